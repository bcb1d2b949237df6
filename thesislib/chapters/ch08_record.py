"""Chapter 8's record: rows of answers, and what stands in files beside them."""

from dataclasses import dataclass, field
from pathlib import Path

from thesislib.chapters import ch08_scores
from thesislib.chapters.ch08_healing import is_healed
from thesislib.chapters.ch08_runs import LEFT_OUT, NOTEBOOK, free, key, outcomes_of
from thesislib.chapters.ch08_scores import Scores
from thesislib.chapters.chapter import on_one_sample
from thesislib.compress.relevance import Outcomes
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store


@dataclass(frozen=True)
class Record:
    """What chapter 8 reads.

    Attributes:
        rows: by key, see `thesislib.chapters.ch08_runs.key`.
        outcomes: {(task, part): outcomes without each block}, of the parts that are complete.
        scores: by text, and what they cost.
        folder: of the other files.
        healed: rows of sets that were trained, by a key that ends in the seed.
    """

    rows: dict[tuple, Measurement]
    outcomes: dict[tuple[str, str], Outcomes]
    scores: Scores
    folder: Path
    healed: dict[tuple, Measurement] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Blocks of the subject."""
        return len(self.scores.losses)

    @property
    def middle(self) -> list[int]:
        """The blocks that may go."""
        return free(self.depth)

    @property
    def left_out(self) -> dict[str, Measurement]:
        """{task: the whole model's answers} of the tasks whose items rank no blocks."""
        return {key[1]: m for key, m in self.rows.items() if key[1] in LEFT_OUT}

    def whole(self, task: str, part: str) -> Measurement:
        """The whole model's answers to a part of a task."""
        return next(
            m for k, m in self.rows.items() if k[1:] == (task, part, "") and len(m.provenance["plan"]) == self.depth
        )


def read_recorded(path: Path) -> Record:
    """A recorded run: PATH.jsonl and the files beside it."""
    rows = on_one_sample(Store(path).rows().values(), key)
    scores = ch08_scores.read(path.with_name(f"{NOTEBOOK}_scores.json"))
    healed = {k: m for k, m in rows.items() if is_healed(m)}
    plain = {k: m for k, m in rows.items() if k not in healed}
    return Record(plain, outcomes_of(plain.values()), scores, path.parent, healed)
