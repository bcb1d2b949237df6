"""The last blocks and the head trained whole, against a plain loop, and what an untied head costs."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Rtn
from thesislib.compress.lora.sequences import sequences
from thesislib.compress.lora.stage import Lora
from thesislib.compress.stage import Shape
from thesislib.compress.training import Training, indices, rate
from thesislib.compress.tune import Tune
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.load import save_checkpoint
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import apply_plan, without_parts
from thesislib.model.layers import adapt, replace
from thesislib.pipeline.forecast import forecast, stand_in
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import compress

SMALL = {
    "length": 64, "batch": 2, "accumulate": 2, "steps": 6, "every": 3, "validation": 4, "checkpoint_every": 2,
    "learning_rate": 1e-2, "autocast": False,
}  # fmt: skip


@pytest.fixture
def subject(tiny):
    return tiny(layers=4)


def logits(model, seed=0):
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def weights(subject):
    return {name: p.detach() for name, p in subject.model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("blocks", "head"), [(2, False), (1, True), (0, True)])
def test_it_is_what_a_plain_loop_trains(tiny, tiny_data, blocks, head, tied):
    subject = tiny(layers=4, tie_word_embeddings=tied)
    config = Tune(blocks=blocks, head=head, weight_decay=0.1, **SMALL | {"validation": 0})
    before = subject.fingerprint
    made, report = config.apply(subject, data=tiny_data)
    train = sequences("wikitext", subject, tiny_data, length=64, validation=0).train
    other = subject.copy()
    learned = {f"model.layers.{b}.{n}": p for b in range(4 - blocks, 4) for n, p in other.blocks[b].named_parameters()}
    if head:
        other.model.lm_head.weight = torch.nn.Parameter(other.model.lm_head.weight.detach().clone())
        learned["lm_head.weight"] = other.model.lm_head.weight
    optimiser = torch.optim.AdamW([p.requires_grad_(True) for p in learned.values()], weight_decay=0.1)
    for step in range(1, 7):
        ids = train.ids[indices(len(train), 0, 4 * step - 4, 4)]
        optimiser.zero_grad()
        other.model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimiser.param_groups[0]["lr"] = rate(step, config)
        optimiser.step()
    found, old = weights(made), weights(subject)
    assert found.keys() == old.keys()
    for name, tensor in found.items():
        if name in learned:
            assert (tensor - learned[name]).norm() < 2e-3 * learned[name].norm(), name
            assert not torch.equal(tensor, old[name])
        elif name != "lm_head.weight" or not tied:
            assert tensor.data_ptr() == old[name].data_ptr(), name  # shared
    assert report["parameters"] == sum(p.numel() for p in learned.values())
    assert report["untied"] == (head and tied) and made.model.config.tie_word_embeddings == (tied and not head)
    assert subject.model.config.tie_word_embeddings == tied and dataclasses.replace(subject).fingerprint == before
    assert not any(p.requires_grad for p in made.model.parameters()) and not made.model.training
    assert json.loads(json.dumps(report)) == report


def test_the_best_loss_is_that_of_the_model_that_comes_out(subject, tiny_data):
    made, report = Tune(blocks=2, head=True, **SMALL | {"steps": 20}).apply(subject, data=tiny_data)
    ids = sequences("wikitext", subject, tiny_data, length=64, validation=4).held_out.ids
    with torch.no_grad():
        assert made.model(ids, labels=ids).loss.item() == pytest.approx(report["best_loss"], rel=1e-4)
        assert subject.model(ids, labels=ids).loss.item() == pytest.approx(report["validation"][0]["loss"], rel=1e-4)
    assert report["best_loss"] < report["validation"][0]["loss"] - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [False, True])
def test_training_that_only_harms_leaves_the_subject(subject, tiny_data, monkeypatch, head, dtype):
    subject.model.to(dtype)
    monkeypatch.setattr("thesislib.compress.training.rate", lambda *_: -1e-2)
    made, report = Tune(blocks=1, head=head, **SMALL).apply(subject, data=tiny_data)
    found = weights(made)
    assert report["best_step"] == 0 and all(torch.equal(found[name], t) for name, t in weights(subject).items())
    assert torch.equal(logits(made.model), logits(subject.model)) and made.dtype == dtype


def test_autocast_changes_little_and_a_dead_run_goes_on(subject, tiny_data, tmp_path, monkeypatch):
    config, step = Tune(blocks=1, head=True, **SMALL | {"autocast": True}), Training.step
    whole, report = config.apply(subject, data=tiny_data)
    plain = dataclasses.replace(config, autocast=False).apply(subject, data=tiny_data)[1]
    assert report["best_loss"] != plain["best_loss"] and report["best_loss"] == pytest.approx(
        plain["best_loss"], rel=0.03
    )

    def dying(self, train, number):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, train, number)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Training, "step", dying)
        config.apply(subject, data=tiny_data, work=tmp_path)
    again, report = config.apply(subject, data=tiny_data, work=tmp_path)
    assert report["resumed_at"] == 2
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(whole).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", True), ("qwen2", False)])
def test_it_reads_back_and_its_size_was_foretold(tiny, tiny_data, tmp_path, kind, tied, dtype):
    folder = save_checkpoint(tiny(kind, layers=5, tie_word_embeddings=tied), tmp_path / "subject")
    half = Width(2, 4, metric="magnitude")
    stages = (
        half,
        Depth(blocks=[3]),
        Tune(blocks=2, head=True, **SMALL),
        half,
        Lora(rank=2, **SMALL),
        Rtn(group=16, linears="down_proj"),
    )
    recipe = Recipe(stages, ("",) * 6)
    foretold = forecast(recipe, stand_in(folder, dtype), lambda n: None)
    assert foretold[2].label == "W2:4+D1+FT2H"
    for n in (3, 4, 6):
        out = compress(folder, Recipe(stages[:n], ("",) * n), tmp_path / str(n), data=tiny_data, dtype=dtype)
        made = load_artifact(out)
        assert foretold[n - 1].parameters == sizes(made)["parameters"], n
        assert foretold[n - 1].disk_bytes == predicted_disk_bytes(made), n
        assert not made.model.config.tie_word_embeddings
    embedding = 32 * made.model.config.vocab_size if tied else 0
    assert foretold[2].parameters - foretold[1].parameters == embedding
    dense = compress(folder, Recipe(stages[2:3], ("",)), tmp_path / "dense", data=tiny_data, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(dense)  # without this package
    torch.testing.assert_close(logits(plain), logits(load_artifact(dense).model))
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)


def test_a_subject_without_some_parts(subject, tiny_data, tmp_path):
    lame = without_parts(subject, {2: "attention", 3: "mlp"})
    made, report = Tune(blocks=2, **SMALL).apply(lame, data=tiny_data, work=tmp_path)
    assert report["best_step"] > 0
    save_artifact(made, tmp_path / "out")


def test_weights_that_cannot_be_trained(subject, tiny_data):
    quantised = Rtn(group=16, linears="blocks.2.*").apply(subject)[0]
    with pytest.raises(BadInput, match="tune trains whole weights, and q_proj of block 2 is packed or quantised"):
        Tune(blocks=2, **SMALL).apply(quantised, data=tiny_data)
    assert Tune(blocks=1, **SMALL).apply(quantised, data=tiny_data)[1]["best_step"] > 0
    corrected = subject.copy()
    replace(corrected.blocks[3], "q_proj", adapt(subject.linears(3)["q_proj"], torch.zeros(2, 32), torch.zeros(32, 2)))
    with pytest.raises(BadInput, match="q_proj of block 3 is corrected: merge the correction first"):
        Tune(blocks=1, **SMALL).apply(corrected, data=tiny_data)
    with pytest.raises(BadInput, match="tune trains block 2, whose weights block 3 has too"):
        Tune(blocks=2, **SMALL).apply(apply_plan(subject, (0, 1, 2, 2)), data=tiny_data)
    low = Rtn(group=16, linears="blocks.0.*", embedding_bits=8).apply(subject)[0]
    with pytest.raises(BadInput, match="tune trains a dense head, and this one is quantised or has a bias"):
        Tune(blocks=1, head=True, **SMALL).apply(low, data=tiny_data)


def test_a_forecast_refuses_what_the_run_would(tiny, tmp_path):
    folder = save_checkpoint(tiny(layers=4), tmp_path / "subject")
    stages = Lora(linears="blocks.3.q_proj"), Tune(blocks=1)
    with pytest.raises(BadInput, match="two: tune trains whole weights, and q_proj of block 3 is corrected"):
        forecast(Recipe(stages, ("one", "two")), stand_in(folder), lambda n: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks is 0: expected at least 1 block to train, or 0 with the head"),
        ({"blocks": -1, "head": True}, "blocks is -1"),
        ({"text": "wikitxt"}, "unknown text of tune 'wikitxt'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        Tune(**settings)


def test_what_may_come_before_and_how_deep():
    assert Tune().after([Depth(remove=2)], Shape(5, {})) == Shape(5, {})
    with pytest.raises(BadInput, match="cannot train the last 3 blocks: the model has 2"):
        Tune().after([], Shape(2, {}))
    with pytest.raises(BadInput, match="FT3 after R would train quantised weights: quantise after it"):
        Tune().after([Rtn()])


def test_labels():
    assert Tune.from_label("FT3H") == Tune(blocks=3, head=True) and Tune.from_label("F16") is None
    assert Label.parse("D2+FT3H").in_words == "2 blocks removed, the last 3 blocks and the head trained on WikiText-2"
    assert Tune(blocks=0, head=True).in_words == "the head trained on WikiText-2"
