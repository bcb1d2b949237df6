"""What a chapter shows: its box, sentences, tables, figures, folds and exercises, as HTML that a notebook and the book
both read.

Labels of configurations become abbreviations with their meaning here, and nowhere else: what a chapter's functions
return has labels as records have them.
"""

import base64
import html
import io
import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Markdown, display
from markdown_it import MarkdownIt

from thesislib.chapters.chapter import Chapter
from thesislib.chapters.labels import marked
from thesislib.chapters.phrases import FAILS, HOLDS, written
from thesislib.files import data_file, read_json
from thesislib.tables import RESULTS, as_data

MINUTES = "results/minutes.json"  # written by `python -m thesislib.book --time`
ROWS = 12  # of a table that are in view; the others are behind a fold


def say(*sentences: str, lead: str = "") -> None:
    """Show sentences of Markdown as one paragraph, each label with its meaning.

    Args:
        sentences: empty ones are left out.
        lead: what the paragraph is about, in bold.
    """
    text = " ".join(marked(sentence.strip()) for sentence in sentences if sentence.strip())
    if text:
        display(Markdown(f"**{lead}** {text}" if lead else text))


def expect(holds: bool, sentence: str) -> None:
    """Say whether a sentence holds in this run.

    It was written about the embedded model. That another model differs is a result and no error.
    """
    verdict, sign = (HOLDS, "✓") if holds else (f"{FAILS} for this subject", "✗")
    display(Markdown(f"{sign} *{verdict}:* {marked(sentence)}"))


class Table:
    """A table under its caption, its first rows in view and the whole behind a fold, with a download as CSV.

    Args:
        table: labels in its index, its cells and its headings get their meaning.
        caption: what it shows, in a sentence of Markdown.
        folded: the line behind which all of it is hidden, "" to show it.
        name: of the CSV file, without its ending.
    """

    def __init__(self, table: pd.DataFrame, caption: str, folded: str = "", name: str = "table"):
        self.table, self.caption, self.folded, self.name = table, caption, folded, name

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        return {"text/plain": repr(self.table), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        shown = _table(self.table, self.caption, self.name)
        return folded(self.folded, shown) if self.folded else shown


class Results(Table):
    """The table of the cell tagged `results`: a `Table` that is handed over to a sweep as data."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(), RESULTS: as_data(self.table)}


def folded(summary: str, content: str, kind: str = "fold") -> str:
    """HTML behind a line of Markdown that opens it."""
    return f'<details class="{kind}"><summary>{_inline(summary)}</summary>\n{content}\n</details>'


def fold(summary: str, *sentences: str) -> None:
    """Show a paragraph for each of these texts of Markdown, behind a line that opens them."""
    display(HTML(folded(summary, "".join(f"<p>{_inline(s)}</p>" for s in sentences if s.strip()))))


def exercise(number: int, question: str, *answer: str) -> None:
    """Show an exercise in Markdown, its answer in a fold."""
    said = folded("Answer", "".join(f"<p>{_inline(s)}</p>" for s in answer), "answer")
    display(
        HTML(f'<div class="exercise"><p><strong>Exercise {number}.</strong> {_inline(question)}</p>\n{said}\n</div>')
    )


def figure(
    drawn: plt.Figure | str,
    number: str,
    caption: str,
    alt: str = "",
    rows: pd.DataFrame | None = None,
    behind: str = "",
) -> None:
    """Show a figure with its number and what it finds, and close it.

    Args:
        drawn: a plot, or a picture's SVG, which has its own alternative text.
        number: chapter and place, e.g. "2.1"; its address on the page is #fig-2-1.
        caption: the finding, in Markdown.
        alt: of a plot, what can be seen, for those who cannot.
        rows: what was drawn, offered as CSV.
        behind: the line behind which it is hidden, "" to show it.
    """
    name = f"fig-{number.replace('.', '-')}"
    if isinstance(drawn, str):
        image = drawn
    else:
        if len(alt) < 30:
            raise ValueError(f"figure {number} has no alternative text")
        file = io.BytesIO()
        drawn.savefig(file, dpi=110, metadata={"Software": None})
        plt.close(drawn)
        image = f'<img src="{_data("image/png", file.getvalue())}" alt="{html.escape(alt)}">'
    link = f" {_download(rows, name)}" if rows is not None else ""
    shown = (
        f'<figure class="numbered" id="{name}">\n{image}\n<figcaption><a href="#{name}">Figure {number}.</a> '
        f"{_inline(caption)}{link}</figcaption>\n</figure>"
    )
    display(HTML(folded(behind, shown) if behind else shown))


def opening(chapter: Chapter, record: Any) -> None:
    """Show a chapter's first box: question, answer, what was measured, what re-running takes, what a reader learns."""
    number = chapter.notebook.partition("_")[0]
    again = f"`.venv/bin/thesislib run {number}` takes {minutes(chapter.notebook)} on two cores, without a GPU."
    rows = {
        "Question": chapter.opening.question,
        "Answer": chapter.opening.answer(record),
        "Measured": chapter.opening.protocol(record),
        "Run it again": again,
        "You learn": chapter.opening.learn,
    }
    lines = "".join(f"<dt>{name}</dt><dd>{_inline(text)}</dd>\n" for name, text in rows.items())
    display(HTML(f'<dl class="opening">\n{lines}</dl>'))


def minutes(notebook: str) -> str:
    """How long a notebook took when it was last timed, e.g. "2 minutes"; see data/results/minutes.json."""
    whole = math.ceil(read_json(data_file(MINUTES))["seconds"][notebook] / 60)
    return f"{whole} minute{'s' if whole > 1 else ''}"


def _inline(text: str) -> str:
    """Markdown of one paragraph as HTML, labels with their meaning; HTML in it is text."""
    return marked(MarkdownIt("commonmark", {"html": False}).renderInline(text))


def _cell(value: Any) -> str:
    """A cell of a table as HTML: plain text, labels with their meaning."""
    return marked(html.escape(str(value), quote=False))


def _table(table: pd.DataFrame, caption: str, name: str) -> str:
    """A table's HTML: headings of columns and rows with their scope, the CSV, and the fold of other rows above it."""
    # `table[[...]]` of two levels keeps names of columns; only plain columns sort by their headings
    columns = [c if isinstance(c, tuple) else (c,) for c in table.columns]
    levels = [str(n or "") for n in table.index.names]
    named = any(levels) or not isinstance(table.index, pd.RangeIndex)
    heads = []
    for level in range(max(map(len, columns), default=1)):
        above = [_head(name if level == 0 else "") for name in levels] if named else []
        heads.append(f"<tr>{''.join([*above, *(_head(c[level]) for c in columns)])}</tr>")
    body = []
    for index, row in zip(table.index, table.itertuples(index=False), strict=True):
        keys = index if isinstance(index, tuple) else (index,)
        first = "".join(f'<th scope="row">{_cell(key)}</th>' for key in keys) if named else ""
        body.append(f"<tr>{first}{''.join(f'<td>{_cell(_shown(x))}</td>' for x in row)}</tr>")
    more = f"<details class='all'><summary>Show all {len(body)} rows</summary></details>" if len(body) > ROWS else ""
    lines = "\n".join(body)
    return (
        f'<div class="table">{more}\n<table class="dataframe"><caption>{_inline(caption)} {_download(table, name)}'
        f"</caption>\n<thead>{''.join(heads)}</thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


def _head(name: Any) -> str:
    return f'<th scope="col">{_cell(name)}</th>'


def _shown(value: Any) -> str:
    """A cell's text: numbers that are not whole with four digits, what is not there as nothing."""
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    return written(value, ",.4g") if isinstance(value, float) else str(value)


def _download(table: pd.DataFrame, name: str) -> str:
    """A link to a table's rows as CSV, which lie in the page."""
    data = _data("text/csv", table.to_csv().encode())
    return f'<a class="rows" download="{html.escape(name)}.csv" href="{data}">CSV</a>'


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
