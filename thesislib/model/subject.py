"""The model under study with its tokenizer, identified by a fingerprint."""

import copy
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thesislib.model.layers import ComputedLinear, Projection, projections, unpack_all
from thesislib.model.tokenizers import pad_token, rows_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A causal language model and its tokenizer. Compression stages take a subject and return one.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        name: its name in tables, e.g. "SmolLM2-135M-Instruct".
        plan: the blocks that it runs, as indices of the loaded model's blocks; None for all of them in order.
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
        """The dtype of the activations, which is the final norm's.

        transformers' `model.dtype` is that of the first parameter, which may be an adapter's.
        """
        return self.model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that the weights are on."""
        return self.model.device

    @property
    def pad_id(self) -> int:
        """The padding token, see `thesislib.model.tokenizers.pad_token`."""
        return pad_token(self.tokenizer, rows_of(self.model))

    def linears(self, block: int) -> dict[str, Projection]:
        """The projections of a block by name; weights have shape (outputs, inputs)."""
        return projections(self.blocks[block])

    @property
    def parameters(self) -> int:
        """The number of parameters, zeros and packed ones too; tied and shared weights count once."""
        stored = {p.data_ptr(): p.numel() for p in self.model.parameters()}
        return sum(stored.values()) + sum(m.numel for m in self.model.modules() if isinstance(m, ComputedLinear))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names, dtypes, shapes and bytes of the state dict's tensors."""
        return fingerprint(sorted(self.model.state_dict().items()))

    def copy(self, unpack: bool = True) -> "Subject":
        """An independent subject with the same weights, for a stage to change.

        Blocks that a plan repeats still share their weights.

        Args:
            unpack: whether packed and quantised linears become dense ones.
        """
        model = copy.deepcopy(self.model)
        return replace(self, model=unpack_all(model) if unpack else model)


def causal(model: PreTrainedModel) -> PreTrainedModel:
    """Switch a model to torch's scaled dot product attention, the one that is causal in a block without a mask."""
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")
    return model


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, in the given order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
