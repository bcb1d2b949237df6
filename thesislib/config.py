"""A notebook's parameters: read from its one tagged cell into a typed, frozen dataclass that checks them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from thesislib.errors import BadInput, shown, unknown

T = TypeVar("T")
# what nobody means is refused before it asks for all memory: counts above these
MOST = 1_000_000
LARGEST = {
    "batch": 65_536,
    "workers": 512,
    "threads": 512,
    "jobs": 512,
    "repeats": 10_000,
    "retries": 100,
    "rank": 65_536,
}


def settings(kind: type[T], namespace: Mapping[str, Any]) -> T:
    """The parameters of a notebook as a `kind`: the values that a namespace (`globals()`) has under the names of its
    fields, the defaults of the rest.

    Other names are the notebook's own; a misspelt parameter is refused before a notebook runs
    (`thesislib.notebooks.check_names`).

    Raises:
        BadInput: a value of the wrong type, or one that its own check refuses.
    """
    return build(
        kind, {f.name: namespace[f.name] for f in dataclasses.fields(typing.cast(Any, kind)) if f.name in namespace}
    )


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """`kind(**values)`, each value checked against its annotation.

    Raises:
        BadInput: a name `kind` does not have, a value of the wrong type, or one its own check refuses.
    """
    every = typing.get_type_hints(kind)
    hints = {name: every[name] for name in fields_of(kind)}
    if not isinstance(values, Mapping):
        raise BadInput(
            f"the settings of {kind.__name__} are {shown(values)}: expected a mapping, such as "
            f"{{{next(iter(hints))}: value}}"
        )
    for name, value in values.items():
        if name not in hints:
            raise unknown(f"parameter of {kind.__name__}", name, hints)
        if not _fits(value, hints[name]):
            raise BadInput(f"parameter '{name}' is {value!r} ({type(value).__name__}): expected {_called(hints[name])}")
    return kind(**values)


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by name, those that it shares with others (keyword-only) last."""
    return {f.name: f for f in sorted(dataclasses.fields(kind), key=lambda f: bool(f.kw_only))}


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)


def _called(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("NoneType", "None")


def positive(**values: int | None) -> None:
    """Raises BadInput for the first value that is neither None nor from 1 to what `LARGEST` has for its name."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise BadInput(f"parameter '{name}' is {value}: expected at least 1")
        if value is not None and value > LARGEST.get(name, MOST):
            raise BadInput(f"parameter '{name}' is {value}: expected at most {LARGEST.get(name, MOST):,}")


def check_seed(seed: int) -> None:
    """Raises BadInput for a seed that some generator does not take."""
    if not 0 <= seed < 1 << 32:
        raise BadInput(f"parameter 'seed' is {seed}: expected 0 to {(1 << 32) - 1:,}")
