import pytest
import torch

from thesislib.corpus import questions
from thesislib.errors import BadInput
from thesislib.evaluate.generate import complete, greedy
from thesislib.evaluate.triviaqa import triviaqa

PROMPTS = ["a", "What is the longest of these prompts, by far?", "Once upon", "née", "x" * 40, "Is it so?", "No.", "Yes, it is", "b"]


def alone(subject, prompt, n):
    """One prompt, no cache, no padding, argmax after argmax."""
    ids = torch.tensor([subject.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    start = ids.shape[1]
    for _ in range(n):
        with torch.inference_mode():
            token = subject.model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if token.item() == subject.tokenizer.eos_token_id and ids.shape[1] - start > 1:
            break
    return subject.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_batched_and_padded_equals_alone(tiny, batch):
    subject = tiny()
    assert greedy(subject, PROMPTS, 8, batch) == [alone(subject, p, 8) for p in PROMPTS]


@pytest.mark.embedded
def test_trivia_answers_do_not_depend_on_the_batch(embedded_subject):
    asked = questions("embedded", limit=16, seed=3)
    one, many = (triviaqa(embedded_subject, asked, source="x", batch=b, max_new_tokens=16) for b in (1, 16))
    assert one.column("answer") == many.column("answer")
    assert any(one.column("answer"))


def test_complete_is_greedy_and_times_each_token_but_the_first(tiny):
    subject = tiny()
    done = complete(subject, "Once upon", 8)
    assert done.text == greedy(subject, ["Once upon"], 8)[0]
    assert 1 <= len(done.token_seconds) <= 7 and done.seconds_per_token > 0


@pytest.mark.parametrize(
    ("prompts", "n", "batch", "message"), [(["a", ""], 4, 2, "prompt 1 is empty"), (["a"], 0, 2, "at least 1"), (["a"], 4, 0, "at least 1")]
)
def test_bad_input(tiny, prompts, n, batch, message):
    with pytest.raises(BadInput, match=message):
        greedy(tiny(), prompts, n, batch)
