"""A Hugging Face checkpoint folder, read completely.

Every tensor and setting is used, known to be harmless, or refused by name.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from thesislib.bounds import read_sizes
from thesislib.errors import BadInput, first_line
from thesislib.files import check_ordinary, read_json

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATING = ("F64", "F32", "F16", "BF16")
# rotary settings that must be positive numbers
POSITIVE = {"rope_theta", "factor", "attention_factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
POSITIVE |= {"original_max_position_embeddings"}
# Older checkpoints store the rotary frequencies, which follow from the configuration
DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
# Settings of other architectures that change the computation, with their values that change nothing. A model class that
# does not know a setting ignores it, and computes another model than the file's.
_UNSET, _ONE, _OFF, _ONE_EXPERT = (None,), (None, 1, 1.0), (None, False), (None, 0, 1)
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("attention_multiplier", "attn_logit_softcapping", "clip_qkv"), _UNSET),
    **dict.fromkeys(("final_logit_softcapping", "query_pre_attn_scalar", "scale_depth"), _UNSET),
    **dict.fromkeys(("embedding_multiplier", "logit_scale", "logits_scaling"), _ONE),
    **dict.fromkeys(("partial_rotary_factor", "residual_multiplier", "scale_emb"), _ONE),
    **dict.fromkeys(("qk_layernorm", "rope_interleaved", "use_qk_norm"), _OFF),
    **dict.fromkeys(("use_bidirectional_attention", "use_parallel_residual"), _OFF),
    **dict.fromkeys(("num_experts", "num_local_experts"), _ONE_EXPERT),
    "is_causal": (None, True),
}


class Header(NamedTuple):
    """A tensor in the header of a safetensors file.

    Args:
        file: that stores it.
        dtype: safetensors' word for its dtype, e.g. F32.
        shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a checkpoint of a supported architecture, none of whose settings is ignored.

    Raises:
        BadInput: unreadable, unsupported, or with a setting that would be ignored.
    """
    read_sizes(folder)
    check_texts(folder)
    raw = read_json(folder / "config.json")
    if raw.get("transformers_weights"):
        raise BadInput(
            f"{folder}: 'transformers_weights' names another file of weights, {raw['transformers_weights']!r}: "
            f"expected {SINGLE} or {INDEX}"
        )
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # each kind of nonsense in a configuration has its own class
            raise BadInput(f"{folder} is not a checkpoint that transformers can read ({first_line(error)})") from error
    if config.model_type not in SUPPORTED:
        raise BadInput(
            f"unsupported architecture '{config.model_type}' in {folder}: supported are {', '.join(SUPPORTED)}"
        )
    check_settings(config, raw, folder)
    return config


def check_texts(folder: Path) -> None:
    """Raises BadInput for a file of a checkpoint, other than weights, that is too large to be read as a whole."""
    for file in [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]:
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken") and file.is_file():
            check_ordinary(file)


def check_memory(size: int, model: object) -> None:
    """Raises BadInput for more bytes than this machine has, where the system would kill the process without a message.

    Args:
        size: bytes.
        model: that takes them, for the message.
    """
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise BadInput(
            f"{model} takes {size / 1e9:,.1f} GB of memory, and this machine has {memory / 1e9:,.1f}: expected a "
            "smaller model, or bfloat16"
        )


def check_settings(config: PretrainedConfig, raw: dict[str, Any], folder: Path) -> None:
    """Raises BadInput for a setting that this architecture's class would ignore, or that contradicts another.

    Args:
        config: the configuration, as transformers read it.
        raw: the object in config.json.
        folder: for the message.
    """
    known = vars(type(config)())
    unknown = {key: raw[key] for key in NEUTRAL if key in raw and key not in known}
    ignored = {key: value for key, value in unknown.items() if value not in NEUTRAL[key]}
    window, depth = raw.get("sliding_window"), config.num_hidden_layers
    if "sliding_window" not in known and window and window < config.max_position_embeddings:
        ignored["sliding_window"] = window
    for name, neutral in (("layer_types", "full_attention"), ("no_rope_layers", 1)):
        values = raw.get(name)
        if values and name not in known and set(values) != {neutral}:
            ignored[name] = values
        elif values and len(values) != depth:
            raise BadInput(
                f"{folder}: '{name}' in config.json has {len(values)} entries for {depth} blocks: expected one for each"
            )
    for key, value in ignored.items():
        raise BadInput(
            f"{folder}: config.json says {key} = {str(value)[:40]}, which {config.model_type} models ignore: "
            "another model would be measured"
        )
    rotary = getattr(config, "rope_parameters", None) or {}
    numbers = {
        "rms_norm_eps": config.rms_norm_eps,
        **{f"rope_parameters.{key}": value for key, value in rotary.items() if key in POSITIVE},
    }
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise BadInput(f"{folder}: {key} in config.json is {str(value)[:40]}: expected a positive number")
    types = set(getattr(config, "layer_types", None) or ())
    if odd := types - {"full_attention", "sliding_attention"}:
        raise BadInput(
            f"{folder}: layer type '{min(odd)}' in config.json is not known here: expected full_attention or "
            "sliding_attention"
        )
    if "sliding_attention" in types and not config.sliding_window:
        raise BadInput(
            f"{folder}: config.json has blocks of sliding_attention and no sliding_window in use: expected its "
            "number of tokens"
        )


def is_gptq(config: PretrainedConfig) -> bool:
    """Whether a checkpoint's weights are stored in GPTQ's layout, see `thesislib.formats.gptq`."""
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, dict) and settings.get("quant_method") == "gptq"


def headers(folder: Path) -> dict[str, Header]:
    """The headers of all tensors in the files that transformers would load, by name.

    The files are model.safetensors, else the shards of an index.

    Raises:
        BadInput: neither is there; a shard that is missing, damaged, or outside the folder; a tensor that its shard
            lacks.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return headers_of(single)
    if not index.is_file():
        raise BadInput(f"{folder} has neither {SINGLE} nor {INDEX}: expected a checkpoint with safetensors weights")
    raw = read_json(index)
    shards = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise BadInput(f"{index} is not an index of weights: expected 'weight_map', tensor names to files")
    stored: dict[str, Header] = {}
    for name in dict.fromkeys(shards.values()):
        if Path(name).name != name:
            raise BadInput(f"{index} names '{name}', which is not in its folder: expected the names of files beside it")
        if not (folder / name).is_file():
            raise BadInput(f"{folder} lacks the file '{name}', which its index names: the checkpoint is not whole")
        for key, header in headers_of(folder / name).items():
            if shards.get(key) == name:
                stored[key] = header
            elif key not in shards:
                raise BadInput(
                    f"{folder / name} holds '{key}', which {INDEX} does not name: the index is another checkpoint's"
                )
    for key, name in shards.items():
        if key not in stored:
            raise BadInput(
                f"{folder} lacks the weight '{key}', which its index expects in {name}: the checkpoint is not whole"
            )
    return stored


def headers_of(file: Path) -> dict[str, Header]:
    """The headers of the tensors in one safetensors file, which must end with its last tensor.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118, it is no mapping
            return {key: Header(file, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{file} cannot be read ({first_line(error)}): the checkpoint is damaged or not whole"
        ) from error


def full_name(key: str) -> str:
    """A stored tensor's name in the model: checkpoints of a decoder alone leave out its first part, "model"."""
    return f"model.{key}" if key.startswith(("layers.", "embed_tokens.", "norm.")) else key


def check_tensors(folder: Path, stored: dict[str, Header], expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Check that a checkpoint has exactly the tensors of a model.

    Args:
        folder: for the message.
        stored: see `headers`.
        expected: the shape of each tensor of the model's state dict.
        tied: whether the output embedding is the input embedding, so that one of them is enough.

    Raises:
        BadInput: a tensor that is missing, is not the model's, has another shape, or has no floating numbers.
    """
    names = [full_name(key) for key in stored]
    if len(set(names)) < len(names):
        raise BadInput(f"{folder} holds the weight '{max(names, key=names.count)}' under two names: expected each once")
    stored = dict(zip(names, stored.values(), strict=True))
    either = {HEAD, EMBEDDING} if tied and not {HEAD, EMBEDDING}.isdisjoint(stored) else set()
    for key, header in stored.items():
        if DERIVED.fullmatch(key):
            continue
        if key not in expected:
            block = re.match(r"model\.layers\.(\d+)\.", key)
            depth = 1 + max(int(name.split(".")[2]) for name in expected if name.startswith("model.layers."))
            hint = "the configuration has no place for it"
            if block and int(block[1]) >= depth:
                hint = f"config.json describes {depth} blocks; to leave blocks out, use --plan or a depth stage"
            raise BadInput(
                f"{folder} holds the weight '{key}', which would not be used ({hint}): another model would be measured"
            )
        if header.dtype not in FLOATING:
            raise BadInput(
                f"the weight '{key}' of {folder} is stored as {header.dtype}: codes of a quantised checkpoint "
                "are not weights; expected floating numbers"
            )
        if header.shape != tuple(expected[key]):
            raise BadInput(
                f"the weight '{key}' of {folder} has shape {header.shape}, and config.json describes "
                f"{tuple(expected[key])}"
            )
    for key in expected:
        if key not in stored and key not in either:
            raise BadInput(f"{folder} lacks the weight '{key}': the checkpoint is not whole")


def read_tensors(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a plain checkpoint under the names of its model's state dict.

    A head that is tied to the embedding is left out. If the configuration ties them but the file has another head,
    `config.tie_word_embeddings` is set to False: transformers keeps such a head too, and whatever writes a model goes
    by the configuration.

    Args:
        folder: the checkpoint.
        config: its configuration.
        dtype: of the result.

    Raises:
        BadInput: quantised weights; see `headers` and `check_tensors`.
    """
    if quantiser := getattr(config, "quantization_config", None):
        settings = quantiser if isinstance(quantiser, dict) else quantiser.to_dict()
        raise BadInput(
            f"{folder} holds weights quantised by '{settings.get('quant_method', 'an unnamed method')}': expected "
            "plain ones, GPTQ's (2, 3, 4 or 8 bits), a GGUF file or an artifact"
        )
    stored = headers(folder)
    empty = empty_model(config, dtype)
    expected = {key: tuple(t.shape) for key, t in empty.state_dict().items()}
    check_tensors(folder, stored, expected, bool(config.tie_word_embeddings))
    check_memory(dtype.itemsize * sum(p.numel() for p in empty.parameters()), folder)
    tensors = {}
    for file in {header.file for header in stored.values()}:
        with safe_open(file, framework="pt") as opened:
            for key in (key for key, header in stored.items() if header.file == file):
                tensors[full_name(key)] = opened.get_tensor(key)
    for key in [key for key in tensors if DERIVED.fullmatch(key)]:
        kept, computed = tensors.pop(key).float(), type(empty.model.rotary_emb)(config).inv_freq
        if kept.shape != computed.shape or not torch.allclose(kept, computed.float(), rtol=0.01):  # some have bfloat16
            raise BadInput(
                f"'{key}' in {folder} are other rotary frequencies than config.json's: another model would be measured"
            )
    if config.tie_word_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        if not torch.equal(tensors.setdefault(EMBEDDING, head), head):
            config.tie_word_embeddings, tensors[HEAD] = False, head
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, as transformers loads it.

    Raises:
        BadInput: it cannot be loaded.
    """
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # tokenizers has its own class for a damaged file
            raise BadInput(f"the tokenizer of {folder} cannot be loaded ({first_line(error)})") from error


def generation_settings(folder: Path) -> GenerationConfig | None:
    """The settings in generation_config.json; None if there is no such file.

    Raises:
        BadInput: it cannot be read.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        with quiet_transformers():
            return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # each kind of nonsense in it has its own class
        raise BadInput(f"{folder / 'generation_config.json'} cannot be read ({first_line(error)})") from error


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration on torch's meta device: its weights take no memory.

    Raises:
        BadInput: a configuration that transformers cannot make a model of.
    """
    with torch.device("meta"), quiet_transformers():
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        except Exception as error:  # each kind of nonsense in a configuration has its own class
            raise BadInput(f"no model can be made of the configuration ({first_line(error)})") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block transformers shows no progress bars and no warnings; errors are still raised."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
