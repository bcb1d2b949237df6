"""Chapter 8's question 6, second half: does training heal the difference between two rankings' sets of blocks?

Each set is trained as chapter 4 trains (LoRA on WikiText-2), with several seeds, and answers the items to report.
"""

import functools
from collections.abc import Callable, Collection, Iterator

from thesislib.chapters import ch04_runs
from thesislib.chapters.chapter import Keep, Key, Part
from thesislib.compress.depth import Depth
from thesislib.compress.lora.stage import Lora
from thesislib.evaluate.setup import Setup
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
