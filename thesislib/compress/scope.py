"""The blocks that a stage works on: all, the last, the quiet, or those whose removal costs little."""

from typing import Any, cast

import torch

from thesislib.compress.calibration import Visitor, stream
from thesislib.compress.relevance import ByAnswers, check_tasks
from thesislib.errors import BadInput, unknown
from thesislib.model.subject import Subject

SCOPES = ("all", "last", "quiet", "relevance")


def check_scope(config: Any) -> None:
    """Raises BadInput for an unknown scope, one without its number of blocks, or a task that ranks no blocks.

    Args:
        config: a stage with `scope`, `blocks`, `task` and `items`.
    """
    if config.scope not in SCOPES:
        raise unknown("scope", config.scope, SCOPES)
    if (config.scope == "all") != (config.blocks is None):
        raise BadInput(
            f"scope {config.scope} with blocks {config.blocks}: expected a number of blocks for last, quiet and "
            "relevance, and none for all"
        )
    check_tasks([config.task])
    if config.items < 1:
        raise BadInput(f"items is {config.items}: expected at least 1")


def blocks_of(config: Any, depth: int, subject: Subject | None = None, data: str = "embedded") -> list[int]:
    """The blocks in a stage's scope, in order.

    Args:
        config: see `check_scope`; for scope quiet also calibrated.
        depth: blocks of the subject.
        subject: needed for quiet and relevance.
        data: a data spec.

    Raises:
        BadInput: more blocks than there are; see `thesislib.compress.relevance.ByAnswers`.
    """
    if config.scope == "all":
        return list(range(depth))
    if config.blocks > depth:
        raise BadInput(f"blocks is {config.blocks}: the model has {depth}")
    if config.scope == "last":
        return list(range(depth - config.blocks, depth))
    subject = cast("Subject", subject)
    ids = config.ids(subject.tokenizer, data)
    if config.scope == "quiet":
        scores = dict(enumerate(mlp_turns(subject, ids)))
    else:
        scores = ByAnswers([config.task], "likelihood", "block", ids, data, config.items, config.seed)(
            subject, range(depth)
        )
    return sorted(sorted(scores, key=lambda b: scores[b])[: config.blocks])


def mlp_turns(subject: Subject, ids: torch.Tensor) -> list[float]:
    """1 - cos of the residual stream before and after each block's MLP, mean over tokens: how far the MLP turns it.

    CALR (arXiv 2508.16680) calls the lowest quiet. It is not said there whether the input is normalised; here it is the
    residual itself, as in the cosine score of blocks. A block without an MLP scores 0.

    Args:
        subject: the model.
        ids: (N, T) windows.
    """
    sums = [0.0] * subject.depth
    before: dict[int, torch.Tensor] = {}

    class Turns(Visitor):
        def seen(self, block, first, x, y):
            if (mlp_input := before.pop(block, None)) is not None:
                cos = torch.nn.functional.cosine_similarity(mlp_input.float(), y.float(), dim=-1)
                sums[block] += float((1 - cos).sum())

    blocks: Any = subject.blocks
    hooks = [
        blocks[b].post_attention_layernorm.register_forward_pre_hook(
            lambda _module, args, b=b: before.__setitem__(b, args[0])
        )
        for b in range(subject.depth)
        if getattr(blocks[b], "mlp", None) is not None and hasattr(blocks[b], "post_attention_layernorm")
    ]
    try:
        stream(subject, ids, Turns(), feed="original", title="quiet")
    finally:
        for hook in hooks:
            hook.remove()
    return [s / ids.numel() for s in sums]
