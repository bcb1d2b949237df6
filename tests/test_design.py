"""What the project keeps to besides its imports."""

import json
import subprocess

from thesislib.files import ROOT


def test_the_book_quotes_the_recorded_run_of_a_card():
    run = {
        row["part"]: row
        for row in map(json.loads, (ROOT / "benchmarks" / "accelerator.jsonl").read_text().splitlines())
        if "part" in row
    }
    shares, rates = run["perplexity, bfloat16"]["batch 32"]["share_of_bare"], run["answers"]["questions_per_s"]
    text = " ".join((ROOT / "book" / "rerun.md").read_text("utf8").split())
    assert (
        f"runs at {shares['now']} of the bare forward pass ({shares['before']} before), {rates['recorded']:.0f} "
        "questions" in text
    )
    assert f"in a second ({rates['before']:.1f} before)" in text


def test_nothing_is_mocked_outside_tests():
    assert not [file for file in (ROOT / "thesislib").rglob("*.py") if "unittest" in file.read_text("utf8")]


def test_make_lab_lets_the_hub_be_asked():
    """And nothing else that make starts."""
    said = subprocess.run(
        ["make", "--dry-run", "lab", "unit"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [
        line.startswith("env -u HF_HUB_OFFLINE ")
        for line in said.splitlines()
        if "jupyter lab" in line or "pytest" in line
    ] == [True, False]


def test_named_tuples_describe_their_fields_as_arguments():
    """Sphinx documents the fields itself, and takes a second list of attributes for an error."""
    import re

    for file in (ROOT / "thesislib").rglob("*.py"):
        for found in re.finditer(
            r"class (\w+)\(NamedTuple\):\n    \"\"\"(.*?)\"\"\"", file.read_text("utf8"), re.DOTALL
        ):
            assert "Attributes:" not in found[2], f"{file.name}: {found[1]}"
