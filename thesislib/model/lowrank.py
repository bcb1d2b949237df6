"""A linear held as two factors, W ~ B A: fewer parameters, multiply-accumulates and bytes than W at a low rank."""

import re

import torch
from torch.nn import functional as F

from thesislib.errors import BadInput
from thesislib.model.layers import ComputedLinear, Projection, StoredLinear, base_of
from thesislib.model.quantised import EVERYWHERE, QuantisedLinear, parse_encoding, stored_shapes

DENSE = "dense"
FACTORS = ("A", "B")
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Pair(ComputedLinear):
    """What a pair of factors counts as, with or without its numbers.

    Attributes:
        rank: of the pair.
        encodings: of its factors A and B.
    """

    rank: int
    encodings: tuple[str, str]

    @property
    def numel(self) -> int:
        """rank (inputs + outputs)."""
        return self.rank * (self.in_features + self.out_features)

    @property
    def macs(self) -> int:
        """As many as parameters."""
        return self.numel

    @property
    def is_quantised(self) -> bool:
        """Whether a factor is on a grid, so that some of its entries may have become zero."""
        return self.encodings != (DENSE, DENSE)


class LowRank(Pair):
    """A linear as a pair: y = (x Aᵀ) Bᵀ + bias.

    Its tensors are `A` (rank, inputs) and `B` (outputs, rank), or of a factor that is quantised those of a
    `QuantisedLinear` of its shape, with the factor's name before theirs: `A_codes`, `A_scales`, ... Wherever a dense
    weight is asked for, as in a plain checkpoint or a GGUF file, the pair is multiplied out.

    Args:
        A: the factor that is multiplied first: a tensor, or the quantised linear that holds it.
        B: the other one.
        bias: of the linear, or None.

    Raises:
        BadInput: factors that do not fit each other; pruned codes left out of a quantised factor.
    """

    words = ("lowrank",)
    like: torch.Tensor

    def __init__(self, A: torch.Tensor | QuantisedLinear, B: torch.Tensor | QuantisedLinear, bias: torch.Tensor | None):
        (rank, inputs), (outputs, columns) = (_shape(factor) for factor in (A, B))
        if rank != columns or rank < 1:
            raise BadInput(
                f"factors A {(rank, inputs)} and B {(outputs, columns)} do not fit: expected (r, {inputs}) and "
                f"({outputs}, r)"
            )
        super().__init__((outputs, inputs), bias)
        self.hold(A, B)

    def hold(self, A: torch.Tensor | QuantisedLinear, B: torch.Tensor | QuantisedLinear) -> None:
        """Hold other factors of the same shapes instead."""
        self.rank, self.encodings = _shape(A)[0], (_encoding(A), _encoding(B))
        self.encoding = ":".join(("lowrank", str(self.rank), *self.encodings))
        self._buffers = {}
        for name, tensor in (_tensors("A", A) | _tensors("B", B)).items():
            self.register_buffer(name, tensor, persistent=False)
        # an empty tensor that follows .to(): its dtype is the weight's
        like = A if isinstance(A, torch.Tensor) else A.like
        self.register_buffer("like", torch.empty(0, dtype=like.dtype), persistent=False)

    @classmethod
    def load(cls, linear: StoredLinear) -> "LowRank":
        """See `ComputedLinear.load`."""
        rank, encodings = parse_lowrank(linear.encoding)
        for part, (size, dtype) in factor_shapes(rank, linear.shape, encodings, linear.dtype).items():
            if part not in linear.tensors:
                raise BadInput(f"it lacks the weight '{linear.name}.{part}'")
            tensor = linear.tensors[part]
            if tensor.shape != torch.Size(size) or tensor.dtype != dtype:
                raise BadInput(
                    f"'{linear.name}.{part}' is {tensor.dtype} of shape {tuple(tensor.shape)}, expected "
                    f"{dtype} of shape {size}"
                )
        shapes = ((rank, linear.shape[1]), (linear.shape[0], rank))
        factors: list[torch.Tensor | QuantisedLinear] = []
        for name, encoding, shape in zip(FACTORS, encodings, shapes, strict=True):
            if encoding == DENSE:
                factors.append(linear.tensors[name])
            else:
                parts = {k.removeprefix(f"{name}_"): t for k, t in linear.tensors.items() if k.startswith(f"{name}_")}
                stored = StoredLinear(encoding, shape, None, linear.dtype, parts, f"{linear.name}.{name}")
                factors.append(QuantisedLinear.load(stored))
        A, B = factors
        return cls(A, B, linear.bias)

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput, see `parse_lowrank`."""
        parse_lowrank(encoding)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """See `ComputedLinear.stored`."""
        return {name: tensor for name, tensor in self._buffers.items() if name != "like"}

    def factor(self, name: str) -> torch.Tensor:
        """The factor A or B in the weight's dtype."""
        if name in self._buffers:
            return self._buffers[name]
        return self._quantised(name).weight

    def held(self, name: str) -> torch.Tensor | QuantisedLinear:
        """The factor A or B as it is held."""
        return self._buffers[name] if name in self._buffers else self._quantised(name)

    def _quantised(self, name: str) -> QuantisedLinear:
        shape = (self.rank, self.in_features) if name == "A" else (self.out_features, self.rank)
        parts = {k.removeprefix(f"{name}_"): t for k, t in self.stored.items() if k.startswith(f"{name}_")}
        return QuantisedLinear(self.encodings[FACTORS.index(name)], shape, None, self.like.dtype, **parts)

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), the product, computed in float32 and rounded once to the model's dtype."""
        return (self.factor("B").float() @ self.factor("A").float()).to(self.like.dtype)

    @property
    def nonzero(self) -> int:
        """Entries of both factors other than zero."""
        return sum(int(torch.count_nonzero(self.factor(name))) for name in FACTORS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(F.linear(x, self.factor("A")), self.factor("B"), self.bias)


def parse_lowrank(encoding: str) -> tuple[int, tuple[str, str]]:
    """The rank and the encodings of both factors.

    >>> parse_lowrank("lowrank:64:dense:int8/symmetric/row/all")
    (64, ('dense', 'int8/symmetric/row/all'))

    Raises:
        BadInput: an encoding of another form.
    """
    found = re.fullmatch(r"lowrank:([1-9]\d{0,8}):([^:]+):([^:]+)", encoding, re.ASCII)
    if not found or not all(_holds_factor(e) for e in found.groups()[1:]):
        raise BadInput(
            f"encoding '{encoding}' is not understood: expected lowrank:{{rank}}:{{A}}:{{B}}, each factor dense or "
            "as int8/symmetric/64/all"
        )
    return int(found[1]), (found[2], found[3])


def _holds_factor(encoding: str) -> bool:
    """Whether a factor may have this encoding."""
    try:
        return encoding == DENSE or parse_encoding(encoding)[1] == EVERYWHERE
    except BadInput:
        return False


def factor_shapes(rank: int, shape: tuple[int, int], encodings: tuple[str, str], dtype: torch.dtype) -> Shapes:
    """The shape and dtype of each tensor of a pair, by name.

    Args:
        rank: of the pair.
        shape: (outputs, inputs).
        encodings: of A and B.
        dtype: of a dense factor.
    """
    shapes: Shapes = {}
    for name, encoding, mine in zip(FACTORS, encodings, ((rank, shape[1]), (shape[0], rank)), strict=True):
        if encoding == DENSE:
            shapes[name] = mine, dtype
        else:
            shapes |= {f"{name}_{part}": size for part, size in stored_shapes(encoding, mine).items()}
    return shapes


def is_lowrank(module: Projection) -> bool:
    """Whether a projection, with or without a correction, is a pair."""
    return isinstance(base_of(module), LowRank)


def _shape(factor: torch.Tensor | QuantisedLinear) -> tuple[int, int]:
    if isinstance(factor, QuantisedLinear):
        if factor.mask != EVERYWHERE:
            raise BadInput(f"a factor cannot be held as {factor.encoding}: expected nothing left out")
        return factor.out_features, factor.in_features
    if factor.ndim != 2:
        raise BadInput(f"a factor has shape {tuple(factor.shape)}: expected a matrix")
    return factor.shape[0], factor.shape[1]


def _encoding(factor: torch.Tensor | QuantisedLinear) -> str:
    return factor.encoding if isinstance(factor, QuantisedLinear) else DENSE


def _tensors(name: str, factor: torch.Tensor | QuantisedLinear) -> dict[str, torch.Tensor]:
    if isinstance(factor, QuantisedLinear):
        return {f"{name}_{part}": tensor for part, tensor in factor.stored.items()}
    return {name: factor.detach()}
