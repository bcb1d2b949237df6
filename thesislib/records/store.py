"""Recorded measurements: rows appended to a JSON Lines file, their items compressed in a file beside it, nothing
rewritten.

A row has `schema`, `id` (of its own content), what was measured (`label`, `recipe`, `stage`, `task`, `metric`), the
number (`value`, `low`, `high`, `n`, `unit`), `extra`, `provenance`, and `items`: where in NAME.items.gz its outcomes
lie, as one gzip member, and their sha256. So a line can be read by eye, and by anything that reads JSON.
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
LARGEST = 2**28  # bytes of one row's outcomes, unpacked; and of all rows


def _known_schema(value: Any) -> bool:
    """1, or another that this version knows"""
    return type(value) is int and 1 <= value <= SCHEMA


KNOWN = (None, str)  # what a record says in a word, or does not say
MADE = {
    "label?": KNOWN,
    "recipe?": KNOWN,
    "stage?": KNOWN,
    "stages?": [dict],
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
    "corpus_sha256?": KNOWN,
    "commit?": KNOWN,
    "settings?": {
        "length?": natural,
        "limit?": (None, natural),
        "prompt?": (None, str, natural),
        "batch?": (None, natural),
        "open_book?": bool,
        "protocol?": str,
        "text_sha256?": KNOWN,
        "repeats?": natural,
    },
    "protocol?": {"on": str, "seed?": int},
    "versions?": {str: str},
    "tolerance?": {"absolute?": positive, "relative?": positive},
    "hardware?": {
        "cpu?": KNOWN,
        "cores?": (None, natural),
        "torch_threads?": natural,
        "accelerator?": KNOWN,
        "device?": str,
    },
    "date?": str,
    "time?": str,
    "seconds?": positive,
    "peak_memory?": natural,
    "sweep?": dict,
    "chapter?": dict,
    "made?": (None, MADE),
}
ROW = {
    "schema": _known_schema,
    "id": re.compile("[0-9a-f]{12}"),
    "label": KNOWN,
    "recipe": KNOWN,
    "stage": KNOWN,
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
    """A line that could not be read (a process died while it wrote, a disk failed), and why."""

    line: int
    reason: str
    id: str = ""


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
            raise BadInput(
                f"{path} holds a recorded run already: expected a new file, since nothing recorded is overwritten"
            )
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
        packed = gzip.compress(
            "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in m.items).encode(), mtime=0
        )
        plain = json.loads(json.dumps({field: getattr(m, field) for field in FIELDS}), parse_constant=lambda _: None)
        made = plain["provenance"].get("made") or {}
        row: dict[str, Any] = {"label": made.get("label"), "recipe": made.get("recipe"), "stage": made.get("stage")}
        row |= {field: plain[field] for field in FIELDS}
        digest = hashlib.sha256(packed).hexdigest()
        name = _id(row, digest)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o666):
                if any(row.get("id") == name and _damage(row) is None for _, row in self._lines([])):
                    return name
                offset = _append(self.items, packed)
                row = {
                    "schema": SCHEMA,
                    "id": name,
                    **row,
                    "items": {"offset": offset, "bytes": len(packed), "sha256": digest},
                }
                line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
                try:
                    if self.path.exists():
                        _append(self.path, line, new_line=True)
                    else:  # never there without a row: an empty file beside outcomes means that rows were lost
                        first = self.path.with_name(f".{self.path.name}.first")
                        first.unlink(missing_ok=True)
                        _append(first, line)
                        os.replace(first, self.path)
                except OSError:
                    _cut(
                        self.items, offset
                    )  # tried again and again, the items alone would fill what is left of the disk
                    raise
        except OSError as error:
            raise BadInput(
                f"{self.path} cannot be added to ({error.strerror}): free some space there, or write to another folder"
            ) from error
        return name

    def rows(self, items: bool = True) -> dict[str, Measurement]:
        """The measurements by id, in the order of the file; without items, what is in the other file is not read.

        Damaged rows are left out and reported on stderr.

        Raises:
            BadInput: no such file, or one that a newer version of this package wrote.
        """
        found, damage, unused = self._read(items)
        for d in damage:
            print(f"{self.path}, line {d.line}: left out, {d.reason}", file=sys.stderr, flush=True)
        if unused > 0 and not damage:
            print(f"{self.path}: {unused} bytes of {self.items.name} belong to no row: rows were lost, or a process "
                "was killed while it wrote one",
                  file=sys.stderr, flush=True)  # fmt: skip
        return found

    def read(self, items: bool = True) -> tuple[dict[str, Measurement], list[Damage]]:
        """As `rows`, the damage returned instead of reported."""
        return self._read(items)[:2]

    def _read(self, items: bool) -> tuple[dict[str, Measurement], list[Damage], int]:
        """As `read`, and how many bytes of outcomes no row points to."""
        outcomes = self.items.stat().st_size if self.items.is_file() else 0
        lost = (
            f", though {self.items.name} holds {outcomes} bytes of outcomes: rows are lost; bring it back from a "
            "copy, or remove both"
            if outcomes
            else ""
        )
        if not self.path.is_file():
            raise BadInput(f"there is no file of records {self.path}{lost}")
        if lost and not self.path.stat().st_size:
            raise BadInput(f"{self.path} is empty{lost}")
        found: dict[str, Measurement] = {}
        damage: list[Damage] = []
        for line, row in self._lines(damage):
            if reason := _damage(row):
                damage.append(Damage(line, reason, str(row.get("id"))))
                continue
            outcomes -= row["items"]["bytes"]
            try:
                found[row["id"]] = Measurement(
                    **{field: row[field] for field in FIELDS}, items=self._outcomes(row["items"]) if items else []
                )
            except (
                OSError,
                EOFError,
                ValueError,
                TypeError,
                OverflowError,
                MemoryError,
                RecursionError,
                zlib.error,
            ) as error:
                damage.append(Damage(line, f"its items in {self.items.name} are damaged ({error})"))
        if lost and not found and not damage:
            raise BadInput(f"{self.path} has no row{lost}")
        return found, sorted(damage, key=lambda d: d.line), outcomes

    def _lines(self, damage: list[Damage]) -> Iterator[tuple[int, dict]]:
        """Line number and row of every line that is one; the others are added to `damage`."""
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

    def _outcomes(self, where: dict) -> list[dict]:
        if self.items.exists() and not self.items.is_file():
            raise ValueError("a pipe or a folder is in their place")  # a pipe would be waited for
        with self.items.open("rb") as file:
            file.seek(where["offset"])
            packed = file.read(min(where["bytes"], self.items.stat().st_size))
        if hashlib.sha256(packed).hexdigest() != where["sha256"]:
            raise ValueError("their sha256 is another")
        with gzip.open(io.BytesIO(packed)) as file:
            plain = file.read(LARGEST + 1)
        if len(plain) > LARGEST:
            raise ValueError(f"they are more than {LARGEST} bytes")
        found = [
            json.loads(line) for line in plain.splitlines()
        ]  # bytes: a text also ends lines at U+2028, which JSON leaves as it is
        if odd := wrong(found, [{"id": object}]):
            raise ValueError(odd)
        return found


def _id(row: dict, digest: str) -> str:
    """12 digits that stand for what a row says and for the sha256 of its outcomes."""
    content = {key: row[key] for key in ("label", "recipe", "stage", *FIELDS)}
    return hashlib.sha256(json.dumps([content, digest], sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def _damage(row: dict) -> str | None:
    """Why a row is none that `append` wrote, if so."""
    if odd := wrong(row, ROW):
        return f"it is not a row of records ({odd})"
    try:
        json.dumps(row, ensure_ascii=False).encode()
        if _id(row, row["items"]["sha256"]) == row["id"]:
            return None
    except (ValueError, RecursionError) as error:  # half a surrogate pair; a number beyond all; lists in lists in lists
        return f"it is not a row of records ({error})"
    return "its id is not that of its content: something in it was changed after it was written"


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _append(path: Path, content: bytes, new_line: bool = False) -> int:
    """Add bytes at a file's end and say where they begin; with `new_line`, a line that was not ended is ended first.

    If the disk is full, the file is cut back to what it was.
    """
    with path.open(
        "ab", buffering=0
    ) as file:  # what a buffer could not write, it would write when it is closed, into the space just freed
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
        with explain_errors(place):
            # outcomes whose rows are gone are not passed over
            files = (
                {*place.glob("*.jsonl"), *(f.with_suffix("").with_suffix(".jsonl") for f in place.glob("*.items.gz"))}
                if place.is_dir()
                else {place}
            )
            if not files:
                raise BadInput(f"{place} holds no records: expected .jsonl files")
            if place in files and not place.is_file() and not Store(place).items.is_file():
                raise BadInput(f"there is no file of records {place}")
        found += map(Store, sorted(files))
    return found


def find(name: str, places: Iterable[Store]) -> Measurement:
    """The one row whose id begins with `name`.

    Raises:
        BadInput: no row or several, or one whose items are damaged.
    """
    known = {}
    for store in places:
        found, damage = store.read(items=False)
        known |= dict.fromkeys(found, store)
        if hit := [d for d in damage if name and d.id.startswith(name)]:
            raise BadInput(
                f"record {hit[0].id} is damaged ({store.path}, line {hit[0].line}): {hit[0].reason}; bring the "
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
    whole, _ = store.read()
    if matching[0] not in whole:
        raise BadInput(
            f"the items of record {matching[0]} are damaged or gone: expected them whole in {store.items}, as "
            "they were written"
        )
    return whole[matching[0]]


def study() -> Path:
    """The folder of this study's own records."""
    return data_file("results")


def select(
    places: Iterable[Store], *, label: str | None = None, task: str | None = None, metric: str | None = None
) -> dict[str, Measurement]:
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
    made, settings, protocol, hardware, versions = (
        run.get(key) or {} for key in ("made", "settings", "protocol", "hardware", "versions")
    )
    sizes = made.get("bytes") or {}
    row = {"id": name, "label": made.get("label") or "?", "recipe": made.get("recipe"), "stage": made.get("stage")}
    row |= {"subject": run.get("subject"), "fingerprint": run.get("fingerprint"), "task": m.task, "metric": m.metric}
    row |= {key: settings.get(key) for key in ("length", "limit", "prompt")}
    row |= {key: getattr(m, key) for key in ("value", "low", "high", "n", "unit")}
    row |= {
        "seed": protocol.get("seed"),
        "dtype": run.get("dtype"),
        "device": hardware.get("accelerator") or hardware.get("cpu"),
    }
    row |= {key: sizes.get(key) for key in ("bytes_on_disk", "parameters", "nonzero_parameters")}
    row |= {
        "threads": hardware.get("torch_threads"),
        "peak_memory": run.get("peak_memory"),
        "seconds": run.get("seconds"),
    }
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
    write_whole(path, text.getvalue())
