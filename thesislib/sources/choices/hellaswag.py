"""HellaSwag: which of four endings a description of an everyday scene goes on with (Zellers et al. 2019)."""

import re

from thesislib.sources.choices.choice_set import ChoiceSet
from thesislib.sources.corpus import Choice, row_id
from thesislib.sources.rows import ARROW, SEVERAL_WORDS, TEXT, WHOLE_NUMBER, Row, Source


class HellaSwag(ChoiceSet):
    """See the module."""

    name = "hellaswag"
    stock = "hellaswag/hellaswag.yaml"
    source = Source(
        name, {"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": SEVERAL_WORDS, "label": WHOLE_NUMBER},
        "hellaswag/validation", ARROW.format("hellaswag/none"), ("Rowan/hellaswag", None, "validation"),
    )  # fmt: skip

    def item(self, i: int, row: Row) -> Choice:
        """See `ChoiceSet.item`."""
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return Choice(
            f"{row_id(row, 'ind') or i}/{i}",
            _wikihow(context),
            tuple(_wikihow(e) for e in row["endings"]),
            int(row["label"]),
        )

    def stock_row(self, row: Row) -> Row:
        """See `ChoiceSet.stock_row`."""
        return super().stock_row(row) | {"label": str(row["label"])}


def _wikihow(text: str) -> str:
    """HellaSwag's WikiHow half has '[title]' and '[step]' marks."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
