"""Quantisation grids: the levels that weights are rounded to, and rounding to the nearest."""

from dataclasses import dataclass
from math import gcd

import torch

from thesislib.errors import BadInput, unknown

BITS = (2, 3, 4, 5, 6, 7, 8)
GRIDS = ("symmetric", "asymmetric", "minimum")
CLIPS = ("none", "squared", "weighted")
SHRINKS = tuple(1 - 0.02 * k for k in range(31))  # of the range, down to 0.4: best for 2 bits is about 0.6, for 4 0.9
ROW = "row"
NO_GRID = {1: "1 bit needs another method, ", 16: "16 bits are what the weights have already, "}


@dataclass(frozen=True)
class Grid:
    """2^bits levels for each run of `group` consecutive weights of a row.

    Attributes:
        bits: 2 to 8.
        group: weights that share a scale; 'row' for all of a row.
        kind: 'symmetric', 'asymmetric' or 'minimum', see below.

    A code is the number of a level. The level's value is, by kind:

    - symmetric: scale * (code - 2^(bits-1));
    - asymmetric: scale * (code - zero), where the zero-point is one of the codes;
    - minimum: scale * code + minimum, with a floating minimum (llama.cpp's Q4_1). Only this kind lacks an exact 0.

    Scales and minima are rounded to float16 before they are used, so the stored numbers give the same weights.

    Raises:
        BadInput: other bits, kind, or a group below 2.
    """

    bits: int = 4
    group: int | str = 64
    kind: str = "symmetric"

    def __post_init__(self):
        if self.bits not in BITS:
            raise BadInput(f"{self.bits} bits: {NO_GRID.get(self.bits, '')}expected {', '.join(map(str, BITS))}")
        if self.kind not in GRIDS:
            raise unknown("grid", self.kind, GRIDS)
        if self.group != ROW and not (isinstance(self.group, int) and self.group >= 2):
            raise BadInput(f"group '{self.group}': expected at least 2 weights, or '{ROW}' for a whole row")

    @property
    def levels(self) -> int:
        """The number of steps from the lowest level to the highest, which is the largest code."""
        return 2**self.bits - 1

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is exactly one of the levels of every group."""
        return self.kind != "minimum"

    def size(self, columns: int) -> int:
        """The weights in a group of a row of `columns`."""
        return columns if self.group == ROW else int(self.group)

    def check(self, inputs: dict[str, int]) -> None:
        """Raises BadInput if the group does not divide the rows of some projection; the message lists groups that do.

        Args:
            inputs: the row length of each projection by name.
        """
        for name, columns in inputs.items():
            if columns % self.size(columns):
                common = gcd(*inputs.values())
                fit = [n for n in range(8, common + 1) if common % n == 0]
                raise BadInput(
                    f"group {self.group} does not divide the rows of {name} ({columns} inputs): "
                    f"{', '.join(map(str, fit)) or 'no group of 8 or more'} divide all rows here, and '{ROW}' "
                    "always fits"
                )

    def fit(
        self, w: torch.Tensor, clip: str = "none", importance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and offset of each group.

        Args:
            w: (..., n) float32 weights, a group in the last dimension.
            clip: 'none' spans the group's whole range. 'squared' spans the share of it (1 down to 0.4 in steps of 0.02)
                with the least squared rounding error. 'weighted' multiplies each squared error by `importance`.
            importance: broadcasts against w, e.g. the mean squares of the inputs.

        Returns:
            scale (...) and offset (...), float32. The offset is the zero-point, for kind 'minimum' the minimum.
        """
        if clip not in CLIPS:
            raise unknown("clip", clip, CLIPS)
        low, high = w.amin(-1), w.amax(-1)
        if clip == "none":
            return self._span(low, high, 1.0)
        best, least = self._span(low, high, 1.0), torch.full_like(low, torch.inf)
        for shrink in SHRINKS:
            scale, offset = self._span(low, high, shrink)
            s, o = scale[..., None], offset[..., None]
            squares = self.values(self.codes(w, s, o), s, o).sub_(w).square_()
            error = (squares * importance if clip == "weighted" else squares).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
        return best

    def codes(self, w: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The code of the level nearest to each weight, as float32."""
        codes = (w / scale).round_().add_(offset) if self.holds_zero else ((w - offset) / scale).round_()
        return codes.clamp_(0, self.levels)

    def values(self, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """The values of the levels that codes number, float32."""
        return (codes - offset) * scale if self.holds_zero else codes * scale + offset

    def _span(self, low: torch.Tensor, high: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and offset of levels that span the share `shrink` of the range from low to high."""
        if self.kind == "symmetric":
            # as in GPTQ's code: the largest absolute value lies half a step outside the levels, and 0 is a level
            scale = _half(2 * shrink / self.levels * torch.maximum(-low, high))
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        if self.kind == "asymmetric":
            low, high = shrink * low.clamp(max=0), shrink * high.clamp(min=0)
            scale = _half((high - low) / self.levels)
            return scale, (-low / scale).round().clamp(0, self.levels)
        cut = (1 - shrink) / 2 * (high - low)
        return _half((high - low) * shrink / self.levels), (low + cut).clamp(-65504.0, 65504.0).half().float()


def _half(scale: torch.Tensor) -> torch.Tensor:
    """The float16 number nearest to each scale, positive and finite."""
    return scale.clamp(2.0**-24, 65504.0).half().float()


@dataclass(frozen=True)
class Quantised:
    """A weight on a grid.

    Attributes:
        grid: the grid.
        codes: (rows, columns) uint8.
        scale: (rows, groups) float32, numbers that float16 holds exactly.
        offset: (rows, groups) float32, see `Grid.fit`.
        index: (columns,) the group of each column; None where a group's columns are neighbours.
    """

    grid: Grid
    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    index: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The quantised weight, (rows, columns) float32."""
        codes = self.codes.float()
        if self.index is not None:
            return self.grid.values(codes, self.scale[:, self.index], self.offset[:, self.index])
        groups = codes.view(len(codes), self.scale.shape[1], -1)
        return self.grid.values(groups, self.scale[..., None], self.offset[..., None]).view_as(codes)

    def rows(self, start: int, end: int) -> "Quantised":
        """The rows from start to end."""
        return Quantised(self.grid, self.codes[start:end], self.scale[start:end], self.offset[start:end], self.index)


def round_to_nearest(
    w: torch.Tensor, grid: Grid, clip: str = "none", importance: torch.Tensor | None = None
) -> Quantised:
    """Each weight rounded to the nearest level of its group.

    Args:
        w: (rows, columns).
        grid: the grid.
        clip: how each group's scale is chosen, see `Grid.fit`.
        importance: (columns,), see `Grid.fit`.
    """
    groups = w.float().view(len(w), -1, grid.size(w.shape[1]))
    scale, offset = grid.fit(groups, clip, None if importance is None else importance.view(groups.shape[1:]))
    codes = grid.codes(groups, scale[..., None], offset[..., None])
    return Quantised(grid, codes.to(torch.uint8).view(w.shape), scale, offset)
