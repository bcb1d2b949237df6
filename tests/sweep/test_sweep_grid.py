"""Grids read: which configurations a few lines make, what each is made of, what is refused before anything runs."""

import json
import re
from pathlib import Path

import pytest

from thesislib.chapters.thesis import thesis_rows
from thesislib.compress.gptq import Gptq
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.formats.load import save_checkpoint
from thesislib.pipeline.recipe import Shape, read_all
from thesislib.records.store import Store
from thesislib.sweep import run
from thesislib.sweep.grid import read_grid, write_recipes
from thesislib.sweep.workers import Workers

ROOT = Path(__file__).parents[2]
GRID = ROOT / "data" / "grid.yaml"
SMALL = """
stages:
  W: {lora: {text: wikitext, steps: 3}}
groups:
  pruned: [[none, D1], [none, "W1:8", "W2:4"]]
  trained: [pruned, [W]]
  again: [[D1]]
sizes:
  quick:
    measures: {perplexity: {on: wikitext, limit: 2}, closed: {on: trivia, limit: 3}}
    few: {trained: [perplexity]}
  other:
    take: [D1+W, dense]
    stages: {W: {lora: {text: wikitext, steps: 9}}}
    measures: {perplexity: {on: wikitext, limit: 2}}
    timed: 4
"""


@pytest.fixture
def write(tmp_path):
    def written(text, old="", new=""):
        assert old in text
        file = tmp_path / "grid.yaml"
        file.write_text(text.replace(old, new) if old else text)
        return file

    return written


def test_every_combination_once_in_order(write):
    grid = read_grid(write(SMALL), "quick")
    labels = [
        "dense",
        "W1:8",
        "W2:4",
        "D1",
        "D1+W1:8",
        "D1+W2:4",
        "W",
        "W1:8+W",
        "W2:4+W",
        "D1+W",
        "D1+W1:8+W",
        "D1+W2:4+W",
    ]
    assert [c.label for c in grid.configurations] == labels
    assert [c.group for c in grid.configurations] == ["pruned"] * 6 + ["trained"] * 6
    assert grid.name == "grid" and grid.size == "quick" and grid.timed is None
    of = {c.label: c for c in grid.configurations}
    assert of["dense"].recipe.stages == () and of["D1+W2:4"].recipe.stages[1] == Width(remove=2, of=4)
    assert list(of["D1"].measures) == ["perplexity", "closed"] and list(of["W"].measures) == ["perplexity"]
    assert of["W"].measures["perplexity"].limit == 2


def test_a_size_takes_labels_and_changes_stages(write):
    grid = read_grid(write(SMALL), "other")
    assert [c.label for c in grid.configurations] == ["D1+W", "dense"] and grid.timed == 4
    assert grid.configurations[0].recipe.stages[1].steps == 9
    assert read_grid(write(SMALL), "quick").configurations[6].recipe.stages[0].steps == 3


def test_a_part_of_a_size_can_be_chosen(write):
    whole, part = (read_grid(write(SMALL), "quick", only=only) for only in ((), ["D1+W", "D1", "dense"]))
    assert part.configurations == tuple(c for c in whole.configurations if c.label in ("dense", "D1", "D1+W"))
    closed = read_grid(write(SMALL), "quick", only=["D1", "W"], measures=["closed"])
    assert [list(c.measures) for c in closed.configurations] == [["closed"], []]
    assert read_grid(write(SMALL), "other", measures=["perplexity"]).timed is None
    timed = read_grid(write(SMALL), "other", measures=["seconds per token"])
    assert timed.timed == 4 and not any(c.measures for c in timed.configurations)


@pytest.mark.parametrize(
    ("size", "chosen", "message"),
    [
        ("quick", {"only": ["D1+W1:9"]}, "unknown label of .*'D1[+]W1:9': did you mean 'D1[+]W1:8'"),
        ("quick", {"measures": ["close"]}, "unknown measure of .*'close': did you mean 'closed'"),
        ("quick", {"measures": ["seconds per token"]}, "unknown measure of .*size quick"),
    ],
)
def test_a_part_that_is_not_there_is_named(write, size, chosen, message):
    with pytest.raises(BadInput, match=message):
        read_grid(write(SMALL), size, **chosen)


def test_what_is_not_chosen_need_not_be_possible(write):
    file = write(SMALL, "again: [[D1]]", "again: [[D1+X9]]")
    assert [c.label for c in read_grid(file, "quick", only=["D1"]).configurations] == ["D1"]
    with pytest.raises(BadInput, match="'X9'"):
        read_grid(file, "quick", only=["D1", "D1+X9"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("groups:", "grups:", "did you mean 'groups'"),
        ("pruned: [[none, D1], ", "pruned: [[none, X1], ", "part 'X1' is not understood"),
        ("[pruned, [W]]", "[prumed, [W]]", "unknown group .*'prumed': did you mean 'pruned'"),
        ("again: [[D1]]", "again: D1", "group 'again': expected a list of lists"),
        ("again: [[D1]]", "again: [[1]]", "neither a list of labels' parts nor the name"),
        ("{on: wikitext, limit: 2}, closed", "{on: wikitex, limit: 2}, closed", "did you mean 'wikitext'"),
        ("few: {trained", "few: {traned", "did you mean 'trained'"),
        ("few: {trained: [perplexity]}", "few: {trained: [perplexty]}", "did you mean 'perplexity'"),
        ("W: {lora: {text: wikitext, steps: 3}}", "W: {lora: {text: wikitext, stps: 3}}", "did you mean 'steps'"),
        ("W: {lora: {text: wikitext, steps: 3}}", "T: {lora: {text: wikitext, steps: 3}}", "whose label is 'W'"),
        ("W: {lora: {text: wikitext, steps: 3}}", "W: {lore: {}}", "did you mean 'lora'"),
        ("W: {lora: {text: wikitext, steps: 3}}", "W: 3", "expected one stage with its settings"),
        ("timed: 4", "timed: 0", "'timed' is 0"),
        ("    take: [D1+W, dense]", "    take: dense", "take is 'dense': expected a list of texts"),
        ("    take: [D1+W, dense]", "    take: [1]", "expected a list of texts"),
        ("    take: [D1+W, dense]", "    groups: [[pruned]]", "expected a list of texts"),
        ("few: {trained: [perplexity]}", "few: {trained: perplexity}", "expected a list of texts"),
        ("limit: 2}, closed", "limit: 0}, closed", "'limit' is 0: expected at least 1"),
        ("stages:\n  W: {lora: {text: wikitext, steps: 3}}\n", "stages:\n", "'stages' is None: expected a mapping"),
        ("    take: [D1+W, dense]\n", "    groups: [trainde]\n", "did you mean 'trained'"),
    ],
)
def test_what_is_wrong_is_named(write, old, new, message):
    size = "other" if old.strip().startswith(("timed", "take")) else "quick"
    with pytest.raises(BadInput, match=message):
        read_grid(write(SMALL, old, new), size)


def test_every_impossible_configuration_is_listed(write):
    text = SMALL.replace("again: [[D1]]", "again: [[R, D5], [Q]]")
    with pytest.raises(
        BadInput, match=r"1 configurations cannot work(.|\n)*R\+Q"
    ):  # quantised twice: no subject is needed to see it
        read_grid(write(text), "quick")
    grid = read_grid(
        write(SMALL.replace('"W2:4"', '"W2:5", "W3:7"').replace("again: [[D1]]", "again: [[D9]]")), "quick"
    )
    with pytest.raises(BadInput) as caught:
        grid.check(lambda c: c.recipe.check(Shape(10, {"q_proj": 32, "down_proj": 64})))
    wrong = [line.split(",")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert len(wrong) == 9 and {"D9", "W2:5", "D1+W3:7", "D1+W2:5+W"} <= set(
        wrong
    )  # two patterns, with and without D1, trained or not


IMPOSSIBLE = """
stages:
  W: {lora: {text: wikitext, steps: 3, rank: 20}}
  Q: {gptq: {group: 24}}
  R: {rtn: {group: 16, grid: minimum}}
groups:
  all: [["W1:8", "W3:7", D2, D8, "W1:8+E", E, "D1+E", Q, R, "W2:4+R", W, "R+R", X1, "D2+D2"]]
sizes:
  quick:
    measures: {perplexity: {on: wikitext, length: 32, limit: 2}}
"""
WHY = {  # of a subject with 8 blocks, rows of 32 and 64 inputs, and values of width 16
    "W3:7": "does not divide",
    "D8": "cannot remove 8 of 8",
    "E": "nothing to correct",
    "D1+E": "nothing to correct",
    "Q": "group 24 does not divide",
    "W2:4+R": "no exact zero",  # which the forecast alone finds, as the next
    "W": "rank 20 is larger than [kv]_proj",
    "R+R": "quantise a quantised subject",
    "X1": "not understood",
    "D2+D2": "cannot remove 2 of 6",
}


def test_all_that_is_impossible_is_listed_before_anything_is_started(write, tiny, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    started = []
    monkeypatch.setattr(run, "drive", lambda *given: started.append(given))
    place, store = (
        run.Target(str(save_checkpoint(tiny(layers=8), tmp_path / "tiny")), tiny_data, "float32"),
        Store(tmp_path / "s.jsonl"),
    )
    grid = read_grid(write(IMPOSSIBLE), "quick", strict=False)
    with pytest.raises(BadInput) as caught:
        run.sweep(grid, place, store, Workers(1))
    first, *listed = str(caught.value).splitlines()
    assert first == "10 of the grid's 14 configurations cannot work on this subject:" and len(listed) == len(WHY)
    for label, why in WHY.items():
        assert any(re.match(rf" *(label ')?{re.escape(label)}[,'].*({why})", line) for line in listed), (label, listed)
    assert not started and not store.path.exists() and not (tmp_path / "cache" / "stages").exists()
    with pytest.raises(BadInput, match="4 configurations cannot work"):  # what needs no subject, where none is at hand
        read_grid(write(IMPOSSIBLE), "quick")


@pytest.mark.parametrize("size", ["", "huge"])
def test_an_unknown_size_is_refused(write, size):
    with pytest.raises(BadInput, match="unknown size.*quick, other"):
        read_grid(write(SMALL), size)


def test_the_studys_grid_holds_all_the_thesis_has():
    grid = read_grid(GRID, "full")
    labels = {c.label for c in grid.configurations}
    for label, lora, stage in thesis_rows():
        if label in ("dense", "base model"):
            continue
        depth, _, width = label.partition("+")
        wanted = (
            f"{depth}+{lora}+{width}"
            if stage == "order"
            else "+".join(x for x in (label, lora, {"E": "Q+E"}.get(stage, stage)) if x)
        )
        assert wanted in labels, (label, lora, stage)
    assert {"Q3", "Q2"} <= labels and len(grid.configurations) == len(labels)
    assert next(c for c in grid.configurations if c.label == "Q3").recipe.stages[0] == Gptq(
        bits=3, grid="asymmetric", windows=16
    )


def test_the_studys_recipes_are_those_of_its_grid(tmp_path):
    write_recipes(read_grid(GRID, "full"), tmp_path)
    grid = {c.label: c.recipe.entries() for c in read_grid(GRID, "full").configurations if c.recipe.stages}
    read = {recipe.label: recipe.entries() for recipe in read_all([tmp_path]).values()}
    assert json.dumps(read, sort_keys=True) == json.dumps(grid, sort_keys=True)


def test_recipes_written_again_leave_others_files(tmp_path, write):
    grid = write(SMALL)
    first = write_recipes(read_grid(grid, "quick"), tmp_path / "r")
    (tmp_path / "r" / "mine.yaml").write_text("stages: [depth: {remove: 1}]\n")
    assert len(first) == 11 and {"d1_w2_4_w.yaml", "w.yaml"} <= {file.name for file in first}
    write_recipes(read_grid(grid, "other"), tmp_path / "r")
    assert sorted(file.name for file in (tmp_path / "r").glob("*")) == ["d1_w.yaml", "mine.yaml"]
