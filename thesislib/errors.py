"""The one exception for input that cannot work, with a message that says what would."""

import difflib
from collections.abc import Iterable

MOST = 60  # options that a message lists


class BadInput(ValueError):
    """The caller gave something that cannot work. The message names the value, what was expected and the nearest
    thing that would have worked; the command line prints it as one line and exits with 2."""


def unknown(what: str, value: object, options: Iterable[str]) -> BadInput:
    """The error for a name that is not among `options`, with the nearest one first."""
    options = list(options)
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    listed = ", ".join(options[:MOST]) + (f" and {len(options) - MOST} more" if len(options) > MOST else "")
    return BadInput(f"unknown {what} '{value}': {hint}expected one of {listed or 'none'}")
