"""LLM-Streamline (Chen et al. 2024, arXiv 2403.19135): a run of blocks becomes one block, trained to do their work."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from thesislib.compress.depth import angular_distances
from thesislib.compress.lora.sequences import Sequences
from thesislib.compress.outline import Outline, Outlined, SizeUnknown, Zeros
from thesislib.compress.selection import whole_number
from thesislib.compress.stage import Shape, Stage, stage
from thesislib.compress.trainable import (
    check_not_quantised,
    check_trainable,
    residual,
    to_bfloat16,
    with_weights,
    with_windows,
)
from thesislib.compress.training import Loss, Trained
from thesislib.config import positive
from thesislib.errors import BadInput, unknown
from thesislib.model.blocks import ATTRIBUTES, remove
from thesislib.model.layers import Adapted, base_of, replace
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_windows

LOSSES = ("hidden", "tokens")


@stage("streamline")
@dataclass(frozen=True)
class Streamline(Trained):
    """Replace a run of `remove` + 1 blocks by one, which begins as the run's first and is trained with all its weights.

    The run is the one whose input and output differ least in angle, of the last token over calibration windows, see
    `thesislib.compress.depth.angular_distances`; the paper takes the mean cosine of all tokens. Weights that pruning
    has set to zero are trained like others: prune after this stage, not before.

    The defaults of `learning_rate` and `weight_decay` are the paper's. Its rate falls to 5e-5, here it falls to 0.

    Attributes:
        remove: how many blocks fewer there are afterwards.
        first: the run's first block; None for the run of the least distance.
        loss: hidden: the squared error of the residual stream after the run, mean over its numbers; the teacher is the
            subject itself. It is the stream that enters the next block or the final norm: the public code takes the
            final norm's output where a run is the last. Large entries, such as those of an attention sink, weigh most.
            tokens: the next token's nats, through the blocks after the run.
        calibration: the text that shows which run it is, see `thesislib.sources.corpus.calibration_windows`.
        windows: of that text, with `length` tokens each.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
    """

    remove: int
    first: int | None = None
    loss: str = "hidden"
    calibration: str = "wikipedia"
    windows: int = 32
    learning_rate: float = field(default=2e-4, kw_only=True)
    weight_decay: float = field(default=1e-3, kw_only=True)

    family: ClassVar[str] = "trained"
    pattern: ClassVar[str] = r"S(\d+)"
    title: ClassVar[str] = "streamline"

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise unknown("loss of streamline", self.loss, LOSSES)
        if self.remove < 1:
            raise BadInput(f"remove is {self.remove}: a run of one block stays as it is, expected at least 1")
        if self.first is not None and self.first < 0:
            raise BadInput(f"first is {self.first}: expected the index of a block, from 0 on")
        positive(windows=self.windows)

    @property
    def label(self) -> str:
        """S4 for 4 blocks fewer."""
        return f"S{self.remove}"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        return f"{self.remove + 1} blocks replaced by one that was trained in their place"

    @classmethod
    def from_label(cls, part: str) -> "Streamline | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return cls(remove=whole_number(match[1])) if match else None

    def check(self, depth: int) -> None:
        """Raises BadInput if a model of `depth` blocks does not have the run."""
        last = depth - 1 - self.remove  # where a run may begin
        if last < 0:
            raise BadInput(f"cannot replace {self.remove + 1} blocks by one: the model has {depth}")
        if self.first is not None and self.first > last:
            raise BadInput(
                f"a run of {self.remove + 1} blocks from block {self.first} on ends after the last, block "
                f"{depth - 1}: expected a first block of at most {last}"
            )

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: fewer blocks."""
        check_not_quantised(self, previous)
        if shape is None:
            return None
        self.check(shape.depth)
        return Shape(shape.depth - self.remove, shape.inputs)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        parts, subject = set(ATTRIBUTES), outline.subject
        if outline.budgeted or outline.lost:
            raise SizeUnknown
        bases: list[Any] = [base_of(m) for b in range(subject.depth) for m in subject.linears(b).values()]
        if self.first is None and (
            # only the run knows which block it trains, and with it loses zeros or finds a correction
            any(base.zeros != Zeros() for base in bases)
            or any(isinstance(m, Adapted) for m in subject.model.modules())
            or len({outline.size_key(b, parts) for b in range(subject.depth)}) > 1
        ):
            raise SizeUnknown
        first = self.first or 0
        check_trainable(self, subject, [first])
        outline.subject = remove(subject, range(first + 1, first + 1 + self.remove))
        for name, module in outline.subject.linears(first).items():
            replace(outline.subject.blocks[first], name, Outlined(module, outline.dtype, Zeros()))
        outline.changed = set()

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The subject with one block in the place of the run, and a report of the run, the distances and the training.

        It shares the remaining weights with `subject`. With `work` there are checkpoints, see
        `thesislib.compress.lora.stage.Lora.apply`. Training is in float32; the block is then rounded to the subject's
        dtype.

        Raises:
            BadInput: a run that the model does not have; packed, quantised or corrected weights in its first block, or
                a block that the plan repeats; text that cannot be used; a loss that is not finite; a full disk.
        """
        self.check(subject.depth)
        first, scores = self.first, {}
        if first is None:
            ids = calibration_windows(subject.tokenizer, self.calibration, data, self.windows, self.length, self.seed)
            distances = angular_distances(subject, ids)[self.remove + 1]
            scores = {b: float(distances[b]) for b in range(subject.depth - self.remove)}
            first = min(scores, key=lambda b: scores[b])
        check_trainable(self, subject, [first])
        removed = list(range(first + 1, first + 1 + self.remove))
        smaller = remove(subject, removed)
        student = smaller.copy()
        best, trained = self.train(
            subject,
            student,
            dict(student.blocks[first].named_parameters()),
            data,
            work,
            lambda autocast: hidden_loss(subject, first, self.remove, autocast) if self.loss == "hidden" else None,
            run=first,
        )
        report = {"first": first, "removed": removed, "loss": self.loss, "scores": scores, **trained}
        return with_weights(smaller, {first: best}), report


def hidden_loss(subject: Subject, first: int, removed: int, autocast: bool) -> Loss:
    """The squared error of block `first` of a student against this subject's blocks `first` to `first + removed`.

    Both get the student's residual stream, whose earlier blocks are this subject's. Tokens of padding do not count.
    """
    whole = subject.copy()
    whole.model.float()
    if autocast:
        to_bfloat16(whole.blocks)
    teacher = list(with_windows(whole))[first : first + removed + 1]

    def loss(student: Subject, some: Sequences) -> tuple[torch.Tensor, int]:
        with torch.no_grad():
            x, onward = residual(student, some, first)
            target = onward(x, teacher)
        y = onward(x, list(with_windows(student))[first : first + 1])
        difference = (y - target).float()
        if some.segments is not None:
            difference = difference[some.segments.to(y.device) >= 0]
        return difference.square().sum(), difference.numel()

    return loss
