"""Chapter 0, the subject and its measures: perplexity, trivia with both prompts and three tiers, multiple choice."""

import functools
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from thesislib.chapters import scorings
from thesislib.chapters.chapter import WIKITEXT, Chapter, Keep, Key, Opening, Parameters, Part, book
from thesislib.chapters.phrases import interval, number, points, share
from thesislib.chapters.pool import largest, recorded_pool
from thesislib.errors import BadInput
from thesislib.evaluate.answers import AT_ONCE, EXACT, F1, FIRST_WORDS, TIERS
from thesislib.evaluate.choice import multiple_choice
from thesislib.evaluate.perplexity import perplexity
from thesislib.evaluate.setup import Setup, task_of
from thesislib.evaluate.stats import proportion
from thesislib.evaluate.task import SHARE, compare_answers
from thesislib.evaluate.triviaqa import triviaqa
from thesislib.experiment import DENSE, described
from thesislib.formats.load import load_subject
from thesislib.model.prompts import PROMPTS, default_prompt
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.records.store import Store
from thesislib.sources.corpus import evaluation_text, question_source, questions

PROMPT_NAMES = {"thesis": "bare prompt", "chat": "chat prompt"}


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
            "accuracy": PROMPT_NAMES.get(settings.get("prompt", "")),
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


# ---------------------------------------------------------------- what the page says


def _ppl(found: Sequence[Measurement]) -> dict[int, Measurement]:
    """Perplexities by the length of their windows, the shortest first."""
    return dict(sorted((m.settings["length"], m) for m in found if m.metric == "perplexity"))


def _trivia(found: Sequence[Measurement]) -> dict[tuple[bool, str], Measurement]:
    """TriviaQA by (open book, prompt)."""
    return {(m.open_book, m.settings["prompt"]): m for m in found if m.metric == "accuracy"}


def _hellaswag(found: Sequence[Measurement]) -> Measurement:
    (m,) = (m for m in found if m.metric == "acc_norm")
    return m


def headline(found: Sequence[Measurement]) -> str:
    """What chapter 0 found, in sentences: the fold "All findings in one place"."""
    ppl, trivia = _ppl(found), _trivia(found)
    first, last = min(ppl), max(ppl)
    name = found[0].provenance["subject"]
    return in_markdown(
        f"{name} has perplexity {number(ppl[first], '.2f')} on {ppl[first].task} in windows of {first} tokens "
        f"and {number(ppl[last], '.2f')} in windows of {last}: a perplexity without its window means nothing. "
        f"Asked in its own chat template it answers {share(trivia[False, 'chat'])} of TriviaQA closed book and "
        f"{share(trivia[True, 'chat'])} "
        f"with a passage that holds the answer; with the thesis's bare prompt {share(trivia[False, 'thesis'])} and "
        f"{share(trivia[True, 'thesis'])}. HellaSwag acc_norm is {share(_hellaswag(found))}."
    )


def answer(record: Sequence[Measurement]) -> str:
    """The chapter's answer in two sentences."""
    ppl, trivia = _ppl(record), _trivia(record)
    first, last = min(ppl), max(ppl)
    return (
        f"The prompt, most of all: asked by chat the same model answers {trivia[False, 'chat'].value:.1%} of TriviaQA "
        f"closed book, asked by a bare prompt {trivia[False, 'thesis'].value:.1%}. The window comes next: perplexity "
        f"is {ppl[first].value:.1f} in windows of {first:,} tokens and {ppl[last].value:.1f} in windows of {last:,}."
    )


def short(record: Sequence[Measurement]) -> str:
    """The answer for the book's table of chapters."""
    trivia = _trivia(record)
    chat, bare = (f"{trivia[False, prompt].value:.1%}" for prompt in PROMPTS)
    return f"Prompt and window decide: {chat} of answers right by chat, {bare} bare."


def protocol(record: Sequence[Measurement]) -> str:
    """Texts, windows and numbers of questions, and the model's values."""
    ppl, trivia = _ppl(record), _trivia(record)
    first = min(ppl)
    windows = " and ".join(f"{m.n} windows of {length:,}" for length, m in ppl.items())
    return in_markdown(
        f"{record[0].provenance['subject']}, unchanged. {ppl[first].task}, all of it: {windows} tokens; perplexity "
        f"{number(ppl[first], '.2f')} in those of {first:,}. TriviaQA: {trivia[False, 'chat'].n:,} questions closed "
        f"book, {trivia[True, 'chat'].n:,} open book by chat, {trivia[True, 'thesis'].n:,} by the bare prompt. "
        f"HellaSwag: {_hellaswag(record).n:,} items."
    )


def choices(record: Sequence[Measurement]) -> pd.DataFrame:
    """What the chart of the chapter's message draws: one row a number, by what was chosen and how.

    Columns: choice (window, prompt or scoring), how, value, low, high, n.
    """
    rows = [("window", f"{length:,} tokens", m) for length, m in _ppl(record).items()]
    trivia = _trivia(record)
    for open_book in (False, True):
        for prompt, name in PROMPT_NAMES.items():
            m = trivia[open_book, prompt]
            rows.append(("prompt", f"{book(m).removesuffix(' book')}, {name.removesuffix(' prompt')}", m))
    again, chat = scorings.scored_again(), trivia[False, "chat"]
    rows.append(("scoring", "name anywhere", chat))
    for name, scoring in ((f"first {FIRST_WORDS} words", AT_ONCE), ("token F1", F1), ("exact", EXACT)):
        if scored := again.get((chat.id, scoring.metric)):
            rows.append(("scoring", name, scored))
    return pd.DataFrame(
        [
            {"choice": choice, "how": how, "value": m.value, "low": m.low, "high": m.high, "n": m.n}
            for choice, how, m in rows
        ]
    )


def choices_caption(record: Sequence[Measurement]) -> str:
    """What the chart of the chapter's message finds."""
    ppl, trivia = list(_ppl(record).values()), _trivia(record)
    times = trivia[False, "chat"].value / trivia[False, "thesis"].value
    chat, exact = trivia[False, "chat"].value, choices(record).set_index("how")["value"].get("exact")
    strict = "" if exact is None else f", and exact match takes the same answers from {chat:.1%} to {exact:.1%}"
    return (
        f"One model, nothing about it changed. The chat prompt multiplies right answers closed book by {times:.1f}; "
        f"the longer window takes {1 - ppl[-1].value / ppl[0].value:.0%} off perplexity{strict}."
    )


def prompt_sentence(record: Sequence[Measurement]) -> str:
    """Chat against bare prompt on the same questions, and how much of it is length."""
    trivia, again = _trivia(record), scorings.scored_again()
    bare, chat = (trivia[False, prompt] for prompt in PROMPT_NAMES)
    words = [scorings.mean_words(m) for m in (chat, bare)]
    cut = [again.get((m.id, AT_ONCE.metric)) for m in (chat, bare)]
    fair = (
        f" Chat answers are longer, {words[0]:.0f} words against {words[1]:.0f}, and a long answer has more chances to "
        f"hold the name; of answers cut at {FIRST_WORDS} words {share(cut[0])} and {share(cut[1])} are right."
        if all(cut)
        else ""
    )
    return (
        f"Asked by chat instead of bare, the same {chat.n:,} questions closed book are answered better by "
        f"{points(compare_answers(bare, chat))}.{fair}"
    )


def window_sentence(record: Sequence[Measurement]) -> str:
    """What a longer window does to perplexity."""
    (short_, a), *_, (long_, b) = _ppl(record).items()
    return (
        f"In windows of {short_:,} tokens perplexity is {number(a, '.2f')}, in windows of {long_:,} "
        f"{number(b, '.2f')}. Every later chapter uses windows of {short_:,}."
    )


def choice_sentence(record: Sequence[Measurement]) -> str:
    """HellaSwag by its two scorings."""
    m = _hellaswag(record)
    plain = m.extra["acc"]
    return (
        f"Over {m.n:,} items `acc_norm` is {share(m)} and `acc` "
        f"{interval(plain['value'], plain['low'], plain['high'], '.1%')}; guessing gives 25 %."
    )


def same_order(record: Sequence[Measurement], found: Sequence[Measurement]) -> bool:
    """Whether longer windows and the chat prompt help in both runs, or hurt in both."""

    def order(run: Sequence[Measurement]) -> dict[Hashable, bool]:
        lengths, trivia = list(_ppl(run).values()), _trivia(run)
        signs: dict[Hashable, bool] = {"window": lengths[-1].value < lengths[0].value}
        for open_book in (False, True):
            bare, chat = (trivia.get((open_book, prompt)) for prompt in PROMPT_NAMES)
            if bare and chat:
                signs[open_book] = chat.value > bare.value
        return signs

    expected, here = order(record), order(found)
    return all(here[name] == expected[name] for name in here)


def units_sentence(record: Sequence[Measurement]) -> str:
    """Exercise 1: one loss in three units."""
    length, m = next(iter(_ppl(record).items()))
    nats, word, bits = (m.extra[name] for name in ("nats_per_token", "word_perplexity", "bits_per_byte"))
    return (
        f"All three are the same sum of losses, in windows of {length:,} divided by tokens, words or bytes: "
        f"ln {m.value:.2f} = {nats:.3f} nats a token and ln {word:.1f} = {np.log(word):.3f} nats a word, so a word has "
        f"{np.log(word) / nats:.2f} tokens; {bits:.3f} bits a byte is {bits * np.log(2):.3f} nats a byte, so a token "
        f"has {nats / (bits * np.log(2)):.2f} bytes."
    )


def items_sentence(record: Sequence[Measurement], few: int = 64) -> str:
    """Exercise 2: the interval of a share by the number of questions."""
    m = _trivia(record)[False, "chat"]
    right = round(m.value * few)
    return (
        f"{right} of {few} right answers are {interval(right / few, *proportion(right, few), '.1%')}, {m.n:,} "
        f"questions give {share(m)}. The width falls with the square root of the number: half of it costs four times "
        "the questions."
    )


def length_sentence(record: Sequence[Measurement]) -> str:
    """Exercise 3: how many right answers are right only because they are long."""
    trivia, again = _trivia(record), scorings.scored_again()
    said = []
    for prompt, name in PROMPT_NAMES.items():
        m = trivia[False, prompt]
        if cut := again.get((m.id, AT_ONCE.metric)):
            said.append(
                f"With the {name} {cut.value / m.value:.0%} of the right answers stay right ({cut.value:.1%} of "
                f"{m.value:.1%}) when they are cut at {FIRST_WORDS} words."
            )
    return " ".join(said)


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
    asked = {f"{book(m)}, {PROMPT_NAMES[m.settings['prompt']]}": m for m in found if m.metric == "accuracy"}
    return scorings.answers_table(asked)


CHAPTER = Chapter("00_measures", "the subject and its measures", Measures, recorded_parts, key, read_recorded, headline,
                  recorded={"windows": None, "questions": 1200, "passages": 96, "items": None},
                  reads=("06_evaluation",),
                  opening=Opening(
                      question="What moves a language model's numbers, if nothing about the model changes?",
                      answer=answer, short=short, protocol=protocol,
                      learn="to read a perplexity or an accuracy with its window, prompt, scoring and interval.",
                  ))  # fmt: skip
