"""Chapter 8's pictures of ideas: a small write that a later block makes large, three parts of a task's items, and what
is computed once when each block is skipped in turn."""

from typing import NamedTuple

import numpy as np
import torch

from thesislib.chapters.ch08_cost import runs
from thesislib.chapters.ch08_theorem import ANSWERS, measured
from thesislib.chapters.ch08_theorem import snowball as snowball_model
from thesislib.chapters.drawing import Drawing
from thesislib.compress.agreement import winners_curse
from thesislib.model.blocks import plans_without_each
from thesislib.sources.choices.choice_set import PARTS, part_of

EPS = 1e-3  # of the snowball that is drawn
UNIT = 18  # its scale: the length of a bar for 1


def states(eps: float, token: int = 1) -> tuple[list[str], np.ndarray]:
    """The residual stream of a snowball that reads one token.

    Returns:
        The names of five coordinates, and their values (5, 5): before block 0, after each block, and after block 2 if
        block 1 is skipped.
    """
    subject, ids, _ = snowball_model(ANSWERS, eps)
    v, blocks = len(ANSWERS) + 1, subject.model.model.layers
    ids = ids[ids[:, 0] == token][:, :1]
    x = subject.model.model.embed_tokens(ids)
    rotary = subject.model.model.rotary_emb(x, position_ids=torch.zeros(1, 1, dtype=torch.long))
    found = [x]
    for block in blocks:
        found.append(block(found[-1], position_embeddings=rotary))
    found.append(blocks[2](found[1], position_embeddings=rotary))
    at = {
        "junk": 2 * v,
        "token read": token,
        "answer: fallback": v,
        "answer: right": v + ANSWERS[token - 1],
        "u": 2 * v + 1,
    }
    return list(at), torch.cat(found).flatten(0, 1)[:, list(at.values())].T.numpy()


def snowball(eps: float = EPS) -> str:
    """The residual stream through three blocks: bars to one scale, and below each block its two scores."""
    case, (names, values) = measured(eps), states(eps)
    left, wide, top, high = 124, 122, 84, 26
    write, answer = names.index("u"), names.index("answer: right")
    picture = Drawing(
        left + 5 * wide,
        top + 5 * high + 80,
        "Bars of five coordinates of the residual stream, to one scale, before and after each of three blocks. Block 1 "
        f"writes {values[write, 2]:.2f} on u, hardly to be seen; block 2 multiplies it by {case.gain:.0f} into the "
        f"right answer. With block 1 skipped the right answer has {values[answer, 4]:.0f}, less than the fallback. "
        f"Cosine scores {', '.join(f'{score:.3f}' for score in case.cosine)}; relevance "
        f"{', '.join(f'{r:.0f}' for r in case.relevance)}.",
    )
    zeros = [left + (i + 0.42) * wide for i in range(5)]
    for x, words in zip(zeros, ("embedding", *(f"after block {b}" for b in (0, 1, 2, 2))), strict=True):
        picture.text(x + 4, 20, words, size=12, bold=True)
    picture.text(zeros[4] + 4, 38, "block 1 skipped", size=12, bold=True)
    below = top + 5 * high + 10
    for b in range(3):
        at = (zeros[b] + zeros[b + 1]) / 2 + 4
        picture.box(at - 28, 32, 56, 22, "changed" if b == 1 else "kept")
        picture.text(at, 47, f"block {b}", size=12)
        picture.arrow(zeros[b] - 6, 43, at - 30, 43)
        picture.text(at, below + 16, f"{case.cosine[b]:.3f}", bold=b == 1)
        picture.text(at, below + 38, f"{case.relevance[b]:.0f}", bold=b == 1)
    picture.arrow(at + 30, 43, at + 56, 43)
    picture.text(left - 16, below + 16, "cosine score", "end", size=12)
    picture.text(left - 16, below + 38, "relevance", "end", size=12)
    picture.arrow(left + 4 * wide - 6, 8, left + 4 * wide - 6, below - 6, dashed=True, head=False)
    for row, name in enumerate(names):
        y = top + row * high
        picture.text(left - 16, y + 12, name, "end", size=12, bold=row in (write, answer))
        for zero, value in zip(zeros, values[row].tolist(), strict=True):
            kind = "changed" if row == write else "added" if row == answer else "kept"
            if value:
                picture.box(zero + min(0, UNIT * value), y, abs(UNIT * value), 16, kind)
            picture.text(zero + max(0, UNIT * value) + 5, y + 12, f"{value:.2g}", "start", size=11, faint=not value)
    up, down = top + high * answer + 8, top + high * write + 8
    picture.arrow(zeros[2] + 34, down, zeros[3] - 3, up)
    picture.text((zeros[2] + zeros[3]) / 2 + 26, down + 4, f"x {case.gain:,.0f}", size=12, bold=True)
    words = "bars to one scale; the head reads the answers and nothing else"
    picture.text(left + 5 * wide - 8, below + 62, words, "end", size=12)
    return picture.svg()


def skipping(depth: int, drawn: int = 8) -> str:
    """Which blocks run when each is skipped in turn, drawn for a few blocks and counted for `depth` too."""
    side, left, top = 22, 128, 30
    plans = plans_without_each(drawn)
    few, each_few = runs(drawn)
    once, each = runs(depth)
    picture = Drawing(
        560,
        top + side * (drawn + 1) + 50,
        f"Rows of {drawn} blocks: the whole model, then the model without block 0, without block 1, and so on. Blocks "
        "before the skipped one are pale, for the whole model has run them; those after it run again. "
        f"{few} block runs instead of {each_few}; with {depth} blocks {once} instead of {each}.",
    )
    seen: set[tuple[int, ...]] = set()
    for row, plan in enumerate(plans):
        y = top + side * row
        picture.text(left - 10, y + 15, "whole" if row == 0 else f"without block {row - 1}", "end", size=12)
        for b in range(drawn):
            x, begun = left + side * b, tuple(plan[: plan.index(b) + 1]) if b in plan else None
            kind = "gone" if begun is None else "plain" if begun in seen else "kept"
            picture.box(x, y, side - 2, side - 2, kind)
            if begun is None:
                picture.cross(x, y, side - 2, side - 2)
            elif begun not in seen:
                picture.text(x + side / 2 - 1, y + 14, str(b), size=11)
                seen.add(begun)
    key = left + side * drawn + 24
    for i, (kind, words) in enumerate((("kept", "runs"), ("plain", "ran already: shared"), ("gone", "skipped"))):
        y = top + 30 * i
        picture.box(key, y, side - 2, side - 2, kind)
        if kind == "gone":
            picture.cross(key, y, side - 2, side - 2)
        picture.text(key + side + 8, y + 15, words, "start", size=12)
    y = top + side * (drawn + 1) + 22
    picture.text(14, y, f"{drawn} blocks: {few} block runs instead of {each_few} ({few / each_few:.0%})", "start")
    words = f"{depth} blocks: {once} instead of {each} ({once / each:.0%}); every variant has its own logits"
    picture.text(14, y + 20, words, "start", bold=True)
    return picture.svg()


# ---------------------------------------------------------------- the winner's curse

BLOCKS, ITEMS, DRAWS = 30, 100, 2_000  # of blocks that all lose nothing
USES = {
    "rank": "every block is scored by these, and put in order",
    "choose": "between orders, and how many blocks go",
    "report": "what the page says is lost: nothing was chosen by these",
}


class Noise(NamedTuple):
    """Scores of blocks that are all as good as the whole model, in standard errors; below 0 seems better than it.

    Args:
        first: (BLOCKS,) one draw's, by the items that blocks are ranked by.
        others: (BLOCKS,) the same blocks' by other items.
        seen: the best block's by the first items, mean over draws.
        kept: that block's by other items, mean over draws.
    """

    first: np.ndarray
    others: np.ndarray
    seen: float
    kept: float


def noise(draws: int = DRAWS, seed: int = 0) -> Noise:
    """Draw the scores of equal blocks."""
    rng, se = np.random.default_rng(seed), ITEMS**-0.5
    pairs = [rng.standard_normal((2, BLOCKS, ITEMS)) for _ in range(draws)]
    curses = [winners_curse(first, others, k=1, resamples=1) for first, others in pairs]
    first, others = pairs[0].mean(-1) / se
    return Noise(
        first,
        others,
        float(np.mean([c.seen for c in curses])) / se,
        float(np.mean([c.kept.value for c in curses])) / se,
    )


def three_parts(items: int = 18) -> str:
    """A task's items in three parts, and the best of equal blocks by the first part and by the third."""
    found, side, left = noise(), 20, 14
    parts = {name: part_of([*range(items)], name) for name in PARTS}
    kinds = dict(zip(PARTS, ("kept", "added", "changed"), strict=True))
    picture = Drawing(
        660,
        330,
        f"{items} items of a task, a third of them each to rank blocks by, to choose between orders, and to report. "
        f"Below, the scores of {BLOCKS} blocks that all lose nothing, by the items to rank by and by those to report: "
        f"on average the best block is {-found.seen:.1f} standard errors below 0 by the first, and "
        f"{abs(found.kept):.1f} away from it by the others.",
    )
    picture.text(left, 18, f"{items} items of a task; chance puts a third of them into each part", "start", bold=True)
    for i in range(items):
        kind = next(kinds[part] for part, some in parts.items() if i in some)
        picture.box(left + side * i, 28, side - 2, side - 2, kind)
        picture.text(left + side * (i + 0.5) - 1, 41, str(i), size=10)
    for row, (part, some) in enumerate(parts.items()):
        y = 64 + 28 * row
        picture.text(left + 52, y + 14, part, "end", bold=True)
        for j, item in enumerate(some):
            picture.box(left + 62 + side * j, y, side - 2, side - 2, kinds[part])
            picture.text(left + 62 + side * (j + 0.5) - 1, y + 13, str(item), size=10)
        picture.text(left + 74 + side * len(some), y + 14, USES[part], "start", size=12)
    zero, unit, best = 390, 72, int(found.first.argmin())
    words = f"why: {BLOCKS} blocks that all lose nothing, scored with the noise of their items"
    picture.text(left, 176, words, "start", bold=True)
    picture.arrow(zero, 190, zero, 276, dashed=True, head=False)
    for y, name, scores in ((200, PARTS[0], found.first), (246, PARTS[2], found.others)):
        picture.text(left, y + 13, f"by the items to {name}", "start", size=12)
        for b in [*(b for b in range(BLOCKS) if b != best), best]:
            high = 22 if b == best else 10
            picture.box(zero + unit * scores[b] - 2.5, y + 9 - high / 2, 5, high, kinds[name])
    picture.arrow(zero + unit * found.first[best], 222, zero + unit * found.others[best], 242)
    for x, at, words in ((zero - 8, "end", "seems better than the whole model"), (zero + 8, "start", "worse")):
        picture.text(x, 290, words, at, size=12, faint=True)
    picture.text(zero, 290, "0", size=12)
    words = (
        f"the best of {BLOCKS}, mean of {DRAWS:,} draws: {found.seen:.1f} standard errors by its own items, "
        f"{round(found.kept, 1) + 0:.1f} by others"
    )
    picture.text(left, 318, words, "start")
    return picture.svg()
