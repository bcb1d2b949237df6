import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.files import inside, sha256_of
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.artifact_json import checksum, read_artifact
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.formats.tensors import packed_tensors
from thesislib.model import packing
from thesislib.model.blocks import apply_plan, remove, without_parts
from thesislib.model.layers import Adapted, PackedLinear, replace
from thesislib.model.packing import THESIS_PATTERNS

IDS = torch.arange(96).view(2, 48)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def masked(subject, pattern="2:4", ratio=None, dtype=torch.float32, back=False):
    """The subject in `dtype` (and `back` in float32), its linears masked."""
    for p in subject.model.parameters():  # not model.to(), which would round the rotary frequencies
        p.data = p.data.to(dtype)
    remove, of = map(int, pattern.split(":"))
    for i in range(subject.depth):
        for module in subject.linears(i).values():
            groups = module.weight.data if ratio else module.weight.data.view(-1, of)
            gone = int(groups.shape[1] * ratio) if ratio else remove
            groups.scatter_(1, groups.abs().topk(gone, 1, largest=False).indices, 0)
    return masked(subject, pattern, ratio) if back else subject


def adapted(subject, ranks=(4,), seed=0):
    """The subject with random corrections on some of its projections, of these ranks in turn."""
    generator, count = torch.Generator().manual_seed(seed), 0
    for i in range(subject.depth):
        for name, module in subject.linears(i).items():
            if name in ("q_proj", "down_proj"):
                rank = ranks[count % len(ranks)]
                A = torch.randn(rank, module.in_features, generator=generator) / 10
                B = torch.randn(module.out_features, rank, generator=generator) / 10
                replace(subject.blocks[i], name, Adapted(module, A, B))
                count += 1
    return subject


def logits(subject):
    with torch.inference_mode():
        return subject.model(IDS).logits


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("pattern", [str(p) for p in THESIS_PATTERNS])
def test_every_pattern_comes_back_and_has_the_size_that_was_predicted(tiny, tmp_path, pattern):
    dense = tiny(layers=2)
    from_config = predicted_disk_bytes(dense, pattern)  # before anything is masked
    subject = masked(dense, pattern)
    folder = save_artifact(subject, tmp_path / "a")
    assert not (folder / "model.safetensors").exists() and set(read_artifact(folder)["encodings"].values()) == {pattern}
    assert from_config == predicted_disk_bytes(subject) == on_disk(folder)
    loaded = load_artifact(folder)
    assert loaded.fingerprint == subject.fingerprint and torch.equal(logits(loaded), logits(subject))


@pytest.mark.parametrize("ratio", (0.25, 0.5, 0.75))
def test_unstructured_zeros_as_bitmaps(tiny, tmp_path, ratio):
    dense = tiny(layers=2)
    from_config = predicted_disk_bytes(dense, ratio)
    subject = masked(dense, ratio=ratio)
    folder = save_artifact(subject, tmp_path / "a")
    assert set(read_artifact(folder)["encodings"].values()) == {"bitmap"} and from_config == on_disk(folder)
    assert load_artifact(folder).fingerprint == subject.fingerprint
    with safe_open(folder / "packed.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert not any(key.startswith("lm_head") for key in file.keys())  # noqa: SIM118  not a dict
        assert file.get_tensor("model.layers.0.self_attn.q_proj.values").numel() == 32 * (32 - int(32 * ratio))


def test_w2_4_in_bfloat16_is_at_most_0_60_of_the_linears_bytes(tiny, tmp_path):
    subject = masked(tiny(layers=2), dtype=torch.bfloat16)
    dense = sum(m.weight.nbytes for i in range(2) for m in subject.linears(i).values())
    tensors = load_file(save_artifact(subject, tmp_path / "a") / "packed.safetensors")
    packed = sum(t.nbytes for key, t in tensors.items() if key.split(".")[-2] in LINEARS)
    assert packed / dense == pytest.approx(35 / 64) and packed / dense <= 0.60


def test_packed_in_memory_or_unpacked_once(tiny, tmp_path):
    subject = masked(tiny(layers=2))
    folder = save_artifact(subject, tmp_path / "a")
    packed, plain = load_artifact(folder), load_artifact(folder, packed=False)
    assert all(type(m) is PackedLinear for i in range(2) for m in packed.linears(i).values())
    assert all(type(m) is nn.Linear for i in range(2) for m in plain.linears(i).values())
    linears = [m.weight for i in range(2) for m in subject.linears(i).values()]
    saved = sum(w.nbytes - packing.predicted_bytes(w.shape, w.dtype, "2:4") for w in linears)
    everything = sum(p.nbytes for p in subject.model.parameters()) + sum(b.nbytes for b in subject.model.buffers())
    count, nonzero = subject.parameters, sum(int((p != 0).sum()) for p in subject.model.parameters())
    assert nonzero <= count - sum(w.numel() // 2 for w in linears)
    assert (
        sizes(subject)
        == sizes(plain)
        == {"parameters": count, "nonzero_parameters": nonzero, "bytes_in_memory": everything}
    )
    assert sizes(packed) == {"parameters": count, "nonzero_parameters": nonzero, "bytes_in_memory": everything - saved}
    assert torch.equal(logits(packed), logits(plain)) and plain.fingerprint == packed.fingerprint == subject.fingerprint
    assert packed.model.lm_head.weight is packed.model.model.embed_tokens.weight
    assert not any(t.is_meta for t in (*packed.model.parameters(), *packed.model.buffers()))


def test_packed_subjects_are_saved_as_they_are(tiny, tmp_path):
    folder = save_artifact(masked(tiny(layers=2)), tmp_path / "a", label="W2:4")
    again = save_artifact(load_artifact(folder), tmp_path / "b", label="W2:4")
    one, two = read_artifact(folder), read_artifact(again)
    assert all(
        one["files"][name] == two["files"][name] for name in ("packed.safetensors", "config.json", "tokenizer.json")
    )
    assert one["sizes"]["bytes_in_memory"] > two["sizes"]["bytes_in_memory"]
    plain = save_artifact(load_artifact(folder), tmp_path / "c", packed=False)
    assert load_artifact(plain).fingerprint == one["fingerprint"]


def test_another_type(tiny, tmp_path):
    subject = masked(tiny(layers=2), dtype=torch.bfloat16)
    folder = save_artifact(subject, tmp_path / "a")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_artifact(folder).model.dtype == torch.bfloat16
    loaded = load_artifact(folder, "float32")
    assert loaded.model.dtype == loaded.linears(0)["q_proj"].weight.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(masked(tiny(layers=2), dtype=torch.bfloat16, back=True)))
    with pytest.raises(BadInput, match="unknown dtype 'float23': did you mean 'float32'"):
        load_artifact(folder, "float23")
    with pytest.raises(BadInput, match="device 'nowhere' cannot be used"):
        load_artifact(folder, device="nowhere")


@pytest.mark.parametrize("model_type", ("qwen2", "qwen3", "mistral", "smollm3"))
@pytest.mark.parametrize("tied", (True, False))
def test_other_architectures(tiny, tmp_path, model_type, tied):
    """qwen2's projections have biases, qwen3 norms of its own; untied heads are weights of their own."""
    subject = masked(tiny(model_type, layers=2, tie_word_embeddings=tied))
    for name, p in subject.model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    folder = save_artifact(subject, tmp_path / "a")
    assert on_disk(folder) == predicted_disk_bytes(subject)
    loaded = load_artifact(folder)
    assert loaded.fingerprint == subject.fingerprint and torch.equal(logits(loaded), logits(subject))
    assert sizes(loaded)["parameters"] == sizes(subject)["parameters"] == subject.parameters


def test_repeated_blocks_are_written_once_and_stay_shared(tiny, tmp_path):
    base = masked(tiny(layers=3))
    subject = apply_plan(base, [0, 1, 1, 2, 1])
    folder = save_artifact(subject, tmp_path / "a")
    assert read_artifact(folder)["repeats"] == {"2": 1, "4": 1} and on_disk(folder) == predicted_disk_bytes(
        subject
    ) == predicted_disk_bytes(base)
    loaded = load_artifact(folder)
    assert (
        loaded.plan == (0, 1, 1, 2, 1)
        and loaded.fingerprint == subject.fingerprint
        and torch.equal(logits(loaded), logits(subject))
    )
    assert loaded.linears(1)["q_proj"] is loaded.linears(4)["q_proj"] and sizes(loaded) == sizes(
        load_artifact(save_artifact(base, tmp_path / "b"))
    )
    dense = save_artifact(apply_plan(tiny(layers=2), [1, 1]), tmp_path / "c")  # nothing to pack, yet less to write
    assert sizes(load_artifact(dense))["parameters"] == sizes(tiny(layers=1))["parameters"]


@pytest.mark.parametrize("mask", (True, False))
@pytest.mark.parametrize("packed", (True, False))
def test_removed_attentions_and_mlps(tiny, tmp_path, mask, packed):
    subject = masked(tiny(layers=4)) if mask else tiny(layers=4)
    subject = without_parts(without_parts(subject, {0: "attention", 2: "mlp", 3: "attention"}), {3: "mlp"})
    folder = save_artifact(subject, tmp_path / "a", packed=packed)
    assert read_artifact(folder)["without"] == {"attention": [0, 3], "mlp": [2, 3]}
    loaded = load_artifact(folder)
    assert loaded.fingerprint == subject.fingerprint and torch.equal(logits(loaded), logits(subject))
    assert [sorted(loaded.linears(i)) for i in range(4)] == [sorted(subject.linears(i)) for i in range(4)]
    assert sizes(loaded)["parameters"] == sizes(subject)["parameters"]
    if packed:
        assert on_disk(folder) == predicted_disk_bytes(subject)
    cached = loaded.model.generate(IDS[:, :8], max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, subject.model.generate(IDS[:, :8], max_new_tokens=6, do_sample=False))


def test_nothing_to_pack_is_a_plain_checkpoint(tiny, tmp_path):
    subject = tiny(layers=2)
    folder = save_artifact(subject, tmp_path / "a")
    assert (
        (folder / "model.safetensors").exists()
        and not (folder / "packed.safetensors").exists()
        and read_artifact(folder)["encodings"] == {}
    )
    assert on_disk(folder) == predicted_disk_bytes(subject)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs(IDS).logits, logits(subject)) and torch.equal(
        logits(load_artifact(folder)), logits(subject)
    )
    assert theirs.config._attn_implementation == load_artifact(folder).model.config._attn_implementation


PLAIN = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "thesislib":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
try:
    import thesislib
except ModuleNotFoundError:
    pass
else:
    sys.exit("thesislib can be imported here")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if any(found.values()):
        sys.exit(f"{folder}: {found}")
    made = model(torch.arange(96).view(2, 48)).logits
    if not torch.equal(made, load_file(sys.argv[1])[folder.rpartition("/")[2]]):
        sys.exit(f"{folder}: other logits")
    AutoTokenizer.from_pretrained(folder)
    print(folder.rpartition("/")[2])
"""


@pytest.mark.processes
def test_plain_checkpoints_load_where_thesislib_is_not(tiny, tmp_path):
    subjects = {
        "masked": masked(tiny(layers=2)),
        "removed": remove(tiny(layers=4), [1, 2]),
        "repeated": apply_plan(masked(tiny(layers=3), "1:8"), [0, 1, 1, 2]),
        "parts": without_parts(tiny(layers=3), {0: "attention", 1: "mlp"}),
        "biases": without_parts(tiny("qwen2", layers=3), {0: "attention", 1: "mlp"}),
    }
    save_file({name: logits(subject).clone() for name, subject in subjects.items()}, tmp_path / "logits.safetensors")
    for name, subject in subjects.items():
        if name == "masked":  # packed in memory, plain on disk
            subject = load_artifact(save_artifact(subject, tmp_path / "packed"))
        save_artifact(subject, tmp_path / name, packed=False)
    command = [sys.executable, "-c", PLAIN, "logits.safetensors", *[str(tmp_path / name) for name in subjects]]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0 and done.stdout.split() == list(subjects), done.stderr


@pytest.mark.parametrize("ranks", ((4,), (2, 3, 3)))
def test_corrections_are_a_peft_adapter(tiny, tmp_path, ranks):
    from peft import PeftModel

    subject = adapted(tiny(layers=12), ranks)  # "layers.1" must not mean "layers.11" too
    folder = save_artifact(subject, tmp_path / "a")
    assert on_disk(folder) == predicted_disk_bytes(subject)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(plain(IDS).logits, logits(subject), atol=0.1)
    theirs = PeftModel.from_pretrained(plain, folder / "adapter")
    torch.testing.assert_close(theirs(IDS).logits, logits(subject), rtol=1e-4, atol=1e-4)
    assert len([m for m in theirs.modules() if hasattr(m, "lora_A")]) == 24
    loaded = load_artifact(folder)
    assert loaded.fingerprint == subject.fingerprint and torch.equal(logits(loaded), logits(subject))
    assert sizes(loaded) == sizes(subject)


def test_corrections_on_packed_weights(tiny, tmp_path):
    base = masked(tiny(layers=2), dtype=torch.bfloat16)
    subject = adapted(copy.deepcopy(base))  # float32 on bfloat16
    folder = save_artifact(subject, tmp_path / "a")
    loaded = load_artifact(folder)
    q = loaded.linears(0)["q_proj"]
    assert type(q) is Adapted and type(q.base) is PackedLinear and q.lora_A.dtype == torch.float32
    assert loaded.fingerprint == subject.fingerprint != base.fingerprint and torch.equal(
        logits(loaded), logits(subject)
    )
    assert type(load_artifact(folder, packed=False).linears(0)["q_proj"].base) is nn.Linear
    assert load_artifact(folder, "float32").linears(0)["q_proj"].lora_A.dtype == torch.float32
    ranks = 4 * sum(
        m.in_features + m.out_features
        for i in range(2)
        for name, m in base.linears(i).items()
        if name in ("q_proj", "down_proj")
    )
    assert sizes(loaded)["parameters"] == sizes(base)["parameters"] + ranks


def test_an_artifact_says_what_it_is(tiny, tmp_path):
    subject = masked(tiny(layers=2))
    stages, reports = [{"width": {"remove": 2, "of": 4}}], [{"removed_weights": 7, "worst": float("inf")}]
    folder = save_artifact(
        subject,
        tmp_path / "a",
        stages=stages,
        reports=reports,
        base={"name": "tiny", "fingerprint": "ab"},
        label="W2:4",
    )
    record = read_artifact(folder)
    assert (record["stages"], record["reports"], record["base"], record["label"]) == (
        stages,
        reports,
        {"name": "tiny", "fingerprint": "ab"},
        "W2:4",
    )
    assert (record["name"], record["fingerprint"], record["dtype"], record["plan"]) == (
        subject.name,
        subject.fingerprint,
        "float32",
        None,
    )
    assert record["sizes"] == {
        **sizes(subject),
        "bytes_on_disk": on_disk(folder),
        "other_bytes_on_disk": record["sizes"]["other_bytes_on_disk"],
    }
    everything = sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "artifact.json"
    )
    assert record["sizes"]["bytes_on_disk"] + record["sizes"]["other_bytes_on_disk"] == everything
    assert record["versions"].keys() >= {"thesislib", "python", "torch", "transformers", "safetensors"}
    assert record["files"].keys() == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {
        "artifact.json"
    }
    assert load_artifact(folder).name == subject.name
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.rglob("*") if path.is_file())


def test_a_flipped_byte_is_found_in_every_file(tiny, tmp_path):
    folder = save_artifact(adapted(masked(tiny(layers=2))), tmp_path / "a")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "artifact.json",
        "packed.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.json",
    }
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 3, len(content) - 10):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(BadInput) as caught:
                load_artifact(folder)
            assert str(path) in str(caught.value), place
        path.write_bytes(content[:-2])
        with pytest.raises(BadInput) as caught:
            load_artifact(folder)
        assert str(path) in str(caught.value)
        path.write_bytes(content)
    load_artifact(folder)
    (folder / "packed.safetensors").unlink()
    with pytest.raises(BadInput, match=r"packed.safetensors is missing: the artifact is not whole"):
        load_artifact(folder)


def test_what_is_no_artifact(tiny, tmp_path):
    with pytest.raises(BadInput, match="is no artifact: expected a folder with artifact.json"):
        load_artifact(tmp_path)
    folder = save_artifact(tiny(layers=1), tmp_path / "a")
    for content, message in (
        ("[1]", "is not thesislib's"),
        ('{"a": 1}', "is not thesislib's"),
        ("{", "cannot be read as JSON"),
    ):
        (folder / "artifact.json").write_text(content)
        with pytest.raises(BadInput, match=message):
            load_artifact(folder)
    (folder / "artifact.json").write_text('{"thesislib_artifact": 2, "all": "is new"}')
    with pytest.raises(
        BadInput, match=r"artifact of format 2: this thesislib .* reads up to format 1; a newer one is needed"
    ):
        load_artifact(folder)


def test_only_artifacts_are_replaced(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(BadInput, match="holds something that is no artifact: expected a new folder"):
        save_artifact(tiny(layers=1), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious"
    folder = save_artifact(masked(tiny(layers=2)), tmp_path / "a")
    replaced = save_artifact(tiny(layers=1), tmp_path / "a")
    assert folder == replaced and load_artifact(folder).depth == 1 and not (folder / "packed.safetensors").exists()


def test_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    folder = save_artifact(tiny(layers=1), tmp_path / "a")
    before = read_artifact(folder)

    def fails(path):
        raise OSError("the machine went away")

    with monkeypatch.context() as patch:
        patch.setattr("thesislib.formats.artifact_json.sha256_of", fails)
        with pytest.raises(OSError):
            save_artifact(masked(tiny(layers=2)), folder)
    assert read_artifact(folder) == before and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_weights_that_are_no_numbers_are_not_written(tiny, tmp_path, bad):
    subject = masked(tiny(layers=2))
    subject.linears(1)["up_proj"].weight.data[3, 3] = bad
    with pytest.raises(
        BadInput,
        match=r"weight 'model.layers.1.mlp.up_proj.values' of tiny llama holds NaN or infinity: nothing was written",
    ):
        save_artifact(subject, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_the_configuration(tiny, tmp_path):
    """Right checksums, wrong contents: what a hand-made artifact could hold."""
    folder = save_artifact(masked(tiny(layers=2)), tmp_path / "a")
    tensors = load_file(folder / "packed.safetensors")

    def forge(changed):
        save_file(changed, folder / "packed.safetensors")
        record = json.loads((folder / "artifact.json").read_text())
        del record["sha256"]
        record["files"]["packed.safetensors"] = sha256_of(folder / "packed.safetensors")
        (folder / "artifact.json").write_text(json.dumps({**record, "sha256": checksum(record)}))

    for key in ("model.norm.weight", "model.layers.1.mlp.up_proj.codes"):
        forge({k: v for k, v in tensors.items() if k != key})
        with pytest.raises(BadInput, match=f"lacks the weight '{key}'"):
            load_artifact(folder)
    for key in ("model.norm.weight", "model.layers.1.mlp.up_proj.codes", "model.layers.1.mlp.up_proj.values"):
        forge({**tensors, key: torch.cat([tensors[key]] * 2)})
        with pytest.raises(BadInput, match=rf"'{key}' has shape .*, expected"):
            load_artifact(folder)
    bitmaps = masked(tiny(layers=2), ratio=0.5)
    folder = save_artifact(bitmaps, tmp_path / "a")
    key, tensors = "model.layers.1.mlp.up_proj.bitmap", load_file(folder / "packed.safetensors")
    forge({**tensors, key: tensors[key] | 1 | 2})
    with pytest.raises(BadInput, match=f"'{key}' names .* places for 1024 values"):
        load_artifact(folder)
    folder = save_artifact(masked(tiny(layers=2)), tmp_path / "a")
    tensors = load_file(folder / "packed.safetensors")
    codes = "model.layers.1.mlp.up_proj.codes"
    forge({**tensors, codes: torch.full_like(tensors[codes], 255)})  # 7 of 6 places
    with pytest.raises(BadInput, match=f"'{codes}' names places that 2:4 does not have"):
        load_artifact(folder)


ROUNDED = [
    Rtn(group=16),
    Rtn(3, group=16, grid="asymmetric"),
    Rtn(5, group=16, grid="asymmetric"),
    Rtn(6, group=16),
    Rtn(7, group=32, grid="minimum"),
    Rtn(8, group="row", embedding_bits=8),
    Rtn(group=32, grid="minimum"),
]


@pytest.mark.parametrize("stage", ROUNDED, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_subjects_come_back_bit_for_bit_and_small(tiny, tmp_path, stage, tied):
    dense = tiny(layers=2, tie_word_embeddings=tied)
    made, _ = stage.apply(dense)
    save_artifact(made, tmp_path / "q")
    again = load_artifact(tmp_path / "q")
    assert again.fingerprint == made.fingerprint != dense.fingerprint
    assert all(type(m).__name__ == "QuantisedLinear" for b in range(2) for m in again.linears(b).values())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, made.model(ids).logits)
        assert torch.equal(load_artifact(tmp_path / "q", packed=False).model(ids).logits, made.model(ids).logits)
    assert predicted_disk_bytes(made) == (tmp_path / "q" / "packed.safetensors").stat().st_size
    assert sizes(again) == sizes(made) and sizes(made)["parameters"] == sizes(dense)["parameters"]
    assert sizes(made)["bytes_in_memory"] < sizes(dense)["bytes_in_memory"]


def test_sparse_and_quantised_is_smaller_than_either(tiny, tmp_path):
    dense = tiny(layers=2, hidden_size=64, intermediate_size=128)
    sparse, _ = Width(2, 4, metric="magnitude").apply(dense)
    both, _ = Rtn(group=32).apply(sparse)
    assert all(m.encoding.endswith("2:4") for b in range(2) for m in both.linears(b).values())
    held = []
    for name, made in (("sparse", sparse), ("quantised", Rtn(group=32).apply(dense)[0]), ("both", both)):
        tensors, _ = packed_tensors(made)
        held.append(sum(t.nbytes for key, t in tensors.items() if "_proj" in key))
        save_artifact(made, tmp_path / name)
    assert held[2] < held[1] < held[0]
    again = load_artifact(tmp_path / "both")
    for b in range(2):
        for name, linear in sparse.linears(b).items():
            assert (again.linears(b)[name].weight[linear.weight == 0] == 0).all()


def test_a_damaged_quantised_artifact_is_refused(tiny, tmp_path):
    made, _ = Rtn(group=16).apply(tiny(layers=1))
    save_artifact(made, tmp_path / "q")
    file = tmp_path / "q" / "packed.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BadInput, match=r"packed\.safetensors is damaged"):
        load_artifact(tmp_path / "q")


# ---------------------------------------------------------------- well signed, and wrong


def sign(folder, edit=lambda record: None, **changes):
    """artifact.json with other fields and a checksum that is right."""
    record = json.loads((folder / "artifact.json").read_text())
    record |= changes
    edit(record)
    record = {key: value for key, value in record.items() if key != "sha256" and value is not ...}
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "artifact.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    return save_artifact(
        masked(tiny(layers=3)), tmp_path_factory.mktemp("artifact") / "a", stages=[{"width": {}}], label="W2:4"
    )


FIELDS = (
    "label",
    "name",
    "plan",
    "stages",
    "reports",
    "base",
    "fingerprint",
    "dtype",
    "sizes",
    "encodings",
    "repeats",
    "without",
    "versions",
    "files",
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_kind_or_missing_is_named(written, tmp_path, field):
    folder = shutil.copytree(written, tmp_path / "a")
    read_artifact(folder)
    for odd in (..., 3, "words", [1], {"a": 1}, {"a": [1]}, [["a"]], True, 1e999, "\ud800", 10**400):
        sign(folder, **{field: odd})
        if (field in ("label", "name") and odd == "words") or (field == "base" and isinstance(odd, dict)):
            read_artifact(folder)
            continue
        with pytest.raises(BadInput, match=rf"artifact\.json .*{field}") as raised:
            load_artifact(folder)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": [0, 1, 10**9]},
        {"plan": [0, -1, 2]},
        {"plan": [0, 1]},
        {"repeats": {"1": 1}},
        {"repeats": {"9": 0}},
        {"repeats": {"-1": 0}},
        {"repeats": {"1": 2}},
        {"without": {"mlp": [3]}},
        {"without": {"mlp": [1, 1]}},
        {"without": {"norm": [1]}},
        {"encodings": {"model.layers.0.mlp.up_proj": "3:2"}},
        {"encodings": {"model.layers.0.mlp.up_proj": "999999999999:9999999999999999"}},
        {"encodings": {"model.layers.0.mlp.up_proj": "nonsense"}},
        {"encodings": {"model.layers.0.mlp.up_proj": "int99 nonsense"}},
        {"dtype": "float16"},
        {"dtype": "save"},
        {"sizes": {"parameters": -1, "nonzero_parameters": 0, "bytes_on_disk": 0, "other_bytes_on_disk": 0}},
        {"fingerprint": "../../x"},
        {"thesislib_artifact": True},
    ],
)
def test_what_is_absurd_is_refused(written, tmp_path, changes):
    folder = shutil.copytree(written, tmp_path / "a")
    sign(folder, **changes)
    with pytest.raises(BadInput, match=next(iter(changes)).replace("encodings", "encoding|up_proj")) as raised:
        load_artifact(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("blocks", [0, -1, 10**9, "three", None, True])
def test_a_configuration_of_no_number_of_blocks_is_refused(written, tmp_path, blocks):
    folder = shutil.copytree(written, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder, lambda record: record["files"].update({"config.json": sha256_of(folder / "config.json")}))
    with pytest.raises(BadInput, match="num_hidden_layers"):
        load_artifact(folder)


@pytest.mark.parametrize("how", ["above", "absolute", "link", "linked folder", "null"])
def test_nothing_outside_the_folder_is_read(written, tmp_path, how):
    folder, other = shutil.copytree(written, tmp_path / "a"), tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "packed.safetensors", other / "more.safetensors")
    name = {"above": "../other/more.safetensors", "absolute": str(other / "more.safetensors"), "null": "a\0.json"}.get(
        how, "more.safetensors"
    )
    if how == "link":
        (folder / name).symlink_to(other / "more.safetensors")
    elif how == "linked folder":
        (folder / "below").symlink_to(other)
        name = "below/more.safetensors"
    sign(folder, lambda record: record["files"].update({name: sha256_of(other / "more.safetensors")}))
    with pytest.raises(BadInput, match="is no file of that folder|is a link that leads out of its folder"):
        load_artifact(folder)


def test_files_that_would_be_read_and_are_not_in_the_list_are_refused(written, tmp_path):
    for name in (
        "chat_template.jinja",
        "added_tokens.json",
        "more.safetensors",
        "adapter/adapter_config.json",
        "additional_chat_templates/tool.jinja",
        "tokenizer.model",
        "merges.txt",
    ):
        folder = shutil.copytree(written, tmp_path / name.replace("/", "_"))
        if name in json.loads((folder / "artifact.json").read_text())["files"]:
            sign(folder, lambda record, name=name: record["files"].pop(name))
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        with pytest.raises(BadInput, match=rf"{name} is not in the list of artifact\.json"):
            load_artifact(folder)
    folder = shutil.copytree(written, tmp_path / "harmless")
    for name in (
        "README.md",
        "LICENSE.txt",
        "licence.json",
        ".gitattributes",
        ".git/config.json",
        ".cache/huggingface/x.json",
        "notes/plot.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    load_artifact(folder)
    (folder / "additional_chat_templates").symlink_to(tmp_path)  # transformers reads what lies there
    with pytest.raises(BadInput, match="additional_chat_templates is not in the list"):
        load_artifact(folder)


def test_an_artifact_in_the_hubs_cache_is_links_to_its_blobs(written, tmp_path):
    snapshot, blobs = tmp_path / "models--me--it" / "snapshots" / ("0" * 40), tmp_path / "models--me--it" / "blobs"
    blobs.mkdir(parents=True)
    for file in (f for f in written.rglob("*") if f.is_file()):
        shutil.copy(file, blobs / sha256_of(file))
        link = snapshot / file.relative_to(written)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / sha256_of(file), link.parent))
    assert load_artifact(snapshot).fingerprint == load_artifact(written).fingerprint
    (snapshot / "deep" / "er").mkdir(parents=True)
    (snapshot / "deep" / "er" / "a").symlink_to("../../../../blobs/" + sha256_of(written / "config.json"))
    assert inside(snapshot, "deep/er/a").is_file() and inside(snapshot / "deep", "er/a").is_file()
    (snapshot / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="leads out"):
        inside(snapshot, "out")
