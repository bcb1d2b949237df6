"""Greedy text from a subject: batched and left-padded, or one prompt with the time of each token."""

import itertools
import time
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from thesislib.errors import BadInput
from thesislib.prompts import adds_bos
from thesislib.subject import Subject


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
        out = _generate(subject, ids, mask, max_new_tokens)
        for i, text in zip(members, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True):
            answers[i] = text
    return answers


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
        eos_token_id=subject.model.generation_config.eos_token_id or tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.inference_mode():
        return subject.model.generate(ids.to(subject.device), attention_mask=mask.to(subject.device), generation_config=config, streamer=streamer).cpu()
