"""HQQ, half-quadratic quantisation: the offset of each group is fitted to its weights, without calibration data."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from thesislib.compress.gptq import Rtn
from thesislib.compress.stage import stage
from thesislib.errors import BadInput, unknown
from thesislib.model.grid import Grid, Quantised, round_to_nearest


@stage("hqq")
@dataclass(frozen=True)
class Hqq(Rtn):
    """Round to levels whose offset makes the errors sparse: few large ones and many near zero (Badri and Shaji 2023).

    A group's scale spans its range, as in rounding. Its floating offset is fitted in a few steps of half-quadratic
    splitting, which reduce the sum of abs(error)^p. With no steps it is rounding on the grid 'minimum'.

    Attributes:
        iterations: the largest number of steps; a row stops earlier when its mean error no longer falls.
        p: of the norm, in (0, 1]; below 1 it favours sparse errors.
        beta: the weight of the penalty on the difference between split errors and true ones.
        growth: beta is multiplied by this after each step.
    """

    grid: str = "minimum"
    clip: str = "none"
    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01

    letter: ClassVar[str] = "H"
    method: ClassVar[str] = "HQQ"
    pattern: ClassVar[str] = r"H([235-8]?)"
    clips: ClassVar[tuple[str, ...]] = ("none",)

    def __post_init__(self):
        super().__post_init__()
        if self.grid != "minimum":
            raise unknown("grid of hqq, whose offset is a floating number,", self.grid, ("minimum",))
        if not 0 <= self.iterations <= 1000:
            raise BadInput(f"iterations is {self.iterations}: expected 0 to 1000, e.g. 20")
        if not 0 < self.p <= 1:
            raise BadInput(f"p is {self.p}: expected a norm in (0, 1], e.g. 0.7")
        if not (0 < self.beta < 1e6 and 1 <= self.growth < 10):
            raise BadInput(
                f"beta is {self.beta} and growth {self.growth}: expected a positive number below a million, and "
                "one in [1, 10), e.g. 10 and 1.01"
            )

    def rounded(self, weight: torch.Tensor, grid: Grid | None = None) -> Quantised:
        """See `Rtn`."""
        levels = grid or self.levels
        start = round_to_nearest(weight, levels)
        scale, (rows, groups) = start.scale[..., None], start.scale.shape
        offset = fit_offset(weight.view(rows, groups, -1), scale, start.offset[..., None], self)
        codes = levels.codes(weight.view(rows, groups, -1), scale, offset)
        return Quantised(levels, codes.to(torch.uint8).view_as(weight), start.scale, offset[..., 0])


def fit_offset(w: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, config: Hqq) -> torch.Tensor:
    """The offset of each group after half-quadratic steps, from the step at which its row's mean error was least.

    Args:
        w: (rows, groups, n) float32 weights.
        scale: (rows, groups, 1) of the levels.
        offset: (rows, groups, 1) initial values.
        config: steps, norm and penalty.

    Returns:
        (rows, groups, 1) float32, numbers that float16 holds exactly.
    """
    grid, beta, best = config.levels, config.beta, offset
    least = torch.full((len(w), 1, 1), torch.inf, device=w.device)
    going = torch.ones_like(least, dtype=torch.bool)  # each row stops at its first step without a smaller error
    for _ in range(config.iterations + 1):
        codes = grid.codes(w, scale, offset)
        error = w - grid.values(codes, scale, offset)
        mean = error.abs().mean((1, 2), keepdim=True)
        going &= mean < least
        if not going.any():
            break
        best, least = torch.where(going, offset, best), torch.where(going, mean, least)
        offset = (w - shrink(error, beta, config.p) - scale * codes).mean(-1, keepdim=True)
        offset = offset.clamp(-65504.0, 65504.0).half().float()
        beta *= config.growth
    return best


def shrink(error: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """The generalised soft threshold sign(x) max(abs(x) - abs(x)^(p-1) / beta, 0).

    It nearly minimises abs(e)^p + beta / 2 (e - x)^2 over e.

    >>> shrink(torch.tensor([-2.0, 0.05, 1.0]), 10.0, 1.0)
    tensor([-1.9000,  0.0000,  0.9000])
    """
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12) ** (p - 1) / beta).clamp(min=0)
