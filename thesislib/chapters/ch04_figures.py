"""Chapter 4's plots: models before and after training, and losses by step."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, TIMES_DENSE, covered, intervals, thousands, values_of
from thesislib.chapters.labels import of
from thesislib.records.measurement import Measurement

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
            intervals(axis, at, values_of(ms), marker, colour, across=True, **look)
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
    thousands(axis.xaxis, small=True)
    axis.tick_params(axis="x", which="both", labelsize=9, pad=4)
    axis.set(
        xlabel=TIMES_DENSE,
        yticks=range(len(models)),
        yticklabels=models,
    )
    axis.invert_yaxis()
    axis.legend()
    return covered(figure)


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
