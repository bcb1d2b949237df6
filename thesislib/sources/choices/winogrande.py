"""WinoGrande: which of two names fills a gap (Sakaguchi et al. 2020), by lm-evaluation-harness alone.

It scores one ending, the text after the gap, with two contexts. `thesislib.model.endings` scores many endings with one
context and cannot do that.
"""

from thesislib.sources.choices.choice_set import ChoiceSet
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import ARROW, TEXT, WORDS, Row, Source


class WinoGrande(ChoiceSet):
    """See the module."""

    name = "winogrande"
    stock = "winogrande/default.yaml"
    metric = "acc"
    one_context = False
    source = Source(
        name,
        {
            "sentence": (lambda value: TEXT[0](value) and "_" in value, "a text with a gap, _"),
            "option1": WORDS,
            "option2": WORDS,
            "answer": (lambda value: value in ("1", "2"), '"1" or "2"'),
        },
        "winogrande/validation",
        ARROW.format("winogrande/winogrande_xl"),
        ("allenai/winogrande", "winogrande_xl", "validation"),
    )

    def item(self, i: int, row: Row) -> Choice:
        """The two names as endings. The item is never scored; its number of endings gives the chance."""
        return Choice(str(i), row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)
