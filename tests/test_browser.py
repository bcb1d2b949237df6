"""The book in a real browser: `make stored-book` builds it first."""

import functools
import http.server
import json
import posixpath
import shutil
import threading
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup

from thesislib.files import ROOT
from thesislib.pipeline.label import Label
from thesislib.runner import chapters

HTML = ROOT / "_build" / "stored" / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: Debian's package chromium has one"),
    pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the book is not built: make stored-book"),
]
CHAPTERS = [f"notebooks/{name}.html" for name in chapters()]
PAGES = [
    "index.html",
    "book/background.html",
    "book/rerun.html",
    "book/claims.html",
    "book/labels.html",
    "book/method.html",
    "book/sources.html",
    "book/changelog.html",
    "book/api.html",
    "book/api/thesislib.chapters.ch05_quantisation.html",
    "book/api/thesislib.compress.gptq.html",
    "book/api/thesislib.model.subject.html",
    *CHAPTERS,
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield found
        found.close()


@pytest.fixture
def page(browser):
    """A page that notes what goes wrong on it."""
    found = browser.new_page(viewport={"width": 1280, "height": 900})
    found.wrong = []
    found.on("console", lambda m: found.wrong.append(m.text) if m.type == "error" else None)
    found.on("pageerror", lambda e: found.wrong.append(str(e)))
    found.on("requestfailed", lambda r: found.wrong.append(f"failed: {r.url}"))
    found.on("response", lambda r: found.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    found.on(
        "request",
        lambda r: (
            found.wrong.append(f"leaves the site: {r.url}")
            if not r.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            else None
        ),
    )
    yield found
    found.close()


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_without_an_error(site, page, path):
    page.goto(f"{site}/{path}", wait_until="networkidle")
    assert page.wrong == []
    # the icon a browser asks for by itself, at a moment of its own choosing
    assert page.request.get(f"{site}/favicon.ico").ok
    assert page.locator("h1").first.inner_text().strip()


@pytest.mark.parametrize("path", CHAPTERS)
def test_figures_show_and_say_what_they_show(site, page, path):
    """Numbered in order, with a finding below each, and the first above the fold."""
    page.goto(f"{site}/{path}", wait_until="networkidle")
    chapter = int(path.split("/")[1][:2])
    figures = page.locator("figure.numbered")
    names = figures.evaluate_all("e => e.map(f => f.id)")
    assert names == [f"fig-{chapter}-{i + 1}" for i in range(len(names))] and len(names) >= 2
    assert figures.first.bounding_box()["y"] < 1000
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")  # some stand behind a line
    for i in range(len(names)):
        said, wide = figures.nth(i).evaluate(
            "f => { const e = f.querySelector('img, svg');"
            " return [e.alt || e.getAttribute('aria-label'), e.getBoundingClientRect().width]; }"
        )
        assert len(said) > 30 and wide > 300, names[i]
        caption = figures.nth(i).locator("figcaption").inner_text()
        assert caption.startswith(f"Figure {chapter}.{i + 1}.") and len(caption) > 40, names[i]


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_has_its_shape(site, page, path):
    """A box, three exercises with answers in folds, no sentence in a grey box, code hidden but where it teaches."""
    page.goto(f"{site}/{path}", wait_until="networkidle")
    assert [e.lower() for e in page.locator("dl.opening dt").all_inner_texts()] == [
        "question", "answer", "measured", "run it again", "you learn"
    ]  # fmt: skip
    assert page.locator(".exercise details.answer").count() == 3
    assert page.evaluate("document.body.scrollHeight") < 12 * 900
    printed = page.locator(".cell:not(.tag_toy) .output.stream").all_inner_texts()
    assert not printed
    bare = page.locator("div.cell:not(.tag_hide-input):not(.tag_parameters):not(.tag_toy):not(.tag_try) > .cell_input")
    assert bare.count() == 0


def test_the_first_page_has_the_study_at_a_glance(site, page):
    from thesislib.chapters import first_page

    page.goto(f"{site}/index.html", wait_until="networkidle")
    page.wait_for_url("**/book/intro.html")
    text = page.locator("article").inner_text().replace("’", "'")  # Sphinx sets typographic apostrophes
    for title, *_ in first_page.findings():
        assert title in text
    assert page.locator("article svg[role=img]").first.bounding_box()["y"] < 500
    assert page.locator("article table tbody tr").count() >= len(CHAPTERS)
    page.locator("article a", has_text="chapter 6").first.click()
    page.wait_for_url("**/06_evaluation.html")


LABEL = r"(?<![\\w:.~/+-])(?:D[AM]?\\d+|W\\d+:\\d+)(?:\\+[\\w:()]+)*(?![\\w:~%]|[-.]\\w)"


@pytest.mark.parametrize("path", [p for p in PAGES if "api" not in p and "changelog" not in p])
def test_every_label_has_its_meaning(site, page, path):
    page.goto(f"{site}/{path}", wait_until="networkidle")
    bare = page.evaluate(
        f"""() => {{
        const found = [], walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
        const label = new RegExp(String.raw`{LABEL}`);
        while (walker.nextNode()) {{
            const text = walker.currentNode, around = text.parentElement;
            const other = "abbr, code, pre, script, style, svg, h1, h2, h3, mjx-container, .math, .explorer";
            if (label.test(text.data) && !around.closest(other)) found.push(text.data.trim().slice(0, 80));
        }}
        return found; }}"""
    )
    assert not bare


@pytest.mark.parametrize("path", PAGES)
def test_a_narrow_screen_does_not_scroll_sideways(site, page, path):
    page.set_viewport_size({"width": 420, "height": 900})
    page.goto(f"{site}/{path}", wait_until="networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420 + 1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_nothing_against_wcag(site, page, path, theme):
    """Levels A and AA, on the whole page: contrast, names, roles, sizes."""
    from axe_playwright_python.sync_playwright import Axe

    page.goto(f"{site}/{path}", wait_until="networkidle")
    page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    page.wait_for_timeout(300)  # colours fade in
    options = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}}
    found = Axe().run(page, options=options).response["violations"]
    assert not [(v["id"], v["nodes"][0]["html"][:200], v["nodes"][0]["failureSummary"]) for v in found]


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("path", PAGES)
def test_no_text_is_cut_off_or_under_the_contents(site, page, path, width):
    """What is wider than its column scrolls by itself, or has the contents folded away beside it."""
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{site}/{path}", wait_until="networkidle")
    beyond = page.evaluate(
        """() => {
        const edge = document.querySelector("article").getBoundingClientRect().right + 1;
        const apart = "div.table, figure.numbered img, mjx-container, .math, .tag_full-width, .visually-hidden, svg";
        return [...document.querySelectorAll("article *")]
            .filter(e => e.checkVisibility() && !e.closest(apart) && e.getBoundingClientRect().right > edge)
            .map(e => e.outerHTML.slice(0, 120)); }"""
    )
    assert not beyond


SETTINGS = {
    "02_depth_pruning": {"depth": "remove blocks metric greedy protect_first protect_last part text windows"},
    "03_width_pruning": {"width": "remove of ratio ratios metric linears text windows weighting"},
    "04_lora_recovery": {"lora": "text linears rank alpha dropout learning_rate steps batch merge"},
    "05_quantisation": {
        "gptq": "bits group grid clip act_order damping sequential weighting",
        "eora": "rank bytes weighting",
        "lora": "init",
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_link_to_what_they_do(site, page, name):
    from thesislib.chapters.links import setting

    page.goto(f"{site}/notebooks/{name}.html", wait_until="networkidle")
    linked = set(page.locator("article code a").evaluate_all("e => e.map(a => a.hash.slice(1))"))
    missing = {
        (word, field)
        for word, fields in SETTINGS[name].items()
        for field in fields.split()
        if setting(word, field) not in linked
    }
    assert not missing


@pytest.mark.parametrize("path", [p for p in PAGES if "api" not in p])
def test_figures_that_are_named_are_linked(site, page, path):
    page.goto(f"{site}/{path}", wait_until="networkidle")
    bare = page.evaluate(
        r"""() => {
        const found = [], walker = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const text = walker.currentNode, linked = text.parentElement.closest("a, code, pre, svg");
            if (/figure \d+\.\d+/i.test(text.data) && !linked) found.push(text.data);
        }
        return found; }"""
    )
    assert not bare


def test_links_and_anchors_resolve(site, page):
    """Every link within the book, and every anchor that one names."""
    anchors, links = {}, {}
    for file in sorted(HTML.rglob("*.html")):
        name = file.relative_to(HTML).as_posix()
        if name.split("/")[0] in ("_static", "_modules", "_sources"):
            continue
        soup = BeautifulSoup(file.read_text("utf8"), "html.parser")
        anchors[name] = {e["id"] for e in soup.find_all(id=True)} | {
            e["name"] for e in soup.find_all("a", attrs={"name": True})
        }
        links[name] = [a["href"] for a in soup.select("article a[href], nav a[href]")]
    broken = []
    for name, hrefs in links.items():
        for href in hrefs:
            if href.startswith(("http:", "https:", "data:", "mailto:", "javascript:", "#")) and not href.startswith(
                "#fig"
            ):
                continue
            path, _, anchor = href.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path))) if path else name
            if target.startswith(("_modules", "_sources", "_static")) and (HTML / target).exists():
                continue
            if not (HTML / target).exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                broken.append((name, href))
    assert not broken and len(links) > 20


def test_formulas_are_typeset(site, page):
    page.goto(f"{site}/book/background.html", wait_until="networkidle")
    page.wait_for_selector("mjx-container", timeout=30_000)
    assert page.locator("mjx-container").count() > 20
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    assert page.wrong == []


@pytest.mark.parametrize(
    ("word", "where"), [("Franken-LLaMA", "01_franken_llama"), ("bootstrap_mean", "api/thesislib.evaluate.stats")]
)
def test_search_finds_a_word(site, page, word, where):
    page.goto(f"{site}/search.html?q={word}", wait_until="networkidle")
    page.wait_for_selector("#search-results li a", timeout=30_000)
    assert any(where in link for link in page.locator("#search-results li a").evaluate_all("e => e.map(a => a.href)"))


def test_nothing_is_wider_than_the_page(site, page):
    page.goto(f"{site}/{CHAPTERS[1]}", wait_until="networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280 + 1


def test_a_table_sorts_by_its_headings(site, page):
    page.goto(f"{site}/notebooks/03_width_pruning.html")
    table = page.locator("table.dataframe").first
    heading = table.locator("thead th").filter(has_text="x dense").first

    def column():
        return table.locator("tbody tr").evaluate_all(
            "(rows, i) => rows.map((row) => row.cells[i].textContent.replace(/,/g, ''))", 2
        )

    def known(texts):
        return [float(text.split()[0]) for text in texts if text]  # the value, before its interval

    before = column()
    heading.click()
    up = column()
    assert known(up) == sorted(known(before)) and len(up) == len(before) and not any(up[len(known(up)) :])
    for key, order, reverse in (("Enter", "descending", True), ("Space", "ascending", False)):
        heading.press(key)
        assert known(column()) == sorted(known(before), reverse=reverse) and heading.get_attribute("aria-sort") == order
    assert page.wrong == []


def test_the_explorer_finds_what_fits_a_budget(site, page):
    page.goto(f"{site}/notebooks/06_evaluation.html")
    box = page.locator(".explorer")
    names = box.locator("tbody th")
    size, measure, group = (box.locator("select").nth(i) for i in range(3))
    rows, fronts, marks = (
        json.loads(
            page.evaluate(
                "(name) => document.querySelector('.explorer').nextElementSibling.textContent"
                ".match(`const ${name} = (.*);`)[1]",
                name,
            )
        )
        for name in ("rows", "fronts", "marks")
    )
    every = [row for row in rows if row["MB"] is not None and row.get("perplexity") is not None]
    rows = [row for row in every if row["base"] == "dense"]
    assert names.first.text_content() == shown(min(rows, key=lambda row: row["perplexity"])["label"])
    budget = sorted(row["MB"] for row in rows)[len(rows) // 2] + 0.01
    box.locator("input").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", budget)
    within = [row for row in rows if row["MB"] <= budget]
    assert names.first.text_content() == shown(min(within, key=lambda row: row["perplexity"])["label"])
    assert box.locator("p").last.text_content().startswith(f"{len(within)} of {len(rows)} models fit")
    assert (
        names.first.text_content()
        == [x for x in map(shown, fronts["MB"]["perplexity"]["dense"]) if x in names_of(within)][-1]
    )
    titles = box.locator("svg title").all_text_contents()
    assert sum("a file beside the study" in title for title in titles) == len(marks) >= 1
    group.select_option("W")
    assert names.first.text_content() == shown(fronts["MB"]["perplexity"]["W"][-1])
    assert set(names.all_text_contents()) <= names_of(row for row in every if row["base"] == "W")
    group.select_option("dense")
    measure.select_option("open book")
    size.select_option("M")
    answered = [row for row in rows if row.get("open book") is not None and row["M"] is not None]
    assert (
        box.locator("tbody tr").first.locator("td").first.text_content()
        == f"{100 * max(row['open book'] for row in answered):.1f} %"
    )
    assert box.locator("svg title").count() == len(answered) and page.wrong == []


def shown(label):
    """A label as the book shows it."""
    return Label.parse(label).shown


def names_of(rows):
    return {shown(row["label"]) for row in rows}
