"""Chapter 8's plots of rankings: scores beside losses, agreement, settling, other items, sets."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, intervals, thousands, write_labels

PURPLE = "#CC79A7"
MARKS = dict(
    zip(
        ("arc_easy", "piqa", "hellaswag", "all"), (("o", BLUE), ("s", ORANGE), ("^", GREEN), ("D", PURPLE)), strict=True
    )
)


def worth_chart(table: pd.DataFrame) -> plt.Figure:
    """Each block's cosine score against what is lost without it.

    Args:
        table: blocks by cosine, loss, low, high and free (whether the block may go).
    """
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for may_go, marker, colour, label in ((True, "o", BLUE, "may go"), (False, "s", GREY, "first four, last two")):
        some = table[table["free"] == may_go]
        intervals(axis, some["cosine"], (some["loss"], some["low"], some["high"]), marker, colour, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log" if (table["low"] > 0).all() else "symlog")
    thousands(axis.yaxis)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set(xlabel="cosine score, one pass over text (log)", ylabel="log-probability lost, nats an item")
    axis.legend(loc="lower right")
    write_labels(axis, [(row["cosine"], row["loss"], str(b), "black") for b, row in table.iterrows()], size=8)
    return figure


def agreement_chart(panels: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """The rank correlation of each ranking with what other items lose, a mark a task.

    Args:
        panels: {title: rankings by (task, value | low | high)}.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 4.2), sharey=True, sharex=True, layout="constrained")
    for axis, (title, table) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        tasks = list(dict.fromkeys(table.columns.get_level_values(0)))
        for i, task in enumerate(tasks):
            marker, colour = MARKS[task]
            at = np.arange(len(table)) + 0.2 * (i - (len(tasks) - 1) / 2)
            # an interval of resamples, which are noisier, may lie below the value
            axis.hlines(at, table[task]["low"], table[task]["high"], colour, linewidth=1)
            axis.plot(table[task]["value"], at, marker, color=colour, markersize=5, label=task)
        axis.axvline(0, color=GREY, linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="Spearman's rank correlation", ylim=(len(table) - 0.5, -0.5))
        axis.set_yticks(range(len(table)), table.index)
        axis.grid(axis="y", visible=False)
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def settling_chart(settled: Mapping[str, Mapping[str, pd.DataFrame]]) -> plt.Figure:
    """How a ranking by few items comes to agree with what other items lose.

    Args:
        settled: {task: {metric: items by value, low, high}}.
    """
    figure, axes = plt.subplots(1, len(settled), figsize=(9.5, 3.2), sharey=True, layout="constrained")
    looks = dict(zip(("likelihood", "margin", "relevance"), (("o-", BLUE), ("s-", GREEN), ("^-", ORANGE)), strict=True))
    for axis, (task, metrics) in zip(np.atleast_1d(axes), settled.items(), strict=True):
        for shift, (metric, table) in zip((0.96, 1, 1.04), metrics.items(), strict=False):
            marker, colour = looks[metric]
            intervals(
                axis, table.index * shift, (table[e] for e in ("value", "low", "high")), marker, colour, label=metric
            )
        axis.axhline(0, color=GREY, linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := [x for x in table.index if x & (x - 1) == 0], map(str, ticks))
        axis.set(title=task, xlabel="items (log)", ylim=(-0.6, 1.05))
    np.atleast_1d(axes)[0].set_ylabel("Spearman, other items")
    np.atleast_1d(axes)[0].legend(loc="lower right", fontsize=8)
    return figure


def other_items_chart(tables: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """What is lost of the items to rank by against what is lost of the items to report, a mark a block.

    Args:
        tables: {task: blocks by first and others, in points of accuracy}.
    """
    figure, axes = plt.subplots(1, len(tables), figsize=(9.5, 3.4), layout="constrained")
    for axis, (task, table) in zip(np.atleast_1d(axes), tables.items(), strict=True):
        marker, colour = MARKS[task]
        ends = min(table.min()) - 1, max(table.max()) + 1
        axis.plot(ends, ends, color=GREY, linestyle="--", linewidth=1)
        axis.axvspan(ends[0], 0, color=GREEN, alpha=0.1, linewidth=0)
        axis.plot(table["first"], table["others"], marker, color=colour, markersize=5)
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(title=task, xlabel="lost of items to rank by", xlim=ends, ylim=ends)
        write_labels(axis, [(x, y, str(b), "black") for b, (x, y) in table[["first", "others"]].iterrows()])
    np.atleast_1d(axes)[0].set_ylabel("lost of items to report")
    return figure


def sets_chart(table: pd.DataFrame, whole: float, chance: float, shown: Sequence[str]) -> plt.Figure:
    """Answers that are right after 2, 4, 6 and 8 blocks go, a line a ranking.

    Args:
        table: rows of ranking, k, value, low, high.
        whole: the whole model's accuracy.
        chance: that of guessing.
        shown: rankings with a colour; the others are grey.
    """
    figure, axis = plt.subplots(figsize=(8.5, 3.9), layout="constrained")
    looks = iter(
        zip(("o-", "s-", "^-", "D-", "v-", "P-"), (BLUE, ORANGE, GREEN, PURPLE, "black", "#E69F00"), strict=True)
    )
    for ranking, some in table.groupby("ranking", sort=False):
        if ranking not in shown:
            axis.plot(some["k"], some["value"], "-", color=GREY, linewidth=0.8, alpha=0.7, zorder=1)
    for i, ranking in enumerate(shown):
        some, (marker, colour) = table[table["ranking"] == ranking], next(looks)
        at = some["k"] + 0.08 * (i - len(shown) / 2)
        intervals(axis, at, (some[end] for end in ("value", "low", "high")), marker, colour, label=ranking)
    for y, words in ((whole, "whole model"), (chance, "guessing")):
        axis.axhline(y, color=GREY, linestyle="--", linewidth=1)
        axis.annotate(
            words,
            (1, y),
            (-4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=GREY,
        )
    axis.set_xticks(sorted(table["k"].unique()))
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axis.set(xlabel="blocks removed", ylabel="right answers, all tasks' items")
    axis.legend(loc="lower left", fontsize=8, title="ranked by (others grey)")
    return figure
