"""Greedy text from a subject: batched and left-padded, or one prompt with the time of each token."""

import itertools
import time
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm
from transformers import DynamicCache, GenerationConfig

from thesislib.errors import BadInput
from thesislib.prompts import adds_bos
from thesislib.subject import Subject

WORTH = 0.9  # finished rows leave the batch when at most this share goes on: to leave copies the keys and values of the others


def greedy(subject: Subject, prompts: list[str], max_new_tokens: int = 50, batch: int = 32) -> list[str]:
    """The greedy continuation of each prompt, 1 to `max_new_tokens` tokens, up to the end-of-text token.

    Prompts run sorted by length, longest first, so that padding is small and memory is tried at once; in float32 the
    answers do not depend on `batch`.

    Raises:
        BadInput: an empty prompt, or no room for a new token.
    """
    if max_new_tokens < 1 or batch < 1:
        raise BadInput(f"max_new_tokens {max_new_tokens} and batch {batch}: expected at least 1 each")
    tokenizer = subject.tokenizer
    encoded = [tokenizer(p, add_special_tokens=adds_bos(subject, p))["input_ids"] for p in prompts]
    if any(not e for e in encoded):
        raise BadInput(f"prompt {[bool(e) for e in encoded].index(False)} is empty: expected some text")
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    answers = [""] * len(prompts)
    for at in tqdm(range(0, len(order), batch), desc="generate", unit="batch", disable=None, leave=False):
        members = order[at : at + batch]
        longest = len(encoded[members[0]])
        ids = torch.full((len(members), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(members):
            ids[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, longest - len(encoded[i]) :] = 1
        new = continuations(subject, ids, mask, max_new_tokens)
        for i, text in zip(members, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers


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


def end_tokens(subject: Subject) -> list[int]:
    """The tokens that end a text: the model's, else the tokenizer's; none where neither names one."""
    named = subject.model.generation_config.eos_token_id
    named = subject.tokenizer.eos_token_id if named is None else named
    return [] if named is None else named if isinstance(named, list) else [named]


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
    """The greedy completion of one prompt by transformers' `generate`, timed token by token with the KV cache in use."""
    tokenizer = subject.tokenizer
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=adds_bos(subject, prompt)).to(subject.device)
    config = GenerationConfig(  # a penalty that the model's own settings hold would come back if it were not named
        max_new_tokens=max_new_tokens, min_new_tokens=1, do_sample=False, use_cache=True, repetition_penalty=1.0,
        eos_token_id=end_tokens(subject) or None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    clock = _Clock()
    with torch.inference_mode():
        out = subject.model.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=config, streamer=clock)
    text = tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    ticks = clock.ticks[1:]  # the first call hands over the prompt
    return Timed(text, tuple(b - a for a, b in itertools.pairwise(ticks)))
