import numpy as np
import pytest
import torch

from thesislib.errors import BadInput
from thesislib.evaluate.choice import MultipleChoice, compare, multiple_choice, multiple_choices
from thesislib.evaluate.setup import TASKS, Setup
from thesislib.model.blocks import apply_plan
from thesislib.sources.corpus import Choice

FAST = [
    name
    for name, task in TASKS.items()
    if isinstance(task, MultipleChoice) and name != "winogrande" and task.metric == "acc_norm"
]
ITEMS = [
    Choice("1", "The dog ran", ("home.", "into the garden, and then out of it again.", "fast"), 1),
    Choice("2", "Question: Why is the sky blue over the sea?\nAnswer:", ("Scattering", "Paint"), 0),
    Choice("3", "One", ("two three four", "a", "b", "été"), 0),
]


def one_pair_at_a_time(subject, item):
    """log p(ending | context), each pair in a sequence of its own."""
    context = subject.tokenizer(item.context, add_special_tokens=False)["input_ids"]
    out = []
    for ending in item.endings:
        ids = torch.tensor([subject.tokenizer(f"{item.context} {ending}", add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            logp = subject.model(ids).logits[0, :-1].log_softmax(-1)
        picked = logp.gather(1, ids[0, 1:, None])[len(context) - 1 :]
        out.append(float(picked.sum()))
    return out


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "smollm3"])
def test_packed_equals_one_pair_at_a_time(tiny, model_type, batch):
    subject = tiny(model_type)
    found = multiple_choice(subject, ITEMS, task="test", batch=batch)
    for item, outcome in zip(ITEMS, found.items, strict=True):
        expected = np.array(one_pair_at_a_time(subject, item))
        np.testing.assert_allclose(outcome["logprobs"], expected, atol=2e-4)
        assert outcome["correct_unnormalised"] == (expected.argmax() == item.label)
        scores = expected / [len(e) for e in item.endings]
        assert outcome["correct"] == (scores.argmax() == item.label)
        wrong = [score for k, score in enumerate(scores) if k != item.label]
        assert outcome["margin"] == pytest.approx(scores[item.label] - max(wrong), abs=2e-4)
        assert outcome["right"] == pytest.approx(expected[item.label], abs=2e-4)


def test_an_item_with_one_ending_has_no_margin(tiny):
    found = multiple_choice(tiny(), [Choice("1", "One", ("two",), 0)], task="test")
    assert found.items[0]["correct"] and "margin" not in found.items[0]


def test_all_plans_at_once_equal_one_at_a_time(tiny):
    subject = tiny()
    plans = {"whole": range(6), "skip": (0, 1, 3), "twice": (0, 0, 5)}
    together = multiple_choices(subject, ITEMS, plans, task="test")
    for name, plan in plans.items():
        alone = multiple_choice(apply_plan(subject, plan), ITEMS, task="test")
        np.testing.assert_allclose(
            np.concatenate(together[name].column("logprobs")), np.concatenate(alone.column("logprobs")), atol=2e-4
        )
    assert 0 <= compare(together["whole"], together["skip"]).p <= 1


@pytest.mark.embedded
@pytest.mark.parametrize("task", FAST)
def test_against_lm_evaluation_harness(few_blocks, task):
    ours, theirs = (Setup(task, limit=4, fast=fast).measure(few_blocks, "embedded") for fast in (True, False))
    assert [bool(x) for x in theirs.column("acc_norm")] == ours.column("correct")
    assert [bool(x) for x in theirs.column("acc")] == ours.column("correct_unnormalised")
    assert theirs.value == ours.value and (theirs.low, theirs.high) == (ours.low, ours.high)


@pytest.mark.embedded
def test_winogrande_and_errors_of_the_harness(few_blocks):
    found = Setup("winogrande", limit=4).measure(few_blocks, "embedded")
    assert found.n == 4 and found.metric == "acc" and found.extra["chance"] == 0.5
    with pytest.raises(BadInput, match="needs WikiText-2 itself"):
        Setup("lm_eval_wikitext").measure(few_blocks, "embedded")


@pytest.mark.shared
def test_harness_wikitext_is_a_word_perplexity(tiny, shared_data):
    import math

    found = Setup("lm_eval_wikitext", limit=2).measure(tiny(layers=1), shared_data)
    assert found.metric == "word_perplexity" and found.n == 2
    nats, words = sum(found.column("nats")), sum(found.column("words"))
    assert found.value == pytest.approx(math.exp(min(nats / words, 700)), rel=1e-6)


def test_no_items(tiny):
    with pytest.raises(BadInput, match="no multiple-choice items"):
        multiple_choice(tiny(), [], task="test")
