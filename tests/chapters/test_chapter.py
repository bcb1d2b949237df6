"""What a chapter is: its recorded run is what was recorded, is gone on with, and a new one is found by its file's
name."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from typer.testing import CliRunner

from thesislib import runner
from thesislib.chapters import (
    ch05_runs,
    ch09_runs,
    chapter_of,
    chapters,
    parameters_of,
    reads,
    record_file,
)
from thesislib.chapters.chapter import Chapter, Part
from thesislib.chapters.pool import recorded_pool
from thesislib.chapters.record import parameters, record
from thesislib.cli import app
from thesislib.config import build
from thesislib.errors import BadInput
from thesislib.experiment import identity, identity_of, recipe_of
from thesislib.files import ROOT, cache_dir
from thesislib.formats.load import save_checkpoint
from thesislib.records.store import Store

NAMES = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
RESULTS = ROOT / "data" / "results"


def wanted(chapter, p, file=RESULTS / "none.jsonl"):
    return {key: n for part in chapter.parts(p, file) for key, n in part.rows.items()}


# ---------------------------------------------------------------- what was recorded


@pytest.mark.embedded
@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_parameters_are_those_of_the_committed_rows(name):
    """Labels and n of every row, from the parameters alone."""
    chapter = chapter_of(name)
    rows = list(Store(record_file(name)).rows(items=False).values())
    expected = wanted(chapter, build(chapter.parameters, chapter.recorded))
    found = {(chapter.key(m), m.n, m.provenance["hardware"]["accelerator"]): m for m in rows}
    assert len(found) == len(rows) and {key for key, *_ in found} <= set(expected)
    for (key, n, _), m in found.items():
        assert key[0] == m.provenance["made"]["label"]
        if expected[key] is None:  # all there are, or a sample of an earlier run
            assert (m.settings.get("limit") is None and n > 100) or m.settings["limit"] == n in (24, 32)
        else:  # size full, and chapter 8 of some tasks, ask for more items than there are
            assert n == expected[key] or (key[1] in ("full", "arc_challenge") and n < expected[key])
    absent = set(expected) - {key for key, *_ in found}
    if name == "06_evaluation":  # the chapters before have the rest of the sample; the whole text is still being run
        pool = chapter.read(record_file(name)).sample
        absent = {(label, what) for label, size, _, what in absent if size == "sample"} - set(pool)
    if (
        name == "04_lora_recovery"
    ):  # further seeds, longer trainings and the control's learning rates are still to be run
        later = {
            c for c in (key[1] for key in absent) if c.seed or c.steps or (c.learning_rate and c.pruned == "dense")
        }
        absent = {key for key in absent if key[1] not in later}
    if name == "05_quantisation":  # what stands beside its table on the test is still being run
        beside = {c.key for c in ch05_runs.on_the_test(ch05_runs.recorded_parameters())}
        absent = {key for key in absent if key[1] not in beside}
    if name == "08_relevance":  # the part to choose by, the whole text and some sets are still to be run
        absent = {
            key for key in absent if key[1] != "perplexity" and key[2] != "choose" and not key[3] and len(key) == 4
        }
    if name == "09_low_rank":  # the whole text, questions, and the rest of the comparisons are still to be run
        first = {c.key for c in [*ch09_runs.dense(), *ch09_runs.budgets(ch09_runs.recorded_parameters())]}
        absent = {key for key in absent if key[2] == "held-out perplexity" and key[1] in first}
    assert not absent


def planned_identity(m, stages, setup):
    """That of a row's plan, on the row's own subject and text."""
    run, base = m.provenance, m.made["base"]["fingerprint"]
    text = run.get("corpus_sha256") or m.settings.get("text_sha256")
    return identity(base, run["dtype"], m.made["data"], recipe_of(stages).entries(), setup, text)


@pytest.mark.parametrize("name", ["03_width_pruning", "04_lora_recovery", "05_quantisation"])
def test_the_committed_rows_are_the_planned_measurements(name):
    chapter = chapter_of(name)
    rows = list(Store(record_file(name)).rows(items=False).values())

    def planned(**others):
        p = build(chapter.parameters, {**chapter.recorded, **others})
        return {key: plan for part in chapter.parts(p, RESULTS / "none.jsonl") for key, plan in part.planned.items()}

    plans = planned()
    for m in rows:
        stages, setup, _ = plans[chapter.key(m)]
        if m.metric == "perplexity" and setup.limit is None:  # or a sample of an earlier run
            setup = dataclasses.replace(setup, limit=m.settings["limit"])
        assert identity_of(m) == planned_identity(m, stages, setup)
    if name == "04_lora_recovery":  # the key of a row does not tell how long it was trained, its identity does
        plans, trained = planned(steps=96), [m for m in rows if chapter.key(m)[1].text]
        for m in trained:
            stages, setup, _ = plans[chapter.key(m)]
            assert identity_of(m) != planned_identity(m, stages, setup)
        assert trained


def test_a_run_on_a_sample_goes_on_to_all_of_the_text(tiny_run, tmp_path):
    """The sample's rows stay, and are shown until every row of the whole text is there."""
    chapter, p = settings("03_width_pruning", tiny_run)
    record(chapter, p, tmp_path)
    store = Store(tmp_path / "03_width_pruning.jsonl")
    sample, shown = store.rows(), chapter.read(store.path)
    whole = dataclasses.replace(p, windows=None)
    first = record(chapter, whole, tmp_path, limit=1)
    assert (first.added, first.missing) == (1, len(sample) - 1) and chapter.read(store.path) == shown
    with pytest.raises(BadInput, match="that this run does not make"):
        record(chapter, p, tmp_path)  # back to the sample
    assert record(chapter, whole, tmp_path).missing == 0
    rows = store.rows()
    assert len(rows) == 2 * len(sample) and sample.items() <= rows.items()
    read = chapter.read(store.path)
    assert read.keys() == shown.keys() and all(m.settings["limit"] is None for m in read.values())
    assert record(chapter, whole, tmp_path).added == 0


@pytest.mark.parametrize("name", ["03_width_pruning", "04_lora_recovery"])
@pytest.mark.parametrize("change", [{"length": 16}, {"dtype": "bfloat16"}], ids=str)
def test_rows_measured_otherwise_are_not_added_to(name, change, tiny_run, tmp_path):
    chapter, p = settings(name, tiny_run)
    record(chapter, p, tmp_path, limit=1)
    with pytest.raises(BadInput, match=r"dense, perplexity\), that was made or measured otherwise than this run would"):
        record(chapter, dataclasses.replace(p, **change), tmp_path)


def test_a_plan_is_not_the_dense_model():
    """A grid takes no row of chapter 1 for the whole model measured on as many windows."""
    plans = [identity_of(m) for m in Store(record_file("01_franken_llama")).rows(items=False).values()]
    assert len(set(plans)) == len(plans)
    others = [m for name in NAMES[:1] + NAMES[2:] for m in Store(record_file(name)).rows(items=False).values()]
    assert not set(plans) & set(map(identity_of, others))


def test_one_measurement_under_two_names_has_one_identity():
    """Of chapter 2: several methods chose the same blocks."""
    rows = Store(record_file("02_depth_pruning")).rows(items=False).values()
    same = {}
    for m in rows:
        same.setdefault(identity_of(m), []).append(m)
    assert any(len(ms) > 1 for ms in same.values())
    assert all(len({(m.value, m.n, str(m.stages)) for m in ms}) == 1 for ms in same.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_reads_no_more_than_it_says(name, tmp_path):
    for other in reads(name):
        for file in RESULTS.glob(f"{other[:2]}_*"):
            (tmp_path / file.name).symlink_to(file)
    for file in RESULTS.glob("answers.*"):  # every notebook may read these
        (tmp_path / file.name).symlink_to(file)
    chapter = chapter_of(name)
    assert chapter.headline(chapter.read(tmp_path / f"{name}.jsonl")) == chapter.headline(
        chapter.read(record_file(name))
    )


# ---------------------------------------------------------------- a run on a tiny model

COMMON = {"dtype": "float32", "length": 64, "windows": 3, "tokens": 4, "questions": 2, "passages": 2}
TINY = {
    "00_measures": {"dtype": "float32", "lengths": [64, 128], "windows": 4, "questions": 2, "passages": 2, "items": 3},
    "01_franken_llama": {"dtype": "float32", "length": 64, "windows": 3, "items": 3, "singles": 2},
    "02_depth_pruning": COMMON | {"calibration": 2, "stability": 3, "greedy": 2, "counts": [1, 2], "seeds": 1},
    "03_width_pruning": {
        "dtype": "float32",
        "length": 32,
        "patterns": ["1:8", "2:4"],
        "windows": 3,
        "calibration": 2,
        "by_magnitude": ["2:4"],
        "ratios": [0.5],
        "weightings": [],
    },
    "04_lora_recovery": COMMON
    | {
        "pruned": ["W2:4"],
        "answering": 1,
        "steps": 2,
        "batch": 1,
        "every": 2,
        "validation": 1,
        "rank": 2,
        "seeds": 1,
        "texts": ["wikitext"],
    },
    "05_quantisation": COMMON | {"calibration": 2, "rank": 2, "bits": [4], "group": 32, "held_out": 2},
    "06_evaluation": {"dtype": "float32", "size": "precision"},
}


@pytest.fixture(scope="module")
def tiny_run(tiny, tiny_data, tmp_path_factory):
    """Folders of a subject of 2 blocks, of one of 12, and of data, with a cache of their own."""
    patch, cache = pytest.MonkeyPatch(), tmp_path_factory.mktemp("cache")
    (cache / "wheels").mkdir()
    for folder in (cache_dir() / "wheels").glob("*-*"):  # what was fetched is not fetched again
        (cache / "wheels" / folder.name).symlink_to(folder)
    patch.setenv("THESISLIB_CACHE", str(cache))
    shallow, deep = (
        save_checkpoint(
            tiny(layers=n, hidden_size=64, intermediate_size=64, num_attention_heads=8),
            tmp_path_factory.mktemp("subject") / "tiny",
        )
        for n in (2, 12)
    )
    data = tmp_path_factory.mktemp("data") / "d"
    shutil.copytree(tiny_data, data)
    (data / "hellaswag").mkdir()
    rows = [
        {
            "ind": i,
            "activity_label": "Run",
            "ctx_a": "He.",
            "ctx_b": "he",
            "endings": ["stops.", "flies.", "is.", "a"],
            "label": "0",
        }
        for i in range(4)
    ]
    (data / "hellaswag" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield str(shallow), str(deep), str(data)
    patch.undo()


def settings(name, tiny_run):
    chapter, (shallow, deep, data) = chapter_of(name), tiny_run
    subject = shallow if name in ("00_measures", "03_width_pruning", "05_quantisation") else deep
    return chapter, parameters(chapter, {"subject": subject, "data": data, **TINY[name]})


@pytest.mark.embedded
@pytest.mark.parametrize("name", list(TINY))
def test_a_recorded_run_is_carried_out_and_gone_on_with(name, tiny_run, tmp_path):
    chapter, p = settings(name, tiny_run)
    all_of_it = name not in ("05_quantisation", "06_evaluation")  # of many models
    first = record(chapter, p, tmp_path, limit=2)
    assert first.added == 2 and not first.busy
    second = record(chapter, p, tmp_path, limit=None if all_of_it else 3)
    store, expected = Store(tmp_path / f"{name}.jsonl"), wanted(chapter, p, tmp_path / f"{name}.jsonl")
    rows = list(store.rows().values())
    keys = [chapter.key(m) for m in rows]
    assert (
        len(rows) == 2 + second.added == len(set(keys))
        and set(keys) <= set(expected)
        and second.missing == len(expected) - len(rows)
    )
    there = 12 if name == "06_evaluation" else 4  # windows of 512 tokens; questions
    assert all(m.n == min(expected[key], there) for key, m in zip(keys, rows, strict=True))
    assert all(m.provenance["made"]["label"] == key[0] for key, m in zip(keys, rows, strict=True))
    if all_of_it:
        assert not second.missing
        before = store.path.read_bytes()
        assert record(chapter, p, tmp_path).added == 0 and store.path.read_bytes() == before
        chapter.read(store.path)
    for part in chapter.parts(p, store.path):
        if part.file:
            part.file.unlink(missing_ok=True)
            part.make([], pytest.fail)
            assert part.file.exists()


def test_rows_of_another_subject_other_data_or_other_parameters_are_not_added_to(tiny, tiny_run, tmp_path):
    chapter, p = settings("03_width_pruning", tiny_run)
    record(chapter, p, tmp_path, limit=1)
    other = save_checkpoint(tiny(layers=2, seed=5), tmp_path / "other")
    with pytest.raises(
        BadInput, match=r"holds rows of tiny, fingerprint .* this subject is other, .*expected another --out"
    ):
        record(chapter, dataclasses.replace(p, subject=str(other)), tmp_path)
    with pytest.raises(BadInput, match=r"made with data of kind folder, this is embedded: expected --data"):
        record(chapter, dataclasses.replace(p, data="embedded"), tmp_path)
    assert record(chapter, dataclasses.replace(p, subject=str(other)), tmp_path / "elsewhere", limit=1).added == 1
    with pytest.raises(
        BadInput,
        match=r"has a row, .* \(dense, perplexity, n = 3\), that this run does not make: expected the chapter and the "
        r"parameters",
    ):
        record(chapter, dataclasses.replace(p, windows=2), tmp_path)
    for suffix in ("jsonl", "items.gz"):
        shutil.copy(tmp_path / f"03_width_pruning.{suffix}", tmp_path / f"05_quantisation.{suffix}")
    with pytest.raises(BadInput, match="that this run does not make"):
        record(*settings("05_quantisation", tiny_run), tmp_path)


def test_of_two_processes_each_takes_what_the_other_is_not_at(tiny_run, tmp_path):
    """The second begins while the first is in its first part."""
    chapter, p = settings("03_width_pruning", tiny_run)
    inner = []

    def parts(p, file):
        first, *rest = chapter.parts(p, file)

        def make(missing, keep):
            inner.append(record(chapter, p, tmp_path))
            first.make(missing, keep)

        return [dataclasses.replace(first, make=make), *rest]

    outer = record(dataclasses.replace(chapter, parts=parts), p, tmp_path)
    assert len(inner) == 1 and len(inner[0].busy) == 1 and inner[0].missing == 1
    assert outer.added == 1 and outer.missing == 0 and not outer.busy
    assert len(Store(tmp_path / "03_width_pruning.jsonl").rows()) == len(wanted(chapter, p))


def test_a_killed_run_goes_on(tiny_run, tmp_path):
    chapter, p = settings("03_width_pruning", tiny_run)
    given = {"subject": p.subject, **TINY["03_width_pruning"]}
    command = [sys.executable, "-m", "thesislib.cli", "record", "3", "--data", p.data, "--out", str(tmp_path)]
    command += [
        word
        for key, value in given.items()
        for word in ("-p", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    run = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    store, until = Store(tmp_path / "03_width_pruning.jsonl"), time.monotonic() + 120
    while not store.path.exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    assert store.path.exists(), run.communicate()[1]
    run.communicate()
    done = record(chapter, p, tmp_path)
    assert done.missing == 0 and not done.busy and len(store.rows()) == len(wanted(chapter, p))


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["03", "-p", "windows=2"], "expected --out FOLDER with -p"),
        (["3_width"], "unknown chapter '3_width': did you mean '03_width_pruning'"),
        (["03", "--out", "OUT", "-p", "windos=2"], "did you mean 'windows'"),
        (["03", "--out", "OUT", "-p", "windows=0"], "'windows' is 0"),
        (["03", "--out", "OUT", "-p", "windows"], "expected key=value"),
        (["03", "--limit", "0"], "'limit' is 0"),
        (["03", "--data", "nowhere", "--out", "OUT"], "unknown data 'nowhere'"),
        (["03", "--data", "embedded", "-p", "data=embedded", "--out", "OUT"], "expected no --data"),
        (["07", "--data", "embedded", "--out", "OUT"], "reads no data: expected no --data"),
        (["03", "-p", "subject=nowhere", "--out", "OUT"], "subject 'nowhere' is not known"),
        (["03", "--out", "FILE"], "cannot be a folder"),
    ],
)
def test_bad_calls_are_one_line(args, message, tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(
        app, ["record", *({"OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}.get(a, a) for a in args)]
    )
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- a new chapter

MODULE = '''
from dataclasses import dataclass
from thesislib.chapters.chapter import Chapter, Part
from thesislib.records.measurement import Measurement

@dataclass(frozen=True)
class Counting:
    """n: how far is counted."""
    n: int = 2

def parts(p, file):
    def make(missing, keep):
        for (label,) in missing:
            keep(Measurement(task="counting", metric="count", value=float(p.n), low=0.0, high=9.0, n=1, unit="item",
                             items=[{"id": 0}], provenance={"made": {"label": label}, "dtype": "float32"}))
    return [Part(label, {(label,): 1}, make) for label in ("one", "two")]

def headline(rows):
    return f"{len(rows)} were counted."

def read(path):
    from thesislib.records.store import Store
    return list(Store(path).rows().values())

CHAPTER = Chapter("42_counting", "counting", Counting, parts, lambda m: (m.provenance["made"]["label"],), read,
                  headline, {"n": 5},
                  claims=lambda rows: (("counted " + m.provenance["made"]["label"], "count", m) for m in rows))
'''


@pytest.fixture
def new_chapter(tmp_path, monkeypatch):
    """A notebook, its line in _toc.yml, and a module, in places of their own; nothing else."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_toc.yml").write_text("root: x")
    (tmp_path / "modules").mkdir()
    (tmp_path / "_toc.yml").write_text("chapters:\n- file: notebooks/42_counting\n")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n = 2", metadata={"tags": ["parameters"]})])
    nbformat.write(nb, tmp_path / "notebooks" / "42_counting.ipynb")
    (tmp_path / "modules" / "ch42_counting.py").write_text(MODULE)
    import thesislib.chapters

    monkeypatch.setattr(thesislib.chapters, "__path__", [*thesislib.chapters.__path__, str(tmp_path / "modules")])
    monkeypatch.setattr(runner, "chapters", lambda root=tmp_path, find=runner.chapters: find(root))
    yield tmp_path
    sys.modules.pop("thesislib.chapters.ch42_counting", None)


def test_a_new_chapter_is_a_notebook_and_a_module(new_chapter):
    found = chapters()
    assert list(found) == [*NAMES, "42_counting"] and found["42_counting"].title == "counting"
    assert parameters_of("42_counting").__name__ == "Counting" and list(reads("42_counting")) == ["42_counting"]
    assert list(runner.chapters()) == ["42_counting"]  # what the book executes
    result = CliRunner().invoke(app, ["record", "42", "--out", str(new_chapter / "record"), "--limit", "1"])
    assert result.exit_code == 0 and "42_counting.jsonl: 1 rows added, 1 missing" in result.stdout, result.output
    assert (
        "1 rows added, 0 missing"
        in CliRunner().invoke(app, ["record", "42", "--out", str(new_chapter / "record")]).stdout
    )
    pool = recorded_pool(new_chapter / "record")
    assert set(pool) == {("counted one", "count"), ("counted two", "count")}
    assert {m.value for samples in pool.values() for (m,) in samples.values()} == {5.0}


def test_a_number_has_one_chapter(new_chapter):
    (new_chapter / "modules" / "ch42_again.py").write_text(MODULE)
    with pytest.raises(BadInput, match=r"ch42_again, thesislib.chapters.ch42_counting 2 have a CHAPTER: expected one"):
        chapters()
    sys.modules.pop("thesislib.chapters.ch42_again")
    (new_chapter / "modules" / "ch42_again.py").write_text("# what the other imports, as chapters 4 and 5 have it")
    assert "42_counting" in chapters()
    sys.modules.pop("thesislib.chapters.ch42_again")
    with pytest.raises(BadInput, match="notebook 43_none has no chapter"):
        chapter_of("43_none")


def test_a_chapter_says_nothing_that_it_was_not_told():
    bare = Chapter(
        "99_bare",
        "bare",
        int,
        lambda p, file: [Part("a", {}, lambda missing, keep: None)],
        lambda m: (),
        lambda path: path,
        str,
    )
    assert not list(bare.claims([])) and not bare.reads and not bare.recorded
