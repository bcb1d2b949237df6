"""Chapter 3, width pruning: nine patterns and some ratios, by magnitude and WANDA, and what calibration has to do with
it."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from thesislib.chapters.chapter import WIKITEXT, Chapter, Keep, Key, Opening, Parameters, Part, by_key, on_one_sample
from thesislib.chapters.phrases import factor, number, p_value, ratio, sample_note, times, together, with_thousands
from thesislib.chapters.pool import Recorded, larger, recorded_pool
from thesislib.chapters.thesis import thesis_row
from thesislib.compress.width import Width
from thesislib.errors import BadInput, unknown
from thesislib.evaluate import perplexity
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.speed import speeds
from thesislib.evaluate.stats import Comparison, by_verdict, holm_adjusted
from thesislib.experiment import DENSE, described, recipe_hash, recipe_of
from thesislib.formats.load import load_subject
from thesislib.model import packing
from thesislib.model.packing import THESIS_PATTERNS
from thesislib.model.sparse import pack_all
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement, in_markdown
from thesislib.records.store import Store
from thesislib.sources.corpus import evaluation_text

NINE = tuple(f"{n}:{m}" for n, m in THESIS_PATTERNS)
HALVES = ("1:2", "2:4", "4:8", "8:16")
USABLE = 0.5  # the largest share of zeros that leaves a model; tables and charts of more are behind a fold
TEXTS = {"c4": "Web text", "wikipedia": "Wikipedia"}
WEIGHTINGS = {
    "unit_norm": "every token at unit norm",
    "first_16": "the first one sixteen times",
    "skip_1": "without the first one",
}


@dataclass(frozen=True)
class WidthChapter(Parameters):
    """Parameters of chapter 3.

    Attributes:
        length: tokens in a window.
        text: calibration text of WANDA, c4 or wikipedia.
        calibration: windows of it.
        windows: that perplexity is measured on.
        patterns: pruned by WANDA.
        by_magnitude: patterns also pruned by magnitude.
        ratios: shares of weights pruned without a pattern, by WANDA.
        weightings: other token weights of WANDA's statistics, tried on 2:4.
    """

    length: int = 512
    text: str = "c4"
    calibration: int = 4
    windows: int | None = 6
    patterns: list = field(default_factory=lambda: [*NINE])
    by_magnitude: list = field(default_factory=lambda: ["1:8", "2:4"])
    ratios: list = field(default_factory=lambda: [0.5])
    weightings: list = field(default_factory=lambda: ["unit_norm"])

    def __post_init__(self):
        super().__post_init__()
        for pattern in (*self.patterns, *self.by_magnitude):
            packing.Pattern.parse(pattern)
        if self.text not in ("c4", "wikipedia"):
            raise unknown("calibration text", self.text, ("c4", "wikipedia"))
        configurations(self)  # each stage checks its own settings

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject whose rows a pattern does not divide."""
        for stage in configurations(self):
            stage.after([], shape)

    def width(self, pattern: str, **settings) -> Width:
        """The stage for a pattern, "2:4", or a ratio, "0.5"."""
        share = (
            dict(zip(("remove", "of"), packing.Pattern.parse(pattern), strict=True))
            if ":" in pattern
            else {"ratio": float(pattern)}
        )
        return Width(**share, **{"text": self.text, "windows": self.calibration, "length": self.length, **settings})


def configurations(p: WidthChapter) -> list[Width]:
    """What the chapter measures, in order: patterns and ratios by WANDA, some by magnitude, some with other token
    weights."""
    return [
        *(p.width(pattern) for pattern in p.patterns),
        *(p.width(str(ratio)) for ratio in p.ratios),
        *(p.width(pattern, metric="magnitude") for pattern in p.by_magnitude),
        *(p.width("2:4", weighting=weighting) for weighting in p.weightings),
    ]


def calibrations(
    p: WidthChapter, windows: Sequence[int] = (8, 32, 128), seeds: Sequence[int] = (0, 1, 2)
) -> list[Width]:
    """2:4 calibrated on web text and Wikipedia, on more or fewer windows, with different seeds."""
    return [
        p.width("2:4", text=text, windows=n, seed=seed)
        for text in ("c4", "wikipedia")
        for n in windows
        for seed in seeds
    ]


Results = Mapping[Width | None, Measurement]  # None: the whole model


def measure(
    subject: Subject, configs: Iterable[Width], p: WidthChapter, done: Results | None = None, keep: Keep | None = None
) -> dict[Width | None, Measurement]:
    """Perplexity of the whole model and of each configuration.

    Args:
        subject: the whole model.
        configs: what to do to it.
        p: text and windows.
        done: earlier results, which are taken from there.
        keep: called with each new measurement, so that a long run can be kept as it goes.
    """
    results: dict[Width | None, Measurement] = {}
    text = evaluation_text(p.data)
    for config in tqdm([None, *dict.fromkeys(configs)], desc="width", unit="model", disable=None, leave=False):
        if done and config in done:
            results[config] = done[config]
            continue
        model, report = (subject, {}) if config is None else config.apply(subject, data=p.data)
        m = perplexity.perplexity(model, text, length=p.length, limit=p.windows)
        results[config] = m.with_provenance(
            chapter={"config": config and dataclasses.asdict(config), "report": report, "sizes": sizes(model)}
        )
        if keep:
            keep(results[config])
    return results


def sizes(subject: Subject) -> dict[str, int]:
    """Bytes of the linears as they are and packed, each in its smallest encoding."""
    linears = [m.weight for b in range(subject.depth) for m in subject.linears(b).values()]
    packed = 0
    for w in linears:
        encoding = packing.smallest(w)
        packed += packing.predicted_bytes(w.shape, w.dtype, encoding, int(packing.nonzero_bits(w).sum()))
    return {
        "dense": sum(w.numel() * w.element_size() for w in linears),
        "packed": packed,
        "zeros": sum(int((w == 0).sum()) for w in linears),
    }


# ---------------------------------------------------------------- what the chapter shows


def conventions() -> pd.DataFrame:
    """How the two readings of N:M name the thesis's nine patterns; the rows of the picture."""
    rows = []
    for n, m in THESIS_PATTERNS:
        pattern = packing.Pattern(n, m)
        share = packing.predicted_bytes((1, 16 * m * 8), torch.bfloat16, str(pattern)) / (16 * m * 8 * 2)
        rows.append(
            {
                "here and in WANDA (removed:of)": str(pattern),
                "NVIDIA's reading (kept:of)": f"{m - n}:{m}",
                "zeros": f"{n / m:.1%}",
                "ways to place": f"{pattern.states:,}",
                "bits a group": pattern.bits,
                "bytes packed, bfloat16": f"{share:.1%}",
            }
        )
    return pd.DataFrame(rows).set_index("here and in WANDA (removed:of)")


def main_results(results: Results, p: WidthChapter, metric: str = "wanda") -> dict[str, Measurement]:
    """{pattern or ratio: measurement} with the chapter's own calibration.

    Of WANDA's in a recorded run all chapters' measurement on the most windows.
    """
    wanted = {p.width(x, metric=metric): x for x in (*NINE, *map(str, p.ratios))}
    own = {wanted[config]: m for config, m in results.items() if config in wanted}
    return {x: _larger(results, f"W{x}", m) for x, m in own.items()} if metric == "wanda" else own


def _larger(results: Results, label: str, m: Measurement) -> Measurement:
    other = larger(results.pool, WIKITEXT, label, m) if isinstance(results, Recorded) else m
    return other.with_provenance(chapter=m.chapter)


def dense_of(results: Results) -> Measurement:
    """The whole model's perplexity; of a recorded run on the most windows that any chapter has."""
    return _larger(results, DENSE, results[None])


def ratios(results: Results, measured: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """Perplexities as ratios to the whole model's, each on the windows that both have."""
    return {x: perplexity.relative(m, dense_of(results)) for x, m in measured.items()}


def pattern_table(results: Results, p: WidthChapter) -> pd.DataFrame:
    """One row a pattern: perplexity by WANDA and by magnitude as ratios to dense, WANDA's itself, bytes, and the
    thesis's figures."""
    dense, wanda, magnitude = dense_of(results), main_results(results, p), main_results(results, p, "magnitude")
    by_wanda, by_magnitude = ratios(results, wanda), ratios(results, magnitude)
    zeros = shares(wanda)
    rows = []
    for pattern, m in {DENSE: dense, **wanda}.items():
        size, whole = m.chapter["sizes"], pattern == DENSE
        row = {
            "pattern": pattern,
            "zeros": "0 %" if whole else f"{zeros[pattern]:.1%}",
            "x dense": "1" if whole else with_thousands(by_wanda[pattern]),
            "x dense, magnitude": with_thousands(by_magnitude[pattern]) if pattern in magnitude else "",
            "perplexity": with_thousands(m),
            "windows": m.n,
            "linears' bytes": "100 %" if whole else f"{size['packed'] / size['dense']:.1%}",
        }
        if whole or ":" in pattern:
            theirs = thesis_row(DENSE if whole else f"W{pattern}").perplexity
            row |= {
                "thesis: x dense": f"{theirs / thesis_row(DENSE).perplexity:,.2f}",
                "thesis: perplexity": f"{theirs:,.2f}",
            }
        rows.append(row)
    return pd.DataFrame(rows).fillna("").set_index("pattern")


def same_order(a: Mapping[str, Measurement], b: Mapping[str, Measurement]) -> bool:
    """Whether the patterns that both have stand in the same order of perplexity, with at most half zeros."""
    both = [x for x, share in shares(a).items() if x in b and share <= USABLE]
    return sorted(both, key=lambda x: a[x].value) == sorted(both, key=lambda x: b[x].value)


def shares(measured: Mapping[str, Measurement]) -> dict[str, float]:
    """{pattern: share of weights removed}."""
    return {pattern: Width(**m.chapter["config"]).share(0, "q_proj") for pattern, m in measured.items()}


def calibration_table(results: Results, p: WidthChapter) -> pd.DataFrame:
    """Perplexity of 2:4 as a ratio to dense, by calibration text and number of windows, one column a seed."""
    rows = [
        {
            "text": c.text,
            "windows": c.windows,
            "seed": c.seed,
            "ratio": perplexity.relative(results[c], results[None]).value,
        }
        for c in calibrations(p)
        if c in results
    ]
    return pd.DataFrame(rows).pivot(index=["text", "windows"], columns="seed", values="ratio")


def halves(results: Results, p: WidthChapter) -> dict[tuple[str, str], Comparison]:
    """At half the weights removed, each wider group against the next narrower one, Holm-adjusted."""
    main = main_results(results, p)
    pairs = [(a, b) for a, b in itertools.pairwise(HALVES) if a in main and b in main]
    return holm_adjusted({(a, b): perplexity.compare(main[a], main[b]) for a, b in pairs})


def halves_sentence(results: Results, p: WidthChapter) -> str:
    """`halves` in words."""
    tests = halves(results, p)
    wider = [f"{b} has {factor(c)} of {a}'s ({p_value(c.p)})" for (a, b), c in tests.items()]
    always = len(by_verdict(tests)["better"]) == len(tests)
    said = "every doubling of the group lowers perplexity" if always else "a doubling of the group does not always help"
    return f"With half the weights removed, {said}: {', '.join(wider)}."


def wanda_against_magnitude(results: Results, p: WidthChapter) -> dict[str, Comparison]:
    """WANDA against magnitude on each pattern measured both ways, Holm-adjusted."""
    wanda, magnitude = main_results(results, p), main_results(results, p, "magnitude")
    return holm_adjusted({x: perplexity.compare(magnitude[x], wanda[x]) for x in magnitude if x in wanda})


def magnitude_sentence(results: Results, p: WidthChapter) -> str:
    """`wanda_against_magnitude` in words."""
    tests = wanda_against_magnitude(results, p)
    better, worse, undecided = by_verdict(tests).values()
    usable = [x for x in better if shares({x: results[p.width(x)]})[x] <= USABLE]
    said = [f"WANDA has a lower perplexity than magnitude on {len(better)} of {len(tests)} patterns"]
    if usable:
        most = min(usable, key=lambda x: tests[x].difference)
        said[0] += f", most at {most} ({factor(tests[most], '.2g')})"
    if worse:
        said.append(f"a higher one on {together(worse)}")
    if undecided:
        said.append("the difference may be chance on " + together(f"{x} ({p_value(tests[x].p)})" for x in undecided))
    return "; ".join(said) + "."


def weightings(results: Results, p: WidthChapter) -> dict[str, Comparison]:
    """2:4 with each other token weighting against equal weights."""
    base = p.width("2:4")
    return {
        config.weighting: perplexity.compare(results[base], m)
        for config, m in results.items()
        if config and config != base and config == p.width("2:4", weighting=config.weighting)
    }


def weighting_sentence(results: Results, p: WidthChapter) -> str:
    """`weightings` in words."""
    found = weightings(results, p)
    better = by_verdict(found)["better"]
    others = ", ".join(f"{WEIGHTINGS.get(name, name)} {ratio(c)}" for name, c in found.items())
    said = "Other counts of tokens change" if better else "No other count of tokens improves"
    return f"{said} 2:4. Against counting all equally: {others}."


def calibration_sentence(results: Results, p: WidthChapter) -> str:
    """How much text, amount and seed matter for 2:4."""
    table = calibration_table(results, p)
    mean = table.mean(axis=1)
    spread = table.std(axis=1, ddof=1) / mean
    said = []
    for text in sorted(set(table.index.get_level_values("text"))):
        means = mean.loc[text]
        steps = together(f"{times(x)} from {n}" for n, x in means.items())
        dip = means.idxmin() not in (means.index[0], means.index[-1])
        said.append(f"{TEXTS[text]}: {steps} windows{f', lowest from {means.idxmin()}' if dip else ''}.")
    own = table.loc[(p.text, p.calibration)]
    place = own.rank().astype(int).iloc[0]
    which = {1: "the lowest", len(own): "the highest"}.get(place, "neither the lowest nor the highest")
    return (
        f"Means of {table.shape[1]} seeds. {' '.join(said)} Seeds alone differ by {spread.min():.1%} to "
        f"{spread.max():.1%} (standard deviation), so steps of a few per cent may be "
        f"chance. The pattern's row elsewhere in this book is of seed 0 on {p.calibration} windows of "
        f"{TEXTS[p.text].lower()}, {which} of its {len(own)} seeds ({times(own.iloc[0])} "
        "here)."
    )


def places_sentence() -> str:
    """What positions cost in bits a weight, by pattern."""
    patterns = [packing.Pattern.parse(x) for x in HALVES]
    each = together(f"{x.bits / x.of:.3g} at {x} ({x.states:,} ways)" for x in patterns)
    return (
        f"Bits of place a weight: {each}. A bitmap takes 1. Wider groups cost a little more, since they can be placed "
        "in more ways, and that freedom is what makes them better."
    )


def seeds_sentence(results: Results, p: WidthChapter) -> str:
    """Whether a lucky calibration makes 2:4 as good as 4:8."""
    best = calibration_table(results, p).min(axis=None)
    wider = perplexity.relative(results[p.width("4:8")], results[None])
    answer = "Yes" if best < wider.value else "No"
    return (
        f"{answer}. The best of all calibrations of 2:4 ends at {times(best)} the dense model's perplexity; 4:8, "
        f"calibrated once, at {number(wider, '.3g')} times. The pattern matters more than the text."
    )


def equal_bytes_sentence(results: Results, p: WidthChapter) -> str:
    """What half zeros cost in bytes and in perplexity, by how freely they are placed."""
    main = main_results(results, p)
    found = ratios(results, main)
    said = []
    for x in (*HALVES, "0.5"):
        size = main[x].chapter["sizes"]
        name = x if ":" in x else "unstructured"
        said.append(f"{name} {size['packed'] / size['dense']:.1%} and {times(found[x].value)}")
    return (
        f"Bytes of the linears, and perplexity against dense: {together(said)}. The freest placement costs about three "
        "points of bytes more than the narrowest group and is by far the best, if the device can run it."
    )


def headline(results: Results) -> str:
    """What chapter 3 found, in sentences: the fold "All findings in one place"."""
    p = recorded_parameters()
    dense, main = dense_of(results), main_results(results, p)
    by_seed = calibration_table(results, p).loc[(p.text, p.calibration)]
    sizes = {x: main[x].chapter["sizes"] for x in ("1:8", "2:4")}
    packed = {x: f"{size['packed'] / size['dense']:.1%}" for x, size in sizes.items()}
    theirs = ", ".join(
        f"{x} x {thesis_row(f'W{x}').perplexity / thesis_row(DENSE).perplexity:.3g}" for x in ("1:8", "2:4")
    )
    return in_markdown(
        f"Removing 1 of 8 weights by WANDA multiplies perplexity on {dense.task} ({dense.value:.3g}) by "
        f"{ratio(perplexity.compare(dense, main['1:8'])).removeprefix('x ')}, "
        f"2 of 4 by {perplexity.relative(main['2:4'], dense).value:.2f} (the thesis's subject: {theirs}). Other "
        f"calibration text moves the latter: {len(by_seed)} seeds, on {results[None].n} windows, have a mean of x "
        f"{by_seed.mean():.2f}, from {by_seed.min():.2f} to {by_seed.max():.2f}. "
        f"{halves_sentence(results, p)} {magnitude_sentence(results, p)} Packed, 1:8 takes {packed['1:8']} of the "
        f"linears' bytes and 2:4 {packed['2:4']}; the thesis's files stayed as large as they were."
        f"{sample_note([m for c, m in results.items() if c])}"
    )


def _answer(results: Results) -> str:
    """The chapter's answer, in two sentences."""
    p = recorded_parameters()
    main = main_results(results, p)
    found = ratios(results, main)
    size = {x: main[x].chapter["sizes"] for x in ("1:8", "2:4")}
    packed = {x: f"{s['packed'] / s['dense']:.1%}" for x, s in size.items()}
    halves = together(f"{found[x].value:.2f} as {x}" for x in HALVES)
    return (
        f"One of eight weights costs {found['1:8'].value - 1:.1%} in perplexity; half of them multiply it by {halves}: "
        f"the wider the group, the better. Packed, 1:8 takes {packed['1:8']} of the linears' bytes and 2:4 "
        f"{packed['2:4']}, without loss."
    )


def _short(results: Results) -> str:
    """The answer in about ten words."""
    found = ratios(results, main_results(results, recorded_parameters()))
    costs = f"1:8 costs {found['1:8'].value - 1:.1%} in perplexity, 2:4 {times(found['2:4'].value)}"
    return f"{costs}; packed, both files shrink."


def _protocol(results: Results) -> str:
    """What the chapter's numbers were measured on."""
    p, dense = recorded_parameters(), dense_of(results)
    return (
        f"Perplexity on {dense.task}, windows of {p.length} tokens: {dense.n} of them for WANDA's patterns, "
        f"{results[None].n} for magnitude, ratios and calibrations. WANDA is calibrated on {p.calibration} windows of "
        f"{TEXTS[p.text].lower()}. The dense model's perplexity is {number(dense)}."
        f"{sample_note([m for c, m in results.items() if c])}"
    )


OPENING = Opening(
    question="Which single weights can go, in which pattern, and does the file get smaller?",
    answer=_answer,
    short=_short,
    protocol=_protocol,
    learn="To prune with WANDA in an N:M pattern, to read N:M either way, and to store zeros so that files shrink.",
)


# ---------------------------------------------------------------- packed models


def packed_speed(subject: Subject, pattern: str = "2:4") -> pd.DataFrame:
    """A pruned subject with dense and with packed weights: bytes held, tokens per second of a prefill and one at a
    time."""
    remove, of = packing.Pattern.parse(pattern)
    dense, _ = Width(remove, of, metric="magnitude").apply(subject)
    return speeds({f"{pattern}, held dense": dense, f"{pattern}, held packed": pack_all(dense)})


# ---------------------------------------------------------------- recorded runs


def stages_of(m: Measurement) -> list[Width]:
    """What makes a record's subject."""
    return [Width(**config)] if (config := m.chapter["config"]) else []


def from_measurements(measurements: Iterable[Measurement]) -> dict[Width | None, Measurement]:
    """The results, by configuration, the whole model first.

    Raises:
        BadInput: not this chapter's.
    """
    results = by_key(measurements, lambda m: next(iter(stages_of(m)), None), 3)
    if None not in results:
        raise BadInput("these are not the results of chapter 3 (the whole model's is missing)")
    return {None: results[None], **results}


def read_recorded(path: Path) -> Recorded:
    """A recorded run."""
    rows = on_one_sample(Store(path).rows().values(), lambda m: tuple(stages_of(m)))
    return Recorded(from_measurements(rows.values()), recorded_pool(path.parent))


RECORDED = {
    "calibration": 32,
    "windows": None,
    "ratios": [0.125, 0.25, 0.5, 0.75],
    "by_magnitude": [*NINE],
    "weightings": ["unit_norm", "first_16", "skip_1"],
}


def recorded_parameters(**settings) -> WidthChapter:
    """The parameters of the recorded run, by which its rows are found again."""
    return WidthChapter(**{**RECORDED, **settings})


def recorded_parts(p: WidthChapter, file: Path) -> Iterator[Part]:
    """Each configuration by itself: those of the chapter's tables, and 2:4 on other calibration text."""
    load = functools.cache(load_subject)
    configs = {_key(config): config for config in (None, *configurations(p), *calibrations(p))}
    setup = Setup("wikitext", length=p.length, limit=p.windows)

    def make(missing: Collection[Key], keep: Keep) -> None:
        subject = load(p.subject, p.dtype, p.device)
        for one in missing:
            config = configs[one]
            m = measure(subject, [config] if config else [], p, {None: None} if config else None)[config]
            keep(described(m, subject, p.data, stages_of(m)))

    for one in configs:
        planned = {one: ([c] if (c := configs[one]) else [], setup, p.data)}
        yield Part(" ".join(map(str, one)), {one: p.windows}, make, planned=planned)


def _key(config: Width | None) -> Key:
    return config.label if config else DENSE, recipe_hash(recipe_of([config] if config else []))


def key(m: Measurement) -> Key:
    """Label, and the hash of all settings."""
    return m.label, m.made["recipe"]


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """The dense model, and WANDA with the recorded run's own calibration."""
    p = recorded_parameters()
    labels = {None: DENSE, **{p.width(x): f"W{x}" for x in (*NINE, *map(str, p.ratios))}}
    for m in rows:
        if (label := labels.get(next(iter(stages_of(m)), None))) is not None:
            yield label, WIKITEXT, m


CHAPTER = Chapter(
    "03_width_pruning",
    "width pruning",
    WidthChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    RECORDED,
    reads=("06_evaluation",),
    claims=for_claims,
    opening=OPENING,
)
