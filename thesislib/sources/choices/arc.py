"""ARC: questions of school science with several answers, easy ones and a challenge set (Clark et al. 2018); OpenBookQA
is laid out alike."""

from thesislib.sources.choices.choice_set import ChoiceSet
from thesislib.sources.corpus import Choice, row_id
from thesislib.sources.rows import ARROW, KEYED_CHOICES, WORDS, Row, Source

COLUMNS = {"question": WORDS, "choices": KEYED_CHOICES, "answerKey": WORDS}


def _source(name: str, rows: str, config: str) -> Source:
    """One of the data set's two configurations."""
    hub = ("allenai/ai2_arc", config, "validation")
    return Source(name, COLUMNS, f"ai2_arc/{rows}", ARROW.format(f"ai2_arc/{config}"), hub)


class ArcEasy(ChoiceSet):
    """The easy set."""

    name = "arc_easy"
    stock = "arc/arc_easy.yaml"
    source = _source(name, "easy_validation", "ARC-Easy")

    def context(self, row: Row) -> str:
        """The text before the answers."""
        return f"Question: {row['question']}\nAnswer:"

    def item(self, i: int, row: Row) -> Choice:
        """See `ChoiceSet.item`."""
        key = row["choices"]["label"].index(row["answerKey"].strip())
        return Choice(row_id(row, "id") or str(i), self.context(row), tuple(row["choices"]["text"]), key)

    def stock_row(self, row: Row) -> Row:
        """See `ChoiceSet.stock_row`."""
        return super().stock_row(row) | {"answerKey": row["answerKey"].strip()}


class ArcChallenge(ArcEasy):
    """The challenge set: the questions that a retriever and a word counter answer wrongly."""

    name = "arc_challenge"
    stock = "arc/arc_challenge.yaml"
    source = _source(name, "challenge_validation", "ARC-Challenge")
