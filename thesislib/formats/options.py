"""A subject's own dtype, and checks of the dtype and the device that a user names."""

from pathlib import Path

import torch

from thesislib.bounds import read_sizes
from thesislib.errors import BadInput, shown, unknown
from thesislib.files import expanded, read_json
from thesislib.formats.artifact_json import RECORD
from thesislib.formats.load import checkpoint_folder
from thesislib.model.subject import DTYPES

EMBEDDED = "bfloat16"  # as the study's tables say


def own_dtype(spec: str | Path) -> str:
    """The dtype of a subject if the user names none.

    - 'embedded': bfloat16.
    - An artifact: the dtype that it was saved in.
    - A checkpoint: the one in its config.json, else float32, as in transformers.
    - A .gguf: float32 if all its matrices are, else bfloat16.

    Raises:
        BadInput: no such subject, or a dtype other than those of `thesislib.model.subject.DTYPES`.
    """
    spec = str(spec)
    if spec == "embedded":
        return EMBEDDED
    if spec.endswith(".gguf") and not spec.startswith("hub:") and expanded(spec).is_file():
        return _dtype_of_gguf(expanded(spec))
    folder, _ = checkpoint_folder(spec)
    read_sizes(folder)  # raises for a configuration that cannot be read
    raw = read_json(folder / (RECORD if (folder / RECORD).is_file() else "config.json"))
    dtype = (raw.get("dtype") or raw.get("torch_dtype") or "float32") if isinstance(raw, dict) else raw
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadInput(
            f"{spec} is held in {shown(name)}, which is not supported: expected --dtype {' or '.join(DTYPES)}"
        )
    return name


def _dtype_of_gguf(file: Path) -> str:
    from gguf import GGUFReader

    try:
        types = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    except Exception as error:  # the reader maps the file and fails in many ways on a damaged one
        raise BadInput(f"{file} cannot be read as GGUF ({error}): truncated? fetch it again") from error
    return "float32" if types == {"F32"} else "bfloat16"


def check_dtype(name: str | None) -> None:
    """Raises BadInput for a dtype that no subject can have; None stands for the subject's own."""
    if name is not None and name not in DTYPES:
        raise unknown("dtype", name, DTYPES)


def check_device(name: str) -> None:
    """Raises BadInput for a device that torch cannot compute on here."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no numbers")
        cards = torch.cuda.device_count()
        # no tensor is made on a GPU: its context would take memory there
        if device.type == "cuda" and cards <= (device.index or 0):
            raise RuntimeError(f"there are {cards} cards here")
        if device.type not in ("cpu", "cuda"):
            torch.empty(1, device=device)
    except Exception as error:  # a backend that torch was built without raises its own class
        devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        why = " ".join(str(error).split())[:120]
        raise BadInput(f"device {shown(name)} cannot be used ({why}): expected one of {', '.join(devices)}") from error
