"""Greedy text from a subject: batched and left-padded, or one prompt with the time of each token."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

from thesislib.errors import BadInput
from thesislib.prompts import adds_bos, control_tokens, end_tokens
from thesislib.subject import Subject
from thesislib.tokenizers import check_tokens, longest_context

WORTH = 0.9  # finished rows leave the batch when at most this share goes on: to leave copies the keys and values of the others


def greedy(subject: Subject, prompts: list[str], max_new_tokens: int = 50, batch: int = 32, names: Sequence[str] | None = None) -> list[str]:
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
        BadInput: an empty prompt, one that leaves no room for an answer in the model's context, or one with a token that
            the model has no row for.
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
        raise BadInput(f"prompt {name} has {len(ids)} tokens, and with {max_new_tokens} new ones exceeds the model's context of {most} "
                       "(max_position_embeddings): leave the question out, or use a model with a longer context")  # fmt: skip


def _answer(tokens: list[int], over: set[int]) -> list[int]:
    """The tokens before the first at which an answer is over: what a model says after that is no part of it."""
    return list(itertools.takewhile(lambda token: token not in over, tokens))


@torch.inference_mode()
def continuations(subject: Subject, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int) -> list[list[int]]:
    """The 1 to `max_new_tokens` greedy tokens after each row, the end token included where it came.

    The tokens of transformers' `generate`, which runs every row on until the last has ended; here a row that has ended
    leaves the batch, its keys and values with it. The first token is never an end token.

    Args:
        subject: the model; its end tokens are those of `end_tokens`.
        ids: (B, T) tokens, padded on the left.
        mask: (B, T) integers, 0 at padding and 1 elsewhere.
        max_new_tokens: at least 1.
    """
    model, device = subject.model, subject.device
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=device)
    found: list[list[int]] = [[] for _ in ids]
    ids, mask, cache = ids.to(device), mask.to(device), DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.arange(len(ids), device=device)  # which of `found` each row of the batch continues
    going = torch.ones_like(rows, dtype=torch.bool)
    for n in range(max_new_tokens):
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
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
        out = subject.model.generate(encoded, attention_mask=torch.ones_like(encoded), generation_config=config, streamer=clock)
    text = tokenizer.decode(_answer(out[0, len(ids) :].tolist(), control_tokens(subject)), skip_special_tokens=True)
    ticks = clock.ticks[1:]  # the first call hands over the prompt
    return Timed(text, tuple(b - a for a, b in itertools.pairwise(ticks)))
