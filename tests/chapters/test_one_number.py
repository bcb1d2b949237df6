"""A model has one perplexity on one sample of the text, on whichever page it stands."""

import re
from collections import defaultdict

import nbformat
import pytest
from bs4 import BeautifulSoup

from thesislib.chapters.chapter import WIKITEXT
from thesislib.chapters.pool import recorded_pool
from thesislib.runner import chapters

LETTERS = {"": "", ", +LoRA(wiki)": "W", ", +LoRA(trivia)": "T"}
NUMBER = re.compile(r"[\d,.]+")


def tables(notebook):
    """The tables that a chapter shows of its record, as lists of rows; those of this run are left out."""
    for cell in nbformat.read(notebook, 4).cells:
        if "## This run" in cell.source:
            return
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            html = output.get("data", {}).get("text/html", "")
            for table in BeautifulSoup("".join(html), "html.parser").find_all("table"):
                yield [[text(cell) for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]


def text(cell):
    """A cell's text; of a label by itself the recorded one, which its meaning begins with."""
    label = cell.find("abbr")
    whole = label and label.get_text() == cell.get_text()
    return label["title"].partition(": ")[0] if whole else cell.get_text()


def shown():
    """{(label, windows): {perplexity as it is shown: pages}} of all tables that say how many windows."""
    facts = defaultdict(lambda: defaultdict(set))
    for name, notebook in chapters().items():
        for head, *rows in tables(notebook):
            if "windows" not in head:
                continue
            for row in rows:
                cells = dict(zip(head, row, strict=True))
                model = f"W{row[0]}" if head[0] == "pattern" and row[0] != "dense" else row[0]
                for end, letter in LETTERS.items():
                    if (value := NUMBER.match(cells.get(f"perplexity{end}", ""))) and cells["windows"]:
                        label = model if not letter else letter if model == "dense" else f"{model}+{letter}"
                        number = float(value[0].replace(",", ""))
                        facts[label, int(cells["windows"])][f"{number:.4g}"].add(name)
    return facts


@pytest.fixture(scope="module")
def facts():
    return shown()


def test_no_two_pages_say_different_numbers_of_one_thing(facts):
    assert (
        len(facts) > 100 and len({page for values in facts.values() for pages in values.values() for page in pages}) > 3
    )
    differ = {key: dict(values) for key, values in facts.items() if len(values) > 1}
    assert not differ


def test_the_numbers_shown_are_the_pool_s(facts):
    """And the dense model has one perplexity on the whole text."""
    pool = recorded_pool()
    checked = 0
    for (label, windows), values in facts.items():
        if rows := pool.get((label, WIKITEXT), {}).get(windows):
            assert set(values) <= {f"{m.value:.4g}" for m in rows}, label
            checked += 1
    assert checked > 80
    assert list(facts["dense", 595]) == [f"{pool['dense', WIKITEXT][595][0].value:.4g}"]
