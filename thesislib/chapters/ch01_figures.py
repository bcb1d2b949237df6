"""Chapter 1's plots: plans of blocks, single blocks, and attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import EngFormatter

from thesislib.chapters.figures import BLUE, GREY, ORANGE, covered, intervals
from thesislib.evaluate.stats import Comparison


def plan_chart(plans: Mapping[str, Sequence[int]], table: pd.DataFrame) -> plt.Figure:
    """Which blocks each plan runs, beside perplexity, as a ratio to the whole model's, and HellaSwag.

    Args:
        plans: by what they do.
        table: one row a plan in the order in which they are drawn, the whole model first; see
            `thesislib.chapters.ch01_franken.table`.
    """
    order = table.index.tolist()
    depth = max(max(p) for p in plans.values()) + 1
    times = np.array([np.bincount(plans[name], minlength=depth) for name in order])
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(8, 6.4), sharey=True, width_ratios=(5, 2.6, 2.2), layout="constrained"
    )
    shades = sns.blend_palette(["white", *sns.light_palette(BLUE, 6)[2:]], as_cmap=True)
    edges_x, edges_y = np.arange(depth + 1) - 0.5, np.arange(len(order) + 1) - 0.5
    left.pcolormesh(
        edges_x, edges_y, np.minimum(times, 5), cmap=shades, vmin=0, vmax=5, edgecolors="#dddddd", linewidth=0.4
    )
    for y, row in enumerate(times):
        for x, n in enumerate(row):
            if n > 1:
                left.text(x, y, str(n), ha="center", va="center", fontsize=7, color="white" if n > 2 else "black")
    left.set(xlabel="block", title="blocks run (number: times)", yticks=range(len(order)), yticklabels=order)
    left.set(xlim=(-0.5, depth - 0.5))
    left.tick_params(axis="y", labelsize=8)
    left.invert_yaxis()
    left.grid(False)
    for axis, columns, marker, colour in (
        (middle, ("times", "times low", "times high"), "o", BLUE),
        (right, ("HellaSwag", "hs low", "hs high"), "s", ORANGE),
    ):
        rows = [table[column] for column in columns]
        intervals(axis, range(len(order)), rows, marker, colour, across=True)
        axis.axvline(rows[0].iloc[0], color=GREY, linestyle="--", linewidth=1)
    middle.set_xscale("log")
    middle.xaxis.set_major_formatter(EngFormatter(sep=""))
    middle.set(title="perplexity", xlabel="x whole model (log)")
    right.axvline(0.25, color=GREY, linestyle=":", linewidth=1)
    right.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}%")
    right.set(title="HellaSwag", xlabel="dotted: chance")
    for axis in (left, middle, right):
        axis.tick_params(axis="x", labelsize=8)
        axis.xaxis.label.set_fontsize(9)
        axis.title.set_fontsize(10)
    return covered(figure)


def single_blocks(
    skipped: Mapping[int, Comparison], repeated: Mapping[int, Comparison], most: float = 1.1
) -> plt.Figure:
    """By how much perplexity rises with one block left out or run twice, on a linear axis.

    Args:
        skipped: by block, the loss against the whole model's.
        repeated: likewise.
        most: the rise at which the axis ends; those beyond stand at its top as numbers.
    """
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for compared, marker, colour, label, shift in (
        (skipped, "o", BLUE, "left out", -0.14),
        (repeated, "^", ORANGE, "run twice", 0.14),
    ):
        rises = {b: np.expm1([c.difference, c.low, c.high]) for b, c in compared.items()}
        inside = {b: rise for b, rise in rises.items() if rise[2] <= most}
        at = np.array(list(inside)) + shift
        intervals(axis, at, np.array(list(inside.values())).reshape(-1, 3).T, marker, colour, label=label)
        for b, rise in ((b, rise) for b, rise in rises.items() if b not in inside):
            y = most * (1.2 if marker == "o" else 1.1)
            axis.plot([b + shift], [y], marker, color=colour, markersize=5, clip_on=False)
            away, side = (6, "left") if b < max(compared) / 2 else (-6, "right")
            words = f"x {1 + rise[0]:,.3g}" if rise[0] < 99 else f"x {1 + rise[0]:,.0f}"
            look: dict[str, Any] = {"color": colour, "ha": side, "va": "center", "fontsize": 9}
            axis.annotate(words, (b + shift, y), xytext=(away, 0), textcoords="offset points", **look)
    axis.set(ylim=(0, most * 1.28), xlabel="block", ylabel="rise of perplexity")
    axis.set_yticks(ticks := np.arange(0, most, 0.2), [f"{100 * y:.0f}%" for y in ticks])
    axis.legend(loc="upper center", ncols=2)
    return covered(figure)


def attention_chart(maps: Mapping[str, np.ndarray], tokens: Sequence[str]) -> plt.Figure:
    """Attention maps side by side.

    Args:
        maps: title to (T, T), queries by keys.
        tokens: the T tokens.
    """
    figure, axes = plt.subplots(1, len(maps), figsize=(8, 4.2), layout="constrained", sharey=True)
    words = [t.strip() or "_" for t in tokens]
    for axis, (title, shown) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(shown, cmap="viridis", vmin=0, vmax=1)
        axis.set(title=title, xticks=range(len(words)), yticks=range(len(words)), xlabel="looks at")
        axis.set_xticklabels(words, rotation=90, fontsize=8)
        axis.set_yticklabels(words, fontsize=8)
        axis.grid(False)
    axes[0].set_ylabel("token")
    figure.colorbar(image, ax=axes, shrink=0.8, label="attention")
    return figure
