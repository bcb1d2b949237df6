"""How right a free answer is, by each scoring in use. All need the answer's text alone, so that recorded answers can be
scored again without asking the model again.

The scorings differ in what the length of an answer does to them. The thesis's rule finds a name anywhere in the answer:
a model that writes 40 words has more chances than one that writes 2. Exact match asks for the name and nothing else: a
model that goes on writing never has it. Token F1 lies between. The thesis's rule on the first words of an answer gives
every model as many chances: that is the fair one where models end their answers differently.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thesislib.model.prompts import normalise

TIERS = ("exact", "substring", "overlap")
FIRST_WORDS = 8  # more than any alias needs but 1 %, fewer than a model that does not end writes


def tier(answer: str, aliases: Sequence[str]) -> str:
    """The strictest tier of the thesis's rule by which an answer counts as correct, or "".

    exact: the whole answer is an alias. substring: an alias occurs in it, even inside a word ("not Mark Twain"
    counts for Mark Twain, "Austria" for US). overlap: at least 80 % of the words of an alias of several words occur.
    """
    said = normalise(answer)
    names = {n for n in map(normalise, aliases) if n}
    if said in names:
        return "exact"
    if any(name in said for name in names):
        return "substring"
    words = set(said.split())
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
    said = normalise(answer).split()
    best = 0.0
    for name in (normalise(alias).split() for alias in aliases):
        common = (Counter(said) & Counter(name)).total()
        if common:
            best = max(best, 2 * common / (len(said) + len(name)))
    return best


def first_words(answer: str) -> str:
    """The first `FIRST_WORDS` words of an answer's first line."""
    line = (answer.strip().splitlines() or [""])[0]
    return " ".join(line.split()[:FIRST_WORDS])


def correct_at_once(answer: str, aliases: Sequence[str]) -> bool:
    """Whether the thesis's rule finds an alias in the answer's first words."""
    return bool(tier(first_words(answer), aliases))


def length(answer: str, aliases: Sequence[str]) -> int:
    """Words of an answer."""
    return len(answer.split())


@dataclass(frozen=True)
class Score:
    """One scoring of an answer.

    Attributes:
        metric: what a measurement calls it.
        of: (answer, aliases) -> right or wrong, or a number.
        share: whether its mean is a share of 1.
        higher_is_better: which way is better; of a length neither is.
    """

    metric: str
    of: Callable[[str, Sequence[str]], bool | float]
    share: bool = True
    higher_is_better: bool = True
