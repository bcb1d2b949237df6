"""Chapter 1's picture of an idea: a plan of blocks."""

from collections import Counter

from thesislib.chapters.drawing import Drawing

PLANS = {
    "the whole model": (0, 1, 2, 3, 4, 5),
    "skip block 3": (0, 1, 2, 4, 5),
    "run block 3 twice": (0, 1, 2, 3, 3, 4, 5),
}


def plans() -> str:
    """Three plans of a model of six blocks, each run with its slot of the KV cache, as SVG."""
    side, wide, left, height = 44, 68, 150, 92
    picture = Drawing(
        left + 7 * wide,
        3 * height,
        "Three plans of a model of six blocks. The whole model runs blocks 0 to 5 and has cache slots 0 to 5. The plan "
        "that skips block 3 runs five blocks and has slots 0 to 4, so blocks behind the gap move down one slot. The "
        "plan that runs block 3 twice has seven slots, one for each run of block 3, and holds six blocks in memory.",
    )
    for row, (name, plan) in enumerate(PLANS.items()):
        y = 4 + row * height
        picture.text(0, y + 20, name, at="start", bold=True)
        picture.text(0, y + 38, f"{len(plan)} runs, {len(set(plan))} blocks held", at="start", size=11, faint=True)
        picture.text(left - 8, y + side + 20, "cache slot", at="end", size=11, faint=True)
        often, x = Counter(plan), float(left)
        for slot, block in enumerate(plan):
            if slot and block > plan[slot - 1] + 1:
                picture.box(x, y, side, side, "gone", str(block - 1))
                picture.arrow(x - wide + side, y + side / 2, x + wide, y + side / 2)
                x += wide
            elif slot:
                picture.arrow(x - wide + side, y + side / 2, x, y + side / 2)
            picture.box(x, y, side, side, "changed" if often[block] > 1 else "kept", str(block))
            picture.text(x + side / 2, y + side + 20, str(slot), size=12, bold=slot != block or often[block] > 1)
            x += wide
    return picture.svg()
