"""Chapter 8's scores by text: what is written is what the package's functions give, and a killed run goes on."""

import json

import numpy as np
import pytest

from tests.fakes import choice_data
from thesislib.chapters import ch08_scores
from thesislib.chapters.ch08_scores import ONE_PASS, TEXT, read, record
from thesislib.compress.depth import angular_distances, importance, influence, taylor, window_losses
from thesislib.compress.relevance import choices, next_tokens, outcomes
from thesislib.sources.corpus import calibration_windows

TASKS, ITEMS, WINDOWS, LENGTH = ("arc_easy", "piqa"), 4, 3, 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return choice_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(data, monkeypatch):
    monkeypatch.setattr(ch08_scores, "SIZES", (2, ITEMS, 2 * ITEMS))
    return lambda subject, file: record(subject, data, TASKS, ITEMS, WINDOWS, LENGTH, file)


def test_what_is_read_is_what_the_functions_give(run, data, tiny, tmp_path):
    subject, file = tiny(layers=4), tmp_path / "s.json"
    run(subject, file)
    found = read(file)
    ids = calibration_windows(subject.tokenizer, TEXT, data, WINDOWS, LENGTH)
    for metric in ONE_PASS:
        assert found.scores[metric] == pytest.approx([*importance(subject, ids, metric).values()], rel=1e-6)
    assert found.scores["taylor"] == pytest.approx([*taylor(subject, ids, range(4)).values()], rel=1e-6)
    angles = angular_distances(subject, ids)
    assert [*found.runs] == [1, 2, 3, 4]
    for n, row in found.runs.items():
        assert row == pytest.approx(angles[n, : 5 - n].tolist())
    assert found.losses == pytest.approx(window_losses(subject, ids, range(4)), abs=1e-5)
    text = outcomes(subject, next_tokens(ids), range(4), kl=True)
    for name in ("correct", "margin", "likelihood", "kl", "chance"):
        assert getattr(found.text, name) == pytest.approx(getattr(text, name), abs=1e-5)
    asked = choices("arc_easy", data, ITEMS)
    assert [*found.kl] == ["arc_easy"]
    assert found.kl["arc_easy"] == pytest.approx(outcomes(subject, asked, range(4), kl=True).kl, abs=1e-5)
    assert {"arc_easy, 2 items", "arc_easy, 4 items"} == {name for name in found.seconds if name.endswith(" items")}
    assert found.made["settings"] | {"items": ITEMS, "windows": WINDOWS, "task": "arc_easy"} == found.made["settings"]


def test_the_cosine_score_of_a_task_is_of_its_items_with_the_right_ending(run, data, tiny, tmp_path):
    subject, file = tiny(layers=4), tmp_path / "s.json"
    run(subject, file)
    found = read(file).cosine
    assert [*found] == [*TASKS]
    for task in TASKS:
        for row, item in zip(found[task], choices(task, data, ITEMS).asked, strict=True):
            text = f"{item.context} {item.endings[item.label]}"
            ids = subject.tokenizer(text, return_tensors="pt")["input_ids"]
            assert row == pytest.approx(influence(subject, ids), abs=1e-6)


def test_a_killed_run_goes_on_and_gives_the_same(run, tiny, tmp_path, monkeypatch):
    subject, whole, killed = tiny(layers=4), tmp_path / "whole.json", tmp_path / "killed.json"
    run(subject, whole)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ch08_scores, "window_losses", stopped)
        run(subject, killed)
    assert not killed.exists()
    done = json.loads((tmp_path / "killed.json.partial").read_text())
    assert [*done["steps"]] == ["arc_easy cosine", "piqa cosine", *ONE_PASS, "taylor", "angular"]
    with monkeypatch.context() as patch:  # what is done is not done again
        for name in ("influence", "importance", "taylor", "angular_distances"):
            patch.setattr(ch08_scores, name, stopped)
        run(subject, killed)
    assert {f.name for f in tmp_path.iterdir()} == {"whole.json", "killed.json"}
    one, other = (json.loads(file.read_text()) for file in (whole, killed))
    assert one["steps"] == other["steps"] and one["seconds"].keys() == other["seconds"].keys()
    assert all(other["seconds"][name] == seconds for name, seconds in done["seconds"].items())


def test_what_was_begun_with_another_model_is_not_gone_on_with(run, tiny, tmp_path):
    file = tmp_path / "s.json"
    subject, other = tiny(layers=4), tiny(layers=4, seed=1)
    run(other, file)
    before = read(file)
    file.rename(tmp_path / "s.json.partial")
    partial = json.loads((tmp_path / "s.json.partial").read_text())
    made = {name: partial["made"][name] for name in ("fingerprint", "plan", "dtype", "settings")}
    (tmp_path / "s.json.partial").write_text(json.dumps({**partial, "made": made}))
    run(subject, file)
    after = read(file)
    assert after.made["fingerprint"] == subject.fingerprint != before.made["fingerprint"]
    assert not np.allclose(after.losses, before.losses)
