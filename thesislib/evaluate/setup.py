"""The setup of a measurement: a task and its options, in words that a record holds and that make the same measurement
again; and all tasks by name."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from thesislib.config import build
from thesislib.errors import BadInput, unknown
from thesislib.evaluate.choice import MultipleChoice
from thesislib.evaluate.task import Options, Task
from thesislib.imports import members
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement
from thesislib.sources.choices.found import SETS

TASKS: dict[str, Task] = {}  # filled below


@dataclass(frozen=True)
class Setup(Options):
    """A task and its options: a measurement without the subject and the data.

    Attributes:
        on: the name of a task, one of `TASKS`. The other fields are those of `Options`.
    """

    on: str

    def __post_init__(self):
        super().__post_init__()
        if self.on not in TASKS:
            raise unknown("task", self.on, TASKS)
        self.task.check(self)

    @property
    def task(self) -> Task:
        """The task named by `on`."""
        return TASKS[self.on]

    def plain(self) -> dict[str, Any]:
        """The fields as a record holds them. Of a reference or a part None is left out, as in records made before there
        was one."""
        facts = {"on": self.on, **dataclasses.asdict(self)}
        return {name: value for name, value in facts.items() if value is not None or name not in ("reference", "part")}

    def items(self, data: str) -> Any:
        """See `Task.items`."""
        return self.task.items(data, self)

    def measure(self, subject: Subject, data: str) -> Measurement:
        """Measure a subject. The provenance holds this setup, as "protocol", and the sha256 of the text or items.

        Raises:
            BadInput: whatever the task refuses.
        """
        items = self.items(data)
        m = self.task.measure(subject, items, self)
        return m.with_provenance(protocol=self.plain(), corpus_sha256=self.task.sha256(items, self))

    def corpus_sha256(self, data: str) -> str | None:
        """The sha256 of the text or items that a measurement on these data uses; None for lm-eval's rows, which the ids
        in a record name."""
        return self.task.sha256(self.items(data), self)


def setup_of(m: Measurement) -> Setup:
    """The setup that makes a measurement again. One whose record holds none, made by `perplexity` or the like directly,
    is read from its settings.

    Raises:
        BadInput: no setup makes this measurement.
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
    """The task of a measurement: the one that its record names, else the one whose settings it has, else the first with
    its metric.

    Raises:
        BadInput: no task made it.
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
    for _cls in list(vars(_module).values()):
        if (
            isinstance(_cls, type)
            and issubclass(_cls, Task)
            and _cls.__module__ == _module.__name__
            and "name" in vars(_cls)
        ):
            if _cls.name in TASKS:
                raise TypeError(
                    f"two tasks are called '{_cls.name}': {type(TASKS[_cls.name]).__module__} and {_module.__name__}"
                )
            TASKS[_cls.name] = _cls()
TASKS.update({name: MultipleChoice(questions) for name, questions in SETS.items()})
