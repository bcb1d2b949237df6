"""A GGUF file converted, once, into a safetensors folder in the cache, which everything else loads."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import cast

import torch

from thesislib.errors import BadInput, first_line
from thesislib.files import cache_dir, damaged, explain_errors, lock, read_json, sha256_of, whole_folder
from thesislib.formats.checkpoint import empty_model
from thesislib.formats.gguf_header import check_header
from thesislib.formats.gguf_reader import PART, GgufModel, parts

READER = 2  # version of the conversion: raise it when the same file gives another result
LARGE = 1 << 32  # bytes of a file from which its header is checked before all of it is read for its checksum
SUMS = "sha256.json"  # the sha256 of each converted file


def safetensors_folder(gguf: Path, sha256: str | None = None, cut: str | None = None) -> Path:
    """The Hugging Face folder of a GGUF file: float32 safetensors, tokenizer and chat template.

    It is converted if the cache does not have it, which takes seconds. Every weight is exact: a Q4_1 or Q8_0 value (a
    float16 scale times a small integer, plus a float16 minimum) fits float32.

    Args:
        gguf: the file, or one of the parts that llama.cpp's gguf-split made.
        sha256: the file's expected sha256.
        cut: the pre-tokenizer, instead of the one that the file names.

    Raises:
        BadInput: another sha256 than given; see `thesislib.formats.gguf_reader.GgufModel`.
    """
    with explain_errors(gguf), gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput(f"{gguf} is not a GGUF file (it does not start with 'GGUF')")
    if gguf.stat().st_size > LARGE:
        check_header(gguf)
    digest = sha256_of(gguf)
    if sha256 and digest != sha256:
        raise BadInput(
            f"{gguf.name} has sha256 {digest}, expected {sha256}: truncated or altered; delete it and fetch it again"
        )
    if PART.search(gguf.stem):
        digest = hashlib.sha256("".join(map(sha256_of, parts(gguf))).encode()).hexdigest()
    folder = cache_dir() / "subjects" / f"{gguf.stem[:80]}-{digest[:12]}-{READER}{f'-{cut}' if cut else ''}"
    if _wrong(folder):
        with lock(folder):
            if why := _wrong(folder):
                again = f": what the cache holds of it {why}" if folder.exists() else " (once, some seconds)"
                print(f"converting {gguf.name} to safetensors{again}", file=sys.stderr)
                with whole_folder(folder, alone=True) as temporary:
                    convert_gguf(gguf, temporary, cut)
                    files = [file for file in temporary.rglob("*") if file.is_file()]
                    sums = {file.relative_to(temporary).as_posix(): sha256_of(file) for file in files}
                    (temporary / SUMS).write_text(json.dumps(sums), "utf8")
    return folder


def _wrong(folder: Path) -> str | None:
    """The reason, in words, why a converted folder cannot be used; None if it has just the files that were written."""
    try:
        sums = read_json(folder / SUMS)
        if not isinstance(sums, dict) or not sums:
            return f"has a damaged {SUMS}"
    except BadInput:
        return "has no checksums that can be read"
    if name := damaged(folder, sums):
        return f"is damaged, or lacks a file: {name}"
    others = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()} - {SUMS, *sums}
    return f"has a file that is not its own: {min(others)}" if others else None


def convert_gguf(gguf: Path, folder: Path, cut: str | None) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder, without looking at the cache.

    Raises:
        BadInput: a file that is damaged, or that this package does not read.
    """
    from safetensors.torch import save_file

    try:
        model = GgufModel(gguf)
        tokenizer = model.tokenizer(cut)  # first, so that an unknown one is refused before weights are decoded
        empty = empty_model(model.config, cast(torch.dtype, model.config.dtype))
    except BadInput:
        raise
    except Exception as error:  # a text instead of a number, a missing token: each library raises its own class
        raise BadInput(
            f"{gguf.name} has a setting or a tokenizer that is none ({first_line(error)}): the file is damaged"
        ) from error
    model.config.architectures = [type(empty).__name__]
    shapes = {name: t.shape for name, t in empty.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    save_file(dict(model.tensors(shapes)), folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes it private
