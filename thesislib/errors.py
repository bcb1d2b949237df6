"""The one exception for input that cannot work, with a message that says what would."""

import difflib
from collections.abc import Iterable

MOST = 60  # options that a message lists
LONGEST = 200  # characters of a value


class BadInput(ValueError):
    """The caller gave something that cannot work. The message names the value, what was expected and the nearest
    thing that would have worked; the command line prints it as one line and exits with 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: object) -> str:
    """A value in quotes as a message has it: on one line, the middle of a long one left out."""
    text = printable(value if isinstance(value, str) else repr(value))
    return f"'{text}'" if len(text) <= LONGEST else f"'{text[: LONGEST // 2]}...{text[-LONGEST // 4 :]}'"


def printable(text: object) -> str:
    """A text on one line, what a terminal would obey (ends of lines, escapes, directions of writing) as an escape.

    >>> print(printable("a\\nb"))
    a\\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def unknown(what: str, value: object, options: Iterable[str]) -> BadInput:
    """The error for a name that is not among `options`, with the nearest one first."""
    options = list(options)
    near = difflib.get_close_matches(str(value)[:LONGEST], options, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    listed = ", ".join(options[:MOST]) + (f" and {len(options) - MOST} more" if len(options) > MOST else "")
    return BadInput(f"unknown {what} {shown(value)}: {hint}expected one of {listed or 'none'}")
