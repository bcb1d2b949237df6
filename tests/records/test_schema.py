"""Every committed row has the form that `thesislib.records.schema` says, and nothing besides."""

import json

import pytest

from thesislib.files import data_file
from thesislib.records.measurement import provenance
from thesislib.records.schema import Base, File, Hardware, Made, Provenance, Settings, Sweep

PARTS = {"made": Made, "hardware": Hardware, "settings": Settings, "sweep": Sweep, "file": File}
FILES = sorted(data_file("results").glob("*.jsonl"))


def wrong(plain, form, where=""):
    """The fields of a row that the schema does not have, and those that it must have and lacks."""
    yield from (f"{where}{key} is not in the schema" for key in plain.keys() - form.__annotations__.keys())
    yield from (f"{where}{key} is missing" for key in form.__required_keys__ - plain.keys())
    if form is Provenance:
        for name, part in PARTS.items():
            if name in plain:
                yield from wrong(plain[name], part, f"{name}.")
    if form is Made and "base" in plain:
        yield from wrong(plain["base"], Base, "made.base.")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_studys_rows(file):
    rows = [json.loads(line)["provenance"] for line in file.read_text("utf8").splitlines()]
    assert rows and sorted({fault for row in rows for fault in wrong(row, Provenance)}) == []


def test_what_a_measurement_notes_now(tiny):
    assert sorted(wrong(provenance(tiny(), 0.0, length=8), Provenance)) == []


def test_a_field_that_nobody_described_is_found():
    row = {"subject": "x", "made": {"label": "D2", "bytes": {}, "colour": "red"}}
    found = set(wrong(row, Provenance))
    assert "made.colour is not in the schema" in found and "fingerprint is missing" in found
