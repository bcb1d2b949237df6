"""What may stand in a projection's place: a linear whose weight is computed when used, and one with a low-rank
correction.

All of them have `weight` (the dense weight of the projection itself), `bias`, `in_features` and `out_features`, and put
a plain `weight` into the state dict, so that fingerprints and plain checkpoints need not know about them.
"""

import re
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from thesislib.errors import BadInput, unknown
from thesislib.model import packing

M = TypeVar("M", bound=nn.Module)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(block: nn.Module) -> dict[str, "Projection"]:
    """The seven projections of a decoder block by name, fewer where its attention or MLP was removed."""
    parts = [part for part in (getattr(block, "self_attn", None), getattr(block, "mlp", None)) if part is not None]
    return {name: module for part in parts for name, module in part.named_children() if name in LINEARS}


class Size(NamedTuple):
    """What a linear is counted as.

    Args:
        numel: its parameters, zeros that are packed away too; a bias apart.
        macs: multiply-accumulates for one token. Masked zeros are multiplied like any weight.
        nbytes: what a file keeps of it, a bias too.
    """

    numel: int
    macs: int
    nbytes: int


READERS: dict[str, type["ComputedLinear"]] = {}  # by the first word of the encodings that each class reads


class ComputedLinear(nn.Module):
    """A linear whose weight is made when it is used: a subclass says how by its `weight`.

    What it is made from are buffers that stay out of the state dict. They follow `.to()`: floating ones change their
    type, codes never do. A subclass whose parameters are not those of a matrix of its shape says so by `numel`, `macs`
    and `nonzero`; one that an artifact brings back has `words` and `load`.

    Attributes:
        encoding: the name under which an artifact keeps those buffers; None if it keeps the weight instead.
        words: first words of the encodings that `load` reads, see `reader`.
    """

    encoding: str | None = None
    words: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for word in cls.__dict__.get("words", ()):
            if word in READERS:
                raise TypeError(
                    f"encodings that begin with '{word}' are read by {READERS[word].__name__} already: "
                    f"{cls.__name__} needs another word"
                )
            READERS[word] = cls

    @classmethod
    def load(
        cls,
        encoding: str,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        tensors: Mapping[str, torch.Tensor],
        name: str,
    ) -> "ComputedLinear":
        """The linear of which a file keeps what `held` gave.

        Args:
            encoding: see above.
            shape: (outputs, inputs).
            bias: (outputs,) or None.
            dtype: of the weight.
            tensors: {"codes": ..., ...}.
            name: what to call it in errors.

        Raises:
            BadInput: tensors that are missing, or of another shape or type.
        """
        raise NotImplementedError

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput for an encoding that begins with a word of this class and is none."""

    def __init__(self, shape: tuple[int, int], bias: torch.Tensor | None, **tensors: torch.Tensor):
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), made anew at every call."""
        raise NotImplementedError

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight is made from."""
        return dict(self.named_buffers())

    @property
    def numel(self) -> int:
        """Parameters, see `Size`."""
        return self.out_features * self.in_features

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.out_features * self.in_features

    @property
    def nonzero(self) -> int:
        """Parameters that are not zero."""
        return int(torch.count_nonzero(self.weight))

    @property
    def nbytes(self) -> int:
        """What a file keeps of it, a bias too."""
        return sum(tensor.nbytes for tensor in self.held.values()) + (0 if self.bias is None else self.bias.nbytes)

    @property
    def resident(self) -> list[torch.Tensor]:
        """The tensors that take memory, where a faster order of them is not what a file keeps."""
        return list(self.held.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As nn.Linear's, and the encoding."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"encoding={self.encoding}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


class PackedLinear(ComputedLinear):
    """Holds its weight packed (see `thesislib.model.packing`), 0.55 of the bytes for W2:4 in bfloat16, and unpacks it
    at each use."""

    words = ("bitmap", "")  # patterns such as 2:4 begin with no word

    def __init__(self, encoding: str, shape: tuple[int, int], bias: torch.Tensor | None, **tensors: torch.Tensor):
        super().__init__(shape, bias, **tensors)
        self.encoding = encoding

    @classmethod
    def load(
        cls,
        encoding: str,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        tensors: Mapping[str, torch.Tensor],
        name: str,
    ) -> "PackedLinear":
        """See `ComputedLinear.load`; the type is that of the values.

        Raises:
            BadInput: tensors that are missing or of another shape, or that name places that cannot be.
        """
        held = {}
        for part, size in packing.packed_shapes(shape, encoding, len(tensors.get("values", ()))).items():
            if part not in tensors:
                raise BadInput(f"it lacks the weight '{name}.{part}'")
            if tensors[part].shape != torch.Size(size):
                raise BadInput(f"'{name}.{part}' has shape {tuple(tensors[part].shape)}, expected {tuple(size)}")
            held[part] = tensors[part]
        packing.check_places(held, encoding, name)
        return cls(encoding, shape, bias, **held)

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput for what is no bitmap and no pattern."""
        if encoding != "bitmap":
            packing.Pattern.parse(encoding)

    @classmethod
    def of(cls, linear: "Projection", encoding: str | None = None) -> "PackedLinear":
        """A linear packed in an encoding, by default the smallest.

        Raises:
            BadInput: the weight does not have the zeros that the encoding needs, or none that save anything.
        """
        encoding = encoding or packing.smallest(linear.weight)
        if encoding == "dense":
            raise BadInput("this weight has too few zeros for packing to save anything: leave it as it is")
        return cls(
            encoding,
            (linear.out_features, linear.in_features),
            linear.bias,
            **packing.pack(linear.weight.detach(), encoding),
        )

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), unpacked at every call."""
        return packing.unpack(self.held, self.encoding, (self.out_features, self.in_features))


def reader(encoding: str) -> type[ComputedLinear]:
    """The class that reads an encoding, by the letters that it begins with: "int" of int4/symmetric/64/all, none of
    2:4.

    Raises:
        BadInput: no class reads it, or not in this form.
    """
    word = re.match(r"[a-z_]*", encoding)[0]
    if word not in READERS:
        raise unknown("encoding", encoding, ["dense", *filter(None, READERS)])
    READERS[word].check_encoding(encoding)
    return READERS[word]


class Adapted(nn.Module):
    """A projection and a low-rank correction of its output: y = base(x) + (x Aᵀ) Bᵀ, any scale folded into B.

    `weight` and `bias` are the base's. In the state dict the base's `weight` stands where it would without a
    correction, beside `lora_A` and `lora_B`.

    Args:
        base: an nn.Linear or a ComputedLinear.
        A: (rank, inputs).
        B: (outputs, rank).

    Raises:
        BadInput: shapes that do not fit; a base that is adapted already (see `adapt`).
    """

    def __init__(self, base: "nn.Linear | ComputedLinear", A: torch.Tensor, B: torch.Tensor):
        super().__init__()
        if isinstance(base, Adapted):
            raise BadInput("this projection is adapted already: use adapt(), which joins both corrections")
        if A.shape != (len(A), base.in_features) or B.shape != (base.out_features, len(A)):
            expected = f"(r, {base.in_features}) and ({base.out_features}, r)"
            raise BadInput(f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit: expected {expected}")
        self.base = base
        self.lora_A, self.lora_B = (
            t if isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False) for t in (A, B)
        )

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    @property
    def rank(self) -> int:
        """Of the correction."""
        return len(self.lora_A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs); the correction is computed in its own type."""
        y = self.base(x)
        return y + F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B).to(y.dtype)

    def state_dict(self, *args, **kwargs):
        """As the base's, and the correction."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        for key in [key for key in state if key.startswith(f"{prefix}base.")]:
            state[prefix + key.removeprefix(f"{prefix}base.")] = state.pop(key)
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in ("weight", "bias"):
            if prefix + key in state_dict:
                state_dict[f"{prefix}base.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)


Projection = nn.Linear | ComputedLinear | Adapted


def adapt(module: Projection, A: torch.Tensor, B: torch.Tensor) -> Adapted:
    """A projection with one more correction: y = module(x) + (x Aᵀ) Bᵀ. Two corrections are one of both ranks
    together."""
    if not isinstance(module, Adapted):
        return Adapted(module, A, B)
    return Adapted(module.base, torch.cat([module.lora_A.detach(), A]), torch.cat([module.lora_B.detach(), B], 1))


def base_of(module: Projection) -> nn.Linear | ComputedLinear:
    """What stands under a projection's correction; the projection itself if it has none."""
    return module.base if isinstance(module, Adapted) else module


def size_of(module: Projection | nn.Embedding) -> Size:
    """Of a linear or an embedding, plain, computed or corrected."""
    if isinstance(module, Adapted):
        A, B, under = module.lora_A, module.lora_B, size_of(module.base)
        more = A.numel() + B.numel()
        return Size(under.numel + more, under.macs + more, under.nbytes + A.nbytes + B.nbytes)
    if isinstance(module, ComputedLinear):
        return Size(module.numel, module.macs, module.nbytes)
    count = module.weight.numel()
    return Size(count, count, sum(p.nbytes for p in module.parameters(recurse=False)))


def merge(adapted: Adapted) -> nn.Linear:
    """A dense linear with W + B A: the correction at no cost, and no mask or grid left."""
    return _linear(_sum(adapted), adapted.bias)


def merge_masked(adapted: Adapted) -> nn.Linear:
    """A dense linear with W + B A where W is not zero (a bit of it is set, so -0.0 counts as a weight), and 0
    elsewhere."""
    kept = packing.nonzero_bits(adapted.weight)
    return _linear(torch.where(kept, _sum(adapted), 0), adapted.bias)


def merged(adapted: Adapted, how: str) -> Projection:
    """A corrected projection merged "dense", see `merge`, or "masked", see `merge_masked`; "beside" leaves it as it
    is."""
    return {"beside": lambda module: module, "masked": merge_masked, "dense": merge}[how](adapted)


def merge_all(model: M, how: str) -> M:
    """Merge every correction of a model in place, see `merged`; those that stood in several places are one again in all
    of them."""
    return _change_all(model, lambda module: merged(module, how) if isinstance(module, Adapted) else module)


def _sum(adapted: Adapted) -> torch.Tensor:
    """W + B A, added in float32 and rounded once."""
    correction = adapted.lora_B.detach().float() @ adapted.lora_A.detach().float()
    weight = adapted.weight.detach()
    return (weight.float() + correction).to(weight.dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An nn.Linear around these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def unpack(module: Projection) -> nn.Linear | Adapted:
    """The projection as an nn.Linear; an adapted one stays adapted, around an nn.Linear; what is dense is returned as
    it is."""
    if isinstance(module, Adapted):
        return (
            Adapted(_linear(module.weight, module.bias), module.lora_A, module.lora_B)
            if isinstance(module.base, ComputedLinear)
            else module
        )
    return _linear(module.weight, module.bias) if isinstance(module, ComputedLinear) else module


def unpack_all(model: M, kind: type[ComputedLinear] = ComputedLinear) -> M:
    """Unpack every linear of one kind in a model in place; those that stood in several places are one again in all of
    them."""
    return _change_all(model, lambda module: unpack(module) if isinstance(base_of(module), kind) else module)


def _change_all(model: M, change: Callable[[ComputedLinear | Adapted], Projection]) -> M:
    """Put what `change` makes of it where each linear of a model stands that is computed or corrected; each is changed
    once."""
    changed: dict[int, nn.Module] = {}
    for parent in list(model.modules()):  # which holds them all, so that no two have the same id
        if isinstance(parent, Adapted):  # replaced as a whole, by its parent
            continue
        for name, child in parent.named_children():
            if isinstance(child, (ComputedLinear, Adapted)):
                if id(child) not in changed:
                    changed[id(child)] = change(child)
                setattr(parent, name, changed[id(child)])
    return model


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the projection `name` (e.g. "q_proj") of a block stands.

    Raises:
        BadInput: the block has no such projection.
    """
    own = projections(block)
    if name not in own:
        raise unknown("projection", name, own)
    parent = next(part for part in block.children() if part._modules.get(name) is own[name])
    setattr(parent, name, module)
