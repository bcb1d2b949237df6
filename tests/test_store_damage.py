"""Records on bad disks: torn and damaged lines, damaged items, rows of a newer version, a disk that is full."""

import errno
import json
import os
import random
import re
import resource
from contextlib import contextmanager
from itertools import count

import pytest

from thesislib.errors import BadInput
from thesislib.records import Measurement
from thesislib.store import SCHEMA, Store, find, select


def row(worker=0, k=0, pad="", **changes):
    items = [{"id": f"{worker}/{k}/{i}", "x": i / 7} for i in range(3)]
    plain = {"task": "t", "metric": "m", "value": 1000.0 * worker + k, "low": 1.0, "high": 2.0, "n": 3, "unit": "u", "items": items, "extra": {"pad": pad}}
    return Measurement(**plain | changes)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "new" / "r.jsonl")


def content(store):
    """Bytes of both files; None where there is none."""
    return [file.read_bytes() if file.exists() else None for file in (store.path, store.items)]


def test_a_line_cut_anywhere(store, capsys):
    names = [store.append(row(0, k, pad="猫🙂")) for k in range(3)]
    whole = store.path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole) + 1):
        store.path.write_bytes(whole[:cut])
        found, damage = store.read(items=cut % 20 == 0)
        complete = cut >= len(whole) - 1  # only the end of the line is missing
        assert list(found) == names[: 3 if complete else 2]
        assert [d.line for d in damage] == ([] if complete or cut == start else [3])
    for cut in (start + 1, whole.index("猫".encode(), start) + 1, len(whole) - 2, len(whole) - 1):
        store.path.write_bytes(whole[:cut])
        assert store.append(row(5, 5)) in store.rows()
        assert store.append(row(0, 2, pad="猫🙂")) == names[2] and list(store.rows())[:2] == names[:2] and set(names) <= set(store.rows())
        assert store.path.read_bytes().startswith(whole[:cut] + b"\n")
    store.path.write_bytes(whole[:-9])
    assert list(store.rows()) == names[:2]
    assert capsys.readouterr().err.endswith(f"{store.path}, line 3: left out, it was not written to its end\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"schema": 1, "id": "abc', "it cannot be read as JSON"),
        (b"\0" * 100, "it cannot be read as JSON"),
        (b"\xff\xfe\xfa", "it cannot be read as JSON"),
        (b"[" * 200_000, "it cannot be read as JSON"),
        (b"[1, 2]", "no JSON object"),
        (b"{}", "not a row of records"),
        (b'{"text": "a line of a corpus"}', r"not a row of records \(KeyError: "),
        ({"id": 7}, "not a row of records"),
        ({"value": "high"}, "its value or a bound is no number"),
        ({"provenance": None}, "not a row of records"),
        ({"items": None}, "not a row of records"),
        ({"items": {"offset": 0, "bytes": 10**18, "sha256": ""}}, r"its items in r\.items\.gz are damaged"),
        ({"items": {"offset": -1, "bytes": 10, "sha256": ""}}, r"its items in r\.items\.gz are damaged"),
    ],
)
def test_a_damaged_line_in_the_middle(store, line, reason):
    names = [store.append(row(0, k)) for k in range(3)]
    lines = store.path.read_bytes().split(b"\n")
    lines[1] = line if isinstance(line, bytes) else json.dumps(json.loads(lines[1]) | line).encode()
    store.path.write_bytes(b"\r\n".join(lines[:2]) + b"\n\n" + b"\n".join(lines[2:]))  # an empty line, and another system's ends
    found, (damage,) = store.read()
    assert list(found) == [names[0], names[2]] and damage.line == 2 and re.search(reason, damage.reason)
    assert store.append(row(0, 1)) in (names[1], "abc") and len(store.read()[1]) == 1


def test_damaged_items_cost_their_row_only(store):
    names = [store.append(row(0, k)) for k in range(3)]
    whole = store.items.read_bytes()
    where = [json.loads(line)["items"] for line in store.path.read_text("utf8").splitlines()]
    flipped = bytearray(whole)
    flipped[where[1]["offset"] + where[1]["bytes"] // 2] ^= 1
    for content, kept in ((bytes(flipped), [0, 2]), (whole[: where[2]["offset"] + 5], [0, 1]), (b"", []), (None, [])):
        store.items.unlink()
        if content is not None:
            store.items.write_bytes(content)
        found, damage = store.read()
        assert list(found) == [names[k] for k in kept]
        assert [d.line for d in damage] == [k + 1 for k in range(3) if k not in kept] and all("r.items.gz are damaged" in d.reason for d in damage)
        assert list(store.read(items=False)[0]) == names and store.read(items=False)[1] == []
        with pytest.raises(BadInput, match=f"the items of record {names[1 if 1 not in kept else 2]} are damaged or gone"):
            find(names[1 if 1 not in kept else 2], [store])


@pytest.mark.parametrize("use", [Store.rows, lambda s: s.append(row(7, 7)), lambda s: find("abc", [s]), lambda s: select([s])])
def test_a_newer_schema_is_refused(store, use):
    store.append(row())
    with store.path.open("a") as file:
        print(json.dumps({"schema": SCHEMA + 1, "id": "abc", "anything": "else"}), file=file)
    before = content(store)
    with pytest.raises(BadInput, match=rf"r\.jsonl, line 2, has schema {SCHEMA + 1}: this version of thesislib reads up to {SCHEMA}; a newer one wrote it"):
        use(store)
    assert content(store) == before


# ---------------------------------------------------------------- a full disk


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes: the system writes what fits, then fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NOISE = [{"id": i, "x": random.Random(i).random()} for i in range(3000)]  # does not compress


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("full", ["items", "row"])
def test_a_full_disk_leaves_what_was_there(store, first, full):
    names = [] if first else [store.append(row(0, 0, pad="y" * 3000)), store.append(row(0, 1, pad="y" * 3000))]
    before = content(store)
    large = row(1, 1, items=NOISE) if full == "items" else row(1, 1, pad="z" * 30_000)
    for _ in range(2):
        with room(9_000), pytest.raises(BadInput, match=r"r\.jsonl cannot be added to \(.*\): free some space there, or write to another folder"):
            store.append(large)
        assert content(store) == before
    assert Store.new(store.path) == store if first else list(store.rows()) == names
    assert store.append(large) in store.rows() and store.read()[1] == [] and len(store.rows()) == len(names) + 1


@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_says_only_at_the_end_that_it_is_full(store, monkeypatch, call):
    store.append(row())
    before, calls, fsync = content(store), count(1), os.fsync

    def full(handle):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match=r"cannot be added to \(No space left on device\)"):
        store.append(row(1, 1))
    assert content(store) == before
    assert list(store.rows().values()) == [row()] and store.append(row(1, 1)) in store.rows()
