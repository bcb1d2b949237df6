"""What to measure and how, in words that a record can hold: the same words make the same measurement again. The tasks
there are."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from thesislib.config import build
from thesislib.errors import BadInput, unknown
from thesislib.evaluate.task import Options, Task
from thesislib.imports import members
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement

TASKS: dict[str, Task] = {}  # filled below


@dataclass(frozen=True)
class Setup(Options):
    """One measurement, but for the subject and the data: a task, and its options.

    Attributes:
        on: one of `TASKS`; the others are those of `Options`.
    """

    on: str

    def __post_init__(self):
        super().__post_init__()
        if self.on not in TASKS:
            raise unknown("task", self.on, TASKS)
        self.task.check(self)

    @property
    def task(self) -> Task:
        """What measures."""
        return TASKS[self.on]

    def plain(self) -> dict[str, Any]:
        """As a record holds it; without a reference, as before there were tasks that have one."""
        facts = {"on": self.on, **dataclasses.asdict(self)}
        return {name: value for name, value in facts.items() if (name, value) != ("reference", None)}

    def items(self, data: str) -> Any:
        """See `Task.items`."""
        return self.task.items(data, self)

    def measure(self, subject: Subject, data: str) -> Measurement:
        """The measurement; its provenance has this setup, as "protocol", and the sha256 of the text or items that were
        used.

        Raises:
            BadInput: whatever the measure refuses.
        """
        items = self.items(data)
        m = self.task.measure(subject, items, self)
        return m.with_provenance(protocol=self.plain(), corpus_sha256=self.task.sha256(items, self))

    def corpus_sha256(self, data: str) -> str | None:
        """Of the text or the items that a measurement on these data uses; None for lm-eval's rows, which the ids in its
        items name."""
        return self.task.sha256(self.items(data), self)


def setup_of(m: Measurement) -> Setup:
    """The setup of a measurement, also of one made by `perplexity` and its like directly, from its settings.

    Raises:
        BadInput: a measurement that no setup makes.
    """
    if "protocol" in m.provenance:
        try:
            return build(Setup, m.provenance["protocol"])
        except (BadInput, TypeError) as error:
            raise BadInput(f"the record's protocol is not one that this version knows ({error})") from error
    for name, task in TASKS.items():
        if (options := task.options_of(m)) is not None:
            return Setup(name, **options)
    raise BadInput(
        f"'{m.metric}' on '{m.task}' cannot be measured again from its record: expected one of {', '.join(TASKS)}"
    )


def task_of(m: Measurement) -> Task:
    """The task whose measurement this is: the one that its record names or whose settings it has, else the first that
    calls its number so.

    Raises:
        BadInput: it is no task's.
    """
    if "protocol" in m.provenance:
        return setup_of(m).task
    for task in TASKS.values():
        if task.options_of(m) is not None:
            return task
    for task in TASKS.values():
        if task.metric == m.metric:
            return task
    raise BadInput(
        f"'{m.metric}' on '{m.task}' is no task's measurement: expected one of "
        f"{', '.join(sorted({t.metric for t in TASKS.values()}))}"
    )


# last, since a module of this folder may import the names above; a task's own file does not
for _module in members("thesislib.evaluate"):
    for _kind in list(vars(_module).values()):
        if (
            isinstance(_kind, type)
            and issubclass(_kind, Task)
            and _kind.__module__ == _module.__name__
            and "name" in vars(_kind)
        ):
            if _kind.name in TASKS:
                raise TypeError(
                    f"two tasks are called '{_kind.name}': {type(TASKS[_kind.name]).__module__} and {_module.__name__}"
                )
            TASKS[_kind.name] = _kind()
