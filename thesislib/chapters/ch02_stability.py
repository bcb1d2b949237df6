"""Chapter 2's choice of blocks from fewer and other calibration windows: the recorded losses, and what they say."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from thesislib.chapters.phrases import together
from thesislib.compress.depth import Depth, window_losses
from thesislib.compress.stability import Resampled, chosen, resampled
from thesislib.files import data_file, read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows
from thesislib.sources.rows import origin_of

TEXT, AT_ONCE = "wikipedia", 8  # windows between two writes
COUNTS = (2, 4)  # blocks removed, of the models that later chapters use


@dataclass(frozen=True)
class Losses:
    """Each calibration window's loss without each block.

    Attributes:
        losses: {block: nats a token of each window, rounded to 5 digits}.
        made: provenance.
    """

    losses: dict[int, list[float]]
    made: dict

    @property
    def windows(self) -> int:
        """How many."""
        return len(next(iter(self.losses.values())))

    @property
    def free(self) -> list[int]:
        """The blocks that may go."""
        return [*range(Depth.protect_first, len(self.losses) - Depth.protect_last)]

    def of_free(self) -> np.ndarray:
        """(B, N) of the blocks that may go."""
        return np.array([self.losses[b] for b in self.free])

    @classmethod
    def from_json(cls, plain: Mapping) -> "Losses":
        """What `record` wrote."""
        return cls({int(b): nats for b, nats in plain["losses"].items()}, plain["made"])


def record(subject: Subject, data: str, windows: int, length: int, file: Path) -> None:
    """Write the `Losses` of every block to a file. A run that was killed goes on from the file .partial beside it."""
    started, partial = time.perf_counter(), file.with_name(file.name + ".partial")
    ids = calibration_windows(subject.tokenizer, TEXT, data, windows, length)
    text = {"text": TEXT, "text_sha256": calibration_text(TEXT, data).sha256, "data": origin_of(data)}
    done = Losses({b: [] for b in range(subject.depth)}, {})
    if partial.exists():
        before = Losses.from_json(read_json(partial))
        same = provenance(subject, started, **text, windows=before.windows, length=length, seed=0)
        if before.windows <= windows and all(
            before.made[name] == same[name] for name in ("fingerprint", "plan", "dtype", "settings")
        ):
            done, started = before, started - before.made["seconds"]
    while done.windows < windows:
        some = window_losses(subject, ids[done.windows : done.windows + AT_ONCE], list(done.losses))
        losses = {
            b: [*nats, *np.round(new, 5).tolist()] for (b, nats), new in zip(done.losses.items(), some, strict=True)
        }
        n = done.windows + some.shape[1]
        done = Losses(losses, provenance(subject, started, **text, windows=n, length=length, seed=0))
        write_whole(partial, json.dumps(asdict(done)))
    partial.replace(file)


# ---------------------------------------------------------------- what the chapter shows

AT_ALL = 0.005  # a block that goes in fewer resamples is not shown


def read_recorded(path: Path | None = None) -> Losses:
    """The file that `record` wrote, by default the study's own."""
    return Losses.from_json(read_json(path or data_file("results/02_depth_pruning_stability.json")))


def choices(record: Losses, k: int) -> dict[int, Resampled]:
    """{windows: what is chosen with so many}: powers of two from 4 on, and as many as were recorded."""
    sizes = [2**i for i in range(2, record.windows.bit_length())]
    return {n: resampled(record.of_free(), k, n) for n in sorted({*sizes, record.windows})}


def shares(record: Losses, k: int) -> pd.DataFrame:
    """Windows by blocks: the share of resamples in which a block is among the k that go; blocks that hardly ever go
    are left out."""
    table = pd.DataFrame({n: c.shares for n, c in choices(record, k).items()}, index=record.free).T
    return table.loc[:, table.max() >= AT_ALL].rename_axis(index="windows", columns="block")


def gone(record: Losses, k: int, windows: int | None = None) -> list[int]:
    """The k blocks that the first so many windows choose, or all."""
    return [record.free[i] for i in chosen(record.of_free()[:, :windows].mean(1), k)]


def settling(record: Losses, counts: Sequence[int] = COUNTS) -> pd.DataFrame:
    """By the number of windows, how often the choice is that of all windows, and by how much it is dearer."""
    columns = {}
    for k in counts:
        found = choices(record, k)
        columns[f"D{k}: as all choose"] = {n: f"{c.same:.0%}" for n, c in found.items()}
        columns[f"D{k}: dearer by"] = {n: f"{np.expm1(c.regret):.2%}" for n, c in found.items()}
    return pd.DataFrame(columns).rename_axis("windows")


def sentences(record: Losses, used: int, counts: Sequence[int] = COUNTS) -> list[str]:
    """What `used` windows choose, what all do, and how often `used` others would choose the same; one text a count."""
    said = []
    for k in counts:
        c, own, every = resampled(record.of_free(), k, used), gone(record, k, used), gone(record, k)
        n = record.windows
        same = f"and so do all {n}" if own == every else f"all {n} choose {together(map(str, every))}"
        said.append(
            f"For D{k} the {used} windows of the recorded run choose {together(map(str, own))}, {same}. A random draw "
            f"of {used} windows agrees with all {n} in {c.same:.0%} of cases. What it chooses costs "
            f"{np.expm1(c.regret):.2%} more perplexity on average."
        )
    return said
