"""Chapter 9's question 7: the effective rank of every linear, by itself and in the metric of its inputs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from thesislib.compress.calibration import ALL_AT_ONCE, INPUTS, Statistics, Visitor, stream
from thesislib.compress.factor import effective_rank, plain, spectrum, whitening
from thesislib.errors import BadInput
from thesislib.files import read_json, write_whole
from thesislib.model.layers import Projection
from thesislib.model.subject import Subject

WAYS = {"plain": None, "whitened": "equal", "whitened, tokens of unit norm": "unit_norm"}


class Spectra(NamedTuple):
    """Effective ranks.

    Args:
        ranks: {way: {"blocks.B.NAME": effective rank}}; ways are `WAYS`.
        shapes: {"blocks.B.NAME": (outputs, inputs)}.
        first: {way: {"blocks.B.NAME": share of the largest squared singular value}}.
        text: of the calibration.
        windows: of it.
    """

    ranks: dict[str, dict[str, float]]
    shapes: dict[str, tuple[int, int]]
    first: dict[str, dict[str, float]]
    text: str
    windows: int

    def of(self, way: str, name: str) -> list[float]:
        """The effective ranks of one kind of linear over depth."""
        return [rank for key, rank in self.ranks[way].items() if key.rpartition(".")[2] == name]

    def break_even(self, name: str) -> float:
        """m n / (m + n) of one kind."""
        m, n = next(shape for key, shape in self.shapes.items() if key.rpartition(".")[2] == name)
        return m * n / (m + n)


class _Measure(Visitor):
    groups = ALL_AT_ONCE
    moments = True

    def __init__(self) -> None:
        self.ranks: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.shapes: dict[str, list[int]] = {}
        self.plain: tuple[dict[str, float], dict[str, float]] = {}, {}

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`; it changes nothing."""
        metrics: dict[str, Any] = {}
        for name, linear in linears.items():
            key, weight = f"blocks.{block}.{name}", linear.weight.detach()
            if INPUTS[name] not in metrics:
                metrics[INPUTS[name]] = whitening(statistics[name].moment, f"block {block}'s {name}")
            for (ranks, first), metric in (
                ((self.ranks, self.first), metrics[INPUTS[name]]),
                (self.plain, plain(weight.shape[1])),
            ):
                s = spectrum(weight, metric)
                ranks[key] = round(effective_rank(s), 2)
                first[key] = round(float(s[0].square() / s.square().sum()), 6)
            self.shapes[key] = list(weight.shape)


def measured(subject: Subject, p: Any) -> Spectra:
    """The effective ranks of all projections.

    Args:
        subject: the whole model.
        p: see `thesislib.chapters.ch09_runs.LowRankChapter`.
    """
    ids = p.pairs().ids(subject.tokenizer, p.data)
    ranks: dict[str, dict[str, float]] = {}
    first: dict[str, dict[str, float]] = {}
    shapes: dict[str, Any] = {}
    for way, weighting in WAYS.items():
        if weighting is None:
            continue
        visitor = _Measure()
        stream(subject, ids, visitor, weighting=weighting, feed="original", title=way)
        ranks |= {"plain": visitor.plain[0], way: visitor.ranks}
        first |= {"plain": visitor.plain[1], way: visitor.first}
        shapes = {key: tuple(shape) for key, shape in visitor.shapes.items()}
    return Spectra(ranks, shapes, first, p.pairs().text, p.windows)


def record(subject: Subject, p: Any, file: Path) -> None:
    """Write the effective ranks."""
    facts = {**measured(subject, p)._asdict(), "length": p.length, "subject": subject.name,
             "fingerprint": subject.fingerprint}  # fmt: skip
    write_whole(file, json.dumps(facts, indent=1) + "\n")


def read(file: Path) -> Spectra:
    """The recorded effective ranks.

    Raises:
        BadInput: no such file, or one without them.
    """
    facts = read_json(file)
    try:
        shapes = {key: (m, n) for key, (m, n) in facts["shapes"].items()}
        return Spectra(facts["ranks"], shapes, facts["first"], facts["text"], facts["windows"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file} does not hold effective ranks ({error}): run `thesislib record 09` again") from error
