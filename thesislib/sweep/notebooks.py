"""A notebook swept: one executed copy for every combination of parameters, and one table of what their results cells
show."""

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
from thesislib.notebooks import check_names, distinct, ready
from thesislib.runner import cache_key, intact, results, results_cell
from thesislib.sweep.workers import Order, Workers, drive

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
    """Execute a notebook with every combination of parameters that is not in `out` yet; the table's path, and {cell:
    why} of those that failed.

    Raises:
        BadInput: a parameter or a value that the notebook does not take, before anything runs; too many combinations;
            see also `thesislib.sweep.workers.drive`.
    """
    check_names(notebook, axes)
    results_cell(notebook)
    count = prod(map(len, axes.values()))
    if count > LARGEST:
        raise BadInput(f"these values make {count:.3g} combinations: expected at most {LARGEST:,}")
    files = {}
    for parameters in combinations(axes):
        in_full = ready(notebook, parameters, kind)
        written = " ".join(f"{key}={json.dumps(value)}" for key, value in parameters.items()) or "defaults"
        safe = "".join(x if x.isalnum() or x in "=.-" else "_" for x in written)[:60].strip("_")
        digest = hashlib.sha256(cache_key(notebook, in_full, reads=reads).encode()).hexdigest()[:8]
        files[written] = (out / f"{name}-{safe}-{digest}.ipynb", parameters, in_full)
    orders = []
    for written, (file, _, in_full) in files.items():
        text = {
            "do": "notebook",
            "notebook": str(notebook.resolve()),
            "out": str(file.resolve()),
            "parameters": in_full,
        }
        orders.append(Order(written, file.stem, text, partial(intact, file), lambda answer: None))
    failed = drive(orders, workers, out / ".claims")
    found = []
    for written, (file, parameters, _) in files.items():
        if intact(file):
            try:
                found += [(parameters, row) for row in results(file)]
            except BadInput as error:  # the others' rows are a table all the same
                failed[written] = str(error)
    rows = [
        dict(zip(distinct([*parameters, *row]), [*parameters.values(), *row.values()], strict=True))
        for parameters, row in found
    ]
    if not rows:
        raise BadInput(f"no cell of the sweep ran: {'; '.join(f'{cell}: {why}' for cell, why in failed.items())}")
    import pandas as pd

    frame = pd.DataFrame(
        [
            {key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in row.items()}
            for row in rows
        ]
    )
    table = out / f"{name}.csv"
    write_whole(table, frame.to_csv(index=False, lineterminator="\n"))
    return table, failed
