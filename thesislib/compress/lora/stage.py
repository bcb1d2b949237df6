"""LoRA recovery (Hu et al. 2021): low-rank corrections of some projections, trained on text to win back what pruning
cost."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import nn

from thesislib.compress.lora.sequences import TEXTS, sequences
from thesislib.compress.lora.train import Factors, Settings, Training, bfloat16_is_fast
from thesislib.compress.outline import Outline, Outlined, SizeUnknown, Zeros, corrected
from thesislib.compress.selection import LinearKey, fits, patterns
from thesislib.compress.stage import Shape, Stage, stage
from thesislib.errors import BadInput, unknown
from thesislib.model.layers import LINEARS, Adapted, Projection, adapt, base_of, merged, replace
from thesislib.model.subject import Subject

INITS = ("default", "gaussian", "orthogonal", "eora")
MERGES = {
    "beside": "the adapter is kept beside the weights, which stay as they were",
    "masked": "the adapter is merged where weights are not zero: zeros stay, and what it would have put there is lost",
    "dense": "the adapter is merged everywhere: zeros are filled",
}
THESIS_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


@stage("lora")
@dataclass(frozen=True)
class Lora(Stage):
    """Train low-rank corrections y + (alpha / rank) x Aᵀ Bᵀ of `linears`; the model's own weights stay fixed.

    Attributes:
        text: wikitext: next-token loss on running text. trivia: loss on the answers of questions. See
            `thesislib.compress.lora.sequences`.
        linears: names or patterns of projections, e.g. 'q_proj', '*_proj', 'blocks.3.*'; the thesis's four by default.
        rank: of the corrections; the thesis's by default.
        alpha: their scale is alpha / rank.
        dropout: of the corrections' inputs while training.
        init: default: A uniform, B zero. gaussian, orthogonal: as PEFT has them. eora: train the corrections that the
            subject has, which an EoRA stage of the same rank put there, instead of adding new ones.
        learning_rate: of AdamW; the default lies between the 2e-4 usual for models of 7 billion parameters and the 4e-3
            that chapter 4 found for 135 million (held-out loss, 48 steps).
        steps: of the optimiser.
        batch: sequences at a time.
        accumulate: batches a step.
        length: tokens of a sequence.
        warmup: the share of the steps over which the learning rate rises; it then falls along a cosine.
        clip: the largest norm of the gradient.
        weight_decay: of AdamW.
        every: steps between validations; the best adapter is kept, the untrained one included.
        validation: held-out sequences.
        checkpoint_every: steps between checkpoints.
        merge: beside, masked or dense, see `MERGES`.
        autocast: compute in bfloat16; None for where the processor has instructions for it.
        seed: of everything random.
    """

    text: str = "wikitext"
    linears: str | list | tuple = THESIS_LINEARS
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.1
    init: str = "default"
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
    merge: str = "beside"
    autocast: bool | None = None
    seed: int = 0

    family: ClassVar[str] = "trained"
    amplifies: ClassVar[bool] = True
    pattern: ClassVar[str] = r"[WT](-masked|-dense)?"

    def __post_init__(self):
        for what, value, options in (
            ("text", self.text, TEXTS),
            ("init", self.init, INITS),
            ("merge", self.merge, MERGES),
        ):
            if value not in options:
                raise unknown(f"{what} of LoRA", value, options)
        self._normalise(linears=patterns(self.linears))
        for name in ("rank", "steps", "batch", "accumulate", "every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} {getattr(self, name)} is too small: expected at least 1")
        if self.length < 2 or self.validation < 0 or not self.linears:
            raise BadInput(
                "LoRA needs sequences of a length of at least 2, a validation of at least 0 of them, and some linears"
            )
        for name, low, high in (("dropout", 0, 1), ("warmup", 0, 1), ("weight_decay", 0, math.inf)):
            if not low <= getattr(self, name) < high:
                raise BadInput(f"{name} {getattr(self, name)}: expected a number in [{low}, {high})")
        for name in ("alpha", "learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} {getattr(self, name)}: expected a positive number")
        if self.init == "orthogonal" and self.rank % 2:
            raise BadInput(f"rank {self.rank} is odd: init 'orthogonal' pairs rows and needs an even one")

    @property
    def label(self) -> str:
        """As the thesis writes it: W for WikiText, T for TriviaQA; W-masked or W-dense where the adapter is merged."""
        return ("W" if self.text == "wikitext" else "T") + ("" if self.merge == "beside" else f"-{self.merge}")

    @classmethod
    def from_label(cls, part: str) -> "Lora | None":
        """The config, with defaults, whose label `part` is."""
        return next((c for text in TEXTS for way in MERGES if (c := cls(text=text, merge=way)).label == part), None)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: `init: eora` needs a correction to train, and a rank is at most a projection's inputs."""
        beside = (
            stage.merge == "beside" if isinstance(stage, Lora) else stage.family == "compensated" for stage in previous
        )
        if self.init == "eora" and not any(beside):
            raise BadInput(
                "init 'eora' trains the corrections that an EoRA stage made: put one before it, or use init 'default'"
            )
        if shape is not None:
            for name, inputs in shape.inputs.items():
                if self.rank > inputs and any(fits(p, b, name) for p in self.linears for b in range(shape.depth)):
                    raise BadInput(f"rank {self.rank} is larger than {name}, which has {inputs} inputs")
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""

        def takes(block: int, name: str) -> bool:
            return any(fits(pattern, block, name) for pattern in self.linears)

        outline.check_alike(takes)
        taken = {place for places in self.places(outline.subject) for place in places}
        replaced = self.merge != "beside" or self.init == "eora"
        if outline.budgeted - taken and (replaced or outline.dtype != torch.float32):
            raise SizeUnknown

        def trained(module: Projection, _: bool) -> Projection:
            base = cast("Outlined", base_of(module))
            if self.merge == "masked":
                return Outlined(base, outline.dtype, None if base.grid else base.zeros)
            if self.merge == "dense":
                return Outlined(base, outline.dtype, Zeros())
            return corrected(base if self.init == "eora" else module, self.rank, torch.float32)

        outline.change(trained, takes)
        outline.changed = set()
        if replaced:
            outline.budgeted = set()

    def places(self, subject: Subject) -> list[list[LinearKey]]:
        """The (block, name) of the projections to adapt; all places of one in one list, where a plan repeats its block.

        Raises:
            BadInput: a pattern that names none here; a rank larger than a projection.
        """
        here = {(b, name): module for b in range(subject.depth) for name, module in subject.linears(b).items()}
        for pattern in self.linears:
            if not any(fits(pattern, *place) for place in here):
                names = sorted({name for _, name in here}, key=LINEARS.index)
                raise BadInput(
                    f"no projection of {subject.name} fits '{pattern}': it has {', '.join(names)} in blocks 0 to "
                    f"{subject.depth - 1}"
                )
        found: dict[nn.Module, list[LinearKey]] = {}
        for place, module in here.items():
            least = min(module.out_features, module.in_features)
            if any(fits(pattern, *place) for pattern in self.linears):
                if self.rank > least:
                    shape = f"({module.out_features}, {module.in_features})"
                    raise BadInput(
                        f"rank {self.rank} is larger than {place[1]} of block {place[0]}, of shape {shape}: "
                        f"expected at most {least}"
                    )
                # one set of weights in several places gets one adapter for all of them, whichever was named
                found.setdefault(module, [p for p, m in here.items() if m is module])
        return list(found.values())

    def apply(
        self, subject: Subject, *, data: str = "embedded", work: Path | None = None, initial: Factors | None = None
    ) -> tuple[Subject, dict]:
        """A copy of the subject with the trained adapter beside its weights or merged into them, and a report.

        The report has the loss, the learning rate and validation by step, the best step, and what was trained on. With
        `work`, a checkpoint is kept there, from which a run that died goes on: on the same processor, with as many
        threads, it ends with the same bits. Projections that a plan repeats get one adapter for all their places; those
        that are adapted already get a second correction, joined with the first, unless `init` is eora.

        Args:
            subject: what to recover.
            data: a data spec for the training text.
            work: a folder for checkpoints.
            initial: with init 'eora', the factors to begin with, e.g. of `thesislib.compress.eora.start`, instead of
                those that the subject has.

        Raises:
            BadInput: see `places` and `thesislib.compress.lora.sequences.sequences`; init 'eora' without factors of
                this rank; a loss that is not finite; a full disk.
        """
        if initial is not None and self.init != "eora":
            raise BadInput(f"init '{self.init}' makes its own factors: use init 'eora' to begin with given ones")
        places = self.places(subject)
        split = sequences(self.text, subject, data, length=self.length, validation=self.validation, seed=self.seed)
        autocast = bfloat16_is_fast(subject.device) if self.autocast is None else self.autocast
        file = None
        if work is not None:
            facts = {
                "autocast": autocast,
                "subject": subject.fingerprint,
                "text": split.train.sha256,
                "initial": _plain(initial),
            }
            # what changes nothing about the training stays out: another merge can use the same checkpoint
            facts["config"] = {
                k: v for k, v in dataclasses.asdict(self).items() if k not in ("merge", "checkpoint_every")
            }
            file = Path(work) / f"lora-{_hash(json.dumps(facts, sort_keys=True).encode())[:16]}.safetensors"
        # packed weights stay packed where the adapter is kept beside them
        result = subject.copy(unpack=False)
        if self.init == "eora":
            initial = self._begin(result, places, initial)
        with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            settings = cast(
                "Settings", self
            )  # a protocol's fields may be set and a frozen stage's may not: training only reads
            factors, trained = Training(settings, result, places, autocast, initial).run(split, file)
        before, after = [], []
        for first, *rest in places:
            old = result.linears(first[0])[first[1]]
            new = merged(adapt(old, *factors[first]), self.merge)
            before.append(_zeros(old))
            after.append(_zeros(new))
            for block, name in (first, *rest):
                replace(result.blocks[block], name, new)
        result.model.eval()
        report = {
            "text": self.text,
            **split.facts,
            "sequences": len(split.train),
            "filled": split.train.filled,
            "autocast": autocast,
            "adapted": len(places),
            "merge": self.merge,
            "weights": MERGES[self.merge],
            "zeros_before": sum(before) / len(before),
            "zeros_after": sum(after) / len(after),
        }
        return result, report | trained

    def _begin(self, subject: Subject, places: list[list[LinearKey]], given: Factors | None) -> Factors:
        """The factors to begin with: those given, or those of the subject, which are taken out of it."""
        found = {}
        for first, *rest in places:
            module = subject.linears(first[0])[first[1]]
            if given is not None:
                A, B = given.get(first, (None, None))
            else:
                A, B = (module.lora_A, module.lora_B) if isinstance(module, Adapted) else (None, None)
            if A is None or len(A) != self.rank:
                has = "none" if A is None else f"one of rank {len(A)}"
                raise BadInput(
                    f"init 'eora' begins with corrections of rank {self.rank}: {first[1]} of block {first[0]} has {has}"
                )
            if given is None:
                for block, name in (first, *rest):
                    replace(subject.blocks[block], name, cast("Adapted", module).base)
            found[first] = A, B
        return found


def _zeros(linear: Projection) -> float:
    return float((linear.weight == 0).float().mean())


def _plain(factors: Factors | None) -> list | Factors | None:
    """Something that JSON can hold and that differs where factors do."""
    return factors and [
        [*place, *(_hash(t.detach().float().cpu().numpy().tobytes()) for t in pair)]
        for place, pair in sorted(factors.items())
    ]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
