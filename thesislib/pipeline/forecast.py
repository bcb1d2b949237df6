"""The sizes after each stage of a recipe, computed from shapes alone: no weight is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from thesislib.bounds import read_sizes
from thesislib.compress.outline import Outline, SizeUnknown
from thesislib.compress.stage import Shape
from thesislib.errors import BadInput
from thesislib.formats.checkpoint import quiet_transformers
from thesislib.formats.sizes import predicted_disk_bytes
from thesislib.model.layers import base_of
from thesislib.model.quantised import quantised_embeddings
from thesislib.model.subject import DTYPES, Subject
from thesislib.pipeline.recipe import Recipe


@dataclass(frozen=True)
class Forecast:
    """The sizes after one stage of a recipe, before it is run.

    Sizes are exact under these conditions:

    - The subject itself has no zeros, and a pruned weight obeys no other pattern than pruning gave it.
    - An adapter that is kept has no zeros, and one that is merged dense fills all zeros.
    - EoRA uses its whole rank, or its whole budget of bytes.

    A size is None if only the run can tell it:

    - Non-zero parameters, once weights are rounded: some become zero. Also once biases replace removed blocks: those of
      blocks before no gap are zero.
    - Bytes too, once such zeros are in a weight that is no longer quantised (`merge: masked` or width pruning after
      quantisation), and after a second width stage, unless the first one's pattern determines the number of zeros (W2:4
      after W1:8, but not W1:4 after W2:8).
    - All sizes, from a stage on that lets a metric choose among blocks of different sizes; that has settings for single
      blocks after a metric chose which of them lost a part; that removes, merges or converts some of the corrections
      that share a budget; or that has no `outline`.
    - All sizes if the subject is an artifact, to which any of this may apply.

    Attributes:
        label: of the stages so far.
        cached: whether the cache has their result; then the sizes are its own.
        parameters: as `thesislib.formats.sizes.sizes` counts.
        nonzero: parameters other than zero.
        disk_bytes: of an artifact's files of weights.
    """

    label: str
    cached: bool
    parameters: int | None
    nonzero: int | None
    disk_bytes: int | None


def forecast(
    recipe: Recipe, empty: Subject | None, cached: Callable[[int], Mapping[str, int] | None]
) -> list[Forecast]:
    """The sizes after each stage, from the cache or else from shapes alone.

    Args:
        recipe: the stages.
        empty: the subject without weights; None if shapes do not tell its sizes.
        cached: gives the sizes after the first n stages out of the cache, or None.

    Raises:
        BadInput: a stage that the run would refuse for its shapes, such as a rank larger than a projection.
    """
    outline = Outline(empty) if empty is not None else None
    rows = []
    for n, (stage, location) in enumerate(zip(recipe.stages, recipe.locations, strict=True), 1):
        try:
            if outline:
                stage.outline(outline)
        except SizeUnknown:
            outline = None
        except BadInput as error:
            raise BadInput(f"{location}: {error}") from error
        values: tuple[int | None, ...] = sizes(outline) if outline else (None, None, None)
        if kept := cached(n):
            values = kept["parameters"], kept["nonzero_parameters"], kept["bytes_on_disk"]
        rows.append(Forecast(recipe.label_of(n), bool(kept), *values))
    return rows


def sizes(outline: Outline) -> tuple[int, int | None, int | None]:
    """Parameters, those other than zero, and bytes of weights on disk; None for what only the run can tell."""
    subject = outline.subject
    linears = (module for i in range(subject.depth) for module in subject.linears(i).values())
    bases: list[Any] = [base_of(module) for module in linears]  # all are `Outlined`
    sure, parameters = all(base.zeros is not None for base in bases), subject.parameters
    rounded = bool(quantised_embeddings(subject.model)) or any(base.rounded for base in bases)
    nonzero = parameters - sum(base.pruned for base in bases) if sure and not (rounded or outline.biased) else None
    return parameters, nonzero, predicted_disk_bytes(subject) if sure else None


def stand_in(folder: Path, dtype: str = "float32") -> Subject:
    """The subject that the config.json of a checkpoint folder describes, without weights and tokenizer.

    Raises:
        BadInput: a configuration that transformers cannot read.
    """
    read_sizes(folder)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        subject = Subject(model, None, folder.name)
        subject.linears(0)
    except Exception as error:  # each kind of nonsense in a configuration has its own class
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{folder} is not a checkpoint that transformers can read ({why})") from error
    return subject


def shape_of(subject: Subject) -> Shape:
    """The shape of a subject, see `thesislib.compress.stage.Shape`."""
    linears = (item for i in range(subject.depth) for item in subject.linears(i).items())
    return Shape(subject.depth, {name: module.in_features for name, module in linears})
