"""Chapter 2, depth pruning: how each metric ranks the blocks, and what is left when the least important ones go."""

import dataclasses
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from tqdm import tqdm

from thesislib.chapters import ch02_stability
from thesislib.chapters.chapter import (
    CLOSED,
    DEPTH_WINDOWS,
    OPEN,
    WIKITEXT,
    Chapter,
    Keep,
    Key,
    Opening,
    Parameters,
    Part,
    book,
    neighbours,
    on_one_sample,
    shape,
)
from thesislib.chapters.phrases import (
    factor,
    interval,
    number,
    p_value,
    percent_more,
    sample_note,
    share,
    times,
    together,
    written,
)
from thesislib.chapters.pool import larger, largest, recorded_pool
from thesislib.chapters.scorings import scored_again
from thesislib.chapters.thesis import thesis_row
from thesislib.chapters.trainings import Records
from thesislib.compress.depth import Depth, angular_distances, importance, taylor_of_parts
from thesislib.errors import BadInput, unknown
from thesislib.evaluate import perplexity, triviaqa
from thesislib.evaluate.answers import AT_ONCE, FIRST_WORDS
from thesislib.evaluate.generate import complete
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted
from thesislib.experiment import DENSE, described
from thesislib.files import read_json, write_whole
from thesislib.formats.load import load_subject
from thesislib.model.blocks import Plan, plan_without, remove, removed_parts
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement, in_markdown, provenance
from thesislib.records.store import Store
from thesislib.sources.corpus import calibration_windows, evaluation_text, question_source, questions
from thesislib.sources.rows import origin_of

ONE_SHOT, GREEDY, RANDOM = "perplexity", "perplexity, greedy", "random"
NOTHING = "nothing removed"
THESIS = (2, 4, 6, 8)
METHODS = {ONE_SHOT: "one-shot perplexity", GREEDY: "greedy perplexity", "taylor": "Taylor"}  # in sentences
# those that ask for running text or for nothing
OF_THE_MODEL = ("perplexity", "taylor", "magnitude", "influence", "angular")


@dataclass(frozen=True)
class DepthChapter(Parameters):
    """Parameters of chapter 2.

    Attributes:
        length: tokens in a window.
        calibration: windows of the calibration text that blocks are scored on.
        stability: of the recorded run: windows from which it is told how stable the choice is; 0 for not at all.
        windows: that perplexity is measured on after each removal.
        metrics: how blocks are scored.
        greedy: also score by perplexity again after each removal, up to this many blocks; 0 for not at all.
        counts: how many blocks are removed.
        seeds: how many random removals.
        questions: of TriviaQA, closed book, for the thesis's D2, D4, D6 and D8.
        passages: of TriviaQA, open book, for the same.
        tokens: of a completion.
        prompt: what is completed.
    """

    length: int = 512
    calibration: int = 4
    stability: int = 0
    windows: int | None = 8
    metrics: list = field(default_factory=lambda: list(OF_THE_MODEL))
    greedy: int = 0
    counts: list = field(default_factory=lambda: [1, 2, 4, 6, 8])
    seeds: int = 1
    questions: int = 32
    passages: int = 12
    tokens: int = 30
    prompt: str = "Once upon a time"
    may_be_zero = ("greedy", "seeds", "stability")

    def __post_init__(self):
        super().__post_init__()
        for metric in self.metrics:
            if metric not in OF_THE_MODEL:
                raise unknown("importance metric", metric, OF_THE_MODEL)
        if not all(isinstance(k, int) and k > 0 for k in self.counts):
            raise BadInput(
                f"parameter 'counts' is {self.counts}: expected numbers of blocks to remove, at least 1 each"
            )

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which no count of `counts` can be removed."""
        self.possible(shape.depth)

    def possible(self, blocks: int) -> list[int]:
        """Those of `counts` that a subject of so many blocks can lose.

        Raises:
            BadInput: none.
        """
        free = unprotected(blocks)
        possible = [k for k in self.counts if k <= free]
        if not possible:
            some = f"expected e.g. counts=[{free}]" if free else "expected a subject with more blocks"
            raise BadInput(
                f"parameter 'counts' is {self.counts}: of this subject's {blocks} blocks {free} can go, since "
                f"the first and the last stay; {some}"
            )
        return possible


def unprotected(blocks: int) -> int:
    """How many blocks a subject of `blocks` can lose at most by default."""
    return max(0, blocks - Depth.protect_first - Depth.protect_last)


@dataclass(frozen=True)
class Scores:
    """Importance of every block on the calibration text.

    Attributes:
        metrics: {metric: {block: importance}} of every block; under angular the distance across that block alone.
        removed: {method: {k: the k blocks that go}}; methods are the metrics, greedy perplexity and random choices.
        made: provenance.
    """

    metrics: dict[str, dict[int, float]]
    removed: dict[str, dict[int, tuple[int, ...]]]
    made: dict

    @property
    def main(self) -> str:
        """The method whose models are asked questions: perplexity, or the first if that was not tried."""
        return "perplexity" if "perplexity" in self.removed else next(iter(self.removed))

    def of_main(self) -> "Scores":
        """The same, of the removals those of `main` and at random: what a page shows of its own run."""
        kept = {m: sets for m, sets in self.removed.items() if m == self.main or m.startswith(RANDOM)}
        return dataclasses.replace(self, removed=kept)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, plain: Mapping) -> "Scores":
        """What `to_json` wrote."""
        return cls(
            {m: {int(b): s for b, s in scores.items()} for m, scores in plain["metrics"].items()},
            {m: {int(k): tuple(v) for k, v in removed.items()} for m, removed in plain["removed"].items()},
            plain["made"],
        )


def score(subject: Subject, p: DepthChapter) -> Scores:
    """Every block's importance by every metric, and which blocks each method removes."""
    started = time.perf_counter()
    ids = calibration_windows(subject.tokenizer, "wikipedia", p.data, p.calibration, p.length)
    counts = p.possible(subject.depth)
    if left := [str(k) for k in p.counts if k not in counts]:
        print(
            f"not possible for this subject: to remove {', '.join(left)} of its {subject.depth} blocks, since "
            "the first and the last stay"
        )
    free = range(Depth.protect_first, subject.depth - Depth.protect_last)
    metrics: dict[str, dict[int, float]] = {}
    removed: dict[str, dict[int, tuple[int, ...]]] = {}
    for metric in p.metrics:
        if metric == "angular":
            distance = angular_distances(subject, ids)
            metrics[metric] = {b: float(distance[1, b]) for b in range(subject.depth)}
            starts = {k: min(free[: len(free) - k + 1], key=lambda b: distance[k, b]) for k in counts}
            removed[metric] = {k: tuple(range(b, b + k)) for k, b in starts.items()}
        else:
            metrics[metric] = importance(subject, ids, metric)
            order = sorted(free, key=lambda b: (metrics[metric][b], b))
            removed[metric] = {k: tuple(sorted(order[:k])) for k in counts}
    if p.greedy:
        _, report = Depth(min(p.greedy, max(counts)), greedy=True, windows=p.calibration, length=p.length).apply(
            subject, data=p.data
        )
        removed[GREEDY] = {k: tuple(sorted(report["order"][:k])) for k in counts if k <= p.greedy}
    for seed in range(p.seeds):
        order = np.random.default_rng(seed).permutation(free).tolist()
        removed[f"{RANDOM} {seed}"] = {k: tuple(sorted(order[:k])) for k in counts}
    return Scores(
        metrics,
        removed,
        provenance(
            subject, started, text="wikipedia", data=origin_of(p.data), windows=p.calibration, length=p.length, seed=0
        ),
    )


@dataclass(frozen=True)
class Results:
    """What is left after each removal.

    Attributes:
        scores: see `Scores`.
        perplexity: {(method, k blocks removed): measurement}; (NOTHING, 0) is the whole model.
        trivia: {(k, open book): accuracy} with the removals of `Scores.main`; 0 is the whole model.
        texts: {k: completion}.
        pool: what all chapters recorded of the same models; empty for a run that is not recorded.
    """

    scores: Scores
    perplexity: dict[tuple[str, int], Measurement]
    trivia: dict[tuple[int, bool], Measurement]
    texts: dict[int, str]
    pool: Records = field(default_factory=dict, repr=False)

    def quoted(self, k: int) -> Measurement:
        """The perplexity without the k blocks of `Scores.main`: of all chapters the measurement on the most windows."""
        return quoted(self.dense if k == 0 else self.perplexity[self.scores.main, k], k, WIKITEXT, self.pool)

    @property
    def dense(self) -> Measurement:
        """Perplexity of the whole model."""
        return self.perplexity[NOTHING, 0]


def quoted(m: Measurement, k: int, measure: str, pool: Records) -> Measurement:
    """The measurement on the most items of the model of `m`, which lacks k blocks. A label does not tell which blocks:
    another machine may have chosen others."""
    other = larger(pool, measure, label_of(k), m)
    return other if other.provenance["plan"] == m.provenance["plan"] or not k else m


def chosen_elsewhere(results: Results) -> str:
    """Models of the same settings whose blocks another machine chose otherwise, in words; "" if there are none."""
    said = []
    for k in (k for k in THESIS if (results.scores.main, k) in results.perplexity):
        own = results.perplexity[results.scores.main, k]
        other = larger(results.pool, WIKITEXT, label_of(k), own)
        here, there = (set(own.provenance["plan"]), set(other.provenance["plan"]))
        if here != there:
            ratio = perplexity.relative(other, results.quoted(0)).value
            blocks = f"block {together(map(str, here - there))} instead of {together(map(str, there - here))}"
            said.append(f"{blocks} for D{k} ({times(ratio)} on {other.n} windows)")
    return f"Another machine, which rounds otherwise, removed {'; '.join(said)}." if said else ""


def plans_of(depth: int, scores: Scores) -> dict[tuple[str, int], Plan]:
    """{(method, blocks removed): plan} of all that was chosen, and of nothing removed."""
    removals = {(method, k): gone for method, sets in scores.removed.items() for k, gone in sets.items()}
    return {name: plan_without(depth, gone) for name, gone in {(NOTHING, 0): (), **removals}.items()}


def pruned(subject: Subject, scores: Scores) -> dict[int, Subject]:
    """The thesis's models that questions are asked of, by how many blocks they lack; 0 is the whole."""
    chosen = scores.removed[scores.main]
    return {0: subject} | {k: remove(subject, chosen[k]) for k in THESIS if k in chosen}


def answers(model: Subject, p: DepthChapter, open_book: bool) -> Measurement:
    """TriviaQA, closed or open book."""
    asked = questions(p.data, open_book=open_book, limit=p.passages if open_book else p.questions)
    return triviaqa.triviaqa(model, asked, source=question_source(p.data, open_book))


def measure(subject: Subject, scores: Scores, p: DepthChapter) -> Results:
    """Perplexity of every method at every count, all in one tree; TriviaQA and a text of the thesis's
    configurations."""
    found = perplexity.perplexities(
        subject, evaluation_text(p.data), plans_of(subject.depth, scores), length=p.length, limit=p.windows
    )
    small, trivia = pruned(subject, scores), {}
    for open_book in (False, True):
        for k, model in tqdm(small.items(), desc="trivia", unit="model", disable=None, leave=False):
            trivia[k, open_book] = answers(model, p, open_book)
    return Results(
        scores, found, trivia, {k: p.prompt + complete(model, p.prompt, p.tokens).text for k, model in small.items()}
    )


def parts(subject: Subject, p: DepthChapter, count: int = 2) -> pd.DataFrame:
    """The `count` whole blocks, attentions and MLPs of lowest Taylor score removed, or as many as can go."""
    rows, count = [], min(count, unprotected(subject.depth))
    ids = calibration_windows(subject.tokenizer, "wikipedia", p.data, p.calibration, p.length)
    free = range(Depth.protect_first, subject.depth - Depth.protect_last)
    for part, scores in taylor_of_parts(subject, ids, free).items():
        lost = removed_parts(subject).get(part, [])
        lowest = sorted(sorted((b for b in free if b not in lost), key=scores.__getitem__)[:count])
        small = remove(subject, lowest, part)
        m = perplexity.perplexity(small, evaluation_text(p.data), length=p.length, limit=p.windows)
        gone = ", ".join(map(str, lowest))
        rows.append(
            {
                "removed": f"{count} x {part}",
                "of blocks": gone,
                "parameters, M": f"{small.parameters / 1e6:.1f}",
                "perplexity": number(m),
            }
        )
    return pd.DataFrame(rows).set_index("removed")


# ---------------------------------------------------------------- what the chapter shows


def importance_table(scores: Scores) -> pd.DataFrame:
    """Blocks by metrics."""
    return pd.DataFrame(scores.metrics).rename_axis("block")


def rank_correlations(scores: Scores) -> pd.DataFrame:
    """Spearman's rank correlation between metrics, over all blocks."""
    table = importance_table(scores)
    return pd.DataFrame(
        spearmanr(table).statistic if table.shape[1] > 2 else table.corr("spearman").to_numpy(),
        table.columns,
        table.columns,
    )


def curves(results: Results) -> pd.DataFrame:
    """One row a (method, blocks removed, base): perplexity as a ratio to the whole model's, and to that of one-shot
    perplexity at the same count, each with its interval; random seeds stay apart."""
    rows = []
    for (method, k), m in results.perplexity.items():
        ratio = perplexity.relative(m, results.dense)
        rows.append((method, k, NOTHING, ratio.value, ratio.low, ratio.high))
    for k in sorted({k for method, k in results.perplexity if method == ONE_SHOT}):
        for method, c in against(results, k).items():
            rows.append((method, k, ONE_SHOT, *np.exp([c.difference, c.low, c.high])))
    return pd.DataFrame(rows, columns=["method", "removed", "base", "value", "low", "high"])


def against(results: Results, k: int, method: str = ONE_SHOT) -> dict[str, Comparison]:
    """Loss of every other method against `method` at k blocks removed, paired by document, Holm-adjusted."""
    others = [m for m, at in results.perplexity if at == k and m != method]
    return holm_adjusted(
        {m: perplexity.compare(results.perplexity[method, k], results.perplexity[m, k]) for m in others}
    )


def thesis_table(results: Results) -> pd.DataFrame:
    """D2, D4, D6, D8 by perplexity: ours beside the thesis's own subject."""
    rows = []
    for k in sorted({k for k, _ in results.trivia}):
        ppl, theirs = results.quoted(k), thesis_row(label_of(k))
        ratio = perplexity.relative(ppl, results.quoted(0))
        rows.append(
            {
                "configuration": label_of(k),
                "blocks removed": ", ".join(map(str, results.scores.removed[results.scores.main][k])) if k else "none",
                "x dense": number(ratio, ".3g") if k else "1",
                "thesis: x dense": f"{theirs.perplexity / thesis_row('dense').perplexity:,.2f}",
                "perplexity": number(ppl),
                "windows": ppl.n,
                "closed book": share(results.trivia[k, False]),
                "open book": share(results.trivia[k, True]),
                "thesis: perplexity": f"{theirs.perplexity:,.2f}",
                "thesis: closed, open": f"{theirs.closed:.1f} %, {theirs.open:.1f} %",
            }
        )
    return pd.DataFrame(rows).set_index("configuration")


def deterministic(results: Results, k: int) -> dict[str, Comparison]:
    """`against` one-shot perplexity, random removals left out."""
    return {m: c for m, c in against(results, k).items() if not m.startswith(RANDOM)}


def same_blocks(results: Results, method: str, k: int) -> bool:
    """Whether a method removes the same k blocks as one-shot perplexity."""
    removed = results.scores.removed
    return {*removed[method][k]} == {*removed[ONE_SHOT][k]}


def methods_table(results: Results, counts: Sequence[int] = (2, 4, 8)) -> pd.DataFrame:
    """Methods by blocks removed: one-shot perplexity as a ratio to the whole model, the others as ratios to it."""
    counts = [k for k in counts if (ONE_SHOT, k) in results.perplexity]
    columns: dict[str, dict[str, str]] = {}
    for k in counts:
        whole = perplexity.relative(results.perplexity[ONE_SHOT, k], results.dense)
        column = {"one-shot perplexity, times dense": number(whole, ".3g")}
        seeds = []
        for method, c in against(results, k).items():
            value, low, high = np.exp([c.difference, c.low, c.high])
            if method.startswith(RANDOM):
                seeds.append(value)
            else:
                column[method] = "same blocks" if same_blocks(results, method, k) else interval(value, low, high, ".2f")
        if seeds:
            low, high = (written(x, ",.3g") for x in (min(seeds), max(seeds)))
            column[f"{RANDOM}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"] = (
                f"{low} to {high}" if len(seeds) > 1 else low
            )
        columns[label_of(k)] = column
    return pd.DataFrame(columns).fillna("").rename_axis("method")


def verdict(results: Results, k: int) -> str:
    """Which methods do better and worse than one-shot perplexity at k blocks, in a sentence."""
    tests = {m: c for m, c in deterministic(results, k).items() if not same_blocks(results, m, k)}
    same = [m for m in deterministic(results, k) if m not in tests]
    better, worse, undecided = by_verdict(tests).values()

    def named(methods: Sequence[str]) -> str:
        ordered = sorted(methods, key=lambda m: tests[m].difference)
        return together(f"{METHODS.get(m, m)} ({percent_more(tests[m])})" for m in ordered)

    parts = [
        f"{named(better)} {'is' if len(better) == 1 else 'are'} better than one-shot perplexity" if better else "",
        f"{named(worse)} {'is' if len(worse) == 1 else 'are'} worse" + ("" if better else " than one-shot perplexity")
        if worse
        else "",
        f"{together(METHODS.get(m, m) for m in same)} {'removes' if len(same) == 1 else 'remove'} the same blocks"
        if same
        else "",
        f"for {together(f'{METHODS.get(m, m)} ({factor(tests[m])}, {p_value(tests[m].p)})' for m in undecided)} the "
        "difference may be chance"
        if undecided
        else "",
    ]
    return f"With {k} blocks removed, {'; '.join(filter(None, parts))}."


def one_shot_sentence(results: Results, counts: Sequence[int] = ch02_stability.COUNTS) -> str:
    """Why later chapters use one-shot perplexity although greedy may be better."""
    said = []
    for k in counts:
        c, same = against(results, k)[GREEDY], same_blocks(results, GREEDY, k)
        said.append(f"at D{k} {'both choose the same blocks' if same else f'it ends at {factor(c)} ({p_value(c.p)})'}")
    last = max(k for method, k in results.perplexity if method == GREEDY and k in THESIS)
    return (
        "Later chapters keep to one-shot perplexity, the thesis's choice, so that D2 means one model in the whole "
        f"book. With few blocks gone greedy perplexity would gain nothing that can be measured: {together(said)}. With "
        f"{last} blocks gone it would be the one to take ({factor(against(results, last)[GREEDY])})."
    )


def scorings_sentence(results: Results) -> str:
    """What the thesis's two blocks cost in closed-book answers, under the thesis's rule and under an equal length."""
    k = min(k for k, _ in results.trivia if k)
    own = {0: results.trivia[0, False], k: results.trivia[k, False]}
    again = scored_again()
    first = {at: again.get((m.id, AT_ONCE.metric)) for at, m in own.items()}
    said = f"D{k} keeps {own[k].value / own[0].value:.0%} of the dense model's answers by the thesis's rule"
    if all(first.values()):
        said += f", {first[k].value / first[0].value:.0%} where every answer is cut at {FIRST_WORDS} words"
    return said + "."


def adding_up_sentence(results: Results) -> str:
    """What the two blocks of D2 cost alone and together."""
    alone = {gone[1][0]: results.perplexity[method, 1] for method, gone in results.scores.removed.items()}
    cost = {b: perplexity.relative(alone[b], results.dense).value for b in results.scores.removed[ONE_SHOT][2]}
    both = perplexity.relative(results.perplexity[ONE_SHOT, 2], results.dense)
    product = np.prod(list(cost.values()))
    return (
        f"Alone, {together(f'block {b} costs {times(x)}' for b, x in cost.items())}. If their losses in nats a token "
        f"added up, both would cost {' x '.join(f'{x:.2f}' for x in cost.values())} = {product:.2f} times. Measured: "
        f"{number(both, '.2f')}. The second to go costs {'more' if both.value > product else 'less'} than it did alone."
    )


def chance_sentence(results: Results, counts: Sequence[int] = (2, 4, 8)) -> str:
    """How far random removals end above one-shot perplexity's."""
    said = []
    for k in counts:
        ratios = [np.exp(c.difference) for m, c in against(results, k).items() if m.startswith(RANDOM)]
        said.append(f"{times(np.exp(np.mean(np.log(ratios))))} at {k} blocks (the luckiest {times(min(ratios))})")
    return (
        f"Against one-shot perplexity, {len(ratios)} random removals end on average at {together(said)}. A score that "
        "does no better than the luckiest of a few draws has told little."
    )


def single_weights_sentence(results: Results) -> str:
    """D2 beside a model that lost about as many weights one by one."""
    other = largest(results.pool, WIKITEXT, ["W1:16"])["W1:16"]
    ratios = [perplexity.relative(m, results.quoted(0)).value for m in (results.quoted(2), other)]
    depth = len(results.scores.metrics[ONE_SHOT])
    return (
        f"D2 lacks {2 / depth:.1%} of the blocks' weights and costs {times(ratios[0])}; W1:16 has {1 / 16:.1%} of them "
        f"at zero and costs x {ratios[1]:.3f}. Single weights are far cheaper in perplexity, but what is left of a "
        "block still has to be computed: only a whole block's absence makes every device faster."
    )


def best(results: Results, k: int) -> str:
    """The method with the lowest perplexity at k blocks removed."""
    return min(
        (m for m, at in results.perplexity if at == k and not m.startswith(RANDOM)),
        key=lambda m: results.perplexity[m, k].value,
    )


def ranks_caption(scores: Scores) -> str:
    """What the ranks of blocks 0 and of D2 show, in a sentence."""
    ranks = importance_table(scores).rank().astype(int)
    depth, gone = len(ranks), sorted(scores.removed[ONE_SHOT][2])
    blamed = together(f"{m} {ranks.loc[0, m]}" for m in ranks if ranks.loc[0, m] < depth)
    most = ranks.loc[gone].max(axis=None)
    return (
        f"Scores agree on the middle: all of them have blocks {together(map(str, gone))}, which D2 lacks, among the "
        f"{most} least important of {depth}. They disagree on block 0, the most important one by most scores "
        f"(rank {depth}) but not by all ({blamed})."
    )


def _protocol(results: Results) -> str:
    """What the chapter's numbers were measured on."""
    whole = [label_of(k) for k in (0, *THESIS) if results.quoted(k).n == results.quoted(0).n]
    dense, trivia = results.quoted(0), results.trivia
    return (
        f"Perplexity on {dense.task}, windows of {dense.settings['length']} tokens: {dense.n} of them for "
        f"{together(whole)}, {results.dense.n} for methods against each other. TriviaQA: {trivia[0, False].n:,} "
        f"questions with the book closed, {trivia[0, True].n:,} with it open. The dense model's perplexity is "
        f"{number(dense)}.{sample_note(results.perplexity.values())}"
    )


def _answer(results: Results) -> str:
    """The chapter's answer, in two sentences."""
    depth = len(results.scores.metrics[ONE_SHOT])
    cost = {k: perplexity.relative(results.quoted(k), results.quoted(0)).value for k in (2, 4)}
    theirs = {k: thesis_row(f"D{k}").perplexity / thesis_row("dense").perplexity for k in cost}
    firm = [str(k) for k in cost if not by_verdict(deterministic(results, k))["better"]]
    other = best(results, 8)
    lower = -np.expm1(against(results, 8)[other].difference)
    return (
        f"Without the 2 of {depth} blocks that cost least, perplexity is {cost[2]:.2f} times the dense model's, "
        f"without 4 {cost[4]:.2f} times (the thesis's model, of 16 blocks: {theirs[2]:.2f} and {theirs[4]:.2f} times). "
        "No score chooses better than the thesis's, one-shot perplexity, at "
        f"{together(firm) if firm else 'no number of'} blocks; at 8, {METHODS.get(other, other)} ends {lower:.0%} "
        "lower."
    )


def _short(results: Results) -> str:
    """The answer in about ten words."""
    two, eight = (perplexity.relative(results.quoted(k), results.quoted(0)).value for k in (2, 8))
    depth = len(results.scores.metrics[ONE_SHOT])
    return f"2 of {depth} blocks cost {times(two)} in perplexity, 8 cost {times(eight)}."


OPENING = Opening(
    question="Which blocks can a language model do without, what does each cost, and how are they best chosen?",
    answer=_answer,
    short=_short,
    protocol=_protocol,
    learn="To score blocks in five ways, to remove some from a running model, and to tell a firm choice from chance.",
)


def headline(results: Results) -> str:
    """What chapter 2 found, in sentences: the fold "All findings in one place"."""
    dense, counts = results.quoted(0), [k for k in THESIS if ("perplexity", k) in results.perplexity]
    ours = {k: results.quoted(k) for k in counts}
    grow = ", ".join(
        f"{times(perplexity.relative(m, dense).value)} with D{k} ({m.value:.3g}"
        f"{'' if m.n == dense.n else f' on {m.n} windows'})"
        for k, m in ours.items()
    )
    theirs = ", ".join(times(thesis_row(f"D{k}").perplexity / thesis_row("dense").perplexity) for k in counts)
    correlation = rank_correlations(results.scores)["perplexity"].drop("perplexity")
    near, far = correlation.idxmax(), correlation.idxmin()
    last, trivia = counts[-1], results.trivia
    depth = len(results.scores.metrics["perplexity"])
    return in_markdown(
        f"Removing the blocks whose removal costs least multiplies perplexity on {dense.task} "
        f"({number(dense, '.3g')}, {dense.n} windows) by {grow.removeprefix('x ').replace(', x ', ', ')}; "
        f"the thesis's subject, which has 16 blocks and not {depth}, lost more: {theirs}. Of the other scores "
        f"{near} ranks blocks most like perplexity "
        f"does (rank correlation {correlation[near]:.2f}), {far} least ({correlation[far]:.2f}). "
        f"{verdict(results, last)} Closed-book TriviaQA goes "
        f"from {share(trivia[0, False])} to {share(trivia[2, False])} at D2 and {share(trivia[last, False])} at "
        f"D{last}.{sample_note(results.perplexity.values())}"
    )


# ---------------------------------------------------------------- recorded runs


def as_measurements(results: Results) -> list[Measurement]:
    """All of them, each naming its method, its count and its removed blocks."""
    out = [_named(m, method=method, removed=k) for (method, k), m in results.perplexity.items()]
    return out + [
        _named(m, method="perplexity", removed=k, text=results.texts[k]) for (k, _), m in results.trivia.items()
    ]


def _named(m: Measurement, **names) -> Measurement:
    return m.with_provenance(chapter=names)


def stages_of(m: Measurement, depth: int) -> list[Depth]:
    """The stage that made a row's subject of one with `depth` blocks. It removes blocks by number."""
    gone = tuple(sorted(set(range(depth)) - set(m.provenance["plan"] or range(depth))))
    return [Depth(blocks=gone, windows=DEPTH_WINDOWS)] if gone else []


def from_measurements(measurements: Sequence[Measurement], scores: Scores) -> Results:
    """The results that `as_measurements` gave.

    Raises:
        BadInput: the whole model's perplexity, or all answers, are missing.
    """
    ppl = {(m.chapter["method"], m.chapter["removed"]): m for m in measurements if m.metric == "perplexity"}
    answers = [m for m in measurements if m.metric == "accuracy"]
    if (NOTHING, 0) not in ppl or not answers:
        raise BadInput(
            "these are not the results of chapter 2: the whole model's perplexity or the answers are missing"
        )
    trivia = {(m.chapter["removed"], m.open_book): m for m in answers}
    return Results(scores, ppl, trivia, {m.chapter["removed"]: m.chapter["text"] for m in answers})


def read_recorded(path: Path) -> Results:
    """A recorded run: PATH.jsonl and, beside it, the scores."""
    rows = on_one_sample(
        Store(path).rows().values(), lambda m: (m.metric, m.open_book, m.chapter["removed"], m.chapter["method"])
    )
    own = from_measurements(list(rows.values()), Scores.from_json(read_json(_scores_file(path))))
    pool = recorded_pool(path.parent)
    trivia = {(k, is_open): quoted(m, k, OPEN if is_open else CLOSED, pool) for (k, is_open), m in own.trivia.items()}
    return dataclasses.replace(own, trivia=trivia, pool=pool)


def _scores_file(path: Path) -> Path:
    return _beside(path, "scores")


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name.removesuffix('.jsonl')}_{what}.json")


def recorded_parts(p: DepthChapter, file: Path) -> Iterator[Part]:
    """Two parts: all rows, which follow from the scores in a file beside the record, and a second file, of the
    choice's stability."""
    counts = p.possible(shape(p.subject).depth)
    methods = [*p.metrics, *(f"{RANDOM} {seed}" for seed in range(p.seeds))]
    removed = [
        (NOTHING, 0),
        *((method, k) for method in methods for k in counts),
        *((GREEDY, k) for k in counts if k <= p.greedy),
    ]
    rows: dict[Key, int | None] = {(label_of(k), "perplexity", method): p.windows for method, k in removed}
    asked = [0, *(k for k in THESIS if k in counts)]
    rows |= {
        (label_of(k), task, "perplexity"): n for task, n in ((CLOSED, p.questions), (OPEN, p.passages)) for k in asked
    }

    def make(missing: Collection[Key], keep: Keep) -> None:
        subject = load_subject(p.subject, p.dtype, p.device)
        if not (beside := _scores_file(file)).exists():
            write_whole(beside, score(subject, p).to_json())
        scores = Scores.from_json(read_json(beside))
        plans = {
            (m, k): plan
            for (m, k), plan in plans_of(subject.depth, scores).items()
            if (label_of(k), "perplexity", m) in missing
        }
        for some in neighbours(plans):
            for (method, k), m in perplexity.perplexities(
                subject, evaluation_text(p.data), some, length=p.length, limit=p.windows
            ).items():
                named = _named(m, method=method, removed=k)
                keep(described(named, subject, p.data, stages_of(named, subject.depth)))
        for k, model in pruned(subject, scores).items():
            text = ""
            for open_book, task in ((False, CLOSED), (True, OPEN)):
                if (label_of(k), task, "perplexity") in missing:
                    text = text or p.prompt + complete(model, p.prompt, p.tokens).text
                    named = _named(answers(model, p, open_book), method="perplexity", removed=k, text=text)
                    keep(described(named, subject, p.data, stages_of(named, subject.depth)))

    yield Part("all", rows, make, _scores_file(file))
    if p.stability:
        beside = _beside(file, "stability")
        yield Part(
            "stability",
            {},
            lambda *_: ch02_stability.record(
                load_subject(p.subject, p.dtype, p.device), p.data, p.stability, p.length, beside
            ),
            beside,
        )


def label_of(removed: int) -> str:
    """The label of a model without so many blocks."""
    return f"D{removed}" if removed else DENSE


def key(m: Measurement) -> Key:
    """Label, task, and the method that chose the blocks."""
    task = m.metric if m.metric == "perplexity" else book(m)
    return m.label, task, m.chapter["method"]


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """The dense model, and those whose blocks perplexity chose."""
    for m in rows:
        if (note := m.chapter)["method"] in ("perplexity", NOTHING):
            yield label_of(note["removed"]), WIKITEXT if m.metric == "perplexity" else book(m), m


CHAPTER = Chapter(
    "02_depth_pruning",
    "depth pruning",
    DepthChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    reads=("06_evaluation",),
    claims=for_claims,
    opening=OPENING,
    recorded={
        "calibration": 8,
        "stability": 48,
        "windows": None,
        "greedy": 12,
        "counts": [1, 2, 3, 4, 5, 6, 7, 8, 10, 12],
        "seeds": 3,
        "questions": 200,
        "passages": 64,
        "tokens": 40,
    },
)
