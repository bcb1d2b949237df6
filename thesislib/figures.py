"""The study's plots: colour-blind-safe, different markers, intervals drawn."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from thesislib.evaluate.perplexity import compare
from thesislib.records import Measurement

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # Okabe and Ito


def style() -> None:
    """The look of every figure and table; call it once at the top of a notebook."""
    sns.set_theme(style="whitegrid", context="notebook", rc={"figure.dpi": 110, "axes.titlesize": 11, "axes.labelsize": 10})
    pd.set_option("display.max_colwidth", None, "display.max_rows", None)


def plan_chart(plans: Mapping[str, Sequence[int]], table: pd.DataFrame, baseline: str = "baseline") -> plt.Figure:
    """Which blocks each plan runs, beside its perplexity and HellaSwag with 95 % intervals, best perplexity on top."""
    order = table.sort_values("perplexity").index.tolist()
    depth = max(max(p) for p in plans.values()) + 1
    times = np.array([np.bincount(plans[name], minlength=depth) for name in order])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 8), sharey=True, width_ratios=(5, 3, 3), layout="constrained")
    shades = sns.blend_palette(["white", *sns.light_palette(BLUE, 6)[2:]], as_cmap=True)
    edges_x, edges_y = np.arange(depth + 1) - 0.5, np.arange(len(order) + 1) - 0.5
    left.pcolormesh(edges_x, edges_y, np.minimum(times, 5), cmap=shades, vmin=0, vmax=5, edgecolors="#dddddd", linewidth=0.4)
    for y, row in enumerate(times):
        for x, n in enumerate(row):
            if n > 1:
                left.text(x, y, str(n), ha="center", va="center", fontsize=7, color="white" if n > 2 else "black")
    left.set(xlabel="block (number: times run)", title="blocks run", yticks=range(len(order)), yticklabels=order, xlim=(-0.5, depth - 0.5))
    left.invert_yaxis()
    left.grid(False)
    for axis, column, low, high, marker, colour, title in (
        (middle, "perplexity", "ppl low", "ppl high", "o", BLUE, "perplexity, lower is better"),
        (right, "HellaSwag", "hs low", "hs high", "s", ORANGE, "HellaSwag, higher is better"),
    ):
        rows = table.loc[order]
        error = [rows[column] - rows[low], rows[high] - rows[column]]
        axis.errorbar(rows[column], range(len(order)), xerr=error, fmt=marker, color=colour, markersize=5, capsize=2, linewidth=1)
        axis.axvline(table.loc[baseline, column], color=GREY, linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="dashed: baseline")
    middle.set_xscale("log")
    right.axvline(0.25, color=GREY, linestyle=":", linewidth=1)
    right.set_xlabel("acc_norm; dotted: chance")
    return figure


def single_blocks(baseline: Measurement, skipped: Mapping[int, Measurement], repeated: Mapping[int, Measurement]) -> plt.Figure:
    """By how many percent perplexity changes with one block left out or run twice. Linear to 10 %, logarithmic beyond."""
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    bounds = []
    for runs, marker, colour, label, shift in ((skipped, "o", BLUE, "left out", -0.12), (repeated, "^", ORANGE, "run twice", 0.12)):
        c = [compare(baseline, m) for m in runs.values()]
        middle, low, high = (100 * np.expm1([getattr(x, name) for x in c]) for name in ("difference", "low", "high"))
        axis.errorbar(np.array(list(runs)) + shift, middle, yerr=[middle - low, high - middle], fmt=marker, color=colour,
                      markersize=5, capsize=2, linewidth=1, label=label)  # fmt: skip
        bounds += [*low, *high]
    axis.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=10)
    axis.set_ylim(min(*bounds, 0) * 1.5 - 3, max(bounds) * 2)
    axis.yaxis.set_major_formatter("{x:,.0f} %")
    axis.set(xlabel="block", ylabel="change of perplexity", title="one block left out or run twice, 95 % paired interval")
    axis.legend()
    return figure


def attention_and_spectrum(maps: Mapping[str, np.ndarray], spectra: Mapping[str, np.ndarray], tokens: Sequence[str]) -> plt.Figure:
    """For each model the attention of its first, middle and last block (mean of heads), above its 2-D spectrum.

    Args:
        maps: name to (blocks, heads, T, T).
        spectra: name to (blocks, heads, T, T), from `thesislib.attention.spectrum`.
        tokens: the T tokens.
    """
    figure, axes = plt.subplots(2 * len(maps), 3, figsize=(11, 6.6 * len(maps)), layout="constrained", squeeze=False)
    words = [t.strip() or "_" for t in tokens]
    half = len(tokens) // 2
    for row, name in enumerate(maps):
        n = len(maps[name])
        for column, block in enumerate((0, n // 2, n - 1)):
            upper, lower = axes[2 * row][column], axes[2 * row + 1][column]
            image = upper.imshow(maps[name][block].mean(0), cmap="viridis", vmin=0, vmax=1)
            upper.set(title=f"{name}: place {block} of {n}", xticks=range(len(words)), yticks=range(len(words)))
            upper.set_xticklabels(words, rotation=90, fontsize=7)
            upper.set_yticklabels(words, fontsize=7)
            shade = lower.imshow(spectra[name][block].mean(0), cmap="magma", extent=(-half, len(words) - half, len(words) - half, -half))
            lower.set(xlabel="frequency along keys", ylabel="along queries" if column == 0 else "")
            for axis in (upper, lower):
                axis.grid(False)
            if column == 2:
                figure.colorbar(image, ax=upper, shrink=0.8, label="attention")
                figure.colorbar(shade, ax=lower, shrink=0.8, label="log(1 + |F|)")
    return figure
