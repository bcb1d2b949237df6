"""Depth pruning: the importance of each block, and removal of the least important blocks, attentions or MLPs."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from thesislib.compress.calibration import Visitor, stream
from thesislib.compress.gradients import differentiable, next_token_nats
from thesislib.compress.outline import Outline, SizeUnknown
from thesislib.compress.relevance import NEXT_TOKEN, SCORES, TASKS, ByAnswers, check_tasks, entropy_change
from thesislib.compress.replace import REPLACEMENTS, check_biases, replaced, with_biases
from thesislib.compress.selection import whole_number
from thesislib.compress.stage import Calibrated, Shape, Stage, stage
from thesislib.config import positive
from thesislib.errors import BadInput, shown, unknown
from thesislib.model.blocks import ATTRIBUTES, plan_without, remove, removed_parts
from thesislib.model.forward import final_states, token_losses
from thesislib.model.layers import projections
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows

METRICS = ("perplexity", "taylor", "magnitude", "influence", "angular", "entropy", *SCORES)
ITEMS = 256  # of each task, by default
WHOLE_BLOCKS = ("influence", "entropy")  # compare a block's input and output
PARTS = ("block", "attention", "mlp")
LETTERS = {"block": "", "attention": "A", "mlp": "M"}  # in labels
ENDINGS = {None: "", "scalar": "S", "bias": "B", "linear": "L"}  # of labels, by what replaces the blocks
NAMES = {"block": "block", "attention": "attention", "mlp": "MLP"}  # in sentences


@stage("depth")
@dataclass(frozen=True)
class Depth(Calibrated):
    """Remove blocks, or only their attention or MLP: the least important ones, or given ones.

    Attributes:
        remove: the number of blocks to remove; either this or `blocks`.
        blocks: the indices of the blocks to remove.
        metric: of a block's importance. perplexity: of the model without the block. taylor: sum of abs(weight *
            gradient). magnitude: sum of abs(weight). influence: 1 - mean cosine of its input and output. angular: the
            angle between input and output of a run of `remove` neighbours, which is removed as a whole. entropy: the
            entropy that it adds. relevance, margin, likelihood, kl: of the answers to `task` without it, see
            `thesislib.compress.relevance.Outcomes`.
        greedy: measure again after each removal.
        protect_first: blocks at the beginning that are never removed; four in the thesis.
        protect_last: blocks at the end that are never removed; two in the thesis.
        part: the part of a block that is removed: block, attention or mlp.
        task: whose items relevance and the like score blocks by; several are mixed. `next_token` is the next tokens
            of the calibration text.
        items: of each task, from the third of its items that is for ranking; `next_token` has `windows` instead.
        replace: what stands in the place of removed blocks, once all are chosen: nothing, scalar, bias or linear, see
            `thesislib.compress.replace`. It is estimated on the calibration text and folded into the other weights.
    """

    remove: int | None = None
    blocks: tuple | list | None = None
    metric: str = "perplexity"
    greedy: bool = False
    protect_first: int = 4
    protect_last: int = 2
    part: str = "block"
    task: str | tuple | list | None = None
    items: int | None = None
    replace: str | None = None
    text: str = field(default="wikipedia", kw_only=True)

    family: ClassVar[str] = "pruned"
    pattern: ClassVar[str] = r"D(?:([AM])(\d+)|(\d+)([SBL]?))"
    later: ClassVar[tuple[str, ...]] = ("task", "items", "replace")

    def __post_init__(self):
        super().__post_init__()
        if (self.remove is None) == (self.blocks is None):
            raise BadInput("depth needs either 'remove', a number of blocks, or 'blocks', a list of them")
        if self.blocks is not None:
            self._normalise(blocks=tuple(self.blocks))
            different = len(set(self.blocks)) == len(self.blocks) > 0
            if not different or not all(isinstance(b, int) and b >= 0 for b in self.blocks):
                raise BadInput(f"blocks {list(self.blocks)}: expected different indices from 0 on, at least one")
        if self.remove is not None and self.remove < 1:
            raise BadInput(f"remove is {self.remove}: expected at least 1 block")
        if self.metric not in METRICS:
            raise unknown("importance metric", self.metric, METRICS)
        if self.part not in PARTS:
            raise unknown("part", self.part, PARTS)
        if self.metric == "angular" and (self.greedy or self.part != "block"):
            raise BadInput(
                "metric 'angular' removes a run of neighbouring blocks at once: it knows neither greedy nor parts"
            )
        if min(self.protect_first, self.protect_last) < 0:
            raise BadInput("protect_first and protect_last must be at least 0")
        if self.replace not in (None, *REPLACEMENTS):
            raise unknown("replacement", self.replace, REPLACEMENTS)
        if self.replace and self.part != "block":
            raise BadInput(
                f"replace '{self.replace}' stands in for whole blocks: it does not go with part '{self.part}'"
            )
        first = self.protect_first if self.blocks is None else min(self.blocks)
        if self.replace in ("bias", "linear") and first == 0:
            raise BadInput(
                f"replace '{self.replace}' goes into the MLP before a removed block: block 0 has none, keep it or use "
                "scalar"
            )
        self._check_task()

    def _check_task(self) -> None:
        """Raises BadInput for a task that the metric does not ask for, an unknown one, or no items."""
        asks = self.remove is not None and self.metric in SCORES
        if asks != bool(self.tasks):
            raise BadInput(
                f"metric '{self.metric}' scores blocks by the answers to a task: expected one or more of "
                f"{', '.join(TASKS)} as 'task'"
                if asks
                else f"task {shown(self.task)} does nothing here: it belongs to the metrics {', '.join(SCORES)}"
            )
        if self.task is not None:
            check_tasks(self.tasks)
        questions = {*self.tasks} - {NEXT_TOKEN}
        if not questions and self.items is not None:
            raise BadInput(f"items is {self.items}: only a task of questions has items, text has 'windows'")
        if questions and self.items is None:
            self._normalise(items=ITEMS)
        positive(items=self.items)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those whose items score blocks."""
        return () if self.task is None else (self.task,) if isinstance(self.task, str) else tuple(self.task)

    @property
    def count(self) -> int:
        """The number of blocks to remove."""
        return self.remove if self.blocks is None else len(self.blocks)

    @property
    def label(self) -> str:
        """As in the thesis: D2; DA2 and DM2 if only attentions or MLPs are removed; D2S, D2B and D2L if a scalar, bias
        or linear map replaces the blocks."""
        return "D" + LETTERS[self.part] + str(self.count) + ENDINGS[self.replace]

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        instead = {None: "", "scalar": ", a scale", "bias": ", a bias", "linear": ", a linear map"}[self.replace]
        removed = f"{self.count} {NAMES[self.part]}{'s' if self.count > 1 else ''} removed"
        return removed + (f"{instead} in their place" if instead else "")

    @classmethod
    def from_label(cls, part: str) -> "Depth | None":
        """See `Stage`."""
        if not (match := re.fullmatch(cls.pattern, part, re.ASCII)):
            return None
        removed = next(name for name, letter in LETTERS.items() if letter == (match[1] or ""))
        instead = next(how for how, ending in ENDINGS.items() if ending == (match[4] or ""))
        return cls(remove=whole_number(match[2] or match[3]), part=removed, replace=instead)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: fewer blocks, or as many if only parts of them are removed."""
        quantised = next((earlier.label for earlier in previous if earlier.family == "quantised"), None)
        pairs = next((earlier.label for earlier in previous if earlier.factorises), None)
        if pairs and self.metric == "taylor":
            raise BadInput(
                f"metric 'taylor' after {pairs} needs gradients of weights that became pairs: use perplexity, or depth "
                "before low rank"
            )
        if pairs and self.replace in ("scalar", "linear"):
            raise BadInput(f"{self.label} after {pairs} would change pairs of low rank: put it before, or use bias")
        if quantised and self.replace in ("scalar", "linear"):
            raise BadInput(
                f"{self.label} after {quantised} would change quantised weights: quantise after it, or use bias"
            )
        if shape is None:
            return None
        self.check(shape.depth)
        return dataclasses.replace(shape, depth=shape.depth - self.count) if self.part == "block" else shape

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        parts = set(ATTRIBUTES) if self.part == "block" else {self.part}
        if outline.budgeted or outline.lost & parts:
            raise SizeUnknown
        chosen: Sequence[int] = self.blocks
        if chosen is None:
            free = range(self.protect_first, outline.subject.depth - self.protect_last)
            if len({outline.size_key(i, parts) for i in free}) > 1:
                raise SizeUnknown
            chosen = free[: self.count]
            outline.lost |= parts if self.part != "block" else set()
        outline.subject, outline.changed = remove(outline.subject, chosen, self.part), set()
        if self.replace == "bias":
            check_biases(outline.subject)
            outline.subject, outline.biased = with_biases(outline.subject), True

    def check(self, depth: int) -> None:
        """Raises BadInput if a model of `depth` blocks does not have the blocks to remove."""
        if self.blocks is not None:
            if max(self.blocks) >= depth:
                raise BadInput(f"block {max(self.blocks)} is out of range: the model has blocks 0 to {depth - 1}")
            if self.part == "block" and len(self.blocks) == depth:
                raise BadInput(f"removing all {depth} blocks leaves no model")
            return
        free = depth - self.protect_first - self.protect_last
        if self.remove > free:
            raise BadInput(
                f"cannot remove {self.remove} of {depth} blocks: {self.protect_first} at the beginning and "
                f"{self.protect_last} at the end are protected, which leaves {max(free, 0)}"
            )

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The subject without the blocks, and a report of which were removed and of their scores.

        It shares the remaining weights with `subject`.

        Raises:
            BadInput: fewer unprotected blocks than are to be removed, or a calibration text that cannot be used.
        """
        self.check(subject.depth)
        lost = removed_parts(subject).get(self.part, [])
        if again := sorted({*lost} & {*(self.blocks or ())}):
            raise BadInput(
                f"the {self.part} of block {', '.join(map(str, again))} is gone already: expected blocks that "
                "still have one"
            )
        # a part that was removed earlier has no importance, and would be chosen again
        free = [b for b in range(self.protect_first, subject.depth - self.protect_last) if b not in lost]
        if self.remove and self.remove > len(free):
            raise BadInput(f"cannot remove {self.remove}: {len(free)} unprotected blocks still have an {self.part}")
        ids = torch.empty(0)
        asks_text = self.blocks is None and self.metric != "magnitude" and (not self.tasks or NEXT_TOKEN in self.tasks)
        if self.replace or asks_text:
            ids = self.ids(subject.tokenizer, data)
            check_windows(subject.model, subject.tokenizer, ids)
        if self.blocks is not None:
            return self._without(subject, self.blocks, ids, {"removed": sorted(self.blocks), "part": self.part})
        by_answers = (
            ByAnswers(self.tasks, self.metric, self.part, ids, data, self.items, self.seed) if self.tasks else None
        )

        def measure(smaller: Subject, blocks: Sequence[int]) -> dict[int, float]:
            if by_answers:
                return by_answers(smaller, blocks)
            return importance(smaller, ids, self.metric, blocks=blocks, part=self.part)

        removed: list[int] = []  # in order
        if self.metric == "angular":
            distance = angular_distances(subject, ids)[self.remove]
            starts = range(self.protect_first, subject.depth - self.protect_last - self.remove + 1)
            first = min(starts, key=lambda i: distance[i])
            removed = list(range(first, first + self.remove))
            scores = {i: float(distance[i]) for i in starts}
        else:
            scores = latest = self._scores(subject, measure, free, removed)
            while len(removed) < self.remove:
                order = sorted(latest, key=lambda b: latest[b])  # equal ones stay in order
                removed += order[:1] if self.greedy else order[: self.remove]
                if len(removed) < self.remove:
                    latest = self._scores(subject, measure, free, removed)
            scores = {b: scores[b] for b in sorted(scores)}
        report = {"removed": sorted(removed), "order": removed, "part": self.part, "metric": self.metric}
        return self._without(subject, removed, ids, {**report, "greedy": self.greedy, "scores": scores})

    def _without(
        self, subject: Subject, removed: Sequence[int], ids: torch.Tensor, report: dict
    ) -> tuple[Subject, dict]:
        """The subject without the chosen blocks, and the report with what replaces them."""
        if not self.replace:
            return remove(subject, removed, self.part), report
        smaller, gaps = replaced(subject, removed, self.replace, ids)
        return smaller, {**report, "replace": self.replace, "gaps": gaps}

    def _scores(
        self,
        subject: Subject,
        measure: Callable[[Subject, Sequence[int]], dict[int, float]],
        free: Sequence[int],
        removed: Sequence[int],
    ) -> dict[int, float]:
        """The importance of each block of `free` that is not removed yet, by its index in the whole model."""
        free = [b for b in free if b not in removed]
        smaller = remove(subject, removed, self.part) if removed else subject
        if self.part != "block":
            return measure(smaller, free)
        left = [b for b in range(subject.depth) if b not in removed]
        return {left[b]: score for b, score in measure(smaller, [left.index(b) for b in free]).items()}


# ---------------------------------------------------------------- importance


def importance(
    subject: Subject, ids: torch.Tensor, metric: str, *, blocks: Sequence[int] | None = None, part: str = "block"
) -> dict[int, float]:
    """The importance of blocks; the block with the lowest is removed first.

    Args:
        subject: the model.
        ids: (N, T) calibration windows; magnitude needs none.
        metric: one of `METRICS`, without angular, which scores runs of blocks (see `angular_distances`), and without
            those that ask a task (see `thesislib.compress.relevance.ByAnswers`).
        blocks: to score; all by default.
        part: score whole blocks, or only their attention or MLP (not with influence and entropy, which compare blocks).

    Raises:
        BadInput: unknown metric, or one that does not fit the part or the subject.
    """
    blocks = range(subject.depth) if blocks is None else blocks
    if metric == "perplexity":
        return leave_one_out(subject, ids, blocks, part)
    if metric in WHOLE_BLOCKS:
        if part != "block":
            raise BadInput(
                f"metric '{metric}' compares a block's input and output: for part '{part}' use perplexity, "
                "taylor or magnitude"
            )
        scores = influence(subject, ids) if metric == "influence" else entropy_change(subject, ids)
        return {b: scores[b] for b in blocks}
    if metric == "magnitude":
        return {
            b: sum(w.detach().float().abs().sum().item() for w in _weights(subject, b, part).values()) for b in blocks
        }
    if metric == "taylor":
        return taylor(subject, ids, blocks, part)
    raise unknown("importance metric", metric, METRICS)


def leave_one_out(
    subject: Subject, ids: torch.Tensor, blocks: Sequence[int], part: str = "block", batch: int = 4
) -> dict[int, float]:
    """Perplexity without each of `blocks` (Kim et al. 2024, one-shot)."""
    return dict(zip(blocks, map(_exp, window_losses(subject, ids, blocks, part, batch).mean(1)), strict=True))


def window_losses(
    subject: Subject, ids: torch.Tensor, blocks: Sequence[int], part: str = "block", batch: int = 4
) -> np.ndarray:
    """Each window's mean loss without each of `blocks`, (len(blocks), N) in nats a token; see `sets_losses`."""
    return sets_losses(subject, ids, [[b] for b in blocks], part, batch)


def sets_losses(
    subject: Subject, ids: torch.Tensor, sets: Sequence[Collection[int]], part: str = "block", batch: int = 4
) -> np.ndarray:
    """Each window's mean loss without each set of blocks, (len(sets), N) in nats a token.

    Sets share the blocks before the first one in which they differ, and those run once: all 435 pairs of 30 blocks take
    4,494 block runs instead of 12,180, which is 37 %; each set still has its own logits. If only attentions or MLPs are
    left out, every set runs by itself, since a tree of plans is made of blocks. A window's loss does not depend on the
    other windows, so a long run may ask for a few at a time and keep what it has.

    Args:
        subject: the whole model.
        ids: (N, T) windows.
        sets: of blocks to leave out together; the empty one leaves out nothing.
        part: leave out blocks, or only their attention or MLP.
        batch: windows at a time.

    Raises:
        BadInput: a block that the model does not have.
    """
    if outside := sorted({b for some in sets for b in some} - {*range(subject.depth)}):
        raise BadInput(f"block {outside[-1]} is out of range: the model has blocks 0 to {subject.depth - 1}")
    losses = np.zeros((len(sets), len(ids)))
    plans = [plan_without(subject.depth, some) for some in sets]
    with torch.inference_mode():
        for start in tqdm(range(0, len(ids), batch), desc="leave out", unit="batch", disable=None, leave=False):
            some = ids[start : start + batch].to(subject.device)
            targets = some[:, 1:].reshape(-1)
            if part == "block":
                variants = final_states(subject.model, some, plans)
            else:
                variants = (
                    (k, h)
                    for k, left_out in enumerate(sets)
                    for _, h in final_states(remove(subject, [*left_out], part).model, some)
                )
            for k, h in variants:
                nats = token_losses(subject.model, h[:, :-1].flatten(0, 1), targets).double()
                losses[k, start : start + batch] = nats.view(len(some), -1).mean(1).cpu().numpy()
    return losses


def _exp(x: float) -> float:
    """exp(x), infinite where it overflows."""
    return math.exp(x) if x < 700 else math.inf


def block_influence(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - mean over tokens of cos(x_t, y_t) (Men et al. 2024, ShortGPT, eq. 1).

    Args:
        x: (..., D) a block's input.
        y: (..., D) its output.
    """
    return 1 - nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).double().mean().item()


def influence(subject: Subject, ids: torch.Tensor) -> list[float]:
    """Each block's `block_influence` over all tokens.

    The outputs are those of the blocks themselves. The last of transformers' `hidden_states` is the output of the final
    norm, which would give the last block another score.
    """
    sums = [0.0] * subject.depth

    class Influence(Visitor):
        def seen(self, block, first, x, y):
            sums[block] += block_influence(x, y) * x.shape[:-1].numel()

    stream(subject, ids, Influence(), title="influence")
    return [s / ids.numel() for s in sums]


def angular_distances(subject: Subject, ids: torch.Tensor) -> np.ndarray:
    """arccos(cos(x_l, x_{l+n})) / pi of the last token's residual, mean over windows (Gromov et al. 2024, eq. 8).

    Returns:
        (depth + 1, depth + 1): [n, l] for a run of n blocks from block l on, where x_l is the input of block l; nan if
        the run would end after the last block.
    """
    states: list[torch.Tensor] = [torch.empty(0)] * (subject.depth + 1)

    class Last(Visitor):
        def seen(self, block, first, x, y):
            states[block] = torch.cat([states[block], x[:, -1].float().cpu()])
            if block == subject.depth - 1:
                states[block + 1] = torch.cat([states[block + 1], y[:, -1].float().cpu()])

    stream(subject, ids, Last(), title="angular distance")
    x = nn.functional.normalize(torch.stack(states).double(), dim=-1)  # (depth + 1, N, D)
    angle = torch.arccos(torch.einsum("lnd,mnd->lmn", x, x).clamp(-1, 1)).mean(-1).numpy() / math.pi
    distances = np.full((subject.depth + 1, subject.depth + 1), np.nan)
    for n in range(subject.depth + 1):
        distances[n, : subject.depth + 1 - n] = np.diagonal(angle, n)
    return distances


def taylor(
    subject: Subject, ids: torch.Tensor, blocks: Sequence[int], part: str = "block", batch: int = 2
) -> dict[int, float]:
    """The sum over a block's weights of abs(w * g) (Kim et al. 2024, eq. 3).

    g is the gradient of the mean loss over all windows.

    Raises:
        BadInput: weights without a gradient, such as packed or quantised ones.
    """
    return taylor_of_parts(subject, ids, blocks, (part,), batch)[part]


def taylor_of_parts(
    subject: Subject, ids: torch.Tensor, blocks: Sequence[int], parts: Sequence[str] = PARTS, batch: int = 2
) -> dict[str, dict[int, float]]:
    """`taylor` of several parts of the blocks, {part: {block: importance}}, from one gradient."""
    weights = {(part, b): _weights(subject, b, part) for part in parts for b in blocks}
    named = {f"blocks.{b}.{name}": w for (_, b), several in weights.items() for name, w in several.items()}
    with differentiable(named, "metric 'taylor'", "use perplexity, influence or magnitude"):
        for start in tqdm(range(0, len(ids), batch), desc="taylor", unit="batch", disable=None, leave=False):
            (next_token_nats(subject, ids[start : start + batch]) / (len(ids) * (ids.shape[1] - 1))).backward()
        scores: dict[str, dict[int, float]] = {part: {} for part in parts}
        for (part, b), several in weights.items():
            scores[part][b] = sum((w.detach().float() * w.grad.float()).abs().sum().item() for w in several.values())
        return scores


def _weights(subject: Subject, block: int, part: str) -> dict[str, torch.Tensor]:
    """The projections' weights in a block or a part of it, by name; norms, a thousandth of a block, are left out."""
    module = subject.blocks[block]
    return {
        name: linear.weight
        for name, linear in projections(module).items()
        if part == "block" or hasattr(getattr(module, ATTRIBUTES[part]), name)
    }
