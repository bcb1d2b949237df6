"""A notebook swept: one executed copy for every combination of parameters, and one table of what their results cells show."""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from thesislib.errors import BadInput
from thesislib.files import write_whole
from thesislib.notebooks import check_names, read_notebook, ready
from thesislib.sweep.workers import Order, Workers, drive

TAG = "results"  # of the cell whose table is a notebook's result
LARGEST = 10_000  # combinations


def combinations(axes: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """Every combination of one value a parameter."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def results_cell(notebook: Path):
    """The one cell that is tagged `results`.

    Raises:
        BadInput: none is, or several.
    """
    cells = [c for c in read_notebook(notebook).cells if TAG in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise BadInput(f"{notebook.name} has {len(cells)} cells tagged '{TAG}': expected one, that shows its table of results")
    return cells[0]


def results(notebook: Path) -> list[dict[str, Any]]:
    """The rows of the table that a notebook's cell tagged `results` shows.

    Raises:
        BadInput: no such cell, or no table in its output.
    """
    import pandas as pd

    for output in results_cell(notebook).get("outputs", []):
        if html := output.get("data", {}).get("text/html"):
            table = pd.read_html(io.StringIO("".join(html)))[0]
            if isinstance(table.columns, pd.MultiIndex):  # headings in levels; an index with a name has a row of its own
                table.columns = [", ".join(dict.fromkeys(str(x) for x in names if not str(x).startswith("Unnamed"))) for names in table.columns]
            table.columns = _distinct(table.columns)
            return json.loads(table.to_json(orient="records"))
    raise BadInput(f"the cell tagged '{TAG}' of {notebook.name} shows no table: expected a DataFrame as its last line")


def _distinct(names: Iterable[str]) -> list[str]:
    """Names, those that are there already with a number."""
    found: list[str] = []
    for name in names:
        taken = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({taken + 1})" if name in found else name)
    return found


def sweep_notebook(name: str, notebook: Path, axes: Mapping[str, Sequence], out: Path, workers: Workers) -> tuple[Path, dict[str, str]]:
    """Execute a notebook with every combination of parameters that is not in `out` yet; the table's path, and {cell: why} of those that failed.

    Raises:
        BadInput: a parameter or a value that the notebook does not take, before anything runs; too many combinations; see also `thesislib.sweep.workers.drive`.
    """
    from thesislib.book import cache_key, intact

    check_names(notebook, axes)
    results_cell(notebook)
    count = prod(map(len, axes.values()))
    if count > LARGEST:
        raise BadInput(f"these values make {count:.3g} combinations: expected at most {LARGEST:,}")
    files = {}
    for parameters in combinations(axes):
        in_full = ready(notebook, parameters)
        written = " ".join(f"{key}={json.dumps(value)}" for key, value in parameters.items()) or "defaults"
        safe = "".join(x if x.isalnum() or x in "=.-" else "_" for x in written)[:60].strip("_")
        digest = hashlib.sha256(cache_key(notebook, in_full).encode()).hexdigest()[:8]
        files[written] = (out / f"{name}-{safe}-{digest}.ipynb", parameters, in_full)
    orders = []
    for written, (file, _, in_full) in files.items():
        text = {"do": "notebook", "notebook": str(notebook.resolve()), "out": str(file.resolve()), "parameters": in_full}
        orders.append(Order(written, file.stem, text, partial(intact, file), lambda answer: None))
    failed = drive(orders, workers, out / ".claims")
    found = []
    for written, (file, parameters, _) in files.items():
        if intact(file):
            try:
                found += [(parameters, row) for row in results(file)]
            except BadInput as error:  # the others' rows are a table all the same
                failed[written] = str(error)
    rows = [dict(zip(_distinct([*parameters, *row]), [*parameters.values(), *row.values()], strict=True)) for parameters, row in found]
    if not rows:
        raise BadInput(f"no cell of the sweep ran: {'; '.join(f'{cell}: {why}' for cell, why in failed.items())}")
    import pandas as pd

    frame = pd.DataFrame([{key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in row.items()} for row in rows])
    table = out / f"{name}.csv"
    write_whole(table, frame.to_csv(index=False, lineterminator="\n"))
    return table, failed
