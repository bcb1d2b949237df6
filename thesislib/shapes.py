"""A small schema language for JSON data: a value out of a file is checked against a shape before it is used.

A shape is one of:

- `str` (text that UTF-8 can encode), `int`, `float` (finite; an int fits too), `bool`, `list`, `dict` or None;
- a tuple of shapes: the value fits one of them;
- `[shape]`: a list whose elements all fit;
- `{str: shape}`: a dict with any keys, whose values all fit;
- `{"name": shape, "name?": shape}`: a dict with these keys, those with "?" optional, and any others;
- a compiled regular expression, which a whole text must match;
- a function that returns True for a value that fits; its docstring names what is expected.
"""

import math
import re
from typing import Any

LARGEST = 2**63  # of integers: counts of bytes and parameters are below
SHA256 = re.compile("[0-9a-f]{64}")
NAMES: dict[Any, str] = {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}
NAMES |= {list: "a list", dict: "an object", None: "null"}


def natural(value: Any) -> bool:
    """a whole number from 0"""
    return type(value) is int and 0 <= value < LARGEST


def positive(value: Any) -> bool:
    """a finite number from 0"""
    return _is(value, float) and value >= 0


def wrong(value: Any, shape: Any, where: str = "") -> str | None:
    """The first part of a value that does not fit its shape, as an error message; None if all fits.

    Args:
        value: as `json` reads it.
        shape: see above.
        where: the path of the value in its file, with dots.

    >>> wrong({"n": 3, "plan": [0, "1"]}, {"n": natural, "plan": (None, [natural]), "unit?": str})
    "plan.1 is '1': expected a whole number from 0"
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            parts = [(key, shape[str]) for key in value]
        else:
            missing = next((key for key in shape if not key.endswith("?") and key not in value), None)
            if missing is not None:
                return f"{f'{where}.{missing}'.lstrip('.')} is missing"
            parts = [(key, inner) for name, inner in shape.items() if (key := name.removesuffix("?")) in value]
        return next(filter(None, (wrong(value[key], inner, f"{where}.{key}") for key, inner in parts)), None)
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (wrong(v, shape[0], f"{where}.{i}") for i, v in enumerate(value))), None)
    if isinstance(shape, tuple):
        reasons = [wrong(value, inner, where) for inner in shape]
        if None in reasons:
            return None
        for reason, inner in zip(reasons, shape, strict=True):
            if isinstance(inner, (dict, list)) and isinstance(value, type(inner)):
                return reason  # of the option that the value was meant to fit
    elif _is(value, shape):
        return None
    return f"{where.lstrip('.') or 'it'} is {_shown(value)}: expected {_words(shape)}"


def _is(value: Any, shape: Any) -> bool:
    """Whether a value fits a shape that is neither a tuple nor has shapes in it."""
    if shape is None:
        return value is None
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if shape is str:
        return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))
    if shape is int:
        return type(value) is int and abs(value) < LARGEST
    if shape is float:
        return (type(value) is int and abs(value) < LARGEST) or (type(value) is float and math.isfinite(value))
    if isinstance(shape, type):
        return isinstance(value, shape)
    return callable(shape) and shape(value)


def _words(shape: Any) -> str:
    """A shape as a message names it."""
    if isinstance(shape, tuple):
        return " or ".join(dict.fromkeys(map(_words, shape)))
    if isinstance(shape, (dict, list)):
        return NAMES[type(shape)]
    if isinstance(shape, re.Pattern):
        return f"a text like {shape.pattern}"
    return NAMES.get(shape, shape.__doc__)


def _shown(value: Any) -> str:
    """A value as a message names it: a list by its length, a long text by its beginning."""
    if isinstance(value, (list, dict)):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    if type(value) is int and abs(value) >= LARGEST:
        return "a number of many digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
