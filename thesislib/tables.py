"""A notebook's table of results, handed over as data beside the HTML. Importing this imports nothing heavy."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

RESULTS = "application/vnd.thesislib.results+json"  # MIME type: {"columns": names, "rows": lists}


class ResultsTable:
    """A table of results, as the last line of the cell tagged `results`: shown, and handed over as data.

    The cell's output holds the table as text, as HTML, and as JSON. Headings that stand twice are numbered there.
    """

    def __init__(self, table: "pd.DataFrame"):
        self.table = table

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        shown = {"text/plain": repr(self.table), "text/html": self.table._repr_html_()}
        return {**shown, RESULTS: as_data(self.table)}


def as_data(table: "pd.DataFrame") -> dict[str, Any]:
    """What a sweep reads of a table: {"columns": names, "rows": lists}, an index with a name first."""
    table = table.reset_index() if table.index.name else table
    columns = distinct(str(name).strip() for name in table.columns)
    return {"columns": columns, "rows": json.loads(table.to_json(orient="values", double_precision=15))}


def distinct(names: Iterable[str]) -> list[str]:
    """Names, those that are there already with a number."""
    numbered: list[str] = []
    for name in names:
        taken = sum(other == name or other.startswith(f"{name} (") for other in numbered)
        numbered.append(f"{name} ({taken + 1})" if name in numbered else name)
    return numbered
