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

LEAVE = 0.9  # ended rows are dropped once at most this share goes on: that copies the rest of the cache, as each new token does anyway
PAYS = 32  # tokens that must be saved for a beginning to be read by itself: that reads all weights once more


def greedy(subject: Subject, prompts: list[str], max_new_tokens: int = 50, batch: int = 32) -> list[str]:
    """The greedy continuation of each prompt, 1 to `max_new_tokens` tokens, up to the end-of-text token.

    Prompts run sorted by length, longest first, so that padding is small and memory is tried at once; in float32 the
    answers do not depend on `batch`. Where a model's generation_config.json asks for a repetition penalty, there is none.

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
        new = continuations(subject, [encoded[i] for i in members], max_new_tokens)
        for i, text in zip(members, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers


@torch.inference_mode()
def continuations(subject: Subject, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The 1 to `max_new_tokens` greedy tokens after each prompt, all prompts at once; an end token is the last of its row.

    transformers' `generate` finds the same and goes on with all rows until the last has ended. Here a row leaves the
    batch when it has, and what all prompts begin with, such as a chat template, is read once.
    """
    model, device, count = subject.model, subject.device, len(prompts)
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config)
    shared = 0 if any(cache.is_sliding) else common(prompts)  # a sliding window counts columns, the padding in the middle too
    if shared * (count - 1) < PAYS:
        shared = 0
    longest = max(map(len, prompts)) - shared
    ids = torch.full((count, longest), subject.tokenizer.pad_token_id)  # (B, T), padded between what is shared and what is not
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) + shared :] = torch.tensor(prompt[shared:])
        mask[row, longest - len(prompt) + shared :] = 1
    ids, mask = ids.to(device), torch.cat([mask.new_ones(count, shared), mask], 1).to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    if shared:
        model.model(torch.tensor([prompts[0][:shared]], device=device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
    found: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(count, device=device)  # whose tokens in `found` each row of the batch goes on with
    going = torch.ones(count, dtype=torch.bool, device=device)
    for n in range(max_new_tokens):
        # (B, V), in float32 as `generate` compares them
        scores = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        if n == 0:
            scores[:, ends] = -torch.inf
        tokens = scores.argmax(-1)
        for row, token in zip(rows[going].tolist(), tokens[going].tolist(), strict=True):
            found[row].append(token)
        going &= ~torch.isin(tokens, ends)
        left = going.nonzero().squeeze(1)
        if not len(left):
            break
        if len(left) <= LEAVE * len(going):
            cache.batch_select_indices(left)
            mask, positions, tokens, rows, going = (x[left] for x in (mask, positions, tokens, rows, going))
        ids, positions, mask = tokens[:, None], positions[:, -1:] + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return found


def common(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with; the last of the shortest stays out, for something must be left to run."""
    least = min(prompts, key=len)[:-1]
    return next((at for at, token in enumerate(least) if any(prompt[at] != token for prompt in prompts)), len(least))


def end_tokens(subject: Subject) -> list[int]:
    """The tokens that end a text: the model's, else the tokenizer's; none where neither names any."""
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
    """The greedy completion of one prompt, timed token by token with the KV cache in use."""
    encoded = subject.tokenizer(prompt, return_tensors="pt", add_special_tokens=adds_bos(subject, prompt))
    clock = _Clock()
    out = _generate(subject, encoded["input_ids"], encoded["attention_mask"], max_new_tokens, clock)
    text = subject.tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    ticks = clock.ticks[1:]  # the first call hands over the prompt
    return Timed(text, tuple(b - a for a, b in itertools.pairwise(ticks)))


def _generate(subject: Subject, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, streamer=None) -> torch.Tensor:
    tokenizer = subject.tokenizer
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, min_new_tokens=1, do_sample=False, use_cache=True,
        eos_token_id=end_tokens(subject) or None, pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.0,  # a model's own would not be greedy
    )  # fmt: skip
    with torch.inference_mode():
        return subject.model.generate(ids.to(subject.device), attention_mask=mask.to(subject.device), generation_config=config, streamer=streamer).cpu()
