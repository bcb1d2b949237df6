"""Chapter 8's question whether relevance is an artefact of scale: what is lost without each block if something stands
in its place, which block makes the attention sink, and what a block's gain says; the recorded run, and what it says."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from thesislib.compress.calibration import Visitor, stream
from thesislib.compress.depth import influence, sets_losses
from thesislib.compress.gain import gains
from thesislib.compress.relevance import Items, Outcomes, choices, entropy_change, outcomes
from thesislib.compress.replace import replaced
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.files import data_file, read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows, evaluation_text, windows
from thesislib.sources.rows import origin_of

TASK, TEXT = "arc_easy", "wikipedia"
SKIP = "skip"
# {way: what replaces a block, and the first tokens of a window that do not count for it}
WAYS = {
    "scalar": ("scalar", 0),
    "bias": ("bias", 0),
    "linear": ("linear", 0),
    "bias without the first token": ("bias", 1),
}
PLACES = ("first", "elsewhere")  # of the tokens at which a block is skipped
DIGITS = 5


@dataclass(frozen=True)
class Scale:
    """What was recorded. Lists of blocks are in order; a way that a block does not have is None.

    Attributes:
        scores: {score: one number a block}: cosine, entropy, gain and share (medians over tokens), and "gain, first"
            and "share, first" (medians over windows, at their first token).
        norms: {"first" or "others": the residual's norm before each block and after the last, median over windows or
            tokens}.
        whole: of the whole model: {"correct": one an item, "likelihood": nats, "losses": nats a token of each window}.
        ways: {way: the same of the model without each block}; with "left", the share of the write that the replacement
            misses.
        places: {where a block is skipped: losses of each block}.
        chance: the accuracy of guessing the items.
        made: provenance.
    """

    scores: dict[str, list[float]]
    norms: dict[str, list[float]]
    whole: dict
    ways: dict[str, list[dict | None]]
    places: dict[str, list[list[float]]]
    chance: float
    made: dict

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.scores["cosine"])


# ---------------------------------------------------------------- the recorded run


def record(subject: Subject, exact: Subject, data: str, items: int, windows_: int, length: int, file: Path) -> None:
    """Write a `Scale` to a file. A run that was killed goes on from the file .partial beside it.

    Args:
        subject: the whole model, in any dtype.
        exact: the same in float32, which scores of one pass are made with: gain needs it.
        data: a data spec.
        items: of ARC-Easy, from the part that blocks are ranked by.
        windows_: of calibration text, by which scores and replacements are made; and as many of held-out text.
        length: tokens of a window.
        file: to be written.

    Raises:
        BadInput: see `thesislib.compress.gain.gains` and `thesislib.compress.relevance.choices`.
    """
    started, partial = time.perf_counter(), file.with_name(file.name + ".partial")
    asked = choices(TASK, data, items)
    ids = calibration_windows(subject.tokenizer, TEXT, data, windows_, length)
    held_out = windows(evaluation_text(data), subject.tokenizer, length, windows_).ids
    settings = {
        "protocol": (setup := Setup(TASK, limit=items, fast=True, part="rank")).plain(),
        "corpus_sha256": setup.corpus_sha256(data),
        "text": TEXT,
        "text_sha256": calibration_text(TEXT, data).sha256,
        "held_out_sha256": evaluation_text(data).sha256,
        "data": origin_of(data),
        "windows": windows_,
        "length": length,
        "seed": 0,
        "dtype of scores": str(exact.dtype).removeprefix("torch."),
    }
    blocks = range(subject.depth)
    done: dict = {"chance": asked.chance, "made": provenance(subject, started, **settings)}
    if partial.exists() and _same(made := (before := read_json(partial))["made"], done["made"]):
        done, started = before, started - made["seconds"]

    def once(place: dict, name: str, made: Callable) -> None:
        """Make a part of the record, unless an earlier run has."""
        if name not in place:
            place[name] = made()
            done["made"] = provenance(subject, started, **settings)
            write_whole(partial, json.dumps(done))

    once(done, "scores", lambda: scores(exact, ids))
    once(done, "norms", lambda: norms(exact, ids))
    without: dict = done.setdefault("without", {})  # {way: {block: what is kept}}
    once(without, SKIP, lambda: _skipped(subject, asked, held_out))
    for way in (*WAYS, *PLACES):
        some = without.setdefault(way, {})
        for b in blocks:
            if way in PLACES:
                once(some, str(b), lambda b=b, way=way: losses_skipped(subject, held_out, b, way))
            else:
                once(some, str(b), lambda b=b, way=way: _replaced(subject, b, way, ids, asked, held_out))
    whole, *skip = without[SKIP]
    ways = {SKIP: skip} | {way: [without[way][str(b)] for b in blocks] for way in WAYS}
    places = {place: [without[place][str(b)] for b in blocks] for place in PLACES}
    found = Scale(done["scores"], done["norms"], whole, ways, places, done["chance"], done["made"])
    write_whole(file, json.dumps(asdict(found)))
    partial.unlink()


def _same(before: dict, now: dict) -> bool:
    """Whether two provenances are of the same run, so that one may go on where the other ended."""
    return all(before[name] == now[name] for name in ("fingerprint", "plan", "dtype", "settings"))


def _rounded(values: np.ndarray) -> list:
    return np.round(values, DIGITS).tolist()


def _outcomes(found: Outcomes, losses: np.ndarray) -> list[dict]:
    """What the record keeps of each row of outcomes, and of the losses (rows, windows)."""
    return [
        {"correct": correct.astype(int).tolist(), "likelihood": _rounded(likelihood), "losses": _rounded(nats)}
        for correct, likelihood, nats in zip(found.correct, found.likelihood, losses, strict=True)
    ]


def _skipped(subject: Subject, asked: Items, held_out: torch.Tensor) -> list[dict]:
    """Of the whole model and of the model without each block."""
    blocks = range(subject.depth)
    losses = sets_losses(subject, held_out, [(), *([b] for b in blocks)])
    return _outcomes(outcomes(subject, asked, blocks), losses)


def _replaced(
    subject: Subject, block: int, way: str, ids: torch.Tensor, asked: Items, held_out: torch.Tensor
) -> dict | None:
    """Of the model with a replacement for a block; None if the block cannot have it."""
    how, skip = WAYS[way]
    try:
        smaller, (gap,) = replaced(subject, [block], how, ids, skip=skip)
    except BadInput:
        if block == 0 and how != "scalar":
            return None  # there is no MLP before it that would take the replacement
        raise
    (found,) = _outcomes(outcomes(smaller, asked, ()), sets_losses(smaller, held_out, [()]))
    return {**found, "left": round(gap["left"], DIGITS)}


def scores(subject: Subject, ids: torch.Tensor) -> dict[str, list[float]]:
    """What one pass, or for gain one pass with derivatives, says of each block; see `Scale`."""
    gain, share = gains(subject, ids)
    found = {"cosine": influence(subject, ids), "entropy": entropy_change(subject, ids)}
    for name, values in (("gain", gain), ("share", share)):
        found[name] = values.flatten(1).nanmedian(1).values.tolist()
        found[f"{name}, first"] = values[:, :, 0].nanmedian(1).values.tolist()
    return {name: [float(f"{x:.6g}") for x in values] for name, values in found.items()}


def norms(subject: Subject, ids: torch.Tensor) -> dict[str, list[float]]:
    """The residual's norm at the first token of a window and at the others; see `Scale`."""
    states: list[list[torch.Tensor]] = [[] for _ in range(subject.depth + 1)]

    class Norms(Visitor):
        def seen(self, block, first, x, y):
            states[block].append(x.norm(dim=-1))
            if block == subject.depth - 1:
                states[block + 1].append(y.norm(dim=-1))

    stream(subject, ids, Norms(), title="norms")
    every = [torch.cat(some) for some in states]  # (N, T) each
    places = {"first": slice(None, 1), "others": slice(1, None)}
    return {name: [round(x[:, at].median().item(), 3) for x in every] for name, at in places.items()}


@contextmanager
def skipped(subject: Subject, block: int, place: str) -> Iterator[None]:
    """Inside, a block writes nothing at the first token of a window, or nothing at the others.

    What its attention reads is as before: only its output is left out.
    """

    def hook(_module, args, out):
        first = torch.arange(out.shape[1], device=out.device)[None, :, None] == 0
        return torch.where(first == (place == PLACES[0]), args[0], out)

    handle = subject.blocks[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def losses_skipped(subject: Subject, ids: torch.Tensor, block: int, place: str) -> list[float]:
    """Each window's loss with a block `skipped`, in nats a token."""
    with skipped(subject, block, place):
        return _rounded(sets_losses(subject, ids, [()])[0])


def read(file: Path | None = None) -> Scale:
    """The file that `record` wrote, by default the study's own."""
    return Scale(**read_json(file or data_file("results/08_relevance_scale.json")))
