"""Chapter 6's plots: fronts, pairs of prunings, and what each stage costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator, NullFormatter

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, Label, draw_files, intervals, thousands, write_labels
from thesislib.chapters.labels import of, plain
from thesislib.chapters.pareto import PPL, group
from thesislib.evaluate.stats import Comparison
from thesislib.experiment import DENSE

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
        labels[axis] = draw_files(axis, marks, measure, most) if base == DENSE else []
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
            thousands(axis.yaxis)
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
        write_labels(axis, texts, 8)
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
                ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axis.text(at, y, text, ha=side, va="center", fontsize=8, color=colour, bbox=ground)
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
