"""The package as a wheel brings it: without a checkout beside it, called from elsewhere."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest

from thesislib.files import ROOT
from thesislib.formats.load import save_checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.embedded]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that calls `python ARGS` from another folder, where thesislib is the wheel's."""
    if not find_spec("hatchling"):
        pytest.skip("hatchling, which builds the wheel, is not installed")
    built, elsewhere = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("elsewhere")
    pip = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, ROOT]
    subprocess.run([sys.executable, "-m", *map(str, pip)], check=True, capture_output=True, cwd=elsewhere)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(built / "site")
    path = os.pathsep.join(
        [str(built / "site"), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(ROOT))]
    )

    def call(*commands):
        """(exit code, stdout, stderr) of each command, all in one process: importing torch takes seconds. "data:"
        begins a file of the wheel's."""
        code = f"""if True:
            import contextlib, io, json
            from thesislib import book, cli
            from thesislib.files import data_file
            said = []
            for name, *args in {commands!r}:
                main = book.main if name == "book" else lambda args: cli.app([name, *args])
                with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                    try:
                        main([str(data_file(a[5:])) if a.startswith("data:") else a for a in args])
                    except SystemExit as end:
                        said.append([end.code, out.getvalue(), err.getvalue()])
            print(json.dumps([book.__file__, said]))"""
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=elsewhere, env=environment
        )
        assert done.returncode == 0, done.stderr
        file, said = json.loads(done.stdout)
        assert file.startswith(str(built))
        return said

    call.folder = elsewhere
    return call


def test_what_works_without_a_checkout_and_what_needs_one_says_so(installed, tiny, tiny_data):
    folder = installed.folder
    save_checkpoint(tiny(layers=9), folder / "tiny")
    said = installed(
        ["profile", "embedded", "--device", "k1", "--json"],
        ["records", "--label", "D2+W1:8", "--json"],
        ["recipe", "check", "data:recipes/d2_w1_8.yaml"],
        ["recipe", "expand", "data:grid.yaml", "--out", "grid", "--size", "quick"],
        ["compress", "D2", "--subject", "tiny", "--data", tiny_data, "--out", "D2"],
        ["evaluate", "D2", "--on", "wikitext", "--limit", "1", "--length", "32", "--json", "--data", tiny_data],
        ["run", "1"],
        ["sweep", "--chapter", "3"],
        ["book"],
    )
    for code, out, err in said[6:]:
        assert out == "" and code == 2 and err.count("\n") == 1 and "needs a checkout of thesislib" in err
    said = said[:6]
    assert [code for code, *_ in said] == [0] * 6, said
    profile, rows, checked, expanded, _, perplexity = (out for _, out, _ in said)
    assert json.loads(profile)["device"] == "k1"
    recorded = [
        line for file in (ROOT / "data" / "results").glob("*.jsonl") for line in file.read_text("utf8").splitlines()
    ]
    assert (
        len(rows.splitlines())
        == sum(json.loads(line)["provenance"].get("made", {}).get("label") == "D2+W1:8" for line in recorded)
        > 0
    )
    assert "D2+W1:8" in checked and len(list((folder / "grid").glob("*.yaml"))) == int(expanded.split()[-2])
    assert json.loads(perplexity)["n"] == 1 and json.loads(perplexity)["provenance"].get("commit") is None
