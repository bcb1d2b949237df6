"""What each notebook measures: its parameters, its recorded run, and the claims it is held against.

A chapter is found by its file's name: of the modules `chNN_*.py` of each number one has a CHAPTER, see
`thesislib.chapters.chapter`.
"""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from thesislib.chapters.chapter import Chapter
from thesislib.errors import BadInput
from thesislib.files import data_file


def chapters() -> dict[str, Chapter]:
    """All chapters by their notebooks' names, in order."""
    numbers = sorted({found[1] for module in iter_modules(__path__) if (found := re.match(r"ch(\d\d)_", module.name))})
    return {c.notebook: c for number in numbers for _, c in [_of(number)]}


def _of(number: str) -> tuple[str, Chapter]:
    """The module that has a number's CHAPTER, and the chapter.

    Raises:
        BadInput: none has, or several, or the notebook's name has another number.
    """
    names = [f"{__name__}.{module.name}" for module in iter_modules(__path__) if module.name.startswith(f"ch{number}_")]
    found = {name: c for name in names if (c := getattr(import_module(name), "CHAPTER", None)) is not None}
    if len(found) != 1 or not next(iter(found.values())).notebook.startswith(f"{number}_"):
        raise BadInput(
            f"of {', '.join(names) or 'no module'} {len(found)} have a CHAPTER: expected one, whose notebook is "
            f"named {number}_..."
        )
    return next(iter(found.items()))


def _known(notebook: str) -> tuple[str, Chapter] | None:
    number = notebook.partition("_")[0]
    there = re.fullmatch(r"\d\d", number) and any(
        module.name.startswith(f"ch{number}_") for module in iter_modules(__path__)
    )
    return found if there and (found := _of(number))[1].notebook == notebook else None


def chapter_of(notebook: str) -> Chapter:
    """The chapter of a notebook.

    Raises:
        BadInput: it has none.
    """
    if (found := _known(notebook)) is None:
        raise BadInput(
            f"notebook {notebook} has no chapter: expected a CHAPTER named so in a module ch{notebook[:2]}_*.py "
            "of thesislib/chapters"
        )
    return found[1]


def parameters_of(notebook: str) -> type | None:
    """The class of the parameters that a chapter's notebook takes; None for a notebook of no chapter."""
    return found[1].parameters if (found := _known(notebook)) else None


def reads(notebook: str) -> dict[str, str]:
    """{chapter: its module} of a notebook's chapter, of those whose records it reads, and of those that these read;
    empty for a notebook of no chapter."""
    found: dict[str, str] = {}
    open_ = [notebook]
    while open_:
        name = open_.pop()
        if name not in found and (known := _known(name)):
            found[name] = known[0]
            open_ += known[1].reads
    return found


def record_file(chapter: str) -> Path:
    """Where a chapter's recorded run lies."""
    return data_file(f"results/{chapter}.jsonl")


def recorded(chapter: str):
    """The recorded run of a chapter, as its functions take it."""
    return chapter_of(chapter).read(record_file(chapter))


def findings() -> str:
    """What was found, in sentences filled in from the recorded runs: for the book's first page and the README."""
    said = []
    for name, chapter in chapters().items():
        said.append(f"**Chapter {int(name[:2])}, {chapter.title}.** {chapter.headline(recorded(name))}\n")
    return "\n".join(said)


FIGURE = "book/_static/pareto.png"  # the README's, drawn by `make findings`


def three_findings() -> str:
    """The findings that matter most, for the README."""
    evaluation = import_module("thesislib.chapters.ch06_grid")
    return "".join(f"- {finding}\n" for finding in evaluation.top_findings(recorded("06_evaluation")))


def block(text: str, name: str) -> tuple[str, str]:
    """What stands before and after the part of a text that is written from records, between <!-- NAME: ... --> and <!--
    /NAME -->."""
    found = re.search(rf"(?s)^(.*<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->.*)$", text)
    if not found:
        raise ValueError(f"no part '{name}' between <!-- {name}: ... --> and <!-- /{name} -->")
    return found[1], found[2]
