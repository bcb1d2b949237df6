"""The paired test that a measure calls for."""

from thesislib.errors import BadInput
from thesislib.evaluate.setup import task_of
from thesislib.evaluate.stats import Comparison
from thesislib.records.measurement import Measurement


def compare(a: Measurement, b: Measurement) -> Comparison:
    """Of b against a, on the same items, by the paired test of their task.

    Raises:
        BadInput: they are of different measures, of no task, or not of the same items.
    """
    if (a.metric, a.unit) != (b.metric, b.unit):
        raise BadInput(
            f"'{a.metric}' ({a.unit}) and '{b.metric}' ({b.unit}) do not compare: expected two measurements of "
            "one measure"
        )
    return task_of(a).compare(a, b)
