"""Chapter 5, quantisation and compensation: which settings are tried, in which cell of the chapter, and what is measured of each."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout
from tqdm import tqdm

from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.lora import Lora
from thesislib.errors import BadInput
from thesislib.evaluate.generate import complete
from thesislib.evaluate.protocol import Protocol
from thesislib.experiment import DENSE, prepare, recipe_hash, recipe_of
from thesislib.files import cache_dir
from thesislib.parameters import positive
from thesislib.recipe import parse_label
from thesislib.records import Measurement
from thesislib.store import Store
from thesislib.subject import DTYPES

PPL, HELD_OUT, CLOSED, OPEN = "perplexity", "held-out perplexity", "closed book", "open book"
PAPER = {"grid": "symmetric", "clip": "none", "act_order": "none", "damping": 0.01, "sequential": False, "weighting": "equal", "text": "c4"}
BEST = {"grid": "asymmetric", "clip": "squared", "act_order": "static", "damping": 0.01, "sequential": True, "weighting": "unit_norm", "text": "c4"}
# every ingredient, and what it can be instead of the paper's; the first is what the chapter's best settings have
INGREDIENTS = {
    "token weighting": ("weighting", ("unit_norm", "first_16", "first_64", "skip_1")),
    "act-order": ("act_order", ("static", "index")),
    "clipping": ("clip", ("squared", "weighted")),
    "sequential order": ("sequential", (True,)),
    "symmetry": ("grid", ("asymmetric",)),
    "damping": ("damping", (0.1, 0.001)),
    "calibration text": ("text", ("wikipedia",)),
    "window length": ("length", (2048,)),
    "group": ("group", (32, 192, "row")),
}


@dataclass(frozen=True)
class QuantChapter:
    """Parameters of chapter 5.

    subject, data: specs. dtype, device: see `load_subject`. bits: of the chapter's table; group: weights that share a scale.
    calibration: windows of length tokens of web text that GPTQ and EoRA see. rank: of EoRA. windows: that perplexity is measured on
    (None: the whole text); held_out: windows of embedded Wikipedia text, on which settings are compared and chosen.
    questions, passages: of TriviaQA. tokens: of a completion of prompt.
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
        if self.dtype not in DTYPES:
            raise BadInput(f"parameter 'dtype' is '{self.dtype}': expected one of {', '.join(DTYPES)}")
        for bits in self.bits:
            self.rtn(bits)

    def rtn(self, bits: int, grid: str = "asymmetric", clip: str = "squared") -> Rtn:
        """Rounding."""
        return Rtn(bits=bits, group=self.group, grid=grid, clip=clip)

    def gptq(self, bits: int, **settings) -> Gptq:
        """GPTQ, by default with the chapter's best settings."""
        windows = {} if settings.get("length") in (None, self.length) else {"windows": max(1, self.calibration * self.length // settings["length"])}
        shared = {"bits": bits, "group": self.group, "windows": self.calibration, "length": self.length}
        return Gptq(**{**shared, **BEST, **settings, **windows})

    def eora(self, **settings) -> Eora:
        """EoRA."""
        return Eora(**{**({} if "bytes" in settings else {"rank": self.rank}), "windows": self.calibration, "length": self.length, **settings})

    def protocols(self) -> dict[str, tuple[Protocol, str]]:
        """{what: (protocol, data)}."""
        return {
            PPL: (Protocol("wikitext", length=self.length, limit=self.windows), self.data),
            HELD_OUT: (Protocol("wikitext", length=self.length, limit=self.held_out), "embedded"),
            CLOSED: (Protocol("trivia", limit=self.questions), self.data),
            OPEN: (Protocol("trivia_open", limit=self.passages), self.data),
        }


@dataclass(frozen=True)
class Configuration:
    """One model of the chapter.

    cell: the question it answers. name: what it is called there. stages: how it is made. measured: what is measured of it.
    """

    cell: str
    name: str
    stages: tuple = ()
    measured: tuple = (PPL,)

    @property
    def key(self) -> str | None:
        """What tells its results from others': the same stages in two cells are one model."""
        return recipe_hash(recipe_of(self.stages))


def table(p: QuantChapter, grids: Iterable[str] = ("asymmetric",), answers: bool = True) -> list[Configuration]:
    """Bits by method: rounding and GPTQ, each without and with EoRA on top."""
    more = (PPL, HELD_OUT, *((CLOSED, OPEN) if answers else ()))
    found = [Configuration("table", DENSE, (), more)]
    for bits in p.bits:
        for grid in grids:
            for name, stage in ((f"rounding {bits}-bit {grid}", p.rtn(bits, grid)), (f"GPTQ {bits}-bit {grid}", p.gptq(bits, grid=grid))):
                found += [Configuration("table", name, (stage,), more), Configuration("table", f"{name} + EoRA", (stage, p.eora()), more)]
    return found


def alone(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """The paper's settings, rounding, and each ingredient changed alone."""
    found = [
        Configuration("alone", "rounding, symmetric, no clipping", (p.rtn(bits, "symmetric", "none"),), (HELD_OUT,)),
        Configuration("alone", "the paper's settings", (p.gptq(bits, **PAPER),), (HELD_OUT,)),
    ]
    for title, (key, values) in INGREDIENTS.items():
        found += [Configuration("alone", f"{title}: {value}", (p.gptq(bits, **{**PAPER, key: value}),), (HELD_OUT,)) for value in values]
    return found


def without(p: QuantChapter, bits: int = 4) -> list[Configuration]:
    """The best settings, and each ingredient taken back to the paper's."""
    found = [Configuration("without", "all of them", (p.gptq(bits),), (HELD_OUT,))]
    for title, (key, _) in INGREDIENTS.items():
        if key in PAPER and PAPER[key] != BEST[key]:
            found.append(Configuration("without", f"without {title}", (p.gptq(bits, **{key: PAPER[key]}),), (HELD_OUT,)))
    return found


def ranks(p: QuantChapter, bits: int = 3, tried: Iterable[int] = (8, 32, 128)) -> list[Configuration]:
    """EoRA's rank on GPTQ, and the same bytes as a budget."""
    base = p.gptq(bits)
    found = [Configuration("rank", "0", (base,), (HELD_OUT,))]
    return found + [Configuration("rank", str(rank), (base, p.eora(rank=rank)), (HELD_OUT,)) for rank in tried]


def pruned(p: QuantChapter, labels: Iterable[str] = ("W2:4", "D4"), bits: int = 4) -> list[Configuration]:
    """Pruned models, quantised and compensated."""
    found = []
    for label in labels:
        before, grid = parse_label(label).stages, "symmetric" if label.startswith("W") else "asymmetric"
        for name, stages in ((label, ()), (f"{label}, rounding", (p.rtn(bits, grid),)), (f"{label}, GPTQ", (p.gptq(bits, grid=grid),)),
                             (f"{label}, GPTQ + EoRA", (p.gptq(bits, grid=grid), p.eora()))):  # fmt: skip
            found.append(Configuration("pruned", name, (*before, *stages), (HELD_OUT,)))
    return found


def starts(p: QuantChapter, bits: int = 3, steps: int = 48, seeds: Iterable[int] = (0, 1, 2)) -> list[Configuration]:
    """LoRA on a quantised model, started as usual and from EoRA's correction, at equal rank and steps."""
    found = []
    for seed in seeds:
        training = Lora(rank=p.rank, alpha=p.rank, linears="*", learning_rate=5e-4, steps=steps, batch=2, accumulate=1, every=16, validation=8,
                        checkpoint_every=16, seed=seed)  # fmt: skip
        found += [
            Configuration("start", f"usual, seed {seed}", (p.gptq(bits), training), (HELD_OUT,)),
            Configuration("start", f"EoRA, seed {seed}", (p.gptq(bits), p.eora(), dataclasses.replace(training, init="eora")), (HELD_OUT,)),
        ]
    return found


Results = Mapping[tuple[str | None, str], Measurement]


def measure(configs: Iterable[Configuration], p: QuantChapter, done: Results | None = None, found: Callable | None = None) -> dict:
    """{(the stages' hash, what): measurement} of each configuration; see `thesislib.chapters.lora.measure`."""
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


def from_measurements(found: Iterable[Measurement]) -> dict[tuple[str | None, str], Measurement]:
    """The results, by the stages' hash and what was measured.

    Raises:
        BadInput: not this chapter's.
    """
    try:
        return {(m.provenance["made"]["recipe"], m.provenance["chapter"]["what"]): m for m in found}
    except (KeyError, TypeError) as error:
        raise BadInput(f"these are not the results of chapter 5 ({error})") from error


def read_recorded(path: Path) -> Results:
    """A recorded run, read only."""
    return MappingProxyType(from_measurements(Store(path).rows().values()))


RECORDED = {"bits": [4, 3], "calibration": 64, "windows": None, "held_out": 48, "questions": 200, "passages": 64, "tokens": 40}
ABLATION = 32  # calibration windows of the ablations: they compare settings with each other, at half the price


def recorded_parameters(**settings) -> QuantChapter:
    """The parameters of the recorded run's table."""
    return QuantChapter(**{**RECORDED, **settings})


def recorded_configurations(p: QuantChapter) -> list[Configuration]:
    """All that the recorded run measures, what matters most first."""
    q = dataclasses.replace(p, calibration=ABLATION)
    return [*table(p), *alone(q), *without(q), *pruned(q), *ranks(p), *starts(p), *table(p, ("symmetric",), answers=False)]


def main() -> None:
    """Make a recorded run: `python -m thesislib.chapters.gptq --data DIR --out FILE.jsonl`; resumable, and twice at a time, as chapter 4's."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("subject", "data", "dtype", "device"):
        parser.add_argument(f"--{name}", default=getattr(QuantChapter, name))
    arguments = vars(parser.parse_args())
    store = Store(arguments.pop("out"))
    p = recorded_parameters(**arguments)
    for c in recorded_configurations(p):
        try:
            with FileLock(cache_dir() / f"chapter-5-{c.key}.lock", timeout=0):
                done = from_measurements(store.rows(items=False).values()) if store.path.exists() else {}
                measure([c], p, done, store.append)
                print(c.cell, c.name, "done", file=sys.stderr, flush=True)
        except Timeout:
            continue


if __name__ == "__main__":
    main()
