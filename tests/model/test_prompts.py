"""Chat templates: not thinking, the same on every day, refused where they cannot put a question; and what a record says
of its prompts."""

import hashlib

import pytest
import transformers.utils.chat_template_utils as utils

from thesislib.errors import BadInput
from thesislib.evaluate.triviaqa import triviaqa
from thesislib.model import prompts
from thesislib.model.prompts import TODAY, prompt_for
from thesislib.sources.corpus import Question

ASKED = Question("1", "Who made <b>it</b>?", ("x",))
BARE = "Question: Who made <b>it</b>? Answer:"
TURN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n"
)
CHATML = TURN + "{% endif %}"
SAID = f"<|im_start|>user\n{BARE}<|im_end|>\n<|im_start|>assistant\n"
DATE = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b "
    "%Y') %}{% endif %}{% endif %}"
    "Today: {{ date_string }}\n"
)
UNTHOUGHT = "<think>\n\n</think>\n\n"
GOOD = {
    "plain": (CHATML, SAID),
    "Qwen3's": (TURN + "{% if enable_thinking is defined and enable_thinking is false %}" + UNTHOUGHT + "{% endif "
        "%}{% endif %}", SAID + UNTHOUGHT),
    "DeepSeek's": (TURN + "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}", SAID + "</think>"),
    "SmolLM3's": (
        "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
        "{{ 'Today: ' ~ strftime_now('%d %B %Y') ~ (' /think' if enable_thinking else ' /no_think') ~ '\n' }}" + CHATML,
        "Today: 26 July 2024 /no_think\n" + SAID,
    ),
    "Llama 3.2's": (DATE + CHATML, "Today: 26 Jul 2024\n" + SAID),
    "a date in a macro": ("{% macro day(x) %}{{ strftime_now('%A, %-d/%m/%y') }}{{ x }}{% endmacro %}{{ day('!') "
        "}}\n" + CHATML, "Friday, 26/07/24!\n" + SAID),
    "line ends": ("\n" + CHATML + "{{ strftime_now('') }}", "\n" + SAID),
}  # fmt: skip


@pytest.fixture
def with_template(tiny, monkeypatch):
    def make(template):
        subject = tiny(layers=1)
        monkeypatch.setattr(subject.tokenizer, "chat_template", template)
        return subject

    return make


@pytest.mark.parametrize(("template", "expected"), GOOD.values(), ids=GOOD)
def test_templates_do_not_think_and_know_one_day(with_template, monkeypatch, template, expected):
    subject = with_template(template)
    assert prompt_for(subject, ASKED, "chat") == expected

    class Later(utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(utils, "datetime", Later)
    assert prompt_for(subject, ASKED, "chat") == expected


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A %H:%M:%S", "%x %X %p %j", "no date", "100 %", "%-d.%-m."]
)
def test_the_day_is_spelt_as_strftime_spells_it(with_template, form):
    subject = with_template("{{ strftime_now('" + form + "') }}|" + CHATML)
    assert prompt_for(subject, ASKED, "chat") == TODAY.strftime(form) + "|" + SAID


BAD = {
    "an open thought": (TURN + "<think>\n{% endif %}", r"opens a thought \(<think>\)"),
    "another open thought": (TURN + "[THINK]{% endif %}", r"opens a thought \(\[THINK\]\)"),
    "a system message": (
        "{{ raise_exception('A system message is required.') }}" + CHATML,
        r"cannot put a question \(A system message is required\.\)",
    ),
    "no syntax": ("{% if %}", "cannot put a question"),
    "what is undefined": ("{{ a.b.c }}", "cannot put a question"),
    "no question": ("Hello", "leaves the question out"),
    "parts": ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "leaves the question out"),
    "markup": ("{% for m in messages %}{{ m['content'] | e }}{% endfor %}", "leaves the question out"),
    "a reach for code": ("{{ ''.__class__.__mro__ }}" + CHATML, "cannot put a question"),
    "too much": ("{% for i in range(10000000000) %}x{% endfor %}", "cannot put a question"),
    "itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "cannot put a question"),
    "several": ({"rag": CHATML, "tool_use": CHATML}, "has the chat templates rag, tool_use and none called 'default'"),
}


@pytest.mark.parametrize(("template", "message"), BAD.values(), ids=BAD)
def test_templates_that_cannot_put_a_question(with_template, template, message):
    subject = with_template(template)
    with pytest.raises(BadInput, match=message + ".*--prompt thesis") as raised:
        triviaqa(subject, [ASKED], source="s")
    assert "\n" not in str(raised.value)
    assert triviaqa(subject, [ASKED], source="s", prompt="thesis", max_new_tokens=2).n == 1


def test_of_several_templates_the_default_is_taken(with_template):
    assert prompt_for(with_template({"default": CHATML, "tool_use": "x"}), ASKED, "chat") == SAID


def test_a_record_says_what_was_asked(with_template):
    subject = with_template(GOOD["Llama 3.2's"][0])
    more = [ASKED, Question("2", "Which?", ("y",))]

    def settings(items, **how):
        return triviaqa(subject, items, source="s", max_new_tokens=2, **how).provenance["settings"]

    chat, thesis = settings(more), settings(more, prompt="thesis")
    texts = [prompt_for(subject, q, "chat") for q in more]
    assert chat["prompts_sha256"] == hashlib.sha256("".join(f"{t}\0" for t in texts).encode()).hexdigest()
    assert chat["template_sha256"] == hashlib.sha256(subject.tokenizer.chat_template.encode()).hexdigest()
    assert (chat["template_date"], chat["thinking"], chat["max_new_tokens"], chat["special_tokens"]) == (
        "2024-07-26",
        False,
        2,
        True,
    )
    assert (
        thesis["prompts_sha256"] != chat["prompts_sha256"] != settings(more[:1])["prompts_sha256"]
        and "template_sha256" not in thesis
    )


@pytest.mark.embedded
@pytest.mark.parametrize("open_book", [False, True])
def test_the_embedded_models_prompts_are_its_templates_own(embedded_subject, open_book):
    from thesislib.sources.corpus import questions

    for question in questions("embedded", open_book=open_book, limit=50):
        bare = prompt_for(embedded_subject, question, "thesis")
        plain = embedded_subject.tokenizer.apply_chat_template(
            [{"role": "user", "content": bare}], tokenize=False, add_generation_prompt=True
        )
        assert prompt_for(embedded_subject, question, "chat") == plain
    flagged = {token for token, t in embedded_subject.tokenizer.added_tokens_decoder.items() if t.special}
    assert prompts.control_tokens(embedded_subject) == flagged and len(flagged) > 3
