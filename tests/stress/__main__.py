"""`python -m tests.stress [--quick] [--seed N] [--only KIND] [--case N] [--json FILE]`: one line a kind; exit 1 if
anything was lost or silently wrong."""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

QUICK = {"kills": 3, "damage": 3, "calls": 30}  # kills a job, files a kind, and each so manieth call
FULL = {"kills": 50, "damage": 200, "calls": 2}
SHORT = {f"kills: {name}" for name in ("compress pruned", "conversion", "fetch")} | {
    f"damage {name}" for name in ("artifact.json", "packed.safetensors", "model.safetensors", "config.json", "tokenizer.json", "cached stage", "cached conversion",
                                  "fingerprint", "records", "items of records", "recipe", "grid", "texts", "wheel's "
                                      "member")
}  # fmt: skip
SHOWN = 3  # cases of one fault that are listed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part, in a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="kinds whose name begins so; as often as needed")
    parser.add_argument("--case", type=int, help="one case of --only, as a fault's line says")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="kinds at a time")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    given = parser.parse_args()
    begun = time.monotonic()
    root = given.keep or Path(tempfile.mkdtemp(prefix="stress-"))
    try:
        found = _all(given, root.resolve())
    finally:
        if not given.keep:
            shutil.rmtree(root, ignore_errors=True)
    bad = sum(len(result["bad"]) for result in found.values())
    print(
        f"{len(found)} kinds, {sum(r.get('cases', 0) + r.get('kills', 0) for r in found.values())} cases in "
        f"{time.monotonic() - begun:.0f} s: {bad} lost or silently wrong"
    )
    if given.json:
        given.json.write_text(
            json.dumps({"seed": given.seed, "seconds": round(time.monotonic() - begun), "kinds": found}, indent=1)
        )
    return int(bad > 0)


def _all(given: argparse.Namespace, root: Path) -> dict[str, dict]:
    for name in [n for n in os.environ if n.startswith("THESISLIB_")]:
        del os.environ[name]
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(root / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    from . import calls, damage, hostile, kills, markup, place

    place.prepared()
    here = place.Place.made(root)
    only = tuple(given.only or [""])
    if not all(name.startswith(("calls", "kills", "markup", "hostile")) for name in only):
        damage.prepared(here, given.quick)
    size = QUICK if given.quick else FULL
    todo: dict[str, Callable[[], dict]] = {}
    for job in kills.jobs(here):
        count = max(1, size["kills"] // 2 if job.name.startswith("sweep") else size["kills"])
        todo[f"kills: {job.name}"] = lambda job=job, count=count: kills.kill(job, here, count, given.seed)
    todo["markup"] = lambda: markup.run(here)
    todo["hostile"] = lambda: hostile.run(here, given.case)
    for part in range(2):
        todo[f"calls {part}"] = lambda part=part: calls.run(here, part, 2, size["calls"], given.seed, given.case)
    todo["calls as an ordinary user"] = lambda: calls.as_nobody(here)
    for kind in damage.kinds(here):
        cases = range(given.case, given.case + 1) if given.case is not None else range(min(size["damage"], kind.cases))
        todo[f"damage {kind.name}"] = lambda kind=kind, cases=cases: damage.run(kind, here, cases, given.seed)
    if given.quick:
        todo = {name: do for name, do in todo.items() if name.startswith("calls ") or name in SHORT}
    todo = {name: do for name, do in todo.items() if name.startswith(only)}
    if not todo:
        sys.exit(f"no kind begins with {given.only!r}")
    return _side_by_side(todo, given.jobs, root)


def _side_by_side(todo: dict[str, Callable[[], dict]], jobs: int, root: Path) -> dict[str, dict]:
    """Each kind in a process of its own, so many at a time; what each found, said as it comes."""
    waiting, running, found = list(todo), {}, {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            note = root / f"result-{len(todo) - len(waiting)}.json"
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    began = time.monotonic()
                    result = todo[name]()
                    spent = sum(os.times()[:4])  # of the processor, forked cases too
                    note.write_text(
                        json.dumps(
                            result | {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(spent, 1)}
                        )
                    )
                    code = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[pid] = name, note
        pid, status = os.wait()
        name, note = running.pop(pid)
        found[name] = (
            json.loads(note.read_text())
            if status == 0
            else {"bad": [("the harness itself failed, see above", f"--only {name!r}")]}
        )
        _say(name, found[name])
    return {name: found[name] for name in todo}


def _say(name: str, result: dict) -> None:
    counts = ", ".join(
        f"{value} {key}" for key, value in result.items() if key not in ("bad", "seconds", "cpu_seconds")
    )
    print(
        f"{name}: {counts}; {len(result['bad'])} lost or silently wrong; {result.get('seconds', 0):.0f} s, "
        f"{result.get('cpu_seconds', 0):.0f} s of a core",
        flush=True,
    )
    alike = defaultdict(list)
    for what, how in result["bad"]:
        alike[re.sub(r"[\d.]+|'.*?'", "#", what)[:50]].append((what, how))
    for cases in sorted(alike.values(), key=len, reverse=True):
        print(f"  {len(cases)} x {cases[0][0]!s:.220}")
        for _, how in cases[:SHOWN]:
            print(f"      {how!s:.300}")


if __name__ == "__main__":
    sys.exit(main())
