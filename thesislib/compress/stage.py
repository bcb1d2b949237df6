"""What a compression stage is: settings under the word that a recipe calls it by, which make a smaller or better
subject of a subject.

A stage of one's own is one file in this folder: a frozen dataclass derived from `Stage` and registered by `@stage`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from thesislib.compress.calibration import check_weighting
from thesislib.compress.outline import Outline, SizeUnknown
from thesislib.compress.selection import check_all_fit
from thesislib.config import fields_of
from thesislib.errors import BadInput
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_windows

FAMILIES = ("pruned", "trained", "quantised", "compensated")
STAGES: dict[str, type["Stage"]] = {}  # by the word; see `thesislib.pipeline.recipe`, which imports them all
Kind = TypeVar("Kind", bound="type[Stage]")


@dataclass(frozen=True)
class Shape:
    """What a subject's config.json says about sizes.

    Attributes:
        depth: its blocks.
        inputs: the length of each projection's rows, by the projection's name.
    """

    depth: int
    inputs: Mapping[str, int]


@dataclass(frozen=True)
class Stage:
    """One compression step.

    Attributes:
        word: what recipes call it.
        family: what it does to a model, one of `FAMILIES`.
        pattern: a regular expression that all of its labels match, and no other stage's.
        correctable: whether it changes weights and keeps their shapes, so that EoRA may follow.
        needs_original: whether `apply` also takes `original`, the subject that the stage right before it was given.
        amplifies: whether it follows its own rounding for many steps, so that sums in another order end at other
            weights.
    """

    word: ClassVar[str] = ""
    family: ClassVar[str] = ""
    pattern: ClassVar[str] = ""
    correctable: ClassVar[bool] = False
    needs_original: ClassVar[bool] = False
    amplifies: ClassVar[bool] = False

    @property
    def streams(self) -> bool:
        """Whether `stream_weights` does the same on blocks that are in memory one at a time."""
        return False

    @property
    def label(self) -> str:
        """Its part of a configuration's label, as the thesis writes it."""
        raise NotImplementedError

    @classmethod
    def from_label(cls, part: str) -> "Stage | None":
        """The settings that a part of a label fixes, all others at their defaults; None for a label that fixes too
        little, or another stage's."""
        return None

    def after(self, previous: Sequence["Stage"], shape: Shape | None = None) -> Shape | None:
        """The shape that this stage leaves of the one that it meets; None if none is known.

        Raises:
            BadInput: it cannot follow the stages before it, or does not fit the shape.
        """
        if shape is not None:
            check_all_fit(getattr(self, "linears", ()), shape.depth)
        return shape

    def outline(self, outline: Outline) -> None:
        """Do to the shapes of a subject what the stage does to the subject.

        Raises:
            SizeUnknown: sizes depend on what the stage finds; so they do if a stage does not say.
            BadInput: the stage would refuse these shapes.
        """
        raise SizeUnknown

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """A new subject and a report that JSON can hold.

        Args:
            subject: as it was before; it stays as it is.
            data: a data spec for calibration or training.
            work: a folder for checkpoints of long work.
        """
        raise NotImplementedError

    def _normalise(self, **values: Any) -> None:
        """Settings in the form that the rest reads: only while the stage is made, since it is frozen."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Calibrated(Stage):
    """A stage that looks at the model's inputs on some text.

    Attributes:
        text: which calibration text, see `thesislib.sources.corpus.calibration_windows`.
        windows: how many windows of it.
        length: tokens of a window.
        seed: of the choice of windows.
    """

    text: str = "c4"
    windows: int = 32
    length: int = 512
    seed: int = 0

    def __post_init__(self):
        if min(self.windows, self.length - 1) < 1:
            raise BadInput(f"{self.word} needs at least 1 calibration window of at least 2 tokens")

    def ids(self, tokenizer: PreTrainedTokenizerBase, data: str) -> torch.Tensor:
        """(windows, length) tokens of the calibration text."""
        return calibration_windows(tokenizer, self.text, data, self.windows, self.length, self.seed)


@dataclass(frozen=True, kw_only=True)
class Weighted(Calibrated):
    """A calibrated stage whose tokens need not count equally.

    Attributes:
        weighting: how they count, see `thesislib.compress.calibration.token_weights`.
    """

    weighting: str = "equal"

    def __post_init__(self):
        super().__post_init__()
        check_weighting(self.weighting, self.length)


def stage(word: str) -> Callable[[Kind], Kind]:
    """Register a class of stages under the word that recipes call it by.

    Raises:
        ValueError: a word that is taken, a family that there is not, or a pattern that is no regular expression.
    """

    def register(kind: Kind) -> Kind:
        if STAGES.get(word, kind).__qualname__ != kind.__qualname__:
            raise ValueError(
                f"stage '{word}' is {STAGES[word].__module__}'s already: expected another word for {kind.__module__}'s"
            )
        if kind.family not in FAMILIES or not kind.pattern:
            raise ValueError(
                f"stage '{word}' has family '{kind.family}' and pattern '{kind.pattern}': expected one of "
                f"{', '.join(FAMILIES)}, and a pattern of its labels"
            )
        re.compile(kind.pattern)
        kind.word, STAGES[word] = word, kind
        return kind

    return register


def plain(stage: Stage) -> dict[str, dict]:
    """A stage as a recipe or a record holds it: {word: settings}, every default filled in."""
    values = dataclasses.asdict(stage)
    return {stage.word: {name: values[name] for name in fields_of(type(stage))}}
