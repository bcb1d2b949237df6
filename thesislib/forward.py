"""The decoder run by hand: embed, block by block, head; and many orders of blocks that share their beginnings.

Two plans that begin with the same blocks have the same activations until they part, so all plans together are a tree
and each edge of it, one block, runs once: the 25 Franken-LLaMA plans on 30 blocks take 347 block runs, not 469.
"""

from collections.abc import Iterator, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

Plan = Sequence[int]


def final_states(
    model: PreTrainedModel,
    ids: torch.Tensor,
    plans: Sequence[Plan] | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """The normed output of the last block, once for each plan, as (index of the plan, states (B, T, D)).

    Args:
        model: a supported causal language model.
        ids: (B, T) tokens. Padding, if any, stands on the right, where causal attention keeps it out of sight.
        plans: orders of blocks; None runs the model as it is. Results come in the order of the tree, not of the list.
        positions: (B, T) rotary positions; by default 0 to T - 1.
        mask: (B, 1, T, T) boolean, True where a query (row) may look at a key (column); by default causal.

    """
    decoder = model.model
    if plans is None and mask is None:
        yield 0, decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        return
    h = decoder.embed_tokens(ids)  # (B, T, D)
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(h, position_ids=positions)
    windows = attention_windows(model.config)
    masks = {window: looking_back(window, positions, mask) for window in set(windows)}

    def run(h: torch.Tensor, at: int, group: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """All plans of `group` agree on their first `at` blocks, whose output is `h`."""
        branches: dict[int, list[int]] = {}
        for i in group:
            if len(plans[i]) == at:
                yield i, decoder.norm(h)
            else:
                branches.setdefault(plans[i][at], []).append(i)
        for block, members in branches.items():
            yield from run(decoder.layers[block](h, attention_mask=masks[windows[block]], position_embeddings=rotary), at + 1, members)

    plans = [range(len(decoder.layers))] if plans is None else plans
    yield from run(h, 0, list(range(len(plans))))


def blocks_run(plans: Sequence[Plan]) -> tuple[int, int]:
    """(with shared beginnings, without): how many blocks all plans together run."""
    return len({tuple(plan[: i + 1]) for plan in plans for i in range(len(plan))}), sum(map(len, plans))


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """How many tokens each block attends to, its own included; None for all before it."""
    usual = "sliding_attention" if config.model_type == "mistral" else "full_attention"
    types = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return [getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in types]


def looking_back(window: int | None, positions: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """The mask of blocks that attend to `window` tokens; None where causal attention alone is that.

    Subjects run with torch's scaled dot product attention, which is causal where it gets no mask (see `thesislib.subject.Subject`).

    Args:
        window: see `attention_windows`.
        positions: (B, T) rotary positions.
        mask: (B, 1, T, T) boolean, who may look at whom without a window; None for causal.

    Returns:
        (B, 1, T, T) boolean, or None.
    """
    length = positions.shape[1]
    if window is None or length <= window:
        return mask
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    return mask & (positions[:, None, :, None] - positions[:, None, None, :] < window)


def token_losses(model: PreTrainedModel, states: torch.Tensor, targets: torch.Tensor, rows: int = 1024, columns: int = 2048) -> torch.Tensor:
    """-log p(target) in nats for each state, without ever holding all logits.

    Args:
        model: gives the output embedding.
        states: (N, D) normed states.
        targets: (N,) the tokens they should predict.
        rows, columns: how many states meet how many words of the vocabulary at once. 1,024 x 2,048 float32 logits are
            8 MB and stay in a cache; a slice of few states and all words is slower and makes the matrix library copy
            the whole output embedding.

    Returns:
        (N,) float32.
    """
    words = model.get_output_embeddings().weight  # (V, D)
    losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
    for i in range(0, len(states), rows):
        x, target = states[i : i + rows], targets[i : i + rows]
        total = torch.full((len(x),), -torch.inf, device=x.device)  # log of the sum of exp(logits) so far
        hit = torch.empty_like(total)
        for j in range(0, len(words), columns):
            logits = (x @ words[j : j + columns].T).float()
            total = torch.logaddexp(total, logits.logsumexp(1))
            here = (target >= j) & (target < j + columns)
            hit[here] = logits[here, target[here] - j]
        losses[i : i + rows] = total - hit
    return losses
