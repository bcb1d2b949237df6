"""Chapter 5, quantisation and compensation: which settings are tried, in which cell of the chapter, and what is
measured of each."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from thesislib.chapters.chapter import CLOSED, OPEN, Keep, Key, Part
from thesislib.compress.calibration import ALL_AT_ONCE, Statistics, Visitor, stream
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.layerwise import layer_errors
from thesislib.compress.lora.stage import Lora
from thesislib.config import positive
from thesislib.errors import BadInput
from thesislib.evaluate.generate import complete
from thesislib.evaluate.setup import Setup
from thesislib.experiment import DENSE, prepare, recipe_hash, recipe_of
from thesislib.files import write_whole
from thesislib.formats.options import check_dtype
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape, parse_label
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources import corpus

PPL, HELD_OUT = "perplexity", "held-out perplexity"
# GPTQ as it is usually set up. Its paper's code has an integer zero-point by default, whole rows, and 128 windows of
# 2,048 tokens
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
MORE: dict = {
    "text": "wikipedia",
    "windows": 128,
}  # calibration on the kind of text that is measured on, and four times as much of it
BUDGET = 19_537_920  # bytes of EoRA's corrections at rank 32 of the embedded subject, for a budget to be compared with
RATES = (
    2e-3,
    2e-4,
)  # of training from either start: the first suits a start at zero, and may be too fast for one that is not
SHAPES = {8: (64,), 4: (32, 64, "row"), 3: (32, 64), 2: (64,)}  # groups tried at each number of bits


@dataclass(frozen=True)
class QuantChapter:
    """Parameters of chapter 5.

    subject, data: specs. dtype, device: see `load_subject`. bits: of the chapter's table; group: weights that share a
    scale. calibration: windows of length tokens of web text that GPTQ and EoRA see. rank: of EoRA. windows: that
    perplexity is measured on (None: the whole text); held_out: windows of embedded Wikipedia text, on which settings
    are compared and chosen. questions, passages: of TriviaQA. tokens: of a completion of prompt.
    """

    subject: str = "embedded"
    data: str = "embedded"
    dtype: str = "bfloat16"
    device: str = "cpu"
    bits: list | None = None
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
        object.__setattr__(self, "bits", [4] if self.bits is None else self.bits)
        names = ("group", "length", "calibration", "rank", "windows", "held_out", "questions", "passages", "tokens")
        positive(**{name: getattr(self, name) for name in names})
        check_dtype(self.dtype)
        for bits in self.bits:
            self.rtn(bits)

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which one of the table's models cannot be made."""
        for c in table(self):
            recipe_of(c.stages).check(shape)

    def rtn(self, bits: int, **settings) -> Rtn:
        """Rounding, by default on the grid of the chapter's best settings."""
        return Rtn(**{"bits": bits, "group": self.group, "grid": BEST["grid"], "clip": BEST["clip"], **settings})

    def gptq(self, bits: int, **settings) -> Gptq:
        """GPTQ, by default with the chapter's best settings; on as many tokens where the windows' length is another."""
        shared = {"bits": bits, "group": self.group, "windows": self.calibration, "length": self.length}
        found = {**shared, **BEST, **settings}
        if found["length"] != self.length:
            found["windows"] = max(1, found["windows"] * self.length // found["length"])
        return Gptq(**found)

    def eora(self, **settings) -> Eora:
        """EoRA."""
        return Eora(
            **{
                **({} if "bytes" in settings else {"rank": self.rank}),
                "windows": self.calibration,
                "length": self.length,
                **settings,
            }
        )

    def protocols(self) -> dict[str, tuple[Setup, str]]:
        """{what: (protocol, data)}."""
        return {
            PPL: (Setup("wikitext", length=self.length, limit=self.windows), self.data),
            HELD_OUT: (Setup("wikitext", length=self.length, limit=self.held_out), "embedded"),
            CLOSED: (Setup("trivia", limit=self.questions), self.data),
            OPEN: (Setup("trivia_open", limit=self.passages), self.data),
        }


@dataclass(frozen=True)
class Configuration:
    """One model of the chapter. What its stages say is asked of them; its name is for readers only.

    Attributes:
        cell: the question it answers.
        name: what it is called there.
        stages: how it is made.
        measured: what is measured of it.
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
        """What tells its results from others': the same stages in two cells are one model."""
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
    """The first that is as wanted: pick(table(p), method="GPTQ", bits=4, corrected=False)."""
    return next(c for c in configs if all(getattr(c, name) == value for name, value in wanted.items()))


# ---------------------------------------------------------------- the chapter's questions, each a list of
# configurations


def table(
    p: QuantChapter, grids: Iterable[str] = ("asymmetric",), measured: tuple = (PPL, HELD_OUT, CLOSED, OPEN)
) -> list[Configuration]:
    """Bits by method: rounding and GPTQ, each without and with EoRA on top."""
    found = [Configuration("table", DENSE, (), measured)]
    for bits in p.bits:
        for grid in grids:
            for name, stage in (
                (f"rounding {bits}-bit {grid}", p.rtn(bits, grid=grid)),
                (f"GPTQ {bits}-bit {grid}", p.gptq(bits, grid=grid)),
            ):
                found += [
                    Configuration("table", name, (stage,), measured),
                    Configuration("table", f"{name} + EoRA", (stage, p.eora()), measured),
                ]
    return found


def shapes(p: QuantChapter) -> list[Configuration]:
    """Bits by group, rounding and GPTQ."""
    found = []
    for bits, groups in SHAPES.items():
        for group in groups:
            found += [
                Configuration("shapes", f"rounding, {bits} bits, group {group}", (p.rtn(bits, group=group),)),
                Configuration("shapes", f"GPTQ, {bits} bits, group {group}", (p.gptq(bits, group=group),)),
            ]
    return found


def alone(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """Rounding, the plain recipe, each ingredient of it changed alone, and rounding with an integer zero-point."""
    found = [
        Configuration("alone", "rounding, symmetric, no clipping", (p.rtn(bits, grid="symmetric", clip="none"),)),
        Configuration("alone", "the plain recipe", (p.gptq(bits, **PLAIN),)),
    ]
    for title, (key, values) in INGREDIENTS.items():
        found += [
            Configuration("alone", f"{title}: {value}", (p.gptq(bits, **{**PLAIN, key: value}),), varied=title)
            for value in values
        ]
    return [*found, Configuration("alone", "rounding, integer zero-point, no clipping", (p.rtn(bits, clip="none"),))]


def without(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """The best settings, and each ingredient taken back to the plain recipe's or, where the two agree, changed."""
    found = [Configuration("without", "all of them", (p.gptq(bits),))]
    for title, (key, (value, *_)) in INGREDIENTS.items():
        if key in PLAIN and PLAIN[key] != BEST[key]:
            found.append(
                Configuration("without", f"without {title}", (p.gptq(bits, **{key: PLAIN[key]}),), varied=title)
            )
        elif key != "group":
            found.append(Configuration("without", f"with {title} {value}", (p.gptq(bits, **{key: value}),)))
    return found


def kinds(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """One kind of projection quantised and all others as they were: rounding and the plain recipe."""
    found = []
    for kind in LINEARS:
        rounding = p.rtn(bits, grid="symmetric", clip="none", linears=(kind,))
        for name, stage in (("rounding", rounding), ("GPTQ", p.gptq(bits, **PLAIN, linears=(kind,)))):
            found.append(Configuration("kinds", f"{kind}, {name}", (stage,), varied=kind))
    return found


def calibrations(
    p: QuantChapter, bits: int = 4, amounts: Iterable[int] = (4, 32), seeds: Iterable[int] = (0, 1, 2)
) -> list[Configuration]:
    """The best settings on more and less text, and on other windows of it."""
    found = [Configuration("calibrations", f"{n} windows", (p.gptq(bits, windows=n),)) for n in amounts]
    return found + [
        Configuration("calibrations", f"{p.calibration} windows, seed {s}", (p.gptq(bits, seed=s),), varied="seed")
        for s in seeds
    ]


def search(p: QuantChapter, bits: int = 3) -> list[Configuration]:
    """How `MORE` was found, at 3 bits on held-out text: the table's calibration, and what else was tried."""
    tried = {
        "more of it": {"windows": MORE["windows"]},
        "Wikipedia": {"text": MORE["text"]},
        "more of Wikipedia": MORE,
        "damping 0.1": {"damping": 0.1},
    }
    return [
        Configuration("search", "the table's", (p.gptq(bits),)),
        *(Configuration("search", name, (p.gptq(bits, **s),)) for name, s in tried.items()),
    ]


def more(p: QuantChapter, bits: int = 3) -> list[Configuration]:
    """The best settings on more and nearer calibration text, GPTQ's and EoRA's: what the table's bars at 3 bits
    needed."""
    stage, name = (
        p.gptq(bits, **MORE),
        f"GPTQ {bits}-bit asymmetric, {MORE['windows']} windows of {MORE['text'].capitalize()}",
    )
    return [
        Configuration("more", name, (stage,), (PPL, HELD_OUT)),
        Configuration("more", f"{name} + EoRA", (stage, p.eora(**MORE)), (PPL, HELD_OUT)),
    ]


def compensations(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """EoRA's own choices: whose inputs, how tokens count, a byte budget instead of one rank; on GPTQ and on
    rounding."""
    found = []
    for name, base in (("GPTQ", p.gptq(bits)), ("rounding", p.rtn(bits))):
        found += [
            Configuration("compensations", name, (base,)),
            Configuration("compensations", f"{name} + EoRA", (base, p.eora())),
            Configuration(
                "compensations", f"{name} + EoRA, tokens by unit norm", (base, p.eora(weighting="unit_norm"))
            ),
        ]
    base = p.gptq(bits)
    return [
        *found,
        Configuration("compensations", "GPTQ + EoRA, the original's inputs", (base, p.eora(inputs="original"))),
        Configuration("compensations", f"GPTQ + EoRA, {BUDGET / 1e6:.1f} MB shared out", (base, p.eora(bytes=BUDGET))),
    ]


def ranks(p: QuantChapter, bits: int = 3, tried: Iterable[int] = (8, 32, 128)) -> list[Configuration]:
    """EoRA's rank on GPTQ."""
    base = p.gptq(bits)
    found = [Configuration("rank", "0", (base,))]
    return found + [Configuration("rank", str(rank), (base, p.eora(rank=rank))) for rank in tried]


def pruned(p: QuantChapter, labels: Iterable[str] = ("W2:4", "D4"), bits: int = 4) -> list[Configuration]:
    """Pruned models, quantised and compensated."""
    found = []
    for label in labels:
        before = parse_label(label).stages
        grid = "symmetric" if any(stage.word == "width" for stage in before) else "asymmetric"  # which keeps zeros
        for name, stages in ((label, ()), (f"{label}, rounding", (p.rtn(bits, grid=grid),)), (f"{label}, "
            "GPTQ", (p.gptq(bits, grid=grid),)),
                             (f"{label}, GPTQ + EoRA", (p.gptq(bits, grid=grid), p.eora()))):  # fmt: skip
            found.append(Configuration("pruned", name, (*before, *stages), varied=label))
    return found


def starts(
    p: QuantChapter, bits: int = 3, steps: int = 16, seeds: Iterable[int] = (0, 1, 2), rates: Iterable[float] = RATES
) -> list[Configuration]:
    """LoRA on a quantised model, started as usual and from EoRA's correction, at equal rank and steps; each at two
    learning rates."""
    found = []
    for rate in rates:
        for seed in seeds:
            training = Lora(
                rank=p.rank,
                alpha=p.rank,
                linears="*",
                learning_rate=rate,
                steps=steps,
                batch=2,
                accumulate=1,
                every=8,
                validation=8,
                checkpoint_every=8,
                seed=seed,
            )
            found += [
                Configuration("start", f"usual, rate {rate:g}, seed {seed}", (p.gptq(bits), training)),
                Configuration(
                    "start",
                    f"EoRA, rate {rate:g}, seed {seed}",
                    (p.gptq(bits), p.eora(), dataclasses.replace(training, init="eora")),
                ),
            ]
    return found


Results = Mapping[tuple[str | None, str], Measurement]


def measure(
    configs: Iterable[Configuration], p: QuantChapter, done: Results | None = None, found: Callable | None = None
) -> dict:
    """{(the stages' hash, what): measurement} of each configuration; see `thesislib.chapters.ch04_runs.measure`."""
    results = dict(done or {})
    for c in tqdm([*configs], desc="quantisation", unit="model", disable=None, leave=False):
        todo = [what for what in c.measured if (c.key, what) not in results]
        if not todo:
            continue
        ready = prepare(p.subject, c.stages, data=p.data, dtype=p.dtype, device=p.device)
        text = complete(ready.model, p.prompt, p.tokens).text if CLOSED in c.measured else ""
        for what in todo:
            protocol, data = p.protocols()[what]
            m = ready.measure(protocol, data, chapter={"cell": c.cell, "name": c.name, "what": what, "text": text})
            results[c.key, what] = m
            if found:
                found(m)
    return results


def models(p: QuantChapter, configs: Iterable[Configuration]) -> dict[str, Subject]:
    """{name: subject}, out of the cache where it has them; weights packed as they are kept."""
    return {c.name: prepare(p.subject, c.stages, data=p.data, dtype=p.dtype, device=p.device).model for c in configs}


def layers(p: QuantChapter, configs: Iterable[Configuration], windows: int = 8) -> dict[str, dict[str, float]]:
    """{name: {"blocks.B.PROJECTION": relative error of its output}} on held-out text, each projection by itself on the
    original's inputs."""
    (original,) = models(p, [Configuration("layers", DENSE)]).values()
    ids = corpus.windows(corpus.evaluation_text("embedded"), original.tokenizer, p.length, windows).ids
    found = layer_errors(original, models(p, configs), ids)
    return {
        name: {f"blocks.{b}.{kind}": round(error, 6) for (b, kind), error in errors.items()}
        for name, errors in found.items()
    }


def sink_shares(p: QuantChapter, windows: int = 4) -> dict[str, float]:
    """{"blocks.B.PROJECTION": the share of the trace of X^T X that the first tokens of windows of calibration text
    have}."""
    (original,) = models(p, [Configuration("sinks", DENSE)]).values()
    ids = corpus.calibration_windows(original.tokenizer, BEST["text"], p.data, windows, p.length)
    both = []
    for weighting in ("equal", "skip_1"):
        visitor = _Traces()
        stream(original, ids, visitor, weighting=weighting, feed="original", title="sinks")
        both.append(visitor.traces)
    whole, rest = both
    return {place: 1 - rest[place] / whole[place] for place in whole}


class _Traces(Visitor):
    groups = ALL_AT_ONCE

    def __init__(self):
        self.traces: dict[str, float] = {}

    def change(self, block: int, linears: Mapping[str, nn.Module], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`; it changes nothing."""
        self.traces |= {f"blocks.{block}.{name}": float(s.squares.sum()) for name, s in statistics.items()}


def from_measurements(found: Iterable[Measurement]) -> dict[tuple[str | None, str], Measurement]:
    """The results, by the stages' hash and what was measured.

    Raises:
        BadInput: not this chapter's.
    """
    try:
        return {(m.made["recipe"], m.chapter["what"]): m for m in found}
    except (KeyError, TypeError) as error:
        raise BadInput(f"these are not the results of chapter 5 ({error})") from error


def read_recorded(path: Path) -> Results:
    """A recorded run; the dense model on the test text and its answers are chapter 0's and chapter 4's, on the same
    items."""
    found = from_measurements(Store(path).rows().values())
    measures, lora = (
        list(Store(path.with_name(f"{name}.jsonl")).rows().values()) for name in ("00_measures", "04_lora_recovery")
    )
    dense = {PPL: [m for m in measures if m.metric == "perplexity" and m.settings["length"] == 512]}
    of_dense = [m for m in lora if m.label == DENSE]
    dense |= {what: [m for m in of_dense if m.chapter["what"] == what] for what in (CLOSED, OPEN)}
    noted = {
        what: dataclasses.replace(ms[0], provenance={"chapter": {"what": what}, **ms[0].provenance})
        for what, ms in dense.items()
        if ms
    }
    return {(None, what): m for what, m in noted.items()} | found


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
    found = []
    for c in table(p):
        tested, answers = c.method == "GPTQ", c.method == "GPTQ" and c.bits == 4
        found.append(
            dataclasses.replace(
                c, measured=(*((PPL,) if tested else ()), HELD_OUT, *((CLOSED, OPEN) if answers else ()))
            )
        )
    return found


def recorded_configurations(p: QuantChapter) -> list[Configuration]:
    """All that the recorded run measures: what settings are chosen by first."""
    q = dataclasses.replace(p, calibration=ABLATION)
    symmetric = [c for c in table(q, ("symmetric",), (HELD_OUT,)) if not c.corrected]
    chosen = [*alone(q), *without(q), *recorded_table(p), *search(p), *more(p)]
    return [
        *chosen,
        *compensations(q),
        *kinds(q),
        *starts(q),
        *ranks(q),
        *pruned(q),
        *calibrations(q),
        *symmetric,
        *shapes(q),
    ]


def layers_file(path: Path) -> Path:
    """Where a recorded run keeps its layer errors."""
    return path.with_name(f"{path.stem}_layers.json")


def recorded_parts(p: QuantChapter, file: Path) -> Iterator[Part]:
    """Each configuration by itself; then the errors of single layers, in a file beside the record."""
    items = {PPL: p.windows, HELD_OUT: p.held_out, CLOSED: p.questions, OPEN: p.passages}
    for c in recorded_configurations(p):

        def make(missing: Collection[Key], keep: Keep, c: Configuration = c) -> None:
            measure(
                [c], p, {(c.key, what): None for what in c.measured if (_label(c), c.key, what) not in missing}, keep
            )

        yield Part(
            f"{c.key} {' '.join(c.measured)}", {(_label(c), c.key, what): items[what] for what in c.measured}, make
        )
    yield Part("layers", {}, lambda *_: _write_layers(p, file), layers_file(file))


def _label(c: Configuration) -> str:
    return recipe_of(c.stages).label or DENSE


def _write_layers(p: QuantChapter, file: Path) -> None:
    q = dataclasses.replace(p, calibration=ABLATION)
    rounding, *_, gptq, both = (c for c in table(q) if c.bits == 4)
    named = {
        "rounding": rounding,
        "GPTQ, tokens equal": Configuration("layers", "", (q.gptq(4, weighting="equal"),)),
        "GPTQ": gptq,
        "GPTQ + EoRA": both,
    }
    found = layers(p, [dataclasses.replace(c, name=name) for name, c in named.items()])
    made = {
        "stages": {name: recipe_of(c.stages).entries() for name, c in named.items()},
        "text": "embedded",
        "windows": 8,
        "length": p.length,
    }
    write_whole(layers_file(file), json.dumps({"errors": found, **made}, indent=1) + "\n")


def key(m: Measurement) -> Key:
    """Of a row: label, hash of the stages, what was measured."""
    ((recipe, what),) = from_measurements([m])
    return m.label, recipe, what


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """The answers of the chapter's table, under its names."""
    names = {c.key: c.name for c in table(recorded_parameters())}
    for m in rows:
        _, recipe, what = key(m)
        if recipe in names and what not in (PPL, HELD_OUT):
            yield names[recipe], what, m
