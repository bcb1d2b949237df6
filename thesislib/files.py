"""Where files live, how one is written (to a temporary name first, renamed only when whole) and how one is known to be
whole."""

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from thesislib.errors import BadInput

LARGEST = 1 << 26  # bytes of a text that is read as a whole: twice the largest tokenizer's
LONGEST = 100  # bytes of a name that a temporary name repeats: systems allow 255
_SUMS: dict[tuple[int, ...], str] = {}  # sha256 of files as they were when this process read them
HARMLESS = (
    "readme",
    "license",
    "licence",
    "notice",
)  # how files' names begin that say something about a model and are no part of it


def expanded(path: str | Path) -> Path:
    """A path with its ~ written out.

    Raises:
        BadInput: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadInput(
            f"'{path}': there is no such home folder: write the path out, or set HOME (the cache's place is "
            "THESISLIB_CACHE)"
        ) from error


def cache_dir() -> Path:
    """The cache folder: `THESISLIB_CACHE`, else the user's cache directory."""
    path = expanded(os.environ.get("THESISLIB_CACHE") or user_cache_dir("thesislib"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"the cache folder {path} cannot be made ({error.strerror}): set THESISLIB_CACHE to one that can"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInput(f"the cache folder {path} cannot be written: set THESISLIB_CACHE to one that can")
    return path


PACKAGE = Path(__file__).parent
ROOT = (
    PACKAGE.parent
)  # of a checkout; of an installed wheel the folder of all packages, which holds nothing of this project


def shipped(name: str) -> Path:
    """A file or folder of the project's that the package reads, e.g. "hw/devices": in a wheel inside the package, in a
    checkout beside it.

    Raises:
        BadInput: there is none of this name.
    """
    for folder in (PACKAGE, ROOT):
        if (folder / name).exists():
            return folder / name
    raise BadInput(f"no '{name}' in this installation of thesislib: expected a file or folder of data/ or hw/")


def data_file(name: str) -> Path:
    """A file of the project's `data/` folder; see `shipped`."""
    return shipped(f"data/{name}")


def check_checkout(what: str, root: Path = ROOT) -> None:
    """Raises BadInput, which names `what`, unless `root` is a checkout of the project: an installed wheel has no
    notebooks and no book."""
    if not (root / "notebooks").is_dir() or not (root / "_toc.yml").is_file():
        raise BadInput(
            f"{what} needs a checkout of thesislib, with its notebooks/ and book/, and {root} is none: run it there"
        )


def check_ordinary(path: Path, most: int = LARGEST) -> None:
    """Raises BadInput for what is no file (a pipe or a device has no end) or holds more bytes than `most`, before it is
    read; OSError if it is not there."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{path} is no ordinary file")
    if found.st_size > most:
        raise BadInput(f"{path} has {found.st_size:,} bytes: expected at most {most:,}")


def read_json(path: Path) -> dict:
    """A JSON file, or an error that names it."""
    try:
        check_ordinary(path)
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error})") from error


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; False too for what cannot be a path at all, such as an overlong name."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- what a system says


def said(error: Exception, place: Path | str | None = None) -> Exception:
    """A disk's or a permission's error as one line, with the file or else `place`; any other error as it is."""
    code, text = getattr(error, "errno", None), str(error)
    if code is None and (
        number := re.search(r"\(os error (\d+)\)", text)
    ):  # writers in Rust (safetensors, tokenizers) have their own classes
        code = int(number[1])
    if code is None and (
        re.fullmatch(r"\d+ requested and \d+ written", text) or "No space left on device" in text
    ):  # numpy's; others'
        code = errno.ENOSPC
    where = getattr(error, "filename", None) or place or cache_dir()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BadInput(
            f"the disk is full at {place or where}: free some space there or write elsewhere (the cache's place "
            "is THESISLIB_CACHE)"
        )
    if code in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EBUSY,
        errno.EIO,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
    ):
        return BadInput(
            f"{str(where)[:200]} cannot be used ({os.strerror(code)}): expected a place that you may read and write"
        )
    if code in (errno.ENOENT, errno.ESTALE):
        return BadInput(f"{where} is not there (any more): was it removed meanwhile? Run again")
    return error


@contextmanager
def plain_errors(place: Path | str | None = None) -> Iterator[None]:
    """Inside the block a full disk, a read-only one or a missing permission is a BadInput of one line."""
    try:
        yield
    except (BadInput, UnicodeError):
        raise
    except Exception as error:
        if (plain := said(error, place)) is error:
            raise
        raise plain from error


def lock(path: Path) -> FileLock:
    """The lock of a file or folder, in a file beside it; whoever may write there may take it, so that users can share a
    cache.

    A killed process leaves no lock behind, only the empty file.

    Raises:
        BadInput: its folder cannot be made.
    """
    with plain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return _Lock(path.with_name(f"{path.name}.lock"), mode=0o666)


class _Lock(FileLock):
    def acquire(self, *args, **kwargs):
        with plain_errors(self.lock_file):
            return super().acquire(*args, **kwargs)


# ---------------------------------------------------------------- where something is to be written


def real(path: str | Path) -> Path:
    """Where a path leads: `~` spelled out and links followed, also one to what is not there yet.

    Raises:
        BadInput: links in a circle, a name too long, a character that no path has, a file where a folder should be.
    """
    try:
        found = Path(path).expanduser().resolve()
        with suppress(FileNotFoundError):
            found.stat()
        return found
    except NotADirectoryError as error:
        raise BadInput(f"{path} cannot be a folder or a file: a file stands above it") from error
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"'{str(path)[-60:]}' cannot be a folder or a file ({why}): expected the name of one") from error


def free_folder(path: str | Path, replaces: str | None = None) -> Path:
    """Where a folder can be written as a whole, checked before any work: `path`, links followed.

    Args:
        path: not there, an empty folder, or one that may be replaced; or a link to one of these, which stays a link.
        replaces: the file by which a folder is known that may be replaced, such as artifact.json.

    Raises:
        BadInput: a file in the way, a folder that holds something else, a mount point, the current folder or one above
            it, a place that cannot be written.
    """
    folder = open_folder(path, above=True)
    if is_folder(folder):
        if Path.cwd().is_relative_to(folder):
            raise BadInput(
                f"{path} is the current folder or above it, and would be replaced as a whole: expected a new "
                "folder's name"
            )
        if os.path.ismount(folder):
            raise BadInput(
                f"{path} is a mount point, which cannot be replaced as a whole: expected a folder in it, such as "
                f"{folder / 'new'}"
            )
        held = os.listdir(folder)
        if held and (replaces is None or replaces not in held):
            kind = f" that is no {replaces.removesuffix('.json')}" if replaces else ""
            raise BadInput(f"{path} holds something{kind}: expected a new folder's name")
    return folder


def open_folder(path: str | Path, above: bool = False) -> Path:
    """Where files can be added to a folder, checked before any work: `path`, links followed. `above`: where it can be
    made anew, or replaced.

    Raises:
        BadInput: a file in the way, a place that cannot be written.
    """
    folder = real(path)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{path} cannot be a folder: a file stands there or above it")
    _check_writable(folder.parent if above else folder, path)
    return folder


def free_file(path: str | Path, new: bool = False) -> Path:
    """Where a file can be written, checked before any work: `path`, links followed. `new`: one that is there is not
    replaced.

    Raises:
        BadInput: a folder or a device there, a file that is there already, a place that cannot be written.
    """
    file = real(path)
    if is_folder(file):
        raise BadInput(f"{path} is a folder: expected a file's name, such as {Path(path) / 'new'}")
    if file.exists() and (new or not file.is_file()):
        raise BadInput(
            f"{path} cannot be written: {'it is there already' if file.is_file() else 'it is no ordinary file'}; "
            "expected a new file's name"
        )
    if file.exists() and not os.access(file, os.W_OK):
        raise BadInput(f"{path} cannot be written: it is read-only; expected another file's name")
    _check_writable(file.parent, path)
    return file


def _check_writable(folder: Path, path: str | Path) -> None:
    """Raises BadInput unless a folder can be made in `folder`, or in the nearest one above that is there: tried, since
    modes do not say all."""
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir():
        raise BadInput(f"{path} cannot be written: {above} is a file")
    try:
        probe = _temporary(above / "probe")
        probe.mkdir()
        probe.rmdir()
        clear_leftovers(above / "probe")  # of a process killed between these two lines
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror} in {above}): expected a place that can") from error


def inside(folder: Path, name: str) -> Path:
    """The file of this name in a folder, if it lies there: for names that a file gives, which may be anybody's.

    The links of the Hub's cache, from `snapshots/REVISION/` to the `blobs/` beside, lead to where its files lie.

    Raises:
        BadInput: a name that is none, is absolute or goes up, or a link that leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(
            f"'{str(name)[:80]}', named in {folder}, is no file of that folder: expected a name in it, without '..'"
        )
    root, target = real(folder), real(folder / name)
    blobs = [above.parent.parent / "blobs" for above in (root, *root.parents) if above.parent.name == "snapshots"]
    if not target.is_relative_to(root) and target.parent not in blobs:
        raise BadInput(f"{folder / name} is a link that leads out of its folder: expected the file itself")
    return folder / name


# ---------------------------------------------------------------- whole or not at all


@contextmanager
def whole_folder(final: Path, alone: bool = False) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name, replacing what was there, only if the block succeeds.

    Args:
        final: links are followed.
        alone: nobody else writes there now, as inside a lock: what any run has left is cleared, else only what one did
            of which it is known that it ended.

    Raises:
        BadInput: the disk is full or cannot be written (said with the folder and the way out); nothing is left behind.
    """
    final = real(final)
    if final.is_file() or any(parent.is_file() for parent in final.parents):
        raise BadInput(f"{final} cannot be a folder: a file stands there or above it")
    temporary, before = _temporary(final), _temporary(final)
    try:
        with plain_errors(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final, alone)
            temporary.mkdir()
            yield temporary
            if (
                final.exists()
            ):  # moved aside, so that a kill leaves the old one or the new one there, or none, but no half of either
                os.replace(final, before)
            try:
                os.replace(temporary, final)
            except OSError:
                if before.exists() and not final.exists():
                    os.replace(before, final)
                raise
    finally:
        for folder in (temporary, before):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A temporary name beside `final`, for writers that take names; it becomes `final` only if the block succeeds.

    Raises:
        BadInput: the disk is full or cannot be written, or a file stands where a folder should; nothing is left behind.
    """
    final = real(final)
    if any(parent.is_file() for parent in final.parents):
        raise BadInput(f"{final} cannot be a file: a file stands where its folder should be")
    folder = _temporary(final)
    try:
        with plain_errors(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final)
            folder.mkdir()
            yield folder / final.name
            (folder / final.name).chmod(0o666 & ~_umask())  # some writers make their files private
            os.replace(folder / final.name, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that `path`, links followed, never holds half of it.

    Raises:
        BadInput: see `whole_file`.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def clear_leftovers(final: Path, alone: bool = False) -> None:
    """Remove what killed processes left of `final`; with `alone`, see `whole_folder`, whatever any has left, earlier
    versions too."""
    own = re.compile(re.escape(f".{_short(final.name)}-") + r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
    earlier = re.compile(re.escape(f".{final.name}-") + r"[a-z0-9_]{8}")
    if not is_folder(final.parent):
        return
    with os.scandir(final.parent) as entries:
        left = [
            (entry, own.fullmatch(entry.name))
            for entry in entries
            if own.fullmatch(entry.name) or (alone and earlier.fullmatch(entry.name))
        ]
    for entry, name in left:
        if alone or (name[1] == _machine() and not alive(int(name[2]))):
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else Path(
                entry.path
            ).unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _temporary(final: Path) -> Path:
    """A new name beside `final` that says which process of which machine has it."""
    return final.with_name(f".{_short(final.name)}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _short(name: str) -> str:
    """A name, or the beginning of a long one with a hash."""
    raw = os.fsencode(name)
    if len(raw) <= LONGEST:
        return name
    beginning = os.fsdecode(raw[: LONGEST - 20]).encode("ascii", "ignore").decode()
    return f"{beginning}-{hashlib.sha256(raw).hexdigest()[:16]}"


@functools.cache
def _machine() -> str:
    """8 digits for where process numbers mean this: the host's name, and the container's space of numbers."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _umask() -> int:
    """The rights that this process's new files lack; it can be read by setting it only."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


# ---------------------------------------------------------------- known to be whole


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; once a process, as long as nothing writes it.

    Raises:
        BadInput: a file that is not there or cannot be read.
    """
    with plain_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for somebody to write into it
            raise BadInput(f"{path} is no ordinary file")
    with plain_errors(path), path.open("rb") as file:
        found = os.fstat(file.fileno())
        known = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if known not in _SUMS:
            _SUMS[known] = hashlib.file_digest(file, "sha256").hexdigest()
        return _SUMS[known]


def damaged(folder: Path, wanted: dict[str, str]) -> str | None:
    """The first of a folder's files that is missing or has another sha256 than wanted; None if all are right."""
    for name, sha256 in wanted.items():
        try:
            if sha256_of(inside(folder, name)) != sha256:
                return name
        except BadInput:
            return str(name)
    return None
