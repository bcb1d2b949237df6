"""Chapter 8's plots of scale: what is lost with something in a block's place, and the block that makes the sink."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from thesislib.chapters.ch08_scale import SKIP, WAYS, Scale, by_first_token, lost, sink
from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE, thousands, write_labels

LOOKS = dict(
    zip((SKIP, *WAYS), (("o", BLUE), ("^", GREEN), ("s", ORANGE), ("D", "#CC79A7"), ("v", "#E69F00")), strict=True)
)
LEAST = 1e-3  # nats a token; less is drawn here


def ways_chart(record: Scale) -> plt.Figure:
    """What each block is worth, on held-out text, when it is skipped and with each replacement; blocks in order."""
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    blocks = np.arange(record.depth)
    for shift, (way, (marker, colour)) in zip(np.linspace(-0.3, 0.3, len(LOOKS)), LOOKS.items(), strict=True):
        value = np.maximum(lost(record, way, "text"), LEAST)
        axis.plot(blocks + shift, value, marker, color=colour, markersize=5, label=way)
    for edge in blocks[:-1] + 0.5:
        axis.axvline(edge, color=GREY, linewidth=0.3, alpha=0.5)
    axis.set_yscale("log")
    thousands(axis.yaxis)
    axis.set_xticks(blocks[::2])
    axis.set(xlabel="block", ylabel="nats a token lost, held-out text (log)", xlim=(-0.6, record.depth - 0.4))
    axis.grid(False, axis="x")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return figure


def sink_chart(record: Scale) -> plt.Figure:
    """Left, the residual's norm through the blocks, at the first token and at the others; right, what is lost where a
    block is skipped at the first token only, by how much of the last block's output its write there is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    at = np.arange(record.depth + 1) - 1
    for name, marker, colour in (("first", "s", ORANGE), ("others", "o", BLUE)):
        label = f"{name} token" if name == "first" else "other tokens, median"
        left.plot(at, record.norms[name], f"{marker}-", color=colour, markersize=4, linewidth=1, label=label)
    left.set_yscale("log")
    thousands(left.yaxis)
    left.axvline(sink(record), color=GREY, linestyle="--", linewidth=1)
    left.set(xlabel=f"after block (dashed: block {sink(record)})", ylabel="norm of the residual (log)")
    left.legend(fontsize=9)
    share, damage = np.array(record.scores["share, first"]), np.maximum(by_first_token(record), LEAST)
    look: dict[str, Any] = {"color": ORANGE, "markersize": 6, "linestyle": ""}
    right.plot(share, damage, "s", **look)
    right.set_xscale("log")
    right.set_yscale("log")
    for axis in (right.xaxis, right.yaxis):
        thousands(axis)
    right.set(
        xlabel="share of the output at the first token (log)",
        ylabel=f"nats a token lost (log, from {LEAST:g} on)",
        title="skipped at the first token only",
    )
    most = np.argsort(-damage)[:8]
    write_labels(right, [(share[b], damage[b], str(b), "black") for b in most], size=9)
    return figure


def gain_chart(record: Scale) -> plt.Figure:
    """What is lost of held-out text without each block, by its cosine score and by the share of the output that its
    write is: median over tokens, and at a window's first token."""
    names = {"cosine": "cosine score", "share": "share, median token", "share, first": "share, first token"}
    figure, axes = plt.subplots(1, len(names), figsize=(9, 3.9), sharey=True, layout="constrained")
    damage = np.maximum(lost(record, SKIP, "text"), LEAST)
    for axis, (name, title), marker, colour in zip(axes, names.items(), "oDs", (BLUE, GREEN, ORANGE), strict=True):
        score = np.array(record.scores[name])
        axis.plot(score, damage, marker, color=colour, markersize=5, linestyle="")
        axis.set_xscale("log")
        axis.set_yscale("log")
        thousands(axis.yaxis)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        near = score.max() / score.min() < 20  # else the powers of ten are enough
        axis.xaxis.set_minor_formatter(lambda x, _, near=near: f"{x:g}" if near and f"{x:e}"[0] in "25" else "")
        axis.set(xlabel=f"{title} (log)")
        write_labels(axis, [(score[b], damage[b], str(b), "black") for b in np.argsort(-damage)[:9]], size=9)
    axes[0].set(ylabel="nats a token lost when skipped (log)")
    return figure
