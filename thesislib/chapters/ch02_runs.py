"""Chapter 2, depth pruning: how blocks are scored, what is left when the least important go, the recorded run."""

import dataclasses
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from thesislib.chapters import ch02_stability
from thesislib.chapters.chapter import (
    CLOSED,
    DEPTH_WINDOWS,
    OPEN,
    WIKITEXT,
    Keep,
    Key,
    Parameters,
    Part,
    book,
    neighbours,
    on_one_sample,
    shape,
)
from thesislib.chapters.phrases import number
from thesislib.chapters.pool import larger, recorded_pool
from thesislib.chapters.trainings import Records
from thesislib.compress.depth import Depth, angular_distances, importance, taylor_of_parts
from thesislib.errors import BadInput, unknown
from thesislib.evaluate import perplexity, triviaqa
from thesislib.evaluate.generate import complete
from thesislib.experiment import DENSE, described
from thesislib.files import read_json, write_whole
from thesislib.formats.load import load_subject
from thesislib.model.blocks import Plan, plan_without, remove, removed_parts
from thesislib.model.subject import Subject
from thesislib.pipeline.recipe import Shape
from thesislib.records.measurement import Measurement, provenance
from thesislib.records.store import Store
from thesislib.sources.corpus import calibration_windows, evaluation_text, question_source, questions
from thesislib.sources.rows import origin_of

ONE_SHOT, GREEDY, RANDOM = "perplexity", "perplexity, greedy", "random"
NOTHING = "nothing removed"
THESIS = (2, 4, 6, 8)
# those that ask for running text or for nothing
OF_THE_MODEL = ("perplexity", "taylor", "magnitude", "influence", "angular")


@dataclass(frozen=True)
class DepthChapter(Parameters):
    """Parameters of chapter 2.

    Attributes:
        length: tokens in a window.
        calibration: windows of the calibration text that blocks are scored on.
        stability: of the recorded run: windows from which it is told how stable the choice is; 0 for not at all.
        windows: that perplexity is measured on after each removal.
        metrics: how blocks are scored.
        greedy: also score by perplexity again after each removal, up to this many blocks; 0 for not at all.
        counts: how many blocks are removed.
        seeds: how many random removals.
        questions: of TriviaQA, closed book, for the thesis's D2, D4, D6 and D8.
        passages: of TriviaQA, open book, for the same.
        tokens: of a completion.
        prompt: what is completed.
    """

    length: int = 512
    calibration: int = 4
    stability: int = 0
    windows: int | None = 8
    metrics: list = field(default_factory=lambda: list(OF_THE_MODEL))
    greedy: int = 0
    counts: list = field(default_factory=lambda: [1, 2, 4, 6, 8])
    seeds: int = 1
    questions: int = 32
    passages: int = 12
    tokens: int = 30
    prompt: str = "Once upon a time"
    may_be_zero = ("greedy", "seeds", "stability")

    def __post_init__(self):
        super().__post_init__()
        for metric in self.metrics:
            if metric not in OF_THE_MODEL:
                raise unknown("importance metric", metric, OF_THE_MODEL)
        if not all(isinstance(k, int) and k > 0 for k in self.counts):
            raise BadInput(
                f"parameter 'counts' is {self.counts}: expected numbers of blocks to remove, at least 1 each"
            )

    def check_shape(self, shape: Shape) -> None:
        """Raises BadInput for a subject of which no count of `counts` can be removed."""
        self.possible(shape.depth)

    def possible(self, blocks: int) -> list[int]:
        """Those of `counts` that a subject of so many blocks can lose.

        Raises:
            BadInput: none.
        """
        free = unprotected(blocks)
        possible = [k for k in self.counts if k <= free]
        if not possible:
            some = f"expected e.g. counts=[{free}]" if free else "expected a subject with more blocks"
            raise BadInput(
                f"parameter 'counts' is {self.counts}: of this subject's {blocks} blocks {free} can go, since "
                f"the first and the last stay; {some}"
            )
        return possible


def unprotected(blocks: int) -> int:
    """How many blocks a subject of `blocks` can lose at most by default."""
    return max(0, blocks - Depth.protect_first - Depth.protect_last)


@dataclass(frozen=True)
class Scores:
    """Importance of every block on the calibration text.

    Attributes:
        metrics: {metric: {block: importance}} of every block; under angular the distance across that block alone.
        removed: {method: {k: the k blocks that go}}; methods are the metrics, greedy perplexity and random choices.
        made: provenance.
    """

    metrics: dict[str, dict[int, float]]
    removed: dict[str, dict[int, tuple[int, ...]]]
    made: dict

    @property
    def main(self) -> str:
        """The method whose models are asked questions: perplexity, or the first if that was not tried."""
        return "perplexity" if "perplexity" in self.removed else next(iter(self.removed))

    def of_main(self) -> "Scores":
        """The same, of the removals those of `main` and at random: what a page shows of its own run."""
        kept = {m: sets for m, sets in self.removed.items() if m == self.main or m.startswith(RANDOM)}
        return dataclasses.replace(self, removed=kept)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, plain: Mapping) -> "Scores":
        """What `to_json` wrote."""
        return cls(
            {m: {int(b): s for b, s in scores.items()} for m, scores in plain["metrics"].items()},
            {m: {int(k): tuple(v) for k, v in removed.items()} for m, removed in plain["removed"].items()},
            plain["made"],
        )


def score(subject: Subject, p: DepthChapter) -> Scores:
    """Every block's importance by every metric, and which blocks each method removes."""
    started = time.perf_counter()
    ids = calibration_windows(subject.tokenizer, "wikipedia", p.data, p.calibration, p.length)
    counts = p.possible(subject.depth)
    if left := [str(k) for k in p.counts if k not in counts]:
        print(
            f"not possible for this subject: to remove {', '.join(left)} of its {subject.depth} blocks, since "
            "the first and the last stay"
        )
    free = range(Depth.protect_first, subject.depth - Depth.protect_last)
    metrics: dict[str, dict[int, float]] = {}
    removed: dict[str, dict[int, tuple[int, ...]]] = {}
    for metric in p.metrics:
        if metric == "angular":
            distance = angular_distances(subject, ids)
            metrics[metric] = {b: float(distance[1, b]) for b in range(subject.depth)}
            starts = {k: min(free[: len(free) - k + 1], key=lambda b: distance[k, b]) for k in counts}
            removed[metric] = {k: tuple(range(b, b + k)) for k, b in starts.items()}
        else:
            metrics[metric] = importance(subject, ids, metric)
            order = sorted(free, key=lambda b: (metrics[metric][b], b))
            removed[metric] = {k: tuple(sorted(order[:k])) for k in counts}
    if p.greedy:
        _, report = Depth(min(p.greedy, max(counts)), greedy=True, windows=p.calibration, length=p.length).apply(
            subject, data=p.data
        )
        removed[GREEDY] = {k: tuple(sorted(report["order"][:k])) for k in counts if k <= p.greedy}
    for seed in range(p.seeds):
        order = np.random.default_rng(seed).permutation(free).tolist()
        removed[f"{RANDOM} {seed}"] = {k: tuple(sorted(order[:k])) for k in counts}
    return Scores(
        metrics,
        removed,
        provenance(
            subject, started, text="wikipedia", data=origin_of(p.data), windows=p.calibration, length=p.length, seed=0
        ),
    )


@dataclass(frozen=True)
class Results:
    """What is left after each removal.

    Attributes:
        scores: see `Scores`.
        perplexity: {(method, k blocks removed): measurement}; (NOTHING, 0) is the whole model.
        trivia: {(k, open book): accuracy} with the removals of `Scores.main`; 0 is the whole model.
        texts: {k: completion}.
        pool: what all chapters recorded of the same models; empty for a run that is not recorded.
    """

    scores: Scores
    perplexity: dict[tuple[str, int], Measurement]
    trivia: dict[tuple[int, bool], Measurement]
    texts: dict[int, str]
    pool: Records = field(default_factory=dict, repr=False)

    def quoted(self, k: int) -> Measurement:
        """The perplexity without the k blocks of `Scores.main`: of all chapters the measurement on the most windows."""
        return quoted(self.dense if k == 0 else self.perplexity[self.scores.main, k], k, WIKITEXT, self.pool)

    @property
    def dense(self) -> Measurement:
        """Perplexity of the whole model."""
        return self.perplexity[NOTHING, 0]


def quoted(m: Measurement, k: int, measure: str, pool: Records) -> Measurement:
    """The measurement on the most items of the model of `m`, which lacks k blocks. A label does not tell which blocks:
    another machine may have chosen others."""
    other = larger(pool, measure, label_of(k), m)
    return other if other.provenance["plan"] == m.provenance["plan"] or not k else m


def plans_of(depth: int, scores: Scores) -> dict[tuple[str, int], Plan]:
    """{(method, blocks removed): plan} of all that was chosen, and of nothing removed."""
    removals = {(method, k): gone for method, sets in scores.removed.items() for k, gone in sets.items()}
    return {name: plan_without(depth, gone) for name, gone in {(NOTHING, 0): (), **removals}.items()}


def pruned(subject: Subject, scores: Scores) -> dict[int, Subject]:
    """The thesis's models that questions are asked of, by how many blocks they lack; 0 is the whole."""
    chosen = scores.removed[scores.main]
    return {0: subject} | {k: remove(subject, chosen[k]) for k in THESIS if k in chosen}


def answers(model: Subject, p: DepthChapter, open_book: bool) -> Measurement:
    """TriviaQA, closed or open book."""
    asked = questions(p.data, open_book=open_book, limit=p.passages if open_book else p.questions)
    return triviaqa.triviaqa(model, asked, source=question_source(p.data, open_book))


def measure(subject: Subject, scores: Scores, p: DepthChapter) -> Results:
    """Perplexity of every method at every count, all in one tree; TriviaQA and a text of the thesis's
    configurations."""
    found = perplexity.perplexities(
        subject, evaluation_text(p.data), plans_of(subject.depth, scores), length=p.length, limit=p.windows
    )
    small, trivia = pruned(subject, scores), {}
    for open_book in (False, True):
        for k, model in tqdm(small.items(), desc="trivia", unit="model", disable=None, leave=False):
            trivia[k, open_book] = answers(model, p, open_book)
    return Results(
        scores, found, trivia, {k: p.prompt + complete(model, p.prompt, p.tokens).text for k, model in small.items()}
    )


def parts(subject: Subject, p: DepthChapter, count: int = 2) -> pd.DataFrame:
    """The `count` whole blocks, attentions and MLPs of lowest Taylor score removed, or as many as can go."""
    rows, count = [], min(count, unprotected(subject.depth))
    ids = calibration_windows(subject.tokenizer, "wikipedia", p.data, p.calibration, p.length)
    free = range(Depth.protect_first, subject.depth - Depth.protect_last)
    for part, scores in taylor_of_parts(subject, ids, free).items():
        lost = removed_parts(subject).get(part, [])
        lowest = sorted(sorted((b for b in free if b not in lost), key=scores.__getitem__)[:count])
        small = remove(subject, lowest, part)
        m = perplexity.perplexity(small, evaluation_text(p.data), length=p.length, limit=p.windows)
        gone = ", ".join(map(str, lowest))
        rows.append(
            {
                "removed": f"{count} x {part}",
                "of blocks": gone,
                "parameters, M": f"{small.parameters / 1e6:.1f}",
                "perplexity": number(m),
            }
        )
    return pd.DataFrame(rows).set_index("removed")


# ---------------------------------------------------------------- recorded runs


def as_measurements(results: Results) -> list[Measurement]:
    """All of them, each naming its method, its count and its removed blocks."""
    out = [_named(m, method=method, removed=k) for (method, k), m in results.perplexity.items()]
    return out + [
        _named(m, method="perplexity", removed=k, text=results.texts[k]) for (k, _), m in results.trivia.items()
    ]


def _named(m: Measurement, **names) -> Measurement:
    return m.with_provenance(chapter=names)


def stages_of(m: Measurement, depth: int) -> list[Depth]:
    """The stage that made a row's subject of one with `depth` blocks. It removes blocks by number."""
    gone = tuple(sorted(set(range(depth)) - set(m.provenance["plan"] or range(depth))))
    return [Depth(blocks=gone, windows=DEPTH_WINDOWS)] if gone else []


def from_measurements(measurements: Sequence[Measurement], scores: Scores) -> Results:
    """The results that `as_measurements` gave.

    Raises:
        BadInput: the whole model's perplexity, or all answers, are missing.
    """
    ppl = {(m.chapter["method"], m.chapter["removed"]): m for m in measurements if m.metric == "perplexity"}
    answers = [m for m in measurements if m.metric == "accuracy"]
    if (NOTHING, 0) not in ppl or not answers:
        raise BadInput(
            "these are not the results of chapter 2: the whole model's perplexity or the answers are missing"
        )
    trivia = {(m.chapter["removed"], m.open_book): m for m in answers}
    return Results(scores, ppl, trivia, {m.chapter["removed"]: m.chapter["text"] for m in answers})


def read_recorded(path: Path) -> Results:
    """A recorded run: PATH.jsonl and, beside it, the scores."""
    rows = on_one_sample(
        Store(path).rows().values(), lambda m: (m.metric, m.open_book, m.chapter["removed"], m.chapter["method"])
    )
    own = from_measurements(list(rows.values()), Scores.from_json(read_json(_scores_file(path))))
    pool = recorded_pool(path.parent)
    trivia = {(k, is_open): quoted(m, k, OPEN if is_open else CLOSED, pool) for (k, is_open), m in own.trivia.items()}
    return dataclasses.replace(own, trivia=trivia, pool=pool)


def _scores_file(path: Path) -> Path:
    return _beside(path, "scores")


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name.removesuffix('.jsonl')}_{what}.json")


def recorded_parts(p: DepthChapter, file: Path) -> Iterator[Part]:
    """Two parts: all rows, which follow from the scores in a file beside the record, and a second file, of the
    choice's stability."""
    counts = p.possible(shape(p.subject).depth)
    methods = [*p.metrics, *(f"{RANDOM} {seed}" for seed in range(p.seeds))]
    removed = [
        (NOTHING, 0),
        *((method, k) for method in methods for k in counts),
        *((GREEDY, k) for k in counts if k <= p.greedy),
    ]
    rows: dict[Key, int | None] = {(label_of(k), "perplexity", method): p.windows for method, k in removed}
    asked = [0, *(k for k in THESIS if k in counts)]
    rows |= {
        (label_of(k), task, "perplexity"): n for task, n in ((CLOSED, p.questions), (OPEN, p.passages)) for k in asked
    }

    def make(missing: Collection[Key], keep: Keep) -> None:
        subject = load_subject(p.subject, p.dtype, p.device)
        if not (beside := _scores_file(file)).exists():
            write_whole(beside, score(subject, p).to_json())
        scores = Scores.from_json(read_json(beside))
        plans = {
            (m, k): plan
            for (m, k), plan in plans_of(subject.depth, scores).items()
            if (label_of(k), "perplexity", m) in missing
        }
        for some in neighbours(plans):
            for (method, k), m in perplexity.perplexities(
                subject, evaluation_text(p.data), some, length=p.length, limit=p.windows
            ).items():
                named = _named(m, method=method, removed=k)
                keep(described(named, subject, p.data, stages_of(named, subject.depth)))
        for k, model in pruned(subject, scores).items():
            text = ""
            for open_book, task in ((False, CLOSED), (True, OPEN)):
                if (label_of(k), task, "perplexity") in missing:
                    text = text or p.prompt + complete(model, p.prompt, p.tokens).text
                    named = _named(answers(model, p, open_book), method="perplexity", removed=k, text=text)
                    keep(described(named, subject, p.data, stages_of(named, subject.depth)))

    yield Part("all", rows, make, _scores_file(file))
    if p.stability:
        beside = _beside(file, "stability")
        yield Part(
            "stability",
            {},
            lambda *_: ch02_stability.record(
                load_subject(p.subject, p.dtype, p.device), p.data, p.stability, p.length, beside
            ),
            beside,
        )


def label_of(removed: int) -> str:
    """The label of a model without so many blocks."""
    return f"D{removed}" if removed else DENSE


def key(m: Measurement) -> Key:
    """Label, task, and the method that chose the blocks."""
    task = m.metric if m.metric == "perplexity" else book(m)
    return m.label, task, m.chapter["method"]


def for_claims(rows: Iterable[Measurement]) -> Iterator[tuple[str, str, Measurement]]:
    """The dense model, and those whose blocks perplexity chose."""
    for m in rows:
        if (note := m.chapter)["method"] in ("perplexity", NOTHING):
            yield label_of(note["removed"]), WIKITEXT if m.metric == "perplexity" else book(m), m
