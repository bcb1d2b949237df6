"""The calibration pass, which WANDA, GPTQ, EoRA and the importance metrics share.

It takes the blocks of a model in turn. A block runs on its input activations, and a visitor gets the statistics of each
projection's inputs and changes the weights. Then the block runs again, so that the next block gets the activations of
the changed model, as in WANDA's and GPTQ's code. Only one block and the activations need to be in memory.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
from torch import nn
from tqdm import tqdm

from thesislib.errors import BadInput
from thesislib.model.forward import attention_windows, window_mask
from thesislib.model.layers import LINEARS, Projection, projections
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows

# the input of each projection; those with the same input share its statistics
INPUTS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention") | dict.fromkeys(("gate_proj", "up_proj"), "mlp")
INPUTS |= {"o_proj": "heads", "down_proj": "hidden"}
FEEDS = ("compressed", "original", "both")


@dataclass
class Statistics:
    """Statistics of a projection's inputs x_t, as sums over tokens t with weights w_t.

    Attributes:
        squares: (D,) float32, the sum of w x^2, which is the diagonal of the moment.
        moment: (D, D) float32, the sum of w x x^T; None if the visitor does not need it.
        tokens: the sum of w; with weighting 'unit_norm' the number of tokens.
        sizes: (D,) the sum of w abs(x); None if the visitor does not need it.
        cross: (D, D) the sum of w f x^T, f being the same projection's inputs in the unchanged model; None unless both
            models are fed.
    """

    squares: torch.Tensor
    moment: torch.Tensor | None
    tokens: float
    sizes: torch.Tensor | None = None
    cross: torch.Tensor | None = None

    @property
    def rms(self) -> torch.Tensor:
        """(D,) root mean square of each input feature."""
        return (self.squares / self.tokens).sqrt()


def check_moment(moment: torch.Tensor, where: str, remedy: str = "leave it out with 'linears'") -> None:
    """Raises BadInput for a moment (D, D) of inputs that are not finite, or all zero.

    Args:
        moment: of a projection's inputs.
        where: the projection's name in the message.
        remedy: what the message recommends for inputs that are zero.
    """
    if not torch.isfinite(moment).all():
        raise BadInput(
            f"the statistics of {where} are not finite: the model or its compression before this block is broken"
        )
    if not moment.diagonal().any():
        raise BadInput(f"{where} saw no tokens: all its inputs are zero on the calibration text; {remedy}")


class Visitor:
    """A method that the calibration pass takes through the blocks; the default collects and changes nothing.

    Attributes:
        groups: projections that change together, after one run of the block for each group. WANDA has one group of all
            seven. In GPTQ's true-sequential order a group sees the changes of the one before.
        moments: whether the method needs the moment X^T X, or only its diagonal.
        sizes: whether it needs the sums of abs(x).
    """

    groups: Sequence[Sequence[str]] = ()
    moments: bool = False
    sizes: bool = False

    def wants(self, block: int, name: str) -> bool:
        """Whether this projection takes part; others cost nothing."""
        return True

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """Change the weights of one group of `linears` in place, given the statistics of their inputs."""

    def seen(self, block: int, first: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Called with a block's input and output (B, T, D), after all changes to the block.

        Args:
            block: its index.
            first: the number of the first of these windows.
            x: the input.
            y: the output.
        """


class Blocks(Protocol):
    """A source of a model's blocks, one at a time."""

    depth: int
    windows: list[int | None]  # see `thesislib.model.forward.attention_windows`

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens -> (B, T, D) embeddings."""

    def rotary(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The position embeddings that a block takes."""

    def hold(self, i: int):
        """A context in which block i is in memory; when it ends, changes to the block are saved."""


class Resident:
    """The blocks of a subject in memory."""

    def __init__(self, subject: Subject):
        self.model, self.depth, self.windows = subject.model, subject.depth, attention_windows(subject.model.config)
        weights = [cast("Any", block).input_layernorm.weight.data_ptr() for block in subject.blocks]
        if len(set(weights)) < len(weights):
            raise BadInput(
                "a plan that runs a block twice cannot be calibrated block by block: the second visit would "
                "change the first again"
            )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """See `Blocks`."""
        return self.model.model.embed_tokens(ids.to(self.model.device))

    def rotary(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Blocks`."""
        return self.model.model.rotary_emb(x, position_ids=positions)

    @contextmanager
    def hold(self, i: int) -> Iterator[nn.Module]:
        """See `Blocks`."""
        yield self.model.model.layers[i]


def token_weights(weighting: str, x: torch.Tensor) -> torch.Tensor:
    """The weight of each token in the statistics, (B, T) float32.

    A window's first token is an attention sink. Its residual can be a hundred times as long as the others', and most
    heads read its value at every step, but X^T X counts it only once in T.

    Args:
        weighting: 'equal' (as in the methods' papers), 'unit_norm' (x divided by its norm), 'first_N' (the first token
            of each window counts N times), 'skip_N' (the first N tokens are left out).
        x: (B, T, D) inputs.

    Raises:
        BadInput: another weighting, or one that leaves no token.
    """
    check_weighting(weighting, x.shape[1])
    if weighting == "unit_norm":
        squared = x.float().square().sum(-1)
        return torch.where(squared > 0, squared.reciprocal(), 0)
    w = torch.ones(x.shape[:2], device=x.device)
    rule, _, n = weighting.partition("_")
    if rule == "first":
        w[:, 0] = int(n)
    elif rule == "skip":
        w[:, : int(n)] = 0
    return w


def check_weighting(weighting: str, length: int | None = None) -> None:
    """Raises BadInput for an unknown weighting, or one that leaves no token of a window of `length`."""
    if not isinstance(weighting, str) or not re.fullmatch(r"equal|unit_norm|first_[1-9]\d*|skip_[1-9]\d*", weighting):
        raise BadInput(
            f"token weighting '{weighting}' is not known: expected equal, unit_norm, first_N or skip_N, e.g. first_16"
        )
    if weighting.startswith("skip_") and length is not None and int(weighting[5:]) >= length:
        raise BadInput(f"token weighting '{weighting}' leaves no token of windows of {length}")


def stream(
    blocks: Blocks | Subject,
    windows: torch.Tensor,
    visitor: Visitor,
    *,
    weighting: str = "equal",
    feed: str = "compressed",
    batch: int = 4,
    activations_on_disk: bool = False,
    title: str = "blocks",
) -> None:
    """Take `visitor` through all blocks.

    Args:
        blocks: a subject, whose weights the visitor changes in place, or another source of blocks.
        windows: (N, T) calibration tokens.
        visitor: the method.
        weighting: of tokens in the statistics, see `token_weights`.
        feed: the input of the next block: the output of the changed block ('compressed', as in WANDA and GPTQ), or of
            the unchanged block ('original'), which saves the second run. With 'both' a block runs on both, and the
            statistics have the cross moment; all projections of a block change together then.
        batch: windows at a time; only the order of sums depends on it.
        activations_on_disk: keep the (N, T, D) activations in a memory-mapped temporary file.
        title: of the progress bar.

    Raises:
        BadInput: no windows, or windows that the model cannot read; inputs of a projection that are not finite; a block
            that runs twice.
    """
    if feed not in FEEDS:
        raise BadInput(f"feed '{feed}' is not known: expected {', '.join(FEEDS)}")
    if feed == "both" and len(visitor.groups) > 1:
        raise BadInput("feed 'both' needs a method that changes all projections of a block at once")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise BadInput(
            f"calibration windows have shape {tuple(windows.shape)}: expected (at least 1, at least 2) tokens"
        )
    check_weighting(weighting, windows.shape[1])
    if isinstance(blocks, Subject):
        check_windows(blocks.model, blocks.tokenizer, windows)
        blocks = Resident(blocks)
    # no_grad instead of inference_mode: results become weights, which may be trained later
    with torch.no_grad():
        x = _embedded(blocks, windows, batch, activations_on_disk)
        dense = x.clone() if feed == "both" else None  # the activations of the unchanged model
        positions = torch.arange(windows.shape[1])[None]
        for i in tqdm(range(blocks.depth), desc=title, unit="block", disable=None, leave=False):
            with blocks.hold(i) as block:
                run = _Run(blocks, block, i, x, positions, batch, weighting, dense)
                linears = {n: m for n, m in projections(block).items() if visitor.wants(i, n)}
                groups = [{n: linears[n] for n in group if n in linears} for group in visitor.groups]
                groups = [group for group in groups if group]
                if feed == "original":
                    statistics = run.collect([n for group in groups for n in group], visitor)
                    for group in groups:
                        visitor.change(i, group, {n: statistics[n] for n in group})
                else:
                    for group in groups or ([{}] if dense is not None else []):
                        visitor.change(i, group, run.collect(list(group), visitor, advance=False))
                    run.collect([], visitor)


def _embedded(blocks: Blocks, windows: torch.Tensor, batch: int, on_disk: bool) -> torch.Tensor:
    """The embedded windows (N, T, D), on the CPU, in memory or in a file.

    The file is deleted while it is open, so that a killed process does not leave it behind.
    """
    parts = (blocks.embed(windows[start : start + batch]).cpu() for start in range(0, len(windows), batch))
    first = next(parts)
    shape = (*windows.shape, first.shape[-1])
    n = windows.numel() * first.shape[-1]
    if on_disk:
        with TemporaryDirectory(prefix="thesislib-") as folder:
            x = torch.from_file(str(Path(folder) / "activations"), shared=True, size=n, dtype=first.dtype).view(shape)
    else:
        x = torch.empty(shape, dtype=first.dtype)
    x[:batch] = first
    for k, part in enumerate(parts, 1):
        x[k * batch : k * batch + len(part)] = part
    return x


class _Collected(Exception):
    """All statistics of a batch are collected: the rest of the block need not run."""


@dataclass
class _Run:
    """Runs of one block over all windows, whose activations are `x`."""

    blocks: Blocks
    block: nn.Module
    number: int
    x: torch.Tensor
    positions: torch.Tensor
    batch: int
    weighting: str
    dense: torch.Tensor | None = None

    def collect(self, names: Sequence[str], visitor: Visitor, advance: bool = True) -> dict[str, Statistics]:
        """Statistics of the inputs of the projections `names`.

        Args:
            names: projections of the block.
            visitor: that needs them.
            advance: whether the activations become the block's output, which the visitor sees then.
        """
        linears = projections(self.block)
        hooked = {INPUTS[n]: n for n in reversed(names)}  # the first of the projections with the same input
        statistics: dict[str, Statistics] = {}
        waiting: set[str] = set()
        unchanged: dict[str, torch.Tensor] = {}  # inputs in the unchanged model, of these windows
        noting = False

        def listen(key: str):
            def hook(_module, args):
                if noting:
                    unchanged[key] = args[0]
                    return
                statistics[key] = self._add(statistics.get(key), args[0], visitor, hooked[key], unchanged.get(key))
                waiting.discard(key)
                if not waiting and not advance:
                    raise _Collected

            return hook

        device = next(self.block.parameters()).device
        positions = self.positions.to(device)
        mask = window_mask(self.blocks.windows[self.number], positions)
        handles = [linears[name].register_forward_pre_hook(listen(key)) for key, name in hooked.items()]
        try:
            for start in range(0, len(self.x), self.batch):
                waiting.update(hooked)
                x = self.x[start : start + self.batch].to(device)
                if self.dense is not None and not advance:  # before the block changes
                    noting, f = True, self.dense[start : start + self.batch].to(device)
                    y = self.block(f, attention_mask=mask, position_embeddings=self.blocks.rotary(f, positions))
                    noting, self.dense[start : start + self.batch] = False, y.cpu()
                try:
                    y = self.block(x, attention_mask=mask, position_embeddings=self.blocks.rotary(x, positions))
                except _Collected:
                    continue
                if advance:
                    visitor.seen(self.number, start, x, y)
                    self.x[start : start + self.batch] = y.cpu()
        finally:
            for handle in handles:
                handle.remove()
        return {name: statistics[INPUTS[name]] for name in names}

    def _add(
        self, sofar: Statistics | None, x: torch.Tensor, visitor: Visitor, name: str, unchanged: torch.Tensor | None
    ) -> Statistics:
        """Add a batch of a projection's inputs, and those in the unchanged model if it is fed, to its statistics."""
        w = token_weights(self.weighting, x)
        weighted = (x.float() * w.sqrt()[..., None]).flatten(0, -2)  # (B T, D)
        moment = weighted.T @ weighted if visitor.moments else None
        squares = weighted.square().sum(0) if moment is None else moment.diagonal().clone()
        sizes = (x.float().abs() * w[..., None]).flatten(0, -2).sum(0) if visitor.sizes else None
        cross = None
        if unchanged is not None:
            cross = (unchanged.float() * w.sqrt()[..., None]).flatten(0, -2).T @ weighted
        if not torch.isfinite(squares).all():
            raise BadInput(
                f"the inputs of block {self.number}'s {name} are not finite: the model or its compression before "
                "this block is broken"
            )
        tokens = float(x.shape[0] * x.shape[1]) if self.weighting == "unit_norm" else float(w.sum())
        new = Statistics(squares, moment, tokens, sizes, cross)
        if sofar is None:
            return new
        for part in ("moment", "sizes", "cross"):
            if getattr(new, part) is not None:
                getattr(sofar, part).add_(getattr(new, part))
        sofar.squares += squares
        sofar.tokens += tokens
        return sofar


ALL_AT_ONCE = (LINEARS,)
TRUE_SEQUENTIAL = (("k_proj", "v_proj", "q_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))
