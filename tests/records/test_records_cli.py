"""`thesislib records` and `records verify`: one call each, results on stdout, exit codes 0, 1 and 2."""

import csv
import hashlib
import json
import math
import os

import pytest
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.compress.depth import Depth
from thesislib.compress.width import Width
from thesislib.evaluate.setup import Setup
from thesislib.experiment import described, prepare
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.blocks import apply_plan
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store

run = CliRunner().invoke
STAGES = (Depth(blocks=[1]), Width(remove=1, of=8, metric="magnitude"))


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return str(save_checkpoint(tiny(layers=4), tmp_path_factory.mktemp("subject") / "tiny"))


@pytest.fixture(scope="module")
def measured(folder, tiny_data):
    """Four records: dense and D1+W1:8, two measures each."""
    protocols = Setup("wikitext", length=32, limit=5), Setup("trivia_open", limit=1)
    made = (prepare(folder, stages, data=tiny_data, dtype="float32") for stages in ((), STAGES))
    return [ready.measure(protocol, tiny_data) for ready in made for protocol in protocols]


@pytest.fixture
def store(measured, tmp_path):
    store = Store(tmp_path / "records" / "r.jsonl")
    for m in measured:
        store.append(m)
    return store


def rewrite(store, **changes):
    """The first row with other fields, by hand, and an id that fits them; the id."""
    first, *others = store.path.read_text("utf8").splitlines(keepends=True)
    row = json.loads(first) | changes
    content = {key: row[key] for key in row if key not in ("schema", "id", "items")}
    row["id"] = hashlib.sha256(json.dumps([content, row["items"]["sha256"]], sort_keys=True).encode()).hexdigest()[:12]
    store.path.write_text(json.dumps(row) + "\n" + "".join(others), "utf8")
    return row["id"]


# ---------------------------------------------------------------- listed


def test_listed_below_their_label_task_and_metric(store):
    for place in (store.path, store.path.parent):
        result = run(app, ["records", "--store", str(place)])
        assert result.exit_code == 0 and result.stderr == ""
        lines = result.stdout.splitlines()
        for heading, line, (name, m) in zip(lines[::2], lines[1::2], store.rows().items(), strict=True):
            assert heading == f"{m.label}  {m.task}  {m.metric}"
            assert (
                line
                == f"  {name}  {m.value:.4g} [{m.low:.4g}, {m.high:.4g}]  n = {m.n} {m.unit.split()[0]}"
                + "s" * (m.n > 1)
            )


def test_the_studys_own_are_the_default():
    result = run(app, ["records", "--metric", "acc_norm", "--label", "dense"])
    assert result.exit_code == 0 and "HellaSwag validation" in result.stdout


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ([], [0, 1, 2, 3]),
        (["--label", "D1+W1:8"], [2, 3]),
        (["--task", "wikitext"], [0, 2]),
        (["--task", "open book", "--label", "dense"], [1]),
        (["--metric", "perplexity"], [0, 2]),
    ],
)
def test_filters(store, options, rows):
    names = list(store.rows())
    result = run(app, ["records", "--store", str(store.path), "--json", *options])
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["id"] for row in found] == [names[k] for k in rows]
    for row in found:
        m = store.rows()[row["id"]]
        assert (row["value"], row["provenance"]) == (m.value, m.provenance) and "items" not in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--label", "D1+W1:9"],
            "unknown label of records 'D1+W1:9': did you mean 'D1+W1:8'? expected one of D1+W1:8, dense",
        ),
        (["--task", "TrviaQA"], "unknown task of records 'TrviaQA': did you mean 'TriviaQA'?"),
        (["--metric", "accurcy"], "unknown metric of records 'accurcy': did you mean 'accuracy'?"),
        (["--store", "NOWHERE"], "there is no file of records NOWHERE"),
        (["--store", "STORE.items.gz"], "is no file of records: expected a name that ends in .jsonl"),
        (["--csv", "FOLDER"], "FOLDER is a folder: expected a file's name"),
        (["--json", "verify", "abc"], "options of the listing before 'verify' would do nothing"),
        (["verify", "nothing", "--store", "STORE.jsonl"], "no record has the id 'nothing'"),
        (["verify", "", "--store", "STORE.jsonl"], "no record has the id ''"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(store, tmp_path, options, message):
    def placed(text):
        return (
            text.replace("STORE", str(store.path.with_suffix("")))
            .replace("FOLDER", str(tmp_path))
            .replace("NOWHERE", str(tmp_path / "gone.jsonl"))
        )

    source = [] if "--store" in options or "verify" in options else ["--store", "STORE.jsonl"]
    result = run(app, [placed(text) for text in ["records", *source, *options]])
    assert result.exit_code == 2, result.output
    assert (
        placed(message) in result.stderr
        and result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
        and result.stdout == ""
    )


def test_the_store_named_before_verify_is_not_forgotten(store):
    result = run(app, ["records", "--store", str(store.path), "verify", next(iter(store.rows()))])
    assert (
        result.exit_code == 2
        and "options of the listing before 'verify' would do nothing: expected its own behind it" in result.stderr
    )


def test_csv_has_the_rows(store, tmp_path):
    file = tmp_path / "new" / "r.csv"
    result = run(app, ["records", "--store", str(store.path), "--csv", str(file)])
    assert (result.exit_code, result.stdout) == (0, f"{file}: 4 records\n")
    with file.open(newline="", encoding="utf8") as lines:
        table = list(csv.DictReader(lines))
    names = (
        "id label recipe stage subject fingerprint task metric length limit prompt value low high n unit seed dtype "
        "device bytes_on_disk parameters "
    )
    assert (
        list(table[0]) == (names + "nonzero_parameters threads peak_memory seconds torch thesislib commit time").split()
    )
    for row, (name, m) in zip(table, store.rows().items(), strict=True):
        made, run_, words = m.provenance["made"], m.provenance, m.provenance["protocol"]
        assert [float(row[key]) for key in ("value", "low", "high")] == [m.value, m.low, m.high]  # every digit
        assert (row["id"], row["task"], row["metric"], int(row["n"]), row["unit"]) == (
            name,
            m.task,
            m.metric,
            m.n,
            m.unit,
        )
        assert (row["label"], row["recipe"], row["stage"]) == (made["label"], made["recipe"] or "", made["stage"] or "")
        assert (row["subject"], row["fingerprint"], row["dtype"]) == ("tiny", run_["fingerprint"], "float32")
        assert int(row["parameters"]) == made["bytes"]["parameters"] and int(row["seed"]) == words["seed"] == 0
        assert (
            row["limit"] == {"perplexity": "5", "accuracy": ""}[m.metric]
            and row["length"] == {"perplexity": "32", "accuracy": ""}[m.metric]
        )
        assert (row["prompt"], float(row["seconds"]), row["time"]) == (
            run_["settings"].get("prompt", ""),
            run_["seconds"],
            run_["time"],
        )
        assert (row["torch"], int(row["threads"])) == (run_["versions"]["torch"], run_["hardware"]["torch_threads"])
        assert int(row["peak_memory"]) == run_["peak_memory"] > 0


def test_what_is_not_finite_or_not_said_is_listed(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    store.append(
        Measurement(
            task='é, "a"\nb', metric="perplexity", value=math.inf, low=1.0, high=math.nan, n=1, unit="u", items=[]
        )
    )
    shown = run(app, ["records", "--store", str(store.path)])
    assert shown.exit_code == 0 and "? [1, ?]  n = 1 u\n" in shown.stdout
    assert json.loads(run(app, ["records", "--store", str(store.path), "--json"]).stdout)["value"] is None
    assert run(app, ["records", "--store", str(store.path), "--csv", str(tmp_path / "r.csv")]).exit_code == 0
    with (tmp_path / "r.csv").open(newline="", encoding="utf8") as lines:
        (row,) = csv.DictReader(lines)
    assert (row["task"], row["value"], row["low"], row["high"], row["label"], row["device"]) == (
        'é, "a"\nb',
        "",
        "1.0",
        "",
        "?",
        "",
    )


def test_damage_is_said_on_stderr_and_the_rest_is_listed(store):
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-30])
    result = run(app, ["records", "--store", str(store.path)])
    assert result.exit_code == 0 and result.stdout.count("  n = ") == 3
    assert result.stderr == f"{store.path}, line 4: left out, it was not written to its end\n"
    store.path.write_bytes(b"")
    store.items.unlink()
    assert run(app, ["records", "--store", str(store.path)]).output == ""
    result = run(app, ["records", "--store", str(store.path), "--csv", str(store.path.with_suffix(".csv"))])
    assert (
        result.exit_code == 2
        and "there are no records to write" in result.stderr
        and not store.path.with_suffix(".csv").exists()
    )


# ---------------------------------------------------------------- verified


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_verify_agrees(store, folder, tiny_data, monkeypatch, k):
    name, m = list(store.rows().items())[k]
    args = ["records", "verify", name[:7], "--store", str(store.path), "--subject", folder]
    result = run(app, [*args, "--data", tiny_data])
    assert result.exit_code == 0, result.output
    assert (
        result.stdout
        == f"{m.metric} on {m.task}: recorded {m.value:.6g}, again {m.value:.6g}: the same to the last bit\n"
    )
    if k == 0:
        monkeypatch.setenv("THESISLIB_DATA", tiny_data)
        assert run(app, args).stdout == result.stdout


def test_another_value_is_exit_code_1_and_a_changed_one_is_refused(store, folder, tiny_data):
    m = next(iter(store.rows().values()))
    args = ["records", "verify", "--store", str(store.path), "--subject", folder, "--data", tiny_data]
    result = run(app, [*args, rewrite(store, value=m.value * 1.01)])
    assert result.exit_code == 1 and "NOT within the tolerance of 0.1% relative" in result.stdout
    assert f"recorded {m.value * 1.01:.6g}, again {m.value:.6g}" in result.stdout
    other = rewrite(store, value=None)
    result = run(app, [*args, other])
    assert result.exit_code == 1 and f"recorded not finite, again {m.value:.6g}: NOT within" in result.stdout
    store.path.write_text(store.path.read_text("utf8").replace('"value": null', f'"value": {m.value}', 1), "utf8")
    result = run(app, [*args, other])
    assert (
        result.exit_code == 2
        and result.stderr.startswith(f"error: record {other} is damaged (")
        and "its id is not that of its content" in result.stderr
    )


def test_verify_refuses_in_one_line(store, folder, tiny, tiny_data, tmp_path):
    other = str(save_checkpoint(tiny(layers=4, seed=1), tmp_path / "other"))
    name, m = next(iter(store.rows().items()))
    text = tmp_path / "data" / "wikitext2" / "test.jsonl"
    text.parent.mkdir(parents=True)
    text.write_text(json.dumps({"text": "Another text. " * 100}) + "\n")

    def refused(*options, name=name):
        result = run(app, ["records", "verify", name, "--store", str(store.path), *options])
        assert result.exit_code == 2, result.output
        assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr

    said = refused("--subject", other, "--data", tiny_data)
    assert (
        all(load_subject(spec).fingerprint[:12] in said for spec in (folder, other))
        and "name the record's subject" in said
    )
    assert "has another text for WikiText-2 test" in refused("--subject", folder, "--data", str(tmp_path / "data"))
    assert "subject 'nowhere' is not known" in refused("--subject", "nowhere", "--data", tiny_data)
    for stages, message in (
        ([{"dept": {}}], "did you mean 'depth'"),
        ([{"depth": {"blok": [1]}}], "unknown parameter of Depth 'blok': did you mean 'blocks'"),
    ):
        other = rewrite(store, provenance={**m.provenance, "made": {**m.provenance["made"], "stages": stages}})
        assert message in refused("--subject", folder, "--data", tiny_data, name=other)
    os.truncate(store.items, 10)
    name, *_ = store.rows(items=False)
    assert f"the items of record {name} are damaged or gone" in refused(
        "--subject", folder, "--data", tiny_data, name=name
    )


def test_a_plan_is_verified(store, folder, tiny_data):
    subject = load_subject(folder)
    m = Setup("wikitext", length=32, limit=5).measure(apply_plan(subject, (0, 2, 2)), tiny_data)
    name = store.append(described(m, subject, tiny_data, label="plan 0,2x2"))
    assert "plan 0,2x2" in run(app, ["records", "--store", str(store.path), "--label", "plan 0,2x2"]).stdout
    result = run(app, ["records", "verify", name, "--store", str(store.path), "--subject", folder, "--data", tiny_data])
    assert result.exit_code == 0 and "the same to the last bit" in result.stdout
