"""The GPTQ checkpoint layout, begun by AutoGPTQ: quantised linears as transformers, GPTQModel and vLLM load them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

import thesislib
from thesislib.errors import BadInput
from thesislib.files import replaceable_folder, whole_folder
from thesislib.formats.adapter import read_adapter, write_adapter
from thesislib.formats.artifact import check_same, fill
from thesislib.formats.checkpoint import (
    empty_model,
    generation_settings,
    headers,
    quiet_transformers,
    read_config,
    read_tokenizer,
)
from thesislib.formats.tensors import plain_tensors, projection_paths, write_tensors
from thesislib.model.beside import check_no_path
from thesislib.model.grid import ROW, Grid, Quantised
from thesislib.model.layers import base_of
from thesislib.model.lowrank import LowRank
from thesislib.model.quantised import QuantisedLinear
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import prepared, rows_of

GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that GPTQModel's kernels know, besides a whole row
BITS = (2, 3, 4, 8)  # that the layout is defined for: GPTQModel lays 5 to 7 out otherwise, transformers refuses them
WORD = 32  # codes that fill whole int32 words, at any number of bits


def export_gptq(subject: Subject, folder: str | Path) -> Path:
    """Write a quantised subject as a GPTQ checkpoint, as a whole or not at all.

    Low-rank corrections become a PEFT adapter in `adapter/`.

    Codes, scales and zeros are the subject's own, so the weights are the same numbers. Pruned weights, which artifacts
    leave out, are written as codes of zero: this layout has no sparse form.

    For the symmetric grid the layout's first version is written, which all loaders read: it stores zero-points minus 1.
    For the asymmetric grid the second version (`checkpoint_format: gptq_v2`) is written, which stores them as they are.
    There a zero-point of 0 minus 1 would borrow from its neighbour in the word, and loaders refuse the first version.

    Args:
        subject: all its projections are quantised on the same grid.
        folder: a new or empty one.

    Raises:
        BadInput: projections that are not quantised, or on different grids; a linear path beside an MLP; 5, 6 or 7
            bits; a grid with a floating minimum; groups or shapes that the layout cannot hold; a folder that holds
            something.
    """
    folder = replaceable_folder(folder)
    check_no_path(subject, "a GPTQ checkpoint")
    linears: dict[str, Any] = {path: base_of(module) for path, module in projection_paths(subject)}
    settings = _settings(subject, linears)
    quantised = {path: linear.quantised for path, linear in linears.items()}
    minus = int(settings["checkpoint_format"] == "gptq")
    prefixes = tuple(f"{path}." for path in linears)
    tensors = {name: tensor for name, tensor in plain_tensors(subject.copy()).items() if not name.startswith(prefixes)}
    for path, q in quantised.items():
        groups = torch.arange(q.codes.shape[1]) // q.grid.size(q.codes.shape[1]) if q.index is None else q.index
        zeros = (q.offset.long() - minus).to(torch.uint8)
        tensors |= {
            f"{path}.qweight": words(q.codes, q.grid.bits).T,  # (inputs x bits / 32, outputs)
            f"{path}.qzeros": words(zeros.T, q.grid.bits),  # (groups, outputs x bits / 32)
            f"{path}.scales": q.scale.T.half(),  # (groups, outputs)
            f"{path}.g_idx": groups.to(torch.int32),
        }
        if linears[path].bias is not None:
            tensors[f"{path}.bias"] = linears[path].bias.detach()
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
        model = load_gptq(temporary, read_config(temporary), subject.dtype)
        tokenizer = prepared(read_tokenizer(temporary), rows_of(model))
        check_same(subject, Subject(model, tokenizer, subject.name), temporary)
    return folder


def load_gptq(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a GPTQ checkpoint, with its projections as `QuantisedLinear`.

    Low-rank corrections in `adapter/`, where `export_gptq` writes them, are loaded too.

    Args:
        folder: with safetensors.
        config: its configuration.
        dtype: of all weights, quantised or not.

    Raises:
        BadInput: settings or a layout that is not read here; a tensor that is missing or that the model does not have.
    """
    settings, where = config.quantization_config, headers(folder)
    bits, group = settings.get("bits"), settings.get("group_size", -1)
    version = settings.get("checkpoint_format", "gptq")
    unread = any(settings.get(key) for key in ("lm_head", "dynamic", "modules_in_block_to_quantize"))
    if version not in ("gptq", "gptq_v2") or unread:
        raise BadInput(
            f"{folder}: GPTQ of format '{version}' with these settings is not read here: expected gptq or gptq_v2, "
            "all projections alike, the head plain"
        )
    if bits not in BITS:
        raise BadInput(f"{folder}: GPTQ of {bits} bits is not read here: expected {', '.join(map(str, BITS))}")
    grid = Grid(bits, ROW if group == -1 else group, "symmetric" if settings.get("sym", True) else "asymmetric")
    opened = {file: load_file(file) for file in {header.file for header in where.values()}}
    stored = {key: opened[header.file][key] for key, header in where.items()}
    plain = copy.deepcopy(config)
    del plain.quantization_config  # transformers' own loader of quantised weights is not used
    subject = Subject(empty_model(plain, dtype), None, folder.name)
    tensors, encodings = {}, {}
    for path, linear in projection_paths(subject):
        parts = {name: stored.pop(f"{path}.{name}", None) for name in ("qweight", "qzeros", "scales", "g_idx")}
        if missing := [name for name, tensor in parts.items() if tensor is None and name != "g_idx"]:
            raise BadInput(f"{folder} lacks the weight '{path}.{missing[0]}': the checkpoint is not whole")
        quantised = _quantised(path, (linear.out_features, linear.in_features), grid, version, **parts)
        layer = QuantisedLinear.of(quantised)
        encodings[path] = layer.encoding
        tensors |= {f"{path}.{name}": tensor for name, tensor in layer.stored.items()}
    for key, tensor in stored.items():
        if not tensor.is_floating_point():
            raise BadInput(
                f"the weight '{key}' of {folder} is stored as {tensor.dtype}: expected floating numbers, or "
                "codes of a projection"
            )
        tensors[key] = tensor.to(dtype)
    if (folder / "adapter").is_dir():
        tensors |= read_adapter(folder / "adapter")
    fill(subject, tensors, encodings, {}, folder)
    subject.model.generation_config = generation_settings(folder) or subject.model.generation_config
    return subject.model


def _quantised(
    path: str,
    shape: tuple[int, int],
    grid: Grid,
    version: str,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
) -> Quantised:
    """A projection's weight on its grid, unpacked from the layout's words."""
    (outputs, inputs), bits = shape, grid.bits
    groups = inputs // grid.size(inputs)
    expected = {
        "qweight": (inputs * bits // 32, outputs),
        "qzeros": (groups, outputs * bits // 32),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }
    for name, tensor in {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}.items():
        if tensor is not None and tensor.shape != torch.Size(expected[name]):
            raise BadInput(
                f"'{path}.{name}' has shape {tuple(tensor.shape)}, expected {expected[name]} for {bits} bits"
            )
    zeros = codes_of(qzeros, bits).long() + (version == "gptq")  # the first version stores them minus 1
    if int(zeros.max()) > grid.levels or (grid.kind == "symmetric" and not bool((zeros == 2 ** (bits - 1)).all())):
        raise BadInput(f"'{path}.qzeros' are not those of a {grid.kind} grid of {bits} bits")
    index = None if g_idx is None else g_idx.long()
    if index is not None and torch.equal(index, torch.arange(inputs) // grid.size(inputs)):
        index = None  # neighbours
    if index is not None and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise BadInput(f"'{path}.g_idx' names groups that it does not have")
    scale, offset = scales.T.float().contiguous(), zeros.T.float().contiguous()
    return Quantised(grid, codes_of(qweight.T, bits), scale, offset, index)


def codes_of(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `words`: (rows, n x bits / 32) int32 words as (rows, n) uint8 codes.

    >>> codes_of(words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4), 4).tolist()
    [[1, 2, 3, 4, 5, 6, 7, 8]]
    """
    rows = np.ascontiguousarray(packed.cpu().numpy().astype("<i4")).view(np.uint8)
    single = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits)
    return torch.from_numpy((single << np.arange(bits, dtype=np.uint8)).sum(2, dtype=np.uint8))


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, n) codes packed into (rows, n x bits / 32) int32 words, lowest bits first.

    >>> words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4).item() == 0x87654321 - 2**32
    True
    """
    single = codes.cpu().numpy()[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    packed = np.packbits(single.reshape(len(codes), -1), axis=1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def _settings(subject: Subject, linears: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of a subject; BadInput if the layout cannot hold it."""
    dense = [path for path, linear in linears.items() if not isinstance(linear, QuantisedLinear)]
    pairs = [path for path, linear in linears.items() if isinstance(linear, LowRank)]
    if pairs:
        raise BadInput(
            f"{pairs[0]} is a pair of low rank ({len(pairs)} of {len(linears)} are): a GPTQ checkpoint holds whole "
            "weights; an artifact holds pairs, a GGUF file their product"
        )
    if dense:
        raise BadInput(
            f"{dense[0]} is not quantised ({len(dense)} of {len(linears)} are not): a GPTQ checkpoint holds "
            "models with all projections quantised"
        )
    if not all(list(subject.linears(i)) == list(subject.linears(0)) for i in range(subject.depth)):
        raise BadInput(
            "a GPTQ checkpoint holds whole blocks, and some here lost attention or MLP: remove whole blocks instead"
        )
    grids = {linear.grid for linear in linears.values()}
    if len(grids) > 1:
        raise BadInput(
            f"projections have different grids ({', '.join(map(str, grids))}): a GPTQ checkpoint has one for all"
        )
    (grid,) = grids
    if grid.bits not in BITS:
        raise BadInput(
            f"{grid.bits} bits cannot be held: GPTQ's loaders share a layout for {', '.join(map(str, BITS))} bits; an "
            "artifact and a GGUF file hold them"
        )
    if not grid.holds_zero:
        raise BadInput(
            "grid 'minimum' cannot be held: a GPTQ checkpoint has integer zeros, so quantise on the symmetric or "
            "asymmetric grid"
        )
    for path, m in linears.items():
        if m.out_features % WORD or m.in_features % WORD:
            raise BadInput(
                f"{path} of shape {(m.out_features, m.in_features)} cannot be held: a GPTQ checkpoint has multiples "
                f"of {WORD} inputs and outputs"
            )
    if grid.group not in (ROW, *GROUPS):
        fit = [g for g in GROUPS if not any(m.in_features % g for m in linears.values())]
        raise BadInput(
            f"group {grid.group} is none that GPTQ's loaders know: here {', '.join(map(str, fit))} or '{ROW}' would be"
        )
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if grid.kind == "symmetric" else "gptq_v2",
        "bits": grid.bits,
        "group_size": -1 if grid.group == ROW else grid.group,
        "sym": grid.kind == "symmetric",
        "desc_act": any("index" in linear.stored for linear in linears.values()),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"thesislib:{thesislib.__version__}"]},
    }
