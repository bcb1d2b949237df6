"""One block for a run of blocks, against plain loops, and where it must be the pruned model."""

import dataclasses
import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from thesislib.compress.depth import angular_distances
from thesislib.compress.gptq import Rtn
from thesislib.compress.lora.sequences import sequences
from thesislib.compress.stage import Shape
from thesislib.compress.streamline import Streamline
from thesislib.compress.training import Training, indices, rate
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.load import save_checkpoint
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import apply_plan, remove, without_parts
from thesislib.model.layers import PackedLinear, adapt, replace
from thesislib.pipeline.forecast import forecast, stand_in
from thesislib.pipeline.label import Label
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import compress
from thesislib.sources.corpus import calibration_windows

SMALL = {
    "length": 64, "batch": 2, "accumulate": 2, "steps": 6, "every": 3, "validation": 4, "checkpoint_every": 2,
    "learning_rate": 1e-2, "autocast": False, "windows": 4,
}  # fmt: skip


@pytest.fixture
def subject(tiny):
    return tiny(layers=5)


def residuals(model, ids):
    """What enters each block and, last, the final norm."""
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in (*model.layers, model.norm)]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def same(a, b):
    a, b = a.model.state_dict(), b.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("first", "removed"), [(1, 2), (2, 2), (0, 4)])  # inside, to the end, all of it
@pytest.mark.parametrize("loss", ["hidden", "tokens"])
def test_it_is_what_a_plain_loop_trains(subject, tiny_data, first, removed, loss):
    config = Streamline(remove=removed, first=first, loss=loss, **SMALL | {"validation": 0})
    before = subject.fingerprint
    made, report = config.apply(subject, data=tiny_data)
    train = sequences("wikitext", subject, tiny_data, length=64, validation=0).train
    student = remove(subject, range(first + 1, first + removed + 1)).copy()
    learned = [p.requires_grad_(True) for p in student.blocks[first].parameters()]
    optimiser = torch.optim.AdamW(learned, weight_decay=1e-3)
    for step in range(1, 7):
        ids = train.ids[indices(len(train), 0, 4 * step - 4, 4)]
        optimiser.zero_grad()
        if loss == "tokens":
            student.model(ids, labels=ids).loss.backward()
        else:
            target = residuals(subject.model.model, ids)[first + removed + 1]
            F.mse_loss(residuals(student.model.model, ids)[first + 1], target).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.param_groups[0]["lr"] = rate(step, config)
        optimiser.step()
    assert made.depth == 5 - removed and made.plan == student.plan
    for (name, p), q in zip(made.blocks[first].named_parameters(), learned, strict=True):
        assert (p - q).norm() < 2e-3 * q.norm(), name
        assert not p.requires_grad and not torch.equal(p, subject.blocks[first].get_parameter(name))
    for b in range(made.depth):
        if b != first:
            assert made.linears(b)["q_proj"].weight is subject.linears(b if b < first else b + removed)["q_proj"].weight
    assert report["first"] == first and report["removed"] == list(range(first + 1, first + removed + 1))
    assert dataclasses.replace(subject).fingerprint == before and not made.model.training
    assert json.loads(json.dumps(report)) == report | {"scores": {}}


def test_the_loss_falls_and_is_that_of_the_model_that_comes_out(subject, tiny_data):
    made, report = Streamline(remove=2, first=1, **SMALL | {"steps": 20}).apply(subject, data=tiny_data)
    ids = sequences("wikitext", subject, tiny_data, length=64, validation=4).held_out.ids
    with torch.no_grad():
        target = residuals(subject.model.model, ids)[4]
        found = [F.mse_loss(residuals(m.model.model, ids)[2], target) for m in (remove(subject, [2, 3]), made)]
    assert report["validation"][0]["loss"] == pytest.approx(found[0].item(), rel=1e-4)
    assert report["best_loss"] == pytest.approx(found[1].item(), rel=1e-4)
    assert found[1] < 0.8 * found[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["hidden", "tokens"])
def test_training_that_only_harms_leaves_the_pruned_model(subject, tiny_data, monkeypatch, loss, dtype):
    subject.model.to(dtype)
    monkeypatch.setattr("thesislib.compress.training.rate", lambda *_: -1e-2)
    made, report = Streamline(remove=2, first=1, loss=loss, **SMALL).apply(subject, data=tiny_data)
    assert report["best_step"] == 0 and same(made, remove(subject, [2, 3]))


def test_blocks_that_do_nothing_are_replaced_without_a_loss(subject, tiny_data):
    for b in (2, 3):
        subject.linears(b)["o_proj"].weight.data.zero_()
        subject.linears(b)["down_proj"].weight.data.zero_()
    made, report = Streamline(remove=2, first=1, **SMALL).apply(subject, data=tiny_data)
    assert report["best_step"] == 0 and report["best_loss"] == 0 and same(made, remove(subject, [2, 3]))


def test_the_run_is_the_one_that_turns_least(subject, tiny_data):
    for b in (2, 3):  # so that the run of three is sought around them
        subject.linears(b)["o_proj"].weight.data *= 0.01
        subject.linears(b)["down_proj"].weight.data *= 0.01
    config = Streamline(remove=2, **SMALL | {"steps": 1})
    _, report = config.apply(subject, data=tiny_data)
    ids = calibration_windows(subject.tokenizer, "wikipedia", tiny_data, 4, 64, 0)
    with torch.no_grad():
        x = torch.stack(residuals(subject.model.model, ids))[:, :, -1].double()
    angle = torch.arccos(F.cosine_similarity(x[:-3], x[3:], dim=-1)).mean(1) / math.pi
    assert list(report["scores"].values()) == pytest.approx(angle.tolist(), abs=1e-6)
    assert report["first"] == int(angle.argmin()) == int(angular_distances(subject, ids)[3, :3].argmin()) in (1, 2)


def test_padding_does_not_count(subject, tiny_data):
    config = Streamline(remove=2, first=1, text="trivia", **SMALL | {"length": 128})
    split = sequences("trivia", subject, tiny_data, length=128, validation=4)
    cut = split.held_out
    assert (cut.segments < 0).any()
    _, report = config.apply(subject, data=tiny_data)
    total = count = 0
    with torch.no_grad():
        for row in range(len(cut)):
            for n in range(int(cut.segments[row].max()) + 1):  # each example alone
                ids = cut.ids[row, cut.segments[row] == n][None]
                y = residuals(remove(subject, [2, 3]).model.model, ids)[2] - residuals(subject.model.model, ids)[4]
                total, count = total + y.square().sum().item(), count + y.numel()
    assert report["validation"][0]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("loss", ["hidden", "tokens"])
def test_autocast_changes_little(subject, tiny_data, loss):
    losses = [
        Streamline(remove=2, first=1, loss=loss, **SMALL | {"autocast": low}).apply(subject, data=tiny_data)[1]
        for low in (False, True)
    ]
    assert losses[0]["best_loss"] != losses[1]["best_loss"]
    assert losses[0]["best_loss"] == pytest.approx(losses[1]["best_loss"], rel=0.03)


def test_a_run_that_died_goes_on_to_the_same_bits(subject, tiny_data, tmp_path, monkeypatch):
    config, step = Streamline(remove=2, **SMALL), Training.step
    whole, _ = config.apply(subject, data=tiny_data)

    def dying(self, train, number):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, train, number)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Training, "step", dying)
        config.apply(subject, data=tiny_data, work=tmp_path)
    again, report = config.apply(subject, data=tiny_data, work=tmp_path)
    assert report["resumed_at"] == 2 and same(again, whole)
    other = dataclasses.replace(config, first=(report["first"] + 1) % 3)
    assert other.apply(subject, data=tiny_data, work=tmp_path)[1]["resumed_at"] == 0


@pytest.mark.parametrize("settings", [{}, {"first": 1}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_stored_as_an_ordinary_checkpoint_whose_size_was_foretold(tiny, tiny_data, tmp_path, settings, dtype):
    folder = save_checkpoint(tiny("qwen2", layers=5), tmp_path / "subject")
    stages = Streamline(remove=3, **settings, **SMALL), Width(2, 4, metric="magnitude")
    recipe = Recipe(stages, ("one", "two"))
    foretold = forecast(recipe, stand_in(folder, dtype), lambda n: None)
    for n in (1, 2):
        out = compress(folder, Recipe(stages[:n], recipe.locations[:n]), tmp_path / str(n), data=tiny_data, dtype=dtype)
        made = load_artifact(out)
        assert foretold[n - 1].parameters == sizes(made)["parameters"]
        assert foretold[n - 1].disk_bytes == predicted_disk_bytes(made)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    assert plain.config.num_hidden_layers == 2 and foretold[1].label == "S3+W2:4"


def test_a_forecast_says_what_only_the_run_can_tell(tiny, tiny_data, tmp_path):
    folder = save_checkpoint(tiny(layers=5), tmp_path / "subject")

    def rows(*stages):
        return forecast(Recipe(stages, ("",) * len(stages)), stand_in(folder), lambda n: None)

    half = Width(2, 4, metric="magnitude")
    assert rows(half, Streamline(remove=2))[1].parameters is None  # which block loses its zeros
    row = rows(half, Streamline(remove=2, first=1))[1]
    recipe = Recipe((half, Streamline(remove=2, first=1, **SMALL)), ("", ""))
    made = load_artifact(compress(folder, recipe, tmp_path / "out", data=tiny_data, dtype="float32"))
    assert row.parameters == sizes(made)["parameters"] and row.disk_bytes == predicted_disk_bytes(made)


def test_a_subject_without_some_attentions(subject, tiny_data, tmp_path):
    lame = without_parts(subject, {1: "attention", 3: "mlp"})
    made, report = Streamline(remove=2, first=1, **SMALL).apply(lame, data=tiny_data, work=tmp_path)
    assert same(Streamline(remove=2, first=1, **SMALL).apply(lame, data=tiny_data, work=tmp_path)[0], made)
    assert report["best_step"] > 0 and "q_proj" not in made.linears(1)
    save_artifact(made, tmp_path / "out")


def packed(subject):
    weight = subject.linears(1)["q_proj"].weight.data
    weight[:, ::2] = 0
    replace(subject.blocks[1], "q_proj", PackedLinear.of(subject.linears(1)["q_proj"], "2:4"))


def quantised(subject):
    replace(subject.blocks[1], "o_proj", Rtn(group=16).apply(subject)[0].linears(1)["o_proj"])


def corrected(subject):
    replace(subject.blocks[1], "q_proj", adapt(subject.linears(1)["q_proj"], torch.zeros(2, 32), torch.zeros(32, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (packed, "trains whole weights, and q_proj of block 1 is packed or quantised"),
        (quantised, "trains whole weights, and o_proj of block 1 is packed or quantised"),
        (corrected, "trains whole weights, and q_proj of block 1 is corrected: merge the correction first"),
    ],
)
def test_weights_that_cannot_be_trained(subject, tiny_data, change, message):
    subject = subject.copy()
    change(subject)
    with pytest.raises(BadInput, match=f"streamline {message}"):
        Streamline(remove=2, first=1, **SMALL).apply(subject, data=tiny_data)
    made, _ = Streamline(remove=2, first=0, **SMALL).apply(subject, data=tiny_data)  # it goes with the run
    assert made.depth == 3


def test_a_block_that_the_plan_repeats(subject, tiny_data):
    with pytest.raises(BadInput, match="streamline trains block 1, whose weights block 2 has too"):
        Streamline(remove=2, first=1, **SMALL).apply(apply_plan(subject, (0, 1, 1, 2)), data=tiny_data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remove": 0}, "remove is 0: a run of one block stays as it is"),
        ({"remove": 1, "loss": "tokns"}, "unknown loss of streamline 'tokns': did you mean 'tokens'"),
        ({"remove": 1, "first": -1}, "first is -1: expected the index of a block"),
        ({"remove": 1, "windows": 0}, "'windows' is 0"),
        ({"remove": 1, "steps": 0}, "steps 0 is too small"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        Streamline(**settings)


def test_what_may_come_before_and_how_deep():
    assert Streamline(remove=2).after([], Shape(5, {})) == Shape(3, {}) and Streamline(remove=2).after([]) is None
    with pytest.raises(BadInput, match="cannot replace 6 blocks by one: the model has 5"):
        Streamline(remove=5).after([], Shape(5, {}))
    with pytest.raises(BadInput, match="a run of 3 blocks from block 3 on .* expected a first block of at most 2"):
        Streamline(remove=2, first=3).after([], Shape(5, {}))
    with pytest.raises(BadInput, match="S2 after R would train quantised weights: quantise after it"):
        Streamline(remove=2).after([Rtn()])


def test_labels():
    assert Streamline.from_label("S4") == Streamline(remove=4) and Streamline.from_label("S") is None
    assert Label.parse("S4+Q").in_words.startswith("5 blocks replaced by one that was trained in their place, ")
