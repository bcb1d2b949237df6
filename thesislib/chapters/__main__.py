"""`make findings`: write what was found, from the records, into the README."""

import re

from thesislib.book import ROOT
from thesislib.chapters import findings
from thesislib.files import write_whole

readme = ROOT / "README.md"
text = readme.read_text("utf8")
block = re.compile(r"(<!-- findings: .*? -->\n).*?(<!-- /findings -->)", re.DOTALL)
write_whole(readme, block.sub(lambda m: m[1] + findings() + m[2], text))
