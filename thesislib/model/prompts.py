"""How a question is put to a subject, in evaluation as in training, and how answers and questions are spelt to be
compared."""

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
TODAY = datetime(2024, 7, 26)  # every day's date in a template: the one that Llama 3.2's falls back to
QUIET = {
    "enable_thinking": False,
    "thinking": False,
}  # as Qwen3's and SmolLM3's templates are told, and DeepSeek's and Granite's
_THOUGHT = re.compile(
    r"(<\|?(?:think|thinking|thought|reasoning)\|?>|\[THINK\])(?!.*(?:</|\[/))", re.DOTALL | re.IGNORECASE
)


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, articles dropped, white space folded (TriviaQA's own evaluation script)."""
    text = text.lower().replace("_", " ")
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def prompt_for(subject: Subject, question: Question, style: str) -> str:
    """The thesis's prompt, bare ('thesis') or as the user's turn in the subject's own chat template ('chat').

    A template that can think is told not to, since an answer has few tokens, and today is `TODAY` in it, so that the
    prompt is the same on every day.

    Raises:
        BadInput: a template that cannot put the question.
    """
    bare = f"Question: {question.question} Answer:"
    if question.context is not None:
        bare = f"Context: {question.context} {bare}"
    return bare if style == "thesis" else _in_chat(subject, bare)


def _in_chat(subject: Subject, text: str) -> str:
    """The user's turn with `text`, up to where the subject's answer begins."""
    instead = "ask with --prompt thesis, which needs no template"
    template = chat_template(subject)
    try:
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **QUIET}
        turn = str(
            subject.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], chat_template=_dated(template), **settings
            )
        )
    except Exception as error:  # a template is a program of its own: whatever it raises is its message
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the chat template of {subject.name} cannot put a question ({said}): {instead}") from error
    _, found, after = turn.rpartition(text.strip())
    if not found and " ".join(text.split()) not in " ".join(turn.split()):
        raise BadInput(f"the chat template of {subject.name} leaves the question out: {instead}")
    if thought := _THOUGHT.search(after if found else turn):
        raise BadInput(
            f"the chat template of {subject.name} opens a thought ({thought[1]}) in which an answer would end: "
            f"{instead}"
        )
    return turn


def chat_template(subject: Subject) -> str:
    """The text of the subject's chat template; of several, the one called 'default'.

    Raises:
        BadInput: none, or several and none called 'default'.
    """
    found = subject.tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            raise BadInput(
                f"{subject.name} has the chat templates {', '.join(sorted(found))} and none called "
                "'default': "
                "give one of them that name in its tokenizer's files, or ask with --prompt thesis, which needs "
                "no template"
            )
        found = found["default"]
    if not found:
        raise BadInput(f"{subject.name} has no chat template: use prompt 'thesis'")
    return found


def _dated(template: str) -> str:
    """The template with a `strftime_now` of its own, in front of transformers', that says `TODAY`."""
    # a macro, because transformers hands no functions to a template; the line end belongs to the block and is not
    # printed
    return _calendar() + template if "strftime_now" in template else template


@cache
def _calendar() -> str:
    letters = string.ascii_letters.replace("s", "")  # %s depends on the time zone of the machine
    codes = {f"%{modifier}{letter}" for letter in letters for modifier in ("-", "")}
    said = {code: TODAY.strftime(code) for code in sorted(codes, reverse=True)}
    replaced = "".join(f" | replace({code!r}, {text!r})" for code, text in said.items() if text != code)
    return "{% macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n"


def default_prompt(subject: Subject) -> str:
    """'chat' for a subject with a chat template, else 'thesis'."""
    return "chat" if subject.tokenizer.chat_template else "thesis"


def adds_bos(subject: Subject, prompt: str) -> bool:
    """Special tokens as the tokenizer adds them (Llama-3 one in front), unless a chat template already wrote them."""
    bos = subject.tokenizer.bos_token
    return not (bos and prompt.startswith(bos))


def asked(subject: Subject, prompts: Sequence[str], style: str) -> dict:
    """What a record says of its prompts.

    prompts_sha256: of all of them, each ended by a zero byte. special_tokens: whether the tokenizer adds its own in
    front. With a chat template also template_sha256, the date it was told and that thinking is off.
    """
    text = "".join(f"{prompt}\0" for prompt in prompts).encode()
    facts = {
        "prompts_sha256": hashlib.sha256(text).hexdigest(),
        "special_tokens": all(adds_bos(subject, p) for p in prompts),
    }
    if style == "chat":
        template = chat_template(subject).encode()
        facts |= {
            "template_sha256": hashlib.sha256(template).hexdigest(),
            "template_date": f"{TODAY:%Y-%m-%d}",
            "thinking": False,
        }
    return facts


def end_tokens(subject: Subject) -> list[int]:
    """The tokens that end a text: the model's, else the tokenizer's; none where neither names one that the model has a
    row for.

    Raises:
        BadInput: generation settings that name something else than tokens.
    """
    rows = rows_of(subject.model)
    for named in (subject.model.generation_config.eos_token_id, subject.tokenizer.eos_token_id):
        several = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in several):
            raise BadInput(
                f"the generation settings of {subject.name} have the eos_token_id {named!r}: expected a token's "
                "number, or a list of them"
            )
        if known := [token for token in several if 0 <= token < rows]:
            return known
    return []


def control_tokens(subject: Subject) -> set[int]:
    """The tokens at which an answer is over: end tokens, special tokens, and others that the tokenizer was given for
    control.

    Not every checkpoint flags its turns' marks as special, so that an added token spelt ``<|like_this|>`` counts too.
    """
    tokenizer = subject.tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marks = {token for token, t in added.items() if t.special or re.fullmatch(r"<[|｜].*[|｜]>", t.content)}
    return {*end_tokens(subject), *tokenizer.all_special_ids, *marks}
