import json

import pytest

from thesislib import records
from thesislib.errors import BadInput
from thesislib.records import Measurement


def measurement(**changes):
    return Measurement(**{"task": "t", "metric": "m", "value": 1.5, "low": 1.0, "high": 2.0, "n": 1, "unit": "u", "items": [{"id": "é", "x": 1}]} | changes)


def test_json_has_no_nan():
    line = measurement(low=float("nan"), high=float("inf")).to_json()
    assert json.loads(line)["low"] is None and json.loads(line)["high"] is None
    assert "items" not in json.loads(measurement().to_json(items=False))


def test_pairing_needs_the_same_items():
    assert measurement().paired_with(measurement(items=[{"id": "é", "x": 2}]), "x") == ([1], [2])
    with pytest.raises(BadInput, match="other items"):
        measurement().paired_with(measurement(items=[{"id": "e", "x": 2}]), "x")


def test_provenance_says_how_to_make_it_again(tiny):
    subject = tiny()
    made = records.provenance(subject, 0.0, length=32, seed=7)
    assert made["fingerprint"] == subject.fingerprint and made["settings"] == {"length": 32, "seed": 7}
    assert made["dtype"] == "float32" and made["versions"]["torch"] and made["hardware"]["cpu"]
    assert "/" not in made["subject"]
    json.dumps(made)
