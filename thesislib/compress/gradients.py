"""Gradients of the next-token loss with respect to a model's own weights, for scores that need them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from thesislib.compress.selection import LinearKey
from thesislib.errors import BadInput
from thesislib.model.layers import Projection
from thesislib.model.subject import Subject


@contextmanager
def differentiable(weights: Mapping[str, torch.Tensor], what: str, instead: str) -> Iterator[None]:
    """A context in which weights require gradients; when it ends they have none.

    Args:
        weights: of a model, by their names in the message.
        what: needs them, for the message.
        instead: what the message recommends.

    Raises:
        BadInput: a weight without a gradient, such as a packed or quantised one.
    """
    for name, w in weights.items():
        if not isinstance(w, nn.Parameter) or not w.is_floating_point():
            raise BadInput(
                f"{what} needs the gradients of {name}, whose weight is computed from packed or quantised numbers or "
                f"is a pair of low rank: {instead}"
            )
    every = list(weights.values())
    try:
        for w in every:
            w.requires_grad_(True)
        yield
    finally:
        for w in every:
            w.requires_grad_(False)
            w.grad = None


def next_token_nats(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """The summed loss of windows (B, T), in nats, with its graph."""
    some = ids.to(subject.device)
    states = subject.model.model(input_ids=some, use_cache=False).last_hidden_state
    logits = subject.model.get_output_embeddings()(states[:, :-1]).float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum")


def fisher_rows(subject: Subject, taken: Mapping[LinearKey, Projection], ids: torch.Tensor) -> dict:
    """FWSVD's weights of each projection's rows: the root of the sum over inputs of the squared gradients' mean.

    Gradients are of a window's mean loss a token; their mean is over windows. They are divided by their root mean
    square over rows, which changes no pair, and are at least the largest times float32's epsilon.

    Args:
        subject: is not changed.
        taken: its projections, with ordinary weights.
        ids: (N, T) windows.

    Returns:
        {(block, projection): (outputs,) float64}.

    Raises:
        BadInput: quantised or packed weights; gradients that are not finite.
    """
    weights = {key: module.weight for key, module in taken.items()}
    sums = {key: torch.zeros(len(w), dtype=torch.float64) for key, w in weights.items()}
    named = {f"blocks.{block}.{name}": w for (block, name), w in weights.items()}
    with differentiable(named, "method fwsvd", "use svd_llm"):
        for window in tqdm(ids, desc="fisher", unit="window", disable=None, leave=False):
            (next_token_nats(subject, window[None]) / (len(window) - 1)).backward()
            for key, w in weights.items():
                sums[key] += w.grad.double().square().sum(1).cpu()
                w.grad = None
    found = {}
    for (block, name), total in sums.items():
        if not torch.isfinite(total).all() or not total.any():
            raise BadInput(
                f"the gradients of blocks.{block}.{name} are not finite, or all zero: the model is broken there"
            )
        root = (total / total.mean()).sqrt()
        found[block, name] = root.clamp(min=float(root.max()) * torch.finfo(torch.float32).eps)
    return found
