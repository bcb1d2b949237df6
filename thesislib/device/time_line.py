"""Time per token as a line over the bytes that a token reads, fitted on some models of one format and tested on
others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from thesislib.errors import BadInput

BETWEEN, BEYOND, FITTED = "between", "beyond", "fitted"


@dataclass(frozen=True)
class Point:
    """A measured model.

    Attributes:
        bytes: of weights that decoding a token reads.
        middle: the median seconds per token, over all repetitions' tokens.
        seconds: that of each repetition.
    """

    bytes: int
    middle: float
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """seconds per token = start + bytes / rate.

    Attributes:
        start: seconds of a token that do not depend on the bytes.
        rate: bytes per second of this format's kernels. They unpack as they read, so it is not the memory's bandwidth.
    """

    start: float
    rate: float

    def seconds(self, size: float) -> float:
        """The seconds of a token that reads `size` bytes."""
        return self.start + size / self.rate


def fit(points: Sequence[Point]) -> Line:
    """The line of least squares through the points' medians.

    Raises:
        BadInput: fewer than two sizes; larger models that are not slower, as only a busy machine shows.
    """
    if (sizes := len({p.bytes for p in points})) < 2:
        raise BadInput(f"a line was to be fitted to {sizes} size of model: expected at least two")
    slope, start = np.polyfit([p.bytes for p in points], [p.middle for p in points], 1)
    if slope <= 0:
        raise BadInput(
            "larger models were not slower: the machine was busy with something else while it was measured; "
            "measure again when it is quiet"
        )
    return Line(float(start), float(1 / slope))


def predict(points: Sequence[Point], size: float, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """The seconds per token of a model that reads `size` bytes a token: low, middle, high.

    The middle is the fitted line's. The interval holds 95 % of the lines through one repetition of each point, drawn
    with replacement. It shows how repetitions differ, not how another machine or format would.
    """
    middle = fit(points).seconds(size)
    draw = np.random.default_rng(seed)
    x = np.array([p.bytes for p in points], float)
    y = np.stack([draw.choice(p.seconds, draws) for p in points])
    slopes = ((x - x.mean()) @ (y - y.mean(0))) / ((x - x.mean()) ** 2).sum()
    low, high = np.quantile(y.mean(0) + slopes * (size - x.mean()), (0.025, 0.975))
    return min(float(low), middle), middle, max(float(high), middle)


def held_out(points: Mapping[int, Point], fitted: Sequence[int]) -> pd.DataFrame:
    """Measured and predicted milliseconds per token by depth.

    Args:
        points: by depth (blocks).
        fitted: the depths that the line is fitted on.

    Returns:
        Indexed by depth; where: fitted, between or beyond the fitted depths; MB per token; measured, low, predicted and
        high in ms; error: of the prediction, as a share of the measured time.

    Raises:
        BadInput: a depth that was not measured; see also `fit`.
    """
    if missing := [d for d in fitted if d not in points]:
        raise BadInput(f"depth {missing[0]} was not measured: expected among {', '.join(map(str, sorted(points)))}")
    known, rows = [points[d] for d in fitted], []
    for depth, p in sorted(points.items(), reverse=True):
        low, middle, high = predict(known, p.bytes)
        inside = BETWEEN if min(fitted) < depth < max(fitted) else BEYOND
        milliseconds = (1e3 * s for s in (p.middle, low, middle, high))
        where = FITTED if depth in fitted else inside
        rows.append((depth, where, p.bytes / 1e6, *milliseconds, middle / p.middle - 1))
    columns = ["depth", "where", "MB per token", "measured", "low", "predicted", "high", "error"]
    return pd.DataFrame(rows, columns=columns).set_index("depth")
