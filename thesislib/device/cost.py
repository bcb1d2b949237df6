"""The costs of a model on a device: MACs and bytes of every operation, for a prompt and for each token after it, with
weights as they are stored."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from thesislib.errors import BadInput
from thesislib.model.beside import CorrectedMLP
from thesislib.model.layers import LINEARS, Adapted, ComputedLinear, Size, size_of
from thesislib.model.packing import Pattern
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import rows_of

TABLES = ("embedding", "head")
BESIDE = "beside"  # the last part of the name of a linear path beside an MLP
NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm")


@dataclass(frozen=True)
class Operation:
    """One operation of one forward pass.

    Attributes:
        name: "blocks.3.q_proj", "blocks.3.attention", "embedding", "head", ...
        kind: gemv (one token), gemm (many tokens), attention, or move for an operation without products.
        macs: multiply-accumulates.
        weights: bytes of stored weights that are read.
        params: how many numbers these bytes hold.
        cache: bytes of the KV cache that are read and written.
        precision: of its products, see `Stored`.
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
    """A weight in its stored form.

    Attributes:
        name: of the operation that reads it.
        bytes: of its tensors.
        params: how many numbers it holds.
        tensors: the memory addresses of its tensors.
        beside: the bytes, and the numbers, of those that belong to a low-rank correction.
        precision: of a product with it: its own floating dtype, or int8 for codes of 8 bits or fewer, since llama.cpp's
            and Deeploy's kernels turn these into int8, with inputs in 8 bits. (This study's own runtime computes them
            in the model's dtype.) A correction has the precision of its projection.
        multiplied: multiply-accumulates for one token; None for one a number.
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
    """A model's weights and sizes without its tensors. Costs are counted from it, and a sketch of another depth, width
    or number of bits takes no time.

    Attributes:
        name: of the model.
        weights: in the order in which they are used.
        heads: of queries.
        kv: heads of keys and values.
        width: numbers a head.
        rows: of the embedding.
        activations: the dtype of norms and of attention's products.
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
        """How many blocks run; a repeated block counts each time."""
        return len({_block(w) for w in self.weights} - {None})


def sketch(subject: Subject | Sketch) -> Sketch:
    """The sketch of a subject; of a sketch, itself.

    Raises:
        BadInput: see `stored`.
    """
    if isinstance(subject, Sketch):
        return subject
    config = subject.model.config
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = str(subject.dtype).removeprefix("torch.")
    return Sketch(subject.name, tuple(stored(subject)), heads, kv, width, rows_of(subject.model), dtype)


def resized(
    subject: Subject | Sketch,
    blocks: int | None = None,
    bits: float | None = None,
    pattern: str | None = None,
    table: float | None = None,
) -> Sketch:
    """The sketch of a model with fewer blocks, or with its linears in other bits.

    It says nothing of the answers of such a model.

    Args:
        subject: the model; for a pattern, one that is not packed already.
        blocks: how many are kept, the largest ones; None for all.
        bits: of a linear's weight, scales included: 4.5 is Q4_0's, 16 is bfloat16, 32 float32. None: those that it has.
        pattern: removed:of, such as "2:4", packed as in an artifact (the positions take bits too) if that is smaller;
            None for no pattern. The size is a little too small for a quantised linear, since its scales all stay. Zeros
            that are not packed change nothing here: they are stored and multiplied like any weight.
        table: bits of a weight of the embedding and the head; None: those that they have.

    Raises:
        BadInput: no block or more than there are; bits that are not above 0; a pattern that is not understood.
    """
    whole = sketch(subject)
    if blocks is not None and not 1 <= blocks <= whole.depth:
        raise BadInput(f"{blocks} blocks: expected 1 to {whole.depth}, which {whole.name} has")
    for name, value in (("bits", bits), ("table", table)):
        if value is not None and not 0 < value <= 32:
            raise BadInput(f"{name} {value}: expected bits a weight above 0 and up to 32")
    parsed = Pattern.parse(pattern) if pattern else None
    size: dict[int, int] = {}
    for w in whole.weights:
        if (b := _block(w)) is not None:
            size[b] = size.get(b, 0) + w.bytes
    kept = {None, *sorted(size, key=lambda b: -size[b])[:blocks]}

    def changed(w: Stored) -> Stored:
        if is_linear(w):
            return _stored_in(w, bits, parsed)
        return _stored_in(w, table, None) if w.name in TABLES else w

    return replace(whole, weights=tuple(changed(w) for w in whole.weights if _block(w) in kept))


def _stored_in(w: Stored, bits: float | None, pattern: Pattern | None) -> Stored:
    """A weight in `bits` bits, packed by a pattern; None leaves either as it is. A low-rank correction stays."""
    if bits is None and pattern is None:
        return w
    correction, numbers = w.beside[0], w.params - w.beside[1]
    each = bits or 8 * (w.bytes - correction) / numbers
    small = each if pattern is None else min(each, (each * pattern.keep + pattern.bits) / pattern.of)
    precision = w.precision
    if bits is not None:
        floating = "float32" if bits == 32 else "bfloat16"
        precision = "int8" if bits < 16 else floating
    return replace(w, bytes=math.ceil(numbers * small / 8) + correction, precision=precision)


def is_linear(weight: Stored) -> bool:
    """Whether a weight is one of a block's projections."""
    return weight.name.rpartition(".")[2] in LINEARS


def _block(weight: Stored) -> int | None:
    """The number of a weight's block; None outside the blocks."""
    parts = weight.name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def _precision(tensors: Iterable[torch.Tensor]) -> str:
    """The precision of a weight in these tensors. Scales of codes are kept as int16, so a floating tensor is the weight
    itself."""
    return next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "int8")


def stored(subject: Subject | Sketch) -> list[Stored]:
    """Every weight of a model, in the order of use.

    The weights of a repeated block appear each time, with the same tensors.

    Raises:
        BadInput: a module with weights that the cost model does not know, by its name.
    """
    if isinstance(subject, Sketch):
        return list(subject.weights)
    weights, seen = [], set()

    def add(
        name: str,
        *tensors: torch.Tensor,
        size: Size,
        beside: tuple[int, int] = (0, 0),
        held: Iterable[torch.Tensor] | None = None,
    ) -> None:
        precision = _precision(tensors if held is None else held)
        addresses = tuple(map(_address, tensors))
        weights.append(Stored(name, size.nbytes, size.numel, addresses, beside, precision, size.macs))

    core = subject.model.model
    table: Any = subject.model.get_input_embeddings()
    head: Any = subject.model.get_output_embeddings()
    for name, module in (("embedding", table), ("head", head)):
        add(name, *_held(module), size=size_of(getattr(module, "table", module)))
        seen |= set(module.modules())
    for b, block in enumerate(subject.blocks):
        for projection, linear in subject.linears(b).items():
            parts = [linear.base, linear] if isinstance(linear, Adapted) else [linear]
            tensors = [t for part in parts for t in _own(part)]
            low_rank = list(_own(linear)) if isinstance(linear, Adapted) else []
            beside = (sum(t.nbytes for t in low_rank), sum(t.numel() for t in low_rank))
            held = parts[0].stored.values() if isinstance(parts[0], ComputedLinear) else [parts[0].weight]
            add(f"blocks.{b}.{projection}", *tensors, size=size_of(linear), beside=beside, held=held)
            seen |= set(linear.modules())
        for path, module in block.named_modules():
            if module not in seen and (own := _own(module)):
                if isinstance(module, CorrectedMLP):
                    count = sum(t.numel() for t in own)
                    add(f"blocks.{b}.{path}.{BESIDE}", *own, size=Size(count, count, sum(t.nbytes for t in own)))
                    continue
                if path.rpartition(".")[2] not in NORMS:
                    raise BadInput(
                        f"block {b} has an operation that the cost model does not know, '{path}' "
                        f"({type(module).__name__}): expected {', '.join(LINEARS)} and norms"
                    )
                add(f"blocks.{b}.{path}", *own, size=_without_products(own))
    for path, module in core.named_modules():
        outside = module not in seen and not path.startswith("layers") and not path.startswith("rotary_emb")
        if outside and (own := _own(module)):
            if path not in NORMS:
                raise BadInput(
                    f"the model has an operation that the cost model does not know, '{path}' ({type(module).__name__})"
                )
            add(path, *own, size=_without_products(own))
    return weights


def _address(tensor: torch.Tensor) -> int:
    """Where a tensor's data begin; tensors without data have an identity instead."""
    if tensor.device.type == "meta":
        return id(tensor)
    return int(tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size())


def _own(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a module itself, without its submodules'."""
    if isinstance(module, ComputedLinear):
        return [*module.stored.values(), *([] if module.bias is None else [module.bias])]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _without_products(tensors: Sequence[torch.Tensor]) -> Size:
    """The size of tensors that take part in no product."""
    return Size(sum(t.numel() for t in tensors), 0, sum(t.nbytes for t in tensors))


def _held(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a module and its submodules."""
    return [t for part in module.modules() for t in _own(part)]


def distinct_bytes(weights: Iterable[Stored]) -> int:
    """The bytes that weights take together; tensors at the same address count once."""
    return sum({w.tensors: w.bytes for w in weights}.values())


@dataclass(frozen=True)
class Costs:
    """The operations of one forward pass.

    Attributes:
        operations: in order.
        tokens: that the pass reads.
        context: tokens in the cache before.
        kept: bytes of all weights, without the KV cache.
        cache_bytes: of the KV cache after the pass.
    """

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
        """Bytes of weights that are read; a weight that is read twice counts twice."""
        return sum(o.weights for o in self.operations)


def costs(subject: Subject | Sketch, tokens: int = 1, context: int = 128, cache_bits: int = 16) -> Costs:
    """The costs of a pass over `tokens` new tokens with `context` tokens in the cache: of decoding with tokens=1, of a
    prompt with context=0.

    Every new token reads one row of the embedding. Only the last goes through the head, whose whole table is read; a
    head that is tied to the embedding is stored once and read at every token. Masked zeros are multiplied like any
    weight.

    Raises:
        BadInput: no token; a model with an operation that is not known.
    """
    if tokens < 1 or context < 0:
        raise BadInput(f"tokens {tokens}, context {context}: expected at least 1 token and a context of at least 0")
    model, product = sketch(subject), "gemv" if tokens == 1 else "gemm"
    entry = 2 * model.kv * model.width * cache_bits // 8  # bytes of one token's keys and values in one block
    pairs = tokens * context + tokens * (tokens + 1) // 2  # each new token attends to those before it and to itself
    operations = []
    for w in model.weights:
        block, _, part = w.name.rpartition(".")
        if w.name == "embedding":
            row_bytes, numbers = -(-w.bytes // model.rows), tokens * w.params // model.rows
            operations.append(Operation(w.name, "move", 0, tokens * row_bytes, numbers))
        elif w.name == "head":
            operations.append(Operation(w.name, "gemv", w.macs, w.bytes, w.params, precision=w.precision))
        elif part in (*LINEARS, BESIDE):
            operations.append(Operation(w.name, product, tokens * w.macs, w.bytes, w.params, precision=w.precision))
            if part == "v_proj":
                macs, moved = 2 * pairs * model.heads * model.width, (context + 2 * tokens) * entry
                operations.append(Operation(f"{block}.attention", "attention", macs, 0, 0, moved, model.activations))
        else:
            operations.append(Operation(w.name, "move", 0, w.bytes, w.params))
    attending = sum(o.kind == "attention" for o in operations)  # attention may have been removed from some blocks
    cache_bytes = attending * (context + tokens) * entry
    return Costs(tuple(operations), tokens, context, distinct_bytes(model.weights), cache_bytes)
