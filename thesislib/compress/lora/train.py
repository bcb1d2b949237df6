"""Training low-rank adapters: PEFT's layers, whose factors are trained."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from thesislib.compress import training
from thesislib.compress.selection import LinearKey
from thesislib.compress.training import Trained
from thesislib.model.layers import Adapted, replace
from thesislib.model.subject import Subject

# A (rank, inputs) and B (outputs, rank); LoRA's scale is multiplied into B
Factors = Mapping[LinearKey, tuple[torch.Tensor, torch.Tensor]]
ADAPTER = "default"  # PEFT's name for the one adapter that a model has


class Settings(Protocol):
    """The settings that adapters need of their stage, see `thesislib.compress.lora.stage.Lora`."""

    rank: int
    alpha: float
    dropout: float
    init: str


class Training(training.Training):
    """A copy of a subject with adapters, an optimiser for them, and the state of their training.

    The adapters' initial values come from torch's default random generator.

    Args:
        config: see `thesislib.compress.lora.stage.Lora`.
        subject: is copied, not changed.
        shared: the (block, name) of each projection to adapt, with those that share its weights.
        autocast: see `thesislib.compress.training.Training`.
        initial: initial factors, by the first (block, name) of each projection.
    """

    def __init__(
        self,
        config: Trained,
        subject: Subject,
        shared: list[list[LinearKey]],
        autocast: bool,
        initial: Factors | None = None,
    ):
        subject = subject.copy()
        subject.model.float()
        self.layers = _inject(cast("Settings", config), subject, shared, initial or {})
        factors = {
            f"{b}.{name}.{ab}": m.weight for (b, name), layer in self.layers.items() for ab, m in _factors(layer)
        }
        super().__init__(config, subject, cast("dict[str, nn.Parameter]", factors), autocast)

    def factors(self, best: Mapping[str, torch.Tensor]) -> Factors:
        """What `run` gives as factors, with the scale in B, by the first (block, name) of each projection."""
        pairs = {key: [best[f"{key[0]}.{key[1]}.{factor}"] for factor in "AB"] for key in self.layers}
        return {key: (A, B * self.layers[key].scaling[ADAPTER]) for key, (A, B) in pairs.items()}


def _inject(
    config: Settings, subject: Subject, shared: list[list[LinearKey]], initial: Factors
) -> dict[LinearKey, LoraLayer]:
    """PEFT's layers, which replace the projections, by the first (block, name) of each."""
    model = subject.model
    names = {module: name for name, module in model.named_modules()}
    paths = {}  # of an adapted projection its base: the correction stays and is frozen
    for (block, name), *_ in shared:
        module = subject.linears(block)[name]
        paths[block, name] = names[module.base if isinstance(module, Adapted) else module]
    init: Any = config.init if config.init in ("gaussian", "orthogonal") else True
    alpha: Any = config.alpha  # PEFT annotates an int and takes any number
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        init_lora_weights=init,
        target_modules=list(paths.values()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls a function of transformers that is deprecated
        get_peft_model(model, lora)  # changes the model in place: the wrapper that it returns is not needed
    layers: dict[LinearKey, Any] = {key: model.get_submodule(path) for key, path in paths.items()}
    for first, *others in shared:
        for block, name in others:  # PEFT replaces a shared module in its first block only
            if not isinstance(subject.linears(block)[name], Adapted):
                replace(subject.blocks[block], name, layers[first])
    with torch.no_grad():
        for key, (A, B) in initial.items():
            layers[key].lora_A[ADAPTER].weight.copy_(A)
            layers[key].lora_B[ADAPTER].weight.copy_(B.float() / layers[key].scaling[ADAPTER])
    return layers


def _factors(layer: LoraLayer) -> Iterator[tuple[str, nn.Linear]]:
    """The factors of a layer of PEFT's by name."""
    yield "A", cast("nn.Linear", layer.lora_A[ADAPTER])
    yield "B", cast("nn.Linear", layer.lora_B[ADAPTER])
