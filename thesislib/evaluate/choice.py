"""Multiple choice, fast: all endings of an item in one sequence, contexts and beginnings of plans computed once.

The score of an ending is its log-probability after the context, as lm-evaluation-harness computes it; a test holds
the two against each other item by item. The harness runs every (context, ending) pair by itself. Here an item is one
sequence, context then all endings, under a mask in which an ending sees the context and itself.
"""

import time
from collections.abc import Mapping

import numpy as np
import torch
from tqdm import tqdm

from thesislib.corpus import Choice
from thesislib.errors import BadInput
from thesislib.evaluate.perplexity import AS_IT_IS
from thesislib.evaluate.stats import Comparison, paired_outcomes, proportion
from thesislib.forward import Plan, batch_for, final_states, token_losses
from thesislib.records import Measurement, provenance
from thesislib.subject import Subject


class _Packed:
    """One item as a sequence: the context is branch 0, ending k is branch k + 1 and starts at the context's end."""

    def __init__(self, item: Choice, tokenizer):
        context = tokenizer(item.context.rstrip(), add_special_tokens=True)["input_ids"]
        if not context:
            raise BadInput(f"item {item.id} has an empty context")
        self.ids, self.branch, self.position = list(context), [0] * len(context), list(range(len(context)))
        self.source, self.target, self.owner = [], [], []  # where a token is predicted, which, and of which ending
        for k, ending in enumerate(item.endings):
            # tokenised together with the context, since the two may merge at the seam (as the harness does)
            together = tokenizer(f"{item.context.rstrip()} {ending}", add_special_tokens=True)["input_ids"]
            tokens = together[len(context) :]
            start = len(self.ids)
            self.source += [len(context) - 1, *range(start, start + len(tokens) - 1)]
            self.target += tokens
            self.owner += [k] * len(tokens)
            self.ids += tokens
            self.branch += [k + 1] * len(tokens)
            self.position += range(len(context), len(context) + len(tokens))


def multiple_choice(subject: Subject, items: list[Choice], *, task: str, batch: int | None = None) -> Measurement:
    """Share of items whose right ending has the highest log-probability per character (`acc_norm`).

    `extra["acc"]` is the share without the division by the ending's length in characters. `batch`: items at a time, by
    default 8 on a CPU and what fills a card; rounding apart, it changes nothing.

    Raises:
        BadInput: no items.
    """
    return multiple_choices(subject, items, {AS_IT_IS: None}, task=task, batch=batch)[AS_IT_IS]


def multiple_choices(subject: Subject, items: list[Choice], plans: Mapping[str, Plan | None], *, task: str, batch: int | None = None) -> dict[str, Measurement]:
    """`multiple_choice` of the subject under every plan, blocks that plans share run once."""
    if not items:
        raise BadInput("no multiple-choice items: expected at least one")
    started = time.perf_counter()
    packed = [_Packed(item, subject.tokenizer) for item in items]
    order = sorted(range(len(items)), key=lambda i: -len(packed[i].ids))
    batch = batch or batch_for(subject.model, len(packed[order[0]].ids), on_cpu=8)
    names = list(plans)
    orders = None if plans[names[0]] is None else [plans[name] for name in names]
    scores = [[np.zeros(len(item.endings)) for item in items] for _ in names]
    found: list[tuple[int, list[int], torch.Tensor]] = []  # (plan, items, losses of their endings' tokens)
    with torch.inference_mode():
        for at in tqdm(range(0, len(order), batch), desc=task, unit="batch", disable=None, leave=False):
            members = [packed[i] for i in order[at : at + batch]]
            ids, positions, mask = _pad(members, subject.tokenizer.pad_token_id, subject.device)
            rows = torch.tensor([row for row, p in enumerate(members) for _ in p.source], device=subject.device)
            source = torch.tensor([s for p in members for s in p.source], device=subject.device)
            target = torch.tensor([t for p in members for t in p.target], device=subject.device)
            for which, states in final_states(subject.model, ids, orders, positions, mask):
                found.append((which, order[at : at + batch], token_losses(subject.model, states[rows, source], target)))
    for which, members, losses in found:  # a card is waited for only here
        values, done = losses.double().cpu().numpy(), 0
        for i in members:
            owner = packed[i].owner
            np.subtract.at(scores[which][i], owner, values[done : done + len(owner)])
            done += len(owner)
    made = provenance(subject, started, task=task, n=len(items), protocol="0-shot, packed endings")
    return {name: _measurement(task, items, scores[k], made if plans[name] is None else {**made, "plan": list(plans[name])}) for k, name in enumerate(names)}


def _pad(members: list[_Packed], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (B, T), rotary positions (B, T), and who may look at whom (B, 1, T, T)."""
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


def _measurement(task: str, items: list[Choice], scores: list[np.ndarray], made: dict) -> Measurement:
    outcomes = []
    for item, logprobs in zip(items, scores, strict=True):
        per_character = logprobs / np.array([len(e) for e in item.endings])
        outcomes.append(
            {
                "id": item.id,
                "logprobs": [round(float(x), 4) for x in logprobs],
                "correct": bool(per_character.argmax() == item.label),
                "correct_unnormalised": bool(logprobs.argmax() == item.label),
            }
        )
    n, right = len(items), sum(o["correct"] for o in outcomes)
    raw = sum(o["correct_unnormalised"] for o in outcomes)
    low, high = proportion(right, n)
    extra = {"acc": dict(zip(("value", "low", "high"), (raw / n, *proportion(raw, n)), strict=True))}
    return Measurement(task, "acc_norm", right / n, low, high, n, "item", outcomes, extra, made)


def compare(a: Measurement, b: Measurement) -> Comparison:
    """Exact McNemar test of b's correct items against a's."""
    return paired_outcomes(*a.paired_with(b, "correct"))
