"""A chapter: its notebook, its parameters, and its recorded run, which `thesislib.chapters.record` carries out."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from thesislib.compress.stage import Stage
from thesislib.config import positive
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.experiment import recipe_of
from thesislib.formats.options import check_dtype
from thesislib.model.blocks import Plan
from thesislib.pipeline.forecast import shape_of, stand_in
from thesislib.pipeline.recipe import Shape, parse_label
from thesislib.pipeline.run import Job
from thesislib.records.measurement import Measurement

# what a row is of, for the claims that compare rows of different chapters
WIKITEXT, CLOSED, OPEN = "WikiText-2", "closed book", "open book"

DEPTH_WINDOWS = 8  # that blocks are chosen on in all recorded runs, which are older than the default of `Depth`

Key = tuple[Any, ...]  # hashable: what tells a row from the others of its chapter; the first is its label
Keep = Callable[[Measurement], object]
K = TypeVar("K")


@dataclass(frozen=True)
class Parameters:
    """The parameters of every chapter that measures models. Whole numbers are at least 1.

    Attributes:
        subject: a subject spec.
        data: a data spec.
        dtype: of the weights, see `thesislib.formats.load.load_subject`.
        device: a torch device.
    """

    subject: str = "embedded"
    data: str = "embedded"
    dtype: str = "bfloat16"
    device: str = "cpu"
    may_be_zero: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        numbers = {f.name for f in fields(self) if f.type in (int, int | None)} - {*self.may_be_zero}
        positive(**{name: getattr(self, name) for name in sorted(numbers)})
        check_dtype(self.dtype)


@dataclass(frozen=True)
class Part:
    """Rows of a recorded run that are made at one go, by one process.

    Attributes:
        name: tells it from the run's other parts.
        rows: {key: n}, all its rows, each with the number of items that it is measured on, or None for all there are.
        make: called with the keys to make and with what keeps a row as soon as it is made. It may keep fewer: those
            that this subject cannot have, or that another chapter's record has.
        file: a file beside the record, which `make` writes too.
        planned: the stages, the setup and the data spec of the rows for which they are known beforehand. A row that
            was made or measured otherwise is refused.
    """

    name: str
    rows: Mapping[Key, int | None]
    make: Callable[[Collection[Key], Keep], object]
    file: Path | None = None
    planned: Mapping[Key, tuple[Sequence[Stage], Setup, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a chapter's first box and its line on the book's first page say, of the record that its `read` gives.

    Attributes:
        question: that the chapter asks, in one sentence.
        answer: of a record, in two sentences.
        short: the answer in about ten words, of a record.
        protocol: text, windows, n and the dense model's value, of a record.
        learn: what a reader can do afterwards, in one sentence.
    """

    question: str
    answer: Callable[[Any], str]
    short: Callable[[Any], str]
    protocol: Callable[[Any], str]
    learn: str


@dataclass(frozen=True)
class Chapter:
    """A notebook and its recorded run: CHAPTER in one module `chNN_name.py` of each number.

    Attributes:
        notebook: its name, e.g. 03_width_pruning; its record is data/results/03_width_pruning.jsonl.
        title: as lists have it.
        parameters: the class of those that its notebook takes.
        recorded: those of the recorded run that are not the class's defaults. They stand nowhere else.
        parts: the recorded run with these parameters, into this file.
        key: of a row of the record, as `parts` has it.
        read: the record in this file, as the chapter's functions take it.
        headline: what was found, in sentences, from what `read` gives.
        reads: the notebooks' names of the other chapters whose records this one reads, in its notebook or in `read`.
        claims: (label, what was measured, row) of those rows that the thesis's claims may be held against.
        opening: its first box.
        papers: claims of papers, each with its verdict, from what `read` gives; see `thesislib.chapters.paper_claims`.
    """

    notebook: str
    title: str
    parameters: type
    parts: Callable[[Any, Path], Iterable[Part]]
    key: Callable[[Measurement], Key]
    read: Callable[[Path], Any]
    headline: Callable[[Any], str]
    recorded: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    claims: Callable[[Iterable[Measurement]], Iterable[tuple[str, str, Measurement]]] = lambda rows: ()
    opening: Opening | None = None
    papers: Callable[[Any], Sequence[Any]] | None = None


def recorded_stages(label: str) -> list[Any]:
    """The stages of a label as recorded runs have them.

    Raises:
        BadInput: see `thesislib.pipeline.recipe.parse_label`.
    """
    stages: Iterable[Any] = parse_label(label).stages
    return [replace(stage, windows=DEPTH_WINDOWS) if stage.word == "depth" else stage for stage in stages]


def book(m: Measurement) -> str:
    """Whether answers were given with the book open or closed."""
    return OPEN if m.open_book else CLOSED


AT_ONCE = 8  # plans of a recorded run that are measured together, so that a killed run loses no more


def neighbours(plans: Mapping[K, Plan]) -> Iterator[dict[K, Plan]]:
    """A few plans at a time, those together that begin with the same blocks: these run once."""
    names = sorted(plans, key=lambda name: tuple(plans[name]))
    for at in range(0, len(names), AT_ONCE):
        yield {name: plans[name] for name in names[at : at + AT_ONCE]}


def on_one_sample(measurements: Iterable[Measurement], key: Callable[[Measurement], K]) -> dict[K, Measurement]:
    """A chapter's rows by key, those of one task all measured on equally many items.

    A recorded run that goes on from a sample to all items has rows of both. A task's rows are those of its largest
    sample that has every key; until there is one, those of the sample with the most keys.
    """
    samples: dict[tuple, dict[int, dict[K, Measurement]]] = {}
    for m in measurements:
        samples.setdefault((m.task, m.metric), {}).setdefault(m.n, {})[key(m)] = m
    rows: dict[K, Measurement] = {}
    for sizes in samples.values():
        rows |= max(sizes.items(), key=lambda sample: (len(sample[1]), sample[0]))[1]
    return rows


def by_key(measurements: Iterable[Measurement], key: Callable[[Measurement], K], chapter: int) -> dict[K, Measurement]:
    """A chapter's measurements by a key.

    Raises:
        BadInput: a measurement without such a key, which is another chapter's.
    """
    try:
        return {key(m): m for m in measurements}
    except (KeyError, TypeError) as error:
        raise BadInput(f"these are not the results of chapter {chapter} ({error})") from error


def shape(subject: str) -> Shape:
    """The shape of a spec's subject; no weight is read."""
    return shape_of(stand_in(Job.prepare(subject, recipe_of(())).source))
