"""Where files live, and how one is written: to a temporary name first, renamed only when whole."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir

from thesislib.errors import BadInput


def expanded(path: str | Path) -> Path:
    """A path with its ~ written out.

    Raises:
        BadInput: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadInput(f"'{path}': there is no such home folder: write the path out, or set HOME (the cache's place is THESISLIB_CACHE)") from error


def cache_dir() -> Path:
    """The cache folder: `THESISLIB_CACHE`, else the user's cache directory."""
    path = expanded(os.environ.get("THESISLIB_CACHE") or user_cache_dir("thesislib"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"the cache folder {path} cannot be made ({error.strerror}): set THESISLIB_CACHE to one that can") from error
    if not os.access(path, os.W_OK):
        raise BadInput(f"the cache folder {path} cannot be written: set THESISLIB_CACHE to one that can")
    return path


def data_file(name: str) -> Path:
    """A file of the project's `data/` folder: in a checkout beside the package, in a wheel inside it."""
    package = Path(__file__).parent
    for folder in (package.parent / "data", package / "data"):
        if (folder / name).exists():
            return folder / name
    raise BadInput(f"no data file '{name}' in this installation of thesislib")


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name, replacing what was there, only if the block succeeds.

    Raises:
        BadInput: the disk is full (said with the folder and the way out); nothing is left behind.
    """
    if final.is_file() or any(parent.is_file() for parent in final.parents):
        raise BadInput(f"{final} cannot be a folder: a file stands there or above it")
    temporary = before = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        yield temporary
        if final.exists():  # moved aside, so that a kill leaves the old one or the new one there, or none, but no half of either
            before = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
            os.replace(final, before)
        os.replace(temporary, final)
    except Exception as error:
        raise _said(error, final) from error
    finally:
        for folder in filter(None, (temporary, before)):
            shutil.rmtree(folder, ignore_errors=True)


def _said(error: Exception, final: Path) -> Exception:
    """A full disk in one line; any other error as it is."""
    # safetensors' writer is Rust and has its own class for it
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return BadInput(f"the disk is full at {final.parent}: free some space there or write elsewhere (the cache's place is THESISLIB_CACHE)")
    return error


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; False too for what cannot be a path at all, such as an overlong name."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that `path` never holds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A temporary name beside `final`, for writers that take names; it becomes `final` only if the block succeeds.

    Raises:
        BadInput: the disk is full, or a file stands where a folder should; nothing is left behind.
    """
    if any(parent.is_file() for parent in final.parents):
        raise BadInput(f"{final} cannot be a file: a file stands where its folder should be")
    folder = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        yield folder / final.name
        (folder / final.name).chmod(0o644)
        os.replace(folder / final.name, final)
    except Exception as error:
        raise _said(error, final) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def read_json(path: Path) -> dict:
    """A JSON file, or an error that names it."""
    try:
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error})") from error
