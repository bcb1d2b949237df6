"""How right a free answer is, by each scoring in use. All need the answer's text alone, so that recorded answers can be
scored again without asking the model again.

The scorings differ in what the length of an answer does to them. The thesis's rule finds a name anywhere in the answer:
a model that writes 40 words has more chances than one that writes 2. Exact match asks for the name and nothing else: a
model that goes on writing never has it. Token F1 lies between. The thesis's rule on the first words of an answer gives
every model as many chances: that is the fair one where models end their answers differently.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from thesislib.errors import BadInput
from thesislib.evaluate.stats import bootstrap_mean
from thesislib.evaluate.task import share_correct
from thesislib.model.prompts import normalise
from thesislib.records.measurement import Measurement

TIERS = ("exact", "substring", "overlap")
FIRST_WORDS = 8  # more than any alias needs but 1 %, fewer than a model that does not end writes


def tier(answer: str, aliases: Sequence[str]) -> str:
    """The strictest tier of the thesis's rule by which an answer counts as correct, or "".

    exact: the whole answer is an alias. substring: an alias occurs in it, even inside a word ("not Mark Twain"
    counts for Mark Twain, "Austria" for US). overlap: at least 80 % of the words of an alias of several words occur.
    """
    answer = normalise(answer)
    names = {n for n in map(normalise, aliases) if n}
    if answer in names:
        return "exact"
    if any(name in answer for name in names):
        return "substring"
    words = set(answer.split())
    several = [set(name.split()) for name in names if " " in name]
    if any(len(name & words) >= 0.8 * len(name) for name in several):
        return "overlap"
    return ""


def exact_match(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the whole answer is an alias, after TriviaQA's normalisation."""
    return tier(answer, aliases) == "exact"


def token_f1(answer: str, aliases: Sequence[str]) -> float:
    """The best token F1 against any alias: 2 x common words / (words of the answer + words of the alias).

    SQuAD's formula (Rajpurkar et al., 2016) after TriviaQA's normalisation, as TriviaQA's own script has it.
    """
    words = Counter(normalise(answer).split())
    best = 0.0
    for alias in aliases:
        name = Counter(normalise(alias).split())
        if common := (words & name).total():
            best = max(best, 2 * common / (words.total() + name.total()))
    return best


def first_words(answer: str) -> str:
    """The first `FIRST_WORDS` words of an answer's first line."""
    line = (answer.strip().splitlines() or [""])[0]
    return " ".join(line.split()[:FIRST_WORDS])


def correct_at_once(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the thesis's rule finds an alias in the answer's first words."""
    return bool(tier(first_words(answer), aliases))


@dataclass(frozen=True)
class Scoring:
    """One way to score a free answer.

    Attributes:
        metric: what a measurement under it calls its number, which is a mean over questions between 0 and 1.
        of: (answer, aliases) -> right or wrong, or a number between 0 and 1.
        reads_the_end: whether what stands after the answer counts, such as a control token that was decoded with it.
    """

    metric: str
    of: Callable[[str, Sequence[str]], bool | float]
    reads_the_end: bool


EXACT = Scoring("exact match", exact_match, True)
F1 = Scoring("token F1", token_f1, True)
AT_ONCE = Scoring(f"accuracy in {FIRST_WORDS} words", correct_at_once, False)


def score_again(m: Measurement, aliases: Mapping[str, Sequence[str]], scoring: Scoring) -> Measurement:
    """The same answers under another scoring; `extra` has the mean number of words of an answer.

    Args:
        m: a measurement with the answers to free questions among its items.
        aliases: {id of a question: the answers that are right}, at least of the questions of `m`.
        scoring: the scoring.

    Raises:
        BadInput: no answers in the items, or a question without aliases.
    """
    if not m.items or any("answer" not in item for item in m.items):
        raise BadInput(f"'{m.task}' has no answers in its items: expected a measurement of free answers")
    if unknown := [item["id"] for item in m.items if item["id"] not in aliases]:
        raise BadInput(f"question '{unknown[0]}' of '{m.task}' is not among these data: name those it was made with")
    scores = [scoring.of(item["answer"], aliases[item["id"]]) for item in m.items]
    key = "correct" if isinstance(scores[0], bool) else "score"
    items = [{"id": item["id"], key: score} for item, score in zip(m.items, scores, strict=True)]
    words = [len(item["answer"].split()) for item in m.items]
    extra = {"words": mean_with_interval(words)}
    if key == "correct":
        return share_correct(m.task, scoring.metric, m.unit, items, extra, dict(m.provenance))
    low, high = _interval(scores)
    return Measurement(
        task=m.task,
        metric=scoring.metric,
        value=fmean(scores),
        low=low,
        high=high,
        n=m.n,
        unit=m.unit,
        items=items,
        extra=extra,
        provenance=dict(m.provenance),
    )


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over questions with its 95 % interval: value, low, high."""
    low, high = _interval(values)
    return {"value": fmean(values), "low": low, "high": high}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    return bootstrap_mean(values, [1] * len(values), range(len(values)))
