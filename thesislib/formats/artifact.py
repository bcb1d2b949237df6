"""Artifact folders: what a compressed model is on disk, and how it comes back.

`artifact.json` says what it is (see `thesislib.formats.artifact_json`). Beside it lie
either a plain Hugging Face checkpoint, where packing would save nothing or was not asked for, or `packed.safetensors`,
in which each projection stands in its smallest encoding (see `thesislib.model.packing`) and blocks that a plan repeats
stand once. Low-rank corrections are a PEFT adapter in `adapter/`.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from thesislib.errors import BadInput, first_line, unknown
from thesislib.files import read_json, replaceable_folder, whole_folder
from thesislib.formats.artifact_json import RECORD, read_artifact, write_record
from thesislib.formats.checkpoint import (
    check_memory,
    empty_model,
    generation_settings,
    quiet_transformers,
    read_config,
    read_tensors,
)
from thesislib.model import packing
from thesislib.model.blocks import ATTRIBUTES, without_parts
from thesislib.model.layers import (
    LINEARS,
    Adapted,
    ComputedLinear,
    Projection,
    StoredLinear,
    base_of,
    projections,
    reader,
    replace,
    unpack_all,
)
from thesislib.model.quantised import EMBEDDINGS, QuantisedLinear, quantised_embeddings, set_embedding
from thesislib.model.subject import DTYPES, Subject
from thesislib.model.tokenizers import prepared, rows_of

# tensors lie in a safetensors file by type, in this order from the last to the first, then by name
TYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.float64,
    torch.int64,
)
PACKED, ADAPTER = "packed.safetensors", "adapter"
BLOCKS = "model.layers."

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
    """Write an artifact folder, whole or not at all.

    Args:
        subject: what a recipe made.
        folder: a new folder, or an artifact that this one replaces.
        stages, reports: the recipe and what each stage did, as plain data.
        base: name and fingerprint of the subject that it began with.
        label: the configuration's, e.g. "D2+W1:8"; by default the subject's name.
        packed: False writes a plain Hugging Face checkpoint in any case.

    Raises:
        BadInput: a folder that holds something else; a weight that is NaN or infinite.
    """
    folder = replaceable_folder(folder, replaces=RECORD)
    tensors, encodings = packed_tensors(subject) if packed else ({}, {})
    repeats, without = repeated_blocks(subject), _removed(subject)
    if not (packed and (repeats or without)) and all(encoding == "dense" for encoding in encodings.values()):
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
        )
        check_same(subject, load_artifact(temporary), folder)
    return folder


def packed_tensors(subject: Subject) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, encodings): the subject with each projection in its smallest encoding, or the one in which it is held.

    Tied embeddings and blocks that repeat another stand once; corrections are left out.
    """
    tensors, encodings = _others(subject), {}
    for path, module in _stored(subject):
        module = base_of(module)
        if isinstance(module, ComputedLinear) and module.encoding:
            encodings[path], own = module.encoding, module.stored
        else:
            weight = module.weight.detach()
            encodings[path] = packing.smallest(weight)
            own = packing.pack(weight, encodings[path])
        tensors |= {f"{path}.{name}": tensor for name, tensor in own.items()}
        if module.bias is not None:
            tensors[f"{path}.bias"] = module.bias.detach()
    for path, table in quantised_embeddings(subject.model):  # an embedding or a head that is quantised
        encodings[path] = table.encoding
        tensors |= {f"{path}.{name}": tensor for name, tensor in table.stored.items()}
    return tensors, encodings


def plain_tensors(subject: Subject) -> dict[str, torch.Tensor]:
    """What a plain Hugging Face checkpoint of the subject holds: repeated blocks once for each place, zeros for
    attentions and MLPs that were removed (which then add nothing), corrections left out."""
    state = {
        key: tensor for key, tensor in subject.model.state_dict().items() if not key.endswith((".lora_A", ".lora_B"))
    }
    for key, like in empty_model(subject.model.config, subject.dtype).state_dict().items():
        if key not in state:
            state[key] = torch.zeros(like.shape, dtype=like.dtype)
    if subject.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {key: tensor.detach().cpu().clone() for key, tensor in state.items()}


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A safetensors file; tensors that share memory are written each by itself."""
    path.parent.mkdir(exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"}
    )


def write_adapter(subject: Subject, folder: Path) -> None:
    """The corrections as an adapter that `peft.PeftModel.from_pretrained` loads onto the plain model; nothing if there
    are none."""
    adapted = {path: module for path, module in projection_paths(subject) if isinstance(module, Adapted)}
    if not adapted:
        return
    tensors = {}
    for path, module in adapted.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.lora_A
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.lora_B
    write_tensors(tensors, folder / "adapter_model.safetensors")
    (usual, _), *_ = Counter(module.rank for module in adapted.values()).most_common(1)
    others = {path: module.rank for path, module in adapted.items() if module.rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "r": usual,
        "lora_alpha": usual,  # alpha / r scales a correction, and ours are scaled already
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(adapted),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf8")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The factors of a LoRA adapter under PEFT's names, any scale in B.

    Raises:
        BadInput: a kind of adapter other than plain LoRA of projections, or factors that cannot be read.
    """
    said = read_json(folder / "adapter_config.json")
    neutral = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "lora_bias": (False, None),
        "fan_in_fan_out": (False, None),
        "use_dora": (False, None),
        "modules_to_save": (None, []),
        "trainable_token_indices": (None,),
        "layer_replication": (None,),
    }
    for key, options in neutral.items():
        if said.get(key) not in options:
            raise BadInput(
                f"{folder} is an adapter with {key} = {said.get(key)!r}, which is not read here: merge it first "
                "(peft's merge_and_unload)"
            )
    if not (folder / "adapter_model.safetensors").is_file():
        raise BadInput(
            f"{folder} has an adapter_config.json and no adapter_model.safetensors: expected both, or neither"
        )
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{folder / 'adapter_model.safetensors'} cannot be read ({first_line(error)})") from error
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        rank = tensors[key].shape[1]
        alphas = [
            alpha
            for pattern, alpha in (said.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?({pattern})", path)
        ]
        scale = (alphas or [said.get("lora_alpha", 8)])[0] / (math.sqrt(rank) if said.get("use_rslora") else rank)
        if scale != 1:
            tensors[key] = tensors[key] * scale
    return tensors


def check_same(written: Subject, read: Subject, where: Path) -> None:
    """Raises BadInput if what was read back is not, in every tensor and setting, the subject that was written."""
    one, two = written.model.state_dict(), read.model.state_dict()
    zeros = {
        key: tensor for key, tensor in two.items() if key not in one
    }  # where a plain checkpoint has what was removed
    differ = [key for key in one if key not in two or not torch.equal(one[key].cpu(), two[key].cpu())] + [
        key for key, tensor in zeros.items() if tensor.any()
    ]
    for name in differ[:1]:
        raise BadInput(
            f"what was written to {where.name} reads back with another '{name}': {written.name} cannot be kept "
            "in this form; nothing was written"
        )
    skip = (
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "architectures",
        "quantization_config",
        "_attn_implementation",
        "attn_implementation",
    )
    one, two = (
        {key: value for key, value in s.model.config.to_dict().items() if key not in skip} for s in (written, read)
    )
    for key in sorted(one.keys() | two.keys()):
        if _plain(one.get(key)) != _plain(two.get(key)):
            raise BadInput(
                f"what was written to {where.name} reads back with {key} = {two.get(key)!r} for "
                f"{one.get(key)!r}; nothing was written"
            )
    one, two = (s.model.generation_config.eos_token_id for s in (written, read))
    if one != two:
        raise BadInput(f"what was written to {where.name} ends texts at {two!r} for {one!r}; nothing was written")


def _plain(value: Any) -> Any:
    """A setting as JSON keeps it."""
    return json.loads(json.dumps(value, default=str))


# ---------------------------------------------------------------- sizes


def sizes(subject: Subject) -> dict[str, int]:
    """parameters: all that the model has, packed zeros too, tied and shared ones once; nonzero_parameters: those that
    are not zero; bytes_in_memory: what its tensors take, packed ones packed."""
    parameters = nonzero = 0
    held: dict[tuple, int] = {}  # by where it lies: tied and shared tensors once
    for module in subject.model.modules():
        weights = [p for p in module.parameters(recurse=False) if _place(p) not in held]
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        parameters += sum(w.numel() for w in weights)
        nonzero += sum(int(torch.count_nonzero(w)) for w in weights)
        if isinstance(module, ComputedLinear):
            parameters, nonzero = parameters + module.numel, nonzero + module.nonzero
            tensors += module.resident
        held |= {_place(tensor): tensor.nbytes for tensor in tensors}
    return {"parameters": parameters, "nonzero_parameters": nonzero, "bytes_in_memory": sum(held.values())}


def predicted_disk_bytes(subject: Subject, removed: str | float | None = None) -> int:
    """How many bytes of weights `save_artifact` writes, without packing any.

    Args:
        subject: its shapes and type count; its values only if `removed` is None.
        removed: what a width stage will remove of each projection, as its config says it: a pattern such as "2:4", or
            the share of each row. None looks at the weights.
    """
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        name: (tuple(t.shape), t.dtype) for name, t in _others(subject).items()
    }
    for path, module in _stored(subject):
        module = base_of(module)
        shape, dtype = (module.out_features, module.in_features), subject.dtype
        if removed is None and isinstance(module, ComputedLinear) and module.encoding:
            shapes |= {f"{path}.{name}": (tuple(t.shape), t.dtype) for name, t in module.stored.items()}
        else:
            if isinstance(removed, str):
                encoding, nonzero = str(packing.Pattern.parse(removed)), None
            elif removed is None:
                encoding, nonzero = packing.smallest(module.weight), int(packing.nonzero_bits(module.weight).sum())
            else:
                nonzero = shape[0] * (shape[1] - int(shape[1] * removed))
                encoding = min(("dense", "bitmap"), key=lambda e: packing.predicted_bytes(shape, dtype, e, nonzero))
            for name, packed_shape in packing.packed_shapes(shape, encoding, nonzero).items():
                shapes[f"{path}.{name}"] = (packed_shape, torch.uint8 if name in ("codes", "bitmap") else dtype)
        if module.bias is not None:
            shapes[f"{path}.bias"] = (tuple(module.bias.shape), module.bias.dtype)
    for path, table in quantised_embeddings(subject.model):
        shapes |= {f"{path}.{name}": (tuple(t.shape), t.dtype) for name, t in table.stored.items()}
    total = file_bytes(shapes)
    corrections = {}
    for path, module in projection_paths(subject):
        if isinstance(module, Adapted):
            for name in ("lora_A", "lora_B"):
                tensor = getattr(module, name)
                corrections[f"base_model.model.{path}.{name}.weight"] = (tuple(tensor.shape), tensor.dtype)
    return total + (file_bytes(corrections) if corrections else 0)


def file_bytes(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """The size of a safetensors file with tensors of these shapes and types: 8 bytes, a header of JSON, the tensors."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in sorted(shapes.items(), key=lambda item: (-TYPES.index(item[1][1]), item[0])):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        kind = {torch.bfloat16: "BF16"}.get(
            dtype, f"{'F' if dtype.is_floating_point else 'I' if dtype.is_signed else 'U'}{8 * dtype.itemsize}"
        )
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + length + -length % 8 + end


# ---------------------------------------------------------------- reading


def load_artifact(folder: str | Path, dtype: str | None = None, device: str = "cpu", packed: bool = True) -> Subject:
    """The subject that `save_artifact` wrote, after every file's checksum was found right.

    Args:
        folder: the artifact.
        dtype: 'float32' or 'bfloat16'; by default the type it was saved in, in which fingerprints agree.
        device: a torch device.
        packed: keep packed projections packed and unpack each when it is used; False unpacks all of them once.

    Raises:
        BadInput: see `read_artifact`; a type or device that cannot be used; weights that do not fit the configuration.
    """
    folder, record = Path(folder), read_artifact(folder)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    kind = getattr(torch, dtype or record["dtype"])
    config, generation = read_config(folder), generation_settings(folder)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # tokenizers has its own for a damaged file
            raise BadInput(f"the tokenizer of {folder} cannot be loaded ({first_line(error)})") from error
    files = [name for name in record["files"] if name.endswith(".safetensors")]
    check_memory(sum((folder / name).stat().st_size for name in files), folder)
    tensors = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise BadInput(f"{folder / name} cannot be read ({first_line(error)}): make the artifact again") from error
    for key, tensor in tensors.items():
        _check_numbers(key, tensor, record["dtype"], folder)
    if kind != getattr(
        torch, record["dtype"]
    ):  # else as they were saved: corrections may be of another type than the model
        tensors = {key: t.to(kind) if t.is_floating_point() else t for key, t in tensors.items()}
    try:
        tensors = {key: t.to(device) for key, t in tensors.items()}
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]}): 'cpu' always works"
        ) from error
    subject = Subject(empty_model(config, kind), tokenizer, record["name"], record["plan"] and tuple(record["plan"]))
    for part, blocks in record["without"].items():
        subject = without_parts(subject, dict.fromkeys(blocks, part))
        gone = tuple(f"{BLOCKS}{block}.{ATTRIBUTES[part]}." for block in blocks)
        tensors = {
            key: t for key, t in tensors.items() if not key.startswith(gone) or t.any()
        }  # zeros in a plain checkpoint
    try:
        fill(subject, tensors, record["encodings"], {int(i): j for i, j in record["repeats"].items()})
    except BadInput as error:
        raise BadInput(f"{folder} does not hold the model that its config.json describes: {error}") from error
    if not packed:
        unpack_all(subject.model)
    if generation is not None:
        subject.model.generation_config = generation
    prepared(tokenizer, rows_of(subject.model))
    return subject


def load_plain(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a plain checkpoint, all of it and nothing else; a LoRA adapter that lies beside the weights stays
    beside them.

    Raises:
        BadInput: see `thesislib.formats.checkpoint.read_tensors` and `read_adapter`; generation settings that cannot be
            read.
    """
    tensors = read_tensors(folder, config, dtype)
    subject = Subject(empty_model(config, dtype), None, folder.name)
    if (folder / "adapter_config.json").is_file():
        tensors |= {key: tensor.to(dtype) for key, tensor in read_adapter(folder).items()}
    try:
        fill(subject, tensors, {}, {})
    except BadInput as error:
        raise BadInput(f"{folder} does not hold the model that its config.json describes: {error}") from error
    subject.model.generation_config = generation_settings(folder) or subject.model.generation_config
    return subject.model


def fill(
    subject: Subject, tensors: Mapping[str, torch.Tensor], encodings: Mapping[str, str], repeats: Mapping[int, int]
) -> None:
    """Put tensors into a subject whose weights are empty, packed projections packed, in blocks that repeat another that
    one's.

    Raises:
        BadInput: a tensor that is missing, of another shape, or that has no place.
    """
    model = subject.model
    filled: dict[str, Projection] = {}
    used: set[str] = set()

    def source(key: str) -> str:
        """Under which name the tensor of this name is stored."""
        if key.startswith(BLOCKS):
            block, _, rest = key.removeprefix(BLOCKS).partition(".")
            return f"{BLOCKS}{repeats.get(int(block), block)}.{rest}"
        return key

    def take(key: str, shape: Sequence[int]) -> torch.Tensor:
        """The stored tensor of this name, if it has this shape."""
        if key not in tensors:
            raise BadInput(f"it lacks the weight '{key}'")
        if tensors[key].shape != torch.Size(shape):
            raise BadInput(f"'{key}' has shape {tuple(tensors[key].shape)}, expected {tuple(shape)}")
        used.add(key)
        return tensors[key]

    for path, linear in list(projection_paths(subject)):
        key = source(path)
        if key not in filled:
            layer, shape = base_of(linear), (linear.out_features, linear.in_features)
            encoding = encodings.get(key, "dense")
            if encoding != "dense":
                bias = None if linear.bias is None else take(f"{key}.bias", linear.bias.shape)
                layer = computed = reader(encoding).load(
                    StoredLinear(encoding, shape, bias, model.dtype, _parts(tensors, key), key)
                )
                used |= {f"{key}.{name}" for name in computed.stored}
            factors = [f"base_model.model.{key}.{name}.weight" for name in ("lora_A", "lora_B")]
            filled[key] = (
                layer if factors[0] not in tensors else Adapted(layer, *(tensors.get(name) for name in factors))
            )
            used.update(factors)
        replace(subject.blocks[_block(path)], path.rpartition(".")[2], filled[key])
    quantised = [path for path in EMBEDDINGS if path in encodings]
    for path in quantised:
        plain: Any = model.get_submodule(path)
        shape = plain.weight.shape[0], plain.weight.shape[1]
        table = QuantisedLinear.load(
            StoredLinear(encodings[path], shape, None, model.dtype, _parts(tensors, path), path)
        )
        used |= {f"{path}.{name}" for name in table.stored}
        set_embedding(model, path, table)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, empty in list(model.named_parameters(remove_duplicate=False)):
        if empty.is_meta and name not in tied:
            parent, _, own = name.rpartition(".")
            tensor = take(source(name.replace(".base.", ".")), empty.shape)
            setattr(model.get_submodule(parent), own, nn.Parameter(tensor, requires_grad=False))
    for key in tensors:
        if key not in used:
            raise BadInput(f"it holds the weight '{key}', which has no place in it")
    if not quantised:
        model.tie_weights()
    # these are computed and not stored
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(next(iter(tensors.values())).device)
    model.requires_grad_(False).eval()


def _check_numbers(key: str, tensor: torch.Tensor, dtype: str, folder: Path) -> None:
    """Raises BadInput for a stored tensor that is not finite, or of another type than the artifact says; corrections
    may have their own."""
    if tensor.dtype == torch.int16 and key.endswith((".scales", ".minima")):
        tensor = tensor.view(torch.float16)  # their bits, see `thesislib.model.quantised`
    elif tensor.is_floating_point() and tensor.dtype not in (
        DTYPES.values() if ".lora_" in key else (getattr(torch, dtype),)
    ):
        raise BadInput(
            f"'{key}' in {folder} is {tensor.dtype}, and {RECORD} says dtype {dtype}: make the artifact again"
        )
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise BadInput(f"'{key}' in {folder} holds NaN or infinity: make the artifact again")


def _parts(tensors: Mapping[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """What is stored under a projection's path: {"codes": ..., ...}."""
    return {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{path}.")}


# ---------------------------------------------------------------- what both directions need


def repeated_blocks(subject: Subject) -> dict[int, int]:
    """{block: an earlier block whose weights it shares}, for subjects whose plan runs a block more than once."""
    first: dict[tuple, int] = {}
    repeats = {}
    for i, block in enumerate(subject.blocks):
        same = tuple(
            (name, _place(t)) for tensors in (block.named_parameters(), block.named_buffers()) for name, t in tensors
        )
        if first.setdefault(same, i) != i:
            repeats[i] = first[same]
    return repeats


def projection_paths(subject: Subject) -> Iterator[tuple[str, Projection]]:
    """Every projection by its path in the model; those that repeat too."""
    for i, block in enumerate(subject.blocks):
        own = {id(module): module for module in projections(block).values()}
        yield from (
            (f"{BLOCKS}{i}.{path}", own[id(module)]) for path, module in block.named_modules() if id(module) in own
        )


def _stored(subject: Subject) -> Iterator[tuple[str, Projection]]:
    """The projections that a packed file holds: those of blocks that repeat no earlier one."""
    repeats = repeated_blocks(subject)
    yield from ((path, module) for path, module in projection_paths(subject) if _block(path) not in repeats)


def _block(path: str) -> int:
    """The block that a projection's path leads into."""
    return int(path.removeprefix(BLOCKS).partition(".")[0])


def _others(subject: Subject) -> dict[str, torch.Tensor]:
    """All that a packed file holds besides projections."""
    skip = {"lm_head.weight"} if subject.model.config.tie_word_embeddings else set()
    away = tuple(
        [f"{path}." for path, _ in projection_paths(subject)] + [f"{BLOCKS}{i}." for i in repeated_blocks(subject)]
    )
    found = subject.model.named_parameters(remove_duplicate=False)
    return {name: p.detach() for name, p in found if name not in skip and not name.startswith(away)}


def _removed(subject: Subject) -> dict[str, list[int]]:
    """{"attention" or "mlp": the blocks that lost theirs}."""
    found: dict[str, list[int]] = {}
    for i, block in enumerate(subject.blocks):
        for slot, part in (("self_attn", "attention"), ("mlp", "mlp")):
            if not any(name in LINEARS for name, _ in getattr(block, slot).named_children()):
                found.setdefault(part, []).append(i)
    return found


def _place(tensor: torch.Tensor) -> tuple:
    """Where a tensor lies: the same for those that share their memory."""
    return tensor.device, tensor.data_ptr(), tensor.nbytes
