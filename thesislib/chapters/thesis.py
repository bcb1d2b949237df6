"""The thesis's own figures for Llama-3.2-1B-Instruct, to set beside ours."""

import csv
from dataclasses import dataclass
from functools import cache

from thesislib.errors import unknown
from thesislib.files import data_file


@dataclass(frozen=True)
class ThesisRow:
    """One configuration as the thesis reports it: single runs, no intervals.

    Attributes:
        label: of the pruned model.
        lora: text that it was trained on, W or T; empty for none.
        stage: the last stage, Q, E or order (pruned after training); empty for none.
        closed: TriviaQA closed book in percent, all three tiers together.
        open: TriviaQA open book, alike.
        perplexity: on WikiText-2 in pieces of 512 tokens, by a protocol that gives the dense model 26.61, where others
            measure 14.01.
        gigabytes: as reported; None where it is not.
    """

    label: str
    lora: str
    stage: str
    closed: float
    open: float
    perplexity: float
    gigabytes: float | None


@cache
def thesis_rows() -> dict[tuple[str, str, str], ThesisRow]:
    """All rows by (label, LoRA text: '', 'W' or 'T', last stage: '', 'Q', 'E', 'order')."""
    rows = {}
    with data_file("thesis.csv").open(encoding="utf8") as file:
        for r in csv.DictReader(line for line in file if not line.startswith("#")):
            numbers = float(r["closed_pct"]), float(r["open_pct"]), float(r["perplexity"])
            key = r["label"], r["lora"], r["stage"]
            rows[key] = ThesisRow(*key, *numbers, float(r["gb"]) if r["gb"] else None)
    return rows


def thesis_row(label: str, lora: str = "", stage: str = "") -> ThesisRow:
    """One of them.

    Raises:
        BadInput: a configuration that the thesis does not have.
    """
    try:
        return thesis_rows()[label, lora, stage]
    except KeyError:
        raise unknown("configuration of the thesis", label, {key[0] for key in thesis_rows()}) from None
