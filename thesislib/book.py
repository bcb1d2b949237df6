"""Notebooks executed with papermill, cached by what they depend on, and the HTML book built from them."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from thesislib.chapters import first_page, labels, reads
from thesislib.chapters.page import MINUTES
from thesislib.errors import BadInput
from thesislib.files import ROOT, check_checkout, read_json, write_whole
from thesislib.records.measurement import hardware
from thesislib.runner import chapters, executed
from thesislib.tables import RESULTS


def build(out: Path, stored: bool = False, root: Path = ROOT) -> Path:
    """Build the book under `out` and return its index page. Any warning, and any failing notebook, fails the build.

    Args:
        out: the build folder; an unchanged second build takes seconds.
        stored: use the notebooks' stored outputs instead of executing them.
        root: the checkout.

    Raises:
        BadInput: `root` is no checkout. RuntimeError: a notebook or the build failed; what was said is on stderr.
    """
    check_checkout("the book", root)
    source = out / "source"
    source.mkdir(parents=True, exist_ok=True)
    pages = set()
    for name, notebook in chapters(root).items():
        outputs = notebook if stored else executed(name, notebook, out / "executed", reads=reads(name))
        shown = without_data(clean(outputs.read_text("utf8")))
        pages.add(_write(shown.encode(), source / "notebooks" / f"{name}.ipynb"))
    for page in (p for p in (root / "book").rglob("*") if p.is_file()):
        pages.add(_copy(page, source / page.relative_to(root)))
    written = generated(root)
    for name, text in written.items():
        pages.add(_write(text.encode(), source / "book" / name))
    pages.add(_write(config(root).encode(), source / "_config.yml"))
    pages.add(_write(contents(written, root).encode(), source / "_toc.yml"))
    there = {p for p in source.rglob("*") if p.is_file() and "_build" not in p.relative_to(source).parts}
    for left_over in there - pages:
        left_over.unlink()
    script = "from jupyter_book.cli.main import main; main()"
    options = ["--path-output", str(out), "-W", "-n", "--keep-going", "--quiet"]
    command = [sys.executable, "-c", script, "build", str(source), *options]
    run = subprocess.run(
        command,
        stdout=sys.stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "book" / "_ext")])},
    )
    index = out / "_build" / "html" / "index.html"
    if run.returncode or not index.exists():
        raise RuntimeError(
            f"the book did not build (jupyter-book exited with {run.returncode}): see the warnings above"
        )
    return index


def generated(root: Path = ROOT) -> dict[str, str]:
    """{name: text} of the files that pages of the book include, or that are pages."""
    picture = f'<div class="strip">\n{first_page.strip(first_page.chain()).svg()}\n</div>'
    return {
        "_first.md": first_page.text("../notebooks/{}.ipynb", "{}.md", picture),
        "_labels.md": labels.table() + "\n",
        "changelog.md": (root / "CHANGELOG.md").read_text("utf8"),
        **api(root),
    }


def rooms(root: Path = ROOT) -> list[tuple[list[str], str]]:
    """CONTRIBUTING's table of the package: the names in each row, in the order of imports, and what they are for."""
    rows = [
        line.split("|")
        for line in (root / "CONTRIBUTING.md").read_text("utf8").split("<!-- imports -->")[1].splitlines()
        if line.startswith("| `")
    ]
    return [(re.findall(r"`(\w+)", cells[1]), cells[2].strip()) for cells in rows if "/" not in cells[1]]


def api(root: Path = ROOT) -> dict[str, str]:
    """{name: text} of the API's pages, one a module, and of _api.md, which lists them by room."""
    pages, lines = {}, []
    for names, purpose in rooms(root):
        lines.append(f"## {', '.join(names)}\n\n{purpose[:1].upper()}{purpose[1:]}.\n")
        for name in names:
            files = sorted((root / "thesislib" / name).rglob("*.py")) or [root / "thesislib" / f"{name}.py"]
            for file in (f for f in files if not f.stem.startswith("__") and f.stem != "cli"):
                module = ".".join(file.relative_to(root).with_suffix("").parts)
                short = module.removeprefix("thesislib.")
                said = ast.get_docstring(ast.parse(file.read_text("utf8"))) or ""
                body = f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```"
                pages[f"api/{module}.md"] = f"# {short}\n\n{body}\n"
                lines.append(f"- [{short}](api/{module}.md): {' '.join(said.partition(chr(10) * 2)[0].split())}")
        lines.append("")
    return {**pages, "_api.md": "\n".join(lines)}


def config(root: Path = ROOT) -> str:
    """`_config.yml` as the book is built from it: buttons of a repository only if its address is set."""
    settings = yaml.safe_load((root / "_config.yml").read_text("utf8"))
    if not settings.get("repository", {}).get("url"):
        settings.pop("repository", None)
        for button in ("use_repository_button", "use_issues_button"):
            settings.get("html", {}).pop(button, None)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def contents(pages: Iterable[str], root: Path = ROOT) -> str:
    """`_toc.yml` with the API's pages below the API."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf8"))
    below = [{"file": f"book/{name.removesuffix('.md')}"} for name in pages if name.startswith("api/")]
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            if chapter["file"] == "book/api" and below:
                chapter["sections"] = below
    return yaml.safe_dump(toc, sort_keys=False)


def _copy(source: Path, target: Path) -> Path:
    return _write(source.read_bytes(), target)


def _write(content: bytes, target: Path) -> Path:
    """Write only what differs, so that Sphinx rebuilds only what changed."""
    if not target.exists() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return target


def clean(notebook: str) -> str:
    """A notebook's JSON without what differs from run to run: execution times, papermill's notes, host paths."""
    import nbformat

    nb = nbformat.reads(notebook, 4)
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(nb.cells):
        cell["id"] = f"cell-{i:02d}"
        for key in ("papermill", "execution", "ExecuteTime", "collapsed"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            cell.metadata.pop("tags")
        if cell.cell_type == "code":
            cell["outputs"] = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    text = nbformat.writes(nb, indent=1)
    if leak := re.search(r"(?<![\w.])/(root|home/\w+|work|Users/\w+|tmp)/[\w./-]*", text):
        raise BadInput(f"an output holds a path of this machine: {leak[0]}")
    return text + "\n"


def without_data(notebook: str) -> str:
    """A notebook's JSON without its results as data: Sphinx warns of a type that it cannot show."""
    import nbformat

    nb = nbformat.reads(notebook, 4)
    for output in (o for cell in nb.cells for o in cell.get("outputs", ())):
        output.get("data", {}).pop(RESULTS, None)
    return nbformat.writes(nb, indent=1) + "\n"


def store(out: Path, root: Path = ROOT) -> list[Path]:
    """Put the executed notebooks, cleaned, into `notebooks/`: what nbval compares with and readers see on the web."""
    return [
        _write(
            clean(executed(name, notebook, out / "executed", reads=reads(name)).read_text("utf8")).encode(), notebook
        )
        for name, notebook in chapters(root).items()
    ]


def note_times(out: Path, root: Path = ROOT) -> Path:
    """Write how long each notebook took when it was last executed into data/results/minutes.json.

    Boxes and the table of chapters quote it. It is written by hand, on a quiet machine, and not by every execution:
    pages would change with each.

    Raises:
        BadInput: a notebook was not executed here.
    """
    seconds = {}
    for name in chapters(root):
        last = max((out / "executed").glob(f"{name}-*.ipynb"), key=lambda p: p.stat().st_mtime, default=None)
        if last is None:
            raise BadInput(f"{name} was not executed under {out}: run `make notebooks`")
        seconds[name] = round(read_json(last)["metadata"]["papermill"]["duration"])
    machine = f"{os.cpu_count()} cores of {hardware()['cpu']}"
    file = root / "data" / MINUTES
    write_whole(file, json.dumps({"machine": machine, "seconds": seconds}, indent=2) + "\n")
    return file


def main(argv: list[str] | None = None) -> None:
    """`python -m thesislib.book [--stored | --store | --time] [--out DIR]`: see the Makefile."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "book")
    parser.add_argument("--stored", action="store_true", help="build from the notebooks' stored outputs")
    parser.add_argument("--store", action="store_true", help="execute, then put the outputs into notebooks/")
    parser.add_argument("--time", action="store_true", help="note how long the last executions took")
    arguments = parser.parse_args(argv)
    try:
        if arguments.time:
            print(note_times(arguments.out))
        elif arguments.store:
            print(*store(arguments.out), sep="\n")
        else:
            print(build(arguments.out, stored=arguments.stored))
    except (BadInput, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__":
    main()
