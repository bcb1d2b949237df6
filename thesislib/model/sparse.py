"""A subject whose pruned linears are held packed, or on the sparse kernels of a card."""

import copy
from dataclasses import replace as with_other

import torch
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured

from thesislib.errors import BadInput
from thesislib.model import packing
from thesislib.model.layers import Adapted, ComputedLinear, PackedLinear, Projection, base_of, projections, replace
from thesislib.model.subject import Subject


def pack_all(subject: Subject) -> Subject:
    """A subject that holds each projection packed in its smallest encoding, sharing all that is not packed.

    Those that packing would not make smaller stay as they are.
    """
    packed: dict[int, Projection] = {}

    def smaller(linear: Projection) -> Projection:
        under = base_of(linear)
        if isinstance(under, ComputedLinear) or packing.smallest(under.weight) == "dense":
            return linear
        made = PackedLinear.of(under)
        return Adapted(made, linear.lora_A, linear.lora_B) if isinstance(linear, Adapted) else made

    model = copy.deepcopy(subject.model, {id(p): p for p in subject.model.parameters()})
    for before, after in zip(subject.model.model.layers, model.model.layers, strict=True):
        for name, linear in projections(before).items():
            replace(after, name, packed.setdefault(id(linear), smaller(linear)))
    return with_other(subject, model=model)


class SemiStructuredLinear(ComputedLinear):
    """2:4 in the form that NVIDIA's sparse tensor cores take; stays on the device where it was made."""

    def __init__(self, sparse: torch.Tensor, bias: torch.Tensor | None):
        super().__init__((sparse.shape[0], sparse.shape[1]), bias)
        self.sparse = sparse

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), made anew at every call."""
        return self.sparse.to_dense()

    @property
    def held(self) -> dict[str, torch.Tensor]:
        """torch's packed values and, with its CUTLASS kernel, their places apart."""
        return {name: t for name in ("packed", "meta") if (t := getattr(self.sparse, name)) is not None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.sparse, self.bias)


def semi_structured(subject: Subject) -> Subject:
    """A subject whose 2:4 linears run on torch's semi-structured sparse kernels; those of other weights stay as they
    are.

    Rows must be a multiple of 32 and columns of 64, which the kernels ask for.

    Raises:
        BadInput: no NVIDIA card of compute capability 8.0 or newer under the subject; neither float16 nor bfloat16; no
            linear that holds 2:4.
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
    result, made = subject.copy(unpack=False), {}
    for i, block in enumerate(result.blocks):
        for name, module in result.linears(i).items():
            under = base_of(module)
            if id(under) not in made:
                weight = under.weight.detach()
                fits = weight.shape[0] % 32 == 0 and weight.shape[1] % 64 == 0 and packing.most_kept(weight, 4) <= 2
                made[id(under)] = (
                    SemiStructuredLinear(to_sparse_semi_structured(weight.contiguous()), under.bias) if fits else under
                )
            if isinstance(module, Adapted):
                module.base = made[id(under)]
            else:
                replace(block, name, made[id(under)])
    if not any(isinstance(m, SemiStructuredLinear) for m in result.model.modules()):
        raise BadInput(
            f"no linear of {subject.name} holds 2:4 weights of a shape that the kernels take: mask with W2:4 first"
        )
    return result
