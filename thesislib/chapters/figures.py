"""The study's plots: colour-blind-safe, different markers, intervals drawn."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter
from matplotlib.transforms import Bbox

from thesislib.chapters.labels import of, plain
from thesislib.chapters.pareto import AS_IT_CAME, PPL, group
from thesislib.chapters.phrases import COVERED, DEPENDS, FAILS, HOLDS, UNDECIDED
from thesislib.evaluate.stats import Comparison
from thesislib.experiment import DENSE
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


def _covered(figure: plt.Figure) -> plt.Figure:
    """The figure with the sentence that says what its intervals cover, below it."""
    figure.supxlabel(COVERED, fontsize=8, color=GREY)
    return figure


def _of(measurements: Iterable[Measurement]) -> tuple[list[float], list[float], list[float]]:
    """Values and the ends of their intervals."""
    ms = list(measurements)
    return [m.value for m in ms], [m.low for m in ms], [m.high for m in ms]


def _thousands(axis, small: bool = False) -> None:
    """Numbers on a logarithmic axis with commas, below 1 with the decimals that they need; small: between its powers of
    ten too."""
    axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:.1g}")
    if small:
        axis.set_minor_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:.1g}")
        axis.set_tick_params(which="minor", labelsize=8)


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
    return _covered(figure)


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
    return _covered(figure)


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
    return _covered(figure)


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
    for k, value in zip(own["removed"], own["value"], strict=True):
        if k in (2, 4, 6, 8):
            left.annotate(f"{value:.2f}", (k, value), (-4, 7), textcoords="offset points", ha="right", fontsize=9)
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
    return _covered(figure)


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
        intervals(axis, at, _of(found[x] for x in here), marker, colour, markersize=6, capsize=3, label=name)
        for x, here_at in zip(here, at, strict=True):
            value = found[x].value
            axis.annotate(
                f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", (here_at, found[x].high), (0, 4),
                textcoords="offset points", ha="right" if marker == "o" else "left", fontsize=8, color=colour,
            )  # fmt: skip
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.annotate("whole model", (len(order) - 0.6, 1), ha="right", va="bottom", fontsize=9, color=GREY)
    axis.set_yscale("log")
    _thousands(axis.yaxis)
    axis.set_ylim(top=2 * axis.get_ylim()[1])
    axis.set_xticks(range(len(order)), [f"{x if ':' in x else 'ratio'}\n{100 * zeros[x]:.3g} %" for x in order])
    axis.set(xlabel="removed:of and share of weights removed", ylabel="perplexity, times dense (log)")
    axis.legend()
    return _covered(figure)


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


LOOKS = {"untrained": ("o", GREY, "none"), "+W": ("s", BLUE, BLUE), "+T": ("^", ORANGE, ORANGE)}


def recovery_chart(points: Mapping[str, Mapping[str, Measurement]], dense: str = "dense") -> plt.Figure:
    """Perplexity of each model untrained and trained on each text, as a ratio to the untrained dense model's.

    Lines mark the dense model untrained and with the same training on WikiText.

    Args:
        points: {model: {"untrained", "+W" or "+T": ratio}}.
        dense: the control's name.
    """
    models = [*(m for m in points if m != dense), *(m for m in points if m == dense)]
    figure, axis = plt.subplots(figsize=(9, 0.62 * len(models) + 1.6), layout="constrained")
    for shift, (name, (marker, colour, fill)) in zip((-0.18, 0, 0.18), LOOKS.items(), strict=True):
        rows = [(y + shift, points[m][name]) for y, m in enumerate(models) if name in points[m]]
        if rows:
            at, ms = zip(*rows, strict=True)
            trained = "" if name == "untrained" else f"+{of(name[1:]).shown}"
            look: dict[str, Any] = {"mfc": fill, "markersize": 7, "capsize": 3, "label": trained or name}
            intervals(axis, at, _of(ms), marker, colour, across=True, **look)
            if name != "+T" and name in points.get(dense, {}):
                control = points[dense][name].value
                axis.axvline(control, color=colour, linestyle=":" if trained else "--", linewidth=1)
                axis.annotate(
                    f"dense{trained or ', untrained'}",
                    (control, 1.01),
                    xycoords=("data", "axes fraction"),
                    ha="right" if trained else "left",
                    fontsize=9,
                    color=colour,
                )
    axis.set_xscale("log")
    _thousands(axis.xaxis, small=True)
    axis.tick_params(axis="x", which="both", labelsize=9, pad=4)
    axis.set(
        xlabel=TIMES_DENSE,
        yticks=range(len(models)),
        yticklabels=models,
    )
    axis.invert_yaxis()
    axis.legend()
    return _covered(figure)


def loss_curves(curves: Mapping[str, Mapping[str, tuple[Sequence[dict], Sequence[dict]]]]) -> plt.Figure:
    """Training loss by step (thin, as it came) and held-out loss (thick, marked), one panel a training text.

    Args:
        curves: {text: {model: (curve, validation)}}, each a list of {"step", "loss", ...}.
    """
    titles = {"wikitext": "trained on WikiText", "trivia": "trained on questions"}
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.1), layout="constrained", squeeze=False)
    palette = [BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
    models = list(dict.fromkeys(model for trained in curves.values() for model in trained))
    for axis, (text, trained) in zip(axes[0], curves.items(), strict=True):
        for model, (curve, validation) in trained.items():
            which = models.index(model)
            colour, marker = palette[which % len(palette)], "os^DvPX"[which % 7]
            axis.plot([c["step"] for c in curve], [c["loss"] for c in curve], color=colour, linewidth=0.6, alpha=0.35)
            held_out = [v["step"] for v in validation], [v["loss"] for v in validation]
            axis.plot(*held_out, f"{marker}-", color=colour, markersize=6, linewidth=1.8, label=model)
        axis.set(xlabel="step", ylabel="loss, nats per predicted token", title=titles[text])
        axis.legend(fontsize=9)
    return figure


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
        table: columns method, look, x dense, low, high (see `thesislib.chapters.ch05_quantisation.methods`).
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


FILE_LOOKS = {True: ("*", "#E69F00", 15), False: ("P", "#56B4E9", 9)}  # the file that the subject came in; others


def bytes_chart(table: pd.DataFrame, marks: pd.DataFrame, most: float = 2.0) -> plt.Figure:
    """Ratios to the dense model over megabytes on disk, a line a series; what lies above `most` is not drawn.

    Args:
        table: columns series, label, MB, x dense, low, high (see `thesislib.chapters.ch05_quantisation.sizes`).
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
    labels = [*_draw_files(axis, marks, "x dense", most), *labels]
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axis.set(xlabel="MB on disk, embedding included", ylabel="held-out perplexity, times dense")
    axis.legend(fontsize=9)
    _covered(figure)
    _write(axis, labels, size=10)
    return figure


def _draw_files(axis: plt.Axes, marks: pd.DataFrame, measure: str, most: float = np.inf) -> list[tuple]:
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


def _write(axis: plt.Axes, labels: Iterable[Label], size: float = 7) -> None:
    """Write labels beside their points, each with a line to it, where they cover neither a mark nor an interval, the
    legend or each other; those that have no such place are left out.

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
    for line in (line for line in axis.lines if line.get_label() == "front"):
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


FAMILY_LOOKS = {"pruned": ("o", GREY), "+ LoRA": ("s", BLUE), "+ GPTQ": ("^", ORANGE), "+ EoRA": ("D", GREEN)}


def pareto_chart(
    table: pd.DataFrame, fronts: Mapping[str, Sequence[str]], measure: str, marks: pd.DataFrame, most: float = np.inf
) -> plt.Figure:
    """A measure over megabytes, a panel for those trained alike; a line joins the models that no other of the panel
    beats at once in size and measure. Labels leave out what all models of a panel were trained on.

    Args:
        table: see `thesislib.chapters.pareto.points`.
        fronts: {base: labels}, see `thesislib.chapters.pareto.front`; a panel each.
        measure: a column; perplexity is drawn on a logarithmic scale.
        marks: files beside the untrained models, see `thesislib.chapters.pareto.marks`.
        most: values above it are not drawn, but counted.
    """
    figure, axes = plt.subplots(
        1,
        len(fronts),
        figsize=(9, 4.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
        width_ratios=[1] * len(fronts),
    )
    labels: dict[plt.Axes, list[Label]] = {}
    for axis, (base, front) in zip(axes[0], fronts.items(), strict=True):
        known = table[table["base"] == base].dropna(subset=["MB", measure])
        shown, on_it = known[known[measure] <= most], known[known["label"].isin(front)].sort_values("MB")
        for name, (marker, colour) in FAMILY_LOOKS.items():
            here = shown[shown["family"] == name]
            if len(here):
                values = (here[column] for column in (measure, f"{measure} low", f"{measure} high"))
                look: dict[str, Any] = {"markersize": 5, "capsize": 0, "linewidth": 0.4, "label": name}
                intervals(axis, here["MB"], values, marker, colour, **look)
        labels[axis] = _draw_files(axis, marks, measure, most) if base == DENSE else []
        on_it = on_it[on_it[measure] <= most]
        axis.plot(on_it["MB"], on_it[measure], "-", color="black", linewidth=1, zorder=0, label="front")
        trained = "" if base == DENSE else plain(base)
        labels[axis] += [
            (x, y, _without(plain(label), trained), "black")
            for x, y, label in zip(on_it["MB"], on_it[measure], on_it["label"], strict=True)
        ]
        axis.margins(x=0.12, y=0.1)
        low, high = axis.get_xlim()
        axis.set_xlim(low - 0.12 * (high - low), high)  # labels stand left of a steep front
        if measure == PPL:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            _thousands(axis.yaxis)
        else:
            axis.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f}%")
        left = f"({len(known) - len(shown)} above {most:.0f} not drawn)" if len(known) > len(shown) else ""
        said = [f"{group(base)}: {len(shown)} models", left, f"(to every label add {trained})" if trained else ""]
        better = "lower is better, log" if measure == PPL else "higher is better"
        axis.set(
            xlabel="MB on disk",
            ylabel=f"{measure} ({better})" if axis is axes[0][0] else "",
            title="\n".join(filter(None, said)),
        )
        axis.title.set_fontsize(9)
    seen = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=len(seen), fontsize=8)
    for axis, texts in labels.items():
        _write(axis, texts, 8)
    return figure


def _without(label: str, part: str) -> str:
    """A label less one of its parts; what is left of nothing is the dense model."""
    return "+".join(x for x in label.split("+") if x != part) or DENSE if part else label


def interaction_chart(table: pd.DataFrame, told: pd.DataFrame) -> plt.Figure:
    """By what factor the perplexity of two prunings together is off the one that their losses add up to: a heat map,
    a star where it differs.

    Args:
        table: factors, blocks removed by width patterns; above 1 they cost more together.
        told: whether a test tells each from 1.
    """
    figure, axis = plt.subplots(figsize=(9, 0.55 * len(table) + 1.2), layout="constrained")
    words = table.map(lambda x: "" if pd.isna(x) else f"{x:.2f}") + told.map(lambda x: " *" if x is True else "")
    look = {"cbar_kws": {"label": "ratio (log)", "ticks": [-2, -1, 0, 1, 2], "format": lambda x, _: f"{2.0**x:g}"}}
    sns.heatmap(np.log2(table.astype(float)), cmap="PuOr_r", vmin=-2, vmax=2, annot=words, fmt="", linewidths=0.5,
                annot_kws={"size": 9}, ax=axis, **look)  # fmt: skip
    axis.set(xlabel="of each group removed", ylabel="blocks removed")
    axis.tick_params(axis="y", rotation=0)
    return figure


def steps_chart(steps: Sequence[tuple[str, str, str, Comparison]], most: float = 1.5) -> plt.Figure:
    """By what factor each stage changes perplexity, a row a model before it, a panel a stage; hollow where a paired
    test tells nothing.

    Args:
        steps: see `thesislib.chapters.ch06_grid.steps`.
        most: a factor beyond it, either way, is written at the panel's edge instead of drawn.
    """
    panels = {name: [(a, b, c) for family, a, b, c in steps if family == name] for name in FAMILY_LOOKS}
    panels = {name: rows for name, rows in panels.items() if rows}
    tallest = max(map(len, panels.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 0.3 * tallest + 1.3), layout="constrained", squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], panels.items(), strict=True):
        marker, colour = FAMILY_LOOKS[name]
        inside = [c for *_, c in rows if abs(c.difference) <= np.log(most)]
        for y, (_, _, c) in enumerate(rows):
            if c in inside:
                values = np.exp([[c.difference], [c.low], [c.high]])
                intervals(axis, y, values, marker, colour, across=True, mfc=colour if c.told else "none", linewidth=1)
        axis.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axis.margins(x=0.1)
        low, high = axis.get_xlim()
        for y, (_, _, c) in enumerate(rows):
            if c not in inside:
                at, side = (high, "right") if c.difference > 0 else (low, "left")
                text = f"x {np.exp(c.difference):.3g} →" if side == "right" else f"← x {np.exp(c.difference):.2f}"
                axis.text(at, y, text, ha=side, va="center", fontsize=8, color=colour)
        last = [of(b).parts[-1] for _, b, _ in rows]  # shown where a panel's stages are not all alike
        labels = [
            plain(f"{a} ({part})" if name == "pruned" or part[-1].isdigit() else a)
            for (a, b, _), part in zip(rows, last, strict=True)
        ]
        axis.set(
            title=name,
            xlabel="perplexity, times that of the model before",
            yticks=range(len(rows)),
            yticklabels=labels,
            xlim=(low, high),
            ylim=(tallest - 0.5, -0.5),
        )
        axis.tick_params(labelsize=8)
    return figure


def timing_chart(rows: pd.DataFrame) -> plt.Figure:
    """Measured milliseconds a token over megabytes of weights, a marker a format; hollow: half are zeros.

    Args:
        rows: with format, model, MB, ms, low, high (quartiles) and zeros.
    """
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    looks = zip(rows.groupby("format", sort=False), "os^D", (GREY, BLUE, ORANGE, GREEN), strict=False)
    for (name, part), marker, colour in looks:
        for zeros, here in part.groupby("zeros"):
            look: dict[str, Any] = {"markersize": 9 if zeros else 5, "mfc": "none" if zeros else colour}
            intervals(axis, here["MB"], (here[x] for x in ("ms", "low", "high")), marker, colour, **look,
                      label=None if zeros else name)  # fmt: skip
    axis.set(xlabel="MB of weights, all read at every token", ylabel="ms a token", xlim=(0, None), ylim=(0, None))
    axis.legend(title="llama.cpp", loc="upper left")
    dense = rows[rows["model"] == DENSE]
    _write(axis, [(x, y, f"{DENSE}, {kind}", "black") for x, y, kind in
                  zip(dense["MB"], dense["ms"], dense["format"], strict=True)], 8)  # fmt: skip
    return figure


def throughput_chart(rows: pd.DataFrame, measured: Mapping[str, float] | None = None) -> plt.Figure:
    """Projected tokens per second, a panel a device that holds any model, an interval a model; crosses: measured on the
    host.

    Args:
        rows: with device, model, low and high, as `thesislib.chapters.ch07_device.projections` has them.
        measured: tokens per second by model, for the panel named host.
    """
    kept = [name for name, part in rows.groupby("device", sort=False) if part["low"].notna().any()]
    figure, axes = plt.subplots(
        1, len(kept), figsize=(2.1 * len(kept) + 1.5, 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], kept, strict=True):
        part = rows[rows["device"] == name].reset_index(drop=True)
        axis.hlines(part.index, part["low"], part["high"], color=BLUE, linewidth=5, alpha=0.7)
        if name == "host" and measured:
            seen = [(y, measured[label]) for y, label in enumerate(part["model"]) if label in measured]
            axis.plot([x for _, x in seen], [y for y, _ in seen], "x", color=ORANGE, markersize=8, markeredgewidth=2)
        axis.set(title=name, xscale="log", xlabel="tokens/s", yticks=range(len(part)))
        axis.set_yticklabels([plain(label) for label in part["model"]], fontsize=8)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].invert_yaxis()
    return figure


def prediction_chart(tables: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """Measured milliseconds per token over MB per token, a panel a format, with the line through the fitted depths;
    hollow marks were held out."""
    figure, axes = plt.subplots(1, len(tables), figsize=(3.2 * len(tables), 3.2), layout="constrained", squeeze=False)
    for axis, (kind, table) in zip(axes[0], tables.items(), strict=True):
        table = table.sort_values("MB per token")
        axis.fill_between(table["MB per token"], table["low"], table["high"], color=BLUE, alpha=0.2)
        axis.plot(table["MB per token"], table["predicted"], color=BLUE)
        for fitted, face in ((True, ORANGE), (False, "white")):
            part = table[(table["where"] == "fitted") == fitted]
            axis.plot(part["MB per token"], part["measured"], "o", color=ORANGE, markerfacecolor=face, markersize=7)
        axis.set(
            title=kind,
            xlabel="MB read per token",
            ylabel="ms per token" if axis is axes[0][0] else "",
            xlim=(0, None),
            ylim=(0, None),
        )
    return figure


def roofline_chart(device_name: str, rate: float, bandwidth: float, operations: pd.DataFrame) -> plt.Figure:
    """MACs per second that a device could reach over MACs per byte (Williams et al. 2009), with operations where they
    lie on it.

    Args:
        device_name: for the title.
        rate: MACs per second of the engine.
        bandwidth: bytes per second of the memory.
        operations: with name, kind (decoding or prompt) and intensity (MACs per byte).
    """
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    x = np.geomspace(min(0.1, operations["intensity"].min() / 2), max(1e3, operations["intensity"].max() * 2), 200)
    ridge = rate / bandwidth
    axis.axvspan(x[0], ridge, color=BLUE, alpha=0.08, linewidth=0)
    axis.axvspan(ridge, x[-1], color=ORANGE, alpha=0.1, linewidth=0)
    axis.plot(x, np.minimum(rate, x * bandwidth), color=GREY)
    labels: list[Label] = []
    for kind, marker, colour in (("decoding", "o", BLUE), ("prompt", "^", ORANGE)):
        part = operations[operations["kind"] == kind]
        height = np.minimum(rate, part["intensity"] * bandwidth)
        axis.plot(part["intensity"], height, marker, color=colour, label=kind, markersize=8, alpha=0.8)
        for at, here in part.assign(height=height).groupby("intensity"):
            names = here["name"].tolist()
            shown = names[0] if len(names) == 1 else f"{len(names)} linears"
            labels.append((float(at), float(here["height"].iloc[0]), f"{kind}: {shown}", "black"))
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="MACs per byte read (log)",
        ylabel="MACs per second, at most (log)",
        title=f"{device_name}",
        xlim=(x[0], x[-1]),
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))  # 10G
    axis.yaxis.set_minor_formatter(NullFormatter())
    for left, right, words in ((x[0], ridge, "memory limits"), (ridge, x[-1], "arithmetic limits")):
        axis.text(np.sqrt(left * right), 0.04, words, transform=axis.get_xaxis_transform(), ha="center", fontsize=9)
    _write(axis, labels, 8)
    return figure


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
