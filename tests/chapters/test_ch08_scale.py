"""Chapter 8's record on scale, on a tiny subject: what is kept is the model without a block, and a killed run goes on;
and what the record says is what was put in."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from thesislib.chapters import ch08_figures_scale as figures
from thesislib.chapters import ch08_scale
from thesislib.chapters.ch08_scale import PLACES, SKIP, WAYS, Scale, read, record
from thesislib.compress.depth import influence
from thesislib.compress.relevance import choices, outcomes
from thesislib.compress.replace import replaced
from thesislib.errors import BadInput
from thesislib.model.blocks import remove
from thesislib.sources.corpus import calibration_windows, join, windows

ITEMS, N, LENGTH = 4, 3, 24


@pytest.fixture
def data(tmp_path, monkeypatch):
    made = join("text", [f"{i} is a number of things, and {i * i} is its square. " * 5 for i in range(12)])
    for module in ("thesislib.sources.corpus", ch08_scale.__name__):
        monkeypatch.setattr(f"{module}.calibration_text", lambda *_: made)
        monkeypatch.setattr(f"{module}.evaluation_text", lambda *_: made)
    letters = "ABCD"
    rows = [
        {
            "id": f"q{i}", "question": f"What is {i}?", "answerKey": letters[i % 4],
            "choices": {"text": [f"thing {i + j}" for j in range(4)], "label": list(letters)},
        }
        for i in range(24)
    ]  # fmt: skip
    folder = tmp_path / "data" / "ai2_arc"
    folder.mkdir(parents=True)
    (folder / "easy_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data"), made


def by_hand(subject, ids, changed=lambda _block, x, y: y):
    """Each window's loss by transformers' own forward pass, with blocks' outputs changed by a function."""
    hooks = [
        block.register_forward_hook(lambda _m, args, out, b=b: changed(b, args[0], out))
        for b, block in enumerate(subject.blocks)
    ]
    with torch.no_grad():
        found = [subject.model(one[None], labels=one[None], use_cache=False).loss.item() for one in ids]
    for hook in hooks:
        hook.remove()
    return found


def test_what_is_kept_is_of_the_model_without_each_block(data, tiny, tmp_path):
    spec, text = data
    subject, file = tiny(layers=4), tmp_path / "s.json"
    record(subject, subject, spec, ITEMS, N, LENGTH, file)
    found = read(file)
    ids = calibration_windows(subject.tokenizer, "wikipedia", spec, N, LENGTH)
    held_out, asked = windows(text, subject.tokenizer, LENGTH, N).ids, choices("arc_easy", spec, ITEMS)
    assert found.depth == 4 and found.made["settings"]["windows"] == N and found.chance == asked.chance
    assert found.scores["cosine"] == pytest.approx(influence(subject, ids), rel=1e-4)

    def check(row, model):
        alone = outcomes(model, asked, ())
        assert row["losses"] == pytest.approx(by_hand(model, held_out), abs=1e-4)
        assert row["correct"] == alone.correct[0].tolist()
        assert row["likelihood"] == pytest.approx(alone.likelihood[0].tolist(), abs=1e-3)

    check(found.whole, subject)
    for b in range(4):
        check(found.ways[SKIP][b], remove(subject, [b]))
        for way, (how, skip) in WAYS.items():
            if b or how == "scalar":
                check(found.ways[way][b], replaced(subject, [b], how, ids, skip=skip)[0])
            else:
                assert found.ways[way][b] is None  # no MLP before it takes the replacement


def test_a_block_is_skipped_at_the_first_token_or_elsewhere(data, tiny, tmp_path):
    subject = tiny(layers=4)
    ids = windows(data[1], subject.tokenizer, LENGTH, N).ids
    for block in range(4):

        def first(b, x, y, block=block):
            return torch.cat([x[:, :1], y[:, 1:]], 1) if b == block else y

        def elsewhere(b, x, y, block=block):
            return torch.cat([y[:, :1], x[:, 1:]], 1) if b == block else y

        for place, changed in zip(PLACES, (first, elsewhere), strict=True):
            found = ch08_scale.losses_skipped(subject, ids, block, place)
            assert found == pytest.approx(by_hand(subject, ids, changed), abs=1e-4)
            assert found != pytest.approx(by_hand(subject, ids), abs=1e-4)
    assert not any(block._forward_hooks for block in subject.blocks)


def test_norms_are_of_the_residual_before_each_block_and_after_the_last(data, tiny):
    subject, states = tiny(layers=3), {}
    ids = windows(data[1], subject.tokenizer, LENGTH, N).ids
    with torch.no_grad():
        hooks = [
            block.register_forward_hook(lambda _m, args, out, b=b: states.update({b: args[0], b + 1: out}))
            for b, block in enumerate(subject.blocks)
        ]
        subject.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    norms = [states[b].norm(dim=-1) for b in range(4)]
    found = ch08_scale.norms(subject, ids)
    assert found["first"] == pytest.approx([x[:, 0].median().item() for x in norms], abs=1e-3)
    assert found["others"] == pytest.approx([x[:, 1:].median().item() for x in norms], abs=1e-3)


def test_a_killed_run_goes_on_and_what_was_begun_otherwise_does_not(data, tiny, tmp_path, monkeypatch):
    subject, whole, killed = tiny(layers=3), tmp_path / "whole.json", tmp_path / "killed.json"
    record(subject, subject, data[0], ITEMS, N, LENGTH, whole)
    asked, made = [], ch08_scale._replaced

    def killed_at_the_fifth(*args):
        asked.append(args[1:3])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return made(*args)

    monkeypatch.setattr(ch08_scale, "_replaced", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        record(subject, subject, data[0], ITEMS, N, LENGTH, killed)
    assert not killed.exists()
    record(subject, subject, data[0], ITEMS, N, LENGTH, killed)
    assert len(asked) == 1 + 3 * len(WAYS)  # only the fifth was asked for again
    one, other = read(whole), read(killed)
    assert replace(one, made={}) == replace(other, made={})
    assert {f.name for f in tmp_path.iterdir()} == {"data", "whole.json", "killed.json"}
    whole.rename(tmp_path / "killed.json.partial")
    record(tiny(layers=3, seed=1), subject, data[0], ITEMS, N, LENGTH, killed)
    assert read(killed).whole != one.whole


def test_a_replacement_may_leave_the_first_token_out(tiny):
    subject, states = tiny(layers=3), {}
    ids = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(3))
    hook = subject.blocks[1].register_forward_hook(lambda _m, args, out: states.update(x=args[0], y=out))
    with torch.no_grad():
        subject.model(ids, use_cache=False)
    hook.remove()
    (x, y) = (states[name][:, 1:].flatten(0, 1).double() for name in "xy")
    smaller, (gap,) = replaced(subject, [1], "bias", ids, skip=1)
    bias = smaller.linears(0)["down_proj"].bias.double()
    assert torch.allclose(bias, (y - x).mean(0), atol=1e-5)
    assert gap["left"] == pytest.approx((((y - x) - (y - x).mean(0)).square().sum() / (y - x).square().sum()).item())
    _, (gap,) = replaced(subject, [1], "scalar", ids, skip=1)
    assert gap["scale"] == pytest.approx((y.norm(dim=1).mean() / x.norm(dim=1).mean()).item())
    with pytest.raises(BadInput, match="skip 12 leaves no token of windows of 12: expected 0 to 11"):
        replaced(subject, [1], "bias", ids, skip=12)


DEPTH, WINDOWS, MANY = 12, 8, 40


@pytest.fixture
def known():
    """A record of 12 blocks: block 5 makes the sink; a bias halves every loss, a scalar changes nothing but noise."""
    rng = np.random.default_rng(0)
    worth = np.linspace(0.05, 1.2, DEPTH)[rng.permutation(DEPTH)]
    worth[5] = 2.0

    def row(loss, right):
        correct = [int(i < right) for i in range(MANY)]
        return {"correct": correct, "likelihood": [-3 - 4 * loss] * MANY, "losses": [3 + loss] * WINDOWS, "left": 1.0}

    skip = [row(w, 30 - int(10 * w)) for w in worth]
    ways = {
        SKIP: skip,
        "scalar": [row(w + 0.01 * (-1) ** b, 30 - int(10 * w)) for b, w in enumerate(worth)],
        "bias": [None, *(row(w / 2, 30 - int(5 * w)) for w in worth[1:])],
        "linear": [None, *(row(w * 1.5, 30 - int(12 * w)) for w in worth[1:])],
        "bias without the first token": [None, *(row(w / 3, 30) for w in worth[1:])],
    }
    # cosine is a poor score, share says all that there is to say, gain nothing
    order = worth.argsort().argsort()
    poor = [float(x) for x in order + rng.normal(0, 4, DEPTH)]
    scores = {"cosine": poor, "gain": rng.random(DEPTH).tolist(), "share": worth.tolist(), "entropy": poor}
    scores |= {"gain, first": [0.5] * DEPTH, "share, first": worth.tolist()}
    first = [50.0] * 6 + [20000.0] * 7
    places = {"first": [[3.0 + (1.5 if b == 5 else 0.01)] * WINDOWS for b in range(DEPTH)]}
    places["elsewhere"] = [[3.0 + 0.02] * WINDOWS for _ in range(DEPTH)]
    return Scale(scores, {"first": first, "others": [60.0] * 13}, row(0, 30), ways, places, 0.25, {})


def test_relevance_is_of_accuracy_above_chance(known):
    found = ch08_scale.relevances(known, SKIP)
    right = [sum(row["correct"]) for row in known.ways[SKIP]]
    assert [e.value for e in found[:-1]] == pytest.approx([1 - max(r - 10, 0) / 20 for r in right])
    assert found[-1].value == pytest.approx(1 - (np.mean(right) - 10) / 20)
    assert all(e.low <= e.value <= e.high for e in found)
    assert ch08_scale.relevances(known, "bias")[0] is None
    near = replace(known, chance=0.74)  # many resamples are at chance
    assert np.isneginf(ch08_scale.relevances(near, "linear")[3].low)
    assert "[no bound, " in ch08_scale.summary(near).loc["linear", "relevance of the mean"]


def test_ways_are_told_apart_by_paired_losses(known):
    for measure, unit in (("text", 1.0), ("answers", 4.0)):
        pairs = ch08_scale.paired(known, measure)
        assert not pairs["scalar"].told and pairs["scalar"].n == 12
        for way, sign in (("bias", -1), ("linear", 1), ("bias without the first token", -1)):
            assert pairs[way].told and pairs[way].n == 11 and np.sign(pairs[way].difference) == sign
        skip = ch08_scale.lost(known, SKIP, measure)[1:]
        assert ch08_scale.lost(known, "bias", measure)[1:] == pytest.approx(skip / 2, abs=1e-9)
        assert pairs["linear"].difference == pytest.approx(np.median(np.add.outer(skip, skip)) / 4, rel=0.2), unit
    assert ch08_scale.perplexities(known, SKIP)[5] == pytest.approx(np.exp(5.0))
    assert ch08_scale.ranked_as_skipped(known, "text", 4)["bias"].spearman.value == pytest.approx(1)
    table = ch08_scale.summary(known)
    assert list(table.index) == [SKIP, *WAYS] and table["blocks"].tolist() == [12, 12, 11, 11, 11]
    assert ch08_scale.by_block(known).loc[0, "perplexity, bias"] == ""


def test_share_says_what_cosine_does_not(known):
    table = ch08_scale.beyond_cosine(known)
    rho = table.loc["all", "text", "share"]
    assert rho["Spearman"] == pytest.approx(1) and rho["given cosine"] == pytest.approx(1) and rho["p"] < 0.01
    assert table.loc["all", "text", "gain"]["p"] > 0.05 and np.isnan(table.loc["all", "text", "cosine"]["p"])


def test_sentences_say_what_the_record_does(known):
    ways, sink, gain = ch08_scale.sentences(known)
    p = ch08_scale.paired(known, "text")["scalar"].p
    assert f"not told apart: scalar (p = {p:.3f})" in ways
    assert "In nats a token of held-out text, against skipping: bias -0.29 (p = 0.004)" in ways
    assert sink.startswith("Block 5 makes the attention sink: the first token's residual goes from 50 to 20,000.")
    assert (
        "when skipped number 1 from the highest" in sink and "is not amplified. More is lost at that one token" in sink
    )
    assert "first token only, perplexity is 90.0; at the other tokens only, 20.5; everywhere, 148.4" in sink
    assert "share at the first token 1.00 for text (p < 0.001)" in gain
    other = replace(
        known,
        places={"first": known.places["elsewhere"], "elsewhere": known.places["first"]},
        scores=known.scores | {"gain, first": [2.0] * DEPTH},
    )
    said = ch08_scale.sentences(other)[1]
    assert "is amplified. More is lost at the other tokens" in said


def test_figures_draw_each_block_and_way(known):
    chart = figures.ways_chart(known).axes[0]
    assert len([line for line in chart.lines if line.get_label() in (SKIP, *WAYS)]) == 5
    left, right = figures.sink_chart(known).axes
    assert len(left.lines[0].get_xdata()) == 13 and len(right.lines[0].get_xdata()) == 12
    assert "5" in [text.get_text() for text in right.texts]
    assert len(figures.gain_chart(known).axes) == 3
