"""Chapter 7, on a device: what compressed models would do on eight devices, what they do on this one, and how wrong the
projection is."""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from thesislib.chapters import figures
from thesislib.chapters.chapter import Chapter, Keep, Key, Part, shape
from thesislib.chapters.pareto import PPL, points
from thesislib.compress.gptq import Rtn
from thesislib.config import positive
from thesislib.device.cost import costs, stored
from thesislib.device.hardware import Device, device, devices
from thesislib.device.measure import (
    QUIET,
    Agreement,
    agreement,
    as_measurement,
    computed_in,
    engine_name,
    gguf_file,
    prompt_ids,
    time_llama_cpp,
    time_transformers,
)
from thesislib.device.placement import BITS, PATTERNS, TOO_LARGE, what_fits
from thesislib.device.published import against_published, hosted
from thesislib.device.report import profile_report
from thesislib.device.roofline import what_each_buys
from thesislib.device.time_line import BETWEEN, BEYOND, Point, held_out
from thesislib.errors import BadInput
from thesislib.evaluate.stats import proportion
from thesislib.experiment import DENSE
from thesislib.files import data_file, read_json
from thesislib.formats.gguf import TYPES
from thesislib.formats.load import load_subject
from thesislib.model.blocks import apply_plan
from thesislib.model.prompts import adds_bos, default_prompt, prompt_for
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import parse_label
from thesislib.records.measurement import Measurement, in_markdown, provenance
from thesislib.records.store import Store
from thesislib.sources.corpus import questions

DEPTHS, FITTED = (
    (30, 20, 10, 4),
    (0, 2),
)  # of predicted against measured, and the places of those that the line is fitted on; held against the others
SAME, PROMPTS = "prompts with the same text", 10
TOKENS, REPEATS = 32, 7  # what a recorded timing decodes after the first token, and how often
PLAIN = "logits of the host without vector instructions"  # what the emulation's record calls its control
Results = Mapping[tuple[str, str], Measurement]  # by model and engine


def stand_in(subject: Subject, label: str) -> Subject:
    """A model with the shapes, zeros and bits of a label, made in seconds: which blocks, weights and values are kept
    changes no cost.

    D2: the blocks before the last are left out. W2:4: by magnitude. Q: rounded to 4 bits in groups of 64. W: nothing,
    since a merged adapter costs nothing.

    Raises:
        BadInput: a part of the label that is none of these.
    """
    result = subject
    stages: Iterable[Any] = [] if label == DENSE else parse_label(label).stages
    for stage in stages:
        if stage.word == "depth" and stage.part == "block" and 0 < stage.count < result.depth:
            kept = result.depth - stage.count
            result = apply_plan(result, [*range(kept - 1), result.depth - 1])
        elif stage.word == "width":
            result, _ = dataclasses.replace(stage, metric="magnitude").apply(result, data="embedded")
        elif stage.family == "quantised":
            result, _ = Rtn(bits=stage.bits, group=64).apply(result)
        elif stage.family != "trained":
            raise BadInput(f"'{stage.label}' of '{label}' has no stand-in: expected parts such as D4, W2:4, W and Q")
    return result


# ---------------------------------------------------------------- recorded runs


@dataclass(frozen=True)
class Case:
    """A model in an engine. kind: a GGUF type for llama.cpp, or float32 or bfloat16 for transformers."""

    label: str
    kind: str

    @property
    def engine(self) -> str:
        """As `Timing.engine` has it."""
        return engine_name(self.kind)


def depths(most: int) -> list[int]:
    """`DEPTHS` for a subject of `most` blocks: as large a share of it, at least one block."""
    return [max(1, round(most * d / DEPTHS[0])) for d in DEPTHS]


def depth_label(most: int, depth: int) -> str:
    """The label of a model with `depth` of a subject's `most` blocks."""
    return DENSE if depth == most else f"D{most - depth}"


MODELS = (DENSE, "D4+W", "D8", "W2:4+W", "W+Q", "D4+W+Q", "W2:4+W+Q", "D4+W2:4+W+Q")


def cases(depth: int) -> list[Case]:
    """All that is measured, for a subject of `depth` blocks: four formats by four depths, the chapter's models, and
    transformers beside them."""
    found = [Case(depth_label(depth, d), kind) for kind in TYPES for d in depths(depth)]
    found += [Case(label, "Q8_0") for label in MODELS[1:]] + [Case("W2:4+W", "F16"), Case("W2:4+W", "Q4_0")]
    found += [Case(label, kind) for label in (DENSE, "D8", "W2:4+W", "W+Q") for kind in ("float32", "bfloat16")]
    return list(dict.fromkeys(found))


def measure(p: "DeviceChapter", store: Callable[[Measurement], object], done: Iterable[tuple[str, str]] = ()) -> None:
    """Measure what is missing, each result handed to `store` as it comes."""
    done = set(done)
    exact = load_subject(p.subject, "float32")
    held: tuple[str, Subject] = ("", exact)
    ids = prompt_ids(exact, p.prompt)
    # a format's depths in one go: a line through them should not be the machine's drift
    for case in sorted(cases(exact.depth), key=lambda c: (c.kind, c.label)):
        if (case.label, case.engine) in done:
            continue
        started = time.perf_counter()
        if case.kind in TYPES:
            if held[0] != case.label:
                held = (case.label, stand_in(exact, case.label))
            model = held[1]
            timing = time_llama_cpp(gguf_file(model, case.kind), ids, TOKENS, REPEATS)
        else:
            model = stand_in(load_subject(p.subject, case.kind), case.label)
            timing = time_transformers(model, ids, TOKENS, REPEATS)
        m = as_measurement(model, timing, started)
        store(_noted(m, case.label, case.engine, exact.depth))
    if (DENSE, SAME) not in done:
        store(_noted(same_text(exact), DENSE, SAME, exact.depth))


def same_text(subject: Subject, tokens: int = TOKENS) -> Measurement:
    """On how many of ten questions the F16 file in llama.cpp writes what the subject writes in transformers, token by
    token."""
    started = time.perf_counter()
    asked = questions("embedded", open_book=False, limit=PROMPTS, seed=0)
    texts = [prompt_for(subject, q, default_prompt(subject)) for q in asked]
    prompts = [subject.tokenizer(t, add_special_tokens=adds_bos(subject, t))["input_ids"] for t in texts]
    found: list[Agreement] = agreement(subject, gguf_file(subject, "F16"), prompts, tokens)
    same = sum(a.same == a.of for a in found)
    low, high = proportion(same, len(found))
    items = [{"id": q.id, **dataclasses.asdict(a)} for q, a in zip(asked, found, strict=True)]
    made = provenance(subject, started, tokens=tokens, file="F16", cache="F32")
    return Measurement(
        task="greedy text, llama.cpp F16 against transformers float32",
        metric=SAME,
        value=same / len(found),
        low=low,
        high=high,
        n=len(found),
        unit="prompt",
        items=items,
        provenance=made,
    )


def _noted(m: Measurement, label: str, engine: str, blocks: int) -> Measurement:
    note = {"made": {"label": label, "bytes": {}}, "chapter": {"model": label, "engine": engine, "blocks": blocks}}
    return m.with_provenance(**note)


@dataclass(frozen=True)
class DeviceChapter:
    """Parameters of chapter 7.

    subject: a subject spec. devices: names of files in hw/devices, or paths of others. prompt: tokens that are read at
    once. context: tokens in the cache when one is generated.
    """

    subject: str = "embedded"
    devices: list[str] = dataclasses.field(
        default_factory=lambda: ["siracusa", "gap9", "k1", "pi4", "pi5", "orin_nano", "laptop", "host"]
    )
    prompt: int = 128
    context: int = 128

    def __post_init__(self):
        positive(prompt=self.prompt, context=self.context)
        for name in self.devices:
            device(name)
        if not self.devices:
            raise BadInput(f"no device was chosen: expected some of {', '.join(devices())}")


# ---------------------------------------------------------------- projections


def models(p: DeviceChapter) -> dict[str, Subject]:
    """The chapter's models in bfloat16, by label: stand-ins with the shapes, zeros and bits of what the chapters before
    made."""
    subject = load_subject(p.subject, "bfloat16")
    fitting = [label for label in MODELS if not (found := re.match(r"D(\d+)", label)) or int(found[1]) < subject.depth]
    return {label: stand_in(subject, label) for label in fitting}


def projections(found: Mapping[str, Subject], p: DeviceChapter) -> pd.DataFrame:
    """One row a model and device: verdict, MB of weights, what binds, tokens per second and joules per token as [low,
    high], None where not known."""
    rows = []
    for name in p.devices:
        on = device(name)
        for label, subject in found.items():
            plain = profile_report(subject, on, p.prompt, p.context)
            speed, spent = plain.get("tokens_per_second") or {}, plain.get("joules_per_token") or {}
            rows.append(
                {
                    "device": on.name,
                    "model": label,
                    "verdict": plain["verdict"],
                    "MB": plain["bytes"]["weights"] / 1e6,
                    "binds": plain["seconds_per_token"]["binds"] if speed else "",
                    "low": speed.get("low"),
                    "high": speed.get("high"),
                    "joules low": spent.get("low"),
                    "joules high": spent.get("high"),
                }
            )
    return pd.DataFrame(rows)


def projection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Tokens per second, low to high, of each model on each device; what does not fit says so."""

    def cell(row) -> str:
        return TOO_LARGE if pd.isna(row["low"]) else f"{row['low']:.3g} to {row['high']:.3g}"

    text = rows.assign(
        cell=rows.apply(cell, axis=1), model=rows.apply(lambda r: f"{r['model']} ({r['MB']:.0f} MB)", axis=1)
    )
    return text.pivot(index="model", columns="device", values="cell").reindex(
        index=text["model"].unique(), columns=rows["device"].unique()
    )


def energy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Millijoules per token, low to high, of each model on each device where they are known for any; what does not fit
    says so."""

    def cell(row) -> str:
        if pd.notna(row["joules low"]):
            return f"{1e3 * row['joules low']:.3g} to {1e3 * row['joules high']:.3g}"
        return "not known" if row["binds"] else TOO_LARGE

    some = rows.groupby("device")["joules low"].transform("count") > 0
    text = rows[some].assign(cell=rows.apply(cell, axis=1))
    return text.pivot(index="model", columns="device", values="cell").reindex(
        index=rows["model"].unique(), columns=text["device"].unique()
    )


def energy_sentence(rows: pd.DataFrame) -> str:
    """For which devices joules are known at all, and where not why."""
    known = rows.dropna(subset=["joules low"])
    fits = rows[rows["binds"] != ""]["device"].unique()
    others = [name for name in fits if name not in set(known["device"])]
    without = f"Not known for {' and '.join(others)}, of which no power is known." if others else ""
    if known.empty:
        return f"Joules per token. {without}".strip()
    first = known.groupby("device", sort=False).first()
    said = [f"{name} {1e3 * r['joules low']:.3g} to {1e3 * r['joules high']:.3g}" for name, r in first.iterrows()]
    return f"Millijoules per token of {known['model'].iloc[0]}, modelled: {', '.join(said)}. {without}".strip()


def binding_sentence(rows: pd.DataFrame) -> str:
    """What limits decoding, by device."""
    said = [
        f"{name} by {' and '.join(sorted(set(part['binds'])))}"
        for name, part in rows[rows["binds"] != ""].groupby("device", sort=False)
    ]
    none = [name for name, part in rows.groupby("device", sort=False) if (part["binds"] == "").all()]
    return f"At the slow end of the intervals decoding is limited on {', '.join(said)}." + (
        f" None of these models fits {' or '.join(none)}." if none else ""
    )


def fitting_table(subject: Subject, p: DeviceChapter, measured: Mapping) -> pd.DataFrame:
    """For each device the least compressed model of chapter 6 that fits it, and what quality is left; or how far off it
    is.

    Args:
        subject: the dense model.
        p: the chapter's parameters.
        measured: chapter 6's record.
    """
    known = points(measured).dropna(subset=["MB", PPL]).sort_values("MB", ascending=False)
    table = next(w.params for w in stored(subject) if w.name == "embedding")
    cache, rows = costs(subject, 1, p.context).cache_bytes, {}
    for name in p.devices:
        on = device(name)
        room = sum(tier.size for tier in on.tiers) - cache
        fitting = known[known["MB"] * 1e6 <= room]
        whole = fitting[
            fitting["label"] == DENSE
        ]  # an adapter beside the dense model makes it larger, not less compressed
        best = None if fitting.empty else (fitting if whole.empty else whole).iloc[0]
        rows[on.name] = {
            "memory, MB": f"{sum(tier.size for tier in on.tiers) / 1e6:,.1f}",
            "least compressed that fits": f"none of {len(known)}: at 8 bits the embedding alone has "
                f"{table / 1e6:.1f} MB" if best is None else best["label"],
            "MB": "" if best is None else f"{best['MB']:.0f}",
            "perplexity": "" if best is None else f"{best[PPL]:.3g} [{best[f'{PPL} low']:.3g}, "
                f"{best[f'{PPL} high']:.3g}]",
            "combinations that fit": f"{len(what_fits(subject, on, context=p.context))} of "
                f"{subject.depth * len(PATTERNS) * len(BITS)}",
        }  # fmt: skip
    return pd.DataFrame(rows).T.rename_axis("device")


def lever_table(subject: Subject, p: DeviceChapter, name: str) -> pd.DataFrame:
    """What depth, width and bits each buy on a device: projected tokens per second."""
    found = what_each_buys(subject, device(name), context=p.context)
    text = [
        f"{low:.3g} to {high:.3g}" if pd.notna(low) else verdict
        for low, high, verdict in zip(found["low"], found["high"], found["verdict"], strict=True)
    ]
    return pd.DataFrame(
        {
            "lever": found["lever"],
            "setting": found["setting"],
            "MB": (found["bytes"] / 1e6).round(1),
            "tokens/s": text,
            "limited by": found["binds"],
        }
    ).set_index("lever")


def published_table() -> pd.DataFrame:
    """Projections beside figures that others published."""
    found = against_published()
    within = {True: "yes", False: "no", None: ""}
    span = [
        f"{low:,.4g} to {high:,.4g}" if pd.notna(low) else "not known"
        for low, high in zip(found["projected low"], found["projected high"], strict=True)
    ]
    error = [f"x {x:.3g}" if pd.notna(x) else "" for x in found["optimistic"]]
    return pd.DataFrame({"device": found["device"], "model": found["model"], "quantity": found["quantity"],
                         "published": [f"{x:,.4g}" for x in found["published"]],
                         "projected": span, "inside": [within[w] for w in found["within"]], "too good by": error,
                         "what differs": found["why"], "source": found["source"]}).set_index("device")  # fmt: skip


def hosted_table(rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Joules of hosted models and what they do; beside them the projections of `rows` for the first model, see
    `projections`."""
    known = pd.DataFrame() if rows is None else rows.dropna(subset=["joules low"])
    ours: Any = {} if known.empty else known[known["model"] == known["model"].iloc[0]].set_index("device")
    found = hosted(
        {f"{row['model']} on {name}": (row["joules low"], row["joules high"]) for name, row in ours.iterrows()}
        if len(ours)
        else None
    )
    each = [
        f"{low:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
        for low, high in zip(found["joules low"], found["joules high"], strict=True)
    ]
    return found.assign(**{"joules a written token": each}).set_index("model")[
        ["work", "joules a written token", "kind", "difference"]
    ]


def emulated_table(path: Path | None = None) -> pd.DataFrame:
    """The recorded emulation: millions of instructions of a token by class, a weight, and whether tokens and logits are
    the host's."""
    found = read_json(path or data_file("results/07_emulated.json"))
    rows = []
    for row in found["rows"]:
        counts, logits = row["instructions"], row["logits"]
        by_class = {name: f"{n / 1e6:,.0f}" for name, n in counts["per token"].items()}
        rows.append(
            {
                "format": row["type"],
                "blocks": row["blocks"],
                **by_class,
                "all": f"{counts['per token, all'] / 1e6:,.0f}",
                "a weight": f"{counts['per weight']:.2f}",
                "same tokens": f"{row['same']} of {row['of']}",
                "lead where they part": ""
                if row.get("margin where they part") is None
                else f"{row['margin where they part']:.2f}",
                "logits apart": f"{logits['share']:.2%}",
                "host without vectors": f"{row[PLAIN]['share']:.2%}",
            }
        )
    return pd.DataFrame(rows).set_index("format")


def roofline(found: Mapping[str, Subject], name: str, p: DeviceChapter) -> plt.Figure:
    """A device's roofline with the dense model's linears on it, decoding and reading a prompt."""
    on = device(name)
    rows: list[dict[str, Any]] = []
    for kind, c in (("decoding", costs(found[DENSE], 1, p.context)), ("prompt", costs(found[DENSE], p.prompt, 0))):
        rows += [
            {"name": o.name, "kind": kind, "intensity": o.macs / o.weights, "precision": o.precision}
            for o in c.operations
            if o.macs and o.weights
        ]
    rate, bandwidth = on.rate("gemm", rows[0]["precision"]), on.tiers[-1].read
    if rate is None or bandwidth is None:
        raise BadInput(
            f"{name}'s file lacks a rate or a bandwidth, without which it has no roofline: expected such as k1"
        )
    return figures.roofline_chart(name, rate[0], bandwidth, pd.DataFrame(rows))


# ---------------------------------------------------------------- measured


def measured_rates(record: Results) -> dict[str, float]:
    """Tokens per second in llama.cpp, Q8_0, by model."""
    return {label: 1 / m.value for (label, engine), m in record.items() if engine == "llama.cpp Q8_0"}


def measured_table(record: Results) -> pd.DataFrame:
    """One row a model and engine: times, bytes and whether the machine was quiet."""
    rows = []
    for (label, engine), m in sorted(record.items(), key=lambda entry: entry[0][1]):
        if engine == SAME:
            continue
        size = m.extra["bytes"]
        rows.append(
            {
                "engine": engine,
                "model": label,
                "ms per token": f"{1e3 * m.value:.2f} [{1e3 * m.low:.2f}, {1e3 * m.high:.2f}]",
                "tokens/s": f"{m.extra['tokens per second']:.1f}",
                "ms to first token": f"{1e3 * m.extra['seconds to first token']:.0f}",
                "MB weights": f"{size['weights'] / 1e6:.1f}",
                "MB cache": f"{size['cache'] / 1e6:.1f}" if "cache" in size else "",
                "MB process": f"{size['resident'] / 1e6:.0f}" if "resident" in size else "",
                "machine": m.extra["verdict"],
            }
        )
    return pd.DataFrame(rows).set_index("engine")


def utilisation_table(subject: Subject, record: Results, on: Device) -> pd.DataFrame:
    """Which shares of a device's bandwidth (MBU) and arithmetic (MFU) the dense model's timings are, with their
    denominators.

    Args:
        subject: the dense model.
        record: timings, made on that device.
        on: the device whose file has what one thread reads and multiplies.
    """
    rows, read = [], on.tiers[0].read
    for (label, engine), m in sorted(record.items(), key=lambda entry: entry[0][1]):
        if label != DENSE or engine == SAME:
            continue
        given, kind = m.settings, engine.split()[1]
        cache = costs(subject, 1, given["prompt"] + given["tokens"] // 2, 32 if kind == "float32" else 16).cache_bytes
        rate, precision = on.rate("gemm", computed_in(kind))
        macs = costs(subject, given["prompt"], 0).macs / m.extra["seconds to first token"]
        moved = (m.extra["bytes"]["weights"] + cache) / m.value
        rows.append(
            {
                "engine": engine,
                "GB/s": f"{moved / 1e9:.1f}",
                "MBU": f"{moved / read:.0%}",
                "of, GB/s": f"{read / 1e9:.1f}",
                "GMAC/s of the prompt": f"{macs / 1e9:.1f}",
                "MFU": f"{macs / rate:.0%}",
                "of, GMAC/s": f"{rate / 1e9:.0f} ({precision})",
            }
        )
    return pd.DataFrame(rows).set_index("engine")


def zeros_sentence(record: Results) -> str:
    """What half of the weights being zeros buys where no kernel skips them."""
    said, gains = [], []
    for kind in ("F16", "Q8_0", "Q4_0"):
        dense, pruned = record.get((DENSE, f"llama.cpp {kind}")), record.get(("W2:4+W", f"llama.cpp {kind}"))
        if dense and pruned:
            said.append(f"{kind} {1e3 * dense.value:.1f} and {1e3 * pruned.value:.1f} ms")
            gains.append(dense.value / pruned.value - 1)
    if not said:
        return NOT_RUN
    return (
        "A token of the dense model and of W2:4, half of whose linears' weights are zeros, takes in "
        f"{'; '.join(said)}: "
        f"{'no kernel skips them' if max(gains) < SKIPPED else 'some kernel gains by them'}."
    )


def drift(record: Results) -> float:
    """The largest ratio, less 1, between timings of files of the same size in the same engine: the same bytes and
    products, at other times."""
    alike: dict[tuple[str, int], list[float]] = {}
    for (_, engine), m in record.items():
        if engine.startswith("llama.cpp"):
            alike.setdefault((engine, m.extra["bytes"]["weights"]), []).append(m.value)
    return max((max(times) / min(times) - 1 for times in alike.values()), default=0.0)


NOT_RUN = "Not run."
SKIPPED = 0.25  # a gain by zeros below this is within what timings of equal files differ by, or nearly


def blocks_of(record: Results) -> int:
    """How many blocks the dense model of a record has; the first rows, of this book's own subject, do not say."""
    return next((m.chapter["blocks"] for m in record.values() if "blocks" in m.chapter), DEPTHS[0])


def predictions(record: Results) -> dict[str, pd.DataFrame]:
    """Predicted against measured by format, see `thesislib.device.time_line.held_out`; formats without all depths are
    left out."""
    most, result = blocks_of(record), {}
    chosen = depths(most)
    for kind in TYPES:
        timed = {d: record.get((depth_label(most, d), engine_name(kind))) for d in chosen}
        if len(timed) == len(DEPTHS) and all(timed.values()):
            result[kind] = held_out({d: point(m) for d, m in timed.items()}, [chosen[i] for i in FITTED])
    return result


def point(m: Measurement) -> Point:
    """A timing as the line is fitted to it. Every byte of these files is read at every token, since head and embedding
    are one."""
    runs: dict[str, list[float]] = {}
    for item in m.items:
        runs.setdefault(item["id"].split(".")[0], []).append(item["seconds"])
    return Point(m.extra["bytes"]["weights"], tuple(statistics.median(r) for r in runs.values()))


def prediction_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All formats, fitted depths left out."""
    rows = [
        {
            "format": kind,
            "blocks": depth,
            "where": r["where"],
            "MB per token": f"{r['MB per token']:.1f}",
            "measured, ms": f"{r['measured']:.2f}",
            "predicted, ms": f"{r['predicted']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
            "error": f"{r['error']:+.1%}",
        }
        for kind, table in tables.items()
        for depth, r in table.iterrows()
        if r["where"] != "fitted"
    ]
    return pd.DataFrame(rows).set_index("format")


def prediction_sentence(record: Results) -> str:
    """The mean errors between and beyond the fitted depths, and whether the host was quiet enough to say."""
    tables = predictions(record)
    if not tables:
        return NOT_RUN
    between, beyond = (
        [e for t in tables.values() for e in t.loc[t["where"] == where, "error"].abs()] for where in (BETWEEN, BEYOND)
    )
    noisy = sum(m.extra["verdict"] != QUIET for (label, engine), m in record.items() if engine.startswith("llama.cpp"))
    caution = (
        f" {noisy} of these timings come from a machine that was not quiet, as the table says."
        if noisy
        else " The machine was quiet for all of them."
    )
    if spread := drift(record):
        caution += (
            f" Files of the same size differed by up to {spread:.0%} between sessions: an error below that says little."
        )
    first, middle, second, last = depths(blocks_of(record))
    return (f"A line through {first} and {second} blocks predicts the time per token of {middle} blocks, in "
        f"{len(tables)} formats, with a mean error of "
            f"{statistics.mean(between):.1%} (from {min(between):.1%} to {max(between):.1%}), and that of "
                f"{last}, beyond both, with "
            f"{statistics.mean(beyond):.1%} (up to {max(beyond):.1%}).{caution}")  # fmt: skip


def same_sentence(record: Results) -> str:
    """How long llama.cpp and transformers write the same."""
    m = record.get((DENSE, SAME))
    if m is None:
        return NOT_RUN
    parted = [i for i in m.items if i["margin"] is not None]
    rest = "; ".join(
        f"{i['id']} parts after {i['same']} tokens, at a margin of {i['margin']:.4f} in the logits" for i in parted
    )
    least = min(i["gap"] for i in m.items)
    return (
        f"On {round(m.value * m.n)} of {m.n} questions the F16 file in llama.cpp writes the same {m.items[0]['of']} "
        "tokens as transformers in float32"
        f"{': ' + rest if rest else f'; the closest call on the way was decided by {least:.4f} in the logits'}."
    )


def headline(record: Results) -> str:
    """What was found, in sentences."""
    dense = {kind: record[DENSE, f"llama.cpp {kind}"] for kind in TYPES if (DENSE, f"llama.cpp {kind}") in record}
    speed = ", ".join(f"{kind} {1 / m.value:.0f}" for kind, m in dense.items())
    decoding = (
        f"One thread of the recording machine decodes, in tokens per second of the dense model in llama.cpp: {speed}."
    )
    return in_markdown(f"{decoding} {zeros_sentence(record)} {prediction_sentence(record)} {same_sentence(record)}")


# ---------------------------------------------------------------- the record, read


def from_measurements(found: Iterable[Measurement]) -> Results:
    """The measurements by model and engine.

    Raises:
        BadInput: not this chapter's.
    """
    try:
        return {(m.chapter["model"], m.chapter["engine"]): m for m in found}
    except (KeyError, TypeError) as error:
        raise BadInput(f"these are not the results of chapter 7 ({error})") from error


def read_recorded(path: Path) -> Results:
    """A recorded run."""
    return from_measurements(Store(path).rows().values())


def recorded_parts(p: DeviceChapter, file: Path) -> Iterator[Part]:
    """One part, so that no two processes take each other's time. A quiet machine and the extra `engine` are needed."""
    rows: dict[Key, int | None] = {(c.label, c.engine): TOKENS * REPEATS for c in cases(shape(p.subject).depth)}
    rows[DENSE, SAME] = PROMPTS

    def make(missing: Collection[Key], keep: Keep) -> None:
        measure(p, keep, set(rows) - set(missing))

    yield Part("timings", rows, make)


def key(m: Measurement) -> Key:
    """Of a row: model and engine."""
    ((model, engine),) = from_measurements([m])
    return model, engine


CHAPTER = Chapter(
    "07_on_device", "on a device", DeviceChapter, recorded_parts, key, read_recorded, headline, reads=("06_evaluation",)
)
