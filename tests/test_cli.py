import io
import json
import os
import subprocess
import sys

import nbformat
import pytest
from typer.testing import CliRunner

from tests.fakes import perplexity
from thesislib import runner
from thesislib.cli import app
from thesislib.files import ROOT
from thesislib.formats import load
from thesislib.formats.load import save_checkpoint
from thesislib.records.store import Store
from thesislib.sources.rows import default_data

run = CliRunner().invoke


@pytest.fixture
def tiny_folder(tiny, tmp_path):
    return str(save_checkpoint(tiny(layers=12), tmp_path / "tiny"))


@pytest.fixture
def data_folder(tmp_path):
    rows = {
        "wikitext2/test": [
            {"text": f" = Article {i} = \n"} if i % 4 == 0 else {"text": f"Line {i} of the article says something. \n"}
            for i in range(40)
        ],
        "trivia_qa/validation_closed_book": [
            {"question_id": str(i), "question": "Who?", "answer": {"value": "a", "aliases": ["a"]}} for i in range(4)
        ],
        "hellaswag/validation": [
            {
                "ind": i,
                "activity_label": "Run",
                "ctx_a": "He runs.",
                "ctx_b": "he",
                "endings": ["stops.", "flies.", "is.", "a"],
                "label": "0",
            }
            for i in range(4)
        ],
    }
    for name, found in rows.items():
        file = tmp_path / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in found))
    return str(tmp_path / "data")


def on_wikitext(subject, data, *options):
    return ["evaluate", subject, "--on", "wikitext", "--data", data, "--length", "16", "--json", *options]


def test_evaluate_json_has_value_interval_n_unit_and_provenance(tiny_folder, data_folder):
    result = run(app, on_wikitext(tiny_folder, data_folder, "--limit", "8"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["low"] < found["value"] < found["high"] and found["n"] == 8 and found["unit"] == "window of 16 tokens"
    assert found["provenance"]["settings"]["length"] == 16 and found["provenance"]["fingerprint"]
    assert "items" not in found
    assert data_folder not in result.stdout  # a record travels: no path of this machine in it


@pytest.mark.parametrize(
    ("task", "extra", "metric"),
    [
        ("wikitext", [], "perplexity"),
        ("trivia", ["--prompt", "thesis"], "accuracy"),
        ("hellaswag", ["--fast"], "acc_norm"),
        ("hellaswag", [], "acc_norm"),
    ],
)
def test_evaluate_in_words(tiny_folder, data_folder, task, extra, metric):
    result = run(
        app, ["evaluate", tiny_folder, "--on", task, "--data", data_folder, "--length", "16", "--limit", "3", *extra]
    )
    assert result.exit_code == 0, result.output
    assert metric in result.stdout and "95 % interval [" in result.stdout and "n = 3" in result.stdout


def test_evaluate_a_plan_and_every_item(tiny_folder, data_folder):
    args = on_wikitext(tiny_folder, data_folder, "--items", "--plan", "0-3x2,11")
    found = json.loads(run(app, args).stdout)
    assert found["provenance"]["plan"] == [0, 0, 1, 1, 2, 2, 3, 3, 11]
    assert len(found["items"]) == found["n"]


def test_a_stream_that_knows_latin_1_only_takes_every_text(monkeypatch, tmp_path):
    name = Store(tmp_path / "s.jsonl").append(perplexity(1.0, provenance={"subject": "Grüße 🚁 日本"}))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    app(["records", "--store", str(tmp_path / "s.jsonl"), "--json"], standalone_mode=False)
    stream.write("\udcff")  # half a character
    stream.flush()
    line, half = stream.buffer.getvalue().decode("latin-1").splitlines()
    plain = json.loads(line)
    assert plain["id"] == name and plain["provenance"]["subject"] == "Grüße 🚁 日本" and half == r"\udcff"


def test_thesislib_data_is_the_default(tiny_folder, data_folder, monkeypatch):
    monkeypatch.setenv("THESISLIB_DATA", data_folder)
    assert default_data() == data_folder
    result = run(app, ["evaluate", tiny_folder, "--on", "wikitext", "--length", "16"])
    assert result.exit_code == 0 and "WikiText-2 test" in result.stdout
    monkeypatch.delenv("THESISLIB_DATA")
    assert default_data() == "embedded"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate", "nowhere", "--on", "wikitext"], "subject 'nowhere' is not known"),
        (["evaluate", "embedded", "--on", "wikitex"], "did you mean 'wikitext'"),
        (["evaluate", "embedded", "--on", "wikitext", "--data", "nowhere"], "unknown data 'nowhere'"),
        (
            ["evaluate", "TINY", "--on", "wikitext", "--data", "DATA", "--length", "100000"],
            "window length 100000 is longer",
        ),
        (
            ["evaluate", "TINY", "--on", "wikitext", "--data", "DATA", "--plan", "0-99"],
            "block 12 is out of range: this model has blocks 0 to 11",
        ),
        (["evaluate", "TINY", "--on", "wikitext", "--data", "DATA", "--plan", ","], "the plan is empty"),
        (["evaluate", "TINY", "--on", "piqa", "--data", "DATA"], "holds neither piqa/validation.jsonl"),
        (["evaluate", "TINY", "--on", "trivia", "--data", "DATA", "--limit", "0"], "'limit' is 0: expected at least 1"),
        (["evaluate", "TINY", "--on", "wikitext", "--dtype", "float8"], "expected one of float32, bfloat16, float16"),
        (["run", "01_frankenllama"], "did you mean '01_franken_llama'"),
        (["run", "01", "-p", "windos=3"], "did you mean 'windows'"),
        (["run", "01", "-p", "windows"], "expected key=value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_folder, data_folder, args, message):
    args = [{"TINY": tiny_folder, "DATA": data_folder}.get(a, a) for a in args]
    result = run(app, args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_an_unknown_task_or_data_costs_no_model(monkeypatch):
    monkeypatch.setattr(load, "load_subject", lambda *_: pytest.fail("loaded a model for nothing"))
    assert run(app, ["evaluate", "embedded", "--on", "nothing"]).exit_code == 2
    assert run(app, ["evaluate", "embedded", "--on", "wikitext", "--data", "nowhere"]).exit_code == 2


def test_a_notebook_that_fails_is_exit_code_1_and_one_that_refuses_2(tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("k = 1", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("from thesislib.errors import BadInput\nif k == 3: raise BadInput('k is 3')"),
            nbformat.v4.new_code_cell("1 / (k - 2)"),
        ]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "09_one.ipynb")
    monkeypatch.setattr(runner, "chapters", lambda: {"09_one": tmp_path / "09_one.ipynb"})
    out = tmp_path / "out.ipynb"
    result = run(app, ["run", "9", "-p", "k=2", "--out", str(out)])
    assert result.exit_code == 1 and "a cell raised ZeroDivisionError" in result.stderr
    assert not out.exists() and (tmp_path / "out.failed.ipynb").exists()
    refused = run(app, ["run", "9", "-p", "k=3", "--out", str(out)])
    assert refused.exit_code == 2 and "k is 3" in refused.stderr


def test_as_installed():
    """In a process of its own, as a user calls it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    called = [sys.executable, "-m", "thesislib.cli", "--help"]
    done = subprocess.run(called, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "evaluate" in done.stdout, done.stderr


@pytest.mark.embedded
def test_what_fetch_and_help_say():
    assert "hellaswag" in run(app, ["evaluate", "--help"]).stdout
    done = run(app, ["fetch"])
    assert done.exit_code == 0 and done.stdout
