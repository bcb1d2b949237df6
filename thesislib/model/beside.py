"""A linear path of low rank beside a whole MLP: y = mlp(x) + (x Aᵀ) Bᵀ (CALR's corrective module)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from thesislib.errors import BadInput
from thesislib.model.blocks import Without, apply_plan
from thesislib.model.subject import Subject

FACTORS = ("beside_A", "beside_B")  # their names in the state dict, after the MLP's
Path = tuple[torch.Tensor, torch.Tensor]  # A (rank, D) and B (D, rank)


class CorrectedMLP(nn.Module):
    """A gated MLP with a linear path beside it, from its input to its output.

    Its projections and its activation are children under their usual names.

    Args:
        mlp: with gate_proj, up_proj, down_proj and act_fn; of one with a path the path is replaced.
        A: (rank, D).
        B: (D, rank).

    Raises:
        BadInput: an MLP of another kind, or factors that do not fit it.
    """

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def __init__(self, mlp: nn.Module, A: torch.Tensor, B: torch.Tensor):
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            if not hasattr(mlp, name):
                raise BadInput(f"an MLP of class {type(mlp).__name__} has no {name}: expected a gated one")
            setattr(self, name, getattr(mlp, name))
        width = self.gate_proj.in_features
        if A.shape != (len(A), width) or B.shape != (width, len(A)) or not len(A):
            raise BadInput(
                f"factors A {tuple(A.shape)} and B {tuple(B.shape)} do not fit an MLP of {width} inputs: expected "
                f"(r, {width}) and ({width}, r)"
            )
        for name, tensor in zip(FACTORS, (A, B), strict=True):
            own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, own)

    @property
    def rank(self) -> int:
        """Of the path."""
        return len(self.get_parameter(FACTORS[0]))

    @property
    def path(self) -> Path:
        """A and B."""
        return self.get_parameter(FACTORS[0]), self.get_parameter(FACTORS[1])

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP without its path."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        A, B = self.path
        return self.gated(x) + F.linear(F.linear(x.to(A.dtype), A), B).to(x.dtype)


def with_paths(subject: Subject, paths: Mapping[int, Path]) -> Subject:
    """The subject with a path beside the MLP of some blocks; it shares all other weights.

    Raises:
        BadInput: a block out of range, or one whose MLP was removed.
    """
    out = apply_plan(subject, range(subject.depth))
    for b, (A, B) in paths.items():
        if not 0 <= b < subject.depth:
            raise BadInput(f"block {b} is out of range: the model has blocks 0 to {subject.depth - 1}")
        block: Any = out.blocks[b]
        if isinstance(block.mlp, Without):
            raise BadInput(f"block {b} lost its MLP: there is nothing to correct")
        block.mlp = CorrectedMLP(block.mlp, A, B)
    return Subject(out.model, out.tokenizer, out.name, subject.plan)


def ranks_beside(subject: Subject) -> dict[int, int]:
    """The rank of the path beside each block's MLP that has one."""
    mlps = ((b, getattr(block, "mlp", None)) for b, block in enumerate(subject.blocks))
    return {b: mlp.rank for b, mlp in mlps if isinstance(mlp, CorrectedMLP)}


def check_no_path(subject: Subject, what: str) -> None:
    """Raises BadInput if an MLP has a path, which `what` has no place for."""
    if ranks := ranks_beside(subject):
        b = min(ranks)
        raise BadInput(
            f"block {b} has a linear path of rank {ranks[b]} beside its MLP, which {what} cannot hold: expected a "
            "packed artifact"
        )
