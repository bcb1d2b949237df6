"""Chapter 5, quantisation and compensation: why GPTQ without act-order, on few tokens, loses to rounding on a small
model, and what repairs it."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thesislib.chapters.ch05_runs import (
    BEST,
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
    on_the_test,
    one_change,
    one_projection,
    pick,
    pruned_models,
    read_recorded,
    recorded_parameters,
    recorded_parts,
    sinks_file,
)
from thesislib.chapters.chapter import Chapter, K, Opening
from thesislib.chapters.pareto import ENDS
from thesislib.chapters.phrases import factor, listed, number, points, ratio, versus, word
from thesislib.chapters.pool import Recorded, scored_by
from thesislib.chapters.thesis import thesis_row
from thesislib.chapters.trainings import on_largest_sample
from thesislib.errors import BadInput
from thesislib.evaluate.answers import AT_ONCE, FIRST_WORDS
from thesislib.evaluate.compare import compare
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted
from thesislib.experiment import DENSE
from thesislib.files import data_file, read_json
from thesislib.model.grid import Grid, round_to_nearest
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.records import measurement
from thesislib.records.measurement import Measurement, in_markdown


def stage_report(m: Measurement, word: str) -> dict:
    """What the first stage of a word ("gptq", "eora", ...) said of itself.

    Raises:
        BadInput: no such stage made this subject.
    """
    for stage, report in zip(m.stages, m.made["reports"], strict=True):
        if word in stage:
            return report
    raise BadInput(f"no stage '{word}' made {m.label}")


def _calibration(c: Configuration) -> str:
    """The text that GPTQ or EoRA saw."""
    seen = [stage for stage in c.stages if stage.word in ("gptq", "eora")]
    text = {"c4": "web", "wikipedia": "Wikipedia"}
    return f"{text.get(seen[0].text, seen[0].text)}, {seen[0].windows} x {seen[0].length:,}" if seen else ""


def _settings(c: Configuration) -> str:
    """What its name leaves out: grid, clipping, and GPTQ's order of columns if that is not the chapter's."""
    stage = next((stage for stage in c.stages if stage.family == "quantised"), None)
    if stage is None:
        return ""
    order = getattr(stage, "act_order", BEST["act_order"])
    clipped, other = stage.clip != "none", order != BEST["act_order"]
    return f"{stage.grid}{', clipped' * clipped}{f', order {order}' * other}"


def main_table(results: Results, configs: Sequence[Configuration]) -> pd.DataFrame:
    """One row a model: perplexity on the test and the held-out text, as ratios to the dense model, and bytes."""
    rows: dict[str | None, dict] = {}
    for c in configs:
        test, held_out = (results.get((c.key, task)) for task in (PPL, HELD_OUT))
        if c.key in rows or not (m := test or held_out):
            continue
        rows[c.key] = {
            "model": c.short if c.method else c.name,
            "settings": _settings(c),
            "calibration": _calibration(c),
            "x dense": ratio(compare(results[None, PPL], test)) if test and c.stages and (None, PPL) in results else "",
            "WikiText-2": f"{test.value:.2f}" if test else "",
            "held-out": f"{held_out.value:.2f}" if held_out else "",
            "MB": f"{_megabytes(m):.1f}",
        }
    return _framed(list(rows.values()), "model", "WikiText-2", "held-out", "MB")


def _megabytes(m: Measurement) -> float:
    size = m.made["bytes"] or {}
    return size.get("bytes_on_disk", size.get("bytes_in_memory", 0)) / 1e6


def table_models(p: QuantChapter) -> list[Configuration]:
    """The models of the chapter's table, those first that every chapter speaks of."""
    return [*main_models(p), *(c for bits in p.bits for c in more_calibration(p, bits)), *on_the_test(p)]


def held_out_table(results: Results, configs: Sequence[Configuration]) -> pd.DataFrame:
    """One row a model: perplexity on held-out text, and bytes on disk."""
    rows = [
        {"model": c.name, "held-out Wikipedia": number(m), "MB": f"{_megabytes(m):.1f}"}
        for c in configs
        if (m := results.get((c.key, HELD_OUT)))
    ]
    return _framed(rows, "model", "held-out Wikipedia", "MB")


def methods(results: Results, q: QuantChapter) -> pd.DataFrame:
    """Ways to 4 bits, one row each: perplexity on held-out text by the dense model's, with the paired interval.

    Of what was measured outside the recorded run, see `read_gptqmodel`, there is no interval, and a row a thread.
    """
    rounding, plain, *_, zero_point = one_change(q)
    clipped, rounding_eora, best, both = (
        pick(main_models(q), bits=4, method=method, corrected=corrected)
        for method in ("rounding", "GPTQ")
        for corrected in (False, True)
    )
    symmetric = pick(main_models(q, ("symmetric",)), bits=4, method="rounding", corrected=False)
    chosen = {
        "rounding, symmetric": ("rounding", rounding),
        "rounding, symmetric, clipped": ("rounding", symmetric),
        "rounding, zero-point": ("rounding", zero_point),
        "rounding, zero-point, clipped": ("rounding", clipped),
        "GPTQ, symmetric, columns from left to right": ("GPTQ", plain),
        "GPTQ, all of the chapter's settings": ("GPTQ", best),
        "rounding + EoRA": ("rounding + EoRA", rounding_eora),
        "GPTQ + EoRA": ("GPTQ + EoRA", both),
    }
    rows = []
    for name, (look, c) in chosen.items():
        if m := results.get((c.key, HELD_OUT)):
            test = compare(results[None, HELD_OUT], m)
            value, low, high = np.exp([test.difference, test.low, test.high])
            rows.append({"method": name, "look": look, "x dense": value, "low": low, "high": high})
    found = read_gptqmodel()["rows"]
    dense = next(row["perplexity"] for row in found if row["model"] == DENSE)
    others = {
        "thesislib, the same settings": "GPTQ, symmetric, columns by groups (float32)",
        "GPTQModel": "GPTQModel, its defaults (float32)",
    }
    beside = [
        {"method": others[row["model"]], "look": "GPTQ", "x dense": row["perplexity"] / dense}
        for row in found
        if row["model"] in others
    ]
    at = next((i for i, row in enumerate(rows) if row["method"].startswith("GPTQ, all")), len(rows))
    return pd.DataFrame([*rows[:at], *sorted(beside, key=lambda row: row["method"] != "GPTQ"), *rows[at:]])


def methods_caption(results: Results, q: QuantChapter) -> str:
    """What `methods` finds."""
    rounding, plain, *_ = one_change(q)
    models = [pick(main_models(q), bits=4, method=m, corrected=True) for m in ("rounding", "GPTQ")]
    test = tested(results, {"plain": (rounding, plain)})["plain"]
    eora = [compare(results[None, HELD_OUT], results[c.key, HELD_OUT]) for c in models]
    return (
        f"From left to right GPTQ is {versus(test)} rounding on its own grid; with its columns ordered, GPTQModel's "
        f"way or the chapter's, it wins. After EoRA it hardly matters which of the two came before ({factor(eora[0])} "
        f"and {factor(eora[1])} dense)."
    )


def _framed(rows: Sequence[dict], index: str, *columns: str) -> pd.DataFrame:
    """Rows as a table, with these columns even if nothing was run."""
    return pd.DataFrame(rows, columns=None if rows else [index, *columns]).set_index(index)


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


def eora_sentence(results: Results, p: QuantChapter) -> str:
    """Does GPTQ still matter once EoRA follows?"""
    tests = method_comparisons(results, main_models(p), HELD_OUT)
    said = []
    for bits in p.bits:
        gptq, rounding = (pick(main_models(p), method=m, bits=bits, corrected=True) for m in ("GPTQ", "rounding"))
        if c := tests.get(against(gptq, rounding)):
            said.append(f"{versus(c)} rounding at {bits} bits ({ratio(c)})")
    return f"With EoRA on top, GPTQ is {' and '.join(said)}." if said else "EoRA was not run."


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


def textbook_sentence(results: Results, p: QuantChapter, bits: int = 4) -> str:
    """Does GPTQ by the plain recipe beat rounding here, and which single change helps most?"""
    found = textbook(results, p, bits)
    best, zero_point = found.changes[found.best], found.zero_point
    also = (
        f" With an integer zero-point it is {versus(zero_point)} rounding ({ratio(zero_point)})." if zero_point else ""
    )
    most = f" Of single changes {found.best} gains most ({ratio(best)})." if best.verdict() == "better" else ""
    return (
        f"At {bits} bits, on held-out text, GPTQ without act-order on {p.calibration * p.length:,} tokens is "
        f"{versus(found.plain)} rounding ({ratio(found.plain)}).{also}{most}"
    )


def read_gptqmodel() -> dict:
    """What `benchmarks.gptqmodel` found, beside the recorded run."""
    return read_json(data_file("results/05_gptqmodel.json"))


def gptqmodel_sentence(found: Mapping[str, Any]) -> str:
    """GPTQModel, whose own order goes by groups, beside rounding and this package's GPTQ, on held-out text."""
    values = {
        row["model"]: [r["perplexity"] for r in found["rows"] if r["model"] == row["model"]] for row in found["rows"]
    }
    (dense,), (rounding,), (theirs,) = (values[name] for name in ("dense", "rounding", "GPTQModel"))
    ours, plain = (values[f"thesislib, {name}"] for name in ("the same settings", "from left to right"))
    apart = max(max(several) / min(several) - 1 for several in (ours, plain))
    lost = min(plain) > rounding
    note = (
        f" Where two numbers stand together, one is from one thread and one from two, which add in another order: "
        f"GPTQ's results differ by up to {apart:.1%} for that alone."
        if apart
        else ""
    )
    return (
        f"GPTQModel {found['GPTQModel']}, whose default order goes by groups, has {theirs:.2f} there after as many "
        f"tokens; rounding has {rounding:.2f}, dense {dense:.2f} (float32). With its settings GPTQ here has "
        f"{_both(ours)} in that order and {_both(plain)} from left to "
        f"right{', above rounding either way' * lost}.{note}"
    )


def _both(values: Iterable[float]) -> str:
    return " and ".join(f"{x:.2f}" for x in values)


def worth(results: Results, p: QuantChapter) -> dict[str, tuple[Comparison, Comparison]]:
    """{ingredient: (added to the plain recipe alone, taken away from the best settings)}."""
    best, *less = leave_one_out(p)
    _, plain, *changed, _ = one_change(p)
    first = {c.varied: c for c in reversed(changed)}
    removed = tested(results, {c.varied: (best, c) for c in less if c.varied})
    added = tested(results, {title: (plain, first[title]) for title in removed})
    return {title: (added[title], c) for title, c in removed.items() if title in added}


def worth_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """What each ingredient gains alone, and what is lost without it, paired and Holm-adjusted."""
    rows = [
        {
            "setting": title,
            "alone, x the plain recipe": ratio(added),
            "without it, x all settings": f"{ratio(removed)}{'' if removed.told else ', within noise'}",
        }
        for title, (added, removed) in worth(results, p).items()
    ]
    return _framed(rows, "setting", "alone, x the plain recipe", "without it, x all settings")


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
    tests = by_projection(results, p)
    better, worse, _ = by_verdict(tests).values()
    if not tests:
        return "Kinds of projections were not run one at a time."
    if not worse:
        return "At no kind of projection is plain GPTQ worse than rounding."
    lost = f"{' and '.join(worse)}{' alone' * (len(worse) == 1)} ({', '.join(ratio(tests[kind]) for kind in worse)})"
    return f"The loss comes from {lost}.{f' At {listed(better)} plain GPTQ is better than rounding.' * bool(better)}"


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
    more = "".join(f", {v:.2f} on {name}" for name, v in amounts.items())
    return (
        f"Calibrated on {len(seeds)} choices of {p.calibration} windows, 4 bits have "
        f"{', '.join(f'{v:.2f}' for v in seeds)} on held-out text, {max(seeds) / min(seeds) - 1:.1%} apart{more}."
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
    lead = "Spend the bytes on the fourth bit: " * (c.verdict() == "worse" and few.disk_bytes > many.disk_bytes)
    return (
        f"{lead}3 bits with EoRA of rank {p.rank} take {few.disk_bytes / 1e6:.1f} MB and have {few.value:.1f} on "
        f"WikiText-2 test, 4 bits without take {many.disk_bytes / 1e6:.1f} MB and have {many.value:.1f} ({ratio(c)}; "
        f"both calibrated on {p.calibration} windows of web text)."
    )


def sizes(results: Results, q: QuantChapter) -> pd.DataFrame:
    """(series, label, MB, x dense, low, high) on held-out text: rounding and GPTQ by bits, and GPTQ with EoRA by
    rank."""
    by_bits = [(c.method, f"{c.bits} bits", c) for c in bits_by_group(q) if c.group == q.group]
    by_rank = [("GPTQ 3-bit + EoRA", f"rank {c.rank}" if c.rank else "", c) for c in eora_ranks(q)]
    four = pick(main_models(q), method="GPTQ", bits=4, corrected=True)
    rows = []
    for series, label, c in (*by_bits, *by_rank, ("GPTQ 4-bit + EoRA", f"rank {q.rank}", four)):
        if m := results.get((c.key, HELD_OUT)):
            test = compare(results[None, HELD_OUT], m)
            value, low, high = np.exp([test.difference, test.low, test.high])
            row = {
                "series": series,
                "label": label,
                "MB": m.disk_bytes / 1e6,
                "x dense": value,
                "low": low,
                "high": high,
            }
            rows.append(row)
    return pd.DataFrame(rows).sort_values(["series", "MB"], kind="stable", ignore_index=True)


def files(marks: pd.DataFrame, dense: Measurement) -> pd.DataFrame:
    """`thesislib.chapters.pareto.marks` of perplexity, by the dense model's."""
    return marks.assign(**{f"x dense{end}": marks[f"perplexity{end}"] / dense.value for end in ENDS})


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
    """What more and nearer calibration text changes on the test."""
    changes = [
        f"{name} by {factor(tests[PPL], '.3f')}" for name, tests in more_comparisons(results, p).items() if PPL in tests
    ]
    if not changes:
        return "Other calibration text was not run."
    return (
        f"Calibrated on {MORE['windows']} windows of Wikipedia instead of {p.calibration} of web text, perplexity on "
        f"WikiText-2 test changes for {' and for '.join(changes)}. Part of that gain is the kind of text: the test is "
        "from Wikipedia too."
    )


def read_sinks(path: Path) -> dict[str, Any]:
    """The recorded shares of the first tokens, beside the recorded run."""
    return read_json(sinks_file(path))


def sink_table(sinks: Mapping[str, Any], results: Results, q: QuantChapter) -> pd.DataFrame:
    """The two opposite troubles with the first token, and what three weightings of tokens do about each.

    A token's share of the trace of X^T X follows from its share with all weights equal. With unit norms all tokens have
    the same.
    """
    shares = sinks["shares"]
    largest = max(shares, key=shares.get)
    _, block, projection = largest.split(".")
    at_v = float(np.median([share for name, share in shares.items() if name.endswith("v_proj")]))
    plain = one_change(q)[1]
    changed = {c.stages[0].weighting: c for c in one_change(q) if c.varied == "token weighting"}
    tests = tested(results, {weighting: (plain, c) for weighting, c in changed.items()})
    heading = {
        "unit_norm": "every token at unit norm",
        "first_16": "first token x 16",
        "skip_1": "first token left out",
    }

    def counted(share: float) -> dict[str, str]:
        after = {"unit_norm": 1 / sinks["length"], "first_16": 16 * share / (1 + 15 * share), "skip_1": 0.0}
        return {"as it comes": f"{share:.2%}"} | {heading[w]: f"{x:.2%}" for w, x in after.items()}

    rows = [
        {"place": "v_proj, median block", "what goes wrong": "too light: every token reads it", **counted(at_v)},
        {
            "place": f"{projection} of block {block}",
            "what goes wrong": "too heavy: hardly anything else is fitted",
            **counted(shares[largest]),
        },
        {"place": "held-out perplexity", "what goes wrong": "", "as it comes": "x 1"}
        | {heading[weighting]: factor(c, ".3f") for weighting, c in tests.items()},
    ]
    return pd.DataFrame(rows).set_index("place")


def sink_sentence(shares: Mapping[str, float], length: int) -> str:
    """How much of X^T X is the first token's (see `thesislib.chapters.ch05_runs.sink_shares`)."""
    largest = max(shares, key=shares.get)
    _, block, projection = largest.split(".")
    large, at_v = [v for v in shares.values() if v > 0.1], [v for name, v in shares.items() if name.endswith("v_proj")]
    return (
        f"The sum over tokens is the trace of XᵀX. The first of {length} tokens makes at most {max(at_v):.1%} of it at "
        f"v_proj. At block {block}'s {projection} it makes {shares[largest]:.0%}, and over 10% at {len(large)} of "
        f"{len(shares)} projections."
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


def layer_sentence(errors: Mapping[str, Mapping[str, float]], results: Results, q: QuantChapter) -> str:
    """What errors of single layers say of the tokens' weights, and what perplexity says."""
    best = leave_one_out(q)[0]
    equal = pick(leave_one_out(q), varied="token weighting")
    c = tested(results, {"equal": (best, equal)})["equal"]
    at_v = layer_table(errors).loc["v_proj"]
    return (
        f"The mean relative error of v_proj's output on held-out text is {at_v['GPTQ']:.4f} with tokens at unit norm "
        f"and {at_v['GPTQ, tokens equal']:.4f} with equal weights ({at_v['rounding']:.4f} by rounding): an error that "
        f"is small on average says little about the one token that everyone reads. Perplexity with equal weights is "
        f"{versus(c)} with unit norms ({ratio(c)})."
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
    first = lora_starts(p)[0].stages[-1]

    def ends(start: Start) -> str:
        return f"{np.mean(list(start.after.values())):.2f} (rate {start.rate:g})"

    _, worse, undecided = map(len, by_verdict(both.tests).values())
    seeds = len(both.tests)
    told = "for every seed" if not worse + undecided else f"for {seeds - worse - undecided} of {seeds} seeds"
    ahead = np.mean(list(both.eora.after.values())) < np.mean(list(both.usual.after.values()))
    after = {
        (c.rate, c.seed): results[c.key, HELD_OUT].value
        for c in lora_starts(p)
        if c.corrected and (c.key, HELD_OUT) in results
    }
    lost = [
        v for (rate, _), v in after.items() if rate != both.eora.rate and both.usual.before and v > both.usual.before
    ]
    tried = sum(rate != both.eora.rate for rate, _ in after)
    caution = (
        f" The rate decides: at {first.learning_rate:g} {len(lost)} of {tried} seeds end far worse "
        f"({' and '.join(f'{v:.1f}' for v in lost)}) than the quantised model without EoRA or training "
        f"({both.usual.before:.2f})."
        if lost
        else ""
    )
    return (
        f"After {first.steps} steps at 3 bits, LoRA that starts from EoRA's correction is "
        f"{'ahead' if ahead else 'behind'}: held-out perplexity {ends(both.eora)} on average against "
        f"{ends(both.usual)} from the usual start, {'better' if ahead else 'better only'} {told}.{caution}"
    )


def answer(results: Results) -> str:
    """The chapter's answer, in two sentences."""
    p, q = recorded_parameters(), ablation_parameters()
    plain = textbook(results, q).plain
    worse = by_verdict(by_projection(results, q))["worse"]
    gptq, eora = (
        compare(results[None, PPL], results[pick(main_models(p), method="GPTQ", bits=4, corrected=e).key, PPL])
        for e in (False, True)
    )
    return (
        f"From left to right GPTQ is {versus(plain)} rounding ({factor(plain, '.3f')} on held-out text): at "
        f"{' and '.join(worse)} it overlooks the token that all others read. Set up better, 4 bits cost {factor(gptq)} "
        f"the dense perplexity on WikiText-2, and {factor(eora)} with EoRA (calibrated on {p.calibration} windows of "
        "web text)."
    )


def short(results: Results) -> str:
    """The answer in about ten words."""
    p = recorded_parameters()
    gptq, eora = (
        results[pick(main_models(p), method="GPTQ", bits=4, corrected=e).key, PPL].value / results[None, PPL].value
        for e in (False, True)
    )
    return f"4 bits cost {gptq - 1:.0%} of perplexity, with EoRA {eora - 1:.0%}; plain GPTQ loses to rounding"


def protocol(results: Recorded) -> str:
    """Text, windows, questions and the dense model's values."""
    p, q = recorded_parameters(), ablation_parameters()
    test, held_out = results[None, PPL], results[None, HELD_OUT]
    asked = ", ".join(f"{next(iter(ms.values())).n:,} {task}" for task, ms in answers(results).items() if ms)
    missing = [c for c in on_the_test(p) if (c.key, PPL) not in results]
    note = f" Not yet measured on WikiText-2: {len(missing)} models of the table." if missing else ""
    return (
        f"WikiText-2 test, {test.n} windows of {p.length}: dense {number(test)}. Held-out Wikipedia, on which settings "
        f"are chosen, {held_out.n} windows: dense {number(held_out)}. TriviaQA: {asked}. Calibration on web text, "
        f"{q.calibration} windows to compare settings, {p.calibration} in the table.{note}"
    )


def headline(results: Results) -> str:
    """What chapter 5 found, in sentences: the fold "All findings in one place"."""
    p, q = recorded_parameters(), ablation_parameters()
    reached = []
    for text, configs in (
        (f"{p.calibration} windows of web text", [c for c in main_models(p) if c.method == "GPTQ"]),
        (f"{MORE['windows']} windows of Wikipedia", [c for bits in p.bits for c in more_calibration(p, bits)]),
    ):
        values = [f"{c.short} {m.value:.1f}" for c in configs if (m := results.get((c.key, PPL)))]
        reached += [f"calibrated on {text}: {', '.join(values)}"] if values else []
    best = tested(results, {"best": (one_change(q)[1], leave_one_out(q)[0])})["best"]
    dense = results[None, PPL]
    return in_markdown(
        f"{textbook_sentence(results, q)} {kinds_sentence(results, q)} {gptqmodel_sentence(read_gptqmodel())} All of "
        f"the chapter's changes together multiply the plain recipe's perplexity by {np.exp(best.difference):.2f}. "
        f"{eora_sentence(results, p)} On WikiText-2 test (dense {dense.value:.1f}), {'; '.join(reached)}. "
        f"{bytes_sentence(results, p)} {starts_sentence(results, q)}"
    )


def pruned_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Pruned models before and after quantisation and compensation, on held-out text, with bytes."""
    return held_out_table(results, pruned_models(p))


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
    said = [
        f"On {label} GPTQ is {versus(tests[f'{label}: GPTQ against rounding'])} rounding "
        f"({ratio(tests[f'{label}: GPTQ against rounding'])}), and EoRA {versus(tests[f'{label}: EoRA against none'])} "
        f"none ({ratio(tests[f'{label}: EoRA against none'])})."
        for label in dict.fromkeys(name.partition(": ")[0] for name in tests)
    ]
    return " ".join(said) or "Pruned models were not run."


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


QUANTISED = (DENSE, "Q", "Q+E")  # chapter 6's models with 4 bits, measured on the most questions


def answers(results: Recorded) -> dict[str, dict[str, Measurement]]:
    """{closed or open book: {label: answers}} of the dense and the quantised models on the most questions that all
    have."""
    found: dict[str, dict[str, Measurement]] = {}
    for task in (CLOSED, OPEN):
        samples = [results.pool.get((label, task), {}) for label in QUANTISED]
        sizes = set.intersection(*map(set, samples))
        found[task] = {x: by_n[max(sizes)][0] for x, by_n in zip(QUANTISED, samples, strict=True)} if sizes else {}
    return found


def answers_sentence(results: Recorded) -> str:
    """Closed-book questions of the quantised models: by the scoring that gives all as many words, and by the thesis's
    rule."""
    fair, rule = (
        [on_largest_sample(results.pool, *two, measure) for two in itertools.pairwise(QUANTISED)]
        for measure in (scored_by(CLOSED, AT_ONCE.metric), CLOSED)
    )
    if not all([*fair, *rule]):
        return "Chapter 6's quantised models have not answered yet."

    def shown(pairs) -> tuple[Measurement, str, str]:
        ((dense,), (gptq,)), (_, (eora,)) = pairs
        costs, gains = points(compare(dense, gptq)), points(compare(gptq, eora))
        return dense, f"{gptq.value:.1%} ({costs})", f"{eora.value:.1%} ({gains})"

    dense, gptq, eora = shown(fair)
    thesis, gptq_there, eora_there = shown(rule)
    return (
        f"Cut at its first line and at {FIRST_WORDS} words, the dense model's answer is right for {dense.value:.1%} of "
        f"{dense.n:,} closed-book questions. Q answers {gptq}, and EoRA brings that to {eora}. By the thesis's rule, "
        f"which counts a name anywhere in the answer, the same go from {thesis.value:.1%} to {gptq_there} and to "
        f"{eora_there}."
    )


def agrees(record: Results, results: Results, p: QuantChapter) -> bool:
    """Whether the models that this run measured on held-out text come in the order of the recorded ones."""
    kinds: dict[Configuration, Configuration] = {}
    theirs = {(c.method, c.bits, c.corrected): c for c in main_models(recorded_parameters())}
    for c in main_models(p):
        other = theirs.get((c.method, c.bits, c.corrected))
        if other and {(c.key, HELD_OUT)} <= results.keys() and {(other.key, HELD_OUT)} <= record.keys():
            kinds[c] = other
    here = sorted(kinds, key=lambda c: results[c.key, HELD_OUT].value)
    return here == sorted(kinds, key=lambda c: record[kinds[c].key, HELD_OUT].value)


# ---------------------------------------------------------------- answers to the exercises


def rank_in_bits(results: Results, p: QuantChapter) -> str:
    """What a correction costs in bits a weight."""
    few, many = (pick(main_models(p), method="GPTQ", bits=bits, corrected=bits == 3) for bits in (3, 4))
    m, other = results[few.key, PPL], results[many.key, PPL]
    quantised, eora = (stage_report(m, word) for word in ("gptq", "eora"))
    weights = 8 * quantised["bytes"] / quantised["bits_per_weight"]
    per_weight = 8 * eora["bytes"] / weights
    return (
        f"The corrections take {eora['bytes'] / 1e6:.1f} MB for {weights / 1e6:.0f} M weights: {per_weight:.2f} bits a "
        f"weight. With scales and zero-points 3 bits are {quantised['bits_per_weight']:.2f}, so together "
        f"{quantised['bits_per_weight'] + per_weight:.2f}, and 4 bits are "
        f"{stage_report(other, 'gptq')['bits_per_weight']:.2f}. A matrix grows with the product of its sides and a "
        "rank with their sum, so wider models get it cheaper."
    )


def groups_or_rank(results: Results, q: QuantChapter) -> str:
    """Five megabytes at 3 bits: smaller groups, or EoRA of rank 8?"""
    groups = {c.group: c for c in bits_by_group(q) if (c.method, c.bits) == ("GPTQ", 3)}
    rank = pick(eora_ranks(q), rank=8)
    start, small, eora = (results[c.key, HELD_OUT] for c in (groups[64], groups[32], rank))
    better = "smaller groups" if small.value < eora.value else "the rank"
    return (
        f"Groups of 32 take {(small.disk_bytes - start.disk_bytes) / 1e6:.1f} MB more and rank 8 "
        f"{(eora.disk_bytes - start.disk_bytes) / 1e6:.1f} MB. Held-out perplexity falls from {start.value:.2f} to "
        f"{small.value:.2f} ({ratio(compare(start, small))}) and to {eora.value:.2f} ({ratio(compare(start, eora))}): "
        f"spend them on {better}. A scale is fitted to its own 32 weights, while rank 8 has to serve a whole matrix."
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
    opening=Opening(
        question="What do 4 bits a weight cost a small model, and why does plain GPTQ lose to rounding here?",
        answer=answer,
        short=short,
        protocol=protocol,
        learn="How GPTQ pushes rounding errors along a row, and how EoRA cuts an SVD.",
    ),
)
