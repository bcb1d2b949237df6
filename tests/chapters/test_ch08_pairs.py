"""Chapter 8's search over pairs: losses are recorded though the run is killed, searches find what a look at every set
finds, and sentences say what was put in."""

import itertools
import math

import numpy as np
import pytest
import torch

from thesislib.chapters import ch08_figures_pairs as figures
from thesislib.chapters import ch08_pairs as pairs
from thesislib.chapters.ch08_pairs import Losses
from thesislib.compress.depth import angular_distances, influence, taylor
from thesislib.model.blocks import remove
from thesislib.model.forward import final_states, token_losses
from thesislib.sources.corpus import calibration_windows, join


@pytest.fixture
def text(monkeypatch):
    made = join("text", [f"{i} is a number of things, and {i * i} is its square. " * 5 for i in range(12)])
    monkeypatch.setattr("thesislib.sources.corpus.calibration_text", lambda *_: made)
    monkeypatch.setattr(pairs, "calibration_text", lambda *_: made)
    monkeypatch.setattr(pairs, "TRIPLES", 3)
    monkeypatch.setattr(pairs, "AGAIN", 2)
    return made


def test_every_set_is_measured_and_a_killed_run_goes_on(text, tiny, tmp_path, monkeypatch):
    subject, whole, killed = tiny(layers=5), tmp_path / "whole.json", tmp_path / "killed.json"
    pairs.record(subject, "embedded", 3, 32, whole)
    asked, sets_losses = [], pairs.sets_losses

    def killed_at_the_fifth(subject, ids, sets):
        asked.append(len(sets))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return sets_losses(subject, ids, sets)

    monkeypatch.setattr(pairs, "sets_losses", killed_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        pairs.record(subject, "embedded", 3, 32, killed)
    assert not killed.exists() and asked == [1, 5, 4, 3, 2]  # none, single blocks, pairs by their first block
    pairs.record(subject, "embedded", 3, 32, killed)
    assert asked[5:7] == [2, 1] and {f.name for f in tmp_path.iterdir()} == {"whole.json", "killed.json"}
    found, again = pairs.read(whole), pairs.read(killed)
    assert found.searched == again.searched and found.others == again.others and found.depth == 5
    assert {*pairs.up_to_pairs(5), *(sets[3] for sets in found.chosen.values())} <= {*found.searched}
    assert found.chosen == again.chosen and {*found.others} >= {(), *(sets[2] for sets in found.chosen.values())}
    cheapest = sorted(itertools.combinations(range(5), 2), key=lambda s: np.mean(found.searched[s]))[:2]
    assert {*cheapest} <= {*found.others}
    assert found.made["settings"] == {
        "text": "wikipedia", "text_sha256": text.sha256, "data": "embedded", "windows": 3, "length": 32, "seed": 0,
    }  # fmt: skip
    ids = calibration_windows(subject.tokenizer, "wikipedia", "embedded", 6, 32)
    for losses, some in ((found.searched, ids[:3]), (found.others, ids[3:])):
        for blocks, nats in losses.items():
            model = remove(subject, blocks).model if blocks else subject.model
            ((_, h),) = final_states(model, some)
            alone = token_losses(model, h[:, :-1].flatten(0, 1), some[:, 1:].reshape(-1)).view(3, -1).mean(1)
            assert nats == pytest.approx(alone.tolist(), abs=2e-5)


def test_what_was_begun_with_another_model_is_not_gone_on_with(text, tiny, tmp_path):
    file = tmp_path / "p.json"
    for other in (tiny(layers=4, seed=1), tiny(layers=4)):
        pairs.record(other, "embedded", 2, 32, file)
        file.rename(tmp_path / "p.json.partial")
    pairs.record(other, "embedded", 2, 32, file)
    assert pairs.read(file).made["fingerprint"] == other.fingerprint


# seven blocks, of which 4 may go by chapter 2's rule; damages add up but for what two blocks do for each other
DAMAGE = np.array([5, 0.9, 0.3, 0.2, 0.25, 0.8, 2])
BOTH = {(2, 3): 0.4, (2, 4): -0.2}
CHOSEN = {"one-shot by cosine": {2: (1, 2), 3: (1, 2, 3)}, "last blocks": {2: (5, 6), 3: (4, 5, 6)}}


def known(noise=0.0, windows=6):
    """Losses of all sets of up to three blocks: 3 nats and the damages."""
    rng = np.random.default_rng(0)
    samples = []
    for sizes in (range(4), range(3)):
        sets = [s for size in sizes for s in itertools.combinations(range(7), size)]
        nats = {s: 3 + DAMAGE[[*s]].sum() + sum(x for p, x in BOTH.items() if {*p} <= {*s}) for s in sets}
        samples.append({s: (x + noise * rng.standard_normal(windows)).tolist() for s, x in nats.items()})
    return Losses(*samples, CHOSEN, {"settings": {"windows": windows, "length": 512}})


@pytest.mark.parametrize("k", [2, 3])
def test_searches_find_what_a_look_at_every_set_finds(k):
    record = known(0.1)
    mean = {s: np.mean(nats) for s, nats in record.searched.items()}
    every = sorted((s for s in mean if len(s) == k), key=mean.get)
    greedy = ()
    for _ in range(k):
        more = [tuple(sorted((*greedy, b))) for b in range(7) if b not in greedy]
        greedy = min(more, key=mean.get)
    singles = tuple(sorted(sorted(range(7), key=lambda b: mean[b,])[:k]))
    found = pairs.found(record, k, {"elsewhere": tuple(range(k))})
    wanted = {"best": every[0], "greedy": greedy, "one-shot": singles, "elsewhere": tuple(range(k))}
    wanted |= {name: sets[k] for name, sets in CHOSEN.items()}
    assert {name: f.blocks for name, f in found.items()} == wanted
    for f in found.values():
        assert f.regret.value == pytest.approx(mean[f.blocks] - mean[every[0]])
        assert f.rank.value == 1 + every.index(f.blocks) and f.of == len(every) == math.comb(7, k)
    table = pairs.search_table(record, k)
    assert table.loc["greedy", "perplexity"] == f"{np.exp(mean[greedy]):,.4g}"
    assert f"rank of all {math.comb(7, k)}" in table.columns
    assert ("on other windows" in table.columns) == (k == 2)


def test_triples_are_the_cheapest_by_pairs_and_those_that_greedy_meets():
    found = pairs.triples(known(), 2)
    # 0.2 + 0.25 + 0.3 + 0.4 - 0.2 = 0.95, then 1.15 of blocks 2, 4 and 5; greedy goes on from the pair 3, 4
    mean = {s: np.mean(nats) for s, nats in known().searched.items() if len(s) == 3}
    assert {*sorted(mean, key=mean.get)[:2]} == {(2, 3, 4), (2, 4, 5)}
    first = 3  # the cheapest block; beside it 4
    assert found == {(2, 3, 4), (2, 4, 5)} | {tuple(sorted((first, 4, b))) for b in (0, 1, 2, 5, 6)} | {
        (1, 2, 3),
        (4, 5, 6),
    }


def test_excesses_are_what_was_put_in():
    record = known()
    square = pairs.excesses(record).to_numpy()
    wanted = np.where(np.eye(7), np.nan, 0)
    for (a, b), x in BOTH.items():
        wanted[a, b] = wanted[b, a] = x
    assert np.allclose(square, wanted, atol=1e-9, equal_nan=True)
    assert pairs.pairs_add_up(record, [0, 1, 5, 6]).r2.value == pytest.approx(1)
    assert pairs.pairs_add_up(record).r2.value < 1
    # all damage beyond single blocks is of pairs


def test_rankings_are_those_of_the_scores(tiny):
    subject = tiny(layers=5)
    ids = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    found = pairs.rankings(subject, ids)
    for name, scores in (
        ("one-shot by cosine", influence(subject, ids)),
        ("one-shot by Taylor", taylor(subject, ids, range(5))),
    ):
        for k in (2, 3):
            assert found[name][k] == tuple(sorted(sorted(range(5), key=lambda b, s=scores: s[b])[:k]))
    distance = angular_distances(subject, ids)
    for k in (2, 3):
        first = min(range(5 - k + 1), key=lambda b, k=k: distance[k, b])
        assert found["angular, neighbours"][k] == tuple(range(first, first + k))
    assert found["last blocks"] == {2: (3, 4), 3: (2, 3, 4)}


def test_sentences_say_what_was_put_in():
    record = known()
    two, three, again = pairs.search_sentences(record)
    # blocks 2 and 4 lose 0.35 nats; greedy and one-shot begin with block 3, the cheapest, and end at 0.45
    start = (
        f"Of all 21 pairs the removal of 2 and 4 costs least: perplexity {math.exp(3.35):.2f} where the whole model "
    )
    assert two.startswith(
        start + f"has {math.exp(3):.2f}. Dearer are greedy (3 and 4) by 10.5 [10.5, 10.5] %, rank 2; "
    )
    dearer = 100 * math.expm1(0.9 + 0.3 - 0.35)  # of blocks 1 and 2; all windows are alike
    assert f"one-shot by cosine (1 and 2) by {dearer:.1f} [{dearer:.1f}, {dearer:.1f}] %, rank 9; " in two
    # the 0.4 of blocks 2 and 3 makes 0.95 of the three cheapest
    assert three.startswith("Of all 35 triples the removal of 2, 3 and 4 costs least") and "not measured" not in three
    assert "It is also what these choose: greedy and one-shot by perplexity." in three
    assert again == "On 6 other windows, where 21 pairs were measured, the pair 2 and 4 costs least again."

    del record.searched[0, 1, 5]
    record.others[2, 4] = [9.0] * 6
    _, three, again = pairs.search_sentences(record)
    assert three.startswith("Of 34 of the 35 triples") and "one that was not measured may cost less" in three
    # all others but 0 and 6 lose less than 6 nats; 3 and 4 is the best of them
    dearer = 100 * math.expm1(6 - 0.45)
    assert f"the pair 2 and 4 has rank 20: it is {dearer:,.0f} [" in again
    assert again.endswith("dearer than 3 and 4, which has rank 2 on the windows of the search.")


def test_sentences_tell_which_pairs_cost_more(monkeypatch):
    monkeypatch.setattr(pairs, "free", lambda depth: [*range(2, 6)])
    every, free, excess, extremes = pairs.additivity_sentences(known())
    assert "variance over all pairs" in every and "variance over pairs of blocks 2 to 5" in free
    # of the six pairs 0.4 and -0.2, of the three neighbours 0.4, with block 3 0.4 of three, with block 4 -0.2 of three
    assert (
        "costs more than both alone (+0.033 [" in excess and "neighbours cost more than both alone (+0.133 [" in excess
    )
    assert "pairs with 3 cost more than both alone (+0.133" in excess
    assert "those with 4 less than both alone (-0.067" in excess
    assert extremes.startswith("Furthest above the sum are 2 and 3 (+0.40 [+0.40, +0.40]), ")
    assert "Furthest below are 2 and 4 (-0.20 [-0.20, -0.20]), " in extremes


def test_the_chart_has_every_pair_and_names_what_searches_choose(monkeypatch):
    monkeypatch.setattr(figures, "free", lambda depth: [*range(2, 6)])
    record = known(0.01)
    left, right, *_ = figures.pair_chart(record, pairs.found(record, 2)).axes
    assert np.allclose(left.images[0].get_array(), pairs.excesses(record), equal_nan=True)
    outer, inner, *rest = right.lines
    assert len(inner.get_xdata()) == 6 and len(outer.get_xdata()) == 21 - 6
    marked = {line.get_label().replace("\n", " "): line.get_xydata()[0] for line in rest[1:]}
    assert [name.split(":")[0] for name in marked] == ["2, 4", "3, 4", "1, 2", "5, 6"]
    assert np.allclose(marked["2, 4: best of all"], [0.55, 0.35], atol=0.05)
