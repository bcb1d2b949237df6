"""Which projections a stage takes: by name, by pattern, or by the block they stand in."""

import fnmatch
from collections.abc import Iterable

from thesislib.bounds import MAX_SIZES
from thesislib.errors import BadInput, unknown
from thesislib.model.layers import LINEARS

MOST_BLOCKS = MAX_SIZES["num_hidden_layers"]


def patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns that a setting gives, checked: 'q_proj', '*_proj', 'blocks.3.*', '*' for all.

    Raises:
        BadInput: a pattern that fits no projection of any model.
    """
    given = (given,) if isinstance(given, str) else tuple(given)
    for pattern in given:
        if not any(fits(pattern, i, name) for i in range(MOST_BLOCKS) for name in LINEARS):
            raise unknown("projection or pattern", pattern, LINEARS)
    return given


def check_all_fit(given: Iterable[str], depth: int) -> None:
    """Raises BadInput for a pattern that names nothing in a model of `depth` blocks, such as 'blocks.30.*' of 30."""
    for pattern in given:
        if not any(fits(pattern, i, name) for i in range(depth) for name in LINEARS):
            raise BadInput(
                f"no projection fits '{pattern}': the model has {', '.join(LINEARS)} in blocks 0 to {depth - 1}"
            )


def fits(pattern: str, block: int, name: str) -> bool:
    """Whether a pattern names projection `name` of a block."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"blocks.{block}.{name}", pattern)


def whole_number(text: str) -> int:
    """The number that digits of a label write.

    Raises:
        BadInput: more digits than any number here has.
    """
    if len(text) > 18:
        raise BadInput(f"{text[:18]}... is too large a number")
    return int(text)
