"""Parameters of notebooks and stages: values checked against the fields of a frozen dataclass."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from thesislib.errors import BadInput, shown, unknown

T = TypeVar("T")
# Larger counts are typing errors: they are refused before they ask for all memory.
MAX_COUNT = 1_000_000
MAX_COUNTS = {"batch": 65_536, "rank": 65_536, "repeats": 10_000, "retries": 100}
MAX_COUNTS |= dict.fromkeys(("workers", "threads", "jobs"), 512)


def settings(parameters: type[T], namespace: Mapping[str, Any]) -> T:
    """The parameters of a notebook: an instance of the dataclass `parameters`.

    A field takes the value that `namespace` (the notebook's `globals()`) has under its name, else its default. Other
    names are the notebook's own variables: a misspelt parameter is refused earlier, before the notebook runs
    (`thesislib.notebooks.check_names`).

    Raises:
        BadInput: a value of the wrong type, or one that the dataclass's own check refuses.
    """
    return build(parameters, {name: namespace[name] for name in fields_of(parameters) if name in namespace})


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """`cls(**values)`, each value checked against its annotation.

    Raises:
        BadInput: a name that `cls` does not have, a value of the wrong type, or one that its own check refuses.
    """
    all_hints = typing.get_type_hints(cls)
    hints = {name: all_hints[name] for name in fields_of(cls)}
    if not isinstance(values, Mapping):
        raise BadInput(
            f"the settings of {cls.__name__} are {shown(values)}: expected a mapping, such as "
            f"{{{next(iter(hints))}: value}}"
        )
    for name, value in values.items():
        if name not in hints:
            raise unknown(f"parameter of {cls.__name__}", name, hints)
        if not _fits(value, hints[name]):
            raise BadInput(f"parameter '{name}' is {value!r} ({type(value).__name__}): expected {_text(hints[name])}")
    return cls(**values)


def fields_of(cls: Any) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by name, keyword-only ones (which stages share) last."""
    return {f.name: f for f in sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only))}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation's type: an int is a float too, a bool is neither."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)


def _text(hint: Any) -> str:
    """An annotation as a message spells it."""
    return str(hint).replace("NoneType", "None") if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def positive(**values: int | None) -> None:
    """Raises BadInput for the first value that is neither None nor a count from 1 to its name's largest."""
    for name, value in values.items():
        largest = MAX_COUNTS.get(name, MAX_COUNT)
        if value is not None and value < 1:
            raise BadInput(f"parameter '{name}' is {value}: expected at least 1")
        if value is not None and value > largest:
            raise BadInput(f"parameter '{name}' is {value}: expected at most {largest:,}")


def check_seed(seed: int) -> None:
    """Raises BadInput for a seed that numpy's or torch's generators do not take."""
    if not 0 <= seed < 1 << 32:
        raise BadInput(f"parameter 'seed' is {seed}: expected 0 to {(1 << 32) - 1:,}")
