"""Linears and an embedding that hold quantised weights packed: codes of 2 to 8 bits, float16 scales, pruned weights not
at all."""

from collections.abc import Mapping
from functools import cache
from math import prod

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from thesislib.errors import BadInput
from thesislib.model import packing
from thesislib.model.bits import pack_bits, packed_length, unpack_bits
from thesislib.model.grid import ROW, Grid, Quantised
from thesislib.model.layers import Adapted, ComputedLinear

EVERYWHERE = "all"
TABLES = ("model.embed_tokens", "lm_head")
TILE = 64  # outputs in a tile of torch's kernel
FEW = 32  # rows of inputs up to which that kernel is faster than a product with the unpacked weight
INFINITE = 0x7C00  # the bits of float16's


class QuantisedLinear(ComputedLinear):
    """A linear whose weight is made of codes at each use, in the type that its model computes in.

    It holds `codes` (packed, see `thesislib.model.bits`; only those of weights that the mask keeps, row by row);
    `scales` (outputs, groups); `zeros` (packed) where the grid is asymmetric, or `minima` (outputs, groups) where it
    has a floating minimum; `index` (inputs,) int16, the group of each input, where groups are not neighbours; `places`
    or `bitmap` (see `thesislib.model.packing`), where pruned weights are left out. Scales and minima are the bits of
    float16 numbers as int16, so that nothing which changes a model's type changes them.

    A bfloat16 model on a CPU multiplies few rows by torch's kernel for 4 bits, which reads the codes as they are, if
    its grid has groups of 32, 64, 128 or 256 neighbours and an integer zero, and nothing is left out. The kernel rounds
    scales, and their products with zeros, to bfloat16: as far as that type rounds every weight of a dense model. It
    wants codes in tiles, so that is how they are held from the first product on, in `resident`; `held` gives them as
    they were.

    Args:
        encoding: 'int{bits}/{kind}/{group}/{mask}'; mask is 'all', 'bitmap', or a pattern such as '2:4'.
        shape: (outputs, inputs).
        bias: of the linear, or None.
        dtype: of the weight.
        tensors: those above.

    Raises:
        BadInput: an encoding of another form.
    """

    words = ("int",)
    like: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    pairs: torch.Tensor  # see `_tiled`, as the next one
    rest: torch.Tensor

    def __init__(
        self,
        encoding: str,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        dtype: torch.dtype = torch.float32,
        **tensors: torch.Tensor,
    ):
        super().__init__(shape, bias, **tensors)
        self.encoding, (self.grid, self.mask) = encoding, parse_encoding(encoding)
        self.register_buffer(
            "like", torch.empty(0, dtype=dtype), persistent=False
        )  # follows .to(), and so does the weight
        self.tiled = False  # whether the buffers are those of `_tiled`

    @classmethod
    def of(
        cls,
        quantised: Quantised,
        pruned: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "QuantisedLinear":
        """A linear that holds a quantised weight.

        Args:
            quantised: the weight.
            pruned: (outputs, inputs) booleans, True where it is zero for good. Those codes are left out in whatever
                way takes the fewest bytes, if any takes fewer than keeping them.
            bias, dtype: of the linear.

        Raises:
            BadInput: a pruned weight that is not zero on the grid.
        """
        q, shape = quantised, (quantised.codes.shape[0], quantised.codes.shape[1])
        if pruned is not None and pruned.any() and q.weight[pruned].any():
            raise BadInput(
                "a pruned weight is not zero on its grid: quantise with the mask, and on a grid that holds an "
                "exact zero"
            )
        tensors = {"scales": _to_bits(q.scale)}
        if q.grid.kind == "asymmetric":
            tensors["zeros"] = pack_bits(q.offset.to(torch.uint8), q.grid.bits)
        elif q.grid.kind == "minimum":
            tensors["minima"] = _to_bits(q.offset)
        if q.index is not None:
            tensors["index"] = q.index.to(torch.int16)
        mask, where = _mask(q.grid.bits, pruned)
        codes = q.codes if mask == EVERYWHERE else q.codes[_kept(where, mask, shape)]
        encoding = f"int{q.grid.bits}/{q.grid.kind}/{q.grid.group}/{mask}"
        return cls(encoding, shape, bias, dtype, codes=pack_bits(codes, q.grid.bits), **tensors, **where)

    @classmethod
    def load(
        cls,
        encoding: str,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        tensors: Mapping[str, torch.Tensor],
        name: str = "the linear",
    ) -> "QuantisedLinear":
        """A linear from what `held` gave and a file kept: {"codes": ..., "scales": ..., ...}.

        Raises:
            BadInput: tensors that are missing, of another shape or type, or that name groups or places that cannot be.
        """
        grid, mask = parse_encoding(encoding)
        grid.check({name: shape[1]})
        nonzero = None
        if mask == "bitmap" and "bitmap" in tensors:
            nonzero = int(unpack_bits(tensors["bitmap"], 1, 8 * len(tensors["bitmap"])).sum())
        expected = held_shapes(encoding, shape, nonzero, "index" in tensors)
        for part, (size, kind) in expected.items():
            if part not in tensors:
                raise BadInput(f"it lacks the weight '{name}.{part}'")
            if tensors[part].shape != torch.Size(size) or tensors[part].dtype != kind:
                found = f"{tensors[part].dtype} of shape {tuple(tensors[part].shape)}"
                raise BadInput(f"'{name}.{part}' is {found}, expected {kind} of shape {size}")
        if "index" in tensors and not 0 <= tensors["index"].min() <= tensors["index"].max() < shape[1] // grid.size(
            shape[1]
        ):
            raise BadInput(f"'{name}.index' names groups that it does not have")
        if "places" in expected:
            packing.check_places({"codes": tensors["places"]}, mask, name)
        return cls(encoding, shape, bias, dtype, **{part: tensors[part] for part in expected})

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput, see `parse_encoding`."""
        parse_encoding(encoding)

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight is made from, as an artifact keeps them."""
        own = {name: tensor for name, tensor in self._buffers.items() if name != "like"}
        return _untiled(own, self.grid.kind == "asymmetric") if self.tiled else own

    @property
    def resident(self) -> list[torch.Tensor]:
        """The tensors that take memory now; in tiles 5 bytes a group instead of 2 or 2.5."""
        return [tensor for name, tensor in self._buffers.items() if name != "like"]

    def _hold(self, tensors: dict[str, torch.Tensor], tiled: bool) -> None:
        self._buffers, self.tiled = {"like": self.like}, tiled
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, *args, **kwargs):
        if self.tiled:  # other devices and types have other kernels
            self._hold(self.held, False)
        return super()._apply(fn, *args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        if not self._tile(x):
            return F.linear(x, self.weight, self.bias)
        rows = x.numel() // self.in_features
        if rows > FEW or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self._transposed().T, self.bias)
        x, shape = x.reshape(rows, self.in_features).contiguous(), (*x.shape[:-1], self.out_features)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.grid.group, self.pairs).view(shape)
        return y if self.bias is None else y + self.bias

    def _tile(self, x: torch.Tensor) -> bool:
        """Whether the weight is held in tiles; makes them where they are of use for a product with x."""
        if self.tiled:
            return x.dtype == torch.bfloat16
        if x.dtype == self.like.dtype == torch.bfloat16 and x.device.type == "cpu" and self._can_tile():
            self._hold(_tiled(self.held, (self.out_features, self.in_features)), True)
        return self.tiled

    def _can_tile(self) -> bool:
        grid = self.grid
        fits = grid.bits == 4 and grid.holds_zero and grid.group in (32, 64, 128, 256) and self.out_features % TILE == 0
        plain = self.mask == EVERYWHERE and "index" not in self._buffers
        return (
            fits and plain and bool(self.scales.min() >= 0) and bool(self.scales.max() < INFINITE) and tiles_are_known()
        )

    def _transposed(self) -> torch.Tensor:
        """(inputs, outputs) from tiles: the same numbers as `weight`."""
        scale, zero = _scales_and_zeros(self.pairs, self.rest)  # (groups, outputs)
        groups, tiles = len(scale), self.out_features // TILE
        # eight bytes at a time: the low halves are the first 32 outputs of a tile, the high ones the rest
        words = torch.empty(self.in_features, tiles, 2, TILE // 16, dtype=torch.int64)
        words[:, :, 0] = self.codes.view(torch.int64).view(tiles, self.in_features, -1).transpose(0, 1)
        torch.bitwise_right_shift(words[:, :, 0], 4, out=words[:, :, 1])
        codes = words.bitwise_and_(0x0F0F0F0F0F0F0F0F).view(torch.uint8).view(groups, -1, self.out_features)
        weight = torch.empty(codes.shape, dtype=self.like.dtype)
        some = max(1, 2**17 // codes[0].numel())  # groups whose numbers stay in a cache
        for c, s, z, out in zip(
            codes.split(some),
            scale[:, None].split(some),
            zero[:, None].float().split(some),
            weight.split(some),
            strict=True,
        ):
            out.copy_(c.float().sub_(z).mul_(s))
        return weight.view(self.in_features, -1)

    @property
    def quantised(self) -> Quantised:
        """The weight on its grid; what was left out has the code of zero."""
        held, shape, bits = self.held, (self.out_features, self.in_features), self.grid.bits
        scale = _from_bits(held["scales"])
        if "zeros" in held:
            offset = unpack_bits(held["zeros"], bits, scale.numel()).view_as(scale).float()
        else:
            offset = _from_bits(held["minima"]) if "minima" in held else torch.full_like(scale, 2 ** (bits - 1))
        index = held["index"].long() if "index" in held else None
        if self.mask == EVERYWHERE:
            codes = unpack_bits(held["codes"], bits, shape[0] * shape[1]).view(shape)
        else:
            kept = _kept(held, self.mask, shape)
            zero = offset.to(torch.uint8)
            codes = zero[:, index] if index is not None else zero.repeat_interleave(shape[1] // zero.shape[1], 1)
            codes = codes.masked_scatter(kept, unpack_bits(held["codes"], bits, int(kept.sum())))
        return Quantised(self.grid, codes, scale, offset, index)

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), computed in float32 from the stored numbers and rounded once to the model's type."""
        return self.quantised.weight.to(self.like.dtype)


def held_shapes(
    encoding: str, shape: tuple[int, int], nonzero: int | None = None, indexed: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: (shape, type)} of the tensors that hold a quantised weight; a bitmap's codes are `nonzero` many."""
    grid, mask = parse_encoding(encoding)
    rows, columns = shape
    groups = rows, columns // grid.size(columns)
    kept = rows * columns
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if mask == "bitmap":
        kept, shapes["bitmap"] = nonzero, ((-(-rows * columns // 8),), torch.uint8)
    elif mask != EVERYWHERE:
        packed = packing.packed_shapes(shape, mask)
        kept, shapes["places"] = prod(packed["values"]), (packed["codes"], torch.uint8)
    shapes["codes"] = (packed_length(grid.bits, kept),), torch.uint8
    shapes["scales"] = groups, torch.int16
    if grid.kind == "asymmetric":
        shapes["zeros"] = (packed_length(grid.bits, prod(groups)),), torch.uint8
    elif grid.kind == "minimum":
        shapes["minima"] = groups, torch.int16
    if indexed:
        shapes["index"] = (columns,), torch.int16
    return shapes


class QuantisedEmbedding(nn.Module):
    """An embedding that makes the rows it is asked for. `table` may be a model's head at the same time.

    In the state dict its weight stands where a plain one would.
    """

    def __init__(self, table: QuantisedLinear):
        super().__init__()
        if table.grid.bits != 8 or table.mask != EVERYWHERE:
            raise BadInput(f"an embedding cannot be held as {table.encoding}: expected 8 bits, nothing left out")
        self.table = table

    num_embeddings = property(lambda self: self.table.out_features)
    embedding_dim = property(lambda self: self.table.in_features)
    weight = property(lambda self: self.table.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) tokens to (..., D)."""
        if not isinstance(self.table, QuantisedLinear):  # unpacked since
            return F.embedding(ids, self.table.weight)
        shape, held = self.table.held["scales"].shape, self.table.held
        codes = held["codes"].view(*shape, -1)[ids].float()  # (..., groups, group): 8 bits are a byte a code
        if "zeros" in held:
            offset = held["zeros"].view(shape)[ids].float()
        else:
            offset = (
                _from_bits(held["minima"][ids])
                if "minima" in held
                else torch.full(codes.shape[:-1], 128.0, device=codes.device)
            )
        values = self.table.grid.values(codes, _from_bits(held["scales"][ids])[..., None], offset[..., None])
        return values.flatten(-2).to(self.table.like.dtype)

    def state_dict(self, *args, **kwargs):
        """As nn.Embedding's."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        state[prefix + "weight"] = state.pop(prefix + "table.weight")
        return state


def parse_encoding(encoding: str) -> tuple[Grid, str]:
    """The grid and the mask that an encoding names.

    >>> parse_encoding("int4/symmetric/64/2:4")
    (Grid(bits=4, group=64, kind='symmetric'), '2:4')
    """
    parts = encoding.split("/")
    if len(parts) != 4 or not parts[0].removeprefix("int").isdigit() or not (parts[2] == ROW or parts[2].isdigit()):
        raise BadInput(
            f"encoding '{encoding}' is not understood: expected int{{bits}}/{{kind}}/{{group}}/{{mask}}, e.g. "
            "int4/symmetric/64/all"
        )
    bits, kind, group, mask = parts
    if mask not in (EVERYWHERE, "bitmap"):
        packing.Pattern.parse(mask)
    return Grid(int(bits.removeprefix("int")), group if group == ROW else int(group), kind), mask


def tables(model: PreTrainedModel) -> list[tuple[str, QuantisedLinear]]:
    """The quantised embedding and head of a model with their paths; a tied head stands under the embedding's alone."""
    table = getattr(model.get_input_embeddings(), "table", None)
    both = zip(TABLES, (table, model.get_output_embeddings()), strict=True)
    return [(path, t) for path, t in both if isinstance(t, QuantisedLinear) and (path == TABLES[0] or t is not table)]


def put_table(model: PreTrainedModel, path: str, table: QuantisedLinear) -> None:
    """Let a quantised table be a model's embedding, and its head too where they are tied; or its head.

    Raises:
        BadInput: not 8 bits.
    """
    if path == TABLES[0]:
        model.set_input_embeddings(QuantisedEmbedding(table))
    if path == TABLES[1] or model.config.tie_word_embeddings:
        model.set_output_embeddings(table)


def _tiled(held: dict[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Codes of 4 bits, scales and zeros as torch's kernel wants them.

    `codes`: in its own order. `pairs` (groups, outputs, 2) bfloat16: the scale, and what code 8 stands for, since the
    kernel computes (code - 8) * scale + that. `rest` (groups, outputs) uint8: zeros in the low half, and in the high
    one how much, in steps of float16, rounding has taken from the scale, plus 8.
    """
    codes, bits = unpack_bits(held["codes"], 4, prod(shape)).view(shape), held["scales"].T.contiguous()
    zeros = (
        unpack_bits(held["zeros"], 4, bits.numel()).view(shape[0], -1).T.contiguous()
        if "zeros" in held
        else torch.full_like(bits, 8, dtype=torch.uint8)
    )
    scale = _from_bits(bits).bfloat16()
    pairs = torch.stack([scale, (8 - zeros.float()) * scale], 2).bfloat16()
    rest = zeros | (bits - _to_bits(scale) + 8 << 4).to(torch.uint8)
    return {"codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), "pairs": pairs, "rest": rest}


def _scales_and_zeros(pairs: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, outputs) float32 scales as they were before they were rounded, and uint8 zeros."""
    return _from_bits(_to_bits(pairs[..., 0]) + (rest >> 4).short() - 8), rest & 15


def _untiled(tiled: dict[str, torch.Tensor], asymmetric: bool) -> dict[str, torch.Tensor]:
    """What `_tiled` was given."""
    scale, zeros = _scales_and_zeros(tiled["pairs"], tiled["rest"])
    halves = tiled["codes"].view(scale.shape[1] // TILE, -1, TILE // 2)
    codes = torch.cat([halves & 15, halves >> 4], 2).transpose(1, 2)  # (tiles, outputs in it, inputs)
    held = {"codes": pack_bits(codes, 4), "scales": _to_bits(scale.T.contiguous())}
    return held | ({"zeros": pack_bits(zeros.T, 4)} if asymmetric else {})


@cache
def tiles_are_known() -> bool:
    """Whether torch's kernel is there and lays codes out as `_untiled` reads them; the order depends on the
    processor."""
    codes = torch.randint(16, (2 * TILE, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    held = {"codes": pack_bits(codes, 4), "scales": torch.zeros(2 * TILE, 1, dtype=torch.int16)}
    try:
        return torch.equal(_untiled(_tiled(held, (codes.shape[0], codes.shape[1])), False)["codes"], held["codes"])
    except (AttributeError, NotImplementedError, RuntimeError):  # no such kernel, or not for this processor
        return False


def is_quantised(module: nn.Module) -> bool:
    """Whether a module, or what it is a correction of, holds a quantised weight."""
    held = module.table if isinstance(module, QuantisedEmbedding) else module
    return isinstance(held.base if isinstance(held, Adapted) else held, QuantisedLinear)


def _to_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers that float16 holds, as int16."""
    return numbers.half().view(torch.int16)


def _from_bits(integers: torch.Tensor) -> torch.Tensor:
    """float32 numbers that `_to_bits` made."""
    return integers.view(torch.float16).float()


def _mask(bits: int, pruned: torch.Tensor | None) -> tuple[str, dict[str, torch.Tensor]]:
    """How to say which codes are kept in the fewest bytes, and the tensors that say it."""
    if pruned is None or not pruned.any():
        return EVERYWHERE, {}
    kept = ~pruned
    count, options = kept.numel(), {EVERYWHERE: kept.numel() * bits, "bitmap": kept.numel() + int(kept.sum()) * bits}
    as_bytes = kept.to(torch.uint8)
    for of in (2, 4, 8, 16):
        if pruned.shape[1] % of == 0 and 0 < (keep := packing.most_kept(as_bytes, of)) < of:
            pattern = packing.Pattern(of - keep, of)
            options[str(pattern)] = count // of * (pattern.bits + keep * bits)
    mask = min(options, key=options.get)
    if mask == EVERYWHERE:
        return mask, {}
    packed = packing.pack(as_bytes, mask)
    return mask, {"bitmap": packed["bitmap"]} if mask == "bitmap" else {"places": packed["codes"]}


def _kept(held: dict[str, torch.Tensor], mask: str, shape: tuple[int, int]) -> torch.Tensor:
    """(outputs, inputs) booleans: the weights whose codes are stored."""
    if mask == "bitmap":
        return unpack_bits(held["bitmap"], 1, shape[0] * shape[1]).view(torch.bool).view(shape)
    pattern = packing.Pattern.parse(mask)
    ones = torch.ones(shape[0], shape[1] // pattern.of * pattern.keep, dtype=torch.uint8, device=held["places"].device)
    return packing.unpack_nm(ones, held["places"], pattern).view(torch.bool)
