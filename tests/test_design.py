"""One direction, no way back: what may import what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("imported", "never"),
    [
        ("thesislib.compress.stage", "thesislib.evaluate"),
        ("thesislib.pipeline.recipe, thesislib.pipeline.run, thesislib.pipeline.offload", "thesislib.evaluate"),
        ("thesislib.evaluate.perplexity, thesislib.evaluate.triviaqa, thesislib.evaluate.choice, thesislib.evaluate.harness", "thesislib.compress"),
        ("thesislib.model.subject, thesislib.sources.corpus, thesislib.model.forward", "thesislib.records.measurement"),
        ("thesislib.records.store, thesislib.records.measurement", ("thesislib.compress", "thesislib.evaluate")),
        ("thesislib.evaluate.setup", "thesislib.compress"),
    ],
)
def test_imports_go_one_way(imported, never):
    code = f"import sys, {imported}; print([m for m in sys.modules if m.startswith({never!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_quotes_the_recorded_run_of_a_card():
    root = Path(__file__).parent.parent
    run = {row["part"]: row for row in map(json.loads, (root / "benchmarks" / "accelerator.jsonl").read_text().splitlines()) if "part" in row}
    shares, rates = run["perplexity, bfloat16"]["batch 32"]["share_of_bare"], run["answers"]["questions_per_s"]
    text = " ".join((root / "README.md").read_text("utf8").split())
    assert f"runs at {shares['now']} of the bare forward pass ({shares['before']} before), {rates['recorded']:.0f} questions" in text
    assert f"in a second ({rates['before']:.1f} before)" in text
