"""Setups: the words of a record make the same measurement again, and what no setup makes is refused. Tasks answer what
is asked of them."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
from scipy import stats

from thesislib.errors import BadInput
from thesislib.evaluate import choice, perplexity, triviaqa
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import TASKS, Setup, setup_of, task_of
from thesislib.evaluate.task import sha256_of_items
from thesislib.files import ROOT
from thesislib.records.measurement import Measurement
from thesislib.sources import corpus
from thesislib.sources.choices import choice_set
from thesislib.sources.choices.found import SETS
from thesislib.sources.rows import rows as read_rows

RECORDED = sorted((ROOT / "data" / "results").glob("0[0-3]_*.jsonl"))  # chapters that measure without protocols
PROTOCOLS = [
    Setup("wikitext", length=32, limit=5),
    Setup("trivia", limit=2, seed=3, batch=1),
    Setup("trivia", prompt="thesis"),
    Setup("trivia_open", limit=3),
    Setup("hellaswag", limit=4, fast=True),
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
    rows = [
        {
            "ind": i,
            "activity_label": "Run",
            "ctx_a": f"He runs {i}.",
            "ctx_b": "he",
            "endings": endings,
            "label": str(i % 4),
        }
        for i in range(8)
    ]
    write(root / "hellaswag" / "validation.jsonl", rows)
    return root


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def measurement(metric="m", task="t", **provenance):
    return Measurement(
        task=task, metric=metric, value=1.0, low=1.0, high=1.0, n=7, unit="u", items=[], provenance=provenance
    )


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_the_same_words_measure_the_same(subject, data, protocol):
    m = protocol.measure(subject, str(data))
    assert m.n == (protocol.limit or 4) and m.provenance["protocol"] == protocol.plain()
    read_back = dataclasses.replace(m, provenance=json.loads(json.dumps(m.provenance)))
    assert setup_of(read_back) == protocol
    again = setup_of(read_back).measure(subject, str(data))
    assert (again.value, again.low, again.high, again.items, again.task, again.metric) == (
        m.value,
        m.low,
        m.high,
        m.items,
        m.task,
        m.metric,
    )
    assert again.provenance["corpus_sha256"] == m.provenance["corpus_sha256"]


def test_each_word_counts(subject, data):
    def ids(**settings):
        return Setup("hellaswag", fast=True, **settings).measure(subject, str(data)).column("id")

    assert (
        len(ids()) == 8
        and ids(limit=3) == ids(limit=5)[:3]
        and ids(limit=3, seed=1) != ids(limit=3)
        and ids(seed=1) == ids()
    )
    one, other = (Setup("wikitext", length=n, limit=4).measure(subject, str(data)) for n in (16, 32))
    assert [i["tokens"] for i in one.items + other.items] == [15] * 4 + [31] * 4
    prompts = {
        Setup("trivia", prompt=p).measure(subject, str(data)).provenance["settings"]["prompt"]
        for p in ("chat", "thesis", None)
    }
    assert prompts == {"chat", "thesis"}
    batched = [
        Setup("wikitext", length=32, limit=5, batch=b).measure(subject, str(data)).column("nats") for b in (1, 5)
    ]
    assert batched[0] == pytest.approx(batched[1], rel=1e-5)


def test_the_text_is_named_by_its_hash(subject, data, tmp_path):
    m = Setup("wikitext", length=32, limit=2).measure(subject, str(data))
    lines = [row["text"] for row in read(data / "wikitext2" / "test.jsonl")]
    assert (
        m.provenance["corpus_sha256"]
        == m.provenance["settings"]["text_sha256"]
        == hashlib.sha256("\n\n".join(lines).encode()).hexdigest()
    )

    file = Path("hellaswag/validation.jsonl")
    rows, hashes = read(data / file), []
    for k, changed in enumerate(
        (
            rows,
            rows[::-1],
            [*rows[:-1], rows[-1] | {"label": "0"}],
            [*rows[:-1], rows[-1] | {"ctx_a": "She runs."}],
            rows,
        )
    ):
        write(tmp_path / str(k) / file, changed)
        hashes.append(
            Setup("hellaswag", fast=True).measure(subject, str(tmp_path / str(k))).provenance["corpus_sha256"]
        )
    assert (
        hashes[0] == hashes[4] == sha256_of_items(Setup("hellaswag", fast=True).items(str(data)))
        and len(set(hashes)) == 4
    )


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
        ({"on": "winogrande", "fast": True}, "task 'winogrande' has no fast way"),
        ({"on": "piqa", "fast": True}, r"holds neither piqa/validation\.jsonl"),
    ],
)
def test_what_cannot_be_measured(subject, data, settings, message):
    with pytest.raises(BadInput, match=message):
        Setup(**settings).measure(subject, str(data))


# ---------------------------------------------------------------- out of records without a protocol


def test_of_measurements_made_directly(subject, data):
    spec = str(data)
    direct = {
        "wikitext": perplexity.perplexity(subject, corpus.evaluation_text(spec), length=32, limit=5),
        "trivia": triviaqa.triviaqa(
            subject,
            corpus.questions(spec, limit=3),
            source=corpus.question_source(spec, False),
            prompt="thesis",
            batch=2,
        ),
        "trivia_open": triviaqa.triviaqa(
            subject, corpus.questions(spec, open_book=True), source=corpus.question_source(spec, True)
        ),
        "hellaswag": choice.multiple_choice(
            subject, Setup("hellaswag", limit=5, fast=True).items(spec), task="HellaSwag validation"
        ),
    }
    for on, m in direct.items():
        found = setup_of(m)
        again = found.measure(subject, spec)
        assert (found.on, again.value, again.items, again.metric) == (on, m.value, m.items, m.metric)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_of_every_record_of_the_first_chapters(path):
    for row in read(path):
        m = Measurement(
            **{key: row[key] for key in ("task", "metric", "value", "low", "high", "n", "unit", "extra", "provenance")},
            items=[],
        )
        m.provenance.pop("protocol", None)
        found, settings = setup_of(m), m.provenance["settings"]
        if m.metric == "perplexity":
            assert (
                found == Setup("wikitext", length=int(m.unit.split()[2]), limit=settings["limit"])
                and (settings["limit"] or m.n) == m.n
            )
        elif m.metric == "accuracy":
            on = {"closed": "trivia", "open": "trivia_open"}[m.task.split()[2]]
            assert found == Setup(on, limit=m.n, prompt=settings["prompt"], batch=32)
        else:
            assert found == Setup("hellaswag", limit=m.n, fast=True)


def test_the_first_chapters_have_records():
    assert [path.stem[:2] for path in RECORDED] == ["00", "01", "02", "03"]


ON = {
    "HellaSwag validation": "hellaswag",
    "PIQA": "piqa",
    "ARC-Easy validation": "arc_easy",
    "OpenBookQA": "openbookqa",
}


@pytest.mark.parametrize("task", [*ON, "hellaswag", "arc_challenge"])
def test_names_of_multiple_choice_tasks(task):
    assert setup_of(measurement("acc_norm", task, settings={"protocol": "0-shot, packed endings"})).on == ON.get(
        task, task
    )


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
    with pytest.raises(
        BadInput,
        match=f"'{m.metric}' on '{m.task}' cannot be measured again from its record: expected one of "
        f"{next(iter(TASKS))}, ",
    ):
        setup_of(m)


@pytest.mark.parametrize(
    ("noted", "message"),
    [
        ({"on": "wikitext", "stride": 256}, "unknown parameter of Setup 'stride'"),
        ({"on": "wikitext", "length": "512"}, r"'length' is '512' \(str\): expected int"),
        ({"on": "wikitext", "length": math.inf}, "'length' is inf"),
        ({"on": "wikitxt"}, "did you mean 'wikitext'"),
        ({"on": ["wikitext"]}, "'on' is"),
        ({"length": 512}, "missing"),
        ({}, "missing"),
        (None, "expected a mapping"),
        ("wikitext", "expected a mapping"),
    ],
)
def test_a_setup_of_another_version(noted, message):
    with pytest.raises(BadInput, match=f"the record's protocol is not one that this version knows .*{message}"):
        setup_of(measurement("perplexity", protocol=noted, settings={"length": 512}))


# ---------------------------------------------------------------- what is asked of tasks


def articles(nats, words=(10, 20, 5, 8), **changes):
    items = [{"id": str(i), "nats": x * n, "words": n} for i, (x, n) in enumerate(zip(nats, words, strict=True))]
    facts = {
        "task": "wikitext (lm-eval)",
        "metric": "word_perplexity",
        "value": 9.0,
        "low": 8.0,
        "high": 10.0,
        "n": len(items),
        "unit": "article",
    }
    return Measurement(**facts | {"items": items} | changes)


def test_word_perplexities_are_compared_by_article():
    a, b, alike = [3.0, 3.5, 2.5, 4.0], [3.2, 3.6, 2.4, 4.4], (7, 7, 7, 7)
    found, expected = compare(articles(a, alike), articles(b, alike)), stats.ttest_rel(b, a)
    assert (found.p, found.n) == (pytest.approx(expected.pvalue), 4)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.difference, found.high) == pytest.approx(
        (interval.low, sum(b) / 4 - sum(a) / 4, interval.high)
    )
    words = (10, 20, 5, 8)  # a long article counts for more: the difference is that of the two word perplexities
    difference = sum(n * (y - x) for x, y, n in zip(a, b, words, strict=True)) / sum(words)
    assert compare(articles(a), articles(b)).difference == pytest.approx(difference)
    with pytest.raises(BadInput, match="measured on other items"):
        compare(articles(a), articles(b[:3], (10, 20, 5)))


def test_word_perplexities_as_the_harness_gives_them(tiny, data):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    one, other = (Setup("lm_eval_wikitext", limit=5).measure(tiny(layers=2, seed=seed), str(data)) for seed in (0, 1))
    means = [[i["nats"] / i["words"] for i in m.items] for m in (one, other)]
    assert (
        compare(one, other).p == pytest.approx(stats.ttest_rel(*means).pvalue)
        and task_of(one).name == "lm_eval_wikitext"
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({}, {"metric": "perplexity"}, r"'word_perplexity' \(article\) and 'perplexity' \(article\) do not compare"),
        (
            {"unit": "window of 512 tokens"},
            {"unit": "window of 64 tokens"},
            "do not compare: expected two measurements of one measure",
        ),
        (
            {"metric": "seconds per token"},
            {"metric": "seconds per token"},
            "'seconds per token' .* is no task's measurement: expected one of .*accuracy",
        ),
        ({"metric": "perplexity of bits"}, {"metric": "perplexity of bits"}, "is no task's measurement"),
    ],
)
def test_what_does_not_compare(a, b, message):
    with pytest.raises(BadInput, match=message) as raised:
        compare(*(articles([1.0] * 4, **changes) for changes in (a, b)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=str)
def test_a_text_is_read_and_hashed_once(subject, data, protocol, monkeypatch):
    reads, rows, hashed, sha256 = [], read_rows, [], hashlib.sha256
    for reader in (corpus, choice_set):
        monkeypatch.setattr(reader, "rows", lambda *of: reads.append(of) or rows(*of))
    monkeypatch.setattr(
        hashlib, "sha256", lambda *content: hashed.append(sha256(*content).hexdigest()) or sha256(*content)
    )
    m = protocol.measure(subject, str(data))
    assert len(reads) == 1 and hashed.count(m.provenance["corpus_sha256"]) == 1


def test_a_record_says_what_guessing_gets(subject, data):
    assert Setup("hellaswag", limit=4, fast=True).measure(subject, str(data)).extra["chance"] == 0.25


def test_every_recorded_number_is_called_as_its_task_calls_it():
    seen = set()
    for path in sorted((ROOT / "data" / "results").glob("*.jsonl")):
        for row in read(path):
            if "protocol" in row["provenance"]:
                m = Measurement(
                    **{key: row[key] for key in ("task", "metric", "value", "low", "high", "n", "unit", "provenance")},
                    items=[],
                )
                assert (task_of(m).name, task_of(m).metric) == (row["provenance"]["protocol"]["on"], row["metric"])
                assert setup_of(m).plain() == row["provenance"]["protocol"]
                seen.add(task_of(m).name)
    assert {"wikitext", "trivia", "trivia_open", "hellaswag"} <= seen


def test_open_and_closed_book_are_told_apart_without_a_protocol():
    for open_book, name in ((False, "trivia"), (True, "trivia_open")):
        assert task_of(measurement("accuracy", settings={"open_book": open_book})).name == name


def test_tasks_are_found_in_their_folder():
    files = {type(task).__module__.rpartition(".")[2] for task in TASKS.values()}
    assert {"perplexity", "triviaqa", "harness", "choice"} <= files and {"hellaswag", "piqa"} <= set(SETS) <= set(TASKS)
    assert all(name == task.name for name, task in TASKS.items())
    for task in TASKS.values():
        kind, allowed = task.tolerance
        assert (
            kind in ("relative", "absolute")
            and list(allowed) == sorted(allowed)
            and task.unit
            and isinstance(task.higher_is_better, bool)
        )


def test_a_reference_belongs_to_tasks_of_two_models(subject, data):
    with pytest.raises(
        BadInput, match="task 'wikitext' measures one model, the reference 'embedded' would do nothing: leave it out"
    ):
        Setup("wikitext", reference="embedded")
    m = Setup("wikitext", length=32, limit=2).measure(subject, str(data))
    assert "reference" not in m.provenance["protocol"]  # as in records made before
