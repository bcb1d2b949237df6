"""Chapter 5, quantisation and compensation: why the textbook recipe loses to rounding on a small model, and what
repairs it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thesislib.chapters.ch05_runs import (
    CLOSED,
    HELD_OUT,
    MORE,
    OPEN,
    PPL,
    RECORDED,
    Configuration,
    QuantChapter,
    Results,
    ablation_parameters,
    alone,
    calibrations,
    compensations,
    for_claims,
    key,
    kinds,
    layers_file,
    more,
    pick,
    pruned,
    ranks,
    read_recorded,
    recorded_parameters,
    recorded_parts,
    shapes,
    starts,
    table,
    without,
)
from thesislib.chapters.chapter import Chapter
from thesislib.chapters.phrases import listed, number, p_value, ratio, share, versus
from thesislib.chapters.thesis import thesis_row
from thesislib.errors import BadInput
from thesislib.evaluate import perplexity, triviaqa
from thesislib.evaluate.stats import VERDICTS, Comparison, holm_adjusted
from thesislib.experiment import DENSE
from thesislib.files import read_json
from thesislib.model.grid import Grid, round_to_nearest
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.records import measurement
from thesislib.records.measurement import Measurement, in_markdown

# what the chapter set itself before it was run: perplexity on the whole of WikiText-2 test, windows of 512, groups of
# 64
BARS = {(4, False): 35.0, (4, True): 32.8, (3, False): 48.0, (3, True): 40.5}  # by bits, and whether EoRA follows; GPTQ


def _short(c: Comparison, up: bool = False) -> str:
    return word if (word := c.verdict(up)) in ("better", "worse") else "within noise"


def stage_report(m: Measurement, kind: str) -> dict:
    """What the first stage of a kind ("gptq", "eora", ...) said of itself.

    Raises:
        BadInput: no such stage made this subject.
    """
    for stage, report in zip(m.stages, m.made["reports"], strict=True):
        if kind in stage:
            return report
    raise BadInput(f"no stage '{kind}' made {m.label}")


def main_table(results: Results, configs: Sequence[Configuration]) -> pd.DataFrame:
    """One row a configuration: perplexity on the test and the held-out text, answers, and bytes on disk."""
    dense = results.get((None, PPL))
    rows = []
    for c in dict.fromkeys(configs):
        found = {what: results.get((c.key, what)) for what in (PPL, HELD_OUT, CLOSED, OPEN)}
        if not any(found.values()):
            continue
        size: dict[str, Any] = next((made for m in found.values() if m and (made := m.made["bytes"])), {})
        times = f"{found[PPL].value / dense.value:.2f}" if found[PPL] and dense else ""
        rows.append(
            {
                "model": c.name, "WikiText-2": number(found[PPL]), "x dense": times, "held-out "
                    "Wikipedia": number(found[HELD_OUT]),
                "closed book": share(found[CLOSED]), "open book": share(found[OPEN]),
                "MB": f"{size.get('bytes_on_disk', size.get('bytes_in_memory', 0)) / 1e6:.1f}", "linears, of "
                    "bfloat16": _share_of_bfloat16(c, found),
            }
        )  # fmt: skip
    return _framed(rows, "model", "held-out Wikipedia", "MB")


def _framed(rows: Sequence[dict], index: str, *columns: str) -> pd.DataFrame:
    """Rows as a table, with these columns even if nothing was run."""
    return pd.DataFrame(rows, columns=None if rows else [index, *columns]).set_index(index)


def _share_of_bfloat16(c: Configuration, found: Mapping[str, Measurement | None]) -> str:
    """The bytes of a quantised configuration's linears, corrections apart, as a share of what they take in bfloat16."""
    kind = next((k for s in c.stages if (k := {"R": "rtn", "Q": "gptq"}.get(getattr(s, "letter", "")))), None)
    return f"{stage_report(next(m for m in found.values() if m), kind)['bits_per_weight'] / 16:.3f}" if kind else ""


def thesis_table(labels: Sequence[str] = ("W1:8", "D2+W1:8", "D2", "D4")) -> pd.DataFrame:
    """The thesis's own figures for models trained on WikiText: before quantisation, after it, and with EoRA."""
    rows = []
    for label in labels:
        try:
            found = {
                "recovered": thesis_row(label, "W"),
                "4-bit": thesis_row(label, "W", "Q"),
                "4-bit + EoRA": thesis_row(label, "W", "E"),
            }
        except BadInput:
            continue
        rows.append(
            {"model": f"{label}+W"}
            | {f"perplexity, {k}": r.perplexity for k, r in found.items()}
            | {f"closed book, {k}": r.closed for k, r in found.items()}
        )
    return pd.DataFrame(rows).set_index("model")


def _pairs(
    results: Results, pairs: Sequence[tuple[Any, Configuration, Configuration]], what: str
) -> dict[Any, Comparison]:
    """Named comparisons of those measured, Holm-adjusted."""
    here = {
        name: (results[a.key, what], results[b.key, what])
        for name, a, b in pairs
        if (a.key, what) in results and (b.key, what) in results
    }
    return holm_adjusted(
        {name: (perplexity if what in (PPL, HELD_OUT) else triviaqa).compare(a, b) for name, (a, b) in here.items()}
    )


def against(c: Configuration, other: Configuration) -> str:
    """The name of a comparison."""
    return f"{c.name} against {other.name}"


def method_comparisons(results: Results, configs: Sequence[Configuration], what: str = PPL) -> dict[str, Comparison]:
    """GPTQ against rounding, and each with EoRA against without, on the same grid."""
    pairs = []
    for c in (c for c in configs if c.method):

        def other(c: Configuration = c, **changed: object) -> Configuration:
            return pick(
                configs, **{"method": c.method, "bits": c.bits, "grid": c.grid, "corrected": c.corrected, **changed}
            )

        if c.method == "GPTQ":
            pairs.append((against(c, rounding := other(method="rounding")), rounding, c))
        if c.corrected:
            pairs.append((f"{c.name} against without", other(corrected=False), c))
        if c.method == "rounding" and c.corrected:
            pairs.append((against(c, gptq := other(method="GPTQ", corrected=False)), gptq, c))
    return _pairs(results, pairs, what)


def method_sentence(results: Results, configs: Sequence[Configuration], what: str = PPL) -> str:
    """The same in words."""
    said = []
    for name, c in method_comparisons(results, configs, what).items():
        said.append(f"{name}: {_short(c)} ({ratio(c)}, {p_value(c.p)})")
    return "Paired t tests over documents, Holm-adjusted: " + "; ".join(said) + "."


def ingredient_table(results: Results, configs: Sequence[Configuration], base: int = 1) -> pd.DataFrame:
    """Each configuration's held-out perplexity, and its ratio to the one at place `base`, paired and Holm-adjusted."""
    start = configs[base]
    tests = _pairs(results, [(c.name, start, c) for c in configs if c != start], HELD_OUT)
    rows = []
    for c in configs:
        if (c.key, HELD_OUT) in results:
            t = tests.get(c.name)
            word = "" if t is None else _short(t)
            rows.append(
                {
                    "settings": c.name,
                    "held-out perplexity": number(results[c.key, HELD_OUT]),
                    f"against {start.name}": ratio(t) if t else "",
                    "": word,
                }
            )
    return pd.DataFrame(rows).set_index("settings")


def textbook_sentence(results: Results, p: QuantChapter, bits: int = 4, brief: bool = False) -> str:
    """Does GPTQ by the plain recipe beat rounding here, and which single change helps most? Unless brief, which others
    move it."""
    rounding, plain, *others, asymmetric = alone(p, bits)
    own = pick(others, varied="integer zero-point")
    compared = _pairs(results, [("plain", rounding, plain), ("own", asymmetric, own)], HELD_OUT)
    tests = _pairs(results, [(c.name, plain, c) for c in others], HELD_OUT)
    name, best = min(tests.items(), key=lambda pair: pair[1].difference)
    gain = [f"{n} ({ratio(c)})" for n, c in tests.items() if c.verdict() == "better" and n != name]
    harm = [f"{n} ({ratio(c)})" for n, c in tests.items() if c.verdict() == "worse"]
    first, second = compared["plain"], compared.get("own")
    most = f"the most is gained by {name} ({ratio(best)})" if best.verdict() == "better" else "none is told from it"
    also = f", with an integer zero-point {versus(second)} it ({ratio(second)}, {p_value(second.p)})" if second else ""
    others_too = "" if brief else f"; also gaining: {listed(gain)}; harming: {listed(harm)}"
    return (
        f"At {bits} bits, on held-out text, GPTQ by the plain recipe (symmetric, no act-order, no clipping, all "
        f"tokens equal) is {versus(first)} "
        f"plain rounding ({ratio(first)}, {p_value(first.p)}){also}. Of the single changes {most}{others_too}."
    )


def worth_sentence(results: Results, p: QuantChapter) -> str:
    """What each ingredient gains alone, and what it is still worth among the others."""
    best, *less = without(p)
    plain, single = alone(p)[1], {c.varied: c for c in reversed(alone(p)[2:-1])}
    there = _pairs(results, [(c.varied, best, c) for c in less if c.varied], HELD_OUT)
    first = _pairs(results, [(title, plain, single[title]) for title in there], HELD_OUT)
    said = [
        f"{t} x {np.exp(first[t].difference):.3f} alone, and taken away x {np.exp(c.difference):.3f} ({_told(c)})"
        for t, c in there.items()
        if t in first
    ]
    return f"{'; '.join(said)} (paired t tests, Holm-adjusted)."


def _told(c: Comparison) -> str:
    return p_value(c.p) if c.told else "within noise"


def _by_kind(results: Results, p: QuantChapter) -> dict[str, Comparison]:
    found = {(c.varied, c.method): c for c in kinds(p)}
    return _pairs(results, [(kind, found[kind, "rounding"], found[kind, "GPTQ"]) for kind in LINEARS], HELD_OUT)


def kinds_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """One kind of projection quantised at a time: GPTQ by the plain recipe against rounding, paired and
    Holm-adjusted."""
    rows = []
    for kind, c in _by_kind(results, p).items():
        rounding, gptq = (
            results[pick(kinds(p), varied=kind, method=how).key, HELD_OUT] for how in ("rounding", "GPTQ")
        )
        rows.append(
            {
                "quantised alone": kind,
                "rounding": f"{rounding.value:.2f}",
                "GPTQ, plain": f"{gptq.value:.2f}",
                "GPTQ / rounding": ratio(c),
                "": versus(c),
            }
        )
    return _framed(rows, "quantised alone", "rounding", "GPTQ, plain", "GPTQ / rounding", "")


def kinds_sentence(results: Results, p: QuantChapter) -> str:
    """Where the plain recipe loses."""
    told: dict[str, list[str]] = {"worse than": [], "better than": [], "within noise of": []}
    for kind, c in _by_kind(results, p).items():
        told[versus(c)].append(kind)
    said = "; ".join(f"{word} rounding for {', '.join(names)}" for word, names in told.items() if names)
    return (
        f"One kind of projection at a time, GPTQ by the plain recipe is {said or 'not run'} (paired t tests, "
        "Holm-adjusted)."
    )


def shapes_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Bits by group: rounding, GPTQ, and the ratio of the two, paired and Holm-adjusted."""
    found = {(c.method, c.bits, c.group): c for c in shapes(p)}
    shaped = list(dict.fromkeys((c.bits, c.group) for c in found.values()))
    tests = _pairs(results, [(one, found["rounding", *one], found["GPTQ", *one]) for one in shaped], HELD_OUT)
    rows = []
    for bits, group in shaped:
        ms = {how: results.get((found[how, bits, group].key, HELD_OUT)) for how in ("rounding", "GPTQ")}
        if any(ms.values()):
            size = next(m for m in ms.values() if m).disk_bytes
            said = f"{ratio(c)}, {versus(c)}" if (c := tests.get((bits, group))) else "not run"
            numbers = {how: number(m) or "not run" for how, m in ms.items()}
            rows.append(
                {
                    "bits": str(bits),
                    "group": str(group),
                    **numbers,
                    "GPTQ / rounding": said,
                    "MB on disk": f"{size / 1e6:.1f}",
                }
            )
    return pd.DataFrame(rows).set_index(["bits", "group"])


def calibration_sentence(results: Results, p: QuantChapter) -> str:
    """How far other windows of the same text, and fewer or more of them, move the best settings' result."""
    found = [(c, results[c.key, HELD_OUT].value) for c in calibrations(p) if (c.key, HELD_OUT) in results]
    seeds = [v for c, v in found if c.varied == "seed"]
    if len(seeds) < 2:
        return "Other windows of calibration text were not run."
    amounts = [f"{v:.2f} with {c.name}" for c, v in found if c.varied != "seed"]
    spread = (
        f"{len(seeds)} choices of {p.calibration} windows give {', '.join(f'{v:.2f}' for v in seeds)}: "
        f"{max(seeds) / min(seeds) - 1:.1%} apart"
    )
    return (
        f"Held-out perplexity, 4 bits: {spread}; {', '.join(amounts)}. Differences of that size between settings are "
        "the calibration's noise."
    )


def compensation_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """EoRA's choices, each against the same weights without it, with the bytes of its factors."""
    configs = compensations(p)
    tests = _pairs(
        results,
        [(c.name, pick(configs, method=c.method, corrected=False), c) for c in configs if c.corrected],
        HELD_OUT,
    )
    rows = []
    for c in configs:
        m = results.get((c.key, HELD_OUT))
        if m is not None:
            size = f"{stage_report(m, 'eora')['bytes'] / 1e6:.1f}" if c.name in tests else ""
            rows.append(
                {
                    "model": c.name,
                    "held-out perplexity": number(m),
                    "against without": ratio(tests[c.name]) if c.name in tests else "",
                    "MB": size,
                }
            )
    return pd.DataFrame(rows).set_index("model")


def bytes_sentence(results: Results, p: QuantChapter) -> str:
    """Is a correction worth its bytes: the fewer bits with EoRA against more bits without?"""
    few, many = (
        pick(table(p), method="GPTQ", bits=bits, corrected=corrected) for bits, corrected in ((3, True), (4, False))
    )
    a, b = results.get((few.key, PPL)), results.get((many.key, PPL))
    if a is None or b is None:
        return "3 bits with EoRA against 4 bits without were not run."
    c = perplexity.compare(b, a)
    sizes = [m.disk_bytes / 1e6 for m in (a, b)]
    return (
        f"3 bits with EoRA of rank {p.rank} take {sizes[0]:.1f} MB, 4 bits without {sizes[1]:.1f} MB; in "
        f"perplexity the first are {versus(c)} the second "
        f"({a.value:.1f} and {b.value:.1f}, {ratio(c)}, {p_value(c.p)})."
    )


def sizes_and_losses(results: Results) -> pd.DataFrame:
    """(method, bits, MB on disk, held-out perplexity, low, high) of the models of the chapter's tables of methods,
    shapes and ranks."""
    rows, seen = [], set()
    p, q = recorded_parameters(), ablation_parameters()
    for c in (*table(p), *table(q, ("symmetric",)), *shapes(q), *ranks(q)):
        m = results.get((c.key, HELD_OUT))
        if m is None or c.key in seen or not c.stages:
            continue
        seen.add(c.key)
        size = m.disk_bytes / 1e6
        rows.append(
            {
                "method": c.method + " + EoRA" * c.corrected,
                "bits": c.bits,
                "MB": size,
                "perplexity": m.value,
                "low": m.low,
                "high": m.high,
            }
        )
    return pd.DataFrame(rows)


def _tried(p: QuantChapter, bits: int, corrected: bool) -> list[Configuration]:
    """GPTQ by the table's calibration and by `MORE`."""
    return [c for c in (*table(p), *more(p, bits)) if (c.method, c.bits, c.corrected) == ("GPTQ", bits, corrected)]


def bars_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """What chapter 5 set itself before it was run, on the whole of WikiText-2 test, and what came out, by the table's
    calibration and by `MORE`."""
    rows = []
    for (bits, corrected), bar in BARS.items():
        for c in _tried(p, bits, corrected):
            m = results.get((c.key, PPL))
            met = "not run" if m is None else "met" if m.value <= bar else "not met"
            margin = "" if m is None else f"{m.value / bar - 1:+.1%}"
            rows.append({"model": c.name, "at most": bar, "perplexity": number(m), "off by": margin, "": met})
    return pd.DataFrame(rows).set_index("model")


def more_sentence(results: Results, p: QuantChapter) -> str:
    """What more and nearer calibration text changes, on held-out text and on the test."""
    said = []
    for bits in p.bits:
        for first, second in zip(
            [c for c in table(p) if (c.method, c.bits) == ("GPTQ", bits)], more(p, bits), strict=True
        ):
            tests = [(what, _pairs(results, [("", first, second)], what)) for what in (HELD_OUT, PPL)]
            shown = [
                f"{ratio(found[''])} on {'held-out text' if what == HELD_OUT else 'the test'} ({p_value(found[''].p)})"
                for what, found in tests
                if found
            ]
            said += [f"{first.short} {' and '.join(shown)}"] if shown else []
    return (
        f"Calibrated on {MORE['windows']} windows of Wikipedia instead of {p.calibration} of web text: "
        f"{'; '.join(said) or 'not run'}."
    )


def sink_sentence(shares: Mapping[str, float], length: int) -> str:
    """How much of X^T X is the first token's (see `thesislib.chapters.ch05_runs.sink_shares`)."""
    place = max(shares, key=shares.get)
    block, kind = place.split(".")[1:]
    many, values = sum(v > 0.1 for v in shares.values()), [v for at, v in shares.items() if at.endswith("v_proj")]
    return (
        f"The first of {length} tokens makes {shares[place]:.0%} of the trace of block {block}'s {kind}, its "
        "largest share, "
        f"and over 10% at {many} of {len(shares)} projections; at v_proj it makes {min(values):.1%} to "
        f"{max(values):.1%}."
    )


def grid_sentence(subject: Subject, blocks: Sequence[int] = (0, 1)) -> str:
    """What the subject's own 4-bit grid does to rounding: nothing is lost on that grid, the usual quarter step on an
    integer zero-point's."""
    own, other = Grid(4, 32, "minimum"), Grid(4, 32, "asymmetric")
    lost, steps = 0.0, []
    linears = [m for b in blocks for m in subject.linears(b).values()]
    for m in linears:
        w = m.weight.detach().float()
        lost = max(lost, float((round_to_nearest(w, own).weight - w).abs().max()))
        q = round_to_nearest(w, other)
        steps.append(float(((q.weight - w).abs() / q.scale.repeat_interleave(32, 1)).mean()))
    return (
        "Rounded to its own grid (groups of 32, a floating minimum), the largest change of a weight in "
        f"{len(linears)} linears is {lost:g}; "
        f"with an integer zero-point instead, the mean change is {np.mean(steps):.2f} steps."
    )


def layer_table(errors: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Mean relative output error by kind of projection, one column a method.

    Args:
        errors: {method: {"blocks.B.NAME": error}}.
    """
    means = {
        method: {kind: np.mean([e for place, e in found.items() if place.endswith(kind)]) for kind in LINEARS}
        for method, found in errors.items()
    }
    return pd.DataFrame(means).loc[list(LINEARS)].round(4)


def layer_sentence(errors: Mapping[str, Mapping[str, float]], base: str = "rounding") -> str:
    """At how many projections each method's error on held-out text is above rounding's."""
    said = [
        f"{method} at {sum(found[place] > errors[base][place] for place in found)}"
        for method, found in errors.items()
        if method != base
    ]
    return (
        f"Of {len(errors[base])} projections the error on held-out text is above {base}'s with {', with '.join(said)}."
    )


def cost_sentence(results: Results) -> str:
    """How long this chapter's own measurements took; the dense model's on the test text and its answers are other
    chapters'."""
    return measurement.cost(m for m in results.values() if "cell" in m.chapter)


def read_layers(path: Path) -> dict[str, dict[str, float]]:
    """The recorded layer errors, beside the recorded run."""
    return read_json(layers_file(path))["errors"]


def rank_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """EoRA's rank, the bytes of its factors, and what it buys."""
    configs = ranks(p)
    rows = []
    tests = _pairs(results, [(c.name, configs[0], c) for c in configs[1:]], HELD_OUT)
    for c in configs:
        m = results.get((c.key, HELD_OUT))
        if m is not None:
            size = stage_report(m, "eora")["bytes"] if c.corrected else 0
            gain = ratio(tests[c.name]) if c.name in tests else ""
            rows.append(
                {
                    "rank": c.name,
                    "MB of factors": f"{size / 1e6:.2f}",
                    "held-out perplexity": number(m),
                    "against rank 0": gain,
                }
            )
    return _framed(rows, "rank", "held-out perplexity")


def starts_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Held-out perplexity after LoRA from either start at each learning rate, a column a seed, and what it was before
    training."""
    before = {c.rank: results.get((c.key, HELD_OUT)) for c in ranks(p)}
    rows: dict[tuple[str, float], dict] = {}
    for c in starts(p):
        m = results.get((c.key, HELD_OUT))
        first = before[c.rank]
        row = rows.setdefault(
            ("EoRA" if c.corrected else "usual", c.rate),
            {"before": "not run" if first is None else f"{first.value:.2f}"},
        )
        row[f"seed {c.seed}"] = "not run" if m is None else f"{m.value:.2f}"
    return pd.DataFrame(rows).T.rename_axis(["start", "learning rate"])


def starts_sentence(results: Results, p: QuantChapter) -> str:
    """LoRA begun at EoRA's correction against LoRA begun at zero, each at the rate that is better for its first seed:
    equal rank, steps and seeds."""
    found = {(c.corrected, c.rate, c.seed): c for c in starts(p) if (c.key, HELD_OUT) in results}
    value = {one: results[c.key, HELD_OUT].value for one, c in found.items()}
    best = {}
    for corrected in (False, True):
        ends = {rate: value[corrected, rate, 0] for start, rate, seed in found if start == corrected and seed == 0}
        best[corrected] = min(ends, key=ends.get, default=None)
    seeds = [
        s for corrected, rate, s in found if not corrected and rate == best[False] and (True, best[True], s) in found
    ]
    if not seeds:
        return "Starts of LoRA were not run."
    usual, eora = ([value[corrected, best[corrected], s] for s in seeds] for corrected in (False, True))
    tests = _pairs(results, [(s, found[False, best[False], s], found[True, best[True], s]) for s in seeds], HELD_OUT)
    told = {word: [c.verdict() for c in tests.values()].count(word) for word in VERDICTS}
    before = {c.rank: f", from {results[c.key, HELD_OUT].value:.2f}" for c in ranks(p) if (c.key, HELD_OUT) in results}
    begun = f"{before[0]} before training" if 0 in before else "", before.get(p.rank, "")
    return (
        f"At 3 bits, learning rate {best[True]:g}, LoRA started from EoRA's correction ends at "
        f"{', '.join(f'{x:.2f}' for x in eora)} (mean "
        f"{np.mean(eora):.2f}{begun[1]}); started as usual, learning rate {best[False]:g}, at "
        f"{', '.join(f'{x:.2f}' for x in usual)} (mean "
        f"{np.mean(usual):.2f}{begun[0]}). By paired t tests, Holm-adjusted, EoRA's start is better for "
        f"{told['better']} of {len(seeds)} seeds, worse for "
        f"{told['worse']}, within noise for {told['not told apart']}."
    )


def headline(results: Results) -> str:
    """What chapter 5 found, in sentences, for the book's first page and the README."""
    p, q = recorded_parameters(), ablation_parameters()
    best = {}
    for bits, corrected in BARS:  # by the better of two calibrations
        tried = _tried(p, bits, corrected)
        best[tried[0].short] = min(
            (m for c in tried if (m := results.get((c.key, PPL)))), key=lambda m: m.value, default=None
        )
    reached = ", ".join(f"{name} {m.value:.1f}" for name, m in best.items() if m)
    plain = alone(q)[1]
    change = _pairs(results, [("best", plain, without(q)[0])], HELD_OUT)["best"]
    gptq, rounding = (pick(table(p), method=method, bits=4, corrected=True) for method in ("GPTQ", "rounding"))
    with_eora = method_comparisons(results, table(p), HELD_OUT)[against(gptq, rounding)]
    return in_markdown(
        f"{textbook_sentence(results, q, brief=True)} {kinds_sentence(results, q)} All of the chapter's changes "
        "together multiply the "
        f"plain recipe's perplexity by {np.exp(change.difference):.2f}. With EoRA on top, GPTQ is "
        f"{versus(with_eora)} rounding ({ratio(with_eora)}). "
        f"On WikiText-2 test (dense, in {results[None, PPL].provenance['dtype']}, "
        f"{results[None, PPL].value:.1f}), groups of "
        f"{p.group}: {reached}. {bytes_sentence(results, p)} {starts_sentence(results, q)}"
    )


def pruned_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Pruned models before and after quantisation and compensation, on held-out text, with bytes."""
    return main_table(results, pruned(p))[["held-out Wikipedia", "MB"]]


def pruned_sentence(results: Results, p: QuantChapter) -> str:
    """GPTQ against rounding, and EoRA against none, on pruned models."""
    configs = pruned(p)
    pairs = []
    for label in dict.fromkeys(c.varied for c in configs):
        r, g, e = (
            pick(configs, varied=label, method=how, corrected=eora)
            for how, eora in (("rounding", False), ("GPTQ", False), ("GPTQ", True))
        )
        pairs += [(f"{label}: GPTQ against rounding", r, g), (f"{label}: EoRA against none", g, e)]
    said = [f"{name}, {_short(c)} ({ratio(c)}, {p_value(c.p)})" for name, c in _pairs(results, pairs, HELD_OUT).items()]
    return f"Paired t tests, Holm-adjusted: {'; '.join(said)}." if said else "Pruned models were not run."


def without_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """The best settings with each ingredient taken away."""
    return ingredient_table(results, without(p), base=0)


def samples(results: Results) -> pd.DataFrame:
    """Greedy completions of the models that answered questions."""
    rows = {}
    for (_, what), m in results.items():
        if what == CLOSED and (note := m.chapter).get("text"):
            rows[note.get("name", DENSE)] = {"what it writes": note["text"].replace("\n", " ")}
    return pd.DataFrame(rows).T.rename_axis("model")


def answers_sentence(results: Results, p: QuantChapter) -> str:
    """Questions answered by the quantised models against the dense one, and with EoRA against without, exact McNemar
    tests."""
    said, (dense, *configs) = [], table(p)
    pairs = [(f"{c.name} against dense", dense, c) for c in configs]
    pairs += [
        (f"{c.name} against without", pick(configs, method=c.method, bits=c.bits, corrected=False), c)
        for c in configs
        if c.corrected
    ]
    of = {name: c for name, _, c in pairs}
    for what in (CLOSED, OPEN):
        tests = _pairs(results, pairs, what)
        shown = [
            f"{n} {results[of[n].key, what].value:.1%} ({_short(c, up=True)}, {p_value(c.p)})" for n, c in tests.items()
        ]
        said.append(f"{what}, dense {results[None, what].value:.1%}: {'; '.join(shown) or 'not run'}")
    return ". ".join(x[0].upper() + x[1:] for x in said) + ". Exact McNemar tests, Holm-adjusted."


CHAPTER = Chapter(
    "05_quantisation",
    "quantisation and compensation",
    QuantChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    RECORDED,
    reads=("00_measures", "04_lora_recovery"),
    claims=for_claims,
)
