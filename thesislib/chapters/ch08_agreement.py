"""Chapter 8's questions 1 to 3: how far rankings agree with what other items lose, whether they depend on the task, and
how much of them is noise."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from thesislib.chapters.ch08_record import Record
from thesislib.chapters.ch08_runs import ALL, BY_TEXT, TASKS, asked, of_text
from thesislib.compress.agreement import (
    Agreement,
    Curse,
    Settled,
    agreement,
    resampled_means,
    settling,
    variance_of_items,
    variance_of_z,
    winners_curse,
)
from thesislib.compress.relevance import Outcomes
from thesislib.evaluate.stats import Comparison, Ranking, friedman, signed_rank
from thesislib.sources.choices.choice_set import PARTS

RANK, _, REPORT = PARTS
LEAST = 8  # blocks that go, of those that rankings are compared by
RESAMPLES = 2_000
ASKING = ("relevance", "margin", "likelihood")
TEXT_ONLY = (*(name for name in BY_TEXT if name != "last"), "entropy", "KL")
SEEDS = {RANK: 0, REPORT: 1, "text": 2}  # of resamples: outcomes of other items are drawn by themselves


def lost(of: Outcomes, metric: str) -> np.ndarray:
    """(blocks, N) what is lost of each item without each block: whether it is right (relevance), the right ending's
    margin or log-probability."""
    values = np.asarray(of.correct if metric == "relevance" else getattr(of, metric), float)
    return values[0] - values[1:]


def reference(record: Record, task: str, metric: str = "likelihood") -> np.ndarray:
    """(1 + resamples, blocks) mean loss of the items to report."""
    return resampled_means(lost(asked(record.outcomes, task, REPORT), metric), RESAMPLES, SEEDS[REPORT])


def scores_of(record: Record, name: str, task: str) -> np.ndarray:
    """(1 + resamples, blocks) the scores of blocks by a ranking: of `TEXT_ONLY`, "cosine of the task's text", or of
    `ASKING` on the task's items to rank by."""
    if name in ASKING:
        return resampled_means(lost(asked(record.outcomes, task), name), RESAMPLES, SEEDS[RANK])
    if name == "cosine of the task's text":
        texts = [record.scores.cosine[t] for t in (TASKS if task == ALL else (task,))]
        return resampled_means(np.concatenate(texts).T, RESAMPLES, SEEDS["text"])
    if name == "perplexity":
        return resampled_means(record.scores.losses, RESAMPLES, SEEDS["text"])
    if name == "KL":
        return resampled_means(record.scores.text.kl[1:], RESAMPLES, SEEDS["text"])
    return np.broadcast_to(of_text(name, record.scores), (1 + RESAMPLES, record.depth))


def agreements(record: Record, task: str, blocks: Sequence[int], metric: str = "likelihood") -> dict[str, Agreement]:
    """Each ranking of some blocks against what a task's other items lose without them."""
    true, names = reference(record, task, metric)[:, blocks], [*TEXT_ONLY, "cosine of the task's text", *ASKING]
    return {name: agreement(scores_of(record, name, task)[:, blocks], true, min(LEAST, len(blocks))) for name in names}


# ---------------------------------------------------------------- tasks


class Dependence(NamedTuple):
    """How much the standing of blocks differs between tasks.

    Args:
        variance: (blocks,) of z-scores over tasks, see `variance_of_z`.
        noise: (blocks,) what the choice of items alone gives, mean over tasks, see `variance_of_items`.
        order: Friedman's test over blocks, tasks as its items.
    """

    variance: np.ndarray
    noise: np.ndarray
    order: Ranking


def dependence(record: Record, metric: str, blocks: Sequence[int]) -> Dependence:
    """Of relevance, margin or likelihood on all items that there are, or of the cosine score on the tasks' texts."""
    items = {
        task: record.scores.cosine[task].T
        if metric == "cosine"
        else np.concatenate([lost(record.outcomes[task, part], metric) for part in (RANK, REPORT)], 1)
        for task in TASKS
    }
    scores = {task: values[blocks] for task, values in items.items()}
    noise = [variance_of_items(resampled_means(values, RESAMPLES, SEEDS[RANK])) for values in scores.values()]
    means = np.array([values.mean(1) for values in scores.values()])
    order = friedman({str(b): means[:, i].tolist() for i, b in enumerate(blocks)})
    return Dependence(variance_of_z(means), np.mean(noise, 0), order)


def against_cosine(record: Record, metric: str, blocks: Sequence[int], corrected: bool = False) -> Comparison:
    """Over blocks, whether the standing by a metric differs more between tasks than by cosine; corrected: less what
    noise alone gives."""
    a, b = (dependence(record, name, blocks) for name in ("cosine", metric))
    less = [d.variance - d.noise if corrected else d.variance for d in (a, b)]
    return signed_rank(*(x.tolist() for x in less))


# ---------------------------------------------------------------- noise


def settled(record: Record, task: str, metric: str, blocks: Sequence[int]) -> dict[int, Settled]:
    """{items: how a ranking by so many agrees with what the other items lose}: with log-probability, which has the
    least noise."""
    values = lost(asked(record.outcomes, task), metric)[blocks]
    n = values.shape[1]
    sizes = [*(2**i for i in range(3, 20) if 2**i < n), n]
    return settling(values, reference(record, task)[0, blocks], min(LEAST, len(blocks)), sizes, draws=400)


def curse(record: Record, task: str, blocks: Sequence[int], metric: str = "relevance") -> Curse:
    """Of the blocks without which the items to rank by are answered better than by the whole model, what is left on the
    items to report."""
    first, others = (lost(asked(record.outcomes, task, part), metric)[blocks] for part in (RANK, REPORT))
    return winners_curse(first, others)
