"""Every long job, killed by SIGKILL at random moments: nothing half under a final name, the same result when run again,
nothing left over.

A job is run once undisturbed. Then it is killed at a moment drawn from the whole of that time, one to three times in a
row, and run to its end: what it made, and the list of files that it leaves, must be those of the undisturbed run.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from .forked import Ended, call, end, start, thesislib
from .place import Place

ROOM = 6 << 30
PATIENCE = 15  # seconds in which kernels, workers and pip must follow who started them


@dataclass(frozen=True)
class Job:
    """do: what a forked process does, given the case's folder. made: what is under the final name there, comparable;
    None if nothing is. It raises if that is not whole. worker: kill one of its workers instead of it. once: what is
    made already is refused.
    """

    name: str
    do: Callable[[Path], Callable[[], int | None]]
    made: Callable[[Path, Ended | None], object]
    worker: bool = False
    once: bool = False


def jobs(here: Place) -> list[Job]:
    """The long jobs there are."""

    def compress(name: str, *options: str) -> Job:
        recipe = here / "recipes" / f"{name}.yaml"
        return Job(
            f"compress {name}", lambda case: thesislib(*here.compressed(recipe, case / "out"), *options), _artifact
        )

    def export(name: str, *options: str) -> Job:
        args = ["export", here / "quantised" if name == "gptq" else here / "pruned", *options]
        return Job(f"export {name}", lambda case: thesislib(*args, "--out", case / "out.gguf"), _files, once=True)

    return [
        *(compress(name) for name in ("pruned", "quantised", "trained")),
        compress("streamed", "--stream-weights"),
        Job("conversion", lambda case: thesislib(*here.measured(here / "F16.gguf")), _value),
        export("gguf", "--gguf", "Q8_0"),
        export("gptq", "--gptq"),
        Job("run", lambda case: _run(here, case), _notebook),
        Job("fetch", lambda case: lambda: _fetch(here), _wheel),
        Job("sweep, driver", lambda case: lambda: _sweep(here, case), _rows),
        Job("sweep, worker", lambda case: lambda: _sweep(here, case), _rows, worker=True),
    ]


def kill(job: Job, here: Place, kills: int, seed: int) -> dict:
    """Kill a job so many times; {"kills", "runs", "bad": [(what, how to see it again)]}."""
    rng, bad, done, runs = random.Random(f"{seed} {job.name}"), [], 0, 0
    case = here.root / "kills" / job.name.replace(" ", "-")
    fresh(case)
    alone = call(_in(job, case), case, environment(here, case), 120, ROOM)
    if alone.code:
        return {"kills": 0, "runs": 1, "bad": [("fails undisturbed", alone.trouble or alone.err[-300:])]}
    expected, listed, whole = job.made(case, alone), listing(case), alone.seconds
    fresh(case)
    tries = 0
    while done < kills and tries < 4 * kills and len(bad) < 20:
        tries += 1
        moment = rng.uniform(0, 1) * whole
        ended = killed(job, here, case, moment, rng)
        how = f"seed {seed}, {job.name}, kill {done + 1} after {moment:.2f} of {whole:.2f} s"
        if ended.signal == signal.SIGKILL or (job.worker and ended.err.startswith("KILLED\n")):
            done += 1
        bad += [(what, how) for what in outlived(case)]
        gave_up = job.worker and ended.code == 1 and not ended.trouble  # said in one line, and the next start goes on
        if ended.code == 0 or ended.signal == signal.SIGKILL or gave_up:
            bad += _judged(job, case, ended if ended.code == 0 else None, expected, how)
        else:
            bad.append((f"neither done nor killed: {ended.trouble or ended.err.strip()[-200:]}", how))
        # killed between its last step and its end: started again, it would refuse to replace what it has written
        finished = job.once and (case / "out.gguf").exists()
        if job.worker or ended.code == 0 or finished or rng.random() < 0.5 or done == kills:
            over = (job.worker and ended.code == 0) or finished
            if not over:
                again = call(_in(job, case), case, environment(here, case), 120, ROOM)
                runs += 1
                if again.code:
                    bad.append((f"does not go on: {again.trouble or again.err.strip()[-200:]}", how))
                else:
                    bad += _judged(job, case, again, expected, how, must=True)
            if left := listing(case) - listed:
                bad.append((f"left over: {', '.join(sorted(left))[:200]}", how))
            fresh(case)
    return {"kills": done, "runs": runs, "bad": bad}


def killed(job: Job, here: Place, case: Path, moment: float, rng: random.Random) -> Ended:
    """Start a job and kill it, or one of its workers, after some seconds, if it is not done before."""
    began = time.monotonic()
    pid = start(_in(job, case), case, environment(here, case), 120, ROOM)
    note = ""
    while time.monotonic() - began < moment and not _over(pid):
        time.sleep(0.005)
    if job.worker:
        while not _over(pid) and not (found := _workers(pid)) and time.monotonic() - began < 60:
            time.sleep(0.01)
        if not _over(pid) and found:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)
                note = "KILLED\n"
    elif not _over(pid):
        os.kill(pid, signal.SIGKILL)
    if not job.worker:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        until = time.monotonic() + PATIENCE
        while (still := family(pid, case)) and time.monotonic() < until:
            time.sleep(0.05)
        if still:
            (case.parent / f"{case.name}.outlived").write_text(
                json.dumps([psutil.Process(p).cmdline()[:8] for p in still if psutil.pid_exists(p)])
            )
        for process in still:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    ended = end(pid, case, began)
    return replace(ended, err=note + ended.err)


def outlived(case: Path) -> list[str]:
    """Processes that went on when the one that started them was dead."""
    note = case.parent / f"{case.name}.outlived"
    if not note.exists():
        return []
    said = note.read_text()
    note.unlink()
    return [f"outlived by {PATIENCE} s: {said[:200]}"]


def family(pid: int, case: Path) -> list[int]:
    """The processes that a forked one has started, and theirs: those of its session, and those with the case's cache in
    their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, OSError):
            if process.pid in (pid, os.getpid()) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) == pid or process.environ().get("THESISLIB_CACHE") == str(case / "cache"):
                found.append(process.pid)
    return found


def _workers(pid: int) -> list[int]:
    """Dask's workers: children of the driver that compute, not the interpreter's own helpers."""
    with suppress(psutil.Error):
        return [
            p.pid
            for p in psutil.Process(pid).children(recursive=True)
            if "resource_tracker" not in " ".join(p.cmdline())
        ]
    return []


def _over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _judged(
    job: Job, case: Path, ended: Ended | None, expected: object, how: str, must: bool = False
) -> list[tuple[str, str]]:
    """What is wrong with what is under the final name."""
    try:
        found = job.made(case, ended)
    except Exception as error:
        return [(f"half under its final name: {type(error).__name__}: {str(error)[:200]}", how)]
    if found is None:
        return [("nothing made, exit 0", how)] if must else []
    if job.name.startswith("sweep") and not must:  # its rows come one by one
        return [] if set(found) <= set(expected) else [("other rows", how)]
    return [] if found == expected else [(f"another result: {str(found)[:80]} for {str(expected)[:80]}", how)]


def environment(here: Place, case: Path) -> dict[str, str]:
    return here.environment(case / "cache") | {
        "TMPDIR": str(case / "tmp"), "JUPYTER_RUNTIME_DIR": str(case.parent / "jupyter"), "IPYTHONDIR": str(case.parent / "ipython"),
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(here / "index"),
    }  # fmt: skip


def fresh(case: Path) -> None:
    """An empty folder for a case."""
    shutil.rmtree(case, ignore_errors=True)
    (case / "tmp").mkdir(parents=True)


def listing(case: Path) -> set[str]:
    """All that lies there but for locks and Dask's own folder, which Dask clears when it comes by."""
    found = (p.relative_to(case).as_posix() for p in case.rglob("*"))
    jupyters = re.compile(
        r"tmp/tmp\w{8}\.json"
    )  # its note for a kernel, 300 bytes, which no program but it may take away
    return {
        f
        for f in found
        if not f.endswith(".lock")
        and f not in (".out", ".err")
        and not re.search(r"dask-scratch-space|\.claims", f)
        and not jupyters.fullmatch(f)
    }


def _in(job: Job, case: Path) -> Callable[[], int | None]:
    def do() -> int | None:
        tempfile.tempdir = None  # TMPDIR is the case's
        return job.do(case)()

    return do


# ---------------------------------------------------------------- the jobs


def _run(here: Place, case: Path) -> Callable[[], int]:
    from thesislib import runner

    def do() -> int:
        runner.chapters = lambda *_: {"01_book": here / "book.ipynb"}
        return thesislib("run", "01", "-p", "k=7", "--out", case / "out.ipynb")()

    return do


def _fetch(here: Place) -> None:
    from thesislib.sources import wheels

    wheels.manifest = lambda: here.manifest
    wheels.wheel_folder("tinywheel")


def _sweep(here: Place, case: Path) -> int:
    args = [
        "sweep",
        here / "grid.yaml",
        "--out",
        case / "rows.jsonl",
        "--subject",
        here / "subject",
        "--data",
        here / "data",
        "--dtype",
        "float32",
    ]
    return thesislib(*args, "--workers", "2", "--threads", "1", "--retries", "3")()


# ---------------------------------------------------------------- what they made


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _artifact(case: Path, ended: Ended | None) -> object:
    from thesislib.formats.artifact_json import read_artifact

    return read_artifact(case / "out")["fingerprint"] if (case / "out").exists() else None


def _files(case: Path, ended: Ended | None) -> object:
    out = case / "out.gguf"
    if out.is_dir():
        assert (out / "config.json").is_file() and list(out.glob("*.safetensors")), f"{sorted(os.listdir(out))}"
        return {p.relative_to(out).as_posix(): sha256(p) for p in out.rglob("*") if p.is_file()}
    return sha256(out) if out.exists() else None


def _value(case: Path, ended: Ended | None) -> object:
    return ended and [ended.json()[key] for key in ("value", "low", "high", "n")]


def _notebook(case: Path, ended: Ended | None) -> object:
    import nbformat

    out = case / "out.ipynb"
    return [c.get("outputs") for c in nbformat.read(out, 4).cells][-1][0]["text"] if out.exists() else None


def _wheel(case: Path, ended: Ended | None) -> object:
    folder = case / "cache" / "wheels" / "tinywheel-1.0"
    return (
        {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}
        if folder.exists()
        else None
    )


def _rows(case: Path, ended: Ended | None) -> object:
    from thesislib.records.store import Store

    store = Store(case / "rows.jsonl")
    if not store.path.exists():
        return None
    rows, damage = store.read()
    assert not damage or ended is None, str(damage)
    found = sorted((m.provenance["sweep"]["label"], m.metric, m.value) for m in rows.values())
    assert len(set(found)) == len(found), "a row twice"
    return found
