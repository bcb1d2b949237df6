"""PIQA: which of two ways reaches a goal in the physical world (Bisk et al. 2020)."""

from thesislib.sources.choices.choice_set import ChoiceSet
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import ARROW, WHOLE_NUMBER, WORDS, Row, Source


class Piqa(ChoiceSet):
    """See the module."""

    name = "piqa"
    stock = "piqa/piqa.yaml"
    source = Source(
        name, {"goal": WORDS, "sol1": WORDS, "sol2": WORDS, "label": WHOLE_NUMBER},
        "piqa/validation", ARROW.format("piqa/plain_text"), ("baber/piqa", None, "validation"),
    )  # fmt: skip

    def item(self, i: int, row: Row) -> Choice:
        """See `ChoiceSet.item`."""
        return Choice(str(i), f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))

    def stock_row(self, row: Row) -> Row:
        """See `ChoiceSet.stock_row`."""
        return super().stock_row(row) | {"label": int(row["label"])}
