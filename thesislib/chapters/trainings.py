"""Models that were trained several times: how far the trainings of one model lie apart, and comparisons that know it.

A test over documents or questions asks whether two given models differ. A claim about training is about models that
were not trained yet too, so it has to stand out of how far trainings lie apart as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thesislib.chapters.labels import training
from thesislib.compress.stage import STAGES
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import task_of
from thesislib.evaluate.stats import Comparison, paired_means, with_spread
from thesislib.records.measurement import Measurement

Samples = Mapping[int, Sequence[Measurement]]  # rows of one model and one measure by number of items, one a training
Records = Mapping[tuple[str, str], Samples]  # by label and what was measured
OUTCOMES = ("nats", "correct", "score")  # an item's outcome, by task


@dataclass(frozen=True)
class Spread:
    """How far trainings of one model lie apart.

    Attributes:
        deviation: the standard deviation of one training, pooled over models; of perplexities' logarithms, or of
            shares.
        df: degrees of freedom: trainings less models.
    """

    deviation: float
    df: int


def collect(rows: Iterable[tuple[str, str, Measurement]]) -> dict[tuple[str, str], dict[int, list[Measurement]]]:
    """(label, measure, row) of every chapter as `Records`.

    Of a model that was not trained the first row stays. Of a trained one each training's first does: another seed, or
    the same seed on another kind of processor, which rounds otherwise.
    """
    records: dict[tuple[str, str], dict[int, list[Measurement]]] = {}
    for label, measure, m in rows:
        alike = records.setdefault((label, measure), {}).setdefault(m.n, [])
        if not alike or (training(label) and _made(m) not in map(_made, alike)):
            alike.append(m)
    return records


def _made(m: Measurement) -> tuple:
    """What tells a training from another one of the same model."""
    stages = ((STAGES.get(word), settings) for stage in m.stages for word, settings in stage.items())
    seeds = [settings.get("seed") for cls, settings in stages if cls and cls.family == "trained"]
    return *seeds, m.provenance.get("hardware", {}).get("accelerator")


def spread(records: Records, measure: str) -> Spread | None:
    """Of all models whose several trainings were measured, each on its largest sample; None if there is none."""
    squares, df = 0.0, 0
    for (label, task), samples in records.items():
        several = {n: ms for n, ms in samples.items() if len(ms) > 1}
        if task == measure and several and training(label):
            values = [_on_scale(m) for m in several[max(several)]]
            squares += float(np.var(values) * len(values))
            df += len(values) - 1
    return Spread(math.sqrt(squares / df), df) if df else None


def _on_scale(m: Measurement) -> float:
    return math.log(m.value) if task_of(m).ratio else m.value


def on_largest_sample(
    records: Records, first: str, second: str, measure: str
) -> tuple[Sequence[Measurement], Sequence[Measurement]] | None:
    """The rows of two models on the largest sample that both were measured on; None if there is none."""
    a, b = (records.get((label, measure), {}) for label in (first, second))
    both = a.keys() & b.keys()
    return (a[max(both)], b[max(both)]) if both else None


def compare_models(
    first: str, a: Sequence[Measurement], second: str, b: Sequence[Measurement], apart: Spread | None
) -> Comparison:
    """The second model against the first on the same items, over all trainings of each.

    Args:
        first, second: labels.
        a, b: one row a training; of an untrained model one row.
        apart: how far trainings lie apart. Without it trained models are not told apart: p is 1.
    """
    c = compare(a[0], b[0]) if len(a) == len(b) == 1 else means_compared(a, b)
    runs = [len(ms) for label, ms in ((first, a), (second, b)) if training(label)]
    if not runs:
        return c
    if apart is None:
        return replace(c, p=1.0)
    return with_spread(c, apart.deviation * math.sqrt(sum(1 / n for n in runs)), apart.df)


def means_compared(a: Sequence[Measurement], b: Sequence[Measurement]) -> Comparison:
    """Each item's mean over trainings, paired."""
    x, y = (_mean(ms) for ms in (a, b))
    if task_of(x).ratio:
        return compare(x, y)
    return paired_means(*x.paired_with(y, _outcome(x)))


def _outcome(m: Measurement) -> str:
    return next(field for field in OUTCOMES if field in m.items[0])


def _mean(ms: Sequence[Measurement]) -> Measurement:
    """The first row, with each item's outcome averaged over all rows."""
    field = _outcome(ms[0])
    values = np.mean([ms[0].paired_with(m, field)[1] for m in ms], axis=0).tolist()
    items = [{**item, field: value} for item, value in zip(ms[0].items, values, strict=True)]
    return replace(ms[0], items=items)
