"""What became of the claims of arXiv 2605.14075 on this subject."""

from thesislib.chapters import ch08_sets, ch08_theorem
from thesislib.chapters.ch08_agreement import against_cosine, agreements, curse, dependence
from thesislib.chapters.ch08_record import Record
from thesislib.chapters.ch08_runs import ALL, NOTEBOOK, TASKS
from thesislib.chapters.paper_claims import PaperClaim
from thesislib.chapters.phrases import UNDECIDED, decided, interval, p_value, points

PAPER = "[Layer relevance](https://arxiv.org/abs/2605.14075)"
MODERATE = 0.5  # a rank correlation below it is read as weak or moderate


def claims(record: Record) -> list[PaperClaim]:
    """Each claim with its verdict."""
    return [
        _theorem(),
        _weak(record),
        _task(record),
        *(_better(record, k) for k in ch08_sets.counts(record)[-1:]),
        _negative(record),
    ]


def _theorem() -> PaperClaim:
    cases = [ch08_theorem.measured(eps) for eps in ch08_theorem.EVERY_EPS]
    built = all(c.cosine[1] == min(c.cosine) and c.accuracy[0] == 1 and c.accuracy[2] == 0 for c in cases)
    return PaperClaim(
        PAPER,
        "for any eps there is a model whose middle block has the lowest cosine score, eps, and decides every answer.",
        "",
        decided(built, not built),
        ch08_theorem.sentence(cases),
        (NOTEBOOK, "two-scores-in-ten-lines"),
    )


def _weak(record: Record) -> PaperClaim:
    rankings = agreements(record, ALL, record.middle, "relevance")
    found, itself = rankings["cosine"].spearman, rankings["relevance"].spearman.value
    # noise of the accuracy lowers every correlation with it: divided by the root of its agreement with itself
    low, high = (x / itself**0.5 for x in (found.low, found.high)) if itself > 0 else (-1, 1)
    return PaperClaim(
        PAPER,
        f"cosine and the accuracy that is lost agree weakly or moderately (read here as: a rank correlation below "
        f"{MODERATE}, over blocks that are not at the ends, on other items, corrected for the noise of the accuracy).",
        "Pearson's .46, .23 and .15 on three models, 28 blocks",
        decided(high < MODERATE, low > MODERATE),
        f"Spearman's {interval(*found, '.2f')}, where accuracy agrees with itself on other items at {itself:.2f}; "
        f"without that noise between {low:.2f} and {min(high, 1):.2f} (Spearman 1904; the noise counts as known).",
        (NOTEBOOK, "does-cosine-say-what-a-block-is-worth"),
    )


def _task(record: Record) -> PaperClaim:
    plain, less = (against_cosine(record, "relevance", record.middle, corrected) for corrected in (False, True))
    d = dependence(record, "relevance", record.middle)
    return PaperClaim(
        PAPER,
        "relevance depends on the task more than cosine does (variance of z-scores over tasks, Wilcoxon over blocks; "
        "judged less what the choice of items alone gives).",
        "",
        decided(less.told and less.difference > 0, less.told and less.difference < 0),
        f"Variance {d.variance.mean():.2f}, {d.noise.mean():.2f} of it by items alone: against cosine "
        f"{p_value(plain.p)} as the paper tests it, {p_value(less.p)} less noise.",
        (NOTEBOOK, "does-it-depend-on-the-task"),
    )


def _better(record: Record, k: int) -> PaperClaim:
    tests = ch08_sets.against(record, k, "cosine")
    c = tests.get(f"relevance: {ALL}")
    word = UNDECIDED if c is None else decided(c.told and c.difference > 0, c.told and c.difference < 0)
    return PaperClaim(
        PAPER,
        f"removing the blocks of least relevance keeps more accuracy than removing those of least cosine score (read "
        f"here as: {k} blocks, ranked once, all tasks mixed, other items).",
        "67.5 % against 59.5 %, 8 of 32 blocks of Llama-3-8B, greedy, calibrated on each task's training set",
        word,
        "Both remove the same blocks." if c is None else f"{points(c)} ({p_value(c.p)}, n = {c.n}).",
        (NOTEBOOK, "removing-several-blocks"),
    )


def _negative(record: Record) -> PaperClaim:
    found = {task: curse(record, task, record.middle) for task in TASKS}
    n, still = (sum(x) for x in zip(*((len(c.blocks), c.still) for c in found.values()), strict=True))
    surely = [task for task, c in found.items() if len(c.blocks) and c.kept.high < 0]
    return PaperClaim(
        PAPER,
        "some blocks do harm: without them more answers are right (read here as: on other items too, all such blocks "
        "of a task together).",
        "Mistral's block 23 on MathInstruct +25 %; above dense on BoolQ and WinoGrande",
        decided(bool(surely), n > 0 and all(c.kept.low > 0 for c in found.values() if len(c.blocks))),
        f"{n} such blocks on the items that were ranked by; {still} of them on others"
        + (f", surely on {', '.join(surely)}." if surely else ", on no task surely.")
        if n
        else "No such block on the items that were ranked by.",
        (NOTEBOOK, "does-any-block-do-harm"),
    )
