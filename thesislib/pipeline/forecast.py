"""What a recipe would make, told from shapes alone: no weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import lcm, prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from thesislib.bounds import read_sizes
from thesislib.compress.depth import Depth
from thesislib.compress.eora import ENTRY, GREED, Eora, share_out
from thesislib.compress.gptq import Rtn
from thesislib.compress.layerwise import Place
from thesislib.compress.lora.stage import Lora
from thesislib.compress.selection import fits
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.artifact import predicted_disk_bytes
from thesislib.formats.checkpoint import quiet_transformers
from thesislib.model import packing
from thesislib.model.blocks import SLOTS, remove
from thesislib.model.grid import ROW, Grid
from thesislib.model.layers import LINEARS, Adapted, ComputedLinear, replace
from thesislib.model.layers import base as base_of
from thesislib.model.packing import PRUNED
from thesislib.model.quantised import EVERYWHERE, TABLES, QuantisedLinear, held_shapes, put_table, tables
from thesislib.model.subject import DTYPES, Subject
from thesislib.pipeline.recipe import Recipe, Shape, Stage

RUNS = (2, 4, 8, 16)  # groups whose patterns the packer tries


class OnlyTheRun(Exception):
    """Sizes depend on what the run will find."""


@dataclass(frozen=True)
class Forecast:
    """One stage of a recipe before it is run.

    Sizes are exact where these hold. The subject itself has no zeros, and a pruned weight no pattern but those that
    follow from how it was pruned. An adapter that is kept has no zeros; one that is merged dense fills all of them; EoRA
    finds as many directions as it is asked for, or as its budget of bytes buys.

    None is what only the run can tell. Non-zero parameters, once weights are rounded: some become zero. Bytes too, once
    such zeros are in a weight that is no longer quantised (`merge: masked` or width pruning after quantisation), and
    after a second width stage unless the first one's pattern fixes how many zeros there are then (W2:4 after W1:8, but
    not W1:4 after W2:8). Everything, from a stage on that: lets a metric choose among blocks that differ in size; has
    settings for single blocks after a metric chose which of them lost a part; removes, merges or converts some of
    the corrections among which a budget was shared out; is not known here. Also everything for an artifact as the
    subject, which may hold any of this already.

    Attributes:
        label: of the stages so far.
        cached: whether the cache holds their result; then the sizes are its own.
        parameters, nonzero, disk_bytes: after the stage, as `thesislib.formats.artifact.sizes` counts and as an artifact's files of weights.
    """

    label: str
    cached: bool
    parameters: int | None
    nonzero: int | None
    disk_bytes: int | None


def forecast(recipe: Recipe, empty: PreTrainedModel | None, cached: Callable[[int], Mapping[str, int] | None]) -> list[Forecast]:
    """What each stage will make, from shapes alone, and what the cache already holds.

    Args:
        recipe: the stages.
        empty: the subject's model, without weights; None if sizes cannot be known from shapes.
        cached: the sizes after the first n stages, as the cache has them, or None.

    Raises:
        BadInput: a stage that the run would refuse for the shapes that it meets, such as a rank larger than a projection.
    """
    outline = Outline(empty) if empty is not None else None
    rows = []
    for n, (stage, where) in enumerate(zip(recipe.stages, recipe.places, strict=True), 1):
        try:
            if outline:
                outline.apply(stage)
        except OnlyTheRun:
            outline = None
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
        if sizes := cached(n):
            rows.append(Forecast(recipe.label_of(n), True, sizes["parameters"], sizes["nonzero_parameters"], sizes["bytes_on_disk"]))
        else:
            rows.append(Forecast(recipe.label_of(n), False, *(outline.sizes if outline else (None,) * 3)))
    return rows


# ---------------------------------------------------------------- one projection


@dataclass(frozen=True)
class Zeros:
    """Where pruning put zeros: exactly `remove` into each `of` consecutive inputs, and at least `least` into each 2, 4, 8 and 16."""

    remove: int = 0
    of: int = 1
    least: tuple[int, ...] = (0,) * len(RUNS)

    def pruned(self, remove: int, of: int, columns: int) -> "Zeros | None":
        """After a width stage, which counts zeros that are there among the weights to remove; None if their number then depends on places."""
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
        shared = [min(start + run, first + of) - max(start, first) for first in range(start // of * of, start + run, of)]
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

    def __init__(self, like: nn.Module, dtype: torch.dtype, zeros: Zeros | None, grid: Grid | None = None, indexed: bool = False):
        shape = like.out_features, like.in_features
        count, known = prod(shape), zeros or Zeros()
        gone = count // known.of * known.remove
        if grid is None:
            nonzero = {"dense": None, "bitmap": count - gone, **{str(p): None for p in known.patterns}}
            encoding = min(nonzero, key=lambda e: packing.predicted_bytes(shape, dtype, e, nonzero[e]))
            sizes = packing.packed_shapes(shape, encoding, nonzero[encoding])
            shapes = {name: (size, torch.uint8 if name in ("codes", "bitmap") else dtype) for name, size in sizes.items()}
        else:
            bits = {EVERYWHERE: count * grid.bits, "bitmap": count + (count - gone) * grid.bits}
            bits |= {str(p): count // p.of * (p.bits + p.keep * grid.bits) for p in known.patterns}
            mask = min(bits, key=bits.get) if gone > PRUNED * count else EVERYWHERE
            encoding = f"int{grid.bits}/{grid.kind}/{grid.group}/{mask}"
            shapes = held_shapes(encoding, shape, count - gone, indexed)
        super().__init__(shape, like.bias)
        self.tensors, self.encoding, self.zeros, self.grid, self.gone = empty(shapes), encoding, zeros, grid, gone

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """Tensors of the shapes that an artifact would keep."""
        return self.tensors


def empty(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes, each one element in a place of its own, since tensors are told apart by where they lie."""
    return {name: torch.empty(1, dtype=dtype).expand(shape) for name, (shape, dtype) in shapes.items()}


def corrected(module: nn.Module, rank: int, dtype: torch.dtype) -> Adapted:
    """A projection with one more correction, as `thesislib.model.layers.adapt` joins them."""
    rank = min(rank, module.in_features, module.out_features)
    if isinstance(module, Adapted):
        rank, dtype = rank + module.rank, torch.promote_types(dtype, module.lora_A.dtype)
    factors = empty({"A": ((rank, module.in_features), dtype), "B": ((module.out_features, rank), dtype)})
    return Adapted(base_of(module), factors["A"], factors["B"])


# ---------------------------------------------------------------- a whole subject


class Outline:
    """A subject of which only shapes are known, taken through stages.

    Args:
        subject: without weights; it is used up.
    """

    def __init__(self, subject: Subject):
        # memory of which nothing is ever touched: tensors are told apart by where they lie
        subject.model.to_empty(device="cpu").tie_weights()
        self.subject, self.dtype = subject, subject.dtype
        self.changed: set[Place] = set()  # whose weights the last stage changed
        self.lost: set[str] = set()  # parts that are gone from blocks which only the run can tell
        self.budgeted: set[Place] = set()  # whose ranks only the run can tell, out of a budget
        self._change(lambda module, _: Outlined(module, self.dtype, Zeros()), lambda *_: True)

    def apply(self, stage: Stage) -> None:
        """Become what a stage makes.

        Raises:
            OnlyTheRun: shapes depend on what the stage finds.
            BadInput: a stage that these shapes do not fit.
        """
        for kind, method in ((Depth, self._depth), (Width, self._width), (Rtn, self._quantise), (Eora, self._eora), (Lora, self._lora)):
            if isinstance(stage, kind):
                return method(stage)
        if not getattr(stage, "keeps_sizes", False):
            raise OnlyTheRun
        self.changed = set()

    @property
    def sizes(self) -> tuple[int, int | None, int | None]:
        """Parameters, those that are not zero, and bytes of weights on disk; None for what only the run can tell."""
        bases = [base_of(module) for i in range(self.subject.depth) for module in self.subject.linears(i).values()]
        sure, parameters = all(base.zeros is not None for base in bases), self.subject.parameters
        rounded = bool(tables(self.subject.model)) or any(base.grid for base in bases)
        nonzero = parameters - sum(base.gone for base in bases) if sure and not rounded else None
        return parameters, nonzero, predicted_disk_bytes(self.subject) if sure else None

    def _change(self, make: Callable[[nn.Module, Any], nn.Module], setting: Callable[[int, str], Any], among: set[Place] | None = None) -> None:
        """Replace the projections for which there is a setting, `among` these places."""
        self._check_alike(setting)
        subject, self.changed = self.subject, set()
        for i in range(subject.depth):
            for name, module in subject.linears(i).items():
                mine = setting(i, name) if among is None or (i, name) in among else None
                if mine:
                    made = make(module, mine)
                    replace(subject.blocks[i], name, made)
                    if base_of(made) is not base_of(module):
                        self.changed.add((i, name))

    def _check_alike(self, setting: Callable[[int, str], Any]) -> None:
        """Raises OnlyTheRun for settings that differ by block where it is not known which block is which."""
        if self.lost and any(len({setting(i, name) for i in range(self.subject.depth)}) > 1 for name in LINEARS):
            raise OnlyTheRun

    def _outlined(self, module: nn.Module, zeros: Zeros | None, grid: Grid | None = None, indexed: bool = False) -> nn.Module:
        """A projection with another weight, inside its correction if it has one."""
        made = Outlined(base_of(module), self.dtype, zeros, grid, indexed)
        return Adapted(made, module.lora_A, module.lora_B) if isinstance(module, Adapted) else made

    def _depth(self, stage: Depth) -> None:
        parts = set(SLOTS) if stage.part == "block" else {stage.part}
        if self.budgeted or self.lost & parts:
            raise OnlyTheRun
        chosen = stage.blocks
        if chosen is None:
            free = range(stage.protect_first, self.subject.depth - stage.protect_last)
            if len({self._facts(i, parts) for i in free}) > 1:
                raise OnlyTheRun
            chosen = free[: stage.count]
            self.lost |= parts if stage.part != "block" else set()
        self.subject, self.changed = remove(self.subject, chosen, stage.part), set()

    def _facts(self, block: int, parts: set[str]) -> tuple:
        """What is the same for two blocks if these parts of them are of one size."""
        children = [child for part in sorted(parts) for child in getattr(self.subject.blocks[block], SLOTS[part]).named_children()]
        return tuple((base_of(m).encoding, base_of(m).zeros, *((p.shape, p.dtype) for p in m.parameters())) for name, m in children if name in LINEARS)

    def _width(self, stage: Width) -> None:
        def pruned(module: nn.Module, share: float) -> nn.Module:
            base, columns = base_of(module), module.in_features
            remove, of = (stage.remove, stage.of) if stage.of else (int(columns * share), columns)
            # quantised weights become plain ones, among whose zeros are those that rounding made
            zeros = base.zeros.pruned(remove, of, columns) if base.zeros and not base.grid else None
            return module if zeros and zeros is base.zeros else self._outlined(module, zeros)

        self._change(pruned, stage.share)

    def _quantise(self, stage: Rtn) -> None:
        def rounded(module: nn.Module, _: bool) -> nn.Module:
            base = base_of(module)
            if not stage.levels.holds_zero and base.gone > PRUNED * base.in_features * base.out_features:
                raise BadInput(f"grid '{stage.grid}' has no exact zero, and weights have been pruned: use symmetric or asymmetric")
            return self._outlined(module, base.zeros, stage.levels, getattr(stage, "act_order", None) == "index")

        self._change(rounded, stage.takes)
        if stage.embedding_bits:
            model = self.subject.model
            shape = tuple(model.get_input_embeddings().weight.shape)
            group = stage.group if shape[1] % stage.levels.size(shape[1]) == 0 else ROW
            encoding = f"int{stage.embedding_bits}/{stage.grid}/{group}/{EVERYWHERE}"
            for path in TABLES[:1] if model.config.tie_word_embeddings else TABLES:
                put_table(model, path, QuantisedLinear(encoding, shape, None, self.dtype, **empty(held_shapes(encoding, shape))))

    def _eora(self, stage: Eora) -> None:
        if stage.bytes is None:
            self._change(lambda module, rank: corrected(module, rank, self.dtype), lambda i, n: stage.rank_of(i, n) * stage.takes(i, n), self.changed)
            return
        self._check_alike(stage.takes)
        taken = {(i, n): m for i in range(self.subject.depth) for n, m in self.subject.linears(i).items() if stage.takes(i, n)}
        costs = {place: ENTRY * (m.in_features + m.out_features) for place, m in taken.items()}
        most = GREED * max(1, stage.bytes // sum(costs.values()))
        costs = {place: cost for place, cost in costs.items() if place in self.changed}
        # what the run gives to each is its own to tell: here each gets a direction before any gets a second
        gains = {p: [cost / k for k in range(1, min(most, taken[p].in_features, taken[p].out_features) + 1)] for p, cost in costs.items()}
        ranks = {p: rank for p, rank in share_out(gains, costs, stage.bytes).items() if rank} if gains else {}
        if any(isinstance(taken[p], Adapted) and taken[p].lora_A.dtype != self.dtype for p in costs):
            raise OnlyTheRun  # how many bytes an entry takes depends on where it falls
        for (i, name), rank in ranks.items():
            replace(self.subject.blocks[i], name, corrected(taken[i, name], rank, self.dtype))
        self.budgeted, self.changed = self.budgeted | set(costs), set()

    def _lora(self, stage: Lora) -> None:
        def takes(block: int, name: str) -> bool:
            return any(fits(pattern, block, name) for pattern in stage.linears)

        self._check_alike(takes)
        taken = {place for places in stage.places(self.subject) for place in places}
        replaced = stage.merge != "beside" or stage.init == "eora"
        if self.budgeted - taken and (replaced or self.dtype != torch.float32):
            raise OnlyTheRun

        def trained(module: nn.Module, _: bool) -> nn.Module:
            base = base_of(module)
            if stage.merge == "masked":
                return Outlined(base, self.dtype, None if base.grid else base.zeros)
            if stage.merge == "dense":
                return Outlined(base, self.dtype, Zeros())
            return corrected(base if stage.init == "eora" else module, stage.rank, torch.float32)

        self._change(trained, takes)
        self.changed = set()
        if replaced:
            self.budgeted = set()


# ---------------------------------------------------------------- what a configuration says


def stand_in(folder: Path, dtype: str = "float32") -> Subject:
    """The subject in a checkpoint folder as its config.json describes it, without weights and without a tokenizer.

    Raises:
        BadInput: a configuration that transformers cannot read.
    """
    read_sizes(folder)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=DTYPES[dtype])
        stands = Subject(model, None, folder.name)
        stands.linears(0)
    except Exception as error:  # each kind of nonsense in a configuration has its own class
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{folder} is not a checkpoint that transformers can read ({why})") from error
    return stands


def shape_of(subject: Subject) -> Shape:
    """Its depth, and the inputs of each projection's rows."""
    return Shape(subject.depth, {name: m.in_features for i in range(subject.depth) for name, m in subject.linears(i).items()})
