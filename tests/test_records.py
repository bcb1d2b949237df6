import json

import pytest

from thesislib import records
from thesislib.errors import BadInput
from thesislib.records import Measurement


def measurement(**changes):
    return Measurement(**{"task": "t", "metric": "m", "value": 1.5, "low": 1.0, "high": 2.0, "n": 1, "unit": "u", "items": [{"id": "é", "x": 1}]} | changes)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_written_measurements_read_back(tmp_path, name):
    found = [measurement(), measurement(value=2.0, extra={"a": 1}, provenance={"plan": [0, 1]})]
    records.write(found, tmp_path / name)
    assert records.read(tmp_path / name) == tuple(found)
    first = (tmp_path / name).read_bytes()
    records.write(found, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first  # the same content is the same file


@pytest.mark.parametrize("content", [b"\x1f\x8b damaged", b"not json", b'{"task": 1}'])
def test_a_damaged_record_is_named(tmp_path, content):
    path = tmp_path / ("r.jsonl.gz" if content[0] == 0x1F else "r.jsonl")
    path.write_bytes(content)
    with pytest.raises(BadInput, match="is not a record of measurements"):
        records.read(path)


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
