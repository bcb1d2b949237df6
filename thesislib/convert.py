"""A GGUF file turned, once, into the safetensors folder that everything else loads."""

import json
import shutil
import sys
from pathlib import Path

from thesislib.errors import BadInput
from thesislib.files import cache_dir, damaged, lock, plain_errors, read_json, sha256_of, whole_folder

SUMS = "sha256.json"  # beside the converted files: of each one


def safetensors_folder(gguf: Path, sha256: str | None = None) -> Path:
    """The Hugging Face folder (float32 safetensors, tokenizer, chat template) made from `gguf`, converted if need be.

    transformers dequantises; every weight is exact, since a Q4_1 or Q8_0 value (an fp16 scale times a small integer,
    plus an fp16 minimum) fits float32. Takes about 20 s, once; loading the result takes under a second.

    Raises:
        BadInput: not a GGUF file, truncated, of another sha256 than given, or of an architecture transformers
            cannot read from GGUF.
    """
    with plain_errors(gguf), gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput(f"{gguf} is not a GGUF file (it does not start with 'GGUF')")
    digest = sha256_of(gguf)
    if sha256 and digest != sha256:
        raise BadInput(f"{gguf.name} has sha256 {digest}, expected {sha256}: truncated or altered; delete it and fetch it again")
    folder = cache_dir() / "subjects" / f"{gguf.stem}-{digest[:12]}"
    if _wrong(folder):
        with lock(folder):
            if why := _wrong(folder):
                _check_complete(gguf)
                again = f": what the cache holds of it {why}" if folder.exists() else " (once, about 20 s)"
                print(f"converting {gguf.name} to safetensors{again}", file=sys.stderr)
                with whole_folder(folder, alone=True) as temporary:
                    _convert(gguf, temporary)
                    sums = {file.relative_to(temporary).as_posix(): sha256_of(file) for file in temporary.rglob("*") if file.is_file()}
                    (temporary / SUMS).write_text(json.dumps(sums), "utf8")
    return folder


def _wrong(folder: Path) -> str | None:
    """What is wrong with a conversion, if not every file is there as it was written and no other."""
    try:
        sums = read_json(folder / SUMS)
        if not isinstance(sums, dict) or not sums:
            return f"has a damaged {SUMS}"
    except BadInput:
        return "has no checksums that can be read"
    if found := damaged(folder, sums):
        return f"is damaged, or lacks a file: {found}"
    others = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()} - {SUMS, *sums}
    return f"has a file that is not its own: {min(others)}" if others else None


def _check_complete(gguf: Path) -> None:
    """A truncated file has tensors that end behind its last byte."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    except Exception as error:  # the reader maps the file and fails in many ways on a short one
        raise BadInput(f"{gguf} cannot be read as GGUF ({error}): truncated? fetch it again") from error
    if end > gguf.stat().st_size:
        raise BadInput(f"{gguf} is truncated: its tensors end at byte {end}, the file at {gguf.stat().st_size}")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from thesislib.subject import quiet_transformers

    with quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (ValueError, KeyError, OSError) as error:
            raise BadInput(f"transformers cannot read {gguf.name} ({str(error).splitlines()[0]})") from error
        # transformers refuses to save what it calls a quantised model; dequantised, it is an ordinary one
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "rms_norm_eps"):  # GGUF stores it in float32: 9.999999747e-06
            model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes it private
