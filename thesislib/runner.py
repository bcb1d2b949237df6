"""One notebook executed with papermill: what it depends on, whether it is as it was written, and its results."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from thesislib.errors import BadInput
from thesislib.files import ROOT, alive, check_checkout, read_json
from thesislib.imports import digest_of, imported, sources
from thesislib.notebooks import read_notebook, ready
from thesislib.tables import RESULTS

SEAL = "thesislib_sha256"
# kernels listen on TCP ports of this machine, where other users are; unencrypted ones warn of it once a chapter
ENCRYPTED = {"KernelManager": {"transport_encryption": "auto"}}
TAG = "results"  # of the cell whose table is a notebook's result


def chapters(root: Path = ROOT) -> dict[str, Path]:
    """The notebooks by name, e.g. '01_franken_llama'."""
    check_checkout("a chapter", root)
    return {p.stem: p for p in sorted((root / "notebooks").glob("*.ipynb"))}


def cache_key(
    notebook: Path, parameters: Mapping[str, Any], root: Path = ROOT, *, reads: Mapping[str, str] | None = None
) -> str:
    """sha256 over all that an executed notebook depends on: itself (code, prose and parameters cell, not its outputs),
    the parameters given, the sources of thesislib that its cells import, directly or not, the data that it may read,
    and the lock file.

    Args:
        notebook, parameters: what is executed.
        root: the checkout.
        reads: {chapter: its module} of the chapters whose records it reads (see `thesislib.chapters.reads`). Of
            data/results the files of these chapters' numbers and of its own count; a module counts too if a cell names
            its chapter, since that record is then read by it.
    """
    cells = [(c.cell_type, c.source, dict(c.metadata)) for c in read_notebook(notebook).cells]
    code = "\n".join(source for kind, source, _ in cells if kind == "code")
    own = sources(
        imported(code) | {module for name, module in (reads or {}).items() if f'"{name}"' in code}, root / "thesislib"
    )
    numbers = {name.partition("_")[0] for name in (notebook.stem, *(reads or {}))}
    data = [
        file
        for file in sorted((root / "data").rglob("*"))
        if file.is_file() and _may_read(numbers, file.relative_to(root / "data"))
    ]
    files = digest_of([*own, *data, root / "constraints.txt"], root)
    facts = (cells, sorted(parameters.items()), sys.version_info[:2], files)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _may_read(numbers: Collection[str], file: Path) -> bool:
    """Whether a notebook may read a file of `data/`: a record of one of these chapters, all else always."""
    return file.parts[0] != "results" or file.name.partition("_")[0] in numbers or file.name.startswith("answers.")


def execute(notebook: Path, out: Path, parameters: Mapping[str, Any], kind: type | None = None) -> None:
    """Execute one notebook; `out` appears only when every cell ran.

    A notebook that fails is left beside `out` as `NAME.failed.ipynb`, up to the cell that failed.

    Args:
        notebook, parameters, kind: see `thesislib.notebooks.ready`.
        out: where it is written.

    Raises:
        BadInput: a parameter that it cannot take, before anything runs, or what a cell refused. RuntimeError: a cell
            raised, with its error.
    """
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    parameters = ready(notebook, parameters, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, failed = out.with_name(f".{out.stem}-{os.getpid()}.partial.ipynb"), out.with_suffix(".failed.ipynb")
    for left in out.parent.glob(f".{out.stem}-*.partial.ipynb"):  # of a process that was killed
        if not alive(int(left.name.removesuffix(".partial.ipynb").rpartition("-")[2])):
            left.unlink(missing_ok=True)
    try:  # a kernel ends by itself, within a second, when its parent is killed: ipykernel looks for that
        execute_notebook(str(notebook), str(partial), parameters, kernel_name="python3", cwd=str(notebook.parent),
                         progress_bar=sys.stderr.isatty(), start_timeout=300, config=Config(ENCRYPTED))  # fmt: skip
        seal(partial)
        os.replace(partial, out)
    except PapermillExecutionError as error:
        os.replace(partial, failed)
        same = BadInput if error.ename == BadInput.__name__ else RuntimeError
        raise same(f"{notebook.stem}: a cell raised {error.ename}: {error.evalue} (see {failed})") from error
    finally:
        partial.unlink(missing_ok=True)


def seal(notebook: Path) -> None:
    """Note in an executed notebook's metadata the checksum of all the rest, for `intact`."""
    content = read_json(notebook)
    content["metadata"][SEAL] = _checksum(content)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf8")


def intact(notebook: Path) -> bool:
    """Whether an executed notebook is there as it was written."""
    try:
        content = read_json(notebook)
        return content["metadata"].pop(SEAL) == _checksum(content)
    except (BadInput, KeyError, TypeError, AttributeError):
        return False


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def executed(
    name: str, notebook: Path, cache: Path, root: Path = ROOT, *, reads: Mapping[str, str] | None = None
) -> Path:
    """The notebook executed with its default parameters, from the cache if nothing it depends on has changed; see
    `cache_key`."""
    out = cache / f"{name}-{cache_key(notebook, {}, root, reads=reads)[:16]}.ipynb"
    if intact(out):
        print(f"{name}: unchanged, not executed again", file=sys.stderr)
        return out
    again = " again, since what was kept of it is damaged" if out.exists() else ""
    print(f"{name}: executing{again}", file=sys.stderr)
    if out.is_dir() and not out.is_symlink():
        shutil.rmtree(out)
    execute(notebook, out, {})
    for old in cache.glob(f"{name}-*.ipynb"):
        if old != out:
            old.unlink()
    return out


def results_cell(notebook: Path):
    """The one cell that is tagged `results`.

    Raises:
        BadInput: none is, or several.
    """
    cells = [c for c in read_notebook(notebook).cells if TAG in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise BadInput(
            f"{notebook.name} has {len(cells)} cells tagged '{TAG}': expected one, that shows its table of results"
        )
    return cells[0]


def results(notebook: Path) -> list[dict[str, Any]]:
    """The rows that a notebook's cell tagged `results` hands over, see `thesislib.tables.ResultsTable`.

    Raises:
        BadInput: no such cell, or no rows in its output.
    """
    for output in results_cell(notebook).get("outputs", []):
        if table := output.get("data", {}).get(RESULTS):
            return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    raise BadInput(
        f"the cell tagged '{TAG}' of {notebook.name} hands over no table: expected page.Results(...) as its last line"
    )
