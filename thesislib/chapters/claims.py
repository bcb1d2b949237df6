"""The thesis's conclusions, each held against the recorded runs.

A claim **holds** if every comparison goes the claimed way (p < 0.05 after Holm). It **does not hold** if one goes the
other way. Otherwise it is **undecided**. Of a claim of "often" more than half of its comparisons decide. A claim about
a size, such as "3 to 6 points", holds if the 95 % interval lies in the claimed range, and does not if it misses it. A
claim about answers is judged by the thesis's rule and by further scorings: it **depends on the scoring** if it holds
by one and does not by another.

Two models are compared on the same items, on the largest sample that both were measured on. For trained models the
test counts two sources of chance: the items, and how far trainings of one model lie apart (another seed, or the same
seed on another kind of processor), pooled over all models that were trained more than once.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from thesislib.chapters.chapter import CLOSED, OPEN, WIKITEXT
from thesislib.chapters.labels import marked, of, training
from thesislib.chapters.paper_claims import PaperClaim, section
from thesislib.chapters.phrases import DEPENDS, FAILS, HOLDS, UNDECIDED, decided, p_number
from thesislib.chapters.pool import scored_by
from thesislib.chapters.scorings import SCORINGS
from thesislib.chapters.thesis import thesis_row
from thesislib.chapters.trainings import Records, Spread, compare_models, on_largest_sample, spread
from thesislib.evaluate.setup import task_of
from thesislib.evaluate.stats import Comparison, holm_adjusted
from thesislib.records.measurement import in_markdown

MISSING = "not measured"
FIGURE = "book/_static/claims.png"  # of `forest`, drawn by `make findings`
GRID_PAGE = "../notebooks/06_evaluation.html#do-other-measures-agree"
EXACT = SCORINGS[0]
COUNTED = {
    HOLDS: ("holds", "hold"),
    FAILS: ("does not hold", "do not hold"),
    DEPENDS: ("depends on the scoring", "depend on the scoring"),
    UNDECIDED: ("is undecided", "are undecided"),
    MISSING: ("is not measured", "are not measured"),
}
MOST = 8  # comparisons of a claim that its page shows
Pair = tuple[str, str, str]  # the labels of two models, and what was measured of both


# ---------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """One conclusion of the thesis.

    Attributes:
        says: the claim, and how it is read here where it leaves room.
        name: the claim in a few words.
        effect: what was found, in words; `{size}` stands for the sizes of all comparisons, `{for_}` of `{n}` for how
            many of them go the claimed way.
        pairs: (name, first, second): labels and measure to compare; the difference is the second's less the first's.
        where: notebook and anchor at which the book shows the records.
        thesis: its own figures.
        higher: whether the claim says that the second's value is higher. It does not count for a claim about a size.
        within: the range that a size should lie in, in the measure's own unit (a ratio for perplexity, a share for
            answers); None for a claim that is not about a size.
        often: whether more than half of the comparisons are enough.
        ours: a control that the thesis did not claim.
        scored: whether it is judged under every scoring of answers.
    """

    says: str
    name: str
    effect: str
    pairs: Callable[[Records], list[Pair]]
    where: tuple[str, str]
    thesis: str = ""
    higher: bool = True
    within: tuple[float, float] | None = None
    often: bool = False
    ours: bool = False
    scored: bool = False

    def word(self, tests: Mapping[str, Comparison], ratios: Mapping[str, bool]) -> str:
        """The verdict by all of its comparisons; `ratios` says which are of logarithms."""
        if self.within is None:
            told = [(c.difference > 0) == self.higher for c in tests.values() if c.told]
        else:
            low, high = self.within
            sizes = [[math.exp(x) if ratios[name] else x for x in (c.low, c.high)] for name, c in tests.items()]
            told = [low <= a and b <= high for a, b in sizes if (low <= a and b <= high) or b < low or a > high]
        for_, against, n = sum(told), told.count(False), len(tests)
        return decided(for_ > n / 2, against > n / 2) if self.often else decided(for_ == n, against > 0)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: the claim.
        word: the verdict.
        comparisons: (name, comparison, whether it is of logarithms), those behind the verdict.
        missing: names of the comparisons whose records are missing.
        by_scoring: {scoring: the verdict under it}, of a claim that is judged under several.
        spreads: {measure: how far trainings lie apart}, of the comparisons that count it.
    """

    claim: Claim
    word: str
    comparisons: list[tuple[str, Comparison, bool]]
    missing: list[str]
    by_scoring: Mapping[str, "Verdict"] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    @property
    def in_words(self) -> str:
        """What was found, in a sentence; of a claim about answers by exact match too."""
        if not self.comparisons:
            return ""
        sizes, (_, _, ratio) = sorted(c.difference for _, c, _ in self.comparisons), self.comparisons[0]
        told = sum(c.told and (c.difference > 0) == self.claim.higher for _, c, _ in self.comparisons) or "None"
        said = self.claim.effect.format(size=_size(sizes, ratio), for_=told, n=len(sizes))
        exact = self.by_scoring.get(EXACT)
        if exact and exact.comparisons:
            said += f" By exact match {_size(sorted(c.difference for _, c, _ in exact.comparisons), False)}."
        return said


def _size(sizes: list[float], ratio: bool) -> str:
    """The smallest and the largest of some effects."""
    low, high = (f"x {math.exp(x):.2f}" if ratio else f"{100 * x:+.1f}" for x in (sizes[0], sizes[-1]))
    return (low if low == high else f"{low} to {high}") + ("" if ratio else " points")


def judge(claim: Claim, records: Records) -> Verdict:
    """The verdict on a claim. With records missing a claim cannot hold."""
    pairs = claim.pairs(records)
    verdict = _judged(claim, pairs, records)
    if not claim.scored:
        return verdict
    further = {
        metric: _judged(claim, [(a, b, scored_by(measure, metric)) for a, b, measure in pairs], records)
        for metric in SCORINGS
    }
    words = {verdict.word, *(v.word for v in further.values())}
    return replace(verdict, word=DEPENDS if {HOLDS, FAILS} <= words else verdict.word, by_scoring=further)


def _judged(claim: Claim, pairs: Iterable[Pair], records: Records) -> Verdict:
    """The verdict on a claim by these comparisons."""
    tests: dict[str, Comparison] = {}
    ratios: dict[str, bool] = {}
    spreads: dict[str, Spread] = {}
    missing = []
    for first, second, measure in pairs:
        if (both := on_largest_sample(records, first, second, measure)) is None:
            missing.append(f"{first} to {second}, {measure}")
            continue
        a, b = both
        name = f"{first} to {second}, {measure}, {a[0].n:,} {a[0].unit.split()[0]}s"
        ratios[name] = task_of(a[0]).ratio
        apart = spread(records, measure)
        tests[name] = compare_models(first, a, second, b, apart)
        if apart and (training(first) or training(second)):
            spreads[measure] = apart
    if not tests:
        return Verdict(claim, MISSING, [], missing)
    tests = holm_adjusted(tests)
    word = claim.word(tests, ratios)
    comparisons = [(name, c, ratios[name]) for name, c in tests.items()]
    return Verdict(claim, UNDECIDED if missing and word == HOLDS else word, comparisons, missing, spreads=spreads)


def _trained(base: str | None) -> Callable[[Records], list[Pair]]:
    """Chapter 4's pruned models and all others that were trained on WikiText, each against what it was before, or
    against `base`."""

    def pairs(records: Records) -> list[Pair]:
        trained = [of(label).before() for label, task in records if task == WIKITEXT and of(label).parts[-1:] == ("W",)]
        others = [str(x) for x in trained if x.parts and x == x.pruned]
        return [(base or x, f"{x}+W", WIKITEXT) for x in dict.fromkeys([*_RECOVERED, *others])]

    return pairs


def _on(measure: str, *labels: tuple[str, str]) -> Callable[[Records], list[Pair]]:
    return lambda records: [(first, second, measure) for first, second in labels]


def _repeats(records: Records) -> list[Pair]:
    blocks = [label for label, task in records if task == WIKITEXT and label.endswith("twice")]
    return [("dense", label, WIKITEXT) for label in blocks or ["block 0 twice"]]


def _ppl(*labels: tuple[str, ...]) -> str:
    return ", ".join(f"{'+'.join(x for x in key if x)} {thesis_row(*key).perplexity:,.2f}" for key in labels)


def _orders() -> str:
    both = {text: [thesis_row("D2+W1:8", text, stage).perplexity for stage in ("", "order")] for text in "WT"}
    return ", ".join(f"D2+W1:8+{t} {last:.2f}, D2+{t}+W1:8 {between:.2f}" for t, (last, between) in both.items())


_RECOVERED = ("D2", "D4", "W2:4", "W8:16", "D2+W1:8")
_ASKED = ("D2", "W2:4", "D2+W1:8")

WIDTH = ("03_width_pruning", "nine-patterns-and-some-ratios")
TRAINED = ("04_lora_recovery", "before-and-after")
TEXTS = ("04_lora_recovery", "what-training-on-one-text-does-to-the-other-measure")
ANSWERS = ("05_quantisation", "answers-and-text")


def _closed(lora: str, stage: str = "") -> str:
    return f"{thesis_row('D2', lora, stage).closed} %"


CLAIMS = (
    Claim(
        "Removing blocks hurts more than removing about as many weights singly (here, of the blocks' weights: D2 "
        "6.7 % and W1:16 6.3 %, D4 13.3 % and W1:8 12.5 %, D8 26.7 % and unstructured pruning 25 %).",
        "Blocks hurt more than weights",
        "Removing blocks gives {size} the perplexity of removing about as many single weights.",
        _on(WIKITEXT, ("W1:16", "D2"), ("W1:8", "D4"), ("W0.25", "D8")),
        WIDTH,
        f"{_ppl(('W1:8',), ('D2',))} (2 of its 16 blocks are 12.5 %)",
    ),
    Claim(
        "W1:8 is nearly free (read here as: perplexity up by less than 10 %).",
        "W1:8 is nearly free",
        "Perplexity is {size} the dense model's.",
        _on(WIKITEXT, ("dense", "W1:8")),
        WIDTH,
        _ppl(("dense",), ("W1:8",)),
        within=(0, 1.1),
    ),
    Claim(
        "With half the weights gone, wider groups are better: 8:16 beats 4:8 beats 2:4 beats 1:2.",
        "Wider groups are better",
        "Doubling the group gives {size} the perplexity.",
        _on(WIKITEXT, ("W1:2", "W2:4"), ("W2:4", "W4:8"), ("W4:8", "W8:16")),
        WIDTH,
        _ppl(("W1:2",), ("W2:4",), ("W4:8",), ("W8:16",)),
        higher=False,
    ),
    Claim(
        "LoRA on WikiText takes a pruned model's perplexity below what it was.",
        "LoRA lowers perplexity",
        "Perplexity goes to {size} of what it was.",
        _trained(None),
        TRAINED,
        _ppl(("D2",), ("D2", "W"), ("W2:4",), ("W2:4", "W")),
        higher=False,
    ),
    Claim(
        "LoRA on WikiText often takes pruned models below the dense model's perplexity.",
        "LoRA beats the dense model",
        "{for_} of {n} pruned models end below the dense model ({size}).",
        _trained("dense"),
        TRAINED,
        _ppl(("dense",), ("D2", "W"), ("W2:4", "W")),
        higher=False,
        often=True,
    ),
    Claim(
        "LoRA on WikiText takes pruned models below the perplexity of the dense model with the same training (not in "
        "the thesis: the control that it lacked).",
        "LoRA beats the dense model with the same training",
        "{for_} of {n} pruned models end below that control ({size}).",
        _trained("W"),
        ("04_lora_recovery", "recovery-or-adaptation"),
        higher=False,
        ours=True,
    ),
    Claim(
        "Training on WikiText answers more of TriviaQA, closed book, than training on TriviaQA does.",
        "WikiText answers more, closed book",
        "WikiText changes answers by {size} by the thesis's rule.",
        _on(CLOSED, *((f"{m}+T", f"{m}+W") for m in _ASKED), ("T", "W")),
        TEXTS,
        f"D2+W {_closed('W')}, D2+T {_closed('T')}",
        scored=True,
    ),
    Claim(
        "Training on WikiText answers more of TriviaQA, open book, than training on TriviaQA does.",
        "WikiText answers more, open book",
        "WikiText changes answers by {size} by the thesis's rule.",
        _on(OPEN, *((f"{m}+T", f"{m}+W") for m in _ASKED), ("T", "W")),
        TEXTS,
        ", ".join(f"{m}+{t} {thesis_row(m, t).open} %" for m in ("D2", "D2+W1:8") for t in "WT"),
        scored=True,
    ),
    Claim(
        "Pruning depth and width and then training beats training between the two.",
        "Prune, prune, train is best",
        "Training between the two gives {size} the perplexity.",
        _on(WIKITEXT, ("D2+W1:8+W", "D2+W+W1:8"), ("D2+W1:8+T", "D2+T+W1:8")),
        ("04_lora_recovery", "prune-recover-prune"),
        _orders(),
    ),
    Claim(
        "4 bits by GPTQ cost 3 to 6 points of TriviaQA, closed book.",
        "4 bits cost 3 to 6 points",
        "Quantising changes answers by {size}.",
        _on(CLOSED, ("dense", "Q")),
        ANSWERS,
        f"D2+W {_closed('W')}, quantised {_closed('W', 'Q')}; its models were pruned and trained, ours is the dense "
        "one",
        within=(-0.06, -0.03),
    ),
    Claim(
        "EoRA gives 1 to 2 points back.",
        "EoRA gives 1 to 2 points back",
        "EoRA changes answers by {size}.",
        _on(CLOSED, ("Q", "Q+E")),
        ANSWERS,
        f"D2+W, quantised {_closed('W', 'Q')}, with EoRA {_closed('W', 'E')}",
        within=(0.01, 0.02),
    ),
    Claim(
        "Repeating a block never helps (read here as: one block run twice, each of those tried on its own).",
        "Repeating never helps",
        "A block run twice gives {size} the dense model's perplexity.",
        _repeats,
        ("01_franken_llama", "one-block-at-a-time"),
    ),
)


# ---------------------------------------------------------------- the page


def verdicts(records: Records) -> list[Verdict]:
    """On every claim."""
    return [judge(claim, records) for claim in CLAIMS]


def page(records: Records, papers: Iterable[PaperClaim] = ()) -> str:
    """book/claims.md: the thesis's claims, then those of papers."""
    found = verdicts(records)
    theirs, ours = ([v for v in found if v.claim.ours == mine] for mine in (False, True))
    counts = ", ".join(
        f"{n} {several if n > 1 else one}"
        for word, (one, several) in COUNTED.items()
        if (n := sum(v.word == word for v in theirs))
    )
    controls = "".join(f"; our control, claim {found.index(v) + 1}, {COUNTED[v.word][0]}" for v in ours)
    rules = [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[1:]]
    lines = [
        "# The thesis's claims, one by one",
        "",
        "<!-- written by `make findings` from data/results/, checked by a test: do not edit -->",
        "",
        f"Of the thesis's {len(theirs)} claims on SmolLM2-135M-Instruct: {counts}{controls}. A claim may hold for the "
        "thesis's own model, Llama-3.2-1B-Instruct, and not here, and the other way round.",
        "",
        f"![{ALT}](_static/{FIGURE.rpartition('/')[2]})",
        "",
        "*Every comparison of each claim with its 95 % interval. Shaded is where the claim says it lies; mark and "
        "word are the verdict.*",
        "",
        "| | claim | verdict | effect in words |",
        "| ---: | --- | --- | --- |",
        *(f"| {n} | {v.claim.says} | **{v.word}** | {v.in_words} |" for n, v in enumerate(found, 1)),
        "",
        "## How a verdict is reached",
        "",
        *(line for rule in rules for line in (rule, "")),
        "Effects on perplexity are ratios of the second to the first, on answers differences in points. Intervals are "
        "those of each comparison alone; p values are adjusted for all of a claim's. n counts documents for "
        "perplexity, questions for answers. The thesis's own figures are those of its tables, single runs.",
        "",
    ]
    for n, v in enumerate(found, 1):
        lines += [f"## Claim {n}: {v.word}", "", *_section(v)]
    lines += section(papers)
    shown = (line if line.startswith(("#", "<!--", "![")) else marked(line) for line in lines)
    return "\n".join(shown).rstrip() + "\n"


ALT = (
    "A forest plot: a row for each claim, left those about perplexity as ratios, right those about answers in points; "
    "each comparison with its 95 % interval, and the verdict as a mark and a word"
)


def forest(found: Iterable[Verdict]) -> pd.DataFrame:
    """What the page's figure draws, a row a comparison: the claim's number and name, its verdict, whether it is of
    ratios, the effect with its interval, and the range that the claim says (None for no end)."""
    rows = []
    for n, v in enumerate(found, 1):
        for _, c, ratio in v.comparisons:
            effect, low, high = (math.exp(x) if ratio else 100 * x for x in (c.difference, c.low, c.high))
            nothing, scale = (1.0, 1) if ratio else (0.0, 100)
            ends = (nothing, None) if v.claim.higher else (None, nothing)
            claimed = ends if v.claim.within is None else tuple(scale * x or None for x in v.claim.within)
            rows.append((n, v.claim.name, v.word, ratio, effect, low, high, *claimed))
    names = ["n", "claim", "verdict", "ratio", "effect", "low", "high", "claimed from", "claimed to"]
    return pd.DataFrame(rows, columns=names)


def digest(table: pd.DataFrame) -> str:
    """16 digits over what `forest` has. They tell whether a figure was drawn from it."""
    return hashlib.sha256(table.to_json(double_precision=6).encode()).hexdigest()[:16]


def _section(v: Verdict) -> list[str]:
    """The lines about one claim."""
    lines = [v.claim.says, ""]
    if v.claim.thesis:
        lines += [f"The thesis: {v.claim.thesis}.", ""]
    if v.in_words:
        lines += [f"Here: {v.in_words}", ""]
    if v.comparisons:
        lines += [f"<details><summary>{len(v.comparisons)} comparisons</summary>", ""] if len(v.comparisons) > 1 else []
        lines += ["| compared | effect | 95 % interval | n | test | p, Holm |"]
        lines += ["| --- | ---: | --- | ---: | --- | ---: |"]
        lines += [*(_row(*row) for row in _shown(v.comparisons)), ""]
        if len(v.comparisons) > MOST:
            lines += [f"The extremes of {len(v.comparisons)} comparisons, all adjusted together.", ""]
        lines += ["</details>", ""] if len(v.comparisons) > 1 else []
    if v.word == UNDECIDED and v.comparisons:
        lines += [_what_is_known(v), ""]
    for apart in v.spreads.values():
        lines += [f"Trainings of one model lie apart by a standard deviation of {_apart(v, apart)}.", ""]
    if v.by_scoring:
        lines += ["<details><summary>By each further scoring</summary>", "", *_scorings(v), "</details>", ""]
    if v.missing:
        lines += [f"Not measured: {'; '.join(map(in_markdown, v.missing))}.", ""]
    notebook, anchor = v.claim.where
    shown = f'Shown in <a href="../notebooks/{notebook}.html#{anchor}">chapter {int(notebook[:2])}</a>'
    return [*lines, f'{shown}; what was measured on the whole text: <a href="{GRID_PAGE}">chapter 6</a>.', ""]


def _apart(v: Verdict, apart: Spread) -> str:
    """How far trainings lie apart; of perplexities in percent."""
    unit = "% of perplexity" if v.comparisons[0][2] else "points"
    return f"{100 * apart.deviation:.2g} {unit} ({apart.df} degrees of freedom)"


def _what_is_known(v: Verdict) -> str:
    """What an undecided claim's comparisons do say."""
    told = sum(c.told for _, c, _ in v.comparisons)
    if v.claim.within is None:
        return f"{told or 'None'} of {len(v.comparisons)} comparisons differ{'s' * (told == 1)} (p < 0.05)."
    _, c, ratio = v.comparisons[0]
    low, high = v.claim.within
    bounds = f"x {low:g} and x {high:g}" if ratio else f"{100 * low:+.0f} and {100 * high:+.0f} points"
    surely = "There surely is an effect" if c.told else "Whether there is an effect is open"
    return f"{surely}; whether it lies between {bounds}, {c.n:,} {'documents' if ratio else 'questions'} leave open."


def _scorings(v: Verdict) -> list[str]:
    """The verdict by each further scoring, with the effects in points and how many words the answers have."""
    lines = [
        "By each further scoring of the same answers (in points, with its 95 % interval; apart: the standard deviation "
        "over trainings of one model):",
        "",
    ]
    lines += ["| scoring | verdict | apart | compared | effect | p, Holm |", "| --- | --- | --- | --- | --- | ---: |"]
    for metric, verdict in v.by_scoring.items():
        if not verdict.comparisons:
            lines.append(f"| {metric} | {verdict.word} | | | | |")
        apart = ", ".join(_apart(verdict, x) for x in verdict.spreads.values())
        for i, (name, c, _) in enumerate(verdict.comparisons):
            effect = f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"
            compared = in_markdown(name.partition(",")[0])
            first = " | ".join((metric, verdict.word, apart) if i == 0 else ("", "", ""))
            lines.append(f"| {first} | {compared} | {effect} | {p_number(c.p)} |")
    return [*lines, ""]


def _shown(comparisons: list) -> list:
    """All comparisons of a claim, or of many the extremes."""
    if len(comparisons) <= MOST:
        return comparisons
    ordered = sorted(comparisons, key=lambda row: row[1].difference)
    return [*ordered[: MOST // 2], *ordered[-(MOST // 2) :]]


def _row(name: str, c: Comparison, ratio: bool) -> str:
    effect, low, high = (
        f"x\u00a0{math.exp(x):.3f}" if ratio else f"{100 * x:+.1f}" for x in (c.difference, c.low, c.high)
    )
    return f"| {in_markdown(name)} | {effect} | {low} to {high} | {c.n} | {c.test} | {p_number(c.p)} |"
