"""What a model asks of a device: MACs and bytes of every operation, for a prompt and for each token after it, weights as they are stored."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from thesislib.errors import BadInput
from thesislib.layers import Adapted, ComputedLinear
from thesislib.subject import LINEARS, Subject

NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm")


@dataclass(frozen=True)
class Operation:
    """One operation of one forward pass.

    name: "blocks.3.q_proj", "blocks.3.attention", "embedding", "head", ... kind: gemv, gemm (many tokens), attention, or move for what only moves
    bytes. macs: multiply-accumulates. weights: bytes of stored weights that are read. params: how many numbers these stand for.
    cache: bytes of the KV cache that are read and written.
    """

    name: str
    kind: str
    macs: int
    weights: int
    params: int
    cache: int = 0


@dataclass(frozen=True)
class Stored:
    """A weight as it is held: the operation that reads it, its bytes, how many numbers it stands for, and in which tensors it lies.

    beside: bytes of these, and how many numbers, that are a low-rank correction's.
    """

    name: str
    bytes: int
    params: int
    tensors: tuple[int, ...]
    beside: tuple[int, int] = (0, 0)


def stored(subject: Subject) -> list[Stored]:
    """Every weight of a model; tied ones once, repeated blocks once for each time they run, sharing tensors.

    Raises:
        BadInput: a module with weights that this model of costs does not know, by its name.
    """
    found, seen = [], set()

    def add(name: str, *tensors: torch.Tensor, params: int, beside: tuple[int, int] = (0, 0)) -> None:
        places = tuple(t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size() if t.device.type != "meta" else id(t) for t in tensors)
        found.append(Stored(name, sum(t.nbytes for t in tensors), params, places, beside))

    core = subject.model.model
    table, head = subject.model.get_input_embeddings(), subject.model.get_output_embeddings()
    for name, module in (("embedding", table), ("head", head)):
        tensors = list(module.held.values()) if isinstance(module, ComputedLinear) else _held(module)
        add(name, *tensors, params=module.weight.numel())
        seen |= set(module.modules())
    for b, block in enumerate(subject.blocks):
        for kind, linear in subject.linears(b).items():
            parts = [linear.base, linear] if isinstance(linear, Adapted) else [linear]
            tensors = [t for part in parts for t in _own(part)]
            low_rank = list(_own(linear)) if isinstance(linear, Adapted) else []
            beside = (sum(t.nbytes for t in low_rank), sum(t.numel() for t in low_rank))
            add(f"blocks.{b}.{kind}", *tensors, params=linear.out_features * linear.in_features + beside[1], beside=beside)
            seen |= set(linear.modules())
        for path, module in block.named_modules():
            if module not in seen and (own := _own(module)):
                if path.rpartition(".")[2] not in NORMS:
                    raise BadInput(f"block {b} has an operation that the cost model does not know, '{path}' ({type(module).__name__}): "
                                   f"expected {', '.join(LINEARS)} and norms")  # fmt: skip
                add(f"blocks.{b}.{path}", *own, params=sum(t.numel() for t in own))
    for path, module in core.named_modules():
        outside = module not in seen and not path.startswith("layers") and not path.startswith("rotary_emb")
        if outside and (own := _own(module)):
            if path not in NORMS:
                raise BadInput(f"the model has an operation that the cost model does not know, '{path}' ({type(module).__name__})")
            add(path, *own, params=sum(t.numel() for t in own))
    return found


def _own(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of a module itself."""
    if isinstance(module, ComputedLinear):
        return [*module.held.values(), *([] if module.bias is None else [module.bias])]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


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
    """The operations of one forward pass over `tokens` tokens after `context` others; `kept` bytes of weights in all, KV cache apart."""

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


def costs(subject: Subject, tokens: int = 1, context: int = 128, cache_bits: int = 16) -> Costs:
    """What a pass over `tokens` new tokens costs when `context` are in the cache: decoding with tokens 1, a prompt with context 0.

    Every new token reads one row of the embedding, and only the last goes through the head, whose whole table is read: tied to the
    embedding it is kept once and charged at every token. Masked zeros are multiplied like any weight.

    Raises:
        BadInput: no token; a model with an operation that is not known.
    """
    if tokens < 1 or context < 0:
        raise BadInput(f"tokens {tokens}, context {context}: expected at least 1 token and a context of at least 0")
    config, weights, kind = subject.model.config, stored(subject), "gemv" if tokens == 1 else "gemm"
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    entry = 2 * kv * width * cache_bits // 8  # bytes of one token's keys and values in one block
    pairs = tokens * context + tokens * (tokens + 1) // 2  # each new token looks at those before it and at itself
    found = []
    for w in weights:
        place, _, part = w.name.rpartition(".")
        if w.name == "embedding":
            rows = subject.model.get_input_embeddings().weight.shape[0]
            found.append(Operation(w.name, "move", 0, tokens * -(-w.bytes // rows), tokens * w.params // rows))
        elif w.name == "head":
            found.append(Operation(w.name, "gemv", w.params, w.bytes, w.params))
        elif part in LINEARS:
            found.append(Operation(w.name, kind, tokens * w.params, w.bytes, w.params))
            if part == "v_proj":
                found.append(Operation(f"{place}.attention", "attention", 2 * pairs * heads * width, 0, 0, (context + 2 * tokens) * entry))
        else:
            found.append(Operation(w.name, "move", 0, w.bytes, w.params))
    attending = sum(o.kind == "attention" for o in found)  # blocks may have lost theirs
    return Costs(tuple(found), tokens, context, distinct_bytes(weights), attending * (context + tokens) * entry)
