"""Chapter 2, depth pruning: how each metric ranks the blocks, and what their removal costs, in tables and words."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from thesislib.chapters import ch02_stability
from thesislib.chapters.ch02_runs import (
    GREEDY,
    NOTHING,
    ONE_SHOT,
    RANDOM,
    THESIS,
    DepthChapter,
    Results,
    Scores,
    for_claims,
    key,
    label_of,
    read_recorded,
    recorded_parts,
)
from thesislib.chapters.chapter import WIKITEXT, Chapter, Opening
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
from thesislib.chapters.pool import larger, largest
from thesislib.chapters.scorings import scored_again
from thesislib.chapters.thesis import thesis_row
from thesislib.evaluate import perplexity
from thesislib.evaluate.answers import AT_ONCE, FIRST_WORDS
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted
from thesislib.records.measurement import in_markdown

METHODS = {ONE_SHOT: "one-shot perplexity", GREEDY: "greedy perplexity", "taylor": "Taylor"}  # in sentences


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
