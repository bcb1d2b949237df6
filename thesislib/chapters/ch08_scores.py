"""Chapter 8's scores by text and by one pass, the divergences that a record of answers does not have, and what each
ranking costs."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thesislib.compress.depth import angular_distances, importance, influence, taylor, window_losses
from thesislib.compress.relevance import Outcomes, choices, next_tokens, outcomes
from thesislib.files import read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows
from thesislib.sources.rows import origin_of

TEXT = "wikipedia"
ONE_PASS = ("influence", "entropy", "magnitude")
SIZES = (12, 24, 48)  # items, by which the cost of asking is measured


@dataclass(frozen=True)
class Scores:
    """What is known of each block without asking questions, and what asking costs.

    Attributes:
        scores: {metric: one number a block}: influence, entropy, magnitude, taylor.
        cosine: {task: (items, blocks) influence on the text of each item, its context with the right ending}.
        runs: {n: angular distance of the run of n blocks from each block on}.
        losses: (blocks, windows) nats a token of each window without each block.
        text: outcomes of the windows' next tokens.
        kl: {task: (1 + blocks, items) divergence, see `Outcomes`}.
        seconds: {metric: processor seconds of one thread}; of a task also "task, n items".
        made: provenance.
    """

    scores: dict[str, list[float]]
    cosine: dict[str, np.ndarray]
    runs: dict[int, list[float]]
    losses: np.ndarray
    text: Outcomes
    kl: dict[str, np.ndarray]
    seconds: dict[str, float]
    made: dict[str, Any]


def record(
    subject: Subject, data: str, tasks: Sequence[str], items: int, windows: int, length: int, file: Path, seed: int = 0
) -> None:
    """Write the `Scores` of a subject to a file. A run that was killed goes on from the file .partial beside it.

    Args:
        subject: the whole model.
        data: a data spec.
        tasks: on whose text the cosine score is measured; of the first also the items' divergences.
        items: of each task's part to rank by.
        windows: of calibration text.
        length: tokens of each.
        file: where to.
        seed: of the windows.
    """
    task, unfinished, started = tasks[0], file.with_name(file.name + ".partial"), time.perf_counter()
    ids = calibration_windows(subject.tokenizer, TEXT, data, windows, length, seed)
    facts = {"text": TEXT, "text_sha256": calibration_text(TEXT, data).sha256, "data": origin_of(data)}
    made = provenance(
        subject,
        started,
        **facts,
        windows=windows,
        length=length,
        seed=seed,
        task=task,
        items=items,
        threads=torch.get_num_threads(),
    )
    every, done = range(subject.depth), read_json(unfinished) if unfinished.exists() else {"steps": {}, "seconds": {}}
    if done.get("made") not in (None, _lasting(made)):
        done = {"steps": {}, "seconds": {}}

    steps: dict[str, Callable[[], Any]] = {
        **{f"{name} cosine": partial(_cosine, subject, data, name, items) for name in tasks},
        **{metric: partial(_of_blocks, subject, ids, metric) for metric in ONE_PASS},
        "taylor": lambda: list(taylor(subject, ids, every).values()),
        "angular": lambda: [[None if x != x else x for x in row] for row in angular_distances(subject, ids).tolist()],
        "perplexity": lambda: np.round(window_losses(subject, ids, every), 5).tolist(),
        "next_token kl": lambda: _plain(outcomes(subject, next_tokens(ids), every, kl=True)),
        **{f"{task}, {n} items": partial(_asked, subject, data, task, n) for n in SIZES if n <= items},
        f"{task} kl": partial(_asked, subject, data, task, items, kl=True),
    }
    for name, step in steps.items():
        if name not in done["steps"]:
            before = time.process_time()
            done["steps"][name] = step()
            done["seconds"][name] = round(time.process_time() - before, 2)
            write_whole(unfinished, json.dumps({**done, "made": _lasting(made)}))
    write_whole(file, json.dumps({**done, "made": {**made, "seconds": round(time.perf_counter() - started, 1)}}))
    unfinished.unlink()


def _of_blocks(subject: Subject, ids: torch.Tensor, metric: str) -> list[float]:
    return list(importance(subject, ids, metric).values())


def _asked(subject: Subject, data: str, task: str, items: int, kl: bool = False) -> dict[str, list | None]:
    return _plain(outcomes(subject, choices(task, data, items), range(subject.depth), kl=kl))


def _cosine(subject: Subject, data: str, task: str, items: int) -> list[list[float]]:
    """Each block's influence on the text of each item."""
    texts = (f"{item.context} {item.endings[item.label]}" for item in choices(task, data, items).asked)
    encoded = (torch.tensor([subject.tokenizer(text)["input_ids"]]) for text in texts)
    return [np.round(influence(subject, ids), 6).tolist() for ids in encoded]


def _lasting(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that goes on must have been made with."""
    return {name: made[name] for name in ("fingerprint", "plan", "dtype", "settings")}


def _plain(found: Outcomes) -> dict[str, list | None]:
    """Outcomes as JSON has them; nan is null."""
    rows = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return {
        name: None if np.isnan(values).all() else np.round(values.astype(float), 5).tolist()
        for name, values in rows.items()
    }


def _outcomes(plain: Mapping[str, Sequence]) -> Outcomes:
    shape = np.shape(plain["correct"])
    return Outcomes(
        **{name: np.full(shape, np.nan) if values is None else np.array(values) for name, values in plain.items()}
    )


def read(file: Path) -> Scores:
    """What `record` wrote."""
    plain = read_json(file)
    steps = plain["steps"]
    blocks = len(steps["influence"])
    return Scores(
        {name: steps[name] for name in (*ONE_PASS, "taylor")},
        {name.removesuffix(" cosine"): np.array(step) for name, step in steps.items() if name.endswith(" cosine")},
        {n: [x for x in steps["angular"][n] if x is not None] for n in range(1, blocks + 1)},
        np.array(steps["perplexity"]),
        _outcomes(steps["next_token kl"]),
        {
            name.removesuffix(" kl"): _outcomes(step).kl
            for name, step in steps.items()
            if name.endswith(" kl") and name != "next_token kl"
        },
        plain["seconds"],
        plain["made"],
    )
