"""What a recipe would make, told from shapes alone: no weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from thesislib.compress.depth import Depth, remove
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.files import read_json
from thesislib.formats import RECORD, predicted_disk_bytes
from thesislib.packing import LARGEST, Pattern
from thesislib.recipe import Shape
from thesislib.subject import DTYPES, Subject, quiet_transformers

if TYPE_CHECKING:
    from thesislib.checkpoints import Job


@dataclass(frozen=True)
class Forecast:
    """One stage of a recipe before it is run.

    Attributes:
        label: of the stages so far.
        cached: whether the cache holds their result; then the sizes are its own.
        parameters, nonzero, disk_bytes: after the stage, as `thesislib.formats.sizes` counts; None where only the run can
            tell. A subject's own zeros are not foreseen.
    """

    label: str
    cached: bool
    parameters: int | None
    nonzero: int | None
    disk_bytes: int | None


def forecast(job: "Job") -> list[Forecast]:
    """What each stage will make, from shapes alone, and what the cache already holds."""
    # real memory, of which nothing is ever touched: the packer tells tensors apart by where they lie
    subject = stand_in(job.source, job.dtype)
    subject.model.to_empty(device="cpu").tie_weights()
    known = job.made is None  # an artifact may be packed or adapted already
    removed: str | float = 0.0
    rows = []
    for n, stage in enumerate(job.recipe.stages, 1):
        if isinstance(stage, Depth):
            subject = remove(subject, range(stage.count) if stage.blocks is None else stage.blocks, stage.part)
        elif isinstance(stage, Width) and removed == 0 and not stage.ratios and stage.linears == ("*",) and (stage.of or 0) <= LARGEST:
            removed = f"{stage.remove}:{stage.of}" if stage.of else stage.ratio
        elif not getattr(stage, "keeps_sizes", False):
            known = False
        try:
            found = read_json(job.folder(n) / RECORD)["sizes"]
            rows.append(Forecast(job.label(n), True, found["parameters"], found["nonzero_parameters"], found["bytes_on_disk"]))
        except (BadInput, KeyError, TypeError):
            sizes = (subject.parameters, subject.parameters - _zeros(subject, removed), predicted_disk_bytes(subject, removed)) if known else (None,) * 3
            rows.append(Forecast(job.label(n), False, *sizes))
    return rows


def _zeros(subject: Subject, removed: str | float) -> int:
    """How many weights a width stage sets to zero: a pattern such as "1:8", or a share of each row."""
    total = 0
    for block in range(subject.depth):
        for linear in subject.linears(block).values():
            if isinstance(removed, str):
                pattern = Pattern.parse(removed)
                total += linear.weight.numel() // pattern.of * pattern.remove
            else:
                total += linear.out_features * int(linear.in_features * removed)
    return total


def stand_in(folder: Path, dtype: str = "float32") -> Subject:
    """The subject in a checkpoint folder as its config.json describes it, without weights and without a tokenizer.

    Raises:
        BadInput: a configuration that transformers cannot read.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=DTYPES[dtype])
        stands = Subject(model, None, folder.name)
        stands.linears(0)
    except Exception as error:  # each kind of nonsense in a configuration has its own class
        raise BadInput(f"{folder} is not a checkpoint that transformers can read ({str(error).splitlines()[0]})") from error
    return stands


def shape_of(subject: Subject) -> Shape:
    """Its depth, and the inputs of each projection's rows."""
    return Shape(subject.depth, {name: m.in_features for i in range(subject.depth) for name, m in subject.linears(i).items()})
