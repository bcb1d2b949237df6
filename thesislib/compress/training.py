"""Training some parameters of a model: gradient steps on packed sequences, validation, checkpoints that survive a kill.

A stage that trains derives its settings from `Trained` and gives `Training` the parameters, in a copy of its subject.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from thesislib.compress.lora.sequences import NOTHING, TEXTS, Sequences, Split, sequences
from thesislib.compress.stage import Stage
from thesislib.compress.trainable import to_bfloat16
from thesislib.errors import BadInput, unknown
from thesislib.files import clear_leftovers, write_whole
from thesislib.model.forward import final_states
from thesislib.model.subject import Subject, fingerprint

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
# the sum of a loss over sequences, and of how many things; what is minimised and reported is their ratio
Loss = Callable[[Subject, Sequences], tuple[torch.Tensor, int]]


@dataclass(frozen=True, kw_only=True)
class Trained(Stage):
    """A stage that trains parameters on text.

    Attributes:
        text: wikitext: next-token loss on running text. trivia: loss on the answers of questions. See
            `thesislib.compress.lora.sequences`.
        learning_rate: of AdamW.
        steps: of the optimiser.
        batch: sequences at a time.
        accumulate: batches a step.
        length: tokens of a sequence.
        warmup: the share of the steps in which the learning rate rises; after it the rate falls along a cosine.
        clip: the largest norm of the gradient.
        weight_decay: of AdamW.
        every: steps between validations. What has the lowest loss is kept, the untrained parameters included.
        validation: held-out sequences.
        checkpoint_every: steps between checkpoints.
        autocast: compute in bfloat16; None: if the processor has instructions for it.
        seed: of everything random.
    """

    text: str = "wikitext"
    learning_rate: float = 5e-4
    steps: int = 100
    batch: int = 4
    accumulate: int = 2
    length: int = 512
    warmup: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.0
    every: int = 20
    validation: int = 16
    checkpoint_every: int = 20
    autocast: bool | None = None
    seed: int = 0

    title: ClassVar[str] = ""  # in messages and on the progress bar
    amplifies: ClassVar[bool] = True

    @property
    def trained_on(self) -> str | None:
        """See `Stage`."""
        return self.text

    def __post_init__(self):
        if self.text not in TEXTS:
            raise unknown(f"text of {self.title}", self.text, TEXTS)
        for name in ("steps", "batch", "accumulate", "every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} {getattr(self, name)} is too small: expected at least 1")
        if self.length < 2 or self.validation < 0:
            raise BadInput(
                f"{self.title} needs sequences of a length of at least 2, and a validation of at least 0 of them: "
                f"length is {self.length}, validation {self.validation}"
            )
        for name, low, high in (("warmup", 0, 1), ("weight_decay", 0, math.inf)):
            if not low <= getattr(self, name) < high:
                raise BadInput(f"{name} {getattr(self, name)}: expected a number in [{low}, {high})")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} {getattr(self, name)}: expected a positive number")

    def train(
        self,
        subject: Subject,
        student: Subject,
        parameters: Mapping[str, nn.Parameter],
        data: str,
        work: Path | str | None,
        loss: Callable[[bool], "Loss | None"] = lambda autocast: None,
        **facts: object,
    ) -> tuple[dict[str, torch.Tensor], dict]:
        """Train on the stage's text.

        Args:
            subject: that the stage was given.
            student: what becomes of it: a copy, which is changed.
            parameters: of the student, see `Training`.
            data: a data spec.
            work: a folder for checkpoints.
            loss: makes the loss, given whether it is computed in bfloat16.
            facts: what else the training depends on, as JSON data.

        Returns:
            The best parameters, float32, and a report of the text and the training.

        Raises:
            BadInput: see `thesislib.compress.lora.sequences.sequences` and `Training.run`.
        """
        split = sequences(self.text, subject, data, length=self.length, validation=self.validation, seed=self.seed)
        autocast = bfloat16_is_fast(subject.device) if self.autocast is None else self.autocast
        file = self.checkpoint(work, subject, split, autocast, **facts)
        with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            best, report = Training(self, student, parameters, autocast, loss(autocast)).run(split, file)
        text = {"text": self.text, **split.facts, "sequences": len(split.train), "filled": split.train.filled}
        return best, {**text, "autocast": autocast, **report}

    def checkpoint(
        self, work: Path | str | None, subject: Subject, split: Split, autocast: bool, *beside: str, **facts: object
    ) -> Path | None:
        """The checkpoint's file in `work`, named by a hash over all that the training depends on; None without `work`.

        Args:
            work: the folder.
            subject: that is trained.
            split: the training text.
            autocast: whether it computes in bfloat16.
            beside: settings that the training does not depend on; stages that differ in them share a checkpoint.
            facts: what else it depends on, as JSON data.
        """
        if work is None:
            return None
        config = {k: v for k, v in dataclasses.asdict(self).items() if k not in (*beside, "checkpoint_every")}
        facts |= {"autocast": autocast, "subject": subject.fingerprint, "text": split.train.sha256, "config": config}
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return Path(work) / f"{self.word}-{name}.safetensors"


class HeadLoss(torch.autograd.Function):
    """The sum of -log p(target) over states, with a slice of the logits at a time, forward and backward.

    The gradients of the states, (p - 1[target]) W, and of a head that is trained, (p - 1[target])^T x, are computed
    with the logits, and are all that the backward pass needs. That takes as many products as with all logits, but not
    their 400 MB for 2,048 tokens of a vocabulary of 49,152, nor as much again for their gradient. Of 64 to 512 rows at
    a time 128 were the fastest.
    """

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        rows: int = 128,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """(N, D) states, (V, D) output embedding, (N,) targets -> () nats in float32.

        Products are computed in `dtype`, by default that of `head`.
        """
        head = head.to(dtype or head.dtype)
        total = torch.zeros((), device=states.device)
        gradient, of_head = (
            torch.zeros(t.shape, device=t.device) if needed else None
            for t, needed in zip((states, head), ctx.needs_input_grad[:2], strict=True)
        )
        for i in range(0, len(states), rows):
            x, target = states[i : i + rows].to(head.dtype), targets[i : i + rows, None]
            p = torch.log_softmax(x @ head.T, 1, dtype=torch.float32)
            total -= p.gather(1, target).sum()
            if gradient is not None or of_head is not None:
                p = p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype)).to(head.dtype)
            if gradient is not None:
                gradient[i : i + rows] = p @ head
            if of_head is not None:
                of_head += p.T @ x
        ctx.gradient, ctx.of_head, ctx.dtype = gradient, of_head, states.dtype
        return total

    @staticmethod
    def backward(ctx, outer: torch.Tensor):
        """The gradients of the states and of a head that is trained; the other arguments have none."""
        gradient = None if ctx.gradient is None else (ctx.gradient * outer).to(ctx.dtype)
        return gradient, None if ctx.of_head is None else ctx.of_head * outer, None, None, None


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products; without them they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def rate(step: int, config: Trained) -> float:
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
    """Parameters of a subject, an optimiser for them, and the state of their training.

    Args:
        config: the settings.
        subject: a copy for the training, which is changed: weights become float32, and only `parameters` require a
            gradient.
        parameters: those to train, by any names; they may be whole weights.
        autocast: whether to compute in bfloat16. The blocks' linears that are not trained are then cast to it, since
            autocast would round them at every use; parameters, norms and the residual stream stay in float32.
        loss: gives for a subject and sequences the loss summed over these, and of how many things: it is called with
            autocast on or off as set. By default the next token's nats (see `nats`), over the predicted tokens.
    """

    def __init__(
        self,
        config: Trained,
        subject: Subject,
        parameters: Mapping[str, nn.Parameter],
        autocast: bool,
        loss: Loss | None = None,
    ):
        self.config, self.subject, self.autocast, self.loss = config, subject, autocast, loss
        self.parameters = dict(parameters)
        subject.model.float().requires_grad_(False)
        for p in self.parameters.values():
            p.data = p.data.float()  # one that is not in the model
            p.requires_grad_(True)
        head = subject.model.get_output_embeddings().weight
        if not any(head is p for p in self.parameters.values()):
            head = head.detach().bfloat16() if autocast else head.detach()
        self.head = head
        if autocast:
            to_bfloat16(subject.blocks, but=self.parameters.values())
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.state: dict[str, Any] = {"step": 0, "curve": [], "validation": [], "best_step": None, "best_loss": None}
        self.state |= {"seconds": 0.0, "tokens": 0}
        self.best: dict[str, torch.Tensor] = {}

    def nats(self, some: Sequences) -> torch.Tensor:
        """The summed loss of some sequences, in nats."""
        device = self.subject.device
        ids, targets, positions, mask = (
            None if t is None else t.to(device) for t in (some.ids, some.targets, some.positions, some.mask)
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            _, states = next(final_states(self.subject.model, ids, positions=positions, mask=mask))
        predicting = targets != NOTHING
        # without a graph a head that is trained needs no gradient either, whatever it requires
        head = self.head if torch.is_grad_enabled() else self.head.detach()
        return HeadLoss.apply(
            states[predicting], head, targets[predicting], 128, torch.bfloat16 if self.autocast else None
        )

    def _summed(self, some: Sequences) -> tuple[torch.Tensor, int]:
        """The summed loss of some sequences, and of how many things."""
        if self.loss is None:
            return self.nats(some), some.predicted
        with torch.autocast(self.subject.device.type, torch.bfloat16, enabled=self.autocast):
            return self.loss(self.subject, some)

    def step(self, train: Sequences, number: int) -> tuple[float, int]:
        """One step of the optimiser, on the sequences of step `number`.

        Returns:
            The loss (in nats a predicted token, by default), and the number of tokens.

        Raises:
            BadInput: a loss or a gradient that is not finite; the parameters are not changed then.
        """
        c = self.config
        count = c.batch * c.accumulate
        some = train[indices(len(train), c.seed, (number - 1) * count, count)]
        # divided by the predicted tokens of the whole step, so that the loss does not depend on the batch
        divisor, loss, counted = some.predicted if self.loss is None else 1, 0.0, 0
        self.optimiser.zero_grad(set_to_none=True)
        for start in range(0, count, c.batch):
            total, n = self._summed(some[start : start + c.batch])
            part = total / divisor
            part.backward()
            loss, counted = loss + part.item(), counted + n
        if self.loss is not None:  # another loss has said only now of how many things it is
            loss /= counted
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad /= counted
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), c.clip).item()
        for name, value in {"loss": loss, "gradient": norm}.items():
            if not math.isfinite(value):
                raise _not_finite(name, value, number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate(number, c)
        self.optimiser.step()
        return loss, some.ids.numel()

    def validate(self, held_out: Sequences) -> float:
        """The loss on held-out sequences, as `step` gives it, without dropout."""
        self.subject.model.eval()
        batch = self.config.batch
        with torch.no_grad():
            parts = [self._summed(held_out[i : i + batch]) for i in range(0, len(held_out), batch)]
        self.subject.model.train()
        return sum(total.item() for total, _ in parts) / sum(n for _, n in parts)

    def run(self, split: Split, file: Path | None = None) -> tuple[dict[str, torch.Tensor], dict]:
        """Train to the end, from the checkpoint in `file` if there is one.

        Returns:
            The parameters with the lowest validation loss, or the last ones without validation; and a report.

        Raises:
            BadInput: see `step`; the disk is full.
        """
        c, state = self.config, self.state
        begun = self._resume(file) if file else 0
        self.subject.model.train()
        if not begun:
            self._validate_and_keep_best(split.held_out)
        title = f"{c.title} {c.label}"
        with tqdm(total=c.steps, initial=begun, desc=title, unit="step", disable=None) as bar:
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
        return self.best, report

    def _validate_and_keep_best(self, held_out: Sequences | None) -> None:
        """Validate, and keep the parameters if their loss is the lowest so far, or without held-out sequences."""
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

    # ------------------------------------------------------------ checkpoints

    def _save(self, file: Path) -> None:
        """Write all that the next step depends on into one file, which is replaced as a whole."""
        # "adapter", whatever it is: LoRA's checkpoints had this name before others trained
        tensors = {f"adapter.{key}": p.detach() for key, p in self.parameters.items()}
        tensors |= {f"best.{key}": t for key, t in self.best.items()}
        for key, p in self.parameters.items():
            # none, if the loss does not reach it: a norm before an attention that was removed
            state = self.optimiser.state[p]
            tensors |= {f"{moment}.{key}": state.get(moment, torch.zeros_like(p)).detach() for moment in MOMENTS}
        tensors |= dict(_random_state(self.subject.device))
        tensors, text = {key: t.contiguous() for key, t in tensors.items()}, json.dumps(self.state)
        try:
            # the learning rate and the position in the data follow from the step
            write_whole(file, safetensors.torch.save(tensors, {"state": text, "sha256": _checksum(text, tensors)}))
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


def _not_finite(name: str, value: float, step: int) -> BadInput:
    return BadInput(f"{name} is {value} at step {step}: training stopped; a lower learning_rate may help")


def _last_checkpoint(file: Path | None) -> str:
    """A message about the last checkpoint of a run that stops."""
    with suppress(Exception):
        if file is not None and file.exists():
            return f"the last good checkpoint, of step {read_checkpoint(file)[0]['step']}, is kept in {file}"
    return "no checkpoint had been written"
