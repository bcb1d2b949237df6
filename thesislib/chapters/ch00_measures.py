"""Chapter 0, the subject and its measures: perplexity, trivia with both prompts and three tiers, multiple choice."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from thesislib.config import positive
from thesislib.errors import BadInput
from thesislib.evaluate.choice import multiple_choice
from thesislib.evaluate.perplexity import perplexity
from thesislib.evaluate.setup import Setup, task_of
from thesislib.evaluate.task import SHARE
from thesislib.evaluate.triviaqa import TIERS, triviaqa
from thesislib.experiment import described
from thesislib.formats.held import check_dtype
from thesislib.formats.load import load_subject
from thesislib.model.prompts import PROMPTS, default_prompt
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.records.store import Store
from thesislib.sources.corpus import evaluation_text, question_source, questions

TITLE = "the subject and its measures"


@dataclass(frozen=True)
class Measures:
    """Parameters of chapter 0.

    subject, data: specs. dtype, device: see `load_subject`. windows: of each length of `lengths`. questions: closed
    book; passages: open book. items: HellaSwag items. None, where allowed, is all.
    """

    subject: str = "embedded"
    data: str = "embedded"
    dtype: str = "bfloat16"
    device: str = "cpu"
    lengths: list | None = None
    windows: int | None = 8
    questions: int | None = 64
    passages: int | None = 24
    items: int | None = 64

    def __post_init__(self):
        object.__setattr__(self, "lengths", self.lengths or [512, 2048])
        if not all(isinstance(n, int) and n > 1 for n in self.lengths):
            raise BadInput(f"parameter 'lengths' is {self.lengths}: expected a list of window lengths of at least 2")
        positive(windows=self.windows, questions=self.questions, passages=self.passages, items=self.items)
        check_dtype(self.dtype)


PARAMETERS = Measures


def prompts_for(subject: Subject) -> tuple[str, ...]:
    """Both prompts for a subject with a chat template, the thesis's alone for one without; the default first."""
    return PROMPTS if default_prompt(subject) == "chat" else ("thesis",)


def measure(subject: Subject, p: Measures) -> list[Measurement]:
    """Everything this chapter measures, in the order of its table."""
    return [*measure_text(subject, p), *measure_answers(subject, p)]


def measure_text(subject: Subject, p: Measures) -> list[Measurement]:
    """Perplexity at each length, over the same number of tokens: a window of 2,048 costs four of 512."""
    text = evaluation_text(p.data)
    limits = [p.windows and max(1, p.windows * min(p.lengths) // n) for n in p.lengths]
    return [perplexity(subject, text, length=n, limit=limit, batch=max(1, 2048 // n)) for n, limit in zip(p.lengths, limits, strict=True)]


def measure_answers(subject: Subject, p: Measures) -> list[Measurement]:
    """Trivia closed and open book with each prompt, and HellaSwag."""
    found = []
    for open_book, limit in ((False, p.questions), (True, p.passages)):
        asked = questions(p.data, open_book=open_book, limit=limit)
        found += [triviaqa(subject, asked, source=question_source(p.data, open_book), prompt=prompt) for prompt in prompts_for(subject)]
    return [*found, multiple_choice(subject, Setup("hellaswag", limit=p.items, fast=True).items(p.data), task="HellaSwag validation")]


def table(found: Sequence[Measurement]) -> pd.DataFrame:
    """One row a number, with what it was measured on, its interval and n; the tiers of trivia are rows of their own."""
    rows = []
    for m in found:
        settings, percent = m.provenance["settings"], task_of(m).unit == SHARE
        first = len(rows)
        how = {"perplexity": f"windows of {settings.get('length')}", "accuracy": f"{settings.get('prompt')} prompt"}.get(m.metric, "0-shot")
        rows.append({"task": m.task, "how": how, "metric": m.metric, "value": m.value, "low": m.low, "high": m.high, "n": m.n})
        for tier in TIERS if m.metric == "accuracy" else ():
            rows.append({"task": "", "how": how, "metric": f"of these by {tier}", **m.extra[tier], "n": m.n})
        if m.metric == "acc_norm":
            rows.append({"task": "", "how": how, "metric": "acc", **m.extra["acc"], "n": m.n})
        if m.metric == "perplexity":
            for name in ("word_perplexity", "bits_per_byte"):
                rows.append({"task": "", "how": how, "metric": name, "value": m.extra[name], "low": None, "high": None, "n": m.n})
        rows[first:] = [row | {"percent": percent} for row in rows[first:]]
    return pd.DataFrame(rows)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The same table for a page: the interval beside its number."""

    def number(x: float, percent: bool) -> str:
        return f"{x:.1%}" if percent else f"{x:.4g}"

    shown = [number(r.value, r.percent) + ("" if pd.isna(r.low) else f" [{number(r.low, r.percent)}, {number(r.high, r.percent)}]") for r in table.itertuples()]
    return table[["task", "how", "metric", "n"]].assign(value=shown).set_index("task")[["how", "metric", "value", "n"]]


def headline(found: Sequence[Measurement]) -> str:
    """What chapter 0 found, in sentences, for the book's first page and the README."""
    ppl = {m.provenance["settings"]["length"]: m for m in found if m.metric == "perplexity"}
    trivia = {(m.provenance["settings"]["open_book"], m.provenance["settings"]["prompt"]): m for m in found if m.metric == "accuracy"}
    (hella,) = (m for m in found if m.metric == "acc_norm")
    first, last = min(ppl), max(ppl)

    def share(m: Measurement) -> str:
        return f"{m.value:.1%} [{m.low:.1%}, {m.high:.1%}]"

    name = found[0].provenance["subject"]
    return in_markdown(
        f"{name} has perplexity {ppl[first].value:.2f} [{ppl[first].low:.2f}, {ppl[first].high:.2f}] on {ppl[first].task} in windows of {first} tokens "
        f"and {ppl[last].value:.2f} [{ppl[last].low:.2f}, {ppl[last].high:.2f}] in windows of {last}: a perplexity without its window means nothing. "
        f"Asked in its own chat template it answers {share(trivia[False, 'chat'])} of TriviaQA closed book and {share(trivia[True, 'chat'])} "
        f"with a passage that holds the answer; with the thesis's bare prompt {share(trivia[False, 'thesis'])} and "
        f"{share(trivia[True, 'thesis'])}. HellaSwag acc_norm is {share(hella)}."
    )


def flattering(m: Measurement, count: int = 3) -> pd.DataFrame:
    """Answers counted as correct only by a flattering tier, the longest first: what 'correct' can mean."""
    loose = [i for i in m.items if i["tier"] in ("substring", "overlap")]
    return pd.DataFrame(sorted(loose, key=lambda i: -len(i["answer"]))[:count], columns=["tier", "answer"])


def read_recorded(path: Path) -> tuple[Measurement, ...]:
    """A recorded run."""
    return tuple(Store(path).rows().values())


def main() -> None:
    """Make a recorded run: `python -m thesislib.chapters.ch00_measures --data DIR --out FILE`.

    Perplexity over the whole text in float32, answers to a stated number of questions in --dtype.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("windows", None), ("questions", 1200), ("passages", 96), ("items", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("subject", "data", "dtype", "device"):
        parser.add_argument(f"--{name}", default=getattr(Measures, name))
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    p = Measures(**arguments)
    store = Store.new(out)
    for dtype, made in (("float32", measure_text), (p.dtype, measure_answers)):
        subject = load_subject(p.subject, dtype, p.device)
        for m in made(subject, p):
            store.append(described(m, subject, p.data))


if __name__ == "__main__":
    main()
