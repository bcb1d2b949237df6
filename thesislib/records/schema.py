"""What a record says of how it was made, field by field, and since when: rows of earlier chapters lack what came
later."""

from typing import Any, NotRequired, TypedDict


class Base(TypedDict):
    """What the stages, or a plan, began with."""

    name: str  # the subject's
    fingerprint: str  # see `thesislib.model.subject.Subject.fingerprint`
    label: NotRequired[str]  # of an artifact that the stages began with


class Made(TypedDict):
    """How the model that was measured came about. Chapter 7's rows, of stand-ins, have label and bytes alone."""

    label: str  # the configuration, see `thesislib.pipeline.label.Label`; of a plan, its text
    recipe: NotRequired[str | None]  # 12 digits over all stages with every setting; None without stages
    stage: NotRequired[str | None]  # the word of the last stage
    stages: NotRequired[list[dict[str, dict]]]  # {word: settings}, every setting written out
    base: NotRequired[Base]
    data: NotRequired[str]  # the kind of data it was calibrated on or trained with: embedded, folder or hub
    bytes: dict[str, int]  # see `thesislib.formats.sizes.sizes`; empty where they were not counted
    reports: NotRequired[list[dict[str, Any]]]  # what each stage said of itself


class Hardware(TypedDict):
    """Where it was measured."""

    cpu: str
    cores: int
    torch_threads: int
    accelerator: str | None  # a card's name
    device: str  # torch's name of the device


class Settings(TypedDict, total=False):
    """How the measure was set; each task writes those that it has."""

    length: int  # tokens of a window
    limit: int | None  # windows, questions or items; None for all
    text: str  # of perplexity
    text_sha256: str
    bootstrap_seed: int
    prompt: str | int  # of questions, by its name; of timings, how many tokens
    source: str
    max_new_tokens: int
    batch: int
    open_book: bool
    prompts_sha256: str  # of all prompts as they were put; since November 2026
    template_sha256: str | None  # of the chat template; since November 2026
    task: str  # of multiple choice
    n: int
    protocol: str  # of multiple choice: how it is scored, in a sentence
    reference: str  # of a task of two models: its name
    reference_fingerprint: str
    engine: str  # of timings, as the rest
    tokens: int
    repeats: int
    threads: int
    interval: str
    file: str
    cache: bool


class Sweep(TypedDict):
    """Which cell of a grid it is."""

    grid: str
    size: str
    group: str
    label: str
    seconds_to_make: NotRequired[float]  # less what the cache held


class Provenance(TypedDict):
    """Everything needed to make a measurement again."""

    subject: str  # its name
    fingerprint: str  # of the weights that were measured; of plans measured in one pass, of the whole model
    plan: list[int] | None  # the blocks that ran
    dtype: str
    settings: Settings
    versions: dict[str, str]  # of this package, Python, torch, ...
    hardware: Hardware
    date: str  # UTC, YYYY-MM-DD
    seconds: float  # of the measurement alone
    made: NotRequired[Made]  # a measurement made directly has none
    tolerance: NotRequired[
        dict[str, float]
    ]  # {"relative" or "absolute": how far it may lie from this elsewhere}; not of timings
    commit: NotRequired[str | None]  # since chapter 4, as the rest
    time: NotRequired[str]  # UTC, to the second
    peak_memory: NotRequired[int]  # bytes, of the process so far
    protocol: NotRequired[dict[str, Any]]  # see `thesislib.evaluate.setup.Setup.plain`; not of timings
    corpus_sha256: NotRequired[str | None]  # of the text or items
    chapter: NotRequired[dict[str, Any]]  # what tells the row from others of its chapter, whose module has its form
    sweep: NotRequired[Sweep]
