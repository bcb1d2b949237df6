"""Replacements for a block's nn.Linear: one whose weight is computed at each use, and one with a low-rank correction.

Both have `weight` (the dense weight, of an adapted linear without its correction), `bias`, `in_features` and
`out_features`. In the state dict both have a dense `weight`, so fingerprints and checkpoints need not know about them.
"""

import re
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from thesislib.errors import BadInput, unknown
from thesislib.model import packing

M = TypeVar("M", bound=nn.Module)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(block: nn.Module) -> dict[str, "Projection"]:
    """The projections of a decoder block by name: seven, or fewer if its attention or MLP was removed."""
    parts = [part for part in (getattr(block, "self_attn", None), getattr(block, "mlp", None)) if part is not None]
    return {name: module for part in parts for name, module in part.named_children() if name in LINEARS}


class Size(NamedTuple):
    """The size of a linear or an embedding.

    Args:
        numel: parameters without the bias; zeros that are packed away count.
        macs: multiply-accumulates for one token; masked zeros are multiplied like any weight.
        nbytes: its bytes in a file, with the bias.
    """

    numel: int
    macs: int
    nbytes: int


class StoredLinear(NamedTuple):
    """A computed linear as an artifact stores it.

    Args:
        encoding: the encoding of its tensors, e.g. "2:4".
        shape: (outputs, inputs).
        bias: (outputs,) or None.
        dtype: of the weight.
        tensors: the tensors that the weight is computed from, by name.
        name: the linear's name in errors.
    """

    encoding: str
    shape: tuple[int, int]
    bias: torch.Tensor | None
    dtype: torch.dtype
    tensors: Mapping[str, torch.Tensor]
    name: str = "the linear"


READERS: dict[str, type["ComputedLinear"]] = {}  # by the first word of the encodings that each class reads


class ComputedLinear(nn.Module):
    """A linear whose weight is computed at each use. A subclass defines `weight`.

    The tensors that the weight is computed from are buffers outside the state dict. They follow `.to()`: floating ones
    change their dtype, integer ones do not. A subclass overrides `numel`, `macs` and `nonzero` if it has other
    parameters than a matrix of its shape. A subclass that artifacts store has `words` and `load`.

    Attributes:
        encoding: the encoding under which an artifact stores the tensors; None if it stores the dense weight.
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
    def load(cls, linear: StoredLinear) -> "ComputedLinear":
        """The linear that an artifact stores.

        Raises:
            BadInput: tensors that are missing, or of another shape or dtype.
        """
        raise NotImplementedError

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput for an encoding that begins with a word of this class but has another form."""

    def __init__(self, shape: tuple[int, int], bias: torch.Tensor | None, **tensors: torch.Tensor):
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), computed at every call."""
        raise NotImplementedError

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors that the weight is computed from, as an artifact stores them."""
        return dict(self.named_buffers())

    @property
    def numel(self) -> int:
        """Parameters without the bias, see `Size`."""
        return self.out_features * self.in_features

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.out_features * self.in_features

    @property
    def nonzero(self) -> int:
        """Parameters other than zero."""
        return int(torch.count_nonzero(self.weight))

    @property
    def nbytes(self) -> int:
        """Its bytes in a file, with the bias."""
        return sum(tensor.nbytes for tensor in self.stored.values()) + (0 if self.bias is None else self.bias.nbytes)

    @property
    def resident(self) -> list[torch.Tensor]:
        """The tensors in memory; a subclass may keep them in a faster layout than a file does."""
        return list(self.stored.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the encoding."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"encoding={self.encoding}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight


class PackedLinear(ComputedLinear):
    """A linear whose pruned weight is packed (see `thesislib.model.packing`) and unpacked at each use.

    W2:4 in bfloat16 takes 0.55 of the dense bytes.
    """

    words = ("bitmap", "")  # a pattern such as 2:4 has no first word

    def __init__(self, encoding: str, shape: tuple[int, int], bias: torch.Tensor | None, **tensors: torch.Tensor):
        super().__init__(shape, bias, **tensors)
        self.encoding = encoding

    @classmethod
    def load(cls, linear: StoredLinear) -> "PackedLinear":
        """See `ComputedLinear.load`; the weight has the dtype of the stored values.

        Raises:
            BadInput: tensors that are missing or of another shape, or positions that do not exist.
        """
        encoding, name, tensors = linear.encoding, linear.name, {}
        for part, size in packing.packed_shapes(linear.shape, encoding, len(linear.tensors.get("values", ()))).items():
            if part not in linear.tensors:
                raise BadInput(f"it lacks the weight '{name}.{part}'")
            tensors[part] = linear.tensors[part]
            if tensors[part].shape != torch.Size(size):
                raise BadInput(f"'{name}.{part}' has shape {tuple(tensors[part].shape)}, expected {tuple(size)}")
        packing.check_positions(tensors, encoding, name)
        return cls(encoding, linear.shape, linear.bias, **tensors)

    @classmethod
    def check_encoding(cls, encoding: str) -> None:
        """Raises BadInput for an encoding that is neither a bitmap nor a pattern."""
        if encoding != "bitmap":
            packing.Pattern.parse(encoding)

    @classmethod
    def of(cls, linear: "Projection", encoding: str | None = None) -> "PackedLinear":
        """A linear packed in an encoding, by default the one with the fewest bytes.

        Raises:
            BadInput: the weight lacks the zeros that the encoding needs, or no encoding saves anything.
        """
        encoding = encoding or packing.smallest(linear.weight)
        if encoding == "dense":
            raise BadInput("this weight has too few zeros for packing to save anything: leave it as it is")
        shape = linear.out_features, linear.in_features
        return cls(encoding, shape, linear.bias, **packing.pack(linear.weight.detach(), encoding))

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), unpacked at every call."""
        return packing.unpack(self.stored, self.encoding, (self.out_features, self.in_features))


def reader(encoding: str) -> type[ComputedLinear]:
    """The class that reads an encoding, by its first word: "int" for int4/symmetric/64/all, "" for 2:4.

    Raises:
        BadInput: no class reads it, or its class does not read this form.
    """
    word = re.match(r"[a-z_]*", encoding)[0]
    if word not in READERS:
        raise unknown("encoding", encoding, ["dense", *filter(None, READERS)])
    READERS[word].check_encoding(encoding)
    return READERS[word]


class Adapted(nn.Module):
    """A linear with a low-rank correction: y = base(x) + (x Aᵀ) Bᵀ.

    `weight` and `bias` are the base's. In the state dict the base's `weight` keeps the name that it has without a
    correction; `lora_A` and `lora_B` stand beside it.

    Args:
        base: an nn.Linear or a ComputedLinear.
        A: (rank, inputs).
        B: (outputs, rank); LoRA's scale, if any, is multiplied into it.

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
        """The rank of the correction."""
        return len(self.lora_A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs); the correction is computed in its own dtype."""
        y = self.base(x)
        return y + F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B).to(y.dtype)

    def state_dict(self, *args, **kwargs):
        """The base's, with `lora_A` and `lora_B`."""
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
    """A projection with one more correction: y = module(x) + (x Aᵀ) Bᵀ.

    A second correction is joined with the first: the rank is the sum of both.
    """
    if not isinstance(module, Adapted):
        return Adapted(module, A, B)
    return Adapted(module.base, torch.cat([module.lora_A.detach(), A]), torch.cat([module.lora_B.detach(), B], 1))


def base_of(module: Projection) -> nn.Linear | ComputedLinear:
    """The linear without its correction."""
    return module.base if isinstance(module, Adapted) else module


def size_of(module: Projection | nn.Embedding) -> Size:
    """The size of a linear or an embedding, with its correction if it has one."""
    if isinstance(module, Adapted):
        A, B, base = module.lora_A, module.lora_B, size_of(module.base)
        added = A.numel() + B.numel()
        return Size(base.numel + added, base.macs + added, base.nbytes + A.nbytes + B.nbytes)
    if isinstance(module, ComputedLinear):
        return Size(module.numel, module.macs, module.nbytes)
    count = module.weight.numel()
    return Size(count, count, sum(p.nbytes for p in module.parameters(recurse=False)))


def merge(adapted: Adapted) -> nn.Linear:
    """A dense linear with weight W + B A: no extra cost, but pruned zeros and the quantisation grid are lost."""
    return _linear(_sum(adapted), adapted.bias)


def merge_masked(adapted: Adapted) -> nn.Linear:
    """A dense linear with weight W + B A where W is not zero, and 0 elsewhere; -0.0 counts as not zero."""
    kept = packing.nonzero_bits(adapted.weight)
    return _linear(torch.where(kept, _sum(adapted), 0), adapted.bias)


def merged(adapted: Adapted, how: str) -> Projection:
    """An adapted linear merged: "dense" (see `merge`), "masked" (see `merge_masked`) or "beside", which leaves it."""
    return {"beside": lambda module: module, "masked": merge_masked, "dense": merge}[how](adapted)


def merge_all(model: M, how: str) -> M:
    """Merge every correction of a model in place, see `merged`; blocks that shared a linear share the merged one."""
    return _change_all(model, lambda module: merged(module, how) if isinstance(module, Adapted) else module)


def _sum(adapted: Adapted) -> torch.Tensor:
    """W + B A, computed in float32 and rounded once."""
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
    """A computed linear as an nn.Linear. An adapted one keeps its correction; a dense one is returned as it is."""
    if not isinstance(base_of(module), ComputedLinear):
        return cast("nn.Linear | Adapted", module)
    dense = _linear(module.weight, module.bias)
    return Adapted(dense, module.lora_A, module.lora_B) if isinstance(module, Adapted) else dense


def unpack_all(model: M, cls: type[ComputedLinear] = ComputedLinear, but: tuple[type[ComputedLinear], ...] = ()) -> M:
    """Unpack every linear of a class in a model in place, but those of some classes; blocks that shared a linear share
    the unpacked one."""

    def change(module: ComputedLinear | Adapted) -> Projection:
        base = base_of(module)
        return unpack(module) if isinstance(base, cls) and not isinstance(base, but) else module

    return _change_all(model, change)


def _change_all(model: M, change: Callable[[ComputedLinear | Adapted], Projection]) -> M:
    """Replace every computed or adapted linear of a model by `change` of it, called once for each."""
    changed: dict[int, nn.Module] = {}
    for parent in list(model.modules()):  # the list keeps all modules alive, so ids stay unique
        if isinstance(parent, Adapted):  # its parent replaces it as a whole
            continue
        for name, child in parent.named_children():
            if isinstance(child, (ComputedLinear, Adapted)):
                if id(child) not in changed:
                    changed[id(child)] = change(child)
                setattr(parent, name, changed[id(child)])
    return model


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the projection `name` (e.g. "q_proj") of a block by `module`.

    Raises:
        BadInput: the block has no such projection.
    """
    existing = projections(block)
    if name not in existing:
        raise unknown("projection", name, existing)
    parent = next(part for part in block.children() if part._modules.get(name) is existing[name])
    setattr(parent, name, module)
