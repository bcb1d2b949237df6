"""Files: where they live, how one is written as a whole or not at all, and how a damaged one is detected.

Whatever is written goes to a temporary name first and is renamed when it is complete.
"""

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

PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent  # of a checkout; for an installed wheel site-packages, which has none of this project's folders
LARGEST = 1 << 26  # bytes of a text that is read as a whole: twice the largest tokenizer's
LONGEST = 100  # bytes of a name that a temporary name repeats: systems allow 255
HARMLESS = ("readme", "license", "licence", "notice")  # names of files about a model begin so; they are no part of it
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNUSABLE: tuple[int, ...] = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EIO)
UNUSABLE += (errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
_SHA256: dict[tuple[int, ...], str] = {}  # of files by device, inode, size and times


def expanded(path: str | Path) -> Path:
    """A path with ~ replaced by the home folder.

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


def shipped(name: str) -> Path:
    """A file or folder of data that comes with the package, e.g. "hw/devices".

    An installed wheel has it inside the package, a checkout beside it.

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


def check_checkout(user: str, root: Path = ROOT) -> None:
    """Raises BadInput unless `root` is a checkout of the project; an installed wheel has no notebooks and no book.

    Args:
        user: who needs it, for the message, e.g. "the book".
        root: the folder that should be a checkout.
    """
    if not (root / "notebooks").is_dir() or not (root / "_toc.yml").is_file():
        raise BadInput(
            f"{user} needs a checkout of thesislib, with its notebooks/ and book/, and {root} is none: run it there"
        )


def check_ordinary(path: Path, most: int = LARGEST) -> None:
    """Check a file before it is read: pipes and devices have no end.

    Raises:
        BadInput: no ordinary file, or one of more than `most` bytes.
        OSError: it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(f"{path} is no ordinary file")
    if status.st_size > most:
        raise BadInput(f"{path} has {status.st_size:,} bytes: expected at most {most:,}")


def read_json(path: Path) -> dict:
    """The content of a JSON file.

    Raises:
        BadInput: it cannot be read, or is not JSON.
    """
    try:
        check_ordinary(path)
        return json.loads(path.read_text("utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({error})") from error


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; False if it cannot be a path at all, such as an overlong name."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------- errors of the operating system


def explained(error: Exception, path: Path | str | None = None) -> Exception:
    """A disk's or a permission's error as a BadInput of one line; any other error as it is.

    The message names the file that the error names, else `path`.
    """
    code, text = getattr(error, "errno", None), str(error)
    if code is None:
        if number := re.search(r"\(os error (\d+)\)", text):  # Rust's writers: safetensors, tokenizers
            code = int(number[1])
        elif re.fullmatch(r"\d+ requested and \d+ written", text) or "No space left on device" in text:  # numpy's first
            code = errno.ENOSPC
    where = getattr(error, "filename", None) or path or cache_dir()
    if code in FULL:
        return BadInput(
            f"the disk is full at {path or where}: free some space there or write elsewhere (the cache's place "
            "is THESISLIB_CACHE)"
        )
    if code in UNUSABLE:
        return BadInput(
            f"{str(where)[:200]} cannot be used ({os.strerror(code)}): expected a place that you may read and write"
        )
    if code in (errno.ENOENT, errno.ESTALE):
        return BadInput(f"{where} is not there (any more): was it removed meanwhile? Run again")
    return error


@contextmanager
def explain_errors(path: Path | str | None = None) -> Iterator[None]:
    """Inside the block a full disk, a read-only one or a missing permission raises a BadInput of one line."""
    try:
        yield
    except (BadInput, UnicodeError):
        raise
    except Exception as error:
        if (bad_input := explained(error, path)) is error:
            raise
        raise bad_input from error


def lock(path: Path) -> FileLock:
    """The lock of a file or folder, kept in a file beside it.

    Everyone who may write there may take it, so users can share a cache. A killed process leaves only the empty file
    behind, no lock.

    Raises:
        BadInput: its folder cannot be made.
    """
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return _Lock(path.with_name(f"{path.name}.lock"), mode=0o666)


class _Lock(FileLock):
    def acquire(self, *args, **kwargs):
        with explain_errors(self.lock_file):
            return super().acquire(*args, **kwargs)


# ---------------------------------------------------------------- checks before something is written


def real(path: str | Path) -> Path:
    """A path resolved: `~` replaced and links followed, whether or not their target exists.

    Raises:
        BadInput: links in a circle, a name too long, a character that no path has, a file where a folder should be.
    """
    try:
        resolved = Path(path).expanduser().resolve()
        with suppress(FileNotFoundError):
            resolved.stat()
        return resolved
    except NotADirectoryError as error:
        raise BadInput(f"{path} cannot be a folder or a file: a file stands above it") from error
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"'{str(path)[-60:]}' cannot be a folder or a file ({why}): expected the name of one") from error


def replaceable_folder(path: str | Path, replaces: str | None = None) -> Path:
    """Check, before any work, that a folder can be written as a whole; returns `path` with links followed.

    Args:
        path: not there, an empty folder, or one that may be replaced; or a link to one of these, which stays a link.
        replaces: a file such as artifact.json: a folder that has it may be replaced.

    Raises:
        BadInput: a file in the way, a folder that holds something else, a mount point, the current folder or one above
            it, or no permission to write.
    """
    folder = writable_folder(path, whole=True)
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
        content = os.listdir(folder)
        if content and (replaces is None or replaces not in content):
            wanted = f" that is no {replaces.removesuffix('.json')}" if replaces else ""
            raise BadInput(f"{path} holds something{wanted}: expected a new folder's name")
    return folder


def writable_folder(path: str | Path, whole: bool = False) -> Path:
    """Check, before any work, that files can be written into a folder; returns `path` with links followed.

    Args:
        path: there or not.
        whole: the folder itself will be made or replaced, so the folder above it must be writable instead.

    Raises:
        BadInput: a file in the way, or no permission to write.
    """
    folder = real(path)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{path} cannot be a folder: a file stands there or above it")
    _check_writable(folder.parent if whole else folder, path)
    return folder


def writable_file(path: str | Path, new: bool = False) -> Path:
    """Check, before any work, that a file can be written; returns `path` with links followed.

    Args:
        path: there or not.
        new: refuse a file that exists.

    Raises:
        BadInput: a folder or a device there, a file that exists already, or no permission to write.
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
    """Raises BadInput unless a folder can be made in `folder`, or in the nearest folder above it that exists.

    It is tried, since the permission bits do not tell all.
    """
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise BadInput(f"{path} cannot be written: {nearest} is a file")
    try:
        probe = _temporary(nearest / "probe")
        probe.mkdir()
        probe.rmdir()
        clear_leftovers(nearest / "probe")  # of a process killed between these two lines
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written ({error.strerror} in {nearest}): expected a place that can"
        ) from error


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, for a name out of an untrusted file: it must not lead out of the folder.

    Links in the Hub's cache from `snapshots/REVISION/` to `blobs/` are allowed: its files lie there.

    Raises:
        BadInput: no name, an absolute one or one with '..', or a link that leads out of the folder.
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
    """A temporary folder beside `final` that replaces it only if the block succeeds.

    Args:
        final: the folder to write; links are followed.
        alone: the caller holds a lock, so nobody else writes there: the leftovers of all earlier runs are removed.
            Otherwise only those of processes that are known to have ended.

    Raises:
        BadInput: the disk is full or cannot be written; nothing is left behind.
    """
    final = real(final)
    if final.is_file() or any(parent.is_file() for parent in final.parents):
        raise BadInput(f"{final} cannot be a folder: a file stands there or above it")
    temporary, before = _temporary(final), _temporary(final)
    try:
        with explain_errors(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(final, alone)
            temporary.mkdir()
            yield temporary
            if final.exists():  # moved aside: a kill leaves the old folder, the new one or none, but no half of either
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
    """A temporary file's path beside `final` that replaces it only if the block succeeds.

    Raises:
        BadInput: the disk is full or cannot be written, or a file stands where a folder should; nothing is left behind.
    """
    final = real(final)
    if any(parent.is_file() for parent in final.parents):
        raise BadInput(f"{final} cannot be a file: a file stands where its folder should be")
    folder = _temporary(final)
    try:
        with explain_errors(final.parent):
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
    """Remove the temporary files and folders that killed processes left of `final`.

    Args:
        final: what they were to become.
        alone: nobody else writes it now, so all of them go, also those named as in earlier versions.
    """
    ours = re.compile(re.escape(f".{_short(final.name)}-") + r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
    earlier = re.compile(re.escape(f".{final.name}-") + r"[a-z0-9_]{8}")
    if not is_folder(final.parent):
        return
    with os.scandir(final.parent) as entries:
        leftovers = [
            entry
            for entry in entries
            if ((name := ours.fullmatch(entry.name)) and name[1] == _machine() and not alive(int(name[2])))
            or (alone and (name or earlier.fullmatch(entry.name)))
        ]
    for entry in leftovers:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _temporary(final: Path) -> Path:
    """A new name beside `final`, with the machine and the process id in it."""
    return final.with_name(f".{_short(final.name)}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _short(name: str) -> str:
    """A name; of a long one its beginning and a hash."""
    raw = os.fsencode(name)
    if len(raw) <= LONGEST:
        return name
    beginning = os.fsdecode(raw[: LONGEST - 20]).encode("ascii", "ignore").decode()
    return f"{beginning}-{hashlib.sha256(raw).hexdigest()[:16]}"


@functools.cache
def _machine() -> str:
    """8 hexadecimal digits for where process ids are unique: a hash of the host's name and the PID namespace."""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


# ---------------------------------------------------------------- damage


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal; a process computes it again only if the file has changed.

    Raises:
        BadInput: a file that is not there or cannot be read.
    """
    with explain_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for somebody to write into it
            raise BadInput(f"{path} is no ordinary file")
    with explain_errors(path), path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in _SHA256:
            _SHA256[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _SHA256[key]


def damaged(folder: Path, wanted: dict[str, str]) -> str | None:
    """The first of a folder's files that is missing or has another sha256 than wanted; None if all are right."""
    for name, sha256 in wanted.items():
        try:
            if sha256_of(inside(folder, name)) != sha256:
                return name
        except BadInput:
            return str(name)
    return None
