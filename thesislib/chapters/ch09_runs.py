"""Chapter 9, low rank: which pairs, paths and neighbours are made, and what of them is measured."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from thesislib.chapters import ch09_spectra
from thesislib.chapters.chapter import Keep, Key, Parameters, Part, by_key, on_one_sample
from thesislib.chapters.pool import Recorded, recorded_pool
from thesislib.compress.calibration import INPUTS
from thesislib.compress.calr import MLP, Calr
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.laco import Laco
from thesislib.compress.lora.stage import Lora
from thesislib.compress.lowrank import LowRankStage, Metrics, metrics_of
from thesislib.compress.selection import selected
from thesislib.compress.slicing import Slice
from thesislib.compress.stage import Stage
from thesislib.compress.streamline import Streamline
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.experiment import DENSE, Prepared, build_history, recipe_hash, recipe_of
from thesislib.files import cache_dir
from thesislib.formats.load import load_subject
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.layers import LINEARS
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store

NOTEBOOK = "09_low_rank"
PPL, HELD_OUT = "perplexity", "held-out perplexity"
TASKS = ("arc_easy", "piqa", "hellaswag")
METHODS = ("svd", "fwsvd", "asvd", "svd_llm", "nsvd")  # on the original model's inputs
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
MORE = 1.18  # times the rank: pairs alone, with the parameters of pairs of that rank and a path of it (7488 / 6336)


@dataclass(frozen=True)
class LowRankChapter(Parameters):
    """Parameters of chapter 9.

    Attributes:
        keep: the share of parameters that this run's pairs keep.
        methods: that this run compares.
        linears: that this run factorises.
        windows: of calibration text.
        length: tokens of a window.
        held_out: windows of embedded Wikipedia text, on which methods are compared.
        quiet: blocks whose MLPs CALR works on.
        rank: of their pairs, and of the path.
        steps: of a training.
        seeds: of recorded trainings.
        items: of each multiple-choice task, for the headline's models.
    """

    keep: float = 0.8
    methods: list = field(default_factory=lambda: ["svd", "asvd", "svd_llm"])
    linears: list = field(default_factory=lambda: ["o_proj", "v_proj"])
    windows: int = 8
    length: int = 512
    held_out: int = 8
    quiet: int = 4
    rank: int = 128
    steps: int = 4
    seeds: int = 1
    items: int = 1_000

    def __post_init__(self):
        super().__post_init__()
        for method in self.methods:
            self.pairs(method=method)

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which the MLPs of so many blocks cannot be taken."""
        if self.quiet > shape.depth:
            raise BadInput(f"parameter 'quiet' is {self.quiet}: the subject has {shape.depth} blocks")

    def pairs(self, **settings: Any) -> LowRankStage:
        """The lowrank stage with this calibration."""
        budget = {} if {"keep", "rank", "bytes"} & {*settings} else {"keep": self.keep}
        return LowRankStage(**{"windows": self.windows, "length": self.length, **budget, **settings})

    def quiet_pairs(self, **settings: Any) -> LowRankStage:
        """Pairs of the quiet blocks' MLPs."""
        return self.pairs(**{"rank": self.rank, "linears": MLP, "scope": "quiet", "blocks": self.quiet, **settings})

    def training(self, seed: int = 0) -> dict[str, Any]:
        """What all trainings of the chapter share; chapter 4's, but for the rate."""
        every = max(1, self.steps // 6)
        shared = {"steps": self.steps, "batch": 2, "accumulate": 1, "length": self.length, "validation": 8}
        return {**shared, "every": every, "checkpoint_every": every, "seed": seed}

    def calr(self, rank: int | None = None, seed: int = 0, **settings: Any) -> Calr:
        """CALR's paths."""
        rank = self.rank if rank is None else rank
        return Calr(rank=rank, windows=self.windows, **{**self.training(seed), **settings})

    def protocols(self) -> dict[str, tuple[Setup, str]]:
        """{what: (setup, data)}."""
        found = {
            HELD_OUT: (Setup("wikitext", length=self.length, limit=self.held_out), "embedded"),
            PPL: (Setup("wikitext", length=self.length), self.data),
        }
        return found | {task: (Setup(task, limit=self.items, fast=True), self.data) for task in TASKS}


@dataclass(frozen=True)
class Configuration:
    """One model of the chapter.

    Attributes:
        cell: the question that it answers.
        name: in the chapter's tables.
        stages: that make it.
        measured: what of it.
    """

    cell: str
    name: str
    stages: tuple[Stage, ...] = ()
    measured: tuple[str, ...] = (HELD_OUT,)

    @property
    def key(self) -> str | None:
        """The hash of its stages: the same stages in two cells are one model."""
        return recipe_hash(recipe_of(self.stages))

    @property
    def label(self) -> str:
        """As records have it."""
        return recipe_of(self.stages).label or DENSE


# ---------------------------------------------------------------- the questions, each a list of configurations


def dense() -> list[Configuration]:
    """The model as it came."""
    return [Configuration("dense", DENSE, ())]


def budgets(p: LowRankChapter) -> list[Configuration]:
    """Question 1: the share kept, with factors of 16, 8 and 4 bits; and what other chapters have at as many bytes."""
    found = []
    for bits, keeps in ((16, KEEPS), (8, KEEPS[:4]), (4, (0.9, 0.8))):
        for keep in keeps:
            name = f"{keep:.0%} kept, {bits} bits"
            found.append(Configuration("budgets", name, (p.pairs(keep=keep, bits=bits),)))
    others: dict[str, tuple[Stage, ...]] = {f"{k} blocks removed": (depth(k),) for k in (2, 4, 6)}
    others |= {f"rounded to {bits} bits": (Rtn(bits=bits, grid="asymmetric"),) for bits in (8, 4)}
    others |= {f"GPTQ, {bits} bits": (gptq(p, bits=bits),) for bits in (4, 3)}
    return found + [Configuration("others", name, stages) for name, stages in others.items()]


def depth(k: int) -> Depth:
    """k blocks removed as all recorded runs remove them."""
    return Depth(remove=k, windows=8)


def gptq(p: LowRankChapter, **settings: Any) -> Gptq:
    """GPTQ at 4 bits with the chapter's calibration."""
    return Gptq(**{"bits": 4, "grid": "asymmetric", "windows": p.windows, "length": p.length, **settings})


def methods(p: LowRankChapter, keeps: Iterable[float] | None = None) -> list[Configuration]:
    """Question 2: methods, what X is, which tokens count, how much text and which, and how the budget is shared out."""
    every: dict[str, tuple[Stage, ...]] = {}
    for keep in keeps or (p.keep,):
        pairs = {method: p.pairs(keep=keep, method=method) for method in METHODS}
        weightings = ("unit_norm", "skip_1", "first_16")
        pairs |= {f"svd_llm, tokens by {w}": p.pairs(keep=keep, weighting=w) for w in weightings}
        pairs |= {"svd_llm, compressed inputs": p.pairs(keep=keep, feed="compressed")}
        pairs |= {"saes, both inputs": p.pairs(keep=keep, method="saes", feed="both")}
        pairs |= {"svd_llm, both inputs": p.pairs(keep=keep, feed="both")}
        pairs |= {"svd_llm, both inputs, ridge": p.pairs(keep=keep, feed="both", ridge=1.0)}
        pairs |= {"svd_llm, Wikipedia": p.pairs(keep=keep, text="wikipedia")}
        pairs |= {"asvd, Wikipedia": p.pairs(keep=keep, method="asvd", text="wikipedia")}
        pairs |= {f"svd_llm, {4 * p.windows} windows": p.pairs(keep=keep, windows=4 * p.windows)}
        pairs |= {f"svd_llm, allocation by {a}": p.pairs(keep=keep, allocation=a) for a in ("effective", "loss")}
        every |= {name: (stage,) for name, stage in pairs.items()}
    return [Configuration("methods", name, stages) for name, stages in every.items()]


def kinds(p: LowRankChapter) -> list[Configuration]:
    """Question 2, per kind of linear: one kind alone as pairs."""
    return [
        Configuration("kinds", f"{name}, {method}", (p.pairs(method=method, linears=(name,)),))
        for name in LINEARS
        for method in ("svd", "asvd", "svd_llm")
    ]


def scopes(p: LowRankChapter) -> list[Configuration]:
    """Question 4: which blocks' MLPs."""
    return [
        Configuration("scopes", scope, (p.quiet_pairs(scope=scope),)) for scope in ("quiet", "last", "relevance")
    ]  # fmt: skip


def orders(p: LowRankChapter) -> list[Configuration]:
    """Question 5: low rank then 4 bits, 4 bits then low rank, and 4 bits alone."""
    rounded = Rtn(bits=4, grid="asymmetric")
    low = p.pairs(keep=0.9)
    stages: dict[str, tuple[Stage, ...]] = {
        "low rank, rounded": (low, rounded),
        "low rank, GPTQ": (low, gptq(p)),
        "rounded": (rounded,),
        "rounded, LoRC": (rounded, Eora(rank=32, inputs="none")),
        "GPTQ": (gptq(p),),
        "GPTQ, EoRA": (gptq(p), Eora(rank=32, windows=p.windows, length=p.length)),
        "GPTQ, 3 bits": (gptq(p, bits=3),),
    }
    return [Configuration("orders", name, each) for name, each in stages.items()]


def calr(p: LowRankChapter) -> list[Configuration]:
    """Question 3: CALR's arms. Each seed of the three that are compared comes before the next."""
    pairs, plain = p.quiet_pairs(), p.quiet_pairs(method="svd")
    wider = p.quiet_pairs(rank=round(MORE * p.rank))
    arms: dict[str, tuple[Stage, ...]] = {
        "pairs": (pairs,),
        "plain pairs": (plain,),
        "wider pairs": (wider,),
        "MLPs removed": (Depth(remove=p.quiet, part="mlp", windows=8),),
        "path in closed form": (pairs, p.calr(fit="closed")),
        "plain pairs, path in closed form": (plain, p.calr(fit="closed")),
    }
    ranks = [r for r in (8, 32) if r < p.rank]
    arms |= {f"path of rank {r} in closed form": (pairs, p.calr(r, fit="closed")) for r in ranks}
    for seed in range(p.seeds):
        arms[f"CALR, seed {seed}"] = (pairs, p.calr(seed=seed))
        arms[f"wider pairs trained, seed {seed}"] = (wider, p.calr(0, seed=seed))
        arms[f"LoRA, seed {seed}"] = (pairs, lora(p, seed))
    arms["plain pairs, CALR"] = (plain, p.calr())
    arms["CALR on outputs"] = (pairs, p.calr(fit="hidden"))
    arms |= {f"CALR, path of rank {r}": (pairs, p.calr(r)) for r in ranks}
    return [Configuration("calr", name, stages) for name, stages in arms.items()]


def lora(p: LowRankChapter, seed: int) -> Lora:
    """Chapter 4's adapters on the pairs, all projections."""
    return Lora(**p.training(seed), linears="*", rank=8, learning_rate=2e-3)


def neighbours(p: LowRankChapter) -> list[Configuration]:
    """Question 6: the methods that CALR's paper compares with, and SliceGPT, at about as many parameters."""
    k = 4
    rows: dict[str, tuple[Stage, ...]] = {
        "ShortGPT": (Depth(remove=k, metric="influence", windows=8, protect_first=0, protect_last=0),),
        "LaCo, the paper's sum": (Laco(remove=k),),
        "LaCo, the public code's": (Laco(remove=k, form="public"),),
        "SliceGPT, one rotation": (Slice(keep=0.75),),
        "LLM-Streamline": (Streamline(remove=k, **p.training()),),
        "depth by perplexity": (depth(k),),
    }
    return [Configuration("neighbours", name, stages) for name, stages in rows.items()]


def headline(p: LowRankChapter) -> list[Configuration]:
    """What is measured on the whole text, and by questions."""
    pairs = [p.pairs(keep=keep) for keep in (0.9, 0.8, 0.7)]
    pairs += [p.pairs(keep=0.9, bits=8), p.pairs(keep=0.8, bits=8), p.pairs(keep=0.9, bits=4)]
    bits = [cast("tuple[int, int]", stage.bits)[0] for stage in pairs]
    found = [
        Configuration("headline", f"{stage.keep:.0%} kept, {b} bits", (stage,), (PPL,))
        for stage, b in zip(pairs, bits, strict=True)
    ]
    chosen = {"pairs", "path in closed form", "CALR, seed 0", "LoRA, seed 0", "wider pairs trained, seed 0"}
    arms = [c for c in [*calr(p), *neighbours(p)] if c.name in chosen or c.cell == "neighbours"]
    asked = [found[0], *arms, Configuration("headline", DENSE)]
    return [*found, *(dataclasses.replace(c, cell="headline", measured=TASKS) for c in asked),
            *(dataclasses.replace(c, cell="headline", measured=(PPL,)) for c in arms)]  # fmt: skip


def every(p: LowRankChapter) -> list[Configuration]:
    """All that the recorded run measures, in order."""
    return [*dense(), *budgets(p), *methods(p), *calr(p), *kinds(p), *scopes(p), *orders(p), *neighbours(p),
            *headline(p)]  # fmt: skip


# ---------------------------------------------------------------- made and measured


class Maker:
    """Makes the chapter's models in memory. Configurations that begin with the same stages share their results.

    Their artifacts are not kept: each is as large as the model. Trainings keep checkpoints in the cache.

    Args:
        p: the chapter's parameters.
    """

    def __init__(self, p: LowRankChapter):
        self.p = p
        self.subject = load_subject(p.subject, p.dtype, p.device)
        self.base = {"name": self.subject.name, "fingerprint": self.subject.fingerprint}
        self.metrics: dict[tuple, Metrics] = {}
        self.made: dict[tuple[Stage, ...], tuple[Subject, list[dict]]] = {}

    def make(self, stages: tuple[Stage, ...]) -> tuple[Subject, list[dict]]:
        """The subject after some stages, and what each reported."""
        if not stages:
            return self.subject, []
        if stages not in self.made:
            before, reports = self.make(stages[:-1])
            last: Any = stages[-1]
            more: dict[str, Any] = {"original": self.make(stages[:-2])[0]} if last.needs_original else {}
            if isinstance(last, LowRankStage) and len(stages) == 1:
                more |= {"metrics": self._metrics(last)}
            subject, report = last.apply(before, data=self.p.data, work=cache_dir() / "checkpoints", **more)
            if len(self.made) > 3:
                self.made.pop(next(iter(self.made)))
            self.made[stages] = subject, [*reports, report]
        return self.made[stages]

    def _metrics(self, stage: LowRankStage) -> Metrics | None:
        """Those of a pass through the whole model, which stages of this method and calibration share; None for a stage
        that takes few blocks, which are faster by themselves, unless a pass has them."""
        if stage.feed != "original" or stage.method in ("svd", "fwsvd"):
            return None
        kind = "asvd" if stage.method == "asvd" else "moments"
        alike = kind, stage.text, stage.windows, stage.length, stage.seed, stage.weighting, stage.alpha
        known = self.metrics.get(alike, {})
        taken = selected(self.subject, stage.takes)
        if all((block, INPUTS[name]) in known for block, name in taken):
            return known
        if stage.scope != "all":
            return None
        if kind == "moments":  # these take 1.6 GB of this study's subject
            self.metrics = {others: found for others, found in self.metrics.items() if others[0] != kind}
        self.metrics[alike] = metrics_of(stage, self.subject, self.p.data)
        return self.metrics[alike]

    def prepared(self, stages: tuple[Stage, ...]) -> Prepared:
        """A model ready to be measured."""
        model, reports = self.make(stages)
        size = {**sizes(model), "bytes_on_disk": predicted_disk_bytes(model)}
        return Prepared(model, build_history(recipe_of(stages), self.base, self.p.data, size, reports))


Results = Mapping[tuple[str | None, str], Measurement]  # by the stages' hash and what was measured


def measure(
    configs: Iterable[Configuration], p: LowRankChapter, done: Collection = (), keep: Keep | None = None,
    maker: Maker | None = None,
) -> dict:  # fmt: skip
    """{(the stages' hash, what): measurement} of each configuration that is not done yet."""
    results: dict[tuple[str | None, str], Measurement] = {}
    maker = maker or Maker(p)
    for c in configs:
        todo = [what for what in c.measured if (c.key, what) not in done and (c.key, what) not in results]
        ready = maker.prepared(c.stages) if todo else None
        for what in todo:
            setup, data = p.protocols()[what]
            m = ready.measure(setup, data, chapter={"cell": c.cell, "name": c.name, "what": what})
            results[c.key, what] = m
            if keep:
                keep(m)
    return results


RECORDED = {
    "methods": list(METHODS),
    "linears": ["*"],
    "windows": 32,
    "held_out": 32,
    "quiet": 10,
    "steps": 48,
    "seeds": 3,
}


def recorded_parameters(**settings: Any) -> LowRankChapter:
    """The parameters of the recorded run."""
    return LowRankChapter(**{**RECORDED, **settings})


def recorded_parts(p: LowRankChapter, file: Path) -> Iterator[Part]:
    """The singular values first, then each configuration by itself."""
    items = {HELD_OUT: p.held_out, PPL: None} | dict.fromkeys(TASKS, p.items)
    made: dict[str, Maker] = {}

    def maker() -> Maker:
        return made.setdefault("maker", Maker(p))

    beside = file.with_name(f"{file.stem}_spectra.json")
    yield Part("spectra", {}, lambda *_: ch09_spectra.record(maker().subject, p, beside), beside)
    seen: set[Key] = set()
    for c in every(p):
        rows: dict[Key, int | None] = {
            (c.label, c.key, what): items[what] for what in c.measured if (c.label, c.key, what) not in seen
        }
        seen |= {*rows}
        if not rows:
            continue

        def make(missing: Collection[Key], keep: Keep, c: Configuration = c) -> None:
            mine = dataclasses.replace(c, measured=tuple(key[2] for key in missing))
            measure([mine], p, (), keep, maker())

        planned = {key: (c.stages, *p.protocols()[key[2]]) for key in rows}
        yield Part(f"{c.cell} {c.name} {' '.join(key[2] for key in rows)}", rows, make, planned=planned)


def from_measurements(measurements: Iterable[Measurement]) -> dict[tuple[str | None, str], Measurement]:
    """The results, by the stages' hash and what was measured.

    Raises:
        BadInput: not this chapter's.
    """
    return by_key(measurements, lambda m: (m.made["recipe"], m.chapter["what"]), 9)


def key(m: Measurement) -> Key:
    """Label, hash of the stages, and what was measured."""
    ((recipe, what),) = from_measurements([m])
    return m.label, recipe, what


class Record(Recorded):
    """The rows by hash and what was measured, the pool of all chapters, and the singular values.

    Attributes:
        spectra: see `thesislib.chapters.ch09_spectra`.
    """

    spectra: Any


def read_recorded(path: Path) -> Record:
    """A recorded run."""
    rows = from_measurements(on_one_sample(Store(path).rows().values(), key).values())
    record = Record(rows, recorded_pool(path.parent))
    record.spectra = ch09_spectra.read(path.with_name(f"{path.stem}_spectra.json"))
    return record
