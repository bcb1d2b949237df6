"""The log-probabilities of an item's endings, fast: all endings in one sequence, contexts and beginnings of plans
computed once.

The score of an ending is its log-probability after the context, as lm-evaluation-harness computes it; a test compares
the two item by item. The harness runs every (context, ending) pair by itself. Here an item is one sequence: the
context, then all endings, under a mask that lets an ending see the context and itself. Only where the context must be
cut, by as much as an ending needs, each ending has a sequence of its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from thesislib.errors import BadInput
from thesislib.model.forward import Plan, batch_for, final_states, token_losses
from thesislib.model.prompts import adds_bos
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_tokens, longest_context
from thesislib.sources.corpus import Choice


class _Packed:
    """A context and some endings of an item in one sequence. The context is branch 0; each ending is a branch that
    starts at the context's end.

    Attributes:
        ids: (T,) the tokens.
        branch: (T,) 0 for the context, k + 1 for ending k.
        position: (T,) the rotary position of each token.
        source: for each token of an ending, where in the sequence it is predicted.
        target: that token.
        owner: the ending that it belongs to.
    """

    def __init__(self, context: list[int], endings: Mapping[int, list[int]]):
        self.ids, self.branch, self.position = list(context), [0] * len(context), list(range(len(context)))
        self.source, self.target, self.owner = [], [], []
        for k, tokens in endings.items():
            start = len(self.ids)
            self.source += [len(context) - 1, *range(start, start + len(tokens) - 1)]
            self.target += tokens
            self.owner += [k] * len(tokens)
            self.ids += tokens
            self.branch += [k + 1] * len(tokens)
            self.position += range(len(context), len(context) + len(tokens))


def _packed(subject: Subject, item: Choice) -> tuple[list[_Packed], bool]:
    """The sequences of an item, and whether a context was cut.

    An item is one sequence. Where an ending leaves no room for the whole context, each ending has a sequence of its
    own. As in lm-evaluation-harness, white space at the context's end belongs to the endings, and a context that is too
    long is cut from the left. The last token of an ending is predicted and needs no position.

    Raises:
        BadInput: a context or an ending without tokens, or an ending longer than the model's context.
    """
    before, tokenizer = item.context.rstrip(), subject.tokenizer
    special = adds_bos(subject, before)
    context = tokenizer(before, add_special_tokens=special)["input_ids"]
    if not context:
        raise BadInput(f"item {item.id} has an empty context")
    # tokenised together with the context, since the two may merge at the seam
    together = (
        tokenizer(f"{item.context} {ending}", add_special_tokens=special)["input_ids"] for ending in item.endings
    )
    endings = {k: tokens[len(context) :] for k, tokens in enumerate(together)}
    most = longest_context(subject.model) or math.inf
    for k, tokens in endings.items():
        if not 1 <= len(tokens) <= most:
            raise BadInput(
                f"ending {k + 1} of item {item.id}, '{item.endings[k][:40]}', has {len(tokens)} tokens after its "
                "context: "
                f"expected at least one, and at most the {most} of the model's context"
            )
    if all(len(context) + len(tokens) <= most for tokens in endings.values()):
        return [_Packed(context, endings)], False
    alone = []
    for k, tokens in endings.items():
        kept = _Packed(context[-min(len(context), most + 1 - len(tokens)) :], {k: tokens})
        kept.ids, kept.branch, kept.position = kept.ids[:-1], kept.branch[:-1], kept.position[:-1]
        alone.append(kept)
    return alone, any(len(context) + len(tokens) > most + 1 for tokens in endings.values())


class Batch(NamedTuple):
    """Some items' sequences, and where in them the tokens of endings are predicted.

    Args:
        members: (number of an item, its sequence) for each of B sequences.
        ids: (B, T) tokens, padded on the right.
        positions: (B, T) rotary positions.
        mask: (B, 1, T, T) boolean, True where a token sees another.
        rows: (n,) for each token of an ending, its sequence.
        source: (n,) where in that sequence it is predicted.
        target: (n,) the token.
    """

    members: list[tuple[int, _Packed]]
    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor

    def states(self, subject: Subject, plans: Sequence[Plan] | None) -> Iterator[tuple[int, torch.Tensor]]:
        """The states (n, D) that predict the endings' tokens, for each plan: (its index, states)."""
        for plan, states in final_states(subject.model, self.ids, plans, self.positions, self.mask):
            yield plan, states[self.rows, self.source]


class Endings:
    """The sequences of items for a subject, longest first.

    Args:
        subject: its tokenizer and its context's length.
        items: the questions.

    Attributes:
        cut: the number of items whose context was cut from the left.

    Raises:
        BadInput: no items; a context or an ending without tokens, or with a token outside the model's embedding; an
            ending longer than the model's context.
    """

    def __init__(self, subject: Subject, items: Sequence[Choice]):
        if not items:
            raise BadInput("no multiple-choice items: expected at least one")
        sequences = [_packed(subject, item) for item in items]
        packed = [(i, p) for i, (parts, _) in enumerate(sequences) for p in parts]
        check_tokens(subject.model, subject.tokenizer, (p.ids for _, p in packed))
        self.packed = sorted(packed, key=lambda pair: -len(pair[1].ids))
        self.cut = sum(was_cut for _, was_cut in sequences)

    def batches(self, subject: Subject, batch: int | None = None, title: str = "endings") -> Iterator[Batch]:
        """The sequences in batches, by default 8 on a CPU and as many as fill a card. It changes rounding only."""
        batch = batch or batch_for(subject.model, len(self.packed[0][1].ids), on_cpu=8)
        for at in tqdm(range(0, len(self.packed), batch), desc=title, unit="batch", disable=None, leave=False):
            members = self.packed[at : at + batch]
            part = [p for _, p in members]
            rows = [row for row, p in enumerate(part) for _ in p.source]
            where = (rows, [s for p in part for s in p.source], [t for p in part for t in p.target])
            tensors = (torch.tensor(w, device=subject.device) for w in where)
            yield Batch(members, *_pad(part, subject.pad_id, subject.device), *tensors)


def logprobs(
    subject: Subject,
    items: Sequence[Choice],
    plans: Sequence[Plan] | None = None,
    *,
    batch: int | None = None,
    title: str = "endings",
) -> tuple[list[list[np.ndarray]], int]:
    """The log-probability of each ending after its context, and how many contexts were cut from the left.

    Args:
        subject: the model and tokenizer.
        items: the questions.
        plans: orders of blocks, whose common beginnings run once; None for the model as it is.
        batch: see `Endings.batches`.
        title: of the progress bar.

    Returns:
        for each plan, for each item, (endings,) nats in float64; and the number of items whose context was cut.

    Raises:
        BadInput: see `Endings`.
    """
    endings = Endings(subject, items)
    found = [[np.zeros(len(item.endings)) for item in items] for _ in plans or (None,)]
    with torch.inference_mode():
        waiting = [
            (plan, part.members, token_losses(subject.model, states, part.target))
            for part in endings.batches(subject, batch, title)
            for plan, states in part.states(subject, plans)
        ]
    for plan, members, losses in waiting:  # losses are fetched from a card only here
        values, done = losses.double().cpu().numpy(), 0
        for i, p in members:
            np.subtract.at(found[plan][i], p.owner, values[done : done + len(p.owner)])
            done += len(p.owner)
    return found, endings.cut


def scores(item: Choice, logprobs: np.ndarray, metric: str) -> np.ndarray:
    """Each ending's score (..., endings): acc_norm, log-probability per character, or acc, log-probability."""
    return logprobs / [len(e) for e in item.endings] if metric == "acc_norm" else logprobs


def picked(item: Choice, logprobs: np.ndarray, metric: str) -> int:
    """The ending with the highest score."""
    return int(scores(item, logprobs, metric).argmax())


def margin(item: Choice, logprobs: np.ndarray, metric: str) -> np.ndarray:
    """The right ending's score minus the best wrong one's (...): above 0 if the right one is picked. An item has at
    least two endings."""
    found = scores(item, logprobs, metric)
    return found[..., item.label] - np.delete(found, item.label, -1).max(-1)


def _pad(members: list[_Packed], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (B, T), rotary positions (B, T), and the attention mask (B, 1, T, T): True where a token sees another."""
    length = max(len(p.ids) for p in members)
    ids = torch.full((len(members), length), pad)
    positions = torch.zeros_like(ids)
    branch = torch.zeros_like(ids)
    for row, p in enumerate(members):
        ids[row, : len(p.ids)] = torch.tensor(p.ids)
        positions[row, : len(p.ids)] = torch.tensor(p.position)
        branch[row, : len(p.ids)] = torch.tensor(p.branch)
    same = branch[:, :, None] == branch[:, None, :]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & (same | (branch == 0)[:, None, :])
    return ids.to(device), positions.to(device), allowed[:, None].to(device)
