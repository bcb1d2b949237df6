"""Chapter 5's tables, and the rows of its plots."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from thesislib.chapters.ch05_comparisons import by_projection, held_out_of, read_gptqmodel, stage_report, tested, worth
from thesislib.chapters.ch05_runs import (
    BEST,
    CLOSED,
    HELD_OUT,
    PPL,
    Configuration,
    QuantChapter,
    Results,
    bits_by_group,
    eora_choices,
    eora_ranks,
    leave_one_out,
    lora_starts,
    main_models,
    more_calibration,
    on_the_test,
    one_change,
    one_projection,
    pick,
    pruned_models,
)
from thesislib.chapters.pareto import ENDS
from thesislib.chapters.phrases import factor, number, ratio, versus, word
from thesislib.chapters.thesis import thesis_row
from thesislib.errors import BadInput
from thesislib.evaluate.compare import compare
from thesislib.experiment import DENSE
from thesislib.model.layers import LINEARS
from thesislib.records.measurement import Measurement


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


def starts_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Held-out perplexity after LoRA from either start at each learning rate, a column a seed, and what it was before
    training."""
    before, after = {c.rank: c.key for c in eora_ranks(p)}, lora_starts(p)
    values = held_out_of(results, [*eora_ranks(p), *after])

    def shown(key: str | None) -> str:
        return f"{values[key]:.2f}" if key in values else "not run"

    rows: dict[tuple[str, float], dict] = {}
    for c in after:
        row = rows.setdefault(("EoRA" if c.corrected else "usual", c.rate), {"before": shown(before[c.rank])})
        row[f"seed {c.seed}"] = shown(c.key)
    return pd.DataFrame(rows).T.rename_axis(["start", "learning rate"])


def pruned_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Pruned models before and after quantisation and compensation, on held-out text, with bytes."""
    return held_out_table(results, pruned_models(p))


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
