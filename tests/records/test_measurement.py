import json
import math

import pytest

from tests.fakes import measurement
from thesislib.errors import BadInput
from thesislib.records.measurement import provenance


def test_json_has_no_nan():
    line = measurement(low=float("nan"), high=float("inf")).to_json()
    assert json.loads(line)["low"] is None and json.loads(line)["high"] is None
    assert "items" not in json.loads(measurement().to_json(items=False))


def test_json_has_nothing_that_is_not_finite_anywhere():
    odd = {"x": math.inf, "deep": [{"y": float("nan")}, (1.5, -math.inf)], "fine": 2}
    plain = json.loads(measurement(value=math.nan, items=[{"id": "1", **odd}], extra=odd, provenance=odd).to_json())
    expected = {"x": None, "deep": [{"y": None}, [1.5, None]], "fine": 2}
    assert (
        plain["value"] is None
        and plain["extra"] == plain["provenance"] == expected
        and plain["items"] == [{"id": "1", **expected}]
    )


def test_half_a_surrogate_pair_is_written_as_an_escape():
    line = measurement(task="é \udcff", items=[]).to_json()
    line.encode()
    assert json.loads(line)["task"] == "é \udcff" and "é" in line


def test_printing_knows_what_is_not_there():
    m = measurement(
        value=math.inf,
        low=math.nan,
        high=math.nan,
        extra={"a": None, "b": {"value": None, "low": 0.25, "high": math.inf}, "c": 3, "why": "so", "d": {"x": 1}},
    )
    assert str(m).splitlines() == [
        "t: m inf, no interval, n = 1 (u)",
        "  a: none",
        "  b: none [0.25, inf]",
        "  c: 3",
        "  why: so",
        "  d: {'x': 1}",
    ]
    assert str(measurement(value=None)).startswith("t: m none, 95 % interval [1, 2]")


def test_pairing_needs_the_same_items():
    assert measurement().paired_with(measurement(items=[{"id": "é", "x": 2}]), "x") == ([1], [2])
    with pytest.raises(BadInput, match="other items"):
        measurement().paired_with(measurement(items=[{"id": "e", "x": 2}]), "x")


def test_provenance_says_how_to_make_it_again(tiny):
    subject = tiny()
    made = provenance(subject, 0.0, length=32, seed=7)
    assert made["fingerprint"] == subject.fingerprint and made["settings"] == {"length": 32, "seed": 7}
    assert made["dtype"] == "float32" and made["versions"]["torch"] and made["hardware"]["cpu"]
    assert "/" not in made["subject"]
    json.dumps(made)
