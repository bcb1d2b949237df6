"""A grid carried out: measurements that its store lacks are ordered from workers, and appended as they come."""

import dataclasses
from collections.abc import Callable, Iterable

from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup, setup_of
from thesislib.evaluate.speed import SECONDS_PER_TOKEN
from thesislib.experiment import Conditions, identity_of, recipe_of, without_batch
from thesislib.pipeline.forecast import shape_of, stand_in
from thesislib.pipeline.run import Job
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources.rows import origin_of
from thesislib.sweep.grid import Configuration, Grid
from thesislib.sweep.workers import Order, Workers, drive

FAILED = "failed"  # the metric of a record that says why a configuration has no measurement


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that a grid is carried out on, and where; see `thesislib.experiment.prepare`.

    Attributes:
        subject: a subject spec.
        data: a data spec.
        dtype: in which the model runs.
        device: a torch device.
    """

    subject: str = "embedded"
    data: str = "embedded"
    dtype: str = "bfloat16"
    device: str = "cpu"

    def job(self) -> Job:
        """The subject before any stage; no weight is read.

        Raises:
            BadInput: no such subject, data, or type.
        """
        return Job.prepare(self.subject, recipe_of(()), self.data, self.dtype, self.device)


def conditions(grid: Grid, target: Target) -> Conditions:
    """What the identities of a grid's measurements have in common; the texts that it measures on are read."""
    setups = [setup for c in grid.configurations for setup in c.measures.values()]
    return Conditions.of(target.job(), target.data, setups)


def recorded_conditions(rows: Iterable[Measurement], dtype: str) -> Conditions:
    """The conditions of a recorded run of one subject, from its rows of this dtype; no text is read.

    Raises:
        BadInput: there are no such rows.
    """
    every = [m for m in rows if m.metric not in (FAILED, SECONDS_PER_TOKEN)]
    rows = [m for m in every if m.provenance["dtype"] == dtype]
    if not rows:
        raise BadInput(
            f"no recorded row was made in {dtype}: expected one of "
            f"{', '.join(sorted({m.provenance['dtype'] for m in every})) or 'none at all'}"
        )
    histories = [m.made for m in rows]
    data = next((h["data"] for h in histories if h["stages"]), histories[0]["data"])
    texts = {without_batch(setup_of(m)): m.provenance.get("corpus_sha256") for m in rows}
    return Conditions(histories[0]["base"]["fingerprint"], dtype, data, texts)


def wanted(grid: Grid, c: Configuration, shared: Conditions) -> dict[str, str]:
    """{measure: identity} of a configuration's measurements; those on a text that is not known are left out."""
    setups: dict[str, Setup | int] = {**c.measures, **({SECONDS_PER_TOKEN: grid.timed} if grid.timed else {})}
    names = {measure: shared.identity(c.recipe.stages, setup) for measure, setup in setups.items()}
    return {measure: name for measure, name in names.items() if name is not None}


def by_identity(rows: Iterable[Measurement]) -> dict[str, Measurement]:
    """The rows that have an identity, by it; of several with one the first. Records of failures have none."""
    named: dict[str, Measurement] = {}
    for m in rows:
        if m.metric != FAILED and (name := identity_of(m)):
            named.setdefault(name, m)
    return named


def known(stores: Iterable[Store]) -> set[str]:
    """The identities of all measurements in some stores."""
    return set(by_identity(m for s in stores if s.path.exists() for m in s.rows(items=False).values()))


def missing(grid: Grid, target: Target, stores: Iterable[Store]) -> dict[str, list[str]]:
    """{label: measures that no store has}, in order.

    Raises:
        BadInput: configurations that cannot work on this subject, all named; shapes alone tell it.
    """
    shared, have = conditions(grid, target), known(stores)
    lacking = {}
    for c in grid.configurations:
        if measures := [measure for measure, name in wanted(grid, c, shared).items() if name not in have]:
            lacking[c.label] = measures
    fits = _fitting(target)
    grid.check(lambda c: fits(c) if c.label in lacking else None)  # what was measured can work
    return lacking


def possible(grid: Grid, target: Target) -> tuple[Grid, dict[str, str]]:
    """The grid less the configurations that cannot work on this subject, and {label: why} of those."""
    fits, kept, why = _fitting(target), [], {}
    for c in grid.configurations:
        try:
            fits(c)
            kept.append(c)
        except BadInput as error:
            why[c.label] = str(error)
    return dataclasses.replace(grid, configurations=tuple(kept)), why


def _fitting(target: Target) -> Callable[[Configuration], None]:
    """A check that raises BadInput for a configuration that cannot work on a target."""
    job = target.job()
    shape = shape_of(stand_in(job.source))

    def fits(c: Configuration) -> None:
        c.recipe.check(shape)
        dataclasses.replace(job, recipe=c.recipe).forecast()

    return fits


def sweep(grid: Grid, target: Target, store: Store, workers: Workers, others: Iterable[Store] = ()) -> dict[str, str]:
    """Measure what neither `store` nor `others` hold of a grid, and append it to `store`; {label: why} of the
    configurations that failed, each of which is also recorded.

    Raises:
        BadInput, RuntimeError: see `missing` and `thesislib.sweep.workers.drive`.
    """
    lacking = missing(grid, target, [store, *others])
    base, shared = target.job().base, conditions(grid, target)
    orders = [
        _order(grid, c, lacking[c.label], target, shared, base, store)
        for c in grid.configurations
        if c.label in lacking
    ]
    return drive(orders, workers, store.path.with_name(f".{store.path.stem}.claims"))


def _order(
    grid: Grid, c: Configuration, measures: list[str], target: Target, shared: Conditions, base: dict, store: Store
) -> Order:
    """The order to make one configuration and to measure it by `measures`, into a store."""
    names = {name for measure, name in wanted(grid, c, shared).items() if measure in measures}

    def done() -> bool:
        return names <= known([store])

    def keep(answer: dict) -> None:
        have = known([store])  # a retry may have been faster
        for row in answer["rows"]:
            if identity_of(m := Measurement(**row)) not in have:
                store.append(m)

    def fail(why: str) -> None:
        store.append(_failure(grid, c, target, base, why))

    text = {
        "do": "configuration",
        **dataclasses.asdict(target),
        "stages": c.recipe.entries(),
        "cell": grid.cell(c),
        "setups": [c.measures[measure].plain() for measure in measures if measure in c.measures],
        "timed": grid.timed if SECONDS_PER_TOKEN in measures else None,
    }
    # claimed by what is made: two drivers that want different measures of one model do not make it at once
    return Order(c.label, shared.of_model(c.recipe.stages), text, done, keep, fail)


def _failure(grid: Grid, c: Configuration, target: Target, base: dict, why: str) -> Measurement:
    """The record of a configuration that could not be made or measured."""
    history = {"label": c.label, "stages": c.recipe.entries(), "base": base, "data": origin_of(target.data)}
    return Measurement(
        task="sweep",
        metric=FAILED,
        value=None,
        low=None,
        high=None,
        n=0,
        unit="configuration",
        items=[],
        provenance={
            "subject": base["name"],
            "dtype": target.dtype,
            "made": history,
            "sweep": grid.cell(c),
            "why": why,
        },
    )
