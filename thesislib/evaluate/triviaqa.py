"""TriviaQA as the thesis scores it. The three tiers of "correct" are kept apart, because the last two are lenient."""

import time
from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from thesislib.errors import BadInput, unknown
from thesislib.evaluate.answers import AT_ONCE, EXACT, F1, TIERS, Scoring, score_again, tier
from thesislib.evaluate.generate import greedy
from thesislib.evaluate.stats import Comparison, paired_means
from thesislib.evaluate.task import (
    Answers,
    Options,
    compare_answers,
    sha256_of_items,
    share_correct,
    share_with_interval,
)
from thesislib.model.prompts import PROMPTS, default_prompt, prompt_facts, prompt_for
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.corpus import Question, question_source, questions


class Asked(NamedTuple):
    """Questions, and their source in words.

    Args:
        questions: the questions.
        source: see `thesislib.sources.corpus.question_source`.
    """

    questions: list[Question]
    source: str


def triviaqa(
    subject: Subject,
    items: list[Question],
    *,
    source: str,
    prompt: str | None = None,
    batch: int = 32,
    max_new_tokens: int = 50,
) -> Measurement:
    """Share of questions answered correctly by any of the three tiers; each tier alone is in `extra`.

    Args:
        subject: the model and tokenizer.
        items: from `thesislib.sources.corpus.questions`.
        source: of the questions, in words for the record (`thesislib.sources.corpus.question_source`).
        prompt: 'chat' or 'thesis'; by default `default_prompt`.
        batch: prompts at a time.
        max_new_tokens: the longest answer; the thesis allows 50.

    Raises:
        BadInput: no questions, unknown prompt, 'chat' for a subject without a chat template or with one that cannot put
            a question, or a question that does not fit into the model's context (see `greedy`).
    """
    if not items:
        raise BadInput("no questions to ask: expected at least one")
    prompt = prompt or default_prompt(subject)
    if prompt not in PROMPTS:
        raise unknown("prompt", prompt, PROMPTS)
    started = time.perf_counter()
    prompts = [prompt_for(subject, q, prompt) for q in items]
    answers = greedy(subject, prompts, max_new_tokens, batch, [q.id for q in items])
    outcomes: list[dict[str, Any]] = [
        {"id": q.id, "answer": answer.strip(), "tier": tier(answer, q.aliases)}
        for q, answer in zip(items, answers, strict=True)
    ]
    for outcome in outcomes:
        outcome["correct"] = bool(outcome["tier"])
    counts = Counter(o["tier"] for o in outcomes)
    extra = {tier: share_with_interval(counts[tier], len(items)) for tier in TIERS}
    settings = {"prompt": prompt, "source": source, "max_new_tokens": max_new_tokens, "batch": batch,
                "open_book": items[0].context is not None, **prompt_facts(subject, prompts, prompt)}  # fmt: skip
    return share_correct(source, "accuracy", "question", outcomes, extra, provenance(subject, started, **settings))


compare = compare_answers


class Trivia(Answers):
    """TriviaQA, closed book: the question alone."""

    name = "trivia"
    metric = "accuracy"
    open_book = False

    def items(self, data: str, options: Options) -> Asked:
        """See `Task.items`."""
        chosen = questions(data, open_book=self.open_book, limit=options.limit, seed=options.seed)
        return Asked(chosen, question_source(data, self.open_book))

    def sha256(self, items: Asked, options: Options) -> str:
        """See `Task.sha256`."""
        return sha256_of_items(items.questions)

    def measure(self, subject: Subject, items: Asked, options: Options) -> Measurement:
        """See `triviaqa`."""
        return triviaqa(subject, items.questions, source=items.source, prompt=options.prompt, batch=options.batch or 32)

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """See `Task.options_of`."""
        settings = m.settings
        if m.metric != self.metric or settings.get("open_book") is not self.open_book:
            return None
        return {"limit": m.n, "prompt": settings.get("prompt"), "batch": settings.get("batch")}


class OpenTrivia(Trivia):
    """TriviaQA, each question with a passage that holds its answer."""

    name = "trivia_open"
    open_book = True


class Scored(Trivia):
    """The same questions and answers under another scoring than the thesis's, see `thesislib.evaluate.answers`."""

    scoring: ClassVar[Scoring]

    def measure(self, subject: Subject, items: Asked, options: Options) -> Measurement:
        """See `triviaqa`; the items keep the answers."""
        m = super().measure(subject, items, options)
        again = score_again(m, aliases_of(items), self.scoring)
        kept = [{**item, "answer": asked["answer"]} for item, asked in zip(again.items, m.items, strict=True)]
        return replace(again, items=kept)

    def compare(self, a: Measurement, b: Measurement) -> Comparison:
        """See `Task.compare`: McNemar's test of right and wrong, a paired t test of numbers."""
        if "score" in a.items[0]:
            return paired_means(*a.paired_with(b, "score"))
        return compare_answers(a, b)


def aliases_of(items: Asked) -> dict[str, tuple[str, ...]]:
    """{id of a question: the answers that are right}."""
    return {q.id: q.aliases for q in items.questions}


class ExactMatch(Scored):
    """TriviaQA, closed book, by exact match."""

    name = "trivia_exact"
    metric = EXACT.metric
    scoring = EXACT


class TokenF1(Scored):
    """TriviaQA, closed book, by token F1."""

    name = "trivia_f1"
    metric = F1.metric
    scoring = F1


class AtOnce(Scored):
    """TriviaQA, closed book, by the thesis's rule on the first words."""

    name = "trivia_at_once"
    metric = AT_ONCE.metric
    scoring = AT_ONCE


class OpenExactMatch(ExactMatch):
    """TriviaQA, open book, by exact match."""

    name = "trivia_open_exact"
    open_book = True


class OpenTokenF1(TokenF1):
    """TriviaQA, open book, by token F1."""

    name = "trivia_open_f1"
    open_book = True


class OpenAtOnce(AtOnce):
    """TriviaQA, open book, by the thesis's rule on the first words."""

    name = "trivia_open_at_once"
    open_book = True
