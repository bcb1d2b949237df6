"""A small part of `make stress`: damage, kills and bad calls from a process of its own, which forks a child for
each."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.fakes import processes
from tests.stress.__main__ import main

ROOT = Path(__file__).parent.parent


def stress(words, said):
    """In a process of its own: `python -m tests.stress` with these words, all that it prints in a file."""
    os.chdir(ROOT)
    sys.argv = ["stress", *words]
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.exit(main())


@pytest.mark.processes
@pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform != "linux", reason="cases are forked, and limits are Linux's"
)
def test_nothing_is_lost_or_silently_wrong(tmp_path):
    said = tmp_path / "said"
    words = ["--quick", "--jobs", "1", "--json", str(tmp_path / "figures.json")]
    process = processes().Process(target=stress, args=(words, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()[-7000:]
    kinds = json.loads((tmp_path / "figures.json").read_text())["kinds"]
    assert sum(k.get("kills", 0) for k in kinds.values()) >= 8 and sum(k.get("cases", 0) for k in kinds.values()) >= 80
    assert sum(k.get("refused", 0) for k in kinds.values()) > 40  # the damage does reach what it should
