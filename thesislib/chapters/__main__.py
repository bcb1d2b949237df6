"""`make findings`: write the first page into README with its strip, and the page of claims with its figure, from the
records."""

import io
from pathlib import Path

import matplotlib

from thesislib.chapters import block, claims, figures, first_page
from thesislib.chapters.paper_claims import recorded_claims
from thesislib.chapters.pool import recorded_pool
from thesislib.files import ROOT, write_whole

matplotlib.use("agg")


def write_figure(drawn: figures.plt.Figure, file: Path, digest: str) -> None:
    """Write a figure as PNG, with the digest of what it was drawn from."""
    image = io.BytesIO()
    drawn.savefig(image, dpi=80, metadata={"Description": digest, "Software": None})
    write_whole(file, image.getvalue())


def write_readme() -> None:
    """Write the first page into README, and its strip."""
    strip = first_page.strip(first_page.chain())
    strip.write(ROOT / first_page.STRIP)
    readme = ROOT / "README.md"
    before, after = block(readme.read_text("utf8"), "first")
    picture = f"![{strip.alt}]({first_page.STRIP})"
    write_whole(readme, before + first_page.text("notebooks/{}.ipynb", "book/{}.md", picture) + after)


def write_claims() -> None:
    """Write the page of claims and its figure."""
    records = recorded_pool()
    write_whole(ROOT / "book" / "claims.md", claims.page(records, recorded_claims()))
    table = claims.forest(claims.verdicts(records))
    write_figure(figures.forest_chart(table), ROOT / claims.FIGURE, claims.digest(table))


if __name__ == "__main__":
    figures.style()
    write_readme()
    write_claims()
