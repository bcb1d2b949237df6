"""Chapter 6, the whole grid: every configuration measured alike, tables of them, and what each stage costs or gives."""

import functools
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from thesislib.chapters.chapter import WIKITEXT, Chapter, Keep, Key, Part, book, large
from thesislib.chapters.labels import FAMILIES, family, of, step_family, thesis_of
from thesislib.chapters.pareto import MEASURES, OPEN, PPL, Results, bytes_finding, size_of
from thesislib.chapters.phrases import difference, interval, number, ratio, share
from thesislib.chapters.thesis import thesis_row
from thesislib.config import positive
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import setup_of, task_of
from thesislib.evaluate.speed import SECONDS_PER_TOKEN
from thesislib.evaluate.stats import Comparison, holm_adjusted, paired_means
from thesislib.evaluate.task import SHARE
from thesislib.experiment import DENSE, prepare
from thesislib.files import cache_dir, data_file
from thesislib.formats.options import check_dtype
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.records.store import Store
from thesislib.sweep.grid import Configuration, Grid, read_grid
from thesislib.sweep.run import FAILED, Place, Setting, identity_of, known, possible, sweep, wanted
from thesislib.sweep.workers import Workers

RECORDED, PRECISION, FULL = "sample", "precision", "full"
READS = (
    "00_measures",
    "01_franken_llama",
    "02_depth_pruning",
    "03_width_pruning",
    "04_lora_recovery",
    "05_quantisation",
)


@dataclass(frozen=True)
class EvaluationChapter:
    """Parameters of chapter 6.

    subject, data, dtype, device: see `thesislib.sweep.run.Place`. size: of the grid in data/grid.yaml. workers,
    threads: processes on this machine, and threads of each.
    """

    subject: str = "embedded"
    data: str = "embedded"
    dtype: str = "bfloat16"
    device: str = "cpu"
    size: str = "quick"
    workers: int = 2
    threads: int = 1

    def __post_init__(self):
        positive(workers=self.workers, threads=self.threads)
        check_dtype(self.dtype)
        grid(self.size)

    @property
    def place(self) -> Place:
        """Where the grid is carried out."""
        return Place(self.subject, self.data, self.dtype, self.device)


@functools.cache
def grid(size: str) -> Grid:
    """The study's grid at one of its sizes."""
    return read_grid(data_file("grid.yaml"), size)


def run(p: EvaluationChapter) -> Results:
    """The grid measured on this machine, less what cannot be made of the subject; what an earlier run measured is kept
    in the cache.

    Raises:
        RuntimeError: configurations that failed, each with its reason.
    """
    g = grid(p.size)
    store = Store(cache_dir() / "sweeps" / f"{g.name}-{g.size}.jsonl")
    g, why = possible(g, p.place)
    for label, reason in why.items():
        print(f"not possible for this subject: {label} ({reason})")
    failed = sweep(g, p.place, store, Workers(p.workers, threads=p.threads, gpu=p.device.startswith("cuda")))
    if failed:
        raise RuntimeError("; ".join(f"{label}: {why}" for label, why in failed.items()))
    return collect(g, store.rows().values(), Setting.of(g, p.place))


def collect(g: Grid, rows: Iterable[Measurement], at: Setting) -> Results:
    """{(label, measure): measurement} of a grid on one subject; other subjects' and types' rows, and what is no part of
    the grid, stay out."""
    by_identity = {name: m for m in rows if m.metric != FAILED and (name := identity_of(m))}
    found = {}
    for c in g.configurations:
        for measure, name in wanted(g, c, at).items():
            if name in by_identity:
                found[c.label, measure] = by_identity[name]
    return found


def read_recorded(path: Path, size: str = RECORDED, dtype: str = "bfloat16") -> Results:
    """The recorded run of a size of the grid: its own rows, and those of the chapters before it that are the same
    measurements."""
    own = list(Store(path).rows().values())
    before = [m for store in _before(path) for m in store.rows().values()]
    return collect(grid(size), [*before, *own], Setting.recorded(own, dtype))


def _before(path: Path) -> list[Store]:
    """The records, beside this chapter's, of the chapters before it."""
    return [Store(file) for name in READS if (file := path.with_name(f"{name}.jsonl")).exists()]


# ---------------------------------------------------------------- tables


def _number(m: Measurement | None, percent: bool) -> str:
    return "not run" if m is None else share(m) if percent else number(m, ",.0f" if m.value > 1000 else ".4g")


def grid_table(
    results: Results, groups: Sequence[str] | None = None, size: str = RECORDED, run: bool = False
) -> pd.DataFrame:
    """One row a configuration of the grid: measures with intervals, sizes, and the thesis's own figures for its
    subject.

    Args:
        results: of that size.
        groups: these groups' configurations only.
        size: of the grid.
        run: leave out configurations of which nothing was measured.
    """
    rows, have = [], {label for label, _ in results}
    dense = results.get((DENSE, PPL))
    for c in grid(size).configurations:
        if (groups and c.group not in groups) or (run and c.label not in have):
            continue
        row: dict[str, object] = {"model": c.label}
        for measure in c.measures:
            m = results.get((c.label, measure))
            row[measure] = _number(m, m is not None and task_of(m).unit == SHARE)
            if measure == PPL:
                row["x dense"] = f"{m.value / dense.value:,.3g}" if m and dense else ""
        if m := results.get((c.label, SECONDS_PER_TOKEN)):
            row["ms per token"] = interval(1e3 * m.value, 1e3 * m.low, 1e3 * m.high, ".1f")
        columns = {
            "M parameters": "parameters",
            "M not zero": "nonzero_parameters",
            "MB on disk": "bytes_on_disk",
            "MB in memory": "bytes_in_memory",
        }
        for name, key in columns.items():
            value = size_of(results, c.label, key)
            row[name] = "" if value is None else f"{value / 1e6:.1f}"
        t, dense_t = thesis_of(c.label), thesis_row(DENSE)
        row["thesis: x dense"] = f"{t.perplexity / dense_t.perplexity:,.3g}" if t else ""
        row["thesis: open book"] = f"{t.open:.1f}%" if t else ""
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def tier_table(results: Results) -> pd.DataFrame:
    """Open-book answers by the tier that found them right, of the models that were asked."""
    rows = []
    for (label, what), m in results.items():
        if what == OPEN:
            rows.append(
                {"model": label, "any": f"{m.value:.1%}"}
                | {tier: interval(x["value"], x["low"], x["high"], ".1%") for tier, x in m.extra.items()}
            )
    return pd.DataFrame(rows).set_index("model")


def coverage_sentence(results: Results, size: str = RECORDED) -> str:
    """How much of the grid was run."""
    g, whole = grid(size), grid("full")
    have = {label for label, _ in results}
    done = [c for c in g.configurations if all((c.label, measure) in results for measure in c.measures)]
    absent = [c.label for c in g.configurations if c.label not in have]
    listed = (
        f" Not run: {', '.join(absent[:12])}{f' and {len(absent) - 12} more' if len(absent) > 12 else ''}."
        if absent
        else ""
    )
    return (
        f"Of the {len(g.configurations)} configurations of size {size}, {len(done)} are measured by all of its "
        f"measures and {len(have)} by at least one; "
        f"the whole grid, size full, has {len(whole.configurations)}.{listed}"
    )


def cost_table(results: Results) -> pd.DataFrame:
    """Seconds of a configuration, by what was done last: to make it from what the cache held of the one before, and to
    measure it."""
    rows = []
    for name in FAMILIES:
        here = {key: m for key, m in results.items() if family(key[0]) == name}
        made = {label: note["seconds_to_make"] for (label, _), m in here.items() if (note := m.provenance.get("sweep"))}
        if here:
            row = {
                "last stage": name,
                "models": len({label for label, _ in here}),
                "to make it": f"{np.median(list(made.values())):.0f}" if made else "",
            }
            for measure in MEASURES:
                seconds = [m.provenance["seconds"] for (_, what), m in here.items() if what == measure]
                row[measure] = f"{np.median(seconds):.0f}" if seconds else ""
            rows.append(row)
    return pd.DataFrame(rows).set_index("last stage")


def cost_sentence(results: Results) -> str:
    """What the medians of `cost_table` were measured on."""
    places: dict[str, None] = {}
    for m in results.values():
        run = m.provenance["hardware"]
        on_card = str(run.get("device", "cpu")).startswith("cuda")
        places[
            str(run["accelerator"])
            if on_card
            else f"{run['torch_threads']} thread{'s' * (run['torch_threads'] != 1)} of {run.get('cpu')}"
        ] = None
    place = " or ".join(places)
    total = sum(m.provenance["seconds"] for m in results.values()) / 3600
    made = {label: note["seconds_to_make"] for (label, _), m in results.items() if (note := m.provenance.get("sweep"))}
    return in_markdown(
        f"Measured on {place}: {len(results)} measurements, {total:.1f} hours of one process, and "
        f"{sum(made.values()) / 3600:.1f} to make the models."
    )


# ---------------------------------------------------------------- comparisons


def against_dense(results: Results, size: str = FULL) -> pd.DataFrame:
    """Every model that was measured beside the dense one on the same items: the ratio of perplexities, or the
    difference in points, with its interval.

    A star: told apart by a paired test, Holm-adjusted over the table.
    """
    measures = dict.fromkeys(m for c in grid(size).configurations for m in c.measures)
    pairs = [(label, m) for label, m in results if label != DENSE and m in measures and (DENSE, m) in results]
    cells: dict[str, dict[str, str]] = {}
    for (label, m), c in holm_adjusted(
        {(label, m): compare(results[DENSE, m], results[label, m]) for label, m in pairs}
    ).items():
        cells.setdefault(label, {})[m] = difference(c, task_of(results[label, m])) + " *" * c.told
    rows = [{"model": label} | {m: cells[label].get(m, "not run") for m in measures} for label in cells]
    return pd.DataFrame(rows, columns=["model", *measures]).set_index("model")


def full_sentence(results: Results) -> str:
    """How much of size full was run, and what one configuration of it takes."""
    if not results:
        return "Nothing of size full was run."
    whole = grid(FULL)
    measures = dict.fromkeys(m for c in whole.configurations for m in c.measures)
    said = [
        f"{m} {len(labels)} ({_few(labels)})"
        for m in measures
        if (labels := [label for label, what in results if what == m])
    ]
    absent = [m for m in measures if not any(what == m for _, what in results)]
    minutes = {
        m: np.median([r.provenance["seconds"] for (_, what), r in results.items() if what == m]) / 60
        for m in measures
        if m not in absent
    }
    cost = ", ".join(f"{m} {x:.2g}" for m, x in minutes.items())
    threads = {r.provenance["hardware"]["torch_threads"] for r in results.values()}
    where = f"{' or '.join(map(str, sorted(threads)))} thread{'s' * (threads != {1})}"
    return (
        f"Of the {len(whole.configurations)} configurations of size full these were measured: {'; '.join(said)}."
        f"{f' Not run for any: {_few(absent)}.' if absent else ''} Median minutes of a measurement on {where}: {cost}."
    )


def steps(results: Results, measure: str = PPL) -> list[tuple[str, str, str, Comparison]]:
    """(family, from, to, comparison) of every model against the one before its last stage, Holm-adjusted over all."""
    found = {}
    for label, what in results:
        if what != measure or not of(label).parts:
            continue
        before, last = str(of(label).before()), of(label).parts[-1]
        if (before, measure) in results:
            found[step_family(last), before, label] = compare(results[before, measure], results[label, measure])
    return [(*names, c) for names, c in holm_adjusted(found).items()]


def shown_steps(results: Results) -> list[tuple[str, str, str, Comparison]]:
    """`steps`, of pruning only those from the dense model: the others are in the chart of interactions."""
    return [row for row in steps(results) if row[0] != FAMILIES[0] or row[1] == DENSE]


def stage_table(results: Results) -> pd.DataFrame:
    """What each stage does to the model before it: how many pairs, the lowest, median and highest effect, how many are
    told apart."""
    rows = []
    for measure, task in MEASURES.items():
        found = steps(results, measure)
        for name in FAMILIES:
            here = [c for f, *_, c in found if f == name]
            if here:
                effects = sorted(c.difference for c in here)
                shown = [
                    f"x {np.exp(x):.3g}" if task.ratio else f"{100 * x:+.1f}"
                    for x in (effects[0], float(np.median(effects)), effects[-1])
                ]
                told = [c.verdict(task.higher_is_better) for c in here]
                rows.append(
                    {
                        "stage": name,
                        "measure": measure,
                        "pairs": len(here),
                        "lowest": shown[0],
                        "median": shown[1],
                        "highest": shown[2],
                        "told worse": told.count("worse"),
                        "told better": told.count("better"),
                    }
                )
    return pd.DataFrame(rows).set_index("stage")


def interaction(results: Results, depth: str, width: str) -> Comparison | None:
    """log perplexity of both prunings together, less what each costs alone: paired t test over documents. Above 0,
    together they cost more."""
    four = [results.get((label, PPL)) for label in (DENSE, depth, width, f"{depth}+{width}")]
    if any(m is None for m in four):
        return None
    tokens = np.asarray(four[0].column("tokens"))
    for m in four[1:]:
        four[0].paired_with(m, "id")
    dense, d, w, both = (np.asarray(m.column("nats")) / tokens for m in four)
    return paired_means(d - dense + w - dense, both - dense, four[0].column("document"))


def interactions(results: Results) -> list[tuple[str, Comparison]]:
    """Every pair of depth and width that was run together, Holm-adjusted."""
    labels = [label for label, what in results if what == PPL]
    single = {x: said.classes[0].word for x in labels if len((said := of(x)).parts) == 1}
    depths, widths = ([x for x, word in single.items() if word == wanted] for wanted in ("depth", "width"))
    found = [(f"{d}+{w}", c) for d in depths for w in widths if (c := interaction(results, d, w))]
    return list(holm_adjusted(dict(found)).items())


def interaction_sentence(results: Results) -> str:
    """Do depth and width pruning add up?"""
    found = interactions(results)
    if not found:
        return "No model was pruned both ways."
    more, less = ([name for name, c in found if c.verdict() == word] for word in ("worse", "better"))
    rest = len(found) - len(more) - len(less)
    name, most = max(found, key=lambda pair: abs(pair[1].difference))
    sides = [
        f"more than that for {len(more)}{_listed(more)}",
        f"less for {len(less)}{_listed(less)}",
        f"and are not told apart from it for {rest}",
    ]
    return (
        f"If pruning depth and width acted apart, their losses in nats a token would add up. Of {len(found)} "
        f"pairs, they lose {', '.join(sides)}; "
        f"furthest off is {name}, perplexity {ratio(most, '.3g')} of the sum's (paired t tests over documents, "
        "Holm-adjusted)."
    )


def _listed(names: Sequence[str]) -> str:
    return f" ({_few(names)})" if names else ""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def by_depth_and_width(results: Results) -> pd.DataFrame:
    """(removed, width, perplexity, low, high) of every model that was pruned and nothing else."""
    rows = []
    for (label, what), m in results.items():
        said = of(label)
        if (
            what != PPL or said.family != "pruned" or said.depth == 0 != len(said.of("depth"))
        ):  # parts of blocks are no depth
            continue
        rows.append(
            {
                "removed": said.depth,
                "width": next(iter(said.width), "none"),
                "perplexity": m.value,
                "low": m.low,
                "high": m.high,
            }
        )
    table = pd.DataFrame(rows)
    several = table.groupby("width")["removed"].transform("nunique") > 1  # a single point has no line
    return table[several]


def precision_sentence(exact: Results, rounded: Results) -> str:
    """Whether bfloat16 moves a conclusion: every pair of models compared in float32 and in bfloat16."""
    labels = [label for label, what in exact if what == PPL and (label, PPL) in rounded]
    words, shifts = {}, []
    for kind, results in (("float32", exact), ("bfloat16", rounded)):
        tests = {
            (a, b): compare(results[a, PPL], results[b, PPL]) for i, a in enumerate(labels) for b in labels[i + 1 :]
        }
        words[kind] = [c.verdict() for c in holm_adjusted(tests).values()]
    shifts = [rounded[x, PPL].value / exact[x, PPL].value - 1 for x in labels]
    differ = sum(int(a != b) for a, b in zip(words["float32"], words["bfloat16"], strict=True))
    return (
        f"{len(labels)} models in both types: perplexity in bfloat16 is off by {min(shifts):+.2%} to "
        f"{max(shifts):+.2%}, and of "
        f"{len(words['float32'])} comparisons between them {differ} come{'s' * (differ == 1)} out otherwise."
    )


# ---------------------------------------------------------------- findings


def headline(results: Results) -> str:
    """What chapter 6 found, in sentences, for the book's first page and the README."""
    return f"{' '.join(top_findings(results))} {interaction_sentence(results)}"


def top_findings(results: Results) -> list[str]:
    """The three that matter most, filled in from records."""
    return [bytes_finding(results), _control_finding(results), _width_finding(results)]


def _below(results: Results, base: str, labels: Sequence[str]) -> int | None:
    """How many of some models' perplexities are told below another's, Holm-adjusted; None without that other."""
    if (base, PPL) not in results:
        return None
    tests = holm_adjusted({x: compare(results[base, PPL], results[x, PPL]) for x in labels})
    return [c.verdict() for c in tests.values()].count("better")


def _control_finding(results: Results) -> str:
    trained = [label for label, what in results if what == PPL and of(label).parts[-1:] == ("W",) and label != "W"]
    dense, control = (_below(results, base, trained) for base in (DENSE, "W"))
    fair = (
        "the dense model trained alike was not run"
        if control is None
        else f"{control} below that of the dense model trained alike"
    )
    return (
        f"**Recovery or adaptation.** Of {len(trained)} pruned models trained on WikiText {dense} end with a "
        "perplexity told apart below the untrained dense "
        f"model's, {fair} (paired t tests, Holm-adjusted)."
    )


def _times(results: Results, labels: Iterable[str]) -> str:
    dense = results[DENSE, PPL].value
    return ", ".join(f"{x[1:]} x {results[x, PPL].value / dense:.3g}" for x in labels if (x, PPL) in results)


def _width_finding(results: Results) -> str:
    return (
        "**Which zeros.** With half of the linears' weights gone, perplexity by the width of the group: "
        f"{_times(results, ('W1:2', 'W2:4', 'W4:8', 'W8:16'))}; "
        f"with one of eight or of sixteen gone: {_times(results, ('W1:8', 'W1:16'))}."
    )


# ---------------------------------------------------------------- the recorded run

TRAINED = ("D2+W", "W", "D2+T", "T", "W2:4+W", "D2+W1:8+W", "D2+W1:8+T", "W2:4+T")
CHOICES = ("dense", "D2", "D4", "W1:8", "W2:4", "W", "Q", "Q+E")
PART_OF_FULL = {  # what of size full was measured, by measure: nobody has run all of it
    "perplexity": ("dense", "D4", "W1:8", "W2:4"),
    "closed book": ("dense", "D4", "W1:8", "W2:4", "Q", "Q+E", *TRAINED),
    "open book": ("W2:4+T", "W2:4+W"),
    "HellaSwag": CHOICES,
    "ARC-Easy": CHOICES,
    "PIQA": CHOICES,
}
RUNS = (
    (RECORDED, "bfloat16"),
    (PRECISION, "float32"),
    (FULL, "bfloat16"),
)  # in bfloat16 size precision is a part of size sample


def recorded_parts(p: EvaluationChapter, file: Path) -> Iterator[Part]:
    """Each configuration by itself: of the recorded sizes, or of `p.size` alone where that is another. What the
    chapters before have is not made again."""
    for size, dtype in RUNS if p.size == RECORDED else [(p.size, p.dtype)]:
        place = replace(p.place, dtype=dtype)
        g = grid(size)

        @functools.cache
        def elsewhere(g: Grid = g, place: Place = place) -> tuple[Setting, set[str]]:
            return Setting.of(g, place), known(_before(file))

        for c in g.configurations:
            everything = p.size != RECORDED or size != FULL
            ways = {
                what: way for what, way in c.measures.items() if everything or c.label in PART_OF_FULL.get(what, ())
            }

            def make(
                missing: Collection[Key],
                keep: Keep,
                g: Grid = g,
                c: Configuration = c,
                place: Place = place,
                elsewhere=elsewhere,
            ) -> None:
                at, have = elsewhere()
                names = wanted(g, c, at)
                todo = [
                    what
                    for what in c.measures
                    if names.get(what) not in have and (c.label, g.size, place.dtype, what) in missing
                ]
                if not todo:
                    return
                started = time.perf_counter()
                ready = prepare(place.subject, c.recipe.stages, data=place.data, dtype=place.dtype, device=place.device)
                note = {
                    "grid": g.name,
                    "size": g.size,
                    "group": c.group,
                    "label": c.label,
                    "seconds_to_make": round(time.perf_counter() - started, 1),
                }
                for what in todo:
                    keep(ready.measure(c.measures[what], place.data, sweep=note))

            if ways:
                yield Part(
                    f"{size} {dtype} {c.label}",
                    {(c.label, size, dtype, what): way.limit for what, way in ways.items()},
                    make,
                )


def key(m: Measurement) -> Key:
    """Of a row: label, size, dtype, measure; a row of a failed sweep has no measure."""
    note, way = m.provenance["sweep"], None if m.metric == FAILED else replace(setup_of(m), batch=None)
    measures = next((c.measures for c in grid(note["size"]).configurations if c.label == note["label"]), {})
    what = next((name for name, other in measures.items() if replace(other, batch=None) == way), None)
    return note["label"], note["size"], m.provenance["dtype"], what


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """Perplexities and answers in bfloat16, those at size full under a name of their own."""
    for m in rows:
        run = m.provenance
        size, fits = run["sweep"]["size"], m.metric in ("perplexity", "accuracy")
        if fits and run["dtype"] == "bfloat16" and size in (RECORDED, FULL) and run["protocol"]["length"] == 512:
            what = WIKITEXT if m.metric == "perplexity" else book(m)
            yield run["sweep"]["label"], large(what) if size == FULL else what, m


CHAPTER = Chapter(
    "06_evaluation",
    "the whole grid",
    EvaluationChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    {"size": RECORDED},
    READS,
    for_claims,
)
