"""Chapter 8's plot of a training: relevance and cosine score of each block over the steps, and how far they agree."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm

from thesislib.chapters.ch08_over_training import BY, Step
from thesislib.chapters.figures import BLUE, GREY, ORANGE, intervals


def training_chart(found: Sequence[Step]) -> plt.Figure:
    """Heat maps of relevance and cosine score, means of the seeds; below them their rank correlation, a mark a seed.

    Args:
        found: see `thesislib.chapters.ch08_over_training.steps`.
    """
    known = [s for s in found if s.defined]
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), height_ratios=(1, 1, 0.9), layout="constrained")
    for axis, name in zip(axes, ("relevance", "cosine"), strict=False):
        means = np.round([getattr(s, name).mean(0) for s in known], 2) + 0  # no -0.00
        look: dict[str, Any] = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, 1), "aspect": "auto"}
        axis.imshow(means.T, **look)
        for (column, block), value in np.ndenumerate(means):
            axis.text(
                column, block, f"{value:.2f}", ha="center", va="center", fontsize=9,
                color="white" if value > 0.4 else "black",
            )  # fmt: skip
        axis.set(
            xticks=range(len(known)),
            xticklabels=[s.step for s in known],
            yticks=range(means.shape[1]),
            ylabel="block",
            title=f"{'cosine score' if name == 'cosine' else name}, mean of {len(found[0].checkpoints)} seeds",
        )
        axis.grid(visible=False)
    axis = axes[2]
    apart = 0.1 * np.arange(len(found[0].checkpoints)) + 0.12
    for by, marker, colour, side in zip(BY, "os", (BLUE, ORANGE), (-1, 1), strict=True):
        lines = []
        for i, s in enumerate(known):
            here = [e for e in s.correlation[by] if e is not None]
            label = f"{by} and cosine score" if i == 0 else None
            intervals(axis, i + side * apart, zip(*here, strict=True), marker, colour, label=label)
            lines.append(np.mean([e.value for e in here]))
        axis.plot(np.arange(len(known)) + side * apart.mean(), lines, "-", color=colour, linewidth=1)
    axis.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axis.set(
        xlim=(-0.5, len(known) - 0.5),
        ylim=(None, 1.05),
        xticks=range(len(known)),
        xticklabels=[s.step for s in known],
        xlabel="step of the training",
        ylabel="rank correlation",
        title="a mark a seed, lines through the means; 95 % intervals: other windows of text",
    )
    axis.grid(axis="x", visible=False)
    axis.legend(loc="lower right")
    return figure
