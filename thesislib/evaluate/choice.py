"""Multiple choice, fast: all endings of an item in one sequence, contexts and beginnings of plans computed once.

The score of an ending is its log-probability after the context, as lm-evaluation-harness computes it; a test holds
the two against each other item by item. The harness runs every (context, ending) pair by itself. Here an item is one
sequence, context then all endings, under a mask in which an ending sees the context and itself; only where the context
must be cut, by as much as an ending needs, each ending is one.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from thesislib.errors import BadInput
from thesislib.evaluate.harness import CUT, Stock, lm_eval_task
from thesislib.evaluate.perplexity import AS_IT_IS, K
from thesislib.evaluate.stats import proportion
from thesislib.evaluate.task import Answers, Options, compare_answers
from thesislib.model.forward import Plan, batch_for, final_states, token_losses
from thesislib.model.prompts import adds_bos
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_tokens, longest_context
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import Row, Source, rows, take

# the score beside the one that leads, and what an item's outcome calls it
OTHER = {"acc_norm": ("acc", "correct_unnormalised"), "acc": ("acc_norm", "correct_normalised")}


class _Packed:
    """A context and some endings of an item as a sequence: the context is branch 0, each ending a branch that starts at
    the context's end."""

    def __init__(self, context: list[int], endings: Mapping[int, list[int]]):
        self.ids, self.branch, self.position = list(context), [0] * len(context), list(range(len(context)))
        self.source, self.target, self.owner = [], [], []  # where a token is predicted, which, and of which ending
        for k, tokens in endings.items():
            start = len(self.ids)
            self.source += [len(context) - 1, *range(start, start + len(tokens) - 1)]
            self.target += tokens
            self.owner += [k] * len(tokens)
            self.ids += tokens
            self.branch += [k + 1] * len(tokens)
            self.position += range(len(context), len(context) + len(tokens))


def _packed(subject: Subject, item: Choice) -> tuple[list[_Packed], bool]:
    """The item as one sequence, or, where an ending leaves no room for the whole context, as one an ending; whether a
    context was cut.

    As lm-evaluation-harness does: white space at the context's end belongs to the endings, and what the model has no
    positions for is cut off the context's left. The last token of an ending is predicted and needs no position.

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


def multiple_choice(
    subject: Subject, items: list[Choice], *, task: str, metric: str = "acc_norm", batch: int | None = None
) -> Measurement:
    """Share of items whose right ending has the highest log-probability per character (`acc_norm`), or the highest at
    all (`acc`).

    `extra` has the other of the two; `extra["contexts cut"]` counts the items whose context was cut from the left,
    because the model has no positions for all of it. `batch`: sequences at a time, by default 8 on a CPU and what fills
    a card; rounding apart, it changes nothing.

    Raises:
        BadInput: no items; a context or an ending that has no tokens, or one that the model has no row for; an ending
            longer than the model's context.
    """
    return multiple_choices(subject, items, {AS_IT_IS: None}, task=task, metric=metric, batch=batch)[AS_IT_IS]


def multiple_choices(
    subject: Subject,
    items: list[Choice],
    plans: Mapping[K, Plan | None],
    *,
    task: str,
    metric: str = "acc_norm",
    batch: int | None = None,
) -> dict[K, Measurement]:
    """`multiple_choice` of the subject under every plan, blocks that plans share run once."""
    if not items:
        raise BadInput("no multiple-choice items: expected at least one")
    started = time.perf_counter()
    found = [_packed(subject, item) for item in items]
    packed = [(i, p) for i, (parts, _) in enumerate(found) for p in parts]  # an item's number, and endings of it
    check_tokens(subject.model, subject.tokenizer, (p.ids for _, p in packed))
    packed.sort(key=lambda pair: -len(pair[1].ids))
    batch = batch or batch_for(subject.model, len(packed[0][1].ids), on_cpu=8)
    names = list(plans)
    orders = None if plans[names[0]] is None else [plans[name] for name in names]
    scores = [[np.zeros(len(item.endings)) for item in items] for _ in names]
    waiting: list[
        tuple[int, list[tuple[int, _Packed]], torch.Tensor]
    ] = []  # (plan, items, losses of their endings' tokens)
    with torch.inference_mode():
        for at in tqdm(range(0, len(packed), batch), desc=task, unit="batch", disable=None, leave=False):
            members = [p for _, p in packed[at : at + batch]]
            ids, positions, mask = _pad(members, subject.pad_id, subject.device)
            rows = torch.tensor([row for row, p in enumerate(members) for _ in p.source], device=subject.device)
            source = torch.tensor([s for p in members for s in p.source], device=subject.device)
            target = torch.tensor([t for p in members for t in p.target], device=subject.device)
            for which, states in final_states(subject.model, ids, orders, positions, mask):
                waiting.append(
                    (which, packed[at : at + batch], token_losses(subject.model, states[rows, source], target))
                )
    for which, some, losses in waiting:  # a card is waited for only here
        values, done = losses.double().cpu().numpy(), 0
        for i, p in some:
            np.subtract.at(scores[which][i], p.owner, values[done : done + len(p.owner)])
            done += len(p.owner)
    made = provenance(subject, started, task=task, n=len(items), protocol="0-shot, packed endings")
    cut = sum(cut for _, cut in found)
    return {
        name: _measurement(
            task, metric, items, scores[k], cut, made if plans[name] is None else {**made, "plan": list(plans[name])}
        )
        for k, name in enumerate(names)
    }


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


def _measurement(
    task: str, metric: str, items: list[Choice], scores: list[np.ndarray], cut: int, made: dict
) -> Measurement:
    beside, key = OTHER[metric]
    outcomes: list[dict[str, Any]] = []
    for item, logprobs in zip(items, scores, strict=True):
        best = {"acc": logprobs.argmax(), "acc_norm": (logprobs / np.array([len(e) for e in item.endings])).argmax()}
        hit = {name: bool(ending == item.label) for name, ending in best.items()}
        outcomes.append(
            {
                "id": item.id,
                "logprobs": [round(float(x), 4) for x in logprobs],
                "correct": hit[metric],
                key: hit[beside],
            }
        )
    n, right = len(items), sum(o["correct"] for o in outcomes)
    low, high = proportion(right, n)
    others = sum(o[key] for o in outcomes)
    extra = {beside: dict(zip(("value", "low", "high"), (others / n, *proportion(others, n)), strict=True)), CUT: cut}
    return Measurement(
        task=task,
        metric=metric,
        value=right / n,
        low=low,
        high=high,
        n=n,
        unit="item",
        items=outcomes,
        extra=extra,
        provenance=made,
    )


compare = compare_answers


class MultipleChoice(Answers):
    """A multiple-choice task that lm-evaluation-harness has: measured by it, or with the same scores by
    `multiple_choice` (fast).

    Attributes:
        source: where its rows lie.
        stock: the harness's own file for it, below lm_eval/tasks.
        metric: what the harness calls the score to lead with: acc_norm, by log-probability per character of an ending,
            or acc, without.
    """

    source: ClassVar[Source]
    stock: ClassVar[str]
    metric = "acc_norm"

    def item(self, i: int, row: Row) -> Choice:
        """Row i as the harness words it, 0-shot.

        Raises:
            ValueError: a label that names no ending.
        """
        raise NotImplementedError

    def stock_row(self, row: Row) -> Row:
        """A row as the harness's data set has it."""
        return {column: row[column] for column in self.source.columns}

    def items(self, data: str, options: Options) -> list[Choice] | list[Row]:
        """Worded items for the fast way, and rows for the harness, which words them itself; all are checked."""
        found = rows(self.source, data)
        # numbered before the shuffle: an item keeps its name whatever the limit
        worded = [self._checked(i, row) for i, row in enumerate(found)]
        return take(worded if options.fast else found, options.limit, options.seed)

    def _checked(self, i: int, row: Row) -> Choice:
        try:
            item = self.item(i, row)
            right = 0 <= item.label < len(item.endings)
        except ValueError:
            right = False
        if not right:
            label = row.get("label", row.get("answerKey"))
            raise BadInput(
                f"row {i + 1} of task '{self.name}' has the label '{label}': expected one that names an ending"
            )
        if empty := [ending for ending in item.endings if not ending.strip()]:
            raise BadInput(
                f"row {i + 1} of task '{self.name}' has {len(empty)} of {len(item.endings)} endings without "
                "words: expected some in each"
            )
        return item

    def sha256(self, items: list, options: Options) -> str | None:
        """See `Task.sha256`."""
        return super().sha256(items, options) if options.fast else None

    def measure(self, subject: Subject, items: list, options: Options) -> Measurement:
        """See `multiple_choice` and `thesislib.evaluate.harness.lm_eval_task`; `extra["chance"]` is what guessing
        gets."""
        if options.fast:
            m = multiple_choice(subject, items, task=self.name, metric=self.metric, batch=options.batch)
        else:
            stock = Stock(self.name, self.stock, self.metric)
            m = lm_eval_task(
                subject,
                stock,
                [self.stock_row(row) for row in items],
                limit=options.limit,
                seed=options.seed,
                batch=options.batch or 8,
            )
            items = [self.item(i, row) for i, row in enumerate(items)]
        return replace(m, extra={**m.extra, "chance": self.chance(items)})

    def chance(self, items: list[Choice]) -> float:
        """What picking an ending at random gets, on average."""
        return sum(1 / len(item.endings) for item in items) / len(items)

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """See `Task.options_of`."""
        name = m.task.lower().partition(" ")[0].replace("-", "_")
        packed = "packed" in m.settings.get("protocol", "")
        return {"limit": m.n, "fast": True} if packed and name == self.name else None
