"""A configuration measured and noted, and the same once more from its record: what agrees, what does not, what is
refused."""

import dataclasses
import json
import math
import shutil
from functools import cache
from pathlib import Path

import pytest

from tests.fakes import measurement
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.evaluate.perplexity import perplexities
from thesislib.evaluate.setup import Setup
from thesislib.experiment import Verdict, again, described, prepare, recipe_hash, recipe_of, tolerance
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import ComputedLinear
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store, find
from thesislib.sources import corpus

STAGES = (Depth(blocks=[0, 2]), Width(remove=1, of=8, windows=4, length=64), Rtn(bits=4, group=32))
PPL = Setup("wikitext", length=32, limit=5)
CHOICE = Setup("hellaswag", limit=4, fast=True)
TRIVIA = Setup("trivia", batch=4)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return str(save_checkpoint(tiny(layers=4), tmp_path_factory.mktemp("subject") / "tiny"))


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """Another subject of the same shape."""
    return str(save_checkpoint(tiny(layers=4, seed=1), tmp_path_factory.mktemp("other") / "tiny"))


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """As `tiny_data`, with a multiple-choice task."""
    root = tmp_path_factory.mktemp("data") / "data"
    shutil.copytree(tiny_data, root)
    rows = [
        {
            "ind": i,
            "activity_label": "Run",
            "ctx_a": f"He runs {i}.",
            "ctx_b": "he",
            "endings": ["stops.", "flies.", "is."],
            "label": "1",
        }
        for i in range(6)
    ]
    (root / "hellaswag").mkdir()
    (root / "hellaswag" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


@pytest.fixture(scope="module")
def recorded(folder, data):
    """One record, of all stages."""
    return prepare(folder, STAGES, data=data, dtype="float32").measure(PPL, data)


@cache
def direct(protocol, folder, data):
    return protocol.measure(load_subject(folder), data)


def stored(m, path):
    """The measurement as a store gives it back."""
    store = Store(path / "r.jsonl")
    return find(store.append(m), [store])


def altered(m, **provenance):
    return dataclasses.replace(m, provenance={**m.provenance, **provenance})


def other_data(data, tmp_path, file, change):
    """A copy of the data folder in which the rows of one file went through `change`."""
    root = tmp_path / "other data"
    shutil.copytree(data, root)
    path = root / f"{file}.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in change([json.loads(line) for line in path.read_text().splitlines()]))
    )
    return str(root)


# ---------------------------------------------------------------- once more


@pytest.mark.parametrize(
    ("stages", "protocol"),
    [
        ((), PPL),
        ((), CHOICE),
        ((), Setup("trivia_open", limit=1)),
        (STAGES, PPL),
        (STAGES, CHOICE),
        (STAGES, Setup("trivia", limit=1)),
    ],
    ids=lambda x: getattr(x, "on", recipe_of(x).label if isinstance(x, tuple) else ""),
)
def test_a_record_is_made_again_to_the_last_bit(folder, data, tmp_path, stages, protocol):
    m = stored(prepare(folder, stages, data=data, dtype="float32").measure(protocol, data), tmp_path)
    verdict = again(m, folder, data)
    assert verdict.agrees and verdict.same_bits and verdict.same_subject
    assert verdict.again.items == m.items and verdict.again.value == m.value
    assert (
        str(verdict) == f"{m.metric} on {m.task}: recorded {m.value:.6g}, again {m.value:.6g}: the same to the last bit"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_is_made_again(folder, data, tmp_path, dtype):
    subject = load_subject(folder, dtype)
    alone = apply_plan(subject, (0, 2, 2, 3))
    together = perplexities(
        subject, corpus.evaluation_text(data), {"a": (0, 1, 3), "b": (0, 2, 2, 3)}, length=32, limit=5
    )
    found = {
        "alone": described(PPL.measure(alone, data), subject, data, label="plan 0,2x2,3"),
        "in one pass": described(together["b"], subject, data, label="plan 0,2x2,3"),
        "bare": PPL.measure(alone, data),
        "bare, in one pass": together["b"],
    }
    for name, m in found.items():
        verdict = again(stored(m, tmp_path), folder, data)
        assert verdict.agrees and verdict.same_bits and verdict.same_subject, (name, str(verdict))
    assert (
        again(stored(found["alone"], tmp_path), folder, data).again.value
        != again(stored(together["a"], tmp_path), folder, data).again.value
    )


def test_what_a_record_says(recorded, folder, data):
    made, base = recorded.provenance["made"], load_subject(folder)
    assert (made["label"], made["stage"], made["data"], made["base"]) == (
        "D2+W1:8+R",
        "rtn",
        "folder",
        {"name": "tiny", "fingerprint": base.fingerprint},
    )
    settings = [{k: v for k, v in dataclasses.asdict(s).items() if k not in s.later} for s in STAGES]
    assert made["stages"] == json.loads(
        json.dumps([{name: values} for name, values in zip(("depth", "width", "rtn"), settings, strict=True)])
    )
    assert made["recipe"] == recipe_hash(recipe_of(STAGES)) and len(made["recipe"]) == 12
    assert made["bytes"]["nonzero_parameters"] < made["bytes"]["parameters"] < base.parameters
    assert made["reports"][0]["removed"] == [0, 2] and len(made["reports"]) == 3
    assert (
        recorded.provenance["tolerance"] == {"relative": 0.001}
        and recorded.provenance["fingerprint"] != base.fingerprint
    )
    assert data not in json.dumps(recorded.provenance) and folder not in json.dumps(recorded.provenance)
    dense = prepare(folder, (), data=data, dtype="float32").measure(PPL, data, chapter={"note": 1}).provenance
    assert (dense["made"]["label"], dense["made"]["recipe"], dense["made"]["stage"], dense["chapter"]) == (
        "dense",
        None,
        None,
        {"note": 1},
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "stages",
    [
        (Rtn(bits=4, group=32),),
        (Width(remove=2, of=4, windows=4, length=64), Rtn(bits=3, group=32), Eora(rank=4, windows=2)),
    ],
)
def test_unpacked_once_is_measured_as_unpacked_at_every_use(folder, data, stages, dtype):
    ready = prepare(folder, stages, data=data, dtype=dtype)
    assert any(isinstance(m, ComputedLinear) for m in ready.model.model.modules())
    assert (
        not any(isinstance(m, ComputedLinear) for m in ready.unpacked.model.modules())
        and ready.unpacked is ready.unpacked
    )
    assert ready.unpacked.fingerprint == ready.model.fingerprint
    for protocol in (PPL, CHOICE, TRIVIA):
        once, each = ready.measure(protocol, data), protocol.measure(ready.model, data)
        if (
            dtype == "bfloat16" and protocol is PPL
        ):  # few rows of 4-bit weights are multiplied by a kernel that rounds otherwise
            assert once.value == pytest.approx(each.value, rel=0.01)
        elif dtype == "float32":
            assert once.value == each.value and once.items == each.items
        assert once.provenance["fingerprint"] == each.provenance["fingerprint"]
    plain = prepare(folder, (), data=data, dtype=dtype)
    assert plain.unpacked is plain.model


def test_a_recipe_hash_stands_for_every_setting():
    recipes = [
        STAGES,
        STAGES[:2],
        STAGES[::-1],
        (*STAGES[:2], Rtn(bits=3, group=32)),
        (Depth(blocks=[2, 0]), *STAGES[1:]),
        (*STAGES, STAGES[2]),
    ]
    assert len({recipe_hash(recipe_of(stages)) for stages in recipes}) == len(recipes)
    assert (
        recipe_hash(recipe_of(STAGES)) == recipe_hash(recipe_of([dataclasses.replace(s) for s in STAGES]))
        and recipe_hash(recipe_of(())) is None
    )


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("then", "now", "allowed", "agrees", "said"),
    [
        (20.0, 20.0, {"relative": 0.01}, True, "recorded 20, again 20: the same to the last bit"),
        (20.0, 20.19, {"relative": 0.01}, True, "again 20.19: within the tolerance of 1.0% relative"),
        (20.0, 19.79, {"relative": 0.01}, False, "again 19.79: NOT within the tolerance of 1.0% relative"),
        (0.0, 0.019, {"absolute": 0.02}, True, "within the tolerance of 2.0% absolute"),
        (0.5, 0.521, {"absolute": 0.02}, False, "NOT within the tolerance of 2.0% absolute"),
        (20.0, math.nan, {"relative": 0.01}, False, "recorded 20, again not finite: NOT within"),
        (20.0, math.inf, {"relative": 0.01}, False, "NOT within"),
        (None, 20.0, {"relative": 0.01}, False, "recorded not finite, again 20: NOT within"),
        (None, math.inf, {"relative": 0.01}, True, "recorded not finite, again not finite: the same"),
    ],
)
def test_verdicts(then, now, allowed, agrees, said):
    a, b = (
        Measurement(task="t", metric="m", value=value, low=0.0, high=0.0, n=1, unit="u", items=[])
        for value in (then, now)
    )
    verdict = Verdict(a, b, allowed, True)
    assert verdict.agrees == agrees and verdict.same_bits == ("the same" in said) and said in str(verdict)
    assert "the weights are not the recorded ones to the last bit" in str(
        Verdict(a, b, allowed, False)
    ) and "weights" not in str(verdict)


@pytest.mark.parametrize(
    ("metric", "dtype", "stages", "expected"),
    [
        ("perplexity", "float32", [], {"relative": 0.001}),
        ("word_perplexity", "bfloat16", [{"depth": {}}], {"relative": 0.01}),
        ("perplexity", "float32", [{"depth": {}}, {"lora": {}}], {"relative": 0.03}),
        ("accuracy", "float32", [], {"absolute": 0.005}),
        ("acc_norm", "bfloat16", [], {"absolute": 0.02}),
        ("accuracy", "bfloat16", [{"lora": {}}], {"absolute": 0.04}),
        ("perplexity", "bfloat16", [{"gptq": {}}, {"eora": {}}], {"relative": 0.03}),
        ("perplexity", "bfloat16", [{"rtn": {}}], {"relative": 0.01}),
    ],
)
def test_tolerances(metric, dtype, stages, expected):
    m = measurement(metric=metric, provenance={"dtype": dtype, "made": {"stages": stages}})
    assert tolerance(m) == expected and tolerance(altered(m, tolerance={"absolute": 7})) == {"absolute": 7}


def test_a_tampered_value_does_not_agree(recorded, folder, data):
    verdict = again(dataclasses.replace(recorded, value=recorded.value * 1.0011), folder, data)
    assert (
        not verdict.agrees
        and not verdict.same_bits
        and verdict.same_subject
        and "NOT within the tolerance of 0.1% relative" in str(verdict)
    )
    assert again(dataclasses.replace(recorded, value=recorded.value * 1.0009), folder, data).agrees


def test_other_calibration_shows_in_the_weights(recorded, folder, data, tmp_path):
    changed = other_data(
        data, tmp_path, "c4/train_sample", lambda rows: [{"text": f"zeta {row['text'][::-1]}"} for row in rows]
    )
    verdict = again(recorded, folder, changed)
    assert not verdict.same_subject and "or another calibration text" in str(verdict)


# ---------------------------------------------------------------- refused


def test_another_subject_is_refused(recorded, folder, other, data):
    ours, theirs = (load_subject(spec).fingerprint[:12] for spec in (folder, other))
    with pytest.raises(
        BadInput,
        match=rf"began with tiny, fingerprint {ours}\.\.\.; '{other}' in float32 has {theirs}\.\.\.: name the record's "
        r"subject",
    ):
        again(recorded, other, data)
    with pytest.raises(BadInput, match=rf"fingerprint {ours}\.\.\.; .* in bfloat16 has (?!{ours})"):
        again(altered(recorded, dtype="bfloat16"), folder, data)
    # measured without a word on how the subject was made
    for subject in (load_subject(folder), apply_plan(load_subject(folder), (0, 2, 3))):
        m = PPL.measure(subject, data)
        assert "made" not in m.provenance and again(m, folder, data).same_bits
        with pytest.raises(
            BadInput,
            match=rf"the record is of tiny, fingerprint {subject.fingerprint[:12]}\.\.\.; '{other}' in float32 has ",
        ):
            again(m, other, data)


@pytest.mark.parametrize(
    ("protocol", "file", "change", "message"),
    [
        (
            PPL,
            "wikitext2/test",
            lambda rows: [{"text": row["text"].replace("alpha", "omega")} for row in rows],
            "has another text for WikiText-2 test .sha256 ",
        ),
        (Setup("wikitext", length=32, limit=16), "wikitext2/test", lambda rows: rows[:2], "has another text for Wiki"),
        (TRIVIA, "trivia_qa/validation_closed_book", lambda rows: rows[:3], "has another text for TriviaQA"),
        (TRIVIA, "trivia_qa/validation_closed_book", lambda rows: rows[::-1], "has another text for TriviaQA"),
        (
            TRIVIA,
            "trivia_qa/validation_closed_book",
            lambda rows: [{**row, "question": "Why?"} for row in rows],
            "has another text for TriviaQA",
        ),
        (
            CHOICE,
            "hellaswag/validation",
            lambda rows: [{**row, "label": "0"} for row in rows],
            "has another text for hellaswag",
        ),
    ],
    ids=["another text", "a shorter text", "fewer questions", "another order", "other questions", "other labels"],
)
def test_other_data_is_refused(folder, data, tmp_path, protocol, file, change, message):
    m, other = direct(protocol, folder, data), other_data(data, tmp_path, file, change)
    with pytest.raises(BadInput, match=f"{message}.*name the data that it was made with"):
        again(m, folder, other)
    # before any stage is carried out, and before the subject is looked at
    with pytest.raises(BadInput, match=message):
        again(m, str(tmp_path / "nowhere"), other)


def test_calibrated_on_one_text_and_measured_on_another(folder, data):
    """As in chapter 5: the stages take the data that are named, the measure the embedded text, known by its sha256."""
    stages = [Width(remove=2, of=4, windows=2, length=32)]
    m = prepare(folder, stages, data=data, dtype="float32").measure(PPL, "embedded")
    verdict = again(m, folder, data)
    assert verdict.same_bits and verdict.same_subject and verdict.again.task == m.task != "WikiText-2 test"


@pytest.mark.parametrize("change", [lambda rows: rows[:3], lambda rows: rows[::-1]], ids=["fewer", "another order"])
def test_other_items_are_refused_where_no_sha256_is_recorded(folder, data, tmp_path, change):
    m = altered(direct(TRIVIA, folder, data), corpus_sha256=None)
    with pytest.raises(BadInput, match=r"gives \d other items .* than the record's 4.*name the data"):
        again(m, folder, other_data(data, tmp_path, "trivia_qa/validation_closed_book", change))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"dpth": {}}], "unknown stage in the record 'dpth': did you mean 'depth'"),
        ([{"depth": {"blocks": [1], "sort": 1}}], "stage 'depth' in the record: unknown parameter of Depth 'sort'"),
        ([{"depth": {"blocks": "1"}}], "stage 'depth' in the record: parameter 'blocks' is '1'"),
        ([{"depth": {"remove": 0}}], "remove is 0: expected at least 1 block"),
        ([{"depth": {"blocks": [1, 9]}}], "stage 1: block"),
        ([{"depth": None}], "stage 'depth' in the record: the settings of Depth are 'None': expected a mapping"),
        ([{}], "is not understood"),
        (["depth"], "is not understood"),
        ([{"depth": {"remove": 1}, "width": {}}], "is not understood"),
    ],
)
def test_stages_of_another_version_are_refused(recorded, folder, data, stages, message):
    with pytest.raises(BadInput, match=message):
        again(altered(recorded, made={**recorded.provenance["made"], "stages": stages}), folder, data)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"protocol": {"on": "wikitext", "limit": 5, "length": 32, "stride": 4}}, "not one that this version knows"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"plan": [0, 99], "made": None}, "block 99 is out of range: this model has blocks 0 to 3"),
    ],
)
def test_other_words_are_refused(recorded, folder, data, provenance, message):
    with pytest.raises(BadInput, match=message):
        again(altered(recorded, **provenance), folder, data)


def test_a_record_that_does_not_say_enough(recorded, folder, data):
    bare = {"protocol": recorded.provenance["protocol"], "subject": "tiny"}
    with pytest.raises(BadInput, match="does not say its fingerprint, dtype, settings: it cannot be measured again"):
        again(dataclasses.replace(recorded, provenance=bare), folder, data)
    with pytest.raises(BadInput, match="subject 'nowhere' is not known"):
        again(recorded, "nowhere", data)
    with pytest.raises(BadInput, match="unknown data 'nowhere'"):
        again(recorded, folder, "nowhere")
    assert not Path("nowhere").exists()


def test_questions_put_in_other_words_are_refused(folder, data, tmp_path):
    m = direct(TRIVIA, folder, data)
    assert again(m, str(folder), str(data)).same_bits
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    template = changed / "chat_template.jinja"
    template.write_text("Answer in a word.\n" + template.read_text())
    with pytest.raises(BadInput, match="the questions are put in other words than the record's"):
        again(m, str(changed), str(data))
    settings = {key: value for key, value in m.provenance["settings"].items() if key != "prompts_sha256"}
    assert again(altered(m, settings=settings), str(folder), str(data)).same_bits, (
        "a record made before prompts were hashed"
    )
