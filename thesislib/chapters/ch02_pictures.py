"""Chapter 2's picture of an idea: blocks that are taken out, and the cache that is numbered anew."""

from collections.abc import Sequence

from thesislib.chapters.drawing import Drawing
from thesislib.chapters.phrases import together


def removal(depth: int, gone: Sequence[int]) -> str:
    """A model's blocks, those that go struck out, and below the blocks that stay with their entries of the KV cache."""
    side, left = 22, 18
    stay = [b for b in range(depth) if b not in gone]
    names = together(map(str, gone))
    picture = Drawing(
        2 * left + side * depth,
        196,
        f"{depth} boxes in a row are the blocks of a model; {names} are struck out. Below them {len(stay)} boxes "
        "without a gap are the blocks that stay; entries of the KV cache under them are numbered 0 to "
        f"{len(stay) - 1}, so that every block after {min(gone)} has a new number.",
    )
    picture.text(left, 16, f"a model of {depth} blocks; {names} cost least to leave out", "start")
    picture.text(left, 108, "their neighbours are joined, no weight changes", "start")
    picture.text(left, 176, "KV cache: one entry a block, numbered anew. Keep the old numbers, and", "start")
    picture.text(left, 192, "generation reads another block's keys and values, or none.", "start")
    for b in range(depth):
        x = left + b * side
        picture.box(x, 26, side - 2, 24, "gone" if b in gone else "kept")
        picture.text(x + side / 2 - 1, 42, str(b), size=11)
        if b in gone:
            picture.cross(x, 26, side - 2, 24)
    for new, b in enumerate(stay):
        x = left + new * side
        changed = "changed" if new != b else "kept"
        picture.box(x, 116, side - 2, 24, "kept")
        picture.text(x + side / 2 - 1, 132, str(b), size=11)
        picture.box(x, 140, side - 2, 20, changed)
        picture.text(x + side / 2 - 1, 154, str(new), size=11)
        if b - 1 in gone or b + 1 in gone or new in (0, len(stay) - 1):
            picture.arrow(left + b * side + side / 2 - 1, 52, x + side / 2 - 1, 90 if new < 8 else 92, dashed=True)
    return picture.svg()
