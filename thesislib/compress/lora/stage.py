"""LoRA recovery (Hu et al. 2021): low-rank corrections of projections, trained on text after compression."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import nn

from thesislib.compress.lora.sequences import TEXTS, sequences
from thesislib.compress.lora.train import Factors, Training
from thesislib.compress.outline import Outline, Outlined, SizeUnknown, Zeros, corrected
from thesislib.compress.selection import LinearKey, fits, patterns, selected
from thesislib.compress.stage import Shape, Stage, stage
from thesislib.compress.training import Trained, bfloat16_is_fast
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
class Lora(Trained):
    """Train low-rank corrections y + (alpha / rank) x Aᵀ Bᵀ of `linears`; the model's own weights stay fixed.

    The default learning rate lies between 2e-4, usual for models of 7 billion parameters, and 4e-3, the best in chapter
    4 for 135 million (held-out loss, 48 steps).

    Attributes:
        linears: names or patterns of projections, e.g. 'q_proj', '*_proj', 'blocks.3.*'; the thesis's four by default.
        rank: of the corrections; the thesis's by default.
        alpha: the corrections' scale is alpha / rank.
        dropout: of the corrections' inputs during training.
        init: initial factors. default: A uniform, B zero. gaussian, orthogonal: as in PEFT. eora: those of the
            subject's own corrections, from an EoRA stage of the same rank, which are trained instead of new ones.
        merge: beside, masked or dense, see `MERGES`.
    """

    linears: str | list | tuple = THESIS_LINEARS
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.1
    init: str = "default"
    merge: str = "beside"

    family: ClassVar[str] = "trained"
    title: ClassVar[str] = "LoRA"
    pattern: ClassVar[str] = r"[WT](-masked|-dense)?"

    def __post_init__(self):
        super().__post_init__()
        for name, options in {"init": INITS, "merge": MERGES}.items():
            if getattr(self, name) not in options:
                raise unknown(f"{name} of LoRA", getattr(self, name), options)
        self._normalise(linears=patterns(self.linears))
        if self.rank < 1:
            raise BadInput(f"rank {self.rank} is too small: expected at least 1")
        if not self.linears:
            raise BadInput("linears is empty: LoRA needs some linears, such as q_proj")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout {self.dropout}: expected a number in [0, 1)")
        if not 0 < self.alpha < math.inf:
            raise BadInput(f"alpha {self.alpha}: expected a positive number")
        if self.init == "orthogonal" and self.rank % 2:
            raise BadInput(f"rank {self.rank} is odd: init 'orthogonal' pairs rows and needs an even one")

    @property
    def label(self) -> str:
        """As in the thesis: W for WikiText, T for TriviaQA; W-masked or W-dense if the adapter is merged."""
        return ("W" if self.text == "wikitext" else "T") + ("" if self.merge == "beside" else f"-{self.merge}")

    @property
    def shown(self) -> str:
        """See `Stage`: LoRA(wiki) or LoRA(trivia), since W is width's letter too."""
        return f"LoRA({'wiki' if self.text == 'wikitext' else self.text}{self.label[1:]})"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        merged = "" if self.merge == "beside" else f", merged {self.merge}"
        return f"LoRA trained on {'WikiText-2' if self.text == 'wikitext' else 'TriviaQA'}{merged}"

    @classmethod
    def from_label(cls, part: str) -> "Lora | None":
        """See `Stage`."""
        return next((c for text in TEXTS for merge in MERGES if (c := cls(text=text, merge=merge)).label == part), None)

    @property
    def leaves_corrections(self) -> bool:
        """See `Stage`."""
        return self.merge == "beside"

    def takes(self, block: int, name: str) -> bool:
        """Whether a projection is adapted."""
        return any(fits(pattern, block, name) for pattern in self.linears)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`: `init: eora` needs a correction to train, and a rank is at most a projection's inputs."""
        if self.init == "eora" and not any(stage.leaves_corrections for stage in previous):
            raise BadInput(
                "init 'eora' trains the corrections that an EoRA stage made: put one before it, or use init 'default'"
            )
        if shape is not None:
            for name, inputs in shape.inputs.items():
                if self.rank > inputs and any(self.takes(block, name) for block in range(shape.depth)):
                    raise BadInput(f"rank {self.rank} is larger than {name}, which has {inputs} inputs")
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        outline.check_alike(self.takes)
        adapted = {key for keys in self.shared_keys(outline.subject) for key in keys}
        replaced = self.merge != "beside" or self.init == "eora"
        if outline.budgeted - adapted and (replaced or outline.dtype != torch.float32):
            raise SizeUnknown

        def trained(module: Projection, _: bool) -> Projection:
            base = cast("Outlined", base_of(module))
            if self.merge == "masked":
                return Outlined(base, outline.dtype, None if base.grid else base.zeros)
            if self.merge == "dense":
                return Outlined(base, outline.dtype, Zeros())
            return corrected(base if self.init == "eora" else module, self.rank, torch.float32)

        outline.change(trained, self.takes)
        outline.changed = set()
        if replaced:
            outline.budgeted = set()

    def shared_keys(self, subject: Subject) -> list[list[LinearKey]]:
        """The (block, name) of each projection that is adapted, with those that share its weights.

        Projections share weights if a plan repeats their block.

        Raises:
            BadInput: a pattern that fits no projection; a rank larger than a projection.
        """
        every = selected(subject, lambda *_: True)
        for pattern in self.linears:
            if not any(fits(pattern, *key) for key in every):
                names = sorted({name for _, name in every}, key=LINEARS.index)
                raise BadInput(
                    f"no projection of {subject.name} fits '{pattern}': it has {', '.join(names)} in blocks 0 to "
                    f"{subject.depth - 1}"
                )
        shared: dict[nn.Module, list[LinearKey]] = {}
        for (block, name), module in selected(subject, self.takes).items():
            rows, columns = module.out_features, module.in_features
            if self.rank > min(rows, columns):
                raise BadInput(
                    f"rank {self.rank} is larger than {name} of block {block}, of shape ({rows}, {columns}): "
                    f"expected at most {min(rows, columns)}"
                )
            # shared weights get one adapter for all blocks, even if the setting fits only one of these
            shared.setdefault(module, [key for key, m in every.items() if m is module])
        return list(shared.values())

    def apply(
        self, subject: Subject, *, data: str = "embedded", work: Path | None = None, initial: Factors | None = None
    ) -> tuple[Subject, dict]:
        """A copy of the subject with the trained adapter, beside its weights or merged into them, and a report.

        The report has the loss, the learning rate and the validation loss by step, the best step, and the training
        text. With `work` there are checkpoints, from which a killed run continues: on the same processor, with as many
        threads, its result has the same bits. Projections that share weights, since a plan repeats their block, share
        one adapter. A projection that is adapted already gets a second correction, joined with the first, unless `init`
        is eora.

        Args:
            subject: the subject to train.
            data: a data spec for the training text.
            work: a folder for checkpoints.
            initial: with init 'eora' the initial factors, e.g. of `thesislib.compress.eora.start`; by default those of
                the subject.

        Raises:
            BadInput: see `shared_keys` and `thesislib.compress.lora.sequences.sequences`; init 'eora' without factors
                of this rank; a loss that is not finite; a full disk.
        """
        if initial is not None and self.init != "eora":
            raise BadInput(f"init '{self.init}' makes its own factors: use init 'eora' to begin with given ones")
        shared = self.shared_keys(subject)
        split = sequences(self.text, subject, data, length=self.length, validation=self.validation, seed=self.seed)
        autocast = bfloat16_is_fast(subject.device) if self.autocast is None else self.autocast
        # stages that differ only in their merge share a checkpoint
        file = self.checkpoint(work, subject, split, autocast, "merge", initial=_hashes(initial))
        # packed weights stay packed if the adapter is kept beside them
        result = subject.copy(unpack=False)
        if self.init == "eora":
            initial = self._initial(result, shared, initial)
        with torch.random.fork_rng(devices=[subject.device] if subject.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            training = Training(self, result, shared, autocast, initial)
            best, trained = training.run(split, file)
            factors = training.factors(best)
        before, after = [], []
        for keys in shared:
            block, name = keys[0]
            old = result.linears(block)[name]
            new = merged(adapt(old, *factors[block, name]), self.merge)
            before.append(_zeros(old))
            after.append(_zeros(new))
            for block, name in keys:
                replace(result.blocks[block], name, new)
        result.model.eval()
        report = {
            "text": self.text,
            **split.facts,
            "sequences": len(split.train),
            "filled": split.train.filled,
            "autocast": autocast,
            "adapted": len(shared),
            "merge": self.merge,
            "weights": MERGES[self.merge],
            "zeros_before": sum(before) / len(before),
            "zeros_after": sum(after) / len(after),
        }
        return result, report | trained

    def _initial(self, subject: Subject, shared: list[list[LinearKey]], given: Factors | None) -> Factors:
        """The initial factors: those given, or those of the subject's corrections, which are removed from it."""
        factors = {}
        for keys in shared:
            first, name = keys[0]
            module = subject.linears(first)[name]
            if given is not None:
                A, B = given.get(keys[0], (None, None))
            else:
                A, B = (module.lora_A, module.lora_B) if isinstance(module, Adapted) else (None, None)
            if A is None or len(A) != self.rank:
                has = "none" if A is None else f"one of rank {len(A)}"
                raise BadInput(
                    f"init 'eora' begins with corrections of rank {self.rank}: {name} of block {first} has {has}"
                )
            if given is None:
                for block, name in keys:
                    replace(subject.blocks[block], name, cast("Adapted", module).base)
            factors[keys[0]] = A, B
        return factors


def _zeros(linear: Projection) -> float:
    """The share of zeros in a projection's weight."""
    return float((linear.weight == 0).float().mean())


def _hashes(factors: Factors | None) -> list | Factors | None:
    """Factors as JSON data: each projection with the hashes of its A and B."""
    return factors and [
        [*key, *(_hash(t.detach().float().cpu().numpy().tobytes()) for t in pair)]
        for key, pair in sorted(factors.items())
    ]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
