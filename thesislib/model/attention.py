"""Attention maps of a text, and how much of the attention a sink takes."""

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


def sink_share(maps: np.ndarray) -> np.ndarray:
    """The attention that later tokens pay to the first one: (blocks,), the mean over heads and later queries."""
    return maps[:, :, 1:, 0].mean((1, 2))
