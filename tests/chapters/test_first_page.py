"""The first page against the records that it quotes."""

import re

import pytest

from thesislib import book
from thesislib.chapters import block, chapters, first_page, page, pareto, recorded
from thesislib.chapters import ch04_recovery as recovery
from thesislib.chapters import ch05_comparisons as comparisons
from thesislib.chapters import ch05_runs as gptq
from thesislib.chapters import ch07_device as device
from thesislib.chapters.chapter import WIKITEXT
from thesislib.chapters.labels import marked
from thesislib.chapters.pool import recorded_pool
from thesislib.files import ROOT


def test_readme_has_the_first_page_and_its_strip():
    strip = first_page.strip(first_page.chain())
    assert (ROOT / first_page.STRIP).read_text("utf8") == strip.svg(alone=True) + "\n", "run `make findings`"
    text = (ROOT / "README.md").read_text("utf8")
    before, after = block(text, "first")
    picture = f"![{strip.alt}]({first_page.STRIP})"
    assert text == before + first_page.text("notebooks/{}.ipynb", "book/{}.md", picture) + after, "run `make findings`"


def test_the_strip_is_the_thesis_s_stages_on_one_sample():
    stages = first_page.chain()
    assert list(stages) == ["dense", "D2", "D2+W1:8", "D2+W1:8+W", "D2+W1:8+W+Q", "D2+W1:8+W+Q+E"]
    assert len({m.n for m, _ in stages.values()}) == 1
    for label, (m, mb) in stages.items():
        assert m in recorded_pool()[label, WIKITEXT][m.n] and m.label == label and 50 < mb < 300
    said = first_page.strip(stages).svg()
    for m, mb in stages.values():
        assert f">{mb:.0f} MB<" in said and f">perplexity {m.value:.1f}<" in said


def test_the_titles_of_the_findings_are_what_the_records_say():
    """Titles and the words between the numbers are fixed: if one of these fails, the finding has turned."""
    lose, of_all = pareto.beaten(recorded("06_evaluation").for_fronts)
    assert lose > of_all / 2  # bits beat weights
    assert 0.4 < recovery.recovered(recorded("04_lora_recovery")).loc["D2", "fair"] < 0.6  # about half
    timed = recorded("07_on_device")
    assert max(device.gains_by_zeros(timed).values()) < device.drift(timed)  # no time that could be told from noise
    q = gptq.ablation_parameters()
    assert (
        comparisons.textbook(recorded("05_quantisation"), q).plain.verdict() == "worse"
    )  # plain GPTQ against rounding
    assert [title for title, *_ in first_page.findings()] == [
        "Fewer bits beat fewer weights.",
        "About half of what LoRA wins back is getting used to the text.",
        "Zeros that no kernel skips buy no time.",
    ]


def test_every_chapter_has_its_line_and_its_box():
    rows = first_page.table("{}").splitlines()[2:]
    assert len(rows) == len(chapters())
    for (name, chapter), row in zip(chapters().items(), rows, strict=True):
        opening, record = chapter.opening, recorded(name)
        assert row.startswith(f"| [{int(name[:2])}]({name}) | {opening.question} | {marked(opening.short(record))} |")
        assert opening.question.endswith("?") and len(opening.short(record).split()) <= 15
        assert 1 <= len(re.findall(r"[.!](?= |$)", opening.answer(record))) <= 3
        assert opening.protocol(record) and opening.learn


def test_addresses_come_from_one_setting(tmp_path, monkeypatch):
    config = (ROOT / "_config.yml").read_text("utf8")
    (tmp_path / "_config.yml").write_text(config)
    assert "repository" not in book.config(tmp_path) and "use_repository_button" not in book.config(tmp_path)
    filled = config.replace('url: ""', "url: https://example.org/fork").replace(
        'baseurl: ""', "baseurl: https://example.org/"
    )
    (tmp_path / "_config.yml").write_text(filled)
    assert "https://example.org/fork" in book.config(tmp_path) and "use_repository_button: true" in book.config(
        tmp_path
    )
    monkeypatch.setattr(first_page, "addresses", lambda: ("https://example.org/fork", "https://example.org/"))
    said = first_page.text("{}", "{}", "picture")
    assert "[the rendered book](https://example.org/)" in said and "url    = {https://example.org/fork}" in said


@pytest.mark.parametrize("part", ["api/thesislib.compress.gptq", "api/thesislib.book"])
def test_the_api_s_pages_are_in_the_contents(part):
    pages = book.api()
    assert f"{part}.md" in pages and f"book/{part}" in book.contents(pages)


@pytest.mark.parametrize("name", list(chapters()))
def test_a_stored_box_quotes_the_time_that_was_noted(name):
    stored = (ROOT / "notebooks" / f"{name}.ipynb").read_text("utf8")
    assert f"</code> takes {page.minutes(name)} on two cores" in stored
