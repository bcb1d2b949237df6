"""The base of all compression stages.

A stage is a frozen dataclass of settings. It is derived from `Stage`, registered under its word in recipes by `@stage`,
and has a file of its own in this folder.
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

FAMILIES = ("pruned", "factorised", "trained", "quantised", "compensated")
STAGES: dict[str, type["Stage"]] = {}  # by word; `thesislib.pipeline.recipe` imports them all
StageClass = TypeVar("StageClass", bound="type[Stage]")


@dataclass(frozen=True)
class Shape:
    """The sizes of a subject that its config.json tells.

    Attributes:
        depth: the number of blocks.
        inputs: the length of each projection's rows by the projection's name.
    """

    depth: int
    inputs: Mapping[str, int]


@dataclass(frozen=True)
class Stage:
    """One compression step.

    Attributes:
        word: its name in recipes.
        family: its effect on a model, one of `FAMILIES`.
        pattern: a regular expression that all of its labels match, and no other stage's.
        correctable: whether EoRA may follow: it changes weights and keeps their shapes.
        needs_original: whether `apply` also takes `original`, the subject before the previous stage.
        factorises: whether it leaves linears as pairs of low rank.
        amplifies: whether rounding errors grow over its steps, so that sums in another order end at other weights.
        later: settings that came after the first records. At its default such a setting is left out of entries, so that
            these records keep their identity.
    """

    word: ClassVar[str] = ""
    family: ClassVar[str] = ""
    pattern: ClassVar[str] = ""
    correctable: ClassVar[bool] = False
    needs_original: ClassVar[bool] = False
    factorises: ClassVar[bool] = False
    amplifies: ClassVar[bool] = False
    later: ClassVar[tuple[str, ...]] = ()

    @property
    def streams(self) -> bool:
        """Whether `stream_weights` does the stage's work on blocks that are in memory one at a time."""
        return False

    @property
    def trained_on(self) -> str | None:
        """The name of the text that it trains on; None if it does not train."""
        return None

    @property
    def leaves_corrections(self) -> bool:
        """Whether low-rank corrections are beside the weights after it."""
        return self.family == "compensated"

    @property
    def rounds_pairs(self) -> bool:
        """Whether it leaves factors of pairs quantised."""
        return False

    def makes_pair(self, block: int, name: str, depth: int | None) -> bool:
        """Whether it is sure before the run that a projection becomes a pair of low rank.

        Args:
            block: its number.
            name: its name.
            depth: blocks of the subject, None if they are not known.
        """
        return False

    @property
    def label(self) -> str:
        """Its part of a configuration's label, as in the thesis."""
        raise NotImplementedError

    @property
    def shown(self) -> str:
        """Its part of a label where it is read by people: as recorded, unless that has a second meaning."""
        return self.label

    @property
    def in_words(self) -> str:
        """What its label means, in a few words."""
        return self.word

    @classmethod
    def from_label(cls, part: str) -> "Stage | None":
        """The stage of a part of a label, with other settings at their defaults.

        None if the part is another stage's, or does not give all settings that have no default.
        """
        return None

    def after(self, previous: Sequence["Stage"], shape: Shape | None = None) -> Shape | None:
        """The subject's shape after this stage; None if the shape before it is not known.

        Args:
            previous: the stages before it.
            shape: before it.

        Raises:
            BadInput: it cannot follow these stages, or does not fit the shape.
        """
        if shape is not None:
            check_all_fit(getattr(self, "linears", ()), shape.depth)
        return shape

    def outline(self, outline: Outline) -> None:
        """Change an outline as `apply` changes a subject. The default cannot tell the sizes.

        Raises:
            SizeUnknown: the sizes after the stage depend on its run.
            BadInput: the stage refuses these shapes.
        """
        raise SizeUnknown

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The compressed subject, and a report as JSON data.

        Args:
            subject: it is not changed.
            data: a data spec for calibration or training.
            work: a folder in which a long stage keeps checkpoints.
        """
        raise NotImplementedError

    def _normalise(self, **values: Any) -> None:
        """Set fields of the frozen dataclass, for `__post_init__` only."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class Calibrated(Stage):
    """A stage that runs the model on calibration text.

    Attributes:
        text: the calibration text's name, see `thesislib.sources.corpus.calibration_windows`.
        windows: the number of windows.
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
    """A calibrated stage that can weight tokens.

    Attributes:
        weighting: of the calibration's tokens, see `thesislib.compress.calibration.token_weights`.
    """

    weighting: str = "equal"

    def __post_init__(self):
        super().__post_init__()
        check_weighting(self.weighting, self.length)


def stage(word: str) -> Callable[[StageClass], StageClass]:
    """The decorator that registers a stage under its word in recipes.

    Raises:
        ValueError: a word that is taken, an unknown family, or a pattern that is no regular expression.
    """

    def register(cls: StageClass) -> StageClass:
        if STAGES.get(word, cls).__qualname__ != cls.__qualname__:
            raise ValueError(
                f"stage '{word}' is {STAGES[word].__module__}'s already: expected another word for {cls.__module__}'s"
            )
        if cls.family not in FAMILIES or not cls.pattern:
            raise ValueError(
                f"stage '{word}' has family '{cls.family}' and pattern '{cls.pattern}': expected one of "
                f"{', '.join(FAMILIES)}, and a pattern of its labels"
            )
        re.compile(cls.pattern)
        cls.word, STAGES[word] = word, cls
        return cls

    return register


def as_entry(stage: Stage) -> dict[str, dict]:
    """A stage as its entry in a recipe or a record: {word: settings}, with every default but those of `later`."""
    values, fields = dataclasses.asdict(stage), fields_of(type(stage))
    return {stage.word: {n: values[n] for n, f in fields.items() if n not in stage.later or values[n] != f.default}}
