"""Two measurements compared by the paired test of their task."""

from thesislib.errors import BadInput
from thesislib.evaluate.setup import task_of
from thesislib.evaluate.stats import Comparison
from thesislib.records.measurement import Measurement


def compare(a: Measurement, b: Measurement) -> Comparison:
    """The paired test of b against a, on the same items.

    Raises:
        BadInput: the two are of different measures, of no task, or of different items.
    """
    if (a.metric, a.unit) != (b.metric, b.unit):
        raise BadInput(
            f"'{a.metric}' ({a.unit}) and '{b.metric}' ({b.unit}) do not compare: expected two measurements of "
            "one measure"
        )
    return task_of(a).compare(a, b)
