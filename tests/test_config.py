import math
from dataclasses import dataclass

import pytest

from thesislib.chapters.ch00_measures import Measures
from thesislib.chapters.ch01_franken import Franken
from thesislib.compress.depth import Depth
from thesislib.config import build, positive, settings
from thesislib.errors import BadInput


@dataclass(frozen=True)
class Some:
    count: int = 3
    rate: float = 0.5
    name: str = "x"
    many: list | None = None
    flag: bool = False


def test_reads_the_names_of_its_fields_and_leaves_others_alone():
    namespace = {
        "count": 5,
        "rate": 1,
        "math": math,
        "settings": settings,
        "_": 7,
        "In": [],
        "results": {"a": 1},
        "cuont": 6,
        "nothing": None,
    }
    assert settings(Some, namespace) == Some(count=5, rate=1)


def test_a_name_it_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match="unknown parameter of Some 'cuont': did you mean 'count'"):
        build(Some, {"cuont": 5})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": "5"}, "parameter 'count' is '5' .str.: expected int"),
        ({"count": True}, "expected int"),
        ({"count": 1.5}, "expected int"),
        ({"rate": "fast"}, "expected float"),
        ({"name": 3}, "expected str"),
        ({"many": 3}, "expected list"),
        ({"flag": 1}, "expected bool"),
    ],
)
def test_wrong_types(values, message):
    with pytest.raises(BadInput, match=message):
        build(Some, values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Franken, {"windows": 0}, "parameter 'windows' is 0: expected at least 1"),
        (Franken, {"dtype": "float8"}, "expected one of float32, bfloat16, float16"),
        (Franken, {"items": -1}, "'items' is -1"),
        (Measures, {"lengths": [1]}, "expected a list of window lengths"),
        (Measures, {"lengths": ["512"]}, "expected a list of window lengths"),
        (Measures, {"questions": 0}, "'questions' is 0"),
    ],
)
def test_chapters_check_their_values(kind, values, message):
    with pytest.raises(BadInput, match=message):
        build(kind, values)


def test_the_notebooks_own_values_are_checked():
    with pytest.raises(BadInput, match="parameter 'count' is '5' .str.: expected int"):
        settings(Some, {"count": "5", "other": 1})


def test_positive():
    positive(a=1, b=None)
    with pytest.raises(BadInput, match="'b' is 0"):
        positive(a=1, b=0)


@pytest.mark.parametrize("values", ["x", ["remove"], 3, None])
def test_settings_that_are_no_mapping(values):
    with pytest.raises(BadInput, match="the settings of Depth are .*expected a mapping, such as {remove: value}"):
        build(Depth, values)
