"""Chapter 5's tests: which of its models are compared, and what was recorded beside its rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thesislib.chapters.ch05_runs import (
    CLOSED,
    HELD_OUT,
    OPEN,
    PPL,
    Configuration,
    QuantChapter,
    Results,
    calibrations,
    eora_ranks,
    layers_file,
    leave_one_out,
    lora_starts,
    main_models,
    more_calibration,
    one_change,
    one_projection,
    pick,
    pruned_models,
    recorded_parameters,
    sinks_file,
)
from thesislib.chapters.chapter import K
from thesislib.chapters.pool import Recorded
from thesislib.errors import BadInput
from thesislib.evaluate.compare import compare
from thesislib.evaluate.stats import Comparison, holm_adjusted
from thesislib.experiment import DENSE
from thesislib.files import data_file, read_json
from thesislib.model.grid import Grid, round_to_nearest
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement


def stage_report(m: Measurement, word: str) -> dict:
    """What the first stage of a word ("gptq", "eora", ...) said of itself.

    Raises:
        BadInput: no such stage made this subject.
    """
    for stage, report in zip(m.stages, m.made["reports"], strict=True):
        if word in stage:
            return report
    raise BadInput(f"no stage '{word}' made {m.label}")


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


def read_gptqmodel() -> dict:
    """What `benchmarks.gptqmodel` found, beside the recorded run."""
    return read_json(data_file("results/05_gptqmodel.json"))


def worth(results: Results, p: QuantChapter) -> dict[str, tuple[Comparison, Comparison]]:
    """{ingredient: (added to the plain recipe alone, taken away from the best settings)}."""
    best, *less = leave_one_out(p)
    _, plain, *changed, _ = one_change(p)
    first = {c.varied: c for c in reversed(changed)}
    removed = tested(results, {c.varied: (best, c) for c in less if c.varied})
    added = tested(results, {title: (plain, first[title]) for title in removed})
    return {title: (added[title], c) for title, c in removed.items() if title in added}


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


def calibration_noise(results: Results, p: QuantChapter) -> tuple[list[float], dict[str, float]]:
    """Held-out perplexity of the best settings on other windows of the same text, and {name: on fewer or more}."""
    values = [(c, results[c.key, HELD_OUT].value) for c in calibrations(p) if (c.key, HELD_OUT) in results]
    return [v for c, v in values if c.varied == "seed"], {c.name: v for c, v in values if c.varied != "seed"}


def few_and_many_bits(results: Results, p: QuantChapter) -> tuple[Measurement | None, Measurement | None]:
    """Perplexity of GPTQ at 3 bits with EoRA, and at 4 bits without."""
    configs = main_models(p)
    few = pick(configs, method="GPTQ", bits=3, corrected=True)
    many = pick(configs, method="GPTQ", bits=4, corrected=False)
    return results.get((few.key, PPL)), results.get((many.key, PPL))


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


def read_sinks(path: Path) -> dict[str, Any]:
    """The recorded shares of the first tokens, beside the recorded run."""
    return read_json(sinks_file(path))


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


def read_layers(path: Path) -> dict[str, dict[str, float]]:
    """The recorded layer errors, beside the recorded run."""
    return read_json(layers_file(path))["errors"]


def held_out_of(results: Results, configs: Iterable[Configuration]) -> dict[str | None, float]:
    """{a configuration's key: its held-out perplexity}, where measured."""
    return {c.key: results[c.key, HELD_OUT].value for c in configs if (c.key, HELD_OUT) in results}


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
