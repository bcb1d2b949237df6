"""A configuration's label: its stages in order, such as D2+W1:8+W+Q+E; 'dense' is the uncompressed model."""

import re
from dataclasses import dataclass

from thesislib.compress.stage import FAMILIES, STAGES, Stage
from thesislib.errors import BadInput
from thesislib.imports import members

members("thesislib.compress")  # each stage registers itself
DENSE = "dense"
LETTERS = {"wikitext": "W", "trivia": "T"}  # of training texts
SHORTER = ("depth", "laco", "streamline")  # stages that leave fewer blocks


def stage_class(part: str) -> type[Stage]:
    """The class of the stage whose label is this part.

    Raises:
        BadInput: no stage has such a label.
    """
    for cls in STAGES.values():
        if re.fullmatch(cls.pattern, part, re.ASCII):
            return cls
    raise BadInput(
        f"part '{part}' is not understood: expected a recipe's .yaml file, or parts like D2 or W1:8 joined by '+'"
    )


@dataclass(frozen=True)
class Label:
    """The label of a configuration; `str` gives its text.

    Attributes:
        parts: the labels of the stages, e.g. ("D2", "W1:8", "W"); none for the dense model.
    """

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Label":
        """The label of a text.

        >>> Label.parse("D2+W1:8").parts
        ('D2', 'W1:8')

        Raises:
            BadInput: a part that is no stage's.
        """
        label = cls(() if text == DENSE else tuple(text.split("+")))
        label.classes  # noqa: B018, raises for a part that is no stage's
        return label

    def __str__(self) -> str:
        return "+".join(self.parts) or DENSE

    @property
    def shown(self) -> str:
        """Its text in the book, e.g. D2+LoRA(wiki)+Q for D2+W+Q."""
        stages = [cls.from_label(part) for part, cls in zip(self.parts, self.classes, strict=True)]
        return "+".join(s.shown if s else part for part, s in zip(self.parts, stages, strict=True)) or DENSE

    @property
    def in_words(self) -> str:
        """What each part means, in order."""
        stages = [cls.from_label(part) or cls for part, cls in zip(self.parts, self.classes, strict=True)]
        return ", ".join(s.in_words if isinstance(s, Stage) else s.word for s in stages) or "the model as it came"

    @property
    def classes(self) -> tuple[type[Stage], ...]:
        """The class of each part's stage."""
        return tuple(stage_class(part) for part in self.parts)

    def of_family(self, family: str) -> tuple[str, ...]:
        """The parts of stages of one family, see `thesislib.compress.stage.FAMILIES`."""
        return tuple(part for part, cls in zip(self.parts, self.classes, strict=True) if cls.family == family)

    def of(self, word: str) -> tuple[str, ...]:
        """The parts of one stage, by its word in recipes."""
        return tuple(part for part, cls in zip(self.parts, self.classes, strict=True) if cls.word == word)

    @property
    def family(self) -> str:
        """The family of its stages that comes last in `FAMILIES`; 'pruned' for the dense model."""
        return max((cls.family for cls in self.classes), key=FAMILIES.index, default=FAMILIES[0])

    @property
    def depth(self) -> int:
        """The number of whole blocks that were removed, or merged into others; M~ does not tell it and counts none."""
        return sum(int(m[1]) for word in SHORTER for part in self.of(word) if (m := re.match(r"[DMS](\d+)", part)))

    @property
    def width(self) -> tuple[str, ...]:
        """The patterns of width pruning, e.g. ("1:8",)."""
        return tuple(part[1:] for part in self.of("width"))

    @property
    def pruned(self) -> "Label":
        """The label of its pruning stages alone."""
        return Label(self.of_family("pruned"))

    @property
    def training(self) -> tuple[str, ...]:
        """The texts that it was trained on, in order: W for WikiText, T for TriviaQA. Where a part does not say it, as
        FT3 does not, that is the stage's default."""
        stages = [cls.from_label(part) for part, cls in zip(self.parts, self.classes, strict=True)]
        return tuple(LETTERS[stage.trained_on] for stage in stages if stage and stage.trained_on)

    @property
    def bits(self) -> int | None:
        """The bits of quantised weights; None if they are not quantised."""
        quantised = self.of_family("quantised")
        return int(re.sub(r"\D", "", quantised[-1]) or 4) if quantised else None

    @property
    def corrected(self) -> bool:
        """Whether a stage added low-rank corrections without training."""
        return bool(self.of_family("compensated"))

    def before(self) -> "Label":
        """The label without its last stage.

        Raises:
            BadInput: the dense model has no stage.
        """
        if not self.parts:
            raise BadInput(f"'{DENSE}' is the model as it was: there is none before it")
        return Label(self.parts[:-1])
