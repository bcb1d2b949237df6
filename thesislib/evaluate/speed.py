"""The speed of a model with its weights as they are in memory: of a prefill, and of single tokens."""

import statistics
import time
from collections.abc import Mapping

import pandas as pd
import torch

from thesislib.formats.sizes import sizes
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, provenance

SECONDS_PER_TOKEN = "seconds per token"


def speeds(models: Mapping[str, Subject], tokens: int = 512, repeats: int = 3) -> pd.DataFrame:
    """One row a model: the MB of its tensors in memory, and median tokens per second, in a prefill and one at a time
    without a KV cache."""
    rows = []
    for name, model in models.items():
        ids = torch.arange(tokens)[None] % model.model.config.vocab_size
        prefill, one = (_median(model, ids[:, :n], repeats) for n in (tokens, 1))
        megabytes = sizes(model)["bytes_in_memory"] / 1e6
        rows.append(
            {
                "weights": name,
                "MB in memory": round(megabytes, 1),
                "tokens/s, prefill": round(tokens / prefill),
                "tokens/s, one at a time": round(1 / one, 1),
            }
        )
    return pd.DataFrame(rows).set_index("weights")


def _median(subject: Subject, ids: torch.Tensor, repeats: int) -> float:
    """The median seconds of a forward pass, after one that warms up."""
    _seconds(subject, ids)
    return statistics.median(_seconds(subject, ids) for _ in range(repeats))


def _seconds(subject: Subject, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        subject.model.model(input_ids=ids.to(subject.device), use_cache=False)
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def token_seconds(subject: Subject, repeats: int = 32) -> Measurement:
    """The seconds of one token without a KV cache: the median, with the quartiles as its interval. That is no
    confidence interval.

    It depends on the machine and on what else runs there, so a record of it cannot be made again.
    """
    started, ids = time.perf_counter(), torch.zeros(1, 1, dtype=torch.long)
    _seconds(subject, ids)
    seconds = [_seconds(subject, ids) for _ in range(repeats)]
    low, middle, high = statistics.quantiles(seconds, n=4) if repeats > 1 else seconds * 3
    items = [{"id": str(i), "seconds": s} for i, s in enumerate(seconds)]
    settings = {"repeats": repeats, "interval": "quartiles"}
    return Measurement(
        task="one token, no cache",
        metric=SECONDS_PER_TOKEN,
        value=middle,
        low=low,
        high=high,
        n=repeats,
        unit="repetition",
        items=items,
        provenance=provenance(subject, started, **settings),
    )
