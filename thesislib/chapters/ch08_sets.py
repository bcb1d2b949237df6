"""Chapter 8's question 6: what is left of a model when several blocks go, chosen by each ranking."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from thesislib.chapters.ch08_record import Record
from thesislib.chapters.ch08_runs import ALL, PERPLEXITY, RANKINGS, TASKS
from thesislib.evaluate.stats import Comparison, holm_adjusted, paired_means, proportion
from thesislib.records.measurement import Measurement
from thesislib.sources.choices.choice_set import PARTS

REPORT = PARTS[2]


class Kept(NamedTuple):
    """What a model without some blocks answers of the items to report.

    Args:
        accuracy: the share of right answers, all tasks' items together, with its interval.
        low: its lower end.
        high: its upper end.
        n: items.
        blocks: that were removed.
    """

    accuracy: float
    low: float
    high: float
    n: int
    blocks: tuple[int, ...]


def measured(record: Record, k: int) -> list[str]:
    """The rankings whose k blocks were removed, with every task asked."""
    return [name for name in RANKINGS if all((f"D{k}", task, REPORT, name) in record.rows for task in TASKS)]


def counts(record: Record) -> list[int]:
    """How many blocks were removed, wherever two rankings can be compared."""
    every = sorted({int(label[1:]) for label, *_, name in record.rows if name})
    return [k for k in every if len(measured(record, k)) > 1]


def rows(record: Record, k: int, ranking: str, tasks: Sequence[str] = TASKS) -> list[Measurement]:
    """The answers without the k blocks that a ranking chooses; of 0 blocks the whole model's."""
    if k == 0:
        return [record.whole(task, REPORT) for task in tasks]
    return [record.rows[f"D{k}", task, REPORT, ranking] for task in tasks]


def kept(record: Record, k: int, ranking: str = "", tasks: Sequence[str] = TASKS) -> Kept:
    """See `Kept`."""
    found = rows(record, k, ranking, tasks)
    right, n = sum(sum(m.column("correct")) for m in found), sum(m.n for m in found)
    return Kept(right / n, *proportion(right, n), n, tuple(found[0].chapter.get("removed", ())))


def outcomes(record: Record, k: int, ranking: str, column: str, tasks: Sequence[str] = TASKS) -> np.ndarray:
    """(N,) an outcome of all items, task after task: correct, or right, the right ending's log-probability."""
    return np.concatenate([np.array(m.column(column), float) for m in rows(record, k, ranking, tasks)])


def against(record: Record, k: int, base: str, column: str = "correct") -> dict[str, Comparison]:
    """Every other ranking's k blocks against a base's, on the same items, Holm-adjusted. Where two choose the same
    blocks there is nothing to compare."""
    theirs = outcomes(record, k, base, column)
    blocks = kept(record, k, base).blocks
    return holm_adjusted(
        {
            name: paired_means(theirs.tolist(), outcomes(record, k, name, column).tolist())
            for name in measured(record, k)
            if kept(record, k, name).blocks != blocks
        }
    )


def own_and_other(record: Record, k: int, metric: str) -> tuple[float, float, float]:
    """Accuracy on a task's items without the k blocks that its own items rank least, those of another task, and those
    of all tasks mixed; means over tasks."""

    def mean(ranked_by: Sequence[tuple[str, str]]) -> float:
        return float(np.mean([kept(record, k, f"{metric}: {by}", [task]).accuracy for task, by in ranked_by]))

    own, other = [(t, t) for t in TASKS], [(t, by) for t in TASKS for by in TASKS if by != t]
    return mean(own), mean(other), mean([(t, ALL) for t in TASKS])


def perplexities(record: Record, k: int) -> dict[str, Measurement]:
    """{ranking: perplexity on the whole text} of those that were measured."""
    found = {name: record.rows.get((f"D{k}", PERPLEXITY, "", name)) for name in RANKINGS}
    return {name: m for name, m in found.items() if m is not None}
