"""Chapter 4, LoRA recovery: which models are trained, on what, and what of them is measured."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from thesislib.chapters.labels import of
from thesislib.chapters.pool import Recorded, recorded_pool
from thesislib.compress.lora.sequences import TEXTS
from thesislib.compress.lora.stage import MERGES, Lora
from thesislib.errors import BadInput, shown, unknown
from thesislib.evaluate.generate import complete
from thesislib.evaluate.setup import Setup
from thesislib.experiment import DENSE, Prepared, build_history, prepare, recipe_of
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.layers import merge_all
from thesislib.pipeline.recipe import Shape, parse_label
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store

PPL = "perplexity"


@dataclass(frozen=True)
class LoraChapter(Parameters):
    """Parameters of chapter 4.

    Attributes:
        pruned: labels of the models to recover; the dense one is always trained too, as the control.
        texts: to train on.
        steps: of the optimiser.
        batch: sequences a step.
        length: tokens in a sequence, and in a window of perplexity.
        learning_rate: see `thesislib.compress.lora.stage.Lora`.
        rank: of the adapter.
        validation: held-out sequences.
        every: steps between validations.
        seeds: of the first model on the first text, and of `seeded`.
        seeded: models that have all these seeds on every text, and are asked questions with each.
        answering: how many of the pruned models are asked questions, and the dense one; 0 for no questions.
        windows: that perplexity is measured on.
        questions: of TriviaQA, closed book.
        passages: of TriviaQA, open book.
        tokens: of a completion.
        prompt: what is completed.
    """

    pruned: list = field(default_factory=lambda: ["D2"])
    texts: list = field(default_factory=lambda: ["wikitext"])
    steps: int = 8
    batch: int = 2
    length: int = 256
    learning_rate: float = 4e-3
    rank: int = 8
    validation: int = 4
    every: int = 4
    seeds: int = 1
    seeded: list = field(default_factory=list)
    answering: int = 0
    windows: int | None = 6
    questions: int = 24
    passages: int = 8
    tokens: int = 30
    prompt: str = "Once upon a time"
    may_be_zero = ("validation", "answering")

    def __post_init__(self):
        super().__post_init__()
        for label in self.pruned:
            parse_label(label)
        for text in self.texts:
            if text not in TEXTS:
                raise unknown("training text", text, TEXTS)
        if not self.pruned or not self.texts:
            raise BadInput(
                "parameters 'pruned' and 'texts' must name at least one model and one text: expected e.g. ['D2'] "
                "and ['wikitext']"
            )
        self.training()

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which one of the models cannot be made."""
        for c in configurations(self):
            try:
                recipe_of(c.stages(self)).check(shape)
            except BadInput as error:
                raise BadInput(
                    f"parameter 'pruned' has {shown(c.pruned)}, which is not possible for this subject "
                    f"({error}): expected others"
                ) from error

    def training(self, text: str = "wikitext", **settings) -> Lora:
        """The LoRA stage on a text."""
        shared = ("rank", "learning_rate", "steps", "batch", "length", "every", "validation")
        return Lora(
            text=text,
            accumulate=1,
            checkpoint_every=self.every,
            **{name: getattr(self, name) for name in shared},
            **settings,
        )

    def protocols(self) -> dict[str, Setup]:
        """What is measured, by name."""
        return {
            PPL: Setup("wikitext", length=self.length, limit=self.windows),
            CLOSED: Setup("trivia", limit=self.questions),
            OPEN: Setup("trivia_open", limit=self.passages),
        }


@dataclass(frozen=True)
class Configuration:
    """One model of the chapter.

    Attributes:
        pruned: label of what was pruned before training, or dense.
        text: trained on; None for no training.
        after: label of what was pruned after training, as in the thesis's order experiment.
        merge: see `thesislib.compress.lora.stage.MERGES`.
        seed: of training.
        learning_rate: None for the chapter's.
        steps: of the optimiser; None for the chapter's.
    """

    pruned: str
    text: str | None = None
    after: str = ""
    merge: str = "beside"
    seed: int = 0
    learning_rate: float | None = None
    steps: int | None = None

    def stages(self, p: LoraChapter) -> list:
        """What makes it."""
        before, after = ([] if x in ("", DENSE) else recorded_stages(x) for x in (self.pruned, self.after))
        trained = p.training(self.text, merge=self.merge, seed=self.seed) if self.text else None
        own: dict[str, Any] = {"learning_rate": self.learning_rate, "steps": self.steps}
        if trained:
            trained = dataclasses.replace(trained, **{name: x for name, x in own.items() if x is not None})
        return [*before, *([trained] if trained else []), *after]

    @property
    def label(self) -> str:
        """As the book writes it: D2+W, W for the control."""
        letter = Lora(text=self.text, merge=self.merge).label if self.text else ""
        pruned = "" if letter and self.pruned == DENSE else self.pruned
        return "+".join(x for x in (pruned, letter, self.after) if x)


def configurations(p: LoraChapter) -> list[Configuration]:
    """What the chapter measures, the dense model first: each model untrained and trained on each text, more seeds of
    the first on the first text and of those that have them on every text."""
    models = [DENSE, *p.pruned]
    trained = [Configuration(m, text) for text in p.texts for m in (*p.pruned, DENSE)]
    several = [(p.pruned[0], p.texts[0]), *((m, text) for m in p.seeded for text in p.texts)]
    seeds = [Configuration(m, text, seed=seed) for m, text in dict.fromkeys(several) for seed in range(1, p.seeds)]
    return [*map(Configuration, models), *trained, *seeds]


def order_experiment(p: LoraChapter, depth: str = "D2", width: str = "W1:8") -> list[Configuration]:
    """The thesis's: width pruning after recovery instead of before."""
    return [Configuration(depth, text, after=width) for text in p.texts]


def rates(p: LoraChapter, model: str | None = None, others: Sequence[float] = (0.25, 0.5, 2)) -> list[Configuration]:
    """A model's training on the first text at other learning rates, multiples of the chapter's: what its default was
    chosen among. By default the first pruned model's."""
    return [Configuration(model or p.pruned[0], p.texts[0], learning_rate=x * p.learning_rate) for x in others]


def longer(p: LoraChapter, times: Sequence[int] = (2, 4)) -> list[Configuration]:
    """The first pruned model and the control, trained on the first text for more tokens."""
    return [Configuration(m, p.texts[0], steps=x * p.steps) for x in times for m in (p.pruned[0], DENSE)]


Results = Mapping[tuple[Configuration, str], Measurement]


def measure(
    configs: Iterable[Configuration], p: LoraChapter, done: Results | None = None, keep: Keep | None = None
) -> dict:
    """{(configuration, task): measurement}: perplexity of all, answers of some (see `asked_of`), merges of trained
    sparse models.

    Args:
        configs: in order.
        p: how they are trained and measured.
        done: earlier results, which are not made again.
        keep: called with each new measurement, so that a long run can be kept as it goes.
    """
    results = dict(done or {})

    def add(c: Configuration, task: str, m: Measurement) -> None:
        results[c, task] = m
        if keep:
            keep(m)

    for c in tqdm([*configs], desc="LoRA", unit="model", disable=None, leave=False):
        todo = [task for task in asked_of(c, p) if (c, task) not in results]
        ways = [w for w in merges(c) if (w, PPL) not in results]
        if not todo and not ways:
            continue
        ready = prepare(p.subject, c.stages(p), data=p.data, dtype=p.dtype, device=p.device)
        text = complete(ready.model, p.prompt, p.tokens).text
        for task in todo:
            add(c, task, ready.measure(p.protocols()[task], p.data, chapter=_noted(c, task, text)))
        for w in ways:
            add(w, PPL, merged(ready, w, p).measure(p.protocols()[PPL], p.data, chapter=_noted(w, PPL, "")))
    return results


def asked_of(c: Configuration, p: LoraChapter) -> list[str]:
    """What is measured of a configuration: perplexity, and of some models answers."""
    asked = p.answering and is_main(c) and c.pruned in (DENSE, *p.pruned[: p.answering])
    return [task for task in p.protocols() if task == PPL or asked or (c.seed and c.pruned in p.seeded)]


def is_main(c: Configuration) -> bool:
    """Whether this is one of the chapter's main models: no further seed, rate, or order."""
    return c.seed == 0 and c.learning_rate is None and c.steps is None and not c.after


def merges(c: Configuration) -> list[Configuration]:
    """The same training merged in each way, where the model is sparse, so that it matters."""
    if not c.text or not is_main(c) or not of(c.pruned).width:
        return []
    return [dataclasses.replace(c, merge=way) for way in ("masked", "dense")]


def merged(ready: Prepared, c: Configuration, p: LoraChapter) -> Prepared:
    """A trained configuration with its adapter merged as `c` says, as if it had been trained so.

    Args:
        ready: the configuration with its adapter beside its weights.
        c: with the way to merge.
        p: the chapter's parameters.
    """
    model = ready.model.copy(unpack=False)
    merge_all(model.model, c.merge)
    size = {**sizes(model), "bytes_on_disk": predicted_disk_bytes(model)}
    *before, trained = ready.history["reports"]
    # zeros_after was counted with the adapter beside
    report = {**trained, "merge": c.merge, "weights": MERGES[c.merge], "zeros_after": None}
    return Prepared(
        model, build_history(recipe_of(c.stages(p)), ready.history["base"], p.data, size, [*before, report])
    )


def _noted(c: Configuration, task: str, text: str) -> dict:
    return {"configuration": dataclasses.asdict(c), "what": task, "text": text}


# ---------------------------------------------------------------- recorded runs


def from_measurements(measurements: Iterable[Measurement]) -> dict[tuple[Configuration, str], Measurement]:
    """The results, by configuration and what was measured.

    Raises:
        BadInput: not this chapter's.
    """
    return by_key(measurements, lambda m: (Configuration(**m.chapter["configuration"]), m.chapter["what"]), 4)


def read_recorded(path: Path) -> Recorded:
    """A recorded run."""
    rows = on_one_sample(Store(path).rows().values(), key)
    return Recorded(from_measurements(rows.values()), recorded_pool(path.parent))


RECORDED = {
    "pruned": ["D2", "W2:4", "D2+W1:8", "D4", "W8:16"],
    "texts": ["wikitext", "trivia"],
    "steps": 48,
    "length": 512,
    "validation": 8,
    "every": 16,
    "seeds": 3,
    "answering": 3,
    "seeded": ["dense", "D2", "D4", "W2:4", "D2+W1:8"],
    "windows": None,
    "questions": 200,
    "passages": 64,
    "tokens": 40,
}


def recorded_parameters(**settings) -> LoraChapter:
    """The parameters of the recorded run."""
    return LoraChapter(**{**RECORDED, **settings})


def recorded_parts(p: LoraChapter, file: Path) -> Iterator[Part]:
    """Each training by itself, with all that is measured of it and of its merges."""
    items = {PPL: p.windows, CLOSED: p.questions, OPEN: p.passages}
    for c in [*configurations(p), *order_experiment(p), *rates(p), *rates(p, DENSE), *longer(p)]:
        mine = [(c, task) for task in asked_of(c, p)] + [(way, PPL) for way in merges(c)]
        rows: dict[Key, int | None] = {
            (recipe_of(one.stages(p)).label or DENSE, one, task): items[task] for one, task in mine
        }

        def make(missing: Collection[Key], keep: Keep, c: Configuration = c, rows: Mapping = rows) -> None:
            measure([c], p, {key[1:]: None for key in rows if key not in missing}, keep)

        planned = {key: (key[1].stages(p), p.protocols()[key[2]], p.data) for key in rows}
        yield Part(f"{c.label} {c.seed} {c.learning_rate} {c.steps}", rows, make, planned=planned)


def key(m: Measurement) -> Key:
    """Label, configuration and task."""
    ((config, task),) = from_measurements([m])
    return m.label, config, task


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """Every seed at the chapter's learning rate."""
    for m in rows:
        label, config, task = key(m)
        if config.learning_rate is None and config.steps is None:
            yield label, WIKITEXT if task == PPL else task, m
