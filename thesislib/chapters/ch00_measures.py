"""Chapter 0, the subject and its measures: perplexity, trivia with both prompts and three tiers, multiple choice."""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from thesislib.chapters import scorings
from thesislib.chapters.chapter import WIKITEXT, Chapter, Keep, Key, Parameters, Part, book
from thesislib.chapters.phrases import interval, number, share
from thesislib.chapters.pool import largest, recorded_pool
from thesislib.errors import BadInput
from thesislib.evaluate.answers import TIERS
from thesislib.evaluate.choice import multiple_choice
from thesislib.evaluate.perplexity import perplexity
from thesislib.evaluate.setup import Setup, task_of
from thesislib.evaluate.task import SHARE
from thesislib.evaluate.triviaqa import triviaqa
from thesislib.experiment import DENSE, described
from thesislib.formats.load import load_subject
from thesislib.model.prompts import PROMPTS, default_prompt
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.records.store import Store
from thesislib.sources.corpus import evaluation_text, question_source, questions


@dataclass(frozen=True)
class Measures(Parameters):
    """Parameters of chapter 0. A number that is None is all there are.

    Attributes:
        lengths: of windows, in tokens.
        windows: of the first length; as many tokens of the others.
        questions: of TriviaQA, closed book.
        passages: of TriviaQA, open book.
        items: of HellaSwag.
    """

    lengths: list = field(default_factory=lambda: [512, 2048])
    windows: int | None = 8
    questions: int | None = 64
    passages: int | None = 24
    items: int | None = 64

    def __post_init__(self):
        super().__post_init__()
        if not self.lengths or not all(isinstance(n, int) and n > 1 for n in self.lengths):
            raise BadInput(f"parameter 'lengths' is {self.lengths}: expected a list of window lengths of at least 2")


def prompts_for(subject: Subject) -> tuple[str, ...]:
    """The prompts for a subject, the default first: both, or without a chat template the thesis's alone."""
    return PROMPTS if default_prompt(subject) == "chat" else ("thesis",)


def measure(subject: Subject, p: Measures) -> list[Measurement]:
    """Everything this chapter measures, in the order of its table."""
    return [*measure_text(subject, p), *measure_answers(subject, p)]


def measure_text(subject: Subject, p: Measures) -> list[Measurement]:
    """Perplexity at each length, over the same number of tokens: a window of 2,048 costs four of 512."""
    return [_text(subject, p, n) for n in p.lengths]


def _text(subject: Subject, p: Measures, length: int) -> Measurement:
    return perplexity(
        subject, evaluation_text(p.data), length=length, limit=_windows(p, length), batch=max(1, 2048 // length)
    )


def _windows(p: Measures, length: int) -> int | None:
    return p.windows and max(1, p.windows * min(p.lengths) // length)


def measure_answers(subject: Subject, p: Measures) -> list[Measurement]:
    """Trivia closed and open book with each prompt, and HellaSwag."""
    asked = [_answers(subject, p, open_book, prompt) for open_book in (False, True) for prompt in prompts_for(subject)]
    return [*asked, _choices(subject, p.data, p)]


def _answers(subject: Subject, p: Measures, open_book: bool, prompt: str) -> Measurement:
    asked = questions(p.data, open_book=open_book, limit=p.passages if open_book else p.questions)
    return triviaqa(subject, asked, source=question_source(p.data, open_book), prompt=prompt)


def _choices(subject: Subject, data: str, p: Measures) -> Measurement:
    return multiple_choice(
        subject, Setup("hellaswag", limit=p.items, fast=True).items(data), task="HellaSwag validation"
    )


def table(found: Sequence[Measurement]) -> pd.DataFrame:
    """One row a number: task, prompt or window, interval and n. Each tier of TriviaQA has its own row."""
    rows = []
    for m in found:
        settings, percent = m.settings, task_of(m).unit == SHARE
        first = len(rows)
        how = {
            "perplexity": f"windows of {settings.get('length')}",
            "accuracy": f"{settings.get('prompt')} prompt",
        }.get(m.metric, "0-shot")
        rows.append(
            {"task": m.task, "how": how, "metric": m.metric, "value": m.value, "low": m.low, "high": m.high, "n": m.n}
        )
        for tier in TIERS if m.metric == "accuracy" else ():
            rows.append({"task": "", "how": how, "metric": f"of these by {tier}", **m.extra[tier], "n": m.n})
        if m.metric == "acc_norm":
            rows.append({"task": "", "how": how, "metric": "acc", **m.extra["acc"], "n": m.n})
        if m.metric == "perplexity":
            for name in ("word_perplexity", "bits_per_byte"):
                rows.append(
                    {
                        "task": "",
                        "how": how,
                        "metric": name,
                        "value": m.extra[name],
                        "low": None,
                        "high": None,
                        "n": m.n,
                    }
                )
        rows[first:] = [row | {"percent": percent} for row in rows[first:]]
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The same table for a page: the interval beside its number."""
    forms = [".1%" if percent else ".4g" for percent in table["percent"]]
    shown = [
        f"{r.value:{form}}" if pd.isna(r.low) else interval(r.value, r.low, r.high, form)
        for r, form in zip(table.itertuples(), forms, strict=True)
    ]
    return table[["task", "how", "metric", "n"]].assign(value=shown).set_index("task")[["how", "metric", "value", "n"]]


def headline(found: Sequence[Measurement]) -> str:
    """What chapter 0 found, in sentences, for the book's first page and the README."""
    ppl = {m.settings["length"]: m for m in found if m.metric == "perplexity"}
    trivia = {(m.open_book, m.settings["prompt"]): m for m in found if m.metric == "accuracy"}
    (hella,) = (m for m in found if m.metric == "acc_norm")
    first, last = min(ppl), max(ppl)

    name = found[0].provenance["subject"]
    return in_markdown(
        f"{name} has perplexity {number(ppl[first], '.2f')} on {ppl[first].task} in windows of {first} tokens "
        f"and {number(ppl[last], '.2f')} in windows of {last}: a perplexity without its window means nothing. "
        f"Asked in its own chat template it answers {share(trivia[False, 'chat'])} of TriviaQA closed book and "
        f"{share(trivia[True, 'chat'])} "
        f"with a passage that holds the answer; with the thesis's bare prompt {share(trivia[False, 'thesis'])} and "
        f"{share(trivia[True, 'thesis'])}. HellaSwag acc_norm is {share(hella)}."
    )


def flattering(m: Measurement, count: int = 3) -> pd.DataFrame:
    """The longest answers that only a flattering tier (substring or overlap) counts as correct."""
    loose = [i for i in m.items if i["tier"] in ("substring", "overlap")]
    return pd.DataFrame(sorted(loose, key=lambda i: -len(i["answer"]))[:count], columns=["tier", "answer"])


# ---------------------------------------------------------------- the recorded run


def recorded_parts(p: Measures, file: Path) -> Iterator[Part]:
    """One part a measure: perplexity in float32, answers in `p.dtype`.

    HellaSwag is measured on the embedded items, which are all of it.
    """
    load = functools.cache(load_subject)

    def make(missing: Collection[Key], keep: Keep) -> None:
        for _, metric, *how in missing:
            subject = load(p.subject, "float32" if metric == "perplexity" else p.dtype, p.device)
            if metric == "perplexity":
                keep(described(_text(subject, p, *how), subject, p.data))
            elif metric == "acc_norm":
                keep(described(_choices(subject, "embedded", p), subject, p.data))
            elif how[1] in prompts_for(subject):
                keep(described(_answers(subject, p, *how), subject, p.data))

    rows: dict[Key, int | None] = {(DENSE, "perplexity", n): _windows(p, n) for n in p.lengths}
    rows |= {
        (DENSE, "accuracy", open_book, prompt): p.passages if open_book else p.questions
        for open_book in (False, True)
        for prompt in PROMPTS
    }
    for key, n in {**rows, (DENSE, "acc_norm"): p.items}.items():
        yield Part(" ".join(map(str, key)), {key: n}, make)


def key(m: Measurement) -> Key:
    """Label, metric and how it was measured: the window's length, or (open book, prompt)."""
    settings = m.settings
    how = {"perplexity": ("length",), "accuracy": ("open_book", "prompt")}.get(m.metric, ())
    return (m.label, m.metric, *(settings[name] for name in how))


def read_recorded(path: Path) -> tuple[Measurement, ...]:
    """A recorded run. Of what later chapters measured too, on more items or in the type of all chapters, their row: so
    the dense model has one perplexity in the whole book."""
    pool = recorded_pool(path.parent)
    rows = []
    for m in Store(path).rows().values():
        shared = {("perplexity", 512): WIKITEXT, ("accuracy", "chat"): book(m)}
        measure = shared.get((m.metric, m.settings.get("length") or m.settings.get("prompt")), "")
        larger = largest(pool, measure, [DENSE]).get(DENSE, m)
        rows.append(larger if larger.n >= m.n else m)
    return tuple(rows)


def answers_table(found: Sequence[Measurement]) -> pd.DataFrame:
    """TriviaQA with each prompt, closed and open book, by every scoring."""
    asked = {f"{book(m)}, {m.settings['prompt']} prompt": m for m in found if m.metric == "accuracy"}
    return scorings.answers_table(asked)


CHAPTER = Chapter("00_measures", "the subject and its measures", Measures, recorded_parts, key, read_recorded, headline,
                  recorded={"windows": None, "questions": 1200, "passages": 96, "items": None},
                  reads=("06_evaluation",))  # fmt: skip
