"""Quantisation of the projections: round-to-nearest, and GPTQ, which moves each rounding error onto the weights not yet
rounded."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import nn
from tqdm import tqdm

from thesislib.compress.calibration import ALL_AT_ONCE, INPUTS, TRUE_SEQUENTIAL, Blocks, Statistics, Visitor, stream
from thesislib.compress.layerwise import Place, relative_error
from thesislib.compress.outline import Outline, Outlined, empty
from thesislib.compress.selection import check_all_fit, fits, patterns
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.grid import CLIPS, ROW, Grid, Quantised, round_to_nearest
from thesislib.model.layers import Adapted, Projection, base_of, replace
from thesislib.model.packing import PRUNED
from thesislib.model.quantised import (
    EMBEDDINGS,
    EVERYWHERE,
    QuantisedLinear,
    is_quantised,
    set_embedding,
    stored_shapes,
)
from thesislib.model.subject import Subject

ORDERS = ("none", "static", "index")
BLOCK = 128  # columns between two updates of all that follow


@stage("rtn")
@dataclass(frozen=True)
class Rtn(Stage):
    """Round every weight to the nearest level of its grid.

    Attributes:
        bits: 2, 3, 4 or 8.
        group: weights of a row that share a scale, or 'row'.
        grid: symmetric, asymmetric or minimum, see `thesislib.model.grid.Grid`.
        clip: none: levels span the whole range. squared: the part of the range with the least squared error of the
            weights.
        linears: names or patterns of projections, e.g. 'q_proj', 'blocks.3.*'; all seven by default.
        embedding_bits: 8 rounds the embedding and the head too, in groups of the same size; by default they stay as
            they are.
    """

    bits: int = 4
    group: int | str = 64
    grid: str = "symmetric"
    clip: str = "squared"
    linears: str | list | tuple = "*"
    embedding_bits: int | None = None

    family: ClassVar[str] = "quantised"
    letter: ClassVar[str] = "R"
    pattern: ClassVar[str] = r"R([238]?)"
    correctable: ClassVar[bool] = True
    clips: ClassVar[tuple[str, ...]] = ("none", "squared")

    def __post_init__(self):
        Grid(self.bits, self.group, self.grid)  # checks all three
        if self.clip not in self.clips:
            raise unknown("clip", self.clip, self.clips)
        if self.embedding_bits not in (None, 8):
            raise BadInput(
                f"embedding_bits is {self.embedding_bits}: expected 8, or nothing to leave embedding and head as "
                "they are"
            )
        self._normalise(linears=patterns(self.linears))

    @property
    def levels(self) -> Grid:
        """The grid that weights are rounded to."""
        return Grid(self.bits, self.group, self.grid)

    @property
    def label(self) -> str:
        """Q for GPTQ at 4 bits, R for rounding; Q3, R3 and so on at others."""
        return self.letter + ("" if self.bits == 4 else str(self.bits))

    @classmethod
    def from_label(cls, part: str) -> "Rtn | None":
        """The config whose label `part` is, everything else at its default; None if it is another stage's."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return cls(bits=int(match[1] or 4)) if match else None

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection is to be quantised."""
        return any(fits(pattern, block, name) for pattern in self.linears)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: no stage before it may have quantised, and groups must divide the rows of all projections that
        take part."""
        for earlier in previous:
            if earlier.family == "quantised":
                raise BadInput(
                    f"{self.label} after {earlier.label} would quantise a quantised subject: keep one of the two"
                )
        if shape is not None:
            self.levels.check(
                {name: n for name, n in shape.inputs.items() if any(self.takes(i, name) for i in range(shape.depth))}
            )
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""

        def rounded(module: Projection, _: bool) -> Projection:
            base = cast("Outlined", base_of(module))
            if not self.levels.holds_zero and base.gone > PRUNED * base.in_features * base.out_features:
                raise BadInput(
                    f"grid '{self.grid}' has no exact zero, and weights have been pruned: use symmetric or asymmetric"
                )
            return outline.outlined(module, base.zeros, self.levels, self.indexed)

        outline.change(rounded, self.takes)
        if self.embedding_bits:
            model = outline.subject.model
            table = cast("nn.Embedding", model.get_input_embeddings())
            shape = cast("tuple[int, int]", tuple(table.weight.shape))
            group = self.group if shape[1] % self.levels.size(shape[1]) == 0 else ROW
            encoding = f"int{self.embedding_bits}/{self.grid}/{group}/{EVERYWHERE}"
            for path in EMBEDDINGS[:1] if model.config.tie_word_embeddings else EMBEDDINGS:
                set_embedding(
                    model,
                    path,
                    QuantisedLinear(encoding, shape, None, outline.dtype, **empty(stored_shapes(encoding, shape))),
                )

    @property
    def indexed(self) -> bool:
        """Whether each input's group is kept."""
        return False

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """A copy of the subject whose projections are `QuantisedLinear`, and a report of bytes and what else was found.

        Adapted projections keep their correction, around a quantised base.

        Raises:
            BadInput: a subject that is quantised already; a group that does not divide a row; a floating minimum on
                pruned weights. For GPTQ also too little text, or a projection whose inputs are all zero or not finite.
        """
        check_all_fit(self.linears, subject.depth)
        self._check_subject(subject)
        result = subject.copy()
        made, report = self._quantise(result, data)
        for (block, name), linear in made.items():
            _put(result, block, name, linear)
        if self.embedding_bits:
            _quantise_embedding(result, self)
        distinct = {id(linear): linear for linear in made.values()}.values()
        size = sum(t.numel() * t.element_size() for linear in distinct for t in linear.stored.values())
        weights = sum(linear.in_features * linear.out_features for linear in distinct)
        return result, {
            "linears": len(distinct),
            "bytes": size,
            "bits_per_weight": round(8 * size / max(weights, 1), 3),
            **report,
        }

    def _check_subject(self, subject: Subject) -> None:
        embedding = subject.model.get_input_embeddings()
        chosen = {
            (i, name): module
            for i in range(subject.depth)
            for name, module in subject.linears(i).items()
            if self.takes(i, name)
        }
        for (i, name), module in chosen.items():
            if is_quantised(module):
                raise BadInput(
                    f"block {i}'s {name} is quantised already ({getattr(module, 'base', module).encoding}): "
                    "start from the subject before that"
                )
            self.levels.check({n: m.in_features for n, m in subject.linears(i).items() if self.takes(i, n)})
            if not self.levels.holds_zero and (share := float((module.weight == 0).float().mean())) > PRUNED:
                raise BadInput(
                    f"grid 'minimum' has no exact zero, and {share:.0%} of block {i}'s {name} are zeros: use "
                    "symmetric or asymmetric"
                )
        if self.embedding_bits and is_quantised(embedding):
            raise BadInput("the embedding is quantised already: start from the subject before that")

    def rounded(self, weight: torch.Tensor) -> Quantised:
        """A (rows, columns) float32 weight on the grid."""
        return round_to_nearest(weight, self.levels, self.clip)

    def _quantise(self, subject: Subject, data: str) -> tuple[dict[Place, QuantisedLinear], dict]:
        places = [
            (i, name, module)
            for i in range(subject.depth)
            for name, module in subject.linears(i).items()
            if self.takes(i, name)
        ]
        made: dict[int, QuantisedLinear] = {}  # by projection: blocks that a plan repeats go on sharing theirs
        for _, _, module in tqdm(places, desc=self.label, unit="linear", disable=None, leave=False):
            if id(module) not in made:
                made[id(module)] = _linear(module, self.rounded(module.weight.detach().float()))
        return {(i, name): made[id(module)] for i, name, module in places}, {}


@stage("gptq")
@dataclass(frozen=True)
class Gptq(Weighted, Rtn):
    """GPTQ (Frantar et al. 2023), by default with the settings that suit this study's subject.

    The grid is symmetric by default, which every loader of GPTQ checkpoints reads. An integer zero-point (grid
    asymmetric) gives this study's subject 4 % less perplexity. With clip none, act_order none and weighting equal, as
    in the paper's code, a symmetric grid at 4 bits is worse there than rounding: chapter 5.

    Attributes:
        clip: also weighted: squared errors weighed by the inputs' mean squares.
        act_order: the order in which columns are rounded. none: as they stand. static: large inputs first, on grids
            fitted to neighbours beforehand. index: large inputs first; neighbours in that order share a grid, and each
            column's group is kept.
        damping: this times the mean of the Hessian's diagonal is added to it; raised, with a warning, if Cholesky
            fails.
        sequential: k, v, q, then o, then up, gate, then down, each on inputs from quantised predecessors; otherwise all
            at once.
        weighting: how tokens count, see `thesislib.compress.calibration.token_weights`.
    """

    act_order: str = "static"
    damping: float = 0.01
    sequential: bool = True
    weighting: str = field(default="unit_norm", kw_only=True)

    letter: ClassVar[str] = "Q"
    amplifies: ClassVar[bool] = True
    pattern: ClassVar[str] = r"Q([238]?)"
    clips: ClassVar[tuple[str, ...]] = CLIPS

    @property
    def indexed(self) -> bool:
        """See `Rtn`."""
        return self.act_order == "index"

    def __post_init__(self):
        Rtn.__post_init__(self)
        Weighted.__post_init__(self)
        if self.act_order not in ORDERS:
            raise unknown("act_order", self.act_order, ORDERS)
        if not 0 <= self.damping < math.inf:
            raise BadInput(
                f"damping is {self.damping}: expected a finite share of the mean diagonal, at least 0, e.g. 0.01"
            )

    def stream_weights(self, blocks: Blocks, windows: torch.Tensor) -> dict:
        """The same on blocks that are in memory one at a time, whose weights become dense ones on the grid; the
        report."""
        visitor = Quantise(self, keep=False)
        stream(blocks, windows, visitor, weighting=self.weighting, title=self.label)
        return visitor.report()

    def _quantise(self, subject: Subject, data: str) -> tuple[dict[Place, QuantisedLinear], dict]:
        ids = self.ids(subject.tokenizer, data)
        visitor = Quantise(self)
        stream(subject, ids, visitor, weighting=self.weighting, title=self.label)
        return visitor.made, visitor.report()


class Quantise(Visitor):
    """Takes GPTQ through the blocks: weights become those on the grid, and `made` the linears that hold them packed."""

    moments = True

    def __init__(self, config: Gptq, keep: bool = True):
        self.config, self.keep = config, keep
        self.groups = TRUE_SEQUENTIAL if config.sequential else ALL_AT_ONCE
        self.made: dict[Place, QuantisedLinear] = {}
        self.errors: dict[str, float] = {}
        self.raised: dict[str, float] = {}

    def wants(self, block: int, name: str) -> bool:
        """See `Visitor`."""
        return self.config.takes(block, name)

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`. Projections that read the same inputs are rounded together: their rows do not know of each
        other."""
        c = self.config
        for key in dict.fromkeys(INPUTS[name] for name in linears):
            together = {name: linear for name, linear in linears.items() if INPUTS[name] == key}
            where = f"block {block}'s {', '.join(together)}"
            moment = statistics[next(iter(together))].moment
            weight = torch.cat([linear.weight.detach().float() for linear in together.values()])
            quantised, damping = gptq(
                weight, moment, c.levels, act_order=c.act_order, damping=c.damping, clip=c.clip, where=where
            )
            if damping != c.damping:
                self.raised[where] = damping
            start = 0
            for name, linear in together.items():
                mine = quantised.rows(start, start + linear.out_features)
                start += linear.out_features
                before, after = linear.weight.detach().float(), mine.weight
                self.errors[f"blocks.{block}.{name}"] = relative_error(before - after, before, moment)
                if self.keep:
                    self.made[block, name] = _linear(linear, mine)
                linear.weight.data.copy_(after)

    def report(self) -> dict:
        """Relative output error of each projection on the calibration text, and where damping had to be raised to
        what."""
        errors = {name: round(error, 6) for name, error in self.errors.items()}
        return {"relative_errors": errors, **({"damping_raised": self.raised} if self.raised else {})}


def gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    grid: Grid,
    *,
    act_order: str = "none",
    damping: float = 0.01,
    clip: str = "none",
    block: int = BLOCK,
    where: str = "the weight",
) -> tuple[Quantised, float]:
    """Round a weight column by column, each column's error made good by those that follow (Frantar et al. 2023,
    algorithm 1).

    A weight that is exactly zero stays so; what the columns before would have made of it is passed on as an error. An
    input that is always zero neither gives nor takes a correction, so that its column is rounded (GPTQ's code sets
    it to zero). Groups are fitted, where not static, to weights that hold every correction so far; GPTQ's code reads
    stale ones in all but the first group of a block of 128 columns.

    Args:
        weight: (rows, columns) float32.
        moment: (columns, columns) X^T X, any multiple of it.
        grid: what to round to.
        act_order: see `Gptq`.
        damping: see `Gptq`.
        clip: see `Gptq`.
        block: columns whose corrections are gathered before all that follow are updated; of influence on speed alone.
        where: what an error should call the weight.

    Returns:
        the weight on the grid, and the damping that made Cholesky succeed.

    Raises:
        BadInput: statistics that are not finite, or zero: no token came by.
    """
    (rows, columns), device = weight.shape, weight.device
    size = grid.size(columns)
    squares = moment.diagonal()
    if not torch.isfinite(moment).all():
        raise BadInput(
            f"the statistics of {where} are not finite: the model or its compression before this block is broken"
        )
    if not squares.any():
        raise BadInput(
            f"{where} saw no tokens: all its inputs are zero on the calibration text; leave it out with "
            "'linears', or round it with rtn"
        )
    moment = moment / squares[squares > 0].mean()  # damping is relative, and nothing else depends on the size
    importance = moment.diagonal().clone()
    moment.diagonal()[importance == 0] = 1
    order = (
        torch.arange(columns, device=device)
        if act_order == "none"
        else importance.argsort(descending=True, stable=True)
    )
    factor, damping = inverse_factor(moment[order][:, order], damping, where)
    t = weight.T[order].contiguous()  # columns are read one by one: (columns, rows)
    pruned = t == 0
    any_pruned = bool(pruned.any())
    weigh = importance[order] if clip == "weighted" else None

    groups = torch.arange(columns, device=device) // size  # of the column at each place in the order
    if act_order == "static":
        groups = groups[order]
        scales, offsets = grid.fit(
            weight.view(rows, -1, size), clip, None if weigh is None else importance.view(-1, size)
        )
        scales, offsets = scales.T.contiguous(), offsets.T.contiguous()  # (groups, rows)
    else:
        scales, offsets = torch.empty(2, columns // size, rows, device=device).unbind()
    # a block holds whole groups or lies in one, so that whenever a group begins, all its columns are up to date
    block = max(block // size, 1) * size if size <= block else max(n for n in range(1, block + 1) if size % n == 0)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=device)
    for start in range(0, columns, block):
        mine, own = t[start : start + block], factor[start : start + block, start : start + block]
        errors = torch.empty_like(mine)
        for i, column in enumerate(mine):
            at = start + i
            group = groups[at]
            if act_order != "static" and at % size == 0:
                now = t[at : at + size].masked_fill(pruned[at : at + size], 0).T
                scales[group], offsets[group] = grid.fit(now, clip, None if weigh is None else weigh[at : at + size])
            scale, offset = scales[group], offsets[group]
            code = grid.codes(column, scale, offset)
            if any_pruned and grid.holds_zero:
                code = torch.where(pruned[at], offset, code)
            codes[at] = code
            torch.sub(column, grid.values(code, scale, offset), out=errors[i]).div_(own[i, i])
            mine[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        t[start + block :].addmm_(factor[start : start + block, start + block :].T, errors, alpha=-1)
    back = order.argsort()
    index = groups[back] if act_order == "index" else None
    return Quantised(grid, codes[back].T.contiguous(), scales.T.contiguous(), offsets.T.contiguous(), index), damping


def inverse_factor(moment: torch.Tensor, damping: float, where: str = "the weight") -> tuple[torch.Tensor, float]:
    """The upper triangular R with R^T R = (moment + damping * mean diagonal * I)^-1, and the damping.

    With J the reversal of order and J H J = L L^T, U = J L J is upper triangular with H = U U^T, so R = U^-1: one
    Cholesky instead of two with an inverse between them. In float32, then float64; if both fail, ten times the damping,
    and a warning.
    """
    asked, mean = damping, moment.diagonal().mean()
    while True:
        for dtype in (torch.float32, torch.float64):
            damped = moment.to(dtype)
            damped = damped + damping * mean * torch.eye(len(moment), dtype=dtype, device=moment.device)
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                factor = torch.linalg.solve_triangular(
                    lower.flip(0, 1), torch.eye(len(moment), dtype=dtype, device=moment.device), upper=True
                ).float()
                if torch.isfinite(factor).all():
                    if damping != asked:
                        warnings.warn(
                            f"X^T X of {where} has no Cholesky factor at damping {asked:g}: raised to {damping:g}",
                            stacklevel=2,
                        )
                    return factor, damping
        damping = max(10 * damping, 1e-4)


def _linear(module: Projection, quantised: Quantised) -> QuantisedLinear:
    """What is to stand in a projection's place."""
    weight = module.weight.detach()
    pruned = weight == 0
    pruned = pruned if float(pruned.float().mean()) > PRUNED else None
    return QuantisedLinear.of(quantised, pruned, module.bias, weight.dtype)


def _put(subject: Subject, block: int, name: str, linear: QuantisedLinear) -> None:
    """Let a quantised linear stand where a projection does, inside its correction if it has one."""
    module = subject.linears(block)[name]
    if isinstance(module, Adapted):
        module.base = linear
    else:
        replace(subject.blocks[block], name, linear)


def _quantise_embedding(subject: Subject, config: Rtn) -> None:
    """Round embedding and head to 8 bits; tied ones stay one."""
    model = subject.model
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    columns = weights[0].shape[1]
    grid = Grid(8, config.group if columns % config.levels.size(columns) == 0 else ROW, config.grid)
    for path, weight in zip(EMBEDDINGS, weights[:1] if model.config.tie_word_embeddings else weights, strict=False):
        set_embedding(
            model, path, QuantisedLinear.of(round_to_nearest(weight.detach().float(), grid), dtype=weight.dtype)
        )
