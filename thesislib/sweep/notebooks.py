"""A sweep of a notebook: one executed copy for every combination of parameters, and one table of their results."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from thesislib.errors import BadInput
from thesislib.files import write_whole
from thesislib.notebooks import check_names, ready
from thesislib.runner import cache_key, intact, results, results_cell
from thesislib.sweep.workers import Order, Workers, drive
from thesislib.tables import distinct

LARGEST = 10_000  # combinations


def combinations(axes: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """Every combination of one value a parameter."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def sweep_notebook(
    name: str,
    notebook: Path,
    axes: Mapping[str, Sequence],
    out: Path,
    workers: Workers,
    kind: type | None = None,
    reads: Mapping[str, str] | None = None,
) -> tuple[Path, dict[str, str]]:
    """Execute a notebook with every combination of parameters that is not in `out` yet.

    Args:
        name: of the notebook, for the names of files.
        notebook: its path.
        axes: {parameter: values}.
        out: the folder of the executed notebooks and the table.
        workers: see `thesislib.sweep.workers.drive`.
        kind: the class of the notebook's parameters, which checks them.
        reads: see `thesislib.runner.cache_key`.

    Returns:
        The path of the table, and {combination: why} of those that failed.

    Raises:
        BadInput: a parameter or a value that the notebook does not take, before anything runs; too many combinations;
            see also `thesislib.sweep.workers.drive`.
    """
    check_names(notebook, axes)
    results_cell(notebook)
    count = prod(map(len, axes.values()))
    if count > LARGEST:
        raise BadInput(f"these values make {count:.3g} combinations: expected at most {LARGEST:,}")
    files, orders = {}, []
    for parameters in combinations(axes):
        in_full = ready(notebook, parameters, kind)
        text = " ".join(f"{key}={json.dumps(value)}" for key, value in parameters.items()) or "defaults"
        safe = "".join(x if x.isalnum() or x in "=.-" else "_" for x in text)[:60].strip("_")
        digest = hashlib.sha256(cache_key(notebook, in_full, reads=reads).encode()).hexdigest()[:8]
        file = out / f"{name}-{safe}-{digest}.ipynb"
        files[text] = (file, parameters)
        paths = {"notebook": str(notebook.resolve()), "out": str(file.resolve())}
        order = {"do": "notebook", **paths, "parameters": in_full}
        orders.append(Order(text, file.stem, order, partial(intact, file), lambda answer: None))
    failed = drive(orders, workers, out / ".claims")
    rows = []
    for text, (file, parameters) in files.items():
        if intact(file):
            try:
                rows += [_table_row(parameters, row) for row in results(file)]
            except BadInput as error:  # the rows of the other notebooks still make a table
                failed[text] = str(error)
    if not rows:
        raise BadInput(f"no cell of the sweep ran: {'; '.join(f'{cell}: {why}' for cell, why in failed.items())}")
    import pandas as pd

    table = out / f"{name}.csv"
    write_whole(table, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    return table, failed


def _table_row(parameters: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and one row of results as a row of the table; lists and mappings are written as JSON."""
    values = [
        json.dumps(value) if isinstance(value, (list, dict)) else value
        for value in (*parameters.values(), *result.values())
    ]
    return dict(zip(distinct([*parameters, *result]), values, strict=True))
