"""Chapter 5, quantisation and compensation: why GPTQ without act-order, on few tokens, loses to rounding on a small
model, and what repairs it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    bits_by_group,
    calibrations,
    eora_choices,
    eora_ranks,
    key,
    layers_file,
    leave_one_out,
    lora_starts,
    main_models,
    more_calibration,
    one_change,
    one_projection,
    pick,
    pruned_models,
    read_recorded,
    recorded_parameters,
    recorded_parts,
)
from thesislib.chapters.chapter import Chapter, K
from thesislib.chapters.phrases import factor, listed, number, p_value, points, ratio, ratio_and_p, share, versus, word
from thesislib.chapters.pool import Recorded
from thesislib.chapters.thesis import thesis_row
from thesislib.chapters.trainings import Records, compare_models, on_largest_sample
from thesislib.errors import BadInput
from thesislib.evaluate.compare import compare
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted
from thesislib.experiment import DENSE
from thesislib.files import data_file, read_json
from thesislib.model.grid import Grid, round_to_nearest
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.records import measurement
from thesislib.records.measurement import Measurement, in_markdown

# what the chapter set itself before it was run, by bits and whether EoRA follows GPTQ: perplexity on the whole of
# WikiText-2 test, windows of 512, groups of 64
BARS = {(4, False): 35.0, (4, True): 32.8, (3, False): 48.0, (3, True): 40.5}


def stage_report(m: Measurement, word: str) -> dict:
    """What the first stage of a word ("gptq", "eora", ...) said of itself.

    Raises:
        BadInput: no such stage made this subject.
    """
    for stage, report in zip(m.stages, m.made["reports"], strict=True):
        if word in stage:
            return report
    raise BadInput(f"no stage '{word}' made {m.label}")


def _of_n(m: Measurement | None) -> str:
    """A share with its interval, and of how many questions."""
    return f"{share(m)}, n = {m.n}" if m else ""


def main_table(results: Results, configs: Sequence[Configuration]) -> pd.DataFrame:
    """One row a configuration: perplexity on the test and the held-out text, answers, and bytes on disk."""
    dense = results.get((None, PPL))
    rows = []
    for c in dict.fromkeys(configs):
        here = {task: results.get((c.key, task)) for task in (PPL, HELD_OUT, CLOSED, OPEN)}
        if not any(here.values()):
            continue
        size: dict[str, Any] = next((held for m in here.values() if m and (held := m.made["bytes"])), {})
        rows.append(
            {
                "model": c.name,
                "WikiText-2": number(here[PPL]),
                "x dense": f"{here[PPL].value / dense.value:.2f}" if here[PPL] and dense else "",
                "held-out Wikipedia": number(here[HELD_OUT]),
                "closed book": _of_n(here[CLOSED]),
                "open book": _of_n(here[OPEN]),
                "MB": f"{size.get('bytes_on_disk', size.get('bytes_in_memory', 0)) / 1e6:.1f}",
                "linears, of bfloat16": _share_of_bfloat16(c, here),
            }
        )
    return _framed(rows, "model", "held-out Wikipedia", "MB")


def _framed(rows: Sequence[dict], index: str, *columns: str) -> pd.DataFrame:
    """Rows as a table, with these columns even if nothing was run."""
    return pd.DataFrame(rows, columns=None if rows else [index, *columns]).set_index(index)


def _share_of_bfloat16(c: Configuration, measured: Mapping[str, Measurement | None]) -> str:
    """The bytes of a quantised configuration's linears, corrections apart, as a share of what they take in bfloat16."""
    word = next((stage.word for stage in c.stages if stage.family == "quantised"), None)
    m = next(m for m in measured.values() if m)
    return f"{stage_report(m, word)['bits_per_weight'] / 16:.3f}" if word else ""


def thesis_table(labels: Sequence[str] = ("W1:8", "D2+W1:8", "D2", "D4")) -> pd.DataFrame:
    """The thesis's own figures for models trained on WikiText: before quantisation, after it, and with EoRA."""
    rows = []
    for label in labels:
        try:
            theirs = {
                "recovered": thesis_row(label, "W"),
                "4-bit": thesis_row(label, "W", "Q"),
                "4-bit + EoRA": thesis_row(label, "W", "E"),
            }
        except BadInput:
            continue
        rows.append(
            {"model": f"{label}+W"}
            | {f"perplexity, {k}": r.perplexity for k, r in theirs.items()}
            | {f"closed book, {k}": r.closed for k, r in theirs.items()}
        )
    return pd.DataFrame(rows).set_index("model")


def tested(results: Results, pairs: Mapping[K, Sequence[Configuration]], task: str = HELD_OUT) -> dict[K, Comparison]:
    """The second of each pair against the first, where both were measured, Holm-adjusted."""
    measured = {name: (results.get((a.key, task)), results.get((b.key, task))) for name, (a, b) in pairs.items()}
    return holm_adjusted({name: compare(*pair) for name, pair in measured.items() if None not in pair})


def against(c: Configuration, other: Configuration) -> str:
    """The name of a comparison."""
    return f"{c.name} against {other.name}"


def method_comparisons(results: Results, configs: Sequence[Configuration], task: str = PPL) -> dict[str, Comparison]:
    """GPTQ against rounding, and each with EoRA against without, on the same grid."""
    pairs: dict[str, tuple[Configuration, Configuration]] = {}
    for c in (c for c in configs if c.method):
        alike = [x for x in configs if (x.bits, x.grid) == (c.bits, c.grid)]
        if c.method == "GPTQ":
            rounding = pick(alike, method="rounding", corrected=c.corrected)
            pairs[against(c, rounding)] = rounding, c
        if c.corrected:
            pairs[f"{c.name} against without"] = pick(alike, method=c.method, corrected=False), c
        if c.method == "rounding" and c.corrected:
            gptq = pick(alike, method="GPTQ", corrected=False)
            pairs[against(c, gptq)] = gptq, c
    return tested(results, pairs, task)


def method_sentence(results: Results, configs: Sequence[Configuration], task: str = PPL) -> str:
    """`method_comparisons` in words."""
    tests = method_comparisons(results, configs, task)
    verdicts = "; ".join(f"{name}: {word(c)} ({ratio_and_p(c)})" for name, c in tests.items())
    return f"Paired t tests over documents, Holm-adjusted: {verdicts}."


def ingredient_table(results: Results, configs: Sequence[Configuration], base: int = 1) -> pd.DataFrame:
    """Each configuration's held-out perplexity, and its ratio to that of configs[base], paired and Holm-adjusted."""
    start = configs[base]
    tests = tested(results, {c.name: (start, c) for c in configs if c != start})
    rows = [
        {
            "settings": c.name,
            "held-out perplexity": number(results[c.key, HELD_OUT]),
            f"against {start.name}": ratio(tests[c.name]) if c.name in tests else "",
            "": word(tests[c.name]) if c.name in tests else "",
        }
        for c in configs
        if (c.key, HELD_OUT) in results
    ]
    return pd.DataFrame(rows).set_index("settings")


@dataclass(frozen=True)
class Textbook:
    """GPTQ by the plain recipe, on held-out text.

    Attributes:
        plain: against rounding on the same grid.
        zero_point: with an integer zero-point, against rounding on that grid; None if that was not run.
        changes: each single change of the recipe against the plain one, by name, Holm-adjusted.
    """

    plain: Comparison
    zero_point: Comparison | None
    changes: dict[str, Comparison]

    @property
    def best(self) -> str:
        """The change after which perplexity is lowest."""
        return min(self.changes, key=lambda name: self.changes[name].difference)


def textbook(results: Results, p: QuantChapter, bits: int = 4) -> Textbook:
    """The plain recipe against rounding, and its single changes against it."""
    rounding, plain, *changed, rounding_zero_point = one_change(p, bits)
    zero_point = pick(changed, varied="integer zero-point")
    tests = tested(results, {"plain": (rounding, plain), "zero-point": (rounding_zero_point, zero_point)})
    return Textbook(tests["plain"], tests.get("zero-point"), tested(results, {c.name: (plain, c) for c in changed}))


def textbook_sentence(results: Results, p: QuantChapter, bits: int = 4, brief: bool = False) -> str:
    """Does GPTQ by the plain recipe beat rounding here, and which single change helps most? Unless brief, which others
    move it."""
    found = textbook(results, p, bits)
    best, zero_point = found.changes[found.best], found.zero_point
    most = (
        f"the most is gained by {found.best} ({ratio(best)})" if best.verdict() == "better" else "none is told from it"
    )
    also = f", with an integer zero-point {versus(zero_point)} it ({ratio_and_p(zero_point)})" if zero_point else ""
    others = ""
    if not brief:
        better, worse, _ = by_verdict(found.changes).values()
        gain, harm = (
            [f"{n} ({ratio(found.changes[n])})" for n in names if n != found.best] for names in (better, worse)
        )
        others = f"; also gaining: {listed(gain)}; harming: {listed(harm)}"
    return (
        f"At {bits} bits, on held-out text, GPTQ without act-order on {p.calibration * p.length:,} tokens (the plain "
        f"recipe: symmetric, groups of {p.group}, no clipping, all tokens equal) is {versus(found.plain)} rounding "
        f"({ratio_and_p(found.plain)}){also}. Of the single changes {most}{others}."
    )


def read_gptqmodel() -> dict:
    """What `benchmarks.gptqmodel` found, beside the recorded run."""
    return read_json(data_file("results/05_gptqmodel.json"))


def gptqmodel_sentence(found: Mapping[str, Any]) -> str:
    """GPTQModel, whose own order goes by groups, beside rounding and this package's GPTQ, on held-out text."""
    dense, rounding, theirs, ours, plain = (
        " and ".join(f"{row['perplexity']:.2f}" for row in found["rows"] if row["model"] == name)
        for name in (
            "dense",
            "rounding",
            "GPTQModel",
            "thesislib, the same settings",
            "thesislib, from left to right",
        )
    )
    return (
        f"GPTQModel {found['GPTQModel']}, whose default act-order goes by groups, has {theirs} there after as many "
        f"tokens, rounding {rounding}, dense {dense}; GPTQ here with its settings has {ours} in that order and {plain} "
        "from left to right (float32; of two numbers one is from one thread and one from two)."
    )


def worth(results: Results, p: QuantChapter) -> dict[str, tuple[Comparison, Comparison]]:
    """{ingredient: (added to the plain recipe alone, taken away from the best settings)}."""
    best, *less = leave_one_out(p)
    _, plain, *changed, _ = one_change(p)
    first = {c.varied: c for c in reversed(changed)}
    removed = tested(results, {c.varied: (best, c) for c in less if c.varied})
    added = tested(results, {title: (plain, first[title]) for title in removed})
    return {title: (added[title], c) for title, c in removed.items() if title in added}


def worth_sentence(results: Results, p: QuantChapter) -> str:
    """What each ingredient gains alone, and what it is still worth among the others."""
    each = "; ".join(
        f"{title} {factor(added, '.3f')} alone, and taken away {factor(removed, '.3f')} "
        f"({p_value(removed.p) if removed.told else 'within noise'})"
        for title, (added, removed) in worth(results, p).items()
    )
    return f"{each} (paired t tests, Holm-adjusted)."


def by_projection(results: Results, p: QuantChapter) -> dict[str, Comparison]:
    """{kind of projection: GPTQ by the plain recipe against rounding}, where only that kind is quantised."""
    configs = one_projection(p)
    return tested(
        results,
        {
            projection: [pick(configs, varied=projection, method=m) for m in ("rounding", "GPTQ")]
            for projection in LINEARS
        },
    )


def kinds_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """One kind of projection quantised at a time: GPTQ by the plain recipe against rounding, paired and
    Holm-adjusted."""
    configs = one_projection(p)
    rows = []
    for projection, c in by_projection(results, p).items():
        rounding, gptq = (
            results[pick(configs, varied=projection, method=how).key, HELD_OUT].value for how in ("rounding", "GPTQ")
        )
        rows.append(
            {
                "quantised alone": projection,
                "rounding": f"{rounding:.2f}",
                "GPTQ, plain": f"{gptq:.2f}",
                "GPTQ / rounding": ratio(c),
                "": versus(c),
            }
        )
    return _framed(rows, "quantised alone", "rounding", "GPTQ, plain", "GPTQ / rounding", "")


def kinds_sentence(results: Results, p: QuantChapter) -> str:
    """Where the plain recipe loses."""
    better, worse, undecided = by_verdict(by_projection(results, p)).values()
    verdicts = "; ".join(
        f"{how} rounding for {', '.join(kinds)}"
        for how, kinds in (("worse than", worse), ("better than", better), ("within noise of", undecided))
        if kinds
    )
    return (
        f"One kind of projection at a time, GPTQ by the plain recipe is {verdicts or 'not run'} (paired t tests, "
        "Holm-adjusted)."
    )


def shapes_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Bits by group: rounding, GPTQ, and the ratio of the two, paired and Holm-adjusted."""
    configs = {(c.method, c.bits, c.group): c for c in bits_by_group(p)}
    shapes = {(bits, group): [configs[m, bits, group] for m in ("rounding", "GPTQ")] for _, bits, group in configs}
    tests = tested(results, shapes)
    rows = []
    for (bits, group), pair in shapes.items():
        rounding, gptq = (results.get((c.key, HELD_OUT)) for c in pair)
        if rounding or gptq:
            c = tests.get((bits, group))
            rows.append(
                {
                    "bits": str(bits),
                    "group": str(group),
                    "rounding": number(rounding) or "not run",
                    "GPTQ": number(gptq) or "not run",
                    "GPTQ / rounding": f"{ratio(c)}, {versus(c)}" if c else "not run",
                    "MB on disk": f"{(rounding or gptq).disk_bytes / 1e6:.1f}",
                }
            )
    return pd.DataFrame(rows).set_index(["bits", "group"])


def calibration_noise(results: Results, p: QuantChapter) -> tuple[list[float], dict[str, float]]:
    """Held-out perplexity of the best settings on other windows of the same text, and {name: on fewer or more}."""
    values = [(c, results[c.key, HELD_OUT].value) for c in calibrations(p) if (c.key, HELD_OUT) in results]
    return [v for c, v in values if c.varied == "seed"], {c.name: v for c, v in values if c.varied != "seed"}


def calibration_sentence(results: Results, p: QuantChapter) -> str:
    """`calibration_noise` in words."""
    seeds, amounts = calibration_noise(results, p)
    if len(seeds) < 2:
        return "Other windows of calibration text were not run."
    return (
        f"Held-out perplexity, 4 bits: {len(seeds)} choices of {p.calibration} windows give "
        f"{', '.join(f'{v:.2f}' for v in seeds)}: {max(seeds) / min(seeds) - 1:.1%} apart; "
        f"{', '.join(f'{v:.2f} with {name}' for name, v in amounts.items())}. Differences of that size between "
        "settings are the calibration's noise."
    )


def compensation_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """EoRA's choices, each against the same weights without it, with the bytes of its factors."""
    configs = eora_choices(p)
    tests = tested(
        results, {c.name: (pick(configs, method=c.method, corrected=False), c) for c in configs if c.corrected}
    )
    rows = []
    for c in configs:
        if m := results.get((c.key, HELD_OUT)):
            test = tests.get(c.name)
            rows.append(
                {
                    "model": c.name,
                    "held-out perplexity": number(m),
                    "against without": ratio(test) if test else "",
                    "MB": f"{stage_report(m, 'eora')['bytes'] / 1e6:.1f}" if test else "",
                }
            )
    return pd.DataFrame(rows).set_index("model")


def few_and_many_bits(results: Results, p: QuantChapter) -> tuple[Measurement | None, Measurement | None]:
    """Perplexity of GPTQ at 3 bits with EoRA, and at 4 bits without."""
    configs = main_models(p)
    few = pick(configs, method="GPTQ", bits=3, corrected=True)
    many = pick(configs, method="GPTQ", bits=4, corrected=False)
    return results.get((few.key, PPL)), results.get((many.key, PPL))


def bytes_sentence(results: Results, p: QuantChapter) -> str:
    """Is a correction worth its bytes: the fewer bits with EoRA against more bits without?"""
    few, many = few_and_many_bits(results, p)
    if few is None or many is None:
        return "3 bits with EoRA against 4 bits without were not run."
    c = compare(many, few)
    return (
        f"3 bits with EoRA of rank {p.rank} take {few.disk_bytes / 1e6:.1f} MB, 4 bits without "
        f"{many.disk_bytes / 1e6:.1f} MB; in perplexity the first are {versus(c)} the second ({few.value:.1f} and "
        f"{many.value:.1f}, {ratio_and_p(c)})."
    )


def sizes_and_losses(results: Results) -> pd.DataFrame:
    """(method, bits, MB on disk, held-out perplexity, low, high) of the models of the chapter's tables of methods,
    shapes and ranks."""
    p, q = recorded_parameters(), ablation_parameters()
    configs = [*main_models(p), *main_models(q, ("symmetric",)), *bits_by_group(q), *eora_ranks(q)]
    return pd.DataFrame(
        {
            "method": c.method + " + EoRA" * c.corrected,
            "bits": c.bits,
            "MB": m.disk_bytes / 1e6,
            "perplexity": m.value,
            "low": m.low,
            "high": m.high,
        }
        for c in {c.key: c for c in configs if c.stages}.values()
        if (m := results.get((c.key, HELD_OUT)))
    )


def _tried(p: QuantChapter, bits: int, corrected: bool) -> list[Configuration]:
    """GPTQ by the table's calibration and by `MORE`."""
    configs = [*main_models(p), *more_calibration(p, bits)]
    return [c for c in configs if (c.method, c.bits, c.corrected) == ("GPTQ", bits, corrected)]


def bars_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """What chapter 5 set itself before it was run, on the whole of WikiText-2 test, and what came out, by the table's
    calibration and by `MORE`."""
    rows = []
    for (bits, corrected), bar in BARS.items():
        for c in _tried(p, bits, corrected):
            row = {"model": c.name, "at most": bar, "perplexity": "", "off by": "", "": "not run"}
            if m := results.get((c.key, PPL)):
                met = "met" if m.value <= bar else "not met"
                row |= {"perplexity": number(m), "off by": f"{m.value / bar - 1:+.1%}", "": met}
            rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def more_comparisons(results: Results, p: QuantChapter) -> dict[str, dict[str, Comparison]]:
    """{model: {what: `MORE` calibration text against the table's}} of GPTQ, where run."""
    tests: dict[str, dict[str, Comparison]] = {}
    for bits in p.bits:
        gptq = [c for c in main_models(p) if (c.method, c.bits) == ("GPTQ", bits)]
        for pair in zip(gptq, more_calibration(p, bits), strict=True):
            for task in (HELD_OUT, PPL):
                if test := tested(results, {task: pair}, task):
                    tests.setdefault(pair[0].short, {}).update(test)
    return tests


def more_sentence(results: Results, p: QuantChapter) -> str:
    """What more and nearer calibration text changes, on held-out text and on the test."""
    where = {HELD_OUT: "held-out text", PPL: "the test"}
    changes = "; ".join(
        f"{name} {' and '.join(f'{ratio(c)} on {where[task]} ({p_value(c.p)})' for task, c in tests.items())}"
        for name, tests in more_comparisons(results, p).items()
    )
    return (
        f"Calibrated on {MORE['windows']} windows of Wikipedia instead of {p.calibration} of web text: "
        f"{changes or 'not run'}."
    )


def sink_sentence(shares: Mapping[str, float], length: int) -> str:
    """How much of X^T X is the first token's (see `thesislib.chapters.ch05_runs.sink_shares`)."""
    largest = max(shares, key=shares.get)
    _, block, projection = largest.split(".")
    large, at_v = [v for v in shares.values() if v > 0.1], [v for name, v in shares.items() if name.endswith("v_proj")]
    return (
        f"The first of {length} tokens makes {shares[largest]:.0%} of the trace of block {block}'s {projection}, its "
        f"largest share, and over 10% at {len(large)} of {len(shares)} projections; at v_proj it makes "
        f"{min(at_v):.1%} to {max(at_v):.1%}."
    )


@dataclass(frozen=True)
class OwnGrid:
    """What rounding to 4 bits changes in the subject's own weights, groups of 32.

    Attributes:
        linears: how many were rounded.
        lost: the largest change of a weight on the subject's own grid, which has a floating minimum.
        steps: the mean change on an integer zero-point's grid, in its steps.
    """

    linears: int
    lost: float
    steps: float


def own_grid(subject: Subject, blocks: Sequence[int] = (0, 1)) -> OwnGrid:
    """The linears of some blocks rounded to both grids."""
    own, other = Grid(4, 32, "minimum"), Grid(4, 32, "asymmetric")
    lost, steps = [], []
    for linear in (m for b in blocks for m in subject.linears(b).values()):
        w = linear.weight.detach().float()
        lost.append(float((round_to_nearest(w, own).weight - w).abs().max()))
        q = round_to_nearest(w, other)
        steps.append(float(((q.weight - w).abs() / q.scale.repeat_interleave(32, 1)).mean()))
    return OwnGrid(len(lost), max(lost), float(np.mean(steps)))


def grid_sentence(rounded: OwnGrid) -> str:
    """The same in words."""
    return (
        "Rounded to its own grid (groups of 32, a floating minimum), the largest change of a weight in "
        f"{rounded.linears} linears is {rounded.lost:g}; with an integer zero-point instead, the mean change is "
        f"{rounded.steps:.2f} steps."
    )


def layer_table(errors: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Mean relative output error by kind of projection, one column a method.

    Args:
        errors: {method: {"blocks.B.NAME": error}}.
    """
    means = {
        method: {
            projection: np.mean([e for name, e in each.items() if name.endswith(projection)]) for projection in LINEARS
        }
        for method, each in errors.items()
    }
    return pd.DataFrame(means).loc[list(LINEARS)].round(4)


def layer_sentence(errors: Mapping[str, Mapping[str, float]], base: str = "rounding") -> str:
    """At how many projections each method's error on held-out text is above rounding's."""
    above = {
        method: sum(error > errors[base][name] for name, error in each.items())
        for method, each in errors.items()
        if method != base
    }
    counts = ", with ".join(f"{method} at {n}" for method, n in above.items())
    return f"Of {len(errors[base])} projections the error on held-out text is above {base}'s with {counts}."


def cost_sentence(results: Results) -> str:
    """How long this chapter's own measurements took; the dense model's on the test text and its answers are other
    chapters'."""
    return measurement.cost(m for m in results.values() if "cell" in m.chapter)


def read_layers(path: Path) -> dict[str, dict[str, float]]:
    """The recorded layer errors, beside the recorded run."""
    return read_json(layers_file(path))["errors"]


def rank_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """EoRA's rank, the bytes of its factors, and what it buys."""
    none, *corrected = eora_ranks(p)
    tests = tested(results, {c.name: (none, c) for c in corrected})
    rows = [
        {
            "rank": c.name,
            "MB of factors": f"{(stage_report(m, 'eora')['bytes'] if c.corrected else 0) / 1e6:.2f}",
            "held-out perplexity": number(m),
            "against rank 0": ratio(tests[c.name]) if c.name in tests else "",
        }
        for c in (none, *corrected)
        if (m := results.get((c.key, HELD_OUT)))
    ]
    return _framed(rows, "rank", "held-out perplexity")


def _held_out(results: Results, configs: Iterable[Configuration]) -> dict[str | None, float]:
    """{a configuration's key: its held-out perplexity}, where measured."""
    return {c.key: results[c.key, HELD_OUT].value for c in configs if (c.key, HELD_OUT) in results}


def starts_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Held-out perplexity after LoRA from either start at each learning rate, a column a seed, and what it was before
    training."""
    before, after = {c.rank: c.key for c in eora_ranks(p)}, lora_starts(p)
    values = _held_out(results, [*eora_ranks(p), *after])

    def shown(key: str | None) -> str:
        return f"{values[key]:.2f}" if key in values else "not run"

    rows: dict[tuple[str, float], dict] = {}
    for c in after:
        row = rows.setdefault(("EoRA" if c.corrected else "usual", c.rate), {"before": shown(before[c.rank])})
        row[f"seed {c.seed}"] = shown(c.key)
    return pd.DataFrame(rows).T.rename_axis(["start", "learning rate"])


@dataclass(frozen=True)
class Start:
    """LoRA from one start, at the learning rate that is better for its first seed.

    Attributes:
        rate: that rate.
        before: held-out perplexity before training; None if that was not measured.
        after: after training, by seed.
    """

    rate: float
    before: float | None
    after: dict[int, float]


@dataclass(frozen=True)
class Starts:
    """LoRA begun at zero and at EoRA's correction: equal rank, steps and seeds.

    Attributes:
        usual: begun at zero.
        eora: begun at EoRA's correction.
        tests: the second against the first, by seed, Holm-adjusted.
    """

    usual: Start
    eora: Start
    tests: dict[int, Comparison]


def starts(results: Results, p: QuantChapter) -> Starts | None:
    """Both starts on the seeds that were run with both; None if there are none."""
    configs = {(c.corrected, c.rate, c.seed): c for c in lora_starts(p) if (c.key, HELD_OUT) in results}
    value = {name: results[c.key, HELD_OUT].value for name, c in configs.items()}
    rate = {}
    for corrected in (False, True):
        ends = {r: v for (start, r, seed), v in value.items() if start == corrected and seed == 0}
        rate[corrected] = min(ends, key=ends.get, default=None)
    seeds = [s for start, r, s in configs if not start and r == rate[False] and (True, rate[True], s) in configs]
    if not seeds:
        return None
    before = {c.rank: results[c.key, HELD_OUT].value for c in eora_ranks(p) if (c.key, HELD_OUT) in results}
    usual, eora = (
        Start(rate[start], before.get(p.rank if start else 0), {s: value[start, rate[start], s] for s in seeds})
        for start in (False, True)
    )
    pairs = {s: (configs[False, rate[False], s], configs[True, rate[True], s]) for s in seeds}
    return Starts(usual, eora, tested(results, pairs))


def starts_sentence(results: Results, p: QuantChapter) -> str:
    """`starts` in words."""
    both = starts(results, p)
    if both is None:
        return "Starts of LoRA were not run."

    def ends(start: Start, note: str) -> str:
        values = list(start.after.values())
        begun = "" if start.before is None else f", from {start.before:.2f}{note}"
        return f"{', '.join(f'{x:.2f}' for x in values)} (mean {np.mean(values):.2f}{begun})"

    better, worse, undecided = map(len, by_verdict(both.tests).values())
    return (
        f"At 3 bits, learning rate {both.eora.rate:g}, LoRA started from EoRA's correction ends at "
        f"{ends(both.eora, '')}; started as usual, learning rate {both.usual.rate:g}, at "
        f"{ends(both.usual, ' before training')}. By paired t tests, Holm-adjusted, EoRA's start is better for "
        f"{better} of {len(both.tests)} seeds, worse for {worse}, within noise for {undecided}."
    )


def headline(results: Results) -> str:
    """What chapter 5 found, in sentences, for the book's first page and the README."""
    p, q = recorded_parameters(), ablation_parameters()
    reached = []
    for bits, corrected in BARS:  # by the better of two calibrations
        values = [(m.value, c.short) for c in _tried(p, bits, corrected) if (m := results.get((c.key, PPL)))]
        reached += [f"{name} {value:.1f}" for value, name in [min(values)] if values] if values else []
    best = tested(results, {"best": (one_change(q)[1], leave_one_out(q)[0])})["best"]
    gptq, rounding = (pick(main_models(p), method=method, bits=4, corrected=True) for method in ("GPTQ", "rounding"))
    with_eora = method_comparisons(results, main_models(p), HELD_OUT)[against(gptq, rounding)]
    dense = results[None, PPL]
    return in_markdown(
        f"{textbook_sentence(results, q, brief=True)} {gptqmodel_sentence(read_gptqmodel())} "
        f"{kinds_sentence(results, q)} All of the chapter's changes "
        f"together multiply the plain recipe's perplexity by {np.exp(best.difference):.2f}. With EoRA on top, GPTQ is "
        f"{versus(with_eora)} rounding ({ratio(with_eora)}). On WikiText-2 test (dense, in "
        f"{dense.provenance['dtype']}, {dense.value:.1f}), groups of {p.group}: {', '.join(reached)}. "
        f"{bytes_sentence(results, p)} {starts_sentence(results, q)}"
    )


def pruned_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Pruned models before and after quantisation and compensation, on held-out text, with bytes."""
    return main_table(results, pruned_models(p))[["held-out Wikipedia", "MB"]]


def pruned_comparisons(results: Results, p: QuantChapter) -> dict[str, Comparison]:
    """GPTQ against rounding, and EoRA against none, on pruned models."""
    configs = pruned_models(p)
    pairs = {}
    for label in dict.fromkeys(c.varied for c in configs):
        rounding, gptq, eora = (
            pick(configs, varied=label, method=method, corrected=corrected)
            for method, corrected in (("rounding", False), ("GPTQ", False), ("GPTQ", True))
        )
        pairs[f"{label}: GPTQ against rounding"] = rounding, gptq
        pairs[f"{label}: EoRA against none"] = gptq, eora
    return tested(results, pairs)


def pruned_sentence(results: Results, p: QuantChapter) -> str:
    """`pruned_comparisons` in words."""
    tests = pruned_comparisons(results, p)
    verdicts = "; ".join(f"{name}, {word(c)} ({ratio_and_p(c)})" for name, c in tests.items())
    return f"Paired t tests, Holm-adjusted: {verdicts}." if tests else "Pruned models were not run."


def without_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """The best settings with each ingredient taken away."""
    return ingredient_table(results, leave_one_out(p), base=0)


def samples(results: Results) -> pd.DataFrame:
    """Greedy completions of the models that answered questions."""
    rows = {}
    for (_, task), m in results.items():
        if task == CLOSED and (note := m.chapter).get("text"):
            rows[note.get("name", DENSE)] = {"what it writes": note["text"].replace("\n", " ")}
    return pd.DataFrame(rows).T.rename_axis("model")


def answers_sentence(results: Results, p: QuantChapter) -> str:
    """Questions answered by the quantised models against the dense one, and with EoRA against without, exact McNemar
    tests: of chapter 6's models on more questions, in a recorded run, and of this chapter's on its own."""
    dense, *configs = main_models(p)
    pairs = {f"{c.name} against dense": (dense, c) for c in configs}
    for c in (c for c in configs if c.corrected):
        pairs[f"{c.name} against without"] = pick(configs, method=c.method, bits=c.bits, corrected=False), c
    books = []
    for task in (CLOSED, OPEN):
        answers = "; ".join(
            f"{name} {results[pairs[name][1].key, task].value:.1%} ({word(test, higher_is_better=True)}, "
            f"{p_value(test.p)})"
            for name, test in tested(results, pairs, task).items()
        )
        m = results[None, task]
        books.append(f"{task}, {m.n} questions, dense {m.value:.1%}: {answers or 'not run'}")
    own = f"{'. '.join(x[0].upper() + x[1:] for x in books)}. Exact McNemar tests, Holm-adjusted."
    return f"{_on_more_questions(results.pool)}{own}" if isinstance(results, Recorded) else own


def _on_more_questions(pool: Records) -> str:
    """What chapter 6's models of 4 bits say on the most questions, closed book, as the claims have it."""
    said, n, windows = [], 0, 0
    for first, second in ((DENSE, "Q"), ("Q", "Q+E")):
        if both := on_largest_sample(pool, first, second, CLOSED):
            (a,), (b,) = both
            c = compare_models(first, [a], second, [b], None)
            n, windows = a.n, b.stages[0]["gptq"]["windows"]
            said.append(f"{second} {b.value:.1%} against {first} {a.value:.1%}, {points(c)}, {p_value(c.p)}")
    return (
        f"Closed book, {n:,} questions, chapter 6's models (calibrated on {windows} windows): {'; '.join(said)}. "
        "The fewer questions below tell less. "
        if said
        else ""
    )


CHAPTER = Chapter(
    "05_quantisation",
    "quantisation and compensation",
    QuantChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    RECORDED,
    reads=("06_evaluation",),
)
