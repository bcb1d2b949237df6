"""What several tests need: measurements that nobody made, and processes that begin with everything imported."""

import json
import multiprocessing
from multiprocessing import forkserver
from types import SimpleNamespace

import numpy as np

from thesislib.records.measurement import Measurement
from thesislib.sources.choices.found import SETS
from thesislib.sources.rows import SOURCES


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


def choice_data(folder, n=15, labels=None):
    """A data folder with n items of four multiple-choice tasks, and text; its path.

    Args:
        folder: where.
        n: how many items.
        labels: {task: which ending of each item is right}.
    """
    letters, labels = "ABCD", {task: [i % 2 for i in range(n)] for task in SETS} | (labels or {})
    tables = {
        "arc_easy": [
            {
                "id": f"q{i}",
                "question": f"What is {i}?",
                "answerKey": letters[labels["arc_easy"][i]],
                "choices": {"text": [f"thing {i + j}" for j in range(4)], "label": list(letters)},
            }
            for i in range(n)
        ],
        "piqa": [
            {"goal": f"move {i}", "sol1": f"walk to {i}", "sol2": "stand", "label": labels["piqa"][i]} for i in range(n)
        ],
        "hellaswag": [
            {
                "activity_label": "Sport",
                "ctx_a": f"Player {i} runs.",
                "ctx_b": "she",
                "endings": [f"falls {i + j}." for j in range(4)],
                "label": labels["hellaswag"][i],
            }
            for i in range(n)
        ],
        "boolq": [
            {"question": f"is {i} even", "passage": f"The number is {i}.", "answer": bool(labels["boolq"][i])}
            for i in range(n)
        ],
        "wikitext": [{"text": t} for i in range(6) for t in (f" = Part {i} = \n", f"{i} is a number. " * 20 + "\n")],
        "calibration_wikipedia": [
            {"text": f"{i} is a number of things, and {i * i} is its square. " * 5} for i in range(12)
        ],
    }
    for name, rows in tables.items():
        source = SETS[name].source if name in SETS else SOURCES[name]
        path = folder / f"{source.folder}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


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
