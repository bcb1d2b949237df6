"""Training low-rank adapters: gradient steps on packed sequences, validation, and checkpoints that survive a kill."""

import hashlib
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
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
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
ADAPTER = "default"  # PEFT's name for the one adapter that a model has


class Settings(Protocol):
    """What training asks of its stage's settings; see `thesislib.compress.lora.stage.Lora`."""

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
    """Sum of -log p(target) over states, the head's logits a slice at a time in both directions.

    The head does not learn, so the gradient of the states, (p - 1[target]) W, is known as soon as the logits are, and
    is all that the backward pass needs: as many products as with all logits at hand, without their 400 MB for 2,048
    tokens of a vocabulary of 49,152 (and as much again for the gradient). 128 rows at a time were the fastest of 64 to
    512.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, rows: int = 128) -> torch.Tensor:
        """(N, D) states, (V, D) output embedding, (N,) targets -> () nats in float32. Products are in the type of
        `words`."""
        total = torch.zeros((), device=states.device)
        gradient = torch.empty(states.shape, device=states.device) if ctx.needs_input_grad[0] else None
        for i in range(0, len(states), rows):
            target = targets[i : i + rows, None]
            p = torch.log_softmax(states[i : i + rows].to(words.dtype) @ words.T, 1, dtype=torch.float32)
            total -= p.gather(1, target).sum()
            if gradient is not None:
                p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                gradient[i : i + rows] = p.to(words.dtype) @ words
        ctx.gradient, ctx.dtype = gradient, states.dtype
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        """Of the states only."""
        return (ctx.gradient * outer).to(ctx.dtype), None, None, None


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products have instructions of their own here; without them they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def rate(step: int, config: Settings) -> float:
    """The learning rate of a step (from 1): up a line over the warm-up, then down a cosine that ends one step above
    0."""
    warm = math.ceil(config.warmup * config.steps)
    if step <= warm:
        return config.learning_rate * step / warm
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (config.steps - warm + 1)))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def indices(n: int, seed: int, position: int, count: int) -> list[int]:
    """Which of n sequences come at `position` and after in an endless order, each epoch a permutation of its own.

    It depends on nothing else, so one number says where the data stand.
    """
    return [_order(n, seed, at // n)[at % n] for at in range(position, position + count)]


class Training:
    """A copy of a subject with adapters in it, and what it takes to train them.

    Args:
        config: see `thesislib.compress.lora.stage.Lora`.
        subject: is copied, not changed.
        places: which projections of it; for each, the (block, name) of every place where it stands.
        autocast: whether to compute in bfloat16. The frozen projections are then held in it, which is what autocast
            would round them to at every use; adapters, norms and the residual stream stay in float32.
        initial: factors to begin with, by the first place of each projection.

    Draws the adapters' first values from torch's generator.
    """

    def __init__(
        self,
        config: Settings,
        subject: Subject,
        places: list[list[LinearKey]],
        autocast: bool,
        initial: Factors | None = None,
    ):
        self.config, self.autocast = config, autocast
        self.subject = subject.copy()
        self.subject.model.float()
        self.layers = self._inject(places, initial or {})
        self.words = self.subject.model.get_output_embeddings().weight.detach()
        if autocast:
            self.words = self.words.bfloat16()
            for b in range(self.subject.depth):
                for linear in self.subject.linears(b).values():
                    base = _plain(linear)
                    base.weight.data = base.weight.data.bfloat16()
                    if base.bias is not None:
                        base.bias.data = base.bias.data.bfloat16()
        self.parameters = {
            f"{b}.{name}.{ab}": m.weight for (b, name), layer in self.layers.items() for ab, m in _factors(layer)
        }
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.state: dict[str, Any] = {
            "step": 0,
            "curve": [],
            "validation": [],
            "best_step": None,
            "best_loss": None,
            "seconds": 0.0,
            "tokens": 0,
        }
        self.best: dict[str, torch.Tensor] = {}

    def _inject(self, places: list[list[LinearKey]], initial: Factors) -> dict[LinearKey, LoraLayer]:
        """PEFT's layers around the projections, by the first place of each."""
        config, model = self.config, self.subject.model
        names = {module: name for name, module in model.named_modules()}
        inner = {}  # PEFT goes around the base of what is adapted already, whose own correction stays and is frozen
        for (block, name), *_ in places:
            module = self.subject.linears(block)[name]
            inner[block, name] = names[module.base if isinstance(module, Adapted) else module]
        how: Any = config.init if config.init in ("gaussian", "orthogonal") else True
        alpha: Any = config.alpha  # PEFT takes any number and says int
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=alpha,
            lora_dropout=config.dropout,
            init_lora_weights=how,
            target_modules=list(inner.values()),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is about to change
            get_peft_model(model, lora)  # changes the model in place: the wrapper that it returns is not needed
        layers: dict[LinearKey, Any] = {place: model.get_submodule(path) for place, path in inner.items()}
        for first, *rest in places:
            for block, name in rest:
                if not isinstance(
                    self.subject.linears(block)[name], Adapted
                ):  # PEFT finds a shared module in its first place only
                    replace(self.subject.blocks[block], name, layers[first])
        with torch.no_grad():
            for place, (A, B) in initial.items():
                layers[place].lora_A[ADAPTER].weight.copy_(A)
                layers[place].lora_B[ADAPTER].weight.copy_(B.float() / layers[place].scaling[ADAPTER])
        return layers

    def nats(self, some: Sequences) -> torch.Tensor:
        """The summed loss of some sequences, in nats."""
        device = self.subject.device
        ids, targets, positions, mask = (
            None if t is None else t.to(device) for t in (some.ids, some.targets, some.positions, some.mask)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            _, states = next(final_states(self.subject.model, ids, positions=positions, mask=mask))
        here = targets != NOTHING
        return HeadLoss.apply(states[here], self.words, targets[here])

    def step(self, train: Sequences, number: int) -> tuple[float, int]:
        """One step of the optimiser on the sequences that are due: its loss in nats a predicted token, and its tokens.

        Raises:
            BadInput: a loss or a gradient that is not finite; the adapter is then what it was before.
        """
        c = self.config
        due = train[indices(len(train), c.seed, (number - 1) * c.batch * c.accumulate, c.batch * c.accumulate)]
        predicted, loss = due.predicted, 0.0
        self.optimiser.zero_grad(set_to_none=True)
        for at in range(0, len(due), c.batch):
            # over the predicted tokens of the whole step, so that how it is cut into batches does not matter
            part = self.nats(due[at : at + c.batch]) / predicted
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), c.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(
                "loss" if not math.isfinite(loss) else "gradient", loss if not math.isfinite(loss) else norm, number
            )
        for group in self.optimiser.param_groups:
            group["lr"] = rate(number, c)
        self.optimiser.step()
        return loss, due.ids.numel()

    def validate(self, held_out: Sequences) -> float:
        """Loss in nats a predicted token on held-out sequences, without dropout."""
        self.subject.model.eval()
        with torch.no_grad():
            nats = sum(
                self.nats(held_out[at : at + self.config.batch]).item()
                for at in range(0, len(held_out), self.config.batch)
            )
        self.subject.model.train()
        return nats / held_out.predicted

    def run(self, split: Split, file: Path | None = None) -> tuple[Factors, dict]:
        """Train to the end, from the checkpoint in `file` if there is one.

        Returns:
            A (rank, inputs) and B (outputs, rank), scale folded in, for the first place of each projection; a report.

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
                    raise BadInput(f"{error}; {_kept(file)}") from error
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
        """Validate, and keep the adapter if it is the best so far; without held-out sequences, the newest is."""
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
        best = {place: [self.best[f"{place[0]}.{place[1]}.{ab}"] for ab in "AB"] for place in self.layers}
        return {place: (A, B * self.layers[place].scaling[ADAPTER]) for place, (A, B) in best.items()}

    # ------------------------------------------------------------ checkpoints

    def _save(self, file: Path) -> None:
        """Everything that the next step depends on, in one file that is replaced as a whole."""
        tensors = {f"adapter.{key}": p.detach() for key, p in self.parameters.items()} | {
            f"best.{key}": t for key, t in self.best.items()
        }
        for key, p in self.parameters.items():
            tensors |= {f"{moment}.{key}": self.optimiser.state[p][moment] for moment in MOMENTS}
        tensors |= dict(_random_state(self.subject.device))
        tensors, said = {key: t.contiguous() for key, t in tensors.items()}, json.dumps(self.state)
        try:
            # the scheduler's state and the position in the data are functions of the step
            write_whole(file, safetensors.torch.save(tensors, {"state": said, "sha256": _checksum(said, tensors)}))
        except BadInput as error:
            raise BadInput(f"{error}; the training is at step {self.state['step']}: {_kept(file)}") from error

    def _resume(self, file: Path) -> int:
        """Take up what `file` holds, if it does and is whole: the step to go on from."""
        clear_leftovers(file, alone=True)  # of a run killed while it wrote
        if not file.exists():
            return 0
        try:
            state, held = read_checkpoint(file)
            taken = {
                key: (
                    held[f"adapter.{key}"],
                    held[f"best.{key}"].to(p.device),
                    *(held[f"{moment}.{key}"].to(p.device) for moment in MOMENTS),
                )
                for key, p in self.parameters.items()
            }
            random: list[tuple[Callable[..., None], tuple]] = [(torch.set_rng_state, (held["random"],))]
            if self.subject.device.type == "cuda":
                random.append((torch.cuda.set_rng_state, (held["random_cuda"], self.subject.device)))
        except (BadInput, KeyError) as error:
            print(
                f"the checkpoint {file} cannot be used ({error}): the training begins again",
                file=sys.stderr,
                flush=True,
            )
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            return 0
        with torch.no_grad():
            for key, p in self.parameters.items():
                value, self.best[key], *moments = taken[key]
                self.optimiser.state[p] = {
                    "step": torch.tensor(float(state["step"])),
                    **dict(zip(MOMENTS, moments, strict=True)),
                }
                p.copy_(value)
        for put_back, given in random:
            put_back(*given)
        self.state |= state
        return state["step"]


def read_checkpoint(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a checkpoint says (step, curves, best step) and its tensors.

    Raises:
        BadInput: it cannot be read, or its checksum is not that of its content.
    """
    if not file.is_file():
        raise BadInput("it is no file")
    try:
        with safe_open(file, "pt") as held:
            said, tensors = held.metadata() or {}, {key: held.get_tensor(key) for key in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"it is damaged: {error}") from error
    if "state" not in said or said.get("sha256") != _checksum(said["state"], tensors):
        raise BadInput("it is damaged: its checksum is another")
    return json.loads(said["state"]), tensors


def _checksum(said: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Over all that a checkpoint holds."""
    return hashlib.sha256(f"{said} {fingerprint(sorted(tensors.items()))}".encode()).hexdigest()


def _random_state(device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    yield "random", torch.get_rng_state()
    if device.type == "cuda":
        yield "random_cuda", torch.cuda.get_rng_state(device)


def _factors(layer: LoraLayer) -> Iterator[tuple[str, nn.Linear]]:
    yield "A", cast("nn.Linear", layer.lora_A[ADAPTER])
    yield "B", cast("nn.Linear", layer.lora_B[ADAPTER])


def _plain(linear: nn.Module) -> nn.Linear:
    """The frozen nn.Linear inside what stands in a projection's place."""
    while not isinstance(linear, nn.Linear):
        linear = linear.base if isinstance(linear, Adapted) else cast("nn.Module", linear.base_layer)
    return linear


def _not_finite(what: str, value: float, step: int) -> BadInput:
    return BadInput(f"{what} is {value} at step {step}: training stopped; a lower learning_rate may help")


def _kept(file: Path | None) -> str:
    """What is left of a run that stops."""
    with suppress(Exception):
        if file is not None and file.exists():
            return f"the last good checkpoint, of step {read_checkpoint(file)[0]['step']}, is kept in {file}"
    return "no checkpoint had been written"
