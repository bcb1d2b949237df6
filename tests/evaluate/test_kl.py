import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import kl_div

from thesislib.compress.gptq import Rtn
from thesislib.errors import BadInput
from thesislib.evaluate.compare import compare
from thesislib.evaluate.kl import divergence
from thesislib.evaluate.setup import Setup, setup_of
from thesislib.experiment import again, prepare
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.subject import Subject
from thesislib.records.store import Store
from thesislib.sources import corpus


@pytest.fixture(scope="module")
def text(tiny_data):
    return corpus.evaluation_text(tiny_data)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    return str(save_checkpoint(tiny(layers=2), tmp_path_factory.mktemp("reference") / "dense"))


@pytest.fixture
def measured(reference, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    setup = Setup("kl", length=32, limit=6, reference=reference)
    return [
        prepare(reference, stages, data=tiny_data, dtype="float32").measure(setup, tiny_data)
        for stages in ((), (Rtn(bits=4, group=16),))
    ]


def whole_logits(subject, ids):
    with torch.inference_mode():
        return subject.model(ids).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(("model_type", "batch"), [("llama", 1), ("llama", 4), ("qwen3", None)])
def test_against_torch_on_whole_logits(tiny, text, model_type, batch):
    subject, reference = (tiny(model_type, layers=2, seed=seed) for seed in (1, 0))
    m = divergence(subject, reference, text, length=32, limit=7, batch=batch)
    cut = corpus.windows(text, subject.tokenizer, 32, 7)
    expected = kl_div(
        whole_logits(subject, cut.ids), whole_logits(reference, cut.ids), reduction="none", log_target=True
    ).sum((1, 2))
    np.testing.assert_allclose(m.column("nats"), expected, rtol=1e-5)
    assert m.value == pytest.approx(float(expected.sum()) / (7 * 31), rel=1e-5) and m.low < m.value < m.high
    assert (m.n, m.column("document"), m.extra["predicted_tokens"]) == (7, cut.document.tolist(), 7 * 31)
    # and it is no distance: the reference's probabilities are the weights
    turned = divergence(reference, subject, text, length=32, limit=7)
    assert turned.value != pytest.approx(m.value, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_not_apart_from_itself(reference, tiny_data, dtype):
    m = Setup("kl", length=64, reference=reference).measure(load_subject(reference, dtype), tiny_data)
    assert abs(m.value) < 1e-9 and m.n > 3 and m.provenance["dtype"] == dtype


def test_what_was_rounded_more_is_further_off(measured, reference, tiny_data):
    four = measured[1]
    eight = prepare(reference, (Rtn(bits=8, group=16),), data=tiny_data, dtype="float32").measure(
        setup_of(four), tiny_data
    )
    assert 0 < eight.value < four.value / 10


def test_a_record_says_what_it_was_held_against(measured, reference, tiny_data):
    same, other = measured
    assert abs(same.value) < 1e-9 < other.value
    facts = other.provenance
    assert (
        facts["settings"]["reference_fingerprint"]
        == load_subject(reference).fingerprint
        == facts["made"]["base"]["fingerprint"]
    )
    read_back = dataclasses.replace(other, provenance=json.loads(json.dumps(facts)))
    assert setup_of(read_back) == Setup("kl", length=32, limit=6, reference=reference) and facts["tolerance"] == {
        "absolute": 0.001
    }
    verdict = again(read_back, reference, tiny_data)
    assert verdict.same_bits and verdict.same_subject


def test_a_record_is_not_made_again_against_another(measured, reference, tiny, tiny_data, tmp_path):
    changed = str(save_checkpoint(tiny(layers=2, seed=5), tmp_path / "changed"))
    with pytest.raises(
        BadInput,
        match=r"was held against a reference with fingerprint .*; '.*changed' has .*: name the record's by --reference",
    ) as raised:
        again(measured[1], reference, tiny_data, reference=changed)
    assert "\n" not in str(raised.value)
    # a store takes it and gives it back
    store = Store(tmp_path / "r.jsonl")
    store.append(measured[1])
    (back,) = store.rows().values()
    assert back.items == measured[1].items and again(back, reference, tiny_data).same_bits


def test_two_are_compared_by_document_against_one_reference(measured, tiny, text):
    same, other = measured
    means = [
        [np.mean([i["nats"] / 31 for i in m.items if i["document"] == d]) for d in dict.fromkeys(m.column("document"))]
        for m in (same, other)
    ]
    assert (
        compare(same, other).p == pytest.approx(stats.ttest_rel(*means).pvalue) and compare(same, other).difference > 0
    )
    elsewhere = divergence(tiny(layers=2), tiny(layers=2, seed=3), text, length=32, limit=6)
    with pytest.raises(BadInput, match="one is held against .* expected one reference"):
        compare(other, elsewhere)


def test_another_vocabulary_is_refused_by_name(tiny, text, byte_tokenizer):
    subject = tiny(layers=1)
    words = copy.deepcopy(byte_tokenizer)
    words.add_tokens(["zebra"])
    other = Subject(subject.model, words, "striped")
    with pytest.raises(
        BadInput,
        match=r"tiny llama has a vocabulary of \d+ tokens and 259 logits, the reference striped of \d+ and 259; "
        r"'zebra' is in one",
    ) as raised:
        divergence(subject, other, text, length=32)
    assert "\n" not in str(raised.value)
    with pytest.raises(
        BadInput,
        match="and 259 logits, the reference tiny llama of .* and 320: expected a reference with the subject's own",
    ):
        divergence(subject, tiny(layers=1, vocab_size=320), text, length=32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            "task 'kl' holds a subject against another, which is not said: expected a reference, such as "
            "--reference embedded",
        ),
        ({"reference": "nowhere/to/be found"}, "nowhere/to/be found"),
        ({"reference": "embeded"}, "embeded"),
        ({"length": 10**6}, "window length 1000000 is longer than text"),
        ({"limit": 0}, "'limit' is 0"),
    ],
)
def test_what_cannot_be_measured(tiny, reference, tiny_data, settings, message):
    with pytest.raises(BadInput, match=message) as raised:
        Setup(
            "kl", **({"reference": reference} if settings and "reference" not in settings else {}), **settings
        ).measure(tiny(layers=1), tiny_data)
    assert "\n" not in str(raised.value)


def test_one_document_has_no_interval(tiny):
    m = divergence(tiny(layers=1, seed=1), tiny(layers=1), corpus.join("one", ["a number of things " * 20]), length=32)
    assert math.isnan(m.low) and math.isnan(m.high) and "one document" in m.extra["why no interval"]
