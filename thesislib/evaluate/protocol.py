"""What to measure and how, in words that a record can hold: the same words make the same measurement again."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from thesislib import corpus
from thesislib.errors import BadInput, unknown
from thesislib.evaluate import choice, harness, perplexity, triviaqa
from thesislib.parameters import build, positive
from thesislib.records import Measurement
from thesislib.subject import Subject

TRIVIA = ("trivia", "trivia_open")
CHOICES = tuple(task for task in harness.STOCK if task != "wikitext")
TASKS = ("wikitext", *TRIVIA, *CHOICES, "lm_eval_wikitext")


@dataclass(frozen=True)
class Protocol:
    """One measurement, but for the subject and the data.

    on: one of `TASKS`. length: tokens in a window of perplexity. limit: windows, questions or items, None for all. prompt:
    of trivia, None for the subject's own. seed: of the choice of questions or items under a limit. fast: multiple choice
    with shared contexts instead of lm-eval, with the same scores. batch: at a time, None for 4 windows, 32 questions, 8
    items; rounding apart, it changes nothing.
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
        positive(batch=self.batch)  # a loop in negative steps measures nothing, and a loss of nothing is a perplexity of 1

    def measure(self, subject: Subject, data: str) -> Measurement:
        """The measurement; its provenance has this protocol and the sha256 of the text or items that were used.

        Raises:
            BadInput: whatever the measure refuses.
        """
        if self.on == "wikitext":
            text = corpus.evaluation_text(data)
            made = perplexity.perplexity(subject, text, length=self.length, limit=self.limit, batch=self.batch or 4)
            used = text.sha256
        elif self.on in TRIVIA:
            open_book = self.on == "trivia_open"
            items = corpus.questions(data, open_book=open_book, limit=self.limit, seed=self.seed)
            made = triviaqa.triviaqa(subject, items, source=corpus.question_source(data, open_book), prompt=self.prompt, batch=self.batch or 32)
            used = sha256_of_items(items)
        elif self.fast:
            items = corpus.choices(self.on, data, self.limit, self.seed)
            made = choice.multiple_choice(subject, items, task=self.on, batch=self.batch or 8)
            used = sha256_of_items(items)
        else:
            made = harness.lm_eval_task(subject, self.on.removeprefix("lm_eval_"), data, limit=self.limit, seed=self.seed, batch=self.batch or 8)
            used = None  # lm-eval's rows: the ids in its items name them
        return dataclasses.replace(made, provenance={**made.provenance, "protocol": dataclasses.asdict(self), "corpus_sha256": used})


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
