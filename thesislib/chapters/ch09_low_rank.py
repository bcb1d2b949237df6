"""Chapter 9, low rank: the SVD family, CALR, and whether rank pays on a small model."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from thesislib.chapters import ch09_arithmetic, ch09_runs
from thesislib.chapters import ch09_sentences as sentences
from thesislib.chapters import ch09_tables as tables
from thesislib.chapters.ch09_claims import claims
from thesislib.chapters.ch09_runs import (
    HELD_OUT,
    NOTEBOOK,
    PPL,
    RECORDED,
    Configuration,
    LowRankChapter,
    Maker,
    Record,
    key,
    read_recorded,
    recorded_parameters,
    recorded_parts,
)
from thesislib.chapters.chapter import Chapter, Opening
from thesislib.chapters.phrases import number, p_value, ratio, times
from thesislib.evaluate.compare import compare
from thesislib.records.measurement import Measurement, in_markdown

__all__ = ["CHAPTER", "headline", "measure", "run_table", "shapes", "this_run_sentence"]


def headline(record: Record) -> str:
    """What chapter 9 found, in sentences: the fold "All findings in one place"."""
    return in_markdown(" ".join([*sentences.every(record), ch09_arithmetic.removable_sentence()]))


# ---------------------------------------------------------------- this run


def configurations(p: LowRankChapter) -> list[Configuration]:
    """What a run makes: pairs of some linears by each method, and CALR's path in closed form and trained."""
    pairs = [Configuration("run", method, (p.pairs(method=method, linears=tuple(p.linears)),)) for method in p.methods]
    quiet = p.quiet_pairs()
    paths = {
        "pairs of quiet MLPs": (quiet,),
        "path in closed form": (quiet, p.calr(fit="closed")),
        "CALR": (quiet, p.calr()),
    }
    return [Configuration("run", "dense"), *pairs, *(Configuration("run", n, s) for n, s in paths.items())]


def measure(p: LowRankChapter) -> dict[str, Measurement]:
    """{name: held-out perplexity} of what a run makes."""
    configs = configurations(p)
    found = ch09_runs.measure(configs, p, maker=Maker(p))
    return {c.name: found[c.key, HELD_OUT] for c in configs}


def run_table(found: Mapping[str, Measurement]) -> pd.DataFrame:
    """This run's models: MB, perplexity, and times the dense model's."""
    dense = found["dense"]
    rows = []
    for name, m in found.items():
        c = compare(dense, m) if m is not dense else None
        value = 1.0 if c is None else float(np.exp(c.difference))
        size = (m.disk_bytes or 0) / tables.MB
        rows.append({"": name, "label": m.label, "MB": f"{size:.1f}", "perplexity": number(m), "x dense": times(value)})
    return pd.DataFrame(rows).set_index("")


def agrees(found: Mapping[str, Measurement]) -> bool:
    """Whether whitened pairs lose least, and the path in closed form wins back, as in the record."""
    least = min((m.value for name, m in found.items() if name in ch09_runs.METHODS), default=None)
    whitened = "svd_llm" not in found or found["svd_llm"].value == least
    return whitened and found["path in closed form"].value < found["pairs of quiet MLPs"].value


def this_run_sentence(found: Mapping[str, Measurement]) -> str:
    """The line before this run's table."""
    return (
        "This run agrees with the record: whitened pairs lose least, and the path wins back"
        if agrees(found)
        else "This run differs from the record"
    )


def shapes(record: Record) -> dict[str, tuple[int, int]]:
    """The shape of each kind of linear, of those that differ."""
    found: dict[str, tuple[int, int]] = {}
    for name, shape in record.spectra.shapes.items():
        kind = name.rpartition(".")[2]
        if shape not in found.values():
            found.setdefault(kind, shape)
    return {f"{kind} {m} x {n}": (m, n) for kind, (m, n) in found.items()}


# ---------------------------------------------------------------- the box


def _answer(record: Record) -> str:
    rivals = tables.rivals(record)
    won = sum(r.c.told and r.c.difference > 0 for r in rivals)
    pays = (
        f"Of {len(rivals)} models of pairs none surely beats another one that is no larger: rank does not pay here"
        if rivals and not won
        else f"Of {len(rivals)} models of pairs {won} surely beat another one that is no larger"
    )
    c = tables.arms_compared(record).get("wider pairs trained")
    if c is None:
        return f"{pays}."
    return (
        f"{pays}. After the same training pairs as wide as CALR's pairs and path have {ratio(c)} CALR's perplexity "
        f"({p_value(c.p)}).{sentences.untrained_sentence(record)}"
    )


def _short(record: Record) -> str:
    rivals = tables.rivals(record)
    won = sum(r.c.told and r.c.difference > 0 for r in rivals)
    return f"{won} of {len(rivals)} low-rank models beat another of no more bytes."


def _protocol(record: Record) -> str:
    dense, r = tables.whole_model(record), recorded_parameters()
    whole = sum(what == PPL for _, what in record)
    rest = f"; {whole} models on the whole of WikiText-2" if whole else ""
    return (
        f"{dense.n} windows of {r.length} tokens of Wikipedia (dense {number(dense)}), calibrated on {r.windows} "
        f"windows of c4{rest}. Bytes are those of the file, embedding included."
    )


OPENING = Opening(
    question="Can weights as pairs of low rank pay on a small model, and is CALR's gain its path's or its training's?",
    answer=_answer,
    short=_short,
    protocol=_protocol,
    learn="To make pairs in the metric of the inputs, to read a compression ratio, and to ask for the control.",
)


CHAPTER = Chapter(
    NOTEBOOK,
    "low rank, and CALR",
    LowRankChapter,
    recorded_parts,
    key,
    read_recorded,
    headline,
    RECORDED,
    opening=OPENING,
    papers=claims,
    reads=("02_depth_pruning", "05_quantisation", "06_evaluation"),
)
