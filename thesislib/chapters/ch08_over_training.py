"""The recorded training of a small model from scratch: what its blocks are worth at ten checkpoints, and what is said.

No weight is kept: a seed's training takes minutes and gives the same numbers again.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from thesislib.chapters.ch08_training import Checkpoint, FromScratch, prepared, trained
from thesislib.chapters.phrases import together
from thesislib.compress.agreement import Estimate, estimate, resampled_means, spearman
from thesislib.errors import BadInput
from thesislib.files import data_file, read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, evaluation_text
from thesislib.sources.rows import origin_of

SAME = ("fingerprint", "plan", "dtype", "settings")  # of two records that one run can have written


@dataclass(frozen=True)
class Trained:
    """The checkpoints of several seeds.

    Attributes:
        checkpoints: {seed: its checkpoints, by step}; sums of nats rounded to 2 digits, cosine scores to 7.
        made: provenance; its settings are those of `FromScratch` with the small model's size and its text.
    """

    checkpoints: dict[int, list[Checkpoint]]
    made: dict

    @classmethod
    def from_json(cls, plain: Mapping) -> "Trained":
        """What `record` wrote."""
        runs: dict[int, list[Checkpoint]] = {}
        for one in plain["checkpoints"]:
            rows = {name: tuple(map(tuple, one[name])) for name in ("right", "nats")}
            flat = {name: tuple(one[name]) for name in ("commonest", "cosine")}
            runs.setdefault(one["seed"], []).append(Checkpoint(**{**one, **rows, **flat}))
        return cls(runs, plain["made"])

    def to_json(self) -> str:
        """The content of the file."""
        every = [_rounded(c) for several in self.checkpoints.values() for c in several]
        return json.dumps({"checkpoints": every, "made": self.made})


def _rounded(c: Checkpoint) -> dict:
    nats = [[round(x, 2) for x in row] for row in c.nats]
    return {**asdict(c), "loss": round(c.loss, 5), "nats": nats, "cosine": [round(x, 7) for x in c.cosine]}


def record(subject: Subject, data: str, seeds: Sequence[int], file: Path, settings: FromScratch | None = None) -> None:
    """Train each seed and write its checkpoints to a file.

    A run that was killed goes on with the first seed that the file .partial beside it lacks.

    Args:
        subject: whose architecture and tokenizer the small model takes.
        data: a data spec.
        seeds: of the runs, each its own.
        file: to write.
        settings: of the training, by default `FromScratch()`.

    Raises:
        BadInput: no seed, or one twice; see `thesislib.chapters.ch08_training.trained`.
    """
    if not seeds or len({*seeds}) < len(seeds):
        raise BadInput(f"seeds {[*seeds]}: expected different ones, at least one")
    settings = settings or FromScratch()
    started, partial = time.perf_counter(), file.with_name(file.name + ".partial")
    facts = {**asdict(settings), **_size(subject, settings, data), "data": origin_of(data)}

    def made() -> dict:
        # the small model's dtype, not the subject's
        return {**provenance(subject, started, **facts), "dtype": "float32"}

    done: dict[int, list[Checkpoint]] = {}
    if partial.exists():
        before = Trained.from_json(read_json(partial))
        if all(before.made[name] == made()[name] for name in SAME):
            done = {seed: found for seed, found in before.checkpoints.items() if seed in seeds}
            started -= before.made["seconds"]
    for seed in seeds:
        if seed not in done:
            done[seed] = list(trained(subject, settings, seed, data))
        write_whole(partial, Trained({s: done[s] for s in seeds if s in done}, made()).to_json())
    partial.replace(file)


def _size(subject: Subject, settings: FromScratch, data: str) -> dict:
    """The small model's size and its text, for the record."""
    config, _, ids, held_out = prepared(subject, settings, data)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        "parameters": model.num_parameters(),
        "width": config.hidden_size,
        "text_tokens": ids.numel(),
        "held_out_tokens": held_out.numel(),
        "text_sha256": calibration_text(data=data).sha256,
        "held_out_sha256": evaluation_text(data).sha256,
    }


def read(file: Path | None = None) -> Trained:
    """The file that `record` wrote, by default the study's own."""
    return Trained.from_json(read_json(file or data_file("results/08_relevance_training.json")))


# ---------------------------------------------------------------- what the page says

BY = ("relevance", "loss")  # the two ways to say what a block is worth, both held against its cosine score


def above_chance(c: Checkpoint) -> bool:
    """Whether the model surely predicts more than the commonest token does: by two standard errors over windows."""
    more = np.subtract(c.right[0], c.commonest)
    return bool(more.mean() > 2 * more.std(ddof=1) / np.sqrt(len(more)))


def correlation(c: Checkpoint, by: str, first: int = 0, resamples: int = 1_000) -> Estimate | None:
    """Spearman's correlation over blocks of the cosine score and what is lost without a block.

    Args:
        c: a checkpoint.
        by: relevance, or loss, which has far less noise: it counts every token's probability.
        first: the first block that counts.
        resamples: of the windows for the interval, in which the cosine scores stay as they are.

    Returns:
        None for relevance that noise leaves undefined, see `above_chance`.
    """
    if by == "loss":
        lost = resampled_means(np.array(c.nats[1:]), resamples)
    elif above_chance(c):
        *without, guessed = resampled_means(np.array([*c.right[1:], c.commonest]), resamples).T
        lost = -np.maximum(np.array(without) - guessed, 0).T  # blocks in the order of their relevance
    else:
        return None
    return estimate(spearman(lost[:, first:], np.array(c.cosine)[None, first:]))


class Step(NamedTuple):
    """All seeds after one step.

    Args:
        step: of the optimiser.
        checkpoints: one a seed.
        relevance: (seeds, blocks), nan for a seed that is not above chance.
        cosine: (seeds, blocks).
        correlation: {relevance or loss: an estimate a seed, None where it is undefined}.
    """

    step: int
    checkpoints: list[Checkpoint]
    relevance: np.ndarray
    cosine: np.ndarray
    correlation: dict[str, list[Estimate | None]]

    @property
    def defined(self) -> bool:
        """Whether every seed has relevance."""
        return not np.isnan(self.relevance).any()

    def place(self, n: int) -> list[int]:
        """The block of each seed that has the n-th highest relevance, from 0."""
        return np.argsort(-self.relevance, 1, "stable")[:, n].tolist()


def steps(record: Trained) -> list[Step]:
    """The record by step."""
    found = []
    for several in zip(*record.checkpoints.values(), strict=True):
        nothing = [np.nan] * len(several[0].cosine)
        relevance = [c.relevance if above_chance(c) else nothing for c in several]
        correlations = {by: [correlation(c, by) for c in several] for by in BY}
        cosine = np.array([c.cosine for c in several])
        found.append(Step(several[0].step, [*several], np.array(relevance, float), cosine, correlations))
    return found


def _spread(values: Sequence[float] | np.ndarray, form: str = ".2f") -> str:
    """The mean of the seeds, and the lowest and the highest."""
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _values(step: Step, by: str) -> list[float]:
    """The seeds' correlations without intervals; none unless all have one."""
    found = [e.value for e in step.correlation[by] if e is not None]
    return found if len(found) == len(step.checkpoints) else []


def _blocks(of_seeds: Sequence[int]) -> str:
    """The blocks of the seeds, each once."""
    return together(map(str, sorted({*of_seeds}))).replace(" and ", " or ")


def table(found: Sequence[Step]) -> pd.DataFrame:
    """A row a checkpoint; where seeds differ, their mean and from which to which they go."""
    rows = []
    for s in found:
        said = {by: _spread(values) if (values := _values(s, by)) else "undefined" for by in BY}
        rows.append(
            {
                "step": s.step,
                "tokens read": f"{s.checkpoints[0].seen:,}",
                "next tokens right": _spread([c.accuracy[0] for c in s.checkpoints], ".1%"),
                "perplexity": _spread([c.perplexity[0] for c in s.checkpoints], ".0f"),
                "most relevant block": _blocks(s.place(0)) if s.defined else "undefined",
                "relevance and cosine": said["relevance"],
                "loss and cosine": said["loss"],
            }
        )
    return pd.DataFrame(rows).set_index("step")


def sentences(record: Trained) -> list[str]:
    """What the model is, where relevance begins, which blocks matter, and whether relevance and cosine agree."""
    found = steps(record)
    known = [s for s in found if s.defined]
    said = [_what(record.made["settings"], found[-1])]
    if not known:
        return [*said, "No step has every seed above the commonest token: relevance is undefined."]
    first, last = known[0], known[-1]
    before = [s.step for s in found if s.step < first.step]
    begins = f"Relevance is defined from step {first.step} on, where every seed is above the commonest token"
    said.append(f"{begins}; at step {before[-1]} it is not yet." if before else f"{begins}.")
    return [*said, _who(first), _who(last), _agree(known, 0), _agree(known, 1), _noise(first, last)]


def _what(made: Mapping, last: Step) -> str:
    end = last.checkpoints[0]
    right = _spread([c.accuracy[0] for c in last.checkpoints], ".1%")
    perplexity = _spread([c.perplexity[0] for c in last.checkpoints], ".0f")
    return (
        f"A small model, {made['blocks']} blocks and {made['parameters']:,} parameters of the subject's architecture, "
        f"is trained from scratch for {end.step} steps, with {len(last.checkpoints)} seeds. It reads "
        f"{made['text_tokens']:,} tokens of text {end.seen / made['text_tokens']:.1f} times over and is measured on "
        f"{made['held_out_tokens']:,} others. In the end it has {right} of next tokens right, where always saying the "
        f"commonest gives {end.chance:.1%}, and perplexity {perplexity} on its {made['vocabulary']:,} tokens. Here and "
        "below: the mean of the seeds, and the lowest and the highest."
    )


def _who(s: Step) -> str:
    """The most relevant block of a step, and what the others have."""
    top = s.place(0)
    others = [
        _spread([np.delete(row, block).mean() for row, block in zip(scores, top, strict=True)])
        for scores in (s.relevance, s.cosine)
    ]
    return (
        f"At step {s.step} block {_blocks(top)} is the most relevant, with {_spread(s.relevance.max(1))}; the next is "
        f"block {_blocks(s.place(1))}. All but the most relevant have a mean relevance of {others[0]} and a mean "
        f"cosine score of {others[1]}."
    )


def _agree(known: Sequence[Step], from_block: int) -> str:
    """How the rank correlations with the cosine score go from the first to the last step with relevance."""
    whose = f"over blocks {from_block} to {known[0].cosine.shape[1] - 1}" if from_block else "over all blocks"
    parts = []
    for by in BY:
        values = [[e.value for c in s.checkpoints if (e := correlation(c, by, from_block, 0))] for s in known]
        a, b = values[0], values[-1]
        how = "stays within the spread of seeds"
        if min(b) > max(a) or max(b) < min(a):
            how = f"{'rises' if min(b) > max(a) else 'falls'} in every seed beyond all first ones"
        parts.append(f"of {by} {how}, from {_spread(a)} to {_spread(b)}")
    return (
        f"The rank correlation with the cosine score, {whose}, at steps {known[0].step} and {known[-1].step}: that "
        f"{parts[0]}; that {parts[1]}."
    )


def _noise(first: Step, last: Step) -> str:
    """How much of the correlations is noise of the windows, at both steps."""
    parts = []
    for by in BY:
        a, b = (np.mean([e.high - e.low for e in s.correlation[by] if e is not None]) for s in (first, last))
        parts.append(f"{a:.2f} and {b:.2f} wide with {by}")
    return (
        f"Noise of the windows lowers a rank correlation: over all blocks a seed's 95 % interval, over "
        f"other windows, is on average {parts[0]}, {parts[1]} (steps {first.step} and {last.step})."
    )
