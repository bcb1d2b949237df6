"""EoRA: a low-rank correction of each compressed projection that minimises the error of its output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from thesislib.compress.calibration import ALL_AT_ONCE, INPUTS, Statistics, Visitor, check_moment, stream
from thesislib.compress.factor import Metric, plain, truncated
from thesislib.compress.layerwise import check_same_shapes, effective_weight, relative_error
from thesislib.compress.outline import Outline, SizeUnknown, corrected
from thesislib.compress.selection import LinearKey, check_all_fit, fits, patterns, selected
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.layers import Adapted, Projection, adapt, replace
from thesislib.model.subject import Subject

INPUTS_OF = ("original", "compressed", "none")
ENTRY = 2  # bytes of an entry of a saved factor: float16 or bfloat16
GREED = 4  # with a byte budget, the largest rank is this times the rank of an even split

Factors = dict[LinearKey, tuple[torch.Tensor, torch.Tensor]]  # A (rank, inputs) and B (outputs, rank)


@stage("eora")
@dataclass(frozen=True)
class Eora(Weighted):
    """Approximate W - W_compressed by a low-rank B A, with the least error on the layer's inputs (Liu et al. 2024).

    Attributes:
        rank: of every correction, at most the projection's smaller side; 32 if no budget is given.
        ranks: {pattern: rank} for some projections; if several patterns fit, the last counts.
        bytes: instead of ranks, a budget for all corrections at 2 bytes an entry. It is spent on the directions that
            reduce the squared relative errors of outputs most for their bytes.
        inputs: the subject whose activations the error is measured on: original, or compressed, whose activations the
            corrected layer gets. none: the weight's own error, without calibration, which is the plain SVD of
            W - W_compressed (LoRC, arXiv 2303.08302, whose factors may be rounded to 8 bits too).
        linears: names or patterns of projections; all seven by default.
    """

    rank: int | None = None
    ranks: dict | None = None
    bytes: int | None = None
    inputs: str = "compressed"
    linears: str | list | tuple = "*"

    label = "E"
    family: ClassVar[str] = "compensated"
    pattern: ClassVar[str] = "E"
    needs_original: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.bytes is not None and (self.rank, self.ranks) != (None, None):
            raise BadInput("eora takes either rank and ranks, or bytes: a budget from which ranks follow")
        if self.rank is None and self.bytes is None:
            self._normalise(rank=32)
        for rank in (self.rank, *(self.ranks or {}).values()):
            if rank is not None and not (isinstance(rank, int) and rank >= 1):
                raise BadInput(f"rank {rank}: expected a whole number of at least 1, e.g. 32")
        if self.bytes is not None and self.bytes < 1:
            raise BadInput(f"bytes is {self.bytes}: expected a budget of at least 1 byte, e.g. 10000000")
        if self.inputs not in INPUTS_OF:
            raise unknown("inputs", self.inputs, INPUTS_OF)
        if self.inputs == "none" and self.weighting != "equal":
            raise BadInput(f"weighting {self.weighting} does nothing here: with inputs none no token is read")
        self._normalise(linears=patterns(self.linears))
        patterns(self.ranks or ())

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection may be corrected."""
        return any(fits(pattern, block, name) for pattern in self.linears)

    def rank_of(self, block: int, name: str) -> int:
        """The rank that is set for a projection."""
        chosen = self.rank
        for pattern, rank in (self.ranks or {}).items():
            if fits(pattern, block, name):
                chosen = rank
        return chosen

    def most(self, taken: Mapping[LinearKey, Projection]) -> int:
        """The largest rank that a byte budget gives to one of these projections."""
        direction = sum(ENTRY * (m.in_features + m.out_features) for m in taken.values())  # bytes of one for each
        return GREED * max(1, self.bytes // direction)

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        return "EoRA's low-rank correction" if self.inputs != "none" else "a low-rank correction by plain SVD"

    @classmethod
    def from_label(cls, part: str) -> "Eora | None":
        """See `Stage`."""
        return cls() if part == cls.label else None

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: the previous stage must be correctable."""
        if not previous or not previous[-1].correctable:
            before = f"after {previous[-1].label}" if previous else "at the beginning"
            raise BadInput(f"eora {before} has nothing to correct: expected width, rtn or gptq right before it")
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        if self.bytes is None:
            outline.change(
                lambda module, rank: corrected(module, rank, outline.dtype),
                lambda i, n: self.rank_of(i, n) * self.takes(i, n),
                outline.changed,
            )
            return
        outline.check_alike(self.takes)
        taken = selected(outline.subject, self.takes)
        most = self.most(taken)
        taken = {key: m for key, m in taken.items() if key in outline.changed}
        costs = {key: ENTRY * (m.in_features + m.out_features) for key, m in taken.items()}
        # only the run knows the gains; with these every projection gets a direction before any gets a second
        gains = {
            key: [costs[key] / k for k in range(1, min(most, m.in_features, m.out_features) + 1)]
            for key, m in taken.items()
        }
        ranks = {key: rank for key, rank in share_out(gains, costs, self.bytes).items() if rank} if gains else {}
        if any(isinstance(m, Adapted) and m.lora_A.dtype != outline.dtype for m in taken.values()):
            raise SizeUnknown  # the bytes of an entry depend on the projection that it is spent on
        for (i, name), rank in ranks.items():
            replace(outline.subject.blocks[i], name, corrected(taken[i, name], rank, outline.dtype))
        outline.budgeted, outline.changed = outline.budgeted | set(costs), set()

    def apply(
        self, subject: Subject, *, data: str = "embedded", work: Path | None = None, original: Subject | None = None
    ) -> tuple[Subject, dict]:
        """A copy of the subject with corrected projections (`thesislib.model.layers.Adapted`), and a report.

        Args:
            subject: after a compression that keeps its shapes.
            data: a data spec for calibration.
            work: unused.
            original: the subject before that compression.

        Raises:
            BadInput: no original, or one of other shapes; subjects with equal weights; too little text; a budget below
                the cheapest direction.
        """
        if original is None:
            raise BadInput(
                "eora corrects the difference to the original weights and needs them at hand: apply(..., "
                "original=SUBJECT), or a recipe"
            )
        check_same_shapes(original, subject)
        check_all_fit(self.linears, subject.depth)
        ids = None if self.inputs == "none" else self.ids(subject.tokenizer, data)
        visitor = _corrections(self, original, subject, ids, self.label)
        factors = visitor.factors()
        if not factors:
            raise BadInput("the original's weights equal the compressed subject's: eora has nothing to correct")
        result = subject.copy(unpack=False)
        for (block, name), (A, B) in factors.items():
            module = result.linears(block)[name]
            replace(result.blocks[block], name, adapt(module, A.to(module.weight), B.to(module.weight)))
        return result, visitor.report(factors)


def _corrections(
    config: Eora, original: Subject, compressed: Subject, ids: torch.Tensor | None, title: str
) -> "Correct":
    """The corrections of all projections, computed in one calibration pass over windows (N, T), if inputs count."""
    visitor = Correct(config, original, compressed)
    if config.inputs == "none":
        visitor.without_inputs()
        return visitor
    source = original if config.inputs == "original" else compressed
    stream(source, ids, visitor, weighting=config.weighting, feed="original", title=title)
    return visitor


def start(
    subject: Subject,
    original: Subject,
    ids: torch.Tensor,
    rank: int,
    linears: str | list | tuple = "*",
    *,
    inputs: str = "compressed",
    weighting: str = "equal",
) -> Factors:
    """EoRA's factors as the initial values of a trainable LoRA, float32.

    Every chosen projection gets factors of the full rank. If its correction has a lower rank, or none, the remaining
    columns of B are zero and the remaining rows of A random, as in LoRA's own initial values.

    Args:
        subject: after compression.
        original: the subject before compression.
        ids: (N, T) calibration windows; not read with inputs none.
        rank: of the factors.
        linears: see `Eora`, as for the other arguments.
        inputs: see `Eora`.
        weighting: see `Eora`.
    """
    config = Eora(rank=rank, linears=linears, inputs=inputs, weighting=weighting)
    check_same_shapes(original, subject)
    corrections = _corrections(config, original, subject, ids, "eora").factors()
    generator, factors = torch.Generator().manual_seed(0), {}
    for key, module in selected(subject, config.takes).items():
        A = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        B = torch.zeros(module.out_features, rank)
        a, b = corrections.get(key, (A[:0], B[:, :0]))
        A[: len(a)], B[:, : len(a)] = a, b
        factors[key] = A, B
    return factors


class Correct(Visitor):
    """Computes each projection's correction; changes no weight."""

    groups = ALL_AT_ONCE
    moments = True

    def __init__(self, config: Eora, original: Subject, compressed: Subject):
        self.config, self.original, self.compressed = config, original, compressed
        self.corrections: dict[LinearKey, Correction] = {}
        self.errors: dict[LinearKey, float] = {}
        if config.bytes is not None:
            self.most = config.most(selected(compressed, config.takes))

    def wants(self, block: int, name: str) -> bool:
        """See `Visitor`."""
        return self.config.takes(block, name)

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`."""
        roots: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in linears:
            before, difference = self._weights(block, name)
            if not difference.any():
                continue
            moment, key = statistics[name].moment, INPUTS[name]
            if key not in roots:
                roots[key] = square_root(moment, f"block {block}'s {name}")
            total = float(((before @ moment) * before).sum(dtype=torch.float64))
            self._correct((block, name), difference, roots[key], total, relative_error(difference, before, moment))

    def without_inputs(self) -> None:
        """Every correction in the norm of its weight, in which all inputs count alike."""
        for block, name in selected(self.compressed, self.config.takes):
            before, difference = self._weights(block, name)
            if difference.any():
                total, missing = (float(w.double().square().sum()) for w in (before, difference))
                error = (missing / total) ** 0.5 if total else 0.0
                ones = plain(difference.shape[1]).root.to(difference.device)
                self._correct((block, name), difference, (ones, ones), total, error)

    def _weights(self, block: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A projection's original weight, and what the compressed one lacks of it."""
        before, after = (effective_weight(s.linears(block)[name]) for s in (self.original, self.compressed))
        return before, before - after

    def _correct(
        self,
        key: LinearKey,
        difference: torch.Tensor,
        metric: tuple[torch.Tensor, torch.Tensor],
        total: float,
        error: float,
    ) -> None:
        """Note a projection's correction and its relative error before it, both in a metric of its inputs."""
        rank = self.most if self.config.bytes is not None else self.config.rank_of(*key)
        self.corrections[key] = correction(difference, *metric, rank, total or 1.0)
        self.errors[key] = error

    def factors(self) -> Factors:
        """A and B of each projection, without those of rank 0."""
        gains = {key: c.gains for key, c in self.corrections.items()}
        ranks = {key: len(several) for key, several in gains.items()}
        if self.config.bytes is not None and gains:
            costs = {key: c.cost for key, c in self.corrections.items()}
            ranks = share_out(gains, costs, self.config.bytes)
        return {key: (c.A[: ranks[key]], c.B[:, : ranks[key]]) for key, c in self.corrections.items() if ranks[key]}

    def report(self, factors: Factors) -> dict:
        """Ranks, bytes, and each projection's relative error before and after, on the inputs that it was fitted to."""
        ranks, errors = {}, {}
        for (i, name), c in self.corrections.items():
            rank, error = len(factors[i, name][0]) if (i, name) in factors else 0, self.errors[i, name]
            after = max(error**2 - sum(c.gains[:rank]), 0) ** 0.5
            ranks[f"blocks.{i}.{name}"] = rank
            errors[f"blocks.{i}.{name}"] = [round(error, 6), round(after, 6)]
        spent = sum(c.cost * rank for c, rank in zip(self.corrections.values(), ranks.values(), strict=True))
        return {"bytes": spent, "ranks": ranks, "relative_errors": errors}


@dataclass(frozen=True)
class Correction:
    """A low-rank correction B A, with the direction of the largest gain first.

    Attributes:
        A: (rank, inputs) float32.
        B: (outputs, rank) float32.
        gains: by how much each direction reduces the squared relative error of the output.
        cost: bytes of one direction.
    """

    A: torch.Tensor
    B: torch.Tensor
    gains: list[float]
    cost: int


def square_root(moment: torch.Tensor, where: str = "the projection") -> tuple[torch.Tensor, torch.Tensor]:
    """S (D, k) with S S^T = X^T X, and its pseudo-inverse (k, D), float64.

    Directions whose eigenvalue is below the largest times float32's epsilon are left out: statistics were summed in
    float32, so smaller eigenvalues are rounding errors of either sign. (EoRA's code raises negative ones to the
    smallest positive one, and divides by its root.) The usual cut-off, D times epsilon, would be too high: an attention
    sink makes the largest eigenvalue so large that 1,455 of the 1,536 directions of SmolLM2-135M's last down_proj but
    one lie below it.

    Raises:
        BadInput: statistics that are not finite, or all zero.
    """
    check_moment(moment, where)
    values, vectors = torch.linalg.eigh(moment.double())
    kept = values > torch.finfo(torch.float32).eps * values[-1]
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    return vectors * root, (vectors / root).T


def correction(
    difference: torch.Tensor, root: torch.Tensor, inverse: torch.Tensor, rank: int, total: float = 1.0
) -> Correction:
    """The B A of a given rank with the least norm of (difference - B A) X (EoRA, section 3).

    It comes from the SVD of difference S.

    Args:
        difference: (outputs, inputs) W - W_compressed.
        root: S (inputs, k) with S S^T = X^T X, or (inputs,) if it is diagonal; any root gives the same product.
        inverse: its pseudo-inverse (k, inputs), or (inputs,).
        rank: at most; the projection's smaller side restores it completely.
        total: squared norm of W X; gains are relative to it.
    """
    metric = Metric(root, inverse)
    u, v, s = truncated(metric.rooted(difference), rank, left=0.5)
    return Correction(
        metric.undone(v.T).float(), u.float(), (s.square() / total).tolist(), ENTRY * sum(difference.shape)
    )


def share_out(
    gains: Mapping[LinearKey, list[float]], costs: Mapping[LinearKey, int], budget: int
) -> dict[LinearKey, int]:
    """Ranks within a budget of bytes, which is spent on directions in order of their gain per byte.

    Args:
        gains: of each projection's directions, in falling order.
        costs: bytes of a direction.
        budget: bytes.

    >>> share_out({(0, "a"): [9.0, 1.0], (0, "b"): [8.0, 7.0]}, {(0, "a"): 10, (0, "b"): 10}, 30)
    {(0, 'a'): 1, (0, 'b'): 2}

    Raises:
        BadInput: a budget below the cheapest direction.
    """
    if budget < (least := min(costs.values())):
        raise BadInput(f"a budget of {budget} bytes buys no correction: the cheapest takes {least}")
    directions = ((gain / costs[key], key) for key, several in gains.items() for gain in several)
    ranks = dict.fromkeys(gains, 0)
    for _, key in sorted(directions, key=lambda d: -d[0]):
        if costs[key] <= budget:
            ranks[key], budget = ranks[key] + 1, budget - costs[key]
    return ranks
