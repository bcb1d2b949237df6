"""A grid of configurations in a few lines of YAML: labels, the stages of their parts, and the measures of each.

A group is a list of lists. Its labels are all combinations of one part from each list, in that order; `none` leaves a
part out, and the name of an earlier group stands for that group's labels::

    name: example
    stages:                     # the stage of a label's part, where the label does not have all settings
      W: {lora: {text: wikitext, learning_rate: 0.004, steps: 96}}
    groups:
      pruned: [[none, D2, D4], [none, W1:8, W2:4]]
      trained: [pruned, [W]]
    sizes:
      quick:
        take: [dense, D2, W1:8, D2+W]          # optional: these labels instead of the groups'
        stages: {W: {lora: {text: wikitext, steps: 16}}}    # optional: in place of those above
        measures: {perplexity: {on: wikitext, limit: 8}}
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import yaml

from thesislib.compress.stage import STAGES, Stage
from thesislib.config import build, fields_of
from thesislib.errors import BadInput, unknown
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.speed import SECONDS_PER_TOKEN
from thesislib.experiment import DENSE, recipe_of
from thesislib.files import expanded, write_whole
from thesislib.pipeline.recipe import Recipe, parse_label
from thesislib.yaml_lines import compose, value

KEYS = {"name", "stages", "groups", "sizes"}
SIZE_KEYS = {"take", "groups", "stages", "measures", "few", "timed"}
NOTHING = "none"
LARGEST = 100_000  # configurations of a group
WRITTEN = "written by `thesislib recipe expand`, do not edit"


@dataclass(frozen=True)
class Configuration:
    """One model of a grid.

    Attributes:
        label: "dense" for no stage.
        group: the first that has it.
        recipe: its stages.
        measures: {name: setup} of its measurements.
    """

    label: str
    group: str
    recipe: Recipe
    measures: Mapping[str, Setup]


@dataclass(frozen=True)
class Grid:
    """A grid at one size.

    Attributes:
        name: of the grid.
        size: of `sizes`.
        configurations: in the order in which they are carried out.
        timed: over how many tokens the seconds of a token are measured; None for no timing.
        refused: why other labels can work on no subject, see `read_grid`.
    """

    name: str
    size: str
    configurations: tuple[Configuration, ...]
    timed: int | None = None
    refused: tuple[str, ...] = ()

    def cell(self, c: Configuration) -> dict[str, str]:
        """Where in the grid a configuration stands, as its records hold it: see `thesislib.records.schema.Sweep`."""
        return {"grid": self.name, "size": self.size, "group": c.group, "label": c.label}

    def check(self, fits: Callable[[Configuration], None]) -> None:
        """Raises BadInput that names every configuration that cannot work: those for which `fits` raises BadInput, and
        those that were refused when the grid was read."""
        wrong = list(self.refused)
        for c in self.configurations:
            try:
                fits(c)
            except BadInput as error:
                wrong.append(str(error))
        if wrong:
            count = len(self.configurations) + len(self.refused)
            raise BadInput(
                f"{len(wrong)} of the grid's {count} configurations cannot work on this subject:\n  "
                + "\n  ".join(wrong)
            )


def read_grid(
    file: str | Path, size: str, strict: bool = True, only: Sequence[str] = (), measures: Sequence[str] = ()
) -> Grid:
    """The grid of a file at one of its sizes. Every label is read before anything runs.

    Args:
        file: a YAML file.
        size: one of its sizes.
        strict: whether a label that can work on no subject is an error. False leaves it to `Grid.check`, which names it
            beside the labels that do not fit the subject at hand.
        only: keep these labels, in the grid's order; none for all.
        measures: keep these measures, among them "seconds per token" if the size is timed; none for all.

    Raises:
        BadInput: a file that is no grid; an unknown size, key, measure or label. Labels that cannot work are all named.
    """
    path = expanded(file)
    top = _mapping(value(compose(path), path), KEYS, str(path))
    for key in ("groups", "sizes"):
        if not isinstance(top.get(key), dict) or not top[key]:
            raise BadInput(f"{path}: '{key}' is missing or empty: expected a mapping")
    if size not in top["sizes"]:
        raise unknown(f"size of {path}", size, top["sizes"])
    at = f"{path}, size {size}"
    sized = _mapping(top["sizes"][size], SIZE_KEYS, at)
    stages = _stages({**_given_stages(top, str(path)), **_given_stages(sized, at)}, path)
    groups = _size_groups(_groups(top["groups"], str(path)), sized, at, path)
    group_of = {label: name for name, labels in reversed(groups.items()) for label in labels}  # the first that has it
    labels = dict.fromkeys(label for labels in groups.values() for label in labels)
    if "take" in sized:
        labels = dict.fromkeys(_texts(sized["take"], f"{at}, take"))
    every = _measures(sized.get("measures"), path)
    few = _few(sized, set(groups), every, at, path)
    timed = sized.get("timed")
    if timed is not None and not (isinstance(timed, int) and timed > 0):
        raise BadInput(f"{path}: 'timed' is {timed!r}: expected how many tokens, e.g. 32")
    chosen = _chosen(f"measure of {at}", measures, [*every, *([SECONDS_PER_TOKEN] if timed else [])])
    configurations, wrong = [], []
    for label in _chosen(f"label of {at}", only, labels):
        try:
            recipe = _recipe(label, stages)
            recipe.check()
        except BadInput as error:
            wrong.append(str(error))
            continue
        group = group_of.get(label, "taken")
        setups = {name: setup for name, setup in every.items() if name in chosen and name in few.get(group, every)}
        configurations.append(Configuration(label, group, recipe, setups))
    if wrong and strict:
        raise BadInput(f"{path}: {len(wrong)} configurations cannot work:\n  " + "\n  ".join(wrong))
    timed = timed if SECONDS_PER_TOKEN in chosen else None
    return Grid(str(top.get("name", path.stem)), size, tuple(configurations), timed, tuple(wrong))


def _given_stages(entries: Mapping, at: str) -> dict:
    """The `stages` of a grid or of a size."""
    given = entries.get("stages", {})
    if not isinstance(given, dict):
        example = "{W: {lora: {text: wikitext}}}"
        raise BadInput(f"{at}: 'stages' is {given!r}: expected a mapping such as {example}, or no such key")
    return given


def _size_groups(groups: dict[str, list[str]], sized: Mapping, at: str, path: Path) -> dict[str, list[str]]:
    """The groups of a size; by default all."""
    for name in _texts(sized.get("groups", []), f"{at}, groups"):
        if name not in groups:
            raise unknown(f"group of {path}", name, groups)
    return {name: groups[name] for name in sized.get("groups", groups)}


def _few(sized: Mapping, groups: set[str], measures: Mapping, at: str, path: Path) -> dict[str, list[str]]:
    """{group: the only measures of its configurations}, from the `few` of a size."""
    few = _mapping(sized.get("few", {}), groups, f"{at}, few")
    for name in itertools.chain.from_iterable(_texts(names, f"{at}, few") for names in few.values()):
        if name not in measures:
            raise unknown(f"measure under 'few' of {path}", name, measures)
    return few


def _chosen(title: str, names: Sequence[str], known: Iterable[str]) -> dict[str, None]:
    """Those of `known` that are in `names`, or all if that is empty, in the order of `known`.

    Raises:
        BadInput: a name that is not known; `title` says of what.
    """
    known = dict.fromkeys(known)
    for name in names:
        if name not in known:
            raise unknown(title, name, known)
    return dict.fromkeys(name for name in known if not names or name in names)


def write_recipes(grid: Grid, folder: Path) -> list[Path]:
    """Write one recipe a configuration, D2+W1:8 as d2_w1_8.yaml, for `thesislib compress`. Files that it wrote earlier
    for other configurations are removed."""
    texts = {}
    for c in grid.configurations:
        if c.recipe.stages:
            every = c.recipe.entries()
            stages = [{name: _given(STAGES[name], values) for name, values in stage.items()} for stage in every]
            entries = {"label": c.recipe.label, "stages": stages}
            body = yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, width=120)
            texts[folder / f"{file_name(c.label)}.yaml"] = f"# {grid.name}, size {grid.size}: {WRITTEN}\n{body}"
    for file in {*folder.glob("*.yaml")} - set(texts):
        if file.is_file():
            with file.open("rb") as opened:
                written_here = WRITTEN.encode() in opened.readline(1000)
            if written_here:
                file.unlink()
    for file, text in texts.items():
        write_whole(file, text)
    return list(texts)


def file_name(label: str) -> str:
    """A label as part of a file's name: D2+W1:8 is d2_w1_8."""
    return label.lower().replace("+", "_").replace(":", "_")


def _given(stage: type, values: Mapping) -> dict:
    """The settings of a stage that differ from their defaults, as YAML holds them. A single pattern equals a list of
    it."""
    shown = {name: list(given) if isinstance(given, tuple) else given for name, given in values.items()}
    fields = fields_of(stage)
    return {name: value for name, value in shown.items() if value not in (fields[name].default, [fields[name].default])}


def _texts(entry: object, at: str) -> list[str]:
    """An entry, if it is a list of texts."""
    if not isinstance(entry, list) or not all(isinstance(x, str) for x in entry):
        raise BadInput(f"{at} is {entry!r}: expected a list of texts")
    return entry


def _mapping(entry: object, keys: set[str], at: str) -> dict:
    """An entry, if it is a mapping with no other keys than these."""
    if not isinstance(entry, dict):
        raise BadInput(f"{at}: expected a mapping with the keys {', '.join(sorted(keys))}")
    for name in entry:
        if name not in keys:
            raise unknown(f"key in {at}", name, sorted(keys))
    return entry


def _stages(entries: Mapping[str, Mapping], path: Path) -> dict[str, Stage]:
    """{part of a label: its stage}."""
    stages = {}
    for letter, entry in entries.items():
        if not isinstance(entry, dict) or len(entry) != 1:
            raise BadInput(
                f"{path}, stage '{letter}': expected one stage with its settings, such as {{gptq: {{bits: 4}}}}"
            )
        ((name, settings),) = entry.items()
        if name not in STAGES:
            raise unknown(f"stage in {path}", name, STAGES)
        try:
            stages[letter] = build(STAGES[name], settings or {})
        except (BadInput, TypeError) as error:
            raise BadInput(f"{path}, stage '{letter}': {error}") from error
        if stages[letter].label != letter:
            raise BadInput(
                f"{path}: '{letter}' is {entry}, whose label is '{stages[letter].label}': expected it under that name"
            )
    return stages


def _groups(entries: Mapping[str, object], at: str) -> dict[str, list[str]]:
    """{name: labels} of the groups; a group may contain those before it."""
    groups: dict[str, list[str]] = {}
    for name, parts in entries.items():
        if not isinstance(parts, list) or not parts:
            raise BadInput(f"{at}, group '{name}': expected a list of lists, such as [[none, D2], [none, W1:8]]")
        choices = []
        for part in parts:
            if isinstance(part, str) and part not in groups:
                raise unknown(f"group in {at}, group '{name}'", part, groups)
            is_list = isinstance(part, list) and part and all(isinstance(x, str) for x in part)
            if not isinstance(part, str) and not is_list:
                raise BadInput(
                    f"{at}, group '{name}': {part!r} is neither a list of labels' parts nor the name of a "
                    "group before it"
                )
            choices.append(groups[part] if isinstance(part, str) else part)
        if (count := prod(map(len, choices))) > LARGEST:
            raise BadInput(f"{at}, group '{name}': {count:.3g} configurations: expected at most {LARGEST:,}")
        groups[name] = [
            "+".join(x for x in chosen if x not in (NOTHING, DENSE)) or DENSE for chosen in itertools.product(*choices)
        ]
    return groups


def _measures(entries: object, path: Path) -> dict[str, Setup]:
    """{name: setup} of a size's measures."""
    if not isinstance(entries, dict) or not entries:
        raise BadInput(f"{path}: no 'measures': expected e.g. {{perplexity: {{on: wikitext, limit: 8}}}}")
    try:
        return {name: build(Setup, settings) for name, settings in entries.items()}
    except (BadInput, TypeError, AttributeError) as error:
        raise BadInput(f"{path}, measures: {error}") from error


def _recipe(label: str, stages: Mapping[str, object]) -> Recipe:
    """The recipe of a label, with the grid's own stages for its parts."""
    if label == DENSE:
        return recipe_of(())
    parts, chosen = label.split("+"), []
    for part in parts:
        chosen += [stages[part]] if part in stages else parse_label(part).stages
    recipe = Recipe(tuple(chosen), tuple(f"{label}, {part}" for part in parts))
    if recipe.label != label:
        raise BadInput(f"label '{label}' is not that of its stages, which is '{recipe.label}'")
    return recipe
