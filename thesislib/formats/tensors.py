"""The tensors of a subject as files store them: their names, the blocks that share them, and writing them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from thesislib.formats.checkpoint import empty_model
from thesislib.model import packing
from thesislib.model.layers import ComputedLinear, Projection, base_of, projections
from thesislib.model.quantised import quantised_embeddings
from thesislib.model.subject import Subject

BLOCKS = "model.layers."


def packed_tensors(subject: Subject) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and encodings of a packed artifact.

    A projection that is computed keeps its encoding, another one gets its smallest. Tied embeddings and repeated blocks
    are stored once. Low-rank corrections are left out.
    """
    tensors, encodings = other_tensors(subject), {}
    for path, module in stored_projections(subject):
        linear = base_of(module)
        if isinstance(linear, ComputedLinear) and linear.encoding:
            encodings[path], parts = linear.encoding, linear.stored
        else:
            weight = linear.weight.detach()
            encodings[path] = packing.smallest(weight)
            parts = packing.pack(weight, encodings[path])
        tensors |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
        if linear.bias is not None:
            tensors[f"{path}.bias"] = linear.bias.detach()
    for path, table in quantised_embeddings(subject.model):
        encodings[path] = table.encoding
        tensors |= {f"{path}.{name}": tensor for name, tensor in table.stored.items()}
    return tensors, encodings


def plain_tensors(subject: Subject) -> dict[str, torch.Tensor]:
    """The tensors of a plain Hugging Face checkpoint of the subject.

    A repeated block is stored each time. An attention or MLP that was removed is stored as zeros, which add nothing.
    Low-rank corrections are left out.
    """
    state = subject.model.state_dict()
    state = {key: tensor for key, tensor in state.items() if not key.endswith((".lora_A", ".lora_B"))}
    for key, empty in empty_model(subject.model.config, subject.dtype).state_dict().items():
        if key not in state:
            state[key] = torch.zeros(empty.shape, dtype=empty.dtype)
    if subject.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file; tensors that share memory are copied, since the format refuses them."""
    path.parent.mkdir(exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, path, {"format": "pt"})


def repeated_blocks(subject: Subject) -> dict[int, int]:
    """The blocks that share their weights with an earlier one: {block: the first block with these weights}."""
    first: dict[tuple, int] = {}
    repeats = {}
    for i, block in enumerate(subject.blocks):
        tensors = [*block.named_parameters(), *block.named_buffers()]
        weights = tuple((name, address(tensor)) for name, tensor in tensors)
        if first.setdefault(weights, i) != i:
            repeats[i] = first[weights]
    return repeats


def projection_paths(subject: Subject) -> Iterator[tuple[str, Projection]]:
    """Every projection with its path in the model, those of repeated blocks too."""
    for i, block in enumerate(subject.blocks):
        linears = {id(module) for module in projections(block).values()}
        for path, module in block.named_modules():
            if id(module) in linears:
                yield f"{BLOCKS}{i}.{path}", module


def stored_projections(subject: Subject) -> Iterator[tuple[str, Projection]]:
    """The projections of a packed file: those of blocks that do not repeat an earlier one."""
    repeats = repeated_blocks(subject)
    return ((path, module) for path, module in projection_paths(subject) if block_of(path) not in repeats)


def other_tensors(subject: Subject) -> dict[str, torch.Tensor]:
    """The parameters of a packed file other than the projections'."""
    skip = {"lm_head.weight"} if subject.model.config.tie_word_embeddings else set()
    paths = [path for path, _ in projection_paths(subject)] + [f"{BLOCKS}{i}" for i in repeated_blocks(subject)]
    prefixes = tuple(f"{path}." for path in paths)
    parameters = subject.model.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in parameters if name not in skip and not name.startswith(prefixes)}


def block_of(path: str) -> int:
    """The index of the block in a projection's path."""
    return int(path.removeprefix(BLOCKS).partition(".")[0])


def address(tensor: torch.Tensor) -> tuple:
    """A tensor's memory address; the same for tensors that share their memory."""
    return tensor.device, tensor.data_ptr(), tensor.nbytes
