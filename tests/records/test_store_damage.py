"""Records on bad disks: torn and damaged lines, damaged items, rows of a newer version, a disk that is full."""

import errno
import hashlib
import json
import os
import random
import re
import resource
from contextlib import contextmanager
from itertools import count

import pytest
from typer.testing import CliRunner

from tests.fakes import measurement, row
from thesislib.cli import app
from thesislib.errors import BadInput
from thesislib.records.store import SCHEMA, Store, find, select, study
from thesislib.sweep.run import known


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
        assert (
            store.append(row(0, 2, pad="猫🙂")) == names[2]
            and list(store.rows())[:2] == names[:2]
            and set(names) <= set(store.rows())
        )
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
        (b'{"text": "a line of a corpus"}', r"not a row of records \(schema is missing\)"),
        ({"id": 7}, "not a row of records"),
        ({"value": "high"}, r"not a row of records \(value is 'high': expected null or a finite number\)"),
        ({"value": 999.5}, "its id is not that of its content"),
        ({"unit": "v"}, "its id is not that of its content"),
        ({"provenance": {"seed": 1}}, "its id is not that of its content"),
        ({"id": "0123456789ab"}, "its id is not that of its content"),
        ({"provenance": None}, "not a row of records"),
        ({"items": None}, "not a row of records"),
        ({"items": {"offset": 0, "bytes": 10**18, "sha256": "0" * 64}}, "its id is not that of its content"),
        (
            {"items": {"offset": -1, "bytes": 10, "sha256": "0" * 64}},
            "items.offset is -1: expected a whole number from 0",
        ),
    ],
)
def test_a_damaged_line_in_the_middle(store, line, reason):
    names = [store.append(row(0, k)) for k in range(3)]
    lines = store.path.read_bytes().split(b"\n")
    lines[1] = line if isinstance(line, bytes) else json.dumps(json.loads(lines[1]) | line).encode()
    store.path.write_bytes(
        b"\r\n".join(lines[:2]) + b"\n\n" + b"\n".join(lines[2:])
    )  # an empty line, and another system's ends
    found, (damage,) = store.read()
    assert list(found) == [names[0], names[2]] and damage.line == 2 and re.search(reason, damage.reason)
    assert store.append(row(0, 1)) == names[1] and len(store.read()[1]) == 1  # measured again, it is written again
    assert set(store.read()[0]) == set(names)


def forged(plain):
    """A row by hand whose id does fit."""
    fields = ("label", "recipe", "stage", "task", "metric", "value", "low", "high", "n", "unit", "extra", "provenance")
    content = [{field: plain[field] for field in fields}, plain["items"]["sha256"]]
    return plain | {"id": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}


MADE = {
    "label": "D1",
    "recipe": "0" * 12,
    "stage": "depth",
    "stages": [{"depth": {}}],
    "base": {"name": "x", "fingerprint": "y"},
    "data": "embedded",
    "bytes": {},
}


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"task": None}, "task is None"),
        ({"label": ["D1"]}, "label is a list of 1"),
        ({"label": "D\ud800"}, "label is"),
        ({"metric": None}, "metric is None"),
        ({"value": 10**400}, "value is a number of many digits"),
        ({"value": True}, "value is True"),
        ({"low": [1]}, "low is a list of 1"),
        ({"n": -1}, "n is -1"),
        ({"n": 2.5}, "n is 2.5"),
        ({"n": True}, "n is True"),
        ({"unit": 3}, "unit is 3"),
        ({"extra": []}, "extra is a list of 0"),
        ({"extra": {"x": "\ud800"}}, "surrogates not allowed"),
        ({"provenance": {"made": 3}}, "provenance.made is 3"),
        ({"provenance": {"made": MADE | {"bytes": [1]}}}, "provenance.made.bytes is a list of 1"),
        (
            {"provenance": {"made": MADE | {"bytes": {"parameters": "many"}}}},
            "provenance.made.bytes.parameters is 'many'",
        ),
        ({"provenance": {"made": MADE | {"stages": {"depth": 1}}}}, "provenance.made.stages is an object"),
        ({"provenance": {"made": MADE | {"stages": [{"depth": 1}]}}}, "provenance.made.stages.0.depth is 1"),
        ({"provenance": {"made": MADE | {"base": "tiny"}}}, "provenance.made.base is 'tiny'"),
        ({"provenance": {"hardware": "a laptop"}}, "provenance.hardware is 'a laptop'"),
        ({"provenance": {"hardware": {"torch_threads": -3}}}, "provenance.hardware.torch_threads is -3"),
        ({"provenance": {"settings": []}}, "provenance.settings is a list of 0"),
        ({"provenance": {"settings": {"open_book": "yes"}}}, "provenance.settings.open_book is 'yes'"),
        ({"provenance": {"versions": [1]}}, "provenance.versions is a list of 1"),
        ({"provenance": {"tolerance": {"relative": "small"}}}, "provenance.tolerance.relative is 'small'"),
        ({"provenance": {"plan": [0, "1"]}}, "provenance.plan.1 is '1'"),
        ({"provenance": {"dtype": ["float32"]}}, "provenance.dtype is a list of 1"),
        ({"provenance": {"seconds": "long"}}, "provenance.seconds is 'long'"),
        ({"schema": True}, "schema is True"),
        ({"schema": 0}, "schema is 0"),
        ({"items": []}, "items is a list of 0"),
    ],
)
def test_rows_that_are_odd_are_named_and_left_out_everywhere(store, changes, odd, capsys):
    """Also those whose id fits, as another program might write them."""
    names = [store.append(row(0, k)) for k in range(2)]
    first, second = map(json.loads, store.path.read_text("utf8").splitlines())
    plain = first | changes
    store.path.write_text(
        "\n".join(json.dumps(x) for x in (forged(plain) if isinstance(plain["items"], dict) else plain, second)) + "\n",
        "utf8",
    )
    found, (damage,) = store.read()
    assert list(found) == names[1:] and damage.line == 1 and odd in damage.reason and "\n" not in damage.reason
    for more in ([], ["--json"], ["--csv", str(store.path.with_suffix(".csv"))]):
        result = CliRunner().invoke(app, ["records", "--store", str(store.path), *more])
        assert (
            result.exit_code == 0
            and result.stderr.count("\n") == 1
            and odd in result.stderr
            and len(result.stdout.splitlines()) == (1 if more else 2)  # the listing has a heading
        )
    result = CliRunner().invoke(app, ["records", "verify", names[0], "--store", str(store.path)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert known([store]) == set() and capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [b"1e999", b"NaN", b"-Infinity", b"1" * 5000])
def test_numbers_that_json_has_not(store, number):
    names = [store.append(row(0, k, pad=0.25)) for k in range(2)]
    store.path.write_bytes(store.path.read_bytes().replace(b"0.25", number, 1))
    found, (damage,) = store.read()
    assert list(found) == names[1:] and damage.line == 1


def test_any_changed_digit_is_noticed(store):
    names = [store.append(row(0, k)) for k in range(3)]
    whole, r = store.path.read_bytes(), random.Random(0)
    end = whole.index(b'"items": {"offset"')  # an offset is noticed where outcomes are read
    for place in r.sample([i for i in range(whole.index(b'"task"'), end) if chr(whole[i]).isalnum()], 40):
        changed = bytearray(whole)
        changed[place] = ord(r.choice([c for c in "0123456789ab" if ord(c) != whole[place]]))
        store.path.write_bytes(changed)
        found, damage = store.read(items=False)
        assert list(found) == names[1:] and len(damage) == 1, changed
    store.path.write_bytes(whole)
    assert list(store.read()[0]) == names


def test_outcomes_whose_rows_are_gone_are_said(store, capsys):
    names = [store.append(row(0, k)) for k in range(3)]
    whole = store.path.read_bytes()
    for empty in (b"", b"\n"):
        store.path.write_bytes(empty)
        with pytest.raises(
            BadInput,
            match=r"r\.jsonl (is empty|has no row), though r\.items\.gz holds \d+ bytes of outcomes: rows are lost; "
            r"bring it back",
        ):
            store.rows()
    store.path.write_bytes(whole.split(b"\n", 1)[1])  # the first line is gone
    assert (
        list(store.rows()) == names[1:]
        and "bytes of r.items.gz belong to no row: rows were lost" in capsys.readouterr().err
    )
    store.path.unlink()
    for place in (store.path, store.path.parent):
        result = CliRunner().invoke(app, ["records", "--store", str(place)])
        assert (
            result.exit_code == 2
            and "there is no file of records" in result.stderr
            and "rows are lost" in result.stderr
            and result.stderr.count("\n") == 1
        )
    assert store.append(row(0, 0)) in store.rows()  # a run that was killed between outcomes and its first row goes on


def test_every_recorded_row_is_as_it_was_written():
    """The committed records, id by id, as this file's own few lines have it."""
    files = sorted(study().glob("*.jsonl"))
    assert len(files) > 5
    for file in files:
        plain = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        assert [forged(r)["id"] for r in plain] == [r["id"] for r in plain] == list(Store(file).read(items=False)[0])


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
        assert [d.line for d in damage] == [k + 1 for k in range(3) if k not in kept] and all(
            "r.items.gz are damaged" in d.reason for d in damage
        )
        assert list(store.read(items=False)[0]) == names and store.read(items=False)[1] == []
        with pytest.raises(
            BadInput, match=f"the items of record {names[1 if 1 not in kept else 2]} are damaged or gone"
        ):
            find(names[1 if 1 not in kept else 2], [store])


@pytest.mark.parametrize(
    "use", [Store.rows, lambda s: s.append(row(7, 7)), lambda s: find("abc", [s]), lambda s: select([s])]
)
def test_a_newer_schema_is_refused(store, use):
    store.append(row())
    with store.path.open("a") as file:
        print(json.dumps({"schema": SCHEMA + 1, "id": "abc", "anything": "else"}), file=file)
    before = content(store)
    with pytest.raises(
        BadInput,
        match=rf"r\.jsonl, line 2, has schema {SCHEMA + 1}: this version of thesislib reads up to {SCHEMA}; a newer "
        r"one wrote it",
    ):
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
        with (
            room(9_000),
            pytest.raises(
                BadInput, match=r"r\.jsonl cannot be added to \(.*\): free some space there, or write to another folder"
            ),
        ):
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


def test_a_pipe_in_the_place_of_the_items_is_not_waited_for(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    store.append(measurement(metric="perplexity", provenance={"made": {"label": "dense"}}))
    store.items.unlink()
    os.mkfifo(store.items)
    found, damage = store.read()
    assert not found and "a pipe or a folder is in their place" in damage[0].reason
