"""A budget shared out over linears as ranks: by effective rank (D-Rank), or by the loss of truncation (SVD-LLM v2)."""

import math
from collections.abc import Callable, Mapping

import torch

from thesislib.compress.factor import effective_rank
from thesislib.compress.selection import LinearKey

Shapes = Mapping[LinearKey, tuple[int, int]]
Ranks = Mapping[LinearKey, int]
Cost = Callable[[int, tuple[int, int]], int]  # of a rank for a shape


def parameters(rank: int, shape: tuple[int, int]) -> int:
    """Those of a pair."""
    return rank * sum(shape)


def by_effective_rank(
    spectra: Mapping[LinearKey, torch.Tensor], shapes: Shapes, uniform: Ranks, cost: Cost = parameters
) -> dict[LinearKey, int]:
    """D-Rank: ranks in proportion to sqrt(effective rank / (m + n)), at the cost of the uniform ranks at most."""
    weight = {key: math.sqrt(effective_rank(spectra[key]) / sum(shape)) for key, shape in shapes.items()}
    most = max(_most(shape) for shape in shapes.values()) / min(weight.values())
    return largest(lambda scale: {key: scale * w for key, w in weight.items()}, shapes, uniform, cost, (0.0, most))


def by_loss(
    spectra: Mapping[LinearKey, torch.Tensor], shapes: Shapes, uniform: Ranks, cost: Cost = parameters
) -> dict[LinearKey, int]:
    """SVD-LLM v2: within each kind of linear the share of parameters removed is proportional to 1 / log L, where L is
    the truncation error at the uniform rank, relative to the kind's least and times e, so that its logarithm is at
    least 1 whatever the scale of the moments. (The paper's logarithm is of the error itself.)"""
    ranks = {}
    for kind in dict.fromkeys(name for _, name in shapes):
        keys = [key for key in shapes if key[1] == kind]
        loss = {key: float(spectra[key][uniform[key] :].square().sum()) ** 0.5 for key in keys}
        least = min((x for x in loss.values() if x > 0), default=1.0)
        inverse = {key: 1 / math.log(max(x / least, 1.0) * math.e) for key, x in loss.items()}
        # the proportion is found by trial, since a rank is at least 1 and at most break-even
        whole = {key: math.prod(shapes[key]) / sum(shapes[key]) for key in keys}
        ranks |= largest(_left(whole, inverse), shapes, {key: uniform[key] for key in keys}, cost, (1e-3, 1e6))
    return ranks


def _left(whole: Mapping[LinearKey, float], inverse: Mapping[LinearKey, float]) -> Callable[[float], dict]:
    """The ranks that are left of break-even at a scale, if the share that goes is inverse / scale."""
    return lambda scale: {key: whole[key] * (1 - inverse[key] / scale) for key in whole}


def largest(
    at: Callable[[float], Mapping[LinearKey, float]],
    shapes: Shapes,
    uniform: Ranks,
    cost: Cost,
    scales: tuple[float, float],
) -> dict[LinearKey, int]:
    """The largest ranks, of those that grow with a scale, that cost no more than the uniform ranks.

    Args:
        at: the ranks at a scale, not rounded; none is taken below 1, nor at break-even or above.
        shapes: (outputs, inputs) of each projection.
        uniform: the ranks that set the budget.
        cost: of a rank, e.g. parameters.
        scales: the smallest and the largest.
    """
    budget = sum(cost(rank, shapes[key]) for key, rank in uniform.items())

    def ranks(scale: float) -> dict[LinearKey, int]:
        return {key: min(max(int(r), 1), _most(shapes[key])) for key, r in at(scale).items()}

    low, high = scales
    for _ in range(100):
        middle = (low + high) / 2
        fits_in = sum(cost(rank, shapes[key]) for key, rank in ranks(middle).items()) <= budget
        low, high = (middle, high) if fits_in else (low, middle)
    return ranks(low)


def _most(shape: tuple[int, int]) -> int:
    """The largest rank with fewer parameters than the weight."""
    m, n = shape
    return max((m * n - 1) // (m + n), 1)
