"""How far each projection's output is from what it was: the error that GPTQ and EoRA make small, layer by layer."""

from collections.abc import Mapping

import torch

from thesislib.compress.calibration import ALL_AT_ONCE, Statistics, Visitor, stream
from thesislib.errors import BadInput
from thesislib.model.layers import Adapted, Projection
from thesislib.model.subject import Subject

Place = tuple[int, str]  # block, projection


def effective_weight(module: Projection) -> torch.Tensor:
    """(outputs, inputs) float32: the weight of a projection, with its correction if it has one."""
    weight = module.weight.detach().float()
    return (
        weight + module.lora_B.detach().float() @ module.lora_A.detach().float()
        if isinstance(module, Adapted)
        else weight
    )


def relative_error(difference: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor) -> float:
    """``|difference X| / |weight X|`` in the Frobenius norm, out of X^T X (D, D) alone: ``|A X|^2 = tr(A X X^T
    A^T)``."""
    wrong, whole = (float(((a @ moment) * a).sum(dtype=torch.float64)) for a in (difference, weight))
    return (max(wrong, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def check_same_shapes(original: Subject, compressed: Subject) -> None:
    """Raises BadInput unless both subjects have the same blocks with projections of the same shapes."""
    if original.depth != compressed.depth:
        raise BadInput(
            f"the original has {original.depth} blocks and the compressed subject {compressed.depth}: compare "
            "what differs by weights only"
        )
    for i in range(original.depth):
        a, b = ({n: (m.out_features, m.in_features) for n, m in s.linears(i).items()} for s in (original, compressed))
        if a != b:
            raise BadInput(
                f"block {i} has projections {b} where the original has {a}: compare what differs by weights only"
            )


def layer_errors(
    original: Subject, compressed: Mapping[str, Subject], windows: torch.Tensor, *, weighting: str = "equal"
) -> dict[str, dict[Place, float]]:
    """For each compressed subject the relative error of each projection's output, all on the original's inputs.

    Args:
        original: before compression.
        compressed: by any name, e.g. {"rounding": ..., "GPTQ": ..., "GPTQ+EoRA": ...}.
        windows: (N, T) tokens.
        weighting: how they count.

    Returns:
        ``{name: {(block, projection): |(W - W') X| / |W X|}}``.

    Raises:
        BadInput: subjects of different shapes.
    """
    for subject in compressed.values():
        check_same_shapes(original, subject)
    visitor = _Compare(compressed)
    stream(original, windows, visitor, weighting=weighting, feed="original", title="layer errors")
    return visitor.errors


class _Compare(Visitor):
    groups = ALL_AT_ONCE
    moments = True

    def __init__(self, compressed: Mapping[str, Subject]):
        self.compressed = compressed
        self.errors: dict[str, dict[Place, float]] = {name: {} for name in compressed}

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`; it changes nothing."""
        for kind, subject in self.compressed.items():
            for name, module in subject.linears(block).items():
                weight = effective_weight(linears[name])
                self.errors[kind][block, name] = relative_error(
                    weight - effective_weight(module), weight, statistics[name].moment
                )
