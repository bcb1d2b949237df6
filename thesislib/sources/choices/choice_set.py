"""A data set of multiple-choice questions: where its rows lie, and how they are worded as contexts and endings."""

import random
from typing import ClassVar

from thesislib.errors import BadInput, unknown
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import Row, Source, rows

PARTS = ("rank", "choose", "report")


def part_of(items: list, part: str | None) -> list:
    """One of three disjoint parts of a data set's items, in a seeded order; all items for None.

    Blocks are ranked on the first, a choice between rankings is made on the second, and what is reported is measured on
    the third: the best of thirty noisy numbers is too good on the items that it was the best on.

    Raises:
        BadInput: an unknown part.
    """
    if part is None:
        return items
    if part not in PARTS:
        raise unknown("part of the items", part, PARTS)
    return random.Random(0).sample(items, len(items))[PARTS.index(part) :: len(PARTS)]


class ChoiceSet:
    """A data set that lm-evaluation-harness has as a multiple-choice task, in its wording, 0-shot. A subclass with a
    `name` is one; `thesislib.sources.choices.found` finds it by itself.

    Attributes:
        name: the harness's name.
        source: the source of its rows.
        stock: the harness's own file for it, below lm_eval/tasks.
        metric: the harness's name of the score by which an ending is picked: acc_norm, by log-probability per character
            of an ending, or acc, by log-probability.
        one_context: whether all endings of an item follow the same context.
    """

    name: ClassVar[str]
    source: ClassVar[Source]
    stock: ClassVar[str]
    metric: ClassVar[str] = "acc_norm"
    one_context: ClassVar[bool] = True

    def item(self, i: int, row: Row) -> Choice:
        """Row i in the harness's wording.

        Raises:
            ValueError: the label names no ending.
        """
        raise NotImplementedError

    def stock_row(self, row: Row) -> Row:
        """A row as the harness's data set has it."""
        return {column: row[column] for column in self.source.columns}

    def rows(self, data: str) -> list[Row]:
        """All rows that a data spec has, each checked as `items` checks it."""
        every = rows(self.source, data)
        for i, row in enumerate(every):
            self._checked(i, row)
        return every

    def items(self, data: str) -> list[Choice]:
        """All items that a data spec has, in its order, numbered in it.

        Raises:
            BadInput: a label that names no ending; an ending without words.
        """
        return [self._checked(i, row) for i, row in enumerate(rows(self.source, data))]

    def chance(self, items: list[Choice]) -> float:
        """The expected score of picking an ending at random."""
        return sum(1 / len(item.endings) for item in items) / len(items)

    def _checked(self, i: int, row: Row) -> Choice:
        try:
            item = self.item(i, row)
            right = 0 <= item.label < len(item.endings)
        except ValueError:
            right = False
        if not right:
            label = row.get("label", row.get("answerKey"))
            raise BadInput(
                f"row {i + 1} of task '{self.name}' has the label '{label}': expected one that names an ending"
            )
        if empty := [ending for ending in item.endings if not ending.strip()]:
            raise BadInput(
                f"row {i + 1} of task '{self.name}' has {len(empty)} of {len(item.endings)} endings without "
                "words: expected some in each"
            )
        return item
