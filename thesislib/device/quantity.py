"""Numbers with units, as device files write them: `11.52 GB/s`, `4 MiB`, `211 pJ/B`. They are read into SI base
units."""

import math
import re

from thesislib.errors import BadInput, unknown

UNITS: dict[str, dict[str, float]] = {
    "B": {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "B/s": {"MB/s": 1e6, "GB/s": 1e9, "MiB/s": 2**20, "GiB/s": 2**30},
    "Hz": {"Hz": 1, "MHz": 1e6, "GHz": 1e9},
    "MAC/cycle": {"MAC/cycle": 1},
    "s": {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "W": {"mW": 1e-3, "W": 1},
    "J/B": {"pJ/B": 1e-12, "nJ/B": 1e-9},
    "J/MAC": {"pJ/MAC": 1e-12, "fJ/MAC": 1e-15},
    "bit": {"bit": 1},
    "": {"": 1},
}


def parse(text: object, unit: str, where: str) -> float:
    """A number in the base unit `unit`, one of `UNITS`.

    >>> parse("4 MiB", "B", "size")
    4194304.0

    Raises:
        BadInput: no number, a unit of another quantity, not finite, or not above 0; an unknown number is null.
    """
    parts = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(\S*)\s*", str(text), re.ASCII)
    try:
        number = float(parts[1]) if parts else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(
            f"{where} is {text!r}: expected a "
            f"number{f' with one of the units {_listed(unit)}' if unit else ' without a unit'}"
        )
    if parts[2] not in UNITS[unit]:
        if not unit:
            raise BadInput(f"{where} is {text!r}: expected a number without a unit")
        raise unknown(f"unit of {where}", parts[2], UNITS[unit])
    if number <= 0:
        raise BadInput(f"{where} is {text!r}: expected a number above 0, or null if it is not known")
    return number * UNITS[unit][parts[2]]


def _listed(unit: str) -> str:
    return ", ".join(UNITS[unit])
