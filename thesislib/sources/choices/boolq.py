"""BoolQ: a yes-or-no question that people asked, with a passage that answers it (Clark et al. 2019)."""

from thesislib.sources.choices.choice_set import ChoiceSet
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import ARROW, WORDS, Row, Source


class BoolQ(ChoiceSet):
    """See the module."""

    name = "boolq"
    stock = "super_glue/boolq/default.yaml"
    metric = "acc"
    source = Source(
        name, {"question": WORDS, "passage": WORDS, "answer": (lambda value: isinstance(value, bool), "true or false")},
        "boolq/validation", ARROW.format("boolq/none"), ("google/boolq", None, "validation"),
    )  # fmt: skip

    def item(self, i: int, row: Row) -> Choice:
        """See `ChoiceSet.item`."""
        return Choice(
            str(i), f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(row["answer"])
        )

    def stock_row(self, row: Row) -> Row:
        """A row as SuperGLUE has it."""
        return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}

    def chance(self, items: list[Choice]) -> float:
        """The score of always giving the more frequent answer of these items, which is more than a coin's."""
        yes = sum(item.label for item in items) / len(items)
        return max(yes, 1 - yes)
