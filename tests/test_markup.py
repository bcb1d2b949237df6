"""HTML, Markdown and formulas in names and records are shown as they were typed, wherever a page or a terminal shows
them."""

import dataclasses
import json
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import yaml
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.mdit import create_md_parser
from typer.testing import CliRunner

from thesislib.chapters import ch00_measures, ch06_figures, ch06_grid, claims, figures, pareto, pool, recorded
from thesislib.cli import app
from thesislib.errors import printable
from thesislib.records.measurement import cost, in_markdown
from thesislib.records.store import Store

ROOT = Path(__file__).parent.parent
HOSTILE = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<!--<script>", "<img src=x "
        "onerror=alert(1)>", "<https://x.org>", "&lt;b&gt; &#60;",
    "[a](javascript:alert(1))", "![a](x.png)", "[a][b]", "*a* **b** _c_ __d__ e_f", "`code` "
        "``more``", "a\\*b*", "{{ "
        "title }} {math}`x`", "$x^2$ and $$y$$",
    "| a | b |", "~~gone~~", "# head", "> quote", "% comment", "(label)=", ":::{note}", "```{raw} "
        "html\n<script>1</script>\n```", "---", "a\n\n<b>b</b>", "a\\",
)  # fmt: skip


@pytest.fixture(scope="module")
def parser():
    """As the book reads its pages."""
    extensions = yaml.safe_load((ROOT / "_config.yml").read_text())["parse"]["myst_enable_extensions"]
    return create_md_parser(MdParserConfig(enable_extensions=set(extensions)), RendererHTML)


def shown(parser, text):
    """The text of Markdown that is one paragraph of nothing but text."""
    first, inline, last = parser.parse(text)
    assert (first.type, inline.type, last.type) == ("paragraph_open", "inline", "paragraph_close")
    assert {child.type for child in inline.children} == {"text"}
    return "".join(child.content for child in inline.children)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_markdown_is_text(parser, text):
    plain = " ".join(text.split())
    assert shown(parser, in_markdown(text)) == plain
    assert shown(parser, f"made by {in_markdown(text)}, twice") == f"made by {plain}, twice"
    table = parser.parse(f"| a | b |\n| --- | --- |\n| {in_markdown(text)} | 1 |\n")
    cells = [x for x in table if x.type == "inline"][2:]
    assert [[(c.type, c.content) for c in x.children] for x in cells] == [[("text", plain)], [("text", "1")]]


def test_numbers_and_labels_need_no_escape():
    for text in (
        "D2+W1:8 x 1.04 [1.03, 1.06], p < 0.001 (n = 24); 15_single_skip, -3 to +5 %",
        "2 cores of AMD EPYC, bfloat16.",
    ):
        assert in_markdown(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_record_s_words_are_text_in_sentences(parser, text):
    found = [
        dataclasses.replace(m, task=text, provenance={**m.provenance, "subject": text}) for m in recorded("00_measures")
    ]
    assert shown(parser, ch00_measures.headline(found)).startswith(" ".join(text.split()))
    machine = {**found[0].provenance["hardware"], "cpu": text, "accelerator": None}
    found = [dataclasses.replace(m, provenance={**m.provenance, "hardware": machine, "dtype": text}) for m in found]
    assert shown(parser, cost(found)).count(" ".join(text.split())) == 2
    assert " ".join(text.split()) in shown(
        parser, ch06_grid.cost_sentence({("dense", str(i)): m for i, m in enumerate(found)})
    )


def test_labels_are_text_in_the_page_of_claims(parser, monkeypatch):
    label = "<img src=x onerror=alert(1)>|*a*"
    known = pool.recorded_pool()
    rows = {(f"{label}{end}", claims.WIKITEXT): known[f"D2{end}", claims.WIKITEXT] for end in ("", "+W")}
    hostile = claims.Claim(
        "c",
        "a name",
        "{size}",
        lambda records: [(label, f"{label}+W", claims.WIKITEXT)],
        ("02_depth_pruning", "x"),
    )
    monkeypatch.setattr(claims, "CLAIMS", [hostile])
    page = claims.page({**known, **rows})
    assert "\\<img" in page and "<img" not in page.replace("\\<img", "")
    assert not [
        t
        for t in parser.parse(page)
        for child in t.children or ()
        if child.type == "html_inline" and "img" in child.content
    ]


def test_the_explorer_holds_nothing_that_a_page_s_parser_takes(monkeypatch):
    rows = [{"label": text, "family": "pruned"} for text in HOSTILE]
    monkeypatch.setattr(pareto, "trade_offs", lambda _: rows)
    data = pareto.explorer({}).partition("const rows = ")[2].partition(";\n")[0]
    assert "<" not in data and json.loads(data) == rows


def test_a_dollar_in_a_figure_is_one():
    matplotlib.use("agg")
    figures.style()
    names = ["$\\frac{", "$x^2$", "a_b"]
    table = pd.DataFrame(
        {
            "label": names,
            "family": "pruned",
            "base": "dense",
            "MB": [1.0, 9.0, 30.0],
            "M": [1.0, 9.0, 30.0],
            "perplexity": [90.0, 30.0, 9.0],
        }
    )
    table = table.assign(**{"perplexity low": table["perplexity"], "perplexity high": table["perplexity"]})
    figure = ch06_figures.pareto_chart(table, {"dense": names}, "perplexity", pareto.marks_of({}))
    figure.canvas.draw()
    drawn = figure.axes[0].texts
    assert [t.get_text() for t in drawn] == names and not any(t.get_parse_math() for t in drawn)
    figures.plt.close(figure)


def test_what_records_say_is_listed_on_lines_of_their_own(tmp_path):
    (m, *_) = recorded("00_measures")
    texts = ["a\nb", "a\x1b[2Jb", "\u202eevil", "ü <b>"]
    for text in texts:
        for note in (text, "another"):
            facts = {**m.provenance, "made": {"label": text}, "chapter": {"method": note}}
            Store(tmp_path / "r.jsonl").append(dataclasses.replace(m, task=text, unit=text, provenance=facts))
    lines = CliRunner().invoke(app, ["records", "--store", str(tmp_path / "r.jsonl")]).stdout.splitlines()
    shown = ["a\\nb", "a\\x1b[2Jb", "\\u202eevil", "ü <b>"]
    assert shown == [*map(printable, texts)] and len(lines) == 3 * len(texts)
    for heading, line, text in zip(lines[::3], lines[1::3], shown, strict=True):
        assert heading == f"{text}  {text}  {m.metric}" and line.endswith(
            f"n = {m.n} {text.split(' ')[0]}s  method {text}"
        )
