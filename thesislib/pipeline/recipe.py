"""Recipes: compression stages with their settings, in order, checked before a model is loaded.

A recipe is a YAML file, or a label such as D2+W1:8 if all other settings have their defaults::

    label: D2+W1:8          # optional, checked against the stages' own label
    include: other.yaml     # optional: its stages come first; a file in this one's folder or below
    data: embedded          # optional: a data spec for calibration; a folder is one in this file's folder or below
    stages:
      - depth: {remove: 2, metric: perplexity}
      - width: {remove: 1, of: 8}
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from thesislib.compress.stage import STAGES, Shape, Stage, as_entry
from thesislib.config import build, fields_of
from thesislib.errors import BadInput, unknown
from thesislib.files import expanded, is_folder
from thesislib.pipeline.label import stage_class
from thesislib.sources import rows
from thesislib.yaml_lines import DEEPEST, at, compose, entries, is_file, location, value

KEYS = ("label", "name", "include", "data", "stages")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        stages: in order.
        locations: where each stage is written, for messages: file and line, or the label.
        data: a data spec; None if the recipe has none.
        name: the recipe's name; None if it has none.
    """

    stages: tuple[Stage, ...]
    locations: tuple[str, ...]
    data: str | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """The configuration's label as in the thesis: D2+W1:8+W+Q+E."""
        return self.label_of(len(self.stages))

    def label_of(self, n: int) -> str:
        """The label of the first `n` stages."""
        return "+".join(stage.label for stage in self.stages[:n])

    def entries(self) -> list[dict[str, dict]]:
        """The stages as entries of a YAML file, see `thesislib.compress.stage.as_entry`."""
        return [as_entry(stage) for stage in self.stages]

    def check(self, shape: Shape | None = None) -> None:
        """Raises BadInput if a stage cannot follow those before it or, given a shape, does not fit such a subject."""
        for i, (stage, where) in enumerate(zip(self.stages, self.locations, strict=True)):
            try:
                shape = stage.after(self.stages[:i], shape)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from error


# ---------------------------------------------------------------- reading


def read_recipe(source: str | Path) -> Recipe:
    """The recipe of a file or a label, with every check that needs no subject.

    Raises:
        BadInput: a recipe that cannot work; the message has file and line.
    """
    path = expanded(source)
    looks_like_a_file = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    recipe = _load(path, ()) if looks_like_a_file or is_file(path) else parse_label(str(source))
    recipe.check()
    return recipe


def read_all(sources: Iterable[str | Path]) -> dict[str, Recipe]:
    """Several recipes by their file's path; for a folder those of all .yaml files in it.

    Raises:
        BadInput: see `read_recipe`; a folder without recipes; two files with one label.
    """
    recipes: dict[str, Recipe] = {}
    by_label: dict[str, str] = {}
    for source in sources:
        files = [source]
        if is_folder(expanded(source)):
            files = sorted(f for f in expanded(source).iterdir() if f.suffix in (".yaml", ".yml"))
            if not files:
                raise BadInput(f"{source} holds no recipe: expected .yaml files")
        for file in files:
            recipe = read_recipe(file)
            first = by_label.setdefault(recipe.label, str(file))
            if Path(first).resolve() != Path(file).resolve():
                raise BadInput(
                    f"{first} and {file} both have the label {recipe.label}: results could not be told apart"
                )
            recipes[str(file)] = recipe
    return recipes


def parse_label(label: str) -> Recipe:
    """The recipe of a label, with defaults for all settings that the label does not give.

    >>> parse_label("D2+W1:8").stages[1].of
    8

    Raises:
        BadInput: a part that is no stage's label, or does not give all settings that have no default.
    """
    parts = [part.strip() for part in str(label).split("+")]
    stages = []
    for part in parts:
        try:
            stages.append(_of_label(part))
        except BadInput as error:
            raise BadInput(f"label '{label}': {error}") from error
    return Recipe(tuple(stages), tuple(f"label '{label}'" for _ in parts))


def _of_label(part: str) -> Stage:
    """The stage whose label `part` is."""
    cls = stage_class(part)
    stage = cls.from_label(part)
    if stage is None:
        raise BadInput(
            f"'{part}' does not say all settings of the stage '{cls.word}': expected a recipe's .yaml file with them"
        )
    return stage


def _load(path: Path, including: tuple[Path, ...]) -> Recipe:
    """The recipe in a file; `including` are the files that include it, outermost first."""
    root = compose(path)
    if not isinstance(root, yaml.MappingNode):
        raise at(path, root, f"a recipe is a mapping with the keys {', '.join(KEYS)}")
    nodes = entries(root, path, "key of a recipe", KEYS)
    texts = {}
    for key in ("label", "name", "include", "data"):
        if key in nodes:
            texts[key] = nodes[key].value
            if not isinstance(nodes[key], yaml.ScalarNode) or not texts[key]:
                raise at(path, nodes[key], f"'{key}' must be a text")
    first = _included(path, nodes["include"], (*including, path)) if "include" in nodes else Recipe((), ())
    stages, locations, data = list(first.stages), list(first.locations), first.data
    if "data" in nodes:
        data = texts["data"] if texts["data"] in ("embedded", "hub") else str(_inside(path, nodes["data"]))
        try:
            rows.origin_of(data)
        except BadInput as error:
            raise at(path, nodes["data"], error) from error
    listed = nodes.get("stages")
    if listed is not None and not isinstance(listed, yaml.SequenceNode):
        raise at(path, listed, "'stages' must be a list, each entry one stage such as '- depth: {remove: 2}'")
    for entry in listed.value if listed is not None else []:
        stages.append(_stage(entry, path))
        locations.append(location(path, entry))
    if not stages:
        raise at(
            path, listed or root, f"the recipe has no stages: expected 'stages:' and a list of {', '.join(STAGES)}"
        )
    recipe = Recipe(tuple(stages), tuple(locations), data, texts.get("name"))
    if "label" in nodes and texts["label"] != recipe.label:
        raise at(
            path, nodes["label"], f"label '{texts['label']}' is not that of these stages, which is '{recipe.label}'"
        )
    return recipe


def _included(path: Path, node: yaml.Node, chain: tuple[Path, ...]) -> Recipe:
    """The recipe that a file includes; `chain` are the files that include each other, down to this one."""
    included = _inside(path, node)
    if len(chain) > DEEPEST:
        raise at(path, node, f"recipes include each other more than {DEEPEST} deep")
    if included.resolve() in {file.resolve() for file in chain}:
        cycle = " -> ".join(file.name for file in (*chain, included))
        raise at(path, node, f"including '{node.value}' closes a cycle: {cycle}")
    if not is_file(included):
        raise at(path, node, f"there is no file {included} to include")
    return _load(included, chain)


def _stage(entry: yaml.Node, path: Path) -> Stage:
    """The stage of an entry of `stages`: 'name', 'name:' or 'name: {setting: value}'."""
    if isinstance(entry, yaml.ScalarNode):
        if entry.value not in STAGES:
            raise at(path, entry, unknown("stage", entry.value, STAGES))
        name, settings = entry.value, None
    elif isinstance(entry, yaml.MappingNode) and len(entry.value) == 1:
        ((name, settings),) = entries(entry, path, "stage", STAGES).items()
    else:
        raise at(path, entry, "expected one stage an entry, such as '- depth: {remove: 2}'")
    fields = fields_of(STAGES[name])
    nodes = {}
    if isinstance(settings, yaml.MappingNode):
        nodes = entries(settings, path, f"setting of stage '{name}'", fields)
    elif settings is not None and settings.value != "":
        form = f"'- {name}: {{setting: value}}', any of {', '.join(fields)}"
        raise at(path, settings, f"stage '{name}' takes its settings as {form}")
    for key, field in fields.items():
        if key not in nodes and field.default is field.default_factory is dataclasses.MISSING:
            raise at(path, entry, f"stage '{name}' lacks the setting '{key}'")
    values = {key: value(node, path) for key, node in nodes.items()}
    try:
        return build(STAGES[name], values)
    except (BadInput, TypeError) as error:  # TypeError: a list or mapping with elements of another type
        raise at(path, _blamed(str(error), nodes) or entry, f"stage '{name}': {error}") from error


def _blamed(message: str, nodes: Mapping[str, yaml.Node]) -> yaml.Node | None:
    """The node of the setting that an error is about, for its line: its name or its value is in the message."""
    signs = (
        lambda key, node: f"'{key}'" in message,
        lambda key, node: message.startswith(f"{key} "),
        lambda key, node: node.value and f"'{node.value}'" in message,
    )
    return next((node for sign in signs for key, node in nodes.items() if sign(key, node)), None)


def _inside(path: Path, node: yaml.Node) -> Path:
    """The path in a node of a recipe's file, which must be in the file's folder or below."""
    target, root = path.parent / node.value, path.parent.resolve()
    try:
        inside = target.resolve().is_relative_to(root)
    except (OSError, RuntimeError, ValueError) as error:  # too long; links in a circle; no character of a path
        raise at(path, node, f"{node.value!r} is no path ({error})") from error
    if not inside:
        raise at(path, node, f"'{node.value}' leads out of {root}: expected a path in that folder or below")
    return target
