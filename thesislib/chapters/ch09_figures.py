"""Chapter 9's plots: bytes, effective ranks, kinds of linear, the arms of CALR, and methods at one budget."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd

from thesislib.chapters.ch09_spectra import Spectra
from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, covered, intervals, thousands, write_labels
from thesislib.model.layers import LINEARS

SERIES = {
    "low rank, 16 bits": ("o-", BLUE),
    "low rank, 8 bits": ("s-", GREEN),
    "low rank, 4 bits": ("^-", "#CC79A7"),
    "depth": ("D--", GREY),
    "fewer bits": ("P", ORANGE),
}


def budget_chart(table: pd.DataFrame) -> plt.Figure:
    """Ratios to the dense model's perplexity over megabytes, a line a series.

    Args:
        table: columns series, MB, x dense, low, high; see `thesislib.chapters.ch09_tables.budget_points`.
    """
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    labels = []
    for series, (marker, colour) in SERIES.items():
        rows = table[table["series"] == series].sort_values("MB")
        if len(rows):
            intervals(axis, rows["MB"], (rows[c] for c in ("x dense", "low", "high")), marker, colour, label=series)
            names = [str(name).split(" kept")[0].replace(" removed", "") for name in rows.index]
            labels += [(x, y, n, colour) for x, y, n in zip(rows["MB"], rows["x dense"], names, strict=True)]
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set_yscale("log")
    thousands(axis.yaxis)
    axis.set(xlabel="MB on disk, embedding included", ylabel="held-out perplexity, times dense (log)")
    axis.legend(fontsize=8)
    covered(figure)
    write_labels(axis, labels, size=8)
    return figure


def spectra_chart(spectra: Spectra) -> plt.Figure:
    """The effective rank of every linear over depth, by itself and whitened, with the break-even rank."""
    figure, axes = plt.subplots(1, len(LINEARS), figsize=(11, 2.9), sharey=True, layout="constrained")
    looks = dict(zip(spectra.ranks, (("o", BLUE), ("s", ORANGE), ("^", GREEN)), strict=False))
    for axis, name in zip(axes, LINEARS, strict=True):
        for way, (marker, colour) in looks.items():
            values = spectra.of(way, name)
            axis.plot(range(len(values)), values, marker, color=colour, markersize=3, label=way)
        axis.axhline(spectra.break_even(name), color=GREY, linestyle="--", linewidth=1)
        axis.set(title=name.removesuffix("_proj"), xlabel="block", yscale="log")
        thousands(axis.yaxis)
    axes[0].set_ylabel("effective rank (log)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def kinds_chart(table: pd.DataFrame) -> plt.Figure:
    """Ratios to the dense model with one kind of linear alone as pairs, a mark a method.

    Args:
        table: columns kind, method, x dense, low, high; see `thesislib.chapters.ch09_tables.kinds_points`.
    """
    figure, axis = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
    kinds = [k for k in LINEARS if k in set(table["kind"])]
    for i, (method, marker, colour) in enumerate((("svd", "o", GREY), ("asvd", "s", ORANGE), ("svd_llm", "^", BLUE))):
        rows = table[table["method"] == method].set_index("kind")
        at = [kinds.index(k) + 0.18 * (i - 1) for k in rows.index]
        intervals(axis, at, (rows[c] for c in ("x dense", "low", "high")), marker, colour, label=method, markersize=6)
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_yscale("log")
    thousands(axis.yaxis)
    axis.set_ylabel("perplexity, times dense (log)")
    axis.legend(fontsize=8)
    axis.grid(axis="x", visible=False)
    return figure


def rows_chart(table: pd.DataFrame, looks: Mapping[str, tuple[str, str]] | None = None) -> plt.Figure:
    """Ratios to the dense model, a row a model, on a log scale.

    Args:
        table: by name, with columns x dense, low, high.
        looks: {name: (marker, colour)} of some rows.
    """
    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.3 * len(table)), layout="constrained")
    for i, (name, row) in enumerate(table.iterrows()):
        marker, colour = (looks or {}).get(str(name), ("o", BLUE))
        ends = ([row[c]] for c in ("x dense", "low", "high"))
        intervals(axis, [i], ends, marker, colour, across=True, markersize=7)
    axis.set(yticks=range(len(table)), yticklabels=table.index, ylim=(len(table) - 0.5, -0.5))
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [x * 10**n for n in range(6) for x in (1, 2, 3, 5)]
    axis.set_xticks([x for x in ticks if low < x < high])
    axis.minorticks_off()
    thousands(axis.xaxis)
    axis.set_xlabel("held-out perplexity, times the dense model's (log)", fontsize=9)
    axis.grid(axis="y", visible=False)
    return figure
