"""What each notebook measures: its parameters, its measurements, and the claims it holds them against.

A chapter's module has a TITLE, PARAMETERS (the class of those that its notebook takes), `read_recorded(path)` for its recorded run, and
`headline(record)`, what was found, in sentences.
"""

import re
from importlib import import_module
from pathlib import Path

from thesislib.files import data_file

CHAPTERS = {
    "00_measures": "ch00_measures", "01_franken_llama": "ch01_franken", "02_depth_pruning": "ch02_depth",
    "03_width_pruning": "ch03_width", "04_lora_recovery": "ch04_recovery",
    "05_quantisation": "ch05_quantisation", "06_evaluation": "ch06_grid", "07_on_device": "ch07_device",
}  # fmt: skip


def parameters_of(notebook: str) -> type | None:
    """The class of the parameters that a chapter's notebook takes; None for a notebook of no chapter."""
    return import_module(f"thesislib.chapters.{CHAPTERS[notebook]}").PARAMETERS if notebook in CHAPTERS else None


def record_file(chapter: str) -> Path:
    """Where a chapter's recorded run lies."""
    return data_file(f"results/{chapter}.jsonl")


def recorded(chapter: str):
    """The recorded run of a chapter, as its functions take it."""
    return import_module(f"thesislib.chapters.{CHAPTERS[chapter]}").read_recorded(record_file(chapter))


def findings() -> str:
    """What was found, in sentences filled in from the recorded runs: for the book's first page and the README."""
    said = []
    for name, module in CHAPTERS.items():
        chapter = import_module(f"thesislib.chapters.{module}")
        said.append(f"**Chapter {int(name[:2])}, {chapter.TITLE}.** {chapter.headline(recorded(name))}\n")
    return "\n".join(said)


FIGURE = "book/_static/pareto.png"  # the README's, drawn by `make findings`


def three_findings() -> str:
    """The findings that matter most, for the README."""
    evaluation = import_module("thesislib.chapters.ch06_grid")
    return "".join(f"- {finding}\n" for finding in evaluation.top_findings(recorded("06_evaluation")))


def block(text: str, name: str) -> tuple[str, str]:
    """What stands before and after the part of a text that is written from records, between <!-- NAME: ... --> and <!-- /NAME -->."""
    found = re.search(rf"(?s)^(.*<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->.*)$", text)
    if not found:
        raise ValueError(f"no part '{name}' between <!-- {name}: ... --> and <!-- /{name} -->")
    return found[1], found[2]
