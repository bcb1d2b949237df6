"""The shapes that stages would leave, without any weight: what a forecast of sizes is made from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import lcm, prod
from typing import Any

import torch

from thesislib.compress.layerwise import Place
from thesislib.model import packing
from thesislib.model.blocks import ATTRIBUTES
from thesislib.model.grid import Grid
from thesislib.model.layers import LINEARS, Adapted, ComputedLinear, Projection, base_of, replace
from thesislib.model.packing import PRUNED
from thesislib.model.quantised import EVERYWHERE, stored_shapes
from thesislib.model.subject import Subject

RUNS = (2, 4, 8, 16)  # groups whose patterns the packer tries


class SizeUnknown(Exception):
    """The sizes after a stage cannot be known before it runs."""


@dataclass(frozen=True)
class Zeros:
    """Where pruning put zeros: exactly `remove` into each `of` consecutive inputs, and at least `least` into each 2, 4,
    8 and 16."""

    remove: int = 0
    of: int = 1
    least: tuple[int, ...] = (0,) * len(RUNS)

    def pruned(self, remove: int, of: int, columns: int) -> "Zeros | None":
        """After a width stage, which counts zeros that are there among the weights to remove; None if their number then
        depends on places."""
        fewest, most = spread(self.remove, self.of, of)
        if fewest >= remove:
            return self
        if most > remove:
            return None
        least = (spread(remove, of, run)[0] if columns % run == 0 else 0 for run in RUNS)
        return Zeros(remove, of, tuple(map(max, self.least, least)))

    @property
    def patterns(self) -> list[packing.Pattern]:
        """Those that a weight is sure to obey."""
        return [packing.Pattern(least, run) for least, run in zip(self.least, RUNS, strict=True) if least]


@cache
def spread(remove: int, of: int, run: int) -> tuple[int, int]:
    """The fewest and the most zeros that each `run` consecutive inputs can have if each `of` have exactly `remove`.

    >>> spread(6, 8, 4), spread(1, 8, 4), spread(1, 2, 8)
    ((2, 4), (0, 1), (4, 4))
    """
    found = []
    for start in range(0, lcm(of, run), run):
        shared = [
            min(start + run, first + of) - max(start, first) for first in range(start // of * of, start + run, of)
        ]
        found.append((sum(max(0, remove - of + n) for n in shared), sum(min(remove, n) for n in shared)))
    return min(a for a, _ in found), max(b for _, b in found)


class Outlined(ComputedLinear):
    """Stands where a projection does, with the shapes of what an artifact would keep of it.

    Args:
        like: the projection.
        dtype: of its weight.
        zeros: where pruning put them; None if only the run can tell.
        grid: of its levels, if it is quantised; pruned weights are left out then, as in `QuantisedLinear`.
        indexed: whether each input's group is kept.
    """

    def __init__(
        self, like: Projection, dtype: torch.dtype, zeros: Zeros | None, grid: Grid | None = None, indexed: bool = False
    ):
        shape = like.out_features, like.in_features
        count, known = prod(shape), zeros or Zeros()
        gone = count // known.of * known.remove
        if grid is None:
            nonzero = {"dense": None, "bitmap": count - gone, **{str(p): None for p in known.patterns}}
            encoding = min(nonzero, key=lambda e: packing.predicted_bytes(shape, dtype, e, nonzero[e]))
            sizes = packing.packed_shapes(shape, encoding, nonzero[encoding])
            shapes = {
                name: (size, torch.uint8 if name in ("codes", "bitmap") else dtype) for name, size in sizes.items()
            }
        else:
            bits = {EVERYWHERE: count * grid.bits, "bitmap": count + (count - gone) * grid.bits}
            bits |= {str(p): count // p.of * (p.bits + p.keep * grid.bits) for p in known.patterns}
            mask = min(bits, key=bits.get) if gone > PRUNED * count else EVERYWHERE
            encoding = f"int{grid.bits}/{grid.kind}/{grid.group}/{mask}"
            shapes = stored_shapes(encoding, shape, count - gone, indexed)
        super().__init__(shape, like.bias)
        self.tensors, self.encoding, self.zeros, self.grid, self.gone = empty(shapes), encoding, zeros, grid, gone

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of the shapes that an artifact would keep."""
        return self.tensors


def empty(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, each one element in a place of its own, since tensors are told apart by where they
    lie."""
    return {name: torch.empty(1, dtype=dtype).expand(shape) for name, (shape, dtype) in shapes.items()}


def corrected(module: Projection, rank: int, dtype: torch.dtype) -> Adapted:
    """A projection with one more correction, as `thesislib.model.layers.adapt` joins them."""
    rank = min(rank, module.in_features, module.out_features)
    if isinstance(module, Adapted):
        rank, dtype = rank + module.rank, torch.promote_types(dtype, module.lora_A.dtype)
    factors = empty({"A": ((rank, module.in_features), dtype), "B": ((module.out_features, rank), dtype)})
    return Adapted(base_of(module), factors["A"], factors["B"])


class Outline:
    """A subject of which only shapes are known, taken through stages: each one's `outline` changes it as its `apply`
    does a subject.

    Args:
        subject: without weights; it is used up.

    Attributes:
        subject: its projections are `Outlined`.
        dtype: of its weights.
        changed: the projections whose weights the last stage changed.
        lost: parts ("self_attn", "mlp") that are gone from blocks which only the run can tell.
        budgeted: the projections whose ranks only the run can tell, out of a budget.
    """

    def __init__(self, subject: Subject):
        # memory of which nothing is ever touched: tensors are told apart by where they lie
        subject.model.to_empty(device="cpu").tie_weights()
        self.subject, self.dtype = subject, subject.dtype
        self.changed: set[Place] = set()
        self.lost: set[str] = set()
        self.budgeted: set[Place] = set()
        self.change(lambda module, _: Outlined(module, self.dtype, Zeros()), lambda *_: True)

    def change(
        self,
        make: Callable[[Projection, Any], Projection],
        setting: Callable[[int, str], Any],
        among: set[Place] | None = None,
    ) -> None:
        """Replace the projections for which there is a setting, `among` these places."""
        self.check_alike(setting)
        subject, self.changed = self.subject, set()
        for i in range(subject.depth):
            for name, module in subject.linears(i).items():
                mine = setting(i, name) if among is None or (i, name) in among else None
                if mine:
                    made = make(module, mine)
                    replace(subject.blocks[i], name, made)
                    if base_of(made) is not base_of(module):
                        self.changed.add((i, name))

    def check_alike(self, setting: Callable[[int, str], Any]) -> None:
        """Raises SizeUnknown for settings that differ by block where it is not known which block is which."""
        if self.lost and any(len({setting(i, name) for i in range(self.subject.depth)}) > 1 for name in LINEARS):
            raise SizeUnknown

    def outlined(
        self, module: Projection, zeros: Zeros | None, grid: Grid | None = None, indexed: bool = False
    ) -> Projection:
        """A projection with another weight, inside its correction if it has one."""
        made = Outlined(base_of(module), self.dtype, zeros, grid, indexed)
        return Adapted(made, module.lora_A, module.lora_B) if isinstance(module, Adapted) else made

    def facts(self, block: int, parts: set[str]) -> tuple:
        """What is the same for two blocks if these parts of them are of one size."""
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
