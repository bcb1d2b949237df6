"""The thesis's own figures for Llama-3.2-1B-Instruct, to set beside ours."""

import csv
from dataclasses import dataclass
from functools import cache

from thesislib.errors import unknown
from thesislib.files import data_file


@dataclass(frozen=True)
class ThesisRow:
    """One configuration as the thesis reports it: single runs, no intervals.

    closed, open: TriviaQA in percent, all three tiers together. perplexity: WikiText-2 in pieces of 512 tokens, by a
    protocol that gives the dense model 26.61, where others measure 14.01. gigabytes: as reported; None where it is not.
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
    with data_file("thesis.csv").open(encoding="utf8") as file:
        found = [
            ThesisRow(
                r["label"],
                r["lora"],
                r["stage"],
                float(r["closed_pct"]),
                float(r["open_pct"]),
                float(r["perplexity"]),
                float(r["gb"]) if r["gb"] else None,
            )
            for r in csv.DictReader(line for line in file if not line.startswith("#"))
        ]
    return {(r.label, r.lora, r.stage): r for r in found}


def thesis_row(label: str, lora: str = "", stage: str = "") -> ThesisRow:
    """One of them.

    Raises:
        BadInput: a configuration that the thesis does not have.
    """
    try:
        return thesis_rows()[label, lora, stage]
    except KeyError:
        raise unknown("configuration of the thesis", label, {key[0] for key in thesis_rows()}) from None
