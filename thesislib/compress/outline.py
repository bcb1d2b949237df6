"""The outline of a subject: its shapes without weights, taken through stages to forecast sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import lcm, prod
from typing import Any

import torch

from thesislib.compress.selection import LinearKey
from thesislib.model import packing
from thesislib.model.blocks import ATTRIBUTES
from thesislib.model.grid import Grid
from thesislib.model.layers import LINEARS, Adapted, ComputedLinear, Projection, base_of, replace
from thesislib.model.lowrank import Pair, factor_shapes
from thesislib.model.packing import PRUNED
from thesislib.model.quantised import EVERYWHERE, stored_shapes
from thesislib.model.subject import Subject

RUNS = (2, 4, 8, 16)  # groups of the patterns that `packing.smallest` tries


class SizeUnknown(Exception):
    """The sizes after a stage cannot be known before it runs."""


@dataclass(frozen=True)
class Zeros:
    """The zeros that pruning has made in each row of a weight.

    Attributes:
        remove: zeros in each `of` consecutive inputs, exactly.
        of: inputs of such a group.
        least: zeros in each 2, 4, 8 and 16 consecutive inputs, at least.
    """

    remove: int = 0
    of: int = 1
    least: tuple[int, ...] = (0,) * len(RUNS)

    def pruned(self, remove: int, of: int, columns: int) -> "Zeros | None":
        """The zeros after a width stage; None if their number depends on the positions of the present ones.

        Zeros that are there already count among the weights to remove.
        """
        fewest, most = spread(self.remove, self.of, of)
        if fewest >= remove:
            return self
        if most > remove:
            return None
        least = (spread(remove, of, run)[0] if columns % run == 0 else 0 for run in RUNS)
        return Zeros(remove, of, tuple(map(max, self.least, least)))

    @property
    def patterns(self) -> list[packing.Pattern]:
        """The patterns that the weight obeys for certain."""
        return [packing.Pattern(least, run) for least, run in zip(self.least, RUNS, strict=True) if least]


@cache
def spread(remove: int, of: int, run: int) -> tuple[int, int]:
    """The fewest and the most zeros in any `run` consecutive inputs if each group of `of` has exactly `remove`.

    >>> spread(6, 8, 4), spread(1, 8, 4), spread(1, 2, 8)
    ((2, 4), (0, 1), (4, 4))
    """
    fewest, most = [], []
    for start in range(0, lcm(of, run), run):
        groups = range(start // of * of, start + run, of)  # those that overlap this run, and by how many inputs
        overlaps = [min(start + run, first + of) - max(start, first) for first in groups]
        fewest.append(sum(max(0, remove - of + n) for n in overlaps))
        most.append(sum(min(remove, n) for n in overlaps))
    return min(fewest), max(most)


class Outlined(ComputedLinear):
    """Replaces a projection in an outline; its tensors have the shapes that an artifact would store.

    Args:
        like: the projection.
        dtype: of its weight.
        zeros: that pruning has made; None if only the run can tell.
        grid: if it is quantised; then pruned weights are left out, as in `QuantisedLinear`.
        indexed: whether each input's group is stored.
    """

    def __init__(
        self, like: Projection, dtype: torch.dtype, zeros: Zeros | None, grid: Grid | None = None, indexed: bool = False
    ):
        shape = like.out_features, like.in_features
        count, known = prod(shape), zeros or Zeros()
        pruned = count // known.of * known.remove
        if grid is None:
            nonzero = {"dense": None, "bitmap": count - pruned, **{str(p): None for p in known.patterns}}
            encoding = min(nonzero, key=lambda e: packing.predicted_bytes(shape, dtype, e, nonzero[e]))
            sizes = packing.packed_shapes(shape, encoding, nonzero[encoding])
            shapes = {
                name: (size, torch.uint8 if name in ("codes", "bitmap") else dtype) for name, size in sizes.items()
            }
        else:
            bits = {EVERYWHERE: count * grid.bits, "bitmap": count + (count - pruned) * grid.bits}
            bits |= {str(p): count // p.of * (p.bits + p.keep * grid.bits) for p in known.patterns}
            mask = min(bits, key=bits.get) if pruned > PRUNED * count else EVERYWHERE
            encoding = f"int{grid.bits}/{grid.kind}/{grid.group}/{mask}"
            shapes = stored_shapes(encoding, shape, count - pruned, indexed)
        super().__init__(shape, like.bias)
        self.tensors, self.encoding, self.zeros, self.grid, self.pruned = empty(shapes), encoding, zeros, grid, pruned

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of the shapes that an artifact would store."""
        return self.tensors

    @property
    def rounded(self) -> bool:
        """Whether numbers are on a grid, so that some may have become zero."""
        return self.grid is not None


class OutlinedPair(Pair, Outlined):
    """Replaces a projection in an outline by a pair of low rank.

    Args:
        like: the projection.
        rank: of the pair.
        encodings: of its factors A and B, see `thesislib.model.lowrank.LowRank`.
        dtype: of a dense factor.
    """

    def __init__(self, like: Projection, rank: int, encodings: tuple[str, str], dtype: torch.dtype):
        super().__init__(base_of(like), dtype, Zeros())
        shape = like.out_features, like.in_features
        self.rank, self.encodings = rank, encodings
        self.tensors = empty(factor_shapes(rank, shape, encodings, dtype))
        self.encoding = f"lowrank:{rank}:{encodings[0]}:{encodings[1]}"

    @property
    def rounded(self) -> bool:
        """See `Outlined`."""
        return self.is_quantised


def empty(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, each with one element of memory, so that their addresses tell them apart."""
    return {name: torch.empty(1, dtype=dtype).expand(shape) for name, (shape, dtype) in shapes.items()}


def corrected(module: Projection, rank: int, dtype: torch.dtype) -> Adapted:
    """A projection with one more correction, as `thesislib.model.layers.adapt` joins them."""
    rank = min(rank, module.in_features, module.out_features)
    if isinstance(module, Adapted):
        rank, dtype = rank + module.rank, torch.promote_types(dtype, module.lora_A.dtype)
    factors = empty({"A": ((rank, module.in_features), dtype), "B": ((module.out_features, rank), dtype)})
    return Adapted(base_of(module), factors["A"], factors["B"])


class Outline:
    """The outline of a subject. Each stage's `outline` changes it as its `apply` changes a subject.

    Args:
        subject: without weights; it is changed in place.

    Attributes:
        subject: its projections are `Outlined`.
        dtype: of its weights.
        changed: the projections whose weights the last stage changed.
        lost: parts ("attention", "mlp") that some blocks have lost; only the run can tell which blocks.
        budgeted: projections whose ranks come out of a budget; only the run can tell them.
        biased: whether MLPs got biases, most of them zero; only the run can tell how many.
    """

    def __init__(self, subject: Subject):
        # tensors are told apart by their addresses; the memory costs nothing, since none of it is touched
        subject.model.to_empty(device="cpu").tie_weights()
        self.subject, self.dtype = subject, subject.dtype
        self.changed: set[LinearKey] = set()
        self.lost: set[str] = set()
        self.budgeted: set[LinearKey] = set()
        self.biased = False
        self.change(lambda module, _: Outlined(module, self.dtype, Zeros()), lambda *_: True)

    def change(
        self,
        make: Callable[[Projection, Any], Projection],
        setting: Callable[[int, str], Any],
        among: set[LinearKey] | None = None,
    ) -> None:
        """Replace projections.

        Args:
            make: the replacement, given a projection and its setting.
            setting: of a projection, by block and name; if it is falsy the projection stays.
            among: the projections that may be replaced; None for all.
        """
        self.check_alike(setting)
        subject, self.changed = self.subject, set()
        for i in range(subject.depth):
            for name, module in subject.linears(i).items():
                if (among is None or (i, name) in among) and (value := setting(i, name)):
                    new = make(module, value)
                    replace(subject.blocks[i], name, new)
                    if base_of(new) is not base_of(module):
                        self.changed.add((i, name))

    def check_alike(self, setting: Callable[[int, str], Any]) -> None:
        """Raises SizeUnknown for settings that differ by block if only the run can tell which blocks lost a part."""
        if self.lost and any(len({setting(i, name) for i in range(self.subject.depth)}) > 1 for name in LINEARS):
            raise SizeUnknown

    def outlined(
        self, module: Projection, zeros: Zeros | None, grid: Grid | None = None, indexed: bool = False
    ) -> Projection:
        """A projection with another weight; its correction, if it has one, stays."""
        new = Outlined(base_of(module), self.dtype, zeros, grid, indexed)
        return Adapted(new, module.lora_A, module.lora_B) if isinstance(module, Adapted) else new

    def size_key(self, block: int, parts: set[str]) -> tuple:
        """A key that two blocks share if these parts of them have the same size."""
        children = [
            child
            for part in sorted(parts)
            for child in getattr(self.subject.blocks[block], ATTRIBUTES[part]).named_children()
        ]
        return tuple(
            (base_of(m).encoding, base_of(m).zeros, *((p.shape, p.dtype) for p in m.parameters()))
            for name, m in children
            if name in LINEARS
        )
