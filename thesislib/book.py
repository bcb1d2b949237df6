"""Notebooks executed with papermill, cached by what they depend on, and the HTML book built from them."""

import os
import re
import subprocess
import sys
from pathlib import Path

from thesislib.chapters import findings as chapter_findings
from thesislib.chapters import reads
from thesislib.errors import BadInput
from thesislib.files import ROOT, check_checkout
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
    for page in [root / "_config.yml", root / "_toc.yml", *(p for p in (root / "book").rglob("*") if p.is_file())]:
        pages.add(_copy(page, source / page.relative_to(root)))
    for name, text in (("_findings.md", chapter_findings()), ("_api.md", api(root))):  # pages include them
        pages.add(_write(text.encode(), source / "book" / name))
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


def rooms(root: Path = ROOT) -> list[tuple[list[str], str]]:
    """The README's table of the package: the names in each row, in the order of imports, and what they are for."""
    rows = [
        line.split("|")
        for line in (root / "README.md").read_text("utf8").split("<!-- imports -->")[1].splitlines()
        if line.startswith("| `")
    ]
    return [(re.findall(r"`(\w+)", cells[1]), cells[2].strip()) for cells in rows if "/" not in cells[1]]


def api(root: Path = ROOT) -> str:
    """The body of the API page: every module of the package under its room's heading."""
    lines = []
    for names, purpose in rooms(root):
        lines.append(f"## {', '.join(names)}\n\n{purpose[:1].upper()}{purpose[1:]}.\n\n```{{eval-rst}}")
        for name in names:
            files = sorted((root / "thesislib" / name).rglob("*.py")) or [root / "thesislib" / f"{name}.py"]
            for file in (f for f in files if not f.stem.startswith("__") and f.stem != "cli"):
                module = ".".join(file.relative_to(root).with_suffix("").parts)
                lines.append(f".. automodule:: {module}\n   :members:")
        lines.append("```\n")
    return "\n".join(lines)


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


def main(argv: list[str] | None = None) -> None:
    """`python -m thesislib.book [--stored | --store] [--out DIR]`: see the Makefile."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "book")
    parser.add_argument("--stored", action="store_true", help="build from the notebooks' stored outputs")
    parser.add_argument("--store", action="store_true", help="execute, then put the outputs into notebooks/")
    arguments = parser.parse_args(argv)
    try:
        if arguments.store:
            print(*store(arguments.out), sep="\n")
        else:
            print(build(arguments.out, stored=arguments.stored))
    except (BadInput, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__":
    main()
