import os
import re
import sys
import time
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml

from tests.fakes import processes
from thesislib.book import api, clean, without_data
from thesislib.chapters import chapters as study
from thesislib.chapters import reads
from thesislib.errors import BadInput
from thesislib.files import ROOT
from thesislib.notebooks import check_names
from thesislib.runner import cache_key, chapters, execute, executed, results
from thesislib.tables import RESULTS


def notebook(*cells, parameters="seconds = 0"):
    nb = nbformat.v4.new_notebook()
    nb.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    return nb


@pytest.fixture
def checkout(tmp_path):
    """A small project: one notebook and what its cache key reads."""
    for folder in ("notebooks", "thesislib", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "thesislib" / "a.py").write_text("from thesislib.b import c")
    (tmp_path / "thesislib" / "b.py").write_text("c = 1")
    (tmp_path / "thesislib" / "unrelated.py").write_text("d = 1")
    (tmp_path / "data" / "results").mkdir()
    for name in ("01_one", "02_two"):
        (tmp_path / "data" / "results" / f"{name}.jsonl").write_text("{}")
    (tmp_path / "data" / "manifest.json").write_text("{}")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0")
    nbformat.write(
        notebook("if False:\n    from thesislib.a import x  # noqa\nprint(1 + seconds)"),
        tmp_path / "notebooks" / "01_one.ipynb",
    )
    return tmp_path


def test_key_depends_on_what_the_notebook_depends_on(checkout):
    path = checkout / "notebooks" / "01_one.ipynb"
    key = cache_key(path, {}, checkout)
    assert cache_key(path, {}, checkout) == key
    assert cache_key(path, {"seconds": 1}, checkout) != key
    for file in (
        "thesislib/a.py",
        "thesislib/b.py",
        "data/manifest.json",
        "data/results/01_one.jsonl",
        "constraints.txt",
    ):
        before = (checkout / file).read_text()
        (checkout / file).write_text(before + " ")
        assert cache_key(path, {}, checkout) != key, file
        (checkout / file).write_text(before)
    for file in ("thesislib/unrelated.py", "data/results/02_two.jsonl"):
        (checkout / file).write_text("{} ")
        assert cache_key(path, {}, checkout) == key, file
    nb = nbformat.read(path, 4)
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="2\n")]
    nbformat.write(nb, path)
    assert cache_key(path, {}, checkout) == key  # outputs are a result, not a cause
    nb.cells[1].source += "  # changed"
    nbformat.write(nb, path)
    assert cache_key(path, {}, checkout) != key


def test_key_depends_on_the_records_that_a_chapter_reads_and_on_what_reads_them(checkout):
    path = checkout / "notebooks" / "01_one.ipynb"
    nb = nbformat.read(path, 4)
    nb.cells[1].source += '\nrecorded("02_two")'
    nbformat.write(nb, path)
    chapters_read = {"01_one": "thesislib.a", "02_two": "thesislib.unrelated", "03_three": "thesislib.quiet"}
    (checkout / "thesislib" / "quiet.py").write_text("e = 1")
    key = cache_key(path, {}, checkout, reads=chapters_read)
    beside = checkout / "data" / "results" / "02_beside.json"
    for file, changes in (
        ("data/results/02_two.jsonl", True),
        ("data/results/02_beside.json", True),
        ("thesislib/unrelated.py", True),
        ("thesislib/quiet.py", False),
        ("data/results/04_four.jsonl", False),
    ):
        before = (checkout / file).read_text() if (checkout / file).exists() else None
        (checkout / file).write_text("f = 1")
        assert (cache_key(path, {}, checkout, reads=chapters_read) != key) == changes, file
        (checkout / file).write_text(before) if before is not None else (checkout / file).unlink()
    assert not beside.exists()


def test_a_chapter_reads_what_its_notebook_names():
    for name, path in chapters().items():
        code = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        named = set(re.findall(r'(?:recorded|record_file)\("(\w+)"', code))
        assert name in named and named <= set(reads(name)), name


def test_executed_runs_once_and_again_when_something_changes(checkout, capsys):
    path, cache = checkout / "notebooks" / "01_one.ipynb", checkout / "cache"
    first = executed("01_one", path, cache, checkout)
    stamp = first.stat().st_mtime_ns
    assert executed("01_one", path, cache, checkout) == first and first.stat().st_mtime_ns == stamp
    assert "unchanged" in capsys.readouterr().err
    first.write_text(first.read_text("utf8").replace("cell", "sell", 1), "utf8")  # a damaged byte
    assert (
        executed("01_one", path, cache, checkout) == first
        and "damaged" in capsys.readouterr().err
        and "sell" not in first.read_text("utf8")
    )
    (checkout / "thesislib" / "a.py").write_text("x = 2")
    second = executed("01_one", path, cache, checkout)
    assert second != first and not first.exists()
    assert [f.name for f in cache.iterdir()] == [second.name]


def test_execute_with_parameters_and_failure(capfd, tmp_path):
    source = tmp_path / "one.ipynb"
    nbformat.write(notebook("print(seconds * 2)", "assert seconds < 5, 'too many'"), source)
    execute(source, tmp_path / "out.ipynb", {"seconds": 4})
    # nothing to read between two chapters; a busy machine may interrupt a kernel that is about to end
    assert "WARNING" not in capfd.readouterr().err
    assert "8\n" in (tmp_path / "out.ipynb").read_text().replace("\\n", "\n")
    with pytest.raises(RuntimeError, match="raised AssertionError: too many"):
        execute(source, tmp_path / "bad.ipynb", {"seconds": 6})
    assert (tmp_path / "bad.failed.ipynb").exists() and not (tmp_path / "bad.ipynb").exists()
    with pytest.raises(BadInput, match="unknown parameter of one 'secnods': did you mean 'seconds'"):
        execute(source, tmp_path / "never.ipynb", {"secnods": 1})
    assert not list(tmp_path.glob("never*")) and not list(tmp_path.glob(".*partial*"))


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whether it lives")
def test_the_kernel_dies_with_its_run(tmp_path):
    """kill -9 on the run: its kernel, in the middle of a long cell, is gone too and nothing has the final name."""
    source, pid_file = tmp_path / "long.ipynb", tmp_path / "kernel.pid"
    cells = [
        f"import os, pathlib\npathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))\nx = 0\nwhile True: x += 1"
    ]
    nbformat.write(notebook(*cells), source)
    run = processes().Process(target=execute, args=(source, tmp_path / "out.ipynb", {}))
    run.start()
    kernel = int(_wait_for(lambda: pid_file.exists() and pid_file.read_text()))
    run.kill()
    run.join()
    assert _wait_for(lambda: not _alive(kernel)), "the kernel outlived its run"
    assert not (tmp_path / "out.ipynb").exists()


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_for(condition, seconds=90):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.2)
    return None


def test_clean_takes_out_what_differs_and_refuses_paths():
    nb = notebook("1")
    nb.cells[0].metadata["papermill"] = {"duration": 1}
    nb.cells[1].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="bar"),
        nbformat.v4.new_output("stream", text="kept"),
    ]
    nb.metadata["papermill"] = {"input_path": "x"}
    text = clean(nbformat.writes(nb))
    assert "papermill" not in text and "bar" not in text and "kept" in text
    assert clean(text) == text
    nb.cells[1].outputs = [nbformat.v4.new_output("stream", text="saved in " + "/".join(["", "root", "secret"]))]
    with pytest.raises(BadInput, match="path of this machine"):
        clean(nbformat.writes(nb))


def test_pages_show_tables_and_not_their_data():
    """MyST-NB warns of each type in an output that it does not know, and a warning fails the book."""
    known = {"text/plain", "text/html", "text/markdown", "image/png", "application/json"}
    for name, path in chapters().items():
        stored, shown = (
            nbformat.reads(text, 4) for text in (path.read_text("utf8"), without_data(path.read_text("utf8")))
        )
        types = [{*o.get("data", {})} for cell in shown.cells for o in cell.get("outputs", ())]
        assert set().union(*types) <= known, name
        data = [{*o.get("data", {})} for cell in stored.cells for o in cell.get("outputs", ())]
        assert [t - known for t in data if t - known] == [{RESULTS}] and len(data) == len(types), name


def test_stored_notebooks_are_clean_thin_and_tagged():
    for name, path in chapters().items():
        nb = nbformat.read(path, 4)
        assert clean(path.read_text("utf8")) == path.read_text("utf8"), f"{name}: run `make notebooks`"
        code = [c for c in nb.cells if c.cell_type == "code"]
        assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
        assert not any(o.output_type == "error" for c in code for o in c.outputs)
        assert not any(line.startswith(("def ", "class ")) for c in code for line in c.source.splitlines()), (
            f"{name} defines a helper"
        )
        assert sum(bool(c.outputs) for c in code) >= 5, f"{name} has no stored outputs"
        compared = [c for c in code if c.outputs and "nbval-ignore-output" not in c.metadata.get("tags", [])]
        assert len(compared) >= 3, f"{name}: nbval compares nothing"
        for c in code:
            assert not any("image/png" in o.get("data", {}) for o in c.outputs), f"{name}: a figure without number"
            hidden = {"hide-input", "parameters", "toy", "try"} & {*c.metadata.get("tags", [])}
            assert hidden, f"{name}: a code cell is shown that is no toy: {c.source[:60]}"
            assert "toy" in hidden or "print(" not in c.source, f"{name}: a sentence is printed"


def test_every_notebook_is_in_the_book_and_its_parameters_are_its_configs():
    from papermill import inspect_notebook

    toc = (ROOT / "_toc.yml").read_text()
    assert list(study()) == list(chapters())
    for name, chapter in study().items():
        assert f"notebooks/{name}" in toc
        assert set(inspect_notebook(str(chapters()[name]))) == {f.name for f in fields(chapter.parameters)}


def test_a_misspelt_parameter_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match="did you mean 'windows'"):
        check_names(chapters()["01_franken_llama"], ["windos"])


@pytest.mark.parametrize("name", list(chapters()))
def test_every_notebook_has_one_table_that_a_sweep_reads(name):
    rows = results(chapters()[name])
    assert rows and all(any(isinstance(value, str) and value for value in row.values()) for row in rows)


def test_every_module_is_in_the_api():
    package = ROOT / "thesislib"
    modules = {
        ".".join(f.relative_to(package).with_suffix("").parts)
        for f in package.rglob("*.py")
        if not f.stem.startswith("__")
    } - {"cli"}
    listed = re.findall(r"automodule:: thesislib\.(\S+)", "".join(api().values()))
    assert sorted(listed) == sorted(modules)


def canonical(name):
    return name.strip().lower().replace("_", "-")


def locked():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonical(n): v for n, v in (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    }


def test_conda_and_pip_install_the_same_versions():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    listed = {canonical(n): v for n, v in (p.split("==") for p in pip if "==" in p)}
    pins = locked()
    assert {n: pins.get(n) for n in listed} == listed
    assert "python=3.11" in conda["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: extra for name, extra in project["optional-dependencies"].items() if name not in ("gptqmodel", "engine")
    }  # own environment; own build
    wanted = [*project["dependencies"], *(d for extra in extras.values() for d in extra)]
    assert {canonical(re.match(r"[\w.-]+", d)[0]) for d in wanted} == set(listed)
    for name in (
        "torch",
        "jupyterlab",
        "jupyter-book",
        "papermill",
        "nbval",
        "transformers",
        "peft",
        "matplotlib",
        "seaborn",
        "lm-eval",
    ):
        assert name in listed, name


@pytest.mark.skipif("THESISLIB_ANY_VERSIONS" in os.environ, reason="THESISLIB_ANY_VERSIONS: other versions on purpose")
@pytest.mark.parametrize("name", ["torch", "transformers", "lm-eval", "datasets", "jupyter-book", "papermill", "nbval"])
def test_the_environment_has_the_pinned_versions(name):
    assert version(name).split("+")[0] == locked()[name]
