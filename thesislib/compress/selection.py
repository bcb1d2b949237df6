"""The patterns that select a stage's projections, such as 'q_proj', '*_proj', 'blocks.3.*' and '*' for all."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from thesislib.bounds import MAX_SIZES
from thesislib.errors import BadInput, unknown
from thesislib.model import packing
from thesislib.model.beside import ranks_beside
from thesislib.model.layers import LINEARS, Adapted, Projection
from thesislib.model.quantised import is_quantised
from thesislib.model.subject import Subject

LinearKey = tuple[int, str]  # a projection by its block and its name

MOST_BLOCKS = MAX_SIZES["num_hidden_layers"]


def patterns(setting: str | Iterable[str]) -> tuple[str, ...]:
    """A stage's setting, one pattern or several, as a tuple.

    Raises:
        BadInput: a pattern that fits no projection of any model.
    """
    several = (setting,) if isinstance(setting, str) else tuple(setting)
    for pattern in several:
        if not any(fits(pattern, i, name) for i in range(MOST_BLOCKS) for name in LINEARS):
            raise unknown("projection or pattern", pattern, LINEARS)
    return several


def check_all_fit(patterns: Iterable[str], depth: int) -> None:
    """Raises BadInput for a pattern that fits no projection in `depth` blocks, such as 'blocks.30.*' in 30."""
    for pattern in patterns:
        if not any(fits(pattern, i, name) for i in range(depth) for name in LINEARS):
            raise BadInput(
                f"no projection fits '{pattern}': the model has {', '.join(LINEARS)} in blocks 0 to {depth - 1}"
            )


def fits(pattern: str, block: int, name: str) -> bool:
    """Whether a pattern fits projection `name` of a block."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"blocks.{block}.{name}", pattern)


def selected(subject: Subject, takes: Callable[[int, str], bool]) -> dict[LinearKey, Projection]:
    """The projections of a subject that a stage takes."""
    every = ((i, name, module) for i in range(subject.depth) for name, module in subject.linears(i).items())
    return {(i, name): module for i, name, module in every if takes(i, name)}


def check_dense(subject: Subject, blocks: Iterable[int], step: str) -> None:
    """Raises BadInput for a block with a weight that is not dense, see `check_all_dense`, or a linear path beside its
    MLP.

    Args:
        subject: the model.
        blocks: whose projections a step changes as wholes.
        step: in words, such as "merge blocks", for messages.
    """
    beside = ranks_beside(subject)
    for b in blocks:
        if b in beside:
            raise BadInput(f"the MLP of block {b} has a linear path beside it: {step} before calr")
        check_all_dense({(b, name): module for name, module in subject.linears(b).items()}, step)


def check_all_dense(linears: Mapping[LinearKey, Projection], step: str) -> None:
    """Raises BadInput for a weight that is quantised, packed, pruned or computed in another way, or has a correction
    beside it.

    Args:
        linears: which a step changes as wholes.
        step: in words, such as "merge blocks", for messages.
    """
    for (b, name), module in linears.items():
        where = f"{name} of block {b}"
        if is_quantised(module):
            raise BadInput(f"{where} is quantised: {step} before quantising")
        if isinstance(module, Adapted):
            raise BadInput(f"{where} has a low-rank correction: merge it into the weight, or {step} before it")
        if not isinstance(module, nn.Linear):
            what = getattr(module, "encoding", None) or type(module).__name__
            raise BadInput(f"{where} is no dense weight but {what}: {step} before changing weights")
        if packing.smallest(module.weight) != "dense":
            raise BadInput(f"{where} has zeros that would be filled: {step} before pruning weights")


def whole_number(text: str) -> int:
    """The number of a label's digits.

    Raises:
        BadInput: more than 18 digits.
    """
    if len(text) > 18:
        raise BadInput(f"{text[:18]}... is too large a number")
    return int(text)
