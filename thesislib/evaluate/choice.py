"""Multiple choice: the share of items whose right ending has the highest log-probability, and the data sets of
`thesislib.sources.choices` as tasks."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from thesislib.errors import BadInput
from thesislib.evaluate.harness import CUT, Stock, lm_eval_task
from thesislib.evaluate.perplexity import AS_IT_IS, K, with_plan
from thesislib.evaluate.task import Answers, Options, compare_answers, share_correct, share_with_interval
from thesislib.model.endings import logprobs, margin, picked
from thesislib.model.forward import Plan
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.choices.choice_set import ChoiceSet, part_of
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import Row, take

# for each score the other one, and the other one's name in an item's outcome
OTHER = {"acc_norm": ("acc", "correct_unnormalised"), "acc": ("acc_norm", "correct_normalised")}


def multiple_choice(
    subject: Subject, items: list[Choice], *, task: str, metric: str = "acc_norm", batch: int | None = None
) -> Measurement:
    """Share of items whose right ending has the highest log-probability.

    `extra` has the score that is not `metric`; `extra["contexts cut"]` counts the items whose context was cut from the
    left, because it is longer than the model's.

    Args:
        subject: the model and tokenizer.
        items: the questions.
        task: the task's name, for the record.
        metric: acc_norm, by log-probability per character of an ending, or acc, by log-probability.
        batch: sequences at a time, by default 8 on a CPU and as many as fill a card. It changes rounding only.

    Raises:
        BadInput: no items; a context or an ending without tokens, or with a token outside the model's embedding; an
            ending longer than the model's context.
    """
    return multiple_choices(subject, items, {AS_IT_IS: None}, task=task, metric=metric, batch=batch)[AS_IT_IS]


def multiple_choices(
    subject: Subject,
    items: list[Choice],
    plans: Mapping[K, Plan | None],
    *,
    task: str,
    metric: str = "acc_norm",
    batch: int | None = None,
) -> dict[K, Measurement]:
    """`multiple_choice` of the subject under every plan. Beginnings that plans share run once."""
    started, names = time.perf_counter(), list(plans)
    orders = None if plans[names[0]] is None else [plans[name] for name in names]
    scores, cut = logprobs(subject, items, orders, batch=batch, title=task)
    facts = provenance(subject, started, task=task, n=len(items), protocol="0-shot, packed endings")
    return {
        name: _measurement(task, metric, items, scores[k], cut, with_plan(facts, plans[name]))
        for k, name in enumerate(names)
    }


def _measurement(
    task: str, metric: str, items: list[Choice], scores: list[np.ndarray], cut: int, facts: dict
) -> Measurement:
    """The measurement of items whose endings have these log-probabilities; `cut` of them had their context cut."""
    other, key = OTHER[metric]
    outcomes: list[dict[str, Any]] = []
    for item, of_endings in zip(items, scores, strict=True):
        hit = {name: picked(item, of_endings, name) == item.label for name in OTHER}
        rounded = [round(float(x), 4) for x in of_endings]
        sure = {"right": rounded[item.label]}  # what has less noise than whether it is picked, see compress.relevance
        if len(item.endings) > 1:
            sure["margin"] = round(float(margin(item, of_endings, metric)), 4)
        outcomes.append({"id": item.id, "logprobs": rounded, "correct": hit[metric], key: hit[other], **sure})
    extra = {other: share_with_interval(sum(o[key] for o in outcomes), len(items)), CUT: cut}
    return share_correct(task, metric, "item", outcomes, extra, facts)


compare = compare_answers


class MultipleChoice(Answers):
    """A data set of `thesislib.sources.choices` as a task. It is measured by lm-evaluation-harness, or, with the option
    `fast`, by `multiple_choice` with the same scores.

    Args:
        questions: the data set.
    """

    in_parts = True

    def __init__(self, questions: ChoiceSet):
        self.questions = questions
        self.name, self.metric = questions.name, questions.metric

    def check(self, options: Options) -> None:
        """See `Task.check`."""
        super().check(options)
        part_of([], options.part)
        if options.fast and not self.questions.one_context:
            raise BadInput(
                f"task '{self.name}' has no fast way, which wants one context before all endings: leave out --fast "
                "(in a grid, fast: true)"
            )

    def items(self, data: str, options: Options) -> list[Choice] | list[Row]:
        """Choices for `multiple_choice`, or rows for the harness, which words them itself. All are checked."""
        every = self.questions.items(data) if options.fast else self.questions.rows(data)
        return take(part_of(every, options.part), options.limit, options.seed)

    def sha256(self, items: list, options: Options) -> str | None:
        """See `Task.sha256`."""
        return super().sha256(items, options) if options.fast else None

    def measure(self, subject: Subject, items: list, options: Options) -> Measurement:
        """See `multiple_choice` and `thesislib.evaluate.harness.lm_eval_task`. `extra["chance"]` is the score of
        guessing."""
        of = self.questions
        if options.fast:
            m = multiple_choice(subject, items, task=self.name, metric=self.metric, batch=options.batch)
        else:
            stock, rows_of_it = Stock(self.name, of.stock, self.metric), [of.stock_row(row) for row in items]
            limit, seed, batch = options.limit, options.seed, options.batch or 8
            m = lm_eval_task(subject, stock, rows_of_it, limit=limit, seed=seed, batch=batch)
            items = [of.item(i, row) for i, row in enumerate(items)]
        return replace(m, extra={**m.extra, "chance": self.chance(items)})

    def chance(self, items: list[Choice]) -> float:
        """See `thesislib.sources.choices.choice_set.ChoiceSet.chance`."""
        return self.questions.chance(items)

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """See `Task.options_of`."""
        name = m.task.lower().partition(" ")[0].replace("-", "_")
        packed = "packed" in m.settings.get("protocol", "")
        return {"limit": m.n, "fast": True} if packed and name == self.name else None
