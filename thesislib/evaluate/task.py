"""What a task is: one measure of a subject, which answers whatever others ask of it. A task is a file in this
folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from thesislib.config import check_seed, positive
from thesislib.errors import BadInput, shown
from thesislib.evaluate.stats import Comparison, paired_outcomes
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement

SHARE = "share"  # the unit of what is a part of 1, and shown in percent


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a task can be told; one that has no use for an option ignores it.

    Attributes:
        length: tokens in a window of running text.
        limit: windows, questions or items, None for all.
        prompt: of trivia, None for the subject's own.
        seed: of the choice of questions or items under a limit.
        fast: multiple choice with shared contexts instead of lm-eval, with the same scores.
        batch: at a time, None for 32 questions and, on a CPU, 4 windows and 8 items (on a card as many as fill it);
            rounding apart, it changes nothing.
        reference: a spec of the subject that another is held against, for a task of two models.
    """

    length: int = 512
    limit: int | None = None
    prompt: str | None = None
    seed: int = 0
    fast: bool = False
    batch: int | None = None
    reference: str | None = None

    def __post_init__(self):
        # a loop in negative steps measures nothing, and a loss of nothing is a perplexity of 1
        positive(batch=self.batch, limit=self.limit, length=self.length)
        check_seed(self.seed)


class Task:
    """One measure. A subclass with a `name` is a task; `thesislib.evaluate.setup` finds it by itself.

    Attributes:
        name: what `--on` and a grid call it.
        metric: what its measurements call their number.
        unit: what the number is in: `SHARE`, "nats a token", ...
        higher_is_better: which way is better.
        ratio: whether the difference of a comparison is the logarithm of a ratio of two numbers.
        tolerance: "relative" or "absolute", and how far the same measurement may lie from a record on another machine:
            of a model in float32, in 16 bits, and of one that was trained.
        two_models: whether it holds a subject against a reference.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool]
    ratio: ClassVar[bool] = False
    tolerance: ClassVar[tuple[str, tuple[float, float, float]]]
    two_models: ClassVar[bool] = False

    def check(self, options: Options) -> None:
        """Raises BadInput for options that this task cannot work with; asked before a model is loaded."""
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
        """What is measured on, out of a data spec: a text, or a list of questions or items.

        Raises:
            BadInput: data that lack it.
        """
        raise NotImplementedError

    def sha256(self, items: Any, options: Options) -> str | None:
        """Of the items with everything in them; None where the ids in a record name them."""
        return sha256_of_items(items)

    def measure(self, subject: Subject, items: Any, options: Options) -> Measurement:
        """The measurement of a subject on items.

        Raises:
            BadInput: whatever the measure refuses.
        """
        raise NotImplementedError

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """Of b against a, on the same items: the paired test that the measure calls for.

        Raises:
            BadInput: they are not of the same items.
        """
        raise NotImplementedError

    def chance(self, items: Any) -> float | None:
        """What guessing gets on items; None where nothing can be guessed."""
        return None

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """The options of a measurement of this task that was made directly and does not say its setup; None for any
        other."""
        return None


class Answers(Task):
    """A task whose items are right or wrong: the number is the share of the right ones, and a pair is tested by
    McNemar's test, exactly."""

    unit = SHARE
    higher_is_better = True
    tolerance = ("absolute", (0.005, 0.02, 0.04))

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """See `Task.compare`."""
        return compare_answers(a, b)


def compare_answers(a: Measurement, b: Measurement) -> Comparison:
    """Exact McNemar test of b's right answers against a's.

    Raises:
        BadInput: they are not of the same items.
    """
    return paired_outcomes(*a.paired_with(b, "correct"))


def sha256_of_items(items: Sequence) -> str:
    """Over questions or choices with everything in them, in order."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items], ensure_ascii=False).encode()).hexdigest()
