"""Training text: apart from evaluation text, packed whole, each example on its own."""

import itertools
import json
import random

import pytest
import torch

from tests.fakes import hub_holds
from thesislib.compress.lora.sequences import (
    NOTHING,
    documents,
    example,
    fullest,
    pack,
    sequences,
    training_questions,
    training_text,
)
from thesislib.compress.training import HeadLoss
from thesislib.errors import BadInput
from thesislib.evaluate import generate
from thesislib.model.forward import final_states
from thesislib.model.prompts import default_prompt, normalise, prompt_for
from thesislib.sources import corpus
from thesislib.sources.rows import SOURCES

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write(folder, task, rows):
    path = folder / f"{SOURCES[task].folder}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def article(title, words, seed=0):
    """The rows of an article as WikiText lays it out."""
    text = random.Random(f"{title}{seed}")
    return [
        {"text": ""},
        {"text": f" = {title} = \n"},
        {"text": ""},
        {"text": " " + " ".join(text.choices(WORDS, k=words)) + " \n"},
    ]


def asked(question, *answers):
    return {"question": question, "answer": {"value": answers[0], "aliases": list(answers)}}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "wikitext", [row for i in range(3) for row in article(f"Test {i}", 40)])
    write(tmp_path, "wikitext_train", [row for i in range(12) for row in article(f"Train {i}", 60)])
    write(tmp_path, "trivia", [asked(f"Who was king {i}?", "Nobody") for i in range(5)])
    write(tmp_path, "trivia_train", [asked(f"Who was queen {i}?", f"Anne {i}", "Ann") for i in range(120)])
    return tmp_path


# ---------------------------------------------------------------- running text


def test_windows_of_text_predict_the_next_token(folder, tiny):
    subject = tiny(layers=1)
    split = sequences("wikitext", subject, folder, length=64, validation=4)
    assert (split.train.targets[:, :-1] == split.train.ids[:, 1:]).all() and (
        split.train.targets[:, -1] == NOTHING
    ).all()
    assert split.train.predicted == len(split.train) * 63
    assert split.train.mask is None and split.train.positions is None and split.train.filled == 1
    # without validation, all of the text but a tail shorter than a sequence
    whole = sequences("wikitext", subject, folder, length=64, validation=0).train.ids.flatten()
    text = training_text(folder)[0].text
    assert subject.tokenizer.decode(whole) == text[: len(whole)] and len(text) - len(whole) < 64


def test_held_out_documents_do_not_train(folder, tiny):
    subject = tiny(layers=1)
    texts = {}
    for seed in (0, 1):
        split = sequences("wikitext", subject, folder, length=64, validation=4, seed=seed)
        assert len(split.held_out) == 4
        assert split.facts["documents"] + split.facts["held_out_documents"] == 12
        train, held = (" ".join(map(subject.tokenizer.decode, part.ids)) for part in (split.train, split.held_out))
        titles = {i for i in range(12) if f"= Train {i} =" in held}
        assert titles and not {i for i in titles if f"= Train {i} =" in train}
        texts[seed] = held
    assert texts[0] != texts[1]
    assert sequences("wikitext", subject, folder, length=64, validation=0).held_out is None


@pytest.mark.parametrize(
    "leak",
    [article("Test 1", 40), article("TEST  1!", 90, seed=5), [{"text": " = Another = \n"}, *article("Test 1", 40)[2:]]],
    ids=["a copy", "the title, other text", "the text, another title"],
)
def test_documents_that_are_evaluated_do_not_train(folder, tiny, leak):
    write(folder, "wikitext_train", [*[row for i in range(12) for row in article(f"Train {i}", 60)], *leak])
    text, dropped = training_text(folder)
    assert dropped == 1
    assert [d.split("\n")[0] for d in documents(text)] == [f" = Train {i} = " for i in range(12)]


def test_text_that_is_all_evaluated_is_an_error(folder):
    write(folder, "wikitext_train", article("Test 1", 40))
    with pytest.raises(BadInput, match=r"all its 1 documents are evaluation text too"):
        training_text(folder)


@pytest.mark.parametrize("rows", [[{"text": ""}], [{"text": " \n"}, {"text": "\n"}]])
def test_empty_text(folder, tiny, rows):
    write(folder, "wikitext_train", rows)
    with pytest.raises(BadInput, match=r"training text 'WikiText-2 train' in .* cannot be used: it is empty"):
        sequences("wikitext", tiny(layers=1), folder)


@pytest.mark.parametrize("text", ["wikitext", "trivia"])
def test_text_shorter_than_one_sequence(folder, tiny, text):
    write(folder, "wikitext_train", article("Short", 20))
    write(folder, "trivia_train", [asked("Who?", "Me")])
    with pytest.raises(
        BadInput,
        match=r"training text '.*' has \d+ tokens, too few for one sequence to train on, of 256 tokens each: .* a "
        r"shorter length$",
    ):
        sequences(text, tiny(layers=1), folder, length=256, validation=0)
    with pytest.raises(
        BadInput, match=r"too few for 9 sequences to hold out and one to train on, .* or less validation"
    ):
        sequences(text, tiny(layers=1), folder, length=64, validation=9)


def test_unknown_text(folder, tiny):
    with pytest.raises(BadInput, match="unknown training text 'wikitxt': did you mean 'wikitext'"):
        sequences("wikitxt", tiny(layers=1), folder)


def test_the_hub_gives_its_train_splits(monkeypatch, tiny):
    seen = []

    def rows_of_the_hub(hub):
        seen.append(hub)
        if "wikitext" in hub[0]:
            return article("Train" if hub[2] == "train" else "Test", 300)
        return [asked(f"{hub[2]} {i}", "yes") | {"entity_pages": {"wiki_context": ["yes"]}} for i in range(200)]

    hub_holds(monkeypatch, rows_of_the_hub)
    sequences("wikitext", tiny(layers=1), "hub", length=64, validation=0)
    assert set(seen) == {("Salesforce/wikitext", "wikitext-2-raw-v1", split) for split in ("train", "test")}
    sequences("trivia", tiny(layers=1), "hub", length=256, validation=1)
    assert ("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", "train") in seen


# ---------------------------------------------------------------- questions


def test_questions_that_are_evaluated_do_not_train(folder):
    rows = [
        asked("who was   King 3", "x"),
        asked("Who was a king 4?", "x"),
        asked("Where was king 3?", "x"),
        asked("WHERE was king 3", "y"),
    ]
    write(folder, "trivia_train", rows)
    kept, dropped = training_questions(folder)
    assert [q.question for q in kept] == ["Where was king 3?"]  # once
    assert dropped == 2
    write(folder, "trivia_train", rows[:2])
    with pytest.raises(BadInput, match="all 2 are evaluation questions too"):
        training_questions(folder)


def test_open_book_questions_do_not_train_either(folder):
    ctxs = [{"title": "t", "text": "Anne 7 was", "has_answer": True}]
    write(folder, "trivia_open", [asked("Who was queen 7?", "Anne 7") | {"ctxs": ctxs}])
    kept, dropped = training_questions(folder)
    assert dropped == 1 and "Who was queen 7?" not in {q.question for q in kept}


@pytest.mark.parametrize("template", [True, False])
def test_the_prompt_that_trains_is_the_prompt_that_is_evaluated(folder, tiny, monkeypatch, template):
    subject = tiny(layers=1)
    if not template:
        monkeypatch.setattr(subject.tokenizer, "chat_template", None)
    question = training_questions(folder)[0][0]
    seen = []
    monkeypatch.setattr(generate, "continuations", lambda _s, ids, *_: seen.append(ids[0].tolist()) or [[0]])
    generate.greedy(subject, [prompt_for(subject, question, default_prompt(subject))], max_new_tokens=1)
    prompt, answer = example(subject, question)
    assert prompt == seen[0]
    assert answer[-1] == subject.tokenizer.eos_token_id
    assert subject.tokenizer.decode(answer[:-1]) == ("" if template else " ") + "Anne 0"


def test_trivia_holds_questions_out_and_says_what_it_left_out(folder, tiny):
    subject = tiny(layers=1)
    long = asked("Who " + "really " * 60 + "was it?", "Me")
    write(folder, "trivia_train", [*[asked(f"Who was queen {i}?", f"Anne {i}") for i in range(120)], long])
    split = sequences("trivia", subject, folder, length=256, validation=3)
    assert split.facts["questions"] + split.facts["held_out_questions"] == 120 and split.facts["too_long"] == 1
    train, held = (" ".join(map(subject.tokenizer.decode, part.ids)) for part in (split.train, split.held_out))
    numbers = [{i for i in range(120) if f"queen {i}?" in text} for text in (train, held)]
    assert len(numbers[0]) + len(numbers[1]) == 120 and not numbers[0] & numbers[1] and numbers[1]
    with pytest.raises(BadInput, match="too few"):
        sequences("trivia", subject, folder, length=16, validation=0)  # none fits


# ---------------------------------------------------------------- packing


def some_examples(n, seed=0, most=40):
    r = random.Random(seed)
    return [
        (
            [r.randrange(1, 200) for _ in range(r.randint(5, most))],
            [r.randrange(1, 200) for _ in range(r.randint(2, 6))],
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_fullest_is_the_best_subset(seed):
    r = random.Random(seed)
    counts = {r.randint(3, 20): r.randint(1, 3) for _ in range(4)}
    room = r.randint(5, 60)
    every = [s for s, n in counts.items() for _ in range(n)]
    best = max(sum(c) for k in range(len(every) + 1) for c in itertools.combinations(every, k) if sum(c) <= room)
    found = fullest(counts, room)
    assert sum(found) == best
    assert all(found.count(s) <= counts.get(s, 0) for s in found)


def test_every_example_is_packed_once_and_whole():
    examples = some_examples(300)
    packed = pack(examples, 128, pad=0)
    found = []
    for ids, targets, segments in zip(
        packed.ids.tolist(), packed.targets.tolist(), packed.segments.tolist(), strict=True
    ):
        for number in range(max(segments) + 1):
            at = [t for t in range(128) if segments[t] == number]
            assert at == list(range(at[0], at[-1] + 1))
            learned = [t for t in at if targets[t] != NOTHING]
            assert learned == list(range(learned[0], at[-1]))  # up to the end, whose last token predicts nothing
            assert [targets[t] for t in learned] == [ids[t + 1] for t in learned]
            found.append((tuple(ids[at[0] : learned[0] + 1]), tuple(ids[learned[0] + 1 : at[-1] + 1])))
        assert all(t == NOTHING for t, s in zip(targets, segments, strict=True) if s < 0)
    assert sorted(found) == sorted((tuple(a), tuple(b)) for a, b in examples)
    assert packed.filled > 0.98
    assert packed.predicted == sum(len(said) for _, said in examples)
    assert len(pack([([1] * 130, [2])], 128, pad=0)) == 0


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3"])
def test_a_packed_example_is_learned_as_if_it_stood_alone(tiny, model_type):
    subject = tiny(model_type, layers=3)
    examples = some_examples(9)
    packed = pack(examples, 96, pad=1)
    assert (packed.segments < 0).any() and (packed.segments.max(1).values > 0).any()
    with torch.no_grad():
        _, states = next(final_states(subject.model, packed.ids, positions=packed.positions, mask=packed.mask))
        here = packed.targets != NOTHING
        together = HeadLoss.apply(states[here], subject.model.get_output_embeddings().weight, packed.targets[here])
        alone = 0.0
        for prompt, said in examples:  # the reference: transformers' own loss on one example at a time
            labels = torch.tensor([[-100] * len(prompt) + said])
            alone += subject.model(torch.tensor([prompt + said]), labels=labels).loss * len(said)
    torch.testing.assert_close(together, alone)


# ---------------------------------------------------------------- the real text


def of(data):
    return {normalise(q.question) for book in (False, True) for q in corpus.questions(data, open_book=book)}


@pytest.mark.embedded
def test_embedded_training_questions_are_not_evaluated():
    kept, dropped = training_questions("embedded")
    trained = {normalise(q.question) for q in kept}
    assert len(trained) == len(kept) == 3609 and dropped == 1  # the horse in Steptoe and Son
    assert not trained & of("embedded")
    assert all(q.aliases[0] for q in kept)


@pytest.mark.embedded
def test_embedded_training_documents_are_not_evaluated():
    train, held = (documents(t) for t in (training_text("embedded")[0], corpus.evaluation_text("embedded")))
    assert len(train) > 150 and len(held) > 100
    assert not {normalise(d) for d in train} & {normalise(d) for d in held}
    assert not {normalise(d.split("\n")[0]) for d in train} & {normalise(d.split("\n")[0]) for d in held}
    whole = normalise(corpus.evaluation_text("embedded").text)
    assert [d[:50] for d in train if normalise(d[-300:]) in whole] == []


@pytest.mark.embedded
@pytest.mark.shared
def test_shared_training_questions_are_not_evaluated(shared_data):
    kept, _ = training_questions(str(shared_data))
    trained = {normalise(q.question) for q in kept}
    assert len(trained) == len(kept) > 8000
    assert not trained & of(shared_data)
    assert not trained & of("embedded")  # nor by who trains on the folder and evaluates what is embedded
    assert not {normalise(q.question) for q in training_questions("embedded")[0]} & of(shared_data)


@pytest.mark.embedded
@pytest.mark.shared
def test_shared_training_documents_are_not_evaluated(shared_data):
    for trained, evaluated in itertools.product((str(shared_data), "embedded"), repeat=2):
        train, held = (documents(t) for t in (training_text(trained)[0], corpus.evaluation_text(evaluated)))
        assert len(train) > 50 and len(held) > 50
        heads = [{normalise(d.strip().split("\n")[0]) for d in half} for half in (train, held)]
        assert not heads[0] & heads[1], (trained, evaluated)
        assert not {normalise(d) for d in train} & {normalise(d) for d in held}
