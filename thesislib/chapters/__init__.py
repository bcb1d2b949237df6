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
    numbers = sorted({number[1] for name in _modules() if (number := re.match(r"ch(\d\d)_", name))})
    return {chapter.notebook: chapter for number in numbers for _, chapter in [_of(number)]}


def _modules() -> list[str]:
    return [module.name for module in iter_modules(__path__)]


def _of(number: str) -> tuple[str, Chapter]:
    """The module that has a number's CHAPTER, and the chapter.

    Raises:
        BadInput: none has, or several, or the notebook's name has another number.
    """
    names = [f"{__name__}.{name}" for name in _modules() if name.startswith(f"ch{number}_")]
    having = [(name, c) for name in names if (c := getattr(import_module(name), "CHAPTER", None)) is not None]
    if len(having) != 1 or not having[0][1].notebook.startswith(f"{number}_"):
        raise BadInput(
            f"of {', '.join(names) or 'no module'} {len(having)} have a CHAPTER: expected one, whose notebook is "
            f"named {number}_..."
        )
    return having[0]


def _known(notebook: str) -> tuple[str, Chapter] | None:
    number = notebook.partition("_")[0]
    if re.fullmatch(r"\d\d", number) and any(name.startswith(f"ch{number}_") for name in _modules()):
        module, chapter = _of(number)
        return (module, chapter) if chapter.notebook == notebook else None
    return None


def chapter_of(notebook: str) -> Chapter:
    """The chapter of a notebook.

    Raises:
        BadInput: it has none.
    """
    if (known := _known(notebook)) is None:
        raise BadInput(
            f"notebook {notebook} has no chapter: expected a CHAPTER named so in a module ch{notebook[:2]}_*.py "
            "of thesislib/chapters"
        )
    return known[1]


def parameters_of(notebook: str) -> type | None:
    """The class of the parameters that a chapter's notebook takes; None for a notebook of no chapter."""
    return known[1].parameters if (known := _known(notebook)) else None


def reads(notebook: str) -> dict[str, str]:
    """{chapter: its module} of a notebook's chapter, of those whose records it reads, and of those that these read;
    empty for a notebook of no chapter."""
    modules: dict[str, str] = {}
    names = [notebook]
    while names:
        name = names.pop()
        if name not in modules and (known := _known(name)):
            modules[name] = known[0]
            names += known[1].reads
    return modules


def record_file(chapter: str) -> Path:
    """Where a chapter's recorded run lies."""
    return data_file(f"results/{chapter}.jsonl")


def recorded(chapter: str):
    """The recorded run of a chapter, as its functions take it."""
    return chapter_of(chapter).read(record_file(chapter))


def block(text: str, name: str) -> tuple[str, str]:
    """What stands before and after the part of a text that is written from records.

    The part lies between <!-- NAME: ... --> and <!-- /NAME -->.
    """
    parts = re.search(rf"(?s)^(.*<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->.*)$", text)
    if not parts:
        raise ValueError(f"no part '{name}' between <!-- {name}: ... --> and <!-- /{name} -->")
    return parts[1], parts[2]
