"""What a block is worth by the answers that are lost without it: relevance, and less noisy scores of the same items.

Relevance is that of "Rethinking Layer Relevance in LLMs Beyond Cosine Similarity" (arXiv 2605.14075). The paper also
uses running text, for which it defines no accuracy; here that is the share of next tokens that are the most probable
one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from thesislib.compress.calibration import Visitor, stream
from thesislib.errors import BadInput, unknown
from thesislib.model.blocks import plans_without_each, remove
from thesislib.model.endings import Endings, margin, scores
from thesislib.model.forward import Plan, final_states
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows
from thesislib.sources.choices.choice_set import PARTS, part_of
from thesislib.sources.choices.found import SETS
from thesislib.sources.corpus import Choice
from thesislib.sources.rows import take

NEXT_TOKEN = "next_token"
TASKS = (*(name for name, questions in SETS.items() if questions.one_context), NEXT_TOKEN)
SCORES = ("relevance", "margin", "likelihood", "kl")  # each a metric of the depth stage
TOP = 512  # of the whole model's most probable tokens, whose probabilities kl compares one by one


def relevance(without: float, whole: float, chance: float) -> float:
    """1 - max(without - chance, 0) / max(whole - chance, 0): 0 if nothing is lost, 1 if the model guesses without the
    block, below 0 if it answers more (2605.14075, eq. 1).

    Args:
        without: the accuracy without the block.
        whole: the accuracy of the whole model.
        chance: the accuracy of guessing.

    Raises:
        BadInput: the whole model is not better than guessing, so that nothing can be lost.
    """
    if whole <= chance:
        raise BadInput(
            f"the model answers {whole:.1%}, and guessing {chance:.1%}: relevance is undefined; expected a task on "
            "which the model is better than chance"
        )
    return 1 - max(without - chance, 0) / (whole - chance)


@dataclass(frozen=True)
class Items:
    """Items of one task.

    Attributes:
        task: its name.
        asked: multiple-choice items, or (N, T) windows of tokens for next_token.
        metric: by which score an ending is picked, see `thesislib.model.endings.scores`.
        chance: the accuracy of guessing; on text that of always saying the commonest token.
    """

    task: str
    asked: Sequence[Choice] | torch.Tensor
    metric: str
    chance: float


def choices(task: str, data: str, n: int, part: str = PARTS[0], seed: int = 0) -> Items:
    """The first n items, in a seeded order, of one part of a multiple-choice task.

    Raises:
        BadInput: an unknown task; fewer items than n; an item with nothing to choose from.
    """
    check_tasks([task])
    questions = SETS[task]
    every = part_of(questions.items(data), part)
    if n > len(every):
        raise BadInput(
            f"task '{task}' has {len(every)} items to {part} by: expected at most that many instead of {n} "
            f"(its items are split in {len(PARTS)} parts: {', '.join(PARTS)})"
        )
    some = take(every, n, seed)
    if alone := next((item for item in some if len(item.endings) < 2), None):
        raise BadInput(f"item {alone.id} of task '{task}' has one ending: expected at least two, to choose from")
    return Items(task, some, questions.metric, questions.chance(some))


def next_tokens(ids: torch.Tensor) -> Items:
    """The next tokens of windows (N, T) of text as items."""
    commonest = int(ids[:, 1:].flatten().bincount().max())
    return Items(NEXT_TOKEN, ids, "acc", commonest / ids[:, 1:].numel())


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises BadInput for a task by whose items no block can be scored."""
    for task in tasks:
        if task in SETS and not SETS[task].one_context:
            raise BadInput(f"task '{task}' scores one ending with several contexts: expected one of {', '.join(TASKS)}")
        if task not in TASKS:
            raise unknown("task", task, TASKS)


# ---------------------------------------------------------------- outcomes of items


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of N items for the whole model, in row 0, and for the model without each of some blocks.

    Attributes:
        correct: (1 + blocks, N) whether the answer is right.
        margin: (1 + blocks, N) the right ending's score minus the best wrong one's, in nats, for acc_norm in nats a
            character; on text as `likelihood`.
        likelihood: (1 + blocks, N) the right ending's log-probability in nats; on text the next token's, mean over a
            window. It has far less noise than the other two.
        kl: (1 + blocks, N) mean KL divergence in nats of the next token from the whole model's; nan if not asked for.
        chance: (N,) the accuracy of guessing each item.
    """

    correct: np.ndarray
    margin: np.ndarray
    likelihood: np.ndarray
    kl: np.ndarray
    chance: np.ndarray

    def accuracy(self, of: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """(1 + blocks,) the mean of `correct` over these items."""
        return self.correct[:, of].mean(1)

    def scores(self, metric: str, whole: float | None = None, of: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """(blocks,) how much is lost without each block.

        Args:
            metric: relevance; margin or likelihood, its mean loss; kl, the mean divergence.
            whole: the whole model's accuracy; by default row 0's.
            of: the items to take.

        Raises:
            BadInput: see `relevance`.
        """
        if metric == "kl":
            return self.kl[1:, of].mean(1)
        if metric in ("margin", "likelihood"):
            values = getattr(self, metric)[:, of]
            return (values[:1] - values[1:]).mean(1)
        accuracy, chance = self.accuracy(of), float(self.chance[of].mean())
        return np.array([relevance(a, accuracy[0] if whole is None else whole, chance) for a in accuracy[1:]])

    def order(self, metric: str, whole: float | None = None) -> np.ndarray:
        """(blocks,) the blocks' places in the order in which they go, see `scores`. Blocks of the same relevance, of
        which a few items leave many, go in order of the likelihood that is lost."""
        return np.lexsort((self.scores("likelihood"), self.scores(metric, whole)))


def joined(several: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of several tasks' items as those of one mixed set."""
    return Outcomes(*(np.concatenate([getattr(o, f.name) for o in several], -1) for f in fields(Outcomes)))


def outcomes(
    subject: Subject,
    items: Items,
    blocks: Sequence[int],
    part: str = "block",
    *,
    kl: bool = False,
    batch: int | None = None,
) -> Outcomes:
    """The outcomes of items without each of `blocks`. What comes before a left-out block runs once for all.

    Args:
        subject: the whole model.
        items: of one task.
        blocks: to leave out, one at a time.
        part: leave out blocks, or only their attention or MLP; then every variant runs by itself.
        kl: whether to compare the distributions of every next token too. Of the whole model's `TOP` tokens each counts
            by itself, the others together, which gives a little less than the full divergence.
        batch: windows at a time, by default 4; of questions see `thesislib.model.endings.Endings.batches`.

    Raises:
        BadInput: items that the model cannot read.
    """
    return _outcomes(subject, items, 1 + len(blocks), lambda s: _variants(subject, blocks, part, s), kl, batch)


def outcomes_of(subject: Subject, items: Items, plans: Sequence[Plan], *, batch: int | None = None) -> Outcomes:
    """The outcomes of items for each of some orders of blocks, a row each; what plans begin with alike runs once.

    Args:
        subject: has the blocks.
        items: of one task.
        plans: orders of its blocks.
        batch: see `outcomes`.

    Raises:
        BadInput: items that the model cannot read.
    """
    return _outcomes(subject, items, len(plans), lambda states: states(subject, plans), False, batch)


# (subject, plans) -> (index of the plan, states), in the order of the tree
_States = Callable[[Subject, Sequence[Plan] | None], Iterator[tuple[int, torch.Tensor]]]


def _outcomes(
    subject: Subject,
    items: Items,
    rows: int,
    variants: Callable[[_States], Iterator[tuple[int, torch.Tensor]]],
    kl: bool,
    batch: int | None,
) -> Outcomes:
    """The outcomes of items for some variants of a subject, whose states `variants` gives batch by batch."""
    n, endings = len(items.asked), 1
    if not isinstance(items.asked, torch.Tensor):
        endings = max(len(item.endings) for item in items.asked)
    nats, hits, far, count = (np.zeros((rows, n, endings)) for _ in range(4))
    with torch.inference_mode():
        head = subject.model.get_output_embeddings().weight  # (V, D)
        if kl:  # a logit that is rounded to 16 bits diverges by itself
            head = head.float()
        for some in _batches(subject, items, batch):
            top = None
            for k, states in variants(some.states):  # for kl the whole model is the first
                of_tokens, top = _of_tokens((states.to(head.dtype) @ head.T).float(), some.target, top, kl)
                for into, values in zip((nats, hits, far), of_tokens, strict=True):
                    np.add.at(into[k], some.where, values.double().cpu().numpy())
                np.add.at(count[k], some.where, 1)
    divergence = far.sum(-1) / count.sum(-1) if kl else np.full(far.shape[:2], np.nan)
    if isinstance(items.asked, torch.Tensor):
        correct, likelihood = (hits / count)[..., 0], -(nats / count)[..., 0]
        return Outcomes(correct, likelihood, likelihood, divergence, np.full(n, items.chance))
    correct, margins, likelihood = (np.zeros(nats.shape[:2]) for _ in range(3))
    for i, item in enumerate(items.asked):
        logprobs = -nats[:, i, : len(item.endings)]
        correct[:, i] = scores(item, logprobs, items.metric).argmax(1) == item.label
        margins[:, i] = margin(item, logprobs, items.metric)
        likelihood[:, i] = logprobs[:, item.label]
    return Outcomes(correct, margins, likelihood, divergence, np.full(n, items.chance))


class _Tokens(NamedTuple):
    """Some tokens that are predicted: of which item and ending each is, which it is, and the states that predict it."""

    where: tuple[np.ndarray, np.ndarray]
    target: torch.Tensor
    states: _States


def _batches(subject: Subject, items: Items, batch: int | None) -> Iterator[_Tokens]:
    if not isinstance(items.asked, torch.Tensor):
        for some in Endings(subject, items.asked).batches(subject, batch, items.task):
            owners = np.array([(i, ending) for i, p in some.members for ending in p.owner])
            yield _Tokens((owners[:, 0], owners[:, 1]), some.target, some.states)
        return
    check_windows(subject.model, subject.tokenizer, items.asked)
    for at in tqdm(range(0, len(items.asked), batch or 4), desc=items.task, unit="batch", disable=None, leave=False):
        ids = items.asked[at : at + (batch or 4)].to(subject.device)
        window = np.repeat(np.arange(at, at + len(ids)), ids.shape[1] - 1)

        def states(one: Subject, plans: Sequence[Plan] | None, ids: torch.Tensor = ids):
            return ((k, h[:, :-1].flatten(0, 1)) for k, h in final_states(one.model, ids, plans))

        yield _Tokens((window, np.zeros_like(window)), ids[:, 1:].flatten(), states)


def _variants(
    subject: Subject, blocks: Sequence[int], part: str, states: _States
) -> Iterator[tuple[int, torch.Tensor]]:
    """(0, states of the whole model), then (k + 1, states without the k-th of `blocks`) for each k."""
    if part == "block":
        plans = plans_without_each(subject.depth, blocks)
        yield from sorted(states(subject, plans), key=lambda of: of[0])  # that without the last block is done first
        return
    for k, one in enumerate((subject, *(remove(subject, [b], part) for b in blocks))):
        yield from ((k, h) for _, h in states(one, None))


def _of_tokens(
    logits: torch.Tensor, target: torch.Tensor, top: tuple[torch.Tensor, torch.Tensor] | None, kl: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """Each token's loss, whether it is the most probable one, and the divergence from the whole model's distribution.

    Args:
        logits: (n, V).
        target: (n,) the tokens.
        top: the whole model's most probable tokens and their log-probabilities (n, TOP + 1), the last of all others
            together; None for the whole model itself.
        kl: whether the divergence is asked for; else it is 0.

    Returns:
        loss, hit and divergence, (n,) each; and `top` for the next call.
    """
    total = logits.logsumexp(1)
    loss, hit = total - logits.gather(1, target[:, None])[:, 0], logits.argmax(1) == target
    far = torch.zeros_like(total)
    if kl:
        index = logits.topk(min(TOP, logits.shape[1] - 1), 1).indices if top is None else top[0]
        each = logits.gather(1, index) - total[:, None]
        rest = logits.scatter(1, index, -torch.inf).logsumexp(1) - total
        these = torch.cat([each, rest[:, None]], 1).double()
        if top is None:
            top = index, these
        far = (top[1].exp() * (top[1] - these)).sum(1)
    return (loss, hit, far), top


class ByAnswers:
    """Scores blocks by the answers without them, for the depth stage.

    After a removal the whole model is still the one that was whole at first.

    Args:
        tasks: whose items are mixed.
        metric: one of `SCORES`.
        part: see `outcomes`.
        ids: (N, T) windows for next_token.
        data: a data spec for questions.
        items: of each task of questions.
        seed: of their choice.

    Raises:
        BadInput: see `choices`.
    """

    def __init__(
        self, tasks: Sequence[str], metric: str, part: str, ids: torch.Tensor, data: str, items: int | None, seed: int
    ):
        self.metric, self.part = metric, part
        self.whole: float | None = None  # its accuracy
        self.items = [
            next_tokens(ids) if task == NEXT_TOKEN else choices(task, data, items or 0, seed=seed) for task in tasks
        ]

    def __call__(self, subject: Subject, blocks: Sequence[int]) -> dict[int, float]:
        """The score of each block; the first of the lowest goes first.

        Raises:
            BadInput: the whole model guesses, see `relevance`.
        """
        found = joined([outcomes(subject, items, blocks, self.part, kl=self.metric == "kl") for items in self.items])
        if self.whole is None:
            self.whole = float(found.accuracy()[0])
        try:
            values = found.scores(self.metric, self.whole)
        except BadInput as error:
            raise BadInput(f"task {', '.join(items.task for items in self.items)}: {error}") from error
        return {blocks[k]: float(values[k]) for k in found.order(self.metric, self.whole)}


# ---------------------------------------------------------------- scores of one pass


def entropy_change(subject: Subject, ids: torch.Tensor) -> list[float]:
    """Each block's H(output) - H(input), in nats (EntroDrop, ICLR 2026): a block that adds little entropy says little.

    H is the Shannon entropy of the residual stream's values. A token's values are divided by their root mean square and
    fall into buckets of a tenth, those beyond 8 into the outermost; the paper's buckets are not public. So a state's
    scale, which no later block reads, has no part in it.
    """
    edges = torch.arange(-8, 8.05, 0.1)
    counts = torch.zeros(subject.depth + 1, len(edges) + 1, dtype=torch.float64)

    class Histogram(Visitor):
        def seen(self, block, first, x, y):
            last = block == subject.depth - 1
            for where, values in ((block, x), (block + 1, y))[: 1 + last]:
                scaled = values.float() / values.float().square().mean(-1, keepdim=True).sqrt()
                counts[where] += torch.bucketize(scaled.cpu(), edges).flatten().bincount(minlength=len(edges) + 1)

    stream(subject, ids, Histogram(), title="entropy")
    p = counts / counts.sum(1, keepdim=True)
    entropy = torch.special.entr(p).sum(1)
    return entropy.diff().tolist()
