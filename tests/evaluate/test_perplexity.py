import json
import math

import numpy as np
import pytest
import torch

from thesislib.errors import BadInput
from thesislib.evaluate.perplexity import compare, perplexities, perplexity
from thesislib.model.blocks import apply_plan
from thesislib.sources.corpus import evaluation_text, join, windows

TEXT = join("tiny text", [f"Document {i} says that the river ran {i} miles, naïvely. " * 4 for i in range(12)])


def reference_nats(subject, ids):
    """transformers' own loss, one window at a time: the mean over T - 1 targets."""
    with torch.inference_mode():
        return [float(subject.model(w[None], labels=w[None]).loss) * (len(w) - 1) for w in ids]


def test_against_transformers_loss(tiny):
    subject = tiny()
    found = perplexity(subject, TEXT, length=32, batch=4)
    ids = windows(TEXT, subject.tokenizer, 32).ids
    expected = reference_nats(subject, ids)
    np.testing.assert_allclose(found.column("nats"), expected, rtol=1e-5)
    assert found.value == pytest.approx(math.exp(sum(expected) / (len(ids) * 31)))
    assert found.n == len(ids) and found.extra["predicted_tokens"] == len(ids) * 31
    assert found.low < found.value < found.high


@pytest.mark.parametrize("batch", [1, 3, 8, 1000])
def test_batch_does_not_matter(tiny, batch):
    subject = tiny()
    assert perplexity(subject, TEXT, length=32, batch=batch).value == pytest.approx(
        perplexity(subject, TEXT, length=32).value, rel=1e-6
    )


def test_all_plans_at_once_equal_one_at_a_time(tiny):
    subject = tiny()
    plans = {"whole": range(6), "skip": (0, 1, 3, 4, 5), "twice": (0, 0, 1, 2, 3, 4, 5), "last": (5,)}
    together = perplexities(subject, TEXT, plans, length=32)
    for name, plan in plans.items():
        alone = perplexity(apply_plan(subject, plan), TEXT, length=32)
        assert together[name].value == pytest.approx(alone.value, rel=1e-5), name
        assert together[name].provenance["plan"] == list(plan)


def test_word_and_byte_measures_are_the_same_nats(tiny):
    subject = tiny()
    found = perplexity(subject, TEXT, length=32)
    cut = windows(TEXT, subject.tokenizer, 32)
    nats = sum(found.column("nats"))
    assert found.extra["bits_per_byte"] == pytest.approx(nats / math.log(2) / cut.scored_bytes.sum())
    assert math.log(found.extra["word_perplexity"]) == pytest.approx(nats / cut.scored_words.sum())
    # the tiny tokenizer has a token a byte, so nothing may be lost or counted twice
    assert cut.scored_bytes.sum() == pytest.approx(found.extra["predicted_tokens"], abs=len(cut.ids))


def test_compare_needs_the_same_windows_and_knows_the_sign(tiny):
    subject = tiny()
    found = perplexities(subject, TEXT, {"a": range(6), "b": (0,)}, length=32)
    c = compare(found["a"], found["b"])
    assert math.exp(c.difference) == pytest.approx(found["b"].value / found["a"].value)
    assert compare(found["a"], found["a"]).p == 1.0
    with pytest.raises(BadInput, match="needs the same ones"):
        compare(perplexity(subject, TEXT, length=32, limit=4), perplexity(subject, TEXT, length=32, limit=3))
    with pytest.raises(BadInput, match="needs the same ones"):
        compare(found["a"], perplexity(subject, TEXT, length=16, limit=3))


def test_a_comparison_is_the_ratio_of_the_perplexities_that_tables_show(tiny):
    subject = tiny()
    both = perplexities(subject, TEXT, {"a": range(subject.depth), "b": range(1, subject.depth)}, length=16)
    a, b = both.values()
    assert len(set(a.column("document"))) < a.n  # documents of several windows
    assert math.exp(compare(a, b).difference) == pytest.approx(b.value / a.value, rel=1e-9)


def test_a_whole_text_and_a_sample_compare_on_the_windows_that_both_have(tiny):
    subject = tiny()
    plans = {"a": range(subject.depth), "b": range(1, subject.depth)}
    whole, sample = (perplexities(subject, TEXT, plans, length=16, limit=n) for n in (None, 5))
    assert whole["a"].n > 5
    expected = compare(sample["a"], sample["b"])
    for a, b in ((whole, sample), (sample, whole)):
        mixed = compare(a["a"], b["b"])
        assert mixed.n == expected.n and mixed.difference == pytest.approx(expected.difference)
    other = perplexity(subject, join("another", ["other words, " * 200] * 3), length=16, limit=5)
    with pytest.raises(BadInput, match="other items"):
        compare(whole["a"], other)


def test_bad_input(tiny):
    subject = tiny()
    with pytest.raises(BadInput, match="text 'none' is empty"):
        perplexity(subject, join("none", [""]))
    with pytest.raises(BadInput, match="window length 100000 is longer than text 'tiny text', which has"):
        perplexity(subject, TEXT, length=100_000)
    with pytest.raises(BadInput, match="window length 1 is too small"):
        perplexity(subject, TEXT, length=1)


def test_one_window_has_no_interval_and_still_makes_json(tiny):
    found = perplexity(tiny(), TEXT, length=32, limit=1)
    assert math.isnan(found.low) and '"low": null' in found.to_json()


def test_a_script_without_spaces_loses_nothing(tiny):
    text = join("Thai", ["ภาษาไทย" * 60])
    found = perplexity(tiny(), text, length=512)
    plain = json.loads(found.to_json())
    nats = reference_nats(tiny(), windows(text, tiny().tokenizer, 512).ids)
    assert (
        plain["value"] == pytest.approx(math.exp(sum(nats) / (511 * len(nats))))
        and plain["extra"]["word_perplexity"] is None
    )
    assert plain["low"] is None and "one document" in plain["extra"]["why no interval"] and "no interval" in str(found)


@pytest.mark.embedded
@pytest.mark.shared
def test_reference_on_wikitext(embedded_subject, shared_data):
    """The whole split is recorded (30.21); here six windows against transformers' own loss."""
    text = evaluation_text(shared_data)
    found = perplexity(embedded_subject, text, limit=6)
    ids = windows(text, embedded_subject.tokenizer, 512, 6).ids
    np.testing.assert_allclose(found.column("nats"), reference_nats(embedded_subject, ids), rtol=1e-5)
