import pytest
import torch
from transformers import GenerationConfig

from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Rtn
from thesislib.compress.plan import apply_plan
from thesislib.compress.width import Width
from thesislib.corpus import questions
from thesislib.errors import BadInput
from thesislib.evaluate import generate as module
from thesislib.evaluate.generate import common, complete, continuations, end_tokens, greedy
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


def theirs(subject, prompts, n):
    """Tokens of transformers' own generate on the whole batch, each row up to its end token."""
    longest, pad = max(map(len, prompts)), subject.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ends = subject.model.generation_config.eos_token_id
    how = GenerationConfig(max_new_tokens=n, min_new_tokens=1, do_sample=False, eos_token_id=ends, pad_token_id=pad)
    rows = subject.model.generate(ids, attention_mask=mask, generation_config=how)[:, longest:].tolist()
    ends = {*(ends if isinstance(ends, list) else [ends])}
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), n)] for row in rows]


def encoded(subject, prompts):
    return [subject.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]


def ending(subject, prompts, n=12):
    """The subject with end tokens by which rows end at different times: some that it says."""
    said = theirs(subject, prompts, n)
    subject.model.generation_config.eos_token_id = [subject.tokenizer.eos_token_id, said[0][2], said[3][4], said[5][7]]
    assert len({len(row) for row in theirs(subject, prompts, n)}) > 2
    return subject


KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen2, every second block sliding": {"use_sliding_window": True, "sliding_window": 12, "layer_types": ["full_attention", "sliding_attention"] * 3},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral, sliding": {"sliding_window": 12},
    "smollm3": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", [0, 0.9, 1])
@pytest.mark.parametrize("before", ["", "A sentence that all share. "])
def test_tokens_are_those_of_transformers_generate(tiny, monkeypatch, kind, leave, before):
    monkeypatch.setattr(module, "LEAVE", leave)
    texts = [before + p for p in PROMPTS]
    subject = tiny(kind.partition(",")[0], **KINDS[kind])
    prompts = encoded(subject, texts)
    subject = ending(subject, prompts)
    assert continuations(subject, prompts, 12) == theirs(subject, prompts, 12)
    assert greedy(subject, texts, 12, 4) == subject.tokenizer.batch_decode(theirs(subject, prompts, 12), skip_special_tokens=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: apply_plan(s, (0, 2, 2, 1, 5, 5)),
        lambda s: Rtn(group=16).apply(s)[0],
        lambda s: Width(remove=2, of=4, metric="magnitude").apply(s)[0],
        lambda s: Depth(blocks=(1, 4)).apply(s)[0],
        lambda s: Depth(blocks=(0, 3), part="attention").apply(s)[0],
    ],
    ids=["plan", "quantised", "pruned", "blocks removed", "attentions removed"],
)
def test_a_compressed_subjects_tokens_too(tiny, make):
    subject = make(tiny())
    prompts = encoded(subject, ["A sentence that all share. " + p for p in PROMPTS])
    subject = ending(subject, prompts)
    assert continuations(subject, prompts, 12) == theirs(subject, prompts, 12)


def test_rows_leave_and_what_is_shared_is_read_once(tiny):
    subject, shapes = tiny(), []
    prompts = encoded(subject, ["A sentence that all share. " + p for p in PROMPTS])
    subject = ending(subject, prompts)
    subject.model.model.embed_tokens.register_forward_hook(lambda _, given, __: shapes.append(tuple(given[0].shape)))
    lengths = [len(row) for row in continuations(subject, prompts, 12)]
    assert shapes[:2] == [(1, 27), (9, max(map(len, prompts)) - 27)]
    # 9 rows are few enough that one that ends is dropped at once
    assert shapes[2:] == [(left, 1) for n in range(1, 12) if (left := sum(length > n for length in lengths))]


def test_one_row_all_rows_at_once_and_end_tokens_of_each_kind(tiny):
    subject = tiny()
    prompts = encoded(subject, PROMPTS[1:2])
    said = theirs(subject, prompts, 8)
    assert continuations(subject, prompts, 8) == said and len(said[0]) == 8  # as many as allowed
    for ends in (said[0][3], [said[0][3], said[0][5]]):
        subject.model.generation_config.eos_token_id = ends
        short = theirs(subject, prompts, 8)
        assert continuations(subject, prompts * 3, 8) == short * 3 and len(short[0]) <= 4
    subject.model.generation_config.eos_token_id = None
    assert end_tokens(subject) == [subject.tokenizer.eos_token_id] and continuations(subject, prompts, 8) == said
    subject.model.generation_config.eos_token_id = said[0][0]  # an end token is never the first
    (first,) = continuations(subject, prompts, 8)
    assert first == theirs(subject, prompts, 8)[0] and first[0] != said[0][0]


def test_a_repetition_penalty_that_a_checkpoint_asks_for_is_not_greedy(tiny):
    subject = tiny()
    plain = greedy(subject, PROMPTS, 12)
    subject.model.generation_config.repetition_penalty = 5.0
    assert theirs(subject, encoded(subject, PROMPTS[1:2]), 12) != continuations(subject, encoded(subject, PROMPTS[1:2]), 12)
    assert greedy(subject, PROMPTS, 12) == plain and complete(subject, PROMPTS[1], 12).text == plain[1]


def test_common():
    assert [common(p) for p in ([[1, 2, 3], [1, 2, 4]], [[1, 2, 3]], [[1, 2], [1, 2]], [[1], [1, 2]], [[2, 1], [1, 1]])] == [2, 2, 1, 0, 0]


@pytest.mark.embedded
def test_the_real_models_tokens_are_those_of_transformers_generate(embedded_subject):
    prompts = encoded(embedded_subject, [f"<|im_start|>user\n{q.question}<|im_end|>\n<|im_start|>assistant\n" for q in questions("embedded", limit=6)])
    assert continuations(embedded_subject, prompts, 24) == theirs(embedded_subject, prompts, 24)


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
