"""Which models are worth their bytes: size against quality, the Pareto front, and a widget to choose by."""

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files

import pandas as pd

from thesislib.chapters.labels import FAMILIES, family, training
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import TASKS
from thesislib.evaluate.stats import Comparison, holm_adjusted
from thesislib.evaluate.task import SHARE
from thesislib.experiment import DENSE
from thesislib.records.measurement import Measurement
from thesislib.sources.wheels import manifest

PPL, OPEN = "perplexity", "open book"
MEASURES = {PPL: TASKS["wikitext"], OPEN: TASKS["trivia_open"]}
USABLE = 1.25  # times the dense model's perplexity: what a summary still calls small
ENGINE_FILE = "llama_cpp.jsonl"  # llama.cpp's own files of the subject, see benchmarks/llama_cpp.py
Results = Mapping[tuple[str, str], Measurement]  # by label and measure


def _bytes(m: Measurement) -> dict:
    return m.made["bytes"] or {}


def size_of(results: Results, label: str, key: str) -> float | None:
    """bytes_on_disk, parameters or nonzero_parameters of a model, from the first of its rows that has it."""
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
    """The Pareto front, smallest first: labels of the models for which no other is both as small and as good."""
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
    table = points(results).set_index("label", drop=False)
    labels = front(table, "MB", measure)
    form = ".0%" if MEASURES[measure].unit == SHARE else ".3g"
    models = ", ".join(f"{x} ({table.loc[x, 'MB']:.0f} MB, {table.loc[x, measure]:{form}})" for x in labels)
    families = ", ".join(
        f"{name} {sum(family(x) == name for x in labels)} of {(table['family'] == name).sum()}" for name in FAMILIES
    )
    return f"On the front of {measure} against bytes on disk: {models}. By last stage: {families}."


def fronts(table: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """{(size, measure): front}, of all that `points` has."""
    return {
        (size, measure): front(table, size, measure) for size in ("MB", "M") for measure in MEASURES if measure in table
    }


def at_equal_bytes(results: Results) -> dict[str, Comparison | None]:
    """Each model that is not quantised against its best quantised rival, Holm-adjusted.

    A rival was trained on the same texts and is no larger. A model without one has None.
    """
    rows = points(results).dropna(subset=["MB", PPL]).set_index("label")
    plain, packed = (rows[rows["family"].isin(names)].index for names in (FAMILIES[:2], FAMILIES[2:]))
    pairs = {}
    for x in plain if len(packed) else ():
        rivals = [q for q in packed if training(q) == training(x) and rows.loc[q, "MB"] <= rows.loc[x, "MB"]]
        pairs[x] = min(rivals, key=lambda q: rows.loc[q, PPL], default=None)
    tests = holm_adjusted({x: compare(results[x, PPL], results[q, PPL]) for x, q in pairs.items() if q})
    return {x: tests.get(x) for x in pairs}


def equal_bytes_sentence(results: Results) -> str:
    """`at_equal_bytes` in words."""
    tests = at_equal_bytes(results)
    if not tests:
        return "Models with and without quantisation are not both there to compare."
    counts = []
    for name, trained in (("untrained", False), ("trained", True)):
        here = [c for x, c in tests.items() if bool(training(x)) == trained]
        beaten = sum(c is not None and c.verdict() == "better" for c in here)
        counts += [f"of {len(here)} {name} ones {beaten}"] if here else []
    return (
        f"Of models that are not quantised, {' and '.join(counts)} are beaten in perplexity by a quantised one that "
        "was trained alike and is no larger (each against the best such; paired t tests, Holm-adjusted)."
    )


def smallest_usable(results: Results) -> dict[str, str]:
    """{base: the smallest model whose perplexity is at most `USABLE` times the base's}.

    The bases are the dense model and the dense model trained on WikiText. Each is compared with models trained alike.
    """
    table, smallest = points(results).set_index("label"), {}
    for base in (x for x in (DENSE, "W") if x in table.index):
        alike = table[[training(x) == training(base) for x in table.index]].dropna(subset="MB")
        usable = alike[alike[PPL] <= USABLE * table.loc[base, PPL]]
        if len(usable):
            smallest[base] = usable["MB"].idxmin()
    return smallest


def bytes_finding(results: Results) -> str:
    """Which models are worth their bytes, in sentences, for the chapter's first lines and the README."""
    table = points(results).set_index("label", drop=False)
    labels = front(table, "MB", PPL)
    quantised = [x for x in labels if family(x) in FAMILIES[2:]]
    smallest = ", ".join(
        f"{'untrained' if base == DENSE else 'trained'} {x} ({table.loc[x, 'MB']:.0f} MB, perplexity "
        f"{table.loc[x, PPL]:.3g} against {table.loc[base, PPL]:.3g})"
        for base, x in smallest_usable(results).items()
    )
    file = original_file(results)
    return (
        f"**Bits or weights.** Of the {len(labels)} models on the front of perplexity against bytes {len(quantised)} "
        f"are quantised. {equal_bytes_sentence(results)} The smallest whose perplexity is at most {USABLE:g} times "
        f"that of the dense model trained alike: {smallest}; the dense model has {table.loc[DENSE, 'MB']:.0f} MB in "
        f"bfloat16.{'' if file is None else _AS_IT_CAME.format(file / 1e6)}"
    )


_AS_IT_CAME = (
    " It came as a file of {:.0f} MB in Q4_1, from which its weights are recovered exactly: sizes compare methods, "
    "none saves over that file."
)


def original_file(results: Results) -> int | None:
    """Bytes of the 4-bit file that the embedded subject is unpacked from; None for another subject."""
    name = results[DENSE, PPL].provenance.get("subject")
    members = {
        path.rpartition("/")[2]: facts for wheel in manifest().values() for path, facts in wheel["members"].items()
    }
    files = [f for f in members if name and f.startswith(name) and f.endswith("Q4_1.gguf")]
    return members[files[0]]["bytes"] if files else None


def trade_offs(results: Results) -> list[dict]:
    """What the explorer shows: one dict a model, JSON's types only."""
    rows = points(results)
    return json.loads(rows.to_json(orient="records"))


def digest(results: Results) -> str:
    """16 digits over all that `points` has. They tell whether a figure was drawn from these results."""
    return hashlib.sha256(points(results).to_json(double_precision=6).encode()).hexdigest()[:16]


def explorer(results: Results) -> str:
    """A page's widget as HTML: a size budget, a measure, and which models win. Everything is in the text; no server and
    no network."""
    script = files("thesislib.chapters").joinpath("explorer.js").read_text("utf8")
    # the page's parser takes </script> and <!-- for its own
    data = json.dumps(trade_offs(results)).replace("<", "\\u003c")
    return f'<div class="explorer"></div>\n<script>\n(() => {{\nconst rows = {data};\n{script}\n}})();\n</script>'
