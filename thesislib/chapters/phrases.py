"""How chapters write numbers, intervals and tests, so that the same thing reads the same on every page."""

import numpy as np

from thesislib.evaluate.stats import Comparison
from thesislib.evaluate.task import SHARE, Task
from thesislib.records.measurement import Measurement


def number(m: Measurement | None) -> str:
    """A value with its interval, four digits; nothing for no measurement."""
    return "" if m is None else f"{m.value:.4g} [{m.low:.4g}, {m.high:.4g}]"


def share(m: Measurement | None) -> str:
    """The same in percent."""
    return "" if m is None else f"{m.value:.1%} [{m.low:.1%}, {m.high:.1%}]"


def ratio(c: Comparison, form: str = ".3f") -> str:
    """The ratio of two perplexities, whose logarithms are compared, with its interval."""
    low, middle, high = (f"{np.exp(x):{form}}" for x in (c.low, c.difference, c.high))
    return f"x {middle} [{low}, {high}]"


def difference(c: Comparison, task: Task) -> str:
    """A comparison with its interval as its task has it: a ratio, points of percent, or a difference in the task's unit."""
    if task.ratio:
        return ratio(c)
    factor, form = (100, "+.1f") if task.unit == SHARE else (1, "+.4g")
    low, middle, high = (f"{factor * x:{form}}" for x in (c.low, c.difference, c.high))
    return f"{middle} [{low}, {high}]"


def p_value(p: float) -> str:
    """p = 0.012, or p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def expect(holds: bool, said: str) -> None:
    """Print whether a sentence holds in this run. It was found with the embedded model: that another one differs is a result and no error."""
    print(f"{'holds' if holds else 'does not hold for this subject'}: {said}")
