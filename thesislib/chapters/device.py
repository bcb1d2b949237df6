"""Chapter 7, on a device: what compressed models would do on eight devices, what they do on this one, and how wrong the projection is."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from thesislib.compress.gptq import Rtn
from thesislib.compress.plan import apply_plan
from thesislib.compress.width import Width
from thesislib.corpus import questions
from thesislib.device.measure import Agreement, Timing, agreement, as_measurement, gguf_file, prompt_ids, time_llama_cpp, time_transformers
from thesislib.errors import BadInput
from thesislib.evaluate.stats import proportion
from thesislib.experiment import DENSE
from thesislib.gguf_format import TYPES
from thesislib.prompts import adds_bos, default_prompt, prompt_for
from thesislib.records import Measurement, provenance
from thesislib.store import Store
from thesislib.subject import Subject, load_subject

TITLE = "on a device"
DEPTHS, FITTED = (30, 20, 10, 4), (30, 10)  # of predicted against measured: the line is fitted on two and held against the others
SAME, PROMPTS, TOKENS = "prompts with the same text", 10, 32
Results = Mapping[tuple[str, str], Measurement]  # by model and engine


def stand_in(subject: Subject, label: str) -> Subject:
    """A model with the shapes, zeros and bits of a label, made in seconds: which blocks, weights and values are kept changes no cost.

    D2: the blocks before the last are left out. W2:4: by magnitude. Q: rounded to 4 bits in groups of 64. W: nothing, since a merged adapter
    costs nothing.

    Raises:
        BadInput: a part of the label that is none of these.
    """
    result = subject
    for part in [] if label == DENSE else label.split("+"):
        if part[0] == "D" and part[1:].isdigit() and 0 < int(part[1:]) < result.depth:
            kept = result.depth - int(part[1:])
            result = apply_plan(result, [*range(kept - 1), result.depth - 1])
        elif part[0] == "W" and ":" in part:
            remove, of = part[1:].split(":")
            result, _ = Width(remove=int(remove), of=int(of), metric="magnitude").apply(result, data="embedded")
        elif part == "Q":
            result, _ = Rtn(bits=4, group=64).apply(result)
        elif part != "W":
            raise BadInput(f"'{part}' of '{label}' has no stand-in: expected parts such as D4, W2:4, W and Q")
    return result


# ---------------------------------------------------------------- recorded runs


@dataclass(frozen=True)
class Case:
    """A model in an engine. kind: a GGUF type for llama.cpp, or float32 or bfloat16 for transformers."""

    label: str
    kind: str

    @property
    def engine(self) -> str:
        """As `Timing.engine` has it."""
        return f"{'llama.cpp' if self.kind in TYPES else 'transformers'} {self.kind}"


def depth_label(subject: Subject | int, depth: int) -> str:
    """The label of a model with so many of a subject's blocks."""
    most = subject if isinstance(subject, int) else subject.depth
    return DENSE if depth == most else f"D{most - depth}"


MODELS = (DENSE, "D4+W", "D8", "W2:4+W", "W+Q", "D4+W+Q", "W2:4+W+Q", "D4+W2:4+W+Q")


def cases(depth: int) -> list[Case]:
    """All that is measured, for a subject of `depth` blocks: four formats by four depths, the chapter's models, and transformers beside them."""
    found = [Case(depth_label(depth, round(depth * d / DEPTHS[0])), kind) for kind in TYPES for d in DEPTHS]
    found += [Case(label, "Q8_0") for label in MODELS[1:]] + [Case("W2:4+W", "F16"), Case("W2:4+W", "Q4_0")]
    found += [Case(label, kind) for label in (DENSE, "D8", "W2:4+W", "W+Q") for kind in ("float32", "bfloat16")]
    return list(dict.fromkeys(found))


def measure(p: "DeviceChapter", store: Callable[[Measurement], object], done: Iterable[tuple[str, str]] = ()) -> None:
    """Measure what is missing, each result handed to `store` as it comes."""
    done = set(done)
    exact = load_subject(p.subject, "float32")
    held: tuple[str, Subject] = ("", exact)
    ids = prompt_ids(exact, p.prompt)
    for case in sorted(cases(exact.depth), key=lambda c: c.label):
        if (case.label, case.engine) in done:
            continue
        started = time.perf_counter()
        if case.kind in TYPES:
            if held[0] != case.label:
                held = (case.label, stand_in(exact, case.label))
            model = held[1]
            timing: Timing = time_llama_cpp(gguf_file(model, case.kind), ids, p.tokens, p.repeats)
        else:
            model = stand_in(load_subject(p.subject, case.kind), case.label)
            timing = time_transformers(model, ids, p.tokens, p.repeats)
        m = as_measurement(model, timing, started)
        store(_noted(m, case.label, case.engine))
        print(case.label, case.engine, f"{1e3 * m.value:.2f} ms,", timing.verdict, file=sys.stderr, flush=True)
    if (DENSE, SAME) not in done:
        store(_noted(same_text(exact), DENSE, SAME))


def same_text(subject: Subject, tokens: int = TOKENS) -> Measurement:
    """On how many of ten questions the F16 file in llama.cpp writes what the subject writes in transformers, token by token."""
    started = time.perf_counter()
    asked = questions("embedded", open_book=False, limit=PROMPTS, seed=0)
    texts = [prompt_for(subject, q, default_prompt(subject)) for q in asked]
    prompts = [subject.tokenizer(t, add_special_tokens=adds_bos(subject, t))["input_ids"] for t in texts]
    found: list[Agreement] = agreement(subject, gguf_file(subject, "F16"), prompts, tokens)
    same = sum(a.same == a.of for a in found)
    low, high = proportion(same, len(found))
    items = [{"id": q.id, **dataclasses.asdict(a)} for q, a in zip(asked, found, strict=True)]
    made = provenance(subject, started, tokens=tokens, file="F16", cache="F32")
    return Measurement("greedy text, llama.cpp F16 against transformers float32", SAME, same / len(found), low, high, len(found), "prompt", items, {}, made)


def _noted(m: Measurement, label: str, engine: str) -> Measurement:
    note = {"made": {"label": label, "bytes": {}}, "chapter": {"model": label, "engine": engine}}
    return dataclasses.replace(m, provenance={**m.provenance, **note})


@dataclass(frozen=True)
class DeviceChapter:
    """Parameters of chapter 7.

    subject: a subject spec. devices: names of files in hw/devices, or paths of others. prompt: tokens that are read at once. context: tokens in the cache
    when one is generated. tokens, repeats: what a measurement decodes after the first token, and how often.
    """

    subject: str = "embedded"
    devices: list[str] = dataclasses.field(default_factory=lambda: ["siracusa", "gap9", "k1", "pi4", "pi5", "orin_nano", "laptop", "host"])
    prompt: int = 128
    context: int = 128
    tokens: int = 32
    repeats: int = 7


def from_measurements(found: Iterable[Measurement]) -> Results:
    """The measurements by model and engine.

    Raises:
        BadInput: not this chapter's.
    """
    try:
        return MappingProxyType({(m.provenance["chapter"]["model"], m.provenance["chapter"]["engine"]): m for m in found})
    except (KeyError, TypeError) as error:
        raise BadInput(f"these are not the results of chapter 7 ({error})") from error


def read_recorded(path: Path) -> Results:
    """A recorded run."""
    return from_measurements(Store(path).rows().values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a recorded run: `python -m thesislib.chapters.device --out FILE.jsonl`. Started again it goes on where it was."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subject", default=DeviceChapter.subject)
    given = parser.parse_args(arguments)
    store = Store(given.out)
    measure(DeviceChapter(subject=given.subject), store.append, read_recorded(given.out) if given.out.exists() else ())


if __name__ == "__main__":
    main()
