"""Recorded answers under further scorings: rows made from the answers that a row keeps. No model is asked again."""

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from thesislib.errors import BadInput
from thesislib.evaluate.answers import score_again
from thesislib.evaluate.setup import TASKS, setup_of
from thesislib.evaluate.triviaqa import Scored, Trivia, aliases_of
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store
from thesislib.sources.rows import origin_of

# answers of before the first control token ended them: one that was decoded over it has the next turn's role glued on
ROLE = re.compile(r"\w(assistant|user|system)\b")
GLUED = 0.01  # of a row's answers, from which on scorings that read an answer's end are left out


def scored_rows(stores: Iterable[Store], data: str, known: Iterable[Measurement] = ()) -> Iterable[Measurement]:
    """One row for each row with TriviaQA's answers and each further scoring of the same questions.

    A row's provenance is that of the row that it was made from, whose id is its `origin`. Exact match and token F1 are
    left out where more than 1 % of the answers have the next turn's role glued to them ("Vietnam Warassistant"): those
    models have to be asked again.

    Args:
        stores: records; rows without answers are passed over.
        data: a data spec that has the questions.
        known: rows that are there already and not made again.

    Raises:
        BadInput: data that lack a question, or have it otherwise than a row says.
    """
    origin_of(data)  # whether there are such data, even if no row has answers
    done = {(m.provenance.get("origin"), m.metric) for m in known}
    aliases: dict[bool, dict[str, tuple[str, ...]]] = {}
    sha256 = cache(lambda setup: setup.corpus_sha256(data))
    for store in stores:
        for name, m in store.rows().items():
            if not m.items or "answer" not in m.items[0]:
                continue
            setup = setup_of(m)
            asked = setup.task
            if not isinstance(asked, Trivia) or isinstance(asked, Scored):
                continue
            recorded = m.provenance.get("corpus_sha256")
            if recorded and sha256(replace(setup, batch=None)) != recorded:
                raise BadInput(
                    f"row {name} was asked other questions than data '{data}' has for {m.task}: name the data that it "
                    "was made with"
                )
            book = asked.open_book
            if book not in aliases:
                aliases[book] = aliases_of(replace(setup, limit=None).items(data))
            glued = sum(bool(ROLE.search(item["answer"])) for item in m.items) > GLUED * m.n
            for task in TASKS.values():
                if not isinstance(task, Scored) or task.open_book is not book or (name, task.metric) in done:
                    continue
                if glued and task.scoring.reads_the_end:
                    print(
                        f"{name} {m.label}: control tokens are glued to its answers, no {task.metric}", file=sys.stderr
                    )
                    continue
                row = score_again(m, aliases[book], task.scoring)
                # what each stage reported, loss curves among it, stands in the row of origin
                made = {**m.made, "reports": []} if m.made else None
                yield row.with_provenance(protocol=replace(setup, on=task.name).plain(), origin=name, made=made)
