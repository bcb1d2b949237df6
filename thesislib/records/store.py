"""Recorded measurements: rows appended to a JSON Lines file, their items compressed in a file beside it.

Nothing is ever rewritten.

A row has `schema`; `id`, a hash of its content; `label`, `recipe`, `stage`, `task`, `metric`; the number (`value`,
`low`, `high`, `n`, `unit`); `extra`; `provenance`; and `items`, the offset, length and sha256 of its outcomes in
NAME.items.gz, where they are one gzip member. People and any JSON parser can read a row.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from thesislib.errors import BadInput, unknown
from thesislib.files import check_ordinary, data_file, expanded, explain_errors, write_whole
from thesislib.records.measurement import Measurement
from thesislib.shapes import SHA256, natural, positive, wrong

SCHEMA = 1
FIELDS = ("task", "metric", "value", "low", "high", "n", "unit", "extra", "provenance")
LARGEST = 2**28  # bytes at most, of one row's outcomes unpacked and of a whole file of rows


# errors that a damaged file of outcomes can cause
UNREADABLE = (OSError, EOFError, ValueError, TypeError, OverflowError, MemoryError, RecursionError, zlib.error)


def _known_schema(value: Any) -> bool:
    """1, or another that this version knows"""
    return type(value) is int and 1 <= value <= SCHEMA


OPTIONAL_TEXT = (None, str)
MADE = {
    "label?": OPTIONAL_TEXT,
    "recipe?": OPTIONAL_TEXT,
    "stage?": OPTIONAL_TEXT,
    "stages?": [{str: dict}],
    "base?": {"name?": str, "fingerprint?": str},
    "data?": str,
    "bytes?": (None, {str: (None, natural)}),
    "reports?": [dict],
}
PROVENANCE = {
    "subject?": str,
    "fingerprint?": str,
    "plan?": (None, [natural]),
    "dtype?": str,
    "corpus_sha256?": OPTIONAL_TEXT,
    "commit?": OPTIONAL_TEXT,
    "settings?": {
        "length?": natural,
        "limit?": (None, natural),
        "prompt?": (None, str, natural),
        "batch?": (None, natural),
        "open_book?": bool,
        "protocol?": str,
        "text_sha256?": OPTIONAL_TEXT,
        "repeats?": natural,
    },
    "protocol?": {"on": str, "seed?": int},
    "versions?": {str: str},
    "tolerance?": {"absolute?": positive, "relative?": positive},
    "hardware?": {
        "cpu?": OPTIONAL_TEXT,
        "cores?": (None, natural),
        "torch_threads?": natural,
        "accelerator?": OPTIONAL_TEXT,
        "device?": str,
    },
    "date?": str,
    "time?": str,
    "seconds?": positive,
    "peak_memory?": natural,
    "sweep?": dict,
    "chapter?": dict,
    "made?": (None, MADE),
    "origin?": str,
}
ROW = {
    "schema": _known_schema,
    "id": re.compile("[0-9a-f]{12}"),
    "label": OPTIONAL_TEXT,
    "recipe": OPTIONAL_TEXT,
    "stage": OPTIONAL_TEXT,
    "task": str,
    "metric": str,
    "value": (None, float),
    "low": (None, float),
    "high": (None, float),
    "n": natural,
    "unit": str,
    "extra": dict,
    "provenance": PROVENANCE,
    "items": {"offset": natural, "bytes": natural, "sha256": SHA256},
}


@dataclass(frozen=True)
class Damage:
    """A line that could not be read, as where a process died while it wrote or a disk failed.

    Attributes:
        line: its number.
        reason: why it could not be read.
        id: of the row, if that could be read.
    """

    line: int
    reason: str
    id: str = ""


@dataclass(frozen=True)
class Store:
    """The rows of one file, NAME.jsonl, and their items in NAME.items.gz.

    Any number of processes may append at a time. Each row is written under a lock, its items first. So a killed process
    leaves behind at most bytes that no row points to, or an unfinished last line.

    Attributes:
        path: of the rows.
    """

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", expanded(self.path))
        if self.path.suffix != ".jsonl":
            raise BadInput(f"{self.path} is no file of records: expected a name that ends in .jsonl")

    @classmethod
    def new(cls, path: Path) -> "Store":
        """A store for a run that is recorded all at once.

        Raises:
            BadInput: the file exists.
        """
        store = cls(path)
        if store.path.exists():
            raise BadInput(
                f"{path} holds a recorded run already: expected a new file, since nothing recorded is overwritten"
            )
        return store

    @property
    def items(self) -> Path:
        """The file of the outcomes."""
        return self.path.with_suffix(".items.gz")

    def append(self, m: Measurement) -> str:
        """Add a row, and return its id. A row that is there already, equal to the last digit and second, is not added.

        A number that is not finite becomes null, since JSON has no such numbers.

        Raises:
            BadInput: the disk is full, or the file cannot be written; the earlier rows are unchanged.
        """
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in m.items)
        packed = gzip.compress(text.encode(), mtime=0)
        fields = json.loads(json.dumps({field: getattr(m, field) for field in FIELDS}), parse_constant=lambda _: None)
        history = fields["provenance"].get("made") or {}
        row: dict[str, Any] = {key: history.get(key) for key in ("label", "recipe", "stage")}
        row |= fields
        digest = hashlib.sha256(packed).hexdigest()
        name = _id(row, digest)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o666):
                if any(row.get("id") == name and _damage(row) is None for _, row in self._lines([])):
                    return name
                offset = _append(self.items, packed)
                items = {"offset": offset, "bytes": len(packed), "sha256": digest}
                try:
                    self._append_row({"schema": SCHEMA, "id": name, **row, "items": items})
                except OSError:
                    _cut(self.items, offset)  # or further attempts would fill the disk with items
                    raise
        except OSError as error:
            raise BadInput(
                f"{self.path} cannot be added to ({error.strerror}): free some space there, or write to another folder"
            ) from error
        return name

    def _append_row(self, row: dict) -> None:
        """Add a line to the file of rows. The file never exists without a row: an empty one beside outcomes means that
        rows were lost."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if self.path.exists():
            _append(self.path, line, new_line=True)
            return
        first = self.path.with_name(f".{self.path.name}.first")
        first.unlink(missing_ok=True)
        _append(first, line)
        os.replace(first, self.path)

    def rows(self, items: bool = True) -> dict[str, Measurement]:
        """The measurements by id, in the order of the file. Without `items` the file of outcomes is not read.

        Damaged rows are left out and reported on stderr.

        Raises:
            BadInput: no such file, or one that a newer version of this package wrote.
        """
        measurements, damage, unused = self._read(items)
        for d in damage:
            print(f"{self.path}, line {d.line}: left out, {d.reason}", file=sys.stderr, flush=True)
        if unused > 0 and not damage:
            cause = "rows were lost, or a process was killed while it wrote one"
            print(
                f"{self.path}: {unused} bytes of {self.items.name} belong to no row: {cause}",
                file=sys.stderr,
                flush=True,
            )
        return measurements

    def read(self, items: bool = True) -> tuple[dict[str, Measurement], list[Damage]]:
        """As `rows`; the damage is returned instead of reported."""
        return self._read(items)[:2]

    def _read(self, items: bool) -> tuple[dict[str, Measurement], list[Damage], int]:
        """As `read`, and the number of bytes of outcomes that no row points to."""
        outcomes = self.items.stat().st_size if self.items.is_file() else 0
        lost = f", though {self.items.name} holds {outcomes} bytes of outcomes: rows are lost; " if outcomes else ""
        lost += "bring it back from a copy, or remove both" if outcomes else ""
        if not self.path.is_file():
            raise BadInput(f"there is no file of records {self.path}{lost}")
        if lost and not self.path.stat().st_size:
            raise BadInput(f"{self.path} is empty{lost}")
        measurements: dict[str, Measurement] = {}
        damage: list[Damage] = []
        for line, row in self._lines(damage):
            if reason := _damage(row):
                damage.append(Damage(line, reason, str(row.get("id"))))
                continue
            outcomes -= row["items"]["bytes"]
            try:
                outcomes_of_row = self._outcomes(row["items"]) if items else []
                fields = {field: row[field] for field in FIELDS}
                measurements[row["id"]] = Measurement(**fields, items=outcomes_of_row, id=row["id"])
            except UNREADABLE as error:
                damage.append(Damage(line, f"its items in {self.items.name} are damaged ({error})"))
        if lost and not measurements and not damage:
            raise BadInput(f"{self.path} has no row{lost}")
        return measurements, sorted(damage, key=lambda d: d.line), outcomes

    def _lines(self, damage: list[Damage]) -> Iterator[tuple[int, dict]]:
        """Line number and row of every line that holds JSON; the other lines are added to `damage`."""
        if not self.path.exists():
            return
        check_ordinary(self.path, LARGEST)
        lines = self.path.read_bytes().split(b"\n")
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=_refused)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except (ValueError, RecursionError) as error:
                torn = n == len(lines)
                damage.append(
                    Damage(n, "it was not written to its end" if torn else f"it cannot be read as JSON ({error})")
                )
                continue
            if isinstance(row.get("schema"), int) and row["schema"] > SCHEMA:
                raise BadInput(
                    f"{self.path}, line {n}, has schema {row['schema']}: this version of thesislib reads up to "
                    f"{SCHEMA}; a newer one wrote it"
                )
            yield n, row

    def _outcomes(self, span: dict) -> list[dict]:
        """The outcomes at a row's `items`; every error of a damaged file is one of `UNREADABLE`."""
        if self.items.exists() and not self.items.is_file():
            raise ValueError("a pipe or a folder is in their place")  # a pipe would be waited for
        with self.items.open("rb") as file:
            file.seek(span["offset"])
            packed = file.read(min(span["bytes"], self.items.stat().st_size))
        if hashlib.sha256(packed).hexdigest() != span["sha256"]:
            raise ValueError("their sha256 is another")
        with gzip.open(io.BytesIO(packed)) as file:
            unpacked = file.read(LARGEST + 1)
        if len(unpacked) > LARGEST:
            raise ValueError(f"they are more than {LARGEST} bytes")
        # split as bytes: str.splitlines also splits at U+2028, which JSON leaves as it is
        outcomes = [json.loads(line) for line in unpacked.splitlines()]
        if odd := wrong(outcomes, [{"id": object}]):
            raise ValueError(odd)
        return outcomes


def _id(row: dict, digest: str) -> str:
    """12 hex digits of a hash over a row's content and the sha256 of its outcomes."""
    content = {key: row[key] for key in ("label", "recipe", "stage", *FIELDS)}
    return hashlib.sha256(json.dumps([content, digest], sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def _damage(row: dict) -> str | None:
    """Why a row cannot be one that `append` wrote; None for one that can."""
    if odd := wrong(row, ROW):
        return f"it is not a row of records ({odd})"
    try:
        json.dumps(row, ensure_ascii=False).encode()
        if _id(row, row["items"]["sha256"]) == row["id"]:
            return None
    except (ValueError, RecursionError) as error:  # half a surrogate pair, NaN, lists too deep
        return f"it is not a row of records ({error})"
    return "its id is not that of its content: something in it was changed after it was written"


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _append(path: Path, content: bytes, new_line: bool = False) -> int:
    """Append bytes to a file and return their offset. With `new_line`, an unfinished last line is ended first.

    If the disk is full, the file is cut back to its old length.
    """
    # no buffer: on closing it would write its rest into the space just freed
    with path.open("ab", buffering=0) as file:
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
    """Cut a file back to a length. An empty file is removed, so that a run may begin there again (`Store.new`)."""
    if end:
        os.truncate(path, end)
    else:
        path.unlink()


def stores(paths: Iterable[str | Path]) -> list[Store]:
    """The stores in files and folders.

    Raises:
        BadInput: no such file or folder, or a folder without stores.
    """
    every: list[Store] = []
    for path in map(Path, paths):
        with explain_errors(path):
            if path.is_dir():
                # also the stores whose rows are gone and whose outcomes are not: reading them reports the loss
                outcomes = path.glob("*.items.gz")
                files = {*path.glob("*.jsonl"), *(f.with_suffix("").with_suffix(".jsonl") for f in outcomes)}
            else:
                files = {path}
            if not files:
                raise BadInput(f"{path} holds no records: expected .jsonl files")
            if path in files and not path.is_file() and not Store(path).items.is_file():
                raise BadInput(f"there is no file of records {path}")
        every += map(Store, sorted(files))
    return every


def find(name: str, among: Iterable[Store]) -> Measurement:
    """The one row whose id begins with `name`, with its items.

    Raises:
        BadInput: no row or several, or one whose items are damaged.
    """
    known = {}
    for store in among:
        rows, damage = store.read(items=False)
        known |= dict.fromkeys(rows, store)
        if name and (damaged := next((d for d in damage if d.id.startswith(name)), None)):
            raise BadInput(
                f"record {damaged.id} is damaged ({store.path}, line {damaged.line}): {damaged.reason}; bring the "
                "line back from a copy"
            )
    matching = [row for row in known if row.startswith(name)] if name else []
    if not matching:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise BadInput(
            f"no record has the id '{name}'{f': did you mean {near[0]}?' if near else ''} `thesislib records` "
            f"lists all {len(known)}"
        )
    if len(matching) > 1:
        raise BadInput(
            f"'{name}' begins the ids of {len(matching)} records, {', '.join(matching[:3])}, ...: expected more "
            "of the id"
        )
    store = known[matching[0]]
    rows, _ = store.read()
    if matching[0] not in rows:
        raise BadInput(
            f"the items of record {matching[0]} are damaged or gone: expected them whole in {store.items}, as "
            "they were written"
        )
    return rows[matching[0]]


def study() -> Path:
    """The folder of this study's own records."""
    return data_file("results")


def select(
    among: Iterable[Store], *, label: str | None = None, task: str | None = None, metric: str | None = None
) -> dict[str, Measurement]:
    """Rows by id, without items: those with this label, with `task` as a part of their task, with this metric.

    Raises:
        BadInput: no row is left; the message lists the labels, tasks or metrics that exist, the nearest first.
    """
    rows = {name: m for store in among for name, m in store.rows(items=False).items()}
    for column, wanted, fits in (
        ("label", label, lambda row: row["label"] == label),
        ("task", task, lambda row: task.lower() in row["task"].lower()),
        ("metric", metric, lambda row: row["metric"] == metric),
    ):
        if wanted is not None:
            kept = {name: m for name, m in rows.items() if fits(flat(name, m))}
            if not kept:
                values = {flat(name, m)[column] for name, m in rows.items()}
                if column == "task":  # its first word is enough
                    values |= {value.split(",")[0].split(" ")[0] for value in values}
                raise unknown(f"{column} of records", wanted, sorted(values))
            rows = kept
    return rows


def flat(name: str, m: Measurement) -> dict[str, Any]:
    """A row without nesting, for a table. A field that the record does not have is None; a label, "?"."""
    run = m.provenance
    history, settings, protocol, hardware, versions = (
        run.get(key) or {} for key in ("made", "settings", "protocol", "hardware", "versions")
    )
    sizes, card = history.get("bytes") or {}, hardware.get("accelerator")
    row = {"id": name, "label": history.get("label") or "?"}
    row |= {key: history.get(key) for key in ("recipe", "stage")}
    row |= {"subject": run.get("subject"), "fingerprint": run.get("fingerprint"), "task": m.task, "metric": m.metric}
    row |= {key: settings.get(key) for key in ("length", "limit", "prompt")}
    row |= {key: getattr(m, key) for key in ("value", "low", "high", "n", "unit")}
    row |= {"seed": protocol.get("seed"), "dtype": run.get("dtype"), "device": card or hardware.get("cpu")}
    row |= {key: sizes.get(key) for key in ("bytes_on_disk", "parameters", "nonzero_parameters")}
    row |= {"threads": hardware.get("torch_threads")} | {key: run.get(key) for key in ("peak_memory", "seconds")}
    row |= {key: versions.get(key) for key in ("torch", "thesislib")}
    return {**row, "commit": run.get("commit"), "time": run.get("time", run.get("date"))}


def write_csv(measurements: Mapping[str, Measurement], path: Path) -> None:
    """Write one row a measurement, with the columns of `flat`.

    Raises:
        BadInput: no measurement, or a path that cannot be written.
    """
    rows = [flat(name, m) for name, m in measurements.items()]
    if not rows:
        raise BadInput(f"there are no records to write to {path}")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
