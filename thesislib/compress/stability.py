"""How far the choice of blocks depends on the calibration windows: the bootstrap of `Depth` with metric perplexity."""

from typing import NamedTuple

import numpy as np


class Resampled(NamedTuple):
    """What is chosen with so many windows.

    Args:
        shares: (B,) the share of resamples in which each block is among those that go.
        same: the share of resamples in which the same blocks go as with all windows.
        regret: by how much the loss without one of the chosen blocks is higher than without one that all windows
            choose: nats a token of all windows, mean over chosen blocks and resamples.
    """

    shares: np.ndarray
    same: float
    regret: float


def chosen(losses: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k blocks that go, ascending: those without which the mean loss is lowest, first ones first.

    Args:
        losses: (..., B) mean loss without each block.
        k: how many go.
    """
    return np.sort(np.argsort(losses, axis=-1, kind="stable")[..., :k], axis=-1)


def resampled(losses: np.ndarray, k: int, windows: int, resamples: int = 10_000, seed: int = 0) -> Resampled:
    """The choice of k blocks from `windows` windows, drawn with replacement (Efron's bootstrap, m out of n).

    Windows count as independent: those of one document are alike, and then the choice is less stable than it seems.

    Args:
        losses: (B, N) each window's mean loss without each block, see `thesislib.compress.depth.window_losses`.
        k: how many blocks go.
        windows: how many are drawn.
        resamples: how often.
        seed: of the draws.
    """
    blocks, n = losses.shape
    draws = np.random.default_rng(seed).multinomial(windows, np.full(n, 1 / n), size=resamples)
    found, mean = chosen(draws @ losses.T, k), losses.mean(1)  # (resamples, k)
    best = chosen(mean, k)
    shares = np.bincount(found.ravel(), minlength=blocks) / resamples
    same = (found == best).all(1).mean()
    return Resampled(shares, float(same), float(mean[found].mean() - mean[best].mean()))
