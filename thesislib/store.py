"""Recorded measurements: rows appended to a JSON Lines file, their items compressed in a file beside it, nothing rewritten.

A row has `schema`, `id` (of its own content), what was measured (`label`, `recipe`, `stage`, `task`, `metric`), the number
(`value`, `low`, `high`, `n`, `unit`), `extra`, `provenance`, and `items`: where in NAME.items.gz its outcomes lie, as one
gzip member, and their sha256. So a line can be read by eye, and by anything that reads JSON.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from thesislib.errors import BadInput, unknown
from thesislib.files import data_file, expanded, write_whole
from thesislib.records import Measurement

SCHEMA = 1
FIELDS = ("task", "metric", "value", "low", "high", "n", "unit", "extra", "provenance")


@dataclass(frozen=True)
class Damage:
    """A line that could not be read (a process died while it wrote, a disk failed), and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Store:
    """The rows of one file, NAME.jsonl, and their items in NAME.items.gz.

    Any number of processes may append at a time: each row is written under a lock, its items first, so that what a
    killed process leaves behind is bytes that no row points to, or an unfinished last line.
    """

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", expanded(self.path))
        if self.path.suffix != ".jsonl":
            raise BadInput(f"{self.path} is no file of records: expected a name that ends in .jsonl")

    @classmethod
    def new(cls, path: Path) -> "Store":
        """A store for a run that is recorded at one go.

        Raises:
            BadInput: there is such a file already.
        """
        store = cls(path)
        if store.path.exists():
            raise BadInput(f"{path} holds a recorded run already: expected a new file, since nothing recorded is overwritten")
        return store

    @property
    def items(self) -> Path:
        """Where the outcomes lie."""
        return self.path.with_suffix(".items.gz")

    def append(self, m: Measurement) -> str:
        """Add a row; its id. What is there already, to the last digit and second, is not added again.

        A number of the row that is not finite becomes null, since JSON has no word for it.

        Raises:
            BadInput: the disk is full, or the file cannot be written; the rows before are as they were.
        """
        packed = gzip.compress("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in m.items).encode(), mtime=0)
        plain = json.loads(json.dumps({field: getattr(m, field) for field in FIELDS}), parse_constant=lambda _: None)
        made = plain["provenance"].get("made") or {}
        row: dict[str, Any] = {"label": made.get("label"), "recipe": made.get("recipe"), "stage": made.get("stage")}
        row |= {field: plain[field] for field in FIELDS}
        digest = hashlib.sha256(packed).hexdigest()
        name = hashlib.sha256(json.dumps([row, digest], sort_keys=True).encode()).hexdigest()[:12]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                if any(row.get("id") == name for _, row in self._lines([])):
                    return name
                offset = _append(self.items, packed)
                row = {"schema": SCHEMA, "id": name, **row, "items": {"offset": offset, "bytes": len(packed), "sha256": digest}}
                try:
                    _append(self.path, json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n", new_line=True)
                except OSError:
                    _cut(self.items, offset)  # tried again and again, the items alone would fill what is left of the disk
                    raise
        except OSError as error:
            raise BadInput(f"{self.path} cannot be added to ({error.strerror}): free some space there, or write to another folder") from error
        return name

    def rows(self, items: bool = True) -> dict[str, Measurement]:
        """The measurements by id, in the order of the file; without items, what is in the other file is not read.

        Damaged rows are left out and reported on stderr.

        Raises:
            BadInput: no such file, or one that a newer version of this package wrote.
        """
        found, damage = self.read(items)
        for d in damage:
            print(f"{self.path}, line {d.line}: left out, {d.reason}", file=sys.stderr, flush=True)
        return found

    def read(self, items: bool = True) -> tuple[dict[str, Measurement], list[Damage]]:
        """As `rows`, the damage returned instead of reported."""
        if not self.path.is_file():
            raise BadInput(f"there is no file of records {self.path}")
        found: dict[str, Measurement] = {}
        damage: list[Damage] = []
        for line, row in self._lines(damage):
            try:
                if not (isinstance(row["id"], str) and isinstance(row["provenance"], dict)):
                    raise TypeError("its id or provenance is of another kind")
                if not all(row[key] is None or isinstance(row[key], (int, float)) for key in ("value", "low", "high")):
                    raise TypeError("its value or a bound is no number")
                outcomes = self._outcomes(row["items"]) if items else []
                found[row["id"]] = Measurement(**{field: row[field] for field in FIELDS}, items=outcomes)
            except (KeyError, TypeError) as error:
                damage.append(Damage(line, f"it is not a row of records ({type(error).__name__}: {error})"))
            except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error) as error:  # also of a length in the row
                damage.append(Damage(line, f"its items in {self.items.name} are damaged ({error})"))
        return found, sorted(damage, key=lambda d: d.line)

    def _lines(self, damage: list[Damage]) -> Iterator[tuple[int, dict]]:
        """Line number and row of every line that is one; the others are added to `damage`."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.split(b"\n")
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except (ValueError, RecursionError) as error:
                torn = n == len(lines)
                damage.append(Damage(n, "it was not written to its end" if torn else f"it cannot be read as JSON ({error})"))
                continue
            if isinstance(row.get("schema"), int) and row["schema"] > SCHEMA:
                raise BadInput(f"{self.path}, line {n}, has schema {row['schema']}: this version of thesislib reads up to {SCHEMA}; a newer one wrote it")
            yield n, row

    def _outcomes(self, where: dict) -> list[dict]:
        with self.items.open("rb") as file:
            file.seek(where["offset"])
            packed = file.read(where["bytes"])
        if hashlib.sha256(packed).hexdigest() != where["sha256"]:
            raise ValueError("their sha256 is another")
        return [json.loads(line) for line in gzip.decompress(packed).splitlines()]  # bytes: a text also ends lines at U+2028, which JSON leaves as it is


def _append(path: Path, content: bytes, new_line: bool = False) -> int:
    """Add bytes at a file's end and say where they begin; with `new_line`, a line that was not ended is ended first.

    If the disk is full, the file is cut back to what it was.
    """
    with path.open("ab", buffering=0) as file:  # what a buffer could not write, it would write when it is closed, into the space just freed
        end = file.seek(0, os.SEEK_END)
        if new_line and end:
            with path.open("rb") as before:
                before.seek(end - 1)
                content = content if before.read() == b"\n" else b"\n" + content
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            _cut(path, end)
            raise
    return end


def _cut(path: Path, end: int) -> None:
    """Make a file as long as it was; one that was empty goes, so that a run may begin there again (`Store.new`)."""
    if end:
        os.truncate(path, end)
    else:
        path.unlink()


def stores(places: Iterable[str | Path]) -> list[Store]:
    """The stores in files and folders.

    Raises:
        BadInput: no such file or folder, or a folder without any.
    """
    found = []
    for place in map(Path, places):
        files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
        if not files:
            raise BadInput(f"{place} holds no records: expected .jsonl files")
        if not files[0].is_file():
            raise BadInput(f"there is no file of records {place}")
        found += map(Store, files)
    return found


def find(name: str, places: Iterable[Store]) -> Measurement:
    """The one row whose id begins with `name`.

    Raises:
        BadInput: no row or several, or one whose items are damaged.
    """
    known = {row: store for store in places for row in store.rows(items=False)}
    matching = [row for row in known if row.startswith(name)] if name else []
    if not matching:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise BadInput(f"no record has the id '{name}'{f': did you mean {near[0]}?' if near else ''} `thesislib records` lists all {len(known)}")
    if len(matching) > 1:
        raise BadInput(f"'{name}' begins the ids of {len(matching)} records, {', '.join(matching[:3])}, ...: expected more of the id")
    store = known[matching[0]]
    whole, _ = store.read()
    if matching[0] not in whole:
        raise BadInput(f"the items of record {matching[0]} are damaged or gone: expected them whole in {store.items}, as they were written")
    return whole[matching[0]]


def study() -> Path:
    """The folder of this study's own records."""
    return data_file("results")


def select(places: Iterable[Store], *, label: str | None = None, task: str | None = None, metric: str | None = None) -> dict[str, Measurement]:
    """Rows by id, without items: those of one label, with `task` in their task's name, of one metric.

    Raises:
        BadInput: none is left; the message lists the labels, tasks or metrics there are, the nearest first.
    """
    found = {name: m for store in places for name, m in store.rows(items=False).items()}
    for what, wanted, fits in (
        ("label", label, lambda row: row["label"] == label),
        ("task", task, lambda row: task.lower() in row["task"].lower()),
        ("metric", metric, lambda row: row["metric"] == metric),
    ):
        if wanted is not None:
            kept = {name: m for name, m in found.items() if fits(flat(name, m))}
            if not kept:
                names = {flat(name, m)[what] for name, m in found.items()}
                if what == "task":  # a part of a name will do, and its beginning is what one types
                    names |= {name.split(",")[0].split(" ")[0] for name in names}
                raise unknown(f"{what} of records", wanted, sorted(names))
            found = kept
    return found


def flat(name: str, m: Measurement) -> dict[str, Any]:
    """A row without nesting: for a table. What the record does not say is None, and "?" for the label."""
    run = m.provenance
    made, settings, protocol, hardware, versions = (run.get(key) or {} for key in ("made", "settings", "protocol", "hardware", "versions"))
    sizes = made.get("bytes") or {}
    row = {"id": name, "label": made.get("label") or "?", "recipe": made.get("recipe"), "stage": made.get("stage")}
    row |= {"subject": run.get("subject"), "fingerprint": run.get("fingerprint"), "task": m.task, "metric": m.metric}
    row |= {key: settings.get(key) for key in ("length", "limit", "prompt")}
    row |= {key: getattr(m, key) for key in ("value", "low", "high", "n", "unit")}
    row |= {"seed": protocol.get("seed"), "dtype": run.get("dtype"), "device": hardware.get("accelerator") or hardware.get("cpu")}
    row |= {key: sizes.get(key) for key in ("bytes_on_disk", "parameters", "nonzero_parameters")}
    row |= {"threads": hardware.get("torch_threads"), "peak_memory": run.get("peak_memory"), "seconds": run.get("seconds")}
    row |= {"torch": versions.get("torch"), "thesislib": versions.get("thesislib"), "commit": run.get("commit")}
    return {**row, "time": run.get("time", run.get("date"))}


def write_csv(found: Mapping[str, Measurement], path: Path) -> None:
    """One row a measurement, columns as in `flat`.

    Raises:
        BadInput: no measurement, or a path that cannot be written.
    """
    rows = [flat(name, m) for name, m in found.items()]
    if not rows:
        raise BadInput(f"there are no records to write to {path}")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_whole(path, text.getvalue())
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}): expected a new file's name in a folder that can be written") from error
