"""Records appended: what comes back, who may write at once, what a dead process, a bad disk or a full one leaves."""

import gzip
import json
import math
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from tests.fakes import processes, row
from thesislib.errors import BadInput
from thesislib.records.store import SCHEMA, Store, find, select, stores

ODD = 'é 猫 🙂 \u2028 \u2029 \x85 \x0b \x1c \r \n " \\ end'  # what ends a line for some readers, and what JSON escapes


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "new" / "r.jsonl")


def content(store):
    """Bytes of both files; None where there is none."""
    return [file.read_bytes() if file.exists() else None for file in (store.path, store.items)]


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"items": []},
        {
            "items": [{"id": ODD, "answer": ODD}, {"id": 2, "x": 0.1 + 0.2, "deep": {"a": [1, None, True]}}],
            "task": ODD,
            "extra": {ODD: {"value": 1e-310}},
        },
        {"items": [{"id": str(i), "text": "x" * 100} for i in range(2000)]},
    ],
    ids=["plain", "no items", "unicode", "many"],
)
def test_a_row_comes_back_to_the_last_bit(store, changes):
    first, m = row(1, 1), row(2, 2, **changes)
    names = [store.append(first), store.append(m)]
    assert store.read() == (dict(zip(names, [first, m], strict=True)), [])
    assert store.read(items=False)[0][names[1]].items == []
    # by hand, as another program would
    *_, last = store.path.read_bytes().decode("utf8").removesuffix("\n").split("\n")
    found = json.loads(last)
    assert (found["schema"], found["id"], found["label"], found["value"]) == (
        SCHEMA,
        names[1],
        "L2",
        m.value,
    ) and re.fullmatch("[0-9a-f]{12}", found["id"])
    start, size = found["items"]["offset"], found["items"]["bytes"]
    lines = gzip.decompress(store.items.read_bytes()[start : start + size]).split(b"\n")
    assert [json.loads(line) for line in lines if line] == m.items


def test_what_is_not_finite(store):
    m = row(
        low=-math.inf,
        high=math.nan,
        value=math.inf,
        extra={"per word": math.inf, "deep": [{"x": math.nan}]},
        items=[{"id": 0, "nats": math.inf}],
    )
    name = store.append(m)
    found = store.rows()[name]
    assert (found.value, found.low, found.high, found.extra) == (
        None,
        None,
        None,
        {"per word": None, "deep": [{"x": None}]},
    )
    assert found.items == m.items
    assert not re.search("NaN|Infinity", store.path.read_text("utf8"))


def test_ids_are_stable_and_each_row_has_its_own(store, tmp_path):
    name = store.append(row())
    before = content(store)
    assert [store.append(row()), Store(store.path).append(row()), store.append(store.rows()[name])] == [
        name
    ] * 3 and content(store) == before
    assert Store(tmp_path / "other.jsonl").append(row()) == name
    changes = [
        {"task": "T"},
        {"metric": "M"},
        {"value": math.nextafter(0.0, 1)},
        {"low": 1.5},
        {"high": 2.5},
        {"n": 4},
        {"unit": "U"},
        {"extra": {}},
        {"provenance": {}},
        {"items": []},
        {"items": row().items[::-1]},
    ]
    assert len({name, *(store.append(row(**change)) for change in changes)}) == 1 + len(changes) == len(store.rows())


def test_names_of_files(tmp_path):
    with pytest.raises(BadInput, match=r"r\.json is no file of records: expected a name that ends in \.jsonl"):
        Store(tmp_path / "r.json")
    with pytest.raises(BadInput, match="there is no file of records"):
        Store(tmp_path / "r.jsonl").rows()
    Store(tmp_path / "r.jsonl").append(row())
    with pytest.raises(BadInput, match="holds a recorded run already: expected a new file"):
        Store.new(tmp_path / "r.jsonl")
    assert stores([tmp_path]) == [Store(tmp_path / "r.jsonl")]
    (tmp_path / "empty").mkdir()
    for place, message in (
        ("empty", r"empty holds no records: expected \.jsonl files"),
        ("gone.jsonl", "no file of records"),
        ("gone", "no file of records"),
    ):
        with pytest.raises(BadInput, match=message):
            stores([tmp_path / place])


# ---------------------------------------------------------------- found and chosen


def test_found_by_how_the_id_begins(store, tmp_path):
    other = Store(tmp_path / "other.jsonl")
    names = [store.append(row(1, k)) for k in range(20)] + [other.append(row(2, k)) for k in range(20)]
    assert find(names[3], [store, other]) == row(1, 3) and find(names[25][:8], [store, other]) == row(2, 5)
    shared = next(
        first for first in "0123456789abcdef" if sum(name.startswith(first) for name in names) > 1
    )  # 40 ids, 16 digits
    with pytest.raises(
        BadInput,
        match=f"'{shared}' begins the ids of {sum(n.startswith(shared) for n in names)} records, .*: expected more of "
        "the id",
    ):
        find(shared, [store, other])
    with pytest.raises(
        BadInput, match=f"no record has the id '{names[0]}0': did you mean {names[0]}\\? .* lists all 40"
    ):
        find(f"{names[0]}0", [store, other])
    with pytest.raises(BadInput, match="no record has the id ''"):
        find("", [store])


def test_chosen_by_label_task_and_metric(store):
    kinds = [
        ("D2", "WikiText-2 test", "perplexity"),
        ("D2", "TriviaQA validation, closed book", "accuracy"),
        ("D2+W1:8", "HellaSwag validation", "acc_norm"),
    ]
    for k, (label, task, metric) in enumerate(kinds):
        store.append(row(0, k, task=task, metric=metric, provenance={"made": {"label": label}}))
    assert (
        len(select([store])) == 3
        and len(select([store], label="D2")) == 2
        and len(select([store], label="D2", task="triviaqa")) == 1
    )
    assert [m.metric for m in select([store], metric="acc_norm").values()] == ["acc_norm"]
    for wanted, message in (
        ({"label": "D2+W1:9"}, r"label of records 'D2\+W1:9': did you mean 'D2\+W1:8'\? expected one of D2, D2\+W1:8$"),
        (
            {"task": "TrivaQA"},
            r"task of records 'TrivaQA': did you mean 'TriviaQA'\? expected one of .*HellaSwag validation",
        ),
        ({"task": "WikiTxt-2 test"}, "did you mean 'WikiText-2 test'"),
        ({"metric": "perplexty"}, "metric of records 'perplexty': did you mean 'perplexity'"),
        ({"label": "D2", "metric": "acc_norm"}, "expected one of accuracy, perplexity$"),  # those that are left
    ):
        with pytest.raises(BadInput, match=message):
            select([store], **wanted)


# ---------------------------------------------------------------- several writers, and dead ones


def write(path, worker, rows, start=None):
    store = Store(path)
    if start:
        start.wait()
    for k in range(rows):
        store.append(row(worker, k, pad="x" * 2000))


def write_on_and_on(path, worker, acknowledged):
    with open(acknowledged, "a") as done:
        for k in count():
            print(Store(path).append(row(worker, k, pad="x" * 20000)), file=done, flush=True)


def die(path, moment):
    """Append one row, be killed at that moment, once everything before has reached the disk."""
    store = Store(path)
    real, before = os.fsync, {file: file.stat().st_size for file in (store.path, store.items)}

    def fsync(number):
        file = Path(f"/proc/self/fd/{number}").readlink()
        which = "row" if file == store.path else "items"
        if moment == f"half of the {which}":
            os.truncate(file, (before[file] + file.stat().st_size) // 2)
        real(number)
        if moment in (f"half of the {which}", f"after the {which}"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    store.append(row(9, 9, pad="猫" * 1000))


@pytest.fixture(scope="module")
def context():
    return processes()


def test_writers_at_once_lose_nothing(context, store):
    start = context.Barrier(6)
    processes = [context.Process(target=write, args=(store.path, worker, 20, start)) for worker in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    found, damage = store.read()
    assert damage == [] and len(found) == 120 and len(store.path.read_bytes().splitlines()) == 120
    assert sorted(m.value for m in found.values()) == sorted(
        1000.0 * worker + k for worker in range(6) for k in range(20)
    )
    for m in found.values():
        assert m == row(*divmod(int(m.value), 1000), pad="x" * 2000)  # its own items with it


def test_threads_at_once_lose_nothing(store):
    with ThreadPoolExecutor(6) as pool:
        names = list(pool.map(lambda k: store.append(row(k % 6, k)), range(30)))
    assert sorted(store.read()[0]) == sorted(names) and len(set(names)) == 30


@pytest.mark.processes
def test_killed_at_ten_random_moments(context, store, tmp_path):
    rng, acknowledged, own = random.Random(0), tmp_path / "acknowledged", []
    acknowledged.touch()
    for kill in range(1, 11):
        before = acknowledged.read_text().count("\n")
        process = context.Process(target=write_on_and_on, args=(store.path, kill, acknowledged))
        process.start()
        deadline = time.monotonic() + 60
        while acknowledged.read_text().count("\n") < before + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        found, damage = store.read()
        told = acknowledged.read_text().splitlines()
        assert process.exitcode == -signal.SIGKILL and len(told) >= before + 2
        assert {*told, *own} <= set(found) and len(found) <= len(told) + len(
            own
        ) + kill  # at most one a kill was written and not told
        assert len(damage) <= kill
        own.append(store.append(row(0, kill)))
        assert own[-1] in store.read()[0]
    assert all(m == row(*divmod(int(m.value), 1000), pad=m.extra["pad"]) for m in store.read()[0].values())


@pytest.mark.parametrize("moment", ["half of the items", "after the items", "half of the row", "after the row"])
def test_killed_at_the_worst_moments(context, store, moment):
    names = [store.append(row(0, k)) for k in range(2)]
    process = context.Process(target=die, args=(store.path, moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found, damage = store.read()
    assert list(found)[:2] == names and [found[name] for name in names] == [row(0, 0), row(0, 1)]
    assert len(found) == 2 + (moment == "after the row")
    assert [(d.line, d.reason) for d in damage] == (
        [(3, "it was not written to its end")] if moment == "half of the row" else []
    )
    name = store.append(row(9, 9, pad="猫" * 1000))  # the same once more
    assert store.read()[0] == {names[0]: row(0, 0), names[1]: row(0, 1), name: row(9, 9, pad="猫" * 1000)}
    assert len(store.read()[1]) == len(damage)
