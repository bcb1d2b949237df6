"""Chapter 8's question whether relevance is an artefact of scale: what is lost without each block if something stands
in its place, which block makes the attention sink, and what a block's gain says; the recorded run, and what it says."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from thesislib.chapters.phrases import interval, p_value, together
from thesislib.compress.agreement import (
    MIDDLE,
    Agreement,
    Estimate,
    agreement,
    partial_spearman,
    resampled_means,
    spearman,
)
from thesislib.compress.calibration import Visitor, stream
from thesislib.compress.depth import influence, sets_losses
from thesislib.compress.gain import gains
from thesislib.compress.relevance import Items, Outcomes, choices, entropy_change, outcomes
from thesislib.compress.replace import replaced
from thesislib.errors import BadInput
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.stats import Comparison, holm_adjusted, signed_rank
from thesislib.files import data_file, read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows, evaluation_text, windows
from thesislib.sources.rows import origin_of

TASK, TEXT = "arc_easy", "wikipedia"
SKIP = "skip"
# {way: what replaces a block, and the first tokens of a window that do not count for it}
WAYS = {
    "scalar": ("scalar", 0),
    "bias": ("bias", 0),
    "linear": ("linear", 0),
    "bias without the first token": ("bias", 1),
}
PLACES = ("first", "elsewhere")  # of the tokens at which a block is skipped
DIGITS = 5


@dataclass(frozen=True)
class Scale:
    """What was recorded. Lists of blocks are in order; a way that a block does not have is None.

    Attributes:
        scores: {score: one number a block}: cosine, entropy, gain and share (medians over tokens), and "gain, first"
            and "share, first" (medians over windows, at their first token).
        norms: {"first" or "others": the residual's norm before each block and after the last, median over windows or
            tokens}.
        whole: of the whole model: {"correct": one an item, "likelihood": nats, "losses": nats a token of each window}.
        ways: {way: the same of the model without each block}; with "left", the share of the write that the replacement
            misses.
        places: {where a block is skipped: losses of each block}.
        chance: the accuracy of guessing the items.
        made: provenance.
    """

    scores: dict[str, list[float]]
    norms: dict[str, list[float]]
    whole: dict
    ways: dict[str, list[dict | None]]
    places: dict[str, list[list[float]]]
    chance: float
    made: dict

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.scores["cosine"])


# ---------------------------------------------------------------- the recorded run


def record(subject: Subject, exact: Subject, data: str, items: int, windows_: int, length: int, file: Path) -> None:
    """Write a `Scale` to a file. A run that was killed goes on from the file .partial beside it.

    Args:
        subject: the whole model, in any dtype.
        exact: the same in float32, which scores of one pass are made with: gain needs it.
        data: a data spec.
        items: of ARC-Easy, from the part that blocks are ranked by.
        windows_: of calibration text, by which scores and replacements are made; and as many of held-out text.
        length: tokens of a window.
        file: to be written.

    Raises:
        BadInput: see `thesislib.compress.gain.gains` and `thesislib.compress.relevance.choices`.
    """
    started, partial = time.perf_counter(), file.with_name(file.name + ".partial")
    asked = choices(TASK, data, items)
    ids = calibration_windows(subject.tokenizer, TEXT, data, windows_, length)
    held_out = windows(evaluation_text(data), subject.tokenizer, length, windows_).ids
    settings = {
        "protocol": (setup := Setup(TASK, limit=items, fast=True, part="rank")).plain(),
        "corpus_sha256": setup.corpus_sha256(data),
        "text": TEXT,
        "text_sha256": calibration_text(TEXT, data).sha256,
        "held_out_sha256": evaluation_text(data).sha256,
        "data": origin_of(data),
        "windows": windows_,
        "length": length,
        "seed": 0,
        "dtype of scores": str(exact.dtype).removeprefix("torch."),
    }
    blocks = range(subject.depth)
    done: dict = {"chance": asked.chance, "made": provenance(subject, started, **settings)}
    if partial.exists() and _same(made := (before := read_json(partial))["made"], done["made"]):
        done, started = before, started - made["seconds"]

    def once(place: dict, name: str, made: Callable) -> None:
        """Make a part of the record, unless an earlier run has."""
        if name not in place:
            place[name] = made()
            done["made"] = provenance(subject, started, **settings)
            write_whole(partial, json.dumps(done))

    once(done, "scores", lambda: scores(exact, ids))
    once(done, "norms", lambda: norms(exact, ids))
    without: dict = done.setdefault("without", {})  # {way: {block: what is kept}}
    once(without, SKIP, lambda: _skipped(subject, asked, held_out))
    for way in (*WAYS, *PLACES):
        some = without.setdefault(way, {})
        for b in blocks:
            if way in PLACES:
                once(some, str(b), lambda b=b, way=way: losses_skipped(subject, held_out, b, way))
            else:
                once(some, str(b), lambda b=b, way=way: _replaced(subject, b, way, ids, asked, held_out))
    whole, *skip = without[SKIP]
    ways = {SKIP: skip} | {way: [without[way][str(b)] for b in blocks] for way in WAYS}
    places = {place: [without[place][str(b)] for b in blocks] for place in PLACES}
    found = Scale(done["scores"], done["norms"], whole, ways, places, done["chance"], done["made"])
    write_whole(file, json.dumps(asdict(found)))
    partial.unlink()


def _same(before: dict, now: dict) -> bool:
    """Whether two provenances are of the same run, so that one may go on where the other ended."""
    return all(before[name] == now[name] for name in ("fingerprint", "plan", "dtype", "settings"))


def _rounded(values: np.ndarray) -> list:
    return np.round(values, DIGITS).tolist()


def _outcomes(found: Outcomes, losses: np.ndarray) -> list[dict]:
    """What the record keeps of each row of outcomes, and of the losses (rows, windows)."""
    return [
        {"correct": correct.astype(int).tolist(), "likelihood": _rounded(likelihood), "losses": _rounded(nats)}
        for correct, likelihood, nats in zip(found.correct, found.likelihood, losses, strict=True)
    ]


def _skipped(subject: Subject, asked: Items, held_out: torch.Tensor) -> list[dict]:
    """Of the whole model and of the model without each block."""
    blocks = range(subject.depth)
    losses = sets_losses(subject, held_out, [(), *([b] for b in blocks)])
    return _outcomes(outcomes(subject, asked, blocks), losses)


def _replaced(
    subject: Subject, block: int, way: str, ids: torch.Tensor, asked: Items, held_out: torch.Tensor
) -> dict | None:
    """Of the model with a replacement for a block; None if the block cannot have it."""
    how, skip = WAYS[way]
    try:
        smaller, (gap,) = replaced(subject, [block], how, ids, skip=skip)
    except BadInput:
        if block == 0 and how != "scalar":
            return None  # there is no MLP before it that would take the replacement
        raise
    (found,) = _outcomes(outcomes(smaller, asked, ()), sets_losses(smaller, held_out, [()]))
    return {**found, "left": round(gap["left"], DIGITS)}


def scores(subject: Subject, ids: torch.Tensor) -> dict[str, list[float]]:
    """What one pass, or for gain one pass with derivatives, says of each block; see `Scale`."""
    gain, share = gains(subject, ids)
    found = {"cosine": influence(subject, ids), "entropy": entropy_change(subject, ids)}
    for name, values in (("gain", gain), ("share", share)):
        found[name] = values.flatten(1).nanmedian(1).values.tolist()
        found[f"{name}, first"] = values[:, :, 0].nanmedian(1).values.tolist()
    return {name: [float(f"{x:.6g}") for x in values] for name, values in found.items()}


def norms(subject: Subject, ids: torch.Tensor) -> dict[str, list[float]]:
    """The residual's norm at the first token of a window and at the others; see `Scale`."""
    states: list[list[torch.Tensor]] = [[] for _ in range(subject.depth + 1)]

    class Norms(Visitor):
        def seen(self, block, first, x, y):
            states[block].append(x.norm(dim=-1))
            if block == subject.depth - 1:
                states[block + 1].append(y.norm(dim=-1))

    stream(subject, ids, Norms(), title="norms")
    every = [torch.cat(some) for some in states]  # (N, T) each
    places = {"first": slice(None, 1), "others": slice(1, None)}
    return {name: [round(x[:, at].median().item(), 3) for x in every] for name, at in places.items()}


@contextmanager
def skipped(subject: Subject, block: int, place: str) -> Iterator[None]:
    """Inside, a block writes nothing at the first token of a window, or nothing at the others.

    What its attention reads is as before: only its output is left out.
    """

    def hook(_module, args, out):
        first = torch.arange(out.shape[1], device=out.device)[None, :, None] == 0
        return torch.where(first == (place == PLACES[0]), args[0], out)

    handle = subject.blocks[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def losses_skipped(subject: Subject, ids: torch.Tensor, block: int, place: str) -> list[float]:
    """Each window's loss with a block `skipped`, in nats a token."""
    with skipped(subject, block, place):
        return _rounded(sets_losses(subject, ids, [()])[0])


def read(file: Path | None = None) -> Scale:
    """The file that `record` wrote, by default the study's own."""
    return Scale(**read_json(file or data_file("results/08_relevance_scale.json")))


# ---------------------------------------------------------------- what is lost


def lost_text(record: Scale, way: str) -> np.ndarray:
    """(B, windows) nats a token of held-out text that are lost without each block; nan for a block without this way."""
    whole = np.array(record.whole["losses"])
    return np.array([np.full(len(whole), np.nan) if r is None else r["losses"] - whole for r in record.ways[way]])


def lost_likelihood(record: Scale, way: str) -> np.ndarray:
    """(B, N) nats of each item's right ending that are lost; nan for a block without this way."""
    whole = np.array(record.whole["likelihood"])
    return np.array([np.full(len(whole), np.nan) if r is None else whole - r["likelihood"] for r in record.ways[way]])


MEASURES = {"text": lost_text, "answers": lost_likelihood}


def lost(record: Scale, way: str, measure: str) -> np.ndarray:
    """(B,) mean loss without each block by one of `MEASURES`, in nats a token or nats an answer."""
    return MEASURES[measure](record, way).mean(1)


def perplexities(record: Scale, way: str) -> np.ndarray:
    """(B,) of held-out text without each block."""
    return np.exp(np.mean(record.whole["losses"]) + lost(record, way, "text"))


def relevances(record: Scale, way: str, resamples: int = 2_000, seed: int = 0) -> list[Estimate | None]:
    """Each block's relevance with its interval over items; the last is that of the mean accuracy over blocks.

    Relevance is undefined in a resample in which the whole model is at chance. Close to that it has no lower bound, so
    such a resample counts as minus infinity.
    """
    have = [b for b, row in enumerate(record.ways[way]) if row is not None]
    rows = np.array([record.whole["correct"], *(record.ways[way][b]["correct"] for b in have)], float)
    accuracy = resampled_means(np.vstack([rows, rows[1:].mean(0)]), resamples, seed)
    above = np.maximum(accuracy - record.chance, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(above[:, :1] > 0, 1 - above[:, 1:] / above[:, :1], -np.inf)
    low, high = np.quantile(values[1:], MIDDLE, axis=0, method="nearest")
    found = dict(zip([*have, record.depth], map(Estimate, values[0], low, high), strict=True))
    return [found.get(b) for b in range(record.depth + 1)]


def paired(record: Scale, measure: str) -> dict[str, Comparison]:
    """Each way against skipping, over the blocks that have both: Wilcoxon's signed-rank test of the loss, p by Holm."""
    skip = lost(record, SKIP, measure)
    pairs = {}
    for way in WAYS:
        other = lost(record, way, measure)
        both = ~np.isnan(other)
        pairs[way] = signed_rank(skip[both], other[both])
    return holm_adjusted(pairs)


def ranked_as_skipped(record: Scale, measure: str, k: int) -> dict[str, Agreement]:
    """How each way ranks the blocks beside skipping; intervals are over windows or items."""
    found = {}
    for way in WAYS:
        other = MEASURES[measure](record, way)
        have = ~np.isnan(other).any(1)
        skip = MEASURES[measure](record, SKIP)
        found[way] = agreement(resampled_means(other[have]), resampled_means(skip[have]), k)
    return found


def summary(record: Scale, k: int = 4) -> pd.DataFrame:
    """By way: what is lost without a block, relevance of the mean block, and how the blocks rank as when skipped."""
    rows = {}
    for way in (SKIP, *WAYS):
        text, answers = (lost(record, way, measure) for measure in MEASURES)
        mean = relevances(record, way)[-1]
        rows[way] = {
            "blocks": int((~np.isnan(text)).sum()),
            "text: nats a token, median": f"{np.nanmedian(text):.3f}",
            "answers: nats, median": f"{np.nanmedian(answers):.2f}",
            "relevance of the mean": "" if mean is None else _bounded(mean),
        }
    for measure in MEASURES:
        for way, found in ranked_as_skipped(record, measure, k).items():
            rows[way][f"{measure}: Spearman with skip"] = interval(*found.spearman, ".2f")
            rows[way][f"{measure}: of {k} least, shared"] = f"{k * found.shared.value:.0f}"
    return pd.DataFrame(rows).T.fillna("").rename_axis("way")


def _bounded(e: Estimate) -> str:
    """An estimate whose interval may have no lower end."""
    return interval(*e, ".2f") if np.isfinite(e.low) else f"{e.value:.2f} [no bound, {e.high:.2f}]"


def by_block(record: Scale) -> pd.DataFrame:
    """By block: cosine, gain, share, perplexity under each way, and relevance when it is skipped."""
    columns: dict[str, list] = {name: [f"{x:.3g}" for x in record.scores[name]] for name in ("cosine", "gain", "share")}
    for way in (SKIP, *WAYS):
        columns[f"perplexity, {way}"] = ["" if np.isnan(x) else f"{x:.4g}" for x in perplexities(record, way)]
    columns["answers: nats lost, skip"] = [f"{x:.2f}" for x in lost(record, SKIP, "answers")]
    columns["relevance, skip"] = ["" if e is None else _bounded(e) for e in relevances(record, SKIP)[:-1]]
    return pd.DataFrame(columns).rename_axis("block")


# ---------------------------------------------------------------- gain, and the sink


def beyond_cosine(record: Scale, ends: int = 2) -> pd.DataFrame:
    """The rank correlation of each score with what is lost, and what is left of it given cosine, with its p value.

    Args:
        record: of the run.
        ends: blocks at either end that "middle" leaves out, as the paper does.
    """
    rows = {}
    parts = {"all": slice(None), "middle": slice(ends, record.depth - ends)}
    for (part, of), measure in itertools.product(parts.items(), MEASURES):
        y, cosine = lost(record, SKIP, measure)[of], np.array(record.scores["cosine"])[of]
        for name in record.scores:
            x = np.array(record.scores[name])[of]
            rho, p = (np.nan, np.nan) if name == "cosine" else partial_spearman(x, y, cosine)
            plain = float(spearman(x[None], y[None])[0])
            rows[part, measure, name] = {"Spearman": plain, "given cosine": rho, "p": p}
    return pd.DataFrame(rows).T.rename_axis(["blocks", "lost", "score"])


def sink(record: Scale) -> int:
    """The block after which the first token's residual has grown most."""
    return int(np.diff(record.norms["first"]).argmax())


def at_places(record: Scale, block: int | None = None) -> dict[str, float]:
    """Perplexity of the whole model, and with a block skipped at the first token only, elsewhere only and everywhere.

    Args:
        record: of the run.
        block: by default the `sink`.
    """
    b = sink(record) if block is None else block
    places = {place: record.places[place][b] for place in PLACES}
    some = {"nowhere": record.whole["losses"], **places, "everywhere": record.ways[SKIP][b]["losses"]}
    return {place: float(np.exp(np.mean(nats))) for place, nats in some.items()}


def by_first_token(record: Scale) -> np.ndarray:
    """(B,) nats a token that are lost where each block is skipped at the first token only."""
    return np.mean(record.places["first"], axis=1) - np.mean(record.whole["losses"])


# scores that sentences name
SHOWN = {"gain": "gain", "share": "share, median over tokens,", "share, first": "share at the first token"}


def sentences(record: Scale) -> list[str]:
    """What the record says of replacements, of the sink and of gain; one text each."""
    return [_ways_said(record), _sink_said(record), _gain_said(record)]


def _ways_said(record: Scale) -> str:
    said = []
    for measure, unit in (("text", "nats a token of held-out text"), ("answers", "nats of an item's right ending")):
        tests = paired(record, measure)
        told = [f"{way} {c.difference:+.2g} ({p_value(c.p)})" for way, c in tests.items() if c.told]
        open_ = [f"{way} ({p_value(c.p)})" for way, c in tests.items() if not c.told]
        said.append(
            f"In {unit}, against skipping: {together(told) if told else 'no way is told apart'}"
            + (f"; not told apart: {together(open_)}" if told and open_ else "")
            + "."
        )
    text = ranked_as_skipped(record, "text", 4)
    return " ".join(
        [
            *said,
            f"Wilcoxon's signed-rank test over {record.depth} blocks, Holm for {len(WAYS)} ways. Rank "
            f"correlation with skipping, on text: scalar {text['scalar'].spearman.value:.2f}, "
            f"bias {text['bias'].spearman.value:.2f}, linear {text['linear'].spearman.value:.2f}.",
        ]
    )


def _sink_said(record: Scale) -> str:
    b, found = sink(record), at_places(record)
    norms, cosine = record.norms["first"], record.scores["cosine"]
    place = sorted(cosine).index(cosine[b]) + 1
    worst = int((perplexities(record, SKIP) > perplexities(record, SKIP)[b]).sum()) + 1
    gain = record.scores["gain, first"][b]
    amplified = "its write there is amplified" if gain > 1 else "its write there is not amplified"
    decides = (
        "More is lost at that one token than at all others together; the cosine score is a mean over tokens."
        if found["first"] > found["elsewhere"]
        else "More is lost at the other tokens than at the first."
    )
    return (
        f"Block {b} makes the attention sink: the first token's residual goes from {norms[b]:,.0f} to "
        f"{norms[b + 1]:,.0f}. Its cosine score is number {place} from the lowest of {record.depth}, its perplexity "
        f"when skipped number {worst} from the highest. Skipped at the first token only, perplexity is "
        f"{found['first']:.1f}; at the other tokens only, {found['elsewhere']:.1f}; everywhere, "
        f"{found['everywhere']:.1f}; the whole model's is {found['nowhere']:.1f}. The gain at the first token is "
        f"{gain:.2f}, so {amplified}. {decides}"
    )


def _gain_said(record: Scale) -> str:
    table = beyond_cosine(record)
    said = []
    for name, words in SHOWN.items():
        rows = [(measure, table.loc["all", measure, name]) for measure in MEASURES]
        each = together(f"{row['given cosine']:.2f} for {of} ({p_value(row['p'])})" for of, row in rows)
        said.append(f"{words} {each}")
    return (
        "What each says of the loss beyond cosine, as partial Spearman, permutation tests not adjusted: "
        + "; ".join(said)
        + "."
    )
