"""`make findings`: write what was found, from the records, into the README, its figure, and the page of claims."""

import io

import matplotlib

from thesislib.chapters import FIGURE, block, figures, findings, pareto, recorded, three_findings
from thesislib.chapters.claims import page
from thesislib.chapters.pool import recorded_pool
from thesislib.files import ROOT, write_whole

matplotlib.use("agg")
readme = ROOT / "README.md"
text = readme.read_text("utf8")
for name, content in (("findings", findings()), ("three", three_findings())):
    before, after = block(text, name)
    text = before + content + after
write_whole(readme, text)
write_whole(ROOT / "book" / "claims.md", page(recorded_pool()))
record = recorded("06_evaluation").for_fronts
figures.style()
table = pareto.points(record)
measures = {name: task.ratio for name, task in pareto.MEASURES.items()}
drawn = figures.pareto_chart(table, pareto.fronts(table), measures, pareto.marks_of(record))
image = io.BytesIO()
drawn.savefig(image, dpi=80, metadata={"Description": pareto.digest(record), "Software": None})
write_whole(ROOT / FIGURE, image.getvalue())
