"""Chapter 1, Franken-LLaMA: 25 ways to skip and repeat blocks, measured together, and what the original study
claimed."""

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from tqdm import tqdm

from thesislib.chapters.chapter import (
    WIKITEXT,
    Chapter,
    K,
    Keep,
    Key,
    Opening,
    Parameters,
    Part,
    neighbours,
    on_one_sample,
    shape,
)
from thesislib.chapters.phrases import (
    FAILS,
    HOLDS,
    UNDECIDED,
    decided,
    interval,
    number,
    p_value,
    points,
    ratio,
    sample_note,
    share,
)
from thesislib.compress.franken import ORIGINAL_DEPTH, format_plan, franken_plans, plan_in_words
from thesislib.errors import BadInput, unknown
from thesislib.evaluate import choice, perplexity
from thesislib.evaluate.generate import Timed, complete
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted, proportion
from thesislib.experiment import DENSE, described
from thesislib.formats.load import load_subject
from thesislib.model.blocks import Plan, apply_plan
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.records.store import Store
from thesislib.sources.corpus import evaluation_text

BASELINE = "baseline"
CHANCE = 0.25  # of HellaSwag


@dataclass(frozen=True)
class Franken(Parameters):
    """Parameters of chapter 1.

    Attributes:
        length: tokens in a window.
        windows: how many perplexity is measured on.
        items: of HellaSwag.
        singles: how many blocks, spread over the depth, are skipped and repeated one at a time.
        tokens: length of a completion.
        prompt: what is completed.
        shown: the plan whose attention is drawn.
    """

    length: int = 512
    windows: int | None = 8
    items: int = 24
    singles: int = 5
    tokens: int = 40
    prompt: str = "Once upon a time"
    shown: str = "0_7_15_23_31"

    def __post_init__(self):
        super().__post_init__()
        if self.shown not in (names := franken_plans(ORIGINAL_DEPTH)):
            raise unknown("plan", self.shown, names)

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject that is too shallow for the plans."""
        franken_plans(shape.depth)


@dataclass(frozen=True)
class Results:
    """Every plan's measurements under one set of parameters.

    Attributes:
        plans: the 25, by name.
        perplexity: of each plan.
        hellaswag: of each plan.
        skipped: perplexity with one block left out, by block.
        repeated: perplexity with one block run twice, by block.
    """

    plans: dict[str, Plan]
    perplexity: dict[str, Measurement]
    hellaswag: dict[str, Measurement]
    skipped: dict[int, Measurement]
    repeated: dict[int, Measurement]

    def against_baseline(self) -> dict[str, tuple[Comparison, Comparison]]:
        """(loss, HellaSwag) of every other plan against the baseline, paired, p values Holm-adjusted over plans."""
        others = [name for name in self.plans if name != BASELINE]
        loss = self.losses({name: self.perplexity[name] for name in others})
        hella = holm_adjusted({n: choice.compare(self.hellaswag[BASELINE], self.hellaswag[n]) for n in others})
        return {n: (loss[n], hella[n]) for n in others}

    def losses(self, measured: Mapping[K, Measurement]) -> dict[K, Comparison]:
        """The loss of each against the baseline's, paired, Holm-adjusted."""
        return holm_adjusted({n: perplexity.compare(self.perplexity[BASELINE], m) for n, m in measured.items()})

    def skipped_against_repeated(self) -> dict[int, Comparison]:
        """For each block tried both ways the loss of leaving it out against that of running it twice, Holm-adjusted."""
        both = [b for b in self.repeated if b in self.skipped]
        return holm_adjusted({b: perplexity.compare(self.repeated[b], self.skipped[b]) for b in both})


def ruined(against: Mapping[str, tuple[Comparison, Comparison]]) -> list[str]:
    """The plans that multiply perplexity by ten or more: the whole interval lies above."""
    return [name for name, (loss, _) in against.items() if loss.low > np.log(10)]


def mildest(losses: Mapping[K, Comparison]) -> K:
    """What costs least."""
    return min(losses, key=lambda name: losses[name].difference)


def single_block_plans(depth: int, blocks: Sequence[int]) -> tuple[dict[int, Plan], dict[int, Plan]]:
    """For each block the plans that leave it out and that run it twice."""
    whole = tuple(range(depth))
    return {b: whole[:b] + whole[b + 1 :] for b in blocks}, {b: whole[: b + 1] + whole[b:] for b in blocks}


def all_plans(depth: int, p: Franken) -> tuple[dict[str, Plan], dict[int, Plan], dict[int, Plan]]:
    """The 25 by name, and by block those that leave it out and that run it twice, for `p.singles` blocks spread over
    the depth."""
    blocks = np.unique(np.linspace(0, depth - 1, min(p.singles, depth)).round().astype(int)).tolist()
    return franken_plans(depth), *single_block_plans(depth, blocks)


def measure(subject: Subject, p: Franken) -> Results:
    """Perplexity and HellaSwag of all 25 plans, and perplexity of single blocks skipped and repeated.

    All of them are one tree of plans: blocks that they share run once.
    """
    plans, skipped, repeated = all_plans(subject.depth, p)
    single = {("skip", b): plan for b, plan in skipped.items()} | {("repeat", b): plan for b, plan in repeated.items()}
    ppl = _losses(subject, {**plans, **single}, p)
    return Results(
        plans,
        {name: ppl[name] for name in plans},
        _answers(subject, plans, p),
        {b: ppl["skip", b] for b in skipped},
        {b: ppl["repeat", b] for b in repeated},
    )


def _losses(subject: Subject, plans: Mapping[Any, Plan], p: Franken) -> dict[Any, Measurement]:
    return perplexity.perplexities(subject, evaluation_text(p.data), plans, length=p.length, limit=p.windows)


def _answers(subject: Subject, plans: Mapping[Any, Plan], p: Franken) -> dict[Any, Measurement]:
    items = Setup("hellaswag", limit=p.items, fast=True).items(p.data)
    return choice.multiple_choices(subject, items, plans, task="HellaSwag")


def completions(subject: Subject, plans: dict[str, tuple[int, ...]], p: Franken) -> dict[str, tuple[Timed, int]]:
    """For each plan the timed completion of the prompt, and the distinct parameters the plan holds in memory."""
    out = {}
    complete(subject, p.prompt, 4)  # the first run pays for everybody's warm-up
    for name, plan in tqdm(plans.items(), desc="completions", unit="plan", disable=None, leave=False):
        changed = apply_plan(subject, plan)
        out[name] = complete(changed, p.prompt, p.tokens), changed.parameters
    return out


def in_words(results: Results, name: str) -> str:
    """What a plan does; its name counts the 32 blocks of the original study's model."""
    return plan_in_words(results.plans[name], len(results.plans[BASELINE]))


def named_plans(results: Results) -> dict[str, Plan]:
    """The plans by what they do."""
    return {in_words(results, name): plan for name, plan in results.plans.items()}


def singles_table(results: Results) -> pd.DataFrame:
    """Perplexity as a ratio to the baseline's (paired interval), a row for each block left out or run twice."""
    rows = []
    for change, measured in (("left out", results.skipped), ("run twice", results.repeated)):
        for b, c in results.losses(measured).items():
            value, low, high = np.exp([c.difference, c.low, c.high])
            rows.append({"block": b, "change": change, "times": value, "low": low, "high": high})
    return pd.DataFrame(rows).set_index("block")


def table(results: Results, written: Mapping[str, tuple[Timed, int]] | None = None) -> pd.DataFrame:
    """One row a plan, best perplexity first, with its ratio to the baseline's (paired interval).

    Args:
        results: of one run.
        written: see `completions`; adds the time of a token and the parameters.
    """
    losses = results.losses(results.perplexity)
    rows = []
    for name, plan in results.plans.items():
        ppl, hella, loss = results.perplexity[name], results.hellaswag[name], losses[name]
        row = {
            "plan": in_words(results, name), "original name": name, "blocks": format_plan(plan), "run": len(plan),
            "perplexity": ppl.value, "times": np.exp(loss.difference),
            "times low": np.exp(loss.low), "times high": np.exp(loss.high),
            "HellaSwag": hella.value, "hs low": hella.low, "hs high": hella.high,
        }  # fmt: skip
        if written:
            timed, parameters = written[name]
            row |= {"ms per token": 1000 * timed.seconds_per_token, "parameters, M": parameters / 1e6}
        rows.append(row)
    return pd.DataFrame(rows).set_index("plan").sort_values("perplexity")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The same table for a page: intervals beside their numbers, three digits."""
    shown = pd.DataFrame(
        {
            "perplexity": table["perplexity"].map(_digits),
            "times the baseline's": [
                f"{_digits(value)} [{_digits(low)}, {_digits(high)}]" if value != 1 else "1"
                for value, low, high in zip(table["times"], table["times low"], table["times high"], strict=True)
            ],
            "HellaSwag": [
                interval(*x, ".1%") for x in zip(table["HellaSwag"], table["hs low"], table["hs high"], strict=True)
            ],
            "blocks run": table["run"],
            "original name": table["original name"],
        },
        index=table.index,
    )
    timed = [column for column in ("ms per token", "parameters, M") if column in table]
    return shown.assign(**{column: table[column].map("{:.1f}".format) for column in timed})


def _digits(x: float) -> str:
    """Three digits, from a thousand on with commas, from a million on in millions."""
    return f"{x / 1e6:.3g} M" if x >= 1e6 else f"{float(f'{x:.3g}'):,.7g}"


def texts(results: Results, written: dict[str, tuple[Timed, int]], prompt: str) -> pd.DataFrame:
    """Every plan's completion, best perplexity first."""
    order = sorted(written, key=lambda n: results.perplexity[n].value)
    return pd.DataFrame(
        {
            "perplexity": [_digits(results.perplexity[n].value) for n in order],
            "completion": [prompt + written[n][0].text for n in order],
        },
        index=pd.Index([in_words(results, n) for n in order], name="plan"),
    )


def agreement(a: Results, b: Results) -> float:
    """Spearman's rank correlation of the plans' perplexities in two runs."""
    return float(
        spearmanr([a.perplexity[n].value for n in a.plans], [b.perplexity[n].value for n in a.plans]).statistic
    )


@dataclass(frozen=True)
class Claim:
    """A conclusion of the original study held against these measurements.

    Attributes:
        said: the conclusion, and how it is read here where it leaves room.
        verdict: holds, does not hold, or undecided.
        shown: the measurements behind the verdict.
    """

    said: str
    verdict: str
    shown: str


# HellaSwag of the original study, 50 items (its slides, December 2024)
ORIGINAL_HELLASWAG = {
    "baseline": 17, "0-23_27-31": 19, "15_single_skip": 19, "mid_expansion_with_repeats": 11, "2_3rd_of_llama": 13,
    "2_3rds_plus_llama": 15, "skip_near_end_keep_last_two": 21,
}  # fmt: skip
ORIGINAL_ITEMS = 50


def claims(results: Results) -> list[Claim]:
    """The original study's conclusions, each held against these measurements at the 5 % level."""
    against = results.against_baseline()
    return [
        _skipping_helps(results, against),
        _few_late(results, against),
        _repetition(results),
        _middle(results),
        _gibberish(against),
        _two_thirds(results),
    ]


def _ratio(c: Comparison) -> str:
    return f"perplexity {ratio(c, '.3g')}"


def skip_or_repeat(results: Results) -> str:
    """For how many of the blocks tried both ways leaving out costs more than running twice, in a sentence."""
    tests = results.skipped_against_repeated()
    told = by_verdict(tests)
    less = f", for {blocks(told['better'])} less" if told["better"] else ""
    return f"For {len(told['worse'])} of {len(tests)} blocks, leaving one out hurts more than running it twice{less}."


def blocks(which: Sequence[int]) -> str:
    """These blocks in words."""
    return f"block{'s' * (len(which) > 1)} {format_plan(which)}"


def claims_table(results: Results) -> pd.DataFrame:
    """The original study's conclusions, each with its verdict and the measurements behind it."""
    rows = [{"the study said": c.said, "here it": c.verdict, "measured": c.shown} for c in claims(results)]
    return pd.DataFrame(rows).set_index("the study said")


# ---------------------------------------------------------------- what the page says


def answer(record: Results) -> str:
    """The chapter's answer in two sentences."""
    losses = record.losses({name: m for name, m in record.perplexity.items() if name != BASELINE})
    plan, broken = mildest(losses), len(ruined(record.against_baseline()))
    twice = record.losses(record.repeated)
    worse = len(by_verdict(twice)["worse"])
    return (
        f"One block in the middle can go: {left_out(record, plan)} perplexity is {np.exp(losses[plan].difference):.2f} "
        f"times the whole model's, while {broken} of the {len(losses)} plans multiply it by ten or more. Running one "
        f"block twice makes it worse for {'all' if worse == len(twice) else f'{worse} of'} {len(twice)} blocks tried, "
        "and saves nothing."
    )


def short(record: Results) -> str:
    """The answer for the book's table of chapters."""
    losses = {name: loss for name, (loss, _) in record.against_baseline().items()}
    cheapest = f"x {np.exp(losses[mildest(losses)].difference):.2f}"
    broken = len(ruined(record.against_baseline()))
    return f"One middle block can go ({cheapest}); {broken} of {len(losses)} plans break the model."


def protocol(record: Results) -> str:
    """Text, windows, items and the whole model's values."""
    base, hella = record.perplexity[BASELINE], record.hellaswag[BASELINE]
    return in_markdown(
        f"{base.task}, {base.n} windows of {base.settings['length']} tokens: whole model {number(base, '.1f')}. "
        f"HellaSwag, {hella.n} items: whole model {share(hella)}."
        f"{sample_note(m for m in as_measurements(record) if m.metric == 'perplexity')}"
    )


def plans_caption(record: Results) -> str:
    """What the chart of all plans finds."""
    against = record.against_baseline()
    near = [name for name in against if name not in ruined(against)]
    hardest = min(near, key=lambda name: len(record.plans[name]))
    worse = by_verdict({name: hella for name, (_, hella) in against.items()}, higher_is_better=True)["worse"]
    chance = sum(record.hellaswag[name].low <= CHANCE <= record.hellaswag[name].high for name in worse)
    return (
        f"{len(near)} of {len(against)} plans stay below ten times the whole model's perplexity; none of them leaves "
        f"out more than {len(record.plans[BASELINE]) - len({*record.plans[hardest]})} blocks. HellaSwag falls for "
        f"{len(worse)} plans (McNemar, Holm, p < 0.05), for {chance} of them to what guessing gives."
    )


def singles_caption(record: Results) -> str:
    """What the chart of single blocks finds."""
    skipped, repeated = record.losses(record.skipped), record.losses(record.repeated)
    return (
        f"{skip_or_repeat(record)} Cheapest to leave out is {_cheapest(skipped)}, to run twice {_cheapest(repeated)}."
    )


def _cheapest(losses: Mapping[int, Comparison]) -> str:
    return f"block {(b := mildest(losses))} ({ratio(losses[b], '.2f')})"


def neighbours_sentence(record: Results) -> str:
    """Exercise 1: whether what single blocks cost explains what three neighbours cost."""
    name = "skip_near_end_keep_last_two"
    gone = [b for b in record.plans[BASELINE] if b not in record.plans[name]]
    single = record.losses(record.skipped)
    together = record.against_baseline()[name][0].difference
    known = {b: single[b].difference for b in gone if b in single}
    parts = " and ".join(f"block {b} x {np.exp(loss):.2f}" for b, loss in known.items())
    rest = np.exp(together - sum(known.values()))
    depth = len(record.plans[BASELINE])
    later = {b: c.difference for b, c in single.items() if depth // 2 <= b < depth - 1}
    dearest = max(later, key=lambda b: later[b])
    return (
        f"Together they cost x {np.exp(together):.2f}. Alone {parts} cost x {np.exp(sum(known.values())):.2f} as a "
        f"product, so {blocks([b for b in gone if b not in known])} would have to cost x {rest:.2f}; the dearest of "
        f"the {len(later)} tried behind the middle, block {dearest}, costs x {np.exp(later[dearest]):.2f}. "
        "So the costs of neighbours more than multiply, as if each did part of the others' work."
    )


def items_sentence(record: Results, wanted: float = 0.02) -> str:
    """Exercise 2: how many items of HellaSwag tell a difference."""
    c = record.against_baseline()["skip_near_end_keep_last_two"][1]
    half = (c.high - c.low) / 2
    return (
        f"Here {c.n} paired items give an interval of ± {100 * half:.1f} points. It shrinks with the square root of "
        f"their number, so ± {100 * wanted:.0f} points need about {_digits(c.n * (half / wanted) ** 2)} items, and the "
        f"original's {ORIGINAL_ITEMS} give about ± {100 * half * (c.n / ORIGINAL_ITEMS) ** 0.5:.0f}."
    )


def memory_sentence(record: Results) -> str:
    """Exercise 3: a plan's time and memory."""
    whole, name = len(record.plans[BASELINE]), "23-31r3"
    run, held = len(record.plans[name]), len({*record.plans[name]})
    return (
        f"It runs {run} blocks of {whole}, so {run / whole:.0%} of their time, and holds {held}, so "
        f"{held / whole:.0%} of their weights; its KV cache has {run} slots, {run / whole:.0%} of the whole model's. "
        f"It writes nothing of use: perplexity is x "
        f"{_digits(np.exp(record.against_baseline()[name][0].difference))}."
    )


def headline(results: Results) -> str:
    """What chapter 1 found, in sentences: the fold "All findings in one place"."""
    base, against = results.perplexity[BASELINE], results.against_baseline()
    losses = {name: loss for name, (loss, _) in against.items()}
    twice = results.losses(results.repeated)
    plan, block = mildest(losses), mildest(twice)
    verdicts = Counter(claim.verdict for claim in claims(results))
    change = "raises" if twice[block].difference > 0 else "lowers"
    counts = f"{verdicts[HOLDS]} hold here, {verdicts[FAILS]} do not"
    counts += f", {verdicts[UNDECIDED]} cannot be decided" if verdicts[UNDECIDED] else ""
    return in_markdown(
        f"On {base.task} (windows of {base.items[0]['tokens'] + 1} tokens, n = {base.n}) the whole model has "
        f"perplexity {number(base, '.1f')}. {len(ruined(against))} of the {len(against)} ways to skip and repeat "
        f"blocks multiply it by ten or more; the mildest, {left_out(results, plan)}, multiplies it by "
        f"{np.exp(losses[plan].difference):.2f}. Running one block twice {change} it even where that does least harm "
        f"(block {block}: {ratio(twice[block])}). {skip_or_repeat(results)} "
        f"Of the original study's {verdicts.total()} conclusions {counts}."
        f"{sample_note([*results.perplexity.values(), *results.skipped.values(), *results.repeated.values()])}"
    )


def left_out(results: Results, name: str) -> str:
    """Which blocks a plan leaves out here; its name counts those of the original's model."""
    gone = [b for b in results.plans[BASELINE] if b not in results.plans[name]]
    return f"without {blocks(gone)}" if gone else "with all blocks"


def _skipping_helps(results: Results, against) -> Claim:
    name = "skip_near_end_keep_last_two"
    c = against[name][1]
    word = c.verdict(higher_is_better=True)
    after, before = (
        interval(right / ORIGINAL_ITEMS, *proportion(right, ORIGINAL_ITEMS), ".2f")
        for right in (ORIGINAL_HELLASWAG[name], ORIGINAL_HELLASWAG[BASELINE])
    )
    return Claim(
        f"Skipping three blocks near the end raises HellaSwag: {after} against {before} ({ORIGINAL_ITEMS} items; "
        "intervals ours).",
        decided(word == "better", word == "worse"),
        f"{left_out(results, name).capitalize()}: HellaSwag {points(c)} over {c.n} items.",
    )


def _few_late(results: Results, against) -> Claim:
    losses = {n: against[n][0] for n in ("15_single_skip", "0-23_27-31", "skip_near_end_keep_last_two")}
    worst, c = max(losses.items(), key=lambda pair: pair[1].difference)
    return Claim(
        "Skipping one to three blocks leaves a usable, lighter model (read here as: perplexity up by less than 10 %).",
        decided(c.high < np.log(1.1), c.low > np.log(1.1)),
        f"The worst of {len(losses)} such plans, {left_out(results, worst)}: {_ratio(c)}.",
    )


def _repetition(results: Results) -> Claim:
    twice = results.losses(results.repeated)
    better, worse, _ = map(len, by_verdict(twice).values())
    block, helps = mildest(twice), f", for {better} better" if better else ""
    return Claim(
        "Repeating blocks generally makes the result worse.",
        decided(worse > len(twice) / 2, better > 0),
        f"One block run twice makes it worse for {worse} of {len(twice)} blocks{helps}; the mildest, block {block}: "
        f"{_ratio(twice[block])}.",
    )


def _middle(results: Results) -> Claim:
    """Over single blocks left out: is the loss smaller the nearer the block is to the middle?"""
    middle = (len(results.plans[BASELINE]) - 1) / 2
    loss = [c.difference for c in results.losses(results.skipped).values()]
    rho, p = spearmanr([abs(b - middle) for b in results.skipped], loss)
    return Claim(
        "Skipping works best in the middle of the model.",
        decided(p < 0.05 and rho > 0, p < 0.05 and rho <= 0),
        "Rank correlation of a block's distance from the middle with what leaving it out costs, over "
        f"{len(loss)} blocks: {rho:+.2f}, {p_value(p)}.",
    )


def _gibberish(against) -> Claim:
    count, n = len(ruined(against)), len(against)
    low, high = proportion(count, n)
    return Claim(
        "Most of the 25 configurations write gibberish (read here as: perplexity at least ten times the baseline's).",
        decided(count > n / 2, count <= n / 2),
        f"{count} of {n} plans [{100 * low:.0f} %, {100 * high:.0f} %].",
    )


def _two_thirds(results: Results) -> Claim:
    others = [n for n in ORIGINAL_HELLASWAG if n not in (BASELINE, "2_3rd_of_llama")]
    pairs = holm_adjusted(
        {n: perplexity.compare(results.perplexity[n], results.perplexity["2_3rd_of_llama"]) for n in others}
    )
    closest = mildest(pairs)
    return Claim(
        "Of the six configurations kept, two thirds of the model gives the lowest quality.",
        decided(len(by_verdict(pairs)["worse"]) == len(pairs), pairs[closest].verdict() == "better"),
        f"{left_out(results, '2_3rd_of_llama').capitalize()} against the one of the others that is worst "
        f"({in_words(results, closest)}): {_ratio(pairs[closest])}.",
    )


# ---------------------------------------------------------------- recorded runs


def as_measurements(results: Results) -> list[Measurement]:
    """All of them, as they are recorded."""
    return [
        m
        for group in (results.perplexity, results.hellaswag, results.skipped, results.repeated)
        for m in group.values()
    ]


def plan_label(m: Measurement) -> str:
    """The label of a row: no recipe makes a plan, so its blocks are named."""
    return f"plan {format_plan(m.provenance['plan'])}"


def from_measurements(measurements: Sequence[Measurement]) -> Results:
    """The results that `as_measurements` gave, told apart by metric and plan.

    Raises:
        BadInput: a plan of this chapter was not measured.
    """
    by_plan = {(m.metric, tuple(m.provenance["plan"] or ())): m for m in measurements}
    depth = max((max(plan) for _, plan in by_plan if plan), default=0) + 1
    plans = franken_plans(depth)
    try:
        ppl, hella = ({n: by_plan[metric, plan] for n, plan in plans.items()} for metric in ("perplexity", "acc_norm"))
    except KeyError as error:
        metric, plan = error.args[0]
        raise BadInput(
            f"these are not the results of chapter 1: {metric} of plan {format_plan(plan)} is missing"
        ) from error
    skipped, repeated = (
        {b: by_plan["perplexity", plan] for b, plan in group.items() if ("perplexity", plan) in by_plan}
        for group in single_block_plans(depth, range(depth))
    )
    return Results(plans, ppl, hella, skipped, repeated)


def read_recorded(path: Path) -> Results:
    """A recorded run."""
    rows = on_one_sample(Store(path).rows().values(), lambda m: (m.metric, tuple(m.provenance["plan"] or ())))
    return from_measurements(list(rows.values()))


def recorded_parts(p: Franken, file: Path) -> Iterator[Part]:
    """Two trees of plans, perplexity's and HellaSwag's. Neighbours in a tree are measured together: blocks that they
    share run once."""
    load = functools.cache(load_subject)
    plans, skipped, repeated = all_plans(shape(p.subject).depth, p)
    by_name = {f"plan {format_plan(plan)}": plan for plan in (*plans.values(), *skipped.values(), *repeated.values())}

    def make(missing: Collection[Key], keep: Keep) -> None:
        subject = load(p.subject, p.dtype, p.device)
        tree: dict[Key, Plan] = {key: by_name[key[0]] for key in missing}
        measured = _losses if next(iter(tree))[1] == "perplexity" else _answers
        for some in neighbours(tree):
            for m in measured(subject, some, p).values():
                keep(described(m, subject, p.data, label=plan_label(m)))

    yield Part("perplexity", {(name, "perplexity"): p.windows for name in by_name}, make)
    yield Part("HellaSwag", {(f"plan {format_plan(plan)}", "acc_norm"): p.items for plan in plans.values()}, make)


def key(m: Measurement) -> Key:
    """Label and metric."""
    return m.label, m.metric


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """Perplexities, by what a plan is called."""
    perplexities = [m for m in rows if m.metric == "perplexity"]
    depth = max((max(m.provenance["plan"] or [0]) for m in perplexities), default=0) + 1
    for m in perplexities:
        yield plan_name(m.provenance["plan"], depth), WIKITEXT, m


def plan_name(plan: Sequence[int] | None, depth: int) -> str:
    """The name of a plan among the claims: dense, `block B twice`, or the numbers of its blocks."""
    if plan is None or list(plan) == list(range(depth)):
        return DENSE
    _, repeated = single_block_plans(depth, range(depth))
    return next((f"block {b} twice" for b, p in repeated.items() if list(p) == list(plan)), f"plan {plan}")


CHAPTER = Chapter(
    "01_franken_llama",
    "skipping and repeating blocks",
    Franken,
    recorded_parts,
    key,
    read_recorded,
    headline,
    recorded={"windows": None, "items": 200, "singles": 15},
    claims=for_claims,
    opening=Opening(
        question="Can blocks of a trained transformer be skipped, or run twice, without training it again?",
        answer=answer,
        short=short,
        protocol=protocol,
        learn="what a plan of blocks is, and which blocks a small model can spare.",
    ),
)
