"""What a worker does: one configuration made and measured, or one notebook executed. Texts go in and come out, so that
versions can differ and be told."""

import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import thesislib
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.speed import token_seconds
from thesislib.experiment import prepare, stage_of
from thesislib.runner import execute, intact, results

SHARED = 0.95  # of a card's memory: each process takes some besides its tensors


class OtherVersion(RuntimeError):
    """Driver and worker differ in what must agree."""


def versions() -> dict[str, str | None]:
    """What must agree between a driver and its workers."""
    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        torch = None
    return {"thesislib": thesislib.__version__, "torch": torch, "python": platform.python_version().rpartition(".")[0]}


def carry_out(order: str) -> str:
    """Do what an order says: {"versions": those of who gave it, "do": configuration or notebook, ...}; the answer as
    JSON.

    Bad input, which a second try would not mend, comes back as {"failed": why}; whatever else goes wrong is raised.

    Raises:
        OtherVersion: an order from another version of this package.
    """
    plain = json.loads(order)
    if plain["versions"] != (here := versions()):
        raise OtherVersion(
            f"the order is from {_said(plain['versions'])}, this worker has {_said(here)}: expected the same on both"
        )
    try:
        return json.dumps({"configuration": _configuration, "notebook": _notebook}[plain["do"]](plain))
    except BadInput as error:
        return json.dumps({"failed": str(error)})


def _said(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())


def _configuration(order: dict) -> dict:
    """{"rows": its measurements, with items}."""
    stages, started = [stage_of(plain) for plain in order["stages"]], time.perf_counter()
    device = card_of_worker(order["device"], order.get("per_card", 1))
    ready = prepare(order["subject"], stages, data=order["data"], dtype=order["dtype"], device=device)
    note = {**order["note"], "seconds_to_make": round(time.perf_counter() - started, 1)}  # less what the cache held
    rows = [ready.measure(Setup(**setup), order["data"], sweep=note) for setup in order["setups"]]
    if order["timed"]:
        rows.append(ready.noted(token_seconds(ready.model, order["timed"]), sweep=note))
    return {"rows": [asdict(m) for m in rows]}


def card_of_worker(device: str, per_card: int) -> str:
    """The card of this worker: local workers are numbered from 0, and cards dealt out in turns. What shares one takes
    its part of the memory."""
    import torch
    from distributed import get_worker

    if device == "cuda":
        with suppress(ValueError):  # called directly
            name = get_worker().name
            device = f"cuda:{name % torch.cuda.device_count()}" if isinstance(name, int) else device
    if device.startswith("cuda") and per_card > 1:
        torch.cuda.set_per_process_memory_fraction(SHARED / per_card, device)
    return device


def _notebook(order: dict) -> dict:
    """{"table": the rows of its cell tagged `results`}; the executed notebook is at `out`, unless it is there
    already."""
    out = Path(order["out"])
    if not intact(out):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        execute(Path(order["notebook"]), out, order["parameters"])
    return {"table": results(out)}
