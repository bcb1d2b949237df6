"""Chapter 7, on a device: which stand-ins are timed, in which engine, and how."""

import dataclasses
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thesislib.chapters.chapter import Keep, Key, Part, by_key, shape
from thesislib.compress.gptq import Rtn
from thesislib.config import positive
from thesislib.device.hardware import device, devices
from thesislib.device.measure import (
    Agreement,
    agreement,
    as_measurement,
    engine_name,
    gguf_file,
    prompt_ids,
    time_llama_cpp,
    time_transformers,
)
from thesislib.errors import BadInput
from thesislib.evaluate.stats import proportion
from thesislib.experiment import DENSE
from thesislib.formats.gguf import TYPES
from thesislib.formats.load import load_subject
from thesislib.model.blocks import apply_plan
from thesislib.model.prompts import adds_bos, default_prompt, prompt_for
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import parse_label
from thesislib.records.measurement import Measurement, provenance
from thesislib.records.store import Store
from thesislib.sources.corpus import questions

DEPTHS = (30, 20, 10, 4)  # blocks at which predicted is held against measured
SAME, PROMPTS = "prompts with the same text", 10
TOKENS, REPEATS = 32, 7  # what a recorded timing decodes after the first token, and how often
MODELS = (DENSE, "D4+W", "D8", "W2:4+W", "W+Q", "D4+W+Q", "W2:4+W+Q", "D4+W2:4+W+Q")
Results = Mapping[tuple[str, str], Measurement]  # by model and engine


@dataclass(frozen=True)
class DeviceChapter:
    """Parameters of chapter 7.

    Attributes:
        subject: a subject spec.
        devices: names of files in hw/devices, or paths of others.
        prompt: tokens that are read at once.
        context: tokens in the cache when one is generated.
    """

    subject: str = "embedded"
    devices: list[str] = dataclasses.field(
        default_factory=lambda: ["siracusa", "gap9", "k1", "pi4", "pi5", "orin_nano", "laptop", "host"]
    )
    prompt: int = 128
    context: int = 128

    def __post_init__(self):
        positive(prompt=self.prompt, context=self.context)
        for name in self.devices:
            device(name)
        if not self.devices:
            raise BadInput(f"no device was chosen: expected some of {', '.join(devices())}")


@dataclass(frozen=True)
class Case:
    """A model in an engine.

    Attributes:
        label: of the model.
        kind: a GGUF type for llama.cpp, or float32 or bfloat16 for transformers.
    """

    label: str
    kind: str

    @property
    def engine(self) -> str:
        """As `Timing.engine` has it."""
        return engine_name(self.kind)


def stand_in(subject: Subject, label: str) -> Subject:
    """A model with the shapes, zeros and bits of a label, made in seconds: which blocks, weights and values are kept
    changes no cost.

    D2: the blocks before the last are left out. W2:4: by magnitude. Q: rounded to 4 bits in groups of 64. W: nothing,
    since a merged adapter costs nothing.

    Raises:
        BadInput: a part of the label that is none of these.
    """
    result = subject
    stages: Iterable[Any] = [] if label == DENSE else parse_label(label).stages
    for stage in stages:
        if stage.word == "depth" and stage.part == "block" and 0 < stage.count < result.depth:
            kept = result.depth - stage.count
            result = apply_plan(result, [*range(kept - 1), result.depth - 1])
        elif stage.word == "width":
            result, _ = dataclasses.replace(stage, metric="magnitude").apply(result, data="embedded")
        elif stage.family == "quantised":
            result, _ = Rtn(bits=stage.bits, group=64).apply(result)
        elif stage.family != "trained":
            raise BadInput(f"'{stage.label}' of '{label}' has no stand-in: expected parts such as D4, W2:4, W and Q")
    return result


def models(p: DeviceChapter) -> dict[str, Subject]:
    """The chapter's models in bfloat16, by label: stand-ins with the shapes, zeros and bits of what the chapters before
    made."""
    subject = load_subject(p.subject, "bfloat16")
    fitting = [label for label in MODELS if not (depth := re.match(r"D(\d+)", label)) or int(depth[1]) < subject.depth]
    return {label: stand_in(subject, label) for label in fitting}


def depths(most: int) -> list[int]:
    """`DEPTHS` for a subject of `most` blocks: as large a share of it, at least one block."""
    return [max(1, round(most * d / DEPTHS[0])) for d in DEPTHS]


def depth_label(most: int, depth: int) -> str:
    """The label of a model with `depth` of a subject's `most` blocks."""
    return DENSE if depth == most else f"D{most - depth}"


def cases(depth: int) -> list[Case]:
    """All that is measured, for a subject of `depth` blocks: four formats by four depths, the chapter's models, and
    transformers beside them."""
    by_depth = [Case(depth_label(depth, d), kind) for kind in TYPES for d in depths(depth)]
    compressed = [*(Case(label, "Q8_0") for label in MODELS[1:]), Case("W2:4+W", "F16"), Case("W2:4+W", "Q4_0")]
    beside = [Case(label, kind) for label in (DENSE, "D8", "W2:4+W", "W+Q") for kind in ("float32", "bfloat16")]
    return list(dict.fromkeys([*by_depth, *compressed, *beside]))


def measure(p: DeviceChapter, keep: Keep, done: Iterable[tuple[str, str]] = ()) -> None:
    """Measure what is missing.

    Args:
        p: the chapter's parameters.
        keep: called with each result as it comes.
        done: models and engines that are not measured again.
    """
    done = set(done)
    exact = load_subject(p.subject, "float32")
    label, model = "", exact
    ids = prompt_ids(exact, p.prompt)
    # a format's depths in one go: a line through them should not be the machine's drift
    for case in sorted(cases(exact.depth), key=lambda c: (c.kind, c.label)):
        if (case.label, case.engine) in done:
            continue
        started = time.perf_counter()
        if case.kind in TYPES:
            if label != case.label:
                label, model = case.label, stand_in(exact, case.label)
            m = as_measurement(model, time_llama_cpp(gguf_file(model, case.kind), ids, TOKENS, REPEATS), started)
        else:
            own = stand_in(load_subject(p.subject, case.kind), case.label)
            m = as_measurement(own, time_transformers(own, ids, TOKENS, REPEATS), started)
        keep(noted(m, case.label, case.engine, exact.depth))
    if (DENSE, SAME) not in done:
        keep(noted(same_text(exact), DENSE, SAME, exact.depth))


def same_text(subject: Subject, tokens: int = TOKENS) -> Measurement:
    """On how many of ten questions the F16 file in llama.cpp writes what the subject writes in transformers, token by
    token."""
    started = time.perf_counter()
    asked = questions("embedded", open_book=False, limit=PROMPTS, seed=0)
    texts = [prompt_for(subject, q, default_prompt(subject)) for q in asked]
    prompts = [subject.tokenizer(t, add_special_tokens=adds_bos(subject, t))["input_ids"] for t in texts]
    answers: list[Agreement] = agreement(subject, gguf_file(subject, "F16"), prompts, tokens)
    same, n = sum(a.same == a.of for a in answers), len(answers)
    low, high = proportion(same, n)
    return Measurement(
        task="greedy text, llama.cpp F16 against transformers float32",
        metric=SAME,
        value=same / n,
        low=low,
        high=high,
        n=n,
        unit="prompt",
        items=[{"id": q.id, **dataclasses.asdict(a)} for q, a in zip(asked, answers, strict=True)],
        provenance=provenance(subject, started, tokens=tokens, file="F16", cache="F32"),
    )


def noted(m: Measurement, label: str, engine: str, blocks: int) -> Measurement:
    """A measurement with its model, its engine and the subject's number of blocks in its provenance."""
    note = {"made": {"label": label, "bytes": {}}, "chapter": {"model": label, "engine": engine, "blocks": blocks}}
    return m.with_provenance(**note)


# ---------------------------------------------------------------- the record


def from_measurements(measurements: Iterable[Measurement]) -> Results:
    """The measurements by model and engine.

    Raises:
        BadInput: not this chapter's.
    """
    return by_key(measurements, lambda m: (m.chapter["model"], m.chapter["engine"]), 7)


def read_recorded(path: Path) -> Results:
    """A recorded run."""
    return from_measurements(Store(path).rows().values())


def recorded_parts(p: DeviceChapter, file: Path) -> Iterator[Part]:
    """One part, so that no two processes take each other's time. A quiet machine and the extra `engine` are needed."""
    rows: dict[Key, int | None] = {(c.label, c.engine): TOKENS * REPEATS for c in cases(shape(p.subject).depth)}
    rows[DENSE, SAME] = PROMPTS

    def make(missing: Collection[Key], keep: Keep) -> None:
        measure(p, keep, set(rows) - set(missing))

    yield Part("timings", rows, make)


def key(m: Measurement) -> Key:
    """Of a row: model and engine."""
    ((model, engine),) = from_measurements([m])
    return model, engine
