"""A small part of `make stress`: damage, kills and bad calls from a process of its own, which forks a child for
each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.processes
@pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform != "linux", reason="cases are forked, and limits are Linux's"
)
def test_nothing_is_lost_or_silently_wrong(tmp_path):
    command = [sys.executable, "-m", "tests.stress", "--quick", "--jobs", "1", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    kinds = json.loads((tmp_path / "figures.json").read_text())["kinds"]
    assert sum(k.get("kills", 0) for k in kinds.values()) >= 8 and sum(k.get("cases", 0) for k in kinds.values()) >= 80
    assert sum(k.get("refused", 0) for k in kinds.values()) > 40  # the damage does reach what it should
