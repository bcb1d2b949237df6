"""Relevance over training: a small model trained from scratch, and what its blocks are worth at ten checkpoints.

The model has the subject's architecture, a sixth as wide and with 8 blocks. It reads the calibration half of the
embedded Wikipedia many times over and is measured on the evaluation half: no more than a small model on little text. No
weight is kept, only what was measured.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from thesislib.compress.depth import influence
from thesislib.compress.relevance import next_tokens, outcomes, relevance
from thesislib.config import positive
from thesislib.errors import BadInput
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_text, evaluation_text, windows

ROWS_AT_ONCE = 16  # windows that are measured together


@dataclass(frozen=True)
class FromScratch:
    """How a small model is trained and measured.

    The learning rate is constant after the warm-up, so that a checkpoint is the end of the run of so many steps.

    Attributes:
        narrow: the subject's width and MLP width are divided by this.
        blocks: of the model.
        vocabulary: tokens; see `small_tokenizer`.
        length: tokens of a window.
        batch: windows a step.
        steps: of the optimiser (AdamW).
        first: the step of the first checkpoint; the others follow in geometric steps.
        checkpoints: how many, the last after the last step.
        learning_rate: after the warm-up.
        warmup: steps, in which the learning rate rises linearly.
        held_out: windows of held-out text on which a checkpoint is measured, evenly spread.
    """

    narrow: int = 6
    blocks: int = 8
    vocabulary: int = 1024
    length: int = 128
    batch: int = 16
    steps: int = 640
    first: int = 20
    checkpoints: int = 10
    learning_rate: float = 3e-3
    warmup: int = 20
    held_out: int = 96

    def __post_init__(self):
        positive(**{name: value for name, value in vars(self).items() if name != "learning_rate"})
        if len(self.measured) < self.checkpoints:
            raise BadInput(
                f"{self.checkpoints} checkpoints from step {self.first} to {self.steps} fall on the same steps: "
                f"expected at most {len(self.measured)}"
            )

    @property
    def measured(self) -> list[int]:
        """The steps after which the model is measured."""
        return sorted({int(step) for step in np.geomspace(self.first, self.steps, self.checkpoints).round()})


@dataclass(frozen=True)
class Checkpoint:
    """A model in training, measured on held-out text with all blocks and without each one.

    Attributes:
        seed: of the run.
        step: of the optimiser.
        seen: tokens read so far, repeats counted.
        loss: of the last step's batch, nats a token.
        predicted: tokens that each window predicts.
        commonest: in each window, how many of them are the commonest token of the training text.
        right: (blocks + 1, windows) how many next tokens are right with all blocks (first row), without block 0, ...
        nats: (blocks + 1, windows) their -log p, summed.
        cosine: each block's `thesislib.compress.depth.influence`.
    """

    seed: int
    step: int
    seen: int
    loss: float
    predicted: int
    commonest: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]
    nats: tuple[tuple[float, ...], ...]
    cosine: tuple[float, ...]

    @property
    def chance(self) -> float:
        """The accuracy of always predicting the training text's commonest token."""
        return float(np.mean(self.commonest)) / self.predicted

    @cached_property
    def accuracy(self) -> list[float]:
        """Next-token top-1 accuracy, rows as `right`."""
        return (np.mean(self.right, axis=1) / self.predicted).tolist()

    @cached_property
    def perplexity(self) -> list[float]:
        """exp of the mean loss, rows as `nats`."""
        return np.exp(np.mean(self.nats, axis=1) / self.predicted).tolist()

    @property
    def relevance(self) -> list[float] | None:
        """Each block's `thesislib.compress.relevance.relevance`; None if the model is at chance."""
        whole, *without = self.accuracy
        return None if whole <= self.chance else [relevance(one, whole, self.chance) for one in without]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of relevance and cosine score over blocks; None without relevance or if one is constant."""
        if self.relevance is None or min(map(len, map(set, (self.relevance, self.cosine)))) < 2:
            return None
        return float(spearmanr(self.relevance, self.cosine).statistic)


def trained(subject: Subject, settings: FromScratch, seed: int, data: str = "embedded") -> Iterator[Checkpoint]:
    """Train a small model from scratch and measure it at each checkpoint. The same seed gives the same numbers.

    Args:
        subject: whose architecture and tokenizer the model takes, in small.
        settings: of the training.
        seed: of the weights and of the order of windows.
        data: a data spec.

    Raises:
        BadInput: see `prepared`.
    """
    config, tokenizer, ids, held_out = prepared(subject, settings, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # there is no dropout
    small = Subject(model, tokenizer, f"{settings.blocks} blocks from scratch")
    commonest = int(ids.flatten().bincount().argmax())
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step in tqdm(range(1, settings.steps + 1), desc=f"seed {seed}", unit="step", disable=None, leave=False):
        while len(queue) < settings.batch:  # each epoch in another order
            queue += torch.randperm(len(ids), generator=order).tolist()
        some, queue = ids[queue[: settings.batch]], queue[settings.batch :]
        optimiser.param_groups[0]["lr"] = settings.learning_rate * min(1, step / settings.warmup)
        loss = model(input_ids=some, labels=some, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step in settings.measured:
            found = outcomes(small, next_tokens(held_out), range(settings.blocks), batch=ROWS_AT_ONCE)
            predicted = settings.length - 1
            yield Checkpoint(
                seed,
                step,
                step * settings.batch * settings.length,
                loss.item(),
                predicted,
                tuple((held_out[:, 1:] == commonest).sum(1).tolist()),
                tuple(map(tuple, (found.correct * predicted).round().astype(int).tolist())),
                tuple(map(tuple, (-found.margin * predicted).tolist())),
                tuple(influence(small, held_out)),
            )


class Prepared(NamedTuple):
    """What every seed of a training has in common.

    Args:
        config: of the small model.
        tokenizer: its own.
        ids: (N, T) windows that it is trained on.
        held_out: (M, T) windows that it is measured on.
    """

    config: Any
    tokenizer: PreTrainedTokenizerFast
    ids: torch.Tensor
    held_out: torch.Tensor


def prepared(subject: Subject, settings: FromScratch, data: str = "embedded") -> Prepared:
    """The small model's configuration and tokenizer, and its text; arguments as of `trained`.

    Raises:
        BadInput: see `small_tokenizer`, `small_config` and `thesislib.sources.corpus.windows`.
    """
    tokenizer = small_tokenizer(subject.tokenizer, settings.vocabulary)
    config = small_config(subject.model.config, settings, len(tokenizer))
    ids = windows(calibration_text(data=data), tokenizer, settings.length).ids
    held_out = windows(evaluation_text(data), tokenizer, settings.length, settings.held_out).ids
    return Prepared(config, tokenizer, ids, held_out)


def small_tokenizer(tokenizer: Any, size: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer with its single characters and as many of its first merges as make `size` tokens.

    It still reads any text, while the most frequent tokens alone would leave a rest that nothing can be learned about.
    The subject's 49,152 tokens would be nine tenths of a small model, and most of them are not in so short a text.

    Raises:
        BadInput: a tokenizer of another kind, or a size below its single characters.
    """
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    if plain["model"]["type"] != "BPE":
        raise BadInput(f"a tokenizer of kind {plain['model']['type']} cannot be cut: expected byte pairs (BPE)")
    special = {token["content"] for token in plain["added_tokens"]}
    single = sorted(token for token in plain["model"]["vocab"] if len(token) == 1 and token not in special)
    if size < len(single):
        raise BadInput(f"vocabulary {size} is too small: the tokenizer's single characters are {len(single)}")
    kept, merges = dict.fromkeys(single), []
    for first, second in plain["model"]["merges"]:
        if len(kept) == size:
            break
        if first in kept and second in kept:
            kept[first + second] = None
            merges.append([first, second])
    plain["model"] |= {"vocab": {token: i for i, token in enumerate(kept)}, "merges": merges}
    plain |= {"added_tokens": [], "post_processor": None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)))


def small_config(config: Any, settings: FromScratch, vocabulary: int) -> Any:
    """The subject's configuration, narrower, with one key-value head and its query heads, and with fewer blocks.

    The initial weights have the standard deviation 1 / sqrt(width).

    Raises:
        BadInput: a subject whose width or MLP width cannot be divided so, or with too few blocks.
    """
    heads = config.num_attention_heads // config.num_key_value_heads
    for name, unit in (("hidden_size", 2 * heads), ("intermediate_size", 1)):  # a head's width is even: it is rotated
        if getattr(config, name) % (settings.narrow * unit):
            raise BadInput(
                f"narrow {settings.narrow} does not divide the subject's {name} {getattr(config, name)} into a "
                f"multiple of {unit}"
            )
    if settings.blocks > config.num_hidden_layers:
        raise BadInput(f"{settings.blocks} blocks asked for: the subject has {config.num_hidden_layers}")
    small = copy.deepcopy(config)
    small.hidden_size //= settings.narrow
    small.intermediate_size //= settings.narrow
    small.num_attention_heads, small.num_key_value_heads, small.head_dim = heads, 1, small.hidden_size // heads
    for name in ("layer_types", "no_rope_layers"):  # have an entry for each block
        if getattr(config, name, None):
            setattr(small, name, getattr(config, name)[: settings.blocks])
    small.num_hidden_layers, small.vocab_size = settings.blocks, vocabulary
    small.initializer_range = small.hidden_size**-0.5
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    return small
