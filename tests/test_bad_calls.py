# ruff: noqa: E501 (a table)
"""Calls that cannot work, over all commands: exit code 2, one line that says why, nothing on stdout, and no traceback.
All of them together take seconds."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.formats.load import save_checkpoint

run = CliRunner().invoke
HUGE = "9" * 30
GRID = {
    "groups": {"all": [["none", "D1"], ["none", "W1:8"]]},
    "sizes": {"quick": {"measures": {"ppl": {"on": "wikitext"}}}},
}
SIZES = {
    "num_hidden_layers": [0, -1, 10**9, "8", 1.5, True, [8], {"a": 1}],
    "hidden_size": [0, -1, "64", 10**9, 63, {}],
    "intermediate_size": [0, 10**12, "x"],
    "num_attention_heads": [0, 3, 10**9, None, "4"],
    "num_key_value_heads": [0, 3, -2, []],
    "head_dim": [0, 15, 10**9, "16"],
    "vocab_size": [0, 10**12, -5, "400"],
    "max_position_embeddings": [0, 10**12, "2048"],
    "layer_types": ["full_attention", {"0": 1}],
}
PLANS = [
    "",
    ",",
    "0-999999999",
    "0x999999999",
    "0-99",
    "-1",
    "1-",
    "3-1",
    "a",
    "0x0",
    "0-7:0",
    "0-7x2000",
    HUGE,
    "0" * 300,
    "0,,8",
    "²",
    "0 1",
    "0-7;1",
]


@pytest.fixture(scope="module")
def here(tiny, tiny_data, tmp_path_factory):
    """A folder with a checkpoint, and things that are none."""
    root = tmp_path_factory.mktemp("bad")
    save_checkpoint(tiny(layers=8), root / "tiny")
    (root / "empty").mkdir()
    (root / "binary.yaml").write_bytes(bytes(range(256)) * 9)
    (root / "broken.yaml").write_text("stages: [")
    (root / "grid.yaml").write_text(yaml.safe_dump(GRID))
    (root / "wide.yaml").write_text(yaml.safe_dump({**GRID, "groups": {"all": [["D1", "D2"]] * 40}}))
    (root / "deep.yaml").write_text("[" * 100_000)
    (root / "loop.yaml").write_text("include: loop.yaml\n")
    (root / "anchor.yaml").write_text("stages: &a [*a]\n")
    for i in range(60):
        (root / f"chain{i}.yaml").write_text(f"include: chain{i + 1}.yaml\n")
    (root / "no.gguf").write_bytes(b"not one")
    (root / "empty.jsonl").write_text("")
    (root / "config").mkdir()
    for name, values in SIZES.items():
        for i, value in enumerate(values):
            folder = root / "config" / f"{name}{i}"
            folder.mkdir()
            plain = json.loads((root / "tiny" / "config.json").read_text())
            if name == "hidden_size" and value == 63:
                del plain["head_dim"]
            (folder / "config.json").write_text(json.dumps({**plain, name: value}))
    for name, text in {
        "nested": "[" * 100_000,
        "list": "[]",
        "number": "1",
        "empty": "",
        "bytes": "\x00",
        "long": '{"a": "' + "x" * (5 << 20) + '"}',
    }.items():
        folder = root / "config" / name
        folder.mkdir()
        (folder / "config.json").write_text(text)
    return root


def configs():
    return [f"{name}{i}" for name, values in SIZES.items() for i in range(len(values)) if values[i] is not None] + [
        "nested",
        "list",
        "number",
        "empty",
        "bytes",
        "long",
    ]


EVALUATE = ["evaluate", "tiny", "--on", "wikitext", "--data", "DATA"]
CALLS = [
    *([*EVALUATE, f"--plan={plan}"] for plan in PLANS),
    *(["evaluate", f"config/{name}", "--on", "wikitext"] for name in configs()),
    *(["compress", "W2:4", "--dry-run", "--subject", f"config/{name}"] for name in configs()),
    *([*EVALUATE, f"--{option}={value}"] for option in ("length", "limit", "batch") for value in ("0", "-1", HUGE, "abc", "", "1.5", "nan")),
    *([*EVALUATE, f"--seed={value}"] for value in ("-1", HUGE, "abc", "1e3", str(1 << 32))),
    *([*EVALUATE, f"--device={value}"] for value in ("meta", "foo", "cuda:99", "cpu:cpu", "", "cuda:-1", "mps:7", "xla", "CPU")),
    *([*EVALUATE, f"--dtype={value}"] for value in ("float8", "", "int8", "Float32", "float64")),
    *([*EVALUATE[:4], f"--data={value}"] for value in ("nowhere", "", "~nouser/x", "x" * 5000, "a\0b", "empty")),
    *(["evaluate", value, "--on", "wikitext"] for value in ("", "nowhere", "~nouser", "empty", "no.gguf", "x" * 5000, "a\0b", "grid.yaml", "tiny/config.json", "/", "нет")),
    *(["evaluate", "tiny", *more] for more in ([], ["--on", ""], ["--on", "wikitex"], ["--on", "wikitext", "--nonsense"], ["two", "--on", "wikitext"])),
    ["evaluate", "tiny", "--on", "trivia", "--prompt", "poem", "--data", "DATA"],
    ["evaluate"],
    *(["record", value] for value in ("", "99", "03_width", "-1")),
    *(["record", "00", "--out", "new", "-p", value] for value in ("lengths=512", "lengths=[a]", f"lengths=[{HUGE}]", "items=x", "windows=0", "nope=1")),
    ["record", "02", "--out", "new", "-p", "counts=[x]"],
    ["record", "01", "-p", "windows=1"],
    *(["run", value] for value in ("", "99", "01_frankenllama", "-1", "notebooks/01_franken_llama.ipynb")),
    *(["run", "01", "-p", value] for value in (
        "windows=abc", "windows=-1", "windows=0", "windows=1.5", "windows=true", f"windows={HUGE}", "windows=[1]", "windows={a: 1}", "windows=", "windows=*a",
        "windows=&a [*a]", "windows=" + "[" * 5000, "windows=!!python/object:os.system x", "windows=2000000", "windos=3", "windows", "=3", "", "subject=nowhere",
        "subject=", "subject=~nouser/x", "subject=empty", "data=nowhere", "device=meta", "device=cuda:99", "dtype=float8", "shown=nothing", "tokens=0",
    )),
    ["run", "01", "-p", "windows=1", "-p", "windows=2"],
    ["run", "00", "-p", "lengths=512"],
    ["run", "00", "-p", "lengths=[a]"],
    ["run", "00", "-p", f"lengths=[{HUGE}]"],
    ["run", "02", "-p", "counts=[x]"],
    ["run", "02", "-p", "metrics=[guess]"],
    ["run", "02", "-p", "metrics=[[1]]"],
    *(["run", "03", "-p", value] for value in ("patterns=[1]", "patterns=[2:1]", "patterns=[[]]", "ratios=[x]", "ratios=[2]", "weightings=[1]", "text=poems")),
    ["run", "04", "-p", "pruned=[D]"],
    ["run", "04", "-p", "pruned=[1]"],
    ["run", "04", "-p", "texts=[poems]"],
    ["run", "04", "-p", "learning_rate=fast"],
    ["run", "05", "-p", "bits=[1]"],
    ["run", "05", "-p", "bits=[x]"],
    ["run", "06", "-p", "size=none"],
    ["run", "06", "-p", "workers=100000"],
    ["run", "07", "-p", "devices=[nowhere.yaml]"],
    ["run", "07", "-p", "devices=[1]"],
    ["run", "07", "-p", "devices=k1"],
    *(["compress", *more] for more in (
        [], ["W2:4"], ["W2:4", "--subject", "tiny"], ["W4:2", "--dry-run"], ["D99", "--subject", "tiny", "--dry-run"], ["nothing", "--dry-run"], ["", "--dry-run"],
        [f"D{HUGE}", "--dry-run"], ["+".join(["D1"] * 9), "--subject", "tiny", "--dry-run"], ["W2:4", "--dry-run", "--subject", "nowhere"],
        ["W2:4", "--dry-run", "--dtype", "int8"], ["W2:4", "--dry-run", "--device", "meta"], ["W2:4", "--dry-run", "--data", "nowhere"],
        ["binary.yaml", "--dry-run"], ["broken.yaml", "--dry-run"], ["loop.yaml", "--dry-run"], ["anchor.yaml", "--dry-run"], ["deep.yaml", "--dry-run"],
        ["chain0.yaml", "--dry-run"], ["nowhere.yaml", "--dry-run"], ["~nouser/x.yaml", "--dry-run"], ["empty", "--dry-run"], ["a\0.yaml", "--dry-run"],
        ["D1", "--subject", "tiny", "--stream-weights", "--out", "o"],
    )),
    *(["export", *more] for more in (
        [], ["tiny"], ["tiny", "--gptq", "--gguf", "F16"], ["tiny", "--gguf", "Q9"], ["tiny", "--gguf", ""], ["tiny", "--gptq", "--merge"], ["nowhere", "--gptq"],
        ["tiny", "--gguf", "F16", "--dtype", "int8"], ["~nouser", "--gguf", "F16"], ["", "--gptq"], ["tiny", "--gptq"], ["tiny", "--gguf", "F16", "--out", "o.txt"],
    )),
    *(["sweep", "grid.yaml", *more] for more in (
        ["--size", "none"], ["--only", "D7"], ["--measure", "none"], ["--workers", "0"], ["--workers", "-1"], ["--workers", HUGE], ["--workers", "99999"],
        ["--threads", "0"], ["--threads", "99999"], ["--retries", "-1"], ["--retries", "99999"], ["--host", "999.1.1.1"], ["--host", ""], ["--host", "x" * 300],
        ["--scheduler", "nonsense"], ["--scheduler", ""], ["--scheduler", "http://a:1"], ["--device", "meta"], ["--device", "foo"], ["--dtype", "int8"],
        ["--subject", "nowhere"], ["--data", "nowhere"], ["--out", "o.txt"], ["--with", "nowhere"], ["-p", "k=1"], ["--chapter", "01"],
    )),
    *(["sweep", *more] for more in (
        [], ["nowhere.yaml"], ["binary.yaml"], ["wide.yaml"], ["deep.yaml"], ["anchor.yaml"], ["empty"], ["--chapter", "99"], ["--chapter", "01", "--subject", "tiny"],
        ["--chapter", "01", "-p", "windows=1,-1"], ["--chapter", "01", "-p", "windows=1,abc"], ["--chapter", "01", "-p", "windows="], ["--chapter", "01", "-p", "windows=[1"],
        ["--chapter", "01", "-p", "subject=nowhere,embedded"], ["--chapter", "01", "-p", "prompt="], ["--chapter", "01", "-p", "k"],
        ["--chapter", "01", "-p", "windows=" + ",".join(["1,2,3,4,5,6,7,8,9"] * 9), "-p", "items=" + ",".join(["1,2,3,4,5,6,7,8,9"] * 99)],
    )),
    *(["profile", "tiny", *more] for more in (
        [], ["--device", "nowhere"], ["--device", "nowhere.yaml"], ["--device", "binary.yaml"], ["--device", "~nouser/x.yaml"], ["--device", ""],
        ["--device", "k1", "--prompt", "0"], ["--device", "k1", "--prompt", HUGE], ["--device", "k1", "--context", "-1"], ["--device", "k1", "--dtype", "int8"],
    )),
    ["profile", "nowhere", "--device", "k1"],
    *(["measure", "tiny", *more] for more in (
        ["--type", "Q9"], ["--tokens", "0"], ["--tokens", HUGE], ["--repeats", "0"], ["--repeats", "99999"], ["--prompt", "-1"], ["--prompt", "5000"], ["--core", "-1"],
        ["--core", "99999"], ["--tokens", "x"],
    )),
    ["measure", "nowhere"],
    *(["emulate", "tiny", *more] for more in (["--type", "Q9"], ["--tokens", "0"], ["--tokens", HUGE], ["--prompt", "0"], ["--jobs", "0"], ["--jobs", "99999"])),
    ["device", "calibrate", "--out", "grid.yaml"],
    ["device", "calibrate", "--out", "o.txt"],
    ["device", "nothing"],
    *(["recipe", "check", more] for more in ("nowhere.yaml", "empty", "binary.yaml", "broken.yaml", "loop.yaml", "deep.yaml", "chain0.yaml", "tiny", "~nouser", "a\0b", "", ".")),
    ["recipe", "check"],
    ["recipe", "check", "W2:4", "--subject", "nowhere"],
    ["recipe", "check", "D99", "--subject", "tiny"],
    ["recipe", "label", "nowhere.yaml"],
    ["recipe", "label", ""],
    ["recipe", "expand", "nowhere.yaml", "--out", "o"],
    ["recipe", "expand", "wide.yaml", "--out", "o"],
    ["recipe", "expand", "grid.yaml", "--out", "o", "--size", "none"],
    ["recipe", "expand", "grid.yaml"],
    *(["records", *more] for more in (
        ["--store", "nowhere"], ["--store", "empty"], ["--store", "grid.yaml"], ["--label", "none"], ["--task", "none"], ["--metric", "none"], ["--label", ""],
        ["verify"], ["verify", "none"], ["verify", ""], ["--label", "D2", "verify", "x"], ["verify", "x", "--store", "nowhere"], ["verify", "x", "--device", "meta"],
    )),
    ["nothing"],
    ["--nothing"],
]  # fmt: skip


@pytest.mark.parametrize(
    "args", CALLS, ids=lambda args: " ".join(args)[:60].encode("ascii", "backslashreplace").decode()
)
def test_bad_calls(here, tiny_data, monkeypatch, args):
    monkeypatch.chdir(here)
    before = sorted(here.rglob("*"))
    result = run(app, [tiny_data if a == "DATA" else a for a in args])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (
        result.exit_code,
        repr(result.exception),
        result.output[-500:],
    )
    assert result.stdout == "" and "Traceback" not in result.stderr and "rror" in result.stderr
    assert max(map(len, result.stderr.splitlines())) < 3000
    assert sorted(here.rglob("*")) == before


def test_there_are_many():
    assert len(CALLS) >= 300
