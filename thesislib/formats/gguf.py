"""GGUF files: what llama.cpp runs."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from thesislib.errors import BadInput, unknown
from thesislib.files import whole_file, writable_file
from thesislib.formats.gguf_reader import ADDED, NORMALISER, NORMALISERS, PATTERNS, SPECIAL, GgufModel, halves
from thesislib.formats.tensors import plain_tensors
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
INTERLEAVED = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3)  # whose rows of q and k stand in llama.cpp's order
# texts that tell ways to cut apart: runs of spaces and lines, digits, contractions, other scripts, symbols
PROBES = (
    "The 1984 edition's   12,345 words\n\n\n  1 of them: don't, WE'LL, can’t.\t\tEnd.",
    "  naïve café, Straße, Привет мир, 你好世界, 日本語 テスト, สวัสดี",
    "def f(x_1):\r\n    return {'a': x_1**2 != 3.14e-10}  # 😀👍🏽\u200b",
    "a" * 40 + " " * 40 + "9" * 40,
    "\ufeffx\x00y\u0301",
)
RUN = 32  # weights that share a scale in Q8_0, Q4_0 and Q4_1
NORMAL, UNUSED = 1, 5  # llama.cpp's kinds of tokens, with gguf_reader's


def export_gguf(subject: Subject, file: str | Path, kind: str = "F16", *, merge_corrections: bool = False) -> Path:
    """Write a subject as a GGUF file, whole or not at all.

    Norms are float32. With Q4_0 and Q4_1 the embedding and the head are Q8_0, as llama.cpp's own files have them.
    Blocks that a plan repeats stand in the file as often as they run; attentions and MLPs that were removed are zeros.

    Args:
        subject: depth-pruned, masked, quantised or as it is. Weights that are quantised already are rounded once more,
            to the type's own grid.
        file: ends in .gguf; not there yet.
        kind: of all other matrices, one of `TYPES`. Q8_0, Q4_0 and Q4_1 round 32 neighbours of a row at a time.
        merge_corrections: add low-rank corrections to the weights, which fills the zeros of masked ones.

    Raises:
        BadInput: another type, K-quants among them; Q4_1, which has no exact zero, of pruned weights; an architecture,
            activation, position embedding or tokenizer that is not written here; rows that the type does not divide;
            corrections without `merge_corrections`; a file that is there; a file that reads back as another model.
    """
    file = Path(file)
    if kind not in TYPES:
        hint = (
            f": its runs of 256 do not divide rows such as {subject.model.config.hidden_size}"
            if "K" in kind and subject.model.config.hidden_size % 256
            else ""
        )
        raise BadInput(f"GGUF type '{kind}' cannot be written{hint}; expected {', '.join(TYPES)}")
    config = subject.model.config
    if config.model_type not in ARCHITECTURES:
        raise unknown("architecture for GGUF", config.model_type, ARCHITECTURES)
    if file.suffix != ".gguf":
        raise BadInput(f"{file} cannot be written: expected a new file whose name ends in .gguf")
    if config.hidden_act != "silu":
        raise BadInput(
            f"activation '{config.hidden_act}' cannot be written as GGUF: llama.cpp computes silu for "
            f"{config.model_type}"
        )
    file = writable_file(file, new=True)
    dense = _dense(subject, merge_corrections)
    tensors = plain_tensors(dense)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, subject.depth)
    if kind != "F16":
        odd = {name: tuple(t.shape) for name, t in tensors.items() if t.ndim == 2 and t.shape[1] % RUN}
        for name, shape in odd.items():
            raise BadInput(
                f"{name} of shape {shape} cannot be {kind}: its rows are no multiple of {RUN}; F16 always fits"
            )
    if kind == "Q4_1":
        for name, t in tensors.items():
            if "_proj" in name and (share := float((t == 0).float().mean())) > PRUNED:
                raise BadInput(
                    f"Q4_1 has no exact zero, and {share:.0%} of {name} are zeros: Q4_0, Q8_0 and F16 keep them"
                )
    digests: dict[str, tuple[torch.Size, str]] = {}
    with whole_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _describe(writer, dense, TYPES[kind])
        _tokenizer(writer, subject)
        for name, tensor in tensors.items():
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise BadInput(
                    f"tensor '{name}' has no name in GGUF's {gguf.MODEL_ARCH_NAMES[architecture]}: it cannot be written"
                )
            heads = (
                config.num_attention_heads
                if ".q_proj." in name
                else config.num_key_value_heads
                if ".k_proj." in name
                else None
            )
            turned = heads is not None and architecture in INTERLEAVED
            encoded = _encoded(own, (interleaved(tensor, heads) if turned else tensor).float().numpy(), kind)
            writer.add_tensor(own, *encoded)
            stands_for = torch.from_numpy(
                encoded[0] if len(encoded) == 1 else gguf.quants.dequantize(encoded[0], encoded[2])
            )
            digests[name] = tensor.shape, _digest(halves(stands_for, heads) if turned else stands_for)
        factors = _rotary(writer, dense)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_read_back(temporary, dense, digests)
    return file


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k in llama.cpp's order: it rotates neighbours (2i, 2i + 1) where transformers rotates (i, i +
    half)."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _dense(subject: Subject, merge_corrections: bool) -> Subject:
    """A copy with plain linears."""
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
    _windows(writer, c)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rotary(writer: gguf.GGUFWriter, subject: Subject) -> np.ndarray | None:
    """Write what rotates how fast; what each rotation's wavelength is multiplied by, where the file keeps that as a
    tensor."""
    c, arch = subject.model.config, writer.arch
    said, rotary = c.rope_parameters, subject.model.model.rotary_emb
    kind, usual = (
        said.get("rope_type", "default"),
        {"rope_theta", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"},
    )
    writer.add_rope_freq_base(float(said["rope_theta"]))
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(said["factor"]))
        return None
    # llama.cpp has numbers of its own for YaRN, which are these
    if kind == "yarn" and set(said) <= usual and (said.get("beta_fast") or 32, said.get("beta_slow") or 1) == (32, 1):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(said["factor"]))
        writer.add_rope_scaling_orig_ctx_len(
            int(said.get("original_max_position_embeddings") or c.max_position_embeddings)
        )
        return None
    fixed = kind == "llama3" or (kind == "longrope" and said["short_factor"] == said["long_factor"])
    if not fixed or rotary.attention_scaling != 1 or arch != "llama":
        raise BadInput(
            f"position embedding '{kind}' of {c.model_type} cannot be written as GGUF here: expected default, "
            "linear or yarn, or with LLaMA llama3"
        )
    used = rotary.original_inv_freq.float().cpu()
    steps = torch.arange(0, 2 * len(used), 2, dtype=torch.float32) / (2 * len(used))
    return (float(said["rope_theta"]) ** -steps / used).numpy()


def _windows(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write how far blocks look back, which llama.cpp ignores for these architectures, and say so."""
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
    """Raises BadInput if a file is not the model that was written: its tensors, what is computed with them, its
    tokenizer."""
    model = GgufModel(file)
    tokenizer, own, read = model.tokenizer(), subject.model.config, model.config
    for name, tensor in model.tensors({name: shape for name, (shape, _) in digests.items()}):
        if _digest(tensor) != digests[name][1]:
            raise BadInput(f"'{name}' reads back as other numbers than were written: {file.name} was not kept")
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "no_rope_layers",
    )
    one, two = ({name: getattr(c, name, None) for name in names} for c in (own, read))
    reach = own.max_position_embeddings
    one["attention windows"], two["attention windows"] = (
        [w if w and w < reach else None for w in attention_windows(c)] for c in (own, read)
    )
    rotary = type(subject.model.model.rotary_emb)
    a, b = rotary(own), rotary(read)
    if (
        not torch.allclose(a.inv_freq.double(), b.inv_freq.double(), rtol=1e-5, atol=0)
        or abs(a.attention_scaling / b.attention_scaling - 1) > 1e-5
    ):
        raise BadInput(f"the rotary frequencies read back as others than were written: {file.name} was not kept")
    ends = [
        c.eos_token_id if isinstance(c.eos_token_id, list) else [c.eos_token_id]
        for c in (subject.model.generation_config, model.generation)
    ]
    one["end tokens"], two["end tokens"] = (sorted(e for e in some if e is not None) for some in ends)
    one["chat template"], two["chat template"] = subject.tokenizer.chat_template, tokenizer.chat_template
    for what in one:
        if one[what] != two[what]:
            raise BadInput(
                f"{what} would read back as {str(two[what])[:60]!r} for {str(one[what])[:60]!r}: GGUF has no "
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


def _digest(tensor: torch.Tensor) -> str:
    """Of a tensor's numbers in float32."""
    return hashlib.sha256(tensor.float().contiguous().numpy().data).hexdigest()


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
    writer.add_string(
        NORMALISER, normaliser
    )  # llama.cpp has none: text that is not in this form becomes other tokens there
    size = subject.model.config.vocab_size
    most = max([*raw["model"]["vocab"].values(), *(added["id"] for added in raw["added_tokens"])])
    if most >= size:
        raise BadInput(
            f"the tokenizer of {subject.name} has a token {most}, its embedding only {size} rows: expected a "
            "tokenizer that fits the model"
        )
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
    ends = end_tokens(subject)
    # llama.cpp knows an end of the text, of a turn and of a message
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
    if kinds == ["Split", "ByteLevel"]:
        for name, text in PATTERNS.items():
            if steps[0]["pattern"].get("Regex") == text:
                return name
    raise BadInput(
        f"the tokenizer cuts text by {', '.join(kinds)} in a way not known here: expected GPT-2's, SmolLM's, "
        "LLaMA 3's or Qwen 2's"
    )
