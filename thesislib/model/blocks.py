"""A model's blocks reordered, skipped, repeated, or stripped of their attention or MLP. No weight is copied."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thesislib.errors import BadInput, unknown
from thesislib.model.layers import Adapted, Projection, replace
from thesislib.model.subject import Subject

Plan = tuple[int, ...]
LONGEST = 10_000  # blocks of a plan
ATTRIBUTES = {"attention": "self_attn", "mlp": "mlp"}  # of a block's parts


def check_plan(plan: Sequence[int], depth: int) -> Plan:
    """The plan as a tuple, checked against a model of `depth` blocks.

    Raises:
        BadInput: an empty plan, or an index out of range.
    """
    plan = tuple(plan)
    if not plan:
        raise BadInput("the plan is empty: expected at least one block")
    wrong = next((b for b in plan if not 0 <= b < depth), None)
    if len(plan) > LONGEST:
        raise BadInput(f"the plan has {len(plan)} blocks: expected at most {LONGEST:,}")
    if wrong is not None:
        raise BadInput(f"block {wrong} is out of range: this model has blocks 0 to {depth - 1}")
    return plan


def plan_without(depth: int, blocks: Collection[int]) -> Plan:
    """The plan of a model of `depth` blocks that leaves these out."""
    return tuple(b for b in range(depth) if b not in blocks)


def plans_without_each(depth: int, blocks: Collection[int] | None = None) -> list[Plan]:
    """The plan of the whole model, and those without each of some blocks, by default of all."""
    each = range(depth) if blocks is None else blocks
    return [plan_without(depth, some) for some in ((), *([b] for b in each))]


def apply_plan(subject: Subject, plan: Sequence[int]) -> Subject:
    """A subject that runs the blocks of `subject` in the order of `plan` and shares every weight with it.

    Each entry of the plan gets a module of its own, around the shared parameters, with its own layer index. By this
    index transformers' KV cache stores keys and values; a block that runs twice must not share them.

    Raises:
        BadInput: see `check_plan`.
    """
    plan = check_plan(plan, subject.depth)
    model: Any = shell(subject.model)
    model.model = shell(subject.model.model)
    config = copy.deepcopy(subject.model.config)
    for name in ("layer_types", "no_rope_layers"):  # have an entry for each block
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[block] for block in plan])
    config.num_hidden_layers = len(plan)
    model.config = model.model.config = config
    if hasattr(model.model, "has_sliding_layers"):
        model.model.has_sliding_layers = "sliding_attention" in config.layer_types
    blocks = []
    for index, block in enumerate(plan):
        own: Any = shell(subject.blocks[block])
        own.self_attn = shell(own.self_attn)
        own.self_attn.layer_idx, own.self_attn.config = index, config
        blocks.append(own)
    model.model.layers = nn.ModuleList(blocks)
    order = plan if subject.plan is None else tuple(subject.plan[block] for block in plan)
    return Subject(model, subject.tokenizer, subject.name, order)


def shell(module: nn.Module) -> nn.Module:
    """A new module object with the same children and parameters; replacing a child of it leaves the original alone."""
    own = copy.copy(module)
    own.__dict__.update({k: copy.copy(v) for k, v in module.__dict__.items() if isinstance(v, dict)})
    return own


def with_projections(subject: Subject, changed: Mapping[tuple[int, str], nn.Module]) -> Subject:
    """The subject with other projections in some places; it shares all remaining weights.

    Args:
        subject: not changed.
        changed: projections by block and name.

    Raises:
        BadInput: a block without such a projection.
    """
    out = apply_plan(subject, range(subject.depth))
    for index in {block for block, _ in changed}:
        block: Any = out.blocks[index]
        block.mlp = shell(block.mlp)  # its attention is one already
    for (index, name), module in changed.items():
        replace(out.blocks[index], name, module)
    return Subject(out.model, out.tokenizer, out.name, subject.plan)


def with_bias(module: Projection, bias: torch.Tensor) -> Projection:
    """A projection with another bias (outputs,), which shares the weight."""
    new: Any = shell(module)
    if isinstance(module, Adapted):
        new.base = with_bias(module.base, bias)
    else:
        new.bias = nn.Parameter(bias, requires_grad=False)
    return new


def remove(subject: Subject, blocks: Sequence[int], part: str = "block") -> Subject:
    """The subject without some blocks, or without their attention or MLP; it shares all remaining weights.

    Args:
        subject: to remove from.
        blocks: their indices.
        part: "block", "attention" or "mlp".

    Raises:
        BadInput: a block out of range, or no block left.
    """
    if part == "block":
        gone = set(blocks)
        if gone and not 0 <= min(gone) <= max(gone) < subject.depth:
            raise BadInput(f"blocks {sorted(gone)} are out of range: the model has blocks 0 to {subject.depth - 1}")
        return apply_plan(subject, plan_without(subject.depth, gone))
    return without_parts(subject, dict.fromkeys(blocks, part))


class Without(nn.Module):
    """Replaces an attention or MLP that was removed, and adds nothing to the residual stream."""

    def __init__(self, part: str, block: int):
        super().__init__()
        self.part, self.layer_idx = part, block

    def forward(self, hidden_states: torch.Tensor, past_key_values=None, **_kwargs):
        """Zeros, in the form that the decoder block expects.

        In the KV cache a removed attention keeps one number a token, so that its layer goes on counting tokens:
        transformers takes the length so far from the first layer of each type, and finds a layer by its block's index.
        """
        zeros = torch.zeros_like(hidden_states)
        if self.part != "attention":
            return zeros
        if past_key_values is not None:
            count = zeros[:, None, :, :1]  # (B, 1 head, T, 1 number)
            past_key_values.update(count, count, self.layer_idx)
        return zeros, None


def without_parts(subject: Subject, parts: Mapping[int, str]) -> Subject:
    """The subject without the attention or the MLP of some blocks: {block: 'attention' or 'mlp'}.

    Raises:
        BadInput: an unknown part, a block out of range, or no attention left.
    """
    out = apply_plan(subject, range(subject.depth))
    for block, part in parts.items():
        if part not in ATTRIBUTES:
            raise unknown("part", part, ATTRIBUTES)
        if not 0 <= block < subject.depth:
            raise BadInput(f"block {block} is out of range: the model has blocks 0 to {subject.depth - 1}")
        setattr(out.blocks[block], ATTRIBUTES[part], Without(part, block))
    if all(isinstance(block.self_attn, Without) for block in out.blocks):
        raise BadInput("removing every attention leaves a model that sees one token at a time: keep at least one")
    return Subject(out.model, out.tokenizer, out.name, subject.plan)


def removed_parts(subject: Subject) -> dict[str, list[int]]:
    """The blocks that lost a part, {'attention': blocks, 'mlp': blocks}; a part that no block lost is left out."""
    removed: dict[str, list[int]] = {}
    for part, attribute in ATTRIBUTES.items():
        for i, block in enumerate(subject.blocks):
            if isinstance(getattr(block, attribute), Without):
                removed.setdefault(part, []).append(i)
    return removed
