"""Records as lines for a terminal, each with what tells it from the others of the same label and measure."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from thesislib.errors import printable
from thesislib.records.measurement import Measurement
from thesislib.records.store import flat

WIDTH = 100  # of a line
SHORT = 40  # characters of a chapter's note at most that is a name, and no text that a model wrote


def listing(rows: Mapping[str, Measurement]) -> Iterator[str]:
    """The lines for these rows by id: for each label, task and metric a heading and below it its rows.

    A row has what differs from other rows under its heading, in as many lines as it takes, and when it was made if
    nothing else does.
    """
    groups: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for name, m in rows.items():
        groups.setdefault((flat(name, m)["label"], m.task, m.metric), {})[name] = m
    for heading, group in groups.items():
        yield "  ".join(map(printable, heading))
        numbers = {name: _numbers(m) for name, m in group.items()}
        width = max(map(len, numbers.values()))
        for name, differs in _differences(group).items():
            start = f"  {name}  {numbers[name]:<{width}}  "
            if len(start + differs) <= WIDTH:
                yield (start + differs).rstrip()
            else:
                yield start.rstrip()
                pad = " " * 6
                yield from textwrap.wrap(
                    differs, WIDTH, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False
                )


def _numbers(m: Measurement) -> str:
    value, low, high = ("?" if x is None else f"{x:.4g}" for x in (m.value, m.low, m.high))  # None: not finite
    unit = m.unit.partition(" ")[0]  # without "of 512 tokens", which is said where lengths differ
    return f"{value} [{low}, {high}]  n = {m.n} {printable(unit)}{'' if m.n == 1 else 's'}"


def _differences(rows: Mapping[str, Measurement]) -> dict[str, str]:
    """The settings of each row that other rows have otherwise."""
    settings = {name: _settings(m) for name, m in rows.items()}
    values: dict[str, set[str]] = {}
    for found in settings.values():
        for key, value in found.items():
            values.setdefault(key, set()).add(value)
    texts = {
        name: ", ".join(f"{key} {value}" for key, value in found.items() if len(values[key]) > 1 and value != "None")
        for name, found in settings.items()
    }
    again = Counter(texts.values())
    when = {name: f"{m.provenance.get('time', m.provenance.get('date'))}" for name, m in rows.items()}
    return {
        name: printable(text if again[text] == 1 else ", ".join(filter(None, (text, f"made {when[name]}"))))
        for name, text in texts.items()
    }


def _settings(m: Measurement) -> dict[str, str]:
    """How a row was made and measured: its chapter's note, stages, dtype, protocol and card."""
    run = m.provenance
    found: dict[str, Any] = {"stages": "+".join(word for stage in m.stages for word in stage) or "none"}
    found |= {key: x for key, x in m.chapter.items() if not isinstance(x, dict) and len(str(x)) <= SHORT}
    for stage in m.stages:
        for word, values in stage.items():
            found |= {f"{word}.{key}": x for key, x in values.items()}
    found |= {"dtype": run.get("dtype"), **{key: m.settings.get(key) for key in ("length", "prompt")}}
    found |= {"seed": (run.get("protocol") or {}).get("seed")}
    found["card"] = (run.get("hardware") or {}).get("accelerator")
    return {key: "-".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x) for key, x in found.items()}
