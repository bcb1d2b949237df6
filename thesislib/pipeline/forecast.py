"""What a recipe would make, told from shapes alone: no weight is read."""

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
    """One stage of a recipe before it is run.

    Sizes are exact where these hold. The subject itself has no zeros, and a pruned weight no pattern but those that
    follow from how it was pruned. An adapter that is kept has no zeros; one that is merged dense fills all of them;
    EoRA finds as many directions as it is asked for, or as its budget of bytes buys.

    None is what only the run can tell. Non-zero parameters, once weights are rounded: some become zero. Bytes too, once
    such zeros are in a weight that is no longer quantised (`merge: masked` or width pruning after quantisation), and
    after a second width stage unless the first one's pattern fixes how many zeros there are then (W2:4 after W1:8, but
    not W1:4 after W2:8). Everything, from a stage on that: lets a metric choose among blocks that differ in size; has
    settings for single blocks after a metric chose which of them lost a part; removes, merges or converts some of
    the corrections among which a budget was shared out; is not known here. Also everything for an artifact as the
    subject, which may hold any of this already.

    Attributes:
        label: of the stages so far.
        cached: whether the cache holds their result; then the sizes are its own.
        parameters, nonzero, disk_bytes: after the stage, as `thesislib.formats.sizes.sizes` counts and as an
            artifact's files of weights.
    """

    label: str
    cached: bool
    parameters: int | None
    nonzero: int | None
    disk_bytes: int | None


def forecast(
    recipe: Recipe, empty: Subject | None, cached: Callable[[int], Mapping[str, int] | None]
) -> list[Forecast]:
    """What each stage will make, from shapes alone, and what the cache already holds.

    Args:
        recipe: the stages.
        empty: the subject without weights; None if sizes cannot be known from shapes.
        cached: the sizes after the first n stages, as the cache has them, or None.

    Raises:
        BadInput: a stage that the run would refuse for the shapes that it meets, such as a rank larger than a
            projection.
    """
    outline = Outline(empty) if empty is not None else None
    rows = []
    for n, (stage, where) in enumerate(zip(recipe.stages, recipe.places, strict=True), 1):
        try:
            if outline:
                stage.outline(outline)
        except SizeUnknown:
            outline = None
        except BadInput as error:
            raise BadInput(f"{where}: {error}") from error
        if kept := cached(n):
            rows.append(
                Forecast(
                    recipe.label_of(n), True, kept["parameters"], kept["nonzero_parameters"], kept["bytes_on_disk"]
                )
            )
        else:
            rows.append(Forecast(recipe.label_of(n), False, *(sizes(outline) if outline else (None,) * 3)))
    return rows


def sizes(outline: Outline) -> tuple[int, int | None, int | None]:
    """Parameters, those that are not zero, and bytes of weights on disk; None for what only the run can tell."""
    subject = outline.subject
    bases: list[Any] = [
        base_of(module) for i in range(subject.depth) for module in subject.linears(i).values()
    ]  # all are `Outlined`
    sure, parameters = all(base.zeros is not None for base in bases), subject.parameters
    rounded = bool(quantised_embeddings(subject.model)) or any(base.grid for base in bases)
    nonzero = parameters - sum(base.gone for base in bases) if sure and not rounded else None
    return parameters, nonzero, predicted_disk_bytes(subject) if sure else None


def stand_in(folder: Path, dtype: str = "float32") -> Subject:
    """The subject in a checkpoint folder as its config.json describes it, without weights and without a tokenizer.

    Raises:
        BadInput: a configuration that transformers cannot read.
    """
    read_sizes(folder)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=DTYPES[dtype]
            )
        stands = Subject(model, None, folder.name)
        stands.linears(0)
    except Exception as error:  # each kind of nonsense in a configuration has its own class
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{folder} is not a checkpoint that transformers can read ({why})") from error
    return stands


def shape_of(subject: Subject) -> Shape:
    """Its depth, and the inputs of each projection's rows."""
    return Shape(
        subject.depth, {name: m.in_features for i in range(subject.depth) for name, m in subject.linears(i).items()}
    )
