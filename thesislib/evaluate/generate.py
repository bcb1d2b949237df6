"""Greedy text from a subject: batched and left-padded, or one prompt with the time of each token."""

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

# finished rows leave the batch when at most this share goes on: to leave copies the keys and values of the others
WORTH = 0.9
AHEAD = 8  # steps between two looks at what has ended, where a look waits for the card


def greedy(
    subject: Subject, prompts: list[str], max_new_tokens: int = 50, batch: int = 32, names: Sequence[str] | None = None
) -> list[str]:
    """The greedy continuation of each prompt, up to `max_new_tokens` tokens or the first of the `control_tokens`.

    Prompts run sorted by length, longest first, so that padding is small and memory is tried at once; in float32 the
    answers do not depend on `batch`.

    Args:
        subject: the model and tokenizer.
        prompts: one text each.
        max_new_tokens: the longest answer.
        batch: prompts at a time.
        names: what an error calls the prompts; by default their numbers.

    Raises:
        BadInput: an empty prompt, one that leaves no room for an answer in the model's context, or one with a token
            that the model has no row for.
    """
    if max_new_tokens < 1 or batch < 1:
        raise BadInput(f"max_new_tokens {max_new_tokens} and batch {batch}: expected at least 1 each")
    tokenizer, over = subject.tokenizer, control_tokens(subject)
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
        new = [_answer(tokens, over) for tokens in continuations(subject, ids, mask, max_new_tokens)]
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


def _answer(tokens: list[int], over: set[int]) -> list[int]:
    """The tokens before the first at which an answer is over: what a model says after that is no part of it."""
    return list(itertools.takewhile(lambda token: token not in over, tokens))


@torch.inference_mode()
def continuations(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, ahead: int | None = None
) -> list[list[int]]:
    """The 1 to `max_new_tokens` greedy tokens after each row, the end token included where it came.

    The tokens of transformers' `generate`, which runs every row on until the last has ended; on a CPU a row that has
    ended leaves the batch, its keys and values with it. A card would be waited for at each look at what has ended, so
    there it runs ahead, see `_run_ahead`. The first token is never an end token.

    Args:
        subject: the model; its end tokens are those of `end_tokens`.
        ids: (B, T) tokens, padded on the left.
        mask: (B, T) integers, 0 at padding and 1 elsewhere.
        max_new_tokens: at least 1.
        ahead: steps without a look; 0 looks at each, and so does a model with sliding windows. By default 0 on a CPU,
            elsewhere `AHEAD`.
    """
    model, device = subject.model, subject.device
    ahead = (0 if device.type == "cpu" else AHEAD) if ahead is None else ahead
    whole = StaticCache(config=model.config, max_cache_len=ids.shape[1] + max_new_tokens)  # nothing is allocated yet
    if ahead and not any(layer.is_sliding for layer in cast("list[Any]", whole.layers)):
        return _run_ahead(subject, ids.to(device), mask.to(device), max_new_tokens, ahead, whole)
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=device)
    found: list[list[int]] = [[] for _ in ids]
    ids, mask, cache = ids.to(device), mask.to(device), DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(ids), device=device)  # which of `found` each row of the batch continues
    going = torch.ones_like(rows, dtype=torch.bool)
    for n in range(max_new_tokens):
        logits = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        scores = logits[:, -1].float()  # (B, V); `generate` too compares in float32
        if n == 0:
            scores[:, ends] = -torch.inf
        tokens = scores.argmax(-1)
        for row, token in zip(rows[going].tolist(), tokens[going].tolist(), strict=True):
            found[row].append(token)
        going &= ~torch.isin(tokens, ends)
        left = going.nonzero().squeeze(1)
        if len(left) == 0:
            break
        if len(left) <= WORTH * len(rows):
            cache.batch_select_indices(left)
            mask, positions, tokens, rows, going = (x[left] for x in (mask, positions, tokens, rows, going))
        ids, positions, mask = tokens[:, None], positions[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return found


def _run_ahead(
    subject: Subject, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, ahead: int, cache: StaticCache
) -> list[list[int]]:
    """`continuations` with room for all keys and values from the start, and a look at what has ended every `ahead`
    steps.

    Rows that have ended run on, and what they say is cut off. A step does the same to the same memory each time, so on
    an NVIDIA card it is recorded once and played again: to start its thousand kernels one by one takes longer than they
    do.
    """
    model, (rows, length) = subject.model, ids.shape
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=ids.device)
    places = torch.arange(length + max_new_tokens, device=ids.device)
    prompt = F.pad(mask.bool(), (0, max_new_tokens))[:, None, None]  # (B, 1, 1, T + new)
    here = places[None, :length, None]
    # padding sees itself, for what a query that sees nothing gives is no number in some kernels
    seen = prompt & (places <= here) | (places == here) & (places < length)  # (B, 1, T, T + new)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    scores = logits[:, -1].float()
    scores[:, ends] = -torch.inf
    # what a step reads and writes, always in the same place
    tokens = scores.argmax(-1, keepdim=True)  # (B, 1)
    said = tokens.repeat(1, max_new_tokens)
    ended = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    position, slot = positions[:, -1:] + 1, torch.full((1,), length, device=ids.device)

    def step() -> None:
        seen = prompt | (places >= length) & (places <= slot)
        logits = model(
            tokens, attention_mask=seen, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        tokens.copy_(logits[:, -1].float().argmax(-1, keepdim=True))  # `generate` too compares in float32
        slot.add_(1)
        position.add_(1)
        said.index_copy_(1, slot - length, tokens)
        ended.logical_or_((tokens == ends).any(1))

    play, n = step, 0
    for n in range(1, max_new_tokens):
        if n == 2 and _recordable(model):  # the first step was as usual, so that all that is made once is made
            play = _recorded(step)
        play()
        if n % ahead == 0 and ended.all():
            break
    return [
        row[: next((i for i, token in enumerate(row) if token in end_tokens(subject)), n) + 1]
        for row in said[:, : n + 1].tolist()
    ]


def _recordable(model: PreTrainedModel) -> bool:
    """Whether a step of a model never waits for the card: plain linears, on an NVIDIA card, and rotary angles that do
    not depend on the length."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    plain = not any(isinstance(m, ComputedLinear) for m in model.modules())
    return (
        model.device.type == "cuda"
        and not torch.version.hip
        and plain
        and kinds <= {"default", "linear", "llama3", "yarn"}
    )


def _recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A step as one piece that the card repeats by itself; the step as it is, with a warning, if it cannot be
    recorded."""
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
    """A greedy completion, the seconds of each new token after the first, and the number of new tokens."""

    text: str
    token_seconds: tuple[float, ...]

    @property
    def seconds_per_token(self) -> float:
        """Median over the tokens after the first, which pays for the prompt."""
        return median(self.token_seconds) if self.token_seconds else float("nan")


class _Clock:
    """A transformers streamer that notes when each token came."""

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
    config = GenerationConfig(  # a penalty that the model's own settings hold would come back if it were not named
        max_new_tokens=max_new_tokens, min_new_tokens=1, do_sample=False, use_cache=True, repetition_penalty=1.0,
        eos_token_id=end_tokens(subject) or None, pad_token_id=subject.pad_id,
    )  # fmt: skip
    clock = _Clock()
    with torch.inference_mode():
        out = cast("Any", subject.model).generate(
            encoded, attention_mask=torch.ones_like(encoded), generation_config=config, streamer=clock
        )
    text = tokenizer.decode(_answer(out[0, len(ids) :].tolist(), control_tokens(subject)), skip_special_tokens=True)
    ticks = clock.ticks[1:]  # the first call hands over the prompt
    return Timed(cast("str", text), tuple(b - a for a, b in itertools.pairwise(ticks)))
