"""Chapter 2's choice of blocks: losses are recorded though the run is killed, and what they say is what was put in."""

import json

import numpy as np
import pytest

from thesislib.chapters import ch02_runs as runs
from thesislib.chapters import ch02_stability as stability
from thesislib.compress.depth import leave_one_out
from thesislib.sources.corpus import calibration_windows, join


@pytest.fixture
def text(monkeypatch):
    made = join("text", [f"{i} is a number of things, and {i * i} is its square. " * 5 for i in range(12)])
    monkeypatch.setattr("thesislib.sources.corpus.calibration_text", lambda *_: made)
    monkeypatch.setattr(stability, "calibration_text", lambda *_: made)
    monkeypatch.setattr(stability, "AT_ONCE", 2)
    return made


def test_every_windows_loss_is_kept_and_a_killed_run_goes_on(text, tiny, tmp_path, monkeypatch):
    subject, whole, killed = tiny(layers=7), tmp_path / "whole.json", tmp_path / "killed.json"
    stability.record(subject, "embedded", 5, 32, whole)
    asked = []

    def killed_at_the_third(subject, ids, blocks):
        asked.append(len(ids))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return window_losses(subject, ids, blocks)

    window_losses = stability.window_losses
    monkeypatch.setattr(stability, "window_losses", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        stability.record(subject, "embedded", 5, 32, killed)
    assert not killed.exists()
    stability.record(subject, "embedded", 5, 32, killed)
    assert asked == [2, 2, 1, 1] and {f.name for f in tmp_path.iterdir()} == {"whole.json", "killed.json"}
    found, again = stability.read_recorded(whole), stability.read_recorded(killed)
    assert found.losses == again.losses and found.windows == 5 and found.free == [4]
    assert found.made["settings"] == {
        "text": "wikipedia", "text_sha256": text.sha256, "data": "embedded", "windows": 5, "length": 32, "seed": 0,
    }  # fmt: skip
    ids = calibration_windows(subject.tokenizer, "wikipedia", "embedded", 5, 32)
    scores = leave_one_out(subject, ids, range(7))
    assert {b: np.exp(np.mean(nats)) for b, nats in found.losses.items()} == pytest.approx(scores, rel=1e-4)


def test_what_was_begun_otherwise_is_not_gone_on_with(text, tiny, tmp_path):
    file = tmp_path / "s.json"
    for other in (tiny(layers=7, seed=1), tiny(layers=7)):
        stability.record(other, "embedded", 2, 32, file)
        file.rename(tmp_path / "s.json.partial")
    stability.record(other, "embedded", 2, 32, file)
    assert stability.read_recorded(file).made["fingerprint"] == other.fingerprint
    file.rename(tmp_path / "s.json.partial")
    stability.record(other, "embedded", 1, 32, file)  # fewer windows than were begun with
    assert stability.read_recorded(file).windows == 1


def test_the_recorded_run_makes_the_file_beside_the_record(text, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_subject", lambda *_: tiny(layers=9))
    p = runs.DepthChapter(subject="embedded", length=32, stability=3)
    *_, part = runs.recorded_parts(p, tmp_path / "r.jsonl")
    part.make([], None)
    assert part.file == tmp_path / "r_stability.json" and stability.read_recorded(part.file).windows == 3
    assert [one.name for one in runs.recorded_parts(runs.DepthChapter(), tmp_path / "r.jsonl")] == ["all"]


# ten blocks, of which 4 to 7 may go: 4 is always the cheapest, then 5 or 6 by the kind of window; 7 never goes
LOSSES = {b: [1.0] * 8 for b in range(10)} | {
    4: [2.0] * 8,
    5: [3.0] * 5 + [4.0] * 3,
    6: [4.0] * 5 + [3.0] * 3,
    7: [9.0] * 8,
}


@pytest.fixture
def record(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"losses": LOSSES, "made": {}}))
    return stability.read_recorded(tmp_path / "l.json")


def test_shares_and_costs_of_a_known_choice(record):
    assert record.free == [4, 5, 6, 7] and stability.gone(record, 2) == [4, 5]
    shares = stability.shares(record, 2)
    assert list(shares.index) == [4, 8] and list(shares.columns) == [4, 5, 6]  # 7 never goes
    assert (shares[4] == 1).all() and np.allclose(shares.sum(axis=1), 2)
    # of 4 windows, 2 or more of the first kind (5 of 8) leave block 5 no dearer: binomial
    assert shares.loc[4, 5] == pytest.approx(1 - (3 / 8) ** 4 - 4 * (5 / 8) * (3 / 8) ** 3, abs=0.02)
    table = stability.settling(record, [2])
    same = float(shares.loc[4, 5])
    assert table.loc[4, "D2: as all choose"] == f"{same:.0%}"
    assert table.loc[4, "D2: dearer by"] == f"{np.expm1((1 - same) * (3.625 - 3.375) / 2):.2%}"


def test_the_sentence_names_both_choices_and_the_shares(record):
    one, two = stability.sentences(record, 8, [1, 2])
    assert one.startswith("For D1 the 8 windows of the recorded run choose 4, and so do all 8.")
    assert "agrees with all 8 in 100% of cases" in one and "choose 4 and 5, and so do all 8." in two
    (few,) = stability.sentences(record, 4, [2])  # of the first kind
    assert "choose 4 and 5, and so do all 8" in few
