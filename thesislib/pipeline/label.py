"""A configuration's label: the stages that made it in order, as D2+W1:8+W+Q+E; the model as it was is 'dense'."""

import re
from dataclasses import dataclass

from thesislib.compress.stage import FAMILIES, STAGES, Stage
from thesislib.errors import BadInput
from thesislib.imports import members

members("thesislib.compress")  # each stage registers itself
DENSE = "dense"


def stage_class(part: str) -> type[Stage]:
    """The stage that writes this part of a label.

    Raises:
        BadInput: no stage does.
    """
    for kind in STAGES.values():
        if re.fullmatch(kind.pattern, part, re.ASCII):
            return kind
    raise BadInput(
        f"part '{part}' is not understood: expected a recipe's .yaml file, or parts like D2 or W1:8 joined by '+'"
    )


@dataclass(frozen=True)
class Label:
    """What was done to a model, stage by stage; `str` is the only writer.

    Attributes:
        parts: the labels of the stages, e.g. ("D2", "W1:8", "W"); none for the dense model.
    """

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Label":
        """The label that a text writes.

        >>> Label.parse("D2+W1:8").parts
        ('D2', 'W1:8')

        Raises:
            BadInput: a part that no stage writes.
        """
        label = cls(() if text == DENSE else tuple(text.split("+")))
        label.kinds  # noqa: B018, refuses what is no part
        return label

    def __str__(self) -> str:
        return "+".join(self.parts) or DENSE

    @property
    def kinds(self) -> tuple[type[Stage], ...]:
        """The stage of each part."""
        return tuple(stage_class(part) for part in self.parts)

    def of_family(self, family: str) -> tuple[str, ...]:
        """The parts of stages of one family, see `thesislib.compress.stage.FAMILIES`."""
        return tuple(part for part, kind in zip(self.parts, self.kinds, strict=True) if kind.family == family)

    def of(self, word: str) -> tuple[str, ...]:
        """The parts of one stage, by the word that recipes call it."""
        return tuple(part for part, kind in zip(self.parts, self.kinds, strict=True) if kind.word == word)

    @property
    def family(self) -> str:
        """The last of the families, pruned to compensated, that some stage belongs to; the dense model counts as pruned
        by nothing."""
        return max((kind.family for kind in self.kinds), key=FAMILIES.index, default=FAMILIES[0])

    @property
    def depth(self) -> int:
        """How many whole blocks were removed."""
        return sum(int(part[1:]) for part in self.of("depth") if part[1:].isdigit())

    @property
    def width(self) -> tuple[str, ...]:
        """The patterns of width pruning, e.g. ("1:8",)."""
        return tuple(part[1:] for part in self.of("width"))

    @property
    def pruned(self) -> "Label":
        """The pruning alone."""
        return Label(self.of_family("pruned"))

    @property
    def training(self) -> tuple[str, ...]:
        """What it was trained on, in order: W for WikiText, T for TriviaQA."""
        return tuple(part[0] for part in self.of_family("trained"))

    @property
    def bits(self) -> int | None:
        """Of quantised weights; None if they are not quantised."""
        quantised = self.of_family("quantised")
        return int(re.sub(r"\D", "", quantised[-1]) or 4) if quantised else None

    @property
    def corrected(self) -> bool:
        """Whether low-rank corrections that were not trained make up for a loss."""
        return bool(self.of_family("compensated"))

    def before(self) -> "Label":
        """The label without its last stage.

        Raises:
            BadInput: the dense model has none.
        """
        if not self.parts:
            raise BadInput(f"'{DENSE}' is the model as it was: there is none before it")
        return Label(self.parts[:-1])
