import pytest

from thesislib.errors import BadInput
from thesislib.evaluate.answers import TIERS, tier
from thesislib.evaluate.triviaqa import compare, default_prompt, triviaqa
from thesislib.model.prompts import normalise, prompt_for
from thesislib.sources.corpus import Question

ASKED = [
    Question("1", "Who wrote Tom Sawyer?", ("Mark Twain", "Samuel Clemens")),
    Question("2", "Which country is it?", ("US",)),
    Question("3", "Which film?", ("The Lord of the Rings: The Two Towers",)),
    Question("4", "What is the capital?", ("Paris",)),
]
ANSWERS = ["Mark Twain.", "It is Austria.", "lord rings of two towers, 2002", "London"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("AC/DC", "ac dc"),
        ("an_apple", "apple"),
        ("rock 'n' roll", "rock n roll"),
        ("Théâtre", "théâtre"),
        ("a the an", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "aliases", "expected"),
    [
        ("Mark Twain", ("Mark Twain",), "exact"),
        ("the mark twain!", ("Mark Twain",), "exact"),
        ("It was not Mark Twain", ("Mark Twain",), "substring"),
        ("Austria", ("US",), "substring"),
        ("one two three four", ("one two three four five",), "overlap"),  # 4 of 5 words
        ("one two three", ("one two three four five",), ""),
        ("Twain", ("Mark Twain",), ""),  # half of two words
        ("London", ("Paris",), ""),
        ("", ("Paris",), ""),
        ("anything", ("", "the"), ""),  # an alias that normalises to nothing matches nothing
    ],
)
def test_tier(answer, aliases, expected):
    assert tier(answer, aliases) == expected


def test_tiers_are_counted_apart_and_together(tiny, monkeypatch):
    monkeypatch.setattr("thesislib.evaluate.triviaqa.greedy", lambda *_: ANSWERS)
    found = triviaqa(tiny(), ASKED, source="test", prompt="thesis")
    assert found.column("tier") == ["exact", "substring", "overlap", ""]
    assert found.value == 0.75 and found.n == 4
    assert [found.extra[t]["value"] for t in TIERS] == [0.25, 0.25, 0.25]
    assert found.low < 0.75 < found.high
    assert compare(found, found).p == 1.0


def test_prompts(tiny):
    subject = tiny()
    assert prompt_for(subject, ASKED[0], "thesis") == "Question: Who wrote Tom Sawyer? Answer:"
    with_passage = Question("1", "Who?", ("x",), "A passage.")
    assert prompt_for(subject, with_passage, "thesis") == "Context: A passage. Question: Who? Answer:"


@pytest.mark.embedded
def test_chat_prompt_is_the_models_own_and_the_default(embedded_subject):
    assert default_prompt(embedded_subject) == "chat"
    said = prompt_for(embedded_subject, ASKED[0], "chat")
    assert said.endswith("<|im_start|>user\nQuestion: Who wrote Tom Sawyer? Answer:<|im_end|>\n<|im_start|>assistant\n")


def test_bad_input(tiny, monkeypatch):
    subject = tiny()
    monkeypatch.setattr(subject.tokenizer, "chat_template", None)
    with pytest.raises(BadInput, match="has no chat template: use prompt 'thesis'"):
        triviaqa(subject, ASKED, source="x", prompt="chat")
    with pytest.raises(BadInput, match="unknown prompt 'thesi': did you mean 'thesis'"):
        triviaqa(subject, ASKED, source="x", prompt="thesi")
    with pytest.raises(BadInput, match="no questions"):
        triviaqa(subject, [], source="x")
