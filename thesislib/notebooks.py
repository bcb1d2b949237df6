"""What goes into a notebook: its parameters, checked before it runs."""

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from thesislib.bounds import read_sizes
from thesislib.config import build
from thesislib.errors import BadInput, first_line, shown, unknown
from thesislib.files import expanded, is_folder, read_json
from thesislib.formats.load import checkpoint_folder
from thesislib.formats.options import check_device
from thesislib.pipeline.forecast import shape_of, stand_in
from thesislib.sources.rows import origin_of
from thesislib.yaml_lines import is_file, value_of_text

TAG = "parameters"  # of the cell with a notebook's defaults
PATHS = ("subject", "data", "devices")  # parameters that may be paths, or lists of them


def read_notebook(notebook: Path):
    """A notebook as nbformat has it, version 4.

    Raises:
        BadInput: it cannot be read, or is no notebook.
    """
    import nbformat

    text = json.dumps(read_json(notebook))  # bounded
    try:
        nb = nbformat.reads(text, 4)
        nbformat.validate(nb)  # which reading only logs
        return nb
    except Exception as error:  # nbformat and jsonschema have many, some with the whole notebook in their text
        raise BadInput(
            f"{notebook} is not a notebook of version 4 ({shown(first_line(error))}): bring it back from a copy"
        ) from error


def defaults(notebook: Path) -> dict[str, Any]:
    """What a notebook's tagged cell sets, by name; None for what is no plain value.

    Raises:
        BadInput: no notebook, or a cell that is no Python.
    """
    values: dict[str, Any] = {}
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
                        values[line.targets[0].id] = ast.literal_eval(line.value)
                    except ValueError:
                        values[line.targets[0].id] = None
    return values


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
    """Parameters as the command line gives them, key and text.

    Where the default is a text the value is the text as typed, else what the text says in YAML.

    Raises:
        BadInput: a name that the notebook does not have or that is given twice, a text that is no YAML.
    """

    def value(key: str, text: str, default: Any) -> Any:
        if isinstance(default, str):
            return text
        if not text.strip():
            raise BadInput(f"parameter '{key}' has no value: expected e.g. {key}={json.dumps(default)}")
        return value_of_text(text, f"parameter {key}")

    return _read(notebook, given, value, "one value")


def listed(notebook: Path, given: Iterable[tuple[str, str]]) -> dict[str, list]:
    """Several values a parameter: 2,4,6 or [2,4],[6]; texts as typed between commas, in quotes where they hold one.

    Raises:
        BadInput: as `typed`, or no value.
    """

    def values(key: str, text: str, default: Any) -> list:
        each = texts(text) if isinstance(default, str) else value_of_text(f"[{text}]", f"values of parameter {key}")
        if not each:
            raise BadInput(f"parameter '{key}' has no value: expected e.g. {key}=2,4,6")
        return each

    return _read(notebook, given, values, "its values with commas between them")


def _read(notebook: Path, given: Iterable[tuple[str, str]], read: Callable[[str, str, Any], Any], once: str) -> dict:
    """{key: read(key, text, default)}; `once` is what is expected of a key that is given twice."""
    given = list(given)
    known, values = check_names(notebook, (key for key, _ in given)), {}
    for key, text in given:
        if key in values:
            raise BadInput(f"parameter '{key}' is given twice: expected {once}")
        values[key] = read(key, text, known[key])
    return values


def texts(text: str) -> list[str]:
    """What stands between commas, less spaces around it; whatever is in quotes from one comma to the next stands for
    itself.

    >>> texts('a: b, c # d,"e, f"')
    ['a: b', 'c # d', 'e, f']
    """
    items, rest = [], text.strip()
    while rest:
        end = rest.find(rest[0], 1) if rest[0] in "\"'" else -1
        after = rest[end + 1 :].lstrip()
        if end > 0 and after[:1] in ("", ","):
            item, comma, rest = rest[1:end], after[:1], after[1:]
        else:
            item, comma, rest = rest.partition(",")
        items.append(item.strip() if end < 0 else item)
        rest = rest.lstrip()
        if comma and not rest:  # a comma at the end is one value too few, or an empty one
            break
    return items


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
    values = {name: _in_full(value) if name in PATHS else value for name, value in given.items()}
    parameters = None if kind is None else build_parameters(notebook.stem, kind, {**known, **values}, given)
    for name, check in CHECKS.items():
        if isinstance(values.get(name), str):
            check(values[name])
    if hasattr(parameters, "check_shape") and is_folder(expanded(parameters.subject)):
        parameters.check_shape(shape_of(stand_in(checkpoint_folder(parameters.subject)[0])))
    return values


def build_parameters(chapter: str, kind: type, values: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """A chapter's parameters, an object of `kind`.

    Args:
        chapter: its notebook's name, for the error.
        kind: their class.
        values: all that are set.
        given: those that the user gave, for the error.

    Raises:
        BadInput: a name, type or value that the chapter does not take.
    """
    try:
        return build(kind, values)
    except BadInput:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # of a list's items
        raise BadInput(f"{chapter} cannot take {shown(given)} ({error})") from error


def _in_full(value: Any) -> Any:
    """A path that is there, from the root; a list's items alike; anything else as it is, for its reader to name."""
    if isinstance(value, list):  # without .yaml an item is a device's name
        return [_in_full(item) if str(item).endswith((".yaml", ".yml")) else item for item in value]
    if not isinstance(value, str) or not value or value in ("embedded", "hub") or value.startswith("hub:"):
        return value
    path = expanded(value)
    return str(path.absolute()) if is_file(path) or is_folder(path) else value


def _check_subject(spec: str) -> None:
    """Raises BadInput for a subject that is not there; nothing is fetched or converted."""
    if spec != "embedded" and not spec.startswith("hub:") and not (spec.endswith(".gguf") and is_file(Path(spec))):
        read_sizes(checkpoint_folder(spec)[0])


CHECKS = {"subject": _check_subject, "data": origin_of, "device": check_device}
