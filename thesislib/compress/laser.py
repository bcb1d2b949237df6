"""LASER: one weight replaced by its best low-rank part (Sharma et al. 2023, arXiv 2312.13558).

The part is multiplied back to an ordinary dense weight: the model keeps its size and costs what it cost. What is
claimed is that a late MLP weight without its small singular values answers better.

Which projection of which block, and how much of its rank, is chosen on items of a task. The paper takes the best
accuracy on the first 20 % of the items and reports the others. Here it is the mean log-probability of the right ending,
which has less noise than right or wrong, on the part of the items that is for ranking
(`thesislib.sources.choices.choice_set.part_of`). The best of many noisy scores is too good on the items that it was the
best on: measure it on the part to report. The public code's SVD is a random one of two iterations; this one is exact.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import nn
from tqdm import tqdm

from thesislib.compress.factor import truncated
from thesislib.compress.outline import Outline
from thesislib.compress.relevance import NEXT_TOKEN, Outcomes, check_tasks, choices, next_tokens, outcomes_of
from thesislib.compress.selection import (
    LinearKey,
    check_all_dense,
    check_all_fit,
    fits,
    patterns,
    selected,
    whole_number,
)
from thesislib.compress.stage import Calibrated, Shape, Stage, stage
from thesislib.config import positive
from thesislib.errors import BadInput, unknown
from thesislib.model.blocks import apply_plan, shell, with_projections
from thesislib.model.layers import LINEARS, Projection
from thesislib.model.subject import Subject

MLP = ("gate_proj", "up_proj", "down_proj")
SHARES = (0.01, 0.05, 0.1, 0.2, 0.4)
ITEMS = 190  # arc_easy's for ranking
SEARCH = ("linears", "blocks", "shares", "task", "items")  # settings of the search


@stage("laser")
@dataclass(frozen=True)
class Laser(Calibrated):
    """Replace one projection by its best low-rank part: the one that answers best, or a given one.

    Either `block`, `linear` and `share` say which, and nothing is measured, or the others say among which to search.

    Attributes:
        block: of the projection to replace.
        linear: its name.
        share: of its rank that is kept: int(share min(outputs, inputs)), at least 1.
        linears: names or patterns of the projections to try; by default those of the MLP.
        blocks: to try; all by default.
        shares: to try; .01, .05, .1, .2 and .4 by default.
        task: whose items choose, arc_easy by default; next_token is the next tokens of the calibration text.
        items: of the task, 190 by default; next_token has `windows` instead.
    """

    block: int | None = None
    linear: str | None = None
    share: float | None = None
    linears: str | list | tuple | None = None
    blocks: list | tuple | None = None
    shares: list | tuple | None = None
    task: str | None = None
    items: int | None = None

    # the rank is lower, but no pair is left; and EoRA after it would put back what it took out
    family: ClassVar[str] = "factorised"
    pattern: ClassVar[str] = r"Z(?:~|(\d+)-(q|k|v|o|gate|up|down)-(\d+(?:\.\d+)?(?:e-\d+)?)%)"

    def __post_init__(self):
        super().__post_init__()
        given = [n for n in ("block", "linear", "share") if getattr(self, n) is not None]
        if given and len(given) < 3:
            raise BadInput(f"laser has {' and '.join(given)}: expected block, linear and share together, or a search")
        if given:
            if idle := next((n for n in SEARCH if getattr(self, n) is not None), None):
                raise BadInput(
                    f"{idle} is {getattr(self, idle)!r}: with block, linear and share nothing is searched, "
                    f"leave {idle} out"
                )
            if self.linear not in LINEARS:
                raise unknown("projection", self.linear, LINEARS)
            _check_blocks([self.block])
            _check_shares([self.share])
            return
        chosen = {n: getattr(self, n) for n in SEARCH if getattr(self, n) is not None}
        search: dict[str, Any] = {"linears": MLP, "shares": SHARES, "task": "arc_easy"} | chosen
        check_tasks([search["task"]])
        if search["task"] == NEXT_TOKEN and self.items is not None:
            raise BadInput(f"items is {self.items}: only a task of questions has items, text has 'windows'")
        if search["task"] != NEXT_TOKEN:
            search = {"items": ITEMS} | search
        search["linears"], search["shares"] = patterns(search["linears"]), tuple(search["shares"])
        _check_shares(search["shares"])
        if not search["linears"] or not search["shares"] or len(set(search["shares"])) < len(search["shares"]):
            raise BadInput(
                f"linears {list(search['linears'])} and shares {list(search['shares'])}: expected at least one of "
                "each, and different shares"
            )
        if self.blocks is not None:
            search["blocks"] = tuple(self.blocks)
            _check_blocks(search["blocks"])
        self._normalise(**search)
        positive(items=self.items)

    @property
    def given(self) -> bool:
        """Whether the projection is given, so that nothing is searched."""
        return self.block is not None

    @property
    def label(self) -> str:
        """Z~ for the best that a search finds, Z27-down-1% for block 27's down_proj at a hundredth of its rank."""
        return f"Z{self.block}-{self.linear.removesuffix('_proj')}-{100 * self.share:g}%" if self.given else "Z~"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        if self.given:
            return f"block {self.block}'s {self.linear} cut to {100 * self.share:g} % of its rank (LASER)"
        return "one weight cut to the low rank that answers best (LASER)"

    @classmethod
    def from_label(cls, part: str) -> "Laser | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        if not match or not match[1]:
            return cls() if match else None
        return cls(block=whole_number(match[1]), linear=f"{match[2]}_proj", share=float(match[3]) / 100)

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection is given, or may be tried."""
        if self.given:
            return (block, name) == (self.block, self.linear)
        return (self.blocks is None or block in self.blocks) and any(fits(p, block, name) for p in self.linears)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: the same shape; weights that are quantised or have corrections cannot be cut."""
        if late := next((s for s in previous if s.family == "quantised" or s.leaves_corrections), None):
            raise BadInput(f"{self.label} after {late.label} would cut weights that it cannot change: put it before")
        if shape is not None:
            self.check(shape.depth)
        return shape

    def outline(self, outline: Outline) -> None:
        """See `Stage`: the sizes stay."""
        self.check(outline.subject.depth)
        outline.changed = set()

    def check(self, depth: int) -> None:
        """Raises BadInput for a block or a pattern that a model of `depth` blocks does not have."""
        blocks = [self.block] if self.given else self.blocks or ()
        if wrong := [b for b in blocks if b >= depth]:
            raise BadInput(f"block {wrong[0]} is out of range: the model has blocks 0 to {depth - 1}")
        check_all_fit(self.linears or (), depth)

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The subject with one weight replaced, and a report: which, and all that was tried.

        It shares all other weights with `subject`. If nothing that was tried is better than the whole model on the
        items, it is the subject, and `chosen` in the report is None.

        Raises:
            BadInput: a block that the model does not have, or without the projection; weights that are not dense, see
                `thesislib.compress.selection.check_all_dense`; too few items; text that cannot be used; a model whose
                scores are not finite.
        """
        self.check(subject.depth)
        taken = selected(subject, self.takes)
        asked = [self.block] if self.given else self.blocks or range(0)
        without = [b for b in asked if b not in {block for block, _ in taken}]
        if without or not taken:
            where = f"block {without[0]}" if without else "the model"
            raise BadInput(
                f"{where} has no {' or '.join([self.linear] if self.given else self.linears)}: expected a projection "
                "that is still there"
            )
        check_all_dense(taken, "cut ranks")
        if self.given:
            ((key, module),) = taken.items()
            ((cut, facts),) = cuts(key, module, [self.share])
            return with_projections(subject, {key: cut}), {"chosen": facts}
        return self._best(subject, taken, data)

    def _best(self, subject: Subject, taken: Mapping[LinearKey, Projection], data: str) -> tuple[Subject, dict]:
        """See `apply`, for a search."""
        if self.task == NEXT_TOKEN:
            items = next_tokens(self.ids(subject.tokenizer, data))
        else:
            items = choices(self.task, data, self.items, seed=self.seed)
        whole = outcomes_of(subject, items, [range(subject.depth)])
        before = whole.likelihood[0]
        if not np.isfinite(before).all():
            raise BadInput("the model's scores are not finite: the model or its compression so far is broken")
        best, chosen, tried = subject, None, []
        for b in tqdm(sorted({b for b, _ in taken}), desc="laser", unit="block", disable=None, leave=False):
            some = [cut for key, m in taken.items() if key[0] == b for cut in cuts(key, m, self.shares)]
            extended, plans = with_variants(subject, b, some)
            found = outcomes_of(extended, items, plans)
            for k, cut in enumerate(some):
                gains = found.likelihood[k] - before
                spread = float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else None
                score = {"gain": float(gains.mean()), "standard_error": spread}
                tried.append({**cut.facts, **_scores(found, k), **score})
                if tried[-1]["gain"] > (chosen["gain"] if chosen else 0):  # of equal ones the first; never if nan
                    chosen, best = tried[-1], with_projections(subject, {(b, cut.facts["linear"]): cut.module})
        report = {"chosen": chosen, "task": self.task, "items": len(before), "whole": _scores(whole, 0), "tried": tried}
        return best, report


def _scores(found: Outcomes, row: int) -> dict[str, float]:
    """Means over items: the right ending's log-probability in nats, by which is chosen, its margin, and accuracy."""
    values = {"score": found.likelihood, "margin": found.margin, "accuracy": found.correct}
    return {name: float(of[row].mean()) for name, of in values.items()}


def _check_blocks(blocks: Sequence[Any]) -> None:
    """Raises BadInput unless these are different indices of blocks, at least one."""
    if not blocks or not all(isinstance(b, int) and b >= 0 for b in blocks) or len(set(blocks)) < len(blocks):
        raise BadInput(f"blocks {list(blocks)}: expected different indices from 0 on, at least one")


def _check_shares(shares: Sequence[Any]) -> None:
    """Raises BadInput for a share outside (0, 1]."""
    for share in shares:
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise BadInput(f"share {share}: expected a share of the rank in (0, 1], e.g. 0.01")


class Cut(NamedTuple):
    """A projection without its small singular values.

    Args:
        module: dense, with the bias of the whole one.
        facts: block, linear, share, rank, and the relative error of the weight, for the report.
    """

    module: nn.Module
    facts: dict[str, Any]


def cuts(key: LinearKey, module: Projection, shares: Sequence[float]) -> Iterator[Cut]:
    """The best parts of a weight at some shares of its rank; the whole rank is the module itself.

    Args:
        key: its block and name.
        module: dense, with a weight (outputs, inputs).
        shares: of the smaller side, in (0, 1].
    """
    weight = module.weight.detach().double()
    side, total = min(weight.shape), float(weight.square().sum())
    ranks = [max(1, int(side * share)) for share in shares]
    u, v, s = truncated(weight, max(ranks), left=0.5)
    for share, rank in zip(shares, ranks, strict=True):
        cut: Any = module if rank == side else shell(module)
        left = max(total - float(s[:rank].square().sum()), 0) if rank < side else 0
        if rank < side:
            cut.weight = nn.Parameter((u[:, :rank] @ v[:, :rank].T).to(module.weight.dtype), requires_grad=False)
        facts = {"block": key[0], "linear": key[1], "share": share, "rank": rank}
        yield Cut(cut, {**facts, "relative_error": round((left / total) ** 0.5 if total else 0.0, 6)})


def with_variants(subject: Subject, block: int, several: Sequence[Cut]) -> tuple[Subject, list[tuple[int, ...]]]:
    """The subject with further blocks at its end, copies of one block with one projection cut, and the plans that run
    each in that block's place. No weight is copied, and all that comes before the block runs once for all plans."""
    depth = subject.depth
    longer = apply_plan(subject, (*range(depth), *[block] * len(several)))
    changed = {(depth + k, cut.facts["linear"]): cut.module for k, cut in enumerate(several)}
    plans = [(*range(block), depth + k, *range(block + 1, depth)) for k in range(len(several))]
    return with_projections(longer, changed), plans
