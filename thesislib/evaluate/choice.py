"""Multiple choice, fast: all endings of an item in one sequence, contexts and beginnings of plans computed once.

The score of an ending is its log-probability after the context, as lm-evaluation-harness computes it; a test compares
the two item by item. The harness runs every (context, ending) pair by itself. Here an item is one sequence: the
context, then all endings, under a mask that lets an ending see the context and itself. Only where the context must be
cut, by as much as an ending needs, each ending has a sequence of its own.
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
from thesislib.evaluate.perplexity import AS_IT_IS, K, with_plan
from thesislib.evaluate.task import Answers, Options, compare_answers, share_correct, share_with_interval
from thesislib.model.forward import Plan, batch_for, final_states, token_losses
from thesislib.model.prompts import adds_bos
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_tokens, longest_context
from thesislib.records.measurement import Measurement, provenance
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import Row, Source, rows, take

# for each score the other one, and the other one's name in an item's outcome
OTHER = {"acc_norm": ("acc", "correct_unnormalised"), "acc": ("acc_norm", "correct_normalised")}


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


def multiple_choice(
    subject: Subject, items: list[Choice], *, task: str, metric: str = "acc_norm", batch: int | None = None
) -> Measurement:
    """Share of items whose right ending has the highest log-probability.

    `extra` has the score that is not `metric`; `extra["contexts cut"]` counts the items whose context was cut from the
    left, because it is longer than the model's.

    Args:
        subject: the model and tokenizer.
        items: the questions.
        task: the task's name, for the record.
        metric: acc_norm, by log-probability per character of an ending, or acc, by log-probability.
        batch: sequences at a time, by default 8 on a CPU and as many as fill a card. It changes rounding only.

    Raises:
        BadInput: no items; a context or an ending without tokens, or with a token outside the model's embedding; an
            ending longer than the model's context.
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
    """`multiple_choice` of the subject under every plan. Beginnings that plans share run once."""
    if not items:
        raise BadInput("no multiple-choice items: expected at least one")
    started = time.perf_counter()
    sequences = [_packed(subject, item) for item in items]
    packed = [(i, p) for i, (parts, _) in enumerate(sequences) for p in parts]  # (number of an item, sequence)
    check_tokens(subject.model, subject.tokenizer, (p.ids for _, p in packed))
    packed.sort(key=lambda pair: -len(pair[1].ids))
    batch = batch or batch_for(subject.model, len(packed[0][1].ids), on_cpu=8)
    names = list(plans)
    orders = None if plans[names[0]] is None else [plans[name] for name in names]
    scores = [[np.zeros(len(item.endings)) for item in items] for _ in names]
    waiting: list[tuple[int, list[tuple[int, _Packed]], torch.Tensor]] = []  # plan, sequences, losses of targets
    with torch.inference_mode():
        for at in tqdm(range(0, len(packed), batch), desc=task, unit="batch", disable=None, leave=False):
            part = [p for _, p in packed[at : at + batch]]
            ids, positions, mask = _pad(part, subject.pad_id, subject.device)
            rows = torch.tensor([row for row, p in enumerate(part) for _ in p.source], device=subject.device)
            source = torch.tensor([s for p in part for s in p.source], device=subject.device)
            target = torch.tensor([t for p in part for t in p.target], device=subject.device)
            for plan, states in final_states(subject.model, ids, orders, positions, mask):
                losses = token_losses(subject.model, states[rows, source], target)
                waiting.append((plan, packed[at : at + batch], losses))
    for plan, members, losses in waiting:  # losses are fetched from a card only here
        values, done = losses.double().cpu().numpy(), 0
        for i, p in members:
            np.subtract.at(scores[plan][i], p.owner, values[done : done + len(p.owner)])
            done += len(p.owner)
    facts = provenance(subject, started, task=task, n=len(items), protocol="0-shot, packed endings")
    cut = sum(was_cut for _, was_cut in sequences)
    return {
        name: _measurement(task, metric, items, scores[k], cut, with_plan(facts, plans[name]))
        for k, name in enumerate(names)
    }


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


def _measurement(
    task: str, metric: str, items: list[Choice], scores: list[np.ndarray], cut: int, facts: dict
) -> Measurement:
    """The measurement of items whose endings have these log-probabilities; `cut` of them had their context cut."""
    other, key = OTHER[metric]
    outcomes: list[dict[str, Any]] = []
    for item, logprobs in zip(items, scores, strict=True):
        best = {"acc": logprobs.argmax(), "acc_norm": (logprobs / np.array([len(e) for e in item.endings])).argmax()}
        hit = {name: bool(ending == item.label) for name, ending in best.items()}
        rounded = [round(float(x), 4) for x in logprobs]
        outcomes.append({"id": item.id, "logprobs": rounded, "correct": hit[metric], key: hit[other]})
    extra = {other: share_with_interval(sum(o[key] for o in outcomes), len(items)), CUT: cut}
    return share_correct(task, metric, "item", outcomes, extra, facts)


compare = compare_answers


class MultipleChoice(Answers):
    """A multiple-choice task of lm-evaluation-harness. It is measured by the harness, or, with the option `fast`, by
    `multiple_choice` with the same scores.

    Attributes:
        source: the source of its rows.
        stock: the harness's own file for it, below lm_eval/tasks.
        metric: the harness's name of the score that a measurement's value is: acc_norm, by log-probability per
            character of an ending, or acc, by log-probability.
    """

    source: ClassVar[Source]
    stock: ClassVar[str]
    metric = "acc_norm"

    def item(self, i: int, row: Row) -> Choice:
        """Row i in the harness's wording, 0-shot.

        Raises:
            ValueError: the label names no ending.
        """
        raise NotImplementedError

    def stock_row(self, row: Row) -> Row:
        """A row as the harness's data set has it."""
        return {column: row[column] for column in self.source.columns}

    def items(self, data: str, options: Options) -> list[Choice] | list[Row]:
        """Choices for `multiple_choice`, or rows for the harness, which words them itself. All are checked."""
        every = rows(self.source, data)
        # numbered before the shuffle, so that an item has the same id under every limit
        worded = [self._checked(i, row) for i, row in enumerate(every)]
        return take(worded if options.fast else every, options.limit, options.seed)

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
        """See `multiple_choice` and `thesislib.evaluate.harness.lm_eval_task`. `extra["chance"]` is the score of
        guessing."""
        if options.fast:
            m = multiple_choice(subject, items, task=self.name, metric=self.metric, batch=options.batch)
        else:
            stock, rows_of_it = Stock(self.name, self.stock, self.metric), [self.stock_row(row) for row in items]
            limit, seed, batch = options.limit, options.seed, options.batch or 8
            m = lm_eval_task(subject, stock, rows_of_it, limit=limit, seed=seed, batch=batch)
            items = [self.item(i, row) for i, row in enumerate(items)]
        return replace(m, extra={**m.extra, "chance": self.chance(items)})

    def chance(self, items: list[Choice]) -> float:
        """The expected score of picking an ending at random."""
        return sum(1 / len(item.endings) for item in items) / len(items)

    def options_of(self, m: Measurement) -> dict[str, Any] | None:
        """See `Task.options_of`."""
        name = m.task.lower().partition(" ")[0].replace("-", "_")
        packed = "packed" in m.settings.get("protocol", "")
        return {"limit": m.n, "fast": True} if packed and name == self.name else None
