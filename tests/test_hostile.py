"""Files that are far larger, deeper or more numerous than they may be: refused in one line, before memory is taken by
what they say."""

import gzip
import json
import os
import struct

import gguf
import nbformat
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.fakes import measurement
from thesislib import notebooks
from thesislib.cli import app
from thesislib.errors import BadInput, printable
from thesislib.files import damaged, read_json, sha256_of
from thesislib.formats import checkpoint
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.gguf_header import check_header
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.records.store import Store
from thesislib.sources import rows
from thesislib.sweep.workers import Order, Workers, drive

TERABYTE = 1 << 40


def sparse(path, size=TERABYTE):
    """A file that says it is so large, and takes no place."""
    with path.open("ab") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ],
)
def test_a_checkpoint_with_a_file_of_a_terabyte(tiny, tmp_path, name):
    folder = save_checkpoint(tiny(layers=1), tmp_path / "x")
    sparse(folder / name)
    with pytest.raises(BadInput, match=name):
        load_subject(folder)


@pytest.mark.parametrize("name", ["artifact.json", "packed.safetensors", "tokenizer.json"])
def test_an_artifact_with_a_file_of_a_terabyte(tiny, tmp_path, name):
    subject = tiny(layers=1)
    for linear in subject.linears(0).values():
        linear.weight.data[:, ::2] = 0
    folder = save_artifact(subject, tmp_path / "x")
    sparse(folder / name)
    with pytest.raises(BadInput, match=name):
        load_artifact(folder)


def test_a_model_that_fits_no_memory(tiny, tmp_path, monkeypatch):
    folder = save_checkpoint(tiny(layers=1), tmp_path / "x")
    taken = sum(p.numel() for p in tiny(layers=1).model.parameters())
    monkeypatch.setattr(
        checkpoint.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2 * taken}.get(name)
    )
    assert load_subject(folder, "bfloat16")
    with pytest.raises(BadInput, match="of memory, and this machine has"):
        load_subject(folder, "float32")


@pytest.mark.parametrize("size", [TERABYTE, 100])
def test_json_that_is_large_or_deep(tmp_path, size):
    path = tmp_path / "x.json"
    path.write_text("[" * 1_000_000 + "]" * 1_000_000)
    sparse(path, size) if size == TERABYTE else None
    with pytest.raises(BadInput, match=r"x\.json cannot be read as JSON"):
        read_json(path)


def test_texts_that_unpack_to_all_memory(tmp_path, monkeypatch):
    path = tmp_path / "wikitext2" / "test.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wb", 1) as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
    with pytest.raises(BadInput, match="is too large at line 1"):
        rows.rows("wikitext", tmp_path)
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 100))
    monkeypatch.setattr(rows, "MOST", 50)
    with pytest.raises(BadInput, match="is too large at line 51"):
        rows.rows("wikitext", tmp_path)
    path.unlink()
    sparse(path.with_suffix(""))
    with pytest.raises(BadInput, match="is too large at line 1"):
        rows.rows("wikitext", tmp_path)


def test_a_pipe_has_no_checksum(tmp_path):
    os.mkfifo(tmp_path / "x")
    assert damaged(tmp_path, {"x": "0" * 64}) == "x"
    with pytest.raises(BadInput, match="no ordinary file"):
        sha256_of(tmp_path / "x")


def test_records_of_a_terabyte(tmp_path):
    with pytest.raises(BadInput, match="expected at most"):
        Store(sparse(tmp_path / "x.jsonl")).rows()


COUNTS = {
    "tensors": struct.pack("<QQ", 1 << 60, 0),
    "settings": struct.pack("<QQ", 0, 1 << 60),
    "a name": struct.pack("<QQQ", 0, 1, 1 << 60),
    "a list": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"x", 9, 4, 1 << 60),
    "a list of texts": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"x", 9, 8, 1 << 60),
    "lists in lists": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"x", 9, 9, 1),
    "a text": struct.pack("<QQQ1sIQ", 0, 1, 1, b"x", 8, 1 << 60),
    "dimensions": struct.pack("<QQQ1sI", 1, 0, 1, b"x", (1 << 32) - 1),
    "a kind": struct.pack("<QQQ1sI", 0, 1, 1, b"x", 99),
    "a tensor": struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"x", 1, 1 << 37, 0, 0),
}


@pytest.mark.parametrize("size", [0, TERABYTE])
@pytest.mark.parametrize("what", COUNTS)
def test_a_gguf_that_counts_to_2_to_the_60(tmp_path, what, size):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + COUNTS[what])
    if size:
        sparse(path, size)
    with pytest.raises(BadInput, match=r"x\.gguf"):
        check_header(path)


def test_a_gguf_that_is_whole_passes(tiny, tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in (
        ("uint32", 1),
        ("string", "x"),
        ("bool", True),
        ("float64", 1.5),
        ("array", ["a", "bc"]),
        ("array", [1, 2, 3]),
        ("array", [0.5]),
    ):
        getattr(writer, f"add_{kind}")(f"own.{kind}.{len(str(value))}", value)
    writer.add_tensor("x", np.zeros((3, 32), dtype="float32"))
    writer.add_tensor("y", np.zeros((4, 34), dtype="uint8"), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    check_header(path)
    sparse(path, path.stat().st_size + (3 << 20))
    with pytest.raises(BadInput, match="expected no others"):
        check_header(path)


@pytest.mark.parametrize("change", ["types", "numbers", "epsilon", "end"])
def test_a_gguf_whose_settings_are_odd(tmp_path, monkeypatch, change):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    tokens = ["a", "b", "ab"]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, value in (
        ("block_count", 1),
        ("embedding_length", 8),
        ("attention.head_count", 2),
        ("feed_forward_length", 8),
        ("context_length", 64),
    ):
        writer.add_uint32(f"llama.{name}", value)
    if change != "epsilon":
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", [1, 2, 3] if change == "numbers" else tokens)
    writer.add_array("tokenizer.ggml.token_type", [1] * (2 if change == "types" else 3))
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1 << 30 if change == "end" else 1)
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), dtype="float32"))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(BadInput, match=r"x\.gguf has .* damaged"):
        load_subject(tmp_path / "x.gguf")


def test_notebooks_that_are_none(tmp_path):
    path = tmp_path / "x.ipynb"
    good = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("k = 1", metadata={"tags": ["parameters"]})])
    nbformat.write(good, path)
    assert notebooks.defaults(path) == {"k": 1}
    for change in (
        {"cells": [7]},
        {"cells": {}},
        {"metadata": []},
        {"nbformat": "4"},
        {"cells": [{**good.cells[0], "source": "k = ("}]},
        {"cells": [{**good.cells[0], "source": "k = 1\0"}]},
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(BadInput) as raised:
            notebooks.defaults(path)
        assert "x.ipynb" in str(raised.value) and "\n" not in str(raised.value)


def test_control_characters_stay_on_their_line():
    assert printable("a\nb\x1b[31mc\u2028\ud800é ") == r"a\nb\x1b[31mc\u2028\ud800é "


@pytest.mark.parametrize(
    "args",
    [
        ["recipe", "label", "D1\nD2"],
        ["evaluate", "a\x1b[31mb\nc", "--on", "wikitext"],
        ["compress", "D1", "--data", "a\nb", "--dry-run"],
        ["export", "a\0b", "--gguf", "F16"],
    ],
)
def test_an_error_of_what_was_typed_is_one_line(args):
    result = CliRunner().invoke(app, args)
    assert (
        result.exit_code == 2
        and result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and "\x1b" not in result.stderr
    )


@pytest.mark.parametrize(
    "args",
    [
        ["\x1b[31mnope"],
        ["evaluate", "--\x1b[31mnope"],
        ["records", "verify", "x", "--\x1b[31m"],
        ["recipe", "\x1b[31m"],
    ],
)
def test_errors_of_usage_leave_a_terminal_alone(args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2 and "\x1b[31m" not in result.output and r"\x1b" in result.output


def test_a_record_is_one_line_whatever_it_is_called(tmp_path):
    m = measurement(task="a\nb\x1b[31m", metric="perplexity", provenance={"made": {"label": "D1\r\nD2"}})
    name = Store(tmp_path / "x.jsonl").append(m)
    result = CliRunner().invoke(app, ["records", "--store", str(tmp_path / "x.jsonl")])
    heading, row = result.stdout.splitlines()
    assert result.exit_code == 0 and row.split()[0] == name
    assert r"a\nb\x1b[31m" in heading and heading.startswith(r"D1\r\nD2")


@pytest.mark.parametrize("value", [{}, [1], "9", True])
def test_a_tokenizer_whose_longest_text_is_no_number(tiny, tmp_path, value):
    folder = save_checkpoint(tiny(layers=1), tmp_path / "x")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": value}))
    with pytest.raises(BadInput, match="model_max_length|tokenizer of"):
        load_subject(folder)


@pytest.mark.parametrize("host", ["a\0b", "\ud800", "x" * 300, ""])
def test_a_host_that_is_no_name(host):
    with pytest.raises(BadInput, match="--host is"):
        Workers(host=host)


def test_a_worker_that_dies_at_the_start_is_started_again(monkeypatch, tmp_path):
    pytest.importorskip("distributed", reason="sweeps need Dask: the extra sweep")
    tries = []

    def cluster(**settings):
        tries.append(settings["n_workers"])
        if len(tries) < 3:
            raise RuntimeError("Nanny failed to start.")
        raise LookupError("it would be ready")

    monkeypatch.setattr("distributed.LocalCluster", cluster)
    one = Order("x", "x", {}, lambda: False, lambda answer: None)
    with pytest.raises(LookupError, match="it would be ready"):
        drive([one], Workers(2, retries=2), tmp_path)
    assert tries == [2, 2, 2]
    tries.clear()
    with pytest.raises(RuntimeError, match="Nanny"):
        drive([one], Workers(2, retries=1), tmp_path)
    assert tries == [2, 2]
