"""Low-rank corrections on disk: a LoRA adapter in PEFT's layout."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from thesislib.errors import BadInput, first_line
from thesislib.files import read_json
from thesislib.formats.tensors import projection_paths, write_tensors
from thesislib.model.layers import Adapted
from thesislib.model.subject import Subject

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTORS = ("lora_A", "lora_B")
# settings of an adapter that is plain LoRA of projections
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
}


def factor_names(path: str) -> list[str]:
    """PEFT's names for the factors A and B of a projection."""
    return [f"base_model.model.{path}.{factor}.weight" for factor in FACTORS]


def adapter_tensors(subject: Subject) -> dict[str, torch.Tensor]:
    """The factors of all corrections under PEFT's names."""
    adapted = ((path, module) for path, module in projection_paths(subject) if isinstance(module, Adapted))
    return {
        name: tensor
        for path, module in adapted
        for name, tensor in zip(factor_names(path), (module.lora_A, module.lora_B), strict=True)
    }


def write_adapter(subject: Subject, folder: Path) -> None:
    """Write the corrections as an adapter for `peft.PeftModel.from_pretrained`; nothing if there are none."""
    ranks = {path: module.rank for path, module in projection_paths(subject) if isinstance(module, Adapted)}
    if not ranks:
        return
    write_tensors(adapter_tensors(subject), folder / WEIGHTS)
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "r": usual,
        "lora_alpha": usual,  # PEFT multiplies by alpha / r, and our factors have their scale already
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf8")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The factors of a LoRA adapter under PEFT's names; its scale is multiplied into B.

    Raises:
        BadInput: an adapter other than plain LoRA of projections, or factors that cannot be read.
    """
    config = read_json(folder / CONFIG)
    for key, options in PLAIN.items():
        if config.get(key) not in options:
            raise BadInput(
                f"{folder} is an adapter with {key} = {config.get(key)!r}, which is not read here: merge it first "
                "(peft's merge_and_unload)"
            )
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder} has an {CONFIG} and no {WEIGHTS}: expected both, or neither")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{folder / WEIGHTS} cannot be read ({first_line(error)})") from error
    patterns = (config.get("alpha_pattern") or {}).items()
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        path = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        rank = tensors[key].shape[1]
        usual = config.get("lora_alpha", 8)
        alpha = next((alpha for pattern, alpha in patterns if re.fullmatch(rf"(.*\.)?({pattern})", path)), usual)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if scale != 1:
            tensors[key] = tensors[key] * scale
    return tensors
