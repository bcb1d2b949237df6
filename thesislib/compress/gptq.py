"""Quantisation of the projections: round-to-nearest, and GPTQ, which compensates rounding errors in later weights."""

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

from thesislib.compress.calibration import (
    ALL_AT_ONCE,
    INPUTS,
    TRUE_SEQUENTIAL,
    Blocks,
    Statistics,
    Visitor,
    check_moment,
    stream,
)
from thesislib.compress.layerwise import relative_error
from thesislib.compress.outline import Outline, Outlined, OutlinedPair, empty
from thesislib.compress.selection import MOST_BLOCKS, LinearKey, check_all_fit, fits, patterns, selected
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.grid import CLIPS, ROW, Grid, Quantised, round_to_nearest
from thesislib.model.layers import LINEARS, Adapted, Projection, base_of, replace, unpack_all
from thesislib.model.lowrank import FACTORS, LowRank, is_lowrank
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

Held = QuantisedLinear | LowRank  # a projection with rounded numbers
ORDERS = ("none", "groups", "static", "index")
BLOCK = 128  # columns after which all later columns are updated


@stage("rtn")
@dataclass(frozen=True)
class Rtn(Stage):
    """Round every weight to the nearest level of its grid.

    Attributes:
        bits: 2 to 8.
        group: weights of a row that share a scale, or 'row'.
        grid: symmetric, asymmetric or minimum, see `thesislib.model.grid.Grid`.
        clip: none: levels span the whole range. squared: the share of the range with the least squared error of the
            weights.
        linears: names or patterns of projections, e.g. 'q_proj', 'blocks.3.*'; all seven by default.
        embedding_bits: 8 rounds the embedding and the head too, in groups of the same size; by default they are not
            rounded.
    """

    bits: int = 4
    group: int | str = 64
    grid: str = "symmetric"
    clip: str = "squared"
    linears: str | list | tuple = "*"
    embedding_bits: int | None = None

    family: ClassVar[str] = "quantised"
    letter: ClassVar[str] = "R"
    method: ClassVar[str] = "rounded"
    pattern: ClassVar[str] = r"R([235-8]?)"
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

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        return f"{self.method} to {self.bits} bits"

    @classmethod
    def from_label(cls, part: str) -> "Rtn | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return cls(bits=int(match[1] or 4)) if match else None

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection is quantised."""
        return any(fits(pattern, block, name) for pattern in self.linears)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: only one stage may quantise, and groups must divide the rows of the projections."""
        for earlier in previous:
            if earlier.family == "quantised":
                raise BadInput(
                    f"{self.label} after {earlier.label} would quantise a quantised subject: keep one of the two"
                )
            depth = shape.depth if shape else None
            every = ((b, n) for b in range(depth or MOST_BLOCKS) for n in LINEARS)
            if earlier.rounds_pairs and any(earlier.makes_pair(b, n, depth) and self.takes(b, n) for b, n in every):
                raise BadInput(
                    f"{self.label} after {earlier.label} would quantise pairs whose factors are quantised: expected "
                    "bits: 16 there, or other linears"
                )
            if earlier.factorises and self.indexed:
                raise BadInput(f"{self.label} after {earlier.label}: a pair's factors keep no index of their inputs")
        if shape is not None:
            blocks = range(shape.depth)
            self.levels.check({n: size for n, size in shape.inputs.items() if any(self.takes(i, n) for i in blocks)})
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""

        def rounded(module: Projection, _: bool) -> Projection:
            base = cast("Outlined", base_of(module))
            if isinstance(base, OutlinedPair):
                pair = OutlinedPair(base, base.rank, self.encodings(base.rank, base.in_features), outline.dtype)
                return Adapted(pair, module.lora_A, module.lora_B) if isinstance(module, Adapted) else pair
            if not self.levels.holds_zero and base.pruned > PRUNED * base.in_features * base.out_features:
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
                tensors = empty(stored_shapes(encoding, shape))
                set_embedding(model, path, QuantisedLinear(encoding, shape, None, outline.dtype, **tensors))

    @property
    def indexed(self) -> bool:
        """Whether each input's group is stored."""
        return False

    def of_factor(self, columns: int) -> Grid:
        """The grid of a pair's factor: its rows are one group where groups do not divide them."""
        return Grid(self.bits, self.group if columns % self.levels.size(columns) == 0 else ROW, self.grid)

    def encodings(self, rank: int, inputs: int) -> tuple[str, str]:
        """How the factors A and B of a pair are held."""
        a, b = (f"int{self.bits}/{self.grid}/{self.of_factor(n).group}/{EVERYWHERE}" for n in (inputs, rank))
        return a, b

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """A copy of the subject with its projections as `QuantisedLinear`, and a report of bytes and errors.

        An adapted projection keeps its correction, around a quantised base.

        Raises:
            BadInput: a subject that is quantised already; a group that does not divide a row; a floating minimum on
                pruned weights. For GPTQ also too little text, or a projection whose inputs are all zero or not finite.
        """
        check_all_fit(self.linears, subject.depth)
        self._check_subject(subject)
        result = subject.copy(unpack=False)
        unpack_all(result.model, but=(LowRank,))
        linears, report = self._quantise(result, data)
        for (block, name), linear in linears.items():
            module = result.linears(block)[name]
            if isinstance(module, Adapted):
                module.base = linear
            else:
                replace(result.blocks[block], name, linear)
        if self.embedding_bits:
            _quantise_embedding(result, self)
        distinct = {id(linear): linear for linear in linears.values()}.values()
        size = sum(t.numel() * t.element_size() for linear in distinct for t in linear.stored.values())
        weights = sum(linear.numel for linear in distinct)
        sizes = {"linears": len(distinct), "bytes": size, "bits_per_weight": round(8 * size / max(weights, 1), 3)}
        return result, sizes | report

    def _check_subject(self, subject: Subject) -> None:
        """Raises BadInput for a subject that cannot be quantised, see `apply`."""
        embedding = subject.model.get_input_embeddings()
        for (i, name), module in selected(subject, self.takes).items():
            base = base_of(module)
            if is_quantised(module) or (isinstance(base, LowRank) and base.is_quantised):
                raise BadInput(
                    f"block {i}'s {name} is quantised already ({base_of(module).encoding}): start from the subject "
                    "before that"
                )
            self.levels.check({n: m.in_features for n, m in subject.linears(i).items() if self.takes(i, n)})
            if not self.levels.holds_zero and (share := float((module.weight == 0).float().mean())) > PRUNED:
                raise BadInput(
                    f"grid 'minimum' has no exact zero, and {share:.0%} of block {i}'s {name} are zeros: use "
                    "symmetric or asymmetric"
                )
        if self.embedding_bits and is_quantised(embedding):
            raise BadInput("the embedding is quantised already: start from the subject before that")

    def rounded(self, weight: torch.Tensor, grid: Grid | None = None) -> Quantised:
        """A (rows, columns) float32 weight on the stage's grid, or another one."""
        return round_to_nearest(weight, grid or self.levels, self.clip)

    def _pair(self, pair: LowRank) -> LowRank:
        """A pair with both factors on the grid."""
        factors = (pair.factor(name).detach().float() for name in FACTORS)
        rounded = (self.rounded(factor, self.of_factor(factor.shape[1])) for factor in factors)
        A, B = (QuantisedLinear.of(q, dtype=pair.like.dtype) for q in rounded)
        return LowRank(A, B, pair.bias)

    def _quantise(self, subject: Subject, data: str) -> tuple[dict[LinearKey, Held], dict]:
        """The quantised projections of a subject, and its part of the report."""
        taken = selected(subject, self.takes)
        quantised: dict[int, Held] = {}  # by module, since repeated blocks share their projections
        for module in tqdm(taken.values(), desc=self.label, unit="linear", disable=None, leave=False):
            if id(module) not in quantised:
                base = base_of(module)
                quantised[id(module)] = (
                    self._pair(base)
                    if isinstance(base, LowRank)
                    else _linear(module, self.rounded(module.weight.detach().float()))
                )
        return {key: quantised[id(module)] for key, module in taken.items()}, {}


@stage("gptq")
@dataclass(frozen=True)
class Gptq(Weighted, Rtn):
    """GPTQ (Frantar et al. 2023), by default with the settings that suit this study's subject.

    The default grid is symmetric, which every loader of GPTQ checkpoints reads. An integer zero-point (grid asymmetric)
    gives this study's subject 4 % less perplexity. With act_order none, clip none and weighting equal on 8,192 tokens,
    a symmetric grid at 4 bits is worse there than rounding, because of v_proj and the attention sink; with act_order
    groups it is better: chapter 5. Weighting tokens in the Hessian is RSQ's idea (Sung et al. 2025, arXiv 2503.01820).

    Attributes:
        clip: as in `Rtn`, or weighted: squared errors times the mean squares of the inputs.
        act_order: the order in which columns are rounded. none: from left to right. groups: by the largest input of
            their group, and large inputs first within it (Gafni et al. 2025, arXiv 2505.14638; GPTQModel's default).
            static: large inputs first, on grids that are fitted to neighbours beforehand. index: large inputs first,
            with a grid for neighbours in that order, so each column's group is stored.
        damping: this times the mean of the Hessian's diagonal is added to the diagonal; raised, with a warning, if
            Cholesky fails.
        sequential: whether projections are rounded in the order k, v, q; o; up, gate; down, each on inputs from the
            quantised ones before; False rounds all at once.
        weighting: of tokens, see `thesislib.compress.calibration.token_weights`.
    """

    act_order: str = "static"
    damping: float = 0.01
    sequential: bool = True
    weighting: str = field(default="unit_norm", kw_only=True)

    letter: ClassVar[str] = "Q"
    method: ClassVar[str] = "GPTQ"
    amplifies: ClassVar[bool] = True
    pattern: ClassVar[str] = r"Q([235-8]?)"
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
        """The report of `apply`, after the same changes to blocks that are in memory one at a time.

        Their weights become dense ones on the grid.
        """
        visitor = Quantise(self, keep=False)
        stream(blocks, windows, visitor, weighting=self.weighting, title=self.label)
        return visitor.report()

    def _quantise(self, subject: Subject, data: str) -> tuple[dict[LinearKey, Held], dict]:
        ids = self.ids(subject.tokenizer, data)
        visitor = Quantise(self)
        stream(subject, ids, visitor, weighting=self.weighting, title=self.label)
        return visitor.linears, visitor.report()


class Quantise(Visitor):
    """Takes GPTQ through the blocks.

    Args:
        config: GPTQ's settings.
        keep: whether to collect the quantised linears; weights are rounded in any case.

    Attributes:
        linears: the quantised linears.
        errors: each projection's relative output error.
        raised: damping that had to be raised, by the projections' names.
    """

    moments = True

    def __init__(self, config: Gptq, keep: bool = True):
        self.config, self.keep = config, keep
        self.groups = TRUE_SEQUENTIAL if config.sequential else ALL_AT_ONCE
        self.linears: dict[LinearKey, Held] = {}
        self.errors: dict[str, float] = {}
        self.raised: dict[str, float] = {}

    def wants(self, block: int, name: str) -> bool:
        """See `Visitor`."""
        return self.config.takes(block, name)

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`. Projections with the same inputs are rounded together, since rows are independent."""
        c = self.config
        for name, linear in linears.items():
            if isinstance(pair := base_of(linear), LowRank):
                self._change_pair(block, name, pair, statistics[name].moment)
        linears = {name: linear for name, linear in linears.items() if not is_lowrank(linear)}
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
                    self.linears[block, name] = _linear(linear, mine)
                linear.weight.data.copy_(after)

    def _change_pair(self, block: int, name: str, pair: LowRank, moment: torch.Tensor) -> None:
        """Round A on the inputs' moment, then B on that of what the rounded A gives it."""
        c, before, factors = self.config, pair.weight.float(), []
        inner = moment
        for factor in FACTORS:
            weight, where = pair.factor(factor).detach().float(), f"block {block}'s {name}, factor {factor}"
            order = c.act_order if factor == "A" or c.of_factor(weight.shape[1]).group != ROW else "none"
            quantised, damping = gptq(
                weight, inner, c.of_factor(weight.shape[1]), act_order=order, damping=c.damping, clip=c.clip,
                where=where,
            )  # fmt: skip
            if damping != c.damping:
                self.raised[where] = damping
            factors.append(QuantisedLinear.of(quantised, dtype=pair.like.dtype))
            inner = quantised.weight @ inner @ quantised.weight.T
        pair.hold(*factors)
        self.errors[f"blocks.{block}.{name}"] = relative_error(before - pair.weight.float(), before, moment)
        if self.keep:
            self.linears[block, name] = pair

    def report(self) -> dict:
        """The relative output error of each projection on the calibration text, and damping that was raised."""
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
    """Round a weight column by column, and compensate each column's error in later columns.

    This is algorithm 1 of Frantar et al. 2023. It differs from the paper's code in three points:

    - A weight that is exactly zero stays zero. The change that earlier columns would have made to it counts as error.
    - The column of an input that is always zero is rounded without corrections; the paper's code sets it to zero.
    - Grids that are not static are fitted to weights with all corrections so far. The paper's code reads weights
      without the latest ones in all but the first group of a block of 128 columns.

    Args:
        weight: (rows, columns) float32.
        moment: (columns, columns) X^T X, any multiple of it.
        grid: to round to.
        act_order: see `Gptq`.
        damping: see `Gptq`.
        clip: see `Gptq`.
        block: columns whose corrections are collected before all later columns are updated; affects speed alone.
        where: the weight's name in errors.

    Returns:
        The weight on the grid, and the damping with which Cholesky succeeded.

    Raises:
        BadInput: statistics that are not finite, or all zero.
    """
    (rows, columns), device = weight.shape, weight.device
    size = grid.size(columns)
    check_moment(moment, where, "leave it out with 'linears', or round it with rtn")
    squares = moment.diagonal()
    moment = moment / squares[squares > 0].mean()  # damping is relative, and nothing else depends on the scale
    importance = moment.diagonal().clone()
    moment.diagonal()[importance == 0] = 1
    order = column_order(importance, act_order, size)
    factor, damping = inverse_factor(moment[order][:, order], damping, where)
    t = weight.T[order].contiguous()  # (columns, rows), since columns are read one by one
    pruned = t == 0
    any_pruned = bool(pruned.any())
    weigh = importance[order] if clip == "weighted" else None

    places = torch.arange(columns, device=device)
    groups = (places if act_order == "index" else order) // size  # of the column at each place
    if act_order == "static":
        by_group = None if weigh is None else importance.view(-1, size)
        scales, offsets = grid.fit(weight.view(rows, -1, size), clip, by_group)
        scales, offsets = scales.T.contiguous(), offsets.T.contiguous()  # (groups, rows)
    else:
        scales, offsets = torch.empty(2, columns // size, rows, device=device).unbind()
    # a block has whole groups or is part of one, so all columns of a group are up to date when the group begins
    block = max(block // size, 1) * size if size <= block else max(n for n in range(1, block + 1) if size % n == 0)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=device)
    for start in range(0, columns, block):
        mine, triangle = t[start : start + block], factor[start : start + block, start : start + block]
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
            torch.sub(column, grid.values(code, scale, offset), out=errors[i]).div_(triangle[i, i])
            mine[i + 1 :].addr_(triangle[i, i + 1 :], errors[i], alpha=-1)
        t[start + block :].addmm_(factor[start : start + block, start + block :].T, errors, alpha=-1)
    back = order.argsort()
    index = groups[back] if act_order == "index" else None
    return Quantised(grid, codes[back].T.contiguous(), scales.T.contiguous(), offsets.T.contiguous(), index), damping


def column_order(importance: torch.Tensor, act_order: str, size: int) -> torch.Tensor:
    """The order in which columns are rounded, (columns,).

    Args:
        importance: (columns,) mean squares of the inputs.
        act_order: see `Gptq`.
        size: of a group.

    >>> column_order(torch.tensor([1.0, 4.0, 3.0, 9.0]), "groups", 2).tolist()
    [3, 2, 1, 0]
    """
    if act_order == "none":
        return torch.arange(len(importance), device=importance.device)
    order = importance.argsort(descending=True, stable=True)
    if act_order != "groups":
        return order
    groups = importance.view(-1, size).amax(1).argsort(descending=True, stable=True)
    return order[groups.argsort()[order // size].argsort(stable=True)]  # sorted by its group's place


def inverse_factor(moment: torch.Tensor, damping: float, where: str = "the weight") -> tuple[torch.Tensor, float]:
    """The upper triangular R with R^T R = (moment + damping * mean diagonal * I)^-1, and the damping.

    Let H be the damped moment, J the reversal of order, and J H J = L L^T. Then U = J L J is upper triangular with
    H = U U^T, so R = U^-1. This takes one Cholesky instead of two with an inverse between them.

    It is tried in float32, then in float64. If both fail, the damping is multiplied by ten, with a warning.
    """
    asked, mean = damping, moment.diagonal().mean()
    while True:
        for dtype in (torch.float32, torch.float64):
            identity = torch.eye(len(moment), dtype=dtype, device=moment.device)
            damped = moment.to(dtype) + damping * mean * identity
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if failed:
                continue
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
            if torch.isfinite(factor).all():
                if damping != asked:
                    warnings.warn(
                        f"X^T X of {where} has no Cholesky factor at damping {asked:g}: raised to {damping:g}",
                        stacklevel=2,
                    )
                return factor, damping
        damping = max(10 * damping, 1e-4)


def _linear(module: Projection, quantised: Quantised) -> QuantisedLinear:
    """The quantised linear that replaces a projection, without the codes of pruned weights."""
    weight = module.weight.detach()
    pruned = weight == 0
    pruned = pruned if float(pruned.float().mean()) > PRUNED else None
    return QuantisedLinear.of(quantised, pruned, module.bias, weight.dtype)


def _quantise_embedding(subject: Subject, config: Rtn) -> None:
    """Round the embedding and the head to 8 bits; tied ones stay tied."""
    model = subject.model
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    columns = weights[0].shape[1]
    grid = Grid(8, config.group if columns % config.levels.size(columns) == 0 else ROW, config.grid)
    for path, weight in zip(EMBEDDINGS, weights[:1] if model.config.tie_word_embeddings else weights, strict=False):
        set_embedding(
            model, path, QuantisedLinear.of(round_to_nearest(weight.detach().float(), grid), dtype=weight.dtype)
        )
