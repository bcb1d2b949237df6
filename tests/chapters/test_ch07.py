"""Chapter 7: its stand-ins, tables and sentences, from small made-up records, and the committed record against its
bars."""

import json

import numpy as np
import pandas as pd
import pytest

from thesislib.chapters import ch07_device as chapter
from thesislib.chapters import ch07_runs as runs
from thesislib.chapters import recorded
from thesislib.device.cost import costs
from thesislib.device.hardware import device
from thesislib.device.measure import NOISY_HOST, QUIET, Timing, as_measurement
from thesislib.device.time_line import BETWEEN
from thesislib.errors import BadInput
from thesislib.formats.gguf import TYPES
from thesislib.records.measurement import Measurement


def timed(subject, engine, ms, size, noise=0.0):
    later = tuple(tuple(ms / 1e3 * (1 + sign * noise) for _ in range(4)) for sign in (-1, 0, 1))
    return as_measurement(
        subject,
        Timing(engine, 128, (0.5,) * 3, later, (0.0,) * 3, {"weights": size, "cache": 10, "resident": 500}, {}),
        0.0,
    )


@pytest.fixture
def record(tiny):
    """20 ms at 30 blocks, 0.6 ms a block; every byte a block's."""
    subject = tiny()
    found = {
        (runs.depth_label(30, d), f"llama.cpp {kind}"): timed(subject, f"llama.cpp {kind}", 2 + 0.6 * d, 10 * d)
        for kind in TYPES
        for d in runs.DEPTHS
    }
    same = [
        {"id": "a", "same": 32, "of": 32, "margin": None, "gap": 0.01},
        {"id": "b", "same": 7, "of": 32, "margin": 0.002, "gap": 0.002},
    ]
    found["dense", runs.SAME] = Measurement(
        task="text", metric=runs.SAME, value=0.5, low=0.1, high=0.9, n=2, unit="prompt", items=same
    )
    return found


def test_stand_ins_have_the_shapes_zeros_and_bits_of_their_labels(tiny):
    subject = tiny(layers=6)
    assert runs.stand_in(subject, "dense") is subject and runs.stand_in(subject, "W") is subject
    assert runs.stand_in(subject, "D2").plan == (0, 1, 2, 5)
    halved = runs.stand_in(subject, "W2:4+W").linears(3)["up_proj"].weight
    assert (halved.view(-1, 4) == 0).sum(1).eq(2).all()
    assert (
        costs(runs.stand_in(tiny(hidden_size=64, head_dim=16), "W+Q")).kept
        < costs(tiny(hidden_size=64, head_dim=16)).kept / 2
    )
    for label in ("D6", "E", "nonsense"):
        with pytest.raises(BadInput, match="has no stand-in|is not understood"):
            runs.stand_in(subject, label)


def test_what_is_measured_covers_four_formats_by_four_depths_and_six_compressed_models():
    found = runs.cases(30)
    assert len(set(found)) == len(found)
    assert {(c.label, c.encoding) for c in found} >= {
        (label, kind) for label in ("dense", "D10", "D20", "D26") for kind in TYPES
    }
    assert len({c.label for c in found if c.encoding == "Q8_0"} - {"dense"}) >= 6 and {c.encoding for c in found} > {
        "float32",
        "bfloat16",
    }


def test_predictions_are_those_of_the_line(record):
    tables = chapter.predictions(record)
    assert list(tables) == list(TYPES)
    assert all(t.loc[t["where"] == BETWEEN, "error"].to_numpy() == pytest.approx(0) for t in tables.values())
    found = chapter.prediction(record)
    assert max(found.between) == pytest.approx(0) and found.formats == len(TYPES) and not found.noisy
    assert len(chapter.prediction_table(tables)) == 8


def test_a_subject_of_another_depth_is_predicted_too(tiny):
    subject = tiny()
    assert runs.depths(30) == list(runs.DEPTHS) and runs.depths(16) == [16, 11, 5, 2]
    assert {c.label for c in runs.cases(16) if c.encoding == "Q4_1"} == {"dense", "D5", "D11", "D14"}
    found = {}
    for d in runs.depths(16):
        case = runs.Case(runs.depth_label(16, d), "F16")
        found[case.label, case.engine] = runs.noted(
            timed(subject, case.engine, 2 + d, 10 * d), case.label, case.engine, 16
        )
    p = chapter.prediction(found)
    assert p.depths == [16, 11, 5, 2] and p.formats == 1 and p.between == [pytest.approx(0)]
    few = {key: runs.noted(m, *key, 2) for key, m in found.items()}
    assert chapter.prediction(few) is None  # two blocks make no four depths


def test_shares_of_bandwidth_and_arithmetic_by_hand(tiny):
    subject, on = tiny(), device("host")
    m = timed(subject, "llama.cpp Q8_0", 20, 10**9)
    shown = chapter.utilisation_table(subject, {("dense", "llama.cpp Q8_0"): m, ("D2", "llama.cpp Q8_0"): m}, on)
    (row,) = shown.to_dict("records")
    cache = (
        6 * 2 * 2 * 8 * 2 * (128 + m.provenance["settings"]["tokens"] // 2 + 1)
    )  # blocks, keys and values, heads, width, bytes, tokens
    assert (
        row["GB/s"] == f"{(10**9 + cache) / 0.02 / 1e9:.1f}" == "50.0"
        and row["MBU"] == f"{50e9 / on.tiers[0].read:.0%}"
    )
    assert (
        row["of, GMAC/s"].endswith("(int8)")
        and row["MFU"] == f"{costs(subject, 128, 0).macs / 0.5 / on.rate('gemm', 'int8')[0]:.0%}"
    )


def test_contrary_timings_are_said(record, tiny):
    record["D10", "llama.cpp F16"] = timed(
        tiny(), "llama.cpp F16", 28, 200, noise=0.2
    )  # twice what the line says, and noisy
    found = chapter.prediction(record)
    assert np.mean(found.between) == pytest.approx(0.125, abs=0.001) and found.noisy == 1
    assert NOISY_HOST in set(chapter.measured_table(record)["machine"])
    del record["D26", "llama.cpp Q4_1"]
    assert list(chapter.predictions(record)) == ["F16", "Q8_0", "Q4_0"]
    assert chapter.prediction({}) is None and not chapter.gains_by_zeros({})


def test_zeros_are_set_beside_the_dense_model(record, tiny):
    record["W2:4+W", "llama.cpp F16"] = timed(tiny(), "llama.cpp F16", 21, 300)
    assert chapter.gains_by_zeros(record) == {"F16": pytest.approx(20 / 21 - 1)}
    record["W2:4+W", "llama.cpp F16"] = timed(tiny(), "llama.cpp F16", 11, 300)
    assert chapter.gains_by_zeros(record)["F16"] > chapter.SKIPPED


def test_every_model_meets_every_device(tiny):
    p = runs.DeviceChapter(devices=["siracusa", "k1", "host"])
    found = {label: runs.stand_in(tiny(layers=6), label) for label in ("dense", "D2", "W2:4")}
    rows = chapter.projections(found, p)
    assert len(rows) == 9 and (rows["low"] <= rows["high"]).all()
    table = chapter.projection_table(rows)
    assert list(table.columns) == p.devices and all(" to " in cell for cell in table.to_numpy().ravel())
    known = chapter.energy(rows)
    assert (
        all(chapter.binding(rows).values()) and known.unknown == ["siracusa", "host"] and list(known.joules) == ["k1"]
    )
    assert list(chapter.energy_table(rows).columns) == ["k1"]  # what the sentence says
    small, half = (rows[(rows["device"] == "k1") & (rows["model"] == m)].iloc[0] for m in ("dense", "D2"))
    assert half["low"] > small["low"]
    roof, *points = (line for line in chapter.roofline(found, "k1", p).axes[0].lines if len(line.get_xdata()) > 2)
    assert [line.get_label() for line in points] == ["decoding", "prompt"]
    for line in points:  # nothing is above its roof
        assert (line.get_ydata() <= 1.02 * np.interp(line.get_xdata(), *roof.get_data())).all()
    with pytest.raises(BadInput, match="lacks a rate or a bandwidth"):
        chapter.roofline(found, "laptop", p)


def test_a_token_beyond_memory_is_said_not_to_fit(tiny):
    large = tiny(layers=2, vocab_size=2_000_000)
    rows = chapter.projections({"dense": large}, runs.DeviceChapter(devices=["siracusa"]))
    assert chapter.projection_table(rows).iloc[0, 0] == "does not fit" and chapter.binding(rows) == {"siracusa": []}


def test_what_was_emulated_and_what_hosted_models_take_are_tables(tmp_path):
    counts = {"per token": {"load": 2_000_000, "store": 0}, "per token, all": 2_000_000, "per weight": 7.5}
    row = {
        "type": "F16",
        "blocks": 30,
        "instructions": counts,
        "same": 3,
        "of": 8,
        "logits": {"share": 0.002},
        chapter.PLAIN: {"share": 0.001},
    }
    (tmp_path / "e.json").write_text(json.dumps({"rows": [row]}))
    (shown,) = chapter.emulated_table(tmp_path / "e.json").to_dict("records")
    assert (
        shown["load"] == shown["all"] == "2"
        and shown["a weight"] == "7.50"
        and shown["same tokens"] == "3 of 8"
        and shown["logits apart"] == "0.20%"
    )
    assert len(chapter.emulated_table()) == 5  # the committed record
    assert chapter.hosted_table()["joules a written token"].tolist()[:2] == ["80.4", "73.8"]


def test_the_committed_record_meets_the_bars():
    record = recorded("07_on_device")
    tables = chapter.predictions(record)
    assert set(tables) == set(TYPES)
    assert pd.concat(tables).query("where == @BETWEEN").error.abs().mean() <= 0.15
    quiet = [m.extra["verdict"] == QUIET for (_, engine), m in record.items() if engine != runs.SAME]
    assert sum(quiet) >= 0.8 * len(quiet)
    same = record["dense", runs.SAME]
    assert same.n == 10 and all(i["of"] >= 32 for i in same.items)
    assert all(
        i["margin"] is None or 0 < i["margin"] < 0.05 for i in same.items
    )  # where they part, it was a close call
