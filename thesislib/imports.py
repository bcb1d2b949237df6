"""Which of this package's source files a piece of code depends on: imports are followed by reading them."""

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
    """The modules of thesislib that a piece of code may import.

    `from thesislib.a import b` gives thesislib.a and thesislib.a.b, since b may be a module. A call of
    `members("thesislib.a")`, which imports a whole folder, gives "thesislib.a.*".

    >>> sorted(imported("import torch, thesislib.files\\nfrom thesislib.model import grid"))
    ['thesislib.files', 'thesislib.model', 'thesislib.model.grid']
    """
    modules = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(func=ast.Name(id="members"), args=[ast.Constant(value=package), *_]):
                modules.add(f"{package!s}.*")
            case ast.Import():
                modules |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                modules |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in modules if name.partition(".")[0] == "thesislib"}


def members(package: str) -> list[ModuleType]:
    """Every module of a folder of this package and of its subfolders, imported.

    Give the name as a literal, not as a variable: `imported` reads it in the source.
    """
    return [import_module(m.name) for m in pkgutil.walk_packages(import_module(package).__path__, f"{package}.")]


@cache
def _imported_by(file: Path, _modified: int) -> frozenset[str]:
    """`imported` of a file; the time of its last change is part of the cache's key."""
    return frozenset(imported(file.read_text("utf8")))


def sources(names: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """The files of modules and of all that they import from this package, directly or not.

    Of this package's code, the results of these modules depend on these files alone.

    Args:
        names: modules, e.g. "thesislib.compress.width".
        package: the folder of thesislib.
    """
    pending, files = list(names), set()
    while pending:
        name = pending.pop()
        path = package.joinpath(*name.removesuffix(".*").split(".")[1:])
        if name.endswith(".*"):
            inner = (file.relative_to(package).with_suffix("") for file in path.rglob("*.py"))
            pending += [".".join(("thesislib", *file.parts)) for file in inner]
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file() and file not in files:
                files.add(file)
                pending += _imported_by(file, file.stat().st_mtime_ns)
    return sorted(files)


def digest_of(files: Iterable[Path], root: Path) -> str:
    """sha256 over the paths, relative to `root`, and the contents of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
