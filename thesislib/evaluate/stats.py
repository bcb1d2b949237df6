"""Intervals and paired tests: how certain a number is, and whether two numbers differ.

Errors of neighbouring windows are alike, so where documents are known, documents and not windows are resampled. Two
subjects are always compared on the same items, item by item: the difficulty of the items then cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.stats import binomtest, friedmanchisquare, norm, rankdata, t, wilcoxon

from thesislib.errors import BadInput

LEVEL = 0.95
K = TypeVar("K")
Floats = Sequence[float] | np.ndarray
Groups = Sequence | np.ndarray
VERDICTS = ("better", "worse", "not told apart")


def bootstrap_mean(
    totals: Floats, weights: Floats, groups: Groups, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(totals) / sum(weights), whole groups resampled (Efron 1979).

    With a single group there is nothing to resample, so no interval: (nan, nan).
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return np.nan, np.nan
    return _middle(_resampled(np.asarray(totals, float), np.asarray(weights, float), index, resamples, seed))


def _resampled(totals: np.ndarray, weights: np.ndarray, index: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """sum(totals) / sum(weights) of every resample of whole groups, `index` being each item's group."""
    total, weight = np.bincount(index, weights=totals), np.bincount(index, weights=weights)
    n = len(total)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return (draws @ total) / (draws @ weight)


def _middle(values: np.ndarray) -> tuple[float, float]:
    """The quantiles that leave LEVEL of the values between them."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def proportion(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); sensible at 0 and n, unlike the bootstrap."""
    if not 0 <= successes <= n or n < 1:
        raise BadInput(f"{successes} successes of {n}: expected 0 <= successes <= n and n >= 1")
    interval = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Comparison:
    """A difference of two subjects on the same items.

    Attributes:
        difference: b - a.
        low: the lower bound of its 95 % interval.
        high: the upper bound.
        p: the two-sided p value.
        n: how many pairs.
        test: the test's name.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    test: str

    @property
    def told(self) -> bool:
        """Whether the two are told apart at the 5 % level."""
        return self.p < 0.05

    def verdict(self, higher_is_better: bool = False) -> str:
        """Whether b is "better" or "worse" than a, or the two are "not told apart"."""
        if not self.told:
            return VERDICTS[2]
        return VERDICTS[(self.difference > 0) != higher_is_better]


def _aligned(samples: Mapping[str, Floats], groups: Groups | None) -> tuple[list[np.ndarray], np.ndarray]:
    """The samples as arrays, and each item's group; without groups every item is its own.

    Raises:
        BadInput: samples that no paired test can take, see `paired_means`.
    """
    rows = [np.asarray(x, float) for x in samples.values()]
    if len({x.shape for x in rows}) > 1:
        sides = "both sides" if len(rows) == 2 else "every side"
        raise BadInput(
            f"a paired test needs the same items on {sides}: got {' and '.join(str(len(x)) for x in rows)} "
            f"({', '.join(samples)})"
        )
    n = len(rows[0])
    if groups is not None and len(groups) != n:
        raise BadInput(f"{len(groups)} groups for {n} items: expected one for each item")
    broken = {name: int((~np.isfinite(x)).sum()) for name, x in zip(samples, rows, strict=True)}
    if any(broken.values()):
        counts = ", ".join(f"{k} in {name}" for name, k in broken.items() if k)
        raise BadInput(
            f"NaN or infinite values ({counts}, of {n} items): a paired test needs finite ones; leave those "
            "items out on every side and say so"
        )
    index = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if index.max(initial=0) < 1:
        raise BadInput(
            f"a paired test needs at least two independent items or documents: got {n} "
            f"items{'' if groups is None else ' in one group'}"
        )
    return rows, index


def _averaged(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The mean of each group."""
    return np.bincount(index, weights=values) / np.bincount(index)


def _checked_weights(weights: Floats, n: int) -> np.ndarray:
    """Raises BadInput unless there are `n` finite weights above 0."""
    w = np.asarray(weights, float)
    good = np.isfinite(w) & (w > 0)
    if w.shape != (n,) or not good.all():
        raise BadInput(f"expected {n} finite weights above 0, one for each item: got {good.sum()} such of {len(good)}")
    return w


def paired_means(a: Floats, b: Floats, groups: Groups | None = None, weights: Floats | None = None) -> Comparison:
    """Paired t test of mean(b) - mean(a) over the same items, whole groups as the independent units.

    The difference is sum(w (b - a)) / sum(w). A group counts by the sum of its weights, and the standard error is that
    of a ratio of two sums over groups (Cochran 1977, section 6.4). For nats per token with tokens as weights the
    difference is thus exactly that of two perplexities' logarithms. Groups of equal weight give the usual paired t test
    of the groups' means.

    Args:
        a, b: one value an item.
        groups: the group of each item; None for every item by itself.
        weights: the weight of each item; None to let every group count alike, and its items alike.

    Raises:
        BadInput: different lengths, NaN or infinite values, fewer than two groups, or a weight that is not above 0.
    """
    (x, y), index = _aligned({"a": a, "b": b}, groups)
    w = 1 / np.bincount(index)[index] if weights is None else _checked_weights(weights, len(x))
    total, weight = np.bincount(index, weights=w * (y - x)), np.bincount(index, weights=w)
    n, mean = len(total), float(total.sum() / weight.sum())
    spread = (total - mean * weight).std(ddof=1) / weight.mean() / np.sqrt(n)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1) * spread)
    p = float(2 * t.sf(abs(mean) / spread, n - 1)) if spread > 0 else float(mean == 0)
    return Comparison(mean, mean - half, mean + half, p, n, "paired t")


def with_spread(c: Comparison, error: float, df: float) -> Comparison:
    """A comparison over items with a second, independent error: that of how the two subjects were made.

    The variances add. Degrees of freedom are Satterthwaite's (1946): the comparison's own are its n - 1.

    Args:
        c: over items; its interval is a t interval.
        error: the second standard error, in the unit of the difference.
        df: degrees of freedom of the second.
    """
    own = (c.high - c.low) / 2 / t.ppf((1 + LEVEL) / 2, c.n - 1)
    total = np.hypot(own, error)
    if not total > 0:
        return c
    freedom = total**4 / (own**4 / (c.n - 1) + error**4 / df)
    half = float(t.ppf((1 + LEVEL) / 2, freedom) * total)
    p = float(2 * t.sf(abs(c.difference) / total, freedom))
    return replace(c, low=c.difference - half, high=c.difference + half, p=p, test="t, items and trainings")


def paired_bootstrap(
    a: Floats,
    b: Floats,
    groups: Groups | None = None,
    weights: Floats | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Bootstrap of mean(b) - mean(a) over the same items, whole groups resampled (Efron 1979; for two systems Koehn
    2004).

    Nothing is averaged within a group: every item counts by its weight, so for nats per token with tokens as weights
    this is the difference of two perplexities' logarithms. The interval is the percentile one; it is too short for few
    groups (of ten groups it covers some 91 %). The p value is twice the smaller of the shares of resamples on either
    side of zero (zero counts for both), with one added above and below so that it is never 0 (Davison and Hinkley
    1997).

    Args:
        a, b: one value an item.
        groups: the group of each item; None for every item by itself.
        weights: the weight of each item; None for equal ones.
        resamples: how many.
        seed: of the resamples.

    Raises:
        BadInput: different lengths, NaN or infinite values, fewer than two groups, or a weight that is not above 0.
    """
    (x, y), index = _aligned({"a": a, "b": b}, groups)
    w = np.ones(len(x)) if weights is None else _checked_weights(weights, len(x))
    d = w * (y - x)
    means = _resampled(d, w, index, resamples, seed)
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return Comparison(float(d.sum() / w.sum()), *_middle(means), float(p), int(index.max()) + 1, "paired bootstrap")


def signed_rank(a: Floats, b: Floats, groups: Groups | None = None) -> Comparison:
    """Wilcoxon's signed-rank test of b - a; the pairs of a group are averaged first (Wilcoxon 1945).

    It tests whether the differences lie symmetrically about zero, so a few enormous ones weigh no more than their
    ranks. The difference is the Hodges-Lehmann estimate: the median of the n (n + 1) / 2 means of two differences. The
    interval lies between two of those means in order (Hodges and Lehmann 1963), by the exact null distribution for n up
    to 50 and its normal approximation above, as scipy chooses for p. Below 6 groups no such interval reaches 95 %, so
    it is (-inf, inf). p leaves out differences of zero; n counts them. Ties make the interval longer than need be. The
    means take memory: 400 MB for 10,000 groups.

    Raises:
        BadInput: different lengths, NaN or infinite values, or fewer than two groups.
    """
    (x, y), index = _aligned({"a": a, "b": b}, groups)
    d = _averaged(y - x, index)
    means = np.sort(np.concatenate([(d[i:] + value) / 2 for i, value in enumerate(d)]))
    k = _largest_rejected(len(d))
    low, high = (means[k], means[-1 - k]) if k >= 0 else (-np.inf, np.inf)
    p = wilcoxon(d).pvalue if d.any() else 1.0
    return Comparison(float(np.median(means)), float(low), float(high), float(p), len(d), "Wilcoxon signed-rank")


def _largest_rejected(n: int) -> int:
    """The largest sum of signed ranks that a two-sided 5 % test of n differences rejects; -1 if it rejects none."""
    if n > 50:
        mean, deviation = n * (n + 1) / 4, np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return int(np.ceil(mean - norm.ppf((1 + LEVEL) / 2) * deviation)) - 1
    null = np.ones(1)  # P(sum = 0, 1, ...): every rank is in the sum or not, with equal chances
    for rank in range(1, n + 1):
        null = (np.pad(null, (0, rank)) + np.pad(null, (rank, 0))) / 2
    return int(np.searchsorted(null.cumsum(), (1 - LEVEL) / 2, side="right")) - 1


def paired_outcomes(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> Comparison:
    """Exact McNemar test of two sets of right and wrong answers to the same items (McNemar 1947).

    The interval of the difference of proportions is the paired t interval; the p value is exact.
    """
    x, y = np.asarray(a, bool), np.asarray(b, bool)
    means = paired_means(x, y)
    gained, lost = int((~x & y).sum()), int((x & ~y).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Comparison(means.difference, means.low, means.high, float(p), len(x), "exact McNemar")


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for testing them together (Holm 1979); they are compared with 0.05 as before."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()


def holm_adjusted(pairs: Mapping[K, Comparison]) -> dict[K, Comparison]:
    """The same comparisons with their p values adjusted for all of them together, see `holm`."""
    adjusted = holm([c.p for c in pairs.values()])
    return {name: replace(c, p=p) for (name, c), p in zip(pairs.items(), adjusted, strict=True)}


def by_verdict(pairs: Mapping[K, Comparison], higher_is_better: bool = False) -> dict[str, list[K]]:
    """{verdict: names of the comparisons that have it}, all of `VERDICTS` in order."""
    return {word: [k for k, c in pairs.items() if c.verdict(higher_is_better) == word] for word in VERDICTS}


@dataclass(frozen=True)
class Ranking:
    """The result of Friedman's test.

    Attributes:
        statistic: Friedman's statistic.
        p: its p value.
        n: how many items or groups.
        mean_ranks: each name's mean rank; 1 is the smallest value.
        w: Kendall's coefficient of concordance W, from 0 (the rankings cancel) to 1 (all alike).
    """

    statistic: float
    p: float
    n: int
    mean_ranks: dict[str, float]
    w: float


def friedman(table: Mapping[str, Floats], groups: Groups | None = None) -> Ranking:
    """Friedman's test that at least three configurations rank alike over the same items (Friedman 1937).

    Each group's items are first averaged. p is from the chi-squared approximation, rough below ten items; if everything
    is tied the statistic is 0 and p 1. Which pairs differ is for `signed_rank`, with `holm`.

    Raises:
        BadInput: fewer than three configurations, different lengths, NaN or infinite values, or fewer than two groups.
    """
    if len(table) < 3:
        raise BadInput(
            f"Friedman's test needs at least three configurations, got {len(table)}: signed_rank compares two"
        )
    rows, index = _aligned(table, groups)
    means = np.array([_averaged(row, index) for row in rows])
    k, n = means.shape
    statistic, p = friedmanchisquare(*means) if np.ptp(means, axis=0).any() else (0.0, 1.0)
    ranks = rankdata(means, axis=0).mean(axis=1).tolist()
    return Ranking(
        float(statistic), float(p), n, dict(zip(table, ranks, strict=True)), float(statistic / (n * (k - 1)))
    )
