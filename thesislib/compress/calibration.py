"""One pass through the blocks of a model on calibration text: what WANDA, GPTQ, EoRA and the importance metrics share.

For each block in turn: run it on the activations that reach it, hand each projection's input statistics to a visitor,
let the visitor change the weights, run the block again so that the next one sees what the changed model computes
(the order of WANDA's and GPTQ's code). Only one block and the activations need to be in memory.
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

# projections that read the same input share its statistics
INPUTS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "heads",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "hidden",
}
FEEDS = ("compressed", "original")


@dataclass
class Statistics:
    """What the inputs x_t of a projection say, as sums over tokens t with weights w_t.

    Attributes:
        squares: (D,) float32, sum of w x^2: the diagonal of the moment.
        moment: (D, D) float32, sum of w x x^T; None if nobody asked for it.
        tokens: the sum of w, or the number of tokens where they are brought to unit norm.
    """

    squares: torch.Tensor
    moment: torch.Tensor | None
    tokens: float

    @property
    def rms(self) -> torch.Tensor:
        """(D,) root mean square of each input feature."""
        return (self.squares / self.tokens).sqrt()


class Visitor:
    """What a method does with each block; the default looks at nothing and changes nothing.

    Attributes:
        groups: projections that change together, after one collecting run each: all seven at once as in WANDA, or
            step by step, each seeing the changes of the one before, as in GPTQ's true-sequential order.
        moments: whether the whole X^T X is needed or its diagonal is enough.
    """

    groups: Sequence[Sequence[str]] = ()
    moments: bool = False

    def wants(self, block: int, name: str) -> bool:
        """Whether this projection takes part; what takes no part costs nothing."""
        return True

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """Change the weights of one group of `linears` in place, given the statistics of their inputs."""

    def seen(self, block: int, first: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Input and output (B, T, D) of the block for the windows from number `first` on, after all changes to it."""


class Blocks(Protocol):
    """Where `stream` gets a model's blocks from, one at a time."""

    depth: int
    windows: list[int | None]  # see `thesislib.model.forward.attention_windows`

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens to (B, T, D)."""

    def rotary(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The position embeddings that a block takes."""

    def hold(self, i: int):
        """A context in which block i is in memory, and after which its changes are kept."""


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
    """How much each token of (B, T, D) inputs counts, (B, T) float32.

    A window's first token is an attention sink: its residual can be a hundred times as long as the others', and most
    heads read its value at every step, yet X^T X counts it once in T.

    Args:
        weighting: 'equal' (the originals), 'unit_norm' (x over its norm), 'first_N' (the first token of each window
            counted N times), 'skip_N' (the first N tokens left out).
        x: the inputs.

    Raises:
        BadInput: another weighting, or one that leaves no token.
    """
    check_weighting(weighting, x.shape[1])
    if weighting == "unit_norm":
        squared = x.float().square().sum(-1)
        return torch.where(squared > 0, squared.reciprocal(), 0)
    w = torch.ones(x.shape[:2], device=x.device)
    kind, _, n = weighting.partition("_")
    if kind == "first":
        w[:, 0] = int(n)
    elif kind == "skip":
        w[:, : int(n)] = 0
    return w


def check_weighting(weighting: str, length: int | None = None) -> None:
    """Raises BadInput for a weighting that `token_weights` does not know, or that leaves no token of a window."""
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
        visitor: what to do.
        weighting: how tokens count in the statistics, see `token_weights`.
        feed: what reaches the next block: the outputs of the changed block ('compressed', as WANDA and GPTQ do), or of
            the block as it was ('original'), which saves the second run.
        batch: windows at a time. It changes no result but for the order of sums.
        activations_on_disk: keep the (N, T, D) activations in a memory-mapped temporary file.
        title: what the progress bar says.

    Raises:
        BadInput: no windows, or windows that the model cannot read; inputs of a projection that are not finite; a block
            that runs twice.
    """
    if feed not in FEEDS:
        raise BadInput(f"feed '{feed}' is not known: expected {' or '.join(FEEDS)}")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise BadInput(
            f"calibration windows have shape {tuple(windows.shape)}: expected (at least 1, at least 2) tokens"
        )
    check_weighting(weighting, windows.shape[1])
    if isinstance(blocks, Subject):
        check_windows(blocks.model, blocks.tokenizer, windows)
        blocks = Resident(blocks)
    # no_grad, not inference_mode: what is computed here becomes weights, and those may be trained later
    with torch.no_grad():
        x = _embedded(blocks, windows, batch, activations_on_disk)
        positions = torch.arange(windows.shape[1])[None]
        for i in tqdm(range(blocks.depth), desc=title, unit="block", disable=None, leave=False):
            with blocks.hold(i) as block:
                run = _Run(blocks, block, i, x, positions, batch, weighting)
                linears = {n: m for n, m in projections(block).items() if visitor.wants(i, n)}
                groups = [
                    present for group in visitor.groups if (present := {n: linears[n] for n in group if n in linears})
                ]
                if feed == "original":
                    statistics = run.collect([n for group in groups for n in group], visitor)
                    for group in groups:
                        visitor.change(i, group, {n: statistics[n] for n in group})
                else:
                    for group in groups:
                        visitor.change(i, group, run.collect(list(group), visitor, advance=False))
                    run.collect([], visitor)


def _embedded(blocks: Blocks, windows: torch.Tensor, batch: int, on_disk: bool) -> torch.Tensor:
    """(N, T, D) embedded windows, on the CPU, in memory or in a file that has no name any more, so that not even a kill
    leaves it."""
    parts = (blocks.embed(windows[at : at + batch]).cpu() for at in range(0, len(windows), batch))
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


class _Enough(Exception):
    """All statistics of this batch are in: the rest of the block need not run."""


@dataclass
class _Run:
    """Runs of one block over all windows."""

    blocks: Blocks
    block: nn.Module
    number: int
    x: torch.Tensor
    positions: torch.Tensor
    batch: int
    weighting: str

    def collect(self, names: Sequence[str], visitor: Visitor, advance: bool = True) -> dict[str, Statistics]:
        """Statistics of the inputs of the projections `names`; with `advance` the activations move on to the block's
        output."""
        linears = projections(self.block)
        heads = {INPUTS[n]: n for n in reversed(names)}  # of projections with one input, the first listens for all
        found: dict[str, Statistics] = {}
        waiting: set[str] = set()

        def listen(key: str):
            def hook(_module, args):
                found[key] = self._add(found.get(key), args[0], visitor.moments, heads[key])
                waiting.discard(key)
                if not waiting and not advance:
                    raise _Enough

            return hook

        device = next(self.block.parameters()).device
        mask = window_mask(self.blocks.windows[self.number], self.positions.to(device))
        handles = [linears[name].register_forward_pre_hook(listen(key)) for key, name in heads.items()]
        try:
            for at in range(0, len(self.x), self.batch):
                waiting.update(heads)
                x = self.x[at : at + self.batch].to(device)
                try:
                    y = self.block(
                        x, attention_mask=mask, position_embeddings=self.blocks.rotary(x, self.positions.to(device))
                    )
                except _Enough:
                    continue
                if advance:
                    visitor.seen(self.number, at, x, y)
                    self.x[at : at + self.batch] = y.cpu()
        finally:
            for handle in handles:
                handle.remove()
        return {name: found[INPUTS[name]] for name in names}

    def _add(self, sofar: Statistics | None, x: torch.Tensor, moments: bool, name: str) -> Statistics:
        w = token_weights(self.weighting, x)
        weighted = (x.float() * w.sqrt()[..., None]).flatten(0, -2)  # (B T, D)
        moment = weighted.T @ weighted if moments else None
        squares = moment.diagonal().clone() if moments else weighted.square().sum(0)
        if not torch.isfinite(squares).all():
            raise BadInput(
                f"the inputs of block {self.number}'s {name} are not finite: the model or its compression before "
                "this block is broken"
            )
        tokens = float(x.shape[0] * x.shape[1]) if self.weighting == "unit_norm" else float(w.sum())
        if sofar is None:
            return Statistics(squares, moment, tokens)
        if moments:
            sofar.moment += moment
        sofar.squares += squares
        sofar.tokens += tokens
        return sofar


ALL_AT_ONCE = (LINEARS,)
TRUE_SEQUENTIAL = (("k_proj", "v_proj", "q_proj"), ("o_proj",), ("up_proj", "gate_proj"), ("down_proj",))
