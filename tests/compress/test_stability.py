"""The bootstrap of the choice of blocks: against every possible draw, and where the answer is known."""

import itertools

import numpy as np
import pytest

from thesislib.compress.stability import chosen, resampled


def every_draw(losses, k, windows):
    """The same by hand, over all n^windows draws, which are equally likely."""
    blocks, n = losses.shape
    mean = losses.mean(1)

    def lowest(scores):
        return sorted(sorted(range(blocks), key=lambda b: (scores[b], b))[:k])

    best, shares, same, regret = lowest(mean), np.zeros(blocks), 0.0, 0.0
    for draw in itertools.product(range(n), repeat=windows):
        gone = lowest(losses[:, draw].mean(1))
        shares[gone] += 1 / n**windows
        same += (gone == best) / n**windows
        regret += (mean[gone].mean() - mean[best].mean()) / n**windows
    return shares, same, regret


@pytest.mark.parametrize(("k", "windows"), [(1, 1), (1, 4), (2, 3), (3, 5)])
def test_the_bootstrap_is_the_mean_over_every_draw(k, windows):
    losses = np.random.default_rng(k).normal(3, 0.3, (6, 5))
    found = resampled(losses, k, windows, resamples=40_000, seed=1)
    shares, same, regret = every_draw(losses, k, windows)
    assert found.shares == pytest.approx(shares, abs=0.01) and found.shares.sum() == pytest.approx(k)
    assert found.same == pytest.approx(same, abs=0.01) and found.regret == pytest.approx(regret, abs=0.003)


def test_one_block_that_is_always_lowest_and_two_of_which_a_window_decides():
    losses = np.array([[5.0] * 4, [1.0] * 4, [2.0, 2.0, 4.0, 4.0], [3.1] * 4])
    alone = resampled(losses, 1, 1)
    assert alone.shares.tolist() == [0, 1, 0, 0] and (alone.same, alone.regret) == (1, 0)
    two = resampled(losses, 2, 1)  # the mean of block 2 is 3, and half of the windows have it below block 3, half above
    assert two.shares[1] == 1 and two.shares[2] == two.same == pytest.approx(0.5, abs=0.02)
    assert two.regret == pytest.approx(0.5 * 0.1 / 2, abs=0.001)
    assert resampled(losses, 2, 1).same == two.same != resampled(losses, 2, 1, seed=1).same
    every = resampled(losses, 4, 3)  # nothing to choose
    assert every.shares.tolist() == [1] * 4 and (every.same, every.regret) == (1, 0)


def test_equal_losses_leave_the_first_blocks():
    assert chosen(np.array([[2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 2).tolist() == [[1, 2], [0, 1]]
