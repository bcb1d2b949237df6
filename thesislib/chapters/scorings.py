"""Answers to free questions under every scoring side by side, so that neither length nor ending decides unseen."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from thesislib.chapters.phrases import share
from thesislib.evaluate.answers import AT_ONCE, EXACT, F1, FIRST_WORDS
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store, study

SCORINGS = (EXACT.metric, F1.metric, AT_ONCE.metric)
FILE = "answers.jsonl"  # what `thesislib records score` writes
LEGEND = (
    "*exact*: the answer is a name that counts and nothing else. *anywhere*: the thesis's rule, a name anywhere in the "
    "answer, or four fifths of its words. *F1*: SQuAD's token F1, which every further word lowers. "
    f"*first {FIRST_WORDS} words*: the thesis's rule on the answer cut at its first line and at {FIRST_WORDS} words. "
    "Every model gets as many words there, so that is the scoring to compare models by that end their answers "
    "differently. *words*: the mean length of an answer. A dash: these answers ended with another control token, which "
    "was decoded over; scorings that read an answer's end do not count."
)


def scored_again(folder: Path | None = None) -> dict[tuple[str, str], Measurement]:
    """{(id of a row with answers, scoring): row} of all recorded answers that were scored again.

    Args:
        folder: of the records, by default the study's own; without such rows there are none.
    """
    file = (folder or study()) / FILE
    rows = Store(file).rows().values() if file.exists() else ()
    return {(m.provenance["origin"], m.metric): m for m in rows}


def mean_words(m: Measurement) -> float:
    """The mean length of recorded answers, in words."""
    return float(np.mean([len(item["answer"].split()) for item in m.items]))


def answers_table(
    answers: Mapping[str, Measurement], again: Mapping[tuple[str, str], Measurement] | None = None
) -> pd.DataFrame:
    """One row a model: its answers by every scoring, each with its 95 % interval, and their mean length.

    Args:
        answers: {model: recorded answers}, by the thesis's rule.
        again: see `scored_again`; by default the study's own.
    """
    again = scored_again() if again is None else again
    rows = []
    for name, m in answers.items():
        exact, f1, first = (again.get((m.id, metric)) for metric in SCORINGS)
        rows.append(
            {
                "model": name,
                f"first {FIRST_WORDS} words": share(first) or "-",
                "anywhere": share(m),
                "exact": share(exact) or "-",
                "F1": share(f1) or "-",
                "words": f"{mean_words(m):.1f}",
                "n": f"{m.n:,}",
            }
        )
    return pd.DataFrame(rows).set_index("model")
