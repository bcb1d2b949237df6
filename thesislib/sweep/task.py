"""What a worker does: make and measure one configuration, or execute one notebook.

An order and its answer are JSON texts, so that a worker of another version can read enough of an order to refuse it.
"""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import thesislib
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.experiment import prepare, stage_of
from thesislib.records.measurement import Measurement
from thesislib.runner import execute, intact, results

MEMORY_FOR_TENSORS = 0.95  # of a card; each process takes some memory besides its tensors


class OtherVersion(RuntimeError):
    """Driver and worker have different versions of a package whose versions must agree."""


def versions() -> dict[str, str | None]:
    """The versions that a driver and its workers must have in common; minor versions of Python."""
    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        torch = None
    return {"thesislib": thesislib.__version__, "torch": torch, "python": platform.python_version().rpartition(".")[0]}


def carry_out(order: str) -> str:
    """Carry out an order; the answer, as JSON.

    Bad input comes back as {"failed": why}, since a second try would not mend it. Any other error is raised.

    Args:
        order: JSON with "versions", those of the driver; "do", configuration or notebook; and the order's own fields.

    Raises:
        OtherVersion: an order from another version of this package.
    """
    fields = json.loads(order)
    if fields["versions"] != (here := versions()):
        raise OtherVersion(
            f"the order is from {in_words(fields['versions'])}, this worker has {in_words(here)}: expected the same on "
            "both"
        )
    try:
        return json.dumps({"configuration": _configuration, "notebook": _notebook}[fields["do"]](fields))
    except BadInput as error:
        return json.dumps({"failed": str(error)})


def in_words(versions: Mapping[str, str | None]) -> str:
    """Versions for a message, e.g. "thesislib 0.1.0, torch 2.13.0"."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def measure_cell(
    subject: str,
    stages: Sequence,
    setups: Iterable[Setup],
    cell: dict[str, str],
    *,
    data: str,
    dtype: str,
    device: str,
    timed: int | None = None,
) -> Iterator[Measurement]:
    """Make one configuration of a grid and measure it; each record as soon as it is measured.

    Args:
        subject, stages, data, dtype, device: see `thesislib.experiment.prepare`.
        setups: how it is measured.
        cell: see `thesislib.sweep.grid.Grid.cell`.
        timed: over how many tokens the seconds of a token are measured; None for no timing.
    """
    started = time.perf_counter()
    ready = prepare(subject, stages, data=data, dtype=dtype, device=device)
    noted = {**cell, "seconds_to_make": round(time.perf_counter() - started, 1)}  # stages in the cache take no time
    for setup in setups:
        yield ready.measure(setup, data, sweep=noted)
    if timed:
        yield ready.time(timed, sweep=noted)


def _configuration(order: dict) -> dict:
    """{"rows": the measurements of a configuration, with items}."""
    measurements = measure_cell(
        order["subject"],
        [stage_of(stage) for stage in order["stages"]],
        [Setup(**setup) for setup in order["setups"]],
        order["cell"],
        data=order["data"],
        dtype=order["dtype"],
        device=card_of_worker(order["device"], order.get("per_card", 1)),
        timed=order["timed"],
    )
    return {"rows": [asdict(m) for m in measurements]}


def card_of_worker(device: str, per_card: int) -> str:
    """The card that this worker uses. Local workers are numbered from 0, and cards are dealt out in turns.

    Workers that share a card each get their part of its memory.
    """
    import torch
    from distributed import get_worker

    if device == "cuda":
        with suppress(ValueError):  # called directly
            name = get_worker().name
            device = f"cuda:{name % torch.cuda.device_count()}" if isinstance(name, int) else device
    if device.startswith("cuda") and per_card > 1:
        torch.cuda.set_per_process_memory_fraction(MEMORY_FOR_TENSORS / per_card, device)
    return device


def _notebook(order: dict) -> dict:
    """{"table": the rows of the notebook's cell tagged `results`}; a notebook that was executed before is only
    read."""
    out = Path(order["out"])
    if not intact(out):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        execute(Path(order["notebook"]), out, order["parameters"])
    return {"table": results(out)}
