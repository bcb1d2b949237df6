"""Width pruning: single weights set to zero, by magnitude or by WANDA, unstructured or n of each m neighbours."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch

from thesislib.compress.calibration import ALL_AT_ONCE, Blocks, Statistics, Visitor, stream
from thesislib.compress.outline import Outline, Outlined
from thesislib.compress.selection import check_all_fit, fits, patterns, whole_number
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.layers import LINEARS, Projection, base_of
from thesislib.model.subject import Subject

METRICS = ("wanda", "magnitude")
THESIS_PATTERNS = ((1, 2), (2, 4), (3, 4), (1, 8), (4, 8), (6, 8), (1, 16), (8, 16), (12, 16))


@stage("width")
@dataclass(frozen=True)
class Width(Weighted):
    """Set single weights to zero: `remove` of each `of` consecutive inputs of a row, or a share of each row.

    Attributes:
        remove: how many of each `of` go.
        of: consecutive inputs that lose `remove`.
        ratio: the share of each row that goes, instead of `remove` and `of`.
        ratios: {pattern: ratio} for some projections; of several that fit, the last counts.
        metric: wanda: abs(weight) times the root mean square of its input (Sun et al. 2023, eq. 1). magnitude:
            abs(weight).
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
        if (self.remove is None) != (self.of is None) or (self.remove is None) == (
            self.ratio is None and self.ratios is None
        ):
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
        """As the thesis writes it: W1:8; W50% where unstructured, W~ where the ratio differs by layer."""
        return f"W{self.remove}:{self.of}" if self.of else "W~" if self.ratios else f"W{100 * self.ratio:g}%"

    @classmethod
    def from_label(cls, part: str) -> "Width | None":
        """See `Stage`; W~ does not say which ratios."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        if not match or part == "W~":
            return None
        return cls(ratio=float(match[3]) / 100) if match[3] else cls(whole_number(match[1]), whole_number(match[2]))

    @property
    def streams(self) -> bool:
        """See `Stage`."""
        return self.metric == "wanda"

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`."""
        if shape is not None:
            self.check(shape.inputs, shape.depth)
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""

        def pruned(module: Projection, share: float) -> Projection:
            base, columns = cast("Outlined", base_of(module)), module.in_features
            remove, of = (self.remove, self.of) if self.of else (int(columns * share), columns)
            # quantised weights become plain ones, among whose zeros are those that rounding made
            zeros = base.zeros.pruned(remove, of, columns) if base.zeros and not base.grid else None
            return module if zeros and zeros is base.zeros else outline.outlined(module, zeros)

        outline.change(pruned, self.share)

    def share(self, block: int, name: str) -> float | None:
        """The share of this projection's weights that goes, None if it takes no part."""
        found = None
        if any(fits(pattern, block, name) for pattern in self.linears):
            found = self.remove / self.of if self.of else self.ratio
        for pattern, ratio in (self.ratios or {}).items():
            if fits(pattern, block, name):
                found = ratio
        return found or None

    def check(self, inputs: Mapping[str, int], depth: int) -> None:
        """Raises BadInput if some projection's row length ({name: inputs}) in `depth` blocks is no multiple of `of`,
        with those that fit."""
        for name, length in inputs.items():
            if self.of and length % self.of and any(self.share(i, name) for i in range(depth)):
                fit = [m for m in range(2, 33) if all(n % m == 0 for n in inputs.values())]
                raise BadInput(
                    f"pattern {self.remove}:{self.of} does not fit {name}: its rows have {length} inputs, which "
                    f"{self.of} does not divide; "
                    f"all rows of this model are multiples of {', '.join(map(str, fit)) or 'no m up to 32'}"
                )

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """A pruned copy of the subject, and a report of the shares removed.

        Raises:
            BadInput: rows that the pattern does not divide, text too short, inputs that are not finite.
        """
        check_all_fit(self.linears, subject.depth)
        self.check(
            {name: m.weight.shape[1] for b in range(subject.depth) for name, m in subject.linears(b).items()},
            subject.depth,
        )
        pruned = subject.copy()
        visitor = Prune(self)
        if self.metric == "magnitude":
            for b in range(pruned.depth):
                visitor.change(b, {n: m for n, m in pruned.linears(b).items() if visitor.wants(b, n)}, {})
        else:
            ids = self.ids(subject.tokenizer, data)
            stream(pruned, ids, visitor, weighting=self.weighting, title=self.label)
        return pruned, visitor.report()

    def stream_weights(self, blocks: Blocks, windows: torch.Tensor) -> dict:
        """The same on blocks that are in memory one at a time; the report."""
        visitor = Prune(self)
        stream(blocks, windows, visitor, weighting=self.weighting, title=self.label)
        return visitor.report()


class Prune(Visitor):
    """Sets each projection's least important weights to zero, all seven by the statistics of the unpruned block."""

    groups = ALL_AT_ONCE

    def __init__(self, config: Width):
        self.config = config
        self.removed = self.total = 0
        self.dead: list[str] = []

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
                    said = (
                        f"all inputs of block {block}'s {name} are zero on the calibration text: its weights are "
                        "compared by magnitude alone"
                    )
                    warnings.warn(said, stacklevel=2)
            c = self.config
            gone = least_of_each(score, c.remove, c.of) if c.of else least_share(score, c.share(block, name))
            linear.weight.data.masked_fill_(
                gone, 0
            )  # not a product with a mask, which would leave zeros of either sign
            self.removed += int(gone.sum())
            self.total += gone.numel()

    def report(self) -> dict:
        """What was done, as plain data."""
        return {
            "removed_weights": self.removed,
            "of_weights": self.total,
            **({"compared by magnitude": self.dead} if self.dead else {}),
        }


def least_of_each(score: torch.Tensor, remove: int, of: int) -> torch.Tensor:
    """True for the `remove` lowest of each `of` consecutive entries of a row; equal scores go from the left.

    This is WANDA's and the thesis's reading of N:M, in which N counts what is REMOVED; NVIDIA's N counts what is kept.

    >>> least_of_each(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 1, 2)
    tensor([[False,  True,  True, False]])
    """
    rows, columns = score.shape
    if columns % of:
        raise BadInput(f"rows of {columns} do not divide into groups of {of}")
    order = score.reshape(rows, -1, of).argsort(dim=-1, stable=True)
    gone = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :remove], True)
    return gone.view(rows, columns)


def least_share(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """True for the int(columns * ratio) lowest entries of each row (WANDA compares within an output's row)."""
    count = int(score.shape[1] * ratio)
    order = score.argsort(dim=-1, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[:, :count], True)


def zero_shares(subject: Subject) -> dict[str, list[float]]:
    """For each projection the share of zeros in each block."""
    return {
        name: [
            float((m.weight == 0).float().mean())
            for b in range(subject.depth)
            if (m := subject.linears(b).get(name)) is not None
        ]
        for name in LINEARS
    }
