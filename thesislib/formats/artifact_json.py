"""artifact.json: what an artifact says of itself, written when all else is there, and believed only once every field
and file is found right.

It holds the recipe, the subject's fingerprint, sizes, versions and a checksum of every file.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import thesislib
from thesislib.errors import BadInput
from thesislib.files import HARMLESS, check_ordinary, damaged, inside, read_json, sha256_of
from thesislib.formats.checkpoint import headers_of
from thesislib.model.layers import reader
from thesislib.model.subject import DTYPES
from thesislib.shapes import SHA256, natural, wrong

SCHEMA = 1
RECORD = "artifact.json"
MOST_BLOCKS = 10_000


def write_record(folder: Path, *, sizes: Mapping[str, int], **facts: Any) -> None:
    """artifact.json of a folder that is whole but for it: the facts given, what lies there with checksums, and
    versions."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in files.values():
        path.chmod(0o644)  # safetensors makes its files private
    weights = sum(path.stat().st_size for path in files.values() if path.suffix == ".safetensors")
    others = sum(path.stat().st_size for path in files.values()) - weights
    record = {
        "thesislib_artifact": SCHEMA,
        **facts,
        "sizes": {**sizes, "bytes_on_disk": weights, "other_bytes_on_disk": others},
        "versions": {
            "thesislib": thesislib.__version__,
            "python": platform.python_version(),
            **{n: version(n) for n in ("torch", "transformers", "safetensors")},
        },
        "files": {name: sha256_of(path) for name, path in files.items()},
    }
    record = json.loads(json.dumps(record))  # as it will be read: the checksum is of that
    (folder / RECORD).write_text(
        json.dumps({**record, "sha256": checksum(record)}, indent=1, ensure_ascii=False) + "\n", "utf8"
    )


def _encoding(value: Any) -> bool:
    """dense, bitmap, a pattern such as 2:4, or the words of a grid"""
    try:
        return isinstance(value, str) and (value == "dense" or bool(reader(value)))
    except (BadInput, ValueError):
        return False


def _number(value: Any) -> bool:
    """a block's number"""
    return natural(value) and value < MOST_BLOCKS


SAYS = {  # what artifact.json says
    "thesislib_artifact": natural,
    "label": str,
    "name": str,
    "plan": (None, [_number]),
    "stages": [dict],
    "reports": [dict],
    "base": {"name?": str, "fingerprint?": str, "label?": str},
    "fingerprint": SHA256,
    "dtype": tuple(map(re.compile, DTYPES)),
    "sizes": {
        "parameters": natural,
        "nonzero_parameters": natural,
        "bytes_on_disk": natural,
        "other_bytes_on_disk": natural,
        "bytes_in_memory?": natural,
    },
    "encodings": {str: _encoding},
    "repeats": {str: _number},
    "without": {"attention?": [_number], "mlp?": [_number]},
    "versions": {str: str},
    "files": {str: SHA256},
}


def read_artifact(folder: str | Path) -> dict[str, Any]:
    """What an artifact says about itself, once every field is found as it is written and every checksum right.

    Raises:
        BadInput: not an artifact, a newer one than this thesislib knows, a file missing, damaged or outside the folder,
            a file that would be read and is not in the list, a field that is odd.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise BadInput(f"{folder} is no artifact: expected a folder with {RECORD}, which `thesislib compress` writes")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or type(record.get("thesislib_artifact")) is not int:
        raise BadInput(f"{folder / RECORD} is not thesislib's: expected a number 'thesislib_artifact'")
    if record["thesislib_artifact"] > SCHEMA:
        made = f"artifact of format {record['thesislib_artifact']}"
        raise BadInput(
            f"{folder} is an {made}: this thesislib {thesislib.__version__} reads up to format {SCHEMA}; a newer "
            "one is needed"
        )
    if record.pop("sha256", None) != checksum(record):
        raise BadInput(f"{folder / RECORD} is damaged or was edited: its checksum is wrong; make the artifact again")
    if odd := wrong(record, SAYS) or _misfit(record, folder):
        raise BadInput(f"{folder / RECORD} is not as `thesislib compress` writes it: {odd}; make the artifact again")
    for name in record["files"]:
        if not inside(folder, name).is_file():
            raise BadInput(f"{folder / name} is missing: the artifact is not whole; make it again")
        if name.endswith(".safetensors"):  # a terabyte behind its tensors is refused before it is read for the checksum
            headers_of(folder / name)
        else:
            check_ordinary(folder / name)
    if name := damaged(folder, record["files"]):
        raise BadInput(f"{folder / name} is damaged: its checksum is not the one in {RECORD}; make the artifact again")
    for name in _read_besides(folder):
        if name not in record["files"]:
            raise BadInput(
                f"{folder / name} is not in the list of {RECORD}, and would be read with the artifact: remove "
                "it, or make the artifact again"
            )
    return record


def _misfit(record: dict[str, Any], folder: Path) -> str | None:
    """What an artifact's record says of blocks that its configuration has not, in words."""
    if "config.json" not in record["files"]:
        return "files lacks config.json"
    config = read_json(inside(folder, "config.json"))
    blocks = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if not _number(blocks) or blocks == 0:
        return f"config.json has num_hidden_layers {blocks!r:.60}: expected a number of blocks below {MOST_BLOCKS}"
    if record["plan"] is not None and len(record["plan"]) != blocks:
        return f"plan has {len(record['plan'])} blocks, config.json {blocks}"
    for later, first in record["repeats"].items():
        if not (later.isascii() and later.isdecimal() and first < int(later) < blocks):
            return f"repeats has {later!r:.60}: {first}: expected two of {blocks} blocks, the first one behind"
    for part, gone in record["without"].items():
        if part not in ("attention", "mlp") or any(i >= blocks for i in gone) or len(set(gone)) < len(gone):
            return f"without has {part!r:.60}: {gone!r:.60}: expected attention or mlp, and some of {blocks} blocks"
    return None


def _read_besides(folder: Path) -> Iterator[str]:
    """The files in a folder that transformers or we would read: all but notes, licences and what is hidden."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*files, *(name for name in folders if (Path(place) / name).is_symlink())]:
            path = (Path(place) / name).relative_to(folder)
            read = (
                path.suffix in (".json", ".jinja", ".safetensors", ".txt", ".model", ".tiktoken", ".bin")
                or name in folders
            )
            if read and not name.lower().startswith((*HARMLESS, ".")) and path != Path(RECORD):
                yield path.as_posix()


def checksum(record: Mapping[str, Any]) -> str:
    """sha256 of what artifact.json says, however it is laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
