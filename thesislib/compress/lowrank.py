"""Low rank: a projection's weight as a pair, W ~ B A, in the metric of its inputs that a method chooses."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from tqdm import tqdm

from thesislib.compress.allocation import by_effective_rank, by_loss, parameters
from thesislib.compress.calibration import ALL_AT_ONCE, FEEDS, INPUTS, Statistics, Visitor, stream
from thesislib.compress.factor import Metric, Pair, best, diagonal, nested, plain, spectrum, towards, whitening
from thesislib.compress.gradients import fisher_rows
from thesislib.compress.layerwise import effective_weight
from thesislib.compress.outline import Outline, OutlinedPair, SizeUnknown
from thesislib.compress.scope import blocks_of, check_scope
from thesislib.compress.selection import MOST_BLOCKS, LinearKey, fits, patterns, selected, whole_number
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model import packing
from thesislib.model.grid import ROW, Grid, round_to_nearest
from thesislib.model.layers import LINEARS, ComputedLinear, Projection, base_of, projections, replace, size_of
from thesislib.model.lowrank import DENSE, LowRank, factor_shapes, is_lowrank
from thesislib.model.quantised import EVERYWHERE, QuantisedLinear
from thesislib.model.subject import Subject

METHODS = ("svd", "fwsvd", "asvd", "svd_llm", "saes", "nsvd")
ALLOCATIONS = ("uniform", "effective", "loss")
BITS = (16, 8, 4)
GROUP = 64  # entries of a quantised factor that share a scale, where that divides a row


@stage("lowrank")
@dataclass(frozen=True)
class LowRankStage(Weighted):
    """Replace projections by pairs B A of a rank below break-even (`thesislib.model.lowrank.LowRank`).

    The pair of a rank minimises ``|(W - B A) S|``. Methods differ in the metric S. They are exact: no random SVD, and a
    floor under the eigenvalues instead of a multiple of the identity. A projection with a correction is factorised as
    it computes, correction included.

    Attributes:
        keep: the share of the parameters of the linears in scope that is kept; .8 if neither rank nor bytes is given.
            A weight m x n gets rank int(keep m n / (m + n)), SVD-LLM's formula; other conventions are in chapter 9.
        rank: instead, of every pair; at most the smaller side.
        bytes: instead, of all pairs together, as a file holds them.
        method: svd: S = I. fwsvd: rows weighted by the root of their squared gradients' sum (Hsu et al. 2022).
            asvd: S = diag(mean abs(x)^alpha) (Yuan et al. 2023). svd_llm: S S^T = X X^T (Wang et al. 2024; ROM and the
            eigenspace of EoRA are the same pair). nsvd: `whitened` of the rank so, the rest by svd of what is left (Lu
            et al. 2025). saes: as svd_llm, for a target pulled towards the outputs in the dense model (2602.03051).
        scope: all; or so many `blocks`: last, quiet (whose MLPs change the direction of their input least), or
            relevance (whose removal costs the right endings' log-probability least, chapter 8).
        blocks: how many; for scope all nothing.
        linears: names or patterns of projections; all seven by default.
        allocation: of the budget over linears. uniform. effective: rank ~ sqrt(effective rank / (m + n)) (D-Rank).
            loss: more where log(truncation error) is larger, within each kind of linear (SVD-LLM v2).
        feed: the inputs that X is: those in the original model, in the compressed one so far, or both; with both,
            the compressed model's inputs are mapped to the original one's outputs (saes needs both).
        alpha: of asvd.
        whitened: of nsvd, the share of the rank.
        pull: of saes, from 0 (svd_llm on compressed inputs) to 1 (the original model's outputs). The paper chooses it
            for each layer.
        bits: of the factors: 16 (the model's dtype), 8 or 4; or [A, B]. Rounded to the grid of least squared error.
        task: whose items scope relevance asks.
        items: of it.
        force: whether a pair may take as many bytes as what it replaces, or more.
        ridge: of feed both, how much the target V is held to the weight: ``ridge |V - W|^2`` beside the errors of
            outputs, in units of the inputs' mean square. At 0, as in the paper, the target follows the calibration
            text's drift where few tokens were, and other texts pay for it.
    """

    keep: float | None = None
    rank: int | None = None
    bytes: int | None = None
    method: str = "svd_llm"
    scope: str = "all"
    blocks: int | None = None
    linears: str | list | tuple = "*"
    allocation: str = "uniform"
    feed: str = "original"
    alpha: float = 0.5
    whitened: float = 0.95
    pull: float = 0.5
    bits: int | list | tuple = 16
    task: str = "arc_easy"
    items: int = 190
    force: bool = False
    ridge: float = 0.0

    family: ClassVar[str] = "factorised"
    pattern: ClassVar[str] = r"L(?:(\d+(?:\.\d+)?)%|r(\d+)|~)(?:-(svd|fwsvd|asvd|saes|nsvd))?"
    correctable: ClassVar[bool] = True
    factorises: ClassVar[bool] = True
    later: ClassVar[tuple[str, ...]] = ("ridge",)

    def __post_init__(self):
        super().__post_init__()
        given = [n for n in ("keep", "rank", "bytes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise BadInput(f"lowrank takes one of keep, rank and bytes: not {' and '.join(given)}")
        if not given:
            self._normalise(keep=0.8)
        if self.keep is not None and not 0 < self.keep <= 1:
            raise BadInput(f"keep is {self.keep}: expected a share in (0, 1], e.g. 0.8")
        for name in ("rank", "bytes", "blocks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: expected a whole number of at least 1")
        for name, options in (("method", METHODS), ("allocation", ALLOCATIONS), ("feed", FEEDS)):
            if getattr(self, name) not in options:
                raise unknown(name, getattr(self, name), options)
        check_scope(self)
        if self.method == "saes" and self.feed != "both":
            raise BadInput("method saes compares the original model's inputs with the compressed one's: feed: both")
        if self.feed == "both" and self.method not in ("svd_llm", "saes"):
            raise BadInput(f"feed both is not defined for method {self.method}: use svd_llm or saes, or another feed")
        if self.allocation != "uniform" and self.rank is not None:
            raise BadInput(f"allocation {self.allocation} shares out a budget, and rank gives every pair its own")
        for name in ("alpha", "whitened", "pull"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"{name} is {getattr(self, name)}: expected a number in [0, 1]")
        if not 0 <= self.ridge < math.inf:
            raise BadInput(f"ridge is {self.ridge}: expected a number of at least 0, e.g. 0.1")
        bits = tuple(self.bits) if isinstance(self.bits, (list, tuple)) else (self.bits, self.bits)
        if len(bits) != 2 or any(b not in BITS for b in bits):
            raise BadInput(f"bits is {self.bits}: expected 16, 8 or 4, or two of them for A and B, e.g. [4, 8]")
        self._normalise(linears=patterns(self.linears), bits=bits)

    @property
    def rounds_pairs(self) -> bool:
        """See `Stage`."""
        return self.bits != (16, 16)

    @property
    def label(self) -> str:
        """L80% for the share that is kept, Lr64 for a rank, L~ for bytes; with the method, if it is not svd_llm."""
        size = f"{100 * self.keep:g}%" if self.keep else f"r{self.rank}" if self.rank else "~"
        return f"L{size}" + ("" if self.method == "svd_llm" else f"-{self.method}")

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        size = f"{100 * self.keep:g} % of the parameters" if self.keep else f"rank {self.rank}"
        return f"weights as pairs of low rank by {self.method}" + (f", {size}" if self.bytes is None else "")

    @classmethod
    def from_label(cls, part: str) -> "LowRankStage | None":
        """See `Stage`; L~ does not give the bytes."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        if not match or not (match[1] or match[2]):
            return None
        method = match[3] or "svd_llm"
        size: dict[str, Any] = {"keep": float(match[1]) / 100} if match[1] else {"rank": whole_number(match[2])}
        return cls(**size, method=method, feed="both" if method == "saes" else "original")

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection may be factorised, as far as its name tells."""
        return any(fits(pattern, block, name) for pattern in self.linears)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: no projection becomes a pair twice, and gradients need weights."""
        depth = shape.depth if shape else None
        for earlier in previous:
            if any(
                earlier.makes_pair(b, n, depth) and self.makes_pair(b, n, depth)
                for b in range(depth or MOST_BLOCKS)
                for n in (shape.inputs if shape else LINEARS)
            ):
                raise BadInput(
                    f"{self.label} after {earlier.label} would make pairs of pairs: expected other linears or blocks"
                )
            if self.method == "fwsvd" and (earlier.family == "quantised" or earlier.factorises):
                raise BadInput(
                    f"method fwsvd needs the gradients of weights, which {earlier.label} replaced: put lowrank "
                    f"before it, or use svd_llm"
                )
        if shape is not None and self.blocks is not None and self.blocks > shape.depth:
            raise BadInput(f"blocks is {self.blocks}: the model has {shape.depth}")
        return super().after(previous, shape)

    def makes_pair(self, block: int, name: str, depth: int | None) -> bool:
        """See `Stage`; only the run can tell which blocks are quiet or irrelevant."""
        last = self.scope == "last" and depth is not None and block >= depth - cast("int", self.blocks)
        return (self.scope == "all" or last) and self.takes(block, name)

    def encodings(self, shape: tuple[int, int]) -> tuple[str, str]:
        """How the factors of a weight are held; groups of a row's entries share a scale where they divide it.

        B's rows have as many entries as the rank, which is not known here: they share one scale.
        """
        a, b = cast("tuple[int, int]", self.bits)
        group: int | str = GROUP if shape[1] % GROUP == 0 else ROW
        return (
            DENSE if a == 16 else f"int{a}/symmetric/{group}/{EVERYWHERE}",
            DENSE if b == 16 else f"int{b}/symmetric/{ROW}/{EVERYWHERE}",
        )

    def ranks(self, linears: Mapping[LinearKey, Projection], dtype: torch.dtype) -> dict[LinearKey, int]:
        """The rank of each projection by the uniform allocation.

        Raises:
            BadInput: a budget of bytes that leaves a projection no rank.
        """
        shapes = {key: (m.out_features, m.in_features) for key, m in linears.items()}
        if self.rank is not None:
            return {key: min(self.rank, *shape) for key, shape in shapes.items()}

        def at(keep: float) -> dict[LinearKey, int]:
            return {key: min(int(keep * m * n / (m + n)), m, n) for key, (m, n) in shapes.items()}

        keep, more = self.keep or 0.0, max((sum(shape) / min(shape) for shape in shapes.values()), default=1.0)
        for _ in range(0 if self.keep else 60):
            middle = (keep + more) / 2
            held = sum(_bytes(self, max(rank, 1), shapes[key], dtype) for key, rank in at(middle).items())
            keep, more = (middle, more) if held <= cast("int", self.bytes) else (keep, middle)
        ranks = at(keep)
        if min(ranks.values()) < 1:
            what = f"keep {self.keep}" if self.keep else f"a budget of {self.bytes} bytes"
            raise BadInput(f"{what} leaves {_named(min(ranks, key=ranks.get))} no rank: expected more")
        return ranks

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        if self.scope in ("quiet", "relevance") or self.allocation != "uniform":
            raise SizeUnknown
        chosen = set(blocks_of(self, outline.subject.depth))
        outline.check_alike(lambda b, n: b in chosen and self.takes(b, n))
        taken = selected(outline.subject, lambda b, n: b in chosen and self.takes(b, n))
        if outline.budgeted & set(taken) and outline.budgeted - set(taken):
            raise SizeUnknown  # which of the corrections go that share a budget
        outline.budgeted -= set(taken)
        _check_taken(self, taken)
        ranks = self.ranks(taken, outline.dtype)
        for (b, name), module in taken.items():
            check_smaller(self, (b, name), module, ranks[b, name], outline.dtype)
            encodings = self.encodings((module.out_features, module.in_features))
            replace(outline.subject.blocks[b], name, OutlinedPair(module, ranks[b, name], encodings, outline.dtype))
        outline.changed = set(taken)

    def apply(
        self, subject: Subject, *, data: str = "embedded", work: Path | None = None, metrics: "Metrics | None" = None
    ) -> tuple[Subject, dict]:
        """A copy of the subject with pairs, and a report: blocks, ranks, bytes, and each pair's relative error.

        Args:
            subject: is not changed.
            data: a data spec for calibration.
            work: unused.
            metrics: those of a pass through the same subject by the same method and calibration, see `metrics_of`; for
                feed original, where they do not depend on the ranks.

        Raises:
            BadInput: no projection in scope; a pair already there; a pair that would take as many bytes as the weight,
                unless forced; moments that are not finite or zero; too little text; metrics for another feed.
        """
        if metrics is not None and self.feed != "original":
            raise BadInput(f"metrics are those of the original model's inputs, and feed is {self.feed}: leave them out")
        chosen = set(blocks_of(self, subject.depth, subject, data))
        taken = _once(selected(subject, lambda b, n: b in chosen and self.takes(b, n)))
        _check_taken(self, taken)
        result = subject.copy(unpack=False)
        fisher = fisher_rows(subject, taken, self.ids(subject.tokenizer, data)) if self.method == "fwsvd" else {}
        ranks = self.ranks(taken, subject.dtype)
        if self.allocation != "uniform":
            ranks = self._allocated(subject, taken, ranks, fisher, data, metrics)
        for key, rank in ranks.items():
            check_smaller(self, key, taken[key], rank, subject.dtype)
        visitor = Factorise(self, result, ranks, fisher, metrics)
        self._through(result, visitor, data)
        pairs = {key: size_of(linear) for key, linear in visitor.linears.items()}
        report = {
            "blocks": sorted({b for b, _ in taken}),
            "linears": len(pairs),
            "bytes": sum(size.nbytes for size in pairs.values()),
            "parameters": sum(size.numel for size in pairs.values()),
            "of_parameters": sum(taken[key].out_features * taken[key].in_features for key in pairs),
            "ranks": {_named(key): ranks[key] for key in pairs},
            "relative_errors": {_named(key): round(e, 6) for key, e in visitor.errors.items()},
        }
        return result, report

    def _through(self, subject: Subject, visitor: "Factorise | Spectra", data: str) -> None:
        """Take a visitor through the blocks, on calibration text if the method needs any."""
        if visitor.known is not None or self.method in ("svd", "fwsvd"):
            for b in tqdm(range(subject.depth), desc=self.label, unit="block", disable=None, leave=False):
                linears = {n: m for n, m in subject.linears(b).items() if visitor.wants(b, n)}
                visitor.change(b, linears, {})
            return
        ids = self.ids(subject.tokenizer, data)
        stream(subject, ids, visitor, weighting=self.weighting, feed=visitor.feed, title=self.label)

    def _allocated(
        self, subject: Subject, taken: Mapping, uniform: Mapping, fisher: Mapping, data: str, metrics: "Metrics | None"
    ) -> dict:
        """The ranks by another allocation, with as many parameters, or bytes, as the uniform one at most."""
        visitor = Spectra(self, subject, uniform, fisher, metrics)
        self._through(subject, visitor, data)
        shapes = {key: (m.out_features, m.in_features) for key, m in taken.items()}
        share = by_effective_rank if self.allocation == "effective" else by_loss

        def bytes_of(rank: int, shape: tuple[int, int]) -> int:
            return _bytes(self, rank, shape, subject.dtype)

        return share(visitor.spectra, shapes, uniform, parameters if self.bytes is None else bytes_of)


# ---------------------------------------------------------------- the pass


class Spectra(Visitor):
    """The singular values of each projection in the method's metric, in the original model; changes nothing."""

    groups = ALL_AT_ONCE
    feed = "original"

    def __init__(
        self,
        config: LowRankStage,
        subject: Subject,
        ranks: Mapping[LinearKey, int],
        fisher: Mapping,
        known: "Metrics | None" = None,
    ):
        self.config, self.subject, self.ranks, self.fisher, self.known = config, subject, ranks, fisher, known
        self.spectra: dict[LinearKey, torch.Tensor] = {}
        self.moments = config.method in ("svd_llm", "saes", "nsvd")
        self.sizes = config.method == "asvd"

    def wants(self, block: int, name: str) -> bool:
        """See `Visitor`."""
        return (block, name) in self.ranks

    def metrics(self, block: int, linears: Mapping[str, Projection], statistics: Mapping) -> dict[str, Metric]:
        """The metric of each projection's inputs; those with the same inputs share one."""
        if self.known is not None:
            return {name: self.known[block, INPUTS[name]] for name in linears}
        found: dict[str, Metric] = {}
        shared: dict[str, Metric] = {}
        for name, linear in linears.items():
            group = INPUTS[name] if statistics else f"{linear.in_features}"
            if group not in shared:
                shared[group] = metric_of(
                    self.config, statistics.get(name), linear.in_features, f"block {block}'s {name}"
                )
            found[name] = shared[group]
        return found

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`."""
        for name, metric in self.metrics(block, linears, statistics).items():
            weight = effective_weight(linears[name])
            if (block, name) in self.fisher:
                weight = self.fisher[block, name].to(weight.device)[:, None] * weight
            self.spectra[block, name] = spectrum(weight, metric)


class Factorise(Spectra):
    """Replaces each projection by its pair, in the subject that it is taken through."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.feed = self.config.feed
        self.linears: dict[LinearKey, LowRank] = {}
        self.errors: dict[LinearKey, float] = {}

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`."""
        metrics = self.metrics(block, linears, statistics)
        for name, linear in linears.items():
            key = block, name
            pair = factorised(
                self.config, effective_weight(linear), self.ranks[key], metrics[name], statistics.get(name),
                self.fisher.get(key),
            )  # fmt: skip
            self.errors[key] = pair.error
            self.linears[key] = as_linear(self.config, pair, linear, self.subject.dtype)
            for block_of in self.subject.blocks:
                if projections(block_of).get(name) is linear:  # blocks that a plan repeats share it
                    replace(block_of, name, self.linears[key])


Metrics = Mapping[tuple[int, str], Metric]  # by block and kind of input, see `thesislib.compress.calibration.INPUTS`


def metrics_of(config: LowRankStage, subject: Subject, data: str = "embedded") -> Metrics:
    """The metrics of projections' inputs in a subject, for several stages that differ in ranks, bits or scope.

    Args:
        config: its method, calibration and linears count.
        subject: the original.
        data: a data spec.

    Raises:
        BadInput: see `metric_of`.
    """
    every = selected(subject, config.takes)
    visitor = Collect(config, subject, dict.fromkeys(every, 1), {})
    config._through(subject, visitor, data)
    return visitor.found


class Collect(Spectra):
    """Keeps the metrics."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.found: dict[tuple[int, str], Metric] = {}

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`; it changes nothing."""
        self.found |= {(block, INPUTS[n]): metric for n, metric in self.metrics(block, linears, statistics).items()}


def metric_of(config: LowRankStage, s: Statistics | None, inputs: int, where: str) -> Metric:
    """The metric of a method, from the statistics of a projection's inputs.

    Raises:
        BadInput: inputs that are not finite, or all zero.
    """
    if config.method in ("svd", "fwsvd"):
        return plain(inputs)
    s = cast("Statistics", s)
    if config.method == "asvd":
        return diagonal((s.sizes / s.tokens) ** config.alpha, where)
    return whitening(s.moment, where)


def factorised(
    config: LowRankStage, weight: torch.Tensor, rank: int, metric: Metric, s: Statistics | None = None,
    rows: torch.Tensor | None = None,
) -> Pair:  # fmt: skip
    """The pair of a weight by a stage's method.

    Args:
        config: method and its settings.
        weight: (outputs, inputs).
        rank: of the pair.
        metric: of the inputs, see `metric_of`.
        s: the statistics of the inputs, for feed both.
        rows: (outputs,) weights of the outputs, for fwsvd.
    """
    if config.method == "nsvd":
        return nested(weight, rank, metric, config.whitened)
    if config.feed == "both":
        return best(
            towards(
                weight, cast("Statistics", s), metric, config.pull if config.method == "saes" else 1.0, config.ridge
            ),
            rank,
            metric,
        )
    return best(weight, rank, metric, rows)


def as_linear(config: LowRankStage, pair: Pair, linear: Projection, dtype: torch.dtype) -> LowRank:
    """The pair as the stage's bits hold it."""
    encodings = config.encodings((linear.out_features, linear.in_features))
    A, B = (
        factor.to(dtype) if encoding == DENSE else rounded(factor, encoding, dtype)
        for factor, encoding in zip((pair.A, pair.B), encodings, strict=True)
    )
    return LowRank(A, B, linear.bias)


def rounded(factor: torch.Tensor, encoding: str, dtype: torch.dtype) -> QuantisedLinear:
    """A factor rounded on the grid of an encoding."""
    bits, kind, group, _ = encoding.removeprefix("int").split("/")
    grid = Grid(int(bits), group if group == ROW else int(group), kind)
    return QuantisedLinear.of(round_to_nearest(factor.float(), grid, "squared"), dtype=dtype)


# ---------------------------------------------------------------- sizes


def check_smaller(config: LowRankStage, key: LinearKey, module: Projection, rank: int, dtype: torch.dtype) -> None:
    """Raises BadInput if a pair takes as many bytes as what it replaces, or more, unless that is forced."""
    shape = module.out_features, module.in_features
    new, old = _bytes(config, rank, shape, dtype), _stored(module)
    if module.bias is not None:
        new += module.bias.nbytes
    if new >= old and not config.force:
        m, n = shape
        raise BadInput(
            f"rank {rank} of {_named(key)} ({m} x {n}) takes {new:,} bytes, and what it replaces takes {old:,}: "
            f"expected a rank below {-(-rank * old // new)} (break-even of a dense weight is "
            f"m n / (m + n) = {m * n / (m + n):.0f}), or force: true"
        )


def _stored(module: Projection) -> int:
    """The bytes of a projection in an artifact, which packs a pruned weight."""
    base, nbytes = base_of(module), size_of(module).nbytes
    if isinstance(base, ComputedLinear):
        return nbytes
    weight = base.weight
    encoding, nonzero = packing.smallest(weight), int(packing.nonzero_bits(weight).sum())
    shape = cast("tuple[int, int]", tuple(weight.shape))
    return nbytes - weight.nbytes + packing.predicted_bytes(shape, weight.dtype, encoding, nonzero)


def _bytes(config: LowRankStage, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """The bytes of a pair's tensors."""
    shapes = factor_shapes(rank, shape, config.encodings(shape), dtype)
    return sum(math.prod(size) * d.itemsize for size, d in shapes.values())


def _check_taken(config: LowRankStage, taken: Mapping[LinearKey, Projection]) -> None:
    """Raises BadInput for no projection in scope, or one that is a pair already."""
    if not taken:
        raise BadInput(f"no projection is in scope '{config.scope}' with linears {', '.join(config.linears)}")
    for key, module in taken.items():
        if is_lowrank(module) or isinstance(base_of(module), OutlinedPair):
            raise BadInput(
                f"{_named(key)} is a pair already ({base_of(module).encoding}): expected linears or a scope without it"
            )


def _once(linears: Mapping[LinearKey, Projection]) -> dict[LinearKey, Projection]:
    """Each projection under one key; blocks that a plan repeats share theirs."""
    keys = {id(module): key for key, module in linears.items()}
    return {key: module for key, module in linears.items() if keys[id(module)] == key}


def _named(key: LinearKey) -> str:
    return f"blocks.{key[0]}.{key[1]}"
