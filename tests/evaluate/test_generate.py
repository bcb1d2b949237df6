from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from thesislib.errors import BadInput
from thesislib.evaluate.generate import complete, continuations, greedy
from thesislib.evaluate.triviaqa import triviaqa
from thesislib.model.prompts import end_tokens
from thesislib.sources.corpus import questions

PROMPTS = [
    "a",
    "What is the longest of these prompts, by far?",
    "Once upon",
    "née",
    "x" * 40,
    "Is it so?",
    "No.",
    "Yes, it is",
    "b",
]


def alone(subject, prompt, n):
    """One prompt, no cache, no padding, argmax after argmax, up to the first special token."""
    ids = torch.tensor([subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    start = ids.shape[1]
    for _ in range(n):
        with torch.inference_mode():
            token = subject.model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() in subject.tokenizer.all_special_ids:
            assert token.item() != subject.tokenizer.eos_token_id or ids.shape[1] > start, (
                "no end token may come first: choose other prompts"
            )
            break
        ids = torch.cat([ids, token], 1)
    return subject.tokenizer.decode(ids[0, start:])


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_batched_and_padded_equals_alone(tiny, batch):
    subject = tiny()
    assert greedy(subject, PROMPTS, 8, batch) == [alone(subject, p, 8) for p in PROMPTS]


@pytest.mark.embedded
def test_trivia_answers_do_not_depend_on_the_batch(few_blocks):
    asked = questions("embedded", limit=8, seed=3)
    one, many = (triviaqa(few_blocks, asked, source="x", batch=b, max_new_tokens=8) for b in (1, 8))
    assert one.column("answer") == many.column("answer")
    assert any(one.column("answer"))


def test_complete_is_greedy_and_times_each_token_but_the_first(tiny):
    subject = tiny()
    done = complete(subject, "Once upon", 8)
    assert done.text == greedy(subject, ["Once upon"], 8)[0]
    assert 1 <= len(done.token_seconds) <= 7 and done.seconds_per_token > 0


ARCHITECTURES = {"llama": {}, "mistral": {"sliding_window": 6}, "qwen2": {}, "qwen3": {}, "smollm3": {}}


def padded(subject, prompts):
    """(B, T) tokens and mask, padded on the left."""
    batch = subject.tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def generated_to_many_ends(subject, ids, mask, monkeypatch):
    """The 12 tokens at most of transformers' generate, where rows end at different steps: at tokens that some say early
    and some never."""
    free = subject.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, min_new_tokens=12)[
        :, ids.shape[1] :
    ]
    ends = sorted({row[at].item() for row, at in zip(free, (1, 3, 5, 1, 2, 8), strict=False)})
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", ends)
    out = subject.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, min_new_tokens=1)[
        :, ids.shape[1] :
    ]
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row) - 1) + 1] for row in out.tolist()]


@pytest.mark.parametrize("ahead", [1, 3, 100])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_running_ahead_says_the_same_as_generate(tiny, model_type, ahead, monkeypatch):
    subject = tiny(model_type, layers=4, **ARCHITECTURES[model_type])
    ids, mask = padded(subject, PROMPTS)
    expected = generated_to_many_ends(subject, ids, mask, monkeypatch)
    widths, forward = [], subject.model.forward
    monkeypatch.setattr(subject.model, "forward", lambda ids, **kw: (widths.append(len(ids)), forward(ids, **kw))[1])
    assert continuations(subject, ids, mask, 12, ahead) == expected
    if model_type == "mistral":  # its window slides
        assert widths[-1] < len(PROMPTS), "a model with sliding windows takes the other way"
        return
    longest = max(map(len, expected))
    assert set(widths) == {len(PROMPTS)} and longest <= len(widths) <= min(12, longest + ahead), (
        "it stops at the next look"
    )
    assert continuations(subject, ids, mask, 1, ahead) == [row[:1] for row in expected]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_continuations_are_those_of_generate_while_rows_leave(tiny, model_type, monkeypatch):
    subject = tiny(model_type, layers=4, **ARCHITECTURES[model_type])
    ids, mask = padded(subject, PROMPTS)
    expected = generated_to_many_ends(subject, ids, mask, monkeypatch)
    widths, forward = [], subject.model.forward
    monkeypatch.setattr(subject.model, "forward", lambda ids, **kw: (widths.append(len(ids)), forward(ids, **kw))[1])
    assert continuations(subject, ids, mask, 12) == expected
    assert len({len(row) for row in expected}) > 2, "the rows should end at different steps"
    assert widths == sorted(widths, reverse=True) and widths[0] == len(PROMPTS) and widths[-1] < 0.7 * len(PROMPTS), (
        "rows that ended should leave"
    )
    assert len(widths) == max(map(len, expected)), "no step after the last row has ended"


def test_a_penalty_in_the_models_own_settings_does_not_change_greedy_text(tiny, monkeypatch):
    subject = tiny()
    before = greedy(subject, PROMPTS, 12), complete(subject, PROMPTS[1], 12).text
    monkeypatch.setattr(subject.model.generation_config, "repetition_penalty", 5.0)
    ids, mask = padded(subject, PROMPTS)
    out = subject.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12)[:, ids.shape[1] :]
    assert subject.tokenizer.batch_decode(out, skip_special_tokens=True) != before[0], (
        "this penalty should show where it is applied"
    )
    assert (greedy(subject, PROMPTS, 12), complete(subject, PROMPTS[1], 12).text) == before


@pytest.mark.parametrize(
    ("model_says", "tokenizer_says", "expected"), [([5, 7], 3, [5, 7]), (0, 3, [0]), (None, 3, [3]), (None, None, [])]
)
def test_end_tokens(tiny, monkeypatch, model_says, tokenizer_says, expected):
    subject = tiny()
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", model_says)
    ids, mask = padded(subject, ["Once upon", "No."])
    subject = replace(subject, tokenizer=SimpleNamespace(eos_token_id=tokenizer_says))
    assert end_tokens(subject) == expected
    if not expected:
        assert [len(row) for row in continuations(subject, ids, mask, 5)] == [5, 5]


@pytest.mark.parametrize(
    ("prompts", "n", "batch", "message"),
    [(["a", ""], 4, 2, "prompt 1 is empty"), (["a"], 0, 2, "at least 1"), (["a"], 4, 0, "at least 1")],
)
def test_bad_input(tiny, prompts, n, batch, message):
    with pytest.raises(BadInput, match=message):
        greedy(tiny(), prompts, n, batch)
