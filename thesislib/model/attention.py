"""Where each head looks: attention maps of a text, and their two-dimensional Fourier transform.

A map that always looks back by the same distance is a diagonal line, and its transform a line through the origin at
right angles to it; a map that looks at one token (a sink) is a column, and its transform a row. Each query's
attention sums to 1, so the transform has nothing at key frequency 0 but at the origin.
"""

import numpy as np
import torch

from thesislib.errors import BadInput
from thesislib.model.subject import Subject


def attention_maps(subject: Subject, text: str) -> tuple[np.ndarray, list[str]]:
    """Attention weights over `text`, and its tokens as text.

    Returns:
        (blocks, heads, T, T) float32, rows (queries) summing to 1 over columns (keys); and T token strings.

    Raises:
        BadInput: a text of fewer than two tokens.
    """
    ids = subject.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] < 2:
        raise BadInput(f"text '{text}' has {ids.shape[1]} tokens: an attention map needs at least 2")
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")  # the only one that keeps its weights
    try:
        with torch.inference_mode():
            maps = subject.model(ids.to(subject.device), output_attentions=True, use_cache=False).attentions
    finally:
        subject.model.set_attn_implementation(before)
    tokens = [str(subject.tokenizer.decode(i)) for i in ids[0].tolist()]
    return torch.stack([m[0].float() for m in maps]).cpu().numpy(), tokens


def spectrum(maps: np.ndarray) -> np.ndarray:
    """log(1 + magnitude) of the 2-D Fourier transform over the last two axes, frequency 0 in the middle. Shape as
    `maps`."""
    return np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(maps), axes=(-2, -1)))).astype(np.float32)


def sink_share(maps: np.ndarray) -> np.ndarray:
    """How much attention later tokens give the first one: mean over heads and queries but the first, (blocks,)."""
    return maps[:, :, 1:, 0].mean((1, 2))
