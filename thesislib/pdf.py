"""The book as one PDF: each page printed by Chromium, folds open, then joined."""

import io
import shutil
import sys
from pathlib import Path

import yaml

from thesislib.errors import BadInput
from thesislib.files import ROOT, write_whole

HIDDEN = "header, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header, footer, .prev-next-area, details.hide"
STYLE = f"""
{HIDDEN} {{ display: none !important }}
pre {{ white-space: pre-wrap !important; overflow-wrap: anywhere }}
figcaption, caption {{ color: #222 !important }}
figure, tr {{ break-inside: avoid }}
"""


def pages(root: Path = ROOT) -> list[str]:
    """The book's pages in order, but the API's: names as in `_toc.yml`."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *(page for page in listed if page != "book/api")]


def write(html: Path, out: Path) -> Path:
    """Print the pages of a built book into one PDF.

    Args:
        html: the folder of the built pages.
        out: the file.

    Raises:
        BadInput: the book is not built, or there is no Chromium.
    """
    from playwright.sync_api import sync_playwright
    from pypdf import PdfWriter

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        raise BadInput("a PDF is printed by Chromium, and none is here: Debian's package chromium has one")
    if not (html / "index.html").exists():
        raise BadInput(f"{html} holds no built book: run `make book`")
    joined = PdfWriter()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in pages():
            page = browser.new_page()
            page.goto((html / f"{name}.html").resolve().as_uri(), wait_until="networkidle")
            page.add_style_tag(content=STYLE)
            page.evaluate(
                "document.querySelectorAll('details.all, details.fold, details.answer').forEach(d => d.open = true)"
            )
            file = out.with_suffix(f".{name.replace('/', '-')}.pdf")
            page.pdf(
                path=str(file), format="A4", margin={"top": "14mm", "bottom": "14mm", "left": "14mm", "right": "14mm"}
            )
            joined.append(file, outline_item=page.title())
            file.unlink()
            page.close()
        browser.close()
    content = io.BytesIO()
    joined.write(content)
    write_whole(out, content.getvalue())
    return out


if __name__ == "__main__":
    try:
        print(write(ROOT / "_build" / "book" / "_build" / "html", ROOT / "_build" / "book.pdf"))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
