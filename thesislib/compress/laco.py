"""LaCo, layer collapse: neighbouring blocks merged into one by their weights' differences (Yang et al. 2024).

A window of C blocks from block l on becomes one block, whose projections have the weights

    theta_l + sum over k = 1 .. C - 1 of (theta_{l+k} - theta_l)       (arXiv 2402.11187, section 2.2)

and the norms of block l. That is the form 'paper'. The authors' public notebooks take each difference to the base that
they have updated already, so that their sum telescopes to theta_{l+C-1}: the window is replaced by its last block, with
the norms of its first. That is the form 'public'. Tables that quote LaCo may show either. Windows of two are the same
in both; in longer ones the paper's sum is that of all blocks but the first, less C - 2 times the first.

Two searches for the windows:

- a number of blocks to remove: in turn the window whose merge leaves the last hidden states most similar to the
  original model's. This greedy search is ours, since the paper's has no number of blocks; its last window is as small
  as the number needs.
- a threshold: the paper's (Algorithm 1). From the highest window down, one is merged if the similarity stays above the
  threshold, and the next begins `interval` blocks below it, else one below. It may take a merged block in again.

Similarity is the mean over calibration windows of the cosine of all hidden states of a window, flattened. As in the
public code they are those after the final norm.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from tqdm import tqdm

from thesislib.compress.outline import Outline, SizeUnknown
from thesislib.compress.selection import check_dense, whole_number
from thesislib.compress.stage import Calibrated, Shape, Stage, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.blocks import ATTRIBUTES, apply_plan, plan_without, remove, removed_parts, shell, with_projections
from thesislib.model.forward import attention_windows, final_states, window_mask
from thesislib.model.layers import Projection
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows

FORMS = {"paper": "", "public": "P"}  # and their endings in labels
REMOVE = 2  # blocks, by default


@stage("laco")
@dataclass(frozen=True)
class Laco(Calibrated):
    """Merge windows of neighbouring blocks into one block each.

    Attributes:
        remove: the number of blocks by which the model gets shorter; 2 by default. Either this or `threshold`.
        threshold: merge what leaves at least this similarity of the last hidden states, in the paper's order. How many
            blocks that removes is known after the run.
        merge: blocks of a window.
        form: paper or public, see above.
        interval: from the first block of a merged window down to that of the next one to be tried; with `threshold`.
        lowest: the first block that may be merged.
        highest: the last block that may be merged; the model's last one by default. (The public code's HIGHEST_LAY is
            one more: its first window ends before it.)
    """

    remove: int | None = None
    threshold: float | None = None
    merge: int = 4
    form: str = "paper"
    interval: int = 1
    lowest: int = 0
    highest: int | None = None
    text: str = field(default="wikipedia", kw_only=True)
    windows: int = field(default=8, kw_only=True)
    length: int = field(default=128, kw_only=True)

    family: ClassVar[str] = "pruned"
    pattern: ClassVar[str] = r"M(\d+|~)(P?)"

    def __post_init__(self):
        super().__post_init__()
        if self.remove is not None and self.threshold is not None:
            raise BadInput("laco takes either 'remove', a number of blocks, or 'threshold', from which it follows")
        if self.remove is None and self.threshold is None:
            self._normalise(remove=REMOVE)
        if self.remove is not None and self.remove < 1:
            raise BadInput(f"remove is {self.remove}: expected at least 1 block")
        if self.threshold is not None and not -1 <= self.threshold < 1:
            raise BadInput(f"threshold is {self.threshold}: expected a cosine in [-1, 1), e.g. 0.65")
        if self.merge < 2:
            raise BadInput(f"merge is {self.merge}: a window of fewer than 2 blocks merges nothing")
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        if self.interval < 1 or (self.interval > 1 and self.threshold is None):
            raise BadInput(
                f"interval is {self.interval}: expected at least 1 block"
                + (", and 1 without a threshold, whose search alone it belongs to" if self.interval > 1 else "")
            )
        if self.lowest < 0 or (self.highest is not None and self.highest <= self.lowest):
            raise BadInput(f"blocks {self.lowest} to {self.highest}: expected at least two, such as 0 to 29")

    @property
    def label(self) -> str:
        """M4 if merging makes the model 4 blocks shorter, M~ if a threshold decides; M4P by the public code's form."""
        return f"M{'~' if self.remove is None else self.remove}{FORMS[self.form]}"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        how = "" if self.form == "paper" else ", as LaCo's public code does"
        if self.remove is None:
            return f"neighbouring blocks merged down to a similarity{how}"
        return f"{self.remove} block{'s' if self.remove > 1 else ''} merged into neighbours{how}"

    @classmethod
    def from_label(cls, part: str) -> "Laco | None":
        """See `Stage`; M~ does not give the threshold."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        if not match or match[1] == "~":
            return None
        return cls(remove=whole_number(match[1]), form="public" if match[2] else "paper")

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: fewer blocks; weights that are quantised or have corrections cannot be merged."""
        if late := next((s for s in previous if s.family == "quantised" or s.leaves_corrections), None):
            raise BadInput(f"{self.label} after {late.label} would merge weights that it cannot change: put it before")
        if shape is None:
            return None
        self.check(shape.depth)
        return None if self.remove is None else dataclasses.replace(shape, depth=shape.depth - self.remove)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        if self.remove is None or outline.budgeted or outline.lost:
            raise SizeUnknown
        depth = outline.subject.depth
        self.check(depth)
        if len({outline.size_key(i, set(ATTRIBUTES)) for i in range(depth)}) > 1:
            raise SizeUnknown
        outline.subject, outline.changed = remove(outline.subject, range(1, self.remove + 1)), set()

    def check(self, depth: int) -> None:
        """Raises BadInput if a model of `depth` blocks does not have the blocks to merge."""
        highest = depth - 1 if self.highest is None else self.highest
        if highest >= depth:
            raise BadInput(f"block {highest} is out of range: the model has blocks 0 to {depth - 1}")
        most = highest - self.lowest
        if most < (self.remove or 1):
            raise BadInput(
                f"cannot merge {self.remove or 1} of blocks {self.lowest} to {highest} into others: expected at most "
                f"{max(most, 0)}"
            )

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The subject with merged blocks, and a report: each merge, by blocks of the subject as it came.

        It shares all other weights with `subject`.

        Raises:
            BadInput: too few blocks; weights that cannot be merged, see `check_mergeable`; a threshold that no window
                reaches; text that cannot be used.
        """
        self.check(subject.depth)
        highest = subject.depth - 1 if self.highest is None else self.highest
        check_mergeable(subject, range(self.lowest, highest + 1))
        ids = self.ids(subject.tokenizer, data)
        check_windows(subject.model, subject.tokenizer, ids)
        with torch.no_grad():
            search = _Search(self, subject, highest, ids)
            (search.downwards if self.remove is None else search.greedy)()
        return search.subject, {"form": self.form, "merges": search.merges, "removed": search.removed}


class _Search:
    """The state of a search: the subject so far, and the merges that made it.

    Attributes:
        top: the last block of the subject so far that may be merged.
        members: for each block of the subject so far, which blocks of the original are in it.
        merges: for the report.
        scores: the similarity of each window that was tried last, by its first block.
    """

    def __init__(self, config: Laco, subject: Subject, highest: int, ids: torch.Tensor):
        self.config, self.subject, self.top, self.ids = config, subject, highest, ids
        self.members = [[b] for b in range(subject.depth)]
        self.merges: list[dict] = []
        self.removed = 0
        self.scores: dict[int, float] = {}
        ((_, self.goal),) = final_states(subject.model, ids.to(subject.device))
        if not torch.isfinite(self.goal).all():
            raise BadInput("the model's hidden states are not finite: the model or its compression so far is broken")

    def greedy(self) -> None:
        """Merge the best window until `remove` blocks are gone."""
        while (left := self.config.remove - self.removed) > 0:
            size = min(self.config.merge, left + 1)
            starts = range(self.config.lowest, self.top - size + 2)
            tried = similarities(self.subject, ((s, size) for s in starts), self.config.form, self.ids, self.goal)
            self.scores = dict(tqdm(tried, desc="laco", total=len(starts), unit="window", disable=None, leave=False))
            best = max(self.scores, key=lambda s: self.scores[s])  # of equal ones the lowest
            self.take(best, size, scores=dict(self.scores))

    def downwards(self) -> None:
        """The paper's search, from the highest window down."""
        config, best = self.config, -1.0
        first = max(self.top - config.merge + 1, config.lowest)
        while first >= config.lowest:
            size = min(config.merge, self.top - first + 1)
            found = -1.0
            if size > 1:
                ((_, found),) = similarities(self.subject, [(first, size)], config.form, self.ids, self.goal)
                self.scores = {first: found}
            best = max(best, found)
            if size > 1 and found > config.threshold:
                self.take(first, size)
                first -= config.interval
            else:
                first -= 1
        if not self.merges:
            raise BadInput(
                f"no window of {config.merge} blocks leaves a similarity above {config.threshold}: the highest is "
                f"{best:.3f}, expected a threshold below it"
            )

    def take(self, first: int, size: int, **facts: Any) -> None:
        """Merge a window for good."""
        self.subject = merged(self.subject, first, size, self.config.form)
        blocks = [b for several in self.members[first : first + size] for b in several]
        self.members[first : first + size] = [blocks]
        self.top, self.removed = self.top - size + 1, self.removed + size - 1
        self.merges.append({"blocks": blocks, "similarity": self.scores[first], **facts})


# ---------------------------------------------------------------- the merge


def check_mergeable(subject: Subject, blocks: Sequence[int]) -> None:
    """Raises BadInput for a block that lost its attention or MLP, or has weights that are not dense, see
    `thesislib.compress.selection.check_dense`."""
    lost = {b: part for part, several in removed_parts(subject).items() for b in several}
    if gone := [b for b in blocks if b in lost]:
        raise BadInput(f"block {gone[0]} has lost its {lost[gone[0]]}: expected whole blocks, merge before removing it")
    check_dense(subject, blocks, "merge blocks")


def merged(subject: Subject, first: int, size: int, form: str) -> Subject:
    """The subject with a window of blocks merged into one; it shares all other weights.

    Args:
        subject: not changed; its blocks are mergeable, see `check_mergeable`.
        first: block of the window, which keeps its place and norms.
        size: blocks of the window; 1 changes nothing.
        form: see `merged_projection`.
    """
    window = [subject.linears(b) for b in range(first, first + size)]
    new: dict[tuple[int, str], nn.Module] = {
        (first, name): merged_projection([linears[name] for linears in window], form) for name in window[0]
    }
    plan = plan_without(subject.depth, range(first + 1, first + size))
    return apply_plan(with_projections(subject, new), plan)


def merged_projection(several: Sequence[Projection], form: str) -> nn.Module:
    """One projection out of those of a window's blocks, in order; a bias is merged as the weight is.

    Args:
        several: with equal shapes.
        form: paper: theta_1 + sum_k (theta_k - theta_1), in float64 and rounded once. public: the last one, shared,
            which is what the sum telescopes to if each difference is to the base so far.
    """
    if form == "public" or len(several) == 1:
        return several[-1]
    linear: Any = shell(several[0])

    def together(tensors: Sequence[torch.Tensor]) -> nn.Parameter:
        first, *others = (t.detach().double() for t in tensors)
        total = first + sum(other - first for other in others)
        return nn.Parameter(total.to(tensors[0].dtype), requires_grad=False)

    linear.weight = together([m.weight for m in several])
    if linear.bias is not None:
        linear.bias = together([cast("torch.Tensor", m.bias) for m in several])
    return linear


# ---------------------------------------------------------------- similarity


def similarities(
    subject: Subject, windows: Iterable[tuple[int, int]], form: str, ids: torch.Tensor, goal: torch.Tensor
) -> Iterator[tuple[int, float]]:
    """(first block, similarity) of the subject with each of some windows merged.

    The blocks before a window run once for all of them.

    Args:
        subject: the model so far.
        windows: (first block, number of blocks), in rising order of the first.
        form: of the merge.
        ids: (N, T) tokens.
        goal: (N, T, D) final states of the original model.
    """
    run, x, done = _Run(subject, ids), subject.model.model.embed_tokens(ids.to(subject.device)), 0
    for first, size in windows:
        x, done = run(x, subject.blocks[done:first], done), first
        short = merged(subject, first, size, form)
        y = _Run(short, ids)(x, short.blocks[first:], first)
        yield first, similarity(short.model.model.norm(y), goal)


def similarity(states: torch.Tensor, goal: torch.Tensor) -> float:
    """The mean over windows of the cosine of their flattened states (N, T, D); -1 if it is not a number."""
    a, b = (t.double().flatten(1) for t in (states, goal))
    return float(nn.functional.cosine_similarity(a, b, dim=1).mean().nan_to_num(-1.0))


class _Run:
    """Runs blocks of a subject on all windows at once; a block keeps the kind of attention that its place has."""

    def __init__(self, subject: Subject, ids: torch.Tensor):
        self.kinds = attention_windows(subject.model.config)
        self.positions = torch.arange(ids.shape[1], device=subject.device)[None]
        self.rotary = subject.model.model.rotary_emb

    def __call__(self, x: torch.Tensor, blocks: Iterable[nn.Module], start: int) -> torch.Tensor:
        """(N, T, D) after some blocks, the first of which has the index `start`."""
        position_embeddings = self.rotary(x, position_ids=self.positions)
        for i, block in enumerate(blocks, start):
            mask = window_mask(self.kinds[i], self.positions)
            x = block(x, attention_mask=mask, position_embeddings=position_embeddings)
        return x
