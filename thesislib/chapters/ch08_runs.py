"""Chapter 8's recorded run: every item's outcome without each block, in three parts of each task's items, and without
the sets of blocks that each ranking chooses."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from thesislib.chapters import ch08_healing, ch08_scores
from thesislib.chapters.ch08_scores import Scores
from thesislib.chapters.chapter import Keep, Key, Parameters, Part, neighbours, shape
from thesislib.compress.depth import Depth
from thesislib.compress.franken import format_plan
from thesislib.compress.relevance import Outcomes, check_tasks, joined
from thesislib.config import positive
from thesislib.errors import BadInput
from thesislib.evaluate.choice import multiple_choices
from thesislib.evaluate.perplexity import perplexities
from thesislib.evaluate.setup import Setup
from thesislib.experiment import described
from thesislib.formats.load import load_subject
from thesislib.model.blocks import Plan, plan_without, plans_without_each
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources.choices.choice_set import PARTS
from thesislib.sources.corpus import evaluation_text

NOTEBOOK = "08_relevance"
TASKS = ("arc_easy", "piqa", "hellaswag")  # on which this subject is surely above chance
LEFT_OUT = ("boolq", "arc_challenge", "winogrande")  # on which it may not be: the whole model alone
ASKED = 1_000  # items of each of those, at most
COUNTS = (2, 4, 6, 8)  # blocks that are removed together
TRAINED = (4, 8)  # of these, after which it trains
BY_TEXT = ("cosine", "angular", "Taylor", "magnitude", "perplexity", "last")
ALL = "all"  # tasks, mixed
RANKINGS = (*BY_TEXT, *(f"{metric}: {task}" for metric in ("relevance", "likelihood") for task in (ALL, *TASKS)))
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Relevance(Parameters):
    """Parameters of chapter 8.

    Attributes:
        task: whose items this run ranks blocks by.
        items: of each part of each task.
        windows: of calibration text, for scores by text.
        length: tokens of a window.
        counts: how many blocks the recorded run removes together.
        healed: of these, after which it trains.
        steps: of such a training.
        seeds: of the recorded trainings.
    """

    task: str = "arc_easy"
    items: int = 24
    windows: int = 8
    length: int = 512
    counts: tuple | list = COUNTS
    healed: tuple | list = TRAINED
    steps: int = 48
    seeds: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_tasks([self.task])
        positive(**{f"{n}[{i}]": k for n in ("counts", "healed") for i, k in enumerate(getattr(self, n))})

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which so many blocks cannot be removed."""
        Depth(remove=max([*self.counts, *self.healed])).check(shape.depth)


# ---------------------------------------------------------------- what each ranking removes


def free(depth: int) -> list[int]:
    """The blocks that may go, as in chapter 2: neither the first four nor the last two."""
    return [*range(Depth.protect_first, depth - Depth.protect_last)]


def asked(outcomes: Mapping[tuple[str, str], Outcomes], task: str, part: str = PARTS[0]) -> Outcomes:
    """The outcomes of one task, or of all tasks mixed."""
    return joined([outcomes[t, part] for t in TASKS]) if task == ALL else outcomes[task, part]


def chosen(ranking: str, k: int, scores: Scores, outcomes: Mapping[tuple[str, str], Outcomes]) -> tuple[int, ...]:
    """The k blocks that a ranking removes, one of `RANKINGS`.

    Of the blocks that may go: the k with the least score; by angular distance the run of k with the least; "last" is
    the last k.
    """
    depth = len(scores.losses)
    may_go = free(depth)
    if ranking == "last":
        return tuple(may_go[-k:])
    if ranking == "angular":
        starts = range(may_go[0], may_go[-1] - k + 2)
        first = min(starts, key=lambda b: scores.runs[k][b])
        return tuple(range(first, first + k))
    if ": " in ranking:
        metric, task = ranking.split(": ")
        try:
            order = asked(outcomes, task).order(metric).tolist()
        except BadInput as error:
            raise BadInput(f"no ranking '{ranking}': {error}") from error
    else:
        order = np.argsort(of_text(ranking, scores), kind="stable").tolist()
    return tuple(sorted([b for b in order if b in may_go][:k]))


def of_text(ranking: str, scores: Scores) -> np.ndarray:
    """(blocks,) the scores of a ranking that asks no questions: cosine, Taylor, magnitude, entropy, perplexity or, of
    single blocks, angular."""
    if ranking == "perplexity":
        return scores.losses.mean(1)
    if ranking == "angular":
        return np.array(scores.runs[1])
    return np.array(scores.scores[{"cosine": "influence", "Taylor": "taylor"}.get(ranking, ranking)])


# ---------------------------------------------------------------- rows


def leave_one_out_plans(depth: int) -> dict[str, Plan]:
    """The whole model and the model without each block, by the label of a row."""
    return {f"plan {format_plan(plan)}": plan for plan in plans_without_each(depth)}


def recorded_parts(p: Relevance, file: Path) -> Iterator[Part]:
    """What is ranked on comes first, then the scores by text, then what is reported on; sets of blocks follow from the
    first two."""
    load = functools.cache(load_subject)
    beside = file.with_name(f"{NOTEBOOK}_scores.json")
    rank, choose, report = PARTS
    yield from _leave_one_out(p, rank, load)
    yield Part(
        "scores",
        {},
        lambda *_: ch08_scores.record(
            load(p.subject, p.dtype, p.device), p.data, TASKS, p.items, p.windows, p.length, beside
        ),
        beside,
    )
    yield from _leave_one_out(p, report, load)
    yield from (_left_out(p, task, load) for task in LEFT_OUT)
    yield _sets(p, file, load)
    yield from ch08_healing.parts(p, functools.partial(_chosen_in, file), TASKS, report)
    yield from _leave_one_out(p, choose, load)


def _leave_one_out(p: Relevance, part: str, load: Callable[..., Subject]) -> Iterator[Part]:
    """One part of each task's items, without each block in turn: one tree of plans."""
    plans = leave_one_out_plans(shape(p.subject).depth)

    def make(task: str, missing: Collection[Key], keep: Keep) -> None:
        subject, setup = load(p.subject, p.dtype, p.device), Setup(task, limit=p.items, fast=True, part=part)
        for some in neighbours({key: plans[key[0]] for key in missing}):
            for m in _answers(subject, setup, some, p.data).values():
                keep(described(m, subject, p.data, label=f"plan {format_plan(m.provenance['plan'])}"))

    for task in TASKS:
        rows = {(label, task, part, ""): p.items for label in plans}
        yield Part(f"{task} {part}", rows, functools.partial(make, task))


def _left_out(p: Relevance, task: str, load: Callable[..., Subject]) -> Part:
    """The whole model's answers to a task whose items rank no blocks."""
    whole = format_plan(plan_without(shape(p.subject).depth, ()))
    row = (f"plan {whole}", task, "", "")

    def make(_: Collection[Key], keep: Keep) -> None:
        subject = load(p.subject, p.dtype, p.device)
        m = Setup(task, limit=ASKED, fast=task != "winogrande").measure(subject, p.data)
        keep(described(m, subject, p.data, label=row[0]))

    return Part(task, {row: ASKED}, make)


def rankings(file: Path) -> tuple[Scores, dict[tuple[str, str], Outcomes]]:
    """What a record's sets of blocks are chosen by.

    Raises:
        BadInput: the record has not got so far.
    """
    outcomes = outcomes_of(Store(file).rows().values())
    if lacking := [task for task in TASKS if (task, PARTS[0]) not in outcomes]:
        raise BadInput(f"{file} has no ranking by {', '.join(lacking)} yet: another process is at it, run again")
    return ch08_scores.read(file.with_name(f"{NOTEBOOK}_scores.json")), outcomes


def _chosen_in(file: Path, ranking: str, k: int) -> tuple[int, ...]:
    return chosen(ranking, k, *rankings(file))


def _sets(p: Relevance, file: Path, load: Callable[..., Subject]) -> Part:
    """The part to report of each task, and the whole text, without the blocks that each ranking chooses."""
    report = PARTS[2]
    rows: dict[Key, int | None] = {
        (f"D{k}", task, report, ranking): p.items for k in p.counts for ranking in RANKINGS for task in TASKS
    }
    rows |= {(f"D{k}", PERPLEXITY, "", ranking): None for k in p.counts for ranking in RANKINGS}

    def make(missing: Collection[Key], keep: Keep) -> None:
        subject = load(p.subject, p.dtype, p.device)
        read = rankings(file)
        for task in dict.fromkeys(key[1] for key in missing):
            wanted: dict[tuple[int, ...], list[Key]] = {}
            for key in missing:
                if key[1] == task:
                    wanted.setdefault(chosen(key[3], int(key[0][1:]), *read), []).append(key)
            for some in neighbours({blocks: plan_without(subject.depth, blocks) for blocks in wanted}):
                if task == PERPLEXITY:
                    found = perplexities(subject, evaluation_text(p.data), some, length=p.length)
                else:
                    setup = Setup(task, limit=p.items, fast=True, part=report)
                    found = _answers(subject, setup, some, p.data)
                for blocks, m in found.items():
                    for key in wanted[blocks]:
                        named = m.with_provenance(chapter={"ranking": key[3], "removed": list(blocks)})
                        keep(described(named, subject, p.data, stages_of(named)))

    return Part("sets", rows, make)


def _answers(subject: Subject, setup: Setup, plans: Mapping, data: str) -> dict:
    items = setup.items(data)
    found = multiple_choices(subject, items, plans, task=setup.on, metric=setup.task.metric)
    facts = {"protocol": setup.plain(), "corpus_sha256": setup.task.sha256(items, setup)}
    return {
        name: replace(m, extra={**m.extra, "chance": setup.task.chance(items)}).with_provenance(**facts)
        for name, m in found.items()
    }


def stages_of(m: Measurement) -> list[Depth]:
    """What makes a row's subject; nothing of one that only has a plan."""
    return [Depth(blocks=m.chapter["removed"])] if m.chapter else []


def key(m: Measurement) -> Key:
    """Label, task, part of its items, the ranking that chose the blocks, and of a healed set the seed."""
    if ch08_healing.is_healed(m):
        task = PERPLEXITY if m.metric == PERPLEXITY else m.provenance["protocol"]["on"]
        part = m.provenance["protocol"].get("part") or ""
        return m.label, task, part, m.chapter["ranking"], m.chapter["seed"]
    if m.metric == PERPLEXITY:
        return m.label, PERPLEXITY, "", m.chapter["ranking"]
    protocol = m.provenance["protocol"]
    return m.label, protocol["on"], protocol.get("part") or "", m.chapter.get("ranking", "") if m.chapter else ""


# ---------------------------------------------------------------- read again


def outcomes_of(rows: Iterable[Measurement]) -> dict[tuple[str, str], Outcomes]:
    """{(task, part): outcomes} of those parts that have the whole model and the model without each block."""
    parts: dict[tuple[str, str], list[Measurement]] = {}
    for m in rows:
        _, task, part, ranking, *_ = key(m)
        if part and not ranking:
            parts.setdefault((task, part), []).append(m)
    found = {}
    for name, some in parts.items():
        whole = {*range(1 + max(b for m in some for b in m.provenance["plan"]))}
        without = {tuple(whole - {*m.provenance["plan"]}): m for m in some}
        order = [(), *((b,) for b in sorted(whole))]
        if {*without} == {*order}:
            found[name] = _outcomes([without[gone] for gone in order])
    return found


def _outcomes(rows: list[Measurement]) -> Outcomes:
    """Of the whole model, and of the model without each block; without the divergence, which no row has."""
    correct, margin, right = (np.array([m.column(c) for m in rows], float) for c in ("correct", "margin", "right"))
    return Outcomes(correct, margin, right, np.full(correct.shape, np.nan), np.full(rows[0].n, rows[0].extra["chance"]))
