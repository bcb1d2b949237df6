"""`make findings`: write what was found, from the records, into the README, its figure, and the page of claims."""

import io
from pathlib import Path

import matplotlib

from thesislib.chapters import FIGURE, block, claims, figures, findings, pareto, recorded, three_findings
from thesislib.chapters.pool import recorded_pool
from thesislib.files import ROOT, write_whole

matplotlib.use("agg")


def write_figure(drawn: figures.plt.Figure, file: Path, digest: str) -> None:
    """Write a figure as PNG, with the digest of what it was drawn from."""
    image = io.BytesIO()
    drawn.savefig(image, dpi=80, metadata={"Description": digest, "Software": None})
    write_whole(file, image.getvalue())


def main() -> None:
    """Write all of them."""
    readme = ROOT / "README.md"
    text = readme.read_text("utf8")
    for name, content in (("findings", findings()), ("three", three_findings())):
        before, after = block(text, name)
        text = before + content + after
    write_whole(readme, text)
    figures.style()
    write_claims()
    record = recorded("06_evaluation").for_fronts
    table = pareto.points(record)
    measures = {name: task.ratio for name, task in pareto.MEASURES.items()}
    drawn = figures.pareto_chart(table, pareto.fronts(table), measures, pareto.marks_of(record))
    write_figure(drawn, ROOT / FIGURE, pareto.digest(record))


def write_claims() -> None:
    """Write the page of claims and its figure."""
    records = recorded_pool()
    write_whole(ROOT / "book" / "claims.md", claims.page(records))
    table = claims.forest(claims.verdicts(records))
    write_figure(figures.forest_chart(table), ROOT / claims.FIGURE, claims.digest(table))


if __name__ == "__main__":
    main()
