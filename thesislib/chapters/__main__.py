"""`make findings`: write what was found, from the records, into the README, its picture, and the page of claims."""

from thesislib.chapters import block, first_page
from thesislib.chapters.claims import page
from thesislib.chapters.pool import recorded_pool
from thesislib.files import ROOT, write_whole

strip = first_page.strip(first_page.chain())
strip.write(ROOT / first_page.STRIP)
readme = ROOT / "README.md"
before, after = block(readme.read_text("utf8"), "first")
picture = f"![{strip.alt}]({first_page.STRIP})"
write_whole(readme, before + first_page.text("notebooks/{}.ipynb", "book/{}.md", picture) + after)
write_whole(ROOT / "book" / "claims.md", page(recorded_pool()))
