"""A GGUF file read as a Hugging Face model: every setting and tensor is used, known to be harmless, or refused by name.

transformers reads GGUF too, but makes up the weights that a file lacks, and drops rotary factors, biases, attention
windows, wide heads and the way in which the tokenizer cuts text.
"""

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from thesislib.bounds import check_sizes
from thesislib.errors import BadInput, unknown
from thesislib.files import LARGEST, plain_errors
from thesislib.formats.checkpoint import check_memory

# GGUF's word for an architecture: transformers' word, and whether rows of q and k stand in llama.cpp's order
ARCHITECTURES = {
    "llama": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
}
SPECIAL, ADDED = 3, 4  # llama.cpp's kinds of tokens that are cut out of a text before it is merged
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}  # how a text is cut before it is merged
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
# a setting of our own: GGUF has no place for it, and Qwen's tokenizers, which have the form NFC, are written without it
# elsewhere
NORMALISER, NORMALISERS = "thesislib.tokenizer.normaliser", {"none": None, "NFC": normalizers.NFC()}
HARMLESS = re.compile(
    r"GGUF\..*|general\.(?!type$).*|split\..*|quantize\.imatrix\..*|tokenizer\.ggml\.(scores|(unknown|separator|mask|cls|fim_\w+|prefix|suffix|middle)_token_id)"
    r"|\w+\.(vocab_size|tensor_data_layout|rope\.scaling\.finetuned)"
)
WIDTHS = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1))) | {
    10: 8,
    11: 8,
    12: 8,
}  # bytes of GGUF's kinds of values, texts and lists apart
MOST_NAMES = 1 << 16  # tensors, or settings
MOST_ELEMENTS = 1 << 22  # of all lists in a header: several times those of the largest tokenizer
SLACK = 1 << 20  # bytes that alignment may add
PART = re.compile(r"-(\d{5})-of-(\d{5})$")  # how a part's name ends
NEUTRAL = {
    "tokenizer.ggml.add_sep_token": False,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "general.type": "model",
}


def parts(path: Path) -> list[Path]:
    """The files of a model that llama.cpp's gguf-split cut into several, in order; the file alone for one that is
    whole.

    Raises:
        BadInput: a part that is not there, or a part under another name than NAME-00001-of-00003.gguf.
    """
    return list(_readers(path))


def _readers(path: Path) -> dict[Path, gguf.GGUFReader]:
    """The same files, open; each is read once, since a vocabulary takes seconds."""
    check_header(path)
    reader = _reader(path)
    count = int(_Fields(reader).get("split.count", 1))
    if count <= 1:
        return {path: reader}
    match = PART.search(path.stem)
    if not match or int(match[2]) != count:
        raise BadInput(
            f"{path.name} is one of {count} parts of a model: expected the name NAME-00001-of-{count:05d}.gguf, "
            "and the others beside it"
        )
    files = [path.with_name(f"{path.stem[: match.start()]}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise BadInput(
                f"{path.name} is one of {count} parts of a model, and {file.name} is not beside it: the model is "
                "not whole"
            )
        check_header(file)
    return {file: reader if file == path else _reader(file) for file in files}


@dataclass
class GgufModel:
    """A model in one or several GGUF files.

    Attributes:
        path: the file, or the first of its parts.
        files: all parts.

    Raises:
        BadInput: no GGUF, truncated, an architecture that is not read here.
    """

    path: Path
    files: list[Path] = field(init=False)

    def __post_init__(self):
        opened = _readers(self.path)
        self.files, readers = list(opened), list(opened.values())
        self.fields = _Fields(*readers)
        self.stored = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        name = self.fields.take("general.architecture")
        if name not in ARCHITECTURES:
            raise unknown("architecture of a GGUF file", name, ARCHITECTURES)
        self.architecture, (self.model_type, self.interleaved) = name, ARCHITECTURES[name]

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration that computes what the file says.

        Raises:
            BadInput: a setting that is missing, or that no configuration here has a place for.
        """
        take = lambda key, default=None: self.fields.take(f"{self.architecture}.{key}", default)  # noqa: E731
        depth, hidden, heads = (
            _whole(key, take(key)) for key in ("block_count", "embedding_length", "attention.head_count")
        )
        kv_heads = _whole("attention.head_count_kv", take("attention.head_count_kv", heads))
        head = take("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (found := take(key, head)) != head:
                raise BadInput(
                    f"{self.path.name}: {self.architecture}.{key} is {found}: expected the width of a head, {head}"
                )
        if "token_embd.weight" not in self.stored:
            raise BadInput(f"{self.path.name} lacks the weight 'token_embd.weight': the model is not whole")
        context = _whole("context_length", take("context_length"))
        settings = {
            "num_hidden_layers": depth,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "intermediate_size": _whole("feed_forward_length", take("feed_forward_length")),
            "max_position_embeddings": context,
            "rms_norm_eps": float(
                f"{take('attention.layer_norm_rms_epsilon'):.6g}"
            ),  # GGUF has it in float32: 9.999999747e-06
            "vocab_size": int(self.stored["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in self.stored,
            "rope_parameters": self._rotary(take, context),
            "dtype": torch.float32,
        }
        for kind in ("bos", "eos", "padding"):
            settings[f"{kind.removesuffix('ding')}_token_id"] = self.fields.get(f"tokenizer.ggml.{kind}_token_id")
        kind = self.model_type
        if window := take("attention.sliding_window"):
            pattern = list(take("attention.sliding_window_pattern", [True] * depth))
            if kind == "llama" and all(pattern):
                kind = "mistral"
            elif kind not in ("qwen2", "qwen3") or len(pattern) != depth:
                raise BadInput(
                    f"{self.path.name}: {self.architecture} with attention windows in {sum(pattern)} of {depth} "
                    "blocks is not known here"
                )
            settings["sliding_window"] = window
            if kind != "mistral":
                settings["use_sliding_window"] = True
                settings["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        if kind == "llama":
            settings |= {
                "attention_bias": "blk.0.attn_q.bias" in self.stored,
                "mlp_bias": "blk.0.ffn_up.bias" in self.stored,
            }
        elif kind == "qwen3":
            settings["attention_bias"] = "blk.0.attn_q.bias" in self.stored
        left = [key for key in self.fields.left if key.startswith(f"{self.architecture}.")]
        for key in left:
            raise BadInput(
                f"{self.path.name} says {key} = {self.fields.get(key)!r}, which {kind} has no place for here: "
                "another model would be measured"
            )
        check_sizes(settings, self.path.name)
        return CONFIG_MAPPING[kind](**settings)

    def _rotary(self, take, context: int) -> dict[str, Any]:
        """What rotates how fast: plain, scaled by one number, by YaRN, or by a factor for each frequency (Llama
        3's)."""
        rotary = {"rope_type": "default", "rope_theta": float(take("rope.freq_base", 10000.0))}
        factor = float(take("rope.scaling.factor", take("rope.scale_linear", 1.0)) or 1.0)
        kind = take("rope.scaling.type", "linear")  # llama.cpp's default
        original = take("rope.scaling.original_context_length")
        if kind == "yarn":
            rotary |= {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": int(original or context),
            }
        elif kind not in ("none", "linear"):
            raise BadInput(
                f"{self.path.name}: rotary scaling '{kind}' is not read here: expected none, linear, yarn or "
                "rope_freqs.weight"
            )
        elif kind == "linear" and factor != 1.0:
            rotary |= {"rope_type": "linear", "factor": factor}
        if "rope_freqs.weight" in self.stored:
            if rotary["rope_type"] != "default":
                raise BadInput(
                    f"{self.path.name} has rope_freqs.weight and scaling '{rotary['rope_type']}': expected one "
                    "of the two"
                )
            factors = self._numbers("rope_freqs.weight").double().tolist()
            # the one kind that takes any factors; with no longer context there is nothing to switch to
            rotary |= {
                "rope_type": "longrope",
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": context,
            }
        return rotary

    def tensors(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a model, float32, under transformers' names.

        Args:
            shapes: the name and shape of each that the model has.

        Raises:
            BadInput: one that is missing, of another shape or of a type that gguf cannot decode, or one that the model
                has no place for.
        """
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.config.num_hidden_layers)
        used = {"rope_freqs.weight"}
        for name, shape in shapes.items():
            own = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if own not in self.stored:
                raise BadInput(f"{self.path.name} lacks the weight '{own}' ({name}): the model is not whole")
            used.add(own)
            tensor = self._numbers(own)
            if tensor.shape != shape:
                raise BadInput(f"{self.path.name}: '{own}' has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
            if self.interleaved and ("q_proj" in name or "k_proj" in name):
                tensor = halves(
                    tensor, self.config.num_attention_heads if "q_proj" in name else self.config.num_key_value_heads
                )
            yield name, tensor
        for own in self.stored:
            if own not in used:
                raise BadInput(
                    f"{self.path.name} holds '{own}', which {self.config.model_type} has no place for here: "
                    "another model would be measured"
                )

    def _numbers(self, own: str) -> torch.Tensor:
        """A tensor decoded to float32."""
        stored = self.stored[own]
        try:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise BadInput(
                f"{self.path.name}: '{own}' is {stored.tensor_type.name}, which gguf cannot decode: convert the "
                "file to Q8_0 or F16"
            ) from error
        return torch.from_numpy(values.astype("float32", copy=True).reshape([int(n) for n in reversed(stored.shape)]))

    @cached_property
    def generation(self) -> GenerationConfig:
        """What ends an answer: the end tokens of a text, a turn and a message."""
        keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(token for key in keys if (token := self.fields.take(key)) is not None))
        own = {kind: getattr(self.config, f"{kind}_token_id") for kind in ("bos", "pad")}
        return GenerationConfig(
            bos_token_id=own["bos"], pad_token_id=own["pad"], eos_token_id=ends[0] if len(ends) == 1 else ends or None
        )

    def tokenizer(self, cut: str | None = None) -> PreTrainedTokenizerFast:
        """The tokenizer.

        Args:
            cut: how a text is cut before it is merged, instead of what the file says.

        Raises:
            BadInput: no tokenizer, or one that is not known here.
        """
        take = self.fields.take
        kind, tokens = take("tokenizer.ggml.model"), take("tokenizer.ggml.tokens")
        if not tokens:
            raise BadInput(f"{self.path.name} holds no tokenizer: expected tokenizer.ggml.tokens")
        types, merges, said = (
            take("tokenizer.ggml.token_type", [1] * len(tokens)),
            take("tokenizer.ggml.merges", []),
            take("tokenizer.ggml.pre"),
        )
        if kind == "gpt2":
            pre = cut or ALIASES.get(said, said)
            raw = byte_level(tokens, types, merges, pre, self.path.name)
            normaliser = take(NORMALISER, "NFC" if pre == "qwen2" else "none")
            if normaliser not in NORMALISERS:
                raise unknown(f"text normaliser in {self.path.name}", normaliser, NORMALISERS)
            raw.normalizer = NORMALISERS[normaliser]
        elif kind == "llama":
            raw, pre = (
                AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).backend_tokenizer,
                "sentencepiece",
            )
        else:
            raise BadInput(
                f"{self.path.name}: tokenizer '{kind}' is not known here: expected gpt2 (byte-level BPE) or "
                "llama (SentencePiece)"
            )
        if not take("tokenizer.ggml.add_space_prefix", True) and kind == "llama":
            raise BadInput(f"{self.path.name}: a SentencePiece tokenizer without the space in front is not read here")
        take("tokenizer.ggml.add_eos_token")  # nothing closes a text here: what is measured goes on
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special = {
            f"{ours}_token": tokens[at]
            for ours, key in named.items()
            if (at := take(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        # llama.cpp's defaults
        if take("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe") and "bos_token" in special:
            bos = special["bos_token"]
            raw.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokens.index(bos))]
            )
        templates = {
            key.removeprefix("tokenizer.chat_template."): take(key)
            for key in list(self.fields.left)
            if key.startswith("tokenizer.chat_template.")
        }
        if (usual := take("tokenizer.chat_template")) is not None:
            templates["default"] = usual
        take("tokenizer.chat_templates")  # the names of those
        chat = templates["default"] if list(templates) == ["default"] else templates or None
        _ = self.generation, self.config  # they use settings too
        for key in self.fields.left:
            raise BadInput(
                f"{self.path.name} says {key} = {str(self.fields.get(key))[:60]!r}, which is not known here: "
                "another model would be measured"
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, chat_template=chat, clean_up_tokenization_spaces=False, **special
        )


def byte_level(
    tokens: list[str], types: list[int], merges: list[str], pre: str | None, name: str = "the file"
) -> Tokenizer:
    """A byte-level BPE tokenizer of a GGUF file's lists.

    Args:
        tokens: by their numbers.
        types: llama.cpp's kind of each.
        merges: "a b", the first merged first.
        pre: how a text is cut before it is merged.
        name: of the file, for errors.

    Raises:
        BadInput: another way to cut than those of GPT-2, SmolLM, LLaMA 3 and Qwen 2; a token that stands twice.
    """
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cuts = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        **{
            key: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(text), "isolated"), bytes_only])
            for key, text in PATTERNS.items()
        },
    }
    if pre not in cuts:
        raise BadInput(
            f"{name} cuts text by '{pre}' before it is merged, which is not known here: expected {', '.join(cuts)}"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise BadInput(f"{name} has the token {twice!r} twice: expected each once")
    # llama.cpp takes a merge that makes no token, and then falls back to the parts
    pairs = [
        (a, b)
        for a, _, b in (merge.partition(" ") for merge in merges)
        if a in vocabulary and b in vocabulary and a + b in vocabulary
    ]
    raw = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    raw.pre_tokenizer, raw.decoder = cuts[pre], decoders.ByteLevel()
    for kind, special in ((SPECIAL, True), (ADDED, False)):
        own = [
            AddedToken(token, normalized=False, special=special)
            for token, is_kind in zip(tokens, types, strict=True)
            if is_kind == kind
        ]
        (raw.add_special_tokens if special else raw.add_tokens)(own)
    return raw


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k in transformers' order: it rotates (i, i + half) where llama.cpp rotates neighbours (2i, 2i +
    1)."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _whole(key: str, value: Any) -> int:
    """A number that all blocks share."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise BadInput(f"{key} differs between blocks ({value[:8]}): expected one number for all")
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise BadInput(f"{key} is {value!r}: expected a number of at least 1")
    return value


def check_header(path: Path) -> None:
    """Walk through a file's header by its own counts and lengths, in bounded time and memory, before anything is made
    by them.

    Raises:
        BadInput: no GGUF; counts or lengths that lead out of the file or are beyond any model; more than tensors behind
            the header; tensors that this machine has no memory for.
    """
    with plain_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(min(size, LARGEST))
    if head[:4] != b"GGUF":
        raise BadInput(f"{path} is not a GGUF file (it does not start with 'GGUF')")
    order, at, elements = ">" if head[4:6] == b"\0\0" else "<", 4, 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(order + kind, head, at)
        at += struct.calcsize(order + kind)
        return value

    def over(length: int) -> None:
        nonlocal at
        at += length
        if at > len(head):
            raise struct.error(f"a length of {length}")

    try:
        _version, tensors, settings = number("I"), number("Q"), number("Q")
        if max(tensors, settings) > MOST_NAMES:
            raise struct.error(f"{tensors} tensors and {settings} settings")
        for _ in range(settings):
            over(number("Q"))  # its name
            kind, count = number("I"), 1
            if kind == gguf.GGUFValueType.ARRAY:
                kind, count = number("I"), number("Q")
                elements += count
                if elements > MOST_ELEMENTS or kind == gguf.GGUFValueType.ARRAY:
                    raise struct.error(f"a list of {count} elements")
            if kind == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    over(number("Q"))
            elif kind in WIDTHS:
                over(count * WIDTHS[kind])
            else:
                raise struct.error(f"a value of kind {kind}")
        total = end = 0
        sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
        for _ in range(tensors):
            over(number("Q"))
            dimensions = number("I")
            if dimensions > 4:  # llama.cpp's most
                raise struct.error(f"a tensor of {dimensions} dimensions")
            n, kind, offset = math.prod(number("Q") for _ in range(dimensions)), number("I"), number("Q")
            block, width = sizes.get(kind, (1, 0))
            total, end = total + n, max(end, offset + n // block * width)
    except struct.error as error:
        raise BadInput(
            f"{path} cannot be read as GGUF (its header leads out of it, or beyond any model's: {error}): "
            "truncated? fetch it again"
        ) from error
    if size > at + end + SLACK:
        raise BadInput(
            f"{path} has {size:,} bytes, of which its header and tensors are {at + end:,}: expected no others; "
            "fetch it again"
        )
    if size < at + end:
        raise BadInput(f"{path} is truncated: its tensors end at byte {at + end}, the file at {size}")
    check_memory(4 * total, path)


def _reader(path: Path) -> gguf.GGUFReader:
    """An open file, all of whose tensors end before it does."""
    try:
        reader = gguf.GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # the reader maps the file and fails in many ways on a short or damaged one
        raise BadInput(
            f"{path} cannot be read as GGUF "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): truncated? fetch it again"
        ) from error
    if end > path.stat().st_size:
        raise BadInput(f"{path} is truncated: its tensors end at byte {end}, the file at {path.stat().st_size}")
    return reader


class _Fields:
    """The settings of a file, and which of them nobody has asked for yet."""

    def __init__(self, *readers: gguf.GGUFReader):
        self._fields = {name: f for reader in reversed(readers) for name, f in reader.fields.items()}
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A setting, looked at and not used."""
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except Exception as error:  # of a damaged file
            raise BadInput(f"the setting '{key}' cannot be read ({error}): the file is damaged") from error

    def take(self, key: str, default: Any = None) -> Any:
        """A setting that is used."""
        self._asked.add(key)
        return self.get(key, default)

    @property
    def left(self) -> list[str]:
        """The settings that nobody used, less those that say nothing of what is computed."""
        neutral = lambda key: NEUTRAL.get(key if key in NEUTRAL else key.partition(".")[2], ...) == self.get(key)  # noqa: E731
        return [
            key for key in self._fields if key not in self._asked and not HARMLESS.fullmatch(key) and not neutral(key)
        ]
