"""What a model asks of a device: MACs and bytes of every operation, for a prompt and for each token after it, weights
as they are stored."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from thesislib.errors import BadInput
from thesislib.model.layers import LINEARS, Adapted, ComputedLinear, Size, size_of
from thesislib.model.packing import Pattern
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import rows_of

TABLES = ("embedding", "head")
NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm")


@dataclass(frozen=True)
class Operation:
    """One operation of one forward pass.

    name: "blocks.3.q_proj", "blocks.3.attention", "embedding", "head", ... kind: gemv, gemm (many tokens), attention,
    or move for what only moves bytes. macs: multiply-accumulates. weights: bytes of stored weights that are read.
    params: how many numbers these stand for. cache: bytes of the KV cache that are read and written. precision: what it
    is computed in, see `Stored`.
    """

    name: str
    kind: str
    macs: int
    weights: int
    params: int
    cache: int = 0
    precision: str = "float32"


@dataclass(frozen=True)
class Stored:
    """A weight as it is held.

    Attributes:
        name: of the operation that reads it.
        bytes: that it takes.
        params: how many numbers it stands for.
        tensors: where it lies.
        beside: bytes of these, and how many numbers, that are a low-rank correction's.
        precision: what a product with it is computed in: its own floating type, or int8 for whatever is held in codes
            of 8 bits or fewer, since that is what llama.cpp's and Deeploy's kernels turn them into, with inputs in 8
            bits. (This study's own runtime computes them in the model's type.) A correction goes with its projection.
        multiplied: multiply-accumulates for one token; None: one for each number.
    """

    name: str
    bytes: int
    params: int
    tensors: tuple[int, ...]
    beside: tuple[int, int] = (0, 0)
    precision: str = "float32"
    multiplied: int | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token."""
        return self.params if self.multiplied is None else self.multiplied


@dataclass(frozen=True)
class Sketch:
    """What costs are counted from: a model's weights and sizes without its tensors, so that another depth, width or
    bits is made in no time.

    heads, kv: of queries; of keys and values. width: numbers a head. rows: of the embedding. activations: the type of
    the norms and of what attention multiplies.
    """

    name: str
    weights: tuple[Stored, ...]
    heads: int
    kv: int
    width: int
    rows: int = 1
    activations: str = "float32"

    @property
    def depth(self) -> int:
        """Blocks that run, repeats counted."""
        return len({_block(w) for w in self.weights} - {None})


def sketch(subject: Subject | Sketch) -> Sketch:
    """A subject's; a sketch is its own.

    Raises:
        BadInput: see `stored`.
    """
    if isinstance(subject, Sketch):
        return subject
    config = subject.model.config
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Sketch(
        subject.name,
        tuple(stored(subject)),
        heads,
        kv,
        width,
        rows_of(subject.model),
        str(subject.dtype).removeprefix("torch."),
    )


def resized(
    subject: Subject | Sketch,
    blocks: int | None = None,
    bits: float | None = None,
    pattern: str | None = None,
    table: float | None = None,
) -> Sketch:
    """A model as it would be with fewer blocks, or with its linears held in other bits. What it would then answer is
    another question.

    Args:
        subject: where it starts from; for a pattern, one that is not packed already.
        blocks: how many are kept, the largest ones; None for all.
        bits: of a linear's weight, scales included: 4.5 is Q4_0's, 16 is bfloat16, 32 float32. None: as it is held.
        pattern: removed:of, such as "2:4", packed as an artifact packs it (the places cost bits too) if that is
            smaller; None: nothing is left out. A little too small for a quantised linear, whose scales all stay. Zeros
            that are not packed change nothing here: they are stored and multiplied like any weight.
        table: bits of the embedding and the head; None: as they are held.

    Raises:
        BadInput: no block or more than there are; bits that are not above 0; a pattern that is not understood.
    """
    plain = sketch(subject)
    if blocks is not None and not 1 <= blocks <= plain.depth:
        raise BadInput(f"{blocks} blocks: expected 1 to {plain.depth}, which {plain.name} has")
    for what, value in (("bits", bits), ("table", table)):
        if value is not None and not 0 < value <= 32:
            raise BadInput(f"{what} {value}: expected bits a weight above 0 and up to 32")
    parsed = Pattern.parse(pattern) if pattern else None
    size: dict[int, int] = {}
    for w in plain.weights:
        if (b := _block(w)) is not None:
            size[b] = size.get(b, 0) + w.bytes
    kept = {None, *sorted(size, key=lambda b: -size[b])[:blocks]}
    weights = []
    for w in plain.weights:
        if _block(w) in kept:
            linear = is_linear(w)
            weights.append(
                _held_in(w, bits if linear else table, parsed if linear else None) if linear or w.name in TABLES else w
            )
    return replace(plain, weights=tuple(weights))


def _held_in(w: Stored, bits: float | None, pattern: Pattern | None) -> Stored:
    if bits is None and pattern is None:
        return w
    more, numbers = w.beside[0], w.params - w.beside[1]
    each = bits or 8 * (w.bytes - more) / numbers
    small = each if pattern is None else min(each, (each * pattern.keep + pattern.bits) / pattern.of)
    precision = w.precision if bits is None else "int8" if bits < 16 else "float32" if bits == 32 else "bfloat16"
    return replace(w, bytes=math.ceil(numbers * small / 8) + more, precision=precision)


def is_linear(weight: Stored) -> bool:
    """Whether a weight is one of a block's projections."""
    return weight.name.rpartition(".")[2] in LINEARS


def _block(weight: Stored) -> int | None:
    parts = weight.name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def _precision(tensors: Iterable[torch.Tensor]) -> str:
    """Of tensors that hold a weight: scales of codes are kept as the bits of int16, so that whatever floats is the
    weight itself."""
    return next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "int8")


def stored(subject: Subject | Sketch) -> list[Stored]:
    """Every weight of a model; tied ones once, repeated blocks once for each time they run, sharing tensors.

    Raises:
        BadInput: a module with weights that this model of costs does not know, by its name.
    """
    if isinstance(subject, Sketch):
        return list(subject.weights)
    found, seen = [], set()

    def add(
        name: str,
        *tensors: torch.Tensor,
        size: Size,
        beside: tuple[int, int] = (0, 0),
        held: Iterable[torch.Tensor] | None = None,
    ) -> None:
        places = tuple(
            int(t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size())
            if t.device.type != "meta"
            else id(t)
            for t in tensors
        )
        found.append(
            Stored(
                name, size.nbytes, size.numel, places, beside, _precision(tensors if held is None else held), size.macs
            )
        )

    core = subject.model.model
    table: Any = subject.model.get_input_embeddings()
    head: Any = subject.model.get_output_embeddings()
    for name, module in (("embedding", table), ("head", head)):
        add(name, *_held(module), size=size_of(getattr(module, "table", module)))
        seen |= set(module.modules())
    for b, block in enumerate(subject.blocks):
        for kind, linear in subject.linears(b).items():
            parts = [linear.base, linear] if isinstance(linear, Adapted) else [linear]
            tensors = [t for part in parts for t in _own(part)]
            low_rank = list(_own(linear)) if isinstance(linear, Adapted) else []
            beside = (sum(t.nbytes for t in low_rank), sum(t.numel() for t in low_rank))
            held = parts[0].stored.values() if isinstance(parts[0], ComputedLinear) else [parts[0].weight]
            add(f"blocks.{b}.{kind}", *tensors, size=size_of(linear), beside=beside, held=held)
            seen |= set(linear.modules())
        for path, module in block.named_modules():
            if module not in seen and (own := _own(module)):
                if path.rpartition(".")[2] not in NORMS:
                    raise BadInput(f"block {b} has an operation that the cost model does not know, '{path}' "
                        f"({type(module).__name__}): "
                                   f"expected {', '.join(LINEARS)} and norms")  # fmt: skip
                add(f"blocks.{b}.{path}", *own, size=_plain(own))
    for path, module in core.named_modules():
        outside = module not in seen and not path.startswith("layers") and not path.startswith("rotary_emb")
        if outside and (own := _own(module)):
            if path not in NORMS:
                raise BadInput(
                    f"the model has an operation that the cost model does not know, '{path}' ({type(module).__name__})"
                )
            add(path, *own, size=_plain(own))
    return found


def _own(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a module itself."""
    if isinstance(module, ComputedLinear):
        return [*module.stored.values(), *([] if module.bias is None else [module.bias])]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _plain(tensors: Sequence[torch.Tensor]) -> Size:
    """Of numbers that no product is made with."""
    return Size(sum(t.numel() for t in tensors), 0, sum(t.nbytes for t in tensors))


def _held(module: nn.Module) -> list[torch.Tensor]:
    return [t for part in module.modules() for t in _own(part)]


def distinct_bytes(weights: Iterable[Stored]) -> int:
    """Bytes that weights take together: what lies in the same place counts once."""
    places: dict[tuple[int, ...], int] = {}
    for w in weights:
        places[w.tensors] = w.bytes
    return sum(places.values())


@dataclass(frozen=True)
class Costs:
    """The operations of one forward pass over `tokens` tokens after `context` others; `kept` bytes of weights in all,
    KV cache apart."""

    operations: tuple[Operation, ...]
    tokens: int
    context: int
    kept: int
    cache_bytes: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return sum(o.macs for o in self.operations)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights read, those that are read twice twice."""
        return sum(o.weights for o in self.operations)


def costs(subject: Subject | Sketch, tokens: int = 1, context: int = 128, cache_bits: int = 16) -> Costs:
    """What a pass over `tokens` new tokens costs when `context` are in the cache: decoding with tokens 1, a prompt with
    context 0.

    Every new token reads one row of the embedding, and only the last goes through the head, whose whole table is read:
    tied to the embedding it is kept once and charged at every token. Masked zeros are multiplied like any weight.

    Raises:
        BadInput: no token; a model with an operation that is not known.
    """
    if tokens < 1 or context < 0:
        raise BadInput(f"tokens {tokens}, context {context}: expected at least 1 token and a context of at least 0")
    plain, kind = sketch(subject), "gemv" if tokens == 1 else "gemm"
    entry = 2 * plain.kv * plain.width * cache_bits // 8  # bytes of one token's keys and values in one block
    pairs = tokens * context + tokens * (tokens + 1) // 2  # each new token looks at those before it and at itself
    found = []
    for w in plain.weights:
        place, _, part = w.name.rpartition(".")
        if w.name == "embedding":
            found.append(
                Operation(w.name, "move", 0, tokens * -(-w.bytes // plain.rows), tokens * w.params // plain.rows)
            )
        elif w.name == "head":
            found.append(Operation(w.name, "gemv", w.macs, w.bytes, w.params, precision=w.precision))
        elif part in LINEARS:
            found.append(Operation(w.name, kind, tokens * w.macs, w.bytes, w.params, precision=w.precision))
            if part == "v_proj":
                macs, moved = 2 * pairs * plain.heads * plain.width, (context + 2 * tokens) * entry
                found.append(Operation(f"{place}.attention", "attention", macs, 0, 0, moved, plain.activations))
        else:
            found.append(Operation(w.name, "move", 0, w.bytes, w.params))
    attending = sum(o.kind == "attention" for o in found)  # blocks may have lost theirs
    return Costs(tuple(found), tokens, context, distinct_bytes(plain.weights), attending * (context + tokens) * entry)
