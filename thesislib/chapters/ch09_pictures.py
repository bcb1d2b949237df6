"""Chapter 9's pictures of ideas: a weight as a pair, whitening, and the path beside an MLP."""

from thesislib.chapters.drawing import Drawing


def pair() -> str:
    """A weight beside two thin factors, drawn to scale."""
    d = Drawing(
        640,
        230,
        "A tall matrix W of 1536 by 576 beside a tall thin matrix B of 1536 by 335 and a flat matrix A of 335 by "
        "576. At rank 335 the two have eight tenths of the parameters of W, though 335 of 576 directions are kept.",
    )
    d.box(40, 30, 72, 192, "kept", "W")
    d.text(76, 20, "1536 × 576", faint=True)
    d.text(150, 130, "≈", size=22)
    d.box(190, 30, 42, 192, "changed", "B")
    d.text(211, 20, "1536 × 335", faint=True)
    d.box(250, 30, 72, 42, "changed", "A")
    d.text(330, 54, "335 × 576", "start", faint=True)
    d.text(385, 110, "0.8 of the parameters", "start", bold=True)
    d.text(385, 132, "58 % of the directions", "start")
    d.text(385, 154, "x → A x → B (A x): two small products", "start", faint=True)
    return d.svg()


def metric() -> str:
    """Which directions a plain SVD and a whitened one keep."""
    d = Drawing(
        640,
        220,
        "Two panels. Left: directions of a weight sorted by the weight's own size; some of the large ones are never "
        "used by inputs. Right: the same directions sorted by size times use; the unused ones fall behind and go.",
    )
    sizes, use = (60, 52, 44, 38, 30, 22), (0.2, 1.0, 0.15, 1.0, 0.9, 0.8)
    for left, title, key in ((30, "SVD: largest weights", lambda i: -sizes[i]),
                             (345, "whitened: largest outputs", lambda i: -sizes[i] * use[i])):  # fmt: skip
        d.text(left + 130, 20, title, bold=True)
        for place, i in enumerate(sorted(range(6), key=key)):
            height = 2.2 * sizes[i]
            d.box(left + 44 * place, 180 - height, 32, height, "kept" if place < 3 else "gone")
            used = height * use[i]
            d.box(left + 44 * place + 8, 180 - used, 16, used, "changed")
            d.text(left + 44 * place + 16, 198, str(i + 1), faint=True)
    d.text(
        320, 215, "outer bar: size in the weight; inner bar: size in the output; solid outer bars are kept", faint=True
    )
    return d.svg()


def path() -> str:
    """CALR's MLP: three pairs, and a linear path around them."""
    d = Drawing(
        640,
        210,
        "An input x goes into gate and up, each two thin boxes, whose product goes into down, again two thin boxes. "
        "A path of two thin boxes leads from x around all three to the sum at the output.",
    )
    d.text(24, 100, "x")
    for y, name in ((40, "gate"), (120, "up")):
        d.arrow(36, 96, 92, y + 18)
        d.box(94, y, 26, 36, "changed", "A")
        d.box(126, y, 26, 36, "changed", "B")
        d.text(123, y - 6, name, faint=True)
        d.arrow(154, y + 18, 216, 96)
    d.text(228, 101, "×", size=18)
    d.arrow(240, 96, 292, 96)
    d.box(294, 78, 26, 36, "changed", "A")
    d.box(326, 78, 26, 36, "changed", "B")
    d.text(323, 72, "down", faint=True)
    d.arrow(354, 96, 452, 96)
    d.text(464, 101, "+", size=18)
    d.arrow(476, 96, 540, 96)
    d.text(556, 101, "y")
    d.arrow(24, 108, 24, 184, head=False)
    d.arrow(24, 184, 230, 184)
    d.box(232, 166, 26, 36, "added", "A")
    d.box(264, 166, 26, 36, "added", "B")
    d.text(320, 190, "the path, linear", "start", bold=True)
    d.arrow(292, 184, 316, 184, head=False)
    d.arrow(464, 184, 464, 108)
    d.arrow(430, 184, 464, 184, head=False)
    return d.svg()
