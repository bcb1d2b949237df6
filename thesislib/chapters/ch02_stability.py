"""Chapter 2's choice of blocks from fewer and other calibration windows: the recorded losses, and what they say."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from thesislib.compress.depth import window_losses
from thesislib.files import read_json, write_whole
from thesislib.model.subject import Subject
from thesislib.records.measurement import provenance
from thesislib.sources.corpus import calibration_text, calibration_windows
from thesislib.sources.rows import origin_of

TEXT, AT_ONCE = "wikipedia", 8  # windows between two writes


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
