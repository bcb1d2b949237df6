"""Pictures of ideas as SVG: boxes, words and arrows that follow the page's colours, light or dark.

Lines and words take the colour of the text around them. Fills are pale enough for either ground, and never the only
mark of a difference. In a file of its own a picture follows the reader's system.
"""

import html
from collections.abc import Sequence
from pathlib import Path

from thesislib.chapters.figures import BLUE, GREEN, GREY, ORANGE
from thesislib.files import write_whole

FILLS = {"kept": BLUE, "changed": ORANGE, "added": GREEN, "gone": "none", "plain": GREY}
PALE = {"kept": 0.25, "changed": 0.3, "added": 0.3, "gone": 0, "plain": 0.12}
ALONE = (
    "<style>svg{color:#1f2328;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}</style>"
)


class Drawing:
    """An SVG picture of a size in its own units, some 700 wide; text is 13 high.

    Args:
        width, height: of the picture.
        alt: what it shows, for those who cannot see it.
    """

    def __init__(self, width: float, height: float, alt: str):
        if len(alt) < 30:
            raise ValueError(f"a picture needs an alternative text that says what it shows, not '{alt}'")
        self.width, self.height, self.alt = width, height, alt
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "plain", words: str = "") -> None:
        """A box, a kind of `FILLS`: gone is dashed and empty. Words stand in its middle."""
        dash = ' stroke-dasharray="4 3" opacity=".6"' if kind == "gone" else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{FILLS[kind]}" '
            f'fill-opacity="{PALE[kind]}" stroke="currentColor" stroke-width="1"{dash}/>'
        )
        if words:
            self.text(x + width / 2, y + height / 2 + 4.5, words)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        at: str = "middle",
        size: float = 13,
        bold: bool = False,
        faint: bool = False,
    ) -> None:
        """Words on a line whose foot is at y; at: start, middle or end."""
        look = ' font-weight="600"' * bold + ' opacity=".75"' * faint
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{at}" font-size="{size:g}"{look}>{html.escape(words)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, dashed: bool = False, head: bool = True) -> None:
        """A straight arrow, or a line."""
        look = ' stroke-dasharray="4 3"' * dashed + ' marker-end="url(#head)"' * head
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="currentColor" stroke-width="1.2"{look}/>'
        )

    def cross(self, x: float, y: float, width: float, height: float) -> None:
        """A box struck out."""
        self.arrow(x, y, x + width, y + height, head=False)
        self.arrow(x, y + height, x + width, y, head=False)

    def cells(
        self, x: float, y: float, words: Sequence[Sequence[str]], kinds: Sequence[Sequence[str]], side: float = 30
    ):
        """A matrix of square boxes with words, each a kind of `FILLS`."""
        for i, (row, looks) in enumerate(zip(words, kinds, strict=True)):
            for j, (word, kind) in enumerate(zip(row, looks, strict=True)):
                self.box(x + j * side, y + i * side, side, side, kind)
                self.text(x + (j + 0.5) * side, y + (i + 0.5) * side + 4, word, size=min(12, side * 0.4))

    def svg(self, alone: bool = False) -> str:
        """The picture; alone: as the content of a file."""
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 8 4 0 8z" fill="currentColor"/></marker></defs>'
        )
        shown = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" role="img" aria-label="{html.escape(self.alt)}" '
            'font-family="system-ui, sans-serif" fill="currentColor">'
            f"{ALONE if alone else ''}{head}\n{shown}\n</svg>"
        )

    def write(self, file: Path) -> None:
        """Write it to an .svg file."""
        write_whole(file, self.svg(alone=True) + "\n")
