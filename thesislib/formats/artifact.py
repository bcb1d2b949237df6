"""Artifact folders: a compressed model on disk, written and loaded.

`artifact.json` describes it (see `thesislib.formats.artifact_json`). The weights are in one of two forms:

- `packed.safetensors`, with each projection in its smallest encoding (see `thesislib.model.packing`) and each repeated
  block once;
- a plain Hugging Face checkpoint, if packing would save nothing or was not asked for.

Low-rank corrections are a PEFT adapter in `adapter/`.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from thesislib.errors import BadInput, first_line, unknown
from thesislib.files import replaceable_folder, whole_folder
from thesislib.formats.adapter import CONFIG, factor_names, read_adapter, write_adapter
from thesislib.formats.artifact_json import RECORD, read_artifact, write_record
from thesislib.formats.checkpoint import (
    check_memory,
    empty_model,
    generation_settings,
    quiet_transformers,
    read_config,
    read_tensors,
    read_tokenizer,
)
from thesislib.formats.sizes import sizes
from thesislib.formats.tensors import (
    BLOCKS,
    block_of,
    packed_tensors,
    plain_tensors,
    projection_paths,
    repeated_blocks,
    write_tensors,
)
from thesislib.model.beside import check_no_path, ranks_beside, with_paths
from thesislib.model.blocks import ATTRIBUTES, removed_parts, without_parts
from thesislib.model.layers import Adapted, Projection, StoredLinear, base_of, reader, replace, unpack_all
from thesislib.model.quantised import EMBEDDINGS, QuantisedLinear, set_embedding
from thesislib.model.subject import DTYPES, Subject
from thesislib.model.tokenizers import prepared, rows_of

PACKED, ADAPTER = "packed.safetensors", "adapter"
# settings that may differ between what was written and what is read back
UNCOMPARED = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "quantization_config"}
UNCOMPARED |= {"_attn_implementation", "attn_implementation"}

# ---------------------------------------------------------------- writing


def save_artifact(
    subject: Subject,
    folder: str | Path,
    *,
    stages: list[dict] | None = None,
    reports: list[dict] | None = None,
    base: dict | None = None,
    label: str | None = None,
    packed: bool = True,
) -> Path:
    """Write an artifact folder, as a whole or not at all.

    Args:
        subject: the compressed subject.
        folder: a new folder, or an artifact that this one replaces.
        stages: the stages that were applied, as JSON data.
        reports: each stage's report, as JSON data.
        base: name and fingerprint of the subject before the first stage.
        label: the configuration's label, e.g. "D2+W1:8"; by default the subject's name.
        packed: False writes a plain Hugging Face checkpoint in any case.

    Raises:
        BadInput: a folder that holds something else; a weight that is NaN or infinite.
    """
    folder = replaceable_folder(folder, replaces=RECORD)
    tensors, encodings = packed_tensors(subject) if packed else ({}, {})
    repeats, without, beside = repeated_blocks(subject), removed_parts(subject), ranks_beside(subject)
    if not packed:
        check_no_path(subject, "a plain checkpoint")
    if not (packed and (repeats or without or beside)) and all(e == "dense" for e in encodings.values()):
        tensors, encodings, repeats = plain_tensors(subject), {}, {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise BadInput(f"weight '{name}' of {subject.name} holds NaN or infinity: nothing was written")
    with whole_folder(folder) as temporary, quiet_transformers():
        if encodings:
            write_tensors(tensors, temporary / PACKED)
            config = copy.deepcopy(subject.model.config)
            config.dtype = subject.dtype
            config.save_pretrained(temporary)
            subject.model.generation_config.save_pretrained(temporary)
        else:
            subject.model.save_pretrained(temporary, state_dict=tensors)
        subject.tokenizer.save_pretrained(temporary)
        write_adapter(subject, temporary / ADAPTER)
        write_record(
            temporary,
            label=label or subject.name,
            name=subject.name,
            plan=subject.plan,
            stages=stages or [],
            reports=reports or [],
            base=base or {},
            fingerprint=subject.fingerprint,
            dtype=str(subject.dtype).removeprefix("torch."),
            sizes=sizes(subject),
            encodings=encodings,
            repeats=repeats,
            without=without,
            **({"beside": {str(b): rank for b, rank in beside.items()}} if beside else {}),
        )
        check_same(subject, load_artifact(temporary), folder)
    return folder


def check_same(written: Subject, read: Subject, where: Path) -> None:
    """Raises BadInput if a subject that was read back differs in a tensor or a setting from the one that was written.

    A tensor that `read` has and `written` lacks must be zero: an attention or MLP that was removed.
    """
    one, two = written.model.state_dict(), read.model.state_dict()
    differing = [key for key in one if key not in two or not torch.equal(one[key].cpu(), two[key].cpu())]
    differing += [key for key in two if key not in one and two[key].any()]
    if differing:
        raise BadInput(
            f"what was written to {where.name} reads back with another '{differing[0]}': {written.name} cannot be "
            "kept in this form; nothing was written"
        )
    one, two = (s.model.config.to_dict() for s in (written, read))
    for key in sorted((one.keys() | two.keys()) - UNCOMPARED):
        if _as_json(one.get(key)) != _as_json(two.get(key)):
            raise BadInput(
                f"what was written to {where.name} reads back with {key} = {two.get(key)!r} for "
                f"{one.get(key)!r}; nothing was written"
            )
    one, two = (s.model.generation_config.eos_token_id for s in (written, read))
    if one != two:
        raise BadInput(f"what was written to {where.name} ends texts at {two!r} for {one!r}; nothing was written")


def _as_json(value: Any) -> Any:
    """A setting as it is read from JSON."""
    return json.loads(json.dumps(value, default=str))


# ---------------------------------------------------------------- reading


def load_artifact(folder: str | Path, dtype: str | None = None, device: str = "cpu", packed: bool = True) -> Subject:
    """The subject of an artifact, loaded after every file's checksum was checked.

    Args:
        folder: the artifact.
        dtype: 'float32' or 'bfloat16'; by default the dtype it was saved in, in which fingerprints agree.
        device: a torch device.
        packed: whether packed projections stay packed and are unpacked at each use; False unpacks all of them once.

    Raises:
        BadInput: see `read_artifact`; a dtype or device that cannot be used; weights that do not fit the configuration.
    """
    folder, record = Path(folder), read_artifact(folder)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    saved = getattr(torch, record["dtype"])
    wanted = saved if dtype is None else getattr(torch, dtype)
    config, generation = read_config(folder), generation_settings(folder)
    tokenizer = read_tokenizer(folder)
    tensors = _read_files(folder, record)
    if wanted != saved:  # if not, corrections keep a dtype of their own
        tensors = {key: t.to(wanted) if t.is_floating_point() else t for key, t in tensors.items()}
    try:
        tensors = {key: t.to(device) for key, t in tensors.items()}
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]}): 'cpu' always works"
        ) from error
    subject = Subject(empty_model(config, wanted), tokenizer, record["name"], record["plan"] and tuple(record["plan"]))
    for part, blocks in record["without"].items():
        subject = without_parts(subject, dict.fromkeys(blocks, part))
        removed = tuple(f"{BLOCKS}{block}.{ATTRIBUTES[part]}." for block in blocks)  # zeros in a plain checkpoint
        tensors = {key: t for key, t in tensors.items() if not key.startswith(removed) or t.any()}
    ranks, width, meta = record.get("beside", {}), config.hidden_size, torch.device("meta")
    if ranks:
        empty = {
            int(b): (torch.empty(rank, width, device=meta), torch.empty(width, rank, device=meta))
            for b, rank in ranks.items()
        }
        subject = with_paths(subject, empty)
    fill(subject, tensors, record["encodings"], {int(i): j for i, j in record["repeats"].items()}, folder)
    if not packed:
        unpack_all(subject.model)
    if generation is not None:
        subject.model.generation_config = generation
    prepared(tokenizer, rows_of(subject.model))
    return subject


def load_plain(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a plain checkpoint. Every tensor is used; a LoRA adapter in the folder is not merged.

    Raises:
        BadInput: see `thesislib.formats.checkpoint.read_tensors` and `thesislib.formats.adapter.read_adapter`;
            generation settings that cannot be read.
    """
    tensors = read_tensors(folder, config, dtype)
    subject = Subject(empty_model(config, dtype), None, folder.name)
    if (folder / CONFIG).is_file():
        tensors |= {key: tensor.to(dtype) for key, tensor in read_adapter(folder).items()}
    fill(subject, tensors, {}, {}, folder)
    subject.model.generation_config = generation_settings(folder) or subject.model.generation_config
    return subject.model


def _read_files(folder: Path, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of an artifact, checked number by number."""
    files = [name for name in record["files"] if name.endswith(".safetensors")]
    check_memory(sum((folder / name).stat().st_size for name in files), folder)
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise BadInput(f"{folder / name} cannot be read ({first_line(error)}): make the artifact again") from error
    for key, tensor in tensors.items():
        _check_numbers(key, tensor, record["dtype"], folder)
    return tensors


class _Tensors:
    """The tensors that a model is filled with. A name is looked up in its block or, if that repeats another, there.

    Args:
        stored: the tensors by name.
        repeats: {block: the block whose tensors it shares}.
    """

    def __init__(self, stored: Mapping[str, torch.Tensor], repeats: Mapping[int, int]):
        self.stored, self.repeats, self.used = stored, repeats, set[str]()

    def key(self, name: str) -> str:
        """The name under which a tensor is stored."""
        if not name.startswith(BLOCKS):
            return name
        block, _, rest = name.removeprefix(BLOCKS).partition(".")
        return f"{BLOCKS}{self.repeats.get(int(block), block)}.{rest}"

    def take(self, key: str, shape: Sequence[int]) -> torch.Tensor:
        """The tensor under a key, which must be there and have this shape."""
        if key not in self.stored:
            raise BadInput(f"it lacks the weight '{key}'")
        if self.stored[key].shape != torch.Size(shape):
            raise BadInput(f"'{key}' has shape {tuple(self.stored[key].shape)}, expected {tuple(shape)}")
        self.used.add(key)
        return self.stored[key]

    def parts(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors of a linear by their names in it: {"codes": ..., ...}."""
        prefix = f"{path}."
        return {key.removeprefix(prefix): t for key, t in self.stored.items() if key.startswith(prefix)}

    def projection(self, key: str, empty: Projection, encoding: str, dtype: torch.dtype) -> Projection:
        """The projection under a key; of a dense one the weight is still empty."""
        linear, shape = base_of(empty), (empty.out_features, empty.in_features)
        if encoding != "dense":
            bias = None if empty.bias is None else self.take(f"{key}.bias", empty.bias.shape)
            linear = reader(encoding).load(StoredLinear(encoding, shape, bias, dtype, self.parts(key), key))
            self.used |= {f"{key}.{name}" for name in linear.stored}
        factors = factor_names(key)
        self.used.update(factors)
        return Adapted(linear, *map(self.stored.get, factors)) if factors[0] in self.stored else linear


def fill(
    subject: Subject,
    tensors: Mapping[str, torch.Tensor],
    encodings: Mapping[str, str],
    repeats: Mapping[int, int],
    folder: Path,
) -> None:
    """Put the tensors of a folder into a subject whose weights are empty.

    Args:
        subject: changed in place.
        tensors: by name; those of a repeated block are those of the first one.
        encodings: of projections and embeddings by path; dense where there is none.
        repeats: {block: the block whose tensors it shares}.
        folder: for messages.

    Raises:
        BadInput: a tensor that is missing, of another shape, or that the model does not have.
    """
    try:
        _fill(subject, _Tensors(tensors, repeats), encodings)
    except BadInput as error:
        raise BadInput(f"{folder} does not hold the model that its config.json describes: {error}") from error
    # the rotary embedding is computed and not stored
    model: Any = subject.model
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(next(iter(tensors.values())).device)
    model.requires_grad_(False).eval()


def _fill(subject: Subject, tensors: _Tensors, encodings: Mapping[str, str]) -> None:
    model, filled = subject.model, dict[str, Projection]()
    for path, empty in list(projection_paths(subject)):
        key = tensors.key(path)
        if key not in filled:
            filled[key] = tensors.projection(key, empty, encodings.get(key, "dense"), model.dtype)
        tensors.used.update(factor_names(path))  # an adapter has those of a repeated block once more
        replace(subject.blocks[block_of(path)], path.rpartition(".")[2], filled[key])
    quantised = [path for path in EMBEDDINGS if path in encodings]
    for path in quantised:
        rows, columns = cast(nn.Embedding, model.get_submodule(path)).weight.shape
        stored = StoredLinear(encodings[path], (rows, columns), None, model.dtype, tensors.parts(path), path)
        table = QuantisedLinear.load(stored)
        tensors.used |= {f"{path}.{name}" for name in table.stored}
        set_embedding(model, path, table)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta and name not in tied:
            parent, _, attribute = name.rpartition(".")
            tensor = tensors.take(tensors.key(name.replace(".base.", ".")), parameter.shape)
            setattr(model.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=False))
    for key in tensors.stored:
        if key not in tensors.used:
            raise BadInput(f"it holds the weight '{key}', which has no place in it")
    if not quantised:
        model.tie_weights()


def _check_numbers(key: str, tensor: torch.Tensor, dtype: str, folder: Path) -> None:
    """Raises BadInput for a tensor that is not finite or not of the artifact's dtype; a correction may have its own."""
    allowed = DTYPES.values() if ".lora_" in key or ".beside_" in key else (getattr(torch, dtype),)
    if tensor.dtype == torch.int16 and key.endswith(("scales", "minima")):
        tensor = tensor.view(torch.float16)  # stored as its bits, see `thesislib.model.quantised`
    elif tensor.is_floating_point() and tensor.dtype not in allowed:
        raise BadInput(
            f"'{key}' in {folder} is {tensor.dtype}, and {RECORD} says dtype {dtype}: make the artifact again"
        )
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise BadInput(f"'{key}' in {folder} holds NaN or infinity: make the artifact again")
