"""Chapter 7's plots: tokens timed, projected and held against published figures, and rooflines."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, Label, intervals, write_labels
from thesislib.chapters.labels import plain
from thesislib.experiment import DENSE


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
    write_labels(axis, [(x, y, f"{DENSE}, {kind}", "black") for x, y, kind in
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
        look: dict[str, Any] = {"markersize": 12, "mfc": "none", "mew": 2} if marker == "o" else {"markersize": 7}
        axis.plot(part["intensity"], height, marker, color=colour, label=kind, **look)  # one may lie in the other
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
    write_labels(axis, labels, 9)
    return figure
