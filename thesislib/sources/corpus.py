"""The text a subject meets: running text cut into windows, trivia questions, multiple choice.

Each takes a data spec, see `thesislib.sources.rows`.
"""

import hashlib
import html
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from thesislib.errors import BadInput, unknown
from thesislib.sources.rows import Row, _listed, _text, kind_of, rows, take

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
    """Where the articles of WikiText begin: at a line " = Title = " (a section has " = = Section = = "), also without
    the spaces around it."""
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
        raise BadInput(
            f"window length {length} is too small: a window predicts all its tokens but the first, so at least 2"
        )
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


def calibration_windows(
    tokenizer, kind: str, data: str | Path, n: int, length: int = 512, seed: int = 0
) -> torch.Tensor:
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


def questions(
    data: str | Path = "embedded", *, open_book: bool = False, limit: int | None = None, seed: int = 0
) -> list[Question]:
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
        return (
            "SQuAD, passages given (embedded)" if open_book else "TriviaQA rc.wikipedia.nocontext validation (embedded)"
        )
    return f"TriviaQA validation, {'open' if open_book else 'closed'} book"


def _question(row: Row, context: str | None = None) -> Question:
    answer = row["answer"] if isinstance(row["answer"], dict) else {"aliases": row["answer"]}  # NQ-open has a list
    names = [
        answer.get("value"),
        *_listed(answer.get("aliases") or []),
        *_listed(answer.get("normalized_aliases") or []),
    ]
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
        holding = [
            p for p in passages if any(re.search(rf"\b{re.escape(a)}\b", p, re.IGNORECASE) for a in plain.aliases)
        ]
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
