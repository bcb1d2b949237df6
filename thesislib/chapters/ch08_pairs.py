"""Chapter 8's search for the blocks to remove, held against every pair: the recorded losses, and what they say."""

import itertools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from thesislib.compress.agreement import resampled_means
from thesislib.compress.depth import sets_losses
from thesislib.compress.exhaustive import Blocks
from thesislib.compress.stability import chosen
from thesislib.files import read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows
from thesislib.sources.rows import origin_of

TEXT = "wikipedia"
TRIPLES, AGAIN = 200, 60  # triples that pairs predict to cost least; pairs that are measured on other windows too
RESAMPLES = 1_000  # of the windows


@dataclass(frozen=True)
class Losses:
    """Each window's loss without each set of blocks, in nats a token, rounded to 5 digits.

    Attributes:
        searched: {blocks: of each window of the search}: without none, each, all pairs and some triples.
        others: the same of as many other windows, for fewer pairs and no triples.
        made: provenance.
    """

    searched: dict[Blocks, list[float]]
    others: dict[Blocks, list[float]]
    made: dict

    @property
    def depth(self) -> int:
        """How many blocks the model has."""
        return sum(len(blocks) == 1 for blocks in self.searched)

    def to_json(self) -> str:
        """One JSON object; the key of a set is its blocks."""
        plain = asdict(self)
        samples = {name: {" ".join(map(str, s)): nats for s, nats in plain[name].items()} for name in SAMPLES}
        return json.dumps({**plain, **samples})

    @classmethod
    def from_json(cls, plain: Mapping) -> "Losses":
        """What `to_json` wrote."""
        samples = ({tuple(map(int, s.split())): nats for s, nats in plain[name].items()} for name in SAMPLES)
        return cls(*samples, plain["made"])


SAMPLES = ("searched", "others")


def record(
    subject: Subject, data: str, windows: int, length: int, file: Path, also: Collection[Blocks] = ()
) -> None:
    """Write the `Losses` to a file. A run that was killed goes on from the file .partial beside it.

    The windows of the search are the first ones of chapter 2's choice with seed 0, the others those that follow there.

    Args:
        subject: the whole model.
        data: see `thesislib.sources.corpus.calibration_text`.
        windows: of the search; as many others.
        length: tokens of a window.
        file: to write.
        also: triples that other rankings choose.
    """
    started, partial = time.perf_counter(), file.with_name(file.name + ".partial")
    ids = calibration_windows(subject.tokenizer, TEXT, data, 2 * windows, length)
    settings = {
        "text": TEXT, "text_sha256": calibration_text(TEXT, data).sha256, "data": origin_of(data),
        "windows": windows, "length": length, "seed": 0,
    }  # fmt: skip
    done = Losses({}, {}, {})
    if partial.exists():
        before, same = Losses.from_json(read_json(partial)), provenance(subject, started, **settings)
        if all(before.made[name] == same[name] for name in ("fingerprint", "plan", "dtype", "settings")):
            done, started = before, started - before.made["seconds"]

    def measure(sets: Collection[Blocks], losses: dict[Blocks, list[float]], some) -> None:
        missing = sorted({*sets} - {*losses}, key=lambda s: (len(s), s))
        # sets with the same first block share what is before it
        for _, group in itertools.groupby(missing, key=lambda s: (len(s), s[:1] if len(s) > 1 else ())):
            new = [*group]
            losses.update(zip(new, np.round(sets_losses(subject, some, new), 5).tolist(), strict=True))
            done.made.update(provenance(subject, started, **settings))
            write_whole(partial, done.to_json())

    measure(up_to_pairs(subject.depth), done.searched, ids[:windows])
    measure({*triples(done), *also}, done.searched, ids[:windows])
    measure(once_more(done), done.others, ids[windows:])
    partial.replace(file)


def up_to_pairs(depth: int) -> list[Blocks]:
    """The empty set, all single blocks and all pairs."""
    return [s for size in range(3) for s in itertools.combinations(range(depth), size)]


def triples(losses: Losses, count: int = TRIPLES) -> set[Blocks]:
    """The triples that single blocks and pairs predict to cost least; and all that greedy and one-shot may meet in a
    resample of the windows, so that their intervals are known."""
    mean = {s: float(np.mean(nats)) for s, nats in losses.searched.items()}

    def predicted(triple: Blocks) -> float:
        pairs, singles = (sum(mean[s] for s in itertools.combinations(triple, size)) for size in (2, 1))
        return pairs - singles + mean[()]

    every = sorted(itertools.combinations(range(losses.depth), 3), key=predicted)
    found = {*every[:count]}
    sets = up_to_pairs(losses.depth)
    means = resampled_means(np.array([losses.searched[s] for s in sets]), RESAMPLES)
    singles = means[:, 1 : 1 + losses.depth]
    found |= {tuple(map(int, s)) for s in np.unique(chosen(singles, 3), axis=0)}
    for first in np.unique(singles.argmin(1)):
        rows = [i for i, s in enumerate(sets) if len(s) == 2 and first in s]
        for i in np.unique(means[singles.argmin(1) == first][:, rows].argmin(1)):
            pair = sets[rows[i]]
            found |= {tuple(sorted((*pair, b))) for b in range(losses.depth) if b not in pair}
    return found


def once_more(losses: Losses, count: int = AGAIN) -> list[Blocks]:
    """What is measured on other windows: the whole model, single blocks and the pairs that cost least."""
    pairs = sorted((s for s in losses.searched if len(s) == 2), key=lambda s: np.mean(losses.searched[s]))
    return [s for s in up_to_pairs(losses.depth) if len(s) < 2] + pairs[:count]
