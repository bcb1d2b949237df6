"""HTML and code in names, parameters, records and texts, from the command line up to the built page: nothing runs, all
of it is shown as it was typed."""

import html.parser
import json
import shutil
from pathlib import Path

import nbformat

from .forked import call, thesislib
from .place import Place

MARK = "RAN7"
HOSTILE = (
    f"<img src=x onerror=\"document.title='{MARK}'\">",
    f"<script>document.title='{MARK}'</script>",
    f"</script><script>document.title='{MARK}'</script>",
    "<!--<script>",
    f"<svg onload=\"document.title='{MARK}'\">",
    f"[link](javascript:document.title='{MARK}')",
    f"<iframe srcdoc=\"<script>parent.document.title='{MARK}'</script>\">",
    f"<a href=\"javascript:document.title='{MARK}'\">x</a>",
    f'"; __import__("os").system("touch {MARK}"); "',
    f"'''; open('{MARK}', 'w'); '''",
    f"{{{{ ''.__class__ }}}} {{% raw %}} $(touch {MARK}) `touch {MARK}`",
    "```{raw} html\n<script>1</script>\n```",
)
CELLS = (
    ("", "import dataclasses, json\nfrom IPython.display import HTML, Markdown, display\n"
         "from thesislib.records import measurement, store\n"
         "from thesislib.chapters import ch00_measures, figures, pareto, recorded\n"
         "from thesislib.config import settings\nfrom thesislib.formats.load import load_subject"),
    ("parameters", "subject = 'x'\ntexts = ['x']\nmade = 'x'\nartifact = 'x'"),
    ("", "p = settings(dataclasses.make_dataclass('P', [('subject', str), ('texts', list), ('made', str), "
        "('artifact', str)]), globals())"),
    ("", "model = load_subject(p.subject)\nprint(f'{model.name}: {model.depth} "
        "blocks')\nprint(load_subject(p.artifact).name)\nprint(p.texts)"),
    ("", "for t in p.texts:\n    named = [dataclasses.replace(m, task=t, provenance={**m.provenance, 'subject': t}) "
        "for m in recorded('00_measures')]\n"
         "    display(Markdown(ch00_measures.headline(named)))"),
    ("", "rows = list(store.Store(p.made).rows().values())\nMarkdown(f'*{measurement.cost(rows)}*')"),
    ("", "found = [dataclasses.replace(m, task=t, unit=t, metric='perplexity ' + t) for t in p.texts for m in "
        "rows[:1]]\n"
         "study = [dataclasses.replace(m, task=t) for m, t in zip(recorded('00_measures'), "
             "p.texts)]\nch00_measures.readable(ch00_measures.table(study))"),
    ("", "items = [{'tier': 'overlap', 'answer': t} for t in "
        "p.texts]\nch00_measures.flattering(dataclasses.replace(rows[0], items=items), 20)"),
    ("", "def sized(m, t):\n    return dataclasses.replace(m, provenance={**m.provenance, 'made': "
        "{**m.provenance['made'], 'label': t, 'bytes': {'bytes_on_disk': 10**6, 'nonzero_parameters': 10**6}}})\n"
         "HTML(pareto.explorer({(t, 'perplexity'): sized(rows[0], t) for t in p.texts}))"),
    ("", "figures.style()\nfig, ax = figures.plt.subplots()\nfor t in p.texts:\n    "
        "ax.set_title(t)\nfigures.plt.show()"),
    ("", f"raise_later = [repr(t) for t in p.texts]\nmodel.name, raise_later  # {HOSTILE[1]}"),
)  # fmt: skip


class Page(html.parser.HTMLParser):
    """Collects what would run in a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.runs: list[str] = []
        self.script: list[str] | None = None
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        for name, value in attributes:
            said = (value or "").strip().lower()
            if MARK.lower() in said and (name.startswith("on") or said.startswith("javascript:") or name == "srcdoc"):
                self.runs.append(f"<{tag} {name}={value!r}>")
        if tag == "script":
            self.script = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self.script is not None:
            code = "".join(self.script)
            if MARK in code and "const rows = " not in code:
                self.runs.append(f"<script>{code[:80]}")
            if "const rows = " in code:
                data = code.partition("const rows = ")[2].partition(";\n")[0]
                try:
                    json.loads(data)
                except ValueError:
                    self.runs.append(f"the widget's data are no JSON: {data[:80]}")
                if "<" in data:
                    self.runs.append("the widget's data hold <, with which a page's parser begins what is its own")
            self.script = None

    def handle_data(self, data: str) -> None:
        (self.text if self.script is None else self.script).append(data)


def looked_at(page: Path) -> tuple[list[str], str]:
    """What would run in a page, and the text that it shows."""
    parser = Page()
    parser.feed(page.read_text("utf8"))
    parser.close()
    return parser.runs, "".join(parser.text)


def run(here: Place) -> dict:
    """{"cases": texts by ways, "pages", "bad"}."""
    root, bad = here.root / "markup", []
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    name = HOSTILE[0].replace("/", "")
    shutil.copytree(here / "subject", root / name)
    rows = [json.loads(line) for line in (here / "records.jsonl").read_text("utf8").splitlines()]
    environment = here.environment(here / "cache") | {"PIP_NO_INDEX": "1"}
    recipe = root / "recipe.yaml"
    recipe.write_text("stages:\n  - width: {remove: 1, of: 8, metric: magnitude}\n")
    nb = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nb.cells = [nbformat.v4.new_markdown_cell("# 1. Hostile")] + [
        nbformat.v4.new_code_cell(code, metadata={"tags": [tag] if tag else []}) for tag, code in CELLS
    ]
    book = root / "book"
    for folder in ("notebooks", "book/_static", "book/_root", "thesislib", "data"):
        (book / folder).mkdir(parents=True)
    source = book / "notebooks" / "01_hostile.ipynb"
    nbformat.write(nb, source)

    def execute() -> int:
        from thesislib import runner
        from thesislib.evaluate.setup import Setup
        from thesislib.experiment import prepare
        from thesislib.records.store import Store

        m = prepare(str(root / name), [], data=str(here / "data"), dtype="float32").measure(
            Setup("wikitext", length=48, limit=2), str(here / "data")
        )
        m.provenance["hardware"] = {**m.provenance["hardware"], "cpu": HOSTILE[1]}
        m.provenance["dtype"] = HOSTILE[5]
        Store(root / "rows.jsonl").append(m)
        if code := thesislib(
            "compress", recipe, "--subject", root / name, "--data", here / "data", "--out", root / "artifact"
        )():
            return code
        runner.chapters = lambda *_: {"01_hostile": source}
        parameters = {
            "subject": str(root / name),
            "texts": list(HOSTILE),
            "made": str(root / "rows.jsonl"),
            "artifact": str(root / "artifact"),
        }
        return thesislib(
            "run",
            "01",
            "--out",
            root / "executed.ipynb",
            *(
                x
                for key, value in parameters.items()
                for x in ("-p", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
            ),
        )()

    ended = call(execute, root, environment, 180, 12 << 30)
    if ended.code != 0:
        return {
            "cases": 0,
            "pages": 0,
            "bad": [(f"the notebook was not executed: {ended.trouble or ended.err.strip()[-300:]}", "--only markup")],
        }
    shutil.copy(root / "executed.ipynb", source)
    # the paths of this folder are no concern of the page
    source.write_text(source.read_text("utf8").replace(str(here.root), "FOLDER"), "utf8")
    checkout = Path(__file__).parents[2]
    config = (checkout / "_config.yml").read_text("utf8")
    for line in ("bibtex_bibfiles", "html_favicon", "html_css_files", "html_js_files"):
        config = "\n".join(x for x in config.splitlines() if line not in x)
    (book / "_config.yml").write_text(config)
    (book / "_toc.yml").write_text("format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_hostile\n")
    (book / "book" / "intro.md").write_text("# Intro\n")
    shutil.copytree(checkout / "book" / "_ext", book / "book" / "_ext")
    (book / "README.md").write_text("<!-- imports -->\n<!-- imports -->\n")  # no module for the API page
    shutil.copytree(
        checkout / "thesislib", book / "thesislib", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )

    def build() -> None:
        from thesislib.book import build

        build(root / "built", stored=True, root=book)

    ended = call(build, root, environment, 180, 12 << 30)
    pages = sorted((root / "built").rglob("01_hostile.html"))
    if not pages:
        return {
            "cases": 0,
            "pages": 0,
            "bad": [(f"the book did not build: {ended.trouble or ended.err.strip()[-300:]}", "--only markup")],
        }
    runs, text = looked_at(pages[0])
    bad += [(f"would run in the page: {x[:160]}", "--only markup") for x in runs]
    bad += [
        ("not shown as it was typed", f"--only markup: {t}")
        for t in HOSTILE
        if t.split("\n")[0] not in text and t.split("\n")[0] not in text.replace("\\'", "'").replace('\\"', '"')
    ]
    bad += [
        ("code in a parameter ran", str(f))
        for f in (root / MARK, source.parent / MARK, here.root / MARK, Path(MARK))
        if f.exists()
    ]
    exported = [c for c in rows if c]  # records, listed and as a table
    listed = root / "hostile.jsonl"
    bad += _listed(here, root, exported[0], listed)
    return {"cases": len(HOSTILE) * len(CELLS), "pages": len(pages), "bad": bad}


def _listed(here: Place, root: Path, row: dict, file: Path) -> list:
    """Rows whose names are hostile, written by the store itself: listing and table hold them as text, one line each."""
    import csv

    def write() -> int:
        import dataclasses

        from thesislib.records.store import Store

        (m, *_) = Store(here / "records.jsonl").rows().values()
        for text in (*HOSTILE, "=1+1", "a\nb", "a\x1b[2Jb", "\u202eevil"):
            made = {**m.provenance, "made": {**m.provenance["made"], "label": text}}
            Store(file).append(dataclasses.replace(m, task=text, provenance=made))
        code = thesislib("records", "--store", file)()
        return code or thesislib("records", "--store", file, "--csv", root / "x.csv")()

    ended = call(write, root, here.environment(here / "cache"), 60)
    if ended.code != 0:
        return [(f"hostile records are not listed: {ended.trouble or ended.err[-200:]}", "--only markup")]
    bad = []
    if "\x1b" in ended.out:
        bad.append(
            (
                "a terminal's control characters in a record's label reach the terminal",
                "--only markup: records --store with label 'a\\x1b[2Jb'",
            )
        )
    if len(ended.out.rstrip("\n").split("\n")) != len(HOSTILE) + 4 + 1:
        bad.append(
            (
                f"{len(HOSTILE) + 4} records are listed in {len(ended.out.rstrip(chr(10)).split(chr(10))) - 1} lines",
                "--only markup: a label with a line's end",
            )
        )
    with (root / "x.csv").open(newline="", encoding="utf8") as table:
        labels = [r["label"] for r in csv.DictReader(table)]
    if labels != [*HOSTILE, "=1+1", "a\nb", "a\x1b[2Jb", "\u202eevil"]:
        bad.append(("labels in the table are not those of the records", "--only markup"))
    return bad
