"""The paired test that a measure calls for."""

from thesislib.evaluate import choice, perplexity, triviaqa
from thesislib.evaluate.stats import Comparison
from thesislib.records.measurement import Measurement


def compare(a: Measurement, b: Measurement) -> Comparison:
    """Of b against a, on the same items: documents' losses by a t test for perplexity, answers by McNemar's, exactly.

    Raises:
        BadInput: they are not of the same items.
    """
    return {"perplexity": perplexity, "accuracy": triviaqa}.get(a.metric, choice).compare(a, b)
