"""`make findings`: write what was found, from the records, into the README and the page of claims."""

import re

from thesislib.book import ROOT
from thesislib.chapters import findings
from thesislib.claims import page, recorded_pool
from thesislib.files import write_whole

readme = ROOT / "README.md"
text = readme.read_text("utf8")
block = re.compile(r"(<!-- findings: .*? -->\n).*?(<!-- /findings -->)", re.DOTALL)
write_whole(readme, block.sub(lambda m: m[1] + findings() + m[2], text))
write_whole(ROOT / "book" / "claims.md", page(recorded_pool()))
