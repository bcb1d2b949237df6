"""What to measure and how, in words that a record can hold: the same words make the same measurement again."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from thesislib.config import build, check_seed, positive
from thesislib.errors import BadInput, unknown
from thesislib.evaluate import choice, harness, perplexity, triviaqa
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement
from thesislib.sources import corpus

TRIVIA = ("trivia", "trivia_open")
CHOICES = tuple(task for task in harness.STOCK if task != "wikitext")
TASKS = ("wikitext", *TRIVIA, *CHOICES, "lm_eval_wikitext")


@dataclass(frozen=True)
class Protocol:
    """One measurement, but for the subject and the data.

    on: one of `TASKS`. length: tokens in a window of perplexity. limit: windows, questions or items, None for all. prompt:
    of trivia, None for the subject's own. seed: of the choice of questions or items under a limit. fast: multiple choice
    with shared contexts instead of lm-eval, with the same scores. batch: at a time, None for 32 questions and, on a CPU, 4
    windows and 8 items (on a card as many as fill it); rounding apart, it changes nothing.
    """

    on: str
    length: int = 512
    limit: int | None = None
    prompt: str | None = None
    seed: int = 0
    fast: bool = False
    batch: int | None = None

    def __post_init__(self):
        if self.on not in TASKS:
            raise unknown("task", self.on, TASKS)
        # a loop in negative steps measures nothing, and a loss of nothing is a perplexity of 1
        positive(batch=self.batch, limit=self.limit, length=self.length)
        check_seed(self.seed)

    def measure(self, subject: Subject, data: str) -> Measurement:
        """The measurement; its provenance has this protocol and the sha256 of the text or items that were used.

        Raises:
            BadInput: whatever the measure refuses.
        """
        if self.on == "wikitext":
            made = perplexity.perplexity(subject, corpus.evaluation_text(data), length=self.length, limit=self.limit, batch=self.batch)
        elif self.on in TRIVIA:
            source = corpus.question_source(data, self.on == "trivia_open")
            made = triviaqa.triviaqa(subject, self._items(data), source=source, prompt=self.prompt, batch=self.batch or 32)
        elif self.fast:
            made = choice.multiple_choice(subject, self._items(data), task=self.on, batch=self.batch)
        else:
            made = harness.lm_eval_task(subject, self.on.removeprefix("lm_eval_"), data, limit=self.limit, seed=self.seed, batch=self.batch or 8)
        return dataclasses.replace(made, provenance={**made.provenance, "protocol": dataclasses.asdict(self), "corpus_sha256": self.corpus_sha256(data)})

    def _items(self, data: str) -> Sequence:
        if self.on in TRIVIA:
            return corpus.questions(data, open_book=self.on == "trivia_open", limit=self.limit, seed=self.seed)
        return corpus.choices(self.on, data, self.limit, self.seed)

    def corpus_sha256(self, data: str) -> str | None:
        """Of the text or the items that a measurement on these data uses; None for lm-eval's rows, which the ids in its items name."""
        if self.on == "wikitext":
            return corpus.evaluation_text(data).sha256
        return sha256_of_items(self._items(data)) if self.on in TRIVIA or self.fast else None


def sha256_of_items(items: Sequence) -> str:
    """Over questions or choices with everything in them, in order."""
    return hashlib.sha256(json.dumps([dataclasses.asdict(item) for item in items], ensure_ascii=False).encode()).hexdigest()


def protocol_of(m: Measurement) -> Protocol:
    """The protocol of a measurement, also of one made by `perplexity` and its like directly, from its settings.

    Raises:
        BadInput: a measurement that no protocol makes.
    """
    made = m.provenance
    if "protocol" in made:
        try:
            return build(Protocol, made["protocol"])
        except (BadInput, TypeError, AttributeError) as error:
            raise BadInput(f"the record's protocol is not one that this version knows ({error})") from error
    settings = made.get("settings", {})
    if m.metric == "perplexity" and "length" in settings:
        return Protocol("wikitext", length=settings["length"], limit=settings.get("limit"))
    if m.metric == "accuracy" and "open_book" in settings:
        return Protocol(TRIVIA[settings["open_book"]], limit=m.n, prompt=settings.get("prompt"), batch=settings.get("batch"))
    task = m.task.lower().partition(" ")[0].replace("-", "_")
    if task in CHOICES and "packed" in settings.get("protocol", ""):
        return Protocol(task, limit=m.n, fast=True)
    raise BadInput(f"'{m.metric}' on '{m.task}' cannot be measured again from its record: expected one of {', '.join(TASKS)}")
