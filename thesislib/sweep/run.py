"""A grid carried out: what its store lacks is ordered from workers, and appended as it comes."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from thesislib import corpus
from thesislib.checkpoints import Job
from thesislib.errors import BadInput
from thesislib.evaluate.protocol import Protocol, protocol_of
from thesislib.evaluate.speed import SECONDS_PER_TOKEN
from thesislib.experiment import recipe_of
from thesislib.forecast import shape_of, stand_in
from thesislib.records import Measurement
from thesislib.store import Store
from thesislib.sweep.drive import Order, Workers, drive
from thesislib.sweep.grid import Configuration, Grid

FAILED = "failed"  # the metric of a record that says why there is none


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a grid is carried out: specs of subject and data, and how the model runs; see `thesislib.experiment.prepare`."""

    subject: str = "embedded"
    data: str = "embedded"
    dtype: str = "bfloat16"
    device: str = "cpu"

    def job(self) -> Job:
        """The subject with nothing done to it yet; no weight is read.

        Raises:
            BadInput: no such subject, data, or type.
        """
        return Job.prepare(self.subject, recipe_of(()), self.data, self.dtype, self.device)


def identity(fingerprint: str, dtype: str, data: str, stages: list[dict], protocol: Protocol | str) -> str:
    """16 digits for one measurement: of what, made how, measured how. Records with the same are the same measurement.

    The batch, which changes rounding only, and the machine do not count; another subject, setting or kind of data does.
    """
    how = protocol if isinstance(protocol, str) else {**dataclasses.asdict(protocol), "batch": None}
    facts = json.dumps([fingerprint, dtype, data, stages, how], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def identity_of(m: Measurement) -> str | None:
    """The same of a record; None for one that does not say enough."""
    made = m.provenance.get("made") or {}
    try:
        protocol = m.metric if m.metric in (SECONDS_PER_TOKEN, FAILED) else protocol_of(m)
        return identity(made["base"]["fingerprint"], m.provenance["dtype"], made["data"], made["stages"], protocol)
    except (BadInput, KeyError, TypeError):
        return None


def wanted(grid: Grid, c: Configuration, place: Place, fingerprint: str) -> dict[str, str]:
    """{measure: identity} of a configuration's measurements."""
    ways: dict[str, Protocol | str] = {**c.measures, **({SECONDS_PER_TOKEN: SECONDS_PER_TOKEN} if grid.timed else {})}
    kind, plain = corpus.kind_of(place.data), _plain(c)
    return {name: identity(fingerprint, place.dtype, kind, plain, way) for name, way in ways.items()}


def known(stores: Iterable[Store]) -> set[str]:
    """Identities of all that some stores hold, failures apart."""
    rows = (m for store in stores if store.path.exists() for m in store.rows(items=False).values())
    return {name for m in rows if m.metric != FAILED and (name := identity_of(m))}


def missing(grid: Grid, place: Place, stores: Iterable[Store]) -> dict[str, list[str]]:
    """{label: measures that no store has}, in order.

    Raises:
        BadInput: configurations that cannot work on this subject, all named.
    """
    job, have = place.job(), known(stores)
    grid.check(shape_of(stand_in(job.source)))
    found = {c.label: [name for name, i in wanted(grid, c, place, job.base["fingerprint"]).items() if i not in have] for c in grid.configurations}
    return {label: names for label, names in found.items() if names}


def sweep(grid: Grid, place: Place, store: Store, workers: Workers, others: Iterable[Store] = ()) -> dict[str, str]:
    """Measure what neither `store` nor `others` hold of a grid, and append it to `store`; {label: why} of what failed, which is also recorded.

    Raises:
        BadInput, RuntimeError: see `missing` and `thesislib.sweep.drive.drive`.
    """
    others = list(others)
    lacking = missing(grid, place, [store, *others])
    job = place.job()
    base = job.base
    orders = []
    for c in grid.configurations:
        if c.label not in lacking:
            continue
        ids = wanted(grid, c, place, base["fingerprint"])
        note = {"grid": grid.name, "size": grid.size, "group": c.group, "label": c.label}
        text = {
            "do": "configuration", **dataclasses.asdict(place), "stages": _plain(c), "note": note,
            "protocols": [dataclasses.asdict(c.measures[name]) for name in lacking[c.label] if name in c.measures],
            "timed": grid.timed if SECONDS_PER_TOKEN in lacking[c.label] else None,
        }  # fmt: skip
        names = {ids[name] for name in lacking[c.label]}

        def done(names: set[str] = names) -> bool:
            return names <= known([store])

        def keep(answer: dict, store: Store = store) -> None:
            have = known([store])  # a retry, or another driver, may have been faster
            for row in answer["rows"]:
                if identity_of(m := Measurement(**row)) not in have:
                    store.append(m)

        orders.append(Order(c.label, "-".join(sorted(names))[:100], text, done, keep))
    failed = drive(orders, workers, store.path.with_name(f".{store.path.stem}.claims"))
    for c in grid.configurations:
        if c.label in failed:
            store.append(_failure(c, grid, place, base, failed[c.label]))
    return failed


def _plain(c: Configuration) -> list[dict]:
    return json.loads(json.dumps(c.recipe.plain()))  # lists, as a record has them


def _failure(c: Configuration, grid: Grid, place: Place, base: dict, why: str) -> Measurement:
    made = {"label": c.label, "stages": _plain(c), "base": base, "data": corpus.kind_of(place.data)}
    note = {"grid": grid.name, "size": grid.size, "group": c.group, "label": c.label}
    facts = {"subject": base["name"], "dtype": place.dtype, "made": made, "sweep": note, "why": why}
    return Measurement("sweep", FAILED, None, None, None, 0, "configuration", [], {}, facts)
