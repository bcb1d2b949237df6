"""What goes into a notebook and what it hands over: parameters, checked before it runs, and its table of results."""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thesislib.bounds import read_sizes
from thesislib.config import build
from thesislib.errors import BadInput, first_line, shown, unknown
from thesislib.files import expanded, is_folder, read_json
from thesislib.formats.load import checkpoint_folder
from thesislib.formats.options import check_device
from thesislib.pipeline.forecast import shape_of, stand_in
from thesislib.sources.rows import origin_of
from thesislib.yaml_lines import is_file, value_of_text

if TYPE_CHECKING:
    import pandas as pd

TAG = "parameters"  # of the cell with a notebook's defaults
RESULTS = "application/vnd.thesislib.results+json"  # MIME type: {"columns": names, "rows": lists}
PATHS = ("subject", "data", "devices")  # parameters that may be paths, or lists of them


def read_notebook(notebook: Path):
    """A notebook as nbformat has it, version 4.

    Raises:
        BadInput: it cannot be read, or is no notebook.
    """
    import nbformat

    text = json.dumps(read_json(notebook))  # bounded
    try:
        found = nbformat.reads(text, 4)
        nbformat.validate(found)  # which reading only logs
        return found
    except Exception as error:  # nbformat and jsonschema have many, some with the whole notebook in their text
        raise BadInput(
            f"{notebook} is not a notebook of version 4 ({shown(first_line(error))}): bring it back from a copy"
        ) from error


def defaults(notebook: Path) -> dict[str, Any]:
    """What a notebook's tagged cell sets, by name; None for what is no plain value.

    Raises:
        BadInput: no notebook, or a cell that is no Python.
    """
    found = {}
    for cell in read_notebook(notebook).cells:
        if cell.cell_type == "code" and TAG in cell.metadata.get("tags", []):
            try:
                lines = ast.parse(cell.source).body
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: of a NUL
                raise BadInput(
                    f"the cell tagged '{TAG}' of {notebook} is not Python ({first_line(error)}): bring it back "
                    "from a copy"
                ) from error
            for line in lines:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                    try:
                        found[line.targets[0].id] = ast.literal_eval(line.value)
                    except ValueError:
                        found[line.targets[0].id] = None
    return found


def check_names(notebook: Path, names: Iterable[str]) -> dict[str, Any]:
    """The defaults of a notebook that has all these parameters.

    Raises:
        BadInput: one that it does not have.
    """
    known = defaults(notebook)
    for name in names:
        if name not in known:
            raise unknown(f"parameter of {notebook.stem}", name, known)
    return known


def typed(notebook: Path, given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parameters as the command line gives them, key and text: the text as typed where the default is one, else what it
    says in YAML.

    Raises:
        BadInput: a name that the notebook does not have or that is given twice, a text that is no YAML.
    """
    given = list(given)
    known, found = check_names(notebook, (key for key, _ in given)), {}
    for key, text in given:
        if key in found:
            raise BadInput(f"parameter '{key}' is given twice: expected one value")
        if not text.strip() and not isinstance(known[key], str):
            raise BadInput(f"parameter '{key}' has no value: expected e.g. {key}={json.dumps(known[key])}")
        found[key] = text if isinstance(known[key], str) else value_of_text(text, f"parameter {key}")
    return found


def listed(notebook: Path, given: Iterable[tuple[str, str]]) -> dict[str, list]:
    """Several values a parameter: 2,4,6 or [2,4],[6]; texts as typed between commas, in quotes where they hold one.

    Raises:
        BadInput: as `typed`, or no value.
    """
    given = list(given)
    known, found = check_names(notebook, (key for key, _ in given)), {}
    for key, text in given:
        if key in found:
            raise BadInput(f"parameter '{key}' is given twice: expected its values with commas between them")
        found[key] = (
            texts(text) if isinstance(known[key], str) else value_of_text(f"[{text}]", f"values of parameter {key}")
        )
        if not found[key]:
            raise BadInput(f"parameter '{key}' has no value: expected e.g. {key}=2,4,6")
    return found


def texts(text: str) -> list[str]:
    """What stands between commas, less spaces around it; whatever is in quotes from one comma to the next stands for
    itself.

    >>> texts('a: b, c # d,"e, f"')
    ['a: b', 'c # d', 'e, f']
    """
    found, rest = [], text.strip()
    while rest:
        end = rest.find(rest[0], 1) if rest[0] in "\"'" else -1
        after = rest[end + 1 :].lstrip()
        if end > 0 and after[:1] in ("", ","):
            item, comma, rest = rest[1:end], after[:1], after[1:]
        else:
            item, comma, rest = rest.partition(",")
        found.append(item.strip() if end < 0 else item)
        rest = rest.lstrip()
        if comma and not rest:  # a comma at the end is one value too few, or an empty one
            break
    return found


def ready(notebook: Path, given: Mapping[str, Any], kind: type | None = None) -> dict[str, Any]:
    """The parameters given as the notebook can take them wherever it runs: paths are the user's, from where the command
    was typed.

    Args:
        notebook: the file.
        given: parameters by name.
        kind: the class of its chapter's parameters; with `check_shape` it also says which subjects it takes.

    Raises:
        BadInput: a name, type or value that the chapter does not take; a subject, data or device that is not there; a
            subject, in a folder, of which what the chapter measures cannot be made. Nothing has run yet.
    """
    known = check_names(notebook, given)
    found = {name: _in_full(value) if name in PATHS else value for name, value in given.items()}
    if kind is not None:
        try:
            parameters = build(kind, {**known, **found})
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # BadInput is a ValueError; the others: of a list's items
            raise (
                error
                if isinstance(error, BadInput)
                else BadInput(f"{notebook.stem} cannot take {shown(given)} ({error})")
            ) from error
    for name, check in CHECKS.items():
        if isinstance(found.get(name), str):
            check(found[name])
    if kind is not None and hasattr(parameters, "check_shape") and is_folder(expanded(parameters.subject)):
        parameters.check_shape(shape_of(stand_in(checkpoint_folder(parameters.subject)[0])))
    return found


def _in_full(value: Any) -> Any:
    """A path that is there, from the root; a list's items alike; anything else as it is, for its reader to name."""
    if isinstance(value, list):
        return [
            _in_full(item) if str(item).endswith((".yaml", ".yml")) else item for item in value
        ]  # without, it is a device's name
    if not isinstance(value, str) or not value or value in ("embedded", "hub") or value.startswith("hub:"):
        return value
    path = expanded(value)
    return str(path.absolute()) if is_file(path) or is_folder(path) else value


class ResultsTable:
    """A table of results, as the last line of the cell tagged `results`: shown, and handed over as data.

    The cell's output holds the table as text, as HTML, and as JSON. Headings that stand twice are numbered there.
    """

    def __init__(self, table: "pd.DataFrame"):
        self.table = table

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        table = self.table.reset_index() if self.table.index.name else self.table
        columns = distinct(str(name).strip() for name in table.columns)
        rows = json.loads(table.to_json(orient="values", double_precision=15))
        return {
            "text/plain": repr(self.table),
            "text/html": self.table._repr_html_(),
            RESULTS: {"columns": columns, "rows": rows},
        }


def distinct(names: Iterable[str]) -> list[str]:
    """Names, those that are there already with a number."""
    numbered: list[str] = []
    for name in names:
        taken = sum(other == name or other.startswith(f"{name} (") for other in numbered)
        numbered.append(f"{name} ({taken + 1})" if name in numbered else name)
    return numbered


def _check_subject(spec: str) -> None:
    """Raises BadInput for a subject that is not there; nothing is fetched or converted."""
    if spec != "embedded" and not spec.startswith("hub:") and not (spec.endswith(".gguf") and is_file(Path(spec))):
        read_sizes(checkpoint_folder(spec)[0])


CHECKS = {"subject": _check_subject, "data": origin_of, "device": check_device}
