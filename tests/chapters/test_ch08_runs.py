"""The recorded run of chapter 8 on a tiny subject: its rows, and what a row says, against the task itself."""

import json

import pytest

from thesislib.chapters import ch08_runs
from thesislib.chapters.ch08_runs import Relevance, key, leave_one_out_plans, recorded_parts
from thesislib.evaluate.setup import Setup, setup_of
from thesislib.model.blocks import remove
from thesislib.pipeline.recipe import Shape


def test_rows_are_of_the_model_without_each_block(tiny, tmp_path, monkeypatch):
    subject = tiny(layers=3)
    rows = [{"goal": f"move {i}", "sol1": f"walk to {i}", "sol2": "stand", "label": i % 2} for i in range(12)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(ch08_runs, "load_subject", lambda *_: subject)
    monkeypatch.setattr(ch08_runs, "shape", lambda _: Shape(3, {}))
    p = Relevance(data=str(tmp_path), items=4)
    part = next(part for part in recorded_parts(p, tmp_path / "r.jsonl") if part.name == "piqa report")
    kept = []
    part.make(part.rows, kept.append)
    assert {key(m) for m in kept} == set(part.rows) and len(kept) == len(leave_one_out_plans(3)) == 4
    for m in kept:
        assert setup_of(m) == Setup("piqa", limit=4, fast=True, part="report") and m.extra["chance"] == 0.5
        gone = {0, 1, 2} - {*m.provenance["plan"]}
        alone = setup_of(m).measure(remove(subject, gone) if gone else subject, p.data)
        assert alone.column("correct") == m.column("correct") and alone.column("id") == m.column("id")
        for one, other in zip(alone.column("logprobs"), m.column("logprobs"), strict=True):
            assert one == pytest.approx(other, abs=1e-3)
