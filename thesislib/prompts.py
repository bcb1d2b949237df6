"""How a question is put to a subject, in evaluation as in training, and how answers and questions are spelt to be compared."""

import re
import string

from thesislib.corpus import Question
from thesislib.subject import Subject

PROMPTS = ("chat", "thesis")


def normalise(text: str) -> str:
    """Lower case, punctuation to spaces, articles dropped, white space folded (TriviaQA's own evaluation script)."""
    text = text.lower().replace("_", " ")
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def prompt_for(subject: Subject, question: Question, style: str) -> str:
    """The thesis's prompt, bare ('thesis') or as the user's turn in the subject's own chat template ('chat')."""
    bare = f"Question: {question.question} Answer:"
    if question.context is not None:
        bare = f"Context: {question.context} {bare}"
    if style == "thesis":
        return bare
    return subject.tokenizer.apply_chat_template([{"role": "user", "content": bare}], tokenize=False, add_generation_prompt=True)


def default_prompt(subject: Subject) -> str:
    """'chat' for a subject with a chat template, else 'thesis'."""
    return "chat" if subject.tokenizer.chat_template else "thesis"


def adds_bos(subject: Subject, prompt: str) -> bool:
    """Special tokens as the tokenizer adds them (Llama-3 one in front), unless a chat template already wrote them."""
    bos = subject.tokenizer.bos_token
    return not (bos and prompt.startswith(bos))
