"""How chapters write numbers, intervals and tests, so that the same thing reads the same on every page."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from thesislib.evaluate.stats import Comparison
from thesislib.evaluate.task import SHARE, Task
from thesislib.records.measurement import Measurement

# what an interval covers: in every figure that draws one, and beside the first table of chapter 0
COVERED = (
    "95 % intervals: other documents or questions of the same kind. Not covered: other calibration windows, another "
    "seed of training."
)


def written(x: float, form: str) -> str:
    """A number in a format of Python's, but whole where that has an exponent.

    >>> written(16_500, ".3g")
    '16,500'
    """
    said = f"{x:{form}}"
    return f"{x:,.0f}" if "e+" in said else said


def interval(value: float, low: float, high: float, form: str) -> str:
    """A value with its interval, each `written` in a format of Python's."""
    value_said, low_said, high_said = (written(x, form) for x in (value, low, high))
    return f"{value_said} [{low_said}, {high_said}]"


def number(m: Measurement | None, form: str = ".4g") -> str:
    """A measurement's value with its interval; nothing for no measurement."""
    return "" if m is None else interval(m.value, m.low, m.high, form)


def with_thousands(m: Measurement) -> str:
    """The value and each end of its interval with four digits, from 1,000 on without decimals."""
    value, low, high = (f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in (m.value, m.low, m.high))
    return f"{value} [{low}, {high}]"


def share(m: Measurement | None) -> str:
    """A measurement in percent with its interval; nothing for no measurement."""
    return number(m, ".1%")


def ratio(c: Comparison, form: str = ".3f") -> str:
    """The ratio of two perplexities with its interval; the comparison is of their logarithms.

    An end of the interval may be beyond what a float holds.
    """
    value, low, high = (np.exp(min(x, 50)) for x in (c.difference, c.low, c.high))
    return f"x {interval(value, low, high, form)}"


def sample_note(measurements: Iterable[Measurement]) -> str:
    """How many of these perplexities are of a sample of the text's windows and not yet of all, in a sentence; "" if
    none is."""
    samples = Counter(m.n for m in measurements if m.metric == "perplexity" and m.settings.get("limit"))
    if not samples:
        return ""
    said = together(f"{count} perplexities were measured on {n} windows" for n, count in sorted(samples.items()))
    return f" So far {said} spread over the text, not on all of it."


def factor(c: Comparison, form: str = ".2f") -> str:
    """The ratio alone."""
    return f"x {np.exp(c.difference):{form}}"


def ratio_and_p(c: Comparison, form: str = ".3f") -> str:
    """The ratio with its interval, and the p value."""
    return f"{ratio(c, form)}, {p_value(c.p)}"


def times(x: float) -> str:
    """A ratio by itself: two decimals, from 100 on none."""
    return f"x {x:,.2f}" if x < 100 else f"x {x:,.0f}"


def points(c: Comparison) -> str:
    """A difference of shares in percentage points, with its interval."""
    return f"{100 * c.difference:+.1f} points [{100 * c.low:+.1f}, {100 * c.high:+.1f}]"


def p_number(p: float) -> str:
    """0.012, or < 0.001."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def difference(c: Comparison, task: Task) -> str:
    """A comparison with its interval: a ratio, percentage points, or a difference in the task's unit."""
    if task.ratio:
        return ratio(c)
    factor, form = (100, "+.1f") if task.unit == SHARE else (1, "+.4g")
    value, low, high = (factor * x for x in (c.difference, c.low, c.high))
    return interval(value, low, high, form)


def p_value(p: float) -> str:
    """p = 0.012, or p < 0.001."""
    return f"p {'' if p < 0.001 else '= '}{p_number(p)}"


def versus(c: Comparison, else_: str = "within noise of") -> str:
    """How b stands to a where less is better: better than, worse than, or `else_` if the test tells nothing."""
    return f"{c.verdict()} than" if c.told else else_


def word(c: Comparison, higher_is_better: bool = False) -> str:
    """Better, worse, or within noise."""
    return c.verdict(higher_is_better) if c.told else "within noise"


def few(names: Sequence[str], most: int = 6) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def listed(names: Sequence[str]) -> str:
    """Names, or none."""
    return ", ".join(names) or "none"


def together(names: Iterable[str]) -> str:
    """Names as a sentence lists them.

    >>> together(["a", "b", "c"])
    'a, b and c'
    """
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def percent_more(c: Comparison) -> str:
    """A ratio of perplexities as a change in percent, e.g. +34 %."""
    return f"{100 * np.expm1(c.difference):+.0f} %"


HOLDS, FAILS, UNDECIDED, DEPENDS = "holds", "does not hold", "undecided", "depends on the scoring"


def decided(holds: bool, fails: bool) -> str:
    """The verdict on a claim."""
    return FAILS if fails else HOLDS if holds else UNDECIDED
