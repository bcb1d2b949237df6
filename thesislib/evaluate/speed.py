"""Tokens per second of a model as it is held: reading a prompt, and one token at a time."""

import statistics
import time
from collections.abc import Mapping

import pandas as pd
import torch

from thesislib import formats
from thesislib.subject import Subject


def speeds(models: Mapping[str, Subject], tokens: int = 512, repeats: int = 3) -> pd.DataFrame:
    """One row a model: MB its tensors take in memory, and median tokens per second of a prefill and of single tokens without a cache."""
    rows = []
    for name, model in models.items():
        ids = torch.arange(tokens)[None] % model.model.config.vocab_size
        prefill, one = (_median(model, ids[:, :n], repeats) for n in (tokens, 1))
        held = formats.sizes(model)["bytes_in_memory"] / 1e6
        rows.append(
            {"weights": name, "MB in memory": round(held, 1), "tokens/s, prefill": round(tokens / prefill), "tokens/s, one at a time": round(1 / one, 1)}
        )
    return pd.DataFrame(rows).set_index("weights")


def _median(subject: Subject, ids: torch.Tensor, repeats: int) -> float:
    """Seconds of a forward pass, after one that does not count."""
    _seconds(subject, ids)
    return statistics.median(_seconds(subject, ids) for _ in range(repeats))


def _seconds(subject: Subject, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        subject.model.model(input_ids=ids.to(subject.device), use_cache=False)
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
