"""Chapter 8's plot of pairs: what two blocks lose together beyond the sum of both."""

import itertools
import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from thesislib.chapters.ch08_pairs import NAMES, Losses, excesses, pairs_add_up
from thesislib.chapters.ch08_runs import free
from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE
from thesislib.compress.exhaustive import Found

SHOWN = 0.95  # the share of the middle blocks' pairs whose colour is not the end of the scale


def pair_chart(record: Losses, found: Mapping[str, Found]) -> plt.Figure:
    """The excess of every pair as a map, and the loss of every pair over the sum of both, with what searches choose.

    Args:
        record: see `thesislib.chapters.ch08_pairs`.
        found: {search: its pair}, see `thesislib.chapters.ch08_pairs.found`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.3), layout="constrained")
    square, inner = excesses(record).to_numpy(), free(record.depth)
    most = float(np.nanquantile(np.abs(square[np.ix_(inner, inner)]), SHOWN))
    image = left.imshow(square, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower")
    left.add_patch(plt.Rectangle((inner[0] - 0.5, inner[0] - 0.5), len(inner), len(inner), fill=False, color="black"))
    left.grid(visible=False)
    left.set(xlabel="block", ylabel="block", title="excess of a pair, nats a token")
    figure.colorbar(image, ax=left, extend="both", shrink=0.85)

    whole, pairs = float(np.mean(record.searched[()])), pairs_add_up(record)
    added, true = pairs.predicted - whole, pairs.predicted + pairs.excess - whole
    inside = np.array([{*pair} <= {*inner} for pair in pairs.sets])
    right.plot(added[~inside], true[~inside], "s", color=GREY, markersize=3, alpha=0.6, label="with an outer block")
    right.plot(added[inside], true[inside], "o", color=BLUE, markersize=3.5, alpha=0.7,
        label=f"of blocks {inner[0]} to {inner[-1]}")  # fmt: skip
    ends = np.array([added.min() * 0.8, added.max() * 1.2])
    right.plot(ends, ends, "--", color=GREY, linewidth=1)
    right.set(xscale="log", yscale="log", xlabel="sum of both damages, nats a token (log)",
        ylabel="damage of the pair, nats a token (log)", title="every pair, and what searches choose")  # fmt: skip
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_minor_formatter(NullFormatter())
    names: dict[tuple[int, ...], list[str]] = {}
    for name, f in found.items():
        names.setdefault(f.blocks, []).append(name)
    looks = itertools.cycle(zip("D^vP*X", (ORANGE, GREEN, "#E69F00", "#CC79A7", "#56B4E9", "white"), strict=True))
    for (pair, several), (marker, colour) in zip(names.items(), looks, strict=False):
        said = f"{pair[0]}, {pair[1]}: {', '.join(NAMES.get(name, name) for name in several)}"
        right.plot(added[pairs.sets.index(pair)], true[pairs.sets.index(pair)], marker, color=colour, markersize=8,
            markeredgecolor="black", linestyle="", label=textwrap.fill(said, 30))  # fmt: skip
    right.set(xlim=(added.min() / 1.5, added.max() * 3), ylim=(true.min() / 8, true.max() * 1.5))  # room for the legend
    right.legend(loc="lower right", fontsize=8)
    return figure
