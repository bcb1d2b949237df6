"""A subject whose pruned linears are packed, or run on the sparse kernels of an NVIDIA GPU."""

import copy
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from thesislib.errors import BadInput
from thesislib.model import packing
from thesislib.model.layers import Adapted, ComputedLinear, PackedLinear, Projection, base_of, projections, replace
from thesislib.model.subject import Subject


def pack_all(subject: Subject) -> Subject:
    """A subject with each projection packed in its smallest encoding, if packing makes it smaller.

    It shares all other weights with `subject`.
    """
    packed: dict[int, Projection] = {}

    def smaller(linear: Projection) -> Projection:
        base = base_of(linear)
        if isinstance(base, ComputedLinear) or packing.smallest(base.weight) == "dense":
            return linear
        small = PackedLinear.of(base)
        return Adapted(small, linear.lora_A, linear.lora_B) if isinstance(linear, Adapted) else small

    model = copy.deepcopy(subject.model, {id(p): p for p in subject.model.parameters()})
    for before, after in zip(subject.model.model.layers, model.model.layers, strict=True):
        for name, linear in projections(before).items():
            replace(after, name, packed.setdefault(id(linear), smaller(linear)))
    return dataclasses.replace(subject, model=model)


class SemiStructuredLinear(ComputedLinear):
    """A 2:4 weight in the form of NVIDIA's sparse tensor cores; it stays on the device where it was made."""

    def __init__(self, sparse: torch.Tensor, bias: torch.Tensor | None):
        super().__init__((sparse.shape[0], sparse.shape[1]), bias)
        self.sparse = sparse

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), computed at every call."""
        return self.sparse.to_dense()

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """torch's packed values and, with its CUTLASS kernel, a second tensor with their positions."""
        return {name: t for name in ("packed", "meta") if (t := getattr(self.sparse, name)) is not None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.sparse, self.bias)


def semi_structured(subject: Subject) -> Subject:
    """A subject whose 2:4 linears run on torch's semi-structured sparse kernels; other linears stay as they are.

    The kernels need a multiple of 32 rows and of 64 columns.

    Raises:
        BadInput: the subject is not on an NVIDIA GPU of compute capability 8.0 or newer, is neither float16 nor
            bfloat16, or has no 2:4 linear.
    """
    device, dtype = subject.device, subject.dtype
    if device.type != "cuda" or torch.version.hip:
        raise BadInput(
            f"2:4 kernels cannot run on '{device}': expected an NVIDIA GPU of compute capability 8.0 or newer; "
            "elsewhere packed linears unpack at use"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise BadInput(
            f"2:4 kernels cannot run on {name} of compute capability {'.'.join(map(str, capability))}: expected "
            "8.0 or newer"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise BadInput(f"2:4 kernels cannot run in {dtype}: expected torch.bfloat16 or torch.float16")
    result = subject.copy(unpack=False)
    # each linear, kept alive so that ids stay unique, and its replacement
    bases: dict[int, tuple[nn.Linear | ComputedLinear, nn.Linear | ComputedLinear]] = {}
    for i, block in enumerate(result.blocks):
        for name, module in result.linears(i).items():
            base = base_of(module)
            if id(base) not in bases:
                weight = base.weight.detach()
                new: nn.Linear | ComputedLinear = base
                if weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0 and packing.most_kept(weight, 4) <= 2:
                    new = SemiStructuredLinear(to_sparse_semi_structured(weight.contiguous()), base.bias)
                bases[id(base)] = base, new
            if isinstance(module, Adapted):
                module.base = bases[id(base)][1]
            else:
                replace(block, name, bases[id(base)][1])
    if not any(isinstance(m, SemiStructuredLinear) for m in result.model.modules()):
        raise BadInput(
            f"no linear of {subject.name} holds 2:4 weights of a shape that the kernels take: mask with W2:4 first"
        )
    return result
