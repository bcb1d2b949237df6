"""Chapter 6, the whole grid: its sizes, this machine's run of one, and the recorded run."""

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from thesislib.chapters.chapter import WIKITEXT, Keep, Key, Parameters, Part, book
from thesislib.chapters.pareto import PPL, Results
from thesislib.evaluate.setup import setup_of
from thesislib.experiment import DENSE, Conditions
from thesislib.files import cache_dir, data_file
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sweep.grid import Configuration, Grid, read_grid
from thesislib.sweep.run import (
    FAILED,
    Target,
    by_identity,
    conditions,
    known,
    possible,
    recorded_conditions,
    sweep,
    wanted,
)
from thesislib.sweep.task import measure_cell
from thesislib.sweep.workers import Workers

RECORDED, PRECISION, FULL = "sample", "precision", "full"
READS = (
    "00_measures",
    "01_franken_llama",
    "02_depth_pruning",
    "03_width_pruning",
    "04_lora_recovery",
    "05_quantisation",
)


@dataclass(frozen=True)
class EvaluationChapter(Parameters):
    """Parameters of chapter 6.

    Attributes:
        size: of the grid in data/grid.yaml.
        workers: processes on this machine.
        threads: of each process.
    """

    size: str = "quick"
    workers: int = 2
    threads: int = 1

    def __post_init__(self):
        super().__post_init__()
        grid(self.size)

    @property
    def target(self) -> Target:
        """Subject, data, dtype and device of the sweep."""
        return Target(self.subject, self.data, self.dtype, self.device)


@functools.cache
def grid(size: str) -> Grid:
    """The study's grid at one of its sizes."""
    return read_grid(data_file("grid.yaml"), size)


def run(p: EvaluationChapter) -> Results:
    """The grid measured on this machine, without what cannot be made of the subject. The cache keeps measurements.

    Raises:
        RuntimeError: configurations that failed, each with its reason.
    """
    g = grid(p.size)
    store = Store(cache_dir() / "sweeps" / f"{g.name}-{g.size}.jsonl")
    g, why = possible(g, p.target)
    for label, reason in why.items():
        print(f"not possible for this subject: {label} ({reason})")
    failed = sweep(g, p.target, store, Workers(p.workers, threads=p.threads, gpu=p.device.startswith("cuda")))
    if failed:
        raise RuntimeError("; ".join(f"{label}: {why}" for label, why in failed.items()))
    return collect(g, store.rows().values(), conditions(g, p.target))


def collect(g: Grid, rows: Iterable[Measurement], at: Conditions) -> Results:
    """{(label, measure): measurement} of a grid on one subject in one type. All other rows stay out."""
    measured = by_identity(rows)
    names = {(c.label, measure): name for c in g.configurations for measure, name in wanted(g, c, at).items()}
    return {cell: measured[name] for cell, name in names.items() if name in measured}


class Record(NamedTuple):
    """What was recorded of the grid, at its two sizes.

    Args:
        full: the whole text, 1,200 questions and 902 passages, as far as it was run.
        sample: 24 windows of the text and 64 passages.
    """

    full: Results
    sample: Results

    def on_one(self, groups: Sequence[str]) -> Results:
        """The whole text's results if they have the perplexity of all configurations of these groups that the sample
        has; else the sample's."""
        labels = [c.label for c in grid(RECORDED).configurations if c.group in groups and (c.label, PPL) in self.sample]
        return self.full if all((label, PPL) in self.full for label in labels) else self.sample

    @property
    def for_fronts(self) -> Results:
        """The whole text's results once they have quantised models and the dense model trained alike; else the
        sample's."""
        has_all = all((label, PPL) in self.full for label in (DENSE, "W", "Q", "Q+E", "D2+W1:8+W+Q"))
        return self.full if has_all else self.sample


# ---------------------------------------------------------------- the record


def read_recorded(path: Path) -> Record:
    """The recorded run."""
    return Record(read_size(path, FULL), read_size(path, RECORDED))


def read_size(path: Path, size: str, dtype: str = "bfloat16") -> Results:
    """The recorded run of one size of the grid: its own rows, and the same measurements of earlier chapters."""
    own = list(Store(path).rows().values())
    before = [m for store in _before(path) for m in store.rows().values()]
    return collect(grid(size), [*before, *own], recorded_conditions(own, dtype))


def _before(path: Path) -> list[Store]:
    """The records of the earlier chapters, which lie beside this chapter's."""
    return [Store(file) for name in READS if (file := path.with_name(f"{name}.jsonl")).exists()]


SINGLES = ("D2", "D4", "D8", "W1:2", "W2:4", "W1:8", "W4:8", "W8:16")
HEADLINES = (  # models that a finding or a claim names
    *("dense", "D2", "D4", "D6", "D8", "W1:2", "W2:4", "W3:4", "W1:8", "W4:8", "W6:8", "W1:16", "W8:16", "W12:16"),
    *("W", "T", *(f"{model}+{text}" for model in (*SINGLES, "D2+W1:8") for text in "WT"), "D2+W1:8", "Q", "Q+E"),
)
CHOICES = ("dense", "D2", "D4", "W1:8", "W2:4", "W", "Q", "Q+E")


@functools.cache
def part_of_full() -> dict[str, tuple[str, ...]]:
    """{measure: labels} of what of size full is recorded: of all that the sample has the perplexity, and of the models
    that a finding or a claim names also the answers. Nobody has run all of it."""
    whole = [c.label for c in grid(RECORDED).configurations]
    return {
        "perplexity": tuple(dict.fromkeys([*whole, *HEADLINES, "H", "H3", "H2"])),
        "closed book": HEADLINES,
        "open book": HEADLINES,
        "HellaSwag": CHOICES,
        "ARC-Easy": CHOICES,
        "PIQA": CHOICES,
    }


# in bfloat16 size precision is a part of size sample
RUNS = ((RECORDED, "bfloat16"), (PRECISION, "float32"), (FULL, "bfloat16"))


def recorded_parts(p: EvaluationChapter, file: Path) -> Iterator[Part]:
    """One part a configuration: of the recorded sizes, or of `p.size` alone if that is another one.

    What earlier chapters measured is not measured again.
    """
    for size, dtype in RUNS if p.size == RECORDED else [(p.size, p.dtype)]:
        target = replace(p.target, dtype=dtype)
        g = grid(size)

        @functools.cache
        def elsewhere(g: Grid = g, target: Target = target) -> tuple[Conditions, set[str]]:
            return conditions(g, target), known(_before(file))

        for c in g.configurations:
            everything = p.size != RECORDED or size != FULL
            ways = {
                task: way for task, way in c.measures.items() if everything or c.label in part_of_full().get(task, ())
            }

            def make(
                missing: Collection[Key],
                keep: Keep,
                g: Grid = g,
                c: Configuration = c,
                target: Target = target,
                elsewhere=elsewhere,
            ) -> None:
                at, have = elsewhere()
                names = wanted(g, c, at)
                todo = [
                    task
                    for task in c.measures
                    if names.get(task) not in have and (c.label, g.size, target.dtype, task) in missing
                ]
                if not todo:
                    return
                setups = [c.measures[task] for task in todo]
                for m in measure_cell(stages=c.recipe.stages, setups=setups, cell=g.cell(c), **asdict(target)):
                    keep(m)

            if ways:
                yield Part(
                    f"{size} {dtype} {c.label}",
                    {(c.label, size, dtype, task): way.limit for task, way in ways.items()},
                    make,
                )


def key(m: Measurement) -> Key:
    """Label, size, dtype and measure. The measure of a row of a failed sweep is None."""
    note, way = m.provenance["sweep"], None if m.metric == FAILED else replace(setup_of(m), batch=None)
    measures = next((c.measures for c in grid(note["size"]).configurations if c.label == note["label"]), {})
    task = next((name for name, other in measures.items() if replace(other, batch=None) == way), None)
    return note["label"], note["size"], m.provenance["dtype"], task


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """Perplexities in windows of 512 tokens and answers, in bfloat16."""
    for m in rows:
        run = m.provenance
        if run["dtype"] == "bfloat16" and run["protocol"]["length"] == 512 and m.metric in ("perplexity", "accuracy"):
            yield run["sweep"]["label"], WIKITEXT if m.metric == "perplexity" else book(m), m
