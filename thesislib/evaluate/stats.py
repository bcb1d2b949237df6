"""Intervals and paired tests: how sure a number is, and whether two differ.

Errors of neighbouring windows are alike, so where documents are known they, not windows, are resampled. Two subjects
are always compared on the same items, item by item: the items' own difficulty then cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t, ttest_1samp

from thesislib.errors import BadInput

LEVEL = 0.95


def bootstrap_mean(totals: Sequence[float], weights: Sequence[float], groups: Sequence, *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of sum(totals) / sum(weights), whole groups resampled (Efron 1979).

    With a single group there is nothing to resample, so no interval: (nan, nan).
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return np.nan, np.nan
    total = np.bincount(index, weights=np.asarray(totals, float))
    weight = np.bincount(index, weights=np.asarray(weights, float))
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    low, high = np.quantile((draws @ total) / (draws @ weight), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def proportion(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion (Wilson 1927); sensible at 0 and n, unlike the bootstrap."""
    if not 0 <= successes <= n or n < 1:
        raise BadInput(f"{successes} successes of {n}: expected 0 <= successes <= n and n >= 1")
    interval = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Comparison:
    """A difference b - a with its 95 % interval, the two-sided p value, the number of pairs and the test."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    test: str


def paired_means(a: Sequence[float], b: Sequence[float], groups: Sequence | None = None) -> Comparison:
    """Paired t test of b - a, each group's pairs first averaged.

    Raises:
        BadInput: different lengths, or fewer than two groups.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise BadInput(f"a paired test needs the same items on both sides: got {len(a)} and {len(b)}")
    index = np.unique(np.asarray(groups), return_inverse=True)[1] if groups is not None else np.arange(len(a))
    d = np.bincount(index, weights=b - a) / np.bincount(index)
    if len(d) < 2:
        raise BadInput("a paired test needs at least two independent items or documents")
    spread = d.std(ddof=1) / np.sqrt(len(d))
    half = t.ppf((1 + LEVEL) / 2, len(d) - 1) * spread
    p = float(ttest_1samp(d, 0).pvalue) if spread > 0 else float(d.mean() == 0)
    return Comparison(float(d.mean()), float(d.mean() - half), float(d.mean() + half), p, len(d), "paired t")


def paired_outcomes(a: Sequence[bool], b: Sequence[bool]) -> Comparison:
    """Exact McNemar test of two sets of right and wrong answers to the same items (McNemar 1947).

    The interval of the difference of proportions is the paired t interval; the p value is exact.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    means = paired_means(a, b)
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Comparison(means.difference, means.low, means.high, float(p), len(a), "exact McNemar")


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for testing them together (Holm 1979): still valid to compare with 0.05."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted.tolist()
