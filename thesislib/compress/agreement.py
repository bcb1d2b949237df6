"""How far rankings of blocks agree, how much of a ranking is noise of its items, and what choosing by it costs.

A score says how much is lost without a block: the block with the lowest goes first, and of equal ones the first.
Intervals are 95 % percentile ones of the bootstrap over items (Efron 1979); the ranking is made again in each resample.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from thesislib.compress.stability import chosen
from thesislib.errors import BadInput

MIDDLE = (0.025, 0.975)


class Estimate(NamedTuple):
    """A number and its interval, which is nan if nothing was resampled.

    Args:
        value: the number.
        low: the lower bound.
        high: the upper bound.
    """

    value: float
    low: float
    high: float


def estimate(values: np.ndarray) -> Estimate:
    """The first value, and the interval of the others, which are those of the resamples."""
    low, high = np.quantile(values[1:], MIDDLE) if len(values) > 1 else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))


def resampled_means(outcomes: np.ndarray, resamples: int = 2_000, seed: int = 0) -> np.ndarray:
    """The mean of each row over all items, then over the items of each resample, (1 + resamples, rows).

    Rows share the items that are drawn. So do two calls with as many items and the same seed: outcomes of the same
    items stay paired, and those of other items need another seed.

    Args:
        outcomes: (rows, N) one number an item, such as what is lost without each block.
        resamples: how many.
        seed: of the draws.
    """
    n = outcomes.shape[-1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return np.concatenate([np.ones((1, n)), draws]) @ np.asarray(outcomes, float).T / n


# ---------------------------------------------------------------- two rankings


class Agreement(NamedTuple):
    """How far a ranking of B blocks agrees with a reference.

    Args:
        spearman: Spearman's rank correlation.
        kendall: Kendall's tau-b.
        shared: the share of the k least that are among the reference's k least; k / B for a random order.
        misranked: the share of blocks that are not at the reference's place; 1 - 1 / B for a random order.
        regret: how much more the k least lose together than the reference's k least, by the reference's scores.
    """

    spearman: Estimate
    kendall: Estimate
    shared: Estimate
    misranked: Estimate
    regret: Estimate


def agreement(scores: np.ndarray, reference: np.ndarray, k: int) -> Agreement:
    """Compare a ranking with a reference.

    An interval holds the agreement that as many other items would show. It reaches further down than up, for a resample
    is noisier than the items. Endless items would show more: noise in a ranking lowers its agreement with any other,
    and with itself on other items, beside which every agreement should stand. The regret adds up the scores of single
    blocks; for losses of whole sets see `thesislib.compress.exhaustive`.

    Args:
        scores: (B,), or (1 + resamples, B) of `resampled_means` or made from it.
        reference: the same, by which the regret is counted too. Where both are resampled they have as many resamples.
        k: how many blocks go.

    Raises:
        BadInput: different blocks, scores that are not numbers, or a k that is not between 1 and B.
    """
    x, y = np.atleast_2d(scores), np.atleast_2d(reference)
    _check(x, y)
    blocks = x.shape[1]
    if not 1 <= k <= blocks:
        raise BadInput(f"k is {k}: expected 1 to {blocks}, as many as there are blocks")
    x, y = np.broadcast_arrays(x, y)
    least, best = chosen(x, k), chosen(y, k)
    both = (least[:, :, None] == best[:, None, :]).any(2).mean(1)
    elsewhere = (np.argsort(x, 1, "stable") != np.argsort(y, 1, "stable")).mean(1)
    regret = np.take_along_axis(y, least, 1).sum(1) - np.take_along_axis(y, best, 1).sum(1)
    return Agreement(*map(estimate, (spearman(x, y), kendall(x, y), both, elsewhere, regret)))


def _check(*scores: np.ndarray) -> None:
    """Raises BadInput for scores of different blocks, and for nan."""
    if len({x.shape[-1] for x in scores}) > 1:
        raise BadInput(f"scores of {' and '.join(str(x.shape[-1]) for x in scores)} blocks: expected the same blocks")
    if any(np.isnan(x).any() for x in scores):
        raise BadInput("a score is nan: expected a number for each block; leave blocks without one out on every side")


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of the last dimension, (...); ties have their mean rank, equal scores give nan."""
    return _correlation(rankdata(x, axis=-1), rankdata(y, axis=-1))


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of the last dimension, (...); equal scores give nan."""
    # ranks and not scores: the difference of two infinite losses has no sign
    a, b = (np.sign(r[..., :, None] - r[..., None, :]) for r in (rankdata(x, axis=-1), rankdata(y, axis=-1)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum((-1, -2)) / np.sqrt((a * a).sum((-1, -2)) * (b * b).sum((-1, -2)))


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the last dimension."""
    a, b = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def partial_spearman(
    x: np.ndarray, y: np.ndarray, given: np.ndarray, permutations: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The rank correlation of x and y that other scores do not explain, and its two-sided p value.

    Ranks of x and y are regressed on those of `given`, and what is left is correlated. For p what is left of x is
    permuted over blocks; the observed order counts as one of the permutations, so p is never 0.

    Args:
        x, y: (B,).
        given: (B,), or (m, B) for several scores.
        permutations: how many.
        seed: of them.

    Raises:
        BadInput: different blocks, scores that are not numbers, or fewer than m + 3 blocks.
    """
    z = np.atleast_2d(given)
    _check(x, y, z)
    if len(x) < len(z) + 3:
        raise BadInput(f"{len(x)} blocks: expected at least {len(z) + 3} for a partial correlation given {len(z)}")
    design = np.column_stack([np.ones(len(x)), rankdata(z, axis=1).T])
    ranks = np.column_stack([rankdata(x), rankdata(y)])
    left = ranks - design @ np.linalg.lstsq(design, ranks)[0]
    scale = np.linalg.norm(left, axis=0)
    if (scale < 1e-9 * np.linalg.norm(ranks, axis=0)).any():
        return np.nan, np.nan  # the given scores say all
    a, b = (left / scale).T
    rho = float(a @ b)
    rng = np.random.default_rng(seed)
    others = rng.permuted(np.broadcast_to(a, (permutations, len(a))), axis=1) @ b
    beyond = int((np.abs(others) >= abs(rho) - 1e-12).sum())
    return rho, (1 + beyond) / (1 + permutations)


# ---------------------------------------------------------------- several tasks


def variance_of_z(scores: np.ndarray) -> np.ndarray:
    """How much each block's standing differs between tasks, (B,): each task's scores as z over blocks, their variance
    over tasks (2605.14075).

    Noise of the items adds to it, see `variance_of_items`. Two metrics are compared over blocks by
    `thesislib.evaluate.stats.signed_rank`. For `thesislib.evaluate.stats.friedman` blocks are what is ranked, and tasks
    the items; its W is 1 if all tasks rank alike.

    Args:
        scores: (tasks, B).

    Raises:
        BadInput: fewer than two tasks, scores that are not numbers, or a task whose scores are all equal.
    """
    scores = np.asarray(scores, float)
    _check(scores)
    if len(scores) < 2:
        raise BadInput(f"{len(scores)} task: expected at least two, between which a block's standing can differ")
    spread = scores.std(1, keepdims=True)
    if not spread.all():
        raise BadInput("a task scores all blocks alike: expected scores that rank them; leave the task out")
    return ((scores - scores.mean(1, keepdims=True)) / spread).var(0, ddof=1)


def variance_of_items(means: np.ndarray) -> np.ndarray:
    """What the choice of items alone adds to `variance_of_z`, (B,): the variance of a task's resampled scores about
    their mean over blocks.

    The unit is the spread of the scores of all items, which is that of their z. A resample's own spread has noise
    twice, by the items and by the resample: scores of nothing but noise would seem to be half of it. This is rather too
    much than too little: (B - 1) / (B - 3) times for nothing but noise, less otherwise.

    Args:
        means: (1 + resamples, B) `resampled_means` of a task.
    """
    about = means[1:] - means[1:].mean(1, keepdims=True)
    return about.var(0, ddof=1) / means[0].var()


# ---------------------------------------------------------------- few items, and other items


class Settled(NamedTuple):
    """How a ranking from so many items agrees with a reference: the median over draws, and the middle 95 % of them.

    Args:
        spearman: Spearman's rank correlation.
        shared: the share of the k least that are among the reference's k least.
    """

    spearman: Estimate
    shared: Estimate


def settling(
    outcomes: np.ndarray, reference: np.ndarray, k: int, sizes: Sequence[int], draws: int = 1_000, seed: int = 0
) -> dict[int, Settled]:
    """{n: how the ranking from n items agrees with a reference from other items}, n items drawn without replacement.

    Towards all items the draws become the same ones, so the last sizes spread less than new items would. A draw by
    which all blocks lose alike has a correlation of 0.

    Args:
        outcomes: (B, N) what is lost of each item without each block.
        reference: (B,) the scores by items that are not among these.
        k: how many blocks go.
        sizes: how many items.
        draws: how often.
        seed: of them; a draw of more items has those of fewer.

    Raises:
        BadInput: a size that is not between 1 and N; see `agreement`.
    """
    n = outcomes.shape[1]
    if wrong := [size for size in sizes if not 1 <= size <= n]:
        raise BadInput(f"{wrong[0]} items: expected 1 to {n}, as many as there are")
    rng, ends = np.random.default_rng(seed), np.asarray(sizes) - 1
    found = np.array([outcomes[:, rng.permutation(n)].cumsum(1)[:, ends] for _ in range(draws)])  # (draws, B, sizes)
    settled = {}
    for i, size in enumerate(sizes):
        # cumsum may differ in the last digit between equal sums
        means = np.round(found[..., i] / size, 12)
        same = (chosen(means, k)[:, :, None] == chosen(reference, k)[None, None, :]).any(2).mean(1)
        # a draw by which all blocks lose alike ranks nothing, and agrees as a random order does
        rho = np.where(np.ptp(means, 1) == 0, 0, spearman(means, np.asarray(reference)[None]))
        middle = [np.quantile(x, (0.5, *MIDDLE)) for x in (rho, same)]
        settled[size] = Settled(*(Estimate(*map(float, q)) for q in middle))
    return settled


class Curse(NamedTuple):
    """What is left of chosen blocks' scores on other items: the winner's curse.

    Args:
        blocks: the rows that were chosen, ascending.
        seen: their mean score on the items by which they were chosen.
        kept: that on other items; the interval is over those, with the blocks as chosen.
        still: how many of them still score below 0.
        slope: of the scores on other items over those on the first, of all blocks: 1 if they come back whole, 0 if they
            were noise. The interval is over the other items.
    """

    blocks: np.ndarray
    seen: float
    kept: Estimate
    still: int
    slope: Estimate


def winners_curse(
    first: np.ndarray, others: np.ndarray, k: int | None = None, resamples: int = 2_000, seed: int = 0
) -> Curse:
    """Choose blocks by some items and score them by others.

    Args:
        first: (B, N) what is lost of each item without each block; below 0 is better than the whole model.
        others: (B, M) the same of items that are not among the first.
        k: how many are chosen, those that lose least; None for all that score below 0.
        resamples: of the other items.
        seed: of them.

    Raises:
        BadInput: different blocks, or a k that is not between 1 and B.
    """
    _check(first.T, others.T)
    scores, means = first.mean(1), resampled_means(others, resamples, seed)
    if k is not None and not 1 <= k <= len(scores):
        raise BadInput(f"k is {k}: expected 1 to {len(scores)}, as many as there are blocks")
    blocks = chosen(scores, int((scores < 0).sum()) if k is None else k)
    centred = scores - scores.mean()
    with np.errstate(invalid="ignore"):
        slope = means @ centred / (centred @ centred)
    if not len(blocks):
        return Curse(blocks, np.nan, Estimate(np.nan, np.nan, np.nan), 0, estimate(slope))
    kept = means[:, blocks]
    return Curse(
        blocks, float(scores[blocks].mean()), estimate(kept.mean(1)), int((kept[0] < 0).sum()), estimate(slope)
    )
