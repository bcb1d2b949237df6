"""Depth pruning: how much each block matters, and a subject without the blocks, attentions or MLPs that matter
least."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from thesislib.compress.calibration import Visitor, stream
from thesislib.compress.outline import Outline, SizeUnknown
from thesislib.compress.selection import whole_number
from thesislib.compress.stage import Calibrated, Shape, Stage, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.blocks import ATTRIBUTES, remove, removed_parts
from thesislib.model.forward import final_states, token_losses
from thesislib.model.layers import projections
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows

METRICS = ("perplexity", "taylor", "magnitude", "influence", "angular")
PARTS = ("block", "attention", "mlp")
LETTERS = {"block": "", "attention": "A", "mlp": "M"}  # in labels


@stage("depth")
@dataclass(frozen=True)
class Depth(Calibrated):
    """Remove whole blocks, or only their attention or MLP: those that matter least, or those that are named.

    Attributes:
        remove: how many go; either this or `blocks`.
        blocks: exactly which go, as indices into the subject's.
        metric: how a block's importance is measured. perplexity: leave it out and measure. taylor: sum of abs(weight *
            gradient). magnitude: sum of abs(weight). influence: 1 - mean cosine of its input and output. angular: the
            run of `remove` neighbours whose input and output point most alike.
        greedy: measure again after each removal.
        protect_first: blocks at the beginning that always stay; the thesis's four.
        protect_last: blocks at the end that always stay; the thesis's two.
        part: block, attention or mlp: what is removed of a block.
    """

    remove: int | None = None
    blocks: tuple | list | None = None
    metric: str = "perplexity"
    greedy: bool = False
    protect_first: int = 4
    protect_last: int = 2
    part: str = "block"
    text: str = field(default="wikipedia", kw_only=True)
    windows: int = field(default=8, kw_only=True)

    family: ClassVar[str] = "pruned"
    pattern: ClassVar[str] = r"D([AM]?)(\d+)"

    def __post_init__(self):
        super().__post_init__()
        if (self.remove is None) == (self.blocks is None):
            raise BadInput("depth needs either 'remove', a number of blocks, or 'blocks', a list of them")
        if self.blocks is not None:
            self._normalise(blocks=tuple(self.blocks))
            if (
                not self.blocks
                or len(set(self.blocks)) < len(self.blocks)
                or not all(isinstance(b, int) and b >= 0 for b in self.blocks)
            ):
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

    @property
    def count(self) -> int:
        """How many blocks go."""
        return self.remove if self.blocks is None else len(self.blocks)

    @property
    def label(self) -> str:
        """As the thesis writes it: D2; DA2 and DM2 where only attentions or MLPs go."""
        return "D" + LETTERS[self.part] + str(self.count)

    @classmethod
    def from_label(cls, part: str) -> "Depth | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return (
            cls(
                remove=whole_number(match[2]), part=next(name for name, letter in LETTERS.items() if letter == match[1])
            )
            if match
            else None
        )

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: it leaves fewer blocks, or as many where it removes parts of them."""
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
            if len({outline.facts(i, parts) for i in free}) > 1:
                raise SizeUnknown
            chosen = free[: self.count]
            outline.lost |= parts if self.part != "block" else set()
        outline.subject, outline.changed = remove(outline.subject, chosen, self.part), set()

    def check(self, depth: int) -> None:
        """Raises BadInput if a model of `depth` blocks cannot lose what this removes."""
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
                f"{self.protect_last} at the end "
                f"are protected, which leaves {max(free, 0)}"
            )

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The subject without them, sharing the weights of what stays, and a report of which went and why.

        Raises:
            BadInput: more blocks than are unprotected, or whatever the calibration text refuses.
        """
        self.check(subject.depth)
        lost = removed_parts(subject).get(self.part, [])
        if again := sorted({*lost} & {*(self.blocks or ())}):
            raise BadInput(
                f"the {self.part} of block {', '.join(map(str, again))} is gone already: expected blocks that "
                "still have one"
            )
        # what is gone costs nothing to leave out, and would be chosen again
        free = [b for b in range(self.protect_first, subject.depth - self.protect_last) if b not in lost]
        if self.remove and self.remove > len(free):
            raise BadInput(f"cannot remove {self.remove}: {len(free)} unprotected blocks still have an {self.part}")
        if self.blocks is not None:
            return remove(subject, self.blocks, self.part), {"removed": sorted(self.blocks), "part": self.part}
        ids = torch.empty(0)
        if self.metric != "magnitude":
            ids = self.ids(subject.tokenizer, data)
            check_windows(subject.model, subject.tokenizer, ids)
        rounds: list[tuple[int, dict[int, float]]] = []
        gone: list[int] = []
        if self.metric == "angular":
            distance = angular_distances(subject, ids)[self.remove]
            starts = range(self.protect_first, subject.depth - self.protect_last - self.remove + 1)
            first = min(starts, key=lambda i: distance[i])
            gone = list(range(first, first + self.remove))
            scores = {i: float(distance[i]) for i in starts}
        else:
            scores = self._scores(subject, ids, free, gone)
            if not self.greedy:
                gone = sorted(scores, key=lambda b: (scores[b], b))[: self.remove]
            while len(gone) < self.remove:
                least = min(scores, key=lambda b: (scores[b], b))
                rounds.append((least, scores))
                gone.append(least)
                scores = self._scores(subject, ids, free, gone) if len(gone) < self.remove else scores
        report = {
            "removed": sorted(gone),
            "order": gone,
            "part": self.part,
            "metric": self.metric,
            "greedy": self.greedy,
        }
        return remove(subject, gone, self.part), {**report, "scores": rounds[0][1] if rounds else scores}

    def _scores(
        self, subject: Subject, ids: torch.Tensor, free: Sequence[int], gone: Sequence[int]
    ) -> dict[int, float]:
        """Importance of every block of `free` that is still there, by its index in the whole model."""
        free = [b for b in free if b not in gone]
        if self.part == "block":
            left = [b for b in range(subject.depth) if b not in gone]
            found = importance(
                remove(subject, gone) if gone else subject, ids, self.metric, blocks=[left.index(b) for b in free]
            )
            return {b: found[left.index(b)] for b in free}
        return importance(
            remove(subject, gone, self.part) if gone else subject, ids, self.metric, blocks=free, part=self.part
        )


# ---------------------------------------------------------------- importance


def importance(
    subject: Subject, ids: torch.Tensor, metric: str, *, blocks: Sequence[int] | None = None, part: str = "block"
) -> dict[int, float]:
    """How much each of `blocks` matters (all by default): the lower, the sooner it can go.

    Args:
        subject: the model.
        ids: (N, T) calibration windows; magnitude looks at none.
        metric: one of `METRICS` but angular, whose scores are runs' (see `angular_distances`).
        blocks: which to score.
        part: score whole blocks, or only their attention or MLP (not known to influence, which compares blocks).

    Raises:
        BadInput: unknown metric, or one that does not fit the part or the subject.
    """
    blocks = range(subject.depth) if blocks is None else blocks
    if metric == "perplexity":
        return leave_one_out(subject, ids, blocks, part)
    if metric == "influence":
        if part != "block":
            raise BadInput(
                f"metric 'influence' compares a block's input and output: for part '{part}' use perplexity, "
                "taylor or magnitude"
            )
        scores = influence(subject, ids)
        return {b: scores[b] for b in blocks}
    if metric == "magnitude":
        return {b: _sum_over(subject, b, part, lambda w: w.detach().float().abs().sum()) for b in blocks}
    if metric == "taylor":
        return taylor(subject, ids, blocks, part)
    raise unknown("importance metric", metric, METRICS)


def leave_one_out(
    subject: Subject, ids: torch.Tensor, blocks: Sequence[int], part: str = "block", batch: int = 4
) -> dict[int, float]:
    """Perplexity with each of `blocks` left out (Kim et al. 2024, one-shot), activations before it computed once.

    Where only an attention or MLP is left out, every variant runs by itself: the tree of plans knows whole blocks only.
    """
    nats = dict.fromkeys(blocks, 0.0)
    with torch.inference_mode():
        for at in tqdm(range(0, len(ids), batch), desc="leave one out", unit="batch", disable=None, leave=False):
            some = ids[at : at + batch].to(subject.device)
            targets = some[:, 1:].reshape(-1)
            if part == "block":
                whole = tuple(range(subject.depth))
                variants = (
                    (blocks[k], h)
                    for k, h in final_states(subject.model, some, [whole[:b] + whole[b + 1 :] for b in blocks])
                )
            else:
                variants = ((b, h) for b in blocks for _, h in final_states(remove(subject, [b], part).model, some))
            for b, h in variants:
                nats[b] += token_losses(subject.model, h[:, :-1].flatten(0, 1), targets).double().sum().item()
    return {b: _exp(total / (len(ids) * (ids.shape[1] - 1))) for b, total in nats.items()}


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def influence(subject: Subject, ids: torch.Tensor) -> list[float]:
    """1 - mean over tokens of cos(block input, block output), for each block (Men et al. 2024, ShortGPT, eq. 1).

    Blocks are watched where they run: the last of transformers' `hidden_states` is the output of the final norm, and
    would give the last block another block's score.
    """
    sums = [0.0] * subject.depth

    class Cosine(Visitor):
        def seen(self, block, first, x, y):
            sums[block] += nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).double().sum().item()

    stream(subject, ids, Cosine(), title="influence")
    return [1 - s / ids.numel() for s in sums]


def angular_distances(subject: Subject, ids: torch.Tensor) -> np.ndarray:
    """arccos(cos(x_l, x_{l+n})) / pi of the last token's residual, mean over windows (Gromov et al. 2024, eq. 8).

    Returns:
        (depth + 1, depth + 1): [n, l] for a run of n blocks from block l on, x_l being the input of block l; nan where
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
    """Sum over a block's weights of abs(w * g), g the gradient of the mean loss over all windows (Kim et al. 2024, eq.
    3).

    Raises:
        BadInput: weights that carry no gradient, such as packed or quantised ones.
    """
    own = {b: list(_weights(subject, b, part)) for b in blocks}
    if any(not isinstance(w, nn.Parameter) or not w.is_floating_point() for weights in own.values() for w in weights):
        raise BadInput(
            "metric 'taylor' needs gradients, which packed or quantised weights do not carry: use perplexity, "
            "influence or magnitude"
        )
    try:
        for weights in own.values():
            for w in weights:
                w.requires_grad_(True)
        for at in tqdm(range(0, len(ids), batch), desc="taylor", unit="batch", disable=None, leave=False):
            some = ids[at : at + batch].to(subject.device)
            states = subject.model.model(input_ids=some, use_cache=False).last_hidden_state
            logits = subject.model.get_output_embeddings()(states[:, :-1]).float().flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum") / (
                len(ids) * (ids.shape[1] - 1)
            )
            loss.backward()
        return {
            b: sum((w.detach().float() * w.grad.float()).abs().sum().item() for w in weights)
            for b, weights in own.items()
        }
    finally:
        for weights in own.values():
            for w in weights:
                w.requires_grad_(False)
                w.grad = None


def _weights(subject: Subject, block: int, part: str):
    """The projections' weights of a block or of a part of it; norms, a thousandth of a block, do not count."""
    whole = subject.blocks[block]
    for name, module in projections(whole).items():
        if part == "block" or hasattr(getattr(whole, ATTRIBUTES[part]), name):
            yield module.weight


def _sum_over(subject: Subject, block: int, part: str, of: Callable[[torch.Tensor], torch.Tensor]) -> float:
    return sum(of(w).item() for w in _weights(subject, block, part))
