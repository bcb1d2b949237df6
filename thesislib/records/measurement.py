"""A measurement with everything needed to make it again."""

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

import thesislib
from thesislib.errors import BadInput
from thesislib.model.subject import Subject
from thesislib.records.schema import Made


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One number, its 95 % interval, and the outcomes that it was computed from.

    Attributes:
        task: the text or the items, e.g. "WikiText-2 test".
        metric: the name of the number, e.g. "perplexity".
        value: the number.
        low: the lower bound of its interval.
        high: the upper bound.
        n: how many items.
        unit: of an item, e.g. "question".
        items: one dict an item, in order, with at least "id", so that two subjects can be compared item by item.
        extra: further numbers of the same run, by name.
        provenance: everything needed to make it again, see `thesislib.records.schema.Provenance`.
        id: of the row that it was read from; "" for one that was not read from records.
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    items: list[dict[str, Any]] = field(repr=False)
    extra: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    id: str = field(default="", repr=False, compare=False)

    @property
    def made(self) -> Made:
        """How the measured model came about, see `thesislib.records.schema.Made`; {} if the record does not say."""
        return cast(Made, self.provenance.get("made") or {})

    @property
    def label(self) -> str | None:
        """The label of the configuration; None if the record does not say."""
        return self.made.get("label")

    @property
    def stages(self) -> list[dict[str, dict]]:
        """Each stage as {word: settings}."""
        return self.made.get("stages", [])

    @property
    def disk_bytes(self) -> int | None:
        """The bytes of the artifact's files of weights; None if they were not counted."""
        return self.made.get("bytes", {}).get("bytes_on_disk")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the measure, see `thesislib.records.schema.Settings`; {} if the record does not say."""
        return self.provenance.get("settings", {})

    @property
    def open_book(self) -> bool:
        """Whether questions were asked with a passage."""
        return bool(self.settings.get("open_book"))

    @property
    def chapter(self) -> dict[str, Any]:
        """What tells the row from others of its chapter, in the form of the chapter's module."""
        return self.provenance.get("chapter", {})

    def with_provenance(self, **facts: Any) -> "Measurement":
        """A copy with these fields added to its provenance, or replaced there."""
        return replace(self, provenance={**self.provenance, **facts})

    def column(self, key: str) -> list:
        """One field of every item, in order."""
        return [item[key] for item in self.items]

    def paired_with(self, other: "Measurement", key: str) -> tuple[list, list]:
        """One field of every item of both measurements.

        Raises:
            BadInput: the two were measured on different items.
        """
        if self.column("id") != other.column("id"):
            raise BadInput(f"'{self.task}' was measured on other items in the two: a paired test needs the same ones")
        return self.column(key), other.column(key)

    def to_json(self, items: bool = True) -> str:
        """One line of JSON. A number that is not finite, such as a bound where too few items allow no interval, becomes
        null."""
        fields = asdict(self)
        del fields["id"]
        if not items:
            del fields["items"]
        line = json.dumps(finite(fields), ensure_ascii=False, allow_nan=False)
        # half a surrogate pair, as a file's name can have, is written as an escape: no file takes it otherwise
        return re.sub("[\ud800-\udfff]", lambda c: json.dumps(c[0])[1:-1], line)

    def __str__(self) -> str:
        """For readers: the number with its interval, then a line for each further number."""
        bounds = f"95 % interval [{_short(self.low)}, {_short(self.high)}]"
        interval = "no interval" if finite(self.low) is None else bounds
        lines = [f"{self.task}: {self.metric} {_short(self.value)}, {interval}, n = {self.n} ({self.unit})"]
        for name, value in self.extra.items():
            if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
                value = f"{_short(value['value'])} [{_short(value['low'])}, {_short(value['high'])}]"
            lines.append(f"  {name}: {_short(value)}")
        return "\n".join(lines)


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, in lists and dicts too: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: object) -> str:
    """A float with four digits, any other value as it is, and 'none' for None."""
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cost(measurements: Iterable[Measurement]) -> str:
    """How long recorded measurements took, without the compression before them, and on which hardware: a sentence."""
    # rows measured together, such as many plans in one tree, each hold the duration of the whole run
    runs = {
        (m.metric, json.dumps(m.provenance["settings"]), m.provenance["seconds"]): m.provenance for m in measurements
    }
    one = next(iter(runs.values()))
    minutes = sum(run["seconds"] for run in runs.values()) / 60
    used, threads = one["hardware"], one["hardware"]["torch_threads"]
    machine = used["accelerator"] or f"{threads} core{'s' if threads > 1 else ''} of {used['cpu']}"
    dtypes = " and ".join(sorted({run["dtype"] for run in runs.values()}))
    return in_markdown(f"Measured on {one['date']} in {minutes:.0f} minutes on {machine}, {dtypes}.")


# markup of Markdown, MyST's and GitHub's, inside a line; brackets alone, an underscore inside a word and "p < 0.05" are
# no markup
MARKUP = re.compile(r"[\\`*{}$&~|]|<(?=\S)|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])|^[!-/:-@[-`{-~]")


def in_markdown(text: str) -> str:
    """Escape a text, such as a record's, for a paragraph or a table of Markdown: it is shown as it is, on one line.

    >>> print(in_markdown("<b> of a_b [1, 2], p < 0.05"))
    \\<b> of a_b [1, 2], p < 0.05
    """
    return MARKUP.sub(lambda markup: "\\" + markup[0], " ".join(text.split()))


@cache
def commit() -> str | None:
    """The git commit of this package's checkout, with "+" if files in it were changed; None outside a checkout."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed wheel may lie inside somebody's repository
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no", "--", str(folder)) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> int:
    """The peak memory of this process until now, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores in use and accelerator."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            cpu,
        )
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "accelerator": accelerator}


def provenance(subject: Subject, started: float, **settings: Any) -> dict[str, Any]:
    """The provenance of a measurement that ends now, see `thesislib.records.schema.Provenance`.

    Args:
        subject: the measured model.
        started: `time.perf_counter()` at the beginning.
        settings: of the measure: text and its sha256, lengths, limits, seeds.
    """
    names = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "subject": subject.name,
        "fingerprint": subject.fingerprint,
        "plan": list(subject.plan) if subject.plan is not None else None,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "settings": settings,
        "versions": {
            "thesislib": thesislib.__version__,
            "python": platform.python_version(),
            **{n: version(n) for n in names},
        },
        "hardware": {**hardware(), "device": str(subject.device)},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_memory": peak_memory(),
    }
