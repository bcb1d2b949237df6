"""Recipes as text: what is read, and what is refused with its file and line."""

from dataclasses import dataclass

import pytest

from thesislib.compress.depth import Depth
from thesislib.compress.stage import STAGES, Stage
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.files import data_file
from thesislib.pipeline.recipe import Shape, parse_label, read_all, read_recipe

SMOLLM2 = Shape(
    30,
    {"q_proj": 576, "k_proj": 576, "v_proj": 576, "o_proj": 576, "gate_proj": 576, "up_proj": 576, "down_proj": 1536},
)


@dataclass(frozen=True)
class Toy(Stage):
    """A stage with settings of each type, that may stand only after one that removed something."""

    rate: float
    times: int = 1
    texts: tuple | list = ()
    on: bool = False
    name: str | None = None

    def __post_init__(self):
        if self.times < 1:
            raise BadInput(f"times is {self.times}: expected at least 1")

    label = "X"
    word, family, pattern = "toy", "pruned", "X"

    def after(self, previous, shape=None):
        if not previous:
            raise BadInput("nothing was removed yet that could be made up for")
        if shape is not None and shape.depth < 3:
            raise BadInput(f"{shape.depth} blocks are too few")
        return shape


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "toy", Toy)

    def write(text, name="recipe.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


IN_ORDER = """
label: D2+W1:8+D1+X
name: "any order"
data: embedded
stages:
  - depth: {remove: 2, metric: magnitude, greedy: true}
  - width:
      remove: 1
      of: 8
      linears: [q_proj, "down_*"]
  - depth: {blocks: [3]}
  - toy: {rate: 1e-4, name: "12"}
"""


def test_a_recipe_becomes_typed_configs_in_order(write):
    recipe = read_recipe(write(IN_ORDER))
    assert recipe.stages == (
        Depth(remove=2, metric="magnitude", greedy=True),
        Width(remove=1, of=8, linears=["q_proj", "down_*"]),
        Depth(blocks=[3]),
        Toy(rate=0.0001, name="12"),
    )
    assert (recipe.label, recipe.data, recipe.name) == ("D2+W1:8+D1+X", "embedded", "any order")
    assert [place.rpartition(":")[2] for place in recipe.locations] == ["6", "7", "11", "12"]
    plain = recipe.entries()
    assert list(plain[0]) == ["depth"] and plain[0]["depth"]["remove"] == 2
    assert plain[0]["depth"]["protect_first"] == 4  # defaults are filled in, so that a changed default changes the hash


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("- depth: {remov: 2}", 3, "unknown setting of stage 'depth' 'remov': did you mean 'remove'?"),
        ("- dept: {remove: 2}", 3, "unknown stage 'dept': did you mean 'depth'?"),
        ("- gptqq", 3, "unknown stage 'gptqq': "),
        (
            "- depth:\n      metric: taylor\n      remove: two",
            5,
            "stage 'depth': parameter 'remove' is 'two' (str): expected int | None",
        ),
        ("- width:\n      of: 8\n      remove: 9", 3, "stage 'width': pattern 9:8 removes all"),
        (
            "- depth:\n      remove: 2\n      metric: perplexty",
            5,
            "unknown importance metric 'perplexty': did you mean 'perplexity'?",
        ),
        ("- toy:\n      rate: 1\n      times: 0", 5, "stage 'toy': times is 0: expected at least 1"),
        ("- depth: {remove: 2}\n  - toy: {times: 2}", 4, "stage 'toy' lacks the setting 'rate'"),
        (
            "- depth: {remove: 2}\n  - width: 1:8",
            4,
            "stage 'width' takes its settings as '- width: {setting: value}', any of remove, of",
        ),
        ("- width: {remove: 1:8, of: 8}", 3, "parameter 'remove' is '1:8' (str)"),  # not 68, as YAML 1.1 has it
        ("- depth: {remove: 99999999999999999999}", 3, "parameter 'remove' is 1e+20 (float): expected int"),
        ("- depth: {remove: yes}", 3, "parameter 'remove' is 'yes' (str)"),
        ("- depth: {remove: 2, remove: 3}", 3, "'remove' is there twice"),
        ("- width: {ratios: {q_proj: 0.5,\n     q_proj: 0.6}}", 4, "the key 'q_proj' is there twice"),
        ("- width: {remove: 1, of: 8, linears: [[q_proj]]}", 3, "stage 'width': "),
        ("- depth: {remove: 2}\n    width: {remove: 1, of: 8}", 3, "expected one stage an entry"),
        (
            "- depth: {remove: !!python/object:os.system 2}",
            3,
            "the tag 'tag:yaml.org,2002:python/object:os.system' is not understood",
        ),
        ("- depth: &a {remove: 2}\n  - depth: *a", 4, "aliases such as '*a' are not understood"),
        ("- depth: {remove: 2", 4, "not YAML ("),
        ("- toy: {rate: 1}\n  - depth: {remove: 2}", 3, "nothing was removed yet"),
    ],
)
def test_what_cannot_work_is_refused_with_its_line(write, text, line, message):
    file = write(f"# a comment\nstages:\n  {text}\n")
    with pytest.raises(BadInput) as error:
        read_recipe(file)
    assert str(error.value).startswith(f"{file}:{line}: "), error.value
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: []", ":1: unknown key of a recipe 'stage': did you mean 'stages'?"),
        ("stages: []\nstages: []", ":2: the key of a recipe 'stages' is there twice"),
        ("stages: []", ":1: the recipe has no stages"),
        ("name: empty", ":1: the recipe has no stages"),
        ("stages:\n  depth: {remove: 2}", ":2: 'stages' must be a list"),
        ("- depth: {remove: 2}", ":1: a recipe is a mapping with the keys label, name, include, data, stages"),
        ("label: D3\nstages:\n- depth: {remove: 2}", ":1: label 'D3' is not that of these stages, which is 'D2'"),
        ("label: [D2]\nstages:\n- depth: {remove: 2}", ":1: 'label' must be a text"),
        ("? [a]\n: b", ":1: a key of a recipe must be a plain text"),
        ("", " is empty"),
        ("a: 1\n---\nb: 2", ":2: not YAML (but found another document)"),
        ("[" * 500_000, ":1: nested more than 20 deep"),
        ("- " * 100 + "a", ":1: nested more than 20 deep"),
        ("#" * (2 << 20), " is larger than 1048576 bytes"),
        ("stages: \x00", ": not YAML ("),
    ],
)
def test_a_file_that_is_no_recipe(write, text, message):
    file = write(text)
    with pytest.raises(BadInput) as error:
        read_recipe(file)
    assert str(error.value).startswith(f"{file}{message}"), error.value


def test_files_that_are_none(write, tmp_path):
    with pytest.raises(BadInput, match=r"is a folder: expected a \.yaml file"):
        read_recipe(f"{tmp_path}/")
    with pytest.raises(BadInput, match=r"gone\.yaml is not there"):
        read_recipe("gone.yaml")
    file = write("")
    file.write_bytes(b"stages: \xff\xfe")
    with pytest.raises(BadInput, match="cannot be read .*utf-8"):
        read_recipe(file)
    with pytest.raises(BadInput, match="is not understood"):
        read_recipe("x" * 5000)


# ---------------------------------------------------------------- includes and paths


def test_an_included_recipe_comes_first(write):
    write("data: hub\nstages: [depth: {remove: 2}]", "parts/first.yaml")
    write("include: parts/first.yaml\nstages: [width: {remove: 1, of: 8}]", "second.yaml")
    recipe = read_recipe(write("label: D2+W1:8+X\ninclude: second.yaml\ndata: embedded\nstages:\n- toy: {rate: 1}"))
    assert recipe.label == "D2+W1:8+X"
    assert [place.rpartition("/")[2] for place in recipe.locations] == [
        "first.yaml:2",
        "second.yaml:2",
        "recipe.yaml:5",
    ]
    assert recipe.data == "embedded"
    assert read_recipe(write("include: second.yaml", "third.yaml")).data == "hub"


@pytest.mark.parametrize("name", ["a\\0b.yaml", "loop.yaml", f"{'x' * 300}.yaml"])
def test_an_include_that_is_no_path(write, name):
    file = write(f'include: "{name}"')
    (file.parent / "loop.yaml").symlink_to(file.parent / "loop.yaml")
    with pytest.raises(BadInput, match=r"recipe.yaml:1: .*(is no path|there is no file)"):
        read_recipe(file)


def test_a_wrong_stage_is_placed_in_the_file_that_has_it(write):
    first = write("stages: [depth: {remove: 0}]", "first.yaml")
    with pytest.raises(BadInput) as error:
        read_recipe(write("include: first.yaml\nstages: [width: {remove: 1, of: 8}]"))
    assert str(error.value).startswith(f"{first}:1: stage 'depth': remove is 0")


def test_cycles_of_includes(write):
    itself = write("include: itself.yaml\nstages: [depth: {remove: 2}]", "itself.yaml")
    with pytest.raises(
        BadInput, match=rf"{itself}:1: including 'itself.yaml' closes a cycle: itself.yaml -> itself.yaml"
    ):
        read_recipe(itself)
    write("include: ./b.yaml", "a.yaml")
    write("stages: [depth: {remove: 2}]\ninclude: c.yaml", "b.yaml")
    write("include: a.yaml", "c.yaml")
    with pytest.raises(
        BadInput, match=r"c.yaml:1: including 'a.yaml' closes a cycle: a.yaml -> b.yaml -> c.yaml -> a.yaml"
    ):
        read_recipe(itself.parent / "a.yaml")


def test_the_same_recipe_included_along_two_ways_is_no_cycle(write):
    write("stages: [depth: {remove: 2}]", "base.yaml")
    write("include: base.yaml", "one.yaml")
    assert read_recipe(write("include: one.yaml\nstages: [depth: {remove: 1}]")).label == "D2+D1"


@pytest.mark.parametrize("where", ["../outside.yaml", "parts/../../outside.yaml", "ABSOLUTE", "link.yaml"])
@pytest.mark.parametrize("key", ["include", "data"])
def test_paths_out_of_the_recipes_folder(write, tmp_path, where, key):
    outside = write("stages: [depth: {remove: 2}]", "outside.yaml")
    file = write(
        f"{key}: {where.replace('ABSOLUTE', str(outside))}\nstages: [depth: {{remove: 2}}]", "project/recipe.yaml"
    )
    (file.parent / "link.yaml").symlink_to(outside)
    with pytest.raises(
        BadInput, match=r"recipe.yaml:1: '.*' leads out of .*project: expected a path in that folder or below"
    ):
        read_recipe(file)


def test_paths_that_lead_nowhere(write):
    with pytest.raises(BadInput, match=r"recipe.yaml:1: there is no file .*gone.yaml to include"):
        read_recipe(write("include: gone.yaml"))
    with pytest.raises(BadInput, match=r"recipe.yaml:2: unknown data '.*gone': expected 'embedded', a folder"):
        read_recipe(write("stages: [depth: {remove: 2}]\ndata: gone"))
    file = write("stages: [depth: {remove: 2}]\ndata: texts")
    (file.parent / "texts").mkdir()
    assert read_recipe(file).data == str(file.parent / "texts")


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "label", ["D4", "W2:4", "D2+W1:8", "W1:8+D2", "D1+D1+W12:16", "DA3+DM2", "W50%", "W12.5%+R3", "T-masked+Q8+E"]
)
def test_labels_of_default_settings_are_recipes(label):
    assert read_recipe(label).label == label


def test_a_label_gives_default_settings():
    assert parse_label("D2 + W1:8").stages == (Depth(remove=2), Width(remove=1, of=8))
    assert parse_label("DA2").stages == (Depth(remove=2, part="attention"),)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("D2+", "label 'D2+': part '' is not understood"),
        ("W50", "part 'W50' is not understood: expected a recipe's .yaml file, or parts like D2 or W1:8 joined by '+'"),
        ("W~", "'W~' does not say all settings of the stage 'width': expected a recipe's .yaml file with them"),
        ("W100%", "ratio 1.0: expected a share of the weights in [0, 1)"),
        ("D", "part 'D' is not understood"),
        ("D0", "label 'D0': remove is 0"),
        ("W8:8", "label 'W8:8': pattern 8:8 removes all"),
        ("D٣", "is not understood"),
        ("D" + "9" * 5000, "is too large a number"),
    ],
)
def test_labels_that_are_none(label, message):
    with pytest.raises(BadInput) as error:
        read_recipe(label)
    assert message in str(error.value)


def test_a_stage_may_read_its_own_label(monkeypatch):
    class Own(Toy):
        word, pattern = "own", r"Y(\d+)"

        @classmethod
        def from_label(cls, part):
            return cls(rate=float(part[1:]))

    monkeypatch.setitem(STAGES, "own", Own)
    assert parse_label("D2+Y3").stages == (Depth(remove=2), Own(rate=3.0))


def test_a_label_of_a_stage_that_is_not_there_yet(monkeypatch):
    monkeypatch.delitem(STAGES, "eora", raising=False)
    with pytest.raises(BadInput, match=r"label 'D2\+E': part 'E' is not understood"):
        parse_label("D2+E")


# ---------------------------------------------------------------- orders and shapes


def test_orders_that_do_not_fit_the_subject():
    fits = parse_label("D20+D4+W1:8")
    fits.check(SMOLLM2)  # 24 of 30 may go: four and two are protected
    with pytest.raises(BadInput, match="label 'D20.D5': cannot remove 5 of 10 blocks"):
        parse_label("D20+D5").check(SMOLLM2)
    parse_label("DA20+D5").check(SMOLLM2)  # attentions alone leave the blocks
    with pytest.raises(
        BadInput, match="pattern 1:7 does not fit q_proj: its rows have 576 inputs, which 7 does not divide"
    ):
        parse_label("W1:7").check(SMOLLM2)


def test_a_stage_sees_what_was_before_it_and_the_shape_that_is_left(write):
    recipe = read_recipe(write("stages:\n- depth: {remove: 3}\n- toy: {rate: 1}"))
    recipe.check(Shape(9, {}))
    with pytest.raises(BadInput, match=r"recipe.yaml:3: 2 blocks are too few"):
        read_recipe(write("stages:\n- depth: {blocks: [0, 1, 2, 3, 4, 5, 6]}\n- toy: {rate: 1}")).check(Shape(9, {}))


# ---------------------------------------------------------------- several


def test_two_recipes_with_one_label(write, tmp_path):
    first, second = (
        write("stages: [depth: {remove: 2}]", "a.yaml"),
        write("stages: [depth: {remove: 2, metric: taylor}]", "b.yml"),
    )
    for sources in ([first, second], [tmp_path]):
        with pytest.raises(BadInput, match=r"a\.yaml and .*b\.yml both have the label D2"):
            read_all(sources)
    assert list(read_all([first, first])) == [str(first)]  # one file is no two
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match=r"none holds no recipe: expected \.yaml files"):
        read_all([tmp_path / "none"])


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("d4", "D4"),
        ("w2_4", "W2:4"),
        ("w1_8", "W1:8"),
        ("d2_w1_8", "D2+W1:8"),
        ("thesis", "D2+W1:8+W+Q+E"),
        ("order_depth_lora_width", "D2+W+W1:8"),
        ("order_depth_width_lora", "D2+W1:8+W"),
    ],
)
def test_the_recipes_that_come_along(name, label):
    recipe = read_recipe(data_file(f"recipes/{name}.yaml"))
    assert recipe.label == label
    recipe.check(SMOLLM2)
    named = parse_label(label).stages
    assert [type(stage) for stage in recipe.stages] == [type(stage) for stage in named]
    # so `compress LABEL` and `compress FILE` are one, but for the files' quick training and calibration
    assert [a == b for a, b in zip(recipe.stages, named, strict=True)] == [
        isinstance(stage, (Depth, Width)) for stage in recipe.stages
    ]
