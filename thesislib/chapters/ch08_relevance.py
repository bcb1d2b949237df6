"""Chapter 8, what a block is worth: relevance beside cosine similarity, and how much of each ranking is noise."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from thesislib.chapters import ch08_healing, ch08_over_training, ch08_pairs, ch08_runs, ch08_scale, ch08_sets
from thesislib.chapters.ch08_agreement import (
    LEAST,
    REPORT,
    against_cosine,
    agreements,
    curse,
    dependence,
    reference,
    settled,
)
from thesislib.chapters.ch08_claims import claims
from thesislib.chapters.ch08_cost import cost_sentence
from thesislib.chapters.ch08_record import Record, read_recorded
from thesislib.chapters.ch08_runs import ALL, NOTEBOOK, TASKS, Relevance, asked
from thesislib.chapters.ch08_scores import TEXT
from thesislib.chapters.ch08_tables import CHANGED, worth
from thesislib.chapters.chapter import Chapter, Opening, Part
from thesislib.chapters.phrases import interval, p_value, together
from thesislib.compress.agreement import Estimate, spearman
from thesislib.compress.depth import influence
from thesislib.compress.relevance import NEXT_TOKEN, Outcomes, choices, next_tokens, outcomes
from thesislib.formats.load import load_subject
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.sources.corpus import calibration_windows

BASE = "cosine"
SHOWN = ("cosine", "perplexity", f"relevance: {ALL}", f"likelihood: {ALL}", "last")  # sets that the plot colours


def _of(e: Estimate, form: str = ".2f") -> str:
    return interval(*e, form)


# ---------------------------------------------------------------- sentences


def block_sentence(record: Record) -> str:
    """The block whose cosine score and loss lie furthest apart, among those that may go."""
    table = worth(record).loc[record.middle]
    ranks = table[["cosine", "loss"]].rank()
    block = int((ranks["loss"] - ranks["cosine"]).idxmax())
    place, dear = int(ranks.loc[block, "cosine"]), int(len(table) + 1 - ranks.loc[block, "loss"])
    return (
        f"Of the {len(table)} blocks that may go, block {block} has the {_nth(place)}lowest cosine score and costs the "
        f"{_nth(dear)}most when it is left out: {table.loc[block, 'loss']:.1f} nats an item."
    )


def _nth(place: int) -> str:
    """Before a superlative: nothing, or the place."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return "" if place == 1 else f"{place}{ending} "


def agreement_sentence(record: Record) -> str:
    """Which rankings agree with what other items lose, in log-probability and in accuracy."""
    likelihood, accuracy = (agreements(record, ALL, record.middle, metric) for metric in ("likelihood", "relevance"))
    best = max(accuracy, key=lambda name: accuracy[name].spearman.value)
    n = len(asked(record.outcomes, ALL).chance)
    return (
        f"Rank correlation with the log-probability that {n} other items lose: cosine "
        f"{_of(likelihood['cosine'].spearman)}, relevance {_of(likelihood['relevance'].spearman)}, the log-probability "
        f"of as many items {_of(likelihood['likelihood'].spearman)}. With the accuracy that they lose, which is what "
        f"relevance counts: cosine {_of(accuracy['cosine'].spearman)}, relevance "
        f"{_of(accuracy['relevance'].spearman)}, log-probability {_of(accuracy['likelihood'].spearman)}; highest is "
        f"{best}, {_of(accuracy[best].spearman)}."
    )


def ends_sentence(record: Record) -> str:
    """What the first and last blocks do to a correlation."""
    all_blocks = agreements(record, ALL, range(record.depth))["cosine"].spearman.value
    middle = agreements(record, ALL, record.middle)["cosine"].spearman.value
    table = worth(record)
    pearson = [float(np.corrcoef(t["cosine"], t["loss"])[0, 1]) for t in (table, table.loc[record.middle])]
    return (
        f"Blocks at the ends are dear by every score and make any two agree: with them cosine's rank correlation is "
        f"{all_blocks:.2f} and Pearson's {pearson[0]:.2f}, without them {middle:.2f} and {pearson[1]:.2f}. All tables "
        "here are without them."
    )


def misranked_sentence(record: Record) -> str:
    """Why the share of misranked blocks says nothing."""
    cosine, likelihood = (agreements(record, ALL, record.middle)[name] for name in ("cosine", "likelihood"))
    n = len(record.middle)
    return (
        f'The paper reports that cosine "misranks" 93.8 % of 28 blocks. A random order misranks 1 - 1/28 = '
        f"{1 - 1 / 28:.1%} of them. Here cosine misranks {cosine.misranked.value:.0%} of {n} (a random order "
        f"{1 - 1 / n:.0%}) at a rank correlation of {cosine.spearman.value:.2f}, and the log-probability of other "
        f"items still {likelihood.misranked.value:.0%} at {likelihood.spearman.value:.2f}."
    )


def regret_sentence(record: Record) -> str:
    """What choosing by each ranking costs, by single losses."""
    found = agreements(record, ALL, record.middle)
    said = together(f"{name} {_of(found[name].regret, '.1f')}" for name in ("cosine", "relevance", "likelihood"))
    return f"Regret, the nats an item that the {LEAST} chosen blocks lose, each alone, beyond the {LEAST} best: {said}."


def dependence_sentence(record: Record) -> str:
    """Whether relevance depends on the task more than cosine does, and whether that is more than noise."""
    plain, less = (against_cosine(record, "relevance", record.middle, corrected) for corrected in (False, True))
    sure = against_cosine(record, "likelihood", record.middle, True)
    d, cosine = (dependence(record, name, record.middle) for name in ("relevance", "cosine"))
    beyond = "stays" if less.told and less.difference > 0 else "is within what items alone can give"
    return (
        f"A block's standing by accuracy differs between tasks more than by cosine: mean variance of z "
        f"{d.variance.mean():.2f} against {cosine.variance.mean():.3f} ({p_value(plain.p)}, Wilcoxon over blocks). The "
        f"choice of items alone gives {d.noise.mean():.2f}. Less that, the difference {beyond} ({p_value(less.p)}); by "
        f"log-probability, which has little noise, it is {sure.difference:+.2f} ({p_value(sure.p)})."
    )


def settling_sentence(record: Record) -> str:
    """How many items a ranking needs."""
    said = []
    for metric in ("likelihood", "relevance"):
        of = {task: settled(record, task, metric, record.middle) for task in TASKS}
        few, n = 32, max(of[TASKS[0]])
        sizes = [size for size in (few, n) if all(size in s for s in of.values())]
        at = {size: [s[size].spearman.value for s in of.values()] for size in sizes}
        said.append(
            f"{metric} " + together(f"{min(x):.2f} to {max(x):.2f} from {size} items" for size, x in at.items())
        )
    return (
        f"Correlation with the log-probability that other items lose, over the {len(TASKS)} tasks: {'; '.join(said)}. "
        "A question that is right or wrong says one bit, and skipping a block changes few of them."
    )


def curse_sentence(record: Record) -> str:
    """What is left of "better than the whole model" on other items."""
    found = {task: curse(record, task, record.middle) for task in TASKS}
    n, still = (sum(x) for x in zip(*((len(c.blocks), c.still) for c in found.values()), strict=True))
    if not n:
        return "No block's removal answers more items than the whole model."
    said = []
    for task, c in found.items():
        if len(c.blocks):
            value, high, low = (-100 * x for x in c.kept)
            said.append(f"{task} {-100 * c.seen:+.1f} becomes {interval(value, low, high, '+.1f')}")
    return (
        f"{n} times a task's items to rank by are answered better without a block. On the items to report {still} of "
        f"them still are. Points gained, on average: {together(said)}."
    )


def sets_sentence(record: Record, k: int) -> str:
    """What removing k blocks by each ranking leaves, against cosine's."""
    tests = ch08_sets.against(record, k, BASE)
    better = [name for name, c in tests.items() if c.told and c.difference > 0]
    worse = [name for name, c in tests.items() if c.told and c.difference < 0]
    names = ch08_sets.measured(record, k)
    best = max(names, key=lambda name: ch08_sets.kept(record, k, name).accuracy)
    top, cosine = (ch08_sets.kept(record, k, name) for name in (best, BASE))
    said = [
        f"Without {k} blocks the most right answers, {top.accuracy:.1%}, are left by {best}; cosine's choice leaves "
        f"{cosine.accuracy:.1%}, the whole model has {ch08_sets.kept(record, 0).accuracy:.1%} (n = {top.n})"
    ]
    said.append(
        f"of {len(tests)} other rankings {_counted(better)} surely better than cosine, {_counted(worse)} surely worse"
        if better or worse
        else f"none of {len(tests)} other rankings is surely better or worse than cosine"
    )
    return "; ".join(said) + "."


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "none"


def own_sentence(record: Record) -> str:
    """Whether a task's own items choose better than another's."""
    said = []
    for k in ch08_sets.counts(record):
        own, other, mixed = ch08_sets.own_and_other(record, k, "likelihood")
        said.append(f"{k} blocks: {own:.1%} by its own, {other:.1%} by another task's, {mixed:.1%} by all mixed")
    return f"Right answers on a task, ranked by the log-probability of items ({'; '.join(said)})." if said else ""


def left_out_sentence(record: Record) -> str:
    """Which tasks rank no blocks, and why."""
    below, unsure = (
        [task for task, m in record.left_out.items() if (m.value <= m.extra["chance"]) == is_below and not _surely(m)]
        for is_below in (True, False)
    )
    said = []
    if below:
        said.append(f"On {together(below)} this subject is not above guessing: relevance is undefined.")
    if unsure:
        said.append(f"On {together(unsure)} it is not surely above guessing: relevance would divide by noise.")
    return " ".join([*said, "They rank no blocks here."] if said else said)


def _surely(m: Measurement) -> bool:
    return m.low > m.extra["chance"]


def headline(record: Record) -> str:
    """What chapter 8 found, in sentences: the fold "All findings in one place"."""
    parts = [
        block_sentence(record),
        agreement_sentence(record),
        misranked_sentence(record),
        regret_sentence(record),
        dependence_sentence(record),
        settling_sentence(record),
        curse_sentence(record),
        *(sets_sentence(record, k) for k in ch08_sets.counts(record)),
        own_sentence(record),
        *(ch08_healing.healing_sentence(record.healed, k) for k in ch08_healing.counts(record.healed)),
        *ch08_scale.sentences(scale(record)),
        *ch08_pairs.search_sentences(pairs(record)),
        *ch08_pairs.additivity_sentences(pairs(record)),
        *ch08_over_training.sentences(training(record)),
        cost_sentence(record),
        left_out_sentence(record),
    ]
    return in_markdown(" ".join(part for part in parts if part))


def guessing(record: Record) -> float:
    """The accuracy of guessing all tasks' items to report."""
    return float(asked(record.outcomes, ALL, REPORT).chance.mean())


# ---------------------------------------------------------------- this run


def measure(p: Relevance) -> tuple[str, Outcomes, list[float]]:
    """The subject's name, the outcomes of a task's items without each block, and each block's cosine score."""
    subject = load_subject(p.subject, p.dtype, p.device)
    ids = calibration_windows(subject.tokenizer, TEXT, p.data, p.windows, p.length)
    items = next_tokens(ids) if p.task == NEXT_TOKEN else choices(p.task, p.data, p.items)
    return subject.name, outcomes(subject, items, range(subject.depth)), influence(subject, ids)


def agrees(record: Record, p: Relevance, found: Outcomes) -> float | None:
    """The rank correlation of a run's losses of log-probability with the record's, where both ask the same task of as
    many blocks."""
    if p.task not in TASKS or len(found.correct) != record.depth + 1:
        return None
    return float(spearman(found.scores("likelihood"), reference(record, p.task)[0]))


def this_run_sentence(record: Record, p: Relevance, found: Outcomes) -> str:
    """The line before this run's table."""
    rho = agrees(record, p, found)
    if rho is None:
        return "This run asks what the record does not: there is nothing to agree with"
    return f"This run ranks blocks as the record's items to report do: rank correlation {rho:.2f}"


def luck_sentence(items: int = 190, blocks: int = 30, changed: float = CHANGED, draws: int = 10_000) -> str:
    """How much better than the whole model the luckiest of blocks looks that are all worth nothing."""
    rng = np.random.default_rng(0)
    flips = rng.binomial(items, changed, (draws, blocks))
    gained = 2 * rng.binomial(flips, 0.5) - flips  # of the answers that change, as many become right as wrong
    best, deviation = 100 * gained.max(1).mean() / items, 100 * np.sqrt(changed / items)
    return (
        f"{best:.1f} points better, on average. {items} x {changed:.0%} = {items * changed:.0f} answers change, half "
        f"of them for the better. So the difference has a standard deviation of {deviation:.1f} points, and the best "
        f"of {blocks} lies {best / deviation:.1f} of them above 0. On other items it is 0."
    )


# ---------------------------------------------------------------- the box


def _answer(record: Record) -> str:
    found = {name: a.spearman.value for name, a in agreements(record, ALL, record.middle, "relevance").items()}
    best = max(found, key=lambda name: found[name])
    c = {task: curse(record, task, record.middle) for task in TASKS}
    n, still = (sum(x) for x in zip(*((len(x.blocks), x.still) for x in c.values()), strict=True))
    return (
        f"With the accuracy that other items lose, cosine's ranking correlates at {found['cosine']:.2f}, relevance's "
        f"at {found['relevance']:.2f}, and highest is {NAMES.get(best, best)} at {found[best]:.2f}. Of {n} removals "
        f"that seemed to help, {still} do on other items."
    )


NAMES = {"likelihood": "the log-probability of the same answers", "margin": "the margin of the same answers"}


def _short(record: Record) -> str:
    found = {name: a.spearman.value for name, a in agreements(record, ALL, record.middle, "relevance").items()}
    return (
        f"Cosine foretells lost accuracy at {found['cosine']:.2f}, other items' accuracy at "
        f"{found['relevance']:.2f}, their log-probability at {found['likelihood']:.2f}."
    )


def _protocol(record: Record) -> str:
    n = {task: len(record.outcomes[task, REPORT].chance) for task in TASKS}
    sizes = together(f"{task} ({record.whole(task, REPORT).value:.1%} right)" for task in TASKS)
    return (
        f"{max(n.values())} items to rank by and as many others to report on, of each of {sizes}; cosine and the like "
        f"on {record.scores.losses.shape[1]} windows of {record.scores.made['settings']['length']} tokens of "
        f"Wikipedia. The {record.depth - len(record.middle)} blocks at the ends stay."
    )


OPENING = Opening(
    question="Is a block that hardly turns the stream worth little, and what does it take to know its worth?",
    answer=_answer,
    short=_short,
    protocol=_protocol,
    learn="To rank blocks by answers without fooling oneself: three parts of the items, intervals of ranks, regret.",
)


# ---------------------------------------------------------------- recorded run


def _beside(folder: Path, what: str) -> Path:
    return folder / f"{NOTEBOOK}_{what}.json"


def scale(record: Record) -> ch08_scale.Scale:
    """The file about what stands in a block's place, and about gain."""
    return ch08_scale.read(_beside(record.folder, "scale"))


def pairs(record: Record) -> ch08_pairs.Losses:
    """The file of losses without pairs of blocks."""
    return ch08_pairs.read(_beside(record.folder, "pairs"))


def training(record: Record) -> ch08_over_training.Trained:
    """The file of the models that were trained from scratch."""
    return ch08_over_training.read(_beside(record.folder, "training"))


def recorded_parts(p: Relevance, file: Path) -> Iterator[Part]:
    """Rows first, see `thesislib.chapters.ch08_runs`; then the files beside them."""
    yield from ch08_runs.recorded_parts(p, file)
    subject = functools.cache(lambda dtype: load_subject(p.subject, dtype, p.device))
    makers: dict[str, Callable[[Path], None]] = {
        "pairs": lambda to: ch08_pairs.record(subject(p.dtype), p.data, p.windows, p.length, to),
        "scale": lambda to: ch08_scale.record(
            subject(p.dtype), subject("float32"), p.data, SCALE_ITEMS, p.windows, p.length, to
        ),
        "training": lambda to: ch08_over_training.record(subject(p.dtype), p.data, range(p.seeds), to),
    }
    for what, make in makers.items():
        beside = _beside(file.parent, what)
        yield Part(what, {}, functools.partial(lambda make, to, *_: make(to), make, beside), beside)


SCALE_ITEMS = 96

CHAPTER = Chapter(
    NOTEBOOK,
    "what a block is worth",
    Relevance,
    recorded_parts,
    ch08_runs.key,
    read_recorded,
    headline,
    {"items": 190},
    opening=OPENING,
    papers=claims,
)
