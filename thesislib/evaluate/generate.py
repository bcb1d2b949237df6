"""Greedy decoding: of a batch of left-padded prompts, or of one prompt with the time of each token."""

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from thesislib.errors import BadInput
from thesislib.model.layers import ComputedLinear
from thesislib.model.prompts import adds_bos, control_tokens, end_tokens
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_tokens, longest_context

COMPACT_BELOW = 0.9  # drop finished rows once 10 % are finished; dropping copies the KV cache, so not at every step
AHEAD = 8  # steps between two checks for finished rows on a card, where each check waits for the card


def greedy(
    subject: Subject, prompts: list[str], max_new_tokens: int = 50, batch: int = 32, names: Sequence[str] | None = None
) -> list[str]:
    """The greedy continuation of each prompt, up to `max_new_tokens` tokens or the first of the `control_tokens`.

    Prompts run sorted by length, longest first: padding is small, and a batch that needs too much memory fails at once.
    In float32 the answers do not depend on `batch`.

    Args:
        subject: the model and tokenizer.
        prompts: one text each.
        max_new_tokens: the longest answer.
        batch: prompts at a time.
        names: the prompts' names in errors; by default their numbers.

    Raises:
        BadInput: an empty prompt, one that leaves no room for an answer in the model's context, or one with a token
            outside the model's embedding.
    """
    if max_new_tokens < 1 or batch < 1:
        raise BadInput(f"max_new_tokens {max_new_tokens} and batch {batch}: expected at least 1 each")
    tokenizer, stops = subject.tokenizer, control_tokens(subject)
    encoded = [tokenizer(p, add_special_tokens=adds_bos(subject, p))["input_ids"] for p in prompts]
    for i, ids in enumerate(encoded):
        _check_prompt(subject, ids, max_new_tokens, i if names is None else f"of '{names[i]}'")
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(prompts)
    for at in tqdm(range(0, len(order), batch), desc="generate", unit="batch", disable=None, leave=False):
        members = order[at : at + batch]
        longest = len(encoded[members[0]])
        ids = torch.full((len(members), longest), subject.pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            ids[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, longest - len(encoded[i]) :] = 1
        new = [_answer(tokens, stops) for tokens in continuations(subject, ids, mask, max_new_tokens)]
        for i, text in zip(members, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers


def _check_prompt(subject: Subject, ids: list[int], max_new_tokens: int, name: object) -> None:
    """Raises BadInput for a prompt that the subject cannot answer, see `greedy`."""
    if not ids:
        raise BadInput(f"prompt {name} is empty: expected some text")
    check_tokens(subject.model, subject.tokenizer, [ids])
    most = longest_context(subject.model)
    if most is not None and len(ids) + max_new_tokens > most:
        raise BadInput(
            f"prompt {name} has {len(ids)} tokens, and with {max_new_tokens} new ones exceeds the model's context of "
            f"{most} "
            "(max_position_embeddings): leave the question out, or use a model with a longer context"
        )


def _answer(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens of an answer: those before the first of `stops`."""
    return list(itertools.takewhile(lambda token: token not in stops, tokens))


@torch.inference_mode()
def continuations(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, ahead: int | None = None
) -> list[list[int]]:
    """The 1 to `max_new_tokens` greedy tokens after each row, with the end token where one came.

    They are the tokens of transformers' `generate`, which continues every row until the last has finished. On a CPU a
    finished row leaves the batch, and its keys and values the cache. On a card each check for finished rows waits for
    the card, so there are fewer checks, see `_run_ahead`. The first token is never an end token.

    Args:
        subject: the model; its end tokens are those of `end_tokens`.
        ids: (B, T) tokens, padded on the left.
        mask: (B, T) integers, 0 at padding and 1 elsewhere.
        max_new_tokens: at least 1.
        ahead: steps between two checks for finished rows; 0 checks at each step, and so does a model with sliding
            windows. By default 0 on a CPU and `AHEAD` elsewhere.
    """
    model, device = subject.model, subject.device
    if ahead is None:
        ahead = 0 if device.type == "cpu" else AHEAD
    static = StaticCache(config=model.config, max_cache_len=ids.shape[1] + max_new_tokens)  # nothing is allocated yet
    if ahead and not any(layer.is_sliding for layer in cast("list[Any]", static.layers)):
        return _run_ahead(subject, ids.to(device), mask.to(device), max_new_tokens, ahead, static)
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=device)
    new: list[list[int]] = [[] for _ in ids]
    ids, mask, cache = ids.to(device), mask.to(device), DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(ids), device=device)  # which prompt each row of the batch continues
    going = torch.ones_like(rows, dtype=torch.bool)  # not finished
    for n in range(max_new_tokens):
        logits = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        scores = logits[:, -1].float()  # (B, V); `generate` too compares in float32
        if n == 0:
            scores[:, ends] = -torch.inf
        tokens = scores.argmax(-1)
        for row, token in zip(rows[going].tolist(), tokens[going].tolist(), strict=True):
            new[row].append(token)
        going &= ~torch.isin(tokens, ends)
        left = going.nonzero().squeeze(1)
        if len(left) == 0:
            break
        if len(left) <= COMPACT_BELOW * len(rows):
            cache.batch_select_indices(left)
            mask, positions, tokens, rows, going = (x[left] for x in (mask, positions, tokens, rows, going))
        ids, positions, mask = tokens[:, None], positions[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return new


def _run_ahead(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, ahead: int, cache: StaticCache
) -> list[list[int]]:
    """`continuations` with a KV cache of full size from the start, and a check for finished rows every `ahead` steps.

    Finished rows go on, and their further tokens are cut off at the end. Every step reads and writes the same memory,
    so on an NVIDIA card one step is recorded as a CUDA graph and replayed: starting its thousand kernels one by one
    takes longer than running them.
    """
    model, (rows, length) = subject.model, ids.shape
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=ids.device)
    slots = torch.arange(length + max_new_tokens, device=ids.device)  # of the cache
    prompt = F.pad(mask.bool(), (0, max_new_tokens))[:, None, None]  # (B, 1, 1, T + new)
    query = slots[None, :length, None]
    # padding sees itself: some kernels give NaN for a query that sees nothing
    seen = prompt & (slots <= query) | (slots == query) & (slots < length)  # (B, 1, T, T + new)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    scores = logits[:, -1].float()
    scores[:, ends] = -torch.inf
    # a step reads and writes these tensors in place
    tokens = scores.argmax(-1, keepdim=True)  # (B, 1)
    new = tokens.repeat(1, max_new_tokens)
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    position, slot = positions[:, -1:] + 1, torch.full((1,), length, device=ids.device)

    def step() -> None:
        seen = prompt | (slots >= length) & (slots <= slot)
        logits = model(
            tokens, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        tokens.copy_(logits[:, -1].float().argmax(-1, keepdim=True))  # `generate` too compares in float32
        slot.add_(1)
        position.add_(1)
        new.index_copy_(1, slot - length, tokens)
        ended.logical_or_((tokens == ends).any(1))

    run, n = step, 0
    for n in range(1, max_new_tokens):
        if n == 2 and _recordable(model):  # the first step ran as usual, so that everything is allocated
            run = _recorded(step)
        run()
        if n % ahead == 0 and ended.all():
            break
    rows_of_tokens = new[:, : n + 1].tolist()
    stops = set(end_tokens(subject))
    return [row[: next((i for i, token in enumerate(row) if token in stops), n) + 1] for row in rows_of_tokens]


def _recordable(model: PreTrainedModel) -> bool:
    """Whether a step of a model never waits for the card, so that a CUDA graph can hold it: on an NVIDIA card, with
    dense linears and with rotary angles that do not depend on the length."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    rope_types = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    dense = not any(isinstance(m, ComputedLinear) for m in model.modules())
    nvidia = model.device.type == "cuda" and not torch.version.hip
    return nvidia and dense and rope_types <= {"default", "linear", "llama3", "yarn"}


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A step recorded as a CUDA graph; if it cannot be recorded, the step itself, with a warning."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        warnings.warn(
            f"steps could not be recorded and are started one by one ({str(error).splitlines()[0]})", stacklevel=2
        )
        return step
    return graph.replay


@dataclass(frozen=True)
class Timed:
    """A greedy completion with its times.

    Attributes:
        text: the completion.
        token_seconds: the seconds of each new token after the first.
    """

    text: str
    token_seconds: tuple[float, ...]

    @property
    def seconds_per_token(self) -> float:
        """Median over the tokens after the first. The first is left out, since its time contains the prompt's."""
        return median(self.token_seconds) if self.token_seconds else float("nan")


class _Clock:
    """A transformers streamer that keeps the time of each token."""

    def __init__(self):
        self.ticks: list[float] = []

    def put(self, _ids):
        self.ticks.append(time.perf_counter())

    def end(self):
        pass


def complete(subject: Subject, prompt: str, max_new_tokens: int = 50) -> Timed:
    """The greedy completion of one prompt by transformers' `generate`, timed token by token with the KV cache in use.

    Raises:
        BadInput: see `greedy`.
    """
    tokenizer = subject.tokenizer
    ids = tokenizer(prompt, add_special_tokens=adds_bos(subject, prompt))["input_ids"]
    _check_prompt(subject, ids, max_new_tokens, repr(prompt[:40]))
    encoded = torch.tensor([ids], device=subject.device)
    config = GenerationConfig(  # a repetition penalty in the model's own settings would count if none were given
        max_new_tokens=max_new_tokens, min_new_tokens=1, do_sample=False, use_cache=True, repetition_penalty=1.0,
        eos_token_id=end_tokens(subject) or None, pad_token_id=subject.pad_id,
    )  # fmt: skip
    clock = _Clock()
    with torch.inference_mode():
        out = cast("Any", subject.model).generate(
            encoded, attention_mask=torch.ones_like(encoded), generation_config=config, streamer=clock
        )
    text = tokenizer.decode(_answer(out[0, len(ids) :].tolist(), control_tokens(subject)), skip_special_tokens=True)
    ticks = clock.ticks[1:]  # the first call of the streamer passes the prompt
    return Timed(cast("str", text), tuple(b - a for a, b in itertools.pairwise(ticks)))
