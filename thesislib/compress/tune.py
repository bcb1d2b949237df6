"""The last blocks and the head trained with all their weights, which heals a pruned model (Lu et al. 2024)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from thesislib.compress.outline import Outline, Outlined, SizeUnknown, Zeros, empty
from thesislib.compress.selection import whole_number
from thesislib.compress.stage import Shape, Stage, stage
from thesislib.compress.trainable import check_not_quantised, check_trainable, with_weights
from thesislib.compress.training import Trained
from thesislib.errors import BadInput
from thesislib.model.blocks import apply_plan, shell
from thesislib.model.layers import replace
from thesislib.model.subject import Subject

HEAD = "head"


@stage("tune")
@dataclass(frozen=True)
class Tune(Trained):
    """Train all weights of the last `blocks` blocks, and of the head if asked.

    Lu et al. (Reassessing Layer Pruning in LLMs, arXiv 2411.15558) heal a model that lost its last blocks by its head
    and its last three blocks, and find that better than LoRA: for Llama-3.1-8B-Instruct a mean accuracy of .5807
    against .5268. Their learning rate is 1e-5; the default here is a guess for models of some hundred million
    parameters. The final norm is not trained. Weights that pruning has set to zero are trained like others: prune after
    this stage.

    Attributes:
        blocks: how many of the last blocks; 0 for the head alone.
        head: train the output embedding too. If it is tied to the input embedding it becomes a matrix of its own: the
            artifact grows by as much as the embedding has.
        learning_rate: of AdamW.
    """

    blocks: int = 3
    head: bool = False
    learning_rate: float = field(default=1e-4, kw_only=True)

    family: ClassVar[str] = "trained"
    pattern: ClassVar[str] = r"FT(\d+)(H?)"
    title: ClassVar[str] = "tune"

    def __post_init__(self):
        super().__post_init__()
        if self.blocks < 0 or (self.blocks == 0 and not self.head):
            raise BadInput(f"blocks is {self.blocks}: expected at least 1 block to train, or 0 with the head")

    @property
    def label(self) -> str:
        """FT3 for three blocks, FT3H if the head is trained too."""
        return f"FT{self.blocks}{'H' if self.head else ''}"

    @property
    def in_words(self) -> str:
        """See `Stage`."""
        last = {0: "", 1: "the last block"}.get(self.blocks, f"the last {self.blocks} blocks")
        what = " and ".join(filter(None, [last, "the head" if self.head else ""]))
        return f"{what} trained on {'WikiText-2' if self.text == 'wikitext' else 'TriviaQA'}"

    @classmethod
    def from_label(cls, part: str) -> "Tune | None":
        """See `Stage`."""
        match = re.fullmatch(cls.pattern, part, re.ASCII)
        return cls(blocks=whole_number(match[1]), head=bool(match[2])) if match else None

    def last(self, depth: int) -> range:
        """The blocks that are trained, of a model of `depth`.

        Raises:
            BadInput: it has fewer.
        """
        if self.blocks > depth:
            raise BadInput(f"cannot train the last {self.blocks} blocks: the model has {depth}")
        return range(depth - self.blocks, depth)

    def after(self, previous: Sequence[Stage], shape: Shape | None = None) -> Shape | None:
        """See `Stage`."""
        check_not_quantised(self, previous)
        if shape is not None:
            self.last(shape.depth)
        return super().after(previous, shape)

    def outline(self, outline: Outline) -> None:
        """See `Stage`."""
        if outline.lost:
            raise SizeUnknown
        last, subject = self.last(outline.subject.depth), outline.subject
        if any((b, name) in outline.budgeted for b in last for name in subject.linears(b)):
            raise SizeUnknown
        check_trainable(self, subject, last)
        for b in last:
            for name, module in subject.linears(b).items():
                replace(subject.blocks[b], name, Outlined(module, outline.dtype, Zeros()))
        outline.changed = set()
        if self.head and _check_head(subject):
            weight = subject.model.get_output_embeddings().weight
            own = empty({HEAD: (tuple(weight.shape), weight.dtype)})[HEAD]
            outline.subject = _with_head(subject, nn.Parameter(own, requires_grad=False))

    def apply(self, subject: Subject, *, data: str = "embedded", work: Path | None = None) -> tuple[Subject, dict]:
        """The subject with the trained weights, and a report of the training.

        It shares the remaining weights with `subject`. With `work` there are checkpoints, see
        `thesislib.compress.lora.stage.Lora.apply`. Training is in float32; the weights are then rounded to the
        subject's dtype. The report says whether the head was untied.

        Raises:
            BadInput: fewer blocks; packed, quantised or corrected weights in the last ones, or blocks that the plan
                repeats; a quantised head; text that cannot be used; a loss that is not finite; a full disk.
        """
        last = self.last(subject.depth)
        check_trainable(self, subject, last)
        untied = self.head and _check_head(subject)
        student = subject.copy()
        parameters = {f"{b}.{name}": p for b in last for name, p in student.blocks[b].named_parameters()}
        if self.head:
            weight = student.model.get_output_embeddings().weight
            student = _with_head(student, nn.Parameter(weight.detach().clone()))
            parameters[HEAD] = student.model.get_output_embeddings().weight
        best, report = self.train(subject, student, parameters, data, work)
        changed = {b: {name: best[f"{b}.{name}"] for name, _ in subject.blocks[b].named_parameters()} for b in last}
        result = with_weights(subject, changed)
        if self.head:
            new = best[HEAD].to(subject.model.get_output_embeddings().weight.dtype)
            result = _with_head(result, nn.Parameter(new, requires_grad=False))
        return result, {"blocks": list(last), "head": self.head, "untied": untied, **report}


def _check_head(subject: Subject) -> bool:
    """Whether the head is tied to the input embedding.

    Raises:
        BadInput: it is no dense linear without bias.
    """
    head = subject.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise BadInput("tune trains a dense head, and this one is quantised or has a bias: leave it out, head: false")
    return bool(subject.model.config.tie_word_embeddings)


def _with_head(subject: Subject, weight: nn.Parameter) -> Subject:
    """The subject with an output embedding (V, D) of its own; it shares all remaining weights."""
    out = apply_plan(subject, range(subject.depth))
    model: Any = out.model
    model.lm_head = shell(model.lm_head)
    model.lm_head.weight = weight
    model.config.tie_word_embeddings = False
    return Subject(out.model, out.tokenizer, out.name, subject.plan)
