import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from thesislib.errors import BadInput, shown
from thesislib.formats import convert
from thesislib.formats.checkpoint import SUPPORTED
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.layers import LINEARS

IDS = torch.arange(40)[None] * 7 % 256


def logits(subject):
    return subject.model(IDS, use_cache=False).logits


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return save_checkpoint(tiny(layers=2), tmp_path / "checkpoint")


def edit(checkpoint, change):
    """Change a checkpoint's tensors in place."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_linears_of_a_block(tiny):
    linears = tiny(layers=2).linears(1)
    assert {name: tuple(linear.weight.shape) for name, linear in linears.items()} == {
        "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
        "gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64),
    }  # fmt: skip


def test_tied_and_shared_weights_count_once(tiny):
    def count(layers, vocabularies):
        attention, mlp, norms = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64, 2 * 32
        return layers * (attention + mlp + norms) + 32 + vocabularies * 259 * 32

    assert tiny(layers=3).parameters == count(3, 1)
    assert tiny(layers=3, tie_word_embeddings=False).parameters == count(3, 2)
    shared = tiny(layers=3)
    shared.blocks[2] = shared.blocks[0]
    assert shared.parameters == count(2, 1)
    assert shared.depth == 3


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_supported_type_loads_runs_and_keeps_its_fingerprint(tiny, tmp_path, model_type):
    subject = tiny(model_type)
    again = load_subject(save_checkpoint(subject, tmp_path / "x"))
    assert again.model.config.model_type == model_type
    assert again.depth == 6 and all(tuple(again.linears(i)) == LINEARS for i in range(6))
    assert again.fingerprint == subject.fingerprint
    assert again.parameters == subject.parameters
    assert torch.equal(logits(again), logits(subject))
    assert not again.model.training and not any(p.requires_grad for p in again.model.parameters())


def test_untied_head_is_kept(tiny, tmp_path):
    subject = tiny(layers=2, tie_word_embeddings=False)
    again = load_subject(save_checkpoint(subject, tmp_path / "x"))
    assert again.fingerprint == subject.fingerprint
    assert not torch.equal(again.model.lm_head.weight, again.model.model.embed_tokens.weight)


def test_fingerprint_sees_one_weight_the_type_the_shape_and_the_order(tiny):
    same = tiny().fingerprint
    assert len(same) == 64 and tiny().fingerprint == same
    one = tiny()
    one.linears(5)["down_proj"].weight[31, 63] += 1e-3
    half = tiny()
    half.model.to(torch.bfloat16)
    order = tiny()
    order.blocks[0], order.blocks[1] = order.blocks[1], order.blocks[0]
    shape = tiny()
    gate = shape.linears(0)["gate_proj"]
    gate.weight = torch.nn.Parameter(gate.weight.view(32, 64))
    seed = tiny(seed=1)
    assert len({same, *(s.fingerprint for s in (one, half, order, shape, seed))}) == 6


@pytest.mark.processes
def test_saved_checkpoint_needs_no_thesislib(tiny, tmp_path):
    subject = tiny()
    subject.blocks[4] = subject.blocks[1]  # as a plan that repeats a block shares it
    folder = save_checkpoint(subject, tmp_path / "x")
    script = textwrap.dedent(f"""
        import sys
        sys.modules["thesislib"] = None  # importing it fails, installed or not
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()
        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
        ids = torch.arange(40)[None] * 7 % 256
        text = torch.tensor(tokenizer("Grüße 🚁<|im_end|>")["input_ids"])
        save_file({{"logits": model(ids, use_cache=False).logits.detach(), "text": text}}, "out.safetensors")
    """)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    out = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(out["logits"], logits(subject), atol=1e-6)  # another process may add up in another order
    assert out["text"].tolist() == subject.tokenizer("Grüße 🚁<|im_end|>")["input_ids"]


def test_save_replaces_a_checkpoint_and_refuses_what_is_none(tiny, checkpoint, tmp_path):
    (checkpoint / "stale").touch()
    save_checkpoint(tiny(layers=2, seed=1), checkpoint)
    assert not (checkpoint / "stale").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match="home"):
        save_checkpoint(tiny(layers=2), tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_save_on_a_full_disk(tiny, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    subject = tiny(layers=2)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(subject.model, "save_pretrained", full)
    with pytest.raises(BadInput, match="disk is full"):
        save_checkpoint(subject, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_as_asked(checkpoint):
    subject = load_subject(checkpoint, dtype="bfloat16")
    assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_subject(checkpoint).model.parameters()} == {torch.float32}


def test_missing_pad_token_is_made_up(checkpoint):
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
    assert load_subject(checkpoint).tokenizer.pad_token == "<|im_end|>"


@pytest.mark.parametrize("spec", ["embeded", "no/such/folder", "gone.gguf", "x" * 300])
def test_unknown_spec_lists_what_there_is(spec):
    with pytest.raises(BadInput, match=r"hub:NAME") as raised:
        load_subject(spec)
    assert shown(spec) in one_line(raised) and "'embedded'" in str(raised.value)


def test_folder_without_config(tmp_path):
    with pytest.raises(BadInput, match=r"folder without config\.json") as raised:
        load_subject(tmp_path)
    assert str(tmp_path) in one_line(raised)


def test_unknown_type_and_device(checkpoint):
    with pytest.raises(BadInput, match="did you mean 'float32'"):
        load_subject(checkpoint, dtype="float23")
    with pytest.raises(BadInput, match="device 'abacus'.*'cpu'") as raised:
        load_subject(checkpoint, device="abacus")
    one_line(raised)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test needs absent")
def test_absent_device(checkpoint):
    with pytest.raises(BadInput, match="device 'cuda'.*'cpu'"):
        load_subject(checkpoint, device="cuda")


def test_unsupported_architecture_lists_the_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(BadInput, match="gpt2") as raised:
        load_subject(tmp_path)
    assert all(name in one_line(raised) for name in SUPPORTED)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "llama", "num_attention_heads": "four"}']
)
def test_config_that_makes_no_sense(checkpoint, config):
    (checkpoint / "config.json").write_text(config)
    with pytest.raises(BadInput) as raised:
        load_subject(checkpoint)
    assert str(checkpoint) in one_line(raised)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_that_is_not_finite_is_named(checkpoint, value, dtype):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    edit(checkpoint, change)
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as raised:
        load_subject(checkpoint, dtype=dtype)
    assert "NaN" in one_line(raised)


def test_missing_weight_is_named_not_made_up(checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as raised:
        load_subject(checkpoint)
    one_line(raised)


def test_weight_of_another_shape(checkpoint):
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}))
    with pytest.raises(BadInput) as raised:
        load_subject(checkpoint)
    assert str(checkpoint) in one_line(raised)


def test_truncated_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput) as raised:
        load_subject(checkpoint)
    assert str(checkpoint) in one_line(raised)


def test_weights_as_pickle_are_not_read(checkpoint):
    file = checkpoint / "model.safetensors"
    torch.save(load_file(file), checkpoint / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(BadInput, match="safetensors") as raised:
        load_subject(checkpoint)
    one_line(raised)


def test_missing_tokenizer(checkpoint):
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BadInput) as raised:
        load_subject(checkpoint)
    assert str(checkpoint) in one_line(raised)


def test_loading_says_nothing(checkpoint, capfd):
    load_subject(checkpoint)
    assert capfd.readouterr() == ("", "")


@pytest.mark.embedded
def test_embedded(embedded_subject):
    assert embedded_subject.name == "SmolLM2-135M-Instruct"
    assert embedded_subject.depth == 30
    assert embedded_subject.parameters == 134_515_008
    assert all(tuple(embedded_subject.linears(i)) == LINEARS for i in range(30))
    assert {p.dtype for p in embedded_subject.model.parameters()} == {torch.float32}
    ids = embedded_subject.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert embedded_subject.tokenizer.decode(embedded_subject.model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.embedded
def test_embedded_is_converted_only_once(embedded_subject, monkeypatch):
    monkeypatch.setattr(convert, "convert_gguf", lambda *_: pytest.fail("converted again"))
    again = load_subject("embedded")
    assert again.fingerprint == embedded_subject.fingerprint
