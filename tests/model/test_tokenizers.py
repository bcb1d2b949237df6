"""What tokenizers add by themselves, tokens without a row, and contexts that are too long, against plain
transformers."""

import dataclasses
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Rtn
from thesislib.compress.lora.sequences import example, sequences
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.evaluate.choice import CUT, multiple_choice
from thesislib.evaluate.generate import complete, greedy
from thesislib.evaluate.perplexity import perplexity
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.triviaqa import triviaqa
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.tokenizers import prepared
from thesislib.sources.corpus import Choice, Question, join

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
FIRST, LAST = "<|im_start|>", "<|im_end|>"
CLOSING = {
    "end": ((), processors.TemplateProcessing(single=f"$A {LAST}", pair=f"$A $B {LAST}", special_tokens=[(LAST, 256)])),
    "both ends": (
        (258,),
        processors.TemplateProcessing(
            single=f"{FIRST} $A {LAST}", pair=f"{FIRST} $A $B {LAST}", special_tokens=[(FIRST, 258), (LAST, 256)]
        ),
    ),
    "two": (
        (),
        processors.TemplateProcessing(
            single=f"$A {LAST} {FIRST}", pair="$A $B", special_tokens=[(FIRST, 258), (LAST, 256)]
        ),
    ),
    "bert": ((258,), processors.BertProcessing((LAST, 256), (FIRST, 258))),
    "roberta": ((258,), processors.RobertaProcessing((LAST, 256), (FIRST, 258))),
}
CLOSING["in a sequence"] = (
    (258,),
    processors.Sequence([processors.ByteLevel(trim_offsets=False), CLOSING["both ends"][1]]),
)
ASKED = [Question("one", "Who is it?", ("x",)), Question("two", "And what of the other one?", ("x",))]
ITEMS = [
    Choice("1", "The dog ran over", ("home.", "into the garden", "up"), 1),
    Choice("2", "One", ("two three four", "a"), 0),
]
TEXT = join("text", [f"Document {i} is here. " * 5 for i in range(8)])


@pytest.fixture
def with_tokenizer(tiny, byte_tokenizer):
    """A factory of tiny subjects whose tokenizer has another post-processor or other special tokens."""

    def make(post=None, family="llama", added=(), prepare=True, special=None, **config):
        raw = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
        if post is not None:
            raw.post_processor = post
        names = {"eos_token": LAST, "pad_token": "<pad>", "extra_special_tokens": [FIRST]} | (special or {})
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw,
            chat_template=byte_tokenizer.chat_template,
            **{k: v for k, v in names.items() if v is not None},
        )
        tokenizer.add_tokens(list(added))
        subject = dataclasses.replace(tiny(family, layers=2, **config), tokenizer=tokenizer)
        if prepare:
            prepared(tokenizer, subject.model.get_input_embeddings().num_embeddings)
        return subject

    return make


def test_the_byte_tokenizer_is_numbered_as_this_file_says(byte_tokenizer):
    assert byte_tokenizer.convert_tokens_to_ids([LAST, "<pad>", FIRST]) == [256, 257, 258]


@pytest.mark.parametrize(("front", "post"), CLOSING.values(), ids=CLOSING)
def test_no_tokenizer_closes_a_text(with_tokenizer, front, post):
    plain, closing = with_tokenizer(prepare=False).tokenizer, with_tokenizer(post, prepare=False).tokenizer
    assert closing("ab")["input_ids"][-1] in (256, 258), "or this test tests nothing"
    opened = with_tokenizer(post).tokenizer
    for text in ("ab", "née", "a b c"):
        assert opened(text)["input_ids"] == [*front, *plain(text)["input_ids"]]
        assert opened(text, add_special_tokens=False, return_offsets_mapping=True) == plain(
            text, add_special_tokens=False, return_offsets_mapping=True
        )


def test_a_setting_that_closes_texts_is_off(with_tokenizer):
    tokenizer = with_tokenizer(prepare=False).tokenizer
    tokenizer.add_eos_token = True
    assert tokenizer("a")["input_ids"][-1] == 256, "or this test tests nothing"
    prepared(tokenizer, 300)
    assert (
        tokenizer.add_eos_token is False
        and tokenizer("a", add_special_tokens=True)["input_ids"]
        == tokenizer("a", add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_closing_tokenizers_give_the_same_answers_and_scores(with_tokenizer, family):
    plain, closing = with_tokenizer(family=family), with_tokenizer(CLOSING["end"][1], family)
    assert greedy(closing, ["Once upon", "No."], 6) == greedy(plain, ["Once upon", "No."], 6)
    assert multiple_choice(closing, ITEMS, task="t").items == multiple_choice(plain, ITEMS, task="t").items
    assert perplexity(closing, TEXT, length=32).value == perplexity(plain, TEXT, length=32).value
    assert example(closing, ASKED[0]) == example(plain, ASKED[0])


def test_what_is_loaded_or_comes_back_closes_no_text(with_tokenizer, tmp_path):
    subject = with_tokenizer(CLOSING["both ends"][1], prepare=False)
    folder = save_checkpoint(subject, tmp_path / "model")
    loaded = load_subject(folder)
    assert loaded.tokenizer("a")["input_ids"] == [258, *subject.tokenizer("a", add_special_tokens=False)["input_ids"]]
    file = folder / "tokenizer.json"
    closing = file.read_text()
    artifact = save_artifact(loaded, tmp_path / "artifact")
    assert load_artifact(artifact).tokenizer("a")["input_ids"] == loaded.tokenizer("a")["input_ids"]
    assert json.loads(closing)["post_processor"]["single"][-1] == {"SpecialToken": {"id": LAST, "type_id": 0}}, (
        "the user's file stays as it is"
    )


# ---------------------------------------------------------------- padding


SPECIAL = {
    "pad without a row": {"pad_token": "[PAD]"},
    "no pad": {"pad_token": None},
    "no pad, no end": {"pad_token": None, "eos_token": None},
    "no pad, end without a row": {"pad_token": None, "eos_token": "[EOS]"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("special", SPECIAL.values(), ids=SPECIAL)
def test_any_token_pads(with_tokenizer, tiny_data, special, family):
    plain, odd = (
        with_tokenizer(family=family),
        with_tokenizer(special=special, vocab_size=256, eos_token_id=None, pad_token_id=None, family=family),
    )
    rows = odd.model.get_input_embeddings().num_embeddings
    assert 0 <= odd.pad_id < rows and all(token >= 256 for token in odd.tokenizer.all_special_ids), (
        "no ordinary token becomes special"
    )
    prompts = ["a", "What is the longest of these prompts, by far?", "née"]
    assert greedy(odd, prompts, 6) == [complete(odd, p, 6).text for p in prompts], "padding is masked"
    assert multiple_choice(odd, ITEMS, task="t").n == 2
    odd.tokenizer.chat_template = None  # its marks have no row either
    if odd.tokenizer.eos_token_id is None or odd.tokenizer.eos_token_id < rows:
        split = sequences("trivia", odd, tiny_data, length=128, validation=0)
        assert split.train.ids.max() < rows
    assert plain.pad_id == 257


def test_lm_eval_without_first_and_end_token(with_tokenizer, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    subject = with_tokenizer(special={"pad_token": None, "eos_token": None})
    assert Setup("arc_easy").measure(subject, arc(tmp_path, ["Why?"] * 3)).n == 3


# ---------------------------------------------------------------- tokens without a row


def test_a_token_without_a_row_is_named_wherever_it_comes_in(with_tokenizer, tmp_path, tiny_data):
    subject = with_tokenizer(added=["zebra", "alpha"])
    number = subject.tokenizer.convert_tokens_to_ids("zebra")
    assert number >= subject.model.get_input_embeddings().num_embeddings
    named = (
        rf"token {number} 'zebra' of the text has no row in the model's embedding, which has "
        rf"{subject.model.get_input_embeddings().num_embeddings}"
    )
    with pytest.raises(BadInput, match=named):
        perplexity(subject, join("t", ["a zebra " * 20]), length=32)
    for ask in (lambda s, p: greedy(s, [p], 4), lambda s, p: complete(s, p, 4)):
        with pytest.raises(BadInput, match=named):
            ask(subject, "a zebra")
    with pytest.raises(BadInput, match=named):
        multiple_choice(subject, [Choice("1", "What", ("a", "zebra"), 0)], task="t")
    for stage in (
        Depth(remove=1, windows=2, length=32, protect_first=0, protect_last=0),
        Width(remove=1, of=2, windows=2, length=32),
    ):
        with pytest.raises(BadInput, match="'alpha' of the text has no row"):
            stage.apply(subject, data=tiny_data)
    with pytest.raises(BadInput, match="has no row"):
        sequences("wikitext", subject, tiny_data, length=64, validation=2)
    with pytest.raises(BadInput, match="has no row"):
        Setup("arc_easy").measure(subject, arc(tmp_path, ["Is it a zebra?"]))
    assert Rtn(bits=4, group=8).apply(subject, data=tiny_data)[0].depth == 2, "what reads no text is not concerned"


# ---------------------------------------------------------------- contexts


def arc(folder, questions, endings=("at home", "out in the garden")):
    path = folder / "ai2_arc" / "easy_validation.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "id": str(i),
            "question": q,
            "answerKey": "AB"[i % 2],
            "choices": {"text": list(endings), "label": ["A", "B"][: len(endings)]},
        }
        for i, q in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_that_does_not_fit_is_cut_from_the_left(tiny, family):
    most = 24
    subject = tiny(family, layers=2, max_position_embeddings=most)
    items = [Choice(str(n), "q" * 3 + "xyz" * n, ("ab", "c" * 9, "d" * 23), 0) for n in range(1, 9)]
    found = multiple_choice(subject, items, task="t", batch=3)
    cut = 0
    for item, outcome in zip(items, found.items, strict=True):
        context = subject.tokenizer(item.context)["input_ids"]
        for ending, score in zip(item.endings, outcome["logprobs"], strict=True):
            tokens = subject.tokenizer(f" {ending}")["input_ids"]
            given = (context + tokens)[-(most + 1) :][:-1]
            logp = subject.model(torch.tensor([given])).logits[0].log_softmax(-1)[-len(tokens) :]
            assert score == pytest.approx(float(logp.gather(1, torch.tensor(tokens)[:, None]).sum()), abs=2e-4)
        cut += len(context) + 24 > most + 1
    assert found.extra[CUT] == cut > 0


@pytest.mark.parametrize("most", [40, 41, 64, 200])
def test_fast_and_lm_eval_cut_alike(tiny, tmp_path, most):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    data = arc(tmp_path, [f"Where {'very ' * n}far is number {n}?  " for n in range(12)])
    subject = tiny(layers=2, max_position_embeddings=most)
    fast, slow = (Setup("arc_easy", fast=fast).measure(subject, data) for fast in (True, False))
    assert fast.column("correct") == [bool(x) for x in slow.column("acc_norm")]
    assert fast.column("correct_unnormalised") == [bool(x) for x in slow.column("acc")]
    assert fast.extra[CUT] == slow.extra[CUT] and (fast.extra[CUT] > 0) == (most < 100)


def test_white_space_behind_a_context_counts_as_in_lm_eval(tiny, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    path = tmp_path / "openbookqa" / "validation.jsonl"
    path.parent.mkdir()
    choice = {"text": ["ab", "a longer one", "c"], "label": ["A", "B", "C"]}
    rows = [
        {"id": str(i), "question_stem": f"stem {i}{' ' * (i % 4)}", "choices": choice, "answerKey": "ABC"[i % 3]}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    subject = tiny(layers=2)
    fast, slow = (Setup("openbookqa", fast=fast).measure(subject, tmp_path) for fast in (True, False))
    assert fast.column("correct") == [bool(x) for x in slow.column("acc_norm")]


def test_endings_that_cannot_be_scored_are_named_in_both(tiny, tmp_path):
    with pytest.raises(
        BadInput, match=r"ending 2 of item 1, 'c{30}', has 31 tokens after its context: .* at most the 24"
    ):
        multiple_choice(tiny(layers=2, max_position_embeddings=24), [Choice("1", "q", ("a", "c" * 30), 0)], task="t")
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    with pytest.raises(BadInput, match="31 of an ending: expected .* at most the 24"):
        Setup("arc_easy").measure(tiny(layers=2, max_position_embeddings=24), arc(tmp_path, ["Why?"], ("a", "c" * 30)))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_beyond_the_context_are_refused(tiny, tiny_data, family):
    subject = tiny(family, layers=3, max_position_embeddings=32)
    assert perplexity(subject, TEXT, length=32).n > 1
    refused = (
        r"windows of 33 tokens are longer than the model's context \(max_position_embeddings 32\): use a length up "
        r"to 32"
    )
    with pytest.raises(BadInput, match=refused):
        perplexity(subject, TEXT, length=33)
    depth = (
        Depth(remove=1, windows=2, length=33, metric=metric, protect_first=0, protect_last=0)
        for metric in ("perplexity", "influence", "taylor")
    )
    for stage in (*depth, Width(remove=1, of=2, windows=2, length=33)):
        with pytest.raises(BadInput, match=refused):
            stage.apply(subject, data=tiny_data)
    for text in ("wikitext", "trivia"):
        with pytest.raises(BadInput, match="windows of 64 tokens are longer"):
            sequences(text, subject, tiny_data, length=64, validation=0)


def test_a_question_without_room_for_its_answer_is_named(tiny):
    subject = tiny(layers=2, max_position_embeddings=48)
    with pytest.raises(
        BadInput, match=r"prompt of 'two' has 44 tokens, and with 5 new ones exceeds the model's context of 48"
    ):
        triviaqa(subject, ASKED, source="s", prompt="thesis", max_new_tokens=5)
    assert triviaqa(subject, ASKED, source="s", prompt="thesis", max_new_tokens=4).n == 2
    with pytest.raises(BadInput, match=r"prompt 'a+' has 60 tokens"):
        complete(subject, "a" * 60, 1)


# ---------------------------------------------------------------- where an answer ends


def saying(monkeypatch, subject, tokens):
    from thesislib.evaluate import generate

    monkeypatch.setattr(generate, "continuations", lambda *_: [tokens])


@pytest.mark.parametrize("content", ["<|turn|>", "<｜User｜>", "[INST]", "<pad>", FIRST, LAST])
def test_an_answer_ends_at_the_first_control_token(with_tokenizer, monkeypatch, content):
    added = {"<|turn|>": False, "<｜User｜>": False, "[INST]": True}
    subject = with_tokenizer(added=[AddedToken(content, special=added[content])] if content in added else [])
    war, rest = (subject.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("War", "assistant"))
    saying(monkeypatch, subject, [*war, subject.tokenizer.convert_tokens_to_ids(content), *rest])
    assert greedy(subject, ["q"], 20) == ["War"]


def test_an_added_word_is_no_control_token(with_tokenizer, monkeypatch):
    subject = with_tokenizer(added=["zebra"])
    saying(monkeypatch, subject, subject.tokenizer("a zebra ran", add_special_tokens=False)["input_ids"])
    assert greedy(subject, ["q"], 20) == ["a zebra ran"]


def test_one_prompt_alone_ends_there_too(tiny, monkeypatch):
    subject = tiny(layers=2)
    ids = subject.tokenizer("q", return_tensors="pt", add_special_tokens=False)["input_ids"]
    said = torch.tensor([[*ids[0].tolist(), *b"War", 258, *b"assistant"]])
    monkeypatch.setattr(type(subject.model), "generate", lambda self, *_, streamer, **__: streamer.put(None) or said)
    expected = subject.tokenizer.decode(list(b"War"))
    assert complete(subject, "q", 20).text == expected


@pytest.mark.parametrize(
    ("named", "expected"), [(5000, [256]), (-1, [256]), ([256, 5000], [256]), ([], [256]), ([7, 256], [7, 256])]
)
def test_end_tokens_without_a_row_end_nothing(tiny, monkeypatch, named, expected):
    from thesislib.model.prompts import end_tokens

    subject = tiny(layers=2)
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", named)
    assert end_tokens(subject) == expected and len(greedy(subject, ["a", "b"], 3)) == 2


@pytest.mark.parametrize("named", ["2", [[2]], True, 2.5])
def test_end_tokens_that_are_no_numbers(tiny, monkeypatch, named):
    subject = tiny(layers=2)
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", named)
    with pytest.raises(BadInput, match="eos_token_id .*expected a token's number, or a list of them"):
        greedy(subject, ["a"], 3)
