"""Chapter 7, on a device: what compressed models would do on eight devices, what they do on this one, and how wrong the
projection is."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from thesislib.chapters import ch07_figures
from thesislib.chapters.ch07_runs import (
    DEPTHS,
    SAME,
    DeviceChapter,
    Results,
    depth_label,
    depths,
    key,
    read_recorded,
    recorded_parts,
)
from thesislib.chapters.chapter import Chapter, Opening
from thesislib.chapters.pareto import PPL, points
from thesislib.chapters.phrases import interval, listed, written
from thesislib.device.cost import costs, stored
from thesislib.device.hardware import Device, device
from thesislib.device.measure import QUIET, computed_in, engine_name
from thesislib.device.placement import BITS, PATTERNS, TOO_LARGE, what_fits
from thesislib.device.published import against_published, hosted
from thesislib.device.report import profile_report
from thesislib.device.roofline import what_each_buys
from thesislib.device.time_line import BETWEEN, BEYOND, Point, held_out
from thesislib.errors import BadInput
from thesislib.experiment import DENSE
from thesislib.files import data_file, read_json
from thesislib.formats.gguf import TYPES
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, in_markdown

FITTED = (0, 2)  # places in `DEPTHS` of those that the line is fitted on; it is held against the others
PLAIN = "logits of the host without vector instructions"  # what the emulation's record calls its control
ENGINES = {engine_name(encoding): encoding for encoding in (*TYPES, "float32", "bfloat16")}
NOT_RUN = "Not run."
SKIPPED = 0.25  # a gain by zeros below this is within what timings of equal files differ by, or nearly


# ---------------------------------------------------------------- projections


def projections(models: Mapping[str, Subject], p: DeviceChapter) -> pd.DataFrame:
    """One row a model and device: verdict, MB of weights, what binds, tokens per second and joules per token as [low,
    high], None where not known."""
    rows = []
    for name in p.devices:
        on = device(name)
        for label, subject in models.items():
            report = profile_report(subject, on, p.prompt, p.context)
            speed, spent = report.get("tokens_per_second") or {}, report.get("joules_per_token") or {}
            rows.append(
                {
                    "device": on.name,
                    "model": label,
                    "verdict": report["verdict"],
                    "MB": report["bytes"]["weights"] / 1e6,
                    "binds": report["seconds_per_token"]["binds"] if speed else "",
                    "low": speed.get("low"),
                    "high": speed.get("high"),
                    "joules low": spent.get("low"),
                    "joules high": spent.get("high"),
                }
            )
    return pd.DataFrame(rows)


def _by_device(rows: pd.DataFrame, models: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Rows with a column `cell` as a table, models by devices, in the rows' order; `models` renames the models."""
    table = rows.pivot(index="model", columns="device", values="cell")
    table = table.reindex(index=rows["model"].unique(), columns=rows["device"].unique())
    return table.rename(index=models or {})


def projection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Tokens per second, low to high, of each model on each device; what does not fit says so."""
    cells = [
        _span(low, high) if pd.notna(low) else TOO_LARGE for low, high in zip(rows["low"], rows["high"], strict=True)
    ]
    sizes = rows.groupby("model")["MB"].first()
    return _by_device(rows.assign(cell=cells), {model: f"{model} ({mb:.0f} MB)" for model, mb in sizes.items()})


def _span(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def energy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Millijoules per token, low to high, of each model on each device where they are known for any; what does not fit
    says so."""

    def cell(row) -> str:
        if pd.notna(row["joules low"]):
            return _span(1e3 * row["joules low"], 1e3 * row["joules high"])
        return "not known" if row["binds"] else TOO_LARGE

    known = rows.groupby("device")["joules low"].transform("count") > 0
    return _by_device(rows[known].assign(cell=rows.apply(cell, axis=1)))


@dataclass(frozen=True)
class Energy:
    """Joules per token.

    Attributes:
        model: the first for which they are known; empty if there is none.
        joules: {device: (low, high)} of that model.
        unknown: devices that hold a model and of which no power is known.
    """

    model: str
    joules: dict[str, tuple[float, float]]
    unknown: list[str]


def energy(rows: pd.DataFrame) -> Energy:
    """For which devices joules are known at all."""
    known = rows.dropna(subset=["joules low"])
    first = known.drop_duplicates("device")
    joules = {name: (low, high) for name, low, high in first[["device", "joules low", "joules high"]].to_numpy()}
    fits = rows[rows["binds"] != ""]["device"].unique()
    return Energy("" if known.empty else known["model"].iloc[0], joules, [name for name in fits if name not in joules])


def energy_sentence(rows: pd.DataFrame) -> str:
    """For which devices joules are known at all, and where not why."""
    found = energy(rows)
    without = f"None for {' and '.join(found.unknown)}: no power of theirs is known." if found.unknown else ""
    if not found.joules:
        return without
    each = ", ".join(f"{_span(1e3 * low, 1e3 * high)} on {name}" for name, (low, high) in found.joules.items())
    return f"A token of {found.model} would take, in millijoules and modelled, {each}. {without}".strip()


def binding(rows: pd.DataFrame) -> dict[str, list[str]]:
    """{device: what limits decoding at the slow end of the intervals}; nothing where no model fits."""
    return {name: sorted(set(part["binds"]) - {""}) for name, part in rows.groupby("device", sort=False)}


def binding_sentence(rows: pd.DataFrame) -> str:
    """`binding` in words."""
    limits = binding(rows)
    by_reason: dict[str, list[str]] = {}
    for name, by in limits.items():
        by_reason.setdefault(" or ".join(by), []).append(name)
    none = by_reason.pop("", [])
    each = "; ".join(
        f"{'memory ' * (why == 'traffic')}{why} limits {listed(names)}" for why, names in by_reason.items()
    )
    return f"In the worst case {each}." + (f" None of these models fits {' or '.join(none)}." if none else "")


def fitting_table(subject: Subject, p: DeviceChapter, measured: Mapping) -> pd.DataFrame:
    """For each device the least compressed model of chapter 6 that fits it, and what quality is left; or how far off it
    is.

    Args:
        subject: the dense model.
        p: the chapter's parameters.
        measured: chapter 6's record.
    """
    known = points(measured).dropna(subset=["MB", PPL]).sort_values("MB", ascending=False)
    embedding = next(w.params for w in stored(subject) if w.name == "embedding")
    cache, rows = costs(subject, 1, p.context).cache_bytes, {}
    for name in p.devices:
        on = device(name)
        memory = sum(tier.size for tier in on.tiers)
        fitting = known[known["MB"] * 1e6 <= memory - cache]
        # an adapter beside the dense model makes it larger, not less compressed
        best = next((row for part in (fitting[fitting["label"] == DENSE], fitting) for _, row in part.iterrows()), None)
        none = f"none of {len(known)}: at 8 bits the embedding alone has {embedding / 1e6:.1f} MB"
        rows[on.name] = {
            "memory, MB": f"{memory / 1e6:,.1f}",
            "least compressed that fits": none if best is None else best["label"],
            "MB": "" if best is None else f"{best['MB']:.0f}",
            "perplexity": "" if best is None else interval(best[PPL], best[f"{PPL} low"], best[f"{PPL} high"], ".3g"),
            "combinations that fit": f"{len(what_fits(subject, on, context=p.context))} of "
            f"{subject.depth * len(PATTERNS) * len(BITS)}",
        }
    return pd.DataFrame(rows).T.rename_axis("device")


def lever_table(subject: Subject, p: DeviceChapter, name: str) -> pd.DataFrame:
    """What depth, width and bits each buy on a device: projected tokens per second."""
    levers = what_each_buys(subject, device(name), context=p.context)
    speeds = [
        _span(low, high) if pd.notna(low) else verdict
        for low, high, verdict in zip(levers["low"], levers["high"], levers["verdict"], strict=True)
    ]
    table = levers.assign(**{"MB": (levers["bytes"] / 1e6).round(1), "tokens/s": speeds, "limited by": levers["binds"]})
    return table.set_index("lever")[["setting", "MB", "tokens/s", "limited by"]]


def published_table() -> pd.DataFrame:
    """Projections beside figures that others published."""
    theirs = against_published()
    spans = [
        f"{written(low, ',.4g')} to {written(high, ',.4g')}" if pd.notna(low) else "not known"
        for low, high in zip(theirs["projected low"], theirs["projected high"], strict=True)
    ]
    shown = {
        "device": theirs["device"],
        "model": theirs["model"],
        "quantity": theirs["quantity"],
        "published": [written(x, ",.4g") for x in theirs["published"]],
        "projected": spans,
        "inside": [{True: "yes", False: "no", None: ""}[within] for within in theirs["within"]],
        "better than published": [f"x {x:.3g}" if pd.notna(x) else "" for x in theirs["optimistic"]],
    }
    return pd.DataFrame(shown).set_index("device")


def published_notes() -> list[str]:
    """What differs from the published measurement, and its source, for each of the figures."""
    theirs = against_published()
    return [
        in_markdown(f"{r['device']}, {r['model']}, {r['quantity']}: {r['why']} ({r['source']})")
        for _, r in theirs.iterrows()
    ]


def published_caption() -> str:
    """How far the projections are off what others published."""
    theirs = against_published()
    off = theirs["optimistic"].dropna()
    known = theirs["within"].dropna()
    return (
        f"Of {len(known)} published figures {int(sum(known))} lie in our interval. x 2.4: our middle estimate is 2.4 "
        f"times faster (or cheaper) than published; here from x {off.min():.2g} to x {off.max():.2g}."
    )


def hosted_table(rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Joules of hosted models and what they do; beside them the projections of `rows` for the first model, see
    `projections`."""
    ours = None if rows is None else energy(rows)
    projected = {f"{ours.model} on {name}": joules for name, joules in ours.joules.items()} if ours else {}
    models = hosted(projected or None)
    each = [
        f"{low:.3g}" if low == high else f"{low:.2g} to {high:.2g}"
        for low, high in zip(models["joules low"], models["joules high"], strict=True)
    ]
    return models.assign(**{"joules a written token": each}).set_index("model")[
        ["work", "joules a written token", "kind", "difference"]
    ]


def emulated_table(path: Path | None = None) -> pd.DataFrame:
    """The recorded emulation: millions of instructions of a token by class, a weight, and whether tokens and logits are
    the host's."""
    rows = []
    for row in read_json(path or data_file("results/07_emulated.json"))["rows"]:
        counts, margin = row["instructions"], row.get("margin where they part")
        rows.append(
            {
                "format": row["type"],
                "blocks": row["blocks"],
                **{name: f"{n / 1e6:,.0f}" for name, n in counts["per token"].items()},
                "all": f"{counts['per token, all'] / 1e6:,.0f}",
                "a weight": f"{counts['per weight']:.2f}",
                "same tokens": f"{row['same']} of {row['of']}",
                "lead where they part": "" if margin is None else f"{margin:.2f}",
                "logits apart": f"{row['logits']['share']:.2%}",
                "host without vectors": f"{row[PLAIN]['share']:.2%}",
            }
        )
    return pd.DataFrame(rows).set_index("format")


def roofline(models: Mapping[str, Subject], name: str, p: DeviceChapter) -> plt.Figure:
    """A device's roofline with the dense model's linears on it, decoding and reading a prompt."""
    on = device(name)
    rows: list[dict[str, Any]] = []
    for phase, c in (("decoding", costs(models[DENSE], 1, p.context)), ("prompt", costs(models[DENSE], p.prompt, 0))):
        rows += [
            {"name": o.name, "kind": phase, "intensity": o.macs / o.weights, "precision": o.precision}
            for o in c.operations
            if o.macs and o.weights
        ]
    rate, bandwidth = on.rate("gemm", rows[0]["precision"]), on.tiers[-1].read
    if rate is None or bandwidth is None:
        raise BadInput(
            f"{name}'s file lacks a rate or a bandwidth, without which it has no roofline: expected such as k1"
        )
    return ch07_figures.roofline_chart(name, rate[0], bandwidth, pd.DataFrame(rows))


# ---------------------------------------------------------------- measured


def measured_rates(record: Results) -> dict[str, float]:
    """Tokens per second in llama.cpp, Q8_0, by model."""
    return {label: 1 / m.value for (label, engine), m in record.items() if engine == "llama.cpp Q8_0"}


def timings(record: Results) -> pd.DataFrame:
    """For `ch07_figures.timing_chart`: every timing in llama.cpp, with the quartiles of its tokens."""
    rows = [
        {"format": ENGINES[engine], "model": label, "MB": m.extra["bytes"]["weights"] / 1e6, "ms": 1e3 * m.value,
         "low": 1e3 * m.low, "high": 1e3 * m.high, "zeros": "W2:4" in label}
        for (label, engine), m in sorted(record.items(), key=lambda x: x[0][1])
        if ENGINES.get(engine) in TYPES
    ]  # fmt: skip
    return pd.DataFrame(rows)


def timings_caption(record: Results) -> str:
    """What the timings find."""
    speeds = {e: 1 / record[DENSE, engine_name(e)].value for e in TYPES if (DENSE, engine_name(e)) in record}
    best = max(speeds, key=lambda e: speeds[e])
    return (
        f"Within a format time follows bytes; {best} is fastest, {speeds[best]:.0f} tokens/s. Models with half of "
        f"their weights zero (hollow) take as long as others of their size. Bars: quartiles of the tokens."
    )


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
                "ms per token": interval(1e3 * m.value, 1e3 * m.low, 1e3 * m.high, ".2f"),
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
        given, encoding = m.settings, ENGINES[engine]
        cache = costs(
            subject, 1, given["prompt"] + given["tokens"] // 2, 32 if encoding == "float32" else 16
        ).cache_bytes
        rate, precision = on.rate("gemm", computed_in(encoding))
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


def with_zeros(record: Results) -> dict[str, tuple[Measurement, Measurement]]:
    """{format: (the dense model, W2:4)} in llama.cpp, where both were timed; half of W2:4's weights are zeros."""
    timed = {
        encoding: tuple(record.get((label, engine_name(encoding))) for label in (DENSE, "W2:4+W"))
        for encoding in ("F16", "Q8_0", "Q4_0")
    }
    return {encoding: (dense, pruned) for encoding, (dense, pruned) in timed.items() if dense and pruned}


def gains_by_zeros(record: Results) -> dict[str, float]:
    """{format: by which share W2:4 is faster than the dense model}."""
    return {encoding: dense.value / pruned.value - 1 for encoding, (dense, pruned) in with_zeros(record).items()}


def zeros_sentence(record: Results) -> str:
    """What half of the weights being zeros buys where no kernel skips them."""
    if not (gains := gains_by_zeros(record)):
        return NOT_RUN
    timed = "; ".join(
        f"{1e3 * dense.value:.1f} and {1e3 * pruned.value:.1f} ms in {encoding}"
        for encoding, (dense, pruned) in with_zeros(record).items()
    )
    buy = "buy no time" if max(gains.values()) < SKIPPED else "buy time in some format"
    return f"Zeros {buy}: a token of the dense model and of W2:4, half of it zeros, takes {timed}."


def _llama_cpp(record: Results) -> list[tuple[str, Measurement]]:
    return [(engine, m) for (_, engine), m in record.items() if ENGINES.get(engine) in TYPES]


def drift(record: Results) -> float:
    """The largest ratio, less 1, between timings of files of the same size in the same engine: the same bytes and
    products, at other times."""
    alike: dict[tuple[str, int], list[float]] = {}
    for engine, m in _llama_cpp(record):
        alike.setdefault((engine, m.extra["bytes"]["weights"]), []).append(m.value)
    return max((max(times) / min(times) - 1 for times in alike.values()), default=0.0)


def blocks_of(record: Results) -> int:
    """How many blocks the dense model of a record has; the first rows, of this book's own subject, do not say."""
    return next((m.chapter["blocks"] for m in record.values() if "blocks" in m.chapter), DEPTHS[0])


def predictions(record: Results) -> dict[str, pd.DataFrame]:
    """Predicted against measured by format, see `thesislib.device.time_line.held_out`; formats without all depths are
    left out."""
    most, tables = blocks_of(record), {}
    chosen = depths(most)
    for encoding in TYPES:
        timed = {d: record.get((depth_label(most, d), engine_name(encoding))) for d in chosen}
        if len(timed) == len(DEPTHS) and all(timed.values()):
            tables[encoding] = held_out({d: point(m) for d, m in timed.items()}, [chosen[i] for i in FITTED])
    return tables


def point(m: Measurement) -> Point:
    """A timing as the line is fitted to it. Every byte of these files is read at every token, since head and embedding
    are one."""
    runs: dict[str, list[float]] = {}
    for item in m.items:
        runs.setdefault(item["id"].split(".")[0], []).append(item["seconds"])
    return Point(m.extra["bytes"]["weights"], m.value, tuple(statistics.median(r) for r in runs.values()))


def prediction_table(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """All formats, fitted depths left out."""
    rows = [
        {
            "format": encoding,
            "blocks": depth,
            "where": r["where"],
            "MB per token": f"{r['MB per token']:.1f}",
            "measured, ms": f"{r['measured']:.2f}",
            "predicted, ms": f"{r['predicted']:.2f} [{r['low']:.2f}, {r['high']:.2f}]",
            "error": f"{r['error']:+.1%}",
        }
        for encoding, table in tables.items()
        for depth, r in table.iterrows()
        if r["where"] != "fitted"
    ]
    return pd.DataFrame(rows).set_index("format")


@dataclass(frozen=True)
class Prediction:
    """How wrong the line through the fitted depths is.

    Attributes:
        depths: the subject's four, fitted and held out in turn.
        formats: how many were timed at all of them.
        between: errors between the fitted depths, absolute, as shares.
        beyond: errors beyond them.
        noisy: timings from a machine that was not quiet.
        drift: see `drift`.
    """

    depths: list[int]
    formats: int
    between: list[float]
    beyond: list[float]
    noisy: int
    drift: float


def prediction(record: Results) -> Prediction | None:
    """The errors of all formats; None if none was timed at all depths."""
    if not (tables := predictions(record)):
        return None
    between, beyond = (
        [e for t in tables.values() for e in t.loc[t["where"] == where, "error"].abs()] for where in (BETWEEN, BEYOND)
    )
    noisy = sum(m.extra["verdict"] != QUIET for _, m in _llama_cpp(record))
    return Prediction(depths(blocks_of(record)), len(tables), between, beyond, noisy, drift(record))


def prediction_sentence(record: Results) -> str:
    """The mean errors between and beyond the fitted depths, and whether the host was quiet enough to say."""
    if not (p := prediction(record)):
        return NOT_RUN
    caution = f" {p.noisy} of the timings come from a machine that was not quiet." if p.noisy else ""
    if p.drift:
        caution += f" Timings of files of one size differ by up to {p.drift:.0%}: a smaller error says little."
    first, middle, second, last = p.depths
    return (
        f"A line through {first} and {second} blocks predicts the time of {middle} blocks with an error of "
        f"{statistics.mean(p.between):.1%} (mean of {p.formats} formats, at most {max(p.between):.1%}), and that of "
        f"{last}, beyond both, with {statistics.mean(p.beyond):.1%} (at most {max(p.beyond):.1%}).{caution}"
    )


def same_sentence(record: Results) -> str:
    """How long llama.cpp and transformers write the same."""
    m = record.get((DENSE, SAME))
    if m is None:
        return NOT_RUN
    parted = "; ".join(
        f"{i['id']} parts after {i['same']}, where {i['margin']:.4f} in the logits decided"
        for i in m.items
        if i["margin"] is not None
    )
    said = f" ({parted})" if parted else ""
    return (
        f"llama.cpp's F16 file writes the same {m.items[0]['of']} tokens as transformers in float32 on "
        f"{round(m.value * m.n)} of {m.n} questions{said}."
    )


def answer(record: Results) -> str:
    """The chapter's answer in two sentences."""
    speeds = {e: 1 / record[DENSE, engine_name(e)].value for e in TYPES if (DENSE, engine_name(e)) in record}
    best = max(speeds, key=lambda e: speeds[e])
    gain = max(gains_by_zeros(record).values())
    return (
        f"On one thread, llama.cpp writes {speeds['F16']:.0f} tokens a second from 16 bits and {speeds[best]:.0f} in "
        f"{best}. Zeroing half of the weights makes it at most {gain:.0%} faster, and two timings of one size differ "
        f"by up to {drift(record):.0%}."
    )


def short(record: Results) -> str:
    """The answer in about ten words."""
    speeds = {e: 1 / record[DENSE, engine_name(e)].value for e in TYPES if (DENSE, engine_name(e)) in record}
    best = max(speeds, key=lambda e: speeds[e])
    return f"{best} decodes {speeds[best] / speeds['F16']:.1f} times as fast as 16 bits; zeros buy no time."


def protocol(record: Results) -> str:
    """What was timed, and on what."""
    m = record[DENSE, "llama.cpp F16"]
    given, on = m.settings, m.provenance["hardware"]
    return in_markdown(
        f"One thread of {on.get('cpu')}; a prompt of {given['prompt']} tokens, then {m.n} timed tokens; the dense "
        f"model in F16 takes {interval(1e3 * m.value, 1e3 * m.low, 1e3 * m.high, '.2f')} ms a token (quartiles). Eight "
        "devices are projected, not measured."
    )


def host_caption(rows: pd.DataFrame, record: Results) -> str:
    """How many projections of the host hold what was measured there."""
    here, seen = rows[rows["device"] == "host"].set_index("model"), measured_rates(record)
    both = [x for x in here.index if x in seen]
    inside = sum(bool(here.loc[x, "low"] <= seen[x] <= here.loc[x, "high"]) for x in both)
    held = "no interval holds its measurement" if not inside else f"{inside} of {len(both)} hold their measurement"
    return f"Projected tokens a second. On host, where we can check, {held} (crosses); read the others as rough."


def bits_answer(record: Results) -> str:
    """Bytes and time of Q4_0 against F16."""
    few, many = (record[DENSE, engine_name(kind)] for kind in ("Q4_0", "F16"))
    size, time = (few.extra["bytes"]["weights"] / many.extra["bytes"]["weights"], few.value / many.value)
    return (
        f"Q4_0 has {size:.2f} of the bytes of F16 and takes {time:.2f} of its time: memory does not limit it alone, "
        "since its weights must be unpacked too."
    )


def zeros_answer(record: Results) -> str:
    """What zeros change in bytes and time."""
    dense, pruned = with_zeros(record)["F16"]
    return (
        f"Not from zeros as such: the file has {pruned.extra['bytes']['weights'] / 1e6:.0f} MB with them and "
        f"{dense.extra['bytes']['weights'] / 1e6:.0f} MB without, since each zero is stored, read and multiplied. "
        f"{zeros_sentence(record)}"
    )


def least_answer(subject: Subject, p: DeviceChapter) -> str:
    """The time that memory alone allows on a K1, by bytes over bandwidth."""
    on = device("k1")
    size, read = costs(subject, 1, p.context), on.tiers[-1].read
    moved = size.kept + size.cache_bytes
    return (
        f"{moved / 1e6:.0f} MB over {read / 1e9:.1f} GB/s are {1e3 * moved / read:.1f} ms a token, so at most "
        f"{read / moved:.0f} tokens a second if all of the bandwidth were used."
    )


def headline(record: Results) -> str:
    """What was found, in sentences."""
    dense = {
        encoding: record[DENSE, engine_name(encoding)] for encoding in TYPES if (DENSE, engine_name(encoding)) in record
    }
    speed = ", ".join(f"{encoding} {1 / m.value:.0f}" for encoding, m in dense.items())
    return in_markdown(
        "One thread of the recording machine decodes, in tokens per second of the dense model in llama.cpp: "
        f"{speed}. {zeros_sentence(record)} {prediction_sentence(record)} {same_sentence(record)}"
    )


CHAPTER = Chapter(
    "07_on_device",
    "on a device",
    DeviceChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    reads=("06_evaluation",),
    opening=Opening(
        question="How fast are compressed models on a device, and do zeros and bits buy time?",
        answer=answer,
        short=short,
        protocol=protocol,
        learn="How to time decoding, to read a roofline, and how far a projection may be trusted.",
    ),
)
