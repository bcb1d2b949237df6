import gzip
import hashlib
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch

from tests.fakes import hub_holds
from thesislib.errors import BadInput, shown
from thesislib.evaluate.setup import TASKS, Setup
from thesislib.sources import corpus
from thesislib.sources.choices.found import SETS
from thesislib.sources.corpus import Choice, Text, clean_web, join, questions, windows
from thesislib.sources.rows import SOURCES as READ_BY_SEVERAL
from thesislib.sources.rows import default_data, take
from thesislib.sources.rows import rows as read_rows
from thesislib.sources.wheels import wheel_folder

UNICODE = "Grüße aus Kraków!  \t 日本語の文章、🚁 und mehr.\n\nÆon naïve – “quoted” ½ "
CHOICES = list(SETS)
SOURCES = READ_BY_SEVERAL | {name: questions.source for name, questions in SETS.items()}
PIQA = {"goal": "boil an egg", "sol1": "in water", "sol2": "in sand", "label": 0}


def rows(name, data="embedded"):
    return read_rows(SOURCES.get(name, name), data)


def choices(name, data="embedded", limit=None):
    return TASKS[name].items(str(data), Setup(name, limit=limit, fast=name != "winogrande"))


@pytest.fixture
def folder(tmp_path):
    """A function that writes rows to a file of a data folder and gives the folder."""

    def write(name, found):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(row) + "\n" for row in found) if isinstance(found, list) else found
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return tmp_path / "data"

    return write


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("name", ["piqa/validation.jsonl", "piqa/validation.jsonl.gz"])
def test_folder_of_json_lines(folder, name):
    second = PIQA | {"goal": "Käse"}
    assert rows("piqa", folder(name, [PIQA, second])) == [PIQA, second]
    assert rows("piqa", str(folder(name, json.dumps(PIQA) + "\n\n"))) == [PIQA]


def test_missing_file_lists_what_is_there(folder):
    folder("hellaswag/validation.jsonl.gz", [{}])
    with pytest.raises(BadInput, match=r"piqa/validation\.jsonl") as raised:
        rows("piqa", folder("boolq/validation.jsonl", [{}]))
    assert "boolq/validation.jsonl" in one_line(raised) and "hellaswag/validation.jsonl.gz" in one_line(raised)


def test_missing_column_is_named_with_those_there(folder):
    with pytest.raises(BadInput, match="lacks the columns sol1, label") as raised:
        rows("piqa", folder("piqa/validation.jsonl", [{"goal": "a", "sol2": "b", "extra": 1}]))
    assert "goal, sol2, extra" in one_line(raised)


def test_column_missing_further_down(folder):
    with pytest.raises(BadInput, match="sol2") as raised:
        choices("piqa", folder("piqa/validation.jsonl", [PIQA, {k: v for k, v in PIQA.items() if k != "sol2"}]))
    one_line(raised)


def test_empty_file(folder):
    with pytest.raises(BadInput, match="'piqa'.*has no rows"):
        rows("piqa", folder("piqa/validation.jsonl", []))


def compressed():
    content = "".join(json.dumps(PIQA | {"goal": hashlib.sha256(bytes([i])).hexdigest()}) + "\n" for i in range(250))
    return gzip.compress(content.encode())


DAMAGED = {
    "cut off": compressed()[:-2000],
    "overwritten": compressed()[:12] + b"\xff" * 60 + compressed()[72:],
    "no gzip": b"plain",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_gzip(tmp_path, content):
    path = tmp_path / "piqa/validation.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"piqa/validation\.jsonl\.gz") as raised:
        rows("piqa", tmp_path)
    one_line(raised)


@pytest.mark.parametrize(
    "content",
    ["goal,sol1\n", '{"goal": ', b"\xff\xfe\x00", "[1, 2]\n", "3\n"],
    ids=["CSV", "cut", "no UTF-8", "list", "number"],
)
def test_not_json_lines(folder, content):
    with pytest.raises(BadInput) as raised:
        rows("piqa", folder("piqa/validation.jsonl", content))
    assert "piqa" in one_line(raised)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("piqa/validation.jsonl", b"\xef\xbb\xbf" + json.dumps(PIQA).encode()),
        ("piqa/validation.jsonl", gzip.compress(json.dumps(PIQA).encode())),
    ],
    ids=["byte order mark", "gzip under another name"],
)
def test_content_counts_and_not_the_name(folder, name, content):
    assert rows("piqa", folder(name, content)) == [PIQA]


def test_plain_text_called_gz(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl.gz").write_text(json.dumps(PIQA))
    assert rows("piqa", tmp_path) == [PIQA]


NAN, HALF = float("nan"), "half \ud83d a pair"
ASKED = {"question_id": "1", "question": "Who?", "answer": {"value": "x", "aliases": ["x"]}}
HELLA = {
    "ind": 1,
    "activity_label": "Run",
    "ctx_a": "He runs.",
    "ctx_b": "he",
    "endings": ["stops.", "flies."],
    "label": "1",
}
GAP = {"sentence": "It _ was.", "option1": "a", "option2": "b", "answer": "1"}
TWO = {"text": ["a", "b"], "label": ["A", "B"]}
EASY = {"id": "1", "question": "why?", "choices": TWO, "answerKey": "A"}
PASSAGE = {"text": "x is", "has_answer": True}
ODD = [
    *(("wikitext", {"text": "x"}, "text", value) for value in (None, 3.5, NAN, ["a", "b"], {"a": 1}, True, HALF)),
    *(("calibration_c4", {"text": "x"}, "text", value) for value in (None, 7, HALF)),
    *(("trivia", ASKED, "question", value) for value in (None, 7, " ", HALF, ["a"])),
    *(
        ("trivia", ASKED, "answer", value)
        for value in (None, "x", 3, [], [" "], [None], {"value": 3}, {"value": "x", "aliases": ["x", None]}, [HALF], {})
    ),
    *(("trivia_open", ASKED | {"ctxs": [PASSAGE]}, "ctxs", value) for value in (None, ["x"], [{"text": "x"}])),
    *(
        ("trivia_open", ASKED | {"ctxs": [PASSAGE]}, "ctxs", [PASSAGE | value])
        for value in ({"has_answer": "False"}, {"text": None})
    ),
    ("trivia_open", ASKED | {"entity_pages": {"wiki_context": ["x"]}}, "entity_pages", {"wiki_context": [None]}),
    *(("hellaswag", HELLA, "label", value) for value in (True, NAN, 1.5, None, "x")),
    *(("hellaswag", HELLA, "endings", value) for value in (None, [], "ab", ["a", None], ["a", " "])),
    ("hellaswag", HELLA, "ctx_b", None),
    *(("piqa", PIQA, "goal", value) for value in (None, "", 3)),
    *(("arc_easy", EASY, "answerKey", value) for value in (None, 1, "")),
    *(("arc_easy", EASY, "choices", value) for value in (None, ["a"], {"text": []}, TWO | {"label": ["A", "A"]})),
    *(("arc_easy", EASY, "choices", TWO | {"text": value}) for value in (["a", NAN], ["a"], ["a", " "])),
    *(("winogrande", GAP, "answer", value) for value in (1, "", "3", None)),
    ("winogrande", GAP, "sentence", "no gap"),
]


@pytest.mark.parametrize(("task", "row", "column", "value"), ODD)
def test_what_is_no_text_is_named_with_its_row_and_file(folder, task, row, column, value):
    name = SOURCES[task].folder + ".jsonl"
    data = folder(name, [row, row | {column: value}])
    with pytest.raises(BadInput, match=rf"row 2 of .*{name} .*has the {column} .*: expected ") as raised:
        rows(task, data)
    one_line(raised).encode()
    assert rows(task, folder(name, [row, row])) == [row, row]


@pytest.mark.parametrize("value", [None, NAN, [1], {}, HALF, True, 4, "same"])
def test_odd_and_equal_ids_are_only_names(folder, value):
    found = questions(folder("trivia_qa/validation_closed_book.jsonl", [ASKED | {"question_id": value}] * 2))
    assert [q.id for q in found] == [
        {4: "4", "same": "same"}.get(value, "Who?") if isinstance(value, (int, str)) and value is not True else "Who?"
    ] * 2
    items = choices("arc_easy", folder("ai2_arc/easy_validation.jsonl", [EASY | {"id": value}] * 2))
    assert len(items) == 2 and all(isinstance(item.id, str) and item.id.encode() for item in items)


def test_one_alias_need_not_be_a_list(folder):
    data = folder(
        "trivia_qa/validation_closed_book.jsonl", [ASKED | {"answer": {"value": "Ada", "aliases": "Lady Lovelace"}}]
    )
    assert questions(data)[0].aliases == ("Ada", "Lady Lovelace")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"goal": ' + "1" * 10_000 + "}",
        json.dumps([PIQA, PIQA]),
        "é".encode("latin-1"),
        json.dumps(PIQA).encode("utf-16"),
    ],
)
def test_files_that_are_no_json_lines_in_utf8(folder, content):
    with pytest.raises(BadInput, match=r"piqa/validation\.jsonl") as raised:
        rows("piqa", folder("piqa/validation.jsonl", content))
    one_line(raised)


def test_a_folder_called_like_a_file(tmp_path):
    (tmp_path / "piqa/validation.jsonl").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"holds neither piqa/validation\.jsonl"):
        rows("piqa", tmp_path)


def test_unknown_task_and_data(tmp_path):
    with pytest.raises(BadInput, match="did you mean 'wikitext'"):
        rows("wikitxt")
    for data in ("embeded", tmp_path / "none", "x" * 300):
        with pytest.raises(BadInput, match="'embedded', a folder of JSON Lines files") as raised:
            rows("piqa", data)
        assert shown(str(data)) in one_line(raised)
    with pytest.raises(BadInput, match="did you mean 'hellaswag'"):
        Setup("helaswag")
    with pytest.raises(BadInput, match="wikipedia, c4"):
        corpus.calibration_text("books")


def test_default_data(monkeypatch):
    monkeypatch.delenv("THESISLIB_DATA", raising=False)
    assert default_data() == "embedded"
    monkeypatch.setenv("THESISLIB_DATA", "/some/where")
    assert default_data() == "/some/where"


@pytest.mark.parametrize("n", [1, 10, 80, 1000])  # 80 of 1000: a sample of so few is drawn by another algorithm
def test_take_is_seeded_and_a_larger_limit_only_adds(n):
    items = list(range(1000))
    assert take(items, None) == items
    assert take(items, n) == take(items, n)
    assert len(set(take(items, n))) == n
    if n < 1000:
        assert take(items, n) == take(items, 999)[:n]
        assert take(items, n, seed=1) != take(items, n, seed=2)


@pytest.mark.parametrize("limit", [0, -1])
def test_take_refuses_less_than_one(limit):
    with pytest.raises(BadInput, match=f"limit {limit}"):
        take([1, 2, 3], limit)


# ---------------------------------------------------------------- running text


def test_join_keeps_the_beginnings():
    text = join("x", ["één", "", "three"])
    assert text.text == "één\n\n\n\nthree"
    assert [text.text[a:] for a in text.starts] == ["één\n\n\n\nthree", "\n\nthree", "three"]


def test_wikitext_rows_become_articles(folder):
    lines = ["", " = One = \n", "", " Text one . \n", " = = Section = = \n", " = Two = \n", " Text = two = \n"]
    text = corpus.evaluation_text(folder("wikitext2/test.jsonl", [{"text": line} for line in lines]))
    assert text.text == "\n\n".join(lines)
    assert [text.text[a : a + 8] for a in text.starts] == ["\n\n = One", " = One =", " = Two ="]


ARTICLES = [
    "",
    " = One = \n",
    " Text one . \n",
    " = = Section = = \n",
    " = A = \n",
    " Text = two = \n",
    " = Two = it = \n",
]


@pytest.mark.parametrize(
    "change", [str, str.strip, lambda t: t.replace("\n", "\r\n"), lambda t: t.strip() + "\r", lambda t: t.rstrip("\n")]
)
def test_articles_are_found_in_stripped_and_windows_rows(folder, change):
    text = corpus.evaluation_text(folder("wikitext2/test.jsonl", [{"text": change(t)} for t in ARTICLES]))
    assert [text.text[a:].split("=")[1].strip() for a in text.starts[1:]] == ["One", "A", "Two"]
    assert "\r" not in text.text


def test_windows_line_ends_change_no_text(folder, tmp_path):
    plain = corpus.evaluation_text(folder("wikitext2/test.jsonl", [{"text": t} for t in ARTICLES]))
    assert (
        corpus.evaluation_text(folder("wikitext2/test.jsonl", [{"text": t.replace("\n", "\r\n")} for t in ARTICLES]))
        == plain
    )


def test_whole_articles_in_a_row_are_articles_too(folder):
    text = corpus.evaluation_text(
        folder("wikitext2/test.jsonl", [{"text": "".join(ARTICLES[1:4])}, {"text": "".join(ARTICLES[4:6])}])
    )
    assert len(text.starts) == 2


def test_windows_cut_without_special_tokens(byte_tokenizer):
    text = join("x", ["abcdef", "ghijklm"], separator="")
    got = windows(text, byte_tokenizer, length=3)
    assert got.ids.dtype == torch.int64
    assert byte_tokenizer.batch_decode(got.ids) == ["abc", "def", "ghi", "jkl"]  # the tail, m, is dropped
    assert got.document.tolist() == [0, 0, 1, 1]
    assert got.scored_bytes.tolist() == [2, 2, 2, 2]


def test_windows_of_a_tokenizer_that_adds_a_beginning(byte_tokenizer):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 258)])
    adding = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert adding("abcd")["input_ids"][0] == 258  # or this test tests nothing
    assert torch.equal(
        windows(Text("x", "abcd", (0,)), adding, 4).ids, windows(Text("x", "abcd", (0,)), byte_tokenizer, 4).ids
    )


def test_windows_limit_spreads_evenly(byte_tokenizer):
    text = Text("x", "".join(f"{i:03d}" for i in range(101)), (0,))

    def chosen(limit):
        return [int(s) for s in byte_tokenizer.batch_decode(windows(text, byte_tokenizer, 3, limit).ids)]

    assert chosen(1) == [0]
    assert chosen(3) == [0, 50, 100]
    assert chosen(5) == [0, 25, 50, 75, 100]
    assert chosen(101) == chosen(1000) == chosen(None) == list(range(101))
    for limit in range(2, 101):
        gaps = np.diff(chosen(limit))
        assert len(gaps) == limit - 1 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("text", "length", "limit", "message"),
    [
        ("", 4, None, "text 'name' is empty"),
        (" \n ", 2, None, "text 'name' is empty"),
        ("abc", 4, None, "window length 4 is longer than text 'name', which has 3 tokens"),
        ("abc", 1, None, "window length 1 is too small"),
        ("abc", -1, None, "window length -1 is too small"),
        ("abc", 2, 0, "limit 0 is too small"),
    ],
)
def test_windows_that_cannot_be(byte_tokenizer, text, length, limit, message):
    with pytest.raises(BadInput, match=message):
        windows(Text("name", text, (0,)), byte_tokenizer, length, limit)


@pytest.mark.parametrize("length", [2, 3, 7, 31])
def test_scored_bytes_and_words_against_a_slow_count(byte_tokenizer, length):
    text = join("x", [UNICODE, UNICODE[5:], UNICODE * 2])
    owner = [i for i, character in enumerate(text.text) for _ in character.encode()]  # byte, i.e. token -> character
    got = windows(text, byte_tokenizer, length)
    assert len(got.ids) == len(owner) // length
    for i in range(len(got.ids)):
        predicted = owner[i * length + 1 : (i + 1) * length]
        touched = "".join(text.text[c] for c in sorted(set(predicted)))
        assert got.scored_bytes[i] == len(touched.encode())
        assert got.scored_words[i] == len(re.findall(r"\S+", touched))
        assert got.document[i] == max(d for d, start in enumerate(text.starts) if start <= owner[i * length])


def test_windows_limit_keeps_what_belongs_to_each(byte_tokenizer):
    text = join("x", [f"{i} {'ß' * i}" for i in range(30)])
    whole, some = windows(text, byte_tokenizer, 11), windows(text, byte_tokenizer, 11, limit=5)
    which = np.linspace(0, len(whole.ids) - 1, 5).round().astype(int)
    for all_of_them, chosen in zip(whole, some, strict=True):
        assert chosen.tolist() == all_of_them[which].tolist()


def test_clean_web_drops_menus_and_keeps_prose():
    prose = [f"The {i}th sentence of this page is plain prose and ends as such sentences do." for i in range(10)]
    menu = "Home About Contact Shop Login Register Privacy Terms. "
    kept = clean_web(
        "\n".join(
            [
                menu + " ".join(prose) + " and what follows here has no end",
                menu * 20,
                "Too short to be of use to anyone here.",
                "",
            ]
        )
    )
    assert kept == [" ".join(prose)]


def test_clean_web_drops_a_page_that_is_mostly_menu():
    prose = " ".join(
        f"The {i}th sentence of this page is plain prose and ends as such sentences do." for i in range(10)
    )
    assert clean_web(prose) == [prose]
    assert clean_web(prose + " Home About Contact Shop Login Register Privacy Terms." * 30) == []


# ---------------------------------------------------------------- questions


def trivia(question, answer, aliases=(), **columns):
    return {
        "question_id": f"id {question}",
        "question": question,
        "answer": {"value": answer, "aliases": list(aliases)},
    } | columns


def passages(*texts):
    return {"ctxs": [{"title": "t", "text": text, "has_answer": has} for text, has in texts]}


def test_closed_book(folder):
    data = folder("trivia_qa/validation_closed_book.jsonl", [trivia("who?", "Ada", ["Ada", "Lady Lovelace"])])
    assert questions(data) == [corpus.Question("id who?", "who?", ("Ada", "Lady Lovelace"), None)]


def test_closed_book_without_an_answer(folder):
    with pytest.raises(
        BadInput,
        match=r"row 1 of .*validation_closed_book\.jsonl .* the answer \{.*null.*at least one of them not blank",
    ):
        questions(folder("trivia_qa/validation_closed_book.jsonl", [trivia("who?", None)]))


def test_open_book_gives_the_shortest_passage_that_holds_an_answer(folder):
    found = [
        trivia(
            "one", "Ada", **passages(("Ada " * 9, True), ("short", False), ("It was Ada.", True), ("Ada. " * 5, True))
        ),
        trivia("none", "Ada", **passages(("nobody", False))),
        trivia("two", "Bob", **passages(("Bob", True))),
    ]
    got = questions(folder("trivia_qa/validation_open_book.jsonl", found), open_book=True)
    assert [(q.question, q.context) for q in got] == [("one", "It was Ada."), ("two", "Bob")]


def test_open_book_without_any_passage(folder):
    data = folder("trivia_qa/validation_open_book.jsonl", [trivia("none", "Ada", **passages(("nobody", False)))])
    with pytest.raises(BadInput, match="no question in .* has a passage"):
        questions(data, open_book=True)


def test_hub_rows_are_cut_into_passages(monkeypatch):
    article = ["word"] * 250
    article[120], article[240] = "ADA,", "Adamant"  # in a passage of 100 words; in one of 50, which names no Ada
    pages = {"wiki_context": [" \n".join(article), "other " * 60 + "Ada " + "other " * 60]}
    found = [
        trivia("one", "Ada", entity_pages=pages),
        trivia("none", "Zoe", entity_pages=pages),
        trivia("empty", "Ada", entity_pages={"wiki_context": []}),
    ]
    asked = []
    hub_holds(monkeypatch, lambda hub: asked.append(hub) or found)
    (got,) = questions("hub", open_book=True)
    assert asked == [("mandarjoshi/trivia_qa", "rc.wikipedia", "validation")]
    assert got.question == "one"
    assert got.context.split() == article[100:200]


def test_hub_passages_do_not_run_from_one_article_into_the_next(monkeypatch):
    found = [trivia("one", "Ada", entity_pages={"wiki_context": ["All about something else.", "Ada lived here."]})]
    hub_holds(monkeypatch, lambda hub: found)
    (got,) = questions("hub", open_book=True)
    assert got.context == "Ada lived here."


def test_questions_limit_is_seeded(folder):
    data = folder("trivia_qa/validation_closed_book.jsonl", [trivia(str(i), "x") for i in range(50)])
    five, ten = questions(data, limit=5), questions(data, limit=10)
    assert ten[:5] == five and len(ten) == 10
    assert questions(data, limit=5, seed=1) != five


# ---------------------------------------------------------------- multiple choice

HELLASWAG = {
    "ind": 7, "activity_label": "Home", "ctx_a": "[header] How to paint [title] Get paint. [step] Buy "
        "it.", "ctx_b": "the Man paints",
    "endings": ["[substeps] Red.", "a wall [title] Then rest.", "b", "c"], "label": "2",
}  # fmt: skip
KEYED = {"id": "k", "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}, "answerKey": "B"}


def test_hellaswag_wording(folder):
    (got,) = choices("hellaswag", folder("hellaswag/validation.jsonl", [HELLASWAG]))
    assert got == Choice(
        "7/0", "Home: How to paint. Get paint. Buy it. The man paints", (" Red.", "a wall. Then rest.", "b", "c"), 2
    )


def test_other_wordings(folder):
    folder("piqa/validation.jsonl", [PIQA])
    folder("ai2_arc/easy_validation.jsonl", [KEYED | {"question": "why?"}])
    data = folder("openbookqa/validation.jsonl", [KEYED | {"question_stem": "because", "answerKey": " C"}])
    assert choices("piqa", data) == [Choice("0", "Question: boil an egg\nAnswer:", ("in water", "in sand"), 0)]
    assert choices("arc_easy", data) == [Choice("k", "Question: why?\nAnswer:", ("one", "two", "three"), 1)]
    assert choices("openbookqa", data) == [Choice("k", "because", ("one", "two", "three"), 2)]


def test_items_keep_their_names_whatever_the_limit(folder):
    data = folder("piqa/validation.jsonl", [PIQA | {"goal": str(i)} for i in range(30)])
    whole = {item.id: item for item in choices("piqa", data)}
    some = choices("piqa", data, limit=7)
    assert len(whole) == 30 and len(some) == 7
    assert all(whole[item.id] == item for item in some)
    assert choices("piqa", data, limit=12)[:7] == some


@pytest.mark.parametrize("change", [{"label": "x"}, {"label": 5}, {"label": -1}])
def test_label_that_names_no_ending(folder, change):
    with pytest.raises(BadInput, match="label"):
        choices("piqa", folder("piqa/validation.jsonl", [PIQA | change]))


def test_answer_key_that_names_no_choice(folder):
    with pytest.raises(BadInput, match="'Z'"):
        choices("arc_easy", folder("ai2_arc/easy_validation.jsonl", [KEYED | {"question": "why?", "answerKey": "Z"}]))


# ---------------------------------------------------------------- the embedded text


@pytest.fixture(scope="session")
def wikipedia():
    """(id, body) of the raw blocks, by a parser of its own."""
    raw = (wheel_folder("exllamav3") / "exllamav3/conversion/standard_cal_data/wiki.utf8").read_text("utf8")
    return [(re.search(r'id="(\d+)"', block)[1], block.split("\n", 1)[1]) for block in raw.split("<doc ")[1:]]


def halves():
    return corpus.evaluation_text("embedded"), corpus.calibration_text("wikipedia", "embedded")


def documents(text):
    return [text.text[a:b].removesuffix("\n\n") for a, b in itertools.zip_longest(text.starts, text.starts[1:])]


@pytest.mark.embedded
def test_embedded_sizes():
    assert len(questions("embedded")) == 7993
    assert len(choices("hellaswag", "embedded")) == 10042


@pytest.mark.embedded
@pytest.mark.parametrize("task", SOURCES)
def test_every_embedded_task_reads(task):
    found = rows(task, "embedded")
    columns = SOURCES[task].columns
    if task == "trivia_open":
        assert all(q.context and q.aliases and q.question for q in questions("embedded", open_book=True))
    else:
        assert all(column in row for row in found for column in columns)
    if task in CHOICES:
        items = [SETS[task].item(i, row) for i, row in enumerate(found)]
        assert all(0 <= item.label < len(item.endings) and item.context for item in items)


@pytest.mark.embedded
def test_squad_passages_hold_their_answers():
    found = questions("embedded", open_book=True)
    assert len(found) == 1000
    assert all(any(alias in q.context for alias in q.aliases) for q in found)


@pytest.mark.embedded
def test_wikipedia_halves_share_no_document(wikipedia):
    evaluation, calibration = (documents(half) for half in halves())
    assert len(evaluation) > 100 and len(calibration) > 100
    assert not set(evaluation) & set(calibration)
    assert len(set(evaluation)) == len(evaluation)
    # every long block is in one of them, and only those
    long = [body for _, body in wikipedia if len(body) > 1400]
    starts = {d[:40] for d in evaluation} | {d[:40] for d in calibration}
    plain = [body for body in long if not re.search("[&<]|formula_", body[:60])]
    assert len(plain) > 0.9 * len(long)
    assert [body[:40] for body in plain if body.strip()[:40] not in starts] == []


@pytest.mark.embedded
def test_wikipedia_is_clean():
    for half in halves():
        assert "formula_" not in half.text
        assert "&lt;" not in half.text and "&amp;" not in half.text
        assert "<doc" not in half.text and "</doc>" not in half.text
        assert min(map(len, documents(half))) > 1000


@pytest.mark.embedded
def test_web_text_is_prose():
    found = documents(corpus.calibration_text("c4", "embedded"))
    assert len(found) > 100
    assert min(map(len, found)) >= 500


@pytest.mark.embedded
def test_embedded_windows_count_the_bytes_of_their_tokens(embedded_subject):
    # a byte-level vocabulary writes each byte of a token as one character
    tokenizer = embedded_subject.tokenizer
    got = windows(corpus.evaluation_text("embedded"), tokenizer, 512, limit=50)
    lengths = [sum(map(len, tokenizer.convert_ids_to_tokens(ids[1:]))) for ids in got.ids.tolist()]
    assert got.scored_bytes.tolist() == lengths


@pytest.mark.embedded
def test_hellaswag_is_worded_as_the_harness_words_it():
    harness = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="lm-eval is an extra")
    raw = rows("hellaswag", "embedded")
    for item, row in zip(choices("hellaswag", "embedded"), raw, strict=True):
        context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
        assert item.context == harness.preprocess(row["activity_label"] + ": " + context)
        assert list(item.endings) == [harness.preprocess(ending) for ending in row["endings"]]


# ---------------------------------------------------------------- the shared folder


@pytest.mark.embedded
@pytest.mark.shared
def test_wikitext_2_as_it_is_known(shared_data, embedded_subject):
    text = corpus.evaluation_text(shared_data)
    ids = embedded_subject.tokenizer(text.text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 304_986
    assert len(windows(text, embedded_subject.tokenizer, 512).ids) == 595
    assert len(windows(text, embedded_subject.tokenizer, 2048).ids) == 148
    assert len(text.starts) == 62 + 1  # the articles, and the blank line before the first
    assert all(text.text[a:].startswith(" = ") for a in text.starts[1:])


@pytest.mark.embedded
@pytest.mark.shared
def test_shared_calibration_holds_nothing_of_the_evaluation_half(shared_data, wikipedia):
    kept = corpus.calibration_text("wikipedia", shared_data)
    raw = {row["id"]: row["text"] for row in rows("calibration_wikipedia", shared_data)}
    evaluation = {number for number, _ in wikipedia if hashlib.sha256(number.encode()).digest()[-1] % 2 == 0}
    # were there no overlap, or were all dropped, the test would say nothing
    assert evaluation & set(raw) and len(kept.starts) > 100
    for number in evaluation & set(raw):
        assert raw[number] not in kept.text
    # and by wording, in case the same article stands under two numbers
    sentences = {d[-80:] for d in documents(corpus.evaluation_text("embedded"))}
    assert [s for s in sentences if s in kept.text] == []


@pytest.mark.shared
def test_every_task_of_the_folder_reads(shared_data):
    for task, source in SOURCES.items():
        assert all(column in row for row in rows(task, shared_data) for column in source.columns)
    assert all(q.context for q in questions(shared_data, open_book=True))
    for task in CHOICES:
        assert all(0 <= SETS[task].item(i, row).label < 5 for i, row in enumerate(rows(task, shared_data)))


@pytest.mark.parametrize("value", [["copper"], {"a": "copper"}, 5])
def test_an_answer_whose_value_is_no_text_is_refused(tiny_data, tmp_path, value):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    file = data / "trivia_qa" / "validation_closed_book.jsonl"
    first, *rest = [json.loads(line) for line in file.read_text("utf8").splitlines()]
    first["answer"] = {**first["answer"], "value": value}
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, *rest)), "utf8")
    with pytest.raises(BadInput, match="row 1.*answer"):
        corpus.questions(str(data))
