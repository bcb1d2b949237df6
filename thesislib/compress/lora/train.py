"""Training low-rank adapters: gradient steps on packed sequences, validation, and checkpoints that survive a kill."""

import hashlib
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from thesislib.compress.lora.sequences import NOTHING, Sequences, Split
from thesislib.compress.selection import LinearKey
from thesislib.errors import BadInput
from thesislib.files import clear_leftovers, write_whole
from thesislib.model.forward import final_states
from thesislib.model.layers import Adapted, replace
from thesislib.model.subject import Subject, fingerprint

# A (rank, inputs) and B (outputs, rank); LoRA's scale is multiplied into B
Factors = Mapping[LinearKey, tuple[torch.Tensor, torch.Tensor]]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
ADAPTER = "default"  # PEFT's name for the one adapter that a model has


class Settings(Protocol):
    """The settings that training needs of its stage, see `thesislib.compress.lora.stage.Lora`."""

    rank: int
    alpha: float
    dropout: float
    init: str
    learning_rate: float
    warmup: float
    weight_decay: float
    steps: int
    batch: int
    accumulate: int
    clip: float
    every: int
    checkpoint_every: int
    seed: int
    label: str


class HeadLoss(torch.autograd.Function):
    """The sum of -log p(target) over states, with a slice of the logits at a time, forward and backward.

    The head is not trained, so the gradient of the states, (p - 1[target]) W, can be computed with the logits, and is
    all that the backward pass needs. That takes as many products as with all logits, but not their 400 MB for 2,048
    tokens of a vocabulary of 49,152, nor as much again for their gradient. Of 64 to 512 rows at a time 128 were the
    fastest.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: int = 128) -> torch.Tensor:
        """(N, D) states, (V, D) output embedding, (N,) targets -> () nats in float32.

        Products are computed in the dtype of `head`.
        """
        total = torch.zeros((), device=states.device)
        gradient = torch.empty(states.shape, device=states.device) if ctx.needs_input_grad[0] else None
        for i in range(0, len(states), rows):
            target = targets[i : i + rows, None]
            p = torch.log_softmax(states[i : i + rows].to(head.dtype) @ head.T, 1, dtype=torch.float32)
            total -= p.gather(1, target).sum()
            if gradient is not None:
                p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                gradient[i : i + rows] = p.to(head.dtype) @ head
        ctx.gradient, ctx.dtype = gradient, states.dtype
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        """The gradient of the states; the other arguments have none."""
        return (ctx.gradient * outer).to(ctx.dtype), None, None, None


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products; without them they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def rate(step: int, config: Settings) -> float:
    """The learning rate of a step, counted from 1.

    It rises linearly over the warm-up, then falls along a cosine that would reach 0 one step after the last.
    """
    warm = math.ceil(config.warmup * config.steps)
    if step <= warm:
        return config.learning_rate * step / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (config.steps - warm + 1)))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n sequences in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def indices(n: int, seed: int, position: int, count: int) -> list[int]:
    """`count` of n sequences, from `position` on in an endless order in which each epoch is another permutation.

    It depends on these arguments alone, so a checkpoint needs only the position.
    """
    return [_order(n, seed, i // n)[i % n] for i in range(position, position + count)]


class Training:
    """A copy of a subject with adapters, an optimiser for them, and the state of their training.

    The adapters' initial values come from torch's default random generator.

    Args:
        config: see `thesislib.compress.lora.stage.Lora`.
        subject: is copied, not changed.
        shared: the (block, name) of each projection to adapt, with those that share its weights.
        autocast: whether to compute in bfloat16. The frozen projections are then cast to it, since autocast would
            round them at every use; adapters, norms and the residual stream stay in float32.
        initial: initial factors, by the first (block, name) of each projection.
    """

    def __init__(
        self,
        config: Settings,
        subject: Subject,
        shared: list[list[LinearKey]],
        autocast: bool,
        initial: Factors | None = None,
    ):
        self.config, self.autocast = config, autocast
        self.subject = subject.copy()
        self.subject.model.float()
        self.layers = self._inject(shared, initial or {})
        self.head = self.subject.model.get_output_embeddings().weight.detach()
        if autocast:
            self.head = self.head.bfloat16()
            for b in range(self.subject.depth):
                for linear in self.subject.linears(b).values():
                    base = _frozen(linear)
                    base.weight.data = base.weight.data.bfloat16()
                    if base.bias is not None:
                        base.bias.data = base.bias.data.bfloat16()
        self.parameters = {
            f"{b}.{name}.{ab}": m.weight for (b, name), layer in self.layers.items() for ab, m in _factors(layer)
        }
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.state: dict[str, Any] = {"step": 0, "curve": [], "validation": [], "best_step": None, "best_loss": None}
        self.state |= {"seconds": 0.0, "tokens": 0}
        self.best: dict[str, torch.Tensor] = {}

    def _inject(self, shared: list[list[LinearKey]], initial: Factors) -> dict[LinearKey, LoraLayer]:
        """PEFT's layers, which replace the projections, by the first (block, name) of each."""
        config, model = self.config, self.subject.model
        names = {module: name for name, module in model.named_modules()}
        paths = {}  # of an adapted projection its base: the correction stays and is frozen
        for (block, name), *_ in shared:
            module = self.subject.linears(block)[name]
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
                if not isinstance(self.subject.linears(block)[name], Adapted):
                    replace(self.subject.blocks[block], name, layers[first])
        with torch.no_grad():
            for key, (A, B) in initial.items():
                layers[key].lora_A[ADAPTER].weight.copy_(A)
                layers[key].lora_B[ADAPTER].weight.copy_(B.float() / layers[key].scaling[ADAPTER])
        return layers

    def nats(self, some: Sequences) -> torch.Tensor:
        """The summed loss of some sequences, in nats."""
        device = self.subject.device
        ids, targets, positions, mask = (
            None if t is None else t.to(device) for t in (some.ids, some.targets, some.positions, some.mask)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            _, states = next(final_states(self.subject.model, ids, positions=positions, mask=mask))
        predicting = targets != NOTHING
        return HeadLoss.apply(states[predicting], self.head, targets[predicting])

    def step(self, train: Sequences, number: int) -> tuple[float, int]:
        """One step of the optimiser, on the sequences of step `number`.

        Returns:
            The loss in nats a predicted token, and the number of tokens.

        Raises:
            BadInput: a loss or a gradient that is not finite; the adapter is not changed then.
        """
        c = self.config
        count = c.batch * c.accumulate
        some = train[indices(len(train), c.seed, (number - 1) * count, count)]
        predicted, loss = some.predicted, 0.0
        self.optimiser.zero_grad(set_to_none=True)
        for start in range(0, count, c.batch):
            # divided by the predicted tokens of the whole step, so that the loss does not depend on the batch
            part = self.nats(some[start : start + c.batch]) / predicted
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), c.clip).item()
        for name, value in {"loss": loss, "gradient": norm}.items():
            if not math.isfinite(value):
                raise _not_finite(name, value, number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate(number, c)
        self.optimiser.step()
        return loss, some.ids.numel()

    def validate(self, held_out: Sequences) -> float:
        """The loss in nats a predicted token on held-out sequences, without dropout."""
        self.subject.model.eval()
        batch = self.config.batch
        with torch.no_grad():
            nats = sum(self.nats(held_out[i : i + batch]).item() for i in range(0, len(held_out), batch))
        self.subject.model.train()
        return nats / held_out.predicted

    def run(self, split: Split, file: Path | None = None) -> tuple[Factors, dict]:
        """Train to the end, from the checkpoint in `file` if there is one.

        Returns:
            The factors, with the scale in B, by the first (block, name) of each projection; and a report.

        Raises:
            BadInput: see `step`; the disk is full.
        """
        c, state = self.config, self.state
        begun = self._resume(file) if file else 0
        self.subject.model.train()
        if not begun:
            self._validate_and_keep_best(split.held_out)
        with tqdm(total=c.steps, initial=begun, desc=f"LoRA {c.label}", unit="step", disable=None) as bar:
            for number in range(begun + 1, c.steps + 1):
                start = time.perf_counter()
                try:
                    loss, tokens = self.step(split.train, number)
                    state["seconds"] += time.perf_counter() - start
                    state["tokens"] += tokens
                    state["step"] = number
                    state["curve"].append({"step": number, "loss": loss, "learning_rate": rate(number, c)})
                    if number % c.every == 0 or number == c.steps:
                        self._validate_and_keep_best(split.held_out)
                except BadInput as error:
                    raise BadInput(f"{error}; {_last_checkpoint(file)}") from error
                if file and (number % c.checkpoint_every == 0 or number == c.steps):
                    self._save(file)
                bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{state['tokens'] / state['seconds']:.0f}")
                bar.update()
        report = {key: state[key] for key in ("curve", "validation", "best_step", "best_loss", "tokens")}
        report |= {
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "seconds": round(state["seconds"], 2),
            "tokens_per_second": round(state["tokens"] / state["seconds"], 1),
            "resumed_at": begun,
        }
        return self._best_factors(), report

    def _validate_and_keep_best(self, held_out: Sequences | None) -> None:
        """Validate, and keep the adapter if its loss is the lowest so far, or if there are no held-out sequences."""
        state = self.state
        loss = None
        if held_out is not None:
            loss = self.validate(held_out)
            if not math.isfinite(loss):
                raise _not_finite("validation loss", loss, state["step"])
            state["validation"].append({"step": state["step"], "loss": loss})
        if loss is None or state["best_loss"] is None or loss < state["best_loss"]:
            state["best_step"], state["best_loss"] = state["step"], loss
            self.best = {key: p.detach().clone() for key, p in self.parameters.items()}

    def _best_factors(self) -> Factors:
        """The factors of the adapter that was kept, with the scale in B."""
        best = {key: [self.best[f"{key[0]}.{key[1]}.{factor}"] for factor in "AB"] for key in self.layers}
        return {key: (A, B * self.layers[key].scaling[ADAPTER]) for key, (A, B) in best.items()}

    # ------------------------------------------------------------ checkpoints

    def _save(self, file: Path) -> None:
        """Write all that the next step depends on into one file, which is replaced as a whole."""
        tensors = {f"adapter.{key}": p.detach() for key, p in self.parameters.items()}
        tensors |= {f"best.{key}": t for key, t in self.best.items()}
        for key, p in self.parameters.items():
            tensors |= {f"{moment}.{key}": self.optimiser.state[p][moment] for moment in MOMENTS}
        tensors |= dict(_random_state(self.subject.device))
        tensors, state = {key: t.contiguous() for key, t in tensors.items()}, json.dumps(self.state)
        try:
            # the learning rate and the position in the data follow from the step
            write_whole(file, safetensors.torch.save(tensors, {"state": state, "sha256": _checksum(state, tensors)}))
        except BadInput as error:
            step = self.state["step"]
            raise BadInput(f"{error}; the training is at step {step}: {_last_checkpoint(file)}") from error

    def _resume(self, file: Path) -> int:
        """Restore the checkpoint in `file` and return its step; 0 if there is none that can be used."""
        clear_leftovers(file, alone=True)  # of a run killed while it wrote
        if not file.exists():
            return 0
        cuda = self.subject.device if self.subject.device.type == "cuda" else None
        try:
            state, tensors = read_checkpoint(file)
            parts = ("adapter", "best", *MOMENTS)
            values = {
                key: [tensors[f"{part}.{key}"].to(p.device) for part in parts] for key, p in self.parameters.items()
            }
            random, random_cuda = tensors["random"], tensors["random_cuda"] if cuda else None
        except (BadInput, KeyError) as error:
            line = f"the checkpoint {file} cannot be used ({error}): the training begins again"
            print(line, file=sys.stderr, flush=True)
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            return 0
        with torch.no_grad():
            for key, p in self.parameters.items():
                value, self.best[key], *moments = values[key]
                p.copy_(value)
                self.optimiser.state[p] = dict(zip(MOMENTS, moments, strict=True))
                self.optimiser.state[p]["step"] = torch.tensor(float(state["step"]))
        torch.set_rng_state(random)
        if cuda:
            torch.cuda.set_rng_state(random_cuda, cuda)
        self.state |= state
        return state["step"]


def read_checkpoint(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The state of a checkpoint's training (step, curves, best step) and its tensors.

    Raises:
        BadInput: it cannot be read, or its checksum is not that of its content.
    """
    if not file.is_file():
        raise BadInput("it is no file")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"it is damaged: {error}") from error
    if "state" not in metadata or metadata.get("sha256") != _checksum(metadata["state"], tensors):
        raise BadInput("it is damaged: its checksum is another")
    return json.loads(metadata["state"]), tensors


def _checksum(state: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 over the content of a checkpoint."""
    return hashlib.sha256(f"{state} {fingerprint(sorted(tensors.items()))}".encode()).hexdigest()


def _random_state(device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The states of torch's random generators by name."""
    yield "random", torch.get_rng_state()
    if device.type == "cuda":
        yield "random_cuda", torch.cuda.get_rng_state(device)


def _factors(layer: LoraLayer) -> Iterator[tuple[str, nn.Linear]]:
    """The factors of a layer of PEFT's by name."""
    yield "A", cast("nn.Linear", layer.lora_A[ADAPTER])
    yield "B", cast("nn.Linear", layer.lora_B[ADAPTER])


def _frozen(linear: nn.Module) -> nn.Linear:
    """The frozen nn.Linear inside an adapted projection."""
    while not isinstance(linear, nn.Linear):
        linear = linear.base if isinstance(linear, Adapted) else cast("nn.Module", linear.base_layer)
    return linear


def _not_finite(name: str, value: float, step: int) -> BadInput:
    return BadInput(f"{name} is {value} at step {step}: training stopped; a lower learning_rate may help")


def _last_checkpoint(file: Path | None) -> str:
    """A message about the last checkpoint of a run that stops."""
    with suppress(Exception):
        if file is not None and file.exists():
            return f"the last good checkpoint, of step {read_checkpoint(file)[0]['step']}, is kept in {file}"
    return "no checkpoint had been written"
