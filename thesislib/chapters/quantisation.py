"""Chapter 5, quantisation and compensation: why the textbook recipe loses to rounding on a small model, and what repairs it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from thesislib.chapters.gptq import (
    ABLATION,
    CLOSED,
    HELD_OUT,
    OPEN,
    PPL,
    Configuration,
    QuantChapter,
    Results,
    alone,
    pruned,
    ranks,
    read_recorded,
    recorded_parameters,
    starts,
    table,
    without,
)
from thesislib.chapters.thesis import thesis_row
from thesislib.errors import BadInput
from thesislib.evaluate import perplexity, triviaqa
from thesislib.evaluate.stats import Comparison, holm
from thesislib.experiment import DENSE
from thesislib.records import Measurement
from thesislib.subject import LINEARS

__all__ = ["TITLE", "headline", "read_recorded"]
TITLE = "quantisation and compensation"


def _number(m: Measurement | None) -> str:
    return "" if m is None else f"{m.value:.4g} [{m.low:.4g}, {m.high:.4g}]"


def _share(m: Measurement | None) -> str:
    return "" if m is None else f"{m.value:.1%} [{m.low:.1%}, {m.high:.1%}]"


def _ratio(c: Comparison) -> str:
    return f"x {np.exp(c.difference):.3f} [{np.exp(c.low):.3f}, {np.exp(c.high):.3f}]"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def stage_report(m: Measurement, kind: str) -> dict:
    """What the first stage of a kind ("gptq", "eora", ...) said of itself.

    Raises:
        BadInput: no such stage made this subject.
    """
    for stage, report in zip(m.provenance["made"]["stages"], m.provenance["made"]["reports"], strict=True):
        if kind in stage:
            return report
    raise BadInput(f"no stage '{kind}' made {m.provenance['made']['label']}")


def main_table(results: Results, configs: Sequence[Configuration]) -> pd.DataFrame:
    """One row a configuration: perplexity on the test and the held-out text, answers, and bytes on disk."""
    dense = results.get((None, PPL))
    rows = []
    for c in dict.fromkeys(configs):
        found = {what: results.get((c.key, what)) for what in (PPL, HELD_OUT, CLOSED, OPEN)}
        if not any(found.values()):
            continue
        size = next(m for m in found.values() if m).provenance["made"]["bytes"]
        times = f"{found[PPL].value / dense.value:.2f}" if found[PPL] and dense else ""
        rows.append(
            {
                "model": c.name, "WikiText-2": _number(found[PPL]), "x dense": times, "held-out Wikipedia": _number(found[HELD_OUT]),
                "closed book": _share(found[CLOSED]), "open book": _share(found[OPEN]),
                "MB on disk": f"{size['bytes_on_disk'] / 1e6:.1f}" if "bytes_on_disk" in size else "",
            }
        )  # fmt: skip
    return pd.DataFrame(rows).set_index("model")


def thesis_table(labels: Sequence[str] = ("W1:8", "D2+W1:8", "D2", "D4")) -> pd.DataFrame:
    """The thesis's own figures for models trained on WikiText: before quantisation, after it, and with EoRA."""
    rows = []
    for label in labels:
        try:
            found = {"recovered": thesis_row(label, "W"), "4-bit": thesis_row(label, "W", "Q"), "4-bit + EoRA": thesis_row(label, "W", "E")}
        except BadInput:
            continue
        rows.append(
            {"model": f"{label}+W"} | {f"perplexity, {k}": r.perplexity for k, r in found.items()} | {f"closed book, {k}": r.closed for k, r in found.items()}
        )
    return pd.DataFrame(rows).set_index("model")


def _pairs(results: Results, pairs: Sequence[tuple[str, Configuration, Configuration]], what: str) -> list[tuple[str, Comparison]]:
    """Named comparisons of those measured, Holm-adjusted."""
    here = [(name, results[a.key, what], results[b.key, what]) for name, a, b in pairs if (a.key, what) in results and (b.key, what) in results]
    tests = [(perplexity if what in (PPL, HELD_OUT) else triviaqa).compare(a, b) for _, a, b in here]
    return [(name, replace(c, p=q)) for (name, *_), c, q in zip(here, tests, holm([c.p for c in tests]), strict=True)]


def method_comparisons(results: Results, configs: Sequence[Configuration], what: str = PPL) -> list[tuple[str, Comparison]]:
    """GPTQ against rounding, and each with EoRA against without, on the same grid."""
    named = {c.name: c for c in configs}
    pairs = []
    for name, c in named.items():
        if name.startswith("GPTQ"):
            pairs.append((f"{name} against rounding", named[name.replace("GPTQ", "rounding")], c))
        if name.endswith("EoRA"):
            pairs.append((f"{name} against without", named[name.removesuffix(" + EoRA")], c))
    return _pairs(results, pairs, what)


def method_sentence(results: Results, configs: Sequence[Configuration], what: str = PPL) -> str:
    """The same in words."""
    said = []
    for name, c in method_comparisons(results, configs, what):
        word = "within noise" if c.p >= 0.05 else "better" if c.difference < 0 else "worse"
        said.append(f"{name}: {word} ({_ratio(c)}, {_p(c.p)})")
    return "Paired t tests over documents, Holm-adjusted: " + "; ".join(said) + "."


def ingredient_table(results: Results, configs: Sequence[Configuration], base: int = 1) -> pd.DataFrame:
    """Each configuration's held-out perplexity, and its ratio to the one at place `base`, paired and Holm-adjusted."""
    start = configs[base]
    tests = dict(_pairs(results, [(c.name, start, c) for c in configs if c != start], HELD_OUT))
    rows = []
    for c in configs:
        if (c.key, HELD_OUT) in results:
            t = tests.get(c.name)
            word = "" if t is None else "within noise" if t.p >= 0.05 else "better" if t.difference < 0 else "worse"
            rows.append(
                {"settings": c.name, "held-out perplexity": _number(results[c.key, HELD_OUT]), f"against {start.name}": _ratio(t) if t else "", "": word}
            )
    return pd.DataFrame(rows).set_index("settings")


def textbook_sentence(results: Results, p: QuantChapter, bits: int = 4) -> str:
    """Does GPTQ with its paper's settings beat rounding here, and which single change helps most?"""
    rounding, paper, *others = alone(p, bits)
    ((_, first),) = _pairs(results, [("paper", rounding, paper)], HELD_OUT)
    word = "is within noise of" if first.p >= 0.05 else "is better than" if first.difference < 0 else "is worse than"
    tests = _pairs(results, [(c.name, paper, c) for c in others], HELD_OUT)
    name, best = min(tests, key=lambda pair: pair[1].difference)
    harm = [n for n, c in tests if c.p < 0.05 and c.difference > 0]
    return (
        f"At {bits} bits GPTQ with its paper's settings {word} plain rounding ({_ratio(first)}, {_p(first.p)}). Of the single changes the most is gained by "
        f"{name} ({_ratio(best)}); harm is done by {', '.join(harm) or 'none'}."
    )


def layer_table(errors: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Mean relative output error by kind of projection, one column a method.

    Args:
        errors: {method: {"blocks.B.NAME": error}}.
    """
    kinds = {method: {kind: np.mean([e for place, e in found.items() if place.endswith(kind)]) for kind in LINEARS} for method, found in errors.items()}
    return pd.DataFrame(kinds).loc[list(LINEARS)]


def errors_by_layer(results: Results, c: Configuration) -> dict[str, dict[str, float]]:
    """{method: {place: relative error of the output}} that the stages of GPTQ + EoRA reported on their calibration text."""
    m = next(results[c.key, what] for what in (PPL, HELD_OUT) if (c.key, what) in results)
    after = stage_report(m, "eora")["relative_errors"]
    return {"GPTQ": stage_report(m, "gptq")["relative_errors"], "GPTQ + EoRA": {place: pair[1] for place, pair in after.items()}}


def rank_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """EoRA's rank, the bytes of its factors, and what it buys."""
    configs = ranks(p)
    rows = []
    tests = dict(_pairs(results, [(c.name, configs[0], c) for c in configs[1:]], HELD_OUT))
    for c in configs:
        m = results.get((c.key, HELD_OUT))
        if m is not None:
            size = 0 if c.name == "0" else stage_report(m, "eora")["bytes"]
            gain = _ratio(tests[c.name]) if c.name in tests else ""
            rows.append({"rank": c.name, "MB of factors": f"{size / 1e6:.2f}", "held-out perplexity": _number(m), "against rank 0": gain})
    return pd.DataFrame(rows).set_index("rank")


def starts_sentence(results: Results, p: QuantChapter) -> str:
    """LoRA begun at EoRA's correction against LoRA begun at zero: equal rank, steps and seeds."""
    found = {c.name: results[c.key, HELD_OUT].value for c in starts(p) if (c.key, HELD_OUT) in results}
    seeds = [s for s in range(9) if f"usual, seed {s}" in found and f"EoRA, seed {s}" in found]
    if not seeds:
        raise BadInput("no seed has both starts measured")
    usual, eora = (np.array([found[f"{kind}, seed {s}"] for s in seeds]) for kind in ("usual", "EoRA"))
    word = "every" if (eora < usual).all() else "no" if (eora > usual).all() else f"{(eora < usual).sum()} of {len(seeds)}"
    return (
        f"Started from EoRA's correction LoRA ends at {', '.join(f'{x:.2f}' for x in eora)} (mean {eora.mean():.2f}), started as usual at "
        f"{', '.join(f'{x:.2f}' for x in usual)} (mean {usual.mean():.2f}): lower for {word} seed{'s' if word[0].isdigit() else ''}."
    )


def headline(results: Results) -> str:
    """What chapter 5 found, in sentences, for the book's first page and the README."""
    p = recorded_parameters()
    dense = results[None, PPL]
    best = {c.name: results[c.key, PPL] for c in table(p) if (c.key, PPL) in results and c.name != DENSE}
    listed = ", ".join(f"{name} {m.value:.1f}" for name, m in best.items())
    return (
        f"{textbook_sentence(results, replace(p, calibration=ABLATION))} On WikiText-2 test (dense {dense.value:.1f}), groups of {p.group}: {listed}. "
        f"{method_sentence(results, table(p))}"
    )


def pruned_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """Pruned models before and after quantisation and compensation, on held-out text, with bytes."""
    return main_table(results, pruned(p))[["held-out Wikipedia", "MB on disk"]]


def without_table(results: Results, p: QuantChapter) -> pd.DataFrame:
    """The best settings with each ingredient taken away."""
    return ingredient_table(results, without(p), base=0)
