"""Chapter 9's comparisons and tables."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from thesislib.chapters.ch09_runs import (
    HELD_OUT,
    PPL,
    TASKS,
    Configuration,
    Record,
    budgets,
    calr,
    dense,
    headline,
    kinds,
    methods,
    neighbours,
    orders,
    recorded_parameters,
    scopes,
)
from thesislib.chapters.chapter import WIKITEXT
from thesislib.chapters.phrases import interval, p_number, ratio, written
from thesislib.chapters.pool import largest
from thesislib.chapters.trainings import Spread, means_compared
from thesislib.evaluate.compare import compare
from thesislib.evaluate.stats import Comparison, Ranking, friedman, holm_adjusted, signed_rank, with_spread
from thesislib.experiment import DENSE
from thesislib.records.measurement import Measurement

MB = 1e6
ARMS = ("CALR", "wider pairs trained", "LoRA")  # of the same tokens, several seeds each
UNTRAINED = ("D2", "D4", "D6", "W1:8", "W1:16", "Q", "Q+E", "Q3", "Q3+E")  # other chapters' models, on the whole text


def found(record: Record, configs: Iterable[Configuration], what: str = HELD_OUT) -> dict[str, Measurement]:
    """{name: measurement} of those configurations that were measured, in order."""
    return {c.name: record[c.key, what] for c in configs if (c.key, what) in record}


def whole_model(record: Record, what: str = HELD_OUT) -> Measurement:
    """The dense model's."""
    return record[dense()[0].key, what]


def beside_dense(record: Record, configs: Iterable[Configuration]) -> pd.DataFrame:
    """Models by MB, held-out perplexity times the dense model's with its interval, the share of parameters removed."""
    base = whole_model(record)
    rows = []
    for name, m in found(record, configs).items():
        c = compare(base, m) if m is not base else None
        value, low, high = (1.0, 1.0, 1.0) if c is None else tuple(np.exp([c.difference, c.low, c.high]))
        rows.append(
            {"model": name, "label": m.label, "MB": m.disk_bytes / MB, "x dense": value, "low": low, "high": high,
             "perplexity": m.value, "parameters": m.made["bytes"]["parameters"]}
        )  # fmt: skip
    columns = ["model", "label", "MB", "x dense", "low", "high", "perplexity", "parameters"]
    return pd.DataFrame(rows, columns=columns).set_index("model")


def shown(table: pd.DataFrame, tests: dict[str, Comparison] | None = None, against: str = "") -> pd.DataFrame:
    """A table of `beside_dense` as the book shows it, with tests against one of its models if there are some."""
    rows = []
    for name, row in table.iterrows():
        said = {
            "": name,
            "MB": f"{row['MB']:.1f}",
            "x dense": interval(row["x dense"], row["low"], row["high"], ".3g"),
            "perplexity": written(row["perplexity"], ".4g"),
        }
        if tests is not None:
            c = tests.get(str(name))
            said |= {f"against {against}": ratio(c) if c else "", "p (Holm)": p_number(c.p) if c else ""}
        rows.append(said)
    return pd.DataFrame(rows, columns=None if rows else ["", "MB", "x dense", "perplexity"]).set_index("")


def against(record: Record, configs: Sequence[Configuration], base: str, what: str = HELD_OUT) -> dict:
    """Every model against one of them on the same text, Holm-adjusted."""
    rows = found(record, configs, what)
    if base not in rows:
        return {}
    return holm_adjusted({name: compare(rows[base], m) for name, m in rows.items() if name != base})


# ---------------------------------------------------------------- question 1


def budget_points(record: Record) -> pd.DataFrame:
    """Question 1 on held-out text: the models of `budgets` by series."""
    table = beside_dense(record, budgets(recorded_parameters()))

    def series(name: str) -> str:
        return f"low rank, {name.split()[-2]} bits" if "kept" in name else "depth" if "blocks" in name else "fewer bits"

    return table.assign(series=[series(str(name)) for name in table.index])


def whole_text(record: Record) -> pd.DataFrame:
    """Perplexity on the whole of WikiText-2 by MB: low rank, and what other chapters made without training."""
    rows = []
    base = largest(record.pool, WIKITEXT, [DENSE]).get(DENSE)
    if base is None:
        return pd.DataFrame()
    mine = {name: m for name, m in found(record, headline(recorded_parameters()), PPL).items() if "kept" in name}
    others = {label: m for label, m in largest(record.pool, WIKITEXT, UNTRAINED).items() if m.n == base.n}
    for name, m in {DENSE: base, **others, **mine}.items():
        c = compare(base, m) if m is not base else None
        value, low, high = (1.0, 1.0, 1.0) if c is None else tuple(np.exp([c.difference, c.low, c.high]))
        rows.append(
            {"model": name, "label": m.label, "MB": (m.disk_bytes or base.disk_bytes) / MB, "x dense": value,
             "low": low, "high": high, "perplexity": m.value, "low rank": name in mine}
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("model").sort_values("MB", ascending=False)


class Rival(NamedTuple):
    """A low-rank model and the best model of another kind that is no larger.

    Args:
        model: the low-rank one.
        rival: the other.
        c: the rival against the model, on the same text; below 0 the rival is better.
    """

    model: str
    rival: str
    c: Comparison


def rivals(record: Record) -> list[Rival]:
    """For every low-rank model of the budgets the best other model that takes no more bytes, Holm-adjusted."""
    configs = [c for c in budgets(recorded_parameters()) if (c.key, HELD_OUT) in record]
    mine = {c.name: record[c.key, HELD_OUT] for c in configs if c.cell == "budgets"}
    others = {c.name: record[c.key, HELD_OUT] for c in configs if c.cell == "others"}
    pairs = {}
    for name, m in mine.items():
        smaller = {other: o for other, o in others.items() if o.disk_bytes <= m.disk_bytes}
        if smaller:
            rival = min(smaller, key=lambda other: smaller[other].value)
            pairs[name, rival] = compare(m, smaller[rival])
    return [Rival(name, rival, c) for (name, rival), c in holm_adjusted(pairs).items()] if pairs else []


# ---------------------------------------------------------------- questions 2, 4, 5


def methods_table(record: Record) -> pd.DataFrame:
    """Methods, inputs, token weights, text and allocations at one budget, each against SVD-LLM's default."""
    configs = methods(recorded_parameters())
    return shown(beside_dense(record, configs), against(record, configs, "svd_llm"), "svd_llm")


def kinds_points(record: Record) -> pd.DataFrame:
    """One kind of linear alone as pairs: (kind, method) by ratio to the dense model."""
    table = beside_dense(record, kinds(recorded_parameters()))
    split = [str(name).split(", ") for name in table.index]
    return table.assign(kind=[kind for kind, _ in split], method=[method for _, method in split])


def kinds_tests(record: Record, base: str, other: str) -> dict[str, Comparison]:
    """{kind: one method against another}, Holm-adjusted."""
    rows = found(record, kinds(recorded_parameters()))
    names = dict.fromkeys(name.split(", ")[0] for name in rows)
    pairs = {
        kind: compare(rows[f"{kind}, {base}"], rows[f"{kind}, {other}"])
        for kind in names
        if f"{kind}, {base}" in rows and f"{kind}, {other}" in rows
    }
    return holm_adjusted(pairs) if pairs else {}


def scopes_table(record: Record) -> pd.DataFrame:
    """Which blocks' MLPs become pairs."""
    configs = scopes(recorded_parameters())
    table = shown(beside_dense(record, configs), against(record, configs, "quiet"), "quiet")
    blocks = {name: m.made["reports"][0]["blocks"] for name, m in found(record, configs).items()}
    return table.assign(blocks=[", ".join(map(str, blocks[str(name)])) for name in table.index])


def orders_table(record: Record) -> pd.DataFrame:
    """Low rank and few bits in both orders."""
    configs = orders(recorded_parameters())
    return shown(beside_dense(record, configs), against(record, configs, "GPTQ"), "GPTQ")


# ---------------------------------------------------------------- question 3


def arm(record: Record, name: str) -> list[Measurement]:
    """The rows of one arm, a seed each."""
    return [m for other, m in found(record, calr(recorded_parameters())).items() if other.startswith(f"{name}, seed ")]


def spread(record: Record) -> Spread | None:
    """How far trainings of one arm lie apart, pooled over arms, of perplexities' logarithms."""
    several = [ms for name in ARMS if len(ms := arm(record, name)) > 1]
    df = sum(len(ms) - 1 for ms in several)
    if not df:
        return None
    squares = sum(float(np.var([math.log(m.value) for m in ms]) * len(ms)) for ms in several)
    return Spread(math.sqrt(squares / df), df)


def arms_compared(record: Record, base: str = ARMS[0]) -> dict[str, Comparison]:
    """The other arms of the same tokens against one, all seeds, Holm-adjusted; a claim about training rests on the
    spread over seeds too. Untold without a spread."""
    apart, first = spread(record), arm(record, base)
    pairs = {}
    for name in ARMS:
        ms = arm(record, name)
        if name != base and first and ms and apart:
            c = means_compared(first, ms)
            pairs[name] = with_spread(c, apart.deviation * math.sqrt(1 / len(first) + 1 / len(ms)), apart.df)
    return holm_adjusted(pairs) if pairs else {}


def arms_points(record: Record) -> pd.DataFrame:
    """Every arm of question 3 beside the dense model, arms of several seeds as one row each: the mean and the ends of
    the seeds."""
    table = beside_dense(record, calr(recorded_parameters()))
    rows = []
    names = dict.fromkeys(str(name).partition(", seed ")[0] for name in table.index)
    for name in names:
        some = table[[str(n) == name or str(n).startswith(f"{name}, seed ") for n in table.index]]
        one = len(some) == 1
        value = some["x dense"].iloc[0] if one else float(np.exp(np.log(some["x dense"]).mean()))
        low, high = (
            (some["low"].iloc[0], some["high"].iloc[0]) if one else (some["x dense"].min(), some["x dense"].max())
        )
        rows.append(
            {"arm": name, "MB": some["MB"].iloc[0], "x dense": value, "low": low, "high": high, "seeds": len(some),
             "trained": bool({"CALR", "trained", "LoRA"} & {*name.replace(",", "").split()}),
             "perplexity": float(np.exp(np.log(some["perplexity"]).mean()))}
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("arm")


def arms_table(record: Record) -> pd.DataFrame:
    """Question 3's table."""
    table = arms_points(record)
    said = shown(table)
    return said.assign(seeds=[str(n) for n in table["seeds"]])


def untrained_path(record: Record) -> Comparison | None:
    """The path in closed form against wider pairs, as many parameters and no training; None if one is not there."""
    rows = found(record, calr(recorded_parameters()))
    both = [rows.get(name) for name in ("wider pairs", "path in closed form")]
    return compare(*both) if all(both) else None


# ---------------------------------------------------------------- question 6


def neighbours_tests(record: Record) -> tuple[Ranking, dict[tuple[str, str], Comparison]] | None:
    """Friedman's test over held-out windows of documents, then Wilcoxon's for each pair, Holm-adjusted, as CALR's paper
    tests; with the Hodges-Lehmann differences, in nats a token, that it lacks."""
    rows = found(record, neighbours(recorded_parameters())) | found(record, calr(recorded_parameters()))
    names = [
        *(c.name for c in neighbours(recorded_parameters())),
        "path in closed form",
        "CALR, seed 0",
        "LoRA, seed 0",
    ]
    rows = {name: rows[name] for name in names if name in rows}
    if len(rows) < 3:
        return None
    table = {name: [item["nats"] / item.get("tokens", 1) for item in m.items] for name, m in rows.items()}
    pairs = {
        (a, b): signed_rank(table[a], table[b])
        for i, a in enumerate(table)
        for b in list(table)[i + 1 :]
    }  # fmt: skip
    return friedman(table), holm_adjusted(pairs)


def neighbours_table(record: Record) -> pd.DataFrame:
    """The methods of question 6: bytes, perplexity, mean rank over windows, answers where they were asked."""
    tests = neighbours_tests(record)
    configs = [*neighbours(recorded_parameters()), *(c for c in calr(recorded_parameters()) if c.name in
               ("path in closed form", "CALR, seed 0", "LoRA, seed 0"))]  # fmt: skip
    table = beside_dense(record, configs)
    said = shown(table).assign(parameters=[f"{x / 1e6:.1f} M" for x in table["parameters"]])
    if tests:
        said["mean rank"] = [f"{tests[0].mean_ranks[str(name)]:.1f}" for name in table.index]
    keys = {c.name: c.key for c in configs}
    for task in TASKS:
        if any((key, task) in record for key in keys.values()):
            said[task] = [f"{m.value:.1%}" if (m := record.get((keys[str(n)], task))) else "" for n in table.index]
    return said
