"""How a model is held where nothing else is asked for: in which type, and on which devices at all."""

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
    """The type in which a subject is held where none is asked for: its own.

    That is bfloat16 for 'embedded', an artifact's own, what a checkpoint's config.json says (float32 where it says
    nothing, as in transformers), and of a .gguf float32 if every matrix of it is, else bfloat16.

    Raises:
        BadInput: no such subject, or one of another type than `thesislib.model.subject.DTYPES`.
    """
    spec = str(spec)
    if spec == "embedded":
        return EMBEDDED
    if spec.endswith(".gguf") and not spec.startswith("hub:") and expanded(spec).is_file():
        return _dtype_of_gguf(expanded(spec))
    folder, _ = checkpoint_folder(spec)
    read_sizes(folder)  # also refuses what cannot be read
    plain = read_json(folder / (RECORD if (folder / RECORD).is_file() else "config.json"))
    said = (plain.get("dtype") or plain.get("torch_dtype") or "float32") if isinstance(plain, dict) else plain
    name = str(said).removeprefix("torch.")
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
    """Raises BadInput for a type in which no model is held; None is the subject's own."""
    if name is not None and name not in DTYPES:
        raise unknown("dtype", name, DTYPES)


def check_device(name: str) -> None:
    """Raises BadInput for a device that this machine's torch cannot compute on."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no numbers")
        cards = torch.cuda.device_count()
        if device.type == "cuda" and cards <= (
            device.index or 0
        ):  # asked like this, for a context takes the card's memory
            raise RuntimeError(f"there are {cards} cards here")
        if device.type not in ("cpu", "cuda"):
            torch.empty(1, device=device)
    except Exception as error:  # each backend that was not built in has its own class
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        why = " ".join(str(error).split())[:120]
        raise BadInput(f"device {shown(name)} cannot be used ({why}): expected one of {', '.join(there)}") from error
