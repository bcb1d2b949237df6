"""Training of given parameters against plain loops: whole weights, the head, another loss, kills."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from thesislib.compress.lora.sequences import sequences
from thesislib.compress.lora.stage import Lora
from thesislib.compress.stage import as_entry
from thesislib.compress.trainable import residual, to_bfloat16, with_weights, with_windows
from thesislib.compress.training import HeadLoss, Trained, Training, indices, rate
from thesislib.errors import BadInput
from thesislib.model.blocks import apply_plan

SMALL = {
    "length": 64,
    "batch": 2,
    "accumulate": 2,
    "steps": 6,
    "every": 3,
    "validation": 4,
    "checkpoint_every": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
}


@dataclass(frozen=True)
class Own(Trained):
    """A stage of the tests; it is not registered."""

    word: ClassVar[str] = "own"
    title: ClassVar[str] = "own training"
    label = "O"


CONFIG = Own(**SMALL)


@pytest.fixture
def subject(tiny):
    return tiny(layers=3)


def split_of(subject, data, config=CONFIG):
    return sequences(config.text, subject, data, length=64, validation=config.validation)


def untied(subject):
    """A copy whose head is no longer the embedding, and the parameters of its last block and of its head."""
    made = subject.copy()
    made.model.lm_head.weight = torch.nn.Parameter(made.model.lm_head.weight.detach().clone())
    return made, dict(made.blocks[2].named_parameters()) | {"head": made.model.lm_head.weight}


def squares(subject, some):
    """Another loss, of as many numbers as there are: the squares of what enters the last block."""
    h, _ = residual(subject, some, 2)
    return h.float().square().sum(), h.numel()


def plain_loop(model, learned, config, train, loss):
    """The reference: torch's optimiser on the mean of `loss(model, ids)` over a whole step."""
    for p in learned:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(learned, weight_decay=config.weight_decay)
    each = config.batch * config.accumulate
    for step in range(config.steps):
        optimiser.zero_grad()
        loss(model, train.ids[indices(len(train), config.seed, step * each, each)]).backward()
        torch.nn.utils.clip_grad_norm_(learned, config.clip)
        optimiser.param_groups[0]["lr"] = rate(step + 1, config)
        optimiser.step()


def close(found, expected):
    for name, tensor in expected.items():
        # AdamW divides one rounding error by another where a gradient is next to nothing
        assert (found[name] - tensor).norm() < 2e-3 * tensor.norm(), name


@pytest.mark.parametrize("n", [1, 128, 300])
def test_the_gradient_of_a_head_that_is_trained(n):
    g = torch.Generator().manual_seed(n)
    states, words = torch.randn(n, 16, generator=g), torch.randn(50, 16, generator=g)
    targets = torch.randint(0, 50, (n,), generator=g)
    ours, theirs = ([t.clone().requires_grad_() for t in (states, words)] for _ in range(2))
    (HeadLoss.apply(*ours, targets) / 3).backward()
    (F.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="sum") / 3).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    alone = words.clone().requires_grad_()
    HeadLoss.apply(states, alone, targets, 128, torch.bfloat16).backward()
    assert alone.grad.dtype == torch.float32
    torch.testing.assert_close(alone.grad, 3 * theirs[1].grad, rtol=0.05, atol=0.2)


def test_whole_weights_and_a_head_as_a_plain_loop_trains_them(subject, tiny_data):
    config = dataclasses.replace(CONFIG, validation=0)
    split = split_of(subject, tiny_data, config)
    made, parameters = untied(subject)
    best, report = Training(config, made, parameters, False).run(split)
    other, learned = untied(subject)
    plain_loop(other.model, list(learned.values()), config, split.train, lambda m, ids: m(ids, labels=ids).loss)
    close(best, {name: p.detach() for name, p in learned.items()})
    assert report["parameters"] == sum(p.numel() for p in parameters.values())
    assert (best["head"] - subject.model.lm_head.weight).abs().max() > 0.01
    embedding = made.model.model.embed_tokens.weight
    assert torch.equal(embedding, subject.model.model.embed_tokens.weight)  # it is trained no longer with the head


def test_another_loss_is_trained_and_validated(subject, tiny_data):
    split = split_of(subject, tiny_data)
    made, other = subject.copy(), subject.copy()
    best, report = Training(CONFIG, made, dict(made.blocks[1].named_parameters()), False, squares).run(split)
    learned = list(other.blocks[1].parameters())

    def loss(model, ids):
        return model(ids, output_hidden_states=True).hidden_states[2].square().mean()

    start = loss(subject.model, split.held_out.ids).item()
    plain_loop(other.model, learned, CONFIG, split.train, loss)
    assert report["best_step"] == CONFIG.steps
    close(best, {name: p.detach() for name, p in other.blocks[1].named_parameters()})
    assert report["validation"][0]["loss"] == pytest.approx(start, rel=1e-4)
    with torch.no_grad():
        assert report["best_loss"] == pytest.approx(loss(other.model, split.held_out.ids).item(), rel=1e-3)
    assert report["best_loss"] < start
    assert report["curve"][0]["loss"] == pytest.approx(start, rel=0.2)


@pytest.mark.parametrize("loss", [None, squares])
@pytest.mark.parametrize("dies_at", [2, 5])
def test_a_run_that_died_goes_on_to_the_same_bits(subject, tiny_data, tmp_path, monkeypatch, dies_at, loss):
    split = split_of(subject, tiny_data)

    def run(file):
        made = subject.copy()
        return Training(CONFIG, made, dict(made.blocks[1].named_parameters()), False, loss).run(split, file)

    whole, expected = run(None)
    file = CONFIG.checkpoint(tmp_path, subject, split, False)
    step = Training.step

    def dying(self, train, number):
        if number == dies_at:
            raise KeyboardInterrupt
        return step(self, train, number)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Training, "step", dying)
        run(file)
    torch.rand(100)
    again, report = run(file)
    assert report["resumed_at"] == (dies_at - 1) // 2 * 2
    assert all(torch.equal(again[name], t) for name, t in whole.items())
    assert report["validation"] == expected["validation"] and report["curve"] == expected["curve"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_what_is_trained_in_float32(subject, tiny_data, dtype):
    subject.model.to(dtype)
    losses = {}
    for autocast in (False, True):
        made, parameters = untied(subject)
        training = Training(CONFIG, made, parameters, autocast)
        dtypes = {b: {m.weight.dtype for m in made.linears(b).values()} for b in range(3)}
        low = torch.bfloat16 if autocast else torch.float32
        assert dtypes == {0: {low}, 1: {low}, 2: {torch.float32}} and made.dtype == torch.float32
        best, report = training.run(split_of(subject, tiny_data))
        assert {t.dtype for t in best.values()} == {torch.float32}
        losses[autocast] = report["best_loss"]
    assert losses[True] != losses[False] and losses[True] == pytest.approx(losses[False], rel=0.02)


def test_the_residual_stream_enters_the_norm_untouched(subject, tiny_data):
    some = split_of(subject, tiny_data).held_out
    seen = []
    handle = subject.model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        states = subject.model(some.ids, output_hidden_states=True).hidden_states
        handle.remove()
        for stop in range(3):
            torch.testing.assert_close(residual(subject, some, stop)[0], states[stop])
        torch.testing.assert_close(residual(subject, some, 3)[0], seen[0])
        h, onward = residual(subject, some, 1)
        torch.testing.assert_close(onward(h, list(with_windows(subject))[1:]), seen[0])
    packed = sequences("trivia", subject, tiny_data, length=128, validation=2).held_out
    with torch.no_grad():  # an example as if it were alone
        whole = residual(subject, packed, 3)[0][0]
        first = packed.segments[0] == 0
        alone = dataclasses.replace(packed[0:1], ids=packed.ids[:1, first], targets=packed.targets[:1, first])
        alone = residual(subject, dataclasses.replace(alone, segments=None), 3)[0][0]
        torch.testing.assert_close(whole[first], alone, rtol=1e-4, atol=1e-4)


def test_weights_put_into_blocks_of_their_own(subject):
    repeated = apply_plan(subject, (0, 1, 1, 2))
    new = {name: p.detach() + 1 for name, p in subject.blocks[1].named_parameters()}
    made = with_weights(repeated, {1: new})
    assert made.plan == repeated.plan and made.blocks[2].mlp is not made.blocks[1].mlp
    assert all(torch.equal(p, new[name]) for name, p in made.blocks[1].named_parameters())
    assert made.linears(2)["q_proj"].weight is subject.linears(1)["q_proj"].weight
    assert made.blocks[1].self_attn.config is made.model.config
    to_bfloat16(made.blocks, but=made.blocks[1].parameters())
    assert made.linears(1)["q_proj"].weight.dtype == torch.float32


def test_what_lora_is_recorded_with_is_what_it_was():
    assert as_entry(Lora()) == {
        "lora": {
            "text": "wikitext", "linears": ("q_proj", "k_proj", "v_proj", "o_proj"), "rank": 8, "alpha": 16,
            "dropout": 0.1, "init": "default", "learning_rate": 5e-4, "steps": 100, "batch": 4, "accumulate": 2,
            "length": 512, "warmup": 0.1, "clip": 1.0, "weight_decay": 0.0, "every": 20, "validation": 16,
            "checkpoint_every": 20, "merge": "beside", "autocast": None, "seed": 0,
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "wikitxt"}, "unknown text of own training 'wikitxt': did you mean 'wikitext'"),
        ({"steps": 0}, "steps 0 is too small: expected at least 1"),
        ({"length": 1}, "own training needs sequences of a length of at least 2"),
        ({"validation": -1}, "validation -1"),
        ({"warmup": 1}, r"warmup 1: expected a number in \[0, 1\)"),
        ({"clip": 0}, "clip 0: expected a positive number"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        Own(**settings)
