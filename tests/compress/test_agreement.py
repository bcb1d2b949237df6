"""Agreement of rankings: against scipy, simulation, and cases where the answer is known."""

import numpy as np
import pytest
from scipy import stats

from thesislib.compress.agreement import (
    agreement,
    kendall,
    partial_spearman,
    resampled_means,
    settling,
    spearman,
    variance_of_items,
    variance_of_z,
    winners_curse,
)
from thesislib.errors import BadInput
from thesislib.evaluate.stats import friedman, signed_rank

RNG = np.random.default_rng(0)


def outcomes(worth, n, seed):
    """Items that each block's absence loses (1), leaves (0) or gains (-1), with the given means."""
    u = np.random.default_rng(seed).random((len(worth), n))
    p = np.asarray(worth)[:, None]
    return np.where(u < 0.15 + p / 2, 1.0, np.where(u > 0.85 + p / 2, -1.0, 0.0))


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_of_ranks_are_scipys(ties):
    x, y = RNG.normal(size=(2, 40, 12))
    if ties:
        x, y = x.round(), y.round()
    np.testing.assert_allclose(spearman(x, y), [stats.spearmanr(a, b)[0] for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(kendall(x, y), [stats.kendalltau(a, b)[0] for a, b in zip(x, y, strict=True)])


def test_what_two_rankings_share_and_cost_by_hand():
    found = agreement(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([7.0, 1.0, 2.0, 4.0, np.inf]), k=2)
    assert found.shared.value == 0.5  # {0, 1} and {1, 2}
    assert found.misranked.value == 0.8  # block 4 alone is last in both
    assert found.regret.value == (7 + 1) - (1 + 2)
    assert found.kendall.value == pytest.approx(stats.kendalltau(range(5), [7, 1, 2, 4, 9])[0])
    assert np.isnan([found.regret.low, found.spearman.high]).all()


def test_a_random_order_misranks_all_but_one_block():
    for blocks in (5, 28):
        orders = RNG.permuted(np.tile(np.arange(float(blocks)), (2000, 1)), axis=1)
        each = [agreement(order, np.arange(float(blocks)), 4) for order in orders]
        assert np.mean([a.misranked.value for a in each]) == pytest.approx(1 - 1 / blocks, abs=0.1 / blocks)
        assert np.mean([a.shared.value for a in each]) == pytest.approx(4 / blocks, abs=0.02)
        assert np.mean([a.spearman.value for a in each]) == pytest.approx(0, abs=0.04)


def test_resampled_means_are_those_of_the_bootstrap_and_paired_by_seed():
    items = RNG.normal(size=(3, 200))
    means = resampled_means(items, 4000, seed=1)
    np.testing.assert_allclose(means[0], items.mean(1))
    np.testing.assert_allclose(means[1:].std(0), items.std(1) / np.sqrt(200), rtol=0.05)
    np.testing.assert_allclose(np.cov(means[1:].T), np.cov(items) / 200, atol=4e-4)
    np.testing.assert_allclose(resampled_means(2 * items[1:], 4000, seed=1), 2 * means[:, 1:])


def test_an_interval_is_that_of_rankings_made_again_in_each_resample():
    x, y = outcomes([0.0, 0.02, 0.05, 0.1, 0.3], 60, 1), outcomes([0.0, 0.01, 0.08, 0.1, 0.2], 60, 2)
    found = agreement(resampled_means(x, 3000), resampled_means(y, 3000), 2)
    rng, by_hand = np.random.default_rng(5), []
    for _ in range(3000):
        some = rng.integers(60, size=60)
        a, b = x[:, some].mean(1), y[:, some].mean(1)
        least, best = (sorted(range(5), key=lambda i: (m[i], i))[:2] for m in (a, b))
        elsewhere = np.mean(np.argsort(a, kind="stable") != np.argsort(b, kind="stable"))
        correlations = stats.spearmanr(a, b)[0], stats.kendalltau(a, b)[0]
        by_hand.append([*correlations, len({*least} & {*best}) / 2, elsewhere, b[least].sum() - b[best].sum()])
    low, high = np.quantile(by_hand, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([e.low for e in found], low, atol=0.06)
    np.testing.assert_allclose([e.high for e in found], high, atol=0.06)
    assert found.regret.low >= 0


def test_a_ranking_agrees_with_itself():
    means = resampled_means(outcomes([0.0, 0.05, 0.1, 0.2], 50, 3), 200)
    same = agreement(means, means, 2)
    assert same.shared == (1, 1, 1) and same.misranked == same.regret == (0, 0, 0)
    assert agreement(means[0], means, 2).spearman.low < 1  # against resamples it does not


def test_the_interval_holds_the_agreement_of_as_many_other_items():
    worth, other = RNG.uniform(0, 0.25, (2, 12))
    covered, expected = (
        0,
        np.mean(
            [spearman(outcomes(worth, 300, s).mean(1), outcomes(other, 300, 1000 + s).mean(1)) for s in range(200)]
        ),
    )
    for s in range(100):
        x, y = (resampled_means(outcomes(w, 300, 2000 + s + 500 * i), 300, i) for i, w in enumerate((worth, other)))
        e = agreement(x, y, 3).spearman
        covered += e.low <= expected <= e.high
    assert covered >= 90


# ---------------------------------------------------------------- partial correlation


def test_partial_correlation_is_the_formula_of_three_correlations():
    x, y, z = RNG.normal(size=(3, 30)).round(1)
    y, x = y + z, x + z + 0.5 * y
    xy, xz, yz = (stats.spearmanr(a, b)[0] for a, b in ((x, y), (x, z), (y, z)))
    rho, p = partial_spearman(x, y, z)
    assert rho == pytest.approx((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))
    t = rho * np.sqrt(27 / (1 - rho**2))
    assert p == pytest.approx(2 * stats.t.sf(abs(t), 27), abs=0.015)
    assert partial_spearman(x, y, z) == (rho, p) and partial_spearman(x, y, z, seed=1)[1] != p
    assert partial_spearman(x, y, np.array([z, z]))[0] == pytest.approx(rho)  # said twice


def test_what_a_third_score_explains_is_no_partial_correlation():
    ps = []
    for s in range(200):
        rng = np.random.default_rng(s)
        z = rng.normal(size=25)
        ps.append(partial_spearman(z + rng.normal(size=25), z + rng.normal(size=25), z, 200)[1])
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.1 and np.mean(ps) == pytest.approx(0.5, abs=0.07)
    assert np.isnan(partial_spearman(z, RNG.normal(size=25), np.exp(z))).all()
    assert partial_spearman(z, -z, RNG.normal(size=25), 999) == (pytest.approx(-1), 0.001)


# ---------------------------------------------------------------- tasks


def test_variance_of_z_by_hand_and_its_tests():
    scores = RNG.normal(size=(4, 9)) * [[1], [10], [0.1], [3]] + 5
    z = stats.zscore(scores, axis=1)
    np.testing.assert_allclose(variance_of_z(scores), np.var(z, axis=0, ddof=1))
    alike = np.arange(9.0) * [[1], [2], [5], [0.3]]  # the same standing in each task
    assert variance_of_z(alike) == pytest.approx(np.zeros(9))
    assert signed_rank(variance_of_z(alike), variance_of_z(scores)).p < 0.05
    ranked = friedman({str(b): alike[:, b] for b in range(9)})
    assert ranked.w == pytest.approx(1) and ranked.w > friedman({str(b): scores[:, b] for b in range(9)}).w


@pytest.mark.parametrize("spread", [0, 0.1, 0.3])
def test_noise_alone_adds_what_resamples_of_one_task_vary(spread):
    worth = np.linspace(-spread / 2, spread / 2, 14)
    tasks = [outcomes(worth, 400, s) for s in range(120)]  # the blocks are worth the same in each
    between = variance_of_z(np.array([t.mean(1) for t in tasks])).mean()
    noise = np.mean([variance_of_items(resampled_means(t, 200, s)).mean() for s, t in enumerate(tasks)])
    assert 0.95 * between < noise < 1.15 * between * (14 - 1) / (14 - 3)


def test_draws_that_lose_alike_agree_as_a_random_order_does():
    lost = np.zeros((5, 40))
    lost[:, 0] = np.arange(5)  # one item tells the blocks apart
    found = settling(lost, np.arange(5.0), 2, [1, 40], draws=100)
    assert found[1].spearman == (0, 0, pytest.approx(0, abs=1)) and found[40].spearman.value == pytest.approx(1)


# ---------------------------------------------------------------- few items, and other items


def test_settling_is_the_ranking_of_every_subset():
    some, reference = outcomes([0.0, 0.05, 0.1, 0.3], 8, 1), np.array([0.0, 0.1, 0.05, 0.2])
    few = settling(some, reference, 2, [1, 8], draws=4000)
    whole = stats.spearmanr(some.mean(1), reference)[0]
    assert few[8].spearman == pytest.approx([whole] * 3)
    each = [np.argsort(some[:, i], kind="stable")[:2] for i in range(8)]
    shared = [len({*map(int, least)} & {0, 2}) / 2 for least in each]
    assert few[1].shared == pytest.approx(np.quantile(np.repeat(shared, 500), [0.5, 0.025, 0.975]))


def test_a_ranking_settles_with_more_items():
    worth = np.linspace(0, 0.3, 20)
    found = settling(outcomes(worth, 4096, 1), outcomes(worth, 4096, 2).mean(1), 4, [64, 256, 1024, 4096], draws=100)
    medians = [s.spearman.value for s in found.values()]
    assert medians == sorted(medians) and medians[0] < 0.9 < 0.97 < medians[-1]
    widths = [s.spearman.high - s.spearman.low for s in found.values()]
    assert widths == sorted(widths, reverse=True) and widths[-1] == 0


def test_blocks_that_only_seem_better_than_the_whole_model_are_not_on_other_items():
    worthless = np.zeros(28)
    cursed = winners_curse(outcomes(worthless, 300, 1), outcomes(worthless, 300, 2))
    first = outcomes(worthless, 300, 1).mean(1)
    assert cursed.blocks.tolist() == np.flatnonzero(first < 0).tolist() and cursed.seen == first[first < 0].mean() < 0
    assert cursed.kept.low < 0 < cursed.kept.high and cursed.kept.value > cursed.seen
    assert cursed.slope.low < 0 < cursed.slope.high < 1 and 0 < cursed.still < len(cursed.blocks)
    real = np.r_[[-0.12] * 4, [0.1] * 10]
    kept = winners_curse(outcomes(real, 2000, 3), outcomes(real, 2000, 4), k=4)
    assert kept.blocks.tolist() == [0, 1, 2, 3] and kept.still == 4
    assert kept.kept.low < -0.12 < kept.kept.high < 0 and kept.slope.low < 1 < kept.slope.high + 0.05
    assert kept.slope.value == pytest.approx(
        stats.linregress(outcomes(real, 2000, 3).mean(1), outcomes(real, 2000, 4).mean(1)).slope
    )


def test_no_block_that_is_better_leaves_nothing_to_keep():
    none = winners_curse(np.array([[1.0, 0], [1, 1]]), np.zeros((2, 3)))
    assert len(none.blocks) == none.still == 0 and np.isnan([none.seen, *none.kept]).all() and none.slope.value == 0


def test_the_interval_of_what_is_kept_covers_the_truth():
    worth, covered = np.r_[np.full(6, -0.02), np.linspace(0, 0.2, 14)], 0
    for s in range(150):
        c = winners_curse(outcomes(worth, 200, s), outcomes(worth, 400, 5000 + s), k=3, resamples=300)
        covered += c.kept.low <= worth[c.blocks].mean() <= c.kept.high
    assert covered / 150 >= 0.88


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agreement(np.ones(3), np.ones(4), 1), "scores of 3 and 4 blocks: expected the same blocks"),
        (lambda: agreement(np.ones(3), np.array([1, np.nan, 2]), 1), "a score is nan"),
        (lambda: agreement(np.ones(3), np.ones(3), 4), "k is 4: expected 1 to 3"),
        (lambda: partial_spearman(*np.ones((3, 3))), "3 blocks: expected at least 4"),
        (lambda: variance_of_z(np.arange(3.0)[None]), "1 task: expected at least two"),
        (lambda: variance_of_z(np.ones((2, 3))), "scores all blocks alike"),
        (lambda: settling(np.ones((3, 9)), np.ones(3), 1, [4, 10]), "10 items: expected 1 to 9"),
        (lambda: winners_curse(np.ones((3, 9)), np.ones((3, 9)), 0), "k is 0: expected 1 to 3"),
        (lambda: winners_curse(np.ones((3, 9)), np.ones((4, 9))), "scores of 3 and 4 blocks"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(BadInput, match=message):
        call()
