"""The one exception for bad input; its message names something that would work."""

import difflib
from collections.abc import Iterable

MAX_OPTIONS = 60  # listed in a message
MAX_CHARACTERS = 200  # of a value in a message


class BadInput(ValueError):
    """The caller gave something that cannot work.

    The message names the value, what was expected and the nearest thing that would have worked. The command line
    prints it as one line and exits with 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: object) -> str:
    """A value in quotes, for a message: on one line, the middle of a long one left out."""
    text = printable(value if isinstance(value, str) else repr(value))
    if len(text) > MAX_CHARACTERS:
        text = f"{text[: MAX_CHARACTERS // 2]}...{text[-MAX_CHARACTERS // 4 :]}"
    return f"'{text}'"


def printable(text: object) -> str:
    """A text on one line: characters that a terminal would act on (newlines, escapes, bidi marks) are escaped.

    >>> print(printable("a\\nb"))
    a\\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def unknown(noun: str, value: object, options: Iterable[str]) -> BadInput:
    """The error for a name that is not among `options`, with the nearest one first.

    Args:
        noun: what the name should be the name of, e.g. "stage".
        value: the unknown name.
        options: the known names.
    """
    options = list(options)
    near = difflib.get_close_matches(str(value)[:MAX_CHARACTERS], options, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    listed = ", ".join(options[:MAX_OPTIONS])
    if len(options) > MAX_OPTIONS:
        listed += f" and {len(options) - MAX_OPTIONS} more"
    return BadInput(f"unknown {noun} {shown(value)}: {hint}expected one of {listed or 'none'}")
