"""Chapter 8's question 7: what each ranking costs, and what it would cost on larger models."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from thesislib.chapters.ch08_record import Record
from thesislib.chapters.ch08_scores import SIZES
from thesislib.chapters.phrases import together
from thesislib.model.blocks import plans_without_each
from thesislib.model.forward import blocks_run
from thesislib.sources.choices.choice_set import PARTS


class Size(NamedTuple):
    """The weights that a token is multiplied by.

    Args:
        name: of a model.
        blocks: how many.
        block: weights of one.
        head: weights of the head.
    """

    name: str
    blocks: int
    block: int
    head: int


def llama(name: str, blocks: int, width: int, mlp: int, keys: int, vocabulary: int) -> Size:
    """The size of a Llama: queries and outputs are as wide as the model, keys and values `keys` wide."""
    return Size(name, blocks, width * (2 * width + 2 * keys + 3 * mlp), width * vocabulary)


HERE = llama("SmolLM2-135M", 30, 576, 1536, 192, 49152)
LARGER = (
    llama("Llama-3.2-1B", 16, 2048, 8192, 512, 128256),
    llama("Llama-3-8B", 32, 4096, 14336, 1024, 128256),
)


def weights_of(size: Size, leave_one_out: bool) -> int:
    """Weights that a token is multiplied by: once through all blocks, or by the whole model and the model without each
    block, beginnings shared, each with its logits."""
    if not leave_one_out:
        return size.blocks * size.block
    shared, _ = runs(size.blocks)
    return shared * size.block + (size.blocks + 1) * size.head


def runs(depth: int) -> tuple[int, int]:
    """Block runs of the whole model and the model without each block: beginnings shared, and one by one."""
    return blocks_run(plans_without_each(depth))


def an_item(record: Record) -> float:
    """Processor seconds that a further item takes without each block in turn, of the first task."""
    few, many = min(SIZES), max(SIZES)
    task = next(iter(record.scores.cosine))
    seconds = record.scores.seconds
    return (seconds[f"{task}, {many} items"] - seconds[f"{task}, {few} items"]) / (many - few)


def cost_table(record: Record) -> pd.DataFrame:
    """Seconds of each ranking on one thread here, and projected: by the weights that a token is multiplied by."""
    seconds, task = record.scores.seconds, next(iter(record.scores.cosine))
    windows, n = record.scores.losses.shape[1], len(record.outcomes[task, PARTS[0]].chance)
    rows = {
        (f"cosine, {windows} windows"): (seconds["influence"], False),
        (f"entropy, {windows} windows"): (seconds["entropy"], False),
        (f"perplexity, {windows} windows"): (seconds["perplexity"], True),
        (f"divergence from the whole model, {windows} windows"): (seconds["next_token kl"], True),
        **{
            f"answers or their log-probability, {items:,} items": (items * an_item(record), True)
            for items in (n, 1_000)
        },
    }
    table = {}
    for name, (here, every) in rows.items():
        factors = {size.name: weights_of(size, every) / weights_of(HERE, every) for size in LARGER}
        table[name] = {
            HERE.name: duration(here),
            **{f"{size}, projected": duration(here * factor) for size, factor in factors.items()},
        }
    return pd.DataFrame(table).T.rename_axis("ranking by")


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def cost_sentence(record: Record) -> str:
    """What asking costs beside one pass, and what sharing beginnings saves."""
    shared, apart = runs(record.depth)
    task = next(iter(record.scores.cosine))
    n = len(record.outcomes[task, PARTS[0]].chance)
    factor = n * an_item(record) / record.scores.seconds["influence"]
    return (
        f"Cosine takes one pass. Without each block in turn {n} items of {task} take {factor:.0f} times its seconds. "
        f"The {record.depth + 1} models take {shared} block runs a token instead of {apart} ({shared / apart:.0%}), "
        "since the blocks before a left-out one run once."
    )


def sharing_sentence(depths: Sequence[int] = (16, 30, 80)) -> str:
    """The share of block runs that is left when beginnings are shared, by depth."""
    said = together(f"{shared / apart:.0%} at {d} blocks" for d in depths for shared, apart in [runs(d)])
    return (
        f"The blocks before the skipped one run once for all: of L + L (L - 1) block runs L (L + 1) / 2 are left, "
        f"{said}. More depth saves no more than half, since the blocks after the skipped one see another stream each "
        "time."
    )
