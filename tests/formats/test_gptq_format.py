"""The GPTQ checkpoint layout against a reader of a few loops, and, where GPTQModel is installed, against GPTQModel."""

import importlib.util
import json
import stat

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.gptq import export_gptq, words
from thesislib.model.layers import LINEARS


def bits_of(word):
    """The 32 bits of an int32, lowest first."""
    return [word >> i & 1 for i in range(32)]


def codes_of(column, bits):
    """The codes in a list of int32 words."""
    string = [b for word in column for b in bits_of(word)]
    return [sum(b << k for k, b in enumerate(string[at : at + bits])) for at in range(0, len(string), bits)]


def read_linear(tensors, path, config):
    """(outputs, inputs) weight of a linear, by the layout's own words: scale * (code - zero), group by group."""
    part = {name: tensors[f"{path}.{name}"].tolist() for name in ("qweight", "qzeros", "scales", "g_idx")}
    bits, less = config["bits"], int(config["checkpoint_format"] == "gptq")
    codes = [codes_of(column, bits) for column in zip(*part["qweight"], strict=True)]  # by output
    zeros = [[zero + less for zero in codes_of(row, bits)] for row in part["qzeros"]]  # by group
    return torch.tensor(
        [
            [part["scales"][g][o] * (codes[o][i] - zeros[g][o]) for i, g in enumerate(part["g_idx"])]
            for o in range(len(codes))
        ]
    )


SHAPE = {"layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
SMALL = {"windows": 2, "length": 16, "text": "wikipedia"}


@pytest.fixture
def subject(tiny):
    return tiny(**SHAPE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, "row"])
def test_every_weight_is_where_the_layout_has_it(subject, tmp_path, bits, grid, group):
    made, _ = Rtn(bits=bits, group=group, grid=grid).apply(subject)
    folder = export_gptq(made, tmp_path / "out")
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text())["quantization_config"],
    )
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (
        bits,
        -1 if group == "row" else 32,
        grid == "symmetric",
        False,
    )
    for i in range(2):
        for name, linear in made.linears(i).items():
            path = f"model.layers.{i}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}"
            assert torch.equal(read_linear(tensors, path, config), linear.weight)
            assert f"{path}.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], made.model.model.embed_tokens.weight)


def test_a_zero_of_0_is_kept(subject, tmp_path):
    for linear in subject.linears(0).values():
        linear.weight.data.abs_()  # nothing below 0: the lowest level is 0
    made, _ = Rtn(bits=4, group=32, grid="asymmetric").apply(subject)
    folder = export_gptq(made, tmp_path / "out")
    config, tensors = (
        json.loads((folder / "config.json").read_text())["quantization_config"],
        load_file(folder / "model.safetensors"),
    )
    assert config["checkpoint_format"] == "gptq_v2" and not tensors["model.layers.0.mlp.up_proj.qzeros"].any()
    assert torch.equal(read_linear(tensors, "model.layers.0.mlp.up_proj", config), made.linears(0)["up_proj"].weight)


def test_act_order_masks_and_corrections(subject, tiny_data, tmp_path):
    sparse, _ = Width(remove=2, of=4, metric="magnitude").apply(subject)
    made, _ = Gptq(bits=4, group=32, act_order="index", **SMALL).apply(sparse, data=tiny_data)
    whole, _ = Eora(rank=4, **SMALL).apply(made, data=tiny_data, original=subject)
    folder = export_gptq(whole, tmp_path / "out")
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text())["quantization_config"],
    )
    assert config["desc_act"]
    path = "model.layers.1.mlp.down_proj"
    weight = read_linear(tensors, path, config)
    assert torch.equal(weight, made.linears(1)["down_proj"].weight) and ((weight == 0).float().mean() >= 0.5)
    assert sorted(tensors[f"{path}.g_idx"].tolist()) != tensors[f"{path}.g_idx"].tolist()
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and len(adapter["target_modules"]) == 14
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.rglob("*") if f.is_file()} == {0o644}


def test_the_order_of_groups_leaves_them_where_they_lie(subject, tiny_data, tmp_path):
    made, _ = Gptq(bits=4, group=32, act_order="groups", **SMALL).apply(subject, data=tiny_data)
    folder, path = export_gptq(made, tmp_path / "out"), "model.layers.1.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert not config["desc_act"] and tensors[f"{path}.g_idx"].tolist() == [i // 32 for i in range(96)]
    assert torch.equal(read_linear(tensors, path, config), made.linears(1)["down_proj"].weight)
    assert "index" not in made.linears(1)["down_proj"].stored
    again = load_artifact(save_artifact(made, tmp_path / "artifact"))
    assert again.fingerprint == made.fingerprint


def test_words_are_strings_of_bits():
    codes = torch.arange(64).view(2, 32).remainder(8).to(torch.uint8)
    packed = words(codes, 3)
    assert packed.shape == (2, 3) and packed.dtype == torch.int32
    assert [codes_of(row, 3) for row in packed.tolist()] == codes.tolist()


def test_what_the_layout_cannot_hold(tiny, subject, tmp_path):
    out, occupied = tmp_path / "out", tmp_path / "occupied"
    with pytest.raises(BadInput, match="q_proj is not quantised .14 of 14"):
        export_gptq(subject, out)
    with pytest.raises(BadInput, match="is not quantised .12 of 14"):
        export_gptq(Rtn(linears="v_proj", group=32).apply(subject)[0], out)
    with pytest.raises(BadInput, match="'minimum' cannot be held"):
        export_gptq(Rtn(grid="minimum", group=32).apply(subject)[0], out)
    for bits in (5, 6, 7):
        with pytest.raises(BadInput, match=f"{bits} bits cannot be held: GPTQ's loaders share a layout for 2, 3, 4, 8"):
            export_gptq(Rtn(bits=bits, group=32).apply(subject)[0], out)
    with pytest.raises(BadInput, match="group 8 is none that GPTQ's loaders know: here 16, 32 or 'row' would be"):
        export_gptq(Rtn(group=8).apply(subject)[0], out)
    with pytest.raises(BadInput, match=r"k_proj of shape \(16, 32\) cannot be held: .* multiples of 32"):
        export_gptq(Rtn(group=16).apply(tiny(layers=1))[0], out)
    occupied.mkdir()
    (occupied / "mine").touch()
    with pytest.raises(BadInput, match="holds something"):
        export_gptq(Rtn(group=32).apply(subject)[0], occupied)
    assert not out.exists()


def tiny_in_bfloat16(subject):
    result = subject.copy()
    result.model.to(torch.bfloat16)
    return result


def test_on_the_command_line(subject, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_artifact(Rtn(group=32).apply(subject)[0], tmp_path / "small")
    done = CliRunner().invoke(app, ["export", "small", "--gptq"])
    assert done.exit_code == 0 and (tmp_path / "small-gptq" / "model.safetensors").is_file(), done.output
    save_artifact(Rtn(group=32).apply(tiny_in_bfloat16(subject))[0], tmp_path / "half")
    assert CliRunner().invoke(app, ["export", "half", "--gptq"]).exit_code == 0
    assert load_file(tmp_path / "half-gptq" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.bfloat16
    again = CliRunner().invoke(app, ["export", "small", "--gptq"])
    assert again.exit_code == 2 and "holds something" in again.stderr
    assert CliRunner().invoke(app, ["export", "small"]).exit_code == 2


@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None,
    reason="GPTQModel is not installed: pip install -e '.[gptqmodel]' in an environment of its own",
)
@pytest.mark.parametrize(
    ("bits", "grid"), [(4, "symmetric"), (4, "asymmetric"), (3, "symmetric"), (8, "symmetric"), (2, "symmetric")]
)
def test_gptqmodel_computes_the_same(tiny, tmp_path, bits, grid):
    from gptqmodel import BACKEND, GPTQModel

    subject = tiny(
        layers=2,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=512,
    )
    made, _ = Rtn(bits=bits, group=32, grid=grid).apply(subject)
    folder = export_gptq(made, tmp_path / "out")
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        ours = made.model(ids).logits
        loaded = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH)
        theirs = loaded.model(ids).logits
        halved = made.model.to(theirs.dtype)(
            ids
        ).logits.float()  # it computes in half precision: as far off as ours do there
    assert theirs.dtype in (torch.bfloat16, torch.float16)
    assert float((theirs.float() - ours).abs().mean()) < 1.5 * float((halved - ours).abs().mean())
