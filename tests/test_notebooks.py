"""A notebook's parameters before it runs: as typed, from where the user stands, refused by name."""

import json
import os

import pytest

from thesislib.bounds import check_sizes
from thesislib.chapters import page, parameters_of
from thesislib.cli import export_name
from thesislib.errors import BadInput
from thesislib.formats.load import save_checkpoint
from thesislib.formats.options import check_device, own_dtype
from thesislib.notebooks import listed, ready, texts, typed
from thesislib.runner import chapters
from thesislib.sources.hub import unusable_proxy

FRANKEN, DEVICE = chapters()["01_franken_llama"], chapters()["07_on_device"]
ODD = [
    "a # b",
    "a: b",
    "[a",
    "{",
    "'x'",
    '"x"',
    "007",
    "null",
    "true",
    "*x",
    "&x",
    "!x",
    "a\nb",
    "<b>&amp;</b>",
    "%",
    "@",
    "`",
    "- a",
    "1:8",
    " a ",
    "",
    "=",
    "é\u2028",
]


@pytest.mark.parametrize("text", ODD)
def test_texts_arrive_as_typed(text):
    assert typed(FRANKEN, [("prompt", text)]) == {"prompt": text}


def test_what_is_no_text_is_read_as_before():
    given = [("windows", "null"), ("items", "7"), ("shown", "7")]
    assert typed(FRANKEN, given) == {"windows": None, "items": 7, "shown": "7"}
    assert typed(DEVICE, [("devices", "[k1, 'a # b.yaml']")]) == {"devices": ["k1", "a # b.yaml"]}


def test_lists_of_texts():
    assert listed(FRANKEN, [("prompt", "a: b, c # d,[e"), ("windows", "1,2")]) == {
        "prompt": ["a: b", "c # d", "[e"],
        "windows": [1, 2],
    }
    assert texts('"a, b",it\'s, "c" d') == ["a, b", "it's", '"c" d']


def test_paths_are_the_users(tiny, tmp_path, monkeypatch):
    save_checkpoint(tiny(layers=11), tmp_path / "a b")
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("a b", "./a b/", "~/a b", "data/../a b"):
        found = ready(FRANKEN, {"subject": text, "data": "data"})
        assert (
            os.path.isabs(found["subject"])
            and os.path.samefile(found["subject"], "a b")
            and found["data"] == str(tmp_path / "data")
        )
    (tmp_path / "embedded").mkdir()
    assert ready(FRANKEN, {"subject": "embedded", "data": "hub", "prompt": "data"}) == {
        "subject": "embedded",
        "data": "hub",
        "prompt": "data",
    }
    assert ready(FRANKEN, {"subject": "hub:org/name"}) == {"subject": "hub:org/name"}


def test_expectations_are_said(monkeypatch):
    said = []
    monkeypatch.setattr(page, "display", lambda shown: said.append(shown.data))
    page.expect(True, "a is b")
    page.expect(float("nan") > 1, "D2+W is d")
    assert said[0] == "✓ *holds:* a is b" and said[1].startswith("✗ *does not hold for this subject:* <abbr title=")


def test_no_notebook_asserts_a_finding():
    whole = ('["zeros"] > 0',)  # that what was made is complete
    for notebook in chapters().values():
        for cell in json.loads(notebook.read_text("utf8"))["cells"]:
            if "toy" in cell["metadata"].get("tags", []):  # what it computes by hand is the package's
                continue
            lines = [
                line for line in cell["source"] if cell["cell_type"] == "code" and line.lstrip().startswith("assert ")
            ]
            assert all(any(word in line for word in whole) for line in lines), notebook


def test_a_models_own_type(tiny, tmp_path):
    assert own_dtype("embedded") == "bfloat16"
    folder = save_checkpoint(tiny(layers=2), tmp_path / "m")
    assert own_dtype(folder) == "float32"
    for said, dtype in (
        ({"dtype": "float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
    ):
        plain = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**plain, **said}))
        assert own_dtype(folder) == dtype
    (folder / "config.json").write_text(json.dumps({**plain, "dtype": "int8"}))
    with pytest.raises(BadInput, match="'int8'"):
        own_dtype(folder)


def test_names_of_exports(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    names = {
        ".": "model",
        "./": "model",
        "..": tmp_path.name,
        "../model/": "model",
        "x/y.gguf": "y",
        "hub:org/name@v1": "name",
        "embedded": "embedded",
    }
    assert {spec: export_name(spec) for spec in names} == names


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [("ALL_PROXY", "socks5://127.0.0.1:9", "socksio"), ("https_proxy", "http://127.0.0.1:port", "HOST:PORT")],
)
def test_a_proxy_that_cannot_be_used_is_named(monkeypatch, name, value, word):
    for other in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    assert unusable_proxy() is None
    monkeypatch.setenv(name, value)
    if "socks" not in value or not __import__("importlib.util").util.find_spec("socksio"):
        assert name in unusable_proxy() and word in unusable_proxy()


def test_devices():
    check_device("cpu")
    with pytest.raises(BadInput, match="meta"):
        check_device("meta")


def test_sizes_that_are_usual_pass():
    check_sizes(
        {
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "intermediate_size": 1536,
        }
    )
    check_sizes(
        {
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
            "vocab_size": 128256,
            "intermediate_size": 28672,
        }
    )


def test_a_subject_that_a_chapter_cannot_take_is_refused_before_it_runs(tiny, tmp_path):
    folders = {}
    for layers, hidden in ((2, 32), (8, 32), (11, 32), (8, 24)):
        folders[layers, hidden] = tmp_path / f"{layers}-{hidden}"
        tiny(layers=layers, hidden_size=hidden, head_dim=8).model.save_pretrained(folders[layers, hidden])
    notebooks = chapters()
    cases = [
        ("01_franken_llama", (8, 32), "the 25 plans need a model of at least 11 blocks"),
        ("02_depth_pruning", (2, 32), "of this subject's 2 blocks 0 can go"),
        ("03_width_pruning", (8, 24), "24"),
        ("04_lora_recovery", (2, 32), "parameter 'pruned' has 'D2', which is not possible for this subject"),
    ]
    for name, shape, said in cases:
        with pytest.raises(BadInput, match=said):
            ready(notebooks[name], {"subject": str(folders[shape])}, parameters_of(name))
    for name, shape in (
        ("01_franken_llama", (11, 32)),
        ("02_depth_pruning", (8, 32)),
        ("03_width_pruning", (2, 32)),
        ("04_lora_recovery", (8, 32)),
    ):
        assert ready(notebooks[name], {"subject": str(folders[shape])}, parameters_of(name))
