"""Chapter 4: what it measures on a tiny model, that a run killed goes on, and that its sentences turn with the numbers."""

import dataclasses
import json
import random

import pytest

from thesislib import corpus
from thesislib.chapters import lora
from thesislib.chapters.lora import CLOSED, OPEN, PPL, Configuration, LoraChapter
from thesislib.errors import BadInput
from thesislib.experiment import again
from thesislib.store import Store

WORDS = ["alpha", "beta", "gamma", "delta", "of", "the", "and"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training, calibration and evaluation data, small."""
    root, r = tmp_path_factory.mktemp("text"), random.Random(0)
    prose = {half: [row for i in range(20) for row in (f" = {half} {i} = \n", " ".join(r.choices(WORDS, k=60)) + "\n")] for half in ("Train", "Test")}
    answer = {"value": "number", "aliases": ["number"]}
    tables = {
        "wikitext_train": [{"text": t} for t in prose["Train"]],
        "wikitext": [{"text": t} for t in prose["Test"]],
        "calibration_wikipedia": [{"text": " ".join(r.choices(WORDS, k=300)) + "."} for i in range(30)],
        "calibration_c4": [{"text": " ".join(r.choices(WORDS, k=300)) + "."} for i in range(30)],
        "trivia_train": [{"question": f"What is {i}?", "answer": {"value": f"number {i % 7}"}} for i in range(200)],
        "trivia": [{"question_id": str(i), "question": f"Who is {i}?", "answer": answer} for i in range(4)],
        "trivia_open": [
            {"question_id": str(i), "question": f"Who is {i}?", "answer": answer, "ctxs": [{"text": "Of a number.", "has_answer": True}]} for i in range(4)
        ],
    }
    for task, rows in tables.items():
        path = root / f"{corpus.TASKS[task].folder}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


@pytest.fixture(scope="module")
def small(tiny, data, tmp_path_factory):
    """Parameters, with a cache of their own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("THESISLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tiny(layers=8).save(tmp_path_factory.mktemp("subject") / "tiny")
    yield LoraChapter(
        subject=str(folder), data=data, dtype="float32", pruned=["D1", "W2:4"], texts=["wikitext", "trivia"], steps=4, batch=2, length=64, rank=2, validation=2,
        every=2, seeds=2, windows=4, questions=2, passages=2, tokens=4, learning_rate=1e-2,
    )  # fmt: skip
    patch.undo()


@pytest.fixture(scope="module")
def measured(small):
    found = []
    results = lora.measure([*lora.configurations(small), *lora.order_experiment(small, "D1", "W1:8")], small, found=found.append)
    return results, found


def test_everything_is_measured_once(small, measured):
    results, found = measured
    assert len(found) == len(results)
    labels = {(c.label, c.seed) for c, what in results if what == PPL}
    assert labels == {
        *((x, 0) for x in ("dense", "D1", "W2:4", "D1+W", "W2:4+W", "dense+W", "D1+T", "W2:4+T", "dense+T", "D1+W+W1:8", "D1+T+W1:8")),
        *((f"W2:4+{x}-{way}", 0) for x in "WT" for way in ("masked", "dense")),
        ("D1+W", 1),
    }  # fmt: skip
    assert {what for c, what in results if c == Configuration("D1", "wikitext")} == {PPL, CLOSED, OPEN}
    assert {what for c, what in results if c.seed == 1} == {PPL}
    assert results[Configuration("D1", "wikitext"), PPL].value != results[Configuration("D1", "wikitext", seed=1), PPL].value
    beside, masked, dense = (results[Configuration("W2:4", "wikitext", merge=way), PPL] for way in ("beside", "masked", "dense"))
    assert len({beside.value, masked.value, dense.value}) == 3
    assert masked.provenance["made"]["bytes"]["nonzero_parameters"] < dense.provenance["made"]["bytes"]["nonzero_parameters"]
    assert dense.value == pytest.approx(beside.value, rel=1e-5)  # float32: the same sum, added otherwise


def test_a_run_goes_on_where_it_was(small, measured):
    results, found = measured
    some = lora.from_measurements(found[:7])
    later = []
    configs = [c for c in dict.fromkeys(c for c, _ in results) if c.merge == "beside"]
    assert lora.measure(configs[:4], small, some, later.append).keys() >= some.keys()
    assert not {(c, w) for c, w in lora.from_measurements(later)} & set(some)


def test_records_come_back_and_can_be_made_again(small, measured, data, tmp_path):
    results, found = measured
    store = Store(tmp_path / "r.jsonl")
    for m in found:
        store.append(m)
    assert dict(lora.read_recorded(store.path)) == results
    for key in ((Configuration("W2:4", "wikitext", merge="masked"), PPL), (Configuration("D1", "trivia", after="W1:8"), PPL), (Configuration("dense"), CLOSED)):
        verdict = again(results[key], small.subject, data)
        assert verdict.agrees and verdict.same_bits and verdict.same_subject, (key, str(verdict))


def test_what_the_chapter_refuses():
    for settings, message in (
        ({"texts": ["wiki"]}, "unknown training text 'wiki': did you mean 'wikitext'"),
        ({"pruned": ["X2"]}, "part 'X2' is not understood"),
        ({"pruned": []}, "at least one"),
        ({"steps": 0}, "steps"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ):
        with pytest.raises(BadInput, match=message):
            LoraChapter(**settings)
    with pytest.raises(BadInput, match="not the results of chapter 4"):
        lora.from_measurements([dataclasses.replace(_any(), provenance={"chapter": {}})])


def _any():
    from thesislib.records import Measurement

    return Measurement("t", "perplexity", 1.0, 1.0, 1.0, 1, "u", [])
