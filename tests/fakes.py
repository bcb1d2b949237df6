"""What several tests need: measurements that nobody made, and processes that begin with everything imported."""

import multiprocessing
from multiprocessing import forkserver
from types import SimpleNamespace

import numpy as np

from thesislib.records.measurement import Measurement


def measurement(**changes):
    """A measurement of one item; changes: its fields."""
    plain = {
        "task": "t",
        "metric": "m",
        "value": 1.5,
        "low": 1.0,
        "high": 2.0,
        "n": 1,
        "unit": "u",
        "items": [{"id": "é", "x": 1}],
    }
    return Measurement(**plain | changes)


def row(worker=0, k=0, pad="", **changes):
    """The k-th measurement of a worker, of three items."""
    plain = {
        "value": 1000.0 * worker + k,
        "n": 3,
        "items": [{"id": f"{worker}/{k}/{i}", "x": worker * 1000 + k + i / 7} for i in range(3)],
        "extra": {"pad": pad},
        "provenance": {"subject": "s", "made": {"label": f"L{worker}"}},
    }
    return measurement(**plain | changes)


def perplexity(per_token, seed=0, *, texts=None, spread=0.01, n=24, **changes):
    """A perplexity over n documents of 100 tokens.

    Args:
        per_token: nats.
        seed, spread: of the noise that is this model's own, in nats.
        texts: the seed of what the documents differ by (0.3 nats) in all models alike; None: nothing.
        changes: fields of the measurement.
    """
    noise = np.random.default_rng(seed).normal(0, spread, n)
    if texts is not None:
        noise = np.random.default_rng(texts).normal(0, 0.3, n) + noise
    items = [{"id": i, "document": i, "nats": 100 * (per_token + noise[i]), "tokens": 100} for i in range(n)]
    value = float(np.exp(per_token))
    plain = {
        "task": "text",
        "metric": "perplexity",
        "value": value,
        "low": 0.9 * value,
        "high": 1.1 * value,
        "n": n,
        "unit": "window",
        "items": items,
    }
    return Measurement(**plain | changes)


def accuracy(share, n=200, **changes):
    """Answers to n questions, the first of them right."""
    items = [
        {"id": i, "answer": "a name", "correct": i < share * n, "tier": "exact" if i < share * n else None}
        for i in range(n)
    ]
    plain = {
        "task": "questions",
        "metric": "accuracy",
        "value": share,
        "low": share - 0.1,
        "high": share + 0.1,
        "n": n,
        "unit": "question",
        "items": items,
    }
    return Measurement(**plain | changes)


def hub_holds(monkeypatch, rows_of):
    """The Hub's data sets have the rows that a function of (name, configuration, split) gives; nothing is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *where, split, streaming: SimpleNamespace(to_list=lambda: rows_of((*where, split))),
    )


def processes():
    """A context whose processes have everything imported already, so that a kill meets work and not imports, and none
    costs seconds."""
    context = multiprocessing.get_context("forkserver")
    llama = "transformers.models.llama."
    context.set_forkserver_preload(
        [
            "pytest",
            "thesislib.cli",
            "thesislib.compress.lora.stage",
            "thesislib.pipeline.run",
            "thesislib.records.store",
            "thesislib.sweep.run",
            f"{llama}modeling_llama",
            f"{llama}configuration_llama",
            "distributed",
            "papermill",
        ]
    )
    forkserver.ensure_running()  # here, since Dask would have other modules imported
    return context
