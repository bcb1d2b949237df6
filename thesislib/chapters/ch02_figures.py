"""Chapter 2's plots: how blocks rank, how firm the choice is, and what removals cost."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import NullFormatter

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, TIMES_DENSE, covered, intervals, write_labels

METHOD_LOOKS = {
    "perplexity": ("o", BLUE),
    "perplexity, greedy": ("D", "#56B4E9"),
    "taylor": ("^", GREEN),
    "magnitude": ("s", ORANGE),
    "influence": ("v", "#CC79A7"),
    "angular": ("P", "#E69F00"),
}


def block_ranks(table: pd.DataFrame, protected: Sequence[int]) -> plt.Figure:
    """Each metric's ranking of the blocks (1: first to go), darker for more important; a hatched bar above: protected.

    Args:
        table: importance, blocks by metrics.
        protected: blocks that no metric may remove.
    """
    ranks = table.rank().T
    figure, axis = plt.subplots(figsize=(10, 0.42 * len(ranks) + 1.2), layout="constrained")
    sns.heatmap(
        ranks, cmap="Blues", annot=True, fmt=".0f", annot_kws={"size": 8}, linewidths=0.4, ax=axis,
        cbar_kws={"label": "rank (1: goes first)", "pad": 0.01},
    )  # fmt: skip
    for b in protected:
        bar = plt.Rectangle((b, -0.32), 1, 0.26, fill=False, hatch="////", edgecolor=GREY, linewidth=0, clip_on=False)
        axis.add_patch(bar)
    axis.set(xlabel="block (hatched above: never removed)", ylabel="")
    axis.tick_params(axis="y", rotation=0)
    return figure


def stability_chart(shares: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """How often each block goes, in percent, by the number of calibration windows that chose; a panel a model.

    Args:
        shares: by label, see `thesislib.chapters.ch02_stability.shares`.
    """
    widths = [table.shape[1] for table in shares.values()]
    figure, axes = plt.subplots(
        1, len(shares), figsize=(10, 2.8), width_ratios=widths, layout="constrained", squeeze=False
    )
    for axis, (label, table) in zip(axes[0], shares.items(), strict=True):
        sns.heatmap(
            100 * table, cmap="Blues", vmin=0, vmax=100, annot=True, fmt=".0f", annot_kws={"size": 8}, linewidths=0.4,
            cbar=False, ax=axis,
        )  # fmt: skip
        axis.set(title=f"{label}: % of draws in which a block goes", xlabel="block", ylabel="calibration windows")
        axis.tick_params(axis="y", rotation=0)
    return figure


def removal_curves(table: pd.DataFrame, most: int = 8) -> plt.Figure:
    """Left, perplexity without the blocks that one-shot perplexity chose, as a ratio to the whole model's, and of
    random removals; right, that of other methods as a ratio to one-shot perplexity's, from paired comparisons.

    Args:
        table: columns method, removed, base, value, low, high (see `thesislib.chapters.ch02_depth.curves`).
        most: blocks removed that are drawn.
    """
    table = table[table["removed"].between(1, most)]
    whole, paired = (rows for _, rows in table.groupby(table["base"] == "perplexity"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(2, 3), layout="constrained")
    own = whole[whole["method"] == "perplexity"].sort_values("removed")
    random = whole[whole["method"].str.startswith("random")]
    left.plot(random["removed"], random["value"], "x", color=GREY, markersize=5, label="random (a mark a seed)")
    values = own["value"], own["low"], own["high"]
    intervals(left, own["removed"], values, "o-", BLUE, label="one-shot perplexity")
    left.set(ylabel=TIMES_DENSE, ylim=(1, 3 * own["high"].max()), title="the whole model is 1")
    looks = {method: look for method, look in METHOD_LOOKS.items() if method != "perplexity"}
    for shift, (method, (marker, colour)) in zip(np.linspace(-0.26, 0.26, len(looks)), looks.items(), strict=True):
        rows = paired[paired["method"] == method].sort_values("removed")
        at = rows["removed"] + shift
        intervals(right, at, (rows["value"], rows["low"], rows["high"]), marker, colour, label=method)
    right.axhline(1, color=BLUE, linewidth=1.2)
    for edge in np.arange(1.5, most):
        right.axvline(edge, color=GREY, linewidth=0.4, alpha=0.6)
    right.set(ylabel="times one-shot perplexity's (log)", title="one-shot perplexity (line) is 1: below is better")
    for axis, ticks, place in (
        (left, (1, 1.5, 2, 3, 5, 10), "lower right"),
        (right, (0.6, 0.8, 1, 1.5, 2, 3), "upper left"),
    ):
        axis.set_yscale("log")
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="blocks removed", xticks=sorted(set(table["removed"])))
        axis.grid(False, axis="x")
        axis.legend(fontsize=8.5, loc=place)
    covered(figure)
    even = own[own["removed"] % 2 == 0]
    labels = [(k, x, f"{x:.2f}", "black") for k, x in zip(even["removed"], even["value"], strict=True)]
    write_labels(left, labels, 9)
    return figure
