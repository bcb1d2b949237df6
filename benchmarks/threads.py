"""How threads should wait: tokens per second of the bare forward pass on two threads, on a quiet machine and with one
core kept busy.

Each setting runs in a process of its own, in turns, since OpenMP reads its settings once.
"""

import json
import os
import statistics
import subprocess
import sys

WAYS = {
    "OpenMP's default": {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "as thesislib sets it": {"GOMP_SPINCOUNT": "1000"},
}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
CHILD = """
import json, sys, torch
from benchmarks.packed import tokens_per_second
from thesislib.formats.load import load_subject
torch.set_num_threads(int(sys.argv[1]))
subject = load_subject(dtype="bfloat16")
tokens_per_second(subject)
print(json.dumps(tokens_per_second(subject)))
"""


def waiting(repeats: int = 3, threads: int = 2) -> dict:
    """Median tokens per second by setting, on a quiet machine and with a loop on the first core (Linux)."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    speeds: dict[str, dict[str, list]] = {}
    for _ in range(repeats):
        for busy in (False, True):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                if loop:
                    os.sched_setaffinity(loop.pid, cores[:1])
                for way, setting in WAYS.items():
                    # torch first, so that thesislib leaves the setting as it is here
                    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | setting
                    command = [sys.executable, "-c", CHILD, str(threads)]
                    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                    speeds.setdefault(f"{way}, {'one core busy' if busy else 'quiet'}", []).append(json.loads(out))
            finally:
                if loop:
                    loop.kill()
                    loop.wait()
    result = {
        way: {part: round(statistics.median(s[part] for s in samples), 1) for part in samples[0]}
        for way, samples in speeds.items()
    }
    return {**result, "threads": threads}


if __name__ == "__main__":
    print(json.dumps(waiting(int(sys.argv[1]) if len(sys.argv) > 1 else 3), indent=1))
