"""Which of a model's weights can be trained, and a model run block by block or with trained weights."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thesislib.compress.lora.sequences import Sequences
from thesislib.compress.outline import Outlined
from thesislib.compress.stage import Stage
from thesislib.errors import BadInput
from thesislib.model.blocks import apply_plan
from thesislib.model.forward import attention_windows, window_mask
from thesislib.model.layers import Adapted
from thesislib.model.subject import Subject


def to_bfloat16(blocks: Iterable[nn.Module], but: Iterable[nn.Parameter] = ()) -> None:
    """Cast the linears of blocks to bfloat16 in place, but for some parameters."""
    kept = {id(p) for p in but}
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) and id(module.weight) not in kept:
                for p in module.parameters(recurse=False):
                    if id(p) not in kept:
                        p.data = p.data.bfloat16()


def check_trainable(stage: Stage, subject: Subject, blocks: Iterable[int]) -> None:
    """Raises BadInput for blocks whose whole weights cannot be trained.

    These are blocks with packed, quantised or corrected projections, and blocks that share a weight with another. In an
    outline a projection that is not quantised will be dense.
    """
    places: dict[int, set[int]] = {}
    for b, block in enumerate(subject.blocks):
        for p in block.parameters():
            places.setdefault(id(p), set()).add(b)
    for b in blocks:
        for name, module in subject.linears(b).items():
            dense = module.grid is None if isinstance(module, Outlined) else isinstance(module, nn.Linear)
            if not dense:
                how = "corrected" if isinstance(module, Adapted) else "packed or quantised"
                instead = "merge the correction first" if isinstance(module, Adapted) else "do that after it"
                raise BadInput(f"{stage.word} trains whole weights, and {name} of block {b} is {how}: {instead}")
        if others := sorted(set().union(*(places[id(p)] for p in subject.blocks[b].parameters())) - {b}):
            raise BadInput(
                f"{stage.word} trains block {b}, whose weights block {others[0]} has too, since the plan repeats it: "
                "expected a block that runs once"
            )


def check_not_quantised(stage: Stage, previous: Sequence[Stage]) -> None:
    """Raises BadInput if an earlier stage has quantised weights: `stage` would train them off their grid."""
    if quantised := next((earlier.label for earlier in previous if earlier.family == "quantised"), None):
        raise BadInput(f"{stage.label} after {quantised} would train quantised weights: quantise after it")


def with_weights(subject: Subject, changed: Mapping[int, Mapping[str, torch.Tensor]]) -> Subject:
    """The subject with other parameters in some blocks, {block: {name: tensor}}; it shares all remaining weights.

    They are rounded to the subject's dtype.
    """
    out = apply_plan(subject, range(subject.depth))
    for b, tensors in changed.items():
        block = copy.deepcopy(out.blocks[b], {id(out.model.config): out.model.config})
        with torch.no_grad():
            for name, p in block.named_parameters():
                p.copy_(tensors[name])
        out.blocks[b] = block
    return Subject(out.model, out.tokenizer, out.name, subject.plan)


def residual(
    subject: Subject, some: Sequences, stop: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor, Iterable[tuple[nn.Module, int | None]]], torch.Tensor]]:
    """The residual stream (B, T, D) that enters block `stop`, and how to take it through further blocks.

    At the end of the model it is what enters the final norm: transformers' last hidden state is what leaves it.

    Returns:
        The stream, and a function of a stream and (block, sliding window) pairs, which may be another model's.
    """
    decoder: Any = subject.model.model
    ids, positions, mask = (None if t is None else t.to(subject.device) for t in (some.ids, some.positions, some.mask))
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    h = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(h, position_ids=positions)

    def onward(h: torch.Tensor, blocks: Iterable[tuple[nn.Module, int | None]]) -> torch.Tensor:
        for block, window in blocks:
            h = block(h, attention_mask=window_mask(window, positions, mask), position_embeddings=rotary)
        return h

    return onward(h, list(with_windows(subject))[:stop]), onward


def with_windows(subject: Subject) -> Iterator[tuple[nn.Module, int | None]]:
    """The blocks of a subject, each with its sliding window, see `thesislib.model.forward.attention_windows`."""
    return zip(subject.blocks, attention_windows(subject.model.config), strict=True)
