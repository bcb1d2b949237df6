"""Chapter 3's plots: patterns, and calibration text."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, covered, intervals, thousands, values_of
from thesislib.records.measurement import Measurement


def pattern_chart(series: Mapping[str, Mapping[str, Measurement]], zeros: Mapping[str, float]) -> plt.Figure:
    """Perplexity of each pattern as a ratio to the whole model's, with its interval, patterns ordered by the share of
    zeros; one marker a metric.

    Args:
        series: {metric: {pattern: ratio}}, see `thesislib.evaluate.perplexity.relative`.
        zeros: {pattern: share of weights removed}.
    """
    order = sorted(
        zeros, key=lambda x: (zeros[x], -int(x.split(":")[-1]) if ":" in x else -1000)
    )  # the freest choice first
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    for (name, found), marker, colour, shift in zip(series.items(), "os", (BLUE, ORANGE), (-0.1, 0.1), strict=False):
        here = [x for x in order if x in found]
        at = [order.index(x) + shift for x in here]
        intervals(axis, at, values_of(found[x] for x in here), marker, colour, markersize=6, capsize=3, label=name)
        for x, here_at in zip(here, at, strict=True):
            value = found[x].value
            axis.annotate(
                f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", (here_at, found[x].high), (0, 4),
                textcoords="offset points", ha="right" if marker == "o" else "left", fontsize=8, color=colour,
            )  # fmt: skip
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.annotate("whole model", (len(order) - 0.6, 1), ha="right", va="bottom", fontsize=9, color=GREY)
    axis.set_yscale("log")
    thousands(axis.yaxis)
    axis.set_ylim(top=2 * axis.get_ylim()[1])
    axis.set_xticks(range(len(order)), [f"{x if ':' in x else 'ratio'}\n{100 * zeros[x]:.3g} %" for x in order])
    axis.set(xlabel="removed:of and share of weights removed", ylabel="perplexity, times dense (log)")
    axis.legend()
    return covered(figure)


def calibration_chart(table: pd.DataFrame, own: tuple[str, int, int]) -> plt.Figure:
    """Perplexity over the number of calibration windows: a mark a seed, a line a text.

    Args:
        table: index (text, windows), one column a seed.
        own: text, windows and seed that get a ring: those of the pattern's other figures.
    """
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    texts = table.index.get_level_values("text").unique()
    for text, marker, colour, factor in zip(texts, "os^", (BLUE, ORANGE, GREEN), (0.97, 1.03, 1), strict=False):
        rows = table.loc[text]
        axis.plot(rows.index * factor, rows.mean(axis=1), "-", color=colour, linewidth=1)
        for seed in rows:
            axis.plot(
                rows.index * factor,
                rows[seed],
                marker,
                color=colour,
                markersize=6,
                alpha=0.7,
                label=text if seed == rows.columns[0] else None,
            )
        if text == own[0]:
            at = own[1] * factor, rows.loc[own[1], own[2]]
            axis.plot(*at, "o", markersize=12, markerfacecolor="none", color="black")
            axis.annotate("used elsewhere", at, (-8, 8), textcoords="offset points", ha="right", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(rows.index, map(str, rows.index))
    axis.set(
        xlabel="calibration windows of 512 tokens (log)",
        ylabel="2:4, times dense",
        title="a mark a seed, lines through the means",
    )
    axis.legend()
    return figure
