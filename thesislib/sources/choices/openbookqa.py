"""OpenBookQA: questions of school science that a fact and some sense answer, here without the fact (Mihaylov et al.
2018)."""

from thesislib.sources.choices.arc import COLUMNS, ArcEasy
from thesislib.sources.rows import ARROW, WORDS, Row, Source


class OpenBookQA(ArcEasy):
    """See the module."""

    name = "openbookqa"
    stock = "openbookqa/openbookqa.yaml"
    source = Source(
        name, {"question_stem": WORDS, **{c: check for c, check in COLUMNS.items() if c != "question"}},
        "openbookqa/validation", ARROW.format("openbookqa/main"), ("allenai/openbookqa", "main", "validation"),
    )  # fmt: skip

    def context(self, row: Row) -> str:
        """The stem; an answer completes it."""
        return row["question_stem"]
