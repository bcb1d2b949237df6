"""Writing a subject as a GGUF file, the format of llama.cpp."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from thesislib.errors import BadInput, unknown
from thesislib.files import whole_file, writable_file
from thesislib.formats.gguf_reader import (
    ADDED,
    NORMALISER,
    NORMALISERS,
    PATTERNS,
    SPECIAL,
    GgufModel,
    halves,
    rotated_heads,
)
from thesislib.formats.tensors import plain_tensors
from thesislib.model.beside import check_no_path
from thesislib.model.forward import attention_windows
from thesislib.model.layers import Adapted, merge_all
from thesislib.model.packing import PRUNED
from thesislib.model.prompts import end_tokens
from thesislib.model.subject import Subject

TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
INTERLEAVED = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3)  # their rows of q and k are in llama.cpp's own order
# texts that pre-tokenizers cut differently: runs of spaces and lines, digits, contractions, other scripts, symbols
PROBES = (
    "The 1984 edition's   12,345 words\n\n\n  1 of them: don't, WE'LL, can’t.\t\tEnd.",
    "  naïve café, Straße, Привет мир, 你好世界, 日本語 テスト, สวัสดี",
    "def f(x_1):\r\n    return {'a': x_1**2 != 3.14e-10}  # 😀👍🏽\u200b",
    "a" * 40 + " " * 40 + "9" * 40,
    "\ufeffx\x00y\u0301",
)
RUN = 32  # weights that share a scale in Q8_0, Q4_0 and Q4_1
NORMAL, UNUSED = 1, 5  # llama.cpp's types of tokens, with gguf_reader's
# settings that must read back as they were written
COMPARED: tuple[str, ...] = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
COMPARED += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "no_rope_layers")


def export_gguf(subject: Subject, file: str | Path, kind: str = "F16", *, merge_corrections: bool = False) -> Path:
    """Write a subject as a GGUF file, as a whole or not at all.

    Norms are float32. With Q4_0 and Q4_1 the embedding and the head are Q8_0, as in llama.cpp's own files. A repeated
    block is written each time; attentions and MLPs that were removed are zeros.

    Args:
        subject: quantised weights of it are rounded once more, to the grid of `kind`.
        file: a new file whose name ends in .gguf.
        kind: the GGUF type of all other matrices, one of `TYPES`. Q8_0, Q4_0 and Q4_1 have a scale for each 32
            neighbours in a row.
        merge_corrections: add low-rank corrections to the weights, which fills the zeros of masked ones.

    Raises:
        BadInput: another type, such as a K-quant; Q4_1, which has no exact zero, of pruned weights; an architecture,
            activation, position embedding or tokenizer that is not written here; rows that are no multiple of 32;
            corrections without `merge_corrections`; a linear path beside an MLP; a file that exists; a file that reads
            back as another model.
    """
    file, config = Path(file), subject.model.config
    _check_writable(config, file, kind)
    check_no_path(subject, "a GGUF file")
    file = writable_file(file, new=True)
    dense = _dense(subject, merge_corrections)
    tensors = plain_tensors(dense)
    _check_types(tensors, kind)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, subject.depth)
    digests: dict[str, tuple[torch.Size, str]] = {}
    with whole_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _describe(writer, dense, TYPES[kind])
        _tokenizer(writer, subject)
        for name, tensor in tensors.items():
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise BadInput(
                    f"tensor '{name}' has no name in GGUF's {gguf.MODEL_ARCH_NAMES[architecture]}: it cannot be written"
                )
            heads = rotated_heads(name, config) if architecture in INTERLEAVED else None
            encoded = _encoded(gguf_name, (interleaved(tensor, heads) if heads else tensor).float().numpy(), kind)
            writer.add_tensor(gguf_name, *encoded)
            decoded = encoded[0] if len(encoded) == 1 else gguf.quants.dequantize(encoded[0], encoded[2])
            values = torch.from_numpy(decoded)
            digests[name] = tensor.shape, _digest(halves(values, heads) if heads else values)
        factors = _rotary(writer, dense)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_read_back(temporary, dense, digests)
    return file


def _check_writable(config: Any, file: Path, kind: str) -> None:
    """Raises BadInput for a GGUF type, an architecture, an activation or a file's name that cannot be written."""
    if kind not in TYPES:
        hint = ""
        if "K" in kind and config.hidden_size % 256:
            hint = f": its runs of 256 do not divide rows such as {config.hidden_size}"
        raise BadInput(f"GGUF type '{kind}' cannot be written{hint}; expected {', '.join(TYPES)}")
    if config.model_type not in ARCHITECTURES:
        raise unknown("architecture for GGUF", config.model_type, ARCHITECTURES)
    if file.suffix != ".gguf":
        raise BadInput(f"{file} cannot be written: expected a new file whose name ends in .gguf")
    if config.hidden_act != "silu":
        raise BadInput(
            f"activation '{config.hidden_act}' cannot be written as GGUF: llama.cpp computes silu for "
            f"{config.model_type}"
        )


def _check_types(tensors: Mapping[str, torch.Tensor], kind: str) -> None:
    """Raises BadInput for a tensor that a GGUF type cannot hold: of other rows, or of pruned weights in Q4_1."""
    for name, t in tensors.items():
        if kind != "F16" and t.ndim == 2 and t.shape[1] % RUN:
            raise BadInput(
                f"{name} of shape {tuple(t.shape)} cannot be {kind}: its rows are no multiple of {RUN}; F16 always fits"
            )
    for name, t in tensors.items():
        if kind == "Q4_1" and "_proj" in name and (share := float((t == 0).float().mean())) > PRUNED:
            raise BadInput(f"Q4_1 has no exact zero, and {share:.0%} of {name} are zeros: Q4_0, Q8_0 and F16 keep them")


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k in llama.cpp's order; `thesislib.formats.gguf_reader.halves` is the inverse.

    llama.cpp rotates rows (2i, 2i + 1) of a head together, transformers rotates rows (i, i + half).
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _dense(subject: Subject, merge_corrections: bool) -> Subject:
    """A copy whose linears are all dense."""
    for i in range(subject.depth):
        for name, module in subject.linears(i).items():
            if isinstance(module, Adapted) and not merge_corrections:
                raise BadInput(
                    f"block {i}'s {name} has a low-rank correction beside its weight, which GGUF cannot hold: "
                    "add --merge, which fills zeros"
                )
    result = subject.copy()
    merge_all(result.model, "dense")
    return result


def _describe(writer: gguf.GGUFWriter, subject: Subject, file_type: gguf.LlamaFileType) -> None:
    """Write the model's settings."""
    c = subject.model.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(subject.name)
    writer.add_block_count(subject.depth)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    _windows(writer, c)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rotary(writer: gguf.GGUFWriter, subject: Subject) -> np.ndarray | None:
    """Write the settings of the rotary position embedding.

    Returns:
        For scalings that GGUF keeps as a tensor, the factor of each rotation's wavelength; else None.
    """
    c, settings, rotary = subject.model.config, subject.model.config.rope_parameters, subject.model.model.rotary_emb
    scaling = settings.get("rope_type", "default")
    writer.add_rope_freq_base(float(settings["rope_theta"]))
    if scaling == "default":
        return None
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(settings["factor"]))
        return None
    # llama.cpp always takes 32 and 1 for YaRN's betas
    usual = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    betas = (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1)
    if scaling == "yarn" and set(settings) <= usual and betas == (32, 1):
        context = settings.get("original_max_position_embeddings") or c.max_position_embeddings
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(settings["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(context))
        return None
    fixed = scaling == "llama3" or (scaling == "longrope" and settings["short_factor"] == settings["long_factor"])
    if not fixed or rotary.attention_scaling != 1 or writer.arch != "llama":
        raise BadInput(
            f"position embedding '{scaling}' of {c.model_type} cannot be written as GGUF here: expected default, "
            "linear or yarn, or with LLaMA llama3"
        )
    frequencies = rotary.original_inv_freq.float().cpu()
    steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    return (float(settings["rope_theta"]) ** -steps / frequencies).numpy()


def _windows(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the sliding window, with a warning, since llama.cpp ignores it for these architectures."""
    windows = attention_windows(config)
    narrow = set(windows) - {None}
    if not narrow or config.max_position_embeddings <= min(narrow):
        return
    if config.model_type == "smollm3":
        raise BadInput(
            "attention windows of smollm3 cannot be written as GGUF: expected attention to all tokens before"
        )
    (window,) = narrow
    writer.add_sliding_window(window)
    if None in windows:
        writer.add_sliding_window_pattern([w is not None for w in windows])
    print(
        f"llama.cpp does not cut {config.model_type}'s attention to {window} tokens: longer contexts run as "
        "another model there",
        file=sys.stderr,
    )


def _check_read_back(file: Path, subject: Subject, digests: dict[str, tuple[torch.Size, str]]) -> None:
    """Raises BadInput if a file reads back with other tensors, settings or another tokenizer than were written."""
    model = GgufModel(file)
    tokenizer, config, read = model.tokenizer(), subject.model.config, model.config
    for name, tensor in model.tensors({name: shape for name, (shape, _) in digests.items()}):
        if _digest(tensor) != digests[name][1]:
            raise BadInput(f"'{name}' reads back as other numbers than were written: {file.name} was not kept")
    rotary = type(subject.model.model.rotary_emb)
    a, b = rotary(config), rotary(read)
    same = torch.allclose(a.inv_freq.double(), b.inv_freq.double(), rtol=1e-5, atol=0)
    if not same or abs(a.attention_scaling / b.attention_scaling - 1) > 1e-5:
        raise BadInput(f"the rotary frequencies read back as others than were written: {file.name} was not kept")
    written = _compared(config, subject.model.generation_config, subject.tokenizer, config.max_position_embeddings)
    again = _compared(read, model.generation, tokenizer, config.max_position_embeddings)
    for key, value in written.items():
        if value != again[key]:
            raise BadInput(
                f"{key} would read back as {str(again[key])[:60]!r} for {str(value)[:60]!r}: GGUF has no "
                "place for it, so nothing was written"
            )
    special = [str(subject.tokenizer.convert_ids_to_tokens(i)) for i in subject.tokenizer.all_special_ids]
    for text in [*PROBES, "".join(special), " and ".join(special)]:
        a, b = (t(text)["input_ids"] for t in (subject.tokenizer, tokenizer))
        if a != b:
            raise BadInput(
                f"the tokenizer of {subject.name} cannot be written as GGUF: {text!r} would become {b[:12]} for "
                f"{a[:12]}"
            )


def _compared(config: Any, generation: Any, tokenizer: Any, context: int) -> dict[str, Any]:
    """The settings that must read back as they were written; a window as long as the context is none."""
    eos = generation.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    return {name: getattr(config, name, None) for name in COMPARED} | {
        "attention windows": [w if w and w < context else None for w in attention_windows(config)],
        "end tokens": sorted(token for token in ends if token is not None),
        "chat template": tokenizer.chat_template,
    }


def _digest(tensor: torch.Tensor) -> str:
    """The sha256 of a tensor's numbers in float32."""
    return hashlib.sha256(tensor.float().contiguous().numpy().data).hexdigest()


def _encoded(name: str, weight: np.ndarray, kind: str) -> tuple:
    """A tensor in the encoding of the file, as arguments of `add_tensor`: (array, shape or None, type)."""
    if weight.ndim == 1:
        return (weight,)
    if kind.startswith("Q4") and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    encoding = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(weight, encoding), None, encoding


def _tokenizer(writer: gguf.GGUFWriter, subject: Subject) -> None:
    """Write the tokenizer, which must be byte-level BPE."""
    raw = json.loads(subject.tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(raw["pre_tokenizer"]):
        raise BadInput(
            f"the tokenizer of {subject.name} cannot be written as GGUF here: expected byte-level BPE, as LLaMA "
            "3, Qwen and SmolLM have"
        )
    normaliser = (raw["normalizer"] or {"type": "none"})["type"]
    if normaliser not in NORMALISERS:
        raise BadInput(
            f"the tokenizer of {subject.name} cannot be written as GGUF here: it normalises text by "
            f"{normaliser}; expected {' or '.join(NORMALISERS)}"
        )
    writer.add_string(NORMALISER, normaliser)  # llama.cpp has none: it makes other tokens of text in another form
    size = subject.model.config.vocab_size
    most = max([*raw["model"]["vocab"].values(), *(added["id"] for added in raw["added_tokens"])])
    if most >= size:
        raise BadInput(
            f"the tokenizer of {subject.name} has a token {most}, its embedding only {size} rows: expected a "
            "tokenizer that fits the model"
        )
    tokens, types = [f"[UNUSED{i}]" for i in range(size)], [UNUSED] * size
    for token, i in raw["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], SPECIAL if added["special"] else ADDED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(raw["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]])
    _special_tokens(writer, subject)


def _special_tokens(writer: gguf.GGUFWriter, subject: Subject) -> None:
    """Write the tokens that begin and end a text, and the chat templates."""
    tokenizer = subject.tokenizer
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    ends = end_tokens(subject)
    # llama.cpp has an end of the text, of a turn and of a message
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in ends or not ends else ends[0]
    if len(ends) > 3:
        raise BadInput(f"{subject.name} ends its answers at {len(ends)} tokens: GGUF has a place for 3")
    for name, token in zip(("eos", "eot", "eom"), [eos, *(token for token in ends if token != eos)], strict=False):
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    for name in ("bos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if isinstance(tokenizer.chat_template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in tokenizer.chat_template.items()])
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(raw: dict[str, Any]) -> str:
    """llama.cpp's name for a pre-tokenizer, which cuts a text before tokens are merged.

    Args:
        raw: the pre_tokenizer of a tokenizer.json.

    Raises:
        BadInput: another one than GPT-2's, SmolLM's, LLaMA 3's or Qwen 2's.
    """
    steps = raw.get("pretokenizers", [raw])
    types = [step["type"] for step in steps]
    if types == ["ByteLevel"]:
        return "gpt-2"
    if types == ["Digits", "ByteLevel"]:
        return "smollm"
    if types == ["Split", "ByteLevel"]:
        for name, text in PATTERNS.items():
            if steps[0]["pattern"].get("Regex") == text:
                return name
    raise BadInput(
        f"the tokenizer cuts text by {', '.join(types)} in a way not known here: expected GPT-2's, SmolLM's, "
        "LLaMA 3's or Qwen 2's"
    )
