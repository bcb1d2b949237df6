"""A Sphinx extension: labels of models in prose, such as D2+W1:8, become abbreviations with their meaning.

Tables and generated sentences have theirs already, see `thesislib.chapters.page`.
"""

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from thesislib.chapters.labels import abbreviated, pieces

OTHER = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.title, nodes.abbreviation, nodes.raw)


class Labels(SphinxPostTransform):
    """Cuts the texts of a page at their labels."""

    default_priority = 600
    formats = ("html",)

    def run(self, **_) -> None:
        """Called by Sphinx for each page; the API's are left as they are."""
        if self.env.docname.startswith("book/api"):
            return
        for text in [t for t in self.document.findall(nodes.Text) if t.parent is not None]:
            before = text.parent.children[text.parent.index(text) - 1] if text.parent.index(text) else None
            marked = isinstance(before, nodes.raw) and before.astext().startswith("<abbr")
            cut = list(pieces(str(text), False))
            if marked or self._within(text) or not any(label for _, label in cut):
                continue
            new = [nodes.raw("", abbreviated(label), format="html") if label else nodes.Text(piece)
                   for piece, label in cut if piece]  # fmt: skip
            text.parent.replace(text, new)

    def _within(self, node: nodes.Node) -> bool:
        while (node := node.parent) is not None:
            if isinstance(node, OTHER):
                return True
        return False


def setup(app) -> dict:
    """Called by Sphinx."""
    app.add_post_transform(Labels)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
