"""Block gain: how much a block's write is amplified on its way to the output."""

from typing import NamedTuple

import torch
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from thesislib.errors import BadInput
from thesislib.model.forward import attention_windows, window_mask
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows

TANGENTS = 8  # that run at once: more take more memory and no less time


class Gains(NamedTuple):
    """What becomes of each block's write w = output - input, to first order; see `gains`.

    Args:
        gain: (blocks, N, T) abs(J w) / abs(w) at each token: 1 if the write arrives as long as it was. nan where a
            block writes nothing.
        share: (blocks, N, T) abs(J w) / abs(x), x being the last block's output: how much of the output would change if
            the write were left out.
    """

    gain: torch.Tensor
    share: torch.Tensor

    @property
    def medians(self) -> list[tuple[float, float]]:
        """Each block's gain and share, median over tokens. A window's first token, a sink, does not rule it."""
        return [(g.nanmedian().item(), s.nanmedian().item()) for g, s in zip(self.gain, self.share, strict=True)]


def gains(subject: Subject, ids: torch.Tensor, batch: int = 1) -> Gains:
    """The gain of every block, by forward-mode differentiation of the blocks behind it.

    J is the Jacobian of the last block's output, before the final norm, with respect to the block's output. It is taken
    of all tokens together: a write reaches the tokens behind it through attention, and J w at a token has the writes at
    all tokens before it. The last block's gain is 1.

    All blocks run once, and the writes of the blocks so far go along as tangents: a block costs as much as one run for
    itself and about two for each block before it.

    Args:
        subject: in float32 or float64.
        ids: (N, T) windows.
        batch: windows at a time; no result depends on it.

    Raises:
        BadInput: another dtype, in which differences of a few per mille drown; windows that the model cannot read.
    """
    if subject.dtype not in (torch.float32, torch.float64):
        raise BadInput(
            f"block gain needs float32: the subject is in {str(subject.dtype).removeprefix('torch.')}, load it with "
            "dtype 'float32'"
        )
    check_windows(subject.model, subject.tokenizer, ids)
    parts = [
        _gains(subject, ids[start : start + batch].to(subject.device))
        for start in tqdm(range(0, len(ids), batch), desc="block gain", unit="batch", disable=None, leave=False)
    ]
    return Gains(*(torch.cat(several, 1) for several in zip(*parts, strict=True)))


@torch.no_grad()
def _gains(subject: Subject, ids: torch.Tensor) -> Gains:
    """The gains on one batch."""
    decoder = subject.model.model
    x = decoder.embed_tokens(ids)  # (B, T, D)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = decoder.rotary_emb(x, position_ids=positions)
    tangents, written = x.new_empty(0, *x.shape), []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        for block, window in zip(subject.blocks, attention_windows(subject.model.config), strict=True):
            mask = window_mask(window, positions)

            def run(x: torch.Tensor, block=block, mask=mask) -> torch.Tensor:
                return block(x, attention_mask=mask, position_embeddings=rotary)

            def carried(tangent: torch.Tensor, x=x, run=run) -> torch.Tensor:
                return jvp(run, (x,), (tangent,))[1]

            if len(tangents):
                tangents = vmap(carried, chunk_size=TANGENTS)(tangents)
            y = run(x)
            tangents = torch.cat([tangents, (y - x)[None]])
            written.append((y - x).norm(dim=-1))
            x = y
    arrived = tangents.norm(dim=-1)  # (blocks, B, T)
    return Gains((arrived / torch.stack(written)).cpu(), (arrived / x.norm(dim=-1)).cpu())
