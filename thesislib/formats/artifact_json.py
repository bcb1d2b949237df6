"""artifact.json, the description of an artifact: written last, and checked field by field and file by file when read.

It has the recipe, the subject's fingerprint, sizes, versions and a checksum of every file.
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
KEY = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)  # a block's number as a key
READ = (".json", ".jinja", ".safetensors", ".txt", ".model", ".tiktoken", ".bin")  # suffixes of files that are read


def write_record(folder: Path, *, sizes: Mapping[str, int], **facts: Any) -> None:
    """Write artifact.json into a folder whose other files are complete.

    Args:
        folder: the artifact.
        sizes: see `thesislib.formats.sizes.sizes`; the bytes of the files are added.
        facts: the other fields of `FIELDS`. Checksums and versions are added.
    """
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
    record = json.loads(json.dumps(record))  # the checksum is over the record as it will be read
    text = json.dumps({**record, "sha256": checksum(record)}, indent=1, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", "utf8")


def _encoding(value: Any) -> bool:
    """dense, bitmap, a pattern such as 2:4, the words of a grid, or of a pair such as lowrank:64:dense:dense"""
    try:
        return isinstance(value, str) and (value == "dense" or bool(reader(value)))
    except (BadInput, ValueError):
        return False


def _number(value: Any) -> bool:
    """a block's number"""
    return natural(value) and value < MOST_BLOCKS


FIELDS = {  # of artifact.json, see `thesislib.shapes`
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
    "beside?": {str: natural},
    "versions": {str: str},
    "files": {str: SHA256},
}


def read_artifact(folder: str | Path) -> dict[str, Any]:
    """The content of artifact.json, after every field and every file's checksum was checked.

    Raises:
        BadInput: no artifact, or one of a newer format; a field that is wrong; a file that is missing, damaged or
            outside the folder, or that would be read and is not listed.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise BadInput(f"{folder} is no artifact: expected a folder with {RECORD}, which `thesislib compress` writes")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or type(record.get("thesislib_artifact")) is not int:
        raise BadInput(f"{folder / RECORD} is not thesislib's: expected a number 'thesislib_artifact'")
    if record["thesislib_artifact"] > SCHEMA:
        raise BadInput(
            f"{folder} is an artifact of format {record['thesislib_artifact']}: this thesislib {thesislib.__version__} "
            f"reads up to format {SCHEMA}; a newer one is needed"
        )
    if record.pop("sha256", None) != checksum(record):
        raise BadInput(f"{folder / RECORD} is damaged or was edited: its checksum is wrong; make the artifact again")
    if why := wrong(record, FIELDS) or _contradiction(record, folder):
        raise BadInput(f"{folder / RECORD} is not as `thesislib compress` writes it: {why}; make the artifact again")
    for name in record["files"]:
        if not inside(folder, name).is_file():
            raise BadInput(f"{folder / name} is missing: the artifact is not whole; make it again")
        if name.endswith(".safetensors"):  # its header, so that bytes behind its tensors are refused before all is read
            headers_of(folder / name)
        else:
            check_ordinary(folder / name)
    if name := damaged(folder, record["files"]):
        raise BadInput(f"{folder / name} is damaged: its checksum is not the one in {RECORD}; make the artifact again")
    for name in _readable_files(folder):
        if name not in record["files"]:
            raise BadInput(
                f"{folder / name} is not in the list of {RECORD}, and would be read with the artifact: remove "
                "it, or make the artifact again"
            )
    return record


def _contradiction(record: dict[str, Any], folder: Path) -> str | None:
    """The first contradiction, in words, between fields about blocks and config.json; None if there is none."""
    if "config.json" not in record["files"]:
        return "files lacks config.json"
    config = read_json(inside(folder, "config.json"))
    blocks = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if not _number(blocks) or blocks == 0:
        return f"config.json has num_hidden_layers {blocks!r:.60}: expected a number of blocks below {MOST_BLOCKS}"
    if record["plan"] is not None and len(record["plan"]) != blocks:
        return f"plan has {len(record['plan'])} blocks, config.json {blocks}"
    for later, first in record["repeats"].items():
        if not (KEY.fullmatch(later) and first < int(later) < blocks):
            return f"repeats has {later!r:.60}: {first}: expected two of {blocks} blocks, the first one behind"
    for part, removed in record["without"].items():
        if part not in ("attention", "mlp") or any(i >= blocks for i in removed) or len(set(removed)) < len(removed):
            return f"without has {part!r:.60}: {removed!r:.60}: expected attention or mlp, and some of {blocks} blocks"
    for block, rank in record.get("beside", {}).items():
        if not (KEY.fullmatch(block) and int(block) < blocks and rank > 0):
            return f"beside has {block!r:.60}: {rank}: expected a rank above 0, and one of {blocks} blocks"
    return None


def _readable_files(folder: Path) -> Iterator[str]:
    """The files and links in a folder that transformers or this package would read.

    Notes, licences and hidden files are none of them.
    """
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(above) / name).is_symlink()]
        for name in [*(name for name in files if Path(name).suffix in READ), *links]:
            path = (Path(above) / name).relative_to(folder)
            if not name.lower().startswith((*HARMLESS, ".")) and path != Path(RECORD):
                yield path.as_posix()


def checksum(record: Mapping[str, Any]) -> str:
    """sha256 over the content of artifact.json, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
