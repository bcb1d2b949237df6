from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from scipy import stats as scipy_stats

from thesislib.errors import BadInput
from thesislib.evaluate.stats import (
    Comparison,
    bootstrap_mean,
    friedman,
    holm,
    holm_adjusted,
    paired_bootstrap,
    paired_means,
    paired_outcomes,
    proportion,
    signed_rank,
)

quick_bootstrap = partial(paired_bootstrap, resamples=1000)
PAIRED = pytest.mark.parametrize(
    "compare", [paired_means, quick_bootstrap, signed_rank], ids=["t", "bootstrap", "ranks"]
)


def pairs(n: int, seed: int = 0, shift: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.normal(3.0, 1.0, size=n)
    return a, a + rng.normal(shift, 0.3, size=n)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        x = rng.normal(3.0, 1.0, size=40)
        low, high = bootstrap_mean(x, np.ones(40), np.arange(40), resamples=1000, seed=trial)
        hits += low <= 3.0 <= high
    assert 178 <= hits <= 199  # 95 % of 200 is 190; the percentile bootstrap at n = 40 falls a little short


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(0).gamma(2.0, size=60)
    expected = scipy_stats.bootstrap((x,), np.mean, method="percentile", rng=0).confidence_interval
    np.testing.assert_allclose(bootstrap_mean(x, np.ones(60), np.arange(60)), expected, rtol=0.02)


def test_documents_not_windows_are_resampled():
    """Ten copies of each of five documents know no more than the five."""
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    once = bootstrap_mean(x, np.ones(5), np.arange(5))
    copies = bootstrap_mean(np.tile(x, 10), np.ones(50), np.tile(np.arange(5), 10))
    np.testing.assert_allclose(copies, once)
    alone = bootstrap_mean(np.tile(x, 10), np.ones(50), np.arange(50))
    assert alone[1] - alone[0] < (once[1] - once[0]) / 2


def test_weights_count_tokens():
    low, high = bootstrap_mean([10.0, 0.0], [10, 1000], [0, 1])
    assert low == 0.0 and high == 1.0  # the extremes are one document drawn twice


def test_one_document_gives_no_interval():
    assert np.isnan(bootstrap_mean([1.0, 2.0], [1, 1], [7, 7])).all()


def test_wilson_against_its_formula():
    z, n, k = 1.959964, 50, 21
    p = k / n
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    np.testing.assert_allclose(proportion(k, n), (centre - half, centre + half), rtol=1e-6)
    assert proportion(0, 10)[0] == 0 and proportion(10, 10)[1] == 1
    for bad in ((11, 10), (-1, 10), (0, 0)):
        with pytest.raises(BadInput, match="expected 0 <= successes <= n"):
            proportion(*bad)


def test_paired_means_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a = rng.normal(size=30)
    b = a + rng.normal(0.1, 0.2, size=30)
    c = paired_means(a, b)
    expected = scipy_stats.ttest_rel(b, a)
    assert c.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (c.difference, c.low, c.high) == pytest.approx(((b - a).mean(), interval.low, interval.high))
    grouped = paired_means(a, b, np.arange(30) // 3)
    assert grouped.n == 10 and grouped.difference == pytest.approx(c.difference)


def test_weighted_means_against_least_squares():
    """A constant fitted by weighted least squares, with errors clustered by group, has the same standard error."""
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(9), rng.integers(1, 8, 9))
    d, w = rng.normal(0.2, 1, len(groups)), rng.uniform(0.5, 3, len(groups))
    c = paired_means(np.zeros(len(d)), d, groups, w)
    constant = (w * d).sum() / w.sum()
    scores = np.array([(w * (d - constant))[groups == g].sum() for g in range(9)])
    error = np.sqrt(9 / 8 * (scores**2).sum()) / w.sum()
    half = scipy_stats.t.ppf(0.975, 8) * error
    assert (c.difference, c.low, c.high) == pytest.approx((constant, constant - half, constant + half))
    assert c.p == pytest.approx(2 * scipy_stats.t.sf(abs(constant / error), 8)) and c.n == 9
    alike = paired_means(np.zeros(12), d[:12], np.arange(12) // 3, np.full(12, 7.0))
    assert alike.p == pytest.approx(paired_means(np.zeros(12), d[:12], np.arange(12) // 3).p)


def test_weighted_intervals_cover_the_truth_where_documents_differ_in_length():
    """As WikiText's 62 articles do. Long documents err less, so weighting is not the same as not weighting."""
    rng, hits = np.random.default_rng(6), 0
    for _ in range(400):
        sizes = rng.integers(2, 30, 62)
        groups = np.repeat(np.arange(62), sizes)
        d = rng.normal(0, 1, 62)[groups] + rng.normal(0, 1, len(groups))
        c = paired_means(np.zeros(len(d)), d, groups, np.full(len(d), 511.0))
        hits += c.low <= 0 <= c.high
    assert 364 <= hits <= 394, hits  # 95 % of 400 is 380, the deviation 4.4


def test_paired_means_edges():
    assert paired_means([1, 2], [1, 2]).p == 1.0
    assert paired_means([1, 2], [2, 3]).p == 0.0  # the same difference every time
    with pytest.raises(BadInput, match="same items on both sides: got 2 and 3"):
        paired_means([1, 2], [1, 2, 3])
    with pytest.raises(BadInput, match="at least two"):
        paired_means([1, 2], [1, 2], [0, 0])


def test_mcnemar_by_hand():
    a = [True] * 10 + [False] * 10
    b = [True] * 9 + [False] + [True] * 6 + [False] * 4  # 6 gained, 1 lost
    c = paired_outcomes(a, b)
    assert c.p == pytest.approx(2 * sum([1, 7]) / 2**7)
    assert c.difference == pytest.approx(5 / 20) and c.n == 20
    assert paired_outcomes(a, a).p == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@PAIRED
def test_swapping_the_two_turns_the_sign(compare):
    a, b = pairs(24)
    there, back = compare(a, b), compare(b, a)
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
    assert back.p == pytest.approx(there.p) and (back.n, back.test) == (there.n, there.test)


@PAIRED
def test_what_both_have_in_common_cancels(compare):
    a, b = pairs(24)
    common = np.random.default_rng(5).normal(0.0, 50.0, size=24)
    found, plain = compare(a + common, b + common), compare(a, b)
    assert (found.difference, found.low, found.high, found.p) == pytest.approx(
        (plain.difference, plain.low, plain.high, plain.p)
    )


@PAIRED
def test_the_order_of_items_and_the_names_of_groups_do_not_matter(compare):
    a, b = pairs(24)
    groups = np.arange(24) // 3
    order = np.random.default_rng(2).permutation(24)
    found, plain = compare(a[order], b[order], [f"document {g}" for g in groups[order]]), compare(a, b, groups)
    assert (found.difference, found.low, found.high, found.p, found.n) == pytest.approx(
        (plain.difference, plain.low, plain.high, plain.p, 8)
    )


@pytest.mark.filterwarnings("error")
@PAIRED
def test_the_same_thing_twice_does_not_differ(compare):
    c = compare([1.0, 2.0, 5.0] * 3, [1.0, 2.0, 5.0] * 3)
    assert (c.difference, c.low, c.high, c.p, c.n) == (0, 0, 0, 1, 9)


@PAIRED
def test_pairs_that_cannot_be_tested(compare):
    with pytest.raises(BadInput, match="same items on both sides: got 2 and 3"):
        compare([1, 2], [1, 2, 3])
    with pytest.raises(BadInput, match="at least two independent items or documents: got 2 items in one group"):
        compare([1, 2], [1, 2], ["x", "x"])
    for items in ([], [1.0]):
        with pytest.raises(BadInput, match=f"at least two independent items or documents: got {len(items)} items$"):
            compare(items, items)
    with pytest.raises(BadInput, match="2 groups for 3 items: expected one for each"):
        compare([1, 2, 3], [1, 2, 3], [0, 1])
    with pytest.raises(BadInput, match=r"NaN or infinite values \(1 in a, 2 in b, of 4 items\)"):
        compare([1, 2, np.nan, 4], [np.inf, 2, 3, -np.inf])
    with pytest.raises(BadInput, match=r"\(1 in b, of 2 items\)"):
        compare([1, 2], [1, np.nan])


def test_paired_bootstrap_agrees_with_scipy_over_documents():
    """The same resampling of documents' totals, by scipy's own code."""
    a, b = pairs(200)
    rng = np.random.default_rng(4)
    groups, weights = rng.integers(0, 40, size=200), rng.integers(1, 30, size=200)
    names = np.unique(groups)
    totals = [((b - a) * weights)[groups == g].sum() for g in names]
    tokens = [weights[groups == g].sum() for g in names]
    c = paired_bootstrap(a, b, groups, weights)
    ratio = scipy_stats.bootstrap(
        (totals, tokens),
        lambda x, w, axis: x.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=1,
    )
    assert c.difference == pytest.approx(np.average(b, weights=weights) - np.average(a, weights=weights))
    expected = ratio.confidence_interval
    np.testing.assert_allclose((c.low, c.high), expected, atol=0.03 * (expected.high - expected.low))
    share = (ratio.bootstrap_distribution <= 0).mean()
    assert (
        c.p == pytest.approx(2 * min(share, 1 - share), abs=0.01) and c.n == len(names) and c.test == "paired bootstrap"
    )


def test_paired_bootstrap_by_hand():
    """Of two items 3 and -1: both, one of each or the other twice, with chances 1/4, 1/2 and 1/4."""
    c = paired_bootstrap([0.0, 0.0], [3.0, -1.0])
    assert (c.difference, c.low, c.high) == (1, -1, 3)
    assert c.p == pytest.approx(0.5, abs=0.02)
    assert paired_bootstrap([0.0, 0.0], [3.0, 1.0], resamples=999).p == 2 / 1000  # never 0
    weighted = paired_bootstrap([0.0, 0.0], [3.0, -1.0], weights=[1, 9])
    assert weighted.difference == pytest.approx(-0.6) and weighted.low == -1 and weighted.high == 3


def test_paired_bootstrap_repeats_itself_by_its_seed():
    a, b = pairs(30)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b, seed=0) != paired_bootstrap(a, b, seed=1)
    c = paired_bootstrap(a, b, seed=7)
    assert (c.low, c.high) == bootstrap_mean(
        b - a, np.ones(30), range(30), seed=7
    )  # the interval of one mean, of the differences


@pytest.mark.parametrize("weights", [[1, 2], [1, 2, 0], [1, 2, -1], [1, 2, np.nan], [1, 2, np.inf]])
def test_weights_that_weigh_nothing(weights):
    with pytest.raises(BadInput, match="expected 3 finite weights above 0, one for each item: got 2 such"):
        paired_bootstrap([1, 2, 3], [2, 2, 2], weights=weights)
    with pytest.raises(BadInput, match="expected 3 finite weights above 0, one for each item: got 2 such"):
        paired_means([1, 2, 3], [2, 2, 2], weights=weights)


def test_intervals_over_documents_cover_the_truth_as_often_as_they_say():
    """Windows of a document err together: an interval over windows would cover the truth in 58 % of such trials."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), 6)
    hits, found = np.zeros(3, int), np.zeros(3, int)
    for trial in range(300):
        a = rng.normal(size=240)
        b = a + rng.standard_t(4, size=40)[groups] + rng.normal(0.0, 0.5, size=240)
        results = [
            paired_means(a, b, groups),
            paired_bootstrap(a, b, groups, resamples=1000, seed=trial),
            signed_rank(a, b, groups),
        ]
        hits += [c.low <= 0 <= c.high for c in results]
        found += [c.p < 0.05 for c in results]
        assert all(
            (c.p < 0.05) == (not c.low <= 0 <= c.high) or abs(c.p - 0.05) < 0.01 for c in results
        )  # the two always say the same
    assert all(272 <= h <= 296 for h in hits), hits  # 95 % of 300 is 285, the deviation 3.8
    assert all(4 <= f <= 28 for f in found), found


def flipped(d: np.ndarray) -> float:
    """Two-sided p of the signed-rank sum over all 2 ** n signs; differences of zero are left out (Wilcoxon 1945)."""
    d = d[d != 0]
    ranks = scipy_stats.rankdata(np.abs(d))
    sums = np.array([signs @ ranks for signs in product([0, 1], repeat=len(d))])
    observed = ranks[d > 0].sum()
    return min(1.0, 2 * min((sums <= observed + 1e-9).mean(), (sums >= observed - 1e-9).mean()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [2, 5, 6, 10])
def test_signed_rank_p_over_all_signs(n, seed):
    a, b = pairs(n, seed)
    assert signed_rank(a, b).p == pytest.approx(flipped(b - a))


@pytest.mark.parametrize("d", [[1, 1, -1, 2, 3, 3, 4], [0, 0, 1, 2, 3, -4, 5, 6], [2, 2, 2, 2, 2, 2], [0, 0, 1]])
def test_signed_rank_p_with_ties_and_zeros(d):
    c = signed_rank(np.zeros(len(d)), d)
    assert c.p == pytest.approx(flipped(np.array(d, float))) and c.n == len(d)


@pytest.mark.parametrize("n", [6, 9, 12])
def test_signed_rank_interval_is_what_the_test_does_not_reject(n):
    a, b = pairs(n, seed=n)
    c = signed_rank(a, b)
    d = b - a
    for edge, outwards in ((c.low, -1e-9), (c.high, 1e-9)):
        assert flipped(d - edge - outwards) <= 0.05 < flipped(d - edge + outwards)
    means = [(x + y) / 2 for i, x in enumerate(d) for y in d[i:]]
    assert c.difference == pytest.approx(np.median(means)) and len(means) == n * (n + 1) / 2


@pytest.mark.parametrize("n", [50, 51, 80])
def test_signed_rank_interval_of_many_is_what_scipy_does_not_reject(n):
    a, b = pairs(n, seed=n)
    c = signed_rank(a, b)
    for edge, outwards in ((c.low, -1e-9), (c.high, 1e-9)):
        rejected, kept = (scipy_stats.wilcoxon(b - a - edge - step).pvalue for step in (outwards, -outwards))
        assert rejected <= 0.05 < kept
    assert c.low < c.difference < c.high and c.test == "Wilcoxon signed-rank"


def test_signed_rank_of_five_has_no_interval():
    """All of one sign is the strongest that five can say: p = 2 / 2 ** 5, above 0.05."""
    c = signed_rank(np.zeros(5), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (c.low, c.high, c.p, c.difference) == (-np.inf, np.inf, 2 / 2**5, 3)
    assert np.isfinite(signed_rank(np.zeros(6), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).low)


def test_one_ruined_window_moves_ranks_little():
    a, b = pairs(20, shift=0.3)
    worst = np.argmax(b - a)
    ruined = b.copy()
    ruined[worst] += 1e6
    plain, found = signed_rank(a, b), signed_rank(a, ruined)
    assert found.p == plain.p and abs(found.difference - plain.difference) < 0.1
    assert paired_means(a, ruined).p > 0.3 > 0.01 > paired_means(a, b).p


@pytest.mark.parametrize("compare", [paired_means, signed_rank])
def test_pairs_of_a_group_are_averaged(compare):
    a, b = pairs(40)
    groups = np.random.default_rng(1).integers(0, 9, size=40)
    means = [[x[groups == g].mean() for g in np.unique(groups)] for x in (a, b)]
    found, plain = compare(a, b, groups), compare(*means)
    assert (found.difference, found.low, found.high, found.p, found.n) == pytest.approx(
        (plain.difference, plain.low, plain.high, plain.p, 9)
    )


def conover(table: np.ndarray) -> float:
    """Friedman's statistic of [configurations, items], ties and all (Conover 1999)."""
    k, n = table.shape
    ranks = np.array([scipy_stats.rankdata(column) for column in table.T])
    return (k - 1) * ((ranks.sum(0) - n * (k + 1) / 2) ** 2).sum() / ((ranks**2).sum() - n * k * (k + 1) ** 2 / 4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("k", "n"), [(3, 2), (3, 15), (6, 30)])
def test_friedman_against_its_formula(k, n, tied):
    table = np.random.default_rng(k * n).normal(np.arange(k)[:, None] / 2, 1.0, size=(k, n))
    table = table.round() if tied else table
    r = friedman({f"c{i}": row for i, row in enumerate(table)})
    assert r.statistic == pytest.approx(conover(table)) and r.n == n
    assert r.p == pytest.approx(scipy_stats.chi2.sf(conover(table), k - 1))
    assert r.w == pytest.approx(conover(table) / (n * (k - 1)))
    ranks = (table[:, None] > table[None]).sum(1) + (
        (table[:, None] == table[None]).sum(1) + 1
    ) / 2  # smaller ones, and half of the equals
    assert r.mean_ranks == pytest.approx({f"c{i}": mean for i, mean in enumerate(ranks.mean(1))})


def test_kendalls_w_is_how_far_the_rank_sums_spread():
    """W = 12 S / (n² (k³ - k)), S the squared deviations of rank sums (Kendall and Babington Smith 1939)."""
    table = np.random.default_rng(0).normal(size=(4, 7))
    ranks = table.argsort(0).argsort(0) + 1
    spread = ((ranks.sum(1) - ranks.sum(1).mean()) ** 2).sum()
    assert friedman(dict(zip("abcd", table, strict=True))).w == pytest.approx(12 * spread / (7**2 * (4**3 - 4)))
    agreed = friedman({"best": [1, 20, 3], "middle": [2, 21, 4], "worst": [3, 22, 5]})
    assert (
        agreed.w == 1
        and agreed.statistic == pytest.approx(6)
        and agreed.mean_ranks == {"best": 1, "middle": 2, "worst": 3}
    )
    cancelled = friedman({"a": [1, 2, 3], "b": [2, 3, 1], "c": [3, 1, 2]})
    assert (cancelled.w, cancelled.p) == pytest.approx((0, 1)) and set(cancelled.mean_ranks.values()) == {2}
    same = friedman({"a": [1, 2], "b": [1, 2], "c": [1, 2]})
    assert (same.statistic, same.p, same.w, same.mean_ranks) == (0, 1, 0, {"a": 2, "b": 2, "c": 2})


def test_friedman_knows_no_difficulty_and_no_scale():
    table = np.random.default_rng(3).normal(size=(4, 20))
    plain = friedman(dict(zip("abcd", table, strict=True)))
    assert friedman(dict(zip("abcd", np.exp(table) + np.arange(20) ** 2, strict=True))) == plain
    assert friedman(dict(zip("dcba", table[::-1], strict=True))).mean_ranks == plain.mean_ranks


def test_friedman_averages_a_group_first():
    table = np.random.default_rng(3).normal(size=(3, 24))
    averaged = table.reshape(3, 8, 3).mean(2)
    assert friedman(dict(zip("abc", table, strict=True)), np.arange(24) // 3) == friedman(
        dict(zip("abc", averaged, strict=True))
    )


def test_friedman_finds_a_difference_in_five_of_a_hundred_where_there_is_none():
    rng = np.random.default_rng(6)
    found = sum(friedman(dict(zip("abcd", rng.normal(size=(4, 25)), strict=True))).p < 0.05 for _ in range(400))
    assert 8 <= found <= 34  # 5 % of 400 is 20, give or take 3 deviations of 4.4


def test_tables_that_cannot_be_ranked():
    x = [1.0, 2.0, 3.0]
    for few in ({}, {"a": x, "b": x}):
        with pytest.raises(BadInput, match=f"at least three configurations, got {len(few)}: signed_rank compares two"):
            friedman(few)
    with pytest.raises(BadInput, match=r"same items on every side: got 3 and 2 and 3 \(a, b, c\)"):
        friedman({"a": x, "b": x[:2], "c": x})
    with pytest.raises(BadInput, match=r"NaN or infinite values \(2 in b, 1 in c, of 3 items\)"):
        friedman({"a": x, "b": [np.nan, 1, np.inf], "c": [1, 2, np.nan]})
    for items, groups in (([], None), ([1.0], None), (x, ["d"] * 3)):
        with pytest.raises(BadInput, match=f"at least two independent items or documents: got {len(items)} items"):
            friedman({"a": items, "b": items, "c": items}, groups)
    with pytest.raises(BadInput, match="2 groups for 3 items"):
        friedman({"a": x, "b": x, "c": x}, [0, 1])


def test_comparisons_adjusted_together_keep_their_names_and_all_but_p():
    found = {
        name: Comparison(d, d - 1, d + 1, p, 9, "t")
        for name, d, p in (("a", 2.0, 0.01), ("b", -2.0, 0.04), ("c", 2.0, 0.03))
    }
    adjusted = holm_adjusted(found)
    assert list(adjusted) == ["a", "b", "c"] and [c.p for c in adjusted.values()] == pytest.approx([0.03, 0.06, 0.06])
    assert [replace(c, p=found[name].p) for name, c in adjusted.items()] == list(found.values())
    assert [c.verdict() for c in adjusted.values()] == ["worse", "not told apart", "not told apart"]  # less is better
    assert [c.verdict(higher_is_better=True) for c in found.values()] == ["better", "worse", "better"]
    assert [c.told for c in adjusted.values()] == [True, False, False] and not Comparison(1, 0, 2, 0.05, 9, "t").told
    assert holm_adjusted({}) == {}
