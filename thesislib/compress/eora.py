"""EoRA: what compression took from each projection, given back as a low-rank correction where the layer's inputs are
large."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from thesislib.compress.calibration import ALL_AT_ONCE, INPUTS, Statistics, Visitor, stream
from thesislib.compress.layerwise import Place, check_same_shapes, effective_weight, relative_error
from thesislib.compress.outline import Outline, SizeUnknown, corrected
from thesislib.compress.selection import check_all_fit, fits, patterns
from thesislib.compress.stage import Shape, Stage, Weighted, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.layers import Adapted, Projection, adapt, replace
from thesislib.model.subject import Subject

INPUTS_OF = ("original", "compressed")
ENTRY = 2  # bytes of an entry of a saved factor: float16 or bfloat16
GREED = 4  # with a byte budget no projection gets more than this times the rank that an even split would give


@stage("eora")
@dataclass(frozen=True)
class Eora(Weighted):
    """Correct W - W_compressed by a low-rank B A that is best for the layer's inputs (Liu et al. 2024, EoRA).

    Attributes:
        rank: of every correction, at most the projection's smaller side; 32 if no budget is given.
        ranks: {pattern: rank} for some projections; of several that fit, the last counts.
        bytes: instead of ranks a budget for all corrections at 2 bytes an entry, spent on the directions that lessen
            the projections' relative errors most for a byte.
        inputs: in whose activations the error is measured: original, or compressed, which the corrected layer will see.
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
        self._normalise(linears=patterns(self.linears))
        patterns(self.ranks or ())

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection may be corrected."""
        return any(fits(pattern, block, name) for pattern in self.linears)

    def rank_of(self, block: int, name: str) -> int:
        """The rank asked for at a projection."""
        found = self.rank
        for pattern, rank in (self.ranks or {}).items():
            if fits(pattern, block, name):
                found = rank
        return found

    @classmethod
    def from_label(cls, part: str) -> "Eora | None":
        """See `Stage`."""
        return cls() if part == cls.label else None

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: the stage right before must have changed weights that can be corrected."""
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
        taken = {
            (i, n): m
            for i in range(outline.subject.depth)
            for n, m in outline.subject.linears(i).items()
            if self.takes(i, n)
        }
        costs = {place: ENTRY * (m.in_features + m.out_features) for place, m in taken.items()}
        most = GREED * max(1, self.bytes // sum(costs.values()))
        costs = {place: cost for place, cost in costs.items() if place in outline.changed}
        # what the run gives to each is its own to tell: here each gets a direction before any gets a second
        gains = {
            p: [cost / k for k in range(1, min(most, taken[p].in_features, taken[p].out_features) + 1)]
            for p, cost in costs.items()
        }
        ranks = {p: rank for p, rank in share_out(gains, costs, self.bytes).items() if rank} if gains else {}
        if any(isinstance(taken[p], Adapted) and taken[p].lora_A.dtype != outline.dtype for p in costs):
            raise SizeUnknown  # how many bytes an entry takes depends on where it falls
        for (i, name), rank in ranks.items():
            replace(outline.subject.blocks[i], name, corrected(taken[i, name], rank, outline.dtype))
        outline.budgeted, outline.changed = outline.budgeted | set(costs), set()

    def apply(
        self, subject: Subject, *, data: str = "embedded", work: Path | None = None, original: Subject | None = None
    ) -> tuple[Subject, dict]:
        """A copy of the subject with corrected projections (`thesislib.model.layers.Adapted`), and a report.

        Args:
            subject: after compression of any kind that keeps its shapes.
            data: for calibration.
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
        ids = self.ids(subject.tokenizer, data)
        visitor = Correct(self, original, subject)
        stream(
            original if self.inputs == "original" else subject,
            ids,
            visitor,
            weighting=self.weighting,
            feed="original",
            title=self.label,
        )
        factors = visitor.factors()
        if not factors:
            raise BadInput("the original's weights equal the compressed subject's: eora has nothing to correct")
        result = subject.copy(unpack=False)
        for (block, name), (A, B) in factors.items():
            module = result.linears(block)[name]
            kind: dict[str, Any] = {"dtype": module.weight.dtype, "device": module.weight.device}
            replace(result.blocks[block], name, adapt(module, A.to(**kind), B.to(**kind)))
        return result, visitor.report(factors)


def start(
    subject: Subject,
    original: Subject,
    ids: torch.Tensor,
    rank: int,
    linears: str | list | tuple = "*",
    *,
    inputs: str = "compressed",
    weighting: str = "equal",
) -> dict[Place, tuple[torch.Tensor, torch.Tensor]]:
    """EoRA's factors as the start of a trainable LoRA: {(block, projection): (A (rank, inputs), B (outputs, rank))},
    float32.

    Every chosen projection gets factors of the full rank: where the difference has less, or there is none, the rest of
    B is zero and the rest of A random, as in LoRA's own start. See `Eora` for the arguments; ids are (N, T) windows.
    """
    config = Eora(rank=rank, linears=linears, inputs=inputs, weighting=weighting)
    check_same_shapes(original, subject)
    visitor = Correct(config, original, subject)
    stream(
        original if inputs == "original" else subject, ids, visitor, weighting=weighting, feed="original", title="eora"
    )
    found, generator = visitor.factors(), torch.Generator().manual_seed(0)
    result = {}
    for i in range(subject.depth):
        for name, module in subject.linears(i).items():
            if config.takes(i, name):
                A = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
                B = torch.zeros(module.out_features, rank)
                a, b = found.get((i, name), (A[:0], B[:, :0]))
                A[: len(a)], B[:, : len(a)] = a, b
                result[i, name] = A, B
    return result


class Correct(Visitor):
    """Finds each projection's correction; changes no weight."""

    groups = ALL_AT_ONCE
    moments = True

    def __init__(self, config: Eora, original: Subject, compressed: Subject):
        self.config, self.original, self.compressed = config, original, compressed
        self.found: dict[Place, Correction] = {}
        self.errors: dict[Place, float] = {}
        if config.bytes is not None:
            places = [
                (i, n, m)
                for i in range(compressed.depth)
                for n, m in compressed.linears(i).items()
                if config.takes(i, n)
            ]
            self.most = GREED * max(
                1, config.bytes // (ENTRY * sum(m.in_features + m.out_features for _, _, m in places))
            )

    def wants(self, block: int, name: str) -> bool:
        """See `Visitor`."""
        return self.config.takes(block, name)

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`."""
        roots: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in linears:
            before, after = (effective_weight(s.linears(block)[name]) for s in (self.original, self.compressed))
            missing = before - after
            if not missing.any():
                continue
            moment, key = statistics[name].moment, INPUTS[name]
            if key not in roots:
                roots[key] = square_root(moment, f"block {block}'s {name}")
            rank = self.most if self.config.bytes is not None else self.config.rank_of(block, name)
            whole = float(((before @ moment) * before).sum(dtype=torch.float64)) or 1.0
            self.found[block, name] = correction(missing, *roots[key], rank, whole)
            self.errors[block, name] = relative_error(missing, before, moment)

    def factors(self) -> dict[Place, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each projection, those of rank 0 left out."""
        ranks = {place: len(c.gains) for place, c in self.found.items()}
        if self.config.bytes is not None and self.found:
            ranks = share_out(
                {place: c.gains for place, c in self.found.items()},
                {p: c.cost for p, c in self.found.items()},
                self.config.bytes,
            )
        return {place: (c.A[: ranks[place]], c.B[:, : ranks[place]]) for place, c in self.found.items() if ranks[place]}

    def report(self, factors: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]) -> dict:
        """Ranks, bytes, and each projection's relative error before and after on the inputs that it was fitted to."""
        ranks = {place: len(factors[place][0]) if place in factors else 0 for place in self.found}
        after = {p: max(e**2 - sum(self.found[p].gains[: ranks[p]]), 0) ** 0.5 for p, e in self.errors.items()}
        return {
            "bytes": sum(self.found[p].cost * r for p, r in ranks.items()),
            "ranks": {f"blocks.{i}.{n}": r for (i, n), r in ranks.items()},
            "relative_errors": {
                f"blocks.{i}.{n}": [round(e, 6), round(after[i, n], 6)] for (i, n), e in self.errors.items()
            },
        }


@dataclass(frozen=True)
class Correction:
    """B A, most useful direction first.

    Attributes:
        A: (rank, inputs) float32.
        B: (outputs, rank) float32.
        gains: by how much each direction lessens the squared relative error of the output.
        cost: bytes of one direction.
    """

    A: torch.Tensor
    B: torch.Tensor
    gains: list[float]
    cost: int


def square_root(moment: torch.Tensor, where: str = "the projection") -> tuple[torch.Tensor, torch.Tensor]:
    """S (D, k) with S S^T = X^T X, and its pseudo-inverse (k, D), float64.

    Directions whose eigenvalue is below float32's epsilon of the largest are left out: statistics were summed in
    float32, and what is below is rounding, of either sign. (EoRA's code lifts negative ones to the smallest positive
    one, and divides by its root.) The usual D times epsilon would be too much: an attention sink makes the largest
    eigenvalue so large that 1,455 of the 1,536 directions of SmolLM2-135M's last down_proj but one lie below it.

    Raises:
        BadInput: statistics that are not finite, or all zero.
    """
    if not torch.isfinite(moment).all():
        raise BadInput(
            f"the statistics of {where} are not finite: the model or its compression before this block is broken"
        )
    values, vectors = torch.linalg.eigh(moment.double())
    if values[-1] <= 0:
        raise BadInput(
            f"{where} saw no tokens: all its inputs are zero on the calibration text; leave it out with 'linears'"
        )
    kept = values > torch.finfo(torch.float32).eps * values[-1]
    root, vectors = values[kept].sqrt(), vectors[:, kept]
    return vectors * root, (vectors / root).T


def correction(
    missing: torch.Tensor, root: torch.Tensor, inverse: torch.Tensor, rank: int, whole: float = 1.0
) -> Correction:
    """The B A of the given rank with the least norm of (missing - B A) X (EoRA, section 3): the SVD of missing S, and
    back.

    Args:
        missing: (outputs, inputs) W - W_compressed.
        root: S (inputs, k) with S S^T = X^T X; any root gives the same product.
        inverse: its pseudo-inverse (k, inputs).
        rank: at most; the projection's smaller side is enough to restore it.
        whole: squared norm of W X, which gains are relative to.
    """
    m = missing.double() @ root
    # the singular vectors of the shorter side are the eigenvectors of its Gram matrix, in a quarter of an SVD's time;
    # with them orthonormal, u u^T m is a projection of m however small a singular value is
    tall = m.shape[0] > m.shape[1]
    short = torch.linalg.eigh(m.T @ m if tall else m @ m.T).eigenvectors.flip(1)[:, :rank]
    long = m @ short if tall else m.T @ short  # times the singular values
    s = long.norm(dim=0)
    half = torch.where(s > 0, s.rsqrt(), 0)
    u, v = (long * half, short * s.sqrt()) if tall else (short * s.sqrt(), long * half)
    return Correction((v.T @ inverse).float(), u.float(), (s.square() / whole).tolist(), ENTRY * sum(missing.shape))


def share_out(gains: Mapping[Place, list[float]], costs: Mapping[Place, int], budget: int) -> dict[Place, int]:
    """Ranks within a budget of bytes: directions in order of gain per byte; each projection's gains fall.

    >>> share_out({(0, "a"): [9.0, 1.0], (0, "b"): [8.0, 7.0]}, {(0, "a"): 10, (0, "b"): 10}, 30)
    {(0, 'a'): 1, (0, 'b'): 2}

    Raises:
        BadInput: a budget below the cheapest direction.
    """
    if budget < (least := min(costs.values())):
        raise BadInput(f"a budget of {budget} bytes buys no correction: the cheapest takes {least}")
    directions = sorted(((gain / costs[p], p) for p, own in gains.items() for gain in own), key=lambda d: -d[0])
    ranks = dict.fromkeys(gains, 0)
    for _, place in directions:
        if costs[place] <= budget:
            ranks[place], budget = ranks[place] + 1, budget - costs[place]
    return ranks
