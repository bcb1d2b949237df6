"""Timings of this machine: what they make of samples, whom they believe, and llama.cpp itself where it is installed."""

import json
import sys
from importlib.util import find_spec

import gguf
import pytest
import torch
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.device import engine, measure
from thesislib.device.cost import distinct_bytes, stored
from thesislib.device.engine import Request, run_engine
from thesislib.device.measure import (
    NOISY_HOST,
    QUIET,
    Timing,
    agreed,
    agreement,
    as_measurement,
    bytes_per_token,
    file_type,
    greedy_steps,
    time_transformers,
)
from thesislib.device.measured import readable
from thesislib.errors import BadInput
from thesislib.formats.gguf import export_gguf
from thesislib.formats.load import save_checkpoint
from thesislib.model.blocks import apply_plan

has_engine = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama.cpp is not installed: pip install -e '.[engine]'"
)


@pytest.fixture(autouse=True)
def known_tokenizer(monkeypatch):
    """The tests' tokenizer cuts nothing, which llama.cpp has no name for, and merges nothing, which it does not
    load."""
    monkeypatch.setattr("thesislib.formats.gguf.pre_tokenizer", lambda raw: "gpt-2")
    write = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr("gguf.GGUFWriter.add_token_merges", lambda writer, merges: write(writer, merges or ["a b"]))


def timing(*later, others=(0.0,)):
    return Timing(
        "llama.cpp Q8_0", 128, tuple(0.5 for _ in later), later, others * len(later), {"weights": 100}, {"engine": "1"}
    )


# ---------------------------------------------------------------- samples


def test_the_first_token_is_not_among_the_others():
    t = timing((0.1, 0.2, 0.3), (0.2, 0.2, 0.9))
    assert t.seconds_per_token == 0.2 and t.seconds_to_first_token == 0.5 and len(t.seconds) == 6


def test_a_machine_that_is_not_quiet_is_told():
    assert timing((0.1,), (0.101,)).verdict == QUIET
    assert timing((0.1,), (0.12,)).verdict == NOISY_HOST  # repetitions 18 % apart
    assert timing((0.1,), (0.101,), others=(1.02,)).verdict == "loaded: others kept 1.0 cores busy"
    assert timing((0.1,), (0.101,), others=(None,)).verdict == QUIET  # where nothing is known, repetitions decide


def test_a_record_has_every_sample_and_what_it_was_made_with(tiny):
    subject = tiny()
    m = as_measurement(subject, timing((0.1, 0.2), (0.3, 0.4)), 0.0)
    assert (
        m.value == pytest.approx(0.25) and m.low == pytest.approx(0.125) and m.high == pytest.approx(0.375) and m.n == 4
    )
    assert m.column("seconds") == [0.1, 0.2, 0.3, 0.4] and m.column("id") == ["0.0", "0.1", "1.0", "1.1"]
    assert m.extra["prompt tokens per second"] == 256 and m.extra["verdict"] == NOISY_HOST
    made = m.provenance
    assert (
        made["fingerprint"] == subject.fingerprint
        and made["settings"]["threads"] == 1
        and made["versions"]["engine"] == "1"
    )
    assert json.loads(m.to_json())["value"] == m.value


def test_weights_are_counted_as_they_are_held(tiny):
    quantised, _ = Rtn(group=32).apply(tiny(hidden_size=64, head_dim=16))
    held = time_transformers(quantised, [1], tokens=1, repeats=1).bytes["weights"]
    assert (
        held
        == distinct_bytes(stored(quantised))
        < time_transformers(tiny(hidden_size=64, head_dim=16), [1], tokens=1, repeats=1).bytes["weights"] / 2
    )


def test_transformers_is_timed_on_one_thread_of_its_own_choice(tiny):
    before = torch.get_num_threads()
    t = time_transformers(tiny(), [1, 2, 3], tokens=4, repeats=3)
    assert (
        len(t.later) == 3
        and all(len(r) == 4 for r in t.later)
        and all(s > 0 for s in t.seconds)
        and torch.get_num_threads() == before
    )
    assert t.bytes["weights"] == sum({p.data_ptr(): p.nbytes for p in tiny().model.parameters()}.values())  # tied once


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_steps_are_those_of_whole_passes(tiny, kind):
    subject, ids = tiny(kind), [5, 6, 7]
    chosen, logits, seconds = greedy_steps(subject, ids, 5)
    for i, (token, step) in enumerate(zip(chosen, logits, strict=True)):
        with torch.no_grad():
            whole = subject.model(torch.tensor([ids + chosen[:i]])).logits[0, -1]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
        assert token == int(step.argmax())
    assert len(seconds) == 5


def test_where_two_texts_part_and_by_how_little():
    logits = [torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 1.9]), torch.tensor([5.0, 0.0, 0.0])]
    found = agreed([0, 1, 0], [0, 2, 0], logits)
    assert (found.same, found.of) == (1, 3) and found.margin == pytest.approx(0.1) and found.gap == pytest.approx(0.1)
    whole = agreed([0, 1, 0], [0, 1, 0], logits)
    assert whole.same == 3 and whole.margin is None and whole.gap == pytest.approx(0.1)


# ---------------------------------------------------------------- files


def test_bytes_of_a_token_are_counted_by_hand(tiny, tmp_path):
    tied, apart = tiny(layers=2), tiny(layers=2, tie_word_embeddings=False)
    linears = (
        2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 16 * 32) * 34 // 32
    )  # Q8_0: 32 bytes and a float16 scale for 32 weights
    rows = tied.model.config.vocab_size
    head, norms = rows * 32 * 34 // 32, 5 * 32 * 4
    assert bytes_per_token(export_gguf(tied, tmp_path / "tied.gguf", "Q8_0")) == linears + head + norms
    assert (
        bytes_per_token(export_gguf(apart, tmp_path / "apart.gguf", "Q8_0")) == linears + head + norms + 34
    )  # and a row of the embedding


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_the_type_of_a_file_is_that_of_its_matrices(tiny, tmp_path, kind):
    assert file_type(export_gguf(tiny(), tmp_path / "m.gguf", kind)) == kind


# ---------------------------------------------------------------- the engine


def test_how_to_get_the_engine_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install -e '\.\[engine\]'"):
        run_engine(Request(str(tmp_path / "m.gguf"), [[1]]))


@has_engine
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": [[1]], "file": "nowhere.gguf"}, "is no file: expected a GGUF file"),
        ({"prompts": []}, "at least one each, and no empty prompt"),
        ({"prompts": [[1], []]}, "no empty prompt"),
        ({"prompts": [[1]], "tokens": 0}, "0 tokens"),
        ({"prompts": [[100_000]]}, "token 100000 is beyond the file's"),
        ({"prompts": [[-1]]}, "cannot run"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(tiny, tmp_path, request_, message):
    file = export_gguf(tiny(), tmp_path / "m.gguf")
    with pytest.raises(BadInput, match=message):
        run_engine(Request(**{"file": str(file), **request_}))


@has_engine
def test_a_file_that_is_damaged_is_refused_with_the_engines_words(tiny, tmp_path):
    file = export_gguf(tiny(), tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(BadInput, match="cannot run .*m.gguf"):
        run_engine(Request(str(file), [[1]]))


@has_engine
def test_an_engine_that_takes_too_long_is_given_up(tiny, tmp_path):
    with pytest.raises(BadInput, match="longer than 0 s"):
        run_engine(Request(str(export_gguf(tiny(), tmp_path / "m.gguf")), [[1]]), timeout=0.01)


@has_engine
@pytest.mark.parametrize(
    "make",
    [
        lambda s: s,
        lambda s: apply_plan(s, [0, 2, 2, 5]),
        lambda s: Width(2, 4, metric="magnitude").apply(s)[0],
        lambda s: Rtn(group=32).apply(s)[0],
    ],
)
def test_the_engine_writes_what_transformers_writes(tiny, tmp_path, make):
    """Weights are rounded to float16 first, so that both have the same."""
    subject = tiny().copy()
    for p in subject.model.parameters():
        p.data = p.data.half().float()
    subject = make(subject)
    found = agreement(subject, export_gguf(subject, tmp_path / "m.gguf"), [[1, 2, 3], [9, 8, 7, 6]], tokens=12)
    assert all(a.same == a.of or a.margin < 0.02 for a in found), found


@has_engine
def test_the_engines_numbers_are_of_this_file(tiny, tmp_path):
    subject = tiny()
    file = export_gguf(subject, tmp_path / "m.gguf")
    answer = run_engine(Request(str(file), [[1, 2, 3], [4]], tokens=5, repeats=2, warm_up=1))
    assert [s["prompt"] for s in answer["samples"]] == [0, 1, 0, 1]
    assert all(
        len(s["ids"]) == len(s["seconds"]) == len(s["cpu"]) == 5 and min(s["seconds"]) > 0 for s in answer["samples"]
    )
    assert answer["samples"][0]["ids"] == answer["samples"][2]["ids"]  # the cache is emptied in between
    size = answer["bytes"]
    assert size["weights"] == bytes_per_token(file)  # tied: every byte is read at every token
    assert (
        size["resident before"] < size["resident"] < 500e6
    )  # and not the peak of this test's process, which holds torch


# ---------------------------------------------------------------- the command


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return str(save_checkpoint(tiny(), tmp_path / "tiny"))


def measured(*words):
    return CliRunner().invoke(app, ["measure", *words])


@has_engine
def test_measure_says_times_bytes_and_shares(checkpoint, monkeypatch):
    monkeypatch.setattr("thesislib.device.host.READ", 2**20)
    done = measured(checkpoint, "--prompt", "9", "--tokens", "3", "--repeats", "2", "--json")
    assert done.exit_code == 0, done.output
    plain = json.loads(done.stdout)
    assert (
        plain["kind"] == "measurement"
        and len(plain["llama.cpp"]["items"]) == 6
        and plain["transformers"]["provenance"]["dtype"] == "bfloat16"
    )
    shares = plain["utilisation"]
    m = plain["llama.cpp"]
    assert shares["MBU"]["value"] == pytest.approx(
        shares["MBU"]["bytes per token"] / m["value"] / shares["MBU"]["bytes per second"]
    )
    assert shares["MFU"]["value"] == pytest.approx(
        shares["MFU"]["MACs of the prompt"] / m["extra"]["seconds to first token"] / shares["MFU"]["MACs per second"]
    )
    assert all("measured just before" in s["denominator"] for s in shares.values())
    text = readable(plain)
    assert "MBU" in text and "process" in text and "transformers bfloat16" in text


@has_engine
def test_a_gguf_file_is_measured_as_it_is(tiny, tmp_path, monkeypatch):
    file = export_gguf(tiny(), tmp_path / "own.gguf", "Q4_0")
    seen = []
    monkeypatch.setattr(
        "thesislib.device.measured.time_llama_cpp", lambda f, *a: seen.append(f) or measure.time_llama_cpp(f, *a)
    )
    monkeypatch.setattr("thesislib.device.measured.gguf_file", None)  # not called
    # transformers reads no GGUF of this tokenizer
    monkeypatch.setattr("thesislib.formats.load.load_subject", lambda *_: tiny())
    done = measured(str(file), "--prompt", "4", "--tokens", "2", "--repeats", "1", "--alone")
    assert (
        done.exit_code == 0 and seen == [file] and "llama.cpp Q4_0" in done.stdout and "transformers" not in done.stdout
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "'tokens' is 0"),
        (["--prompt", "5000"], "context of 2048"),
        (["--core", "4096"], "core 4096 is not ours"),
        (["--type", "Q4_K"], "unknown type 'Q4_K': did you mean 'Q4_1'?"),
    ],
)
def test_what_cannot_be_measured_is_refused(checkpoint, words, message):
    done = measured(checkpoint, *words)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.stderr


def test_the_engines_process_imports_no_torch():
    code = "import sys, thesislib.device.engine; print('torch' in sys.modules)"
    import subprocess

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
