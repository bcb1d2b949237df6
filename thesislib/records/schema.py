"""The fields of a record's provenance, and since when they exist: rows of earlier chapters lack the later ones."""

from typing import Any, NotRequired, TypedDict


class Base(TypedDict):
    """The model that the stages, or a plan, began with."""

    name: str  # of the subject
    fingerprint: str  # see `thesislib.model.subject.Subject.fingerprint`
    label: NotRequired[str]  # if the stages began with an artifact


class Made(TypedDict):
    """How the measured model came about. Chapter 7's rows, of stand-ins, have only label and bytes."""

    label: str  # the configuration, see `thesislib.pipeline.label.Label`; of a plan, its text
    recipe: NotRequired[str | None]  # 12 hex digits of a hash over all stages with every setting; None without stages
    stage: NotRequired[str | None]  # the word of the last stage
    stages: NotRequired[list[dict[str, dict]]]  # {word: settings}, every setting written out
    base: NotRequired[Base]
    data: NotRequired[str]  # the kind of data spec for calibration and training: embedded, folder or hub
    bytes: dict[str, int]  # see `thesislib.formats.sizes.sizes`; empty if they were not counted
    reports: NotRequired[list[dict[str, Any]]]  # what each stage reported


class Hardware(TypedDict):
    """The machine that measured."""

    cpu: str
    cores: int
    torch_threads: int
    accelerator: str | None  # the name of a card
    device: str  # torch's name of it


class Settings(TypedDict, total=False):
    """The settings of a measure. Each task writes those that it has."""

    length: int  # tokens of a window
    limit: int | None  # windows, questions or items; None for all
    text: str  # of perplexity
    text_sha256: str
    bootstrap_seed: int
    prompt: str | int  # of questions, the prompt's name; of timings, its number of tokens
    source: str
    max_new_tokens: int
    batch: int
    open_book: bool
    prompts_sha256: str  # of all prompts with their questions; since November 2026
    template_sha256: str | None  # of the chat template; since November 2026
    task: str  # of multiple choice
    n: int
    protocol: str  # of multiple choice: the scoring, in words
    lm_eval: str  # of multiple choice by lm-evaluation-harness: its version
    seed: int  # of the choice of its items
    reference: str  # of a task of two models: the reference model's name
    reference_fingerprint: str
    engine: str  # of timings, as the rest
    tokens: int
    repeats: int
    threads: int
    interval: str
    file: str
    cache: bool


class Sweep(TypedDict):
    """The cell of a grid."""

    grid: str
    size: str
    group: str
    label: str
    seconds_to_make: NotRequired[float]  # of its stages; those in the cache take none


class File(TypedDict):
    """A file in which another program quantised a subject, and whose decoded weights were measured."""

    of: str  # the subject's fingerprint
    made_by: dict[str, str]  # the program's versions
    sha256: str
    bytes: int
    types: dict[str, float]  # the share of the file's numbers that each of its types holds


class Provenance(TypedDict):
    """Everything needed to make a measurement again."""

    subject: str  # the subject's name
    fingerprint: str  # of the measured weights; of plans measured in one pass, of the whole model
    plan: list[int] | None  # the blocks that ran, in order
    dtype: str
    settings: Settings
    versions: dict[str, str]  # of this package, Python, torch, ...
    hardware: Hardware
    date: str  # UTC, YYYY-MM-DD
    seconds: float  # of the measurement alone
    made: NotRequired[Made]  # not of a subject that was measured as loaded, without `thesislib.experiment`
    # {"relative" or "absolute": how far another machine's value may lie from this}; not of timings
    tolerance: NotRequired[dict[str, float]]
    commit: NotRequired[str | None]  # this and all below: since chapter 4
    time: NotRequired[str]  # UTC, to the second
    peak_memory: NotRequired[int]  # bytes, of the process so far
    protocol: NotRequired[dict[str, Any]]  # the setup, see `thesislib.evaluate.setup.Setup.plain`; not of timings
    corpus_sha256: NotRequired[str | None]  # of the text or items
    chapter: NotRequired[dict[str, Any]]  # what tells the row from others of its chapter, in that module's form
    sweep: NotRequired[Sweep]
    file: NotRequired[File]
    origin: NotRequired[str]  # the id of the row whose recorded answers were scored again
