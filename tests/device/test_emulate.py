"""Emulation: what is counted and compared, and, where it was asked for and the tools are there, the whole of it on a
tiny model."""

import json
import os
import subprocess
from dataclasses import astuple

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.device.emulate import (
    CLASSES,
    FLAGS,
    ROUNDED_TOLERANCE,
    SOURCE,
    TOLERANCE,
    TOOLS,
    Distance,
    Programs,
    build,
    counted,
    distance,
    emulate,
    missing_tools,
    multiplied,
)
from thesislib.errors import BadInput
from thesislib.files import ROOT, shipped
from thesislib.formats.gguf import export_gguf

cross = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(sorted(set(TOOLS.values())))}")
asked = pytest.mark.skipif(
    os.environ.get("THESISLIB_EMULATE") != "1",
    reason="THESISLIB_EMULATE=1 builds llama.cpp three times, about 10 minutes",
)
RECORD = ROOT / "data" / "results" / "07_emulated.json"


@pytest.fixture
def known_tokenizer(monkeypatch):
    """The tests' tokenizer cuts nothing, which llama.cpp has no name for, and merges nothing, which it does not
    load."""
    monkeypatch.setattr("thesislib.formats.gguf.pre_tokenizer", lambda raw: "gpt-2")
    write = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr("gguf.GGUFWriter.add_token_merges", lambda writer, merges: write(writer, merges or ["a b"]))


# ---------------------------------------------------------------- what was counted


def test_a_pass_stands_between_two_marks():
    said = "a warning\ncount 1 1 1 1 1 1 1 1\ncount 1 4 1 1 2 1 1 1\ncount 1 9 9 9 9 9 9 9\ncount 1 9 9 9 9 9 10 9\n"
    loading, passes = counted(said)
    assert loading == 7 and [sum(p.values()) for p in passes] == [4, 1]
    assert passes[0] == dict(zip(CLASSES, (3, 0, 0, 1, 0, 0, 0), strict=True)) and passes[1]["float"] == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("", "0 marks: expected two for every pass"),
        ("count 1 1 1 1 1 1 1 1\n" * 3, "3 marks"),
        ("count 1 2\ncount 1 3\n", "2 marks: .* newer than 8.2"),
        ("count 1 1 1 1 1 1 1 1\ncount 2 1 1 1 1 1 1 1\n", "on 2 threads: expected one"),
    ],
)
def test_counts_that_mean_nothing(said, message):
    with pytest.raises(BadInput, match=message):
        counted(said)


# what llama.cpp's kernels are made of, in both lengths; how often each class comes between the marks
PROGRAM = """
    .option norelax
    .globl _start
    .macro mark
    li a7, 57
    li a0, -1000
    ecall
    .endm
_start:
    lla s0, room
    li t0, 3
    mark
    .option norvc
1:  lbu a1, 0(s0)        # load 8
    lw a1, 0(s0)
    flw fa0, 0(s0)
    fld fa0, 0(s0)
    .option rvc
    c.lw a1, 0(s0)
    c.ld a1, 8(s0)
    c.fld fa0, 8(s0)
    c.ldsp a2, 0(sp)
    .option norvc
    sb a1, 0(s0)         # store 6
    sd a1, 0(s0)
    fsw fa0, 0(s0)
    .option rvc
    c.sw a1, 0(s0)
    c.sd a1, 0(s0)
    c.fsd fa0, 8(s0)
    .option norvc
    mul a1, a2, a2       # multiply 3
    divuw a1, a2, a2
    remu a1, a2, a2
    fmadd.s fa0, fa0, fa0, fa0  # float 5
    fnmsub.d fa0, fa0, fa0, fa0
    fadd.s fa0, fa0, fa0
    fcvt.w.d a1, fa0
    fmv.x.w a1, fa0
    add a1, a2, a2       # integer 12
    subw a1, a2, a2
    addi a1, a2, 1
    addiw a1, a2, 1
    lui a1, 1
    auipc a1, 0
    sraiw a1, a2, 3
    .option rvc
    c.mv a1, a2
    c.add a1, a2
    c.slli a1, 2
    c.and a1, a2
    c.addiw a1, 1
    .option norvc
    fence                # other 3
    csrr a1, fcsr
    amoadd.d a1, a2, (s0)
    jal a1, 2f           # jump 5, and the loop's own
2:  .option rvc
    c.j 3f
3:  c.beqz s0, 3b
    .option norvc
    bnez zero, 1b
    lla a1, 4f
    .option rvc
    c.jr a1
4:  .option norvc
    addi t0, t0, -1
    bgtz t0, 1b
    mark
    li a7, 93
    li a0, 0
    ecall
    .bss
    .balign 16
room: .space 64
"""


@cross
def test_every_instruction_is_in_its_class(tmp_path):
    (tmp_path / "program.S").write_text(PROGRAM)
    subprocess.run(
        ["riscv64-linux-gnu-gcc", "-nostdlib", "-static", "program.S", "-o", "program"], cwd=tmp_path, check=True
    )
    subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", shipped("hw/emulate/count.c"), "-o", "count.so"],
        cwd=tmp_path,
        check=True,
    )
    done = subprocess.run(
        ["qemu-riscv64", "-plugin", "./count.so", "./program"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    _, (found,) = counted(done.stderr)
    # three rounds; besides, in each: lla (two integers), what counts down and the loop's branch; then the second mark's
    # li, li and call
    wanted = {"load": 8, "store": 6, "jump": 6, "integer": 15, "multiply": 3, "float": 5, "other": 3}
    assert found == {name: 3 * n + {"integer": 2, "other": 1}.get(name, 0) for name, n in wanted.items()}


# ---------------------------------------------------------------- what was compared


def test_logits_are_compared_as_long_as_both_read_the_same():
    ours = np.array([[0, 2], [2, 0], [0, 2], [0, 2]], np.float32)
    theirs = ours + np.array([[0.5], [0], [-1], [100]], np.float32)
    assert astuple(distance([1, 0, 1, 1], ours, [1, 0, 0, 1], theirs)) == pytest.approx(
        (1.0, np.sqrt(2 * 1.25 / 6), 1.0)
    )
    assert distance([1, 0, 1, 1], ours, [1, 0, 1, 1], theirs).largest == 100
    assert Distance(1.0, 0.5, 2.0).share == 0.25


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_a_token_multiplies_by(tiny, tmp_path, tied):
    subject = tiny(layers=2, tie_word_embeddings=tied)
    linears = sum(linear.weight.numel() for b in range(2) for linear in subject.linears(b).values())
    assert (
        multiplied(export_gguf(subject, tmp_path / "m.gguf"))
        == linears + subject.model.get_output_embeddings().weight.numel()
    )


# ---------------------------------------------------------------- what cannot work


def test_missing_tools_are_named_with_their_packages(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: None if "g++" in tool or "qemu" in tool else tool)
    assert missing_tools() == {
        "g++": "g++",
        "riscv64-linux-gnu-g++": "g++-riscv64-linux-gnu",
        "qemu-riscv64": "qemu-user",
    }
    with pytest.raises(
        BadInput,
        match="riscv64-linux-gnu-g.., qemu-riscv64, not found here: .* apt-get install g.. g..-riscv64-linux-gnu "
        "qemu-user",
    ):
        build()


def test_an_installation_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    for place in ("PACKAGE", "ROOT"):
        monkeypatch.setattr(f"thesislib.files.{place}", tmp_path)
    with pytest.raises(BadInput, match="no 'hw/emulate' in this installation of thesislib"):
        build()


def test_an_archive_that_is_another(monkeypatch, tmp_path):
    def pip(command, **_):
        assert "--no-binary=llama-cpp-python" in command
        (type(tmp_path)(command[command.index("--dest") + 1]) / f"{SOURCE}.tar.gz").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("thesislib.sources.wheels.subprocess.run", pip)
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match="has sha256 [0-9a-f]{64}, expected 832db069.*check your package index"):
        build()
    assert [file.name for file in (tmp_path / "emulate").iterdir() if file.suffix != ".lock"] == []


def test_what_cannot_be_emulated(tmp_path):
    with pytest.raises(BadInput, match="no.gguf is no file: expected a GGUF file"):
        emulate(tmp_path / "no.gguf", [1])
    (tmp_path / "m.gguf").touch()
    for ids, tokens in (([], 8), ([1], 1)):
        with pytest.raises(
            BadInput, match=f"a prompt of {len(ids)} tokens and {tokens} new ones: expected at least one and two"
        ):
            emulate(tmp_path / "m.gguf", ids, tokens)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo count 1 2 >&2; echo because >&2; exit 3", r"running .*m.gguf failed \(exit code 3\): because"),
        ("exec sleep 5", "running .*m.gguf took longer than 0 s"),
    ],
)
def test_a_program_that_fails_says_why(tmp_path, script, message):
    (tmp_path / "m.gguf").touch()
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(BadInput, match=message):
        emulate(tmp_path / "m.gguf", [1], programs=Programs(program, program, program, program), timeout=0.3)


def test_the_command_says_what_was_counted(monkeypatch):
    plain = json.loads(RECORD.read_text())
    asked = []
    monkeypatch.setattr("thesislib.formats.load.load_subject", lambda *given: given)
    monkeypatch.setattr("thesislib.device.emulate.record", lambda *given: (asked.append(given), plain)[1])
    told = CliRunner().invoke(app, ["emulate", "somewhere", "--type", "F16", "--type", "Q4_1", "--tokens", "3"])
    assert told.exit_code == 0 and asked == [(("somewhere", "float32"), [("F16", None), ("Q4_1", None)], 8, 3, 1)]
    assert "F16, 30 blocks: 1,913.0 M a decoded token, 14.23 a weight; by class, in M: load 542" in told.output
    (parted,) = [row["margin where they part"] for row in plain["rows"] if row["margin where they part"] is not None]
    assert (
        f"2 of 8 tokens are the host's, where they part the host's lead is {parted:.3g}" in told.output
        and "no time is taken" in told.output
    )
    assert json.loads(CliRunner().invoke(app, ["emulate", "somewhere", "--json"]).output) == plain
    wrong = CliRunner().invoke(app, ["emulate", "somewhere", "--type", "Q4_K"])
    assert wrong.exit_code != 0 and "did you mean 'Q4_" in wrong.output


# ---------------------------------------------------------------- the whole


@cross
@asked
@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_tiny_model(tiny, tmp_path, kind):
    programs = build()
    whole, half = (
        emulate(export_gguf(tiny(layers=n), tmp_path / f"{n}.gguf", kind), [5, 6, 7, 8], 4, programs) for n in (8, 4)
    )
    for found in (whole, half):
        assert found.within and found.control.share <= found.tolerance, found
        assert len(found.host) == len(found.emulated) == 4 and len(found.later) == 3
        assert found.agreement.margin is None or found.agreement.margin <= 2 * found.distance.largest
        kinds = ("load", "integer", "float") if kind == "F16" else ("load", "integer", "multiply")
        assert all(found.per_token[name] > found.weights / 64 for name in kinds)
        assert sum(found.prompt.values()) > 2 * sum(found.per_token.values())  # four tokens, but one head
    # the same blocks twice as often: what they cost doubles, the head and the rest do not
    assert 1.3 < sum(whole.per_token.values()) / sum(half.per_token.values()) < 2
    again = emulate(tmp_path / "4.gguf", [5, 6, 7, 8], 4, programs)
    assert again.emulated == half.emulated and again.distance == half.distance
    assert sum(again.per_token.values()) == pytest.approx(sum(half.per_token.values()), rel=1e-3)


@cross
@asked
def test_what_llama_cpp_does_not_load(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"no model")
    with pytest.raises(BadInput, match="m.gguf failed .*the file cannot be loaded"):
        emulate(tmp_path / "m.gguf", [1])


# ---------------------------------------------------------------- the record


def test_the_record_was_made_by_this():
    record = json.loads(RECORD.read_text())
    assert [(row["type"], row["blocks"]) for row in record["rows"]] == [
        ("F16", 30),
        ("Q8_0", 30),
        ("Q4_0", 30),
        ("Q4_1", 30),
        ("Q4_0", 10),
    ]
    for row in record["rows"]:
        logits, instructions = row["logits"], row["instructions"]
        assert logits["within"] and logits["share"] <= logits["tolerance"] == TOLERANCE.get(
            row["type"], ROUNDED_TOLERANCE
        )
        assert set(instructions["per token"]) == set(CLASSES)
        assert instructions["per token, all"] == pytest.approx(np.mean(instructions["each token"]), abs=4)
        assert instructions["per weight"] == pytest.approx(instructions["per token, all"] / row["weights"], abs=1e-3)
        parted = row["margin where they part"]
        assert (parted is None) == (row["tokens"]["host"] == row["tokens"]["emulated"]) and (parted or 0) <= 2 * logits[
            "largest difference"
        ]
    text = RECORD.read_text()
    assert "seconds" not in text.replace("seconds are not", "") and str(ROOT) not in text
    assert record["provenance"]["flags"] == {
        target: [f.removeprefix("-D") for f in flags] for target, flags in FLAGS.items()
    }
