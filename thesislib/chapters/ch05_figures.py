"""Chapter 5's plots: ways to 4 bits, and perplexity over bytes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, Label, covered, draw_files, intervals, write_labels

QUANTISED_LOOKS = {
    "rounding": ("o", GREY),
    "rounding + EoRA": ("s", ORANGE),
    "GPTQ": ("^", BLUE),
    "GPTQ + EoRA": ("D", GREEN),
    "GPTQ 3-bit + EoRA": ("D", GREEN),
    "GPTQ 4-bit + EoRA": ("s", ORANGE),
}


def methods_chart(table: pd.DataFrame) -> plt.Figure:
    """Ratios to the dense model, one row a method; those without an interval are hollow.

    Args:
        table: columns method, look, x dense, low, high (see `thesislib.chapters.ch05_tables.methods`).
    """
    names = list(dict.fromkeys(table["method"]))
    figure, axis = plt.subplots(figsize=(9, 0.8 + 0.3 * len(names)), layout="constrained")
    for _, row in table.iterrows():
        at, (marker, colour) = names.index(row["method"]), QUANTISED_LOOKS[row["look"]]
        if np.isnan(row["low"]):
            axis.plot(row["x dense"], at, marker, color=colour, markerfacecolor="none", markersize=7)
        else:
            ends = ([row[column]] for column in ("x dense", "low", "high"))
            intervals(axis, [at], ends, marker, colour, across=True, markersize=7)
    axis.axvline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axis.set_xlabel("held-out perplexity, times the dense model's", fontsize=9)
    figure.supxlabel("95 % paired intervals over documents; hollow marks: none measured", fontsize=8, color=GREY)
    axis.grid(axis="y", visible=False)
    return figure


def bytes_chart(table: pd.DataFrame, marks: pd.DataFrame, most: float = 2.0) -> plt.Figure:
    """Ratios to the dense model over megabytes on disk, a line a series; what lies above `most` is not drawn.

    Args:
        table: columns series, label, MB, x dense, low, high (see `thesislib.chapters.ch05_tables.sizes`).
        marks: files beside the study's models with a column "x dense", see `thesislib.chapters.pareto.marks`.
        most: the highest ratio drawn.
    """
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    labels: list[Label] = []
    for series, rows in table[table["x dense"] <= most].groupby("series", sort=False):
        marker, colour = QUANTISED_LOOKS[str(series)]
        values = (rows[column] for column in ("x dense", "low", "high"))
        intervals(axis, rows["MB"], values, f"{marker}-", colour, markersize=7, label=str(series))
        labels += [
            (x, y, text, colour) for x, y, text in zip(rows["MB"], rows["x dense"], rows["label"], strict=True) if text
        ]
    labels = [*draw_files(axis, marks, "x dense", most), *labels]
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set(xlabel="MB on disk, embedding included", ylabel="held-out perplexity, times dense")
    axis.legend(fontsize=9)
    covered(figure)
    write_labels(axis, labels, size=10)
    return figure
