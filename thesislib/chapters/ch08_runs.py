"""Chapter 8's recorded run: every item's outcome without each block, in three parts of each task's items."""

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from thesislib.chapters.chapter import Keep, Key, Parameters, Part, neighbours, shape
from thesislib.compress.franken import format_plan
from thesislib.compress.relevance import check_tasks
from thesislib.evaluate.choice import multiple_choices
from thesislib.evaluate.setup import Setup
from thesislib.experiment import described
from thesislib.formats.load import load_subject
from thesislib.model.blocks import Plan, plan_without
from thesislib.records.measurement import Measurement
from thesislib.sources.choices.choice_set import PARTS

NOTEBOOK = "08_relevance"
TASKS = ("arc_easy", "piqa", "hellaswag")  # on which this subject is surely above chance


@dataclass(frozen=True)
class Relevance(Parameters):
    """Parameters of chapter 8.

    Attributes:
        task: whose items this run ranks blocks by.
        items: of each part of each task.
        windows: of calibration text, for scores by text.
        length: tokens of a window.
    """

    task: str = "arc_easy"
    items: int = 24
    windows: int = 8
    length: int = 512

    def __post_init__(self):
        super().__post_init__()
        check_tasks([self.task])


def leave_one_out_plans(depth: int) -> dict[str, Plan]:
    """The whole model and the model without each block, by the label of a row."""
    plans = [plan_without(depth, some) for some in ((), *([b] for b in range(depth)))]
    return {f"plan {format_plan(plan)}": plan for plan in plans}


def recorded_parts(p: Relevance, file: Path) -> Iterator[Part]:
    """Each part of each task is one tree of plans; what is ranked on comes first."""
    load = functools.cache(load_subject)
    plans = leave_one_out_plans(shape(p.subject).depth)

    def make(task: str, part: str, missing: Collection[Key], keep: Keep) -> None:
        subject, setup = load(p.subject, p.dtype, p.device), Setup(task, limit=p.items, fast=True, part=part)
        items = setup.items(p.data)
        for some in neighbours({key: plans[key[0]] for key in missing}):
            for m in multiple_choices(subject, items, some, task=task, metric=setup.task.metric).values():
                m = replace(m, extra={**m.extra, "chance": setup.task.chance(items)})
                m = m.with_provenance(protocol=setup.plain(), corpus_sha256=setup.task.sha256(items, setup))
                keep(described(m, subject, p.data, label=f"plan {format_plan(m.provenance['plan'])}"))

    for part in PARTS:
        for task in TASKS:
            rows = {(label, task, part): p.items for label in plans}
            yield Part(f"{task} {part}", rows, functools.partial(make, task, part))


def key(m: Measurement) -> Key:
    """Label, task and part of its items."""
    return m.label, m.task, m.provenance["protocol"]["part"]
