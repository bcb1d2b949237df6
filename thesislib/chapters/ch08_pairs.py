"""Chapter 8's search for the blocks to remove, held against every pair: the recorded losses, and what they say."""

import itertools
import json
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from thesislib.chapters.ch08_runs import free
from thesislib.chapters.phrases import interval, together
from thesislib.compress.agreement import Estimate, estimate, resampled_means
from thesislib.compress.depth import angular_distances, influence, sets_losses, taylor
from thesislib.compress.exhaustive import Additivity, Blocks, Found, additivity, searches
from thesislib.compress.stability import chosen
from thesislib.files import data_file, read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows
from thesislib.sources.rows import origin_of

TEXT = "wikipedia"
TRIPLES, AGAIN = 100, 40  # triples that pairs predict to cost least; pairs that are measured on other windows too
RESAMPLES = 1_000  # of the windows
EXTREMES = 3  # pairs that a sentence names


@dataclass(frozen=True)
class Losses:
    """Each window's loss without each set of blocks, in nats a token, rounded to 5 digits.

    Attributes:
        searched: {blocks: of each window of the search}: without none, each, all pairs and some triples.
        others: the same of as many other windows, without none and some pairs.
        chosen: {ranking: {how many: blocks}} of rankings that measure no set, from the windows of the search.
        made: provenance.
    """

    searched: dict[Blocks, list[float]]
    others: dict[Blocks, list[float]]
    chosen: dict[str, dict[int, Blocks]]
    made: dict

    @property
    def depth(self) -> int:
        """How many blocks the model has."""
        return sum(len(blocks) == 1 for blocks in self.searched)

    def to_json(self) -> str:
        """One JSON object; the key of a set is its blocks."""
        plain = asdict(self)
        samples = {name: {" ".join(map(str, s)): nats for s, nats in plain[name].items()} for name in SAMPLES}
        return json.dumps({**plain, **samples})

    @classmethod
    def from_json(cls, plain: Mapping) -> "Losses":
        """What `to_json` wrote."""
        searched, others = ({tuple(map(int, s.split())): nats for s, nats in plain[name].items()} for name in SAMPLES)
        chosen = {name: {int(k): tuple(s) for k, s in sets.items()} for name, sets in plain["chosen"].items()}
        return cls(searched, others, chosen, plain["made"])


SAMPLES = ("searched", "others")


def record(subject: Subject, data: str, windows: int, length: int, file: Path) -> None:
    """Write the `Losses` to a file. A run that was killed goes on from the file .partial beside it.

    The windows of the search are the first ones of the calibration text's choice with seed 0, the others those that
    follow there.

    Args:
        subject: the whole model.
        data: see `thesislib.sources.corpus.calibration_text`.
        windows: of the search; as many others.
        length: tokens of a window.
        file: to write.
    """
    started, partial = time.perf_counter(), file.with_name(file.name + ".partial")
    ids = calibration_windows(subject.tokenizer, TEXT, data, 2 * windows, length)
    settings = {
        "text": TEXT, "text_sha256": calibration_text(TEXT, data).sha256, "data": origin_of(data),
        "windows": windows, "length": length, "seed": 0,
    }  # fmt: skip
    done = Losses({}, {}, {}, {})
    if partial.exists():
        before, same = Losses.from_json(read_json(partial)), provenance(subject, started, **settings)
        if all(before.made[name] == same[name] for name in ("fingerprint", "plan", "dtype", "settings")):
            done, started = before, started - before.made["seconds"]

    def measure(sets: Collection[Blocks], losses: dict[Blocks, list[float]], some) -> None:
        missing = sorted({*sets} - {*losses}, key=lambda s: (len(s), s))
        # sets with the same first block share what is before it
        for _, group in itertools.groupby(missing, key=lambda s: (len(s), s[:1] if len(s) > 1 else ())):
            new = [*group]
            losses.update(zip(new, np.round(sets_losses(subject, some, new), 5).tolist(), strict=True))
            done.made.update(provenance(subject, started, **settings))
            write_whole(partial, done.to_json())

    measure(up_to_pairs(subject.depth), done.searched, ids[:windows])
    if not done.chosen:
        done.chosen.update(rankings(subject, ids[:windows]))
    measure(once_more(done, AGAIN), done.others, ids[windows:])
    measure(triples(done, TRIPLES), done.searched, ids[:windows])
    partial.replace(file)


def up_to_pairs(depth: int) -> list[Blocks]:
    """The empty set, all single blocks and all pairs."""
    return [s for size in range(3) for s in itertools.combinations(range(depth), size)]


def rankings(subject: Subject, ids: torch.Tensor) -> dict[str, dict[int, Blocks]]:
    """The two and three blocks that go by scores of single blocks, or as a run of neighbours; and the last ones."""
    angles = angular_distances(subject, ids)
    scores = {"one-shot by cosine": influence(subject, ids)}
    scores["one-shot by Taylor"] = [*taylor(subject, ids, range(subject.depth)).values()]
    found = {name: {k: tuple(map(int, chosen(np.array(x), k))) for k in (2, 3)} for name, x in scores.items()}
    starts = {k: int(np.nanargmin(angles[k])) for k in (2, 3)}
    found["angular, neighbours"] = {k: tuple(range(at, at + k)) for k, at in starts.items()}
    found["last blocks"] = {k: tuple(range(subject.depth - k, subject.depth)) for k in (2, 3)}
    return found


def triples(losses: Losses, count: int) -> set[Blocks]:
    """The triples that single blocks and pairs predict to cost least; all that greedy and one-shot may meet in a
    resample of the windows, so that their intervals are known; and those of rankings."""
    mean = {s: float(np.mean(nats)) for s, nats in losses.searched.items()}

    def predicted(triple: Blocks) -> float:
        pairs, singles = (sum(mean[s] for s in itertools.combinations(triple, size)) for size in (2, 1))
        return pairs - singles + mean[()]

    every = sorted(itertools.combinations(range(losses.depth), 3), key=predicted)
    found = {*every[:count], *(sets[3] for sets in losses.chosen.values())}
    sets = up_to_pairs(losses.depth)
    means = resampled_means(np.array([losses.searched[s] for s in sets]), RESAMPLES)
    singles = means[:, 1 : 1 + losses.depth]
    found |= {tuple(map(int, s)) for s in np.unique(chosen(singles, 3), axis=0)}
    for first in np.unique(singles.argmin(1)):
        rows = [i for i, s in enumerate(sets) if len(s) == 2 and first in s]
        for i in np.unique(means[singles.argmin(1) == first][:, rows].argmin(1)):
            pair = sets[rows[i]]
            found |= {tuple(sorted((*pair, b))) for b in range(losses.depth) if b not in pair}
    return found


def once_more(losses: Losses, count: int) -> list[Blocks]:
    """What is measured on other windows: the whole model, the pairs that cost least, and those of rankings."""
    pairs = sorted((s for s in losses.searched if len(s) == 2), key=lambda s: np.mean(losses.searched[s]))
    return [(), *{*pairs[:count], *(sets[2] for sets in losses.chosen.values())}]


# ---------------------------------------------------------------- what the chapter shows

# as a table or a sentence calls a search or a ranking; others are called as in the record
NAMES = {"best": "best of all", "one-shot": "one-shot by perplexity", "angular, neighbours": "neighbours by angle"}


def read(file: Path | None = None) -> Losses:
    """The file that `record` wrote, by default the study's own."""
    return Losses.from_json(read_json(file or data_file("results/08_relevance_pairs.json")))


def _arrays(losses: Mapping[Blocks, list[float]]) -> tuple[list[Blocks], np.ndarray]:
    """The sets, and their losses (sets, windows)."""
    return [*losses], np.array([*losses.values()])


def found(record: Losses, k: int, more: Mapping[str, Blocks] | None = None) -> dict[str, Found]:
    """What each search and ranking finds for k blocks, see `thesislib.compress.exhaustive.searches`. For three blocks
    the best is that of the measured triples.

    Args:
        record: what was measured.
        k: 2 or 3.
        more: {name: blocks} of choices that were made elsewhere.

    Raises:
        BadInput: a choice that was not measured.
    """
    others = {name: sets[k] for name, sets in record.chosen.items()} | dict(more or {})
    return searches(*_arrays(record.searched), k, others, RESAMPLES)


def search_table(record: Losses, k: int, more: Mapping[str, Blocks] | None = None) -> pd.DataFrame:
    """A row a search: the blocks that go, the perplexity without them, how much dearer that is than the best, and the
    place among the measured sets; also the perplexity on windows that no search saw, where it was measured."""
    rows, other = [], {s: np.exp(np.mean(nats)) for s, nats in record.others.items()}
    for name, f in found(record, k, more).items():
        of = f"of the {f.of:,} measured" if f.of < math.comb(record.depth, k) else f"of all {f.of:,}"
        row = {
            "search": NAMES.get(name, name),
            "blocks": together(map(str, f.blocks)),
            "perplexity": f"{np.exp(f.loss):,.4g}",
            "dearer than the best by": _percent(f.regret),
            f"rank {of}": interval(*f.rank, ".0f"),
        }
        if other and k < 3:
            row["on other windows"] = f"{other[f.blocks]:,.4g}" if f.blocks in other else "not measured"
        rows.append(row)
    return pd.DataFrame(rows).set_index("search")


def dense(record: Losses) -> float:
    """The whole model's perplexity on the windows of the search."""
    return float(np.exp(np.mean(record.searched[()])))


class Again(NamedTuple):
    """What the best pair of the search is on other windows.

    Args:
        pair: the best of all on the windows of the search.
        rank: there; 1 is the best.
        of: how many pairs were measured there.
        regret: how much higher its loss is than the least there.
        best: the pair with the least loss there.
        rank_here: of that one on the windows of the search.
    """

    pair: Blocks
    rank: int
    of: int
    regret: Estimate
    best: Blocks
    rank_here: int


def again(record: Losses) -> Again:
    """The winner's curse of an exhaustive search. The least loss on other windows is of few windows too."""
    here = sorted((s for s in record.searched if len(s) == 2), key=lambda s: np.mean(record.searched[s]))
    pairs = [s for s in record.others if len(s) == 2]
    means = resampled_means(np.array([record.others[s] for s in pairs]), RESAMPLES)
    row = pairs.index(here[0])
    best = pairs[int(means[0].argmin())]
    regret = estimate(means[:, row] - means.min(1))
    return Again(here[0], 1 + int((means[0] < means[0, row]).sum()), len(pairs), regret, best, 1 + here.index(best))


def pairs_add_up(record: Losses, among: Collection[int] | None = None) -> Additivity:
    """Whether the damages of two blocks are the sum of each one's, among some blocks or all."""
    among = range(record.depth) if among is None else among
    return additivity(*_arrays({s: x for s, x in record.searched.items() if len(s) < 3 and {*s} <= {*among}}))


def excesses(record: Losses) -> pd.DataFrame:
    """(depth, depth) what a pair loses beyond the sum of both, in nats a token; nan on the diagonal."""
    found, square = pairs_add_up(record), np.full((record.depth, record.depth), np.nan)
    for (a, b), excess in zip(found.sets, found.excess, strict=True):
        square[a, b] = square[b, a] = excess
    return pd.DataFrame(square).rename_axis(index="block", columns="block")


def mean_excess(record: Losses, distance: int | None = None, block: int | None = None) -> Estimate:
    """The mean excess of pairs of middle blocks so far apart, or with a block in it; of all such pairs by default."""
    pairs = [
        (a, b)
        for a, b in itertools.combinations(free(record.depth), 2)
        if distance in (None, b - a) and block in (None, a, b)
    ]
    return estimate(resampled_means(_excess(record, pairs), RESAMPLES).mean(1))


def _excess(record: Losses, pairs: Collection[Blocks]) -> np.ndarray:
    """Each window's excess of pairs, (pairs, windows)."""
    x = {s: np.array(nats) for s, nats in record.searched.items()}
    return np.array([x[a, b] - x[a,] - x[b,] + x[()] for a, b in pairs])


# ---------------------------------------------------------------- sentences


def _percent(regret: Estimate) -> str:
    """How much dearer in perplexity a difference of losses is."""
    value, low, high = (100 * np.expm1(x) for x in regret)
    return interval(value, low, high, ",.1f" if value < 1000 else ",.0f") + " %"


def _blocks(blocks: Blocks) -> str:
    return together(map(str, blocks))


def _search_sentence(record: Losses, k: int) -> str:
    """What costs least of the measured sets of k blocks, which searches find it, and how much dearer the others are."""
    rows, whole = found(record, k), math.comb(record.depth, k)
    best, what = rows["best"], {2: "pairs", 3: "triples"}[k]
    among = f"all {whole:,} {what}" if best.of == whole else f"{best.of:,} of the {whole:,} {what}"
    text = (
        f"Of {among} the removal of {_blocks(best.blocks)} costs least: perplexity {np.exp(best.loss):.2f} where the "
    )
    text += f"whole model has {dense(record):.2f}."
    if best.of < whole:
        text += (
            " They are those that single blocks and pairs predict to cost least, and those that greedy and one-shot "
            "may meet: one that was not measured may cost less."
        )
    names = {name: NAMES.get(name, name) for name in rows if name != "best"}
    if same := [name for key, name in names.items() if rows[key].blocks == best.blocks]:
        text += f" It is also what these choose: {together(same)}."
    dearer = [
        f"{name} ({_blocks(rows[key].blocks)}) by {_percent(rows[key].regret)}, rank {rows[key].rank.value:,.0f}"
        for key, name in names.items()
        if rows[key].blocks != best.blocks
    ]
    return text + (f" Dearer are {'; '.join(dearer)}." if dearer else "")


def search_sentences(record: Losses) -> list[str]:
    """The best pair, the best measured triple, and what the best pair is on windows that no search saw."""
    a, n = again(record), record.made["settings"]["windows"]
    where = "costs least again"
    if a.rank > 1:
        where = f"has rank {a.rank}: it is {_percent(a.regret)} dearer than {_blocks(a.best)}, which has rank "
        where += f"{a.rank_here} on the windows of the search"
    return [
        *(_search_sentence(record, k) for k in (2, 3)),
        f"On {n} other windows, where {a.of} pairs were measured, the pair {_blocks(a.pair)} {where}.",
    ]


def _against_the_sum(excess: Estimate) -> str:
    """More than the sum, less, or neither, with the mean excess."""
    nats = interval(*excess, "+.3f") + " nats a token"
    if excess.low <= 0 <= excess.high:
        return f"about as much as both alone ({nats})"
    return f"{'more' if excess.value > 0 else 'less'} than both alone ({nats})"


def additivity_sentences(record: Losses) -> list[str]:
    """How well the sum of two damages predicts a pair's, of all blocks and of the middle ones; and which pairs cost
    more."""
    inner, said = free(record.depth), []
    for name, blocks in (("all pairs", range(record.depth)), (f"pairs of blocks {inner[0]} to {inner[-1]}", inner)):
        a = pairs_add_up(record, blocks)
        said.append(
            f"The sum of two single damages explains {a.r2.value:.0%} [{a.r2.low:.0%}, {a.r2.high:.0%}] of the "
            f"variance over {name}, and ranks them with Spearman's {interval(*a.spearman, '.2f')}."
        )
    near, far = mean_excess(record, distance=1), mean_excess(record)
    by_block = {b: mean_excess(record, block=b) for b in inner}
    most, least = (pick(by_block, key=lambda b: by_block[b].value) for pick in (max, min))
    said.append(
        f"A pair of those blocks costs {_against_the_sum(far)} on average; neighbours cost {_against_the_sum(near)}. "
        f"By block, pairs with {most} cost {_against_the_sum(by_block[most])}, those with {least} "
        f"{_against_the_sum(by_block[least])}."
    )
    pairs = pairs_add_up(record, inner)
    order = [pairs.sets[i] for i in np.argsort(pairs.excess)]
    said.append(
        f"Furthest above the sum are {_with_excess(record, order[: -1 - EXTREMES : -1])}. Furthest below are "
        f"{_with_excess(record, order[:EXTREMES])}."
    )
    return said


def _with_excess(record: Losses, pairs: Collection[Blocks]) -> str:
    """Pairs, each with its excess."""
    each = zip(pairs, resampled_means(_excess(record, pairs), RESAMPLES).T, strict=True)
    return together(f"{_blocks(pair)} ({interval(*estimate(x), '+.2f')})" for pair, x in each)
