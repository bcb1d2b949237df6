"""Chapter 8's question 6, second half: does training heal the difference between two rankings' sets of blocks?

Each set is trained as chapter 4 trains (LoRA on WikiText-2), with several seeds, and answers the items to report.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from thesislib.chapters import ch04_runs
from thesislib.chapters.chapter import Keep, Key, Part
from thesislib.chapters.phrases import number, p_value, ratio, together
from thesislib.compress.depth import Depth
from thesislib.compress.lora.stage import Lora
from thesislib.evaluate.compare import compare
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.stats import holm_adjusted
from thesislib.experiment import prepare
from thesislib.records.measurement import Measurement

HEALED = ("cosine", "likelihood: all", "relevance: all")  # rankings whose sets are trained
PERPLEXITY = "perplexity"
Choose = Callable[[str, int], tuple[int, ...]]  # the blocks that a ranking removes


def lora(steps: int, seed: int) -> Lora:
    """Chapter 4's training on WikiText-2, of so many steps."""
    return ch04_runs.recorded_parameters(steps=steps, every=max(1, steps // 6)).training(seed=seed)


def setups(items: int, length: int, tasks: tuple[str, ...], part: str) -> dict[str, Setup]:
    """What is measured of a healed model, by name: perplexity on the whole text, and the items to report."""
    return {PERPLEXITY: Setup("wikitext", length=length)} | {
        task: Setup(task, limit=items, fast=True, part=part) for task in tasks
    }


def parts(p, choose: Choose, tasks: tuple[str, ...], part: str) -> Iterator[Part]:
    """Each training by itself, seed after seed, so that every model has a first one before any has a second.

    Args:
        p: see `thesislib.chapters.ch08_runs.Relevance`.
        choose: called when a part is made.
        tasks: whose items are asked.
        part: of their items.
    """
    measured = setups(p.items, p.length, tasks, part)

    def make(k: int, ranking: str, seed: int, missing: Collection[Key], keep: Keep) -> None:
        removed = choose(ranking, k)
        ready = prepare(
            p.subject, [Depth(blocks=list(removed)), lora(p.steps, seed)], data=p.data, dtype=p.dtype, device=p.device
        )
        for _, task, *_ in missing:
            facts = {"ranking": ranking, "removed": list(removed), "seed": seed}
            keep(ready.measure(measured[task], p.data, chapter=facts))

    for seed in range(p.seeds):
        for k in p.healed:
            for ranking in HEALED:
                rows: dict[Key, int | None] = {
                    (f"D{k}+W", task, "" if task == PERPLEXITY else part, ranking, seed): setup.limit
                    for task, setup in measured.items()
                }
                yield Part(f"healed D{k} {ranking} {seed}", rows, functools.partial(make, k, ranking, seed))


def is_healed(m: Measurement) -> bool:
    """Whether a row is of a trained set."""
    return bool(m.chapter) and "seed" in m.chapter


# ---------------------------------------------------------------- what was found


class Healed(NamedTuple):
    """A set of blocks that was trained.

    Args:
        k: blocks removed.
        ranking: that chose them.
        seed: of the training.
        curve: {step: held-out loss, nats a token}, step 0 before the training.
        rows: its rows by what was measured.
    """

    k: int
    ranking: str
    seed: int
    curve: dict[int, float]
    rows: dict[str, Measurement]

    @property
    def before(self) -> float:
        """The held-out loss of the set as it was chosen."""
        return self.curve[0]

    @property
    def after(self) -> float:
        """The least held-out loss of the training, which is kept."""
        return min(self.curve.values())


def healed(rows: Mapping[tuple, Measurement]) -> list[Healed]:
    """What was trained and measured whole, from a chapter-8 record's rows, by blocks removed, ranking and seed."""
    by_model: dict[tuple[int, str, int], dict[str, Measurement]] = {}
    for (label, task, _, ranking, seed), m in rows.items():
        by_model.setdefault((int(label[1:].split("+")[0]), ranking, seed), {})[task] = m
    found = []
    for (k, ranking, seed), mine in sorted(by_model.items(), key=lambda item: (item[0][0], item[0][2])):
        if PERPLEXITY in mine:
            curve = {p["step"]: p["loss"] for p in mine[PERPLEXITY].made["reports"][-1]["validation"]}
            found.append(Healed(k, ranking, seed, curve, mine))
    return found


def counts(rows: Mapping[tuple, Measurement]) -> list[int]:
    """How many blocks were removed where every ranking's set was trained."""
    every = healed(rows)
    return [k for k in dict.fromkeys(h.k for h in every) if {h.ranking for h in every if h.k == k} >= {*HEALED}]


def healing_sentence(rows: Mapping[tuple, Measurement], k: int) -> str:
    """Whether training erases the difference between rankings' sets of k blocks."""
    mine = [h for h in healed(rows) if h.k == k]
    seeds = len({h.seed for h in mine})
    before, after = ({n: np.mean([getattr(h, end) for h in mine if h.ranking == n]) for n in HEALED}
                     for end in ("before", "after"))  # fmt: skip
    base = next(h for h in mine if h.ranking == HEALED[0])
    tests = holm_adjusted(
        {
            h.ranking: compare(base.rows[PERPLEXITY], h.rows[PERPLEXITY])
            for h in mine
            if h.seed == base.seed and h != base
        }
    )
    said = together(f"{n} {before[n]:.2f} to {after[n]:.2f}" for n in HEALED)
    apart = max(before.values()) - min(before.values()), max(after.values()) - min(after.values())
    beside = together(f"{name} {ratio(c)} ({p_value(c.p)})" for name, c in tests.items())
    return (
        f"{k} blocks, then LoRA ({seeds} seed{'s' if seeds > 1 else ''}): held-out nats a token fall from {said}. "
        f"The rankings lie {apart[0]:.2f} apart before and {apart[1]:.2f} after. Perplexity on "
        f"{base.rows[PERPLEXITY].n} other windows against cosine's set: {beside}."
    )


def healing_table(rows: Mapping[tuple, Measurement]) -> pd.DataFrame:
    """Every trained set: held-out loss by step, perplexity, right answers of the items to report."""
    found = []
    for h in healed(rows):
        steps = {f"step {step}": f"{loss:.3f}" for step, loss in sorted(h.curve.items())}
        answers = {task: f"{m.value:.1%}" for task, m in h.rows.items() if task != PERPLEXITY}
        removed = ", ".join(map(str, h.rows[PERPLEXITY].chapter["removed"]))
        found.append({"": f"{h.k}, {h.ranking}", "seed": h.seed, "blocks": removed, **steps,
                      "perplexity": number(h.rows[PERPLEXITY]), **answers})  # fmt: skip
    return pd.DataFrame(found).set_index("")
