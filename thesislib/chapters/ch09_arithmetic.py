"""Chapter 9's sums: what a ratio means to each method, and which share of a model CALR can remove at all."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

REMOVED = 0.5177  # the largest share that CALR's abstract reports, over three models


@dataclass(frozen=True)
class Model:
    """The sizes of a model with a tied embedding that CALR's paper measures, from its config.json.

    Attributes:
        name: of the model.
        width: D.
        hidden: of an MLP.
        blocks: their number.
        queries: rows of q_proj.
        keys: rows of k_proj and of v_proj.
        vocabulary: rows of the embedding.
    """

    name: str
    width: int
    hidden: int
    blocks: int
    queries: int
    keys: int
    vocabulary: int

    @property
    def mlp(self) -> int:
        """Parameters of a block's MLP."""
        return 3 * self.width * self.hidden

    @property
    def body(self) -> int:
        """Parameters of all blocks' projections."""
        return self.blocks * (self.mlp + 2 * self.width * (self.queries + self.keys))

    @property
    def whole(self) -> int:
        """Parameters with the embedding; norms, a thousandth of a percent, are left out."""
        return self.body + self.width * self.vocabulary

    def removed_by(self, rank: int) -> int:
        """Parameters that a block loses by pairs of a rank and a path of it."""
        return self.mlp - rank * (3 * (self.width + self.hidden) + 2 * self.width)

    def needed(self, rank: int, of: int) -> float:
        """How many blocks of these lose `REMOVED` of `of` parameters."""
        return REMOVED * of / self.removed_by(rank)


MODELS = (
    Model("SmolLM2-135M", 576, 1536, 30, 576, 192, 49_152),
    Model("Qwen3-0.6B", 1024, 3072, 28, 2048, 1024, 151_936),
    Model("Llama-3.2-1B", 2048, 8192, 16, 2048, 512, 128_256),
)


def removable_table(rank: int = 32) -> pd.DataFrame:
    """For each model the share that lies in MLPs, and how many blocks must become pairs to remove `REMOVED`."""
    rows = []
    for m in MODELS:
        counts = {"of the whole model": m.needed(rank, m.whole), "without the embedding": m.needed(rank, m.body)}
        rows.append(
            {
                "": m.name,
                "parameters": f"{m.whole / 1e6:.0f} M",
                "in MLPs": f"{m.blocks * m.mlp / m.whole:.1%}",
                **{
                    f"blocks, {name}": f"{x:.1f} of {m.blocks}" + (": impossible" if x > m.blocks else "")
                    for name, x in counts.items()
                },
            }
        )
    return pd.DataFrame(rows).set_index("")


def removable_sentence(rank: int = 32) -> str:
    """Which reading of CALR's largest ratio is possible."""
    wrong = [m for m in MODELS if m.needed(rank, m.whole) > m.blocks]
    one = MODELS[0]
    said = " and ".join(f"{m.name}, whose MLPs are {m.blocks * m.mlp / m.whole:.1%} of it" for m in wrong)
    return (
        f"CALR's abstract reports up to {REMOVED:.2%} fewer parameters. Counted of the whole model with pairs and "
        f"paths of rank {rank}, {one.name} would need {one.needed(rank, one.whole):.1f} of its {one.blocks} MLPs; it "
        f"cannot be for {said}. Counted without the embedding it is {one.needed(rank, one.body):.1f} of {one.blocks}."
    )


# each convention's rank of an m x n weight at a ratio that its paper calls 20 % compression, and what that counts
CONVENTIONS: Mapping[str, tuple[Callable[[int, int], Any], str]] = {
    "SVD-LLM": (lambda m, n: int(0.8 * m * n / (m + n)), "parameters of the pair; its option names what is removed"),
    "ASVD": (lambda m, n: int(m * n * 0.8) // (m + n), "parameters of the pair; its option names what is kept"),
    "LASER": (lambda m, n: int(min(m, n) * 0.8), "the rank itself; multiplied back, nothing gets smaller"),
    "ERC-SVD": (
        lambda m, n: int(0.8 * m * n / (m + n)),
        "parameters, if all layers; over the last k it is N / k times",
    ),
    "Dobi-SVD": (lambda m, n: int(0.8 * min(m, n)), "16-bit words after two 8-bit halves were packed into each"),
    "SliceGPT": (lambda m, n: None, "features of the stream; each block's rotations come on top"),
    "here": (lambda m, n: int(0.8 * m * n / (m + n)), "parameters of the pairs of the linears in scope"),
}


def conventions_table(shapes: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """The rank that each method gives the weights of these shapes at "20 %", and what it counts."""
    rows = []
    for name, (rank, counts) in CONVENTIONS.items():
        ranks = {kind: rank(*shape) for kind, shape in shapes.items()}
        rows.append({"": name, **{k: "" if r is None else str(r) for k, r in ranks.items()}, "20 % is of": counts})
    return pd.DataFrame(rows).set_index("")


def break_even(m: int, n: int) -> float:
    """The rank at which a pair has as many parameters as the weight."""
    return m * n / (m + n)


def break_even_sentence(m: int = 1536, n: int = 576) -> str:
    """Exercise: the break-even rank, and what 8-bit factors change."""
    rank = break_even(m, n)
    return (
        f"{m} x {n} / ({m} + {n}) = {rank:.0f} of {min(m, n)} directions. A pair saves nothing until "
        f"{1 - rank / min(m, n):.0%} of them are gone. With factors of 8 bits it breaks even with the 16-bit weight "
        f"at rank {2 * rank:.0f}, which is more than there are: then all the rank fits, and what is compared is 8 "
        f"bits a factor with 8 bits a weight, {math.ceil(8 * min(m, n) * (m + n) / (m * n))} bits a weight against 8."
    )


def control_sentence(rank: int = 128) -> str:
    """Exercise: the rank of pairs alone that takes as many parameters as pairs and a path."""
    m = MODELS[0]
    pairs, path = 3 * (m.width + m.hidden), 2 * m.width
    return (
        f"Pairs take 3 (D + H) r = {pairs:,} r, the path {path:,} r, so by {path / pairs:.0%}: pairs of rank "
        f"{round(rank * (1 + path / pairs))} take what pairs and path of rank {rank} take."
    )
