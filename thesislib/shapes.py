"""What plain data out of a file must look like, said in types, so that what is odd is named before it is used.

A shape is one of: `str` (text that can be written), `int`, `float` (finite; an int fits), `bool`, `list`, `dict`, None;
a tuple of shapes, one of which fits; [shape], a list of such; {str: shape}, such values under any names; {"name":
shape, "name?": shape}, a dict with these fields, those with "?" optional, and any others; a compiled pattern, for a
whole text; a function, for what is True of it.
"""

import math
import re
from typing import Any

LARGEST = 2**63  # of integers: what counts bytes and parameters is below
SHA256 = re.compile("[0-9a-f]{64}")
NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    None: "null",
}


def natural(value: Any) -> bool:
    """a whole number from 0"""
    return type(value) is int and 0 <= value < LARGEST


def positive(value: Any) -> bool:
    """a finite number from 0"""
    return _is(value, float) and value >= 0


def wrong(value: Any, shape: Any, where: str = "") -> str | None:
    """The first thing about a value that is not as its shape, in words; None if all is.

    >>> wrong({"n": 3, "plan": [0, "1"]}, {"n": natural, "plan": (None, [natural]), "unit?": str})
    "plan.1 is '1': expected a whole number from 0"
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            found = (wrong(v, shape[str], f"{where}.{k}") for k, v in value.items())
        else:
            lacking = next((k for k in shape if not k.endswith("?") and k not in value), None)
            if lacking is not None:
                return f"{f'{where}.{lacking}'.lstrip('.')} is missing"
            found = (
                wrong(value[k], inner, f"{where}.{k}")
                for key, inner in shape.items()
                if (k := key.removesuffix("?")) in value
            )
        return next(filter(None, found), None)
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (wrong(v, shape[0], f"{where}.{i}") for i, v in enumerate(value))), None)
    if isinstance(shape, tuple):
        reasons = [wrong(value, inner, where) for inner in shape]
        if None in reasons:
            return None
        deep = next(
            (
                r
                for r, inner in zip(reasons, shape, strict=True)
                if isinstance(inner, (dict, list)) and isinstance(value, type(inner))
            ),
            None,
        )
        if deep:
            return deep
    elif _is(value, shape):
        return None
    shown = (
        f"a list of {len(value)}"
        if isinstance(value, list)
        else "an object"
        if isinstance(value, dict)
        else _short(value)
    )
    return f"{where.lstrip('.') or 'it'} is {shown}: expected {_words(shape)}"


def _is(value: Any, shape: Any) -> bool:
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
    if isinstance(shape, tuple):
        return " or ".join(dict.fromkeys(map(_words, shape)))
    if isinstance(shape, (dict, list)):
        return NAMES[type(shape)]
    if isinstance(shape, re.Pattern):
        return f"a text like {shape.pattern}"
    return NAMES.get(shape, shape.__doc__)


def _short(value: Any) -> str:
    if type(value) is int and abs(value) >= LARGEST:
        return "a number of many digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
