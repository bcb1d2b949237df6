"""Searches for the blocks to remove, held against the best of all sets; and whether damages add up.

Every function takes measured sets and their losses (len(sets), N), as `thesislib.compress.depth.sets_losses` gives
them. Intervals are over the N windows, see `thesislib.compress.agreement`.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from thesislib.compress.agreement import Estimate, estimate, resampled_means, spearman
from thesislib.compress.stability import chosen
from thesislib.errors import BadInput

Blocks = tuple[int, ...]


class Found(NamedTuple):
    """What a search finds, among all measured sets of its size.

    Args:
        blocks: that it removes, in order of their index.
        loss: the mean loss without them.
        regret: how much higher it is than the least.
        rank: the place among the sets; 1 is the best.
        of: how many sets there are.
    """

    blocks: Blocks
    loss: float
    regret: Estimate
    rank: Estimate
    of: int


class _Measured:
    """Where each set stands among the measured ones, and which blocks there are."""

    def __init__(self, sets: Sequence[Collection[int]], losses: np.ndarray):
        if len(sets) != len(losses):
            raise BadInput(f"{len(losses)} rows of losses for {len(sets)} sets: expected one for each set")
        self.sets = [tuple(sorted(s)) for s in sets]
        self.index = {s: i for i, s in enumerate(self.sets)}
        self.singles = [i for i, s in enumerate(self.sets) if len(s) == 1]

    def of(self, size: int) -> list[int]:
        """The rows of all sets of a size."""
        return [i for i, s in enumerate(self.sets) if len(s) == size]

    def row(self, blocks: Collection[int]) -> int:
        """Raises BadInput if the set was not measured."""
        key = tuple(sorted(blocks))
        if key not in self.index:
            raise BadInput(f"the loss without blocks {', '.join(map(str, key)) or '(none)'} was not measured")
        return self.index[key]

    def least_singles(self, losses: np.ndarray, k: int) -> int:
        """The row of the k blocks whose single losses are least, from the losses of every set."""
        return self.row([self.sets[self.singles[i]][0] for i in chosen(losses[self.singles], k)])

    def greedy(self, losses: np.ndarray, k: int) -> int:
        """The row that is reached by adding to the set, k times, the block that costs least beside it."""
        blocks: Blocks = ()
        for _ in range(k):
            more = [self.row((*blocks, self.sets[i][0])) for i in self.singles if self.sets[i][0] not in blocks]
            blocks = self.sets[more[int(np.argmin(losses[more]))]]
        return self.row(blocks)


def searches(
    sets: Sequence[Collection[int]],
    losses: np.ndarray,
    k: int,
    others: Mapping[str, Collection[int]] | None = None,
    resamples: int = 1_000,
    seed: int = 0,
) -> dict[str, Found]:
    """What removing k blocks costs: {"best": of all sets, "greedy": one block after the other, "one-shot": the k that
    cost least alone}, and other choices by their names.

    Each search is done again in every resample and held against the best there, on the windows that it searched.
    Other choices stay as they are. What was chosen on other windows may be one of them: its loss on these is not the
    luck of a search. The blocks that a search may take are those that were measured alone. For two blocks greedy is
    never dearer than one-shot, whose pair is among those that it looks at; for more it may be.

    Args:
        sets: the measured ones: every single block, all sets of k, and what greedy may meet in between.
        losses: (len(sets), N).
        k: how many blocks go.
        others: {name: blocks}, as other rankings choose.
        resamples: of the windows; 0 for no intervals, if not all sets that other windows may lead to were measured.
        seed: of them.

    Raises:
        BadInput: a set that was not measured, or a row too many or few; fewer single blocks than k.
    """
    known = _Measured(sets, losses)
    if not 1 <= k <= len(known.singles):
        raise BadInput(f"k is {k}: expected 1 to {len(known.singles)}, as many blocks as were measured alone")
    rows, means = known.of(k), resampled_means(losses, resamples, seed)
    if not rows:
        raise BadInput(f"no set of {k} blocks was measured: expected all of them")
    at = {
        "best": np.array(rows)[means[:, rows].argmin(1)],
        "greedy": np.array([known.greedy(m, k) for m in means]),
        "one-shot": np.array([known.least_singles(m, k) for m in means]),
    }
    for name, blocks in (others or {}).items():
        if len(blocks) != k:
            raise BadInput(f"'{name}' removes {len(blocks)} blocks: expected {k}")
        at[name] = np.full(len(means), known.row(blocks))
    every, found = means[:, rows], {}
    for name, where in at.items():
        loss = np.take_along_axis(means, where[:, None], 1)
        regret, rank = loss[:, 0] - every.min(1), 1 + (every < loss).sum(1)
        found[name] = Found(known.sets[where[0]], float(loss[0, 0]), estimate(regret), estimate(rank), len(rows))
    return found


class Additivity(NamedTuple):
    """How far the losses of sets are what smaller sets predict.

    Args:
        sets: of the size that is predicted.
        predicted: (len(sets),) the mean loss that smaller sets predict.
        excess: (len(sets),) what is lost beyond; above 0 if blocks can stand in for each other.
        r2: the share of the losses' variance over sets that the prediction explains, below 0 if their mean predicts
            better; nothing is fitted.
        spearman: the rank correlation of prediction and loss.
    """

    sets: list[Blocks]
    predicted: np.ndarray
    excess: np.ndarray
    r2: Estimate
    spearman: Estimate


def additivity(
    sets: Sequence[Collection[int]],
    losses: np.ndarray,
    size: int = 2,
    order: int = 1,
    resamples: int = 1_000,
    seed: int = 0,
) -> Additivity:
    """Predict the losses of sets of a size from those of sets of up to `order` blocks.

    Order 1 adds the damages of single blocks to the whole model's loss, so the excess of a pair is loss(ab) - loss(a) -
    loss(b) + loss(whole). Order 2 adds the excesses of pairs too, and so on.

    Args:
        sets: the measured ones, with the empty set and every smaller one that is needed.
        losses: (len(sets), N).
        size: of the sets to predict.
        order: of the largest that predict.
        resamples: of the windows.
        seed: of them.

    Raises:
        BadInput: a set that was not measured, or a row too many or few; an order that is not below the size; fewer than
            two sets of the size.
    """
    if not 1 <= order < size:
        raise BadInput(f"order is {order}: expected 1 to {size - 1}, for sets of {size} blocks")
    known, losses = _Measured(sets, losses), np.asarray(losses, float)
    rows = known.of(size)
    if len(rows) < 2:
        raise BadInput(f"{len(rows)} sets of {size} blocks: expected at least two")
    predicted = np.zeros((len(rows), losses.shape[1]))
    for smaller in range(order + 1):
        # of inclusion and exclusion, cut off at the order
        factor = (-1) ** (order - smaller) * math.comb(size - smaller - 1, order - smaller)
        parts = [[known.row(s) for s in itertools.combinations(known.sets[i], smaller)] for i in rows]
        predicted += factor * losses[parts].sum(1)
    guess, true = resampled_means(predicted, resamples, seed), resampled_means(losses[rows], resamples, seed)
    r2 = 1 - ((true - guess) ** 2).sum(1) / ((true - true.mean(1, keepdims=True)) ** 2).sum(1)
    return Additivity(
        [known.sets[i] for i in rows], guess[0], (true - guess)[0], estimate(r2), estimate(spearman(guess, true))
    )
