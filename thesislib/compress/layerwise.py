"""The error of each projection's output after compression, which GPTQ and EoRA minimise layer by layer."""

from collections.abc import Mapping

import torch

from thesislib.compress.calibration import ALL_AT_ONCE, Statistics, Visitor, stream
from thesislib.compress.selection import LinearKey
from thesislib.errors import BadInput
from thesislib.model.layers import Adapted, Projection
from thesislib.model.subject import Subject


def effective_weight(module: Projection) -> torch.Tensor:
    """The weight of a projection with its low-rank correction, if it has one: (outputs, inputs) float32."""
    weight = module.weight.detach().float()
    if not isinstance(module, Adapted):
        return weight
    return weight + module.lora_B.detach().float() @ module.lora_A.detach().float()


def relative_error(difference: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor) -> float:
    """``|difference X| / |weight X|`` in the Frobenius norm, by ``|A X|^2 = tr(A X X^T A^T)``.

    Args:
        difference: (outputs, inputs), of the compressed weight from the original.
        weight: (outputs, inputs), the original.
        moment: (inputs, inputs), X X^T of the inputs X.
    """
    error, total = (float(((a @ moment) * a).sum(dtype=torch.float64)) for a in (difference, weight))
    return (max(error, 0.0) / total) ** 0.5 if total > 0 else 0.0


def check_same_shapes(original: Subject, compressed: Subject) -> None:
    """Raises BadInput unless both subjects have as many blocks, with projections of the same shapes."""
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
) -> dict[str, dict[LinearKey, float]]:
    """The relative error of each projection's output in compressed subjects, on the inputs in the original.

    Args:
        original: the subject before compression.
        compressed: by any name, e.g. {"rounding": ..., "GPTQ": ..., "GPTQ+EoRA": ...}.
        windows: (N, T) tokens.
        weighting: of the tokens, see `thesislib.compress.calibration.token_weights`.

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
        self.errors: dict[str, dict[LinearKey, float]] = {name: {} for name in compressed}

    def change(self, block: int, linears: Mapping[str, Projection], statistics: Mapping[str, Statistics]) -> None:
        """See `Visitor`; it changes nothing."""
        for subject_name, subject in self.compressed.items():
            for name, module in subject.linears(block).items():
                weight = effective_weight(linears[name])
                error = relative_error(weight - effective_weight(module), weight, statistics[name].moment)
                self.errors[subject_name][block, name] = error
