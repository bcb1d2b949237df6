"""A task: one measure of a subject, with what others need to know of it. Each task is a file in this folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from thesislib.config import check_seed, positive
from thesislib.errors import BadInput, shown
from thesislib.evaluate.stats import Comparison, paired_outcomes, proportion
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement

SHARE = "share"  # the unit of a number between 0 and 1 that is shown in percent


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a measurement. A task ignores those that it has no use for.

    Attributes:
        length: tokens in a window of running text.
        limit: how many windows, questions or items; None for all.
        prompt: the prompt of TriviaQA's questions; None for the subject's own.
        seed: of the choice of questions or items under a limit.
        fast: multiple choice by `thesislib.evaluate.choice` instead of lm-eval, with the same scores.
        batch: how many at a time; None for 32 questions and, on a CPU, 4 windows and 8 items (on a card as many as fill
            it). It changes rounding only.
        reference: a spec of the reference model, for a task of two models.
        part: the part of a multiple-choice task's items, see `thesislib.sources.choices.choice_set.part_of`; None for
            all.
    """

    length: int = 512
    limit: int | None = None
    prompt: str | None = None
    seed: int = 0
    fast: bool = False
    batch: int | None = None
    reference: str | None = None
    part: str | None = None

    def __post_init__(self):
        # a loop in negative steps measures nothing, and a loss of nothing is a perplexity of 1
        positive(batch=self.batch, limit=self.limit, length=self.length)
        check_seed(self.seed)


class Task:
    """One measure. A subclass with a `name` is a task; `thesislib.evaluate.setup` finds it by itself.

    Attributes:
        name: its name for `--on` and in a grid.
        metric: the name of its number in a measurement.
        unit: the unit of the number: `SHARE`, "nats a token", ...
        higher_is_better: whether a larger number is better.
        ratio: whether the difference in a `Comparison` is the logarithm of a ratio of two numbers.
        tolerance: how far the same measurement on another machine may lie from a record: "relative" or "absolute", and
            the bounds for a model in float32, for one in 16 bits, and for one that was trained.
        two_models: whether it compares a subject with a reference model.
        in_parts: whether its items are split in parts, see `Options.part`.
    """

    name: str
    metric: str
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    ratio: ClassVar[bool] = False
    tolerance: ClassVar[tuple[str, tuple[float, float, float]]]
    two_models: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False

    def check(self, options: Options) -> None:
        """Raises BadInput for options that this task cannot work with; asked before a model is loaded."""
        if options.part is not None and not self.in_parts:
            raise BadInput(
                f"task '{self.name}' has no parts, 'part' {shown(options.part)} would do nothing: leave it out"
            )
        if self.two_models and options.reference is None:
            raise BadInput(
                f"task '{self.name}' holds a subject against another, which is not said: expected a reference, "
                "such as --reference embedded"
            )
        if not self.two_models and options.reference is not None:
            raise BadInput(
                f"task '{self.name}' measures one model, the reference {shown(options.reference)} would do "
                "nothing: leave it out"
            )

    def items(self, data: str, options: Options) -> Any:
        """The text, or the list of questions or items, that a data spec has for this task.

        Raises:
            BadInput: the data have none.
        """
        raise NotImplementedError

    def sha256(self, items: Any, options: Options) -> str | None:
        """The sha256 over all items; None where the ids in a record tell which items they were."""
        return sha256_of_items(items)

    def measure(self, subject: Subject, items: Any, options: Options) -> Measurement:
        """The measurement of a subject on items.

        Raises:
            BadInput: whatever the measure refuses.
        """
        raise NotImplementedError

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """The paired test of b against a that suits this measure, on the same items.

        Raises:
            BadInput: the two were measured on different items.
        """
        raise NotImplementedError

    def chance(self, items: Any) -> float | None:
        """The score of guessing on these items; None for a task without answers to guess."""
        return None

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """The options of a measurement of this task whose record holds no setup, since it was made before or without
        one; None for another task's measurement."""
        return None


class Answers(Task):
    """A task whose items are answered right or wrong. Its number is the share of right ones; two measurements are
    compared by the exact McNemar test."""

    unit = SHARE
    higher_is_better = True
    tolerance = ("absolute", (0.005, 0.02, 0.04))

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """See `Task.compare`."""
        return compare_answers(a, b)


def compare_answers(a: Measurement, b: Measurement) -> Comparison:
    """Exact McNemar test of b's right answers against a's.

    Raises:
        BadInput: the two were measured on different items.
    """
    return paired_outcomes(*a.paired_with(b, "correct"))


def share_with_interval(count: int, n: int) -> dict[str, float]:
    """The share count / n with its 95 % interval, as `Measurement.extra` holds it: value, low, high."""
    low, high = proportion(count, n)
    return {"value": count / n, "low": low, "high": high}


def share_correct(
    task: str, metric: str, unit: str, items: list[dict[str, Any]], extra: Mapping[str, Any], provenance: dict
) -> Measurement:
    """The measurement of answers that are right or wrong: the share of the items whose "correct" is true."""
    n, right = len(items), sum(item["correct"] for item in items)
    low, high = proportion(right, n)
    return Measurement(
        task=task,
        metric=metric,
        value=right / n,
        low=low,
        high=high,
        n=n,
        unit=unit,
        items=items,
        extra=dict(extra),
        provenance=provenance,
    )


def sha256_of_items(items: Sequence) -> str:
    """The sha256 over questions or choices with all their fields, in order."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items], ensure_ascii=False).encode()).hexdigest()
