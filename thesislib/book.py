"""Notebooks executed with papermill, cached by what they depend on, and the HTML book built from them."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thesislib.chapters import findings as chapter_findings
from thesislib.config import PARENT
from thesislib.errors import BadInput
from thesislib.files import read_json
from thesislib.notebooks import read_notebook, ready

ROOT = Path(__file__).parent.parent
SEAL = "thesislib_sha256"


def chapters(root: Path = ROOT) -> dict[str, Path]:
    """The notebooks by name, e.g. '01_franken_llama'."""
    found = {p.stem: p for p in sorted((root / "notebooks").glob("*.ipynb"))}
    if not found:
        raise BadInput(f"no notebooks in {root}: `thesislib run` and `thesislib book` work in a checkout of the project")
    return found


def cache_key(notebook: Path, parameters: Mapping[str, Any], root: Path = ROOT) -> str:
    """sha256 over all that an executed notebook depends on: itself (code, prose and parameters cell, not its
    outputs), the parameters given, the sources of thesislib, the data it reads, and the lock file."""
    digest = hashlib.sha256()
    cells = [(c.cell_type, c.source, dict(c.metadata)) for c in read_notebook(notebook).cells]
    digest.update(repr((cells, sorted(parameters.items()), sys.version_info[:2])).encode())
    files = [*(root / "thesislib").rglob("*.py"), *(root / "data").rglob("*"), root / "constraints.txt"]
    for file in sorted(f for f in files if f.is_file()):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def execute(notebook: Path, out: Path, parameters: Mapping[str, Any]) -> None:
    """Execute one notebook; `out` appears only when every cell ran.

    A notebook that fails is left beside `out` as `NAME.failed.ipynb`, up to the cell that failed.

    Raises:
        BadInput: a parameter that it cannot take, before anything runs, or what a cell refused. RuntimeError: a cell raised, with its error.
    """
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    parameters = ready(notebook, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, failed = out.with_name(f".{out.stem}-{os.getpid()}.partial.ipynb"), out.with_suffix(".failed.ipynb")
    for left in out.parent.glob(f".{out.stem}-*.partial.ipynb"):  # of a process that was killed
        if not _alive(int(left.name.removesuffix(".partial.ipynb").rpartition("-")[2])):
            left.unlink(missing_ok=True)
    os.environ[PARENT] = str(os.getpid())  # the kernel's promise to die with us, see thesislib.config
    try:
        execute_notebook(str(notebook), str(partial), parameters, kernel_name="python3", cwd=str(notebook.parent),
                         progress_bar=sys.stderr.isatty(), start_timeout=300)  # fmt: skip
        seal(partial)
        os.replace(partial, out)
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        kind = BadInput if error.ename == BadInput.__name__ else RuntimeError
        raise kind(f"{notebook.stem}: a cell raised {error.ename}: {error.evalue} (see {failed})") from error
    finally:
        os.environ.pop(PARENT, None)
        partial.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def seal(notebook: Path) -> None:
    """Note in an executed notebook's metadata the checksum of all the rest, for `intact`."""
    plain = read_json(notebook)
    plain["metadata"][SEAL] = _checksum(plain)
    notebook.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", "utf8")


def intact(notebook: Path) -> bool:
    """Whether an executed notebook is there as it was written."""
    try:
        plain = read_json(notebook)
        return plain["metadata"].pop(SEAL) == _checksum(plain)
    except (BadInput, KeyError, TypeError, AttributeError):
        return False


def _checksum(plain: dict) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def executed(name: str, notebook: Path, cache: Path) -> Path:
    """The notebook executed with its default parameters, from the cache if nothing it depends on has changed."""
    out = cache / f"{name}-{cache_key(notebook, {})[:16]}.ipynb"
    if intact(out):
        print(f"{name}: unchanged, not executed again", file=sys.stderr)
    else:
        print(f"{name}: executing{' again, since what was kept of it is damaged' if out.exists() else ''}", file=sys.stderr)
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        execute(notebook, out, {})
        for old in cache.glob(f"{name}-*.ipynb"):
            if old != out:
                old.unlink()
    return out


def build(out: Path, stored: bool = False, root: Path = ROOT) -> Path:
    """Build the book under `out` and return its index page. Any warning, and any failing notebook, fails the build.

    Args:
        out: the build folder; an unchanged second build takes seconds.
        stored: use the notebooks' stored outputs instead of executing them.
        root: the checkout.

    Raises:
        RuntimeError: a notebook or the build failed; what was said is on stderr.
    """
    source = out / "source"
    source.mkdir(parents=True, exist_ok=True)
    wanted = set()
    for name, notebook in chapters(root).items():
        wanted.add(_place(notebook if stored else executed(name, notebook, out / "executed"), source / "notebooks" / f"{name}.ipynb", strip=True))
    for page in [root / "_config.yml", root / "_toc.yml", *(p for p in (root / "book").rglob("*") if p.is_file())]:
        wanted.add(_place(page, source / page.relative_to(root)))
    findings = source / "book" / "_findings.md"  # the first page includes it
    wanted.add(findings)
    if not findings.exists() or findings.read_text("utf8") != chapter_findings():
        findings.write_text(chapter_findings(), "utf8")
    for left_over in {p for p in source.rglob("*") if p.is_file() and "_build" not in p.relative_to(source).parts} - wanted:
        left_over.unlink()
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        str(source),
        "--path-output",
        str(out),
        "-W",
        "-n",
        "--keep-going",
        "--quiet",
    ]
    run = subprocess.run(command, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "book" / "_ext")])})
    index = out / "_build" / "html" / "index.html"
    if run.returncode or not index.exists():
        raise RuntimeError(f"the book did not build (jupyter-book exited with {run.returncode}): see the warnings above")
    return index


def _place(source: Path, target: Path, strip: bool = False) -> Path:
    """Copy only what differs, so that Sphinx rebuilds only what changed."""
    content = clean(source.read_text("utf8")).encode() if strip else source.read_bytes()
    if not target.exists() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return target


def clean(notebook: str) -> str:
    """A notebook's JSON without what differs from run to run: execution times, papermill's notes, host paths."""
    import nbformat

    nb = nbformat.reads(notebook, 4)
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    nb.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
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


def store(out: Path, root: Path = ROOT) -> list[Path]:
    """Put the executed notebooks, cleaned, into `notebooks/`: what nbval compares with and readers see on the web."""
    stored = []
    for name, notebook in chapters(root).items():
        stored.append(_place(executed(name, notebook, out / "executed"), notebook, strip=True))
    return stored


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
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
