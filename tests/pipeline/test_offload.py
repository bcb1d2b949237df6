"""Blocks streamed from disk against the same model in memory."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from thesislib.compress.calibration import stream
from thesislib.compress.width import Prune, Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import save_artifact, sizes
from thesislib.formats.artifact_json import read_artifact
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.pipeline.offload import FromFolder, compress_streamed

IDS = torch.randint(0, 250, (4, 16), generator=torch.Generator().manual_seed(1))


def streamed(source, target, config, dtype="float32"):
    target.mkdir()
    blocks = FromFolder(source, target, dtype)
    report = config.stream_weights(blocks, IDS)
    blocks.finish()
    return report


@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_weights_equal_those_pruned_in_memory(tiny, tmp_path, kind, tied):
    subject = tiny(kind, layers=3, tie_word_embeddings=tied)
    save_checkpoint(subject, tmp_path / "dense")
    report = streamed(tmp_path / "dense", tmp_path / "pruned", config := Width(2, 4))
    inside = load_subject(tmp_path / "dense")
    stream(inside, IDS, visitor := Prune(config))
    assert report == visitor.report() and report["removed_weights"] * 2 == report["of_weights"]
    found = load_subject(tmp_path / "pruned")
    for key, tensor in inside.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[key]), key
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")(IDS).logits
    torch.testing.assert_close(logits, inside.model(IDS).logits)


def test_one_block_is_in_memory_at_a_time(tiny, tmp_path):
    save_checkpoint(tiny(layers=3), tmp_path / "dense")
    (tmp_path / "out").mkdir()
    blocks = FromFolder(tmp_path / "dense", tmp_path / "out")
    with blocks.hold(1) as block:
        assert block.mlp.up_proj.weight.dtype == torch.bfloat16 and block.mlp.up_proj.weight.device.type == "cpu"
        assert all(p.is_meta for p in blocks.model.parameters())
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["model-00001.safetensors"]


def test_sharded_checkpoints_are_read(tiny, tmp_path):
    subject = tiny(layers=3)
    subject.model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    subject.tokenizer.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists()
    streamed(tmp_path / "dense", tmp_path / "pruned", Width(1, 8))
    assert load_subject(tmp_path / "pruned").parameters == subject.parameters


def test_damaged_checkpoints(tiny, tmp_path):
    subject = tiny(layers=2)
    save_checkpoint(subject, tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((tmp_path / "dense" / "config.json").read_bytes())
    with pytest.raises(
        BadInput, match="has neither model.safetensors nor .*: expected a checkpoint with safetensors weights"
    ):
        FromFolder(tmp_path / "empty", tmp_path)
    whole = (tmp_path / "dense" / "model.safetensors").read_bytes()
    (tmp_path / "dense" / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read"):
        FromFolder(tmp_path / "dense", tmp_path)
    subject.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    subject.model.save_pretrained(tmp_path / "nan")
    with pytest.raises(BadInput, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"):
        streamed(tmp_path / "nan", tmp_path / "out", Width(1, 8))
    config = json.loads((tmp_path / "nan" / "config.json").read_text())
    (tmp_path / "nan" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with (
        pytest.raises(BadInput, match=r"lacks the weight 'model\.layers\.2"),
        FromFolder(tmp_path / "nan", tmp_path / "out").hold(2),
    ):
        pass


def test_a_streamed_artifact_is_the_one_made_in_memory(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *_: IDS)
    dense = tiny(layers=3, hidden_size=48)
    save_checkpoint(dense, tmp_path / "dense")
    compress_streamed(str(tmp_path / "dense"), "W2:4", tmp_path / "out", data="embedded", dtype="float32")
    record = read_artifact(tmp_path / "out")  # all checksums hold
    pruned, report = Width(2, 4).apply(load_subject(tmp_path / "dense"))
    assert record["fingerprint"] == pruned.fingerprint == load_subject(tmp_path / "out").fingerprint
    assert (
        record["base"]["fingerprint"] == dense.fingerprint
        and record["label"] == "W2:4"
        and record["reports"] == [report]
    )
    expected = sizes(pruned)
    assert {k: record["sizes"][k] for k in expected} == expected


def test_what_cannot_be_streamed(tiny, tmp_path):
    subject = tiny(layers=8)
    save_checkpoint(subject, tmp_path / "dense")
    for recipe in ("D2", "D2+W2:4"):
        with pytest.raises(
            BadInput, match=rf"takes a recipe of one WANDA stage, e.g. W2:4, and this one is {re.escape(recipe)}"
        ):
            compress_streamed(str(tmp_path / "dense"), recipe, tmp_path / "out")
    pruned, _ = Width(2, 4, metric="magnitude").apply(subject)
    save_artifact(pruned, tmp_path / "packed")
    with pytest.raises(BadInput, match="is a packed artifact: weights are streamed from a plain checkpoint"):
        compress_streamed(str(tmp_path / "packed"), "W1:8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
