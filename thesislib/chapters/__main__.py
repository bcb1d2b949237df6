"""`make findings`: write what was found, from the records, into the README, its figure, and the page of claims."""

import io

import matplotlib

from thesislib.chapters import FIGURE, block, figures, first_page, pareto, recorded
from thesislib.chapters.claims import page
from thesislib.chapters.pool import recorded_pool
from thesislib.files import ROOT, write_whole

matplotlib.use("agg")
strip = first_page.strip(first_page.chain())
strip.write(ROOT / first_page.STRIP)
readme = ROOT / "README.md"
before, after = block(readme.read_text("utf8"), "first")
picture = f"![{strip.alt}]({first_page.STRIP})"
write_whole(readme, before + first_page.text("notebooks/{}.ipynb", "book/{}.md", picture) + after)
write_whole(ROOT / "book" / "claims.md", page(recorded_pool()))
record = recorded("06_evaluation").for_fronts
figures.style()
table = pareto.points(record)
measures = {name: task.ratio for name, task in pareto.MEASURES.items()}
drawn = figures.pareto_chart(table, pareto.fronts(table), measures, pareto.marks_of(record))
image = io.BytesIO()
drawn.savefig(image, dpi=80, metadata={"Description": pareto.digest(record), "Software": None})
write_whole(ROOT / FIGURE, image.getvalue())
