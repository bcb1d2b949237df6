"""ARC: questions of school science with several answers, easy ones and a challenge set (Clark et al. 2018); OpenBookQA
is laid out alike."""

from thesislib.evaluate.choice import MultipleChoice
from thesislib.sources.corpus import Choice, row_id
from thesislib.sources.rows import ARROW, KEYED_CHOICES, WORDS, Row, Source

COLUMNS = {"question": WORDS, "choices": KEYED_CHOICES, "answerKey": WORDS}


class ArcEasy(MultipleChoice):
    """The easy set."""

    name = "arc_easy"
    stock = "arc/arc_easy.yaml"
    source = Source(
        name,
        COLUMNS,
        "ai2_arc/easy_validation",
        ARROW.format("ai2_arc/ARC-Easy"),
        ("allenai/ai2_arc", "ARC-Easy", "validation"),
    )

    def context(self, row: Row) -> str:
        """What the answers follow."""
        return f"Question: {row['question']}\nAnswer:"

    def item(self, i: int, row: Row) -> Choice:
        """See `MultipleChoice.item`."""
        key = row["choices"]["label"].index(row["answerKey"].strip())
        return Choice(row_id(row, "id") or str(i), self.context(row), tuple(row["choices"]["text"]), key)

    def stock_row(self, row: Row) -> Row:
        """See `MultipleChoice.stock_row`."""
        return super().stock_row(row) | {"answerKey": row["answerKey"].strip()}


class ArcChallenge(ArcEasy):
    """The challenge set: what a retriever and a counter of words get wrong."""

    name = "arc_challenge"
    stock = "arc/arc_challenge.yaml"
    source = Source(
        name,
        COLUMNS,
        "ai2_arc/challenge_validation",
        ARROW.format("ai2_arc/ARC-Challenge"),
        ("allenai/ai2_arc", "ARC-Challenge", "validation"),
    )
