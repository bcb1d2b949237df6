"""A grid carried out: what its store lacks is ordered from workers, and appended as it comes."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup, setup_of
from thesislib.evaluate.speed import SECONDS_PER_TOKEN
from thesislib.experiment import recipe_of
from thesislib.pipeline.forecast import shape_of, stand_in
from thesislib.pipeline.run import Job
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources.rows import origin_of
from thesislib.sweep.grid import Configuration, Grid
from thesislib.sweep.workers import Order, Workers, drive

FAILED = "failed"  # the metric of a record that says why there is none


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a grid is carried out: specs of subject and data, and how the model runs; see
    `thesislib.experiment.prepare`."""

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


def identity(fingerprint: str, dtype: str, data: str, stages: list[dict], setup: Setup | str, text: str | None) -> str:
    """16 digits for one measurement: of what, made how, measured how on which text. Records with the same are the same
    measurement.

    Args:
        fingerprint: of what the stages began with; dtype: how it ran.
        data: the kind of data they were calibrated on or trained with; a model without stages knows none.
        stages: with all settings.
        setup: its batch, which changes rounding only, does not count; or a metric that has none.
        text: sha256 of the text or items that were measured on.
    """
    how = setup if isinstance(setup, str) else {**setup.plain(), "batch": None}
    facts = json.dumps([fingerprint, dtype, data if stages else None, stages, how, text], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _timing(repeats: int, device: str) -> str:
    """What stands for a setup where time is measured: a record of it from another kind of device, or of fewer
    repetitions, is another."""
    return f"{SECONDS_PER_TOKEN}, {repeats} on {device.partition(':')[0]}"


def identity_of(m: Measurement) -> str | None:
    """The same of a record; None for one that does not say enough."""
    made = m.provenance.get("made") or {}
    try:
        setup = (
            _timing(m.settings["repeats"], m.provenance["hardware"]["device"])
            if m.metric == SECONDS_PER_TOKEN
            else setup_of(m)
        )
        text = m.provenance.get("corpus_sha256") or m.settings.get("text_sha256")
        return identity(made["base"]["fingerprint"], m.provenance["dtype"], made["data"], made["stages"], setup, text)
    except (BadInput, KeyError, TypeError):
        return None


@dataclasses.dataclass(frozen=True)
class Setting:
    """What identities of planned measurements depend on besides the grid.

    fingerprint: of the subject. dtype: how it runs. data: kind of data for calibration and training. texts: {setup, its
    batch None: sha256 of the text that it measures on}. device: that time is measured on.
    """

    fingerprint: str
    dtype: str
    data: str
    texts: dict[Setup, str | None] = dataclasses.field(hash=False)
    device: str = "cpu"

    @classmethod
    def of(cls, grid: Grid, place: Place) -> "Setting":
        """A grid's, carried out at a place: its texts are read."""
        ways = {_plainly(way) for c in grid.configurations for way in c.measures.values()}
        texts = {way: way.corpus_sha256(place.data) for way in ways}
        return cls(place.job().base["fingerprint"], place.dtype, origin_of(place.data), texts, place.device)

    @classmethod
    def recorded(cls, rows: Iterable[Measurement], dtype: str) -> "Setting":
        """That of a recorded run of one subject, by its rows of this type: where its text is need not be known.

        Raises:
            BadInput: there are none.
        """
        every = [m for m in rows if m.metric not in (FAILED, SECONDS_PER_TOKEN)]
        rows = [m for m in every if m.provenance["dtype"] == dtype]
        if not rows:
            raise BadInput(
                f"no recorded row was made in {dtype}: expected one of "
                f"{', '.join(sorted({m.provenance['dtype'] for m in every})) or 'none at all'}"
            )
        made = [m.made for m in rows]
        kind = next((note["data"] for note in made if note["stages"]), made[0]["data"])
        return cls(
            made[0]["base"]["fingerprint"],
            dtype,
            kind,
            {_plainly(setup_of(m)): m.provenance.get("corpus_sha256") for m in rows},
        )


def _plainly(setup: Setup) -> Setup:
    return dataclasses.replace(setup, batch=None)


def wanted(grid: Grid, c: Configuration, at: Setting) -> dict[str, str]:
    """{measure: identity} of a configuration's measurements; those on a text that is not known are left out."""
    plain = _plain(c)
    ways: dict[str, tuple[Any, str | None]] = {
        name: (way, at.texts[_plainly(way)]) for name, way in c.measures.items() if _plainly(way) in at.texts
    }
    if grid.timed:
        ways[SECONDS_PER_TOKEN] = (_timing(grid.timed, at.device), None)
    return {name: identity(at.fingerprint, at.dtype, at.data, plain, way, text) for name, (way, text) in ways.items()}


def known(stores: Iterable[Store]) -> set[str]:
    """Identities of all that some stores hold, failures apart."""
    rows = (m for store in stores if store.path.exists() for m in store.rows(items=False).values())
    return {name for m in rows if m.metric != FAILED and (name := identity_of(m))}


def missing(grid: Grid, place: Place, stores: Iterable[Store]) -> dict[str, list[str]]:
    """{label: measures that no store has}, in order.

    Raises:
        BadInput: configurations that cannot work on this subject, all named. That is told from shapes, stage by stage.
    """
    at, have = Setting.of(grid, place), known(stores)
    found = {c.label: [name for name, i in wanted(grid, c, at).items() if i not in have] for c in grid.configurations}
    lacking = {label: names for label, names in found.items() if names}
    fits = _fitting(place)
    grid.check(lambda c: fits(c) if c.label in lacking else None)  # what was measured can work
    return lacking


def possible(grid: Grid, place: Place) -> tuple[Grid, dict[str, str]]:
    """The grid less the configurations that cannot work on this subject, and {label: why} of those."""
    fits, kept, why = _fitting(place), [], {}
    for c in grid.configurations:
        try:
            fits(c)
            kept.append(c)
        except BadInput as error:
            why[c.label] = str(error)
    return dataclasses.replace(grid, configurations=tuple(kept)), why


def _fitting(place: Place) -> Callable[[Configuration], None]:
    """What raises BadInput for a configuration that cannot work at a place."""
    job = place.job()
    shape = shape_of(stand_in(job.source))

    def fits(c: Configuration) -> None:
        c.recipe.check(shape)
        dataclasses.replace(job, recipe=c.recipe).forecast()

    return fits


def sweep(grid: Grid, place: Place, store: Store, workers: Workers, others: Iterable[Store] = ()) -> dict[str, str]:
    """Measure what neither `store` nor `others` hold of a grid, and append it to `store`; {label: why} of what failed,
    which is also recorded.

    Raises:
        BadInput, RuntimeError: see `missing` and `thesislib.sweep.workers.drive`.
    """
    others = list(others)
    lacking = missing(grid, place, [store, *others])
    base, at = place.job().base, Setting.of(grid, place)
    orders = []
    for c in grid.configurations:
        if c.label not in lacking:
            continue
        ids = wanted(grid, c, at)
        note = {"grid": grid.name, "size": grid.size, "group": c.group, "label": c.label}
        text = {
            "do": "configuration", **dataclasses.asdict(place), "stages": _plain(c), "note": note,
            "setups": [c.measures[name].plain() for name in lacking[c.label] if name in c.measures],
            "timed": grid.timed if SECONDS_PER_TOKEN in lacking[c.label] else None,
        }  # fmt: skip
        names = {ids[name] for name in lacking[c.label]}

        def done(names: set[str] = names) -> bool:
            return names <= known([store])

        def keep(answer: dict) -> None:
            have = known([store])  # a retry may have been faster
            for row in answer["rows"]:
                if identity_of(m := Measurement(**row)) not in have:
                    store.append(m)

        def fail(why: str, c: Configuration = c) -> None:
            store.append(_failure(c, grid, place, base, why))

        # by what is made: two drivers that want different measures of one model do not make it at once
        claim = identity(at.fingerprint, at.dtype, at.data, _plain(c), "any", None)
        orders.append(Order(c.label, claim, text, done, keep, fail))
    return drive(orders, workers, store.path.with_name(f".{store.path.stem}.claims"))


def _plain(c: Configuration) -> list[dict]:
    return json.loads(json.dumps(c.recipe.entries()))  # lists, as a record has them


def _failure(c: Configuration, grid: Grid, place: Place, base: dict, why: str) -> Measurement:
    made = {"label": c.label, "stages": _plain(c), "base": base, "data": origin_of(place.data)}
    note = {"grid": grid.name, "size": grid.size, "group": c.group, "label": c.label}
    facts = {"subject": base["name"], "dtype": place.dtype, "made": made, "sweep": note, "why": why}
    return Measurement(
        task="sweep",
        metric=FAILED,
        value=None,
        low=None,
        high=None,
        n=0,
        unit="configuration",
        items=[],
        provenance=facts,
    )
