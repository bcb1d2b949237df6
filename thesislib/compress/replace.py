"""What stands in the place of removed blocks: a scale, a bias or a linear map, folded into the weights that stay.

The result is an ordinary model of fewer blocks. A gap is a run of neighbouring blocks that are removed together. x is
the residual stream before it, y after it. Three replacements give y from x:

- scalar: y = s x with s = mean(abs(y)) / mean(abs(x)), abs being a token's norm (Prune&Comp, arXiv 2507.18212, whose
  code takes the mean over features of ratios of mean magnitudes instead). Every block begins with an RMSNorm, which
  does not see the scale of the residual, and so does the head. So instead of x all later writes are scaled, by 1 / s:
  the weights and biases of o_proj and down_proj. Prune&Comp's code scales the embedding and all earlier writes by s
  instead, which would change a tied head. The norms' epsilon is the difference: it counts as epsilon s^2 does in the
  model that is scaled by hand.
- bias: y = x + mean(y - x), a bias of the down_proj before the gap. A checkpoint holds it where the configuration has
  `mlp_bias`; then every gate_proj, up_proj and down_proj has a bias, all others zero.
- linear: y = x - m + m T (ReplaceMe, arXiv 2505.02819), where m is what the MLP before the gap wrote into x and T the
  ridge regression of y - (x - m) on m. T is multiplied into that MLP's down_proj.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from thesislib.compress.calibration import check_moment
from thesislib.errors import BadInput
from thesislib.model import packing
from thesislib.model.blocks import apply_plan, shell, with_bias, with_projections
from thesislib.model.layers import Adapted, Projection, unpack
from thesislib.model.lowrank import is_lowrank
from thesislib.model.quantised import is_quantised
from thesislib.model.subject import Subject

REPLACEMENTS = ("scalar", "bias", "linear")
WRITERS = ("o_proj", "down_proj")  # into the residual stream
BIASED = ("gate_proj", "up_proj", "down_proj")  # where the configuration has `mlp_bias`
RIDGE = 1e-6  # of the mean square of m's features


def gaps(removed: Collection[int]) -> list[list[int]]:
    """Runs of neighbouring blocks.

    >>> gaps([7, 3, 4])
    [[3, 4], [7]]
    """
    runs: list[list[int]] = []
    for b in sorted(removed):
        if runs and runs[-1][-1] == b - 1:
            runs[-1].append(b)
        else:
            runs.append([b])
    return runs


def check(subject: Subject, removed: Collection[int], how: str) -> None:
    """Raises BadInput if the weights beside a gap cannot take its replacement; none is read for it but zeros are."""
    if how == "bias":
        check_biases(subject)
    for run in gaps(removed):
        if how == "scalar":
            later = [subject.linears(b) for b in range(run[-1] + 1, subject.depth)]
            if any(is_lowrank(linears[n]) for linears in later for n in WRITERS if n in linears):
                raise BadInput(
                    f"replace 'scalar' scales the weights after block {run[-1]}, and some are pairs: use bias"
                )
            if any(is_quantised(linears[n]) for linears in later for n in WRITERS if n in linears):
                raise BadInput(
                    f"replace 'scalar' scales the weights after block {run[-1]}, and they are quantised: quantise "
                    "after the depth stage, or use bias"
                )
            continue
        if run[0] == 0:
            raise BadInput(f"replace '{how}' goes into the MLP before a removed block: block 0 has none, use scalar")
        neighbour = subject.linears(run[0] - 1).get("down_proj")
        where = f"replace '{how}' of block {run[0]} goes into the down_proj of block {run[0] - 1}, which"
        if neighbour is None:
            raise BadInput(f"{where} was removed with its MLP: use scalar")
        if how == "linear" and is_lowrank(neighbour):
            raise BadInput(f"{where} is a pair of low rank: use bias")
        if how == "linear" and is_quantised(neighbour):
            raise BadInput(f"{where} is quantised: quantise after the depth stage, or use bias")
        if how == "linear" and packing.smallest(neighbour.weight) != "dense":
            raise BadInput(f"{where} has zeros that it would fill: prune after the depth stage, or use scalar or bias")


def check_biases(subject: Subject) -> None:
    """Raises BadInput if a checkpoint of the subject's architecture cannot hold a bias of an MLP."""
    if not hasattr(subject.model.config, "mlp_bias"):
        raise BadInput(
            f"replace 'bias' needs an architecture whose MLP may have biases (llama, smollm3), and this one is "
            f"{subject.model.config.model_type}: use scalar or linear"
        )


def replaced(
    subject: Subject, removed: Collection[int], how: str, ids: torch.Tensor, batch: int = 4, skip: int = 0
) -> tuple[Subject, list[dict]]:
    """The subject without some blocks and with a replacement folded in for each gap; the rest is shared.

    Gaps are estimated from the first to the last, each in the model in which those before it are replaced already, and
    those after it are not yet gaps.

    Args:
        subject: the whole model.
        removed: indices of the blocks.
        how: one of `REPLACEMENTS`.
        ids: (N, T) calibration windows.
        batch: windows at a time.
        skip: the first tokens of each window that do not count. The first one is an attention sink, whose residual can
            be a hundred times as long as the others'; see `thesislib.compress.calibration.token_weights`.

    Returns:
        The subject, and for each gap its blocks, its scale if it has one, and `left`: the share of the gap's squared
        write, summed over the calibration's tokens that count, that the replacement misses.

    Raises:
        BadInput: see `check`; activations that are not finite; no token that counts.
    """
    check(subject, removed, how)
    if not 0 <= skip < ids.shape[1]:
        raise BadInput(f"skip {skip} leaves no token of windows of {ids.shape[1]}: expected 0 to {ids.shape[1] - 1}")
    current = subject = with_biases(subject) if how == "bias" else subject
    changed: dict[tuple[int, str], nn.Module] = {}
    report, scale = [], 1.0
    for run in tqdm(gaps(removed), desc="replace", unit="gap", disable=None, leave=False):
        plan = [b for b in range(run[-1] + 1) if b in run or b not in removed]
        gap = measure(apply_plan(current, plan), plan.index(run[0]), ids, how == "linear", batch, skip)
        facts: dict[str, Any] = {"blocks": run, "left": 1.0}
        before = run[0] - 1, "down_proj"
        if how == "scalar":
            facts |= {"scale": gap.scale, "left": gap.left_by_scale}
            scale /= gap.scale  # of what later blocks write, in the units of the residual before the first gap
            for b in range(run[-1] + 1, subject.depth):
                linears = subject.linears(b)
                changed |= {(b, n): mapped(linears[n], scale) for n in WRITERS if n in linears}
        elif how == "bias":
            facts["left"] = gap.left_by_bias
            down = subject.linears(before[0])["down_proj"]
            changed[before] = with_bias(down, (down.bias.double() + gap.write / gap.tokens).to(down.bias.dtype))
        else:
            T = ridge(gap.moment, gap.cross)
            facts["left"] = gap.left_by_map(T)
            changed[before] = mapped(subject.linears(before[0])["down_proj"], T)
        report.append(facts)
        current = with_projections(subject, changed)
    return apply_plan(current, [b for b in range(subject.depth) if b not in removed]), report


def ridge(moment: torch.Tensor, cross: torch.Tensor, weight: float = RIDGE) -> torch.Tensor:
    """T = (M'M + a I)^-1 M'R, the map with the least ||M T - R||^2 + a ||T||^2, where a is `weight` times M'M's mean
    diagonal.

    Args:
        moment: M'M (D, D) float64.
        cross: M'R (D, D) float64.
        weight: of the penalty.
    """
    penalty = weight * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment + penalty, cross)


def mapped(module: Projection, by: float | torch.Tensor) -> nn.Linear | Adapted:
    """A projection whose outputs are mapped linearly, computed in float64 and rounded once; a correction stays one.

    Args:
        module: not quantised; a packed weight becomes a dense one.
        by: s or T (outputs, outputs): the output y becomes s y or y T.
    """

    def new(tensor: torch.Tensor) -> nn.Parameter:
        exact = tensor.detach().double()
        exact = by.T @ exact if isinstance(by, torch.Tensor) else by * exact
        return nn.Parameter(exact.to(tensor.dtype), requires_grad=False)

    module = unpack(module)
    if isinstance(module, Adapted):
        return Adapted(cast("nn.Linear", mapped(module.base, by)), module.lora_A, new(module.lora_B))
    linear: Any = shell(module)
    linear.weight = new(module.weight)
    linear.bias = None if module.bias is None else new(module.bias)
    return linear


def with_biases(subject: Subject) -> Subject:
    """The subject whose MLPs have biases, zero where there was none."""
    none = {
        (b, name): with_bias(module, torch.zeros(module.out_features, dtype=subject.dtype, device=subject.device))
        for b in range(subject.depth)
        for name, module in subject.linears(b).items()
        if name in BIASED and module.bias is None
    }
    out = with_projections(subject, none)
    out.model.config.mlp_bias = True  # a copy, see `apply_plan`
    return out


# ---------------------------------------------------------------- what is measured


@dataclass
class Gap:
    """Sums over tokens around a gap, float64: x before it, y after it, w = y - x, m the write of the MLP before it, and
    r = y - (x - m).

    Attributes:
        tokens: their number.
        norms: of x and of y.
        write: (D,) w.
        squares: w.w, x.w and x.x.
        moment: (D, D) m m'; None if not asked for.
        cross: (D, D) m r'.
        target: r.r.
    """

    tokens: int = 0
    norms: Any = 0.0
    write: Any = 0.0
    squares: Any = 0.0
    moment: Any = 0.0
    cross: Any = 0.0
    target: Any = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor, m: torch.Tensor | None) -> None:
        """Add a batch of tokens, (B, T, D) each."""
        x, y = (t.double().flatten(0, -2) for t in (x, y))
        w = y - x
        self.tokens += len(x)
        self.norms += torch.stack([x.norm(dim=1).sum(), y.norm(dim=1).sum()])
        self.write += w.sum(0)
        self.squares += torch.stack([w.square().sum(), (x * w).sum(), x.square().sum()])
        if m is not None:
            m = m.double().flatten(0, -2)
            r = w + m
            self.moment, self.cross = self.moment + m.T @ m, self.cross + m.T @ r
            self.target += r.square().sum()

    @property
    def scale(self) -> float:
        """The ratio of the mean norms, y's to x's."""
        return float(self.norms[1] / self.norms[0])

    @property
    def left_by_scale(self) -> float:
        """The share of the squared write that scaling misses."""
        ww, xw, xx = self.squares.tolist()
        return _share(ww - 2 * (self.scale - 1) * xw + (self.scale - 1) ** 2 * xx, ww)

    @property
    def left_by_bias(self) -> float:
        """The share of the squared write that its mean misses."""
        ww = float(self.squares[0])
        return _share(ww - float(self.write.square().sum()) / self.tokens, ww)

    def left_by_map(self, T: torch.Tensor) -> float:
        """The share of the squared write that the map T (D, D) misses."""
        error = self.target - 2 * (T * self.cross).sum() + (T * (self.moment @ T)).sum()
        return _share(float(error), float(self.squares[0]))


def _share(part: float, whole: float) -> float:
    """part / whole, at least 0; 0 of nothing is 0."""
    return max(part, 0.0) / whole if whole else 0.0


def measure(prefix: Subject, start: int, ids: torch.Tensor, moments: bool, batch: int = 4, skip: int = 0) -> Gap:
    """The sums around the gap that begins with block `start` of a model and ends with its last.

    Args:
        prefix: the model up to the gap's last block.
        start: the gap's first block.
        ids: (N, T) windows.
        moments: whether the write of the MLP before the gap is asked for.
        batch: windows at a time.
        skip: the first tokens of each window that do not count.

    Raises:
        BadInput: activations that are not finite or all zero.
    """
    gap, seen = Gap(), dict[str, torch.Tensor]()
    blocks: Any = prefix.blocks
    hooks = [
        blocks[start].register_forward_pre_hook(lambda _module, args: seen.update(x=args[0])),
        blocks[-1].register_forward_hook(lambda _module, _args, out: seen.update(y=out)),
    ]
    if moments:
        hooks.append(blocks[start - 1].mlp.register_forward_hook(lambda _module, _args, out: seen.update(m=out)))
    try:
        with torch.no_grad():
            for first in range(0, len(ids), batch):
                prefix.model.model(input_ids=ids[first : first + batch].to(prefix.device), use_cache=False)
                gap.add(*(seen[name][:, skip:] if name in seen else None for name in "xym"))
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.isfinite(gap.squares).all() or not gap.norms.all():
        raise BadInput("the residual stream around a removed block is zero or not finite: the model is broken there")
    if moments:
        check_moment(gap.moment, "the MLP before a removed block", "use scalar or bias")
    return gap
