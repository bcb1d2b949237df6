"""All chapters' records together: every row of one model and one measure, whichever chapter made it.

A page that quotes a model takes its largest measurement from here, so that two pages never quote different ones.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from thesislib.chapters import chapters
from thesislib.chapters.scorings import SCORINGS, scored_again
from thesislib.chapters.trainings import Records, collect
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store, study

K = TypeVar("K")


def pool(records: Mapping[str, Iterable[Measurement]]) -> Records:
    """Every chapter's rows by label and measure, the first chapter's first.

    Args:
        records: {"02_depth_pruning": its rows, ...}; those that are missing leave claims unmeasured.
    """
    return collect(row for name, chapter in chapters().items() for row in chapter.claims(records.get(name, ())))


def recorded_pool(folder: Path | None = None) -> Records:
    """The records in a folder, by default the study's own; claims of a chapter without one stay unmeasured."""
    folder = folder or study()
    return _read(
        folder, tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.jsonl")))
    )


@functools.lru_cache(maxsize=2)
def _read(folder: Path, state: tuple) -> Records:
    """As `recorded_pool`; the state of the files tells when they have to be read again."""
    files = {name: folder / f"{name}.jsonl" for name in chapters()}
    stored = {name: Store(file).rows().values() for name, file in files.items() if file.exists()}
    again = scored_again(folder)

    def rows() -> Iterable[tuple[str, str, Measurement]]:
        for name, chapter in chapters().items():
            for label, measure, m in chapter.claims(stored.get(name, ())):
                yield label, measure, m
                for metric in SCORINGS:
                    if scored := again.get((m.id, metric)):
                        yield label, scored_by(measure, metric), scored

    return collect(rows())


def scored_by(measure: str, metric: str) -> str:
    """What a measure of answers is called under another scoring than the thesis's."""
    return f"{measure}, {metric}"


class Recorded(dict[K, Measurement]):
    """A chapter's recorded run, and what all chapters together recorded.

    Attributes:
        pool: see `recorded_pool`.
    """

    def __init__(self, rows: Mapping[K, Measurement], pool: Records):
        super().__init__(rows)
        self.pool = pool


def larger(records: Records, measure: str, label: str, m: Measurement) -> Measurement:
    """The measurement of a label on the most items, if that are more than those of `m`; else `m`."""
    other = largest(records, measure, [label]).get(label, m)
    return other if other.n > m.n else m


def largest(records: Records, measure: str, labels: Iterable[str]) -> dict[str, Measurement]:
    """{label: its measurement on the most items}; of several trainings the first. Labels without one are left out."""
    samples = {label: records.get((label, measure), {}) for label in labels}
    return {label: by_n[max(by_n)][0] for label, by_n in samples.items() if by_n}
