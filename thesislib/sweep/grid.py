"""A grid of configurations in a few lines of YAML: which labels, what their letters stand for, and what is measured of
each.

A group is a list of lists: every combination of one part from each, in that order; `none` leaves a part out, and the
name of a group before it stands for its labels::

    name: example
    stages:                     # what a label's part stands for, where the label does not say it all
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
    """One model of a grid: its label ("dense" for no stage), the first group that has it, how it is made and what is
    measured of it."""

    label: str
    group: str
    recipe: Recipe
    measures: Mapping[str, Setup]


@dataclass(frozen=True)
class Grid:
    """A grid at one size.

    configurations: in the order they are carried out. timed: tokens that single-token speed is measured over, None for
    no timing. refused: why other labels make none, on any subject (see `read_grid`).
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
    """The grid that a file describes, at one of its sizes; every label is read before anything runs.

    Args:
        file, size: which.
        strict: False leaves labels that can work on no subject to `Grid.check`, which names them beside those that do
            not fit the subject at hand.
        only: these labels of it, in the grid's order; none for all.
        measures: these measures of it, "seconds per token" among them where the size is timed; none for all.

    Raises:
        BadInput: a file that is none; an unknown size, key, measure or label. Labels that cannot work are all named.
    """
    path = expanded(file)
    plain = _mapping(value(compose(path), path), KEYS, str(path))
    for key in ("groups", "sizes"):
        if not isinstance(plain.get(key), dict) or not plain[key]:
            raise BadInput(f"{path}: '{key}' is missing or empty: expected a mapping")
    if size not in plain["sizes"]:
        raise unknown(f"size of {path}", size, plain["sizes"])
    sized = _mapping(plain["sizes"][size], SIZE_KEYS, f"{path}, size {size}")
    for where, given in ((str(path), plain), (f"{path}, size {size}", sized)):
        if not isinstance(given.get("stages", {}), dict):
            raise BadInput(
                f"{where}: 'stages' is {given['stages']!r}: expected a mapping such as {{W: {{lora: {{text: "
                "wikitext}}}, or no such key"
            )
    stages = _stages({**plain.get("stages", {}), **sized.get("stages", {})}, path)
    groups = _groups(plain["groups"], str(path))
    for name in _texts(sized.get("groups", []), f"{path}, size {size}, groups"):
        if name not in groups:
            raise unknown(f"group of {path}", name, groups)
    kept = {name: groups[name] for name in sized.get("groups", groups)}
    by_label = {
        label: name for name, labels in reversed(kept.items()) for label in labels
    }  # of several, the first group
    order = dict.fromkeys(label for labels in kept.values() for label in labels)
    if "take" in sized:
        order = dict.fromkeys(_texts(sized["take"], f"{path}, size {size}, take"))
    order = _chosen(f"label of {path}, size {size}", only, order)
    every = _measures(sized.get("measures"), path)
    few = _mapping(sized.get("few", {}), set(kept), f"{path}, size {size}, few")
    for name in itertools.chain.from_iterable(_texts(names, f"{path}, size {size}, few") for names in few.values()):
        if name not in every:
            raise unknown(f"measure under 'few' of {path}", name, every)
    timed = sized.get("timed")
    if timed is not None and not (isinstance(timed, int) and timed > 0):
        raise BadInput(f"{path}: 'timed' is {timed!r}: expected how many tokens, e.g. 32")
    chosen = _chosen(f"measure of {path}, size {size}", measures, [*every, *([SECONDS_PER_TOKEN] if timed else [])])
    found, wrong = [], []
    for label in order:
        try:
            recipe = _recipe(label, stages)
            recipe.check()
        except BadInput as error:
            wrong.append(str(error))
            continue
        group = by_label.get(label, "taken")
        found.append(
            Configuration(
                label, group, recipe, {n: m for n, m in every.items() if n in chosen and n in few.get(group, every)}
            )
        )
    if wrong and strict:
        raise BadInput(f"{path}: {len(wrong)} configurations cannot work:\n  " + "\n  ".join(wrong))
    return Grid(
        str(plain.get("name", path.stem)),
        size,
        tuple(found),
        timed if SECONDS_PER_TOKEN in chosen else None,
        tuple(wrong),
    )


def _chosen(what: str, names: Sequence[str], known: Iterable[str]) -> dict[str, None]:
    """Those of `known` that are named, or all where none is; in the order of `known`."""
    known = dict.fromkeys(known)
    for name in names:
        if name not in known:
            raise unknown(what, name, known)
    return dict.fromkeys(name for name in known if not names or name in names)


def write_recipes(grid: Grid, folder: Path) -> list[Path]:
    """One recipe a configuration, D2+W1:8 as d2_w1_8.yaml, for `thesislib compress`; files that it wrote of
    configurations that are gone go."""
    texts = {}
    for c in grid.configurations:
        if c.recipe.stages:
            stages = [
                {name: _given(STAGES[name], values) for name, values in stage.items()} for stage in c.recipe.plain()
            ]
            body = yaml.safe_dump(
                {"label": c.recipe.label, "stages": stages}, sort_keys=False, default_flow_style=None, width=120
            )
            texts[folder / f"{file_name(c.label)}.yaml"] = f"# {grid.name}, size {grid.size}: {WRITTEN}\n{body}"
    for file in {*folder.glob("*.yaml")} - set(texts):
        if file.is_file():
            with file.open("rb") as opened:
                own = WRITTEN.encode() in opened.readline(1000)
            if own:
                file.unlink()
    for file, text in texts.items():
        write_whole(file, text)
    return list(texts)


def file_name(label: str) -> str:
    """A label as part of a file's name: D2+W1:8 is d2_w1_8."""
    return label.lower().replace("+", "_").replace(":", "_")


def _given(kind: type, values: Mapping) -> dict:
    """A stage's settings that differ from their defaults, as YAML holds them; a single pattern is kept as a list of
    one."""
    shown = {name: list(given) if isinstance(given, tuple) else given for name, given in values.items()}
    return {name: shown[name] for name, f in fields_of(kind).items() if shown[name] not in (f.default, [f.default])}


def _texts(plain: object, where: str) -> list[str]:
    if not isinstance(plain, list) or not all(isinstance(x, str) for x in plain):
        raise BadInput(f"{where} is {plain!r}: expected a list of texts")
    return plain


def _mapping(plain: object, keys: set[str], where: str) -> dict:
    if not isinstance(plain, dict):
        raise BadInput(f"{where}: expected a mapping with the keys {', '.join(sorted(keys))}")
    for name in plain:
        if name not in keys:
            raise unknown(f"key in {where}", name, sorted(keys))
    return plain


def _stages(plain: Mapping[str, Mapping], path: Path) -> dict[str, Stage]:
    made = {}
    for letter, entry in plain.items():
        if not isinstance(entry, dict) or len(entry) != 1:
            raise BadInput(
                f"{path}, stage '{letter}': expected one stage with its settings, such as {{gptq: {{bits: 4}}}}"
            )
        ((name, settings),) = entry.items()
        if name not in STAGES:
            raise unknown(f"stage in {path}", name, STAGES)
        try:
            made[letter] = build(STAGES[name], settings or {})
        except (BadInput, TypeError) as error:
            raise BadInput(f"{path}, stage '{letter}': {error}") from error
        if made[letter].label != letter:
            raise BadInput(
                f"{path}: '{letter}' is {entry}, whose label is '{made[letter].label}': expected it under that name"
            )
    return made


def _groups(plain: Mapping[str, object], where: str) -> dict[str, list[str]]:
    """{name: labels}; a group may build on those before it."""
    found: dict[str, list[str]] = {}
    for name, parts in plain.items():
        if not isinstance(parts, list) or not parts:
            raise BadInput(f"{where}, group '{name}': expected a list of lists, such as [[none, D2], [none, W1:8]]")
        choices = []
        for part in parts:
            if isinstance(part, str) and part not in found:
                raise unknown(f"group in {where}, group '{name}'", part, found)
            if not isinstance(part, str) and not (
                isinstance(part, list) and part and all(isinstance(x, str) for x in part)
            ):
                raise BadInput(
                    f"{where}, group '{name}': {part!r} is neither a list of labels' parts nor the name of a "
                    "group before it"
                )
            choices.append(found[part] if isinstance(part, str) else part)
        if prod(map(len, choices)) > LARGEST:
            raise BadInput(
                f"{where}, group '{name}': {prod(map(len, choices)):.3g} configurations: expected at most {LARGEST:,}"
            )
        found[name] = [
            "+".join(x for x in chosen if x not in (NOTHING, DENSE)) or DENSE for chosen in itertools.product(*choices)
        ]
    return found


def _measures(plain: object, path: Path) -> dict[str, Setup]:
    if not isinstance(plain, dict) or not plain:
        raise BadInput(f"{path}: no 'measures': expected e.g. {{perplexity: {{on: wikitext, limit: 8}}}}")
    try:
        return {name: build(Setup, settings) for name, settings in plain.items()}
    except (BadInput, TypeError, AttributeError) as error:
        raise BadInput(f"{path}, measures: {error}") from error


def _recipe(label: str, stages: Mapping[str, object]) -> Recipe:
    """The recipe of a label, its letters as the grid defines them."""
    if label == DENSE:
        return recipe_of(())
    parts, made = label.split("+"), []
    for part in parts:
        made += [stages[part]] if part in stages else parse_label(part).stages
    recipe = Recipe(tuple(made), tuple(f"{label}, {part}" for part in parts))
    if recipe.label != label:
        raise BadInput(f"label '{label}' is not that of its stages, which is '{recipe.label}'")
    return recipe
