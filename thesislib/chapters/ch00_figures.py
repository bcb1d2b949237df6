"""Chapter 0's plot: what one model scores by window, prompt and scoring."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from thesislib.chapters.figures import BLUE, GREEN, ORANGE, covered, intervals


def choices_chart(table: pd.DataFrame) -> plt.Figure:
    """What one unchanged model scores by window, prompt and scoring.

    Args:
        table: see `thesislib.chapters.ch00_measures.choices`.
    """
    panels = (
        ("window", "perplexity", "o", BLUE, 1.0),
        ("prompt", "right answers", "s", ORANGE, 100.0),
        ("scoring", "closed book, chat", "^", GREEN, 100.0),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(7.6, 2.5), layout="constrained", width_ratios=(2, 3, 3))
    for axis, (choice, title, marker, colour, factor) in zip(axes, panels, strict=True):
        rows = table[table["choice"] == choice]
        values = [factor * rows[column] for column in ("value", "low", "high")]
        intervals(axis, range(len(rows)), values, marker, colour, across=True, markersize=6, capsize=3)
        for y, value in enumerate(values[0]):
            side = "center" if value > 0.1 * values[2].max() else "left"
            look: dict[str, Any] = {"ha": side, "va": "bottom", "fontsize": 8, "color": colour}
            words = f"{value:.1f}" + "%" * (factor > 1)
            axis.annotate(words, (value, y), xytext=(0, 6), textcoords="offset points", **look)
        axis.set_yticks(range(len(rows)), rows["how"], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set(title=f"{choice}: {title}", ylim=(len(rows) - 0.5, -0.8), xlim=(0, 1.12 * values[2].max()))
        axis.title.set_fontsize(9)
        if factor > 1:
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0f}%")
    return covered(figure)
