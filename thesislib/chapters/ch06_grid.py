"""Chapter 6, the whole grid: every configuration measured alike, tables of them, and what each stage costs or gives."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from thesislib.chapters import scorings
from thesislib.chapters.ch06_runs import (
    CHOICES,
    FULL,
    READS,
    RECORDED,
    EvaluationChapter,
    Record,
    for_claims,
    grid,
    key,
    read_recorded,
    recorded_parts,
)
from thesislib.chapters.chapter import Chapter, Opening
from thesislib.chapters.labels import FAMILIES, QUANTISED, family, of, thesis_of
from thesislib.chapters.pareto import (
    MEASURES,
    OPEN,
    PPL,
    USABLE,
    Results,
    beaten,
    equal_bytes_sentence,
    file_sentence,
    front,
    group,
    marks_of,
    points,
    size_of,
    smallest_usable,
    trained_like,
    usable_sentence,
)
from thesislib.chapters.phrases import difference, few, interval, number, ratio, sample_note, share, written
from thesislib.chapters.thesis import thesis_row
from thesislib.evaluate.compare import compare
from thesislib.evaluate.perplexity import relative
from thesislib.evaluate.setup import task_of
from thesislib.evaluate.speed import SECONDS_PER_TOKEN
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted, paired_means
from thesislib.evaluate.task import SHARE
from thesislib.experiment import DENSE
from thesislib.records.measurement import Measurement, in_markdown


def size_measured(results: Results) -> str:
    """Of which size of the grid results are: full if perplexities are of the whole text, else the sample."""
    return FULL if any(m.settings.get("limit", 0) is None for m in _measured(results, PPL).values()) else RECORDED


def protocol_sentence(results: Results) -> str:
    """On how much the models of some results were measured."""
    counts = {task: sorted({f"{m.n:,}" for m in _measured(results, task).values()}) for task in MEASURES}
    units = {task: next(iter(_measured(results, task).values())).unit for task, numbers in counts.items() if numbers}
    said = ", ".join(f"{task} on {' or '.join(counts[task])} {unit.split()[0]}s" for task, unit in units.items())
    return f"Measured here: {said}; the dense model's perplexity is {number(results[DENSE, PPL], '.4g')}."


PRUNED = ("depth", "width", "first", "pruned")  # groups without training or quantisation
STAGED = (
    "fewer bits",
    "fewer bits, compensated",
    "first, recovered",
    "first, quantised",
    "first, compensated",
)


# ---------------------------------------------------------------- tables


def _shown(m: Measurement | None) -> str:
    if m is None:
        return "not run"
    return share(m) if task_of(m).unit == SHARE else number(m, ",.0f" if m.value > 1000 else ".4g")


SIZES = {
    "M parameters": "parameters",
    "M not zero": "nonzero_parameters",
    "MB on disk": "bytes_on_disk",
    "MB in memory": "bytes_in_memory",
}  # column: where a record has it


def grid_table(
    results: Results, groups: Sequence[str] | None = None, size: str | None = None, run: bool = False
) -> pd.DataFrame:
    """One row a configuration of the grid: perplexity as a ratio to the dense model's, then itself, the other measures
    that any of them has, sizes, and the thesis's own figures for its subject.

    Args:
        results: of one size.
        groups: these groups' configurations only.
        size: of the grid; by default that of the results.
        run: leave out configurations of which nothing was measured.
    """
    size, rows, measured = size or size_measured(results), [], _labels(results)
    dense, dense_thesis = results.get((DENSE, PPL)), thesis_row(DENSE)
    shown = [
        c for c in grid(size).configurations if (not groups or c.group in groups) and (not run or c.label in measured)
    ]
    taken = {task for c in shown for task in c.measures if (c.label, task) in results}
    for c in shown:
        row: dict[str, object] = {"model": c.label}
        for measure in (task for task in c.measures if task in taken):
            m = results.get((c.label, measure))
            if measure == PPL:
                row["x dense"] = number(relative(m, dense), ",.3g") if m and dense else ""
            row[measure] = _shown(m)
            if measure == PPL:
                row["windows"] = m.n if m else ""
        if m := results.get((c.label, SECONDS_PER_TOKEN)):
            row["ms per token"] = interval(1e3 * m.value, 1e3 * m.low, 1e3 * m.high, ".1f")
        for column, where in SIZES.items():
            size_in_units = size_of(results, c.label, where)
            row[column] = "" if size_in_units is None else f"{size_in_units / 1e6:.1f}"
        t = thesis_of(c.label)
        row["thesis: x dense"] = written(t.perplexity / dense_thesis.perplexity, ",.3g") if t else ""
        row["thesis: open book"] = f"{t.open:.1f}%" if t else ""
        rows.append(row)
    return pd.DataFrame(rows).set_index("model")


def _labels(results: Results) -> dict[str, None]:
    """The models of which anything was measured, in order."""
    return dict.fromkeys(label for label, _ in results)


def _measured(results: Results, measure: str) -> dict[str, Measurement]:
    """{model: measurement} by one measure."""
    return {label: m for (label, task), m in results.items() if task == measure}


def answers_table(results: Results, task: str = OPEN) -> pd.DataFrame:
    """Answers by every scoring, of the models that were asked."""
    return scorings.answers_table(_measured(results, task))


def complete(results: Results, size: str = RECORDED) -> list[str]:
    """Those of a size's configurations of which every measure was taken."""
    return [c.label for c in grid(size).configurations if all((c.label, task) in results for task in c.measures)]


def absent(results: Results, size: str = RECORDED) -> list[str]:
    """Those of a size's configurations of which nothing was measured."""
    return [c.label for c in grid(size).configurations if c.label not in _labels(results)]


def coverage_sentence(results: Results, size: str = RECORDED) -> str:
    """How much of the grid was run."""
    none = absent(results, size)
    return (
        f"Of the {len(grid(size).configurations)} configurations of size {size}, {len(complete(results, size))} are "
        f"measured by all of its measures and {len(_labels(results))} by at least one; the whole grid, size full, has "
        f"{len(grid(FULL).configurations)}.{f' Not run: {few(none, 12)}.' if none else ''}"
    )


def _seconds_to_make(results: Results) -> dict[str, float]:
    """{model: seconds} of those that a sweep made."""
    return {label: note["seconds_to_make"] for (label, _), m in results.items() if (note := m.provenance.get("sweep"))}


def _median_seconds(results: Results, measure: str) -> float | None:
    seconds = [m.provenance["seconds"] for m in _measured(results, measure).values()]
    return float(np.median(seconds)) if seconds else None


def cost_table(results: Results) -> pd.DataFrame:
    """Median seconds to make a configuration from the cached one before it, and to measure it, by its last stage."""
    rows = []
    for name in FAMILIES:
        here = {key: m for key, m in results.items() if family(key[0]) == name}
        if here:
            making = list(_seconds_to_make(here).values())
            seconds: dict[str, Any] = {"to make it": np.median(making) if making else None}
            seconds |= {measure: _median_seconds(here, measure) for measure in MEASURES}
            shown = {task: "" if x is None else f"{x:.0f}" for task, x in seconds.items()}
            rows.append({"last stage": name, "models": len(_labels(here)), **shown})
    return pd.DataFrame(rows).set_index("last stage")


def _threads(counts: Iterable[int]) -> str:
    numbers = sorted(set(counts))
    return f"{' or '.join(map(str, numbers))} thread{'s' * (numbers != [1])}"


def cost_sentence(results: Results) -> str:
    """The machines that `cost_table` was measured on, and the hours in all."""

    def machine(hardware: dict) -> str:
        if str(hardware.get("device", "cpu")).startswith("cuda"):
            return str(hardware["accelerator"])
        return f"{_threads([hardware['torch_threads']])} of {hardware.get('cpu')}"

    machines = " or ".join(dict.fromkeys(machine(m.provenance["hardware"]) for m in results.values()))
    hours = sum(m.provenance["seconds"] for m in results.values()) / 3600
    return in_markdown(
        f"Measured on {machines}: {len(results)} measurements, {hours:.1f} hours of one process, and "
        f"{sum(_seconds_to_make(results).values()) / 3600:.1f} to make the models."
    )


# ---------------------------------------------------------------- comparisons


def _all_measures(size: str) -> list[str]:
    return list(dict.fromkeys(task for c in grid(size).configurations for task in c.measures))


def against_dense(results: Results, size: str = FULL) -> pd.DataFrame:
    """Every model that was measured beside the dense one on the same items: the ratio of perplexities, or the
    difference in points, with its interval.

    A star: told apart by a paired test, Holm-adjusted over the table.
    """
    measures = _all_measures(size)
    tests = holm_adjusted(
        {
            (label, task): compare(results[DENSE, task], m)
            for (label, task), m in results.items()
            if label != DENSE and task in measures and (DENSE, task) in results
        }
    )
    rows = {label: dict.fromkeys(measures, "not run") for label, _ in tests}
    for (label, task), c in tests.items():
        rows[label][task] = difference(c, task_of(results[label, task])) + " *" * c.told
    return pd.DataFrame(rows.values(), pd.Index(rows, name="model"), measures)


def full_sentence(results: Results) -> str:
    """How much of size full was run, and what one configuration of it takes."""
    if not results:
        return "Nothing of size full was run."
    labels = {task: list(_measured(results, task)) for task in _all_measures(FULL)}
    taken = "; ".join(f"{task} {len(models)} ({few(models)})" for task, models in labels.items() if models)
    none = [task for task, models in labels.items() if not models]
    cost = ", ".join(f"{task} {_median_seconds(results, task) / 60:.2g}" for task, models in labels.items() if models)
    threads = _threads(m.provenance["hardware"]["torch_threads"] for m in results.values())
    return (
        f"Of the {len(grid(FULL).configurations)} configurations of size full these were measured: {taken}."
        f"{f' Not run for any: {few(none)}.' if none else ''} Median minutes of a measurement on {threads}: {cost}."
    )


def steps(results: Results, measure: str = PPL) -> list[tuple[str, str, str, Comparison]]:
    """(family, from, to, comparison) of every model against the one before its last stage, Holm-adjusted over all."""
    tests = {}
    for label in _measured(results, measure):
        if (model := of(label)).parts and (before := str(model.before())) in _measured(results, measure):
            tests[family(model.parts[-1]), before, label] = compare(results[before, measure], results[label, measure])
    return [(*names, c) for names, c in holm_adjusted(tests).items()]


def stage_table(results: Results) -> pd.DataFrame:
    """The effect of each stage on the model before it: number of pairs, lowest, median and highest effect, and how
    many are told apart."""
    rows = []
    for measure, task in MEASURES.items():
        tests = steps(results, measure)
        for name in FAMILIES:
            here = {label: c for stage, _, label, c in tests if stage == name}
            if here:
                effects = sorted(c.difference for c in here.values())
                lowest, median, highest = (
                    f"x {written(np.exp(x), '.3g')}" if task.ratio else f"{100 * x:+.1f}"
                    for x in (effects[0], np.median(effects), effects[-1])
                )
                better, worse, _ = map(len, by_verdict(here, task.higher_is_better).values())
                rows.append(
                    {
                        "stage": name,
                        "measure": measure,
                        "pairs": len(here),
                        "lowest": lowest,
                        "median": median,
                        "highest": highest,
                        "worse": worse,
                        "better": better,
                    }
                )
    return pd.DataFrame(rows).set_index("stage")


def interaction(results: Results, depth: str, width: str) -> Comparison | None:
    """The loss of both prunings together less the losses of each alone: a paired t test over documents.

    Above 0 they cost more together.
    """
    four = [results.get((label, PPL)) for label in (DENSE, depth, width, f"{depth}+{width}")]
    if any(m is None for m in four):
        return None
    tokens = np.asarray(four[0].column("tokens"))
    for m in four[1:]:
        four[0].paired_with(m, "id")
    dense, d, w, both = (np.asarray(m.column("nats")) / tokens for m in four)
    return paired_means(d - dense + w - dense, both - dense, four[0].column("document"), tokens)


def interactions(results: Results) -> dict[str, Comparison]:
    """Every pair of depth and width that was run together, Holm-adjusted."""
    words = {x: label.classes[0].word for x in _measured(results, PPL) if len((label := of(x)).parts) == 1}
    depths, widths = ([x for x, word in words.items() if word == wanted] for wanted in ("depth", "width"))
    return holm_adjusted({f"{d}+{w}": c for d in depths for w in widths if (c := interaction(results, d, w))})


def interaction_sentence(results: Results) -> str:
    """Do depth and width pruning add up?"""
    tests = interactions(results)
    if not tests:
        return "No model was pruned both ways."
    less, more, rest = map(len, by_verdict(tests).values())
    counts = [f"{n} cost {words}" for n, words in ((more, "more together"), (less, "less")) if n]
    counts += [f"{rest} cannot be told from the sum"] if rest else []
    furthest = max(tests, key=lambda name: abs(tests[name].difference))
    return (
        f"Do the two losses, in nats a token, add up? Of {len(tests)} pairs {', '.join(counts)} (paired t tests over "
        f"documents, Holm-adjusted). Furthest off is {furthest}, {ratio(tests[furthest], '.3g')} of the perplexity "
        "that the sum predicts."
    )


def interaction_grid(results: Results) -> tuple[pd.DataFrame, pd.DataFrame]:
    """For `ch06_figures.interaction_chart`: the factor by which each pair is off the sum, blocks removed by width
    patterns; and whether it is told apart from 1."""
    rows = [
        {"removed": of(pair).depth, "width": next(iter(of(pair).width)), "off": np.exp(c.difference), "told": c.told}
        for pair, c in interactions(results).items()
    ]
    table = pd.DataFrame(rows)
    order = sorted(set(table["width"]), key=lambda x: (int(x.split(":")[0]) / int(x.split(":")[1]), len(x), x))
    off, told = (table.pivot(index="removed", columns="width", values=name)[order] for name in ("off", "told"))
    return off, told.map(lambda x: x is True)


@dataclass(frozen=True)
class Precision:
    """Whether bfloat16 moves a conclusion: every pair of models compared in float32 and in bfloat16.

    Attributes:
        shifts: {model: by which share its perplexity in bfloat16 is off}.
        exact: {pair: verdict} in float32.
        rounded: the same in bfloat16.
    """

    shifts: dict[str, float]
    exact: dict[tuple[str, str], str]
    rounded: dict[tuple[str, str], str]

    @property
    def differ(self) -> list[tuple[str, str]]:
        """The pairs that come out otherwise."""
        return [pair for pair, verdict in self.exact.items() if self.rounded[pair] != verdict]


def precision(exact: Results, rounded: Results) -> Precision:
    """The models that were measured in both types."""
    labels = [label for label in _measured(exact, PPL) if (label, PPL) in rounded]

    def verdicts(results: Results) -> dict[tuple[str, str], str]:
        tests = {(a, b): compare(results[a, PPL], results[b, PPL]) for a, b in itertools.combinations(labels, 2)}
        return {pair: c.verdict() for pair, c in holm_adjusted(tests).items()}

    shifts = {x: rounded[x, PPL].value / exact[x, PPL].value - 1 for x in labels}
    return Precision(shifts, verdicts(exact), verdicts(rounded))


def precision_sentence(exact: Results, rounded: Results) -> str:
    """`precision` in words."""
    both = precision(exact, rounded)
    shifts = both.shifts.values()
    return (
        f"{len(shifts)} models in both types: perplexity in bfloat16 is off by {min(shifts):+.2%} to "
        f"{max(shifts):+.2%}, and {len(both.differ) or 'none'} of {len(both.exact)} comparisons between them come out "
        "otherwise."
    )


# ---------------------------------------------------------------- findings


def answer(record: Record) -> str:
    """The chapter's answer in two sentences."""
    results = record.for_fronts
    lose, of_all = beaten(results)
    smallest = smallest_usable(results)[DENSE]
    return (
        f"Fewer bits beat fewer weights: {lose} of {of_all} models that are not quantised lose to a quantised "
        f"one that is no larger. Without training, {smallest} is the smallest that stays within {USABLE - 1:.0%} of "
        "the dense model's perplexity."
    )


def short(record: Record) -> str:
    """The answer in about ten words."""
    lose, of_all = beaten(record.for_fronts)
    return f"Fewer bits beat fewer weights at equal bytes: {lose} of {of_all}."


def protocol(record: Record) -> str:
    """Text, windows, questions and the dense model's value."""
    results = record.for_fronts
    note = sample_note(results.values())
    whole = f" On the whole text: {number(record.full[DENSE, PPL])}." if note and (DENSE, PPL) in record.full else ""
    return f"WikiText-2 test. {protocol_sentence(results)}{note}{whole}"


def main_fronts(results: Results, measure: str) -> dict[str, list[str]]:
    """The fronts of the untrained models and of those trained on WikiText, see `pareto.front`."""
    return {
        base: labels
        for base, labels in front(points(results), "MB", measure).items()
        if base in (DENSE, "W") and labels
    }


def with_answers(record: Record) -> Results:
    """The whole size's results once quantised models have answered with the book open; else the sample's."""
    return record.full if all((label, OPEN) in record.full for label in (DENSE, "W", "Q", "Q+E")) else record.sample


def front_caption(record: Record) -> str:
    """What the first figure finds."""
    by_base = main_fronts(record.for_fronts, PPL)
    counts = " and ".join(
        f"{sum(family(x) in QUANTISED for x in labels)} of the {len(labels)} {group(base)}"
        for base, labels in by_base.items()
    )
    star = " No untrained model reaches the star, the file that the model came in." if _star_wins(record) else ""
    return f"Of the models that none beats at once in size and perplexity {counts} are quantised.{star}"


def _star_wins(record: Record) -> bool:
    results = record.for_fronts
    table, beside = points(results), marks_of(results)
    if beside.empty:
        return False
    mark = beside.iloc[0]
    rows = table[(table["base"] == DENSE) & (table["MB"] <= mark["MB"]) & (table[PPL] <= mark[PPL])]
    return rows.empty


def answers_caption(results: Results) -> str:
    """What the front of open-book answers finds."""
    counts = _measured(results, OPEN)
    none = [x for x, m in counts.items() if trained_like(x) == DENSE and m.low == 0 and m.value < 0.02]
    untrained = [x for x in counts if trained_like(x) == DENSE]
    best = front(points(results), "MB", OPEN)[DENSE]
    return (
        f"{len(none)} of {len(untrained)} untrained models answer next to nothing (under 2 %); of the {len(best)} on "
        f"the front {sum(family(x) in QUANTISED for x in best)} are quantised."
    )


def interaction_caption(results: Results) -> str:
    """What the heat map of interactions finds."""
    less, more, _ = map(len, by_verdict(interactions(results)).values())
    return (
        f"Mild pairs cost a little more than their sum ({more} differ), broken ones less ({less}). Each cell: the "
        "perplexity over the one that the sum predicts; a star: p < 0.05."
    )


def quantised_steps(results: Results) -> list[tuple[str, str, str, Comparison]]:
    """`steps` to fewer bits and to EoRA; what pruning and LoRA change is shown by chapters 2 to 4."""
    return [row for row in steps(results) if row[0] in QUANTISED]


def steps_caption(results: Results) -> str:
    """What quantisation costs and EoRA gives back, at 4 bits."""
    four = {name: [np.exp(c.difference) for stage, _, label, c in quantised_steps(results)
                   if stage == name and of(label).bits == 4] for name in QUANTISED}  # fmt: skip
    cost, gain = (f"x {min(x):.3g} to x {max(x):.3g}" for x in four.values())
    return (
        f"Four bits cost perplexity {cost}, and EoRA changes that by {gain}, whatever was done before. Hollow: no "
        "difference that a test finds. Arrows: beyond the panel."
    )


def with_control(record: Record) -> Results:
    """The whole text's results once they have the dense model trained on WikiText; else the sample's."""
    return record.full if ("W", PPL) in record.full else record.sample


def chosen(beside: pd.DataFrame) -> pd.DataFrame:
    """Of `against_dense` the models and measures that chapter 6 compares by all tasks."""
    return beside.loc[[x for x in CHOICES if x in beside.index], [c for c in beside if "2048" not in c]]


def agreement(results: Results, record: Record) -> str:
    """Whether a run's models come in the order of the record's by perplexity, in a line."""
    ours, theirs = _measured(results, PPL), _measured(record.for_fronts, PPL)
    both = [x for x in ours if x in theirs]
    same = sorted(both, key=lambda x: ours[x].value) == sorted(both, key=lambda x: theirs[x].value)
    return f"{len(ours)} models measured here. In the recorded order of perplexity: {'yes' if same else 'no'}"


def headline(record: Record) -> str:
    """What chapter 6 found, in sentences."""
    results = record.for_fronts
    said = (equal_bytes_sentence(results), usable_sentence(results), file_sentence(results))
    more = (
        control_sentence(with_control(record)),
        width_sentence(record.full),
        interaction_sentence(record.on_one(PRUNED)),
    )
    return " ".join(filter(None, (*said, *more)))


def pruned_and_trained(results: Results) -> list[str]:
    """The models that were pruned and then trained on WikiText."""
    return [label for label in _measured(results, PPL) if of(label).parts[-1:] == ("W",) and label != "W"]


def below(results: Results, base: str) -> list[str] | None:
    """Those of `pruned_and_trained` whose perplexity is told below another model's, Holm-adjusted; None without that
    other."""
    if (base, PPL) not in results:
        return None
    tests = {x: compare(results[base, PPL], results[x, PPL]) for x in pruned_and_trained(results)}
    return by_verdict(holm_adjusted(tests))["better"]


def control_sentence(results: Results) -> str:
    """Do pruned models with LoRA beat the dense model, and the dense model with LoRA?"""
    dense, control = (below(results, base) for base in (DENSE, "W"))
    fair = "" if control is None else f" {len(control) or 'None'} beat{'s' * (len(control) < 2)} the dense model W."
    return (
        f"After LoRA {len(dense) or 'none'} of {len(pruned_and_trained(results))} pruned models beat the untrained "
        f"dense model in perplexity.{fair}"
    )


def _times(results: Results, labels: Iterable[str]) -> str:
    dense = results[DENSE, PPL].value
    return ", ".join(f"{x[1:]} x {results[x, PPL].value / dense:.3g}" for x in labels if (x, PPL) in results)


def width_sentence(results: Results) -> str:
    """Perplexity by the width of the group from which zeros are chosen."""
    return (
        "With half of the linears' weights zero, the dense model's perplexity grows by the group's width: "
        f"{_times(results, ('W1:2', 'W2:4', 'W4:8', 'W8:16'))}; "
        f"with one of eight or of sixteen zero: {_times(results, ('W1:8', 'W1:16'))}."
    )


# ---------------------------------------------------------------- exercises


def best_within(results: Results, budget: float) -> str:
    """Which untrained model a budget in MB buys, and what it costs."""
    rows, dense = points(results).set_index("label"), results[DENSE, PPL]
    label = next(x for x in reversed(front(points(results), "MB", PPL)[DENSE]) if rows.loc[x, "MB"] <= budget)
    return (
        f"{label}: {rows.loc[label, 'MB']:.0f} MB, {ratio(compare(dense, results[label, PPL]), '.3g')} of the dense "
        "model's perplexity."
    )


def sum_of(results: Results, depth: str, width: str) -> str:
    """What two prunings cost alone, what that predicts for both, and what both cost."""
    alone = [results[x, PPL].value / results[DENSE, PPL].value for x in (depth, width)]
    both = f"{depth}+{width}"
    return (
        f"Losses in nats add up if ratios multiply: {depth} x {alone[0]:.3g} and {width} x {alone[1]:.3g} predict "
        f"x {alone[0] * alone[1]:.3g}. Measured, {both} has x "
        f"{results[both, PPL].value / results[DENSE, PPL].value:.3g} of the dense model's perplexity: "
        f"{ratio(interaction(results, depth, width), '.3g')} of the prediction."
    )


def against_control(results: Results, label: str) -> str:
    """A trained model against the dense model without and with that training."""
    control = trained_like(label)
    naive, fair = (compare(results[x, PPL], results[label, PPL]) for x in (DENSE, control))
    return (
        f"Against the untrained dense model {label} has perplexity {ratio(naive, '.3g')}; against {control}, the dense "
        f"model with the same training, {ratio(fair, '.3g')}. Only the second says what pruning costs: the "
        "first counts getting used to the text as a gain."
    )


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
    Opening(
        question="What does each stage of compression cost, and which of the models are worth their bytes?",
        answer=answer,
        short=short,
        protocol=protocol,
        learn="How to compare compressed models at equal bytes, and to test whether two losses add up.",
    ),
)
