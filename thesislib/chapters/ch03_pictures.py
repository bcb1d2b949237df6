"""Chapter 3's pictures of ideas: how N:M is read and packed, and the calibration pass."""

import torch

from thesislib.chapters.drawing import Drawing
from thesislib.model.packing import THESIS_PATTERNS, Pattern, pack_nm, predicted_bytes

ONE_OF_EIGHT = Pattern(1, 8)
WEIGHTS = (0.8, -1.1, 0.0, 0.5, 1.9, -0.7, 0.4, -1.3)  # a group of it, already pruned


def packing() -> str:
    """A group of 1:8: eight weights, the seven that are kept, and three bits that say where the eighth was."""
    pattern, side, left = ONE_OF_EIGHT, 44, 20
    before = 16 * pattern.of
    after = 16 * pattern.keep + pattern.bits
    zero = WEIGHTS.index(0)
    _, codes = pack_nm(torch.tensor([WEIGHTS], dtype=torch.bfloat16), pattern)
    place = int(codes[0]) % 2**pattern.bits
    picture = Drawing(
        560,
        206,
        f"Eight weights of 16 bits, the third of which is zero. Packed, the seven others follow each other, and "
        f"{pattern.bits} bits with the number of the zero's place: {after} bits for {before}.",
    )
    picture.text(left, 18, f"a group of {pattern}: {pattern.of} neighbouring weights of a row, in bfloat16", "start")
    for j, weight in enumerate(WEIGHTS):
        picture.box(left + j * side, 28, side - 4, 30, "kept" if weight else "gone", f"{weight:g}")
        if not weight:
            continue
        to = j - (j > zero)
        picture.arrow(left + j * side + side / 2 - 2, 60, left + to * side + side / 2 - 2, 94)
        picture.box(left + to * side, 96, side - 4, 30, "kept", f"{weight:g}")
    at = left + pattern.keep * side + 10
    picture.box(at, 96, 64, 30, "changed", f"{place:0{pattern.bits}b}")
    picture.text(left + pattern.of * side + 10, 48, f"{pattern.of} x 16 = {before} bits", "start")
    picture.text(at + 76, 116, f"{pattern.keep} x 16 + {pattern.bits} = {after} bits", "start", size=12)
    picture.text(at + 32, 144, f"{pattern.bits} bits: which of", size=12)
    picture.text(at + 32, 159, f"{pattern.states} places", size=12)
    picture.text(left, 150, "kept values, in order", "start", size=12)
    left_over = f"{after} / {before} = {after / before:.1%} of the bytes"
    picture.text(left, 192, f"{left_over}, and every weight comes back exactly", "start", bold=True)
    return picture.svg()


def share(pattern: Pattern) -> float:
    """The bytes of a packed bfloat16 matrix, as a share of the unpacked one's."""
    columns = 8 * pattern.of
    return predicted_bytes((1, columns), torch.bfloat16, str(pattern)) / (2 * columns)


def conventions() -> str:
    """The thesis's nine patterns on 16 weights, removed ones empty, under the names of both readings."""
    patterns = sorted(THESIS_PATTERNS, key=lambda pattern: (pattern.remove / pattern.of, pattern.of))
    side, gap, left, top = 17, 6, 156, 44
    right = left + 16 * side + 7 * gap
    picture = Drawing(
        660,
        top + 24 * len(patterns) + 8,
        "Nine rows of 16 weights, one a pattern, in groups with a gap between them; removed weights are empty boxes. "
        "Beside each its name by what is removed, as in this book, and by what is kept, as NVIDIA writes it: they "
        "agree where half is removed. Beside them bits of place a group and the share of bytes that is left.",
    )
    for x, words, more in (
        (52, "removed:of", "(this book)"),
        (122, "kept:of", "(NVIDIA)"),
        (right + 52, "bits of place", "a group"),
        (right + 132, "bytes,", "packed"),
    ):
        picture.text(x, 16, words, size=12)
        picture.text(x, 31, more, size=11, faint=True)
    picture.text(left, 24, "16 weights of a row, in groups", "start", size=12)
    for i, pattern in enumerate(patterns):
        y = top + 24 * i
        picture.text(52, y + 13, str(pattern), bold=True)
        picture.text(122, y + 13, f"{pattern.keep}:{pattern.of}")
        for j in range(16):
            group, place = divmod(j, pattern.of)
            gone = (place * 5 + group) % pattern.of < pattern.remove
            picture.box(left + j * side + group * gap, y, side - 2, 17, "gone" if gone else "kept")
        picture.text(right + 52, y + 13, str(pattern.bits))
        picture.text(right + 132, y + 13, f"{share(pattern):.1%}")
    return picture.svg()


def calibration_pass() -> str:
    """One block in memory, its inputs, the statistics beside it, and the order of what happens."""
    picture = Drawing(
        640,
        250,
        "A row of blocks, of which only one is in memory. Activations of all calibration windows enter it; beside it "
        "stand X^T X of each projection's inputs; from them the weights are changed, then the block runs again and its "
        "output goes to the next block.",
    )
    for i, kind in enumerate(("kept", "kept", "changed", "gone", "gone")):
        picture.box(20, 20 + 38 * i, 100, 30, kind, f"block {i}")
    picture.text(70, 222, "...", size=16)
    picture.text(130, 40, "pruned, saved", "start", size=12)
    picture.text(130, 155, "not read yet", "start", size=12)
    picture.arrow(122, 111, 228, 111)
    picture.text(175, 103, "in memory", size=12)
    picture.box(230, 78, 150, 66, "changed")
    picture.text(305, 106, "block 2")
    picture.text(305, 126, "its projections W", size=12)
    picture.box(230, 12, 150, 32, "plain", "activations X")
    picture.text(392, 32, "of all calibration windows", "start", size=12)
    picture.arrow(305, 46, 305, 76)
    picture.text(315, 66, "1 run", "start", size=12)
    picture.box(470, 78, 150, 66, "added")
    picture.text(545, 106, "XᵀX")
    picture.text(545, 126, "WANDA: its diagonal", size=12)
    picture.arrow(382, 98, 468, 98)
    picture.text(425, 90, "2 add up", size=12)
    picture.arrow(468, 126, 382, 126)
    picture.text(425, 142, "3 change W", size=12)
    picture.arrow(305, 146, 305, 186)
    picture.text(315, 170, "4 run again, changed", "start", size=12)
    picture.box(230, 188, 150, 32, "plain", "next X, for block 3")
    picture.text(392, 208, "replaces X; memory stays the same", "start", size=12)
    return picture.svg()
