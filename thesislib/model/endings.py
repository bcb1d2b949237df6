"""The log-probabilities of an item's endings, fast: all endings in one sequence, contexts and beginnings of plans
computed once.

The score of an ending is its log-probability after the context, as lm-evaluation-harness computes it; a test compares
the two item by item. The harness runs every (context, ending) pair by itself. Here an item is one sequence: the
context, then all endings, under a mask that lets an ending see the context and itself. Only where the context must be
cut, by as much as an ending needs, each ending has a sequence of its own.
"""

import math
from collections.abc import Mapping, Sequence

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
        batch: sequences at a time, by default 8 on a CPU and as many as fill a card. It changes rounding only.
        title: of the progress bar.

    Returns:
        for each plan, for each item, (endings,) nats in float64; and the number of items whose context was cut.

    Raises:
        BadInput: no items; a context or an ending without tokens, or with a token outside the model's embedding; an
            ending longer than the model's context.
    """
    if not items:
        raise BadInput("no multiple-choice items: expected at least one")
    sequences = [_packed(subject, item) for item in items]
    packed = [(i, p) for i, (parts, _) in enumerate(sequences) for p in parts]  # (number of an item, sequence)
    check_tokens(subject.model, subject.tokenizer, (p.ids for _, p in packed))
    packed.sort(key=lambda pair: -len(pair[1].ids))
    batch = batch or batch_for(subject.model, len(packed[0][1].ids), on_cpu=8)
    scores = [[np.zeros(len(item.endings)) for item in items] for _ in plans or (None,)]
    waiting: list[tuple[int, list[tuple[int, _Packed]], torch.Tensor]] = []  # plan, sequences, losses of targets
    with torch.inference_mode():
        for at in tqdm(range(0, len(packed), batch), desc=title, unit="batch", disable=None, leave=False):
            part = [p for _, p in packed[at : at + batch]]
            ids, positions, mask = _pad(part, subject.pad_id, subject.device)
            rows = torch.tensor([row for row, p in enumerate(part) for _ in p.source], device=subject.device)
            source = torch.tensor([s for p in part for s in p.source], device=subject.device)
            target = torch.tensor([t for p in part for t in p.target], device=subject.device)
            for plan, states in final_states(subject.model, ids, plans, positions, mask):
                losses = token_losses(subject.model, states[rows, source], target)
                waiting.append((plan, packed[at : at + batch], losses))
    for plan, members, losses in waiting:  # losses are fetched from a card only here
        values, done = losses.double().cpu().numpy(), 0
        for i, p in members:
            np.subtract.at(scores[plan][i], p.owner, values[done : done + len(p.owner)])
            done += len(p.owner)
    return scores, sum(was_cut for _, was_cut in sequences)


def picked(item: Choice, logprobs: np.ndarray, metric: str) -> int:
    """The ending with the highest score: acc_norm, log-probability per character, or acc, log-probability."""
    return int((logprobs / [len(e) for e in item.endings] if metric == "acc_norm" else logprobs).argmax())


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
