"""Chapter 5, quantisation and compensation: which settings each cell tries, and what is measured of them."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from thesislib.chapters.chapter import (
    CLOSED,
    OPEN,
    WIKITEXT,
    Keep,
    Key,
    Parameters,
    Part,
    by_key,
    on_one_sample,
    recorded_stages,
)
from thesislib.chapters.pool import Recorded, largest, recorded_pool
from thesislib.compress.calibration import ALL_AT_ONCE, Statistics, Visitor, stream
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.layerwise import layer_errors
from thesislib.compress.lora.stage import Lora
from thesislib.evaluate.generate import complete
from thesislib.evaluate.setup import Setup
from thesislib.experiment import DENSE, prepare, recipe_hash, recipe_of
from thesislib.files import write_whole
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources import corpus

PPL, HELD_OUT = "perplexity", "held-out perplexity"
# GPTQ without act-order. Its paper's code also has an integer zero-point by default, whole rows, and `PAPER` tokens
PLAIN: dict = {
    "grid": "symmetric",
    "clip": "none",
    "act_order": "none",
    "damping": 0.01,
    "sequential": False,
    "weighting": "equal",
    "text": "c4",
}
BEST: dict = {
    "grid": "asymmetric",
    "clip": "squared",
    "act_order": "static",
    "damping": 0.01,
    "sequential": True,
    "weighting": "unit_norm",
    "text": "c4",
}
# GPTQModel's defaults for 4 bits on a symmetric grid (see benchmarks.gptqmodel)
GPTQMODEL: dict = {**PLAIN, "act_order": "groups", "damping": 0.05, "sequential": True}
PAPER: dict = {"windows": 128, "length": 2048}  # the calibration of GPTQ's paper
# every ingredient, and what it can be instead of the plain recipe's; the first is what the chapter's best settings have
INGREDIENTS = {
    "token weighting": ("weighting", ("unit_norm", "first_16", "skip_1")),
    "act-order": ("act_order", ("static", "index")),
    "clipping": ("clip", ("squared",)),
    "sequential order": ("sequential", (True,)),
    "integer zero-point": ("grid", ("asymmetric",)),
    "damping": ("damping", (0.1,)),
    "calibration text": ("text", ("wikipedia",)),
    "window length": ("length", (2048,)),
    "group": ("group", (32,)),
}
# calibration on the kind of text that is measured on, and four times as much of it
MORE: dict = {"text": "wikipedia", "windows": 128}
BUDGET = 19_537_920  # bytes of EoRA's corrections at rank 32 of the embedded subject, for a budget to be compared with
EQUAL_RANK = 22  # of EoRA on 4 bits: with it the embedded subject takes as many bytes as at 5 bits
RATES = (2e-3, 2e-4)  # of training: the first suits a start at zero, and may be too fast for one that is not
SHAPES = {8: (64,), 4: (32, 64, "row"), 3: (32, 64), 2: (64,)}  # groups tried at each number of bits


@dataclass(frozen=True)
class QuantChapter(Parameters):
    """Parameters of chapter 5.

    Attributes:
        bits: of the chapter's table.
        group: weights of a row that share a scale.
        length: tokens in a window.
        calibration: windows of web text that GPTQ and EoRA see.
        rank: of EoRA.
        windows: that perplexity is measured on; None for the whole text.
        held_out: windows of embedded Wikipedia text, on which settings are compared and chosen.
        questions: of TriviaQA, closed book.
        passages: of TriviaQA, open book.
        tokens: of a completion.
        prompt: what is completed.
    """

    bits: list = field(default_factory=lambda: [4])
    group: int = 64
    length: int = 512
    calibration: int = 4
    rank: int = 32
    windows: int | None = 6
    held_out: int = 6
    questions: int = 24
    passages: int = 8
    tokens: int = 30
    prompt: str = "Once upon a time"

    def __post_init__(self):
        super().__post_init__()
        for bits in self.bits:
            self.rtn(bits)

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which one of the table's models cannot be made."""
        for c in main_models(self):
            recipe_of(c.stages).check(shape)

    def rtn(self, bits: int, **settings) -> Rtn:
        """Rounding, by default on the grid of the chapter's best settings."""
        return Rtn(**{"bits": bits, "group": self.group, "grid": BEST["grid"], "clip": BEST["clip"], **settings})

    def gptq(self, bits: int, **settings) -> Gptq:
        """GPTQ, by default with the chapter's best settings; on as many tokens where the windows' length is another."""
        own = {"bits": bits, "group": self.group, "windows": self.calibration, "length": self.length}
        values = {**own, **BEST, **settings}
        if values["length"] != self.length:
            values["windows"] = max(1, values["windows"] * self.length // values["length"])
        return Gptq(**values)

    def eora(self, **settings) -> Eora:
        """EoRA, by default of the chapter's rank; with `bytes` of no rank."""
        size = {} if "bytes" in settings else {"rank": self.rank}
        return Eora(**{**size, "windows": self.calibration, "length": self.length, **settings})

    def protocols(self) -> dict[str, tuple[Setup, str]]:
        """{task: (setup, data)}."""
        return {
            PPL: (Setup("wikitext", length=self.length, limit=self.windows), self.data),
            HELD_OUT: (Setup("wikitext", length=self.length, limit=self.held_out), "embedded"),
            CLOSED: (Setup("trivia", limit=self.questions), self.data),
            OPEN: (Setup("trivia_open", limit=self.passages), self.data),
        }


@dataclass(frozen=True)
class Configuration:
    """One model of the chapter. Its name is for readers only: settings are read from its stages.

    Attributes:
        cell: the question it answers.
        name: in the chapter's tables.
        stages: that make it.
        measured: tasks.
        varied: what the cell varies where the stages do not say: an ingredient, a kind of projection, a pruned model,
            the seed of calibration.
    """

    cell: str
    name: str
    stages: tuple = ()
    measured: tuple = (HELD_OUT,)
    varied: str = ""

    @property
    def key(self) -> str | None:
        """The hash of its stages, by which results are kept: the same stages in two cells are one model."""
        return recipe_hash(recipe_of(self.stages))

    def _first(self, word: str, setting: str) -> Any:
        return next((getattr(stage, setting) for stage in self.stages if word in (stage.word, stage.family)), None)

    @property
    def method(self) -> str:
        """GPTQ or rounding; nothing if it is not quantised."""
        word = self._first("quantised", "word") or ""
        return {"gptq": "GPTQ", "rtn": "rounding"}.get(word, word)

    @property
    def bits(self) -> int | None:
        """Of its quantised weights."""
        return self._first("quantised", "bits")

    @property
    def group(self) -> int | str | None:
        """How many weights share a scale, or "row"."""
        return self._first("quantised", "group")

    @property
    def grid(self) -> str | None:
        """Symmetric, asymmetric, ..."""
        return self._first("quantised", "grid")

    @property
    def corrected(self) -> bool:
        """Whether EoRA follows."""
        return self._first("eora", "word") is not None

    @property
    def rank(self) -> int:
        """EoRA's; 0 without it."""
        return self._first("eora", "rank") or 0

    @property
    def rate(self) -> float | None:
        """The learning rate of its training."""
        return self._first("lora", "learning_rate")

    @property
    def seed(self) -> int | None:
        """Of its training."""
        return self._first("lora", "seed")

    @property
    def short(self) -> str:
        """GPTQ 4-bit + EoRA."""
        return f"{self.method} {self.bits}-bit{' + EoRA' * self.corrected}"


def pick(configs: Iterable["Configuration"], **wanted: object) -> "Configuration":
    """The first configuration with these values: pick(main_models(p), method="GPTQ", bits=4, corrected=False)."""
    return next(c for c in configs if all(getattr(c, name) == value for name, value in wanted.items()))


# ---------------------------------------------------------------- the chapter's questions, each a list of
# configurations


def main_models(
    p: QuantChapter, grids: Iterable[str] = ("asymmetric",), measured: tuple = (PPL, HELD_OUT, CLOSED, OPEN)
) -> list[Configuration]:
    """The chapter's table, bits by method: rounding and GPTQ, each without and with EoRA on top."""
    configs = [Configuration("table", DENSE, (), measured)]
    for bits in p.bits:
        for grid in grids:
            for method, stage in (("rounding", p.rtn(bits, grid=grid)), ("GPTQ", p.gptq(bits, grid=grid))):
                name = f"{method} {bits}-bit {grid}"
                configs += [
                    Configuration("table", name, (stage,), measured),
                    Configuration("table", f"{name} + EoRA", (stage, p.eora()), measured),
                ]
    return configs


def bits_by_group(p: QuantChapter) -> list[Configuration]:
    """Every number of bits with every group size of `SHAPES`, by rounding and by GPTQ."""
    return [
        Configuration("shapes", f"{method}, {bits} bits, group {group}", (make(bits, group=group),))
        for bits, groups in SHAPES.items()
        for group in groups
        for method, make in (("rounding", p.rtn), ("GPTQ", p.gptq))
    ]


def one_change(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """Rounding, the plain recipe, each ingredient of it changed alone, and rounding with an integer zero-point."""
    symmetric, asymmetric = p.rtn(bits, grid="symmetric", clip="none"), p.rtn(bits, clip="none")
    changed = [
        Configuration("alone", f"{title}: {value}", (p.gptq(bits, **{**PLAIN, key: value}),), varied=title)
        for title, (key, values) in INGREDIENTS.items()
        for value in values
    ]
    return [
        Configuration("alone", "rounding, symmetric, no clipping", (symmetric,)),
        Configuration("alone", "the plain recipe", (p.gptq(bits, **PLAIN),)),
        *changed,
        Configuration("alone", "rounding, integer zero-point, no clipping", (asymmetric,)),
    ]


def leave_one_out(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """The best settings, and each ingredient taken back to the plain recipe's or, where the two agree, changed."""
    configs = [Configuration("without", "all of them", (p.gptq(bits),))]
    for title, (key, (value, *_)) in INGREDIENTS.items():
        if key in PLAIN and PLAIN[key] != BEST[key]:
            stage = p.gptq(bits, **{key: PLAIN[key]})
            configs.append(Configuration("without", f"without {title}", (stage,), varied=title))
        elif key != "group":
            configs.append(Configuration("without", f"with {title} {value}", (p.gptq(bits, **{key: value}),)))
    return configs


def one_projection(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """One kind of projection quantised and all others as they were: by rounding and by the plain recipe."""
    configs = []
    for projection in LINEARS:
        rounding = p.rtn(bits, grid="symmetric", clip="none", linears=(projection,))
        for method, stage in (("rounding", rounding), ("GPTQ", p.gptq(bits, **PLAIN, linears=(projection,)))):
            configs.append(Configuration("kinds", f"{projection}, {method}", (stage,), varied=projection))
    return configs


def calibrations(
    p: QuantChapter, bits: int = 4, amounts: Iterable[int] = (4, 32), seeds: Iterable[int] = (0, 1, 2)
) -> list[Configuration]:
    """The best settings on more and less text, and on other windows of it."""
    return [
        *(Configuration("calibrations", f"{n} windows", (p.gptq(bits, windows=n),)) for n in amounts),
        *(
            Configuration("calibrations", f"{p.calibration} windows, seed {s}", (p.gptq(bits, seed=s),), varied="seed")
            for s in seeds
        ),
    ]


def on_the_test(p: QuantChapter) -> list[Configuration]:
    """What the table's models are held against on the whole test: rounding with and without clipping, GPTQ without
    act-order and in GPTQModel's order, calibration as large as the paper's, and 5 and 6 bits."""
    stages: dict[str, tuple] = {DENSE: ()}
    for bits in dict.fromkeys((*p.bits, 5, 6)):
        stages[f"rounding {bits}-bit"] = (p.rtn(bits, clip="none"),)
        stages[f"rounding {bits}-bit, clipped"] = (p.rtn(bits),)
        stages[f"GPTQ {bits}-bit"] = (p.gptq(bits),)
    plain, zero_point = p.gptq(4, **PLAIN), p.gptq(4, **{**PLAIN, "grid": "asymmetric"})
    stages |= {
        "GPTQ 4-bit, the paper's calibration": (dataclasses.replace(p.gptq(4), **PAPER),),
        f"GPTQ 4-bit + EoRA of rank {p.rank}": (p.gptq(4), p.eora()),
        f"GPTQ 4-bit + EoRA of rank {EQUAL_RANK}": (p.gptq(4), p.eora(rank=EQUAL_RANK)),
        "rounding 4-bit symmetric": (p.rtn(4, grid="symmetric", clip="none"),),
        "GPTQ 4-bit symmetric, the plain recipe": (plain,),
        "GPTQ 4-bit symmetric, the plain recipe, the paper's calibration": (dataclasses.replace(plain, **PAPER),),
        "GPTQ 4-bit, the plain recipe with a zero-point, the paper's calibration": (
            dataclasses.replace(zero_point, **PAPER),
        ),
        "GPTQ 4-bit symmetric, GPTQModel's settings": (p.gptq(4, **GPTQMODEL),),
    }
    return [Configuration("test", name, each, (PPL, HELD_OUT)) for name, each in stages.items()]


def calibration_search(p: QuantChapter, bits: int = 3) -> list[Configuration]:
    """How `MORE` was found, at 3 bits on held-out text: the table's calibration, and what else was tried."""
    tried = {
        "the table's": {},
        "more of it": {"windows": MORE["windows"]},
        "Wikipedia": {"text": MORE["text"]},
        "more of Wikipedia": MORE,
        "damping 0.1": {"damping": 0.1},
    }
    return [Configuration("search", name, (p.gptq(bits, **settings),)) for name, settings in tried.items()]


def more_calibration(p: QuantChapter, bits: int = 3) -> list[Configuration]:
    """The best settings on `MORE` calibration text, GPTQ's and EoRA's: what the table's bars at 3 bits needed."""
    stage, measured = p.gptq(bits, **MORE), (PPL, HELD_OUT)
    name = f"GPTQ {bits}-bit asymmetric, {MORE['windows']} windows of {MORE['text'].capitalize()}"
    return [
        Configuration("more", name, (stage,), measured),
        Configuration("more", f"{name} + EoRA", (stage, p.eora(**MORE)), measured),
    ]


def eora_choices(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """EoRA's own choices: whose inputs, how tokens count, a byte budget instead of one rank; on GPTQ and on
    rounding."""
    gptq = p.gptq(bits)
    stages: dict[str, tuple] = {}
    for name, base in (("GPTQ", gptq), ("rounding", p.rtn(bits))):
        stages[name] = (base,)
        stages[f"{name} + EoRA"] = (base, p.eora())
        stages[f"{name} + EoRA, tokens by unit norm"] = (base, p.eora(weighting="unit_norm"))
    stages["GPTQ + EoRA, the original's inputs"] = (gptq, p.eora(inputs="original"))
    stages[f"GPTQ + EoRA, {BUDGET / 1e6:.1f} MB shared out"] = (gptq, p.eora(bytes=BUDGET))
    return [Configuration("compensations", name, each) for name, each in stages.items()]


def eora_ranks(p: QuantChapter, bits: int = 3, tried: Iterable[int] = (8, 32, 128)) -> list[Configuration]:
    """EoRA's rank on GPTQ; 0 without it."""
    base = p.gptq(bits)
    corrected = [Configuration("rank", str(rank), (base, p.eora(rank=rank))) for rank in tried]
    return [Configuration("rank", "0", (base,)), *corrected]


def pruned_models(p: QuantChapter, labels: Iterable[str] = ("W2:4", "D4"), bits: int = 4) -> list[Configuration]:
    """Pruned models, quantised and compensated."""
    configs = []
    for label in labels:
        before = recorded_stages(label)
        grid = "symmetric" if any(stage.word == "width" for stage in before) else "asymmetric"  # which keeps zeros
        gptq = p.gptq(bits, grid=grid)
        models = {
            label: (),
            f"{label}, rounding": (p.rtn(bits, grid=grid),),
            f"{label}, GPTQ": (gptq,),
            f"{label}, GPTQ + EoRA": (gptq, p.eora()),
        }
        configs += [Configuration("pruned", name, (*before, *s), varied=label) for name, s in models.items()]
    return configs


def lora_starts(
    p: QuantChapter, bits: int = 3, steps: int = 16, seeds: Iterable[int] = (0, 1, 2), rates: Iterable[float] = RATES
) -> list[Configuration]:
    """LoRA on a quantised model, started as usual and from EoRA's correction, at equal rank and steps; each at two
    learning rates."""
    shared: dict[str, Any] = {"batch": 2, "accumulate": 1, "every": 8, "validation": 8, "checkpoint_every": 8}
    configs = []
    for rate in rates:
        for seed in seeds:
            lora = Lora(rank=p.rank, alpha=p.rank, linears="*", learning_rate=rate, steps=steps, seed=seed, **shared)
            from_eora = (p.gptq(bits), p.eora(), dataclasses.replace(lora, init="eora"))
            configs += [
                Configuration("start", f"usual, rate {rate:g}, seed {seed}", (p.gptq(bits), lora)),
                Configuration("start", f"EoRA, rate {rate:g}, seed {seed}", from_eora),
            ]
    return configs


Results = Mapping[tuple[str | None, str], Measurement]  # by the stages' hash and what was measured


def measure(
    configs: Iterable[Configuration], p: QuantChapter, done: Results | None = None, keep: Keep | None = None
) -> dict:
    """{(the stages' hash, task): measurement} of each configuration; see `thesislib.chapters.ch04_runs.measure`."""
    results = dict(done or {})
    for c in tqdm([*configs], desc="quantisation", unit="model", disable=None, leave=False):
        todo = [task for task in c.measured if (c.key, task) not in results]
        if not todo:
            continue
        ready = prepare(p.subject, c.stages, data=p.data, dtype=p.dtype, device=p.device)
        text = complete(ready.model, p.prompt, p.tokens).text if CLOSED in c.measured else ""
        for task in todo:
            protocol, data = p.protocols()[task]
            m = ready.measure(protocol, data, chapter={"cell": c.cell, "name": c.name, "what": task, "text": text})
            results[c.key, task] = m
            if keep:
                keep(m)
    return results


def models(p: QuantChapter, configs: Iterable[Configuration]) -> dict[str, Subject]:
    """{name: subject with packed weights}, from the cache where it has them."""
    return {c.name: prepare(p.subject, c.stages, data=p.data, dtype=p.dtype, device=p.device).model for c in configs}


def layers(p: QuantChapter, configs: Iterable[Configuration], windows: int = 8) -> dict[str, dict[str, float]]:
    """{name: {"blocks.B.PROJECTION": relative error of its output}} on held-out text.

    Each projection is measured by itself, on the original's inputs.
    """
    (original,) = models(p, [Configuration("layers", DENSE)]).values()
    ids = corpus.windows(corpus.evaluation_text("embedded"), original.tokenizer, p.length, windows).ids
    return {
        name: {f"blocks.{b}.{projection}": round(error, 6) for (b, projection), error in errors.items()}
        for name, errors in layer_errors(original, models(p, configs), ids).items()
    }


def sink_shares(p: QuantChapter, windows: int = 4) -> dict[str, float]:
    """{"blocks.B.PROJECTION": share of the trace of X^T X that is the first tokens' of calibration windows}."""
    (original,) = models(p, [Configuration("sinks", DENSE)]).values()
    ids = corpus.calibration_windows(original.tokenizer, BEST["text"], p.data, windows, p.length)
    whole, rest = _Traces(), _Traces()
    for visitor, weighting in ((whole, "equal"), (rest, "skip_1")):
        stream(original, ids, visitor, weighting=weighting, feed="original", title="sinks")
    return {name: 1 - rest.traces[name] / trace for name, trace in whole.traces.items()}


class _Traces(Visitor):
    groups = ALL_AT_ONCE

    def __init__(self):
        self.traces: dict[str, float] = {}

    def change(self, block: int, linears: Mapping[str, nn.Module], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`; it changes nothing."""
        self.traces |= {f"blocks.{block}.{name}": float(s.squares.sum()) for name, s in statistics.items()}


def from_measurements(measurements: Iterable[Measurement]) -> dict[tuple[str | None, str], Measurement]:
    """The results, by the stages' hash and what was measured.

    Raises:
        BadInput: not this chapter's.
    """
    return by_key(measurements, lambda m: (m.made["recipe"], m.chapter["what"]), 5)


def read_recorded(path: Path) -> Recorded:
    """A recorded run. The dense model's perplexity is the one that all chapters quote; its answers are chapter 4's, on
    the same items."""
    lora = Store(path.with_name("04_lora_recovery.jsonl")).rows().values()
    dense = {(None, m.chapter["what"]): m for m in lora if m.label == DENSE and m.chapter["what"] in (CLOSED, OPEN)}
    pool = recorded_pool(path.parent)
    for m in largest(pool, WIKITEXT, [DENSE]).values():
        dense[None, PPL] = m.with_provenance(chapter={"what": PPL})
    return Recorded(dense | from_measurements(on_one_sample(Store(path).rows().values(), key).values()), pool)


RECORDED = {
    "bits": [4, 3],
    "calibration": 32,
    "windows": None,
    "held_out": 24,
    "questions": 200,
    "passages": 64,
    "tokens": 40,
}
ABLATION = 16  # calibration windows of all but the table: settings are compared with each other, at half the price


def recorded_parameters(**settings) -> QuantChapter:
    """The parameters of the recorded run's table."""
    return QuantChapter(**{**RECORDED, **settings})


def ablation_parameters(**settings) -> QuantChapter:
    """The parameters of all that the recorded run compares on held-out text."""
    return recorded_parameters(calibration=ABLATION, **settings)


def recorded_table(p: QuantChapter) -> list[Configuration]:
    """The recorded run's table: on the test text what its bars need, answers of two, the rest on held-out text."""

    def measured(c: Configuration) -> tuple[str, ...]:
        if c.method != "GPTQ":
            return (HELD_OUT,)
        return (PPL, HELD_OUT, CLOSED, OPEN) if c.bits == 4 else (PPL, HELD_OUT)

    return [dataclasses.replace(c, measured=measured(c)) for c in main_models(p)]


def recorded_configurations(p: QuantChapter) -> list[Configuration]:
    """All that the recorded run measures, those first by which settings are chosen."""
    q = dataclasses.replace(p, calibration=ABLATION)
    symmetric = [c for c in main_models(q, ("symmetric",), (HELD_OUT,)) if not c.corrected]
    chosen = [*one_change(q), *leave_one_out(q), *recorded_table(p), *calibration_search(p), *more_calibration(p)]
    compared = [*eora_choices(q), *one_projection(q), *lora_starts(q), *eora_ranks(q), *pruned_models(q)]
    # the dense model's perplexity on the test is chapter 0's
    test = [c for c in on_the_test(p) if c.stages]
    return [*chosen, *compared, *calibrations(q), *symmetric, *bits_by_group(q), *test]


def layers_file(path: Path) -> Path:
    """Where a recorded run keeps its layer errors."""
    return path.with_name(f"{path.stem}_layers.json")


def sinks_file(path: Path) -> Path:
    """Where a recorded run keeps the first tokens' shares of X^T X, see `sink_shares`."""
    return path.with_name(f"{path.stem}_sinks.json")


def recorded_parts(p: QuantChapter, file: Path) -> Iterator[Part]:
    """Each configuration by itself; then the errors of single layers and the first tokens' shares, in files beside the
    record."""
    items = {PPL: p.windows, HELD_OUT: p.held_out, CLOSED: p.questions, OPEN: p.passages}
    for c in recorded_configurations(p):
        rows: dict[Key, int | None] = {(_label(c), c.key, task): items[task] for task in c.measured}

        def make(missing: Collection[Key], keep: Keep, c: Configuration = c, rows: Mapping = rows) -> None:
            measure([c], p, {key[1:]: None for key in rows if key not in missing}, keep)

        planned = {key: (c.stages, *p.protocols()[key[2]]) for key in rows}
        yield Part(f"{c.key} {' '.join(c.measured)}", rows, make, planned=planned)
    yield Part("layers", {}, lambda *_: _write_layers(p, file), layers_file(file))
    yield Part("sinks", {}, lambda *_: _write_sinks(p, file), sinks_file(file))


def _label(c: Configuration) -> str:
    return recipe_of(c.stages).label or DENSE


def _write_layers(p: QuantChapter, file: Path) -> None:
    q = dataclasses.replace(p, calibration=ABLATION)
    rounding, *_, gptq, both = (c for c in main_models(q) if c.bits == 4)
    stages = {
        "rounding": rounding.stages,
        "GPTQ, tokens equal": (q.gptq(4, weighting="equal"),),
        "GPTQ": gptq.stages,
        "GPTQ + EoRA": both.stages,
    }
    facts = {
        "errors": layers(p, [Configuration("layers", name, each) for name, each in stages.items()]),
        "stages": {name: recipe_of(each).entries() for name, each in stages.items()},
        "text": "embedded",
        "windows": 8,
        "length": p.length,
    }
    write_whole(layers_file(file), json.dumps(facts, indent=1) + "\n")


def _write_sinks(p: QuantChapter, file: Path) -> None:
    shares = {name: round(share, 6) for name, share in sink_shares(p, ABLATION).items()}
    facts = {"shares": shares, "text": BEST["text"], "windows": ABLATION, "length": p.length}
    write_whole(sinks_file(file), json.dumps(facts, indent=1) + "\n")


def key(m: Measurement) -> Key:
    """Label, hash of the stages, and task."""
    ((recipe, task),) = from_measurements([m])
    return m.label, recipe, task
