"""Which of this package's sources a piece of code depends on: followed from import to import, read and not run."""

import ast
import hashlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent


def imported(code: str) -> set[str]:
    """The modules of thesislib that a piece of code imports, and may: `from thesislib.a import b` names thesislib.a and
    thesislib.a.b.

    `members("thesislib.a")` imports all of a folder, "thesislib.a.*" here.

    >>> sorted(imported("import torch, thesislib.files\\nfrom thesislib.model import grid"))
    ['thesislib.files', 'thesislib.model', 'thesislib.model.grid']
    """
    found = set()
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", None) == members.__name__
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(f"{node.args[0].value!s}.*")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.partition(".")[0] == "thesislib"}


def members(package: str) -> list[ModuleType]:
    """Every module of a folder of this package and of those in it, imported. Give its name as it is, not a variable:
    `imported` reads it."""
    return [import_module(m.name) for m in pkgutil.walk_packages(import_module(package).__path__, f"{package}.")]


@cache
def _imported_by(file: Path, _changed: int) -> frozenset[str]:
    return frozenset(imported(file.read_text("utf8")))


def sources(names: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """The files of modules, and of all that they import from this package, however far: what they compute depends on
    these alone.

    Args:
        names: modules, e.g. "thesislib.compress.width".
        package: the folder of thesislib.
    """
    open_, found = list(names), {}
    while open_:
        name = open_.pop()
        path = package.joinpath(*name.removesuffix(".*").split(".")[1:])
        if name.endswith(".*"):
            open_ += [
                ".".join(("thesislib", *file.relative_to(package).with_suffix("").parts)) for file in path.rglob("*.py")
            ]
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file() and file not in found:
                found[file] = None
                open_ += _imported_by(file, file.stat().st_mtime_ns)
    return sorted(found)


def digest_of(files: Iterable[Path], root: Path) -> str:
    """sha256 over the names, below `root`, and the contents of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
