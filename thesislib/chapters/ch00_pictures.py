"""Chapter 0's picture of an idea: what a window hides from a token."""

from thesislib.chapters.drawing import Drawing

TOKENS, MARKED = 16, 9


def windows() -> str:
    """Sixteen tokens in windows of four and of sixteen: how many tokens before it one of them sees, as SVG."""
    side, left, height = 32, 150, 86
    picture = Drawing(
        left + TOKENS * side + 8,
        2 * height,
        "The same sixteen tokens cut into windows of four and into one of sixteen. Token 9 is predicted from one "
        "token before it in the first case and from nine in the second.",
    )
    for row, length in enumerate((4, TOKENS)):
        y, first = 8 + row * height, MARKED - MARKED % length
        picture.text(0, y + 15, f"windows of {length}", at="start", bold=True)
        seen = MARKED - first
        picture.text(0, y + 33, f"sees {seen} token{'s' * (seen > 1)} before it", at="start", size=11, faint=True)
        for token in range(TOKENS):
            kind = "changed" if token == MARKED else "kept" if first <= token < MARKED else "plain"
            gap = 5 * (token // length) * (length < TOKENS)
            picture.box(left + token * (side - 1) + gap, y, side - 3, side - 3, kind, str(token))
        begin = left + first * (side - 1) + 5 * (first // length) * (length < TOKENS)
        end = left + MARKED * (side - 1) + 5 * (MARKED // length) * (length < TOKENS)
        picture.arrow(begin, y + side + 10, end + side / 2 - 3, y + side + 10)
    return picture.svg()
