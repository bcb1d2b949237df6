"""Protocols: the words of a record make the same measurement again, and what no protocol makes is refused."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from thesislib.errors import BadInput
from thesislib.evaluate import choice, perplexity, triviaqa
from thesislib.evaluate.task import CHOICES, TASKS, Protocol, protocol_of, sha256_of_items
from thesislib.files import ROOT
from thesislib.records.measurement import Measurement
from thesislib.sources import corpus

RECORDED = sorted((ROOT / "data" / "results").glob("0[0-3]_*.jsonl"))  # chapters that measure without protocols
PROTOCOLS = [
    Protocol("wikitext", length=32, limit=5),
    Protocol("trivia", limit=2, seed=3, batch=1),
    Protocol("trivia", prompt="thesis"),
    Protocol("trivia_open", limit=3),
    Protocol("hellaswag", limit=4, fast=True),
]


@pytest.fixture(scope="module")
def subject(tiny):
    return tiny(layers=2)


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """As `tiny_data`, with a multiple-choice task."""
    root = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(tiny_data, root)
    endings = ["stops.", "flies away with it.", "is.", "a"]
    rows = [{"ind": i, "activity_label": "Run", "ctx_a": f"He runs {i}.", "ctx_b": "he", "endings": endings, "label": str(i % 4)} for i in range(8)]
    write(root / "hellaswag" / "validation.jsonl", rows)
    return root


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def measurement(metric="m", task="t", **provenance):
    return Measurement(task=task, metric=metric, value=1.0, low=1.0, high=1.0, n=7, unit="u", items=[], provenance=provenance)


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_the_same_words_measure_the_same(subject, data, protocol):
    m = protocol.measure(subject, str(data))
    assert m.n == (protocol.limit or 4) and m.provenance["protocol"] == dataclasses.asdict(protocol)
    read_back = dataclasses.replace(m, provenance=json.loads(json.dumps(m.provenance)))
    assert protocol_of(read_back) == protocol
    again = protocol_of(read_back).measure(subject, str(data))
    assert (again.value, again.low, again.high, again.items, again.task, again.metric) == (m.value, m.low, m.high, m.items, m.task, m.metric)
    assert again.provenance["corpus_sha256"] == m.provenance["corpus_sha256"]


def test_each_word_counts(subject, data):
    def ids(**settings):
        return Protocol("hellaswag", fast=True, **settings).measure(subject, str(data)).column("id")

    assert len(ids()) == 8 and ids(limit=3) == ids(limit=5)[:3] and ids(limit=3, seed=1) != ids(limit=3) and ids(seed=1) == ids()
    one, other = (Protocol("wikitext", length=n, limit=4).measure(subject, str(data)) for n in (16, 32))
    assert [i["tokens"] for i in one.items + other.items] == [15] * 4 + [31] * 4
    prompts = {Protocol("trivia", prompt=p).measure(subject, str(data)).provenance["settings"]["prompt"] for p in ("chat", "thesis", None)}
    assert prompts == {"chat", "thesis"}
    batched = [Protocol("wikitext", length=32, limit=5, batch=b).measure(subject, str(data)).column("nats") for b in (1, 5)]
    assert batched[0] == pytest.approx(batched[1], rel=1e-5)


def test_the_text_is_named_by_its_hash(subject, data, tmp_path):
    m = Protocol("wikitext", length=32, limit=2).measure(subject, str(data))
    lines = [row["text"] for row in read(data / "wikitext2" / "test.jsonl")]
    assert m.provenance["corpus_sha256"] == m.provenance["settings"]["text_sha256"] == hashlib.sha256("\n\n".join(lines).encode()).hexdigest()

    file = Path("hellaswag/validation.jsonl")
    rows, hashes = read(data / file), []
    for k, changed in enumerate((rows, rows[::-1], [*rows[:-1], rows[-1] | {"label": "0"}], [*rows[:-1], rows[-1] | {"ctx_a": "She runs."}], rows)):
        write(tmp_path / str(k) / file, changed)
        hashes.append(Protocol("hellaswag", fast=True).measure(subject, str(tmp_path / str(k))).provenance["corpus_sha256"])
    assert hashes[0] == hashes[4] == sha256_of_items(corpus.choices("hellaswag", str(data))) and len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on": "wikitex"}, "unknown task 'wikitex': did you mean 'wikitext'"),
        ({"on": "wikitext", "batch": -1}, "'batch' is -1: expected at least 1"),
        ({"on": "trivia", "batch": 0}, "'batch' is 0: expected at least 1"),
        ({"on": "wikitext", "limit": 0}, "'limit' is 0: expected at least 1"),
        ({"on": "trivia", "limit": -2}, "'limit' is -2: expected at least 1"),
        ({"on": "wikitext", "length": 1}, "window length 1 is too small"),
        ({"on": "wikitext", "length": 10**6}, "window length 1000000 is longer than text 'WikiText-2 test'"),
        ({"on": "trivia", "prompt": "chatt"}, "unknown prompt 'chatt': did you mean 'chat'"),
        ({"on": "winogrande", "fast": True}, "unknown multiple-choice task 'winogrande'"),
        ({"on": "piqa", "fast": True}, r"holds neither piqa/validation\.jsonl"),
    ],
)
def test_what_cannot_be_measured(subject, data, settings, message):
    with pytest.raises(BadInput, match=message):
        Protocol(**settings).measure(subject, str(data))


# ---------------------------------------------------------------- out of records without a protocol


def test_of_measurements_made_directly(subject, data):
    spec = str(data)
    direct = {
        "wikitext": perplexity.perplexity(subject, corpus.evaluation_text(spec), length=32, limit=5),
        "trivia": triviaqa.triviaqa(subject, corpus.questions(spec, limit=3), source=corpus.question_source(spec, False), prompt="thesis", batch=2),
        "trivia_open": triviaqa.triviaqa(subject, corpus.questions(spec, open_book=True), source=corpus.question_source(spec, True)),
        "hellaswag": choice.multiple_choice(subject, corpus.choices("hellaswag", spec, 5), task="HellaSwag validation"),
    }
    for on, m in direct.items():
        found = protocol_of(m)
        again = found.measure(subject, spec)
        assert (found.on, again.value, again.items, again.metric) == (on, m.value, m.items, m.metric)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_of_every_record_of_the_first_chapters(path):
    for row in read(path):
        m = Measurement(**{key: row[key] for key in ("task", "metric", "value", "low", "high", "n", "unit", "extra", "provenance")}, items=[])
        m.provenance.pop("protocol", None)
        found, settings = protocol_of(m), m.provenance["settings"]
        if m.metric == "perplexity":
            assert found == Protocol("wikitext", length=int(m.unit.split()[2]), limit=settings["limit"]) and (settings["limit"] or m.n) == m.n
        elif m.metric == "accuracy":
            on = {"closed": "trivia", "open": "trivia_open"}[m.task.split()[2]]
            assert found == Protocol(on, limit=m.n, prompt=settings["prompt"], batch=32)
        else:
            assert found == Protocol("hellaswag", limit=m.n, fast=True)


def test_the_first_chapters_have_records():
    assert [path.stem[:2] for path in RECORDED] == ["00", "01", "02", "03"]


@pytest.mark.parametrize("task", ["HellaSwag validation", "hellaswag", "PIQA", "ARC-Easy validation", "arc_challenge", "OpenBookQA"])
def test_names_of_multiple_choice_tasks(task):
    assert protocol_of(measurement("acc_norm", task, settings={"protocol": "0-shot, packed endings"})).on in CHOICES


@pytest.mark.parametrize(
    "m",
    [
        measurement(),
        measurement("perplexity"),
        measurement("accuracy", "GSM8K"),
        measurement("acc_norm", ""),
        measurement("acc_norm", "PIQA", settings={"protocol": "lm-eval 0-shot"}),
        measurement("acc_norm", "MMLU", settings={"protocol": "0-shot, packed endings"}),
    ],
    ids=lambda m: f"{m.metric} on {m.task}",
)
def test_what_no_protocol_makes(m):
    with pytest.raises(BadInput, match=f"'{m.metric}' on '{m.task}' cannot be measured again from its record: expected one of {TASKS[0]}, "):
        protocol_of(m)


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        ({"on": "wikitext", "stride": 256}, "unknown parameter of Protocol 'stride'"),
        ({"on": "wikitext", "length": "512"}, r"'length' is '512' \(str\): expected int"),
        ({"on": "wikitext", "length": math.inf}, "'length' is inf"),
        ({"on": "wikitxt"}, "did you mean 'wikitext'"),
        ({"on": ["wikitext"]}, "'on' is"),
        ({"length": 512}, "missing"),
        ({}, "missing"),
        (None, "no attribute"),
        ("wikitext", "no attribute"),
    ],
)
def test_a_protocol_of_another_version(noted, message):
    with pytest.raises(BadInput, match=f"the record's protocol is not one that this version knows .*{message}"):
        protocol_of(measurement("perplexity", protocol=noted, settings={"length": 512}))
