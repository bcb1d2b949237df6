"""A GGUF file read as a Hugging Face model: every setting and tensor is used, known to be harmless, or refused by name.

transformers reads GGUF too, but it invents the weights that a file lacks, and drops rotary factors, biases, attention
windows, wide heads and pre-tokenizers.
"""

import re
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
from thesislib.errors import BadInput, first_line, unknown
from thesislib.formats.gguf_header import check_header

# by GGUF's name of an architecture, which is transformers' too: whether rows of q and k are in llama.cpp's own order
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False, "smollm3": True}
SPECIAL, ADDED = 3, 4  # llama.cpp's types of tokens that are cut out of a text before the rest is merged
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}  # of pre-tokenizers
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
# a setting of our own, since GGUF has none: others' files of Qwen's tokenizers, which normalise to NFC, do not say so
NORMALISER, NORMALISERS = "thesislib.tokenizer.normaliser", {"none": None, "NFC": normalizers.NFC()}
HARMLESS = re.compile(
    r"GGUF\..*|general\.(?!type$).*|split\..*|quantize\.imatrix\..*|tokenizer\.ggml\.(scores|(unknown|separator|mask|cls|fim_\w+|prefix|suffix|middle)_token_id)"
    r"|\w+\.(vocab_size|tensor_data_layout|rope\.scaling\.finetuned)"
)
PART = re.compile(r"-(\d{5})-of-(\d{5})$")  # the end of a part's name
# settings of an architecture that are whole numbers
WHOLE = ("block_count", "embedding_length", "attention.head_count", "feed_forward_length", "context_length")
NEUTRAL = {  # settings that are known only with these values
    "tokenizer.ggml.add_sep_token": False,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "general.type": "model",
}


def parts(path: Path) -> list[Path]:
    """The files of a model that llama.cpp's gguf-split has split, in order; of any other model its one file.

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
        self.architecture = self.fields.take("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise unknown("architecture of a GGUF file", self.architecture, ARCHITECTURES)

    def _take(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture, marked as used."""
        return self.fields.take(f"{self.architecture}.{key}", default)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration that computes the model of the file.

        Raises:
            BadInput: a setting that is missing, or that no configuration here has.
        """
        depth, hidden, heads, inner, context = (_whole(key, self._take(key)) for key in WHOLE)
        kv_heads = _whole("attention.head_count_kv", self._take("attention.head_count_kv", heads))
        head = self._take("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (width := self._take(key, head)) != head:
                raise BadInput(
                    f"{self.path.name}: {self.architecture}.{key} is {width}: expected the width of a head, {head}"
                )
        if "token_embd.weight" not in self.stored:
            raise BadInput(f"{self.path.name} lacks the weight 'token_embd.weight': the model is not whole")
        settings = {
            "num_hidden_layers": depth,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "intermediate_size": inner,
            "max_position_embeddings": context,
            # GGUF has it in float32: 9.999999747e-06
            "rms_norm_eps": float(f"{self._take('attention.layer_norm_rms_epsilon'):.6g}"),
            "vocab_size": int(self.stored["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in self.stored,
            "rope_parameters": self._rotary(context),
            "dtype": torch.float32,
        }
        for name in ("bos", "eos", "padding"):
            settings[f"{name.removesuffix('ding')}_token_id"] = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        model_type, windows = self._windows(depth)
        settings |= windows
        if model_type in ("llama", "qwen3"):
            settings["attention_bias"] = "blk.0.attn_q.bias" in self.stored
        if model_type == "llama":
            settings["mlp_bias"] = "blk.0.ffn_up.bias" in self.stored
        for key in self.fields.unused:
            if key.startswith(f"{self.architecture}."):
                raise BadInput(
                    f"{self.path.name} says {key} = {self.fields.get(key)!r}, which {model_type} has no place for "
                    "here: another model would be measured"
                )
        check_sizes(settings, self.path.name)
        return CONFIG_MAPPING[model_type](**settings)

    def _windows(self, depth: int) -> tuple[str, dict[str, Any]]:
        """transformers' name of the architecture, which depends on the sliding window, and the window's settings."""
        window = self._take("attention.sliding_window")
        if not window:
            return self.architecture, {}
        pattern = list(self._take("attention.sliding_window_pattern", [True] * depth))
        if self.architecture == "llama" and all(pattern):
            return "mistral", {"sliding_window": window}
        if self.architecture not in ("qwen2", "qwen3") or len(pattern) != depth:
            raise BadInput(
                f"{self.path.name}: {self.architecture} with attention windows in {sum(pattern)} of {depth} "
                "blocks is not known here"
            )
        types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        return self.architecture, {"sliding_window": window, "use_sliding_window": True, "layer_types": types}

    def _rotary(self, context: int) -> dict[str, Any]:
        """The rope_parameters: default, or scaled by one number, by YaRN, or by a factor a frequency (Llama 3's)."""
        rotary = {"rope_type": "default", "rope_theta": float(self._take("rope.freq_base", 10000.0))}
        factor = float(self._take("rope.scaling.factor", self._take("rope.scale_linear", 1.0)) or 1.0)
        scaling = self._take("rope.scaling.type", "linear")  # llama.cpp's default
        original = self._take("rope.scaling.original_context_length") or context
        if scaling == "yarn":
            rotary |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(original)}
        elif scaling not in ("none", "linear"):
            raise BadInput(
                f"{self.path.name}: rotary scaling '{scaling}' is not read here: expected none, linear, yarn or "
                "rope_freqs.weight"
            )
        elif scaling == "linear" and factor != 1.0:
            rotary |= {"rope_type": "linear", "factor": factor}
        if "rope_freqs.weight" in self.stored:
            if rotary["rope_type"] != "default":
                raise BadInput(
                    f"{self.path.name} has rope_freqs.weight and scaling '{rotary['rope_type']}': expected one "
                    "of the two"
                )
            factors = self._numbers("rope_freqs.weight").double().tolist()
            # the one type with any factors; it would switch between two lists at the original context's length
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
            shapes: the shape of each tensor that the model has, by name.

        Raises:
            BadInput: a tensor that is missing, has another shape, a type that gguf cannot decode, or that the model
                does not have.
        """
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.config.num_hidden_layers)
        used = {"rope_freqs.weight"}
        for name, shape in shapes.items():
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name not in self.stored:
                raise BadInput(f"{self.path.name} lacks the weight '{gguf_name}' ({name}): the model is not whole")
            used.add(gguf_name)
            tensor = self._numbers(gguf_name)
            if tensor.shape != shape:
                raise BadInput(
                    f"{self.path.name}: '{gguf_name}' has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
                )
            heads = rotated_heads(name, self.config) if ARCHITECTURES[self.architecture] else None
            yield name, halves(tensor, heads) if heads else tensor
        for gguf_name in self.stored:
            if gguf_name not in used:
                raise BadInput(
                    f"{self.path.name} holds '{gguf_name}', which {self.config.model_type} has no place for here: "
                    "another model would be measured"
                )

    def _numbers(self, gguf_name: str) -> torch.Tensor:
        """A tensor decoded to float32."""
        stored = self.stored[gguf_name]
        try:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise BadInput(
                f"{self.path.name}: '{gguf_name}' is {stored.tensor_type.name}, which gguf cannot decode: convert the "
                "file to Q8_0 or F16"
            ) from error
        return torch.from_numpy(values.astype("float32", copy=True).reshape([int(n) for n in reversed(stored.shape)]))

    @cached_property
    def generation(self) -> GenerationConfig:
        """The generation settings, with the end tokens of a text, a turn and a message."""
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(token for key in keys if (token := self.fields.take(key)) is not None))
        bos, pad = self.config.bos_token_id, self.config.pad_token_id
        eos = ends[0] if len(ends) == 1 else ends or None
        return GenerationConfig(bos_token_id=bos, pad_token_id=pad, eos_token_id=eos)

    def tokenizer(self, cut: str | None = None) -> PreTrainedTokenizerFast:
        """The tokenizer.

        Args:
            cut: the pre-tokenizer, instead of the one that the file names.

        Raises:
            BadInput: no tokenizer, or one that is not known here.
        """
        take = self.fields.take
        model, tokens = take("tokenizer.ggml.model"), take("tokenizer.ggml.tokens")
        if not tokens:
            raise BadInput(f"{self.path.name} holds no tokenizer: expected tokenizer.ggml.tokens")
        backend, adds_bos = self._backend(model, tokens, cut)
        if not take("tokenizer.ggml.add_space_prefix", True) and model == "llama":
            raise BadInput(f"{self.path.name}: a SentencePiece tokenizer without the space in front is not read here")
        take("tokenizer.ggml.add_eos_token")  # ignored: no text gets an end token here, see `tokenizers.prepared`
        ids = {
            f"{ours}_token": take(f"tokenizer.ggml.{theirs}_token_id")
            for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        }
        special = {name: tokens[i] for name, i in ids.items() if i is not None}
        if take("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special:
            bos = special["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokens.index(bos))]
            )
        chat = self._chat_templates()
        _ = self.generation, self.config  # they use settings too
        for key in self.fields.unused:
            raise BadInput(
                f"{self.path.name} says {key} = {str(self.fields.get(key))[:60]!r}, which is not known here: "
                "another model would be measured"
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=chat, clean_up_tokenization_spaces=False, **special
        )

    def _backend(self, model: str, tokens: list[str], cut: str | None) -> tuple[Tokenizer, bool]:
        """The tokenizer without special tokens, and whether llama.cpp adds a first token to its texts by default."""
        take = self.fields.take
        types, merges = take("tokenizer.ggml.token_type", [1] * len(tokens)), take("tokenizer.ggml.merges", [])
        pre = take("tokenizer.ggml.pre")
        if model == "llama":
            return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).backend_tokenizer, True
        if model != "gpt2":
            raise BadInput(
                f"{self.path.name}: tokenizer '{model}' is not known here: expected gpt2 (byte-level BPE) or "
                "llama (SentencePiece)"
            )
        pre = cut or ALIASES.get(pre, pre)
        backend = byte_level(tokens, types, merges, pre, self.path.name)
        normaliser = take(NORMALISER, "NFC" if pre == "qwen2" else "none")
        if normaliser not in NORMALISERS:
            raise unknown(f"text normaliser in {self.path.name}", normaliser, NORMALISERS)
        backend.normalizer = NORMALISERS[normaliser]
        return backend, pre == "llama-bpe"

    def _chat_templates(self) -> str | dict[str, str] | None:
        """The chat template; a dict by name if there are several or if the one has a name; None if there is none."""
        take, prefix = self.fields.take, "tokenizer.chat_template."
        keys = [key for key in self.fields.unused if key.startswith(prefix)]
        templates = {key.removeprefix(prefix): take(key) for key in keys}
        if (default := take("tokenizer.chat_template")) is not None:
            templates["default"] = default
        take("tokenizer.chat_templates")  # only lists their names
        return templates["default"] if list(templates) == ["default"] else templates or None


def byte_level(
    tokens: list[str], types: list[int], merges: list[str], pre: str | None, name: str = "the file"
) -> Tokenizer:
    """A byte-level BPE tokenizer made of a GGUF file's lists.

    Args:
        tokens: by their ids.
        types: llama.cpp's type of each token.
        merges: "a b", the first merged first.
        pre: the pre-tokenizer, which cuts a text before tokens are merged.
        name: of the file, for messages.

    Raises:
        BadInput: another pre-tokenizer than GPT-2's, SmolLM's, LLaMA 3's or Qwen 2's; a token that stands twice.
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
    # llama.cpp accepts a merge that makes no token, and then uses its parts
    halves_of = (merge.partition(" ") for merge in merges)
    pairs = [(a, b) for a, _, b in halves_of if a in vocabulary and b in vocabulary and a + b in vocabulary]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = cuts[pre], decoders.ByteLevel()
    for wanted, add in ((SPECIAL, backend.add_special_tokens), (ADDED, backend.add_tokens)):
        texts = [token for token, type_ in zip(tokens, types, strict=True) if type_ == wanted]
        add([AddedToken(token, normalized=False, special=wanted == SPECIAL) for token in texts])
    return backend


def rotated_heads(name: str, config: PretrainedConfig) -> int | None:
    """The number of heads in a tensor of q or k, whose rows llama.cpp reorders; None for any other tensor."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else None


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k in transformers' order, the inverse of `thesislib.formats.gguf.interleaved`.

    llama.cpp rotates rows (2i, 2i + 1) of a head together, transformers rotates rows (i, i + half).
    """
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _whole(key: str, value: Any) -> int:
    """A whole number from 1, for all blocks the same."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise BadInput(f"{key} differs between blocks ({value[:8]}): expected one number for all")
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise BadInput(f"{key} is {value!r}: expected a number of at least 1")
    return value


def _reader(path: Path) -> gguf.GGUFReader:
    """A file opened by gguf, checked to hold all of its tensors."""
    try:
        reader = gguf.GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception as error:  # the reader maps the file and fails in many ways on a short or damaged one
        raise BadInput(f"{path} cannot be read as GGUF ({first_line(error)}): truncated? fetch it again") from error
    if end > path.stat().st_size:
        raise BadInput(f"{path} is truncated: its tensors end at byte {end}, the file at {path.stat().st_size}")
    return reader


class _Fields:
    """The settings of a file; it remembers which were used."""

    def __init__(self, *readers: gguf.GGUFReader):
        self._fields = {name: f for reader in reversed(readers) for name, f in reader.fields.items()}
        self._used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A setting, not marked as used."""
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except Exception as error:  # of a damaged file
            raise BadInput(f"the setting '{key}' cannot be read ({error}): the file is damaged") from error

    def take(self, key: str, default: Any = None) -> Any:
        """A setting, marked as used."""
        self._used.add(key)
        return self.get(key, default)

    @property
    def unused(self) -> list[str]:
        """The settings that were not used, without those that do not affect what is computed."""
        keys = [key for key in self._fields if key not in self._used and not HARMLESS.fullmatch(key)]
        return [key for key in keys if not self._is_neutral(key)]

    def _is_neutral(self, key: str) -> bool:
        return NEUTRAL.get(key if key in NEUTRAL else key.partition(".")[2], ...) == self.get(key)
