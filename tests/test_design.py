"""One direction, no way back: what may import what."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("imported", "never"),
    [
        ("thesislib.compress.stages", "thesislib.evaluate"),
        ("thesislib.recipe, thesislib.checkpoints, thesislib.streamed", "thesislib.evaluate"),
        ("thesislib.evaluate.perplexity, thesislib.evaluate.triviaqa, thesislib.evaluate.choice, thesislib.evaluate.harness", "thesislib.compress"),
        ("thesislib.subject, thesislib.corpus, thesislib.forward", "thesislib.records"),
        ("thesislib.store, thesislib.records", ("thesislib.compress", "thesislib.evaluate")),
        ("thesislib.evaluate.protocol", "thesislib.compress"),
    ],
)
def test_imports_go_one_way(imported, never):
    code = f"import sys, {imported}; print([m for m in sys.modules if m.startswith({never!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
