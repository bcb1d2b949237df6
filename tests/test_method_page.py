"""The walk-through "Your method in this book", done as it stands there, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from thesislib.files import ROOT
from thesislib.formats.load import save_checkpoint

PAGE = (ROOT / "book" / "method.md").read_text("utf8")
BLOCKS = re.findall(r"(?s)```(\w+)\n(.*?)```", PAGE)


@pytest.mark.processes
def test_the_page_does_what_it_says(tmp_path, tiny, tiny_data):
    shutil.copytree(ROOT / "thesislib", tmp_path / "thesislib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("results"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for kind, code in BLOCKS:
        if kind in ("python", "yaml") and (file := re.match(r"# (\S+\.(?:py|yaml))\n", code)):
            (tmp_path / file[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file[1]).write_text(code)

    def run(*words):
        here = {"THESISLIB_DATA": tiny_data, "THESISLIB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **here}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    options = ("-q", "-p", "no:cacheprovider", "-o", "addopts=")
    assert "2 passed" in run("-m", "pytest", *options, "tests/compress/test_ria.py")
    save_checkpoint(tiny(layers=4), tmp_path / "tiny")
    commands = [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines() if line]
    assert len(commands) == 5
    for line in commands:
        words = line.replace("--subject embedded", "--subject tiny").split()[1:]
        if words[0] == "sweep":
            words += ["--subject", "tiny"]
        run("-m", "thesislib.cli", *words)
    code = next(code for kind, code in BLOCKS if kind == "python" and "Store(" in code)
    assert "Comparison(" in run("-c", code)
