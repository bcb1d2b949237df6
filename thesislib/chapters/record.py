"""A chapter's recorded run carried out: row by row, gone on with after a kill, by one process or several."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout
from tqdm import tqdm

from thesislib.chapters.chapter import Chapter, Key, Part, shape
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.experiment import DENSE, identity, identity_of, recipe_of
from thesislib.files import cache_dir, lock, real
from thesislib.notebooks import build_parameters
from thesislib.pipeline.run import Job
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources.rows import default_data, origin_of


@dataclass(frozen=True)
class Recorded:
    """What `record` did.

    Attributes:
        added: rows that it made.
        missing: rows that the record still lacks.
        busy: names of the parts that another process is at.
    """

    added: int
    missing: int
    busy: list[str]


def parameters(chapter: Chapter, given: Mapping[str, Any], data: str | None = None) -> Any:
    """Those of a chapter's recorded run, with those that are given instead.

    Args:
        chapter: which.
        given: by name.
        data: a data spec, by default `thesislib.sources.rows.default_data()`.

    Raises:
        BadInput: one that the chapter does not take; a subject of which what it measures cannot be made.
    """
    has_data = "data" in {f.name for f in dataclasses.fields(chapter.parameters)}
    if data is not None and (not has_data or "data" in given):
        why = "-p data=... is given too" if has_data else f"chapter {chapter.notebook} reads no data"
        raise BadInput(f"{why}: expected no --data")
    where = {"data": default_data() if data is None else data} if has_data else {}
    p = build_parameters(chapter.notebook, chapter.parameters, {**chapter.recorded, **where, **given}, given)
    if has_data:
        origin_of(p.data)
    if hasattr(p, "check_shape"):
        p.check_shape(shape(p.subject))
    return p


def record(chapter: Chapter, p: Any, folder: Path, limit: int | None = None) -> Recorded:
    """Carry out a chapter's recorded run: make the rows and files that a folder lacks, in order. A run that was killed
    goes on where it was.

    Of several processes each takes the parts that no other is at.

    Args:
        chapter: which.
        p: an object of its parameters' class.
        folder: of the record.
        limit: make at most so many rows.

    Raises:
        BadInput: rows there are of another subject, other data, or other parameters; whatever the chapter refuses.
    """
    store = Store(folder / f"{chapter.notebook}.jsonl")
    _check_alike(store, p)
    parts, added, busy = list(chapter.parts(p, store.path)), 0, []
    wanted = {key: n for part in parts for key, n in part.rows.items()}
    _check_parameters(store, chapter, wanted)
    _check_identities(store, chapter, p, parts)

    def missing(keys: Iterable[Key]) -> list[Key]:
        rows = store.rows(items=False).values() if store.path.exists() else ()
        have = {key for m in rows if not _of_a_sample(m, wanted[key := chapter.key(m)])}
        return [key for key in keys if key not in have]

    with tqdm(
        total=len(wanted), initial=len(wanted) - len(missing(wanted)), desc=chapter.notebook, unit="row", disable=None
    ) as bar:

        def keep(m: Measurement) -> None:
            nonlocal added
            store.append(m)
            added += 1
            bar.update()
            bar.write(f"{m.label}: {str(m).splitlines()[0]}", file=sys.stderr)

        for part in parts:
            left = None if limit is None else limit - added
            if left == 0 or not _lacks(part, missing):
                continue
            name = hashlib.sha256(f"{real(store.path)} {part.name}".encode()).hexdigest()[:16]
            try:
                with lock(cache_dir() / "records" / name).acquire(timeout=0):
                    if _lacks(part, missing):  # another process may have made it meanwhile
                        part.make(missing(part.rows)[:left], keep)
            except Timeout:
                busy.append(part.name)
    return Recorded(added, len(missing(wanted)), busy)


def _of_a_sample(m: Measurement, n: int | None) -> bool:
    """Whether a row is of an earlier run on a sample, where all items are wanted now (n is None). Such rows stay."""
    limits = m.provenance.get("protocol") or m.settings
    return n is None and limits.get("limit") is not None


def _lacks(part: Part, missing: Callable[[Iterable[Key]], list[Key]]) -> bool:
    return bool(missing(part.rows)) or (part.file is not None and not part.file.exists())


def _check_parameters(store: Store, chapter: Chapter, wanted: Mapping[Key, int | None]) -> None:
    """Raises BadInput if a store has rows that the recorded run, {key: n}, does not have, or has on more items or by
    another limit."""
    for name, m in (store.rows(items=False) if store.path.exists() else {}).items():
        try:
            key = chapter.key(m)
        except (KeyError, TypeError, ValueError):  # BadInput is a ValueError
            key = ()
        limits = m.provenance.get("protocol") or m.settings
        n = wanted.get(key)
        if key not in wanted or (n is not None and (m.n > n or limits.get("limit", n) != n)):
            raise BadInput(
                f"{store.path} has a row, {name} ({m.label}, {m.metric}, n = {m.n}), that this run does not make: "
                "expected the chapter and the parameters that it was made with, or another --out FOLDER"
            )


def _check_identities(store: Store, chapter: Chapter, p: Any, parts: Iterable[Part]) -> None:
    """Raises BadInput if a store has a row that was made or measured otherwise than the recorded run would: with other
    settings of a stage, in another dtype, on another text."""
    planned = {key: plan for part in parts for key, plan in part.planned.items()}
    rows = store.rows(items=False) if planned and store.path.exists() else {}
    job = Job.prepare(p.subject, recipe_of(()), p.data, p.dtype) if rows else None
    text = functools.cache(Setup.corpus_sha256)
    for name, m in rows.items():
        if job is None or (key := chapter.key(m)) not in planned:
            continue
        stages, setup, data = planned[key]
        if _of_a_sample(m, setup.limit):
            continue
        expected = identity(
            job.base["fingerprint"], job.dtype, origin_of(p.data), recipe_of(stages).entries(), setup, text(setup, data)
        )
        if identity_of(m) != expected:
            raise BadInput(
                f"{store.path} has a row, {name} ({m.label}, {m.metric}), that was made or measured otherwise than "
                "this run would: expected the parameters and the data that it was made with, or another --out FOLDER"
            )


def _check_alike(store: Store, p: Any) -> None:
    """Raises BadInput if a store has rows of another subject than these parameters', or rows that were made with
    another kind of data."""
    rows = list(store.rows(items=False).values()) if store.path.exists() else []
    before = {kind for m in rows if (kind := m.made.get("data"))}
    if before and (now := origin_of(p.data)) not in before:
        raise BadInput(
            f"{store.path} was made with data of kind {', '.join(sorted(before))}, this is {now}: expected "
            "--data as then, or another --out FOLDER"
        )
    bases: dict[str, dict] = {}
    for m in rows if hasattr(p, "subject") else ():
        dtype = m.provenance["dtype"]
        if dtype not in bases:
            bases[dtype] = Job.prepare(p.subject, recipe_of(()), "embedded", dtype).base
        base, then = bases[dtype], _fingerprint_of_base(m)
        if then is not None and then != base["fingerprint"]:
            raise BadInput(
                f"{store.path} holds rows of {m.provenance['subject']}, fingerprint {then[:12]}..., and this "
                f"subject is {base['name']}, {base['fingerprint'][:12]}...: expected another --out FOLDER"
            )


def _fingerprint_of_base(m: Measurement) -> str | None:
    """The fingerprint of what a row's model was made of; None if the row does not say."""
    if "base" in m.made:
        return m.made["base"]["fingerprint"]
    return m.provenance["fingerprint"] if m.made["label"] == DENSE else None
