"""Who may import whom: the table in CONTRIBUTING is what is tested."""

import ast
import shutil

import pytest

from thesislib.book import rooms
from thesislib.imports import PACKAGE, sources

MODULES = {
    ".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): f
    for f in PACKAGE.rglob("*.py")
}


def layers():
    """{room: row}: each may import rows above its own, and itself."""
    return {name: i for i, (names, _) in enumerate(rooms()) for name in names}


def imports(file):
    """(line, module, whether inside a function) of what a file imports from thesislib."""
    tree = ast.parse(file.read_text("utf8"))
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            names = [
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name in MODULES and name != "thesislib":
                yield node.lineno, name, id(node) in inside


def room(module):
    return module.partition(".")[2].partition(".")[0]


def test_the_table_names_every_room():
    assert set(layers()) == {room(m) for m in MODULES} - {"", "__init__"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"thesislib"}))
def test_imports_lead_to_the_left(module):
    row = layers()
    for line, other, hidden in imports(MODULES[module]):
        assert row[room(other)] < row[room(module)] or room(other) == room(module), (
            f"{module}:{line} imports {other}, which stands after it"
        )
        assert not hidden or module == "thesislib.cli", f"{module}:{line} imports {other} inside a function"


def test_no_circles():
    graph, done = {m: {other for _, other, _ in imports(f)} - {m} for m, f in MODULES.items()}, {}

    def visit(module, path):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, [*path, module])
            done[module] = True

    for module in graph:
        visit(module, [])


def test_compress_and_evaluate_are_blind_to_each_other():
    """And then truly: not through a third either."""
    blind = [
        ("compress", "evaluate"),
        ("pipeline", "evaluate"),
        ("evaluate", "compress"),
        ("model", "records"),
        ("sources", "records"),
        ("records", "compress"),
        ("records", "evaluate"),
    ]
    for one, other in blind:
        reached = {f.relative_to(PACKAGE).parts[0] for f in sources(m for m in MODULES if room(m) == one)}
        assert other not in reached


def test_a_notebook_does_not_depend_on_other_chapters():
    from thesislib.imports import imported
    from thesislib.runner import chapters, read_notebook

    code = "\n".join(c.source for c in read_notebook(chapters()["02_depth_pruning"]).cells if c.cell_type == "code")
    own = {f.name for f in sources(imported(code))}
    assert "ch02_depth.py" in own and "depth.py" in own and "corpus.py" in own
    assert not own & {"ch05_runs.py", "ch07_device.py", "book.py", "cli.py", "roofline.py"}


def test_who_finds_the_tasks_depends_on_them_all(tmp_path):
    from thesislib.imports import digest_of

    copy = tmp_path / "thesislib"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of(sources(["thesislib.evaluate.setup"], copy), tmp_path)
    piqa = copy / "sources" / "choices" / "piqa.py"
    piqa.write_text(piqa.read_text() + "# worded otherwise\n")
    touched = digest_of(sources(["thesislib.evaluate.setup"], copy), tmp_path)
    (copy / "evaluate" / "new.py").write_text("# one more task\n")
    assert len({before, touched, digest_of(sources(["thesislib.evaluate.setup"], copy), tmp_path)}) == 3
