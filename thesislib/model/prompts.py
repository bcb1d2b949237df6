"""The prompts that put a question to a subject, in evaluation and in training, and the tokens that end its answer."""

import hashlib
import re
import string
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from thesislib.errors import BadInput
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import rows_of
from thesislib.sources.corpus import Question

PROMPTS = ("chat", "thesis")
TODAY = datetime(2024, 7, 26)  # today's date in every chat template: the one that Llama 3.2's falls back to
QUIET = {"enable_thinking": False, "thinking": False}  # switches of Qwen3 and SmolLM3, and of DeepSeek and Granite
_THOUGHT = re.compile(
    r"(<\|?(?:think|thinking|thought|reasoning)\|?>|\[THINK\])(?!.*(?:</|\[/))", re.DOTALL | re.IGNORECASE
)


def normalise(text: str) -> str:
    """An answer as it is compared: lower case, no punctuation or articles, single spaces.

    As in TriviaQA's own evaluation script.
    """
    text = text.lower().replace("_", " ")
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def prompt_for(subject: Subject, question: Question, style: str) -> str:
    """The prompt of a question: the thesis's own text, or that text in a chat template.

    In a template thinking is switched off, since an answer has few tokens. The date is `TODAY`, so the prompt is the
    same on every day.

    Args:
        subject: that is asked.
        question: its context, if any, is part of the prompt.
        style: 'thesis' for the bare text, 'chat' for the user's turn in the subject's chat template.

    Raises:
        BadInput: a template that fails, leaves the question out or opens a thought.
    """
    bare = f"Question: {question.question} Answer:"
    if question.context is not None:
        bare = f"Context: {question.context} {bare}"
    return bare if style == "thesis" else _in_chat(subject, bare)


def _in_chat(subject: Subject, text: str) -> str:
    """The chat template with `text` as the user's turn, up to where the answer begins."""
    instead = "ask with --prompt thesis, which needs no template"
    settings: dict[str, Any] = {"chat_template": _dated(chat_template(subject)), **QUIET}
    try:
        turn = str(
            subject.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **settings
            )
        )
    except Exception as error:  # a template is a program and can raise anything
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the chat template of {subject.name} cannot put a question ({why}): {instead}") from error
    _, literal, after = turn.rpartition(text.strip())
    if not literal and " ".join(text.split()) not in " ".join(turn.split()):
        raise BadInput(f"the chat template of {subject.name} leaves the question out: {instead}")
    if thought := _THOUGHT.search(after if literal else turn):
        raise BadInput(
            f"the chat template of {subject.name} opens a thought ({thought[1]}) in which an answer would end: "
            f"{instead}"
        )
    return turn


def chat_template(subject: Subject) -> str:
    """The text of the subject's chat template; of several, the one called 'default'.

    Raises:
        BadInput: no template, or several and none called 'default'.
    """
    template = subject.tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise BadInput(
                f"{subject.name} has the chat templates {', '.join(sorted(template))} and none called 'default': give "
                "one of them that name in its tokenizer's files, or ask with --prompt thesis, which needs no template"
            )
        template = template["default"]
    if not template:
        raise BadInput(f"{subject.name} has no chat template: use prompt 'thesis'")
    return template


def _dated(template: str) -> str:
    """The template with its own `strftime_now`, which hides transformers' and gives `TODAY`."""
    # a macro, because transformers hands no functions to a template; its final line end is not printed
    return _calendar() + template if "strftime_now" in template else template


@cache
def _calendar() -> str:
    """A macro that replaces strftime's codes by the parts of `TODAY`."""
    letters = string.ascii_letters.replace("s", "")  # %s depends on the time zone of the machine
    codes = sorted({f"%{modifier}{letter}" for letter in letters for modifier in ("-", "")}, reverse=True)
    parts = [(code, TODAY.strftime(code)) for code in codes]
    filters = "".join(f" | replace({code!r}, {text!r})" for code, text in parts if text != code)
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"


def default_prompt(subject: Subject) -> str:
    """'chat' for a subject with a chat template, else 'thesis'."""
    return "chat" if subject.tokenizer.chat_template else "thesis"


def adds_bos(subject: Subject, prompt: str) -> bool:
    """Whether the tokenizer shall add its special tokens to a prompt: not if a chat template already wrote them."""
    bos = subject.tokenizer.bos_token
    return not (bos and prompt.startswith(bos))


def prompt_facts(subject: Subject, prompts: Sequence[str], style: str) -> dict:
    """The facts about its prompts that a record keeps.

    Returns:
        `prompts_sha256`: over all prompts, each with a zero byte behind it. `special_tokens`: whether the tokenizer
        adds its own in front. With a chat template also `template_sha256`, `template_date` and `thinking`.
    """
    text = "".join(f"{prompt}\0" for prompt in prompts).encode()
    special = all(adds_bos(subject, prompt) for prompt in prompts)
    facts = {"prompts_sha256": hashlib.sha256(text).hexdigest(), "special_tokens": special}
    if style == "chat":
        facts["template_sha256"] = hashlib.sha256(chat_template(subject).encode()).hexdigest()
        facts |= {"template_date": f"{TODAY:%Y-%m-%d}", "thinking": False}
    return facts


def end_tokens(subject: Subject) -> list[int]:
    """The tokens that end a text: the model's, else the tokenizer's. Only tokens with a row of the embedding count.

    Raises:
        BadInput: an eos_token_id that is neither a token nor a list of tokens.
    """
    rows = rows_of(subject.model)
    for eos in (subject.model.generation_config.eos_token_id, subject.tokenizer.eos_token_id):
        if eos is None:
            continue
        tokens = eos if isinstance(eos, (list, tuple)) else [eos]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
            raise BadInput(
                f"the generation settings of {subject.name} have the eos_token_id {eos!r}: expected a token's "
                "number, or a list of them"
            )
        if usable := [token for token in tokens if 0 <= token < rows]:
            return usable
    return []


def control_tokens(subject: Subject) -> set[int]:
    """The tokens that end an answer: end tokens, special tokens, and added tokens spelt ``<|like_this|>``.

    The last are there because not every checkpoint flags the marks of its turns as special.
    """
    tokenizer = subject.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {token for token, t in added.items() if t.special or re.fullmatch(r"<[|｜].*[|｜]>", t.content)}
    return {*end_tokens(subject), *tokenizer.all_special_ids, *marks}
