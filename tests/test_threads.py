"""How threads wait is set before torch is there, or not at all."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# a stand-in: that it is there is all that is asked
BEFORE_TORCH, AFTER = "import thesislib.cli", "import sys; sys.modules['torch'] = sys; import thesislib"


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        (BEFORE_TORCH, {}, {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}),
        (AFTER, {}, {}),
        *(
            (BEFORE_TORCH, {name: value}, {name: value})
            for name, value in zip(NAMES, ("active", "9", "5"), strict=True)
        ),
    ],
)
def test_threads_spin_for_a_moment_unless_told_otherwise(code, given, expected):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    script = f"import os; {code}; print({{n: os.environ[n] for n in {NAMES} if n in os.environ}})"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == expected


def test_every_notebook_imports_thesislib_before_what_loads_torch():
    import nbformat

    for notebook in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
        cells = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
        found = [
            n for source in cells for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        modules = [(n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).partition(".")[0] for n in found]
        assert set(modules[: modules.index("thesislib")]) <= {"IPython", *sys.stdlib_module_names}, notebook.name
