"""The recorded run of chapter 8 on a tiny subject: its rows, what a row says against the task itself, and what each
ranking removes."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from tests.fakes import choice_data
from thesislib.chapters import ch08_runs, ch08_scores
from thesislib.chapters.ch08_record import read_recorded
from thesislib.chapters.ch08_runs import (
    ALL,
    NOTEBOOK,
    PERPLEXITY,
    RANKINGS,
    TASKS,
    Relevance,
    chosen,
    free,
    key,
    leave_one_out_plans,
    outcomes_of,
    recorded_parts,
)
from thesislib.chapters.ch08_scores import Scores
from thesislib.compress.depth import Depth
from thesislib.compress.relevance import Outcomes, choices, outcomes
from thesislib.errors import BadInput
from thesislib.evaluate.perplexity import perplexity
from thesislib.evaluate.setup import Setup, setup_of
from thesislib.model.blocks import remove
from thesislib.model.endings import scores
from thesislib.pipeline.recipe import Shape
from thesislib.records.store import Store
from thesislib.sources.choices.found import SETS
from thesislib.sources.corpus import evaluation_text

DEPTH, ITEMS = 9, 4


def made(parts):
    """The names of those parts that the run made."""
    left = ("winogrande", "arc_challenge", "healed")  # trainings begin from a spec, see test_ch08_relevance
    return [name for name in parts if not name.endswith("choose") and not name.startswith(left)]


def picked(subject, task, data):
    """Which ending of each item a subject picks."""
    m = Setup(task, fast=True).measure(subject, data)
    logprobs = dict(zip(m.column("id"), m.column("logprobs"), strict=True))
    items = SETS[task].items(data)
    return [int(scores(item, np.array([logprobs[item.id]]), SETS[task].metric).argmax()) for item in items]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Subject, parameters, file and parts of a run; the parts of items to choose by, ARC's challenge set and WinoGrande
    were not made."""
    with pytest.MonkeyPatch.context() as patch:
        subject = tiny(layers=DEPTH)
        patch.setattr(ch08_runs, "load_subject", lambda *_: subject)
        patch.setattr(ch08_runs, "shape", lambda _: Shape(DEPTH, {}))
        patch.setattr(ch08_scores, "SIZES", (2, ITEMS))
        data = choice_data(tmp_path_factory.mktemp("any"))
        # a random subject guesses, and then nothing is relevant: so what it answers is right
        labels = {task: picked(subject, task, data) for task in TASKS}
        data = choice_data(tmp_path_factory.mktemp("data"), labels=labels)
        p = Relevance(data=data, items=ITEMS, windows=3, length=24, counts=(2,))
        file = tmp_path_factory.mktemp("run") / f"{NOTEBOOK}.jsonl"
        parts = {part.name: part for part in recorded_parts(p, file)}
        for name in made(parts):
            parts[name].make(parts[name].rows, Store(file).append)
        yield subject, p, file, parts


def test_rows_are_of_the_model_without_each_block(run):
    subject, p, file, parts = run
    rows = {key(m): m for m in Store(file).rows().values()}
    part = parts["piqa report"]
    assert {*part.rows} <= {*rows} and len(part.rows) == len(leave_one_out_plans(DEPTH)) == 1 + DEPTH
    for name in part.rows:
        m = rows[name]
        assert setup_of(m) == Setup("piqa", limit=ITEMS, fast=True, part="report") and m.extra["chance"] == 0.5
        gone = {*range(DEPTH)} - {*m.provenance["plan"]}
        alone = setup_of(m).measure(remove(subject, gone) if gone else subject, p.data)
        assert alone.column("correct") == m.column("correct") and alone.column("id") == m.column("id")
        for one, other in zip(alone.column("logprobs"), m.column("logprobs"), strict=True):
            assert one == pytest.approx(other, abs=1e-3)


def test_every_row_has_the_key_of_its_part(run):
    _, _, file, parts = run
    rows = [key(m) for m in Store(file).rows().values()]
    wanted = [k for name in made(parts) for k in parts[name].rows]
    assert sorted(rows) == sorted(wanted) and len({*rows}) == len(rows)
    assert ("plan 0-8", "boolq", "", "") in rows and ("D2", PERPLEXITY, "", "last") in rows


def test_what_is_read_are_the_outcomes_of_the_same_items(run):
    subject, p, file, _ = run
    record = read_recorded(file)
    assert {*record.outcomes} == {(task, part) for task in TASKS for part in ("rank", "report")}
    assert record.depth == DEPTH and record.middle == [4, 5, 6] and [*record.left_out] == ["boolq"]
    for task in TASKS:
        found = record.outcomes[task, "rank"]
        alone = outcomes(subject, choices(task, p.data, ITEMS), range(DEPTH))
        assert (found.correct == alone.correct).all() and found.chance == pytest.approx(alone.chance)
        assert found.likelihood == pytest.approx(alone.likelihood, abs=1e-3)
        assert found.margin == pytest.approx(alone.margin, abs=1e-3) and np.isnan(found.kl).all()
        whole = record.whole(task, "rank")
        assert whole.column("correct") == [bool(x) for x in alone.correct[0]]


def test_sets_are_measured_without_the_blocks_that_each_ranking_chooses(run):
    subject, p, file, _ = run
    record = read_recorded(file)
    for name in RANKINGS:
        m = record.rows["D2", "piqa", "report", name]
        blocks = m.chapter["removed"]
        assert blocks == [*chosen(name, 2, record.scores, record.outcomes)] and {*blocks} <= {4, 5, 6}
        assert m.provenance["plan"] == [b for b in range(DEPTH) if b not in blocks]
        assert m.stages[0]["depth"]["blocks"] == blocks
        alone = setup_of(m).measure(remove(subject, blocks), p.data)
        assert alone.column("id") == m.column("id")
        assert alone.column("right") == pytest.approx(m.column("right"), abs=1e-3)
    text = record.rows["D2", PERPLEXITY, "", "cosine"]
    alone = perplexity(remove(subject, text.chapter["removed"]), evaluation_text(p.data), length=p.length)
    assert text.value == pytest.approx(alone.value, rel=1e-4)


def test_no_sets_before_what_they_are_chosen_by(run, tmp_path):
    _, p, file, _ = run
    early = tmp_path / file.name
    for m in Store(file).rows().values():
        if key(m)[1:3] != ("piqa", "rank"):
            Store(early).append(m)
    beside = f"{NOTEBOOK}_scores.json"
    (tmp_path / beside).write_bytes(file.with_name(beside).read_bytes())
    part = next(part for part in recorded_parts(p, early) if part.name == "sets")
    with pytest.raises(BadInput, match="no ranking by piqa yet"):
        part.make(part.rows, lambda _: None)


def test_a_part_without_one_of_its_models_has_no_outcomes(run):
    _, _, file, _ = run
    rows = [m for m in Store(file).rows().values() if key(m)[1:3] == ("piqa", "rank")]
    assert len(rows) == 1 + DEPTH and [*outcomes_of(rows)] == [("piqa", "rank")]
    for i in range(len(rows)):  # the whole model is one of them
        assert outcomes_of(rows[:i] + rows[i + 1 :]) == {}
    (found,), (turned,) = outcomes_of(rows).values(), outcomes_of(rows[::-1]).values()
    assert (found.likelihood == turned.likelihood).all()


def test_rows_of_sets_are_no_outcomes(run):
    _, _, file, _ = run
    assert outcomes_of(m for m in Store(file).rows().values() if key(m)[3]) == {}


def test_a_larger_run_that_has_begun_changes_nothing_yet(run, tmp_path):
    _, p, file, _ = run
    larger = tmp_path / file.name
    larger.write_bytes(file.read_bytes())
    for name in (file.with_suffix(".items.gz").name, f"{NOTEBOOK}_scores.json"):
        (tmp_path / name).write_bytes(file.with_name(name).read_bytes())
    part = next(iter(recorded_parts(replace(p, items=ITEMS + 1), larger)))
    part.make([*part.rows][:3], Store(larger).append)
    assert len(Store(larger).rows()) == len(Store(file).rows()) + 3
    one, other = read_recorded(file).outcomes, read_recorded(larger).outcomes
    assert all((one[name].likelihood == other[name].likelihood).all() for name in one) and {*one} == {*other}


# ---------------------------------------------------------------- what each ranking removes

BLOCKS = 13  # of which 4 to 10 may go


def known(seed=0):
    """Scores, and outcomes of items to rank by, all random."""
    rng = np.random.default_rng(seed)
    names = ("influence", "entropy", "magnitude", "taylor")
    text = Outcomes(*(np.zeros((BLOCKS + 1, 2)) for _ in range(4)), np.zeros(2))
    runs = {n: rng.random(BLOCKS + 1 - n).tolist() for n in range(1, BLOCKS + 1)}
    of = {n: rng.random(BLOCKS).tolist() for n in names}
    by_text = Scores(of, {}, runs, rng.random((BLOCKS, 5)), text, {}, {}, {})
    found = {}
    for task in TASKS:
        correct, nats = rng.random((BLOCKS + 1, 40)) < 0.5, -rng.random((BLOCKS + 1, 40))
        correct[0] = True
        found[task, "rank"] = Outcomes(correct, nats, nats, nats * np.nan, np.full(40, 0.25))
    return by_text, found


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_blocks_that_go_have_the_lowest_scores(k):
    by_text, found = known()
    middle = [*range(4, 11)]
    assert free(BLOCKS) == middle

    def least(values):
        return tuple(sorted(sorted(middle, key=lambda b: values[b])[:k]))

    assert chosen("last", k, by_text, found) == tuple(middle[-k:])
    assert chosen("cosine", k, by_text, found) == least(by_text.scores["influence"])
    assert chosen("Taylor", k, by_text, found) == least(by_text.scores["taylor"])
    assert chosen("magnitude", k, by_text, found) == least(by_text.scores["magnitude"])
    assert chosen("perplexity", k, by_text, found) == least(by_text.losses.mean(1))
    together = [some for some in combinations(middle, k) if some[-1] - some[0] == k - 1]
    assert chosen("angular", k, by_text, found) == min(together, key=lambda some: by_text.runs[k][some[0]])
    for by in (ALL, *TASKS):
        several = [found[task, "rank"] for task in TASKS if by in (ALL, task)]
        nats = np.concatenate([o.likelihood for o in several], 1).mean(1)
        right = np.concatenate([o.correct for o in several], 1).mean(1)
        assert chosen(f"likelihood: {by}", k, by_text, found) == least(nats[0] - nats[1:])
        # of equal accuracy that with less of the log-probability lost; below guessing is guessing
        order = [(-max(a, 0.25), -x) for a, x in zip(right[1:], nats[1:], strict=True)]
        assert chosen(f"relevance: {by}", k, by_text, found) == least(order)


def test_blocks_at_the_ends_stay_however_little_they_matter():
    by_text, found = known()
    cosine = np.arange(BLOCKS, dtype=float)
    by_text.scores["influence"][:] = np.where((cosine < 4) | (cosine > 10), -1, cosine).tolist()
    assert chosen("cosine", 2, by_text, found) == (4, 5)


def test_a_model_that_guesses_ranks_nothing():
    by_text, found = known()
    one = found["piqa", "rank"]
    found["piqa", "rank"] = replace(one, correct=np.zeros_like(one.correct))
    with pytest.raises(BadInput, match="no ranking 'relevance: piqa'.*undefined"):
        chosen("relevance: piqa", 2, by_text, found)


# ---------------------------------------------------------------- parameters


def test_parameters_that_no_run_can_have():
    with pytest.raises(BadInput, match="winogrande"):
        Relevance(task="winogrande")
    with pytest.raises(BadInput, match=r"counts\[1\]"):
        Relevance(counts=(2, 0))
    Relevance(counts=(2, 4), healed=(2,)).check_shape(Shape(10, {}))
    with pytest.raises(BadInput, match="cannot remove 4 of 9 blocks"):
        Relevance(counts=(2, 4), healed=(2,)).check_shape(Shape(9, {}))
    with pytest.raises(BadInput, match="cannot remove 8 of 10 blocks"):
        Relevance(counts=(2,)).check_shape(Shape(10, {}))
    assert len(free(30)) == 30 - Depth.protect_first - Depth.protect_last
