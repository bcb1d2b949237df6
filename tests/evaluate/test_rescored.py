"""Recorded answers under further scorings: one row each, from the row that has the answers, and none twice."""

import itertools
import json
import shutil

import pytest
from typer.testing import CliRunner

from thesislib.chapters.scorings import FILE as ANSWERS_FILE
from thesislib.chapters.scorings import SCORINGS
from thesislib.cli import app
from thesislib.errors import BadInput
from thesislib.evaluate.rescored import ROLE, scored_rows
from thesislib.evaluate.setup import Setup
from thesislib.experiment import again, identity_of, prepare
from thesislib.formats.load import save_checkpoint
from thesislib.records.store import Store, study


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return str(save_checkpoint(tiny(layers=2), tmp_path_factory.mktemp("subject") / "tiny"))


@pytest.fixture
def store(folder, tiny_data, tmp_path):
    """Closed and open book, and a perplexity, which has no answers."""
    store = Store(tmp_path / "run.jsonl")
    ready = prepare(folder, [], data=str(tiny_data), dtype="float32")
    for setup in (Setup("trivia", limit=4), Setup("trivia_open", limit=3), Setup("wikitext", length=32, limit=2)):
        store.append(ready.measure(setup, str(tiny_data)))
    return store


def test_each_row_with_answers_gives_one_row_a_scoring(store, folder, tiny_data):
    rows = list(scored_rows([store], str(tiny_data)))
    answered = {name: m for name, m in store.rows().items() if m.metric == "accuracy"}
    assert {(m.provenance["origin"], m.metric) for m in rows} == {
        (name, metric) for name in answered for metric in ("exact match", "token F1", "accuracy in 8 words")
    }
    assert len(rows) == 6
    for m in rows:
        origin = answered[m.provenance["origin"]]
        assert m.column("id") == origin.column("id") and m.label == origin.label and m.n == origin.n
        # made again from its own record, by asking the model, it is the same
        assert again(m, folder, str(tiny_data)).same_bits
    assert len({identity_of(m) for m in [*rows, *answered.values()]}) == len(rows) + len(answered)


def test_rows_that_are_there_are_not_made_again(store, tiny_data, tmp_path):
    arguments = ["records", "score", "--store", str(store.path), "--data", str(tiny_data), "--out"]
    out = tmp_path / "answers.jsonl"
    assert "6 rows more" in CliRunner().invoke(app, [*arguments, str(out)]).output
    lines = out.read_text().splitlines()
    assert "0 rows more" in CliRunner().invoke(app, [*arguments, str(out)]).output
    out.write_text("\n".join(lines[:4]) + "\n")
    assert "2 rows more" in CliRunner().invoke(app, [*arguments, str(out)]).output
    assert {json.loads(line)["id"] for line in out.read_text().splitlines()} == {json.loads(x)["id"] for x in lines}


def test_answers_with_the_next_turn_glued_on_keep_only_what_reads_the_beginning(store, tiny_data, tmp_path, capsys):
    glued = Store(tmp_path / "glued.jsonl")
    for m in store.rows().values():
        if m.metric == "accuracy":
            for item in m.items:
                item["answer"] = "The Vietnam Warassistant"
            glued.append(m)
    rows = list(scored_rows([glued], str(tiny_data)))
    assert {m.metric for m in rows} == {"accuracy in 8 words"} and len(rows) == 2
    assert "control tokens are glued to its answers, no exact match" in capsys.readouterr().err


def test_other_questions_are_refused(store, tiny_data, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(tiny_data, other)
    for file in (other / "trivia_qa").rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("\n".join(json.dumps({**row, "question": "Why?"}) for row in rows))
    with pytest.raises(BadInput, match="was asked other questions than data"):
        list(scored_rows([store], str(other)))


def test_the_studys_answers_are_all_scored_and_from_rows_that_are_there():
    """By exact match as the origin's own tiers say, which were counted when the model was asked."""
    folder = study()
    answered = {
        name: m
        for file in folder.glob("0*.jsonl")
        for name, m in Store(file).rows().items()
        if m.metric == "accuracy" and m.items and "answer" in m.items[0]
    }
    scored = {(m.provenance["origin"], m.metric): m for m in Store(folder / ANSWERS_FILE).rows().values()}
    absent = set(itertools.product(answered, SCORINGS)) - set(scored)
    glued = {name for name, m in answered.items() if sum(bool(ROLE.search(a)) for a in m.column("answer")) > 0.01 * m.n}
    assert absent == set(itertools.product(glued, ("exact match", "token F1"))) and len(answered) > 100
    assert set(scored) <= set(itertools.product(answered, SCORINGS))
    for (origin, metric), m in scored.items():
        before = answered[origin]
        assert m.column("id") == before.column("id") and m.label == before.label
        if metric == "exact match":
            assert m.column("correct") == [tier == "exact" for tier in before.column("tier")], origin
        elif metric == "token F1":  # the whole answer is a name: nothing is missing and nothing too much
            scores = zip(m.column("score"), before.column("tier"), strict=True)
            assert all(score == 1 for score, tier in scores if tier == "exact"), origin
        else:
            assert m.value <= before.value, origin
