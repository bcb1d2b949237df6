"""The decoder run by hand: embed, block by block, head; and many orders of blocks that share their beginnings.

Two plans that begin with the same blocks have the same activations until they part, so all plans together are a tree
and each edge of it, one block, runs once: the 25 Franken-LLaMA plans on 30 blocks take 347 block runs, not 469.
"""

import math
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel

Plan = Sequence[int]

LOGITS = 1 << 30  # bytes of logits and what is made of them at a time, on a card
BYTES_A_LOGIT = 8  # in the model's type or float16, and its logarithm of a probability in float32
FILLING = 16384  # tokens: fewer leave a large card idle between kernels


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
            yield from run(
                decoder.layers[block](h, attention_mask=masks[windows[block]], position_embeddings=rotary),
                at + 1,
                members,
            )

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

    Subjects run with torch's scaled dot product attention, which is causal where it gets no mask (see
    `thesislib.model.subject.Subject`).

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


def token_losses(
    model: PreTrainedModel,
    states: torch.Tensor,
    targets: torch.Tensor,
    rows: int | None = None,
    columns: int | None = None,
) -> torch.Tensor:
    """-log p(target) in nats for each state, without ever holding all logits, and without waiting for a card.

    Args:
        model: gives the output embedding.
        states: (N, D) normed states.
        targets: (N,) the tokens they should predict.
        rows, columns: how many states meet how many words of the vocabulary at once; by default those of `tile`.

    Returns:
        (N,) float32.
    """
    words = model.get_output_embeddings().weight  # (V, D)
    if rows is None and columns is None:
        rows, columns = tile(states.device.type, len(words))
    # bfloat16 numbers stand in float16 as they are, and their products are rounded less: to 11 bits instead of 8
    kind = (
        torch.float16
        if states.is_cuda and states.dtype == torch.bfloat16 and columns is None and fits_half(model)
        else states.dtype
    )
    words = words.to(kind)
    losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
    for i in range(0, len(states), rows):
        x, target = states[i : i + rows], targets[i : i + rows]
        if columns is None:
            logits = x.to(kind) @ words.T
            # of float16 one kernel makes float32 logarithms without a float32 copy of the logits in between
            half = logits.is_cuda and kind == torch.float16
            logprobs = torch._log_softmax(logits if half else logits.float(), 1, half)
            losses[i : i + rows] = -logprobs.gather(1, target[:, None])[:, 0]
            continue
        total = torch.full((len(x),), -torch.inf, device=x.device)  # log of the sum of exp(logits) so far
        hit = torch.empty_like(total)
        for j in range(0, len(words), columns):
            logits = (x @ words[j : j + columns].T).float()
            total = torch.logaddexp(total, logits.logsumexp(1))
            place = target - j
            logit = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            hit = torch.where((place >= 0) & (place < logits.shape[1]), logit, hit)
        losses[i : i + rows] = total - hit
    return losses


def fits_half(model: PreTrainedModel) -> bool:
    """Whether float16 holds every logit that a model can have: ``|w x| <= |w| |x|``, and a normed state x is at most
    ``sqrt(D) max |gamma|`` long.

    It waits for a card, once for a model.
    """
    if model not in _FITS_HALF:
        gamma, words = model.model.norm.weight.float(), model.get_output_embeddings().weight.float()
        longest = math.sqrt(len(gamma)) * gamma.abs().max() * words.norm(dim=1).max()
        _FITS_HALF[model] = bool(longest < torch.finfo(torch.float16).max)
    return _FITS_HALF[model]


_FITS_HALF: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def tile(device: str, words: int) -> tuple[int, int | None]:
    """(rows, columns): how many states meet how many of the `words` of a vocabulary at once on a type of device; None
    for all.

    On a CPU 1,024 x 2,048: 8 MB of float32 logits stay in a cache; a slice of few states and all words is slower and
    makes the matrix library copy the whole output embedding. On a card all words, and as many states as `LOGITS` bytes
    hold: there each kernel should be large, and nothing of it stays in a cache.
    """
    return (1024, 2048) if device == "cpu" else (max(1, LOGITS // (words * BYTES_A_LOGIT)), None)


def batch_for(model: PreTrainedModel, length: int, on_cpu: int) -> int:
    """How many sequences of `length` tokens to run at a time where nobody says: `on_cpu` on a CPU, on a card what fills
    it."""
    device = model.device
    if device.type == "cpu":
        return on_cpu
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return max(1, tokens_at_once(free, model.config.hidden_size, model.config.intermediate_size) // length)


def tokens_at_once(free: int | None, hidden: int, intermediate: int) -> int:
    """How many tokens fill a card, 16,384, or fewer where their activations would take more than a quarter of its
    `free` bytes.

    Eight vectors of `hidden` and four of `intermediate` numbers a token are held at once, 4 bytes each.
    """
    return FILLING if free is None else min(FILLING, free // 4 // (4 * (8 * hidden + 4 * intermediate)))
