"""A linear and an embedding with quantised weights: packed codes of 2 to 8 bits and float16 scales.

The codes of pruned weights can be left out.
"""

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
from thesislib.model.layers import Adapted, ComputedLinear, StoredLinear

EVERYWHERE = "all"
EMBEDDINGS = ("model.embed_tokens", "lm_head")
TILE = 64  # outputs in a tile of torch's kernel
FEW = 32  # rows of inputs up to which that kernel is faster than a product with the unpacked weight
INFINITY = 0x7C00  # the bits of float16's


class QuantisedLinear(ComputedLinear):
    """A linear whose weight is computed from codes at each use.

    Its tensors are:

    - `codes`: packed (see `thesislib.model.bits`), row by row, without those of weights that the mask leaves out;
    - `scales`: (outputs, groups);
    - `zeros`: packed zero-points, for an asymmetric grid;
    - `minima`: (outputs, groups), for a grid with minima;
    - `index`: (inputs,) int16, the group of each input, if a group's inputs are not neighbours;
    - `places` or `bitmap`: where the kept weights are (see `thesislib.model.packing`), if pruned ones are left out.

    Scales and minima are float16 numbers whose bits are stored as int16, so that casting the model leaves them alone.

    In a bfloat16 model on a CPU, few rows of inputs are multiplied by torch's kernel for 4-bit codes. The grid must
    have groups of 32, 64, 128 or 256 neighbours and integer zero-points, and no code may be left out. The kernel rounds
    scales, and their products with zero-points, to bfloat16, as a dense bfloat16 model rounds every weight. It needs
    the codes in tiles: from the first such product on, the tensors in memory (`resident`) are tiles, and `stored` turns
    them back.

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
        # an empty tensor that follows .to(): its dtype is the weight's
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.tiled = False  # whether the buffers are those of `_tiled`

    @classmethod
    def of(
        cls,
        quantised: Quantised,
        pruned: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "QuantisedLinear":
        """A linear with a quantised weight.

        Args:
            quantised: the weight.
            pruned: (outputs, inputs) booleans, True where the weight is pruned. These codes are left out, in the way
                that takes the fewest bytes, unless all codes take fewer still.
            bias: of the linear, or None.
            dtype: of its weight.

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
        mask, positions = _mask(q.grid.bits, pruned)
        codes = q.codes if mask == EVERYWHERE else q.codes[_kept(positions, mask, shape)]
        encoding = f"int{q.grid.bits}/{q.grid.kind}/{q.grid.group}/{mask}"
        return cls(encoding, shape, bias, dtype, codes=pack_bits(codes, q.grid.bits), **tensors, **positions)

    @classmethod
    def load(cls, linear: StoredLinear) -> "QuantisedLinear":
        """See `ComputedLinear.load`.

        Raises:
            BadInput: tensors that are missing, of another shape or dtype, or with groups or positions that do not
                exist.
        """
        encoding, shape, bias, dtype, tensors, name = linear
        grid, mask = parse_encoding(encoding)
        grid.check({name: shape[1]})
        nonzero = None
        if mask == "bitmap" and "bitmap" in tensors:
            nonzero = int(unpack_bits(tensors["bitmap"], 1, 8 * len(tensors["bitmap"])).sum())
        expected = stored_shapes(encoding, shape, nonzero, "index" in tensors)
        for part, (size, expected_dtype) in expected.items():
            if part not in tensors:
                raise BadInput(f"it lacks the weight '{name}.{part}'")
            tensor = tensors[part]
            if tensor.shape != torch.Size(size) or tensor.dtype != expected_dtype:
                actual = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise BadInput(f"'{name}.{part}' is {actual}, expected {expected_dtype} of shape {size}")
        groups = shape[1] // grid.size(shape[1])
        if "index" in tensors and not 0 <= tensors["index"].min() <= tensors["index"].max() < groups:
            raise BadInput(f"'{name}.index' names groups that it does not have")
        if "places" in expected:
            packing.check_positions({"codes": tensors["places"]}, mask, name)
        return cls(encoding, shape, bias, dtype, **{part: tensors[part] for part in expected})

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput, see `parse_encoding`."""
        parse_encoding(encoding)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight is computed from, as an artifact stores them."""
        buffers = {name: tensor for name, tensor in self._buffers.items() if name != "like"}
        return _untiled(buffers, self.grid.kind == "asymmetric") if self.tiled else buffers

    @property
    def resident(self) -> list[torch.Tensor]:
        """The tensors in memory now; tiles take 5 bytes a group besides the codes, stored tensors 2 or 2.5."""
        return [tensor for name, tensor in self._buffers.items() if name != "like"]

    def _set_buffers(self, tensors: dict[str, torch.Tensor], tiled: bool) -> None:
        self._buffers, self.tiled = {"like": self.like}, tiled
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, *args, **kwargs):
        if self.tiled:  # other devices and dtypes have other kernels
            self._set_buffers(self.stored, False)
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
        """Whether x can be multiplied by tiles; makes them at the first x that can."""
        if self.tiled:
            return x.dtype == torch.bfloat16
        if x.dtype == self.like.dtype == torch.bfloat16 and x.device.type == "cpu" and self._can_tile():
            self._set_buffers(_tiled(self.stored, (self.out_features, self.in_features)), True)
        return self.tiled

    def _can_tile(self) -> bool:
        """Whether torch's kernel takes this grid, these scales and this layout of codes."""
        grid = self.grid
        fits = grid.bits == 4 and grid.holds_zero and grid.group in (32, 64, 128, 256) and self.out_features % TILE == 0
        if not fits or self.mask != EVERYWHERE or "index" in self._buffers:
            return False
        return bool(self.scales.min() >= 0) and bool(self.scales.max() < INFINITY) and kernel_is_known()

    def _transposed(self) -> torch.Tensor:
        """The weight as (inputs, outputs), computed from tiles: the same numbers as `weight`."""
        scale, zero = _scales_and_zeros(self.pairs, self.rest)  # (groups, outputs)
        groups, tiles = len(scale), self.out_features // TILE
        # eight bytes at a time: the low halves are the first 32 outputs of a tile, the high ones the rest
        words = torch.empty(self.in_features, tiles, 2, TILE // 16, dtype=torch.int64)
        words[:, :, 0] = self.codes.view(torch.int64).view(tiles, self.in_features, -1).transpose(0, 1)
        torch.bitwise_right_shift(words[:, :, 0], 4, out=words[:, :, 1])
        codes = words.bitwise_and_(0x0F0F0F0F0F0F0F0F).view(torch.uint8).view(groups, -1, self.out_features)
        weight = torch.empty(codes.shape, dtype=self.like.dtype)
        some = max(1, 2**17 // codes[0].numel())  # groups whose numbers stay in a cache
        parts = (tensor.split(some) for tensor in (codes, scale[:, None], zero[:, None].float(), weight))
        for c, s, z, out in zip(*parts, strict=True):
            out.copy_(c.float().sub_(z).mul_(s))
        return weight.view(self.in_features, -1)

    @property
    def quantised(self) -> Quantised:
        """The weight on its grid; pruned weights that are left out have the code of zero."""
        tensors, shape, bits = self.stored, (self.out_features, self.in_features), self.grid.bits
        scale = _from_bits(tensors["scales"])
        if "zeros" in tensors:
            offset = unpack_bits(tensors["zeros"], bits, scale.numel()).view_as(scale).float()
        else:
            offset = _from_bits(tensors["minima"]) if "minima" in tensors else torch.full_like(scale, 2 ** (bits - 1))
        index = tensors["index"].long() if "index" in tensors else None
        if self.mask == EVERYWHERE:
            codes = unpack_bits(tensors["codes"], bits, shape[0] * shape[1]).view(shape)
        else:
            kept = _kept(tensors, self.mask, shape)
            zero = offset.to(torch.uint8)
            codes = zero[:, index] if index is not None else zero.repeat_interleave(shape[1] // zero.shape[1], 1)
            codes = codes.masked_scatter(kept, unpack_bits(tensors["codes"], bits, int(kept.sum())))
        return Quantised(self.grid, codes, scale, offset, index)

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), computed in float32 from the stored numbers and rounded once to the model's dtype."""
        return self.quantised.weight.to(self.like.dtype)


def stored_shapes(
    encoding: str, shape: tuple[int, int], nonzero: int | None = None, indexed: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of each tensor that stores a quantised weight, by name.

    Args:
        encoding: of the weight.
        shape: (outputs, inputs).
        nonzero: weights that are kept, needed if the mask is a bitmap.
        indexed: whether a group's inputs are not neighbours.
    """
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
    """An embedding that dequantises the rows that it looks up. If it is tied, `table` is the model's head too.

    In the state dict it has a dense `weight`, as nn.Embedding.
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
        """(...) tokens -> (..., D)."""
        if not isinstance(self.table, QuantisedLinear):  # unpacked since
            return F.embedding(ids, self.table.weight)
        shape, tensors = self.table.stored["scales"].shape, self.table.stored
        codes = tensors["codes"].view(*shape, -1)[ids].float()  # (..., groups, group): 8 bits are a byte a code
        scale = _from_bits(tensors["scales"][ids])
        if "zeros" in tensors:
            offset = tensors["zeros"].view(shape)[ids].float()
        else:
            offset = _from_bits(tensors["minima"][ids]) if "minima" in tensors else torch.full_like(scale, 128.0)
        values = self.table.grid.values(codes, scale[..., None], offset[..., None])
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


def quantised_embeddings(model: PreTrainedModel) -> list[tuple[str, QuantisedLinear]]:
    """The quantised embedding and head of a model with their paths; a tied head is listed as the embedding only."""
    table, head = getattr(model.get_input_embeddings(), "table", None), model.get_output_embeddings()
    both = zip(EMBEDDINGS, (table, None if head is table else head), strict=True)
    return [(path, linear) for path, linear in both if isinstance(linear, QuantisedLinear)]


def set_embedding(model: PreTrainedModel, path: str, table: QuantisedLinear) -> None:
    """Replace a model's embedding (and its head, if they are tied) or its head by a quantised one.

    Args:
        model: changed in place.
        path: one of `EMBEDDINGS`.
        table: the quantised weight, (vocabulary, D).

    Raises:
        BadInput: an embedding of other than 8 bits.
    """
    if path == EMBEDDINGS[0]:
        model.set_input_embeddings(QuantisedEmbedding(table))
    if path == EMBEDDINGS[1] or model.config.tie_word_embeddings:
        model.set_output_embeddings(table)


def _tiled(tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Codes of 4 bits, scales and zero-points in the layout of torch's kernel, which computes (code - 8) * s + m.

    Returns:
        `codes`: in the kernel's own order. `pairs`: (groups, outputs, 2) bfloat16, s and m. `rest`: (groups, outputs)
        uint8, needed to turn tiles back. Its low 4 bits are the zero-point, its high 4 bits the float16 scale minus
        the bfloat16 one, in steps of float16, plus 8.
    """
    codes, bits = unpack_bits(tensors["codes"], 4, prod(shape)).view(shape), tensors["scales"].T.contiguous()
    if "zeros" in tensors:
        zeros = unpack_bits(tensors["zeros"], 4, bits.numel()).view(shape[0], -1).T.contiguous()
    else:
        zeros = torch.full_like(bits, 8, dtype=torch.uint8)
    scale = _from_bits(bits).bfloat16()
    pairs = torch.stack([scale, (8 - zeros.float()) * scale], 2).bfloat16()
    rest = zeros | (bits - _to_bits(scale) + 8 << 4).to(torch.uint8)
    return {"codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), "pairs": pairs, "rest": rest}


def _scales_and_zeros(pairs: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales before they were rounded to bfloat16, (groups, outputs) float32, and the uint8 zero-points."""
    return _from_bits(_to_bits(pairs[..., 0]) + (rest >> 4).short() - 8), rest & 15


def _untiled(tiled: dict[str, torch.Tensor], asymmetric: bool) -> dict[str, torch.Tensor]:
    """The inverse of `_tiled`."""
    scale, zeros = _scales_and_zeros(tiled["pairs"], tiled["rest"])
    halves = tiled["codes"].view(scale.shape[1] // TILE, -1, TILE // 2)
    codes = torch.cat([halves & 15, halves >> 4], 2).transpose(1, 2)  # (tiles, outputs of a tile, inputs)
    tensors = {"codes": pack_bits(codes, 4), "scales": _to_bits(scale.T.contiguous())}
    return tensors | ({"zeros": pack_bits(zeros.T, 4)} if asymmetric else {})


@cache
def kernel_is_known() -> bool:
    """Whether torch has the kernel here and lays codes out as `_untiled` reads them, which depends on the processor."""
    codes = torch.randint(16, (2 * TILE, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    tensors = {"codes": pack_bits(codes, 4), "scales": torch.zeros(2 * TILE, 1, dtype=torch.int16)}
    try:
        back = _untiled(_tiled(tensors, (codes.shape[0], codes.shape[1])), False)
        return torch.equal(back["codes"], tensors["codes"])
    except (AttributeError, NotImplementedError, RuntimeError):  # no such kernel, or not for this processor
        return False


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear or an embedding, with or without a correction, has a quantised weight."""
    linear = module.table if isinstance(module, QuantisedEmbedding) else module
    return isinstance(linear.base if isinstance(linear, Adapted) else linear, QuantisedLinear)


def _to_bits(numbers: torch.Tensor) -> torch.Tensor:
    """The bits of numbers that float16 holds, as int16."""
    return numbers.half().view(torch.int16)


def _from_bits(integers: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_bits`, float32."""
    return integers.view(torch.float16).float()


def _mask(bits: int, pruned: torch.Tensor | None) -> tuple[str, dict[str, torch.Tensor]]:
    """The mask of an encoding that takes the fewest bytes, and the tensor with the positions of the kept codes."""
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


def _kept(tensors: dict[str, torch.Tensor], mask: str, shape: tuple[int, int]) -> torch.Tensor:
    """(outputs, inputs) booleans, True for the weights whose codes are stored."""
    if mask == "bitmap":
        return unpack_bits(tensors["bitmap"], 1, shape[0] * shape[1]).view(torch.bool).view(shape)
    pattern, codes = packing.Pattern.parse(mask), tensors["places"]
    ones = torch.ones(shape[0], shape[1] // pattern.of * pattern.keep, dtype=torch.uint8, device=codes.device)
    return packing.unpack_nm(ones, codes, pattern).view(torch.bool)
