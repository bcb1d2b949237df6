"""All data sets of multiple-choice questions by name."""

from thesislib.imports import members
from thesislib.sources.choices.choice_set import ChoiceSet

SETS: dict[str, ChoiceSet] = {
    cls.name: cls()
    for module in members("thesislib.sources.choices")
    for cls in list(vars(module).values())
    if isinstance(cls, type)
    and issubclass(cls, ChoiceSet)
    and cls.__module__ == module.__name__
    and "name" in vars(cls)
}
