"""Scorings of free answers: against the formulas written out, and what the length of an answer does to each."""

import re

import numpy as np
import pytest

from tests.fakes import accuracy
from thesislib.errors import BadInput
from thesislib.evaluate.answers import AT_ONCE, EXACT, F1, exact_match, first_words, score_again, tier, token_f1
from thesislib.evaluate.setup import TASKS, Setup
from thesislib.evaluate.stats import proportion

ALIASES = ("The Vietnam War", "Vietnam conflict")
RAMBLING = "It was the Vietnam War, which lasted from 1955 to 1975 and ended with the fall of Saigon."


def squad_f1(prediction, truth):
    """SQuAD's script, written out: words in common by multiplicity, precision and recall."""

    def words(text):
        text = re.sub(r"[^\w\s]", " ", text.lower())
        return [w for w in text.split() if w not in ("a", "an", "the")]

    said, right = words(prediction), words(truth)
    common = sum(min(said.count(w), right.count(w)) for w in set(said))
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(right)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    "answer",
    ["Vietnam War", "the vietnam war.", RAMBLING, "a war war war", "Vietnam", "", "no", "conflict Vietnam conflict"],
)
def test_f1_is_squads(answer):
    assert token_f1(answer, ALIASES) == pytest.approx(max(squad_f1(answer, alias) for alias in ALIASES))
    assert token_f1(answer, ()) == 0.0


def test_what_length_does_to_each_scoring():
    """The thesis's rule and the first words find the name in a long answer, exact match does not, F1 shrinks."""
    short = "Vietnam War"
    assert tier(short, ALIASES) == "exact" and tier(RAMBLING, ALIASES) == "substring"
    assert exact_match(short, ALIASES) and not exact_match(RAMBLING, ALIASES)
    assert token_f1(short, ALIASES) == 1 > token_f1(RAMBLING, ALIASES) > 0
    late = "I think that this was of course the well known Vietnam War"
    assert tier(late, ALIASES) and not AT_ONCE.of(late, ALIASES) and AT_ONCE.of(RAMBLING, ALIASES)


def test_the_first_words_end_with_the_first_line():
    assert first_words("\n one two\nthree") == "one two"
    assert first_words("1 2 3 4 5 6 7 8 9 10") == "1 2 3 4 5 6 7 8" and first_words("  \n ") == ""


def test_recorded_answers_are_scored_again():
    said = ["Paris", "Paris, the capital of France, on the Seine and not on the Rhine", "London", ""]
    items = [{"id": str(i), "answer": a, "tier": "", "correct": False} for i, a in enumerate(said)]
    m = accuracy(0.5, n=4, items=items)
    aliases = {str(i): ("Paris",) for i in range(9)}
    exact = score_again(m, aliases, EXACT)
    assert [item["correct"] for item in exact.items] == [True, False, False, False] and exact.value == 0.25
    assert (exact.low, exact.high) == proportion(1, 4) and exact.metric == "exact match" and exact.task == m.task
    assert exact.extra["words"]["value"] == np.mean([1, 13, 1, 0]) and exact.provenance == m.provenance
    f1 = score_again(m, aliases, F1)
    assert [item["score"] for item in f1.items] == [1.0, pytest.approx(squad_f1(said[1], "Paris")), 0.0, 0.0]
    assert f1.low < f1.value < f1.high and f1.value == pytest.approx(np.mean([i["score"] for i in f1.items]))
    assert score_again(m, aliases, AT_ONCE).value == 0.5
    with pytest.raises(BadInput, match="question '3' of .* is not among these data"):
        score_again(m, {str(i): ("x",) for i in range(3)}, EXACT)
    with pytest.raises(BadInput, match="has no answers in its items"):
        score_again(accuracy(0.5, n=4, items=[{"id": "0", "correct": True}]), aliases, EXACT)


@pytest.mark.parametrize("book", ["trivia", "trivia_open"])
def test_each_scoring_is_a_task(tiny, tiny_data, book):
    subject = tiny(layers=2)
    plain = Setup(book, limit=4).measure(subject, str(tiny_data))
    for scoring in ("exact", "f1", "at_once"):
        task = TASKS[f"{book}_{scoring}"]
        m = Setup(task.name, limit=4).measure(subject, str(tiny_data))
        assert m.metric == task.metric and m.provenance["protocol"]["on"] == task.name
        assert [i["answer"] for i in m.items] == [i["answer"] for i in plain.items]
        other = Setup(task.name, limit=4).measure(tiny(layers=2, seed=1), str(tiny_data))
        assert task.compare(m, m).difference == 0 and task.compare(m, other).n in (0, 4)
