"""Sweeps on real worker processes: what is measured, what a second start does, and what deaths, other versions and full
disks leave."""

import errno
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from typer.testing import CliRunner

import thesislib
from tests.fakes import processes
from thesislib.cli import app
from thesislib.errors import BadInput
from thesislib.experiment import again, identity_of
from thesislib.formats.load import save_checkpoint
from thesislib.notebooks import listed
from thesislib.records.store import Store, select
from thesislib.runner import chapters, results
from thesislib.sweep.grid import read_grid
from thesislib.sweep.notebooks import sweep_notebook
from thesislib.sweep.run import FAILED, Target, missing, possible, sweep
from thesislib.sweep.task import card_of_worker, carry_out, versions
from thesislib.sweep.workers import Order, Workers, drive
from thesislib.tables import ResultsTable

dask = pytest.importorskip("dask", reason="sweeps need Dask: the extra sweep")
METHOD = "distributed.worker.multiprocessing-method"
GRID = """
groups:
  some: [[none, D1], [none, "W1:8"]]
sizes:
  quick:
    measures: {perplexity: {on: wikitext, length: 32, limit: 5}}
    timed: 3
  more:
    measures: {perplexity: {on: wikitext, length: 32, limit: 5}, closed: {on: trivia, limit: 4}}
"""
LOOPBACK = {"127.0.0.1", "::1"}
LABELS = ["dense", "W1:8", "D1", "D1+W1:8"]


def on_workers(test):
    """A test that starts workers."""
    return pytest.mark.processes(pytest.mark.usefixtures("forked_workers")(test))


@pytest.fixture(scope="module")
def forked_workers(own_cache):
    """Workers begin with everything imported, which is not how they begin elsewhere (spawned), and takes no time."""
    processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        own = {name: os.environ[name] for name in ("THESISLIB_CACHE", "HF_HUB_OFFLINE")}
        with dask.config.set({METHOD: "forkserver", "distributed.nanny.environ": own}):
            yield


@pytest.fixture(scope="module")
def place(own_cache, tiny, tiny_data, tmp_path_factory):
    folder = save_checkpoint(tiny(layers=8), tmp_path_factory.mktemp("subject") / "tiny")
    return Target(str(folder), tiny_data, "float32")


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("grid") / "small.yaml"
    file.write_text(GRID)
    return file


@contextmanager
def watched():
    """Collects, until it is left, the addresses that this process and those below it listen at, and the variables that
    Dask's workers were started with."""
    seen, over = SimpleNamespace(addresses=set(), environments={}), threading.Event()

    def watch():
        while not over.wait(0.2):
            for process in (me := psutil.Process(), *me.children(recursive=True)):
                with suppress(psutil.Error):
                    every = process.net_connections("inet")
                    seen.addresses.update(c.laddr.ip for c in every if c.status == psutil.CONN_LISTEN)
                    if any("spawn_main" in word for word in process.cmdline()):
                        seen.environments[process.pid] = process.environ()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def swept(place, grid_file, forked_workers, tmp_path_factory):
    """A store with the whole of size quick, what failed, and what was seen meanwhile."""
    store = Store(tmp_path_factory.mktemp("swept") / "small.jsonl")
    with watched() as seen:
        failed = sweep(read_grid(grid_file, "quick"), place, store, Workers(2))
    return SimpleNamespace(store=store, failed=failed, seen=seen)


def measured(store):
    return sorted((m.provenance["sweep"]["label"], m.metric) for m in store.rows(items=False).values())


WHOLE = sorted((label, metric) for label in LABELS for metric in ("perplexity", "seconds per token"))


@on_workers
def test_a_grid_is_measured_once(swept, place, grid_file, monkeypatch):
    store = swept.store
    assert swept.failed == {} and measured(store) == WHOLE
    monkeypatch.setattr("distributed.LocalCluster", None)  # a second start begins no worker
    assert sweep(read_grid(grid_file, "quick"), place, store, Workers(2)) == {} and measured(store) == WHOLE
    assert missing(read_grid(grid_file, "more"), place, [store]) == {label: ["closed"] for label in LABELS}
    assert not [*store.path.parent.glob("**/*.tmp")]


@on_workers
def test_a_record_of_a_sweep_is_made_again(swept, place):
    rows = [m for m in swept.store.rows().values() if m.metric == "perplexity"]
    pruned = next(m for m in rows if m.provenance["made"]["label"] == "D1+W1:8")
    assert again(pruned, place.subject, place.data).agrees
    note = dict(pruned.provenance["sweep"])
    assert note.pop("seconds_to_make") > 0 and note == {
        "grid": "small",
        "size": "quick",
        "group": "some",
        "label": "D1+W1:8",
    }


@on_workers
def test_workers_have_the_threads_they_are_given(place, grid_file, tmp_path):
    store, grid = Store(tmp_path / "s.jsonl"), read_grid(grid_file, "quick")
    one = replace(grid, configurations=grid.configurations[:1])
    with dask.config.set({METHOD: "spawn"}), watched() as seen:
        assert sweep(one, place, store, Workers(1, threads=2)) == {}
    assert {m.provenance["hardware"]["torch_threads"] for m in store.rows(items=False).values()} == {2}
    (environment,) = seen.environments.values()
    assert environment["MKL_NUM_THREADS"] == "2"
    # nor does Dask's advice against keeping memory reach them, which halves their speed
    assert "MALLOC_TRIM_THRESHOLD_" not in environment and "MALLOC_TRIM_THRESHOLD_" not in os.environ
    timed = missing(replace(one, timed=7), place, [store])  # other repetitions are another measurement
    assert timed == {"dense": ["seconds per token"]}


@on_workers
def test_everything_listens_on_loopback_only(swept):
    assert swept.seen.addresses and swept.seen.addresses <= LOOPBACK


@on_workers
def test_records_of_another_subject_do_not_count(swept, tiny, place, grid_file, tmp_path):
    other = Target(str(save_checkpoint(tiny(layers=8, seed=1), tmp_path / "tiny")), place.data, "float32")
    grid = read_grid(grid_file, "quick")
    assert set(missing(grid, other, [swept.store])) == set(LABELS)
    names = set(map(identity_of, swept.store.rows().values()))
    assert None not in names and len(names) == len(WHOLE)
    assert set(missing(grid, Target(place.subject, place.data, "bfloat16"), [swept.store])) == set(LABELS)


def test_a_grid_less_what_a_subject_cannot_be_made_into(place, grid_file, tiny, tmp_path):
    grid = read_grid(grid_file, "quick")
    assert possible(grid, place) == (grid, {})
    shallow = Target(str(save_checkpoint(tiny(layers=6), tmp_path / "shallow")), place.data, "float32")
    kept, why = possible(grid, shallow)
    assert [c.label for c in kept.configurations] == ["dense", "W1:8"] and set(why) == {"D1", "D1+W1:8"}
    assert all("cannot remove 1 of 6 blocks" in reason for reason in why.values())
    assert set(missing(kept, shallow, [])) == {"dense", "W1:8"}


def test_what_cannot_work_is_said_before_the_first_run(place, tmp_path, monkeypatch):
    file = tmp_path / "wrong.yaml"
    file.write_text(GRID.replace("D1]", "D7, D9]").replace('"W1:8"]', '"W1:8", "W1:5"]'))
    monkeypatch.setattr("distributed.LocalCluster", None)
    with pytest.raises(BadInput, match="7 of the grid's 9 configurations cannot work"):
        sweep(read_grid(file, "quick"), place, Store(tmp_path / "x.jsonl"), Workers(1))


@on_workers
def test_one_that_fails_is_recorded_and_the_rest_goes_on(place, tmp_path):
    file = tmp_path / "hard.yaml"
    text = GRID.replace("groups:", "stages: {Q: {gptq: {group: 32, text: c4, windows: 99999}}}\ngroups:").replace(
        '[none, "W1:8"]', "[none, Q]"
    )
    file.write_text(text.replace("    timed: 3\n", ""))
    store = Store(tmp_path / "hard.jsonl")
    failed = sweep(read_grid(file, "quick"), place, store, Workers(1, retries=0))
    assert set(failed) == {"Q", "D1+Q"} and all("99999" in why or "windows" in why for why in failed.values()), failed
    rows = list(store.rows().values())
    assert sorted(m.provenance["made"]["label"] for m in rows) == ["D1", "D1+Q", "Q", "dense"]
    assert {m.provenance["why"] for m in rows if m.metric == FAILED} == set(failed.values())
    assert all(m.value is None for m in rows if m.metric == FAILED)
    assert set(missing(read_grid(file, "quick"), place, [store])) == {"Q", "D1+Q"}  # to be tried again
    assert select([store], metric="perplexity")


# ---------------------------------------------------------------- orders that die


PRELUDE = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
from thesislib.config import settings
from thesislib.tables import ResultsTable

@dataclass(frozen=True)
class P:
    k: int = 1
    folder: str = ""
"""


@pytest.fixture
def notebook(tmp_path):
    """A factory of notebooks with parameters k and folder, of which one cell is given."""

    def make(code, name="book"):
        nb = nbformat.v4.new_notebook()
        cells = [("", PRELUDE), ("parameters", 'k = 1\nfolder = ""'), ("", "p = settings(P, globals())"), ("", code)]
        table = 'pd.DataFrame({"name": [f"row {k}"], "square": [k * k]}).set_index("name")'
        cells.append(("results", f"ResultsTable({table})"))
        nb.cells = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}) for tag, source in cells]
        nb.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return make


def order(notebook, out, k=1):
    kept = []
    text = {
        "do": "notebook",
        "notebook": str(notebook),
        "out": str(out),
        "parameters": {"k": k, "folder": str(out.parent)},
    }
    return Order(f"k={k}", f"{notebook.stem}-{k}", text, lambda: bool(kept), kept.append), kept


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


@on_workers
def test_a_worker_that_dies_is_replaced_its_kernel_dies_and_an_order_that_kills_them_all_is_named(notebook, tmp_path):
    deadly = notebook(
        'mine = Path(folder) / f"{k}-{os.getpid()}.kernel"\n'
        'mine.write_text(os.environ.get("MALLOC_TRIM_THRESHOLD_", ""))\n'
        'if k == 2 or k == 1 and len(list(Path(folder).glob("1-*.kernel"))) == 1:\n'
        "    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(600)"
    )
    out = tmp_path / "out"
    out.mkdir()
    orders = {k: order(deadly, out / f"book-{k}.ipynb", k) for k in (1, 2, 3)}
    with watched() as seen:
        failed = drive([o for o, _ in orders.values()], Workers(1, retries=1), tmp_path / "claims")
    assert list(failed) == ["k=2"] and "died 2 times" in failed["k=2"]
    answers = [[{"table": [{"name": f"row {k}", "square": k * k}]}] for k in (1, 3)]
    assert [kept for _, kept in orders.values()] == [answers[0], [], answers[1]]
    kernels = [*out.glob("*.kernel")]
    assert sorted(f.stem[0] for f in kernels) == ["1", "1", "2", "2", "3"]
    assert seen.addresses and seen.addresses <= LOOPBACK
    for pid in (int(f.stem[2:]) for f in kernels):
        wait_for(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 5)
    assert [f.name for f in out.glob("*book-1*.ipynb")] == ["book-1.ipynb"]  # nothing half written is left


@on_workers
def test_an_error_is_tried_again(notebook, tmp_path):
    flaky = notebook(
        'if k == 2:\n    1 / 0\nmark = Path(folder) / "mark"\n'
        'if not mark.exists():\n    mark.write_text("x")\n    raise OSError("once")'
    )
    (tmp_path / "out").mkdir()
    once, always = (order(flaky, tmp_path / "out" / f"{k}.ipynb", k) for k in (1, 2))
    failed = drive([once[0], always[0]], Workers(1, retries=1), tmp_path / "claims")
    assert list(failed) == ["k=2"] and "ZeroDivisionError" in failed["k=2"]
    assert len(once[1]) == 1 and not always[1]


@on_workers
def test_a_notebook_is_swept_into_one_table(notebook, tmp_path):
    book = notebook("if k == 3: raise ValueError('three')")
    nb = nbformat.read(book, 4)
    nb.cells[-1].source = f"None if k == 4 else {nb.cells[-1].source}"
    nbformat.write(nb, book)
    table, failed = sweep_notebook("squares", book, {"k": [1, 3, 4, 2]}, tmp_path / "out", Workers(1, retries=0))
    assert list(failed) == ["k=3", "k=4"] and "three" in failed["k=3"] and "hands over no table" in failed["k=4"]
    assert table.read_text() == "k,name,square\n1,row 1,1\n2,row 2,4\n"
    assert len([*(tmp_path / "out").glob("squares-*.ipynb")]) == 4  # one of them the failed one, up to its error
    with pytest.raises(BadInput, match="unknown parameter of book 'kk': did you mean 'k'"):
        sweep_notebook("squares", book, {"kk": [1]}, tmp_path / "out", Workers(1))


def test_options_that_a_notebook_does_not_take_are_refused():
    for options, named in ((["--dry-run"], "--dry-run"), (["--data", "embedded", "--with", "x"], "--with, --data")):
        run = CliRunner().invoke(app, ["sweep", "--chapter", "02", *options])
        assert run.exit_code == 2 and f"with --chapter {named} would do nothing" in run.output
    assert "either a grid's file or --chapter" in CliRunner().invoke(app, ["sweep"]).output
    assert "-p goes with --chapter" in CliRunner().invoke(app, ["sweep", "data/grid.yaml", "-p", "k=1"]).output


def test_workers_that_share_a_card_take_equal_parts_of_it():
    assert Workers(2).resources is None
    assert Workers(1, gpu=True).resources == {"GPU": 1}
    for per_card in (1, 2, 3, 7, 8):
        crew = Workers(per_card, gpu=True, per_card=per_card)
        assert per_card * crew.resources["GPU"] == pytest.approx(1)
        crew.check_cards(1)
        Workers(4 * per_card, gpu=True, per_card=per_card).check_cards(4)
        with pytest.raises(
            BadInput,
            match=rf"--workers is {2 * per_card + 1}, and this machine has 2 cards: expected at most {2 * per_card}, "
            rf"or --per-card {per_card + 1}",
        ):
            Workers(2 * per_card + 1, gpu=True, per_card=per_card).check_cards(2)
    with pytest.raises(BadInput, match="this machine has 0 cards: expected at most 0$"):
        Workers(2, gpu=True, per_card=2).check_cards(0)
    Workers(99, "tcp://somewhere:1", gpu=True).check_cards(0)  # the cards are elsewhere
    with pytest.raises(BadInput, match="--per-card is 0: expected at least 1"):
        Workers(1, gpu=True, per_card=0)
    with pytest.raises(BadInput, match="--per-card is 2, and no card is asked for: expected --device cuda"):
        Workers(2, per_card=2)


@pytest.mark.parametrize(
    ("number", "per_card", "card", "share"),
    [(0, 1, "cuda:0", None), (1, 1, "cuda:1", None), (5, 4, "cuda:1", 0.95 / 4), ("a", 2, "cuda", 0.95 / 2)],
)
def test_workers_are_dealt_to_the_cards_in_turns(monkeypatch, number, per_card, card, share):
    shares = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: shares.append((part, device))
    )
    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(name=number))
    assert card_of_worker("cuda", per_card) == card
    assert shares == ([(share, card)] if share else [])
    assert card_of_worker("cpu", 1) == "cpu" and card_of_worker("cuda:1", 1) == "cuda:1"


def test_cards_are_not_shared(tmp_path):
    one = Order("x", "x", {}, lambda: False, lambda answer: None)
    with pytest.raises(BadInput, match=r"--workers is 99, and this machine has \d+ cards?: expected at most \d+"):
        drive([one], Workers(99, gpu=True), tmp_path)


def test_a_notebook_without_results_is_refused(notebook, tmp_path):
    nb = nbformat.read(notebook("1"), 4)
    with pytest.raises(BadInput, match="hands over no table"):
        results(tmp_path / "book.ipynb")
    nb.cells = nb.cells[:-1]
    nbformat.write(nb, tmp_path / "none.ipynb")
    with pytest.raises(BadInput, match="0 cells tagged 'results'"):
        results(tmp_path / "none.ipynb")


def test_headings_that_stand_twice_are_numbered(notebook, tmp_path):
    nb = nbformat.read(notebook("1"), 4)
    table = pd.DataFrame([[1, 2, 3]], pd.Index(["a"], name="name"), ["k", "x", "x"])
    bundle = ResultsTable(table)._repr_mimebundle_()
    nb.cells[-1].outputs = [nbformat.v4.new_output("execute_result", bundle, execution_count=1)]
    nbformat.write(nb, tmp_path / "twice.ipynb")
    assert results(tmp_path / "twice.ipynb") == [{"name": "a", "k": 1, "x": 2, "x (2)": 3}]


def test_lists_of_values_are_read():
    width, franken = chapters()["03_width_pruning"], chapters()["01_franken_llama"]
    assert listed(width, [("patterns", "[1:8],[2:4]")]) == {"patterns": [["1:8"], ["2:4"]]}
    assert listed(franken, [("windows", "2,4,6"), ("prompt", "2026-01-01, it")]) == {
        "windows": [2, 4, 6],
        "prompt": ["2026-01-01", "it"],
    }
    for text in ("", "[1", "{"):
        with pytest.raises(BadInput):
            listed(franken, [("windows", text)])


# ---------------------------------------------------------------- schedulers


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


WORKER = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")


def dask_command(name, words, environment, number):
    """In a process of its own: `dask scheduler` or `dask worker`, of this version of thesislib or another."""
    os.environ.update(environment)
    dask.config.refresh()
    thesislib.__version__ = number
    import_module(f"distributed.cli.dask_{name}").main(words, standalone_mode=False)


@contextmanager
def running(name, *words, number=thesislib.__version__, **environment):
    given = {"THESISLIB_CACHE": os.environ["THESISLIB_CACHE"], **environment}
    process = processes().Process(target=dask_command, args=(name, words, given, number))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def scheduler(port, *words, **environment):
    words = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard", *words)
    with running("scheduler", *words, **environment) as process:
        wait_for(lambda: _open(port))
        yield process


@on_workers
def test_a_scheduler_killed_and_started_again(place, grid_file, tmp_path):
    store, grid, port = Store(tmp_path / "s.jsonl"), read_grid(grid_file, "quick"), free_port()
    at = f"tcp://127.0.0.1:{port}"
    crew = Workers(scheduler=at)
    with running("worker", at, *WORKER):
        with scheduler(port) as first:
            killer = threading.Thread(target=lambda: (wait_for(store.path.exists, 120), first.kill()))
            killer.start()
            with pytest.raises(RuntimeError, match=f"the scheduler at tcp://127.0.0.1:{port} is gone"):
                sweep(grid, place, store, crew)
            killer.join()
        before = measured(store)
        assert before and len(before) < len(WHOLE)
    with scheduler(port), running("worker", at, *WORKER):
        assert sweep(grid, place, store, crew) == {}
    assert measured(store) == WHOLE


@on_workers
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_an_encrypted_sweep_on_workers_with_caches_of_their_own(place, grid_file, tmp_path):
    """As book/rerun.md says for more machines; these two share nothing but the network."""
    key, cert, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    made = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        cert,
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    )
    subprocess.run(made, check=True, capture_output=True)
    names = {"ca-file": cert} | {
        f"{who}.{what}": file
        for who in ("scheduler", "worker", "client")
        for what, file in (("cert", cert), ("key", key))
    }
    environment = {
        f"DASK_DISTRIBUTED__COMM__TLS__{n.replace('.', '__').replace('-', '_').upper()}": str(file)
        for n, file in names.items()
    }
    at, store = f"tls://127.0.0.1:{port}", Store(tmp_path / "s.jsonl")
    caches = [str(tmp_path / name) for name in ("here", "there")]
    with ExitStack() as stack:
        stack.enter_context(scheduler(port, "--protocol", "tls", **environment))
        for cache in caches:
            where = {**environment, "THESISLIB_CACHE": cache}
            stack.enter_context(running("worker", at, *WORKER, **where))
        with pytest.raises(BadInput, match="this driver has no certificate"):
            sweep(read_grid(grid_file, "quick"), place, store, Workers(scheduler=at))
        with pytest.raises(BadInput, match="no scheduler answers at tcp://"):  # nor does anyone without TLS
            sweep(read_grid(grid_file, "quick"), place, store, Workers(scheduler=at.replace("tls", "tcp")))
        with dask.config.set({f"distributed.comm.tls.{n}": str(file) for n, file in names.items()}):
            assert sweep(read_grid(grid_file, "quick"), place, store, Workers(scheduler=at)) == {}
    assert measured(store) == WHOLE
    assert all(any(Path(cache).rglob("*.safetensors")) for cache in caches), (
        "both should have made something, in their own cache"
    )


def test_no_scheduler_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("thesislib.sweep.workers.CONNECT", 1)
    one = Order("x", "x", {}, lambda: False, lambda answer: None)
    with pytest.raises(BadInput, match="no scheduler answers at tcp://127.0.0.1"):
        drive([one], Workers(scheduler=f"tcp://127.0.0.1:{free_port()}"), tmp_path)
    with pytest.raises(BadInput, match="--scheduler is 'nonsense://x': expected such as tcp://"):
        drive([one], Workers(scheduler="nonsense://x"), tmp_path)


@on_workers
def test_a_worker_of_another_version_is_refused(tmp_path):
    port = free_port()
    at, one = f"tcp://127.0.0.1:{port}", Order("x", "x", {}, lambda: False, lambda answer: None)
    with (
        scheduler(port),
        running("worker", at, *WORKER, number="0.0.1"),
        pytest.raises(BadInput, match=r"has thesislib 0\.0\.1.*Expected thesislib"),
    ):
        drive([one], Workers(scheduler=at), tmp_path)
    with pytest.raises(RuntimeError, match=r"the order is from thesislib 9"):  # one that joined later
        carry_out(json.dumps({"versions": {**versions(), "thesislib": "9"}}))


def _open(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


# ---------------------------------------------------------------- disks, and two drivers


@on_workers
def test_a_full_disk_stops_the_sweep_and_leaves_what_was_there(place, grid_file, tmp_path, monkeypatch):
    store, grid, real = Store(tmp_path / "s.jsonl"), read_grid(grid_file, "quick"), os.fsync
    writes = []

    def full(file):
        path = Path(f"/proc/self/fd/{file}").readlink()
        writes.extend([path] if path.parent == tmp_path else [])
        if len(writes) > 4:  # two rows, each with its items
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BadInput, match="No space left on device"):
            sweep(grid, place, store, Workers(1))
    assert len(measured(store)) == 2
    assert sweep(grid, place, store, Workers(1)) == {} and measured(store) == WHOLE


def command_line(cache, log, args):
    """In a process of its own: `thesislib` with these words, its stderr in a file."""
    os.environ["THESISLIB_CACHE"] = cache
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    app(args, standalone_mode=False)


@on_workers
def test_two_drivers_on_one_store(place, grid_file, tmp_path):
    from distributed import LocalCluster

    store, logs, drivers = tmp_path / "s.jsonl", [tmp_path / "one", tmp_path / "two"], []
    ours = {"processes": True, "threads_per_worker": 1, "dashboard_address": None, "memory_limit": 0}
    with LocalCluster(n_workers=2, **ours, silence_logs=50) as cluster:
        args = ["sweep", str(grid_file), "--out", str(store), "--subject", place.subject, "--data", place.data]
        args += ["--dtype", "float32", "--scheduler", cluster.scheduler_address]
        for log in logs:
            given = (os.environ["THESISLIB_CACHE"], log, args)
            drivers.append(processes().Process(target=command_line, args=given))
            drivers[-1].start()
        for driver in drivers:
            driver.join(240)
    said = [log.read_text() for log in logs]
    assert [driver.exitcode for driver in drivers] == [0, 0], said
    assert measured(Store(store)) == WHOLE
    done = [line for err in said for line in err.splitlines() if ": done; " in line]
    assert len(done) == len(LABELS)  # nothing was carried out twice
