"""The size of a subject: its parameters, its bytes in memory, and the bytes of its artifact before that is written."""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from thesislib.formats.adapter import adapter_tensors
from thesislib.formats.tensors import address, other_tensors, stored_projections
from thesislib.model import packing
from thesislib.model.layers import ComputedLinear, base_of
from thesislib.model.quantised import quantised_embeddings
from thesislib.model.subject import Subject

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of tensors by name
# a safetensors file is sorted by dtype, in this order from the last to the first, then by name
FILE_ORDER: tuple[torch.dtype, ...] = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)
FILE_ORDER += (torch.int32, torch.float32, torch.float64, torch.int64)


def sizes(subject: Subject) -> dict[str, int]:
    """Counts of a subject in memory; tied and shared tensors count once.

    Returns:
        `parameters`: all parameters, packed zeros too. `nonzero_parameters`: those other than zero.
        `bytes_in_memory`: of all tensors, packed ones as they are packed.
    """
    parameters = nonzero = 0
    nbytes: dict[tuple, int] = {}  # by memory address
    for module in subject.model.modules():
        weights = [p for p in module.parameters(recurse=False) if address(p) not in nbytes]
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        parameters += sum(w.numel() for w in weights)
        nonzero += sum(int(torch.count_nonzero(w)) for w in weights)
        if isinstance(module, ComputedLinear):
            parameters, nonzero = parameters + module.numel, nonzero + module.nonzero
            tensors += module.resident
        nbytes |= {address(tensor): tensor.nbytes for tensor in tensors}
    return {"parameters": parameters, "nonzero_parameters": nonzero, "bytes_in_memory": sum(nbytes.values())}


def predicted_disk_bytes(subject: Subject, removed: str | float | None = None) -> int:
    """The bytes of weights that `save_artifact` will write, computed without packing any.

    Args:
        subject: only its shapes and dtypes are used, unless `removed` is None.
        removed: the zeros that a width stage will make in each projection, as its config has it: a pattern such as
            "2:4", or the share of each row. None counts the zeros in the weights.
    """
    shapes = _shapes(other_tensors(subject))
    for path, module in stored_projections(subject):
        linear = base_of(module)
        if removed is None and isinstance(linear, ComputedLinear) and linear.encoding:
            parts = _shapes(linear.stored)
        else:
            parts = _packed_shapes(linear, subject.dtype, removed)
        shapes |= {f"{path}.{name}": part for name, part in parts.items()}
        if linear.bias is not None:
            shapes[f"{path}.bias"] = (tuple(linear.bias.shape), linear.bias.dtype)
    for path, table in quantised_embeddings(subject.model):
        shapes |= {f"{path}.{name}": part for name, part in _shapes(table.stored).items()}
    factors = _shapes(adapter_tensors(subject))
    return file_bytes(shapes) + (file_bytes(factors) if factors else 0)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _packed_shapes(linear: Any, dtype: torch.dtype, removed: str | float | None) -> Shapes:
    """The tensors of a projection in its smallest encoding, see `predicted_disk_bytes`."""
    shape, nonzero = (linear.out_features, linear.in_features), None
    if isinstance(removed, str):
        encoding = str(packing.Pattern.parse(removed))
    elif removed is None:
        encoding, nonzero = packing.smallest(linear.weight), int(packing.nonzero_bits(linear.weight).sum())
    else:
        nonzero = shape[0] * (shape[1] - int(shape[1] * removed))
        encoding = min(("dense", "bitmap"), key=lambda e: packing.predicted_bytes(shape, dtype, e, nonzero))
    packed = packing.packed_shapes(shape, encoding, nonzero)
    return {name: (size, torch.uint8 if name in ("codes", "bitmap") else dtype) for name, size in packed.items()}


def file_bytes(shapes: Shapes) -> int:
    """The bytes of a safetensors file with such tensors: 8, a JSON header, and the tensors."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in sorted(shapes.items(), key=lambda item: (-FILE_ORDER.index(item[1][1]), item[0])):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _name(dtype), "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + length + -length % 8 + end


def _name(dtype: torch.dtype) -> str:
    """A dtype as safetensors spells it, e.g. F32."""
    if dtype == torch.bfloat16:
        return "BF16"
    letter = "F" if dtype.is_floating_point else "UI"[dtype.is_signed]
    return f"{letter}{8 * dtype.itemsize}"
