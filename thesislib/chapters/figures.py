"""What the study's plots share: colours that the colour-blind tell apart, different markers, intervals drawn, labels
that cover nothing; and the plot of all claims. A chapter's own plots are in its `chNN_figures.py`."""

import itertools
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

from thesislib.chapters.pareto import AS_IT_CAME
from thesislib.chapters.phrases import COVERED, DEPENDS, FAILS, HOLDS, UNDECIDED
from thesislib.records.measurement import Measurement

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # Okabe and Ito
TIMES_DENSE = "perplexity, times the dense model's (log)"


def style() -> None:
    """The look of every figure and table; call it once at the top of a notebook."""
    plain = {"text.parse_math": False}  # a dollar sign in a token or a name is one
    sns.set_theme(
        style="whitegrid",
        context="notebook",
        rc={"figure.dpi": 110, "axes.titlesize": 11, "axes.labelsize": 10, **plain},
    )
    pd.set_option("display.max_colwidth", None, "display.max_rows", None)


def intervals(axis: plt.Axes, at, values: Iterable, marker: str, colour: str, across: bool = False, **look) -> None:
    """Values with their intervals.

    Args:
        axis: what is drawn on.
        at: where each value stands on the other axis.
        values: the values, the low and the high ends.
        marker: and line, as matplotlib's `fmt`.
        colour: of all.
        across: values lie along the x axis.
        look: matplotlib's, instead of markersize 5, capsize 2 and linewidth 1.
    """
    value, low, high = (np.asarray(x, float) for x in values)
    x, y, side = (value, at, "xerr") if across else (at, value, "yerr")
    options: dict[str, Any] = {"markersize": 5, "capsize": 2, "linewidth": 1, side: [value - low, high - value], **look}
    axis.errorbar(x, y, fmt=marker, color=colour, **options)


def covered(figure: plt.Figure) -> plt.Figure:
    """The figure with the sentence that says what its intervals cover, below it."""
    figure.supxlabel(COVERED, fontsize=8, color=GREY)
    return figure


def values_of(measurements: Iterable[Measurement]) -> tuple[list[float], list[float], list[float]]:
    """Values and the ends of their intervals."""
    ms = list(measurements)
    return [m.value for m in ms], [m.low for m in ms], [m.high for m in ms]


def thousands(axis, small: bool = False) -> None:
    """Numbers on a logarithmic axis with commas, below 1 with the decimals that they need; small: between its powers of
    ten too."""
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:.1g}")
    if small:
        axis.set_minor_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:.1g}")
        axis.set_tick_params(which="minor", labelsize=8)


FILE_LOOKS = {True: ("*", "#E69F00", 15), False: ("P", "#56B4E9", 9)}  # the file that the subject came in; others


def draw_files(axis: plt.Axes, marks: pd.DataFrame, measure: str, most: float = np.inf) -> list[tuple]:
    """Draw the files beside the study's models, a star for the one that the subject came in.

    Returns:
        The labels for `_write`.
    """
    labels: list[tuple] = []
    if measure not in marks:
        return labels
    for first, rows in marks[marks[measure] <= most].groupby(marks["label"] == AS_IT_CAME, sort=False):
        marker, colour, size = FILE_LOOKS[bool(first)]
        name = "the file it came in" if first else "llama.cpp's files"
        look: dict[str, Any] = {"color": colour, "markersize": size, "markeredgecolor": "black", "zorder": 5}
        axis.vlines(rows["MB"], rows[f"{measure} low"], rows[f"{measure} high"], colour, linewidth=0.6)
        axis.plot(rows["MB"], rows[measure], marker, linestyle="", label=name, **look)
        labels += [
            (x, y, f"{label.split()[-1]} file, {x:.0f} MB" if first else label.split()[-1], "black")
            for x, y, label in zip(rows["MB"], rows[measure], rows["label"], strict=True)
        ]
    return labels


Label = tuple[float, float, str, str]  # x, y, text, colour
SIDES = ((1, 1), (-1, -1), (-1, 1), (1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # of a mark, where a label may stand


def write_labels(axis: plt.Axes, labels: Iterable[Label], size: float = 7) -> None:
    """Write labels beside their points, each with a line to it, where they cover neither a mark nor an interval, a
    solid line, the legend or each other; those that have no such place are left out.

    Call it last: a later change of the axes moves the marks.
    """
    figure: Any = axis.figure
    figure.draw_without_rendering()  # the layout is settled
    taken, pixels = [text.get_window_extent() for text in axis.texts], figure.dpi / 72
    for line in axis.lines:
        if line.get_marker() not in ("", "None", None):
            half = line.get_markersize() / 2 * pixels
            at = axis.transData.transform(line.get_xydata())
            taken += [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in at]
    for bars in (c for c in axis.collections if isinstance(c, LineCollection)):
        ends = (axis.transData.transform(ends) for ends in bars.get_segments())
        taken += [Bbox(np.array([pair.min(0) - 1, pair.max(0) + 1])) for pair in ends]
    if axis.get_legend():
        taken.append(axis.get_legend().get_window_extent())
    for line in (x for x in axis.lines if x.get_linestyle() == "-" and x.get_transform() == axis.transData):
        for start, end in itertools.pairwise(axis.transData.transform(line.get_xydata())):
            steps = np.linspace(start, end, 2 + int(np.abs(end - start).max() / 4))
            taken += [Bbox.from_extents(x - 1, y - 1, x + 1, y + 1) for x, y in steps]
    for x, y, text, colour in labels:
        arrow: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 2}
        look: dict[str, Any] = {"fontsize": size, "color": colour, "in_layout": False, "arrowprops": arrow}
        note = axis.annotate(text, (x, y), (0, 0), textcoords="offset points", **look)
        for far, (dx, dy) in itertools.product((6, 12, 20, 30, 45, 60), SIDES):
            across, up = ("right", "center", "left")[1 + dx], ("top", "center", "bottom")[1 + dy]
            note.set(position=(far * dx, far * dy), ha=across, va=up)
            note.get_window_extent()  # moves it; this box contains the line too
            box = Text.get_window_extent(note)
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1 and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            note.remove()


VERDICT_LOOKS = {HOLDS: ("o", BLUE), FAILS: ("X", ORANGE), DEPENDS: ("D", "#CC79A7"), UNDECIDED: ("s", GREY)}


def forest_chart(table: pd.DataFrame) -> plt.Figure:
    """Every claim's comparisons with their intervals, claims about perplexity left, about answers right.

    Args:
        table: see `thesislib.chapters.claims.forest`.
    """
    sides = [rows for _, rows in table.groupby("ratio", sort=False)]
    heights = [rows["n"].nunique() for rows in sides]
    figure, axes = plt.subplots(len(sides), 1, figsize=(9, 0.5 * sum(heights) + 2), height_ratios=heights,
        layout="constrained", squeeze=False)  # fmt: skip
    for axis, rows in zip(axes[:, 0], sides, strict=True):
        ratio, claims = bool(rows["ratio"].iloc[0]), list(rows.groupby("n"))
        left, right = rows["low"].min(), rows["high"].max()
        left, right = (left * 0.9, right * 1.1) if ratio else (left - 2, right + 2)
        for y, (_, found) in enumerate(claims):
            marker, colour = VERDICT_LOOKS[found["verdict"].iloc[0]]
            low, high = (found[f"claimed {end}"].iloc[0] for end in ("from", "to"))
            low, high = (edge if pd.isna(x) else x for x, edge in ((low, left), (high, right)))
            axis.fill_betweenx([y - 0.42, y + 0.42], low, high, color=GREEN, alpha=0.15, linewidth=0)
            at = y + np.linspace(-0.28, 0.28, len(found)) if len(found) > 1 else [y]
            intervals(axis, at, (found["effect"], found["low"], found["high"]), marker, colour, across=True, capsize=0)
        axis.axvline(1 if ratio else 0, color=GREY, linestyle="--", linewidth=1)
        if ratio:
            axis.set_xscale("log")
            axis.set_xticks(ticks := [0.2, 0.5, 1, 2, 5, 10], [f"{x:g}" for x in ticks])
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(
            xlim=(left, right),
            ylim=(len(claims) - 0.5, -0.5),
            yticks=range(len(claims)),
            yticklabels=[f"{n} {found['claim'].iloc[0]}: {found['verdict'].iloc[0]}" for n, found in claims],
            xlabel="ratio of perplexities (log)" if ratio else "difference of answers, points",
        )
        axis.tick_params(labelsize=9)
        axis.grid(axis="y", visible=False)
    covers = "95 % intervals: other documents or questions of the same kind; of trained models, other trainings too."
    figure.supxlabel(covers, fontsize=8, color=GREY)
    return figure
