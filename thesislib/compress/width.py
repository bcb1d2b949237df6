"""Width pruning: single weights set to zero by magnitude or WANDA, unstructured or in a pattern n:m."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch

from thesislib.compress.calibration import ALL_AT_ONCE, Blocks, Statistics, Visitor, stream
from thesislib.compress.outline import Outline, Outlined
from thesislib.compress.selection import MOST_BLOCKS, check_all_fit, fits, patterns, selected, whole_number
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.layers import LINEARS, Projection, base_of, unpack_all
from thesislib.model.lowrank import LowRank, is_lowrank
from thesislib.model.subject import Subject

METRICS = ("wanda", "magnitude")


@stage("width")
@dataclass(frozen=True)
class Width(Weighted):
    """Set single weights to zero: `remove` of each `of` consecutive inputs of a row, or a share of each row.

    Attributes:
        remove: weights that are removed of each `of`.
        of: consecutive inputs of a group.
        ratio: the share of each row that is removed, instead of `remove` and `of`.
        ratios: {pattern: ratio} for some projections; if several patterns fit, the last counts.
        metric: of a weight's importance. wanda: abs(weight) times the root mean square of its input (Sun et al. 2023,
            eq. 1). magnitude: abs(weight).
        linears: names or patterns of projections, e.g. 'q_proj', '*_proj', 'blocks.3.*'; all seven by default.
    """

    remove: int | None = None
    of: int | None = None
    ratio: float | None = None
    ratios: dict | None = None
    metric: str = "wanda"
    linears: str | list | tuple = "*"

    family: ClassVar[str] = "pruned"
    pattern: ClassVar[str] = r"W(?:(\d+):(\d+)|(\d+(?:\.\d+)?(?:e-\d+)?)%|~)"
    correctable: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        no_ratio = self.ratio is None and self.ratios is None
        if (self.remove is None) != (self.of is None) or (self.remove is None) == no_ratio:
            raise BadInput("width needs either 'remove' and 'of' (n of each m inputs), or 'ratio' or 'ratios'")
        if self.of is not None and not 0 < self.remove < self.of:
            raise BadInput(
                f"pattern {self.remove}:{self.of} removes {'none' if self.remove <= 0 else 'all'}: expected 0 < "
                f"removed < {self.of}"
            )
        for ratio in (self.ratio, *(self.ratios or {}).values()):
            if ratio is not None and not (isinstance(ratio, (int, float)) and 0 <= ratio < 1):
                raise BadInput(f"ratio {ratio}: expected a share of the weights in [0, 1)")
        if self.metric not in METRICS:
            raise unknown("width metric", self.metric, METRICS)
        self._normalise(linears=patterns(self.linears))
        patterns(self.ratios or ())

    @property
    def label(self) -> str:
        """W1:8 as in the thesis; W50% for an unstructured share, W~ for shares that differ by projection."""
        if self.of:
            return f"W{self.remove}:{self.of}"
        return "W~" if self.ratios else f"W{100 * self.ratio:g}%"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        if self.of:
            return f"{self.remove} of each {self.of} neighbouring weights set to zero"
        return f"{100 * self.ratio:g} % of the weights set to zero" if self.ratio else "some weights set to zero"

    @classmethod
    def from_label(cls, part: str) -> "Width | None":
        """See `Stage`; W~ does not give the ratios."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        if not match or part == "W~":
            return None
        return cls(ratio=float(match[3]) / 100) if match[3] else cls(whole_number(match[1]), whole_number(match[2]))

    @property
    def streams(self) -> bool:
        """See `Stage`."""
        return self.metric == "wanda"

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: zeros in a pair's product are none in its factors."""
        blocks = range(MOST_BLOCKS if shape is None else shape.depth)
        for earlier in previous:
            depth = shape.depth if shape else None
            both = [n for n in LINEARS if any(earlier.makes_pair(b, n, depth) and self.share(b, n) for b in blocks)]
            if both:
                raise BadInput(
                    f"{self.label} after {earlier.label} would multiply the pairs of {', '.join(both)} out: expected "
                    "width before low rank, or other linears"
                )
        if shape is not None:
            self.check(shape.inputs, shape.depth)
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""

        def pruned(module: Projection, share: float) -> Projection:
            base, columns = cast("Outlined", base_of(module)), module.in_features
            remove, of = (self.remove, self.of) if self.of else (int(columns * share), columns)
            # quantised weights become dense ones, and rounding may have made some of them zero
            zeros = base.zeros.pruned(remove, of, columns) if base.zeros and not base.grid else None
            return module if zeros and zeros is base.zeros else outline.outlined(module, zeros)

        outline.change(pruned, self.share)

    def share(self, block: int, name: str) -> float | None:
        """The share of a projection's weights that is removed; None if none is."""
        share = None
        if any(fits(pattern, block, name) for pattern in self.linears):
            share = self.remove / self.of if self.of else self.ratio
        for pattern, ratio in (self.ratios or {}).items():
            if fits(pattern, block, name):
                share = ratio
        return share or None

    def check(self, inputs: Mapping[str, int], depth: int) -> None:
        """Raises BadInput if `of` does not divide a projection's rows; the message lists groups that divide all rows.

        Args:
            inputs: the row length of each projection by name.
            depth: the number of blocks.
        """
        for name, length in inputs.items():
            if self.of and length % self.of and any(self.share(i, name) for i in range(depth)):
                fit = [m for m in range(2, 33) if all(n % m == 0 for n in inputs.values())]
                raise BadInput(
                    f"pattern {self.remove}:{self.of} does not fit {name}: its rows have {length} inputs, which "
                    f"{self.of} does not divide; all rows of this model are multiples of "
                    f"{', '.join(map(str, fit)) or 'no m up to 32'}"
                )

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """A pruned copy of the subject, and a report of how many weights were removed.

        Raises:
            BadInput: rows that the pattern does not divide, text too short, inputs that are not finite.
        """
        check_all_fit(self.linears, subject.depth)
        for (b, name), module in selected(subject, lambda b, n: self.share(b, n) is not None).items():
            if is_lowrank(module):
                raise BadInput(
                    f"blocks.{b}.{name} is a pair of low rank, and zeros in its product are none in its factors: "
                    "expected linears without it"
                )
        inputs = {name: m.weight.shape[1] for b in range(subject.depth) for name, m in subject.linears(b).items()}
        self.check(inputs, subject.depth)
        pruned = subject.copy(unpack=False)
        unpack_all(pruned.model, but=(LowRank,))
        visitor = Prune(self)
        if self.metric == "magnitude":
            for b in range(pruned.depth):
                visitor.change(b, {n: m for n, m in pruned.linears(b).items() if visitor.wants(b, n)}, {})
        else:
            ids = self.ids(subject.tokenizer, data)
            stream(pruned, ids, visitor, weighting=self.weighting, title=self.label)
        return pruned, visitor.report()

    def stream_weights(self, blocks: Blocks, windows: torch.Tensor) -> dict:
        """The report of `apply`, after the same changes to blocks that are in memory one at a time."""
        visitor = Prune(self)
        stream(blocks, windows, visitor, weighting=self.weighting, title=self.label)
        return visitor.report()


class Prune(Visitor):
    """Sets each projection's least important weights to zero. All statistics are those of the unpruned block."""

    groups = ALL_AT_ONCE

    def __init__(self, config: Width):
        self.config = config
        self.removed = self.total = 0
        self.dead: list[str] = []  # projections whose inputs are all zero

    def wants(self, block: int, name: str) -> bool:
        """See `Visitor`."""
        return self.config.share(block, name) is not None

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`."""
        for name, linear in linears.items():
            score = linear.weight.detach().float().abs()
            if self.config.metric == "wanda":
                rms = statistics[name].rms
                if rms.any():
                    score *= rms
                else:
                    self.dead.append(f"blocks.{block}.{name}")
                    warnings.warn(
                        f"all inputs of block {block}'s {name} are zero on the calibration text: its weights are "
                        "compared by magnitude alone",
                        stacklevel=2,
                    )
            c = self.config
            mask = least_of_each(score, c.remove, c.of) if c.of else least_share(score, c.share(block, name))
            linear.weight.data.masked_fill_(mask, 0)  # a product with a mask would leave zeros of either sign
            self.removed += int(mask.sum())
            self.total += mask.numel()

    def report(self) -> dict:
        """The numbers of weights, as JSON data."""
        report = {"removed_weights": self.removed, "of_weights": self.total}
        return report | ({"compared by magnitude": self.dead} if self.dead else {})


def least_of_each(score: torch.Tensor, remove: int, of: int) -> torch.Tensor:
    """True for the `remove` lowest of each `of` consecutive entries of a row; of equal scores the leftmost first.

    This is N:M as in WANDA and the thesis, where N counts the REMOVED ones; NVIDIA's N counts the kept ones.

    >>> least_of_each(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 1, 2)
    tensor([[False,  True,  True, False]])
    """
    rows, columns = score.shape
    if columns % of:
        raise BadInput(f"rows of {columns} do not divide into groups of {of}")
    order = score.reshape(rows, -1, of).argsort(dim=-1, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :remove], True)
    return mask.view(rows, columns)


def least_share(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """True for the int(columns * ratio) lowest entries of each row (WANDA compares within an output's row)."""
    count = int(score.shape[1] * ratio)
    order = score.argsort(dim=-1, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[:, :count], True)
