"""Searches against every set by hand, and losses that add up by construction."""

import itertools

import numpy as np
import pytest

from thesislib.compress.exhaustive import additivity, searches
from thesislib.errors import BadInput


def sets_of(blocks, *sizes):
    return [s for k in sizes for s in itertools.combinations(range(blocks), k)]


def random_losses(seed, blocks=6, sizes=(0, 1, 2, 3), windows=8):
    sets = sets_of(blocks, *sizes)
    return sets, np.random.default_rng(seed).normal(3, 0.5, (len(sets), windows))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_searches_by_hand(seed, k):
    sets, losses = random_losses(seed)
    found = searches(sets, losses, k, {"given": [5, 0, 3][:k]}, resamples=50)
    loss = {frozenset(s): nats.mean() for s, nats in zip(sets, losses, strict=True)}
    every = sorted((v, tuple(sorted(s))) for s, v in loss.items() if len(s) == k)
    greedy = frozenset()
    for _ in range(k):
        greedy = min((greedy | {b} for b in set(range(6)) - greedy), key=loss.get)
    alone = sorted(range(6), key=lambda b: loss[frozenset([b])])[:k]
    for name, blocks in {"best": every[0][1], "greedy": greedy, "one-shot": alone, "given": [5, 0, 3][:k]}.items():
        of = found[name]
        assert of.blocks == tuple(sorted(blocks)) and of.of == len(every)
        assert of.loss == pytest.approx(loss[frozenset(blocks)])
        assert of.regret.value == pytest.approx(of.loss - every[0][0])
        assert of.rank.value == 1 + [s for _, s in every].index(of.blocks)
    assert found["best"].regret == (0, 0, 0) and found["best"].rank == (1, 1, 1)
    for of in found.values():
        assert of.regret.low >= 0 and of.rank.low >= 1
    if k == 1:
        assert found["greedy"] == found["one-shot"] == found["best"]
    if k == 2:  # in every resample
        for mine, other in (
            (found["greedy"].regret, found["one-shot"].regret),
            (found["greedy"].rank, found["one-shot"].rank),
        ):
            assert all(x <= y for x, y in zip(mine, other, strict=True))


def test_greedy_of_three_may_be_dearer_than_one_shot():
    # beside block 0 block 3 costs least, and then no third is cheap
    sets = sets_of(4, 1, 2, 3)
    losses = {(0,): 1, (1,): 2, (2,): 3, (3,): 4, (0, 3): 5} | {(0, 1, 2): 6, (0, 1, 3): 9, (0, 2, 3): 8}
    found = searches(sets, np.array([[float(losses.get(s, 7))] for s in sets]), 3, resamples=0)
    assert found["one-shot"].blocks == (0, 1, 2) and found["one-shot"].loss == 6
    assert found["greedy"].blocks == (0, 2, 3) and found["greedy"].regret.value == 2
    assert np.isnan(found["greedy"].regret.low)


def test_intervals_are_over_windows():
    sets, losses = random_losses(3, windows=40)
    found = searches(sets, losses, 2, resamples=3000)["greedy"].regret
    rng, by_hand, rows = np.random.default_rng(9), [], [i for i, s in enumerate(sets) if len(s) == 2]
    for _ in range(3000):
        mean = losses[:, rng.integers(40, size=40)].mean(1)
        first = int(np.argmin(mean[1:7]))
        by_hand.append(min(mean[i] for i in rows if first in sets[i]) - mean[rows].min())
    np.testing.assert_allclose([found.low, found.high], np.quantile(by_hand, [0.025, 0.975]), atol=0.01)


def test_damages_that_add_up_are_predicted_by_single_blocks():
    rng, sets = np.random.default_rng(0), sets_of(7, 0, 1, 2, 3)
    single, pair = rng.exponential(1, (7, 5)), rng.normal(0, 0.5, (7, 7, 5))

    def losses(with_pairs):
        return np.array(
            [
                2.5
                + sum(single[b] for b in s)
                + with_pairs * sum(pair[a, b] for a, b in itertools.combinations(s, 2))
                + np.zeros(5)
                for s in sets
            ]
        )

    for size in (2, 3):
        found = additivity(sets, losses(0), size)
        assert found.r2 == pytest.approx([1, 1, 1]) and found.excess == pytest.approx(np.zeros(len(found.sets)))
        assert found.spearman == pytest.approx([1, 1, 1])
    pairs = additivity(sets, losses(1))
    assert pairs.excess == pytest.approx([pair[a, b].mean() for a, b in pairs.sets])
    true = np.array([row.mean() for s, row in zip(sets, losses(1), strict=True) if len(s) == 2])
    assert pairs.r2.value == pytest.approx(1 - (pairs.excess**2).sum() / ((true - true.mean()) ** 2).sum())
    assert pairs.r2.low <= pairs.r2.value <= pairs.r2.high < 1 and pairs.predicted + pairs.excess == pytest.approx(true)
    # triples are made of single blocks and pairs, so the second order predicts them and the first does not
    assert additivity(sets, losses(1), 3, order=2).r2.value == pytest.approx(1)
    assert additivity(sets, losses(1), 3, order=1).r2.value < 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x: searches(s, x, 3), "no set of 3 blocks was measured"),
        (
            lambda s, x: searches([*s, (0, 1, 2)], np.vstack([x, x[:1]]), 3),
            r"the loss without blocks \d, \d, \d was not measured",
        ),
        (lambda s, x: searches(s[:-1], x, 2), "22 rows of losses for 21 sets: expected one for each set"),
        (lambda s, x: searches(s, x, 7), "k is 7: expected 1 to 6, as many blocks as were measured alone"),
        (lambda s, x: searches(s, x, 2, {"cosine": [3]}), "'cosine' removes 1 blocks: expected 2"),
        (lambda s, x: searches(s, x, 2, {"cosine": [9, 3]}), "without blocks 3, 9 was not measured"),
        (lambda s, x: additivity(s[1:], x[1:]), r"without blocks \(none\) was not measured"),
        (lambda s, x: additivity(s, x, 2, 2), "order is 2: expected 1 to 1"),
        (lambda s, x: additivity(s, x, 3), "0 sets of 3 blocks: expected at least two"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(BadInput, match=message):
        call(*random_losses(0, sizes=(0, 1, 2)))
