"""GGUF files: what llama.cpp runs."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from thesislib.compress.gptq import PRUNED
from thesislib.errors import BadInput, unknown
from thesislib.files import free_file, whole_file
from thesislib.formats import plain_tensors
from thesislib.layers import Adapted, merge, replace, unpack_all
from thesislib.subject import Subject

TYPES = {
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
RUN = 32  # weights that share a scale in Q8_0, Q4_0 and Q4_1
SPECIAL, ADDED, NORMAL, UNUSED = 3, 4, 1, 5  # llama.cpp's kinds of tokens
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}  # how a text is cut, whole: other models differ by a letter


def export_gguf(subject: Subject, file: str | Path, kind: str = "F16", *, merge_corrections: bool = False) -> Path:
    """Write a subject as a GGUF file, whole or not at all.

    Norms are float32. With Q4_0 and Q4_1 the embedding and the head are Q8_0, as llama.cpp's own files have them. Blocks that a plan
    repeats stand in the file as often as they run; attentions and MLPs that were removed are zeros.

    Args:
        subject: depth-pruned, masked, quantised or as it is. Weights that are quantised already are rounded once more, to the type's own grid.
        file: ends in .gguf; not there yet.
        kind: of all other matrices, one of `TYPES`. Q8_0, Q4_0 and Q4_1 round 32 neighbours of a row at a time.
        merge_corrections: add low-rank corrections to the weights, which fills the zeros of masked ones.

    Raises:
        BadInput: another type, K-quants among them; Q4_1, which has no exact zero, of pruned weights; an architecture, position
            embedding or tokenizer that is not written here;
            rows that the type does not divide; corrections without `merge_corrections`; a file that is there.
    """
    file = Path(file)
    if kind not in TYPES:
        hint = (
            f": its runs of 256 do not divide rows such as {subject.model.config.hidden_size}" if "K" in kind and subject.model.config.hidden_size % 256 else ""
        )
        raise BadInput(f"GGUF type '{kind}' cannot be written{hint}; expected {', '.join(TYPES)}")
    config = subject.model.config
    if config.model_type not in ARCHITECTURES:
        raise unknown("architecture for GGUF", config.model_type, ARCHITECTURES)
    if file.suffix != ".gguf":
        raise BadInput(f"{file} cannot be written: expected a new file whose name ends in .gguf")
    file = free_file(file, new=True)
    dense = _dense(subject, merge_corrections)
    tensors = plain_tensors(dense)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, subject.depth)
    if kind != "F16":
        odd = {name: tuple(t.shape) for name, t in tensors.items() if t.ndim == 2 and t.shape[1] % RUN}
        for name, shape in odd.items():
            raise BadInput(f"{name} of shape {shape} cannot be {kind}: its rows are no multiple of {RUN}; F16 always fits")
    if kind == "Q4_1":
        for name, t in tensors.items():
            if "_proj" in name and (share := float((t == 0).float().mean())) > PRUNED:
                raise BadInput(f"Q4_1 has no exact zero, and {share:.0%} of {name} are zeros: Q4_0, Q8_0 and F16 keep them")
    with whole_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _describe(writer, dense, TYPES[kind])
        _tokenizer(writer, subject)
        for name, tensor in tensors.items():
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise BadInput(f"tensor '{name}' has no name in GGUF's {gguf.MODEL_ARCH_NAMES[architecture]}: it cannot be written")
            if architecture == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
                tensor = interleaved(tensor, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
            writer.add_tensor(own, *_encoded(own, tensor.float().numpy(), kind))
        factors = _rotary_factors(dense)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k in llama.cpp's order: it rotates neighbours (2i, 2i + 1) where transformers rotates (i, i + half)."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _dense(subject: Subject, merge_corrections: bool) -> Subject:
    """A copy with plain linears."""
    result = dataclasses.replace(subject, model=unpack_all(copy.deepcopy(subject.model)))
    for i in range(result.depth):
        for name, module in result.linears(i).items():
            if isinstance(module, Adapted):
                if not merge_corrections:
                    raise BadInput(f"block {i}'s {name} has a low-rank correction beside its weight, which GGUF cannot hold: add --merge, which fills zeros")
                replace(result.blocks[i], name, merge(module))
    return result


def _describe(writer: gguf.GGUFWriter, subject: Subject, file_type: gguf.LlamaFileType) -> None:
    """What the model is."""
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
    writer.add_rope_freq_base(float(c.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rotary_factors(subject: Subject) -> np.ndarray | None:
    """What each rotation's wavelength is multiplied by, where that is not 1 (Llama 3's scaling)."""
    c = subject.model.config
    kind = c.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadInput(f"position embedding '{kind}' cannot be written as GGUF here: expected default or llama3")
    used = subject.model.model.rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(0, 2 * len(used), 2, dtype=torch.float32) / (2 * len(used))
    return (float(c.rope_parameters["rope_theta"]) ** -steps / used).numpy()


def _encoded(name: str, weight: np.ndarray, kind: str) -> tuple:
    """A tensor's numbers as the file keeps them: (array, shape or None, type)."""
    if weight.ndim == 1:
        return (weight,)
    if kind.startswith("Q4") and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    encoding = gguf.GGMLQuantizationType[kind]
    return gguf.quants.quantize(weight, encoding), None, encoding


def _tokenizer(writer: gguf.GGUFWriter, subject: Subject) -> None:
    """Tokens, merges and what begins and ends a text; byte-level BPE only, which all models here have."""
    tokenizer = subject.tokenizer
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(raw["pre_tokenizer"]):
        raise BadInput(f"the tokenizer of {subject.name} cannot be written as GGUF here: expected byte-level BPE, as LLaMA 3, Qwen and SmolLM have")
    size = subject.model.config.vocab_size
    most = max([*raw["model"]["vocab"].values(), *(added["id"] for added in raw["added_tokens"])])
    if most >= size:
        raise BadInput(f"the tokenizer of {subject.name} has a token {most}, its embedding only {size} rows: expected a tokenizer that fits the model")
    tokens, kinds = [f"[UNUSED{i}]" for i in range(size)], [UNUSED] * size
    for token, i in raw["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], SPECIAL if added["special"] else ADDED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(raw["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]])
    writer.add_add_bos_token(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(raw: dict[str, Any]) -> str:
    """llama.cpp's name for how a text is cut before it is merged, by what a tokenizer.json says of it.

    Raises:
        BadInput: another way than those of GPT-2, SmolLM, LLaMA 3 and Qwen 2.
    """
    steps = raw.get("pretokenizers", [raw])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and (found := steps[0]["pattern"].get("Regex")) in PATTERNS:
        return PATTERNS[found]
    raise BadInput(f"the tokenizer cuts text by {', '.join(kinds)} in a way not known here: expected GPT-2's, SmolLM's, LLaMA 3's or Qwen 2's")
