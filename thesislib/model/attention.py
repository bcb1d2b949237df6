"""Attention maps of a text, and their two-dimensional Fourier transform.

A head that always attends to the token a fixed distance back has a diagonal line as its map; the transform is a line
through the origin at right angles to it. A head that attends to one token (a sink) has a column as its map; the
transform is a row. Each query's attention sums to 1, so at key frequency 0 the transform is zero but at the origin.
"""

import numpy as np
import torch

from thesislib.errors import BadInput
from thesislib.model.subject import Subject


def attention_maps(subject: Subject, text: str) -> tuple[np.ndarray, list[str]]:
    """The attention weights of a subject over a text, and the text's tokens.

    Returns:
        (blocks, heads, T, T) float32: each row (query) sums to 1 over its columns (keys). And T token strings.

    Raises:
        BadInput: a text of fewer than two tokens.
    """
    ids = subject.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] < 2:
        raise BadInput(f"text '{text}' has {ids.shape[1]} tokens: an attention map needs at least 2")
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation("eager")  # the only one that returns attention weights
    try:
        with torch.inference_mode():
            maps = subject.model(ids.to(subject.device), output_attentions=True, use_cache=False).attentions
    finally:
        subject.model.set_attn_implementation(before)
    tokens = [str(subject.tokenizer.decode(i)) for i in ids[0].tolist()]
    return torch.stack([m[0].float() for m in maps]).cpu().numpy(), tokens


def spectrum(maps: np.ndarray) -> np.ndarray:
    """log(1 + magnitude) of the 2-D Fourier transform over the last two axes, in the shape of `maps`.

    Frequency 0 is in the middle.
    """
    return np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(maps), axes=(-2, -1)))).astype(np.float32)


def sink_share(maps: np.ndarray) -> np.ndarray:
    """The attention that later tokens pay to the first one: (blocks,), the mean over heads and later queries."""
    return maps[:, :, 1:, 0].mean((1, 2))
