"""The decoder run block by block, also in many orders of blocks at once.

Two plans that begin with the same blocks have the same activations up to the block where they differ. So all plans form
a tree, and each of its edges, one block, runs once: the 25 Franken-LLaMA plans on 30 blocks take 347 block runs instead
of 469.
"""

import math
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel

Plan = Sequence[int]

LOGITS = 1 << 30  # bytes that a GPU holds at a time of logits and their log-probabilities
BYTES_A_LOGIT = 8  # a logit in the model's dtype or float16, and its log-probability in float32
FILLING = 16384  # tokens a batch: with fewer a large GPU idles between kernels


def final_states(
    model: PreTrainedModel,
    ids: torch.Tensor,
    plans: Sequence[Plan] | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """The output of the final norm for each plan, as (index of the plan, states (B, T, D)).

    Args:
        model: a supported causal language model.
        ids: (B, T) tokens. Padding, if any, is on the right, where causal attention does not see it.
        plans: orders of blocks; None runs the model as it is. Results come in the order of the tree, not of the list.
        positions: (B, T) rotary positions; by default 0 to T - 1.
        mask: (B, 1, T, T) boolean, True where a query (row) may attend to a key (column); by default causal.
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
    masks = {window: window_mask(window, positions, mask) for window in set(windows)}

    def run(h: torch.Tensor, done: int, group: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """The states of the plans of `group`, whose first `done` blocks are the same and have the output `h`."""
        branches: dict[int, list[int]] = {}
        for i in group:
            if len(plans[i]) == done:
                yield i, decoder.norm(h)
            else:
                branches.setdefault(plans[i][done], []).append(i)
        for block, members in branches.items():
            out = decoder.layers[block](h, attention_mask=masks[windows[block]], position_embeddings=rotary)
            yield from run(out, done + 1, members)

    plans = [range(len(decoder.layers))] if plans is None else plans
    yield from run(h, 0, list(range(len(plans))))


def blocks_run(plans: Sequence[Plan]) -> tuple[int, int]:
    """How many blocks all plans together run: (with shared beginnings, without)."""
    return len({tuple(plan[: i + 1]) for plan in plans for i in range(len(plan))}), sum(map(len, plans))


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each block, in tokens and with the token itself; None for full causal attention."""
    usual = "sliding_attention" if config.model_type == "mistral" else "full_attention"
    types = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    return [getattr(config, "sliding_window", None) if t == "sliding_attention" else None for t in types]


def window_mask(window: int | None, positions: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor | None:
    """The attention mask of blocks with a sliding window; None if causal attention needs no mask.

    Subjects run with torch's scaled dot product attention, which is causal without a mask (see
    `thesislib.model.subject.Subject`).

    Args:
        window: see `attention_windows`.
        positions: (B, T) rotary positions.
        mask: (B, 1, T, T) boolean, the mask without a window; None for causal.

    Returns:
        (B, 1, T, T) boolean, True where a query may attend to a key; or None.
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
    """-log p(target) in nats for each state. All logits never exist at once, and a GPU is not waited for.

    Args:
        model: its output embedding makes logits of states.
        states: (N, D), the output of the final norm.
        targets: (N,) the tokens that the states should predict.
        rows: how many states are multiplied at once; by default, as `columns`, what `tile` gives.
        columns: with how many rows of the output embedding.

    Returns:
        (N,) float32.
    """
    head = model.get_output_embeddings().weight  # (V, D)
    if rows is None and columns is None:
        rows, columns = tile(states.device.type, len(head))
    dtype = states.dtype
    if states.is_cuda and dtype == torch.bfloat16 and columns is None and fits_half(model):
        dtype = torch.float16  # it holds bfloat16 numbers exactly, and products are rounded to 11 bits instead of 8
    head = head.to(dtype)
    losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
    for i in range(0, len(states), rows):
        x, target = states[i : i + rows], targets[i : i + rows]
        if columns is None:
            logits = x.to(dtype) @ head.T
            # one kernel makes float32 logarithms of float16 logits, without a float32 copy of them in between
            half = logits.is_cuda and dtype == torch.float16
            logprobs = torch._log_softmax(logits if half else logits.float(), 1, half)
            losses[i : i + rows] = -logprobs.gather(1, target[:, None])[:, 0]
            continue
        total = torch.full((len(x),), -torch.inf, device=x.device)  # log of the sum of exp(logits) so far
        target_logit = torch.empty_like(total)
        for j in range(0, len(head), columns):
            logits = (x @ head[j : j + columns].T).float()
            total = torch.logaddexp(total, logits.logsumexp(1))
            column = target - j
            logit = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target_logit = torch.where((column >= 0) & (column < logits.shape[1]), logit, target_logit)
        losses[i : i + rows] = total - target_logit
    return losses


def fits_half(model: PreTrainedModel) -> bool:
    """Whether every logit that a model can give is below float16's largest number.

    The bound is ``|w x| <= |w| |x|``, with ``|x| <= sqrt(D) max |gamma|`` for a state x out of the final norm.
    The first call for a model waits for the GPU.
    """
    if model not in _FITS_HALF:
        gamma, head = model.model.norm.weight.float(), model.get_output_embeddings().weight.float()
        largest = math.sqrt(len(gamma)) * gamma.abs().max() * head.norm(dim=1).max()
        _FITS_HALF[model] = bool(largest < torch.finfo(torch.float16).max)
    return _FITS_HALF[model]


_FITS_HALF: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def tile(device: str, vocabulary: int) -> tuple[int, int | None]:
    """How many states (rows) to multiply by how many rows of the output embedding (columns of the logits) at once.

    On a CPU 1,024 x 2,048: the 8 MB of float32 logits stay in a cache. Few states by all columns are slower, and make
    the matrix library copy the whole output embedding. On a GPU all columns (None), and as many states as `LOGITS`
    bytes hold: kernels should be large there, and no logits stay in a cache anyway.
    """
    return (1024, 2048) if device == "cpu" else (max(1, LOGITS // (vocabulary * BYTES_A_LOGIT)), None)


def batch_for(model: PreTrainedModel, length: int, on_cpu: int) -> int:
    """The default batch for sequences of `length` tokens: `on_cpu` on a CPU, on a GPU as many as fill it."""
    device = model.device
    if device.type == "cpu":
        return on_cpu
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return max(1, tokens_at_once(free, model.config.hidden_size, model.config.intermediate_size) // length)


def tokens_at_once(free: int | None, hidden: int, intermediate: int) -> int:
    """The tokens of a batch that fills a GPU: 16,384, or fewer if their activations took over a quarter of `free`.

    A token's activations are eight vectors of `hidden` and four of `intermediate` numbers, 4 bytes each. `free` is in
    bytes, None if it is not known.
    """
    return FILLING if free is None else min(FILLING, free // 4 // (4 * (8 * hidden + 4 * intermediate)))
