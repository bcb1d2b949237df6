"""LoRA recovery against plain loops, through kills, and with whatever stands in a projection's place."""

import dataclasses
import errno
import json
import math
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from tests.fakes import processes
from thesislib.compress.eora import Eora
from thesislib.compress.lora.sequences import sequences
from thesislib.compress.lora.stage import MERGES, Lora
from thesislib.compress.lora.train import Training
from thesislib.compress.stage import Shape
from thesislib.compress.training import HeadLoss, bfloat16_is_fast, indices, rate, read_checkpoint
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.blocks import apply_plan, remove
from thesislib.model.layers import LINEARS, Adapted, PackedLinear, adapt, replace

SMALL = {
    "length": 64,
    "batch": 2,
    "accumulate": 2,
    "steps": 8,
    "every": 4,
    "validation": 4,
    "checkpoint_every": 2,
    "learning_rate": 1e-2,
    "autocast": False,
}
WORDS = ["alpha", "beta", "gamma", "delta", "of", "the", "and"]


@pytest.fixture(scope="session")
def folder(tiny_data):
    """Training and evaluation text, small."""
    return tiny_data


@pytest.fixture
def subject(tiny):
    return tiny(layers=3)


def logits(subject, seed=0):
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return subject.model(ids, use_cache=False).logits


def adapters(subject):
    return {(b, n): m for b in range(subject.depth) for n, m in subject.linears(b).items() if isinstance(m, Adapted)}


def same_adapters(a, b):
    a, b = adapters(a), adapters(b)
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[p].lora_A, b[p].lora_A) and torch.equal(a[p].lora_B, b[p].lora_B) for p in a)


# ---------------------------------------------------------------- the pieces


@pytest.mark.parametrize("n", [1, 127, 128, 300])
def test_head_loss_is_the_cross_entropy_of_all_logits(n):
    g = torch.Generator().manual_seed(n)
    states, words, targets = (
        torch.randn(n, 16, generator=g),
        torch.randn(50, 16, generator=g),
        torch.randint(0, 50, (n,), generator=g),
    )
    a, b = (states.clone().requires_grad_() for _ in range(2))
    ours, theirs = HeadLoss.apply(a, words, targets), F.cross_entropy(b @ words.T, targets, reduction="sum")
    (ours / 3).backward()
    (theirs / 3).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)


def test_head_loss_in_bfloat16_is_summed_in_float32():
    g = torch.Generator().manual_seed(0)
    states, words = torch.randn(4000, 16, generator=g), torch.randn(50, 16, generator=g)
    targets = torch.randint(0, 50, (4000,), generator=g)
    low = HeadLoss.apply(states, words.bfloat16(), targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, F.cross_entropy(states @ words.T, targets, reduction="sum"), rtol=1e-3, atol=0)


def test_rate_goes_up_a_line_and_down_a_cosine():
    config = Lora(steps=20, warmup=0.2, learning_rate=1.0)
    rates = [rate(step, config) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([(1 + math.cos(math.pi * i / 17)) / 2 for i in range(1, 17)])
    assert 0 < rates[-1] < 0.02
    assert rate(1, Lora(steps=3, warmup=0, learning_rate=1.0)) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_each_epoch_is_a_permutation_and_a_position_says_where_it_stands():
    whole = indices(7, 3, 0, 28)
    assert [sorted(whole[i : i + 7]) for i in range(0, 28, 7)] == [list(range(7))] * 4
    assert len({tuple(whole[i : i + 7]) for i in range(0, 28, 7)}) > 1
    assert indices(7, 3, 0, 5) + indices(7, 3, 5, 23) == whole
    assert indices(7, 4, 0, 28) != whole


def test_bfloat16_is_fast_where_there_are_instructions(monkeypatch):
    for known, fast in (
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert bfloat16_is_fast(torch.device("cpu")) is fast
    assert not bfloat16_is_fast(torch.device("meta"))


# ---------------------------------------------------------------- training


def plain_loop(subject, config, train):
    """The reference: PEFT, transformers' own loss on whole logits, torch's optimiser. Returns {(block, name): (A,
    B)}."""
    model = subject.copy().model
    torch.manual_seed(config.seed)
    peft = get_peft_model(
        model,
        LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.linears)
        ),
    )
    learned = [p for p in peft.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, weight_decay=config.weight_decay)
    peft.train()
    each = config.batch * config.accumulate
    for step in range(config.steps):
        which = indices(len(train), config.seed, step * each, each)
        optimiser.zero_grad()
        for at in range(0, each, config.batch):
            ids = train.ids[which[at : at + config.batch]]
            (peft(input_ids=ids, labels=ids).loss / config.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(learned, config.clip)
        optimiser.param_groups[0]["lr"] = rate(step + 1, config)
        optimiser.step()
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    scale = config.alpha / config.rank
    return {
        (int(n.split(".")[2]), n.split(".")[-1]): (m.lora_A["default"].weight, m.lora_B["default"].weight * scale)
        for n, m in layers.items()
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize(
    "changes",
    [{}, {"linears": "*_proj", "rank": 4, "alpha": 2, "dropout": 0.0, "weight_decay": 0.3, "clip": 0.01, "batch": 4}],
)
def test_training_is_what_a_plain_loop_does(subject, folder, changes):
    config = Lora(**{**SMALL, "validation": 0, **changes})
    before = subject.fingerprint
    trained, report = config.apply(subject, data=folder)
    train = sequences("wikitext", subject, folder, length=64, validation=0).train
    expected = plain_loop(subject, dataclasses.replace(config, linears=LINEARS if changes else config.linears), train)
    found = adapters(trained)
    assert found.keys() == expected.keys() and len(found) == report["adapted"] == 3 * (7 if changes else 4)
    for place, (A, B) in expected.items():
        # dropout masks come from the same generator in the same order, so even they agree; but where a gradient is
        # next to nothing AdamW divides one rounding error by another, so single entries may differ
        for ours, theirs in ((found[place].lora_A, A), (found[place].lora_B, B)):
            assert torch.isclose(ours, theirs, rtol=1e-2, atol=1e-4).float().mean() > 0.98
            assert (ours - theirs).norm() < 0.02 * theirs.norm()
        assert B.abs().max() > 0.02
    fresh = {k: v for k, v in vars(subject).items() if k != "fingerprint"}
    assert type(subject)(**fresh).fingerprint == before
    assert not any(m.training for m in trained.model.modules()) and not any(
        p.requires_grad for p in trained.model.parameters()
    )


def test_loss_falls_and_the_report_says_so(subject, folder):
    _, report = Lora(**{**SMALL, "steps": 20}).apply(subject, data=folder)
    assert [c["step"] for c in report["curve"]] == list(range(1, 21))
    assert [v["step"] for v in report["validation"]] == [0, 4, 8, 12, 16, 20]
    assert report["curve"][-1]["loss"] < report["curve"][0]["loss"] - 1
    assert report["validation"][-1]["loss"] < report["validation"][0]["loss"] - 1
    assert report["curve"][1]["learning_rate"] == pytest.approx(1e-2)
    assert report["tokens"] == 20 * 2 * 2 * 64 and report["tokens_per_second"] == pytest.approx(
        report["tokens"] / report["seconds"], rel=0.05
    )
    assert report["parameters"] == 3 * 8 * sum((32 + out) for out in (32, 16, 16, 32))
    assert json.loads(json.dumps(report)) == report


def test_the_bar_shows_loss_and_tokens_per_second(subject, folder, monkeypatch, tmp_path):
    bars = []

    class Bar(tqdm):
        def __init__(self, **settings):
            super().__init__(**settings | {"disable": False, "file": open(os.devnull, "w")})  # noqa: SIM115
            bars.append(self)

    monkeypatch.setattr("thesislib.compress.training.tqdm", Bar)
    for _ in range(2):
        Lora(**SMALL).apply(subject, data=folder, work=tmp_path)
    assert (bars[0].initial, bars[0].n, bars[0].total) == (0, 8, 8) and bars[1].initial == 8
    assert re.fullmatch(r"loss=\d\.\d{3}, tokens_per_s=\d+", bars[0].postfix)


def test_trivia_learns_answers_and_not_questions(subject, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(HeadLoss, "apply", lambda *a, apply=HeadLoss.apply: seen.append(a[2]) or apply(*a))
    _, report = Lora(text="trivia", **{**SMALL, "length": 128, "steps": 20}).apply(subject, data=folder)
    said = {subject.tokenizer.decode(t) for t in seen}
    assert all(set(text.replace("number ", "").replace("<|im_end|>", "")) <= set("0123456") for text in said)
    assert report["validation"][-1]["loss"] < report["validation"][0]["loss"] / 2
    assert (
        report["source"] == "TriviaQA train, closed book" and report["questions"] + report["held_out_questions"] == 200
    )


def test_how_a_step_is_cut_into_batches_does_not_matter(subject, folder):
    # answers differ in length: a mean of the batches' means would weight them wrongly
    split = sequences("trivia", subject, folder, length=128, validation=2)
    found = []
    for batch, accumulate in ((6, 1), (1, 6), (2, 3)):
        config = Lora(
            text="trivia", **{**SMALL, "length": 128, "batch": batch, "accumulate": accumulate, "dropout": 0.0}
        )
        torch.manual_seed(0)
        training = Training(config, subject, config.shared_keys(subject), False)
        loss, tokens = training.step(split.train, 1)
        found.append((loss, tokens, {key: p.grad.clone() for key, p in training.parameters.items()}))
    for loss, tokens, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5) and tokens == 6 * 128
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][2][key], rtol=1e-3, atol=1e-7)


def test_the_best_adapter_is_kept(subject, folder):
    # a rate at which it learns first and then diverges
    config = Lora(
        **{**SMALL, "steps": 16, "every": 1, "learning_rate": 0.3, "clip": 1e3, "warmup": 0.9, "dropout": 0.0}
    )
    trained, report = config.apply(subject, data=folder)
    losses = {v["step"]: v["loss"] for v in report["validation"]}
    assert report["best_loss"] == min(losses.values()) == losses[report["best_step"]]
    assert 0 < report["best_step"] < 16
    ids = sequences("wikitext", subject, folder, length=64, validation=4).held_out.ids
    with torch.no_grad():  # transformers' own loss of what came back
        assert trained.model(ids, labels=ids).loss.item() == pytest.approx(report["best_loss"], rel=1e-4)


def test_an_adapter_that_only_harms_is_not_kept(subject, folder, monkeypatch):
    monkeypatch.setattr("thesislib.compress.training.rate", lambda *_: -1e-2)  # uphill
    trained, report = Lora(**SMALL).apply(subject, data=folder)
    assert report["best_step"] == 0 and report["validation"][-1]["loss"] > report["best_loss"]
    assert torch.equal(logits(trained), logits(subject))


def test_seeds_differ_and_equal_seeds_agree(subject, folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, _ = Lora(**SMALL).apply(subject, data=folder)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are its own
    torch.manual_seed(6)
    assert same_adapters(first, Lora(**SMALL).apply(subject, data=folder)[0])
    assert not same_adapters(first, Lora(**SMALL, seed=1).apply(subject, data=folder)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_bfloat16_and_trains_in_float32(tiny, folder, dtype):
    subject = tiny(layers=3)
    subject.model.to(dtype)
    high, plain = Lora(**SMALL).apply(subject, data=folder)
    low, report = Lora(**SMALL | {"autocast": True}).apply(subject, data=folder)
    assert report["autocast"] is True and plain["autocast"] is False
    assert low.model.dtype == dtype and all(
        m.lora_A.dtype == m.lora_B.dtype == torch.float32 for m in adapters(low).values()
    )
    assert not same_adapters(low, high)  # it did something
    assert report["best_loss"] == pytest.approx(plain["best_loss"], rel=0.02)


def test_autocast_follows_the_processor(subject, folder, monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr("thesislib.compress.lora.stage.bfloat16_is_fast", lambda _device, fast=fast: fast)
        _, report = Lora(**SMALL | {"autocast": None, "steps": 1, "validation": 0}).apply(subject, data=folder)
        assert report["autocast"] is fast


# ---------------------------------------------------------------- what comes out


def sparse(subject):
    made = subject.copy()
    for b in range(made.depth):
        for module in made.linears(b).values():
            module.weight.data[:, ::4] = 0
    return made


def test_beside_masked_and_dense_are_what_they_are_called(subject, folder):
    subject = sparse(subject)
    made = {way: Lora(**SMALL, merge=way).apply(subject, data=folder) for way in MERGES}
    kept, report = made["beside"]
    assert report["zeros_before"] == report["zeros_after"] == 0.25
    assert made["masked"][1]["zeros_before"] == made["masked"][1]["zeros_after"] == 0.25
    assert made["dense"][1]["zeros_before"] == 0.25 and made["dense"][1]["zeros_after"] == 0
    assert [made[way][1]["merge"] for way in MERGES] == list(MERGES)
    for place, adapted in adapters(kept).items():
        weight = subject.linears(place[0])[place[1]].weight
        assert torch.equal(adapted.weight, weight)
        full = weight + adapted.lora_B @ adapted.lora_A
        masked, dense = (made[way][0].linears(place[0])[place[1]].weight for way in ("masked", "dense"))
        torch.testing.assert_close(dense, full)
        torch.testing.assert_close(masked, torch.where(weight == 0, 0.0, full))
        assert (masked[:, ::4] == 0).all()
    assert not adapters(made["masked"][0]) and not adapters(made["dense"][0])
    torch.testing.assert_close(logits(made["dense"][0]), logits(kept), rtol=1e-3, atol=1e-3)
    assert (logits(made["masked"][0]) - logits(kept)).abs().max() > 0.01
    assert [Lora(merge=way).label for way in MERGES] == ["W", "W-masked", "W-dense"]


def test_the_model_that_comes_out_computes_what_was_trained(subject, folder):
    config = Lora(**SMALL | {"validation": 0})
    torch.manual_seed(config.seed)
    training = Training(config, subject, config.shared_keys(subject), False)
    training.run(sequences("wikitext", subject, folder, length=64, validation=0))
    training.subject.model.eval()
    trained, _ = config.apply(subject, data=folder)
    torch.testing.assert_close(logits(trained), logits(training.subject), rtol=1e-4, atol=1e-4)


def test_chosen_linears_only(subject, folder):
    trained, report = Lora(**SMALL | {"steps": 1, "validation": 0}, linears=["blocks.1.*", "down_proj"]).apply(
        subject, data=folder
    )
    assert set(adapters(trained)) == {(1, n) for n in LINEARS} | {(0, "down_proj"), (2, "down_proj")}
    assert report["adapted"] == 9


def test_a_repeated_block_has_one_adapter(subject, folder):
    repeated = apply_plan(subject, (0, 1, 1, 2))
    trained, report = Lora(**SMALL, linears="*").apply(repeated, data=folder)
    assert report["adapted"] == 21 and len(adapters(trained)) == 28
    for name in LINEARS:
        assert trained.linears(1)[name] is trained.linears(2)[name]
    assert report["best_step"] > 0 and not torch.equal(logits(trained), logits(repeated))
    # its gradient is the sum over both places: a dense merge, evaluated by a plain model, has the loss that was
    # reported
    dense, _ = Lora(**SMALL, linears="*", merge="dense").apply(repeated, data=folder)
    ids = sequences("wikitext", subject, folder, length=64, validation=4).held_out.ids
    with torch.no_grad():
        assert dense.model(ids, labels=ids).loss.item() == pytest.approx(report["best_loss"], rel=1e-4)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_second_adapter_joins_the_first(subject, folder, repeated):
    subject = apply_plan(subject, (0, 1, 1, 2)) if repeated else subject
    first, _ = Lora(**SMALL).apply(subject, data=folder)
    second, report = Lora(**SMALL, rank=3, seed=1, linears=["q_proj", "up_proj"]).apply(first, data=folder)
    assert report["best_step"] > 0
    old, new = adapters(first), adapters(second)
    for (b, name), module in new.items():
        if name == "q_proj":
            assert module.rank == 11
            assert torch.equal(module.lora_A[:8], old[b, name].lora_A) and torch.equal(
                module.lora_B[:, :8], old[b, name].lora_B
            )
        else:
            assert module.rank == (3 if name == "up_proj" else 8)
    # it began where the first had ended
    ids = sequences("wikitext", subject, folder, length=64, validation=4, seed=1).held_out.ids
    with torch.no_grad():
        assert first.model(ids, labels=ids).loss.item() == pytest.approx(report["validation"][0]["loss"], rel=1e-4)
        assert second.model(ids, labels=ids).loss.item() == pytest.approx(report["best_loss"], rel=1e-4)


@pytest.mark.parametrize("repeated", [False, True])
def test_init_eora_trains_the_corrections_that_are_there(subject, folder, repeated):
    g = torch.Generator().manual_seed(0)
    subject = apply_plan(subject, (0, 1, 1, 2)) if repeated else subject
    corrected = subject.copy()
    made = {}
    for b in range(corrected.depth):
        old = corrected.linears(b)["q_proj"]
        made.setdefault(
            id(old), adapt(old, 0.1 * torch.randn(4, 32, generator=g), 0.1 * torch.randn(32, 4, generator=g))
        )
        replace(corrected.blocks[b], "q_proj", made[id(old)])
    config = Lora(**SMALL, init="eora", rank=4, linears="q_proj")
    trained, report = config.apply(corrected, data=folder)
    assert {m.rank for m in adapters(trained).values()} == {4} and report["best_step"] > 0
    ids = sequences("wikitext", subject, folder, length=64, validation=4).held_out.ids
    with torch.no_grad():
        assert corrected.model(ids, labels=ids).loss.item() == pytest.approx(report["validation"][0]["loss"], rel=1e-4)
        assert trained.model(ids, labels=ids).loss.item() == pytest.approx(report["best_loss"], rel=1e-4)
    # the same factors, given by hand to the bare subject
    given = {place: (m.lora_A, m.lora_B) for place, m in adapters(corrected).items()}
    assert same_adapters(trained, config.apply(subject, data=folder, initial=given)[0])
    with pytest.raises(
        BadInput, match="init 'eora' begins with corrections of rank 8: q_proj of block 0 has one of rank 4"
    ):
        Lora(**SMALL, init="eora", linears="q_proj").apply(corrected, data=folder)
    with pytest.raises(BadInput, match="q_proj of block 0 has none"):
        Lora(**SMALL, init="eora", rank=4, linears="q_proj").apply(subject, data=folder)
    with pytest.raises(BadInput, match="init 'default' makes its own factors"):
        Lora(**SMALL).apply(subject, data=folder, initial=given)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_every_init_starts_at_the_subject_itself(subject, folder, init):
    config = Lora(**SMALL, init=init)
    training = Training(config, subject, config.shared_keys(subject), False)
    training.subject.model.eval()
    torch.testing.assert_close(logits(training.subject), logits(subject), rtol=1e-4, atol=1e-4)
    B = next(iter(training.layers.values())).lora_B["default"].weight
    assert (B == 0).all() == (init != "orthogonal")


def test_packed_linears_stay_packed_under_the_adapter(subject, folder):
    half = subject.copy()
    for b in range(half.depth):
        for name, module in half.linears(b).items():
            module.weight.data[:, ::2] = 0
            replace(half.blocks[b], name, PackedLinear.of(module, "2:4"))
    plain, _ = Lora(**SMALL).apply(half.copy(), data=folder)
    trained, _ = Lora(**SMALL).apply(half, data=folder)
    assert same_adapters(plain, trained)
    assert all(isinstance(m.base, PackedLinear) for m in adapters(trained).values())
    torch.testing.assert_close(logits(trained), logits(plain))
    masked, report = Lora(**SMALL, merge="masked").apply(half, data=folder)
    assert report["zeros_after"] == 0.5 and (masked.linears(0)["q_proj"].weight[:, ::2] == 0).all()


def test_a_subject_without_some_attentions(subject, folder):
    trained, report = Lora(**SMALL).apply(remove(subject, [1], "attention"), data=folder)
    assert {b for b, _ in adapters(trained)} == {0, 2} and report["best_step"] > 0


# ---------------------------------------------------------------- kills, full disks, losses that are not finite


def stop_at(monkeypatch, number, error=KeyboardInterrupt):
    """A run that dies in a step, before the adapter changes."""
    whole = Training.step

    def step(self, train, n):
        if n == number:
            raise error
        return whole(self, train, n)

    monkeypatch.setattr(Training, "step", step)


@pytest.mark.parametrize("text", ["wikitext", "trivia"])
@pytest.mark.parametrize("dies_at", [2, 3, 6, 8])
def test_a_run_that_died_goes_on_to_the_same_bits(subject, folder, tmp_path, monkeypatch, dies_at, text):
    config = Lora(text=text, **SMALL | {"length": 128 if text == "trivia" else 64})
    whole, expected = config.apply(subject, data=folder)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at(patched, dies_at)
        config.apply(subject, data=folder, work=tmp_path)
    torch.rand(100)  # another process, other random numbers
    again, report = config.apply(subject, data=folder, work=tmp_path)
    assert report["resumed_at"] == (dies_at - 1) // 2 * 2
    assert same_adapters(again, whole)
    for key in ("curve", "validation", "best_step", "best_loss", "tokens"):
        assert report[key] == expected[key]
    # and once more: it is done
    monkeypatch.setattr(Training, "step", None)
    done, report = config.apply(subject, data=folder, work=tmp_path)
    assert report["resumed_at"] == 8 and same_adapters(done, whole)


def test_a_checkpoint_of_other_work_is_not_taken_up(tiny, folder, tmp_path):
    config, subject = Lora(**SMALL), tiny(layers=3)
    config.apply(subject, data=folder, work=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    for other, whom in (
        (dataclasses.replace(config, seed=1), subject),
        (config, tiny(layers=3, seed=1)),
        (dataclasses.replace(config, rank=4), subject),
    ):
        assert other.apply(whom, data=folder, work=tmp_path)[1]["resumed_at"] == 0
    assert len(list(tmp_path.iterdir())) == 4
    assert dataclasses.replace(config, merge="dense").apply(subject, data=folder, work=tmp_path)[1]["resumed_at"] == 8


def train(source, folder, work, out, threads, settings):
    """In a process of its own: trains, and writes the factors and the step at which it went on."""
    torch.set_num_threads(threads)
    made, report = Lora(**settings).apply(load_subject(source), data=folder, work=work)
    found = {f"{b}.{n}.{ab}": getattr(m, f"lora_{ab}").detach() for (b, n), m in adapters(made).items() for ab in "AB"}
    save_file(found | {"resumed_at": torch.tensor(report["resumed_at"])}, out)


@pytest.mark.processes
def test_killed_at_any_moment_it_ends_with_the_same_bits(subject, folder, tmp_path):
    settings = SMALL | {"steps": 250, "checkpoint_every": 1, "every": 50}
    source, work, out = save_checkpoint(subject, tmp_path / "subject"), tmp_path / "work", tmp_path / "out.safetensors"
    context, r = processes(), random.Random(time.time_ns())

    def start():
        child = context.Process(target=train, args=(source, folder, work, out, torch.get_num_threads(), settings))
        child.start()
        return child

    def newest():
        return max((f.stat().st_mtime_ns for f in work.glob("lora-*")), default=0)

    for _ in range(2):
        seen, child = newest(), start()
        while newest() == seen and child.is_alive():
            time.sleep(0.005)
        time.sleep(r.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "it had ended before it was killed"
    last = start()
    last.join()
    assert last.exitcode == 0
    found = load_file(out)
    assert 0 < found.pop("resumed_at") < 250
    assert [f.name for f in work.iterdir() if f.name.startswith(".")] == []  # nothing half written is left
    whole, _ = Lora(**settings).apply(load_subject(source), data=folder)
    expected = {f"{b}.{n}.{ab}": getattr(m, f"lora_{ab}") for (b, n), m in adapters(whole).items() for ab in "AB"}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint(subject, folder, tmp_path, monkeypatch):
    config = Lora(**SMALL)
    whole, _ = config.apply(subject, data=folder)
    real, writes = Path.write_bytes, []

    def full(path, content):
        writes.append(len(content))
        real(path, content[: len(content) // 2 if len(writes) == 3 else None])
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(
            BadInput,
            match=rf"the disk is full at {tmp_path}: .*; the training is at step 6: the last good checkpoint, of step "
            r"4, is kept in",
        ):
            config.apply(subject, data=folder, work=tmp_path)
    (file,) = tmp_path.iterdir()
    assert read_checkpoint(file)[0]["step"] == 4
    again, report = config.apply(subject, data=folder, work=tmp_path)
    assert report["resumed_at"] == 4 and same_adapters(again, whole)


@pytest.mark.parametrize(
    "damage", ["cut", "a byte of a tensor", "a digit of the state", "of an earlier version", "a folder", "a pipe"]
)
def test_a_damaged_checkpoint_is_said_and_the_training_begins_again(subject, folder, tmp_path, capsys, damage):
    config = Lora(**SMALL)
    whole, _ = config.apply(subject, data=folder, work=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:1000])
    elif damage == "a byte of a tensor":
        file.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    elif damage == "a digit of the state":
        at = content.index(b"tokens") + content[content.index(b"tokens") :].index(b"1")
        file.write_bytes(content[:at] + b"2" + content[at + 1 :])
    elif damage == "of an earlier version":
        file.write_bytes(content.replace(b'"sha256"', b'"sha255"'))
    else:
        file.unlink()
        file.mkdir() if damage == "a folder" else os.mkfifo(file)
    again, report = config.apply(subject, data=folder, work=tmp_path)
    assert report["resumed_at"] == 0 and same_adapters(again, whole)
    why = "no file" if damage in ("a folder", "a pipe") else "damaged: "
    assert (
        f"the checkpoint {file} cannot be used (it is {why}" in (said := capsys.readouterr().err)
        and "the training begins again" in said
    )
    assert config.apply(subject, data=folder, work=tmp_path)[1]["resumed_at"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_it(subject, folder, tmp_path, monkeypatch, value):
    whole, calls = Training.nats, []

    def nats(self, some):
        calls.append(torch.is_grad_enabled())
        return whole(self, some) * (value if sum(calls) == 9 else 1)  # the first batch of step 5

    monkeypatch.setattr(Training, "nats", nats)
    with pytest.raises(
        BadInput,
        match=rf"loss is {value} at step 5: training stopped.*; the last good checkpoint, of step 4, is kept in "
        rf"{tmp_path}",
    ):
        Lora(**SMALL).apply(subject, data=folder, work=tmp_path)
    (file,) = tmp_path.iterdir()
    state, tensors = read_checkpoint(file)
    assert state["step"] == 4 and all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    calls.clear()
    with pytest.raises(BadInput, match=rf"loss is {value} at step 5.*; no checkpoint had been written"):
        Lora(**SMALL).apply(subject, data=folder)


def test_a_gradient_that_is_not_finite_stops_it(subject, folder, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(BadInput, match="gradient is inf at step 1"):
        Lora(**SMALL).apply(subject, data=folder)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "wikitxt"}, "unknown text of LoRA 'wikitxt': did you mean 'wikitext'"),
        ({"init": "random"}, "unknown init of LoRA 'random'"),
        ({"merge": "mask"}, "unknown merge of LoRA 'mask': did you mean 'masked'"),
        ({"linears": "q_prj"}, "'q_prj': did you mean 'q_proj'"),
        ({"linears": []}, "some linears"),
        ({"rank": 0}, "rank 0 is too small"),
        ({"steps": 0}, "steps 0 is too small"),
        ({"checkpoint_every": 0}, "checkpoint_every 0 is too small"),
        ({"length": 1}, "a length of at least 2"),
        ({"dropout": 1.0}, r"dropout 1.0: expected a number in \[0, 1\)"),
        ({"warmup": -0.1}, "warmup -0.1"),
        ({"learning_rate": 0}, "learning_rate 0: expected a positive number"),
        ({"alpha": math.nan}, "alpha nan: expected a positive number"),
        ({"init": "orthogonal", "rank": 3}, "rank 3 is odd"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(BadInput, match=message):
        Lora(**settings)


def test_a_rank_larger_than_the_layer(subject, folder):
    with pytest.raises(
        BadInput, match=r"rank 17 is larger than k_proj of block 0, of shape \(16, 32\): expected at most 16"
    ):
        Lora(**SMALL, rank=17).apply(subject, data=folder)
    Lora(rank=17, linears="q_proj").shared_keys(subject)


def test_a_projection_that_this_subject_lacks(subject, folder):
    with pytest.raises(
        BadInput,
        match=r"no projection of tiny llama fits 'blocks\.3\.\*': it has q_proj, .*, down_proj in blocks 0 to 2",
    ):
        Lora(**SMALL, linears=["q_proj", "blocks.3.*"]).apply(subject, data=folder)


def test_labels_there_and_back():
    for text, letter in (("wikitext", "W"), ("trivia", "T")):
        for way in MERGES:
            config = Lora(text=text, merge=way)
            assert config.label.startswith(letter) and Lora.from_label(config.label) == config
    assert Lora.from_label("W1:8") is None and Lora.from_label("D2") is None


def test_what_may_come_before():
    shape = Shape(2, {"q_proj": 32, "up_proj": 32})
    Lora().after([], shape)
    Lora(init="eora").after([Width(1, 8), Eora()], shape)
    Lora(init="eora").after([Lora()], None)
    for before in ([], [Width(1, 8)], [Lora(merge="dense")]):
        with pytest.raises(BadInput, match="init 'eora' trains the corrections that an EoRA stage made"):
            Lora(init="eora").after(before, shape)
    with pytest.raises(BadInput, match="rank 33 is larger than q_proj, which has 32 inputs"):
        Lora(rank=33).after([], shape)


@pytest.mark.embedded
def test_one_step_on_the_real_thing(embedded_subject):
    config = Lora(text="trivia", linears="blocks.29.*", steps=1, batch=1, accumulate=1, validation=1, length=256)
    trained, report = config.apply(embedded_subject)
    assert report["source"].startswith("NQ-open") and report["adapted"] == 7
    assert 0 < report["validation"][0]["loss"] < 12
    assert len(adapters(trained)) == 7
