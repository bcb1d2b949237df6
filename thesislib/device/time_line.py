"""Time per token as a line over the bytes that a token reads, fitted on some models in one format and held against
others that it has not seen."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from thesislib.errors import BadInput

BETWEEN, BEYOND, FITTED = "between", "beyond", "fitted"


@dataclass(frozen=True)
class Point:
    """A measured model: bytes of weights that decoding a token reads, and the median seconds per token of each
    repetition."""

    bytes: int
    seconds: tuple[float, ...]

    @property
    def middle(self) -> float:
        """Median seconds per token."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Line:
    """seconds per token = start + bytes / rate.

    start: seconds that a token costs whatever is read. rate: bytes per second of this format's kernels, which unpack as
    they read: not the memory's bandwidth.
    """

    start: float
    rate: float

    def seconds(self, size: float) -> float:
        """Of a token that reads `size` bytes."""
        return self.start + size / self.rate


def fit(points: Sequence[Point]) -> Line:
    """The line of least squares through the points' medians.

    Raises:
        BadInput: fewer than two sizes; or larger models that are not slower, which no machine that was left alone
            shows.
    """
    if len({p.bytes for p in points}) < 2:
        raise BadInput(
            f"a line was to be fitted to {len({p.bytes for p in points})} size of model: expected at least two"
        )
    slope, start = np.polyfit([p.bytes for p in points], [p.middle for p in points], 1)
    if slope <= 0:
        raise BadInput(
            "larger models were not slower: the machine was busy with something else while it was measured; "
            "measure again when it is quiet"
        )
    return Line(float(start), float(1 / slope))


def predict(points: Sequence[Point], size: float, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Seconds per token of a model that reads `size` bytes a token: low, middle, high.

    The middle is the fitted line's. The interval holds 95 % of the lines through one repetition of each point, drawn
    with replacement: what repetitions differ by, not what another machine or format would.
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
        high in ms; error: of the prediction, as a share of what was measured.

    Raises:
        BadInput: a depth that was not measured; see also `fit`.
    """
    if missing := [d for d in fitted if d not in points]:
        raise BadInput(f"depth {missing[0]} was not measured: expected among {', '.join(map(str, sorted(points)))}")
    known, rows = [points[d] for d in fitted], []
    for depth, p in sorted(points.items(), reverse=True):
        low, middle, high = predict(known, p.bytes)
        where = FITTED if depth in fitted else BETWEEN if min(fitted) < depth < max(fitted) else BEYOND
        rows.append(
            {
                "depth": depth,
                "where": where,
                "MB per token": p.bytes / 1e6,
                "measured": 1e3 * p.middle,
                "low": 1e3 * low,
                "predicted": 1e3 * middle,
                "high": 1e3 * high,
                "error": middle / p.middle - 1,
            }
        )
    return pd.DataFrame(rows).set_index("depth")


def mean_error(tables: Sequence[pd.DataFrame], where: str) -> float:
    """Mean of the absolute errors of all tables' rows between, or beyond, the fitted depths; NaN without any."""
    found = [abs(e) for table in tables for e in table.loc[table["where"] == where, "error"]]
    return float(np.mean(found)) if found else float("nan")
