"""The GPTQ checkpoint layout, begun by AutoGPTQ: quantised linears as transformers, GPTQModel and vLLM load them."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import thesislib
from thesislib.compress.grid import ROW
from thesislib.errors import BadInput
from thesislib.files import free_folder, whole_folder
from thesislib.formats import plain_tensors, projection_paths, write_adapter, write_tensors
from thesislib.layers import unpack_all
from thesislib.quantised import QuantisedLinear
from thesislib.subject import Subject, quiet_transformers

GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that GPTQModel's kernels know, besides a whole row
WORD = 32  # codes that fill whole int32 words, at any number of bits


def export_gptq(subject: Subject, folder: str | Path) -> Path:
    """Write a quantised subject as a GPTQ checkpoint, whole or not at all; corrections beside it as a PEFT adapter in `adapter/`.

    Codes, scales and zeros are the subject's own, so the weights are the same numbers. Pruned weights, which artifacts
    leave out, are written as codes of zero: this layout has no sparse form.

    On the symmetric grid zeros are stored less one, as the layout's first version has it and all loaders read it. On the
    asymmetric grid they are stored as they are, which is its second version (`checkpoint_format: gptq_v2`): a zero of 0 less
    one would borrow from its neighbour in the word, and loaders refuse the first version there.

    Args:
        subject: all of whose projections are quantised, alike.
        folder: a new or empty one.

    Raises:
        BadInput: projections that are not quantised, or not alike; a grid with a floating minimum; groups or shapes that the
            layout cannot hold; a folder that holds something.
    """
    folder = free_folder(folder)
    linears = {path: getattr(module, "base", module) for path, module in projection_paths(subject)}
    settings = _settings(subject, linears)
    quantised = {path: linear.quantised for path, linear in linears.items()}
    less = int(settings["checkpoint_format"] == "gptq")
    away = tuple(f"{path}." for path in linears)
    dense = dataclasses.replace(subject, model=unpack_all(copy.deepcopy(subject.model)))
    tensors = {name: tensor for name, tensor in plain_tensors(dense).items() if not name.startswith(away)}
    for path, q in quantised.items():
        groups = torch.arange(q.codes.shape[1]) // q.grid.size(q.codes.shape[1]) if q.index is None else q.index
        zeros = (q.offset.long() - less).to(torch.uint8)
        tensors |= {
            f"{path}.qweight": words(q.codes, q.grid.bits).T,  # (inputs x bits / 32, outputs)
            f"{path}.qzeros": words(zeros.T, q.grid.bits),  # (groups, outputs x bits / 32)
            f"{path}.scales": q.scale.T.half(),  # (groups, outputs)
            f"{path}.g_idx": groups.to(torch.int32),
        }
        if linears[path].bias is not None:
            tensors[f"{path}.bias"] = linears[path].bias.detach().half()
    config = copy.deepcopy(subject.model.config)
    config.dtype = subject.dtype
    config.quantization_config = settings
    with whole_folder(folder) as temporary, quiet_transformers():
        write_tensors(tensors, temporary / "model.safetensors")
        config.save_pretrained(temporary)
        (temporary / "quantize_config.json").write_text(json.dumps(settings, indent=1) + "\n", "utf8")
        subject.model.generation_config.save_pretrained(temporary)
        subject.tokenizer.save_pretrained(temporary)
        write_adapter(subject, temporary / "adapter")
        for file in temporary.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes its files private
    return folder


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, n) codes as (rows, n x bits / 32) int32: each row a string of bits, the lowest bit of the first code first.

    >>> words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4).item() == 0x87654321 - 2**32
    True
    """
    single = codes.cpu().numpy()[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    packed = np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def _settings(subject: Subject, linears: dict[str, Any]) -> dict[str, Any]:
    """quantization_config of a subject that the layout can hold."""
    dense = [path for path, linear in linears.items() if not isinstance(linear, QuantisedLinear)]
    if dense:
        raise BadInput(f"{dense[0]} is not quantised ({len(dense)} of {len(linears)} are not): a GPTQ checkpoint holds models with all projections quantised")
    if not all(list(subject.linears(i)) == list(subject.linears(0)) for i in range(subject.depth)):
        raise BadInput("a GPTQ checkpoint holds whole blocks, and some here lost attention or MLP: remove whole blocks instead")
    grids = {linear.grid for linear in linears.values()}
    if len(grids) > 1:
        raise BadInput(f"projections have different grids ({', '.join(map(str, grids))}): a GPTQ checkpoint has one for all")
    (grid,) = grids
    if not grid.holds_zero:
        raise BadInput("grid 'minimum' cannot be held: a GPTQ checkpoint has integer zeros, so quantise on the symmetric or asymmetric grid")
    odd = {path: (m.out_features, m.in_features) for path, m in linears.items() if m.out_features % WORD or m.in_features % WORD}
    if odd:
        path, shape = next(iter(odd.items()))
        raise BadInput(f"{path} of shape {shape} cannot be held: a GPTQ checkpoint has multiples of {WORD} inputs and outputs")
    if grid.group not in (ROW, *GROUPS):
        fit = [g for g in GROUPS if not any(m.in_features % g for m in linears.values())]
        raise BadInput(f"group {grid.group} is none that GPTQ's loaders know: here {', '.join(map(str, fit))} or '{ROW}' would be")
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if grid.kind == "symmetric" else "gptq_v2",
        "bits": grid.bits,
        "group_size": -1 if grid.group == ROW else grid.group,
        "sym": grid.kind == "symmetric",
        "desc_act": any("index" in linear.held for linear in linears.values()),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"thesislib:{thesislib.__version__}"]},
    }
