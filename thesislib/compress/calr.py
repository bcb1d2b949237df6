"""CALR (arXiv 2508.16680): a linear path of low rank beside MLPs that became pairs, trained or in closed form.

The paper has no public code. Let F be the MLP that was, F_pairs what became of it, and R = F(X) - F_pairs(X) on its
inputs X. The path A, B should minimise E|R - (X A) B|^2. The paper trains it, B = 0 at first, with the pairs, by the
next-token loss. The best path has a closed form: of the least-squares map M = (R X^T) (X X^T)^-1 it is the part of rank
r in the metric of X, which is that of the top eigenvectors of M H M^T.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from thesislib.compress.factor import best, whitening
from thesislib.compress.lora.sequences import Sequences
from thesislib.compress.outline import Outline, OutlinedPair, empty
from thesislib.compress.selection import whole_number
from thesislib.compress.stage import Shape, Stage, stage
from thesislib.compress.trainable import residual, to_bfloat16, with_windows
from thesislib.compress.training import Loss, Trained
from thesislib.config import positive
from thesislib.errors import BadInput, unknown
from thesislib.model.beside import FACTORS, ranks_beside, with_paths
from thesislib.model.beside import Path as Beside
from thesislib.model.blocks import apply_plan
from thesislib.model.forward import attention_windows, window_mask
from thesislib.model.layers import Projection, base_of, replace, unpack_all
from thesislib.model.lowrank import DENSE, LowRank, is_lowrank
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_windows

FITS = ("tokens", "hidden", "closed", "none")
MLP = ("gate_proj", "up_proj", "down_proj")


@stage("calr")
@dataclass(frozen=True)
class Calr(Trained):
    """Put a linear path beside every MLP that the lowrank stage before made pairs of, and fit it.

    Attributes:
        rank: of each path; 0 for none, so that the pairs alone are trained: the control that the paper lacks.
        fit: tokens: path and pairs are trained by the next token's nats. hidden: by the squared error of each MLP's
            output against that of the MLP that was, on the same input, relative to its size. closed: the least-squares
            path, block after block, on the inputs in the model so far; the pairs stay. none: the path does nothing.
        pairs: whether training changes the pairs too, as in the paper.
        calibration: the text of the closed form, see `thesislib.sources.corpus.calibration_windows`.
        windows: of that text, with `length` tokens each.
    """

    rank: int = 32
    fit: str = "tokens"
    pairs: bool = True
    calibration: str = "c4"
    windows: int = 32
    learning_rate: float = field(default=1e-3, kw_only=True)

    family: ClassVar[str] = "trained"
    pattern: ClassVar[str] = r"CALR(\d+)(?:-(hidden|closed|none))?"
    title: ClassVar[str] = "CALR"
    needs_original: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.fit not in FITS:
            raise unknown("fit of calr", self.fit, FITS)
        if self.rank < 0 or (self.rank == 0 and (self.fit not in ("tokens", "hidden") or not self.pairs)):
            raise BadInput(
                f"rank {self.rank} with fit {self.fit} and pairs {self.pairs}: expected a rank of at least 1, or 0 to "
                "train the pairs alone"
            )
        positive(windows=self.windows)

    @property
    def label(self) -> str:
        """CALR32 for trained paths of rank 32; CALR32-closed for the closed form."""
        return f"CALR{self.rank}" + ("" if self.fit == "tokens" else f"-{self.fit}")

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        if self.rank == 0:
            return "the pairs of MLPs trained"
        how = {"tokens": "trained on text", "hidden": "trained on the MLPs' outputs", "closed": "in closed form"}
        return f"linear paths of rank {self.rank} beside MLPs, {how.get(self.fit, 'that do nothing')}"

    @classmethod
    def from_label(cls, part: str) -> "Calr | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return cls(rank=whole_number(match[1]), fit=match[2] or "tokens") if match else None

    @property
    def trained_on(self) -> str | None:
        """See `Stage`."""
        return self.text if self.fit in ("tokens", "hidden") else None

    @property
    def trains_pairs(self) -> bool:
        """Whether it changes the pairs."""
        return self.pairs and self.trained_on is not None

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: right after the stage that made the pairs, since the MLPs before that are the target."""
        if not previous or not previous[-1].factorises:
            before = f"after {previous[-1].label}" if previous else "at the beginning"
            raise BadInput(f"calr {before} has no pairs to correct: expected lowrank, of MLPs, right before it")
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        subject = outline.subject
        width, dtype = subject.model.config.hidden_size, outline.dtype
        blocks = [
            b
            for b in range(subject.depth)
            if all(isinstance(subject.linears(b).get(name), OutlinedPair) for name in MLP)
        ]
        _check_blocks(blocks)
        _check_rank(self.rank, width)
        for b in blocks if self.trains_pairs else ():
            for name in MLP:
                _check_trainable(b, name, subject.linears(b)[name])
        if self.rank:
            made = {b: empty({"A": ((self.rank, width), dtype), "B": ((width, self.rank), dtype)}) for b in blocks}
            outline.subject = with_paths(subject, {b: (path["A"], path["B"]) for b, path in made.items()})
        outline.changed = set()

    def apply(
        self, subject: Subject, *, data: str = "embedded", work: Path | None = None, original: Subject | None = None
    ) -> tuple[Subject, dict]:
        """The subject with paths beside the MLPs that are pairs, and a report: blocks, errors before and after, and the
        training.

        Args:
            subject: after lowrank.
            data: a data spec.
            work: a folder for checkpoints.
            original: the subject before lowrank.

        Raises:
            BadInput: no original, or one of another depth; no MLP of pairs, or one that the plan repeats; paths already
                there; quantised factors, if they are to be trained; a rank above the model's width; a loss that is not
                finite.
        """
        if original is None or original.depth != subject.depth:
            raise BadInput("calr needs the subject before lowrank at hand: apply(..., original=...), of as many blocks")
        blocks = [b for b in range(subject.depth) if all(_is_pair(subject, b, name) for name in MLP)]
        _check_blocks(blocks)
        _check_rank(self.rank, subject.model.config.hidden_size)
        _check_once(subject, blocks)
        if present := ranks_beside(subject):
            raise BadInput(f"block {min(present)} has a path already: expected calr once")
        if self.trained_on is None:
            ids = calibration_windows(subject.tokenizer, self.calibration, data, self.windows, self.length, self.seed)
            result, errors = with_closed_form(subject, original, blocks, self.rank if self.fit == "closed" else 0, ids)
            if self.fit == "none":
                result = with_paths(subject, {b: start(self, subject, b) for b in blocks})
            return result, {"blocks": blocks, "relative_errors": errors}
        return self._trained(subject, original, blocks, data, work)

    def _trained(
        self, subject: Subject, original: Subject, blocks: list[int], data: str, work: Path | None
    ) -> tuple[Subject, dict]:
        """Paths and pairs after training."""
        shared = apply_plan(subject, range(subject.depth))
        if self.rank:
            shared = with_paths(shared, {b: start(self, subject, b) for b in blocks})
        student = shared.copy(unpack=False)
        parameters: dict[str, nn.Parameter] = {}
        for b in blocks:
            mlp: Any = student.blocks[b].mlp
            if self.rank:
                parameters |= {f"{b}.{name}": mlp.get_parameter(name) for name in FACTORS}
            for name in MLP if self.pairs else ():
                pair: Any = student.linears(b)[name]
                _check_trainable(b, name, pair)
                trainable = TrainedPair(pair)
                replace(student.blocks[b], name, trainable)
                parameters |= {f"{b}.{name}.A": trainable.A, f"{b}.{name}.B": trainable.B}
        unpack_all(student.model)
        best_found, report = self.train(
            subject,
            student,
            parameters,
            data,
            work,
            lambda autocast: outputs_loss(original, blocks, autocast) if self.fit == "hidden" else None,
            original=original.fingerprint,
        )
        dtype = subject.dtype
        result = shared.copy(unpack=False)
        for b in blocks:
            corrected: Any = result.blocks[b].mlp
            for name in FACTORS if self.rank else ():
                corrected.get_parameter(name).data = best_found[f"{b}.{name}"].to(dtype)
            for name in MLP if self.pairs else ():
                A, B = (best_found[f"{b}.{name}.{f}"].to(dtype) for f in "AB")
                replace(result.blocks[b], name, LowRank(A, B, result.linears(b)[name].bias))
        return result, {"blocks": blocks, **report}


def _is_pair(subject: Subject, block: int, name: str) -> bool:
    module = subject.linears(block).get(name)
    return module is not None and is_lowrank(module)


def _check_blocks(blocks: Sequence[int]) -> None:
    if not blocks:
        raise BadInput("calr corrects MLPs whose gate_proj, up_proj and down_proj are pairs, and none is: expected "
                       "lowrank with linears [gate_proj, up_proj, down_proj] before it")  # fmt: skip


def _check_once(subject: Subject, blocks: Sequence[int]) -> None:
    first: dict[int, int] = {}
    for b in blocks:
        if (same := first.setdefault(id(subject.linears(b)[MLP[0]]), b)) != b:
            raise BadInput(
                f"calr corrects block {same}, whose pairs block {b} has too, since the plan repeats it: expected a "
                "block that runs once"
            )


def _check_trainable(block: int, name: str, pair: Projection) -> None:
    base: Any = base_of(pair)
    if base is not pair or base.encodings != (DENSE, DENSE):
        what = "has a correction" if base is not pair else f"is {base.encoding}"
        raise BadInput(
            f"blocks.{block}.{name} {what}: calr trains dense factors without correction; expected bits 16 before it, "
            "or pairs: false"
        )


def _check_rank(rank: int, width: int) -> None:
    if rank > width:
        raise BadInput(f"rank {rank} of a path: the model has {width} features, expected at most as many")


def start(config: Calr, subject: Subject, block: int) -> Beside:
    """A path that does nothing yet: A as in LoRA, uniform within 1 / sqrt(D), B zero; in the subject's dtype."""
    width, dtype = subject.model.config.hidden_size, subject.dtype
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + block)
    A = (2 * torch.rand(config.rank, width, generator=generator) - 1) / width**0.5
    return A.to(dtype).to(subject.device), torch.zeros(width, config.rank, dtype=dtype, device=subject.device)


class TrainedPair(nn.Module):
    """A pair whose factors are parameters, with the singular values shared out between both (A = S^1/2 V^T, B = U
    S^1/2), so that one learning rate suits both."""

    def __init__(self, pair: LowRank):
        super().__init__()
        A, B = pair.factor("A").detach().float(), pair.factor("B").detach().float()
        a, b = A.norm(dim=1).clamp(min=1e-12), B.norm(dim=0).clamp(min=1e-12)
        share = (b / a).sqrt()
        self.A, self.B = nn.Parameter(A * share[:, None]), nn.Parameter(B / share)
        self.bias = pair.bias
        self.in_features, self.out_features = pair.in_features, pair.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(x, self.A), self.B, self.bias)


def outputs_loss(original: Subject, blocks: Sequence[int], autocast: bool) -> Loss:
    """The squared error of each MLP's output against that of the original MLP on the same input, relative to the
    latter's squared size; the sum over blocks and their number. Inputs are the student's, without gradient."""
    teachers = original.copy()
    teachers.model.float()
    if autocast:
        to_bfloat16(teachers.blocks)
    before: dict[int, Any] = {b: teachers.blocks[b].mlp for b in blocks}

    def loss(student: Subject, some: Sequences) -> tuple[torch.Tensor, int]:
        seen: dict[int, torch.Tensor] = {}
        mlps: dict[int, Any] = {b: student.blocks[b].mlp for b in blocks}

        def note(b: int):
            return lambda _module, args: seen.__setitem__(b, args[0].detach())

        hooks = [mlps[b].register_forward_pre_hook(note(b)) for b in blocks]
        try:
            with torch.no_grad():
                x, onward = residual(student, some, 0)
                onward(x, list(with_windows(student))[: max(blocks) + 1])
        finally:
            for hook in hooks:
                hook.remove()
        total = torch.zeros((), device=student.device)
        for b in blocks:
            with torch.no_grad():
                target = before[b](seen[b]).float()
            error = (mlps[b](seen[b]).float() - target).square()
            target = target.square()
            if some.segments is not None:
                counted = some.segments.to(error.device) >= 0
                error, target = error[counted], target[counted]
            total = total + error.sum() / target.sum()
        return total, len(blocks)

    return loss


@torch.no_grad()
def with_closed_form(
    subject: Subject, original: Subject, blocks: Sequence[int], rank: int, ids: torch.Tensor, batch: int = 4
) -> tuple[Subject, dict[str, list[float]]]:
    """The subject with the best linear path beside each MLP, fitted block after block on the inputs so far.

    Args:
        subject: after compression of some MLPs.
        original: before it, of as many blocks.
        blocks: whose MLPs get a path.
        rank: of the paths; 0 for none, to know the errors.
        ids: (N, T) calibration windows.
        batch: windows at a time.

    Returns:
        The subject, and {block: [relative error of the MLP's output before, after]} on these inputs.

    Raises:
        BadInput: activations that are not finite or all zero.
    """
    result = apply_plan(subject, range(subject.depth))
    decoder: Any = result.model.model
    positions = torch.arange(ids.shape[1], device=result.device)[None]
    windows = attention_windows(result.model.config)
    starts = range(0, len(ids), batch)
    x = torch.cat([decoder.embed_tokens(ids[i : i + batch].to(result.device)) for i in starts])
    rotary = decoder.rotary_emb(x[:1], position_ids=positions)
    errors: dict[str, list[float]] = {}
    for b in tqdm(range(result.depth), desc="calr", unit="block", disable=None, leave=False):
        mask = window_mask(windows[b], positions)

        def run(block: nn.Module, mask: torch.Tensor | None = mask):
            for i in starts:
                yield i, block(x[i : i + batch], attention_mask=mask, position_embeddings=rotary)

        if b in blocks:
            mlp: Any = result.blocks[b].mlp
            sums = Residual(mlp, original.blocks[b].mlp)
            hook = mlp.register_forward_pre_hook(lambda _m, args, sums=sums: sums.add(args[0]))
            try:
                for _ in run(result.blocks[b]):
                    pass
            finally:
                hook.remove()
            before, after = sums.error(None), None
            if rank:
                A, B = sums.path(rank, f"block {b}'s MLP")
                after = sums.error((A, B))
                path = (A.to(subject.dtype), B.to(subject.dtype))
                result = with_paths(result, {b: path})
            errors[str(b)] = [round(e, 6) for e in (before, after) if e is not None]
        for i, y in run(result.blocks[b]):
            x[i : i + batch] = y
    return Subject(result.model, result.tokenizer, result.name, subject.plan), errors


class Residual:
    """Sums over the inputs x of an MLP, float64: H = sum x x^T, C = sum r x^T with r = F(x) - F_pairs(x), and the
    squared sizes of r and of F(x)."""

    def __init__(self, mlp: Any, original: Any):
        self.mlp, self.original, self.busy = mlp, original, False
        self.moment: Any = 0.0
        self.cross: Any = 0.0
        self.left = self.whole = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs (B, T, D). Called by the MLP's own hook, so the MLP's run in here is not another one."""
        if self.busy:
            return
        self.busy = True
        target = self.original(x).double().flatten(0, -2)
        r = target - self.mlp(x).double().flatten(0, -2)
        self.busy = False
        x = x.double().flatten(0, -2)
        self.moment, self.cross = self.moment + x.T @ x, self.cross + r.T @ x
        self.left += float(r.square().sum())
        self.whole += float(target.square().sum())

    def path(self, rank: int, where: str) -> Beside:
        """A (rank, D) and B (D, rank), float32: the best path of this rank."""
        metric = whitening(self.moment, where)
        scale = self.moment.diagonal().mean()
        M = (self.cross / scale) @ metric.inverse.T @ metric.inverse
        pair = best(M, rank, metric)
        return pair.A, pair.B

    def error(self, path: Beside | None) -> float:
        """The relative error ``|r - B A x| / |F(x)|``."""
        left = self.left
        if path is not None:
            P = path[1].double() @ path[0].double()
            left += float((P * (P @ self.moment)).sum() - 2 * (P * self.cross).sum())
        return (max(left, 0.0) / self.whole) ** 0.5 if self.whole else 0.0
