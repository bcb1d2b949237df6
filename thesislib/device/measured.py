"""A measurement on this machine in words and as JSON: times, bytes, and their shares of the machine's bandwidth and
arithmetic."""

import json
import os
import statistics
import time
from pathlib import Path

from thesislib.device.cost import costs
from thesislib.device.host import mac_rate, read_bandwidth
from thesislib.device.measure import (
    QUIET,
    Timing,
    as_measurement,
    bytes_per_token,
    computed_in,
    file_type,
    gguf_file,
    prompt_ids,
    time_llama_cpp,
    time_transformers,
)
from thesislib.errors import BadInput
from thesislib.model.subject import Subject

MEMORY_READ = "what one thread of this machine reads from memory, measured just before by a sum over 256 MiB"


def measured_report(
    subject: Subject,
    spec: str,
    kind: str = "Q8_0",
    prompt: int = 128,
    tokens: int = 32,
    repeats: int = 5,
    core: int = 0,
    beside: bool = True,
) -> dict:
    """The whole measurement in SI units, with JSON's types only.

    Args:
        subject: the model.
        spec: that it was loaded from. A .gguf file runs as it is; of anything else one is written.
        kind: the GGUF type of that file.
        prompt, tokens, repeats, core: see `thesislib.device.measure.time_llama_cpp`.
        beside: measure transformers' own generation too, in the subject's dtype.

    Returns:
        llama.cpp, transformers: records with every sample, see `thesislib.device.measure.as_measurement`. utilisation:
        MBU and MFU of llama.cpp, each with its denominator, measured just before. notes: for readers.

    Raises:
        BadInput: more tokens than the model's context; a type that cannot be written; whatever the engine refuses.
    """
    most = subject.model.config.max_position_embeddings
    if prompt + tokens + 1 > most:
        raise BadInput(
            f"a prompt of {prompt} and {tokens + 1} tokens after it are more than {subject.name}'s context of "
            f"{most}: expected fewer"
        )
    own = Path(spec).suffix == ".gguf"
    if core not in _cores():
        raise BadInput(f"core {core} is not ours: expected one of {', '.join(map(str, _cores()))}")
    file = Path(spec) if own else gguf_file(subject, kind)
    bandwidth, precision = statistics.median(read_bandwidth()), computed_in(file_type(file))
    arithmetic = statistics.median(mac_rate(precision, "gemm"))
    started, ids = time.perf_counter(), prompt_ids(subject, prompt)
    timing = time_llama_cpp(file, ids, tokens, repeats, core)
    # of the cache a token reads the prompt's part, and on average half of the part that decoding adds
    cache = timing.bytes["cache"] * (prompt + tokens / 2) / (prompt + tokens)
    read, macs = bytes_per_token(file) + cache, costs(subject, prompt, 0).macs
    report = {
        "kind": "measurement",
        "subject": subject.name,
        "llama.cpp": _as_json(subject, timing, started),
        "utilisation": {
            "MBU": {
                "value": read / timing.seconds_per_token / bandwidth,
                "bytes per token": read,
                "bytes per second": bandwidth,
                "denominator": MEMORY_READ,
            },
            "MFU": {
                "value": macs / timing.seconds_to_first_token / arithmetic,
                "MACs of the prompt": macs,
                "MACs per second": arithmetic,
                "denominator": f"one thread's {precision} matrix product in torch, measured just before",
            },
        },
        "notes": _notes(timing.verdict, own, kind),
    }
    if beside:
        started = time.perf_counter()
        report["transformers"] = _as_json(subject, time_transformers(subject, ids, tokens, repeats), started)
    return report


def _as_json(subject: Subject, timing: Timing, started: float) -> dict:
    """The record of a timing, as JSON."""
    return json.loads(as_measurement(subject, timing, started).to_json())


def _cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _notes(verdict: str, own: bool, kind: str) -> list[str]:
    """The notes of a report: on a busy machine, and on a file of type `kind` that is not the user's own."""
    notes = []
    if verdict != QUIET:
        notes.append(f"Not to be believed as it stands, {verdict}: stop what else runs here and measure again.")
    if not own and kind != "F16":
        notes.append(
            f"The file rounds every matrix to {kind}'s own grid, also those that were quantised before; zeros "
            "are stored and multiplied."
        )
    return notes


def readable(report: dict) -> str:
    """A measurement of `measured_report` in a few lines."""
    lines = [f"{report['subject']}, measured on this machine, one thread"]
    for m in (report["llama.cpp"], report.get("transformers")):
        if m is None:
            continue
        extra, size = m["extra"], m["extra"]["bytes"]
        value, low, high = (f"{1e3 * m[key]:.2f}" for key in ("value", "low", "high"))
        lines.append(
            f"  {m['task']}: {value} ms per token [{low}, {high}] (quartiles), {extra['tokens per second']:.1f} "
            f"tokens/s; first in {1e3 * extra['seconds to first token']:.0f} ms, prompt "
            f"{extra['prompt tokens per second']:.0f} tokens/s; {extra['verdict']}"
        )
        rest = ""
        if "cache" in size:
            rest = f", cache {size['cache'] / 1e6:.1f} MB, process {size['resident'] / 1e6:.0f} MB at its highest"
        lines.append(f"    weights {size['weights'] / 1e6:.1f} MB{rest}")
    for name, share in report["utilisation"].items():
        lines.append(f"  {name} {share['value']:.0%} of {share['denominator']}")
    return "\n".join([*lines, *(f"  note: {note}" for note in report["notes"])])
