"""A Sphinx extension: figures and settings that a page's prose names become links, see `thesislib.chapters.links`.

It works on the finished page, so that Markdown, generated sentences, captions and tables are treated alike. A figure or
a setting that does not exist is a warning, which fails the build.
"""

import re
from pathlib import Path

from sphinx.util import logging

from thesislib.chapters.links import linked
from thesislib.errors import BadInput


def _figures(app) -> None:
    app.figures = {
        name: f"notebooks/{file.stem}"
        for file in Path(app.srcdir, "notebooks").glob("*.ipynb")
        for name in re.findall(r'<figure[^>]* id=\\"(fig-\d+-\d+)\\"', file.read_text("utf8"))
    }


def _link(app, pagename, templatename, context, doctree) -> None:
    objects = app.env.get_domain("py").objects

    def address(name: str) -> str:
        if name in app.figures:
            return f"{app.builder.get_relative_uri(pagename, app.figures[name])}#{name}"
        return f"{app.builder.get_relative_uri(pagename, objects[name].docname)}#{objects[name].node_id}"

    if doctree is not None and not pagename.startswith("book/api"):
        try:
            context["body"] = linked(context["body"], address)
        except (BadInput, KeyError) as error:
            logging.getLogger(__name__).warning(f"{pagename} names what is not in the book: {error}")


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("builder-inited", _figures)
    app.connect("html-page-context", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
