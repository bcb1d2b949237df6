"""Which models are worth their bytes: size against quality, the Pareto front, and a widget to choose by."""

import functools
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files

import pandas as pd

from thesislib.chapters.labels import FAMILIES, QUANTISED, family, of, training
from thesislib.chapters.phrases import interval
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import TASKS
from thesislib.evaluate.stats import Comparison, holm_adjusted
from thesislib.evaluate.task import SHARE
from thesislib.experiment import DENSE
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store, study
from thesislib.sources.wheels import manifest

PPL, OPEN = "perplexity", "open book"
MEASURES = {PPL: TASKS["wikitext"], OPEN: TASKS["trivia_open"]}
USABLE = 1.25  # times the dense model's perplexity: what a summary still calls small
ENDS = ("", " low", " high")
AS_IT_CAME = "as it came, Q4_1"  # the file that the subject is unpacked from
ENGINE_FILE = "05_llama_cpp.jsonl"  # llama.cpp's own files of the subject, see benchmarks/llama_cpp.py
Results = Mapping[tuple[str, str], Measurement]  # by label and measure


def _bytes(m: Measurement) -> dict:
    return m.made["bytes"] or {}


def size_of(results: Results, label: str, key: str) -> float | None:
    """bytes_on_disk, parameters or nonzero_parameters of a model, from the first of its rows that has it."""
    held = [_bytes(m) for (other, _), m in results.items() if other == label]
    if label == DENSE and key == "bytes_on_disk":  # plain weights take on disk what they take in memory
        held = [{key: size.get(key) or size.get("bytes_in_memory")} for size in held]
    return next((value for size in held if (value := size.get(key))), None)


def trained_like(label: str) -> str:
    """The dense model that a model is held against: dense, or the dense model trained on the same texts, e.g. W."""
    return "+".join(training(label)) or DENSE


def group(base: str) -> str:
    """What the models of a base, see `trained_like`, are called."""
    return {DENSE: "untrained", "W": "trained on WikiText", "T": "trained on TriviaQA"}.get(base, f"trained as {base}")


def points(results: Results) -> pd.DataFrame:
    """One row a model: label, family, base (see `trained_like`), MB on disk, M parameters not zero, and each measure's
    value, low and high."""
    rows = []
    for label in dict.fromkeys(label for label, _ in results):
        disk, nonzero = size_of(results, label, "bytes_on_disk"), size_of(results, label, "nonzero_parameters")
        row = {
            "label": label,
            "family": family(label),
            "base": trained_like(label),
            "MB": None if disk is None else disk / 1e6,
            "M": None if nonzero is None else nonzero / 1e6,
        }
        rows.append(row | _values({measure: m for measure in MEASURES if (m := results.get((label, measure)))}))
    return pd.DataFrame(rows)


def _values(measured: Mapping[str, Measurement]) -> dict[str, float]:
    """{measure: value, "measure low": ..., "measure high": ...}."""
    return {
        f"{name}{end}": x for name, m in measured.items() for end, x in zip(ENDS, (m.value, m.low, m.high), strict=True)
    }


def front(table: pd.DataFrame, size: str, measure: str) -> dict[str, list[str]]:
    """{base: the Pareto front of its models}, smallest first: those for which no other is both as small and as good.

    Models that were trained differently do not meet: one that has seen WikiText would win by that.
    """
    if not {size, measure} <= {*table}:
        return {}
    up = MEASURES[measure].higher_is_better
    rows = table.dropna(subset=[size, measure]).sort_values([size, measure], ascending=[True, not up])
    best: dict[str, float] = {}
    kept: dict[str, list[str]] = {base: [] for base in sorted(set(rows["base"]), key=lambda x: (x != DENSE, x))}
    for _, row in rows.iterrows():
        base, value = row["base"], row[measure]
        if base not in best or (value > best[base] if up else value < best[base]):
            best[base] = value
            kept[base].append(row["label"])
    return kept


def fronts(table: pd.DataFrame) -> dict[tuple[str, str], dict[str, list[str]]]:
    """{(size, measure): front}, of all that `points` has."""
    return {
        (size, measure): front(table, size, measure) for size in ("MB", "M") for measure in MEASURES if measure in table
    }


def marks(dense: Mapping[str, Measurement], files: Iterable[Measurement] | None = None) -> pd.DataFrame:
    """Files of the subject that are no models of the study, in the form of `points`: the one that it came in, whose
    numbers are the dense model's, and llama.cpp's own.

    Args:
        dense: the dense model's measurement by each measure.
        files: measurements of llama.cpp's files, by default the recorded ones; those of another subject, or on other
            text, are left out.
    """
    rows: dict[str, dict] = {}
    for measure, d in dense.items():
        if size := original_file(d):
            rows.setdefault(AS_IT_CAME, {"MB": size / 1e6}).update(_values({measure: d}))
        for m in _engine_files() if files is None else files:
            same = all(m.settings[key] == d.settings.get(key) for key in ("text_sha256", "length", "limit"))
            if same and m.metric == d.metric and m.provenance["file"]["of"] == d.provenance.get("fingerprint"):
                rows.setdefault(m.label, {"MB": m.disk_bytes / 1e6}).update(_values({measure: m}))
    return pd.DataFrame([{"label": label, **row} for label, row in rows.items()])


@functools.cache
def _engine_files() -> tuple[Measurement, ...]:
    """The recorded measurements of llama.cpp's files, without their items."""
    path = study() / ENGINE_FILE
    return tuple(Store(path).rows(items=False).values()) if path.exists() else ()


def marks_of(results: Results) -> pd.DataFrame:
    """`marks` beside these results."""
    return marks({measure: m for measure in MEASURES if (m := results.get((DENSE, measure)))})


def no_better(table: pd.DataFrame, labels: Iterable[str], mark: Mapping, measure: str) -> list[str]:
    """Those of some models, by `points`, that are no smaller and no better than a row of `marks`."""
    rows, up = table.set_index("label").loc[[*labels]], MEASURES[measure].higher_is_better
    worse = rows[measure] <= mark[measure] if up else rows[measure] >= mark[measure]
    return list(rows.index[(rows["MB"] >= mark["MB"]) & worse])


def front_table(results: Results, measure: str = PPL) -> pd.DataFrame:
    """The models on the front of a measure against bytes on disk, each among those trained alike, and the files of the
    dense model beside the untrained ones."""
    table, form = points(results), ".1%" if MEASURES[measure].unit == SHARE else ".4g"
    by_base, beside, rows = front(table, "MB", measure), marks_of(results), table.set_index("label")
    files = beside.dropna(subset=[measure]) if measure in beside else beside[:0]
    shown = [(group(base), x, rows.loc[x]) for base, labels in by_base.items() for x in labels]
    shown += [("a file of the dense model", row["label"], row) for _, row in files.iterrows()]
    return pd.DataFrame(
        [
            {
                "": kind,
                "model": name,
                "MB": f"{row['MB']:.0f}",
                measure: interval(row[measure], row[f"{measure} low"], row[f"{measure} high"], form),
            }
            for kind, name, row in shown
        ]
    ).set_index(["", "model"])


def at_equal_bytes(results: Results) -> dict[str, Comparison | None]:
    """Each model that is not quantised against its best quantised rival, Holm-adjusted.

    A rival was trained on the same texts and is no larger. A model without one has None; where no quantised model was
    trained on the same texts, there is nothing to compare, and a model is left out.
    """
    rows = points(results).dropna(subset=["MB", PPL]).set_index("label")
    plain, packed = (rows[rows["family"].isin(names)].index for names in (FAMILIES[:-2], QUANTISED))
    pairs = {}
    for x in plain:
        alike = [q for q in packed if trained_like(q) == trained_like(x)]
        if not alike:
            continue
        rivals = [q for q in alike if rows.loc[q, "MB"] <= rows.loc[x, "MB"]]
        pairs[x] = min(rivals, key=lambda q: rows.loc[q, PPL], default=None)
    tests = holm_adjusted({x: compare(results[x, PPL], results[q, PPL]) for x, q in pairs.items() if q})
    return {x: tests.get(x) for x in pairs}


def beaten(results: Results) -> tuple[int, int]:
    """How many models that are not quantised lose to a rival of `at_equal_bytes`, and of how many."""
    tests = at_equal_bytes(results)
    return sum(c is not None and c.verdict() == "better" for c in tests.values()), len(tests)


def equal_bytes_sentence(results: Results) -> str:
    """`at_equal_bytes` in words."""
    tests = at_equal_bytes(results)
    if not tests:
        return "Models with and without quantisation are not both there to compare."
    counts = []
    for name, trained in (("untrained", False), ("trained", True)):
        here = [c for x, c in tests.items() if bool(training(x)) == trained]
        beaten = sum(c is not None and c.verdict() == "better" for c in here)
        counts += [f"{beaten} of {len(here)} {name} ones"] if here else []
    return (
        "Models that are not quantised lose in perplexity to a quantised one of their size or less, with the same "
        f"training: {' and '.join(counts)} do (p < 0.05, paired t tests, Holm-adjusted, each against the best such)."
    )


def smallest_usable(results: Results) -> dict[str, str]:
    """{base: the smallest model whose perplexity is at most `USABLE` times the base's}.

    The bases are the dense model, and the dense model trained on each text, see `trained_like`: only models trained
    alike are compared.
    """
    table = points(results)
    value, smallest = table.set_index("label")[PPL], {}
    for base, labels in front(table, "MB", PPL).items():
        usable = [x for x in labels if base in value and value[x] <= USABLE * value[base]]
        if usable:
            smallest[base] = usable[0]
    return smallest


def usable_sentence(results: Results) -> str:
    """The smallest models that lose little."""
    rows = points(results).set_index("label")
    found = "; ".join(
        f"{group(base)}, {x} with {rows.loc[x, 'MB']:.0f} MB ({rows.loc[x, PPL]:.3g} against {rows.loc[base, PPL]:.3g})"
        for base, x in smallest_usable(results).items()
    )
    return (
        f"If {USABLE - 1:.0%} more perplexity than the dense model with the same training is acceptable, the smallest "
        f"are: {found}. The dense model has {rows.loc[DENSE, 'MB']:.0f} MB."
    )


def file_sentence(results: Results) -> str:
    """What the file that the subject came in says of the untrained models on the front; nothing without one."""
    table, beside = points(results), marks_of(results)
    if beside.empty or (mark := beside.iloc[0])["label"] != AS_IT_CAME:
        return ""
    untrained = front(table, "MB", PPL)[DENSE]
    beaten, all_ = len(no_better(table, untrained, mark, PPL)), len(untrained)
    said = (
        f"None of the {all_} untrained models on the front is smaller or better than that file."
        if beaten == all_
        else f"Of the {all_} untrained models on the front {beaten} are neither smaller nor better than that file."
    )
    came = f"The model came as a file of {mark['MB']:.0f} MB in 4 bits, from which its weights are recovered exactly."
    return f"{came} {said}"


def original_file(dense: Measurement) -> int | None:
    """Bytes of the 4-bit file that the embedded subject, in a measurement of it, is unpacked from; None for another
    subject."""
    name = dense.provenance.get("subject")
    members = {
        path.rpartition("/")[2]: facts for wheel in manifest().values() for path, facts in wheel["members"].items()
    }
    files = [f for f in members if name and f.startswith(name) and f.endswith("Q4_1.gguf")]
    return members[files[0]]["bytes"] if files else None


def trade_offs(results: Results) -> list[dict]:
    """What the explorer shows: one dict a model, JSON's types only."""
    table = points(results)
    return _plain(
        table.assign(shown=[_shown(x) for x in table["label"]], meaning=[of(x).in_words for x in table["label"]])
    )


def _shown(label: str) -> str:
    """A label as the book shows it; one that no stage writes as it is."""
    return of(label).shown if of(label).parts else label


def _plain(table: pd.DataFrame) -> list[dict]:
    return json.loads(table.to_json(orient="records"))


def explorer(results: Results) -> str:
    """A page's widget as HTML: which models, a size budget, a measure, and which of them win, by `front`. Everything is
    in the text; no server and no network."""
    script = files("thesislib.chapters").joinpath("explorer.js").read_text("utf8")
    by_base: dict[str, dict] = {}
    for (size, measure), found in fronts(points(results)).items():
        by_base.setdefault(size, {})[measure] = found
    bases = {base: group(base) for size in by_base.values() for found in size.values() for base in found}
    data = {"rows": trade_offs(results), "fronts": by_base, "groups": bases, "marks": _plain(marks_of(results))}
    # the page's parser takes </script> and <!-- for its own
    constants = "\n".join(
        f"const {name} = {json.dumps(values)};".replace("<", "\\u003c") for name, values in data.items()
    )
    return f'<div class="explorer"></div>\n<script>\n(() => {{\n{constants}\n{script}\n}})();\n</script>'
