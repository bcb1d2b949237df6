"""Recipes carried out: shared work, dead processes, two at once, full disks, damaged checkpoints."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import thesislib
from tests.fakes import processes
from thesislib.cli import app
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.lora.stage import Lora
from thesislib.compress.stage import STAGES, Stage
from thesislib.compress.streamline import Streamline
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.files import cache_dir
from thesislib.formats import artifact, artifact_json
from thesislib.formats.artifact import load_artifact
from thesislib.formats.artifact_json import RECORD, read_artifact
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import Job, compress, sources_of

run = CliRunner().invoke
RAN: list[str] = []  # the toy stages that were computed, in order


@dataclass(frozen=True)
class Toy(Stage):
    """Multiplies a projection in a few slow steps, of which it keeps the finished ones in its scratch folder."""

    factor: float = 2.0
    seconds: float = 0.0
    die: str = ""  # a moment at which to be killed, once

    word, family, pattern = "toy", "trained", r"X[\d.]+"

    @property
    def label(self):
        return f"X{self.factor:g}"

    def apply(self, subject, *, data, work):
        RAN.append(self.label)
        made = subject.copy()
        weight = made.linears(0)["q_proj"].weight.data
        for step in range(4):
            file = work / f"{step}.json"
            if not file.exists():
                time.sleep(self.seconds / 4)
                file.with_suffix(".part").write_text(json.dumps(self.factor ** (1 / 4)))
                os.replace(file.with_suffix(".part"), file)
            weight *= json.loads(file.read_text())
        (work / "log").open("a").write("applied\n")
        return made, {"factor": self.factor, "runs": len((work / "log").read_text().split())}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("THESISLIB_DATA", raising=False)
    monkeypatch.setitem(STAGES, "toy", Toy)
    RAN.clear()
    return tmp_path


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_checkpoint(tiny(layers=8), tmp_path_factory.mktemp("subject") / "tiny")


def of(*stages, data=None):
    return Recipe(stages, tuple(f"recipe.yaml:{n}" for n in range(1, len(stages) + 1)), data)


D2, W18 = Depth(blocks=[1, 4]), Width(remove=1, of=8, metric="magnitude")  # neither needs a text


# ---------------------------------------------------------------- results


def test_the_artifact_is_what_the_stages_make_one_after_the_other(folder, place):
    out = compress(folder, of(D2, W18), place / "out")
    expected, _ = D2.apply(load_subject(folder))
    expected, _ = W18.apply(expected)
    record = read_artifact(out)
    assert load_artifact(out).fingerprint == expected.fingerprint == record["fingerprint"]
    assert record["label"] == "D2+W1:8" and record["name"] == "tiny"
    assert [list(stage) for stage in record["stages"]] == [["depth"], ["width"]] and record["stages"][1]["width"][
        "of"
    ] == 8
    assert record["reports"][0]["removed"] == [1, 4] and record["reports"][1]["removed_weights"] > 0
    assert record["base"] == {"name": "tiny", "fingerprint": load_subject(folder).fingerprint}


def test_the_given_data_goes_before_the_recipes_own(folder, place):
    (place / "texts").mkdir()
    assert Job.prepare(folder, of(D2, data="hub"), data=str(place / "texts")).data == str(place / "texts")
    assert Job.prepare(folder, of(D2, data="hub")).data == "hub"
    assert Job.prepare(folder, of(D2)).data == "embedded"
    with pytest.raises(BadInput, match="unknown data 'nowhere'"):
        Job.prepare(folder, of(D2), data="nowhere")


def test_a_shared_beginning_is_computed_once(folder, place):
    first = compress(folder, of(Toy(2), Toy(3), Toy(5)), place / "first")
    second = compress(folder, of(Toy(2), Toy(3), Toy(7)), place / "second")
    assert RAN == ["X2", "X3", "X5", "X7"]
    compress(folder, of(Toy(2)), place / "third")
    compress(folder, of(Toy(3), Toy(2)), place / "fourth")  # another order is another beginning
    assert RAN == ["X2", "X3", "X5", "X7", "X3", "X2"]
    scale = [
        load_artifact(f).linears(0)["q_proj"].weight / load_subject(folder).linears(0)["q_proj"].weight
        for f in (first, second)
    ]
    assert torch.allclose(scale[0], torch.tensor(30.0)) and torch.allclose(scale[1], torch.tensor(42.0))
    assert [report["factor"] for report in read_artifact(second)["reports"]] == [2, 3, 7]


def test_what_the_cache_holds_needs_no_weight(folder, place, monkeypatch, capsys):
    recipe = of(D2, W18)
    first = compress(folder, recipe, place / "first")
    monkeypatch.setattr("thesislib.pipeline.run.load_subject", lambda *_, **__: pytest.fail("loaded for nothing"))
    capsys.readouterr()
    second = compress(folder, recipe, place / "second")
    assert capsys.readouterr().err == "stage 2 of 2, D2+W1:8: out of the cache\n"
    assert (first / RECORD).read_text() == (second / RECORD).read_text()
    plain = compress(folder, recipe, place / "plain", packed=False)
    assert load_subject(plain).fingerprint == read_artifact(first)["fingerprint"]


def test_a_key_depends_on_all_that_a_result_depends_on_and_on_nothing_else(folder, place, monkeypatch):
    texts = place / "texts" / "wikipedia"
    texts.mkdir(parents=True)
    (texts / "train_sample.jsonl").write_text('{"text": "a"}\n')

    def key(recipe=None, subject=folder, data=str(place / "texts"), dtype="float32", n=1):
        return Job.prepare(subject, recipe or of(Toy(2)), data, dtype).keys[n - 1]

    same = key()
    assert same == key() == key(of(Toy(2), Toy(3))) and len(same) == 64
    moved = Path(shutil.copytree(folder, place / "moved"))
    assert same == key(subject=moved)
    stages = [of(Toy(3)), of(Width(ratio=0.5)), of(Width(ratio=0.5, seed=1))]
    keys = {same, key(of(Toy(2), Toy(2)), n=2), key(dtype="bfloat16"), key(data="embedded"), *map(key, stages)}
    assert len(keys) == 7
    (texts / "train_sample.jsonl").write_text('{"text": "b, and longer"}\n')
    keys.add(key())
    monkeypatch.setattr("thesislib.__version__", "999")
    keys.add(key())
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(
        json.dumps(config | {"rms_norm_eps": 0.5})
    )  # runs otherwise, with the same weights
    keys.add(key(subject=moved))
    other = load_subject(folder)
    other.linears(0)["q_proj"].weight.data[0, 0] += 1
    keys.add(key(subject=save_checkpoint(other, place / "other")))
    assert len(keys) == 11


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (Lora, ("compress/lora/train.py", "compress/training.py", "compress/lora/sequences.py", "model/layers.py")),
        (Streamline, ("compress/training.py", "compress/depth.py", "sources/corpus.py")),
        (
            Gptq,
            (
                "compress/calibration.py",
                "compress/layerwise.py",
                "compress/selection.py",
                "model/grid.py",
                "model/quantised.py",
            ),
        ),
        (Rtn, ("model/grid.py", "model/bits.py")),
        (Width, ("compress/calibration.py", "model/forward.py", "sources/corpus.py", "pipeline/run.py")),
        (Eora, ("compress/eora.py", "compress/calibration.py", "formats/artifact.py", "files.py")),
        (Depth, ("model/blocks.py", "model/tokenizers.py", "formats/load.py", "formats/gguf_reader.py")),
    ],
)
def test_a_key_depends_on_every_source_that_a_result_depends_on(kind, changed, tmp_path):
    package = tmp_path / "thesislib"
    shutil.copytree(Path(thesislib.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    digests = {sources_of(kind, package)}
    assert digests == {sources_of(kind)}
    for name in changed:
        with (package / name).open("a", encoding="utf8") as file:
            file.write("# edited\n")
        digests.add(sources_of(kind, package))
    assert len(digests) == 1 + len(changed)
    for name in (
        "chapters/ch02_depth.py",
        "book.py",
        "cli.py",
        "evaluate/perplexity.py",
        "sweep/run.py",
        "device/cost.py",
    ):
        with (package / name).open("a", encoding="utf8") as file:
            file.write("# edited\n")
    assert sources_of(kind, package) in digests


def test_a_stage_of_ones_own_is_in_its_key_too():
    assert sources_of(Toy) != sources_of(Width) and len(sources_of(Toy)) == 128


def test_weights_changed_in_place_are_noticed(folder, place):
    mine = Path(shutil.copytree(folder, place / "mine"))
    before = Job.prepare(mine, of(Toy(2))).base["fingerprint"]
    subject = load_subject(mine)
    subject.linears(0)["q_proj"].weight.data *= 2
    save_checkpoint(subject, mine)
    assert before != Job.prepare(mine, of(Toy(2))).base["fingerprint"] == load_subject(mine).fingerprint


def test_every_setting_that_a_result_copies_is_in_its_key(folder, place):
    """Two checkpoints that differ in one of these only do not share a result."""
    mine = Path(shutil.copytree(folder, place / "mine"))

    def key():
        return Job.prepare(mine, of(Toy(2))).keys[0]

    keys, changed = {key()}, 1
    for name, content in {
        "generation_config.json": '{"eos_token_id": [2, 7]}',
        "special_tokens_map.json": "{}",
        "chat_template.json": "{}",
        "chat_template.jinja": "{{ 1 }}",
        "additional_chat_templates/tool_use.jinja": "{{ 1 }}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "tokenizer.model": "x",
        "added_tokens.json": "{}",
        "preprocessor_config.json": "{}",
    }.items():
        for more in ("", " "):
            (mine / name).parent.mkdir(exist_ok=True)
            (mine / name).write_text(content + more)
            keys.add(key())
            changed += 1
    assert len(keys) == changed
    same = key()
    for name in ("README.md", "LICENSE.txt", "model.safetensors.index.json", "plot.png"):
        (mine / name).write_text("{}")
    assert key() == same


def test_the_generation_settings_and_templates_of_now_are_in_the_artifact(folder, place):
    mine = Path(shutil.copytree(folder, place / "mine"))
    compress(mine, of(D2), place / "before")
    settings = json.loads((mine / "generation_config.json").read_text())
    (mine / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, 7]}))
    compress(mine, of(D2), place / "after")
    assert (
        load_artifact(place / "after").model.generation_config.eos_token_id
        == [0, 7]
        != load_artifact(place / "before").model.generation_config.eos_token_id
    )


@pytest.mark.parametrize("damage", ["a digit", "another's", "cut", "a list"])
def test_a_damaged_fingerprint_is_not_believed(folder, place, damage):
    right = Job.prepare(folder, of(Toy(2))).base["fingerprint"]
    (memory,) = (cache_dir() / "fingerprints").iterdir()
    plain = json.loads(memory.read_text())
    if damage == "a digit":
        memory.write_text(json.dumps(plain | {"fingerprint": ("1" if right[0] == "0" else "0") + right[1:]}))
    elif damage == "another's":
        Job.prepare(folder, of(Toy(2)), dtype="bfloat16").base  # noqa: B018
        (other,) = set((cache_dir() / "fingerprints").iterdir()) - {memory}
        shutil.copy(other, memory)
    else:
        memory.write_text("[1]" if damage == "a list" else memory.read_text()[:9])
    assert Job.prepare(folder, of(Toy(2))).base["fingerprint"] == right == load_subject(folder).fingerprint


def test_weights_that_are_others_than_remembered_are_refused_once(folder, place):
    """A byte that changed on the disk itself leaves size and all times as they were."""
    mine = Path(shutil.copytree(folder, place / "mine"))
    job = Job.prepare(mine, of(Toy(2)))
    before = job.base["fingerprint"]
    shutil.rmtree(cache_dir() / "fingerprints")
    subject = load_subject(mine)
    subject.linears(0)["q_proj"].weight.data *= 2
    save_checkpoint(subject, mine)
    Job.prepare(mine, of(Toy(2))).base  # noqa: B018
    (memory,) = (cache_dir() / "fingerprints").iterdir()
    vouched = hashlib.sha256(json.dumps([memory.stem, before]).encode()).hexdigest()
    memory.write_text(json.dumps({"fingerprint": before, "sha256": vouched}))
    with pytest.raises(BadInput, match="the weights in .*mine are others than before, .*run again"):
        compress(mine, of(Toy(2)), place / "out")
    made = read_artifact(compress(mine, of(Toy(2)), place / "out"))
    assert made["base"]["fingerprint"] == load_subject(mine).fingerprint != before


@pytest.mark.parametrize("name", ["to_empty", "to_nowhere", "to_artifact"])
def test_an_artifact_is_written_where_a_link_points_to(folder, place, name):
    (place / "elsewhere").mkdir()
    if name == "to_artifact":
        compress(folder, of(W18), place / "elsewhere")
    (place / name).symlink_to("new" if name == "to_nowhere" else "elsewhere")
    compress(folder, of(D2), place / name)
    assert (place / name).is_symlink() and read_artifact(place / ("new" if name == "to_nowhere" else "elsewhere"))[
        "label"
    ] == "D2"


def test_a_cache_that_vanishes_or_is_read_only_in_mid_run_is_one_line(folder, place, monkeypatch):
    def vanishes(self, subject, *, data, work):
        shutil.rmtree(cache_dir())
        (work / "state").write_text("x")

    monkeypatch.setattr(Toy, "apply", vanishes)
    with pytest.raises(BadInput, match=r"is not there \(any more\)") as raised:
        compress(folder, of(Toy(2)), place / "out")
    assert "\n" not in str(raised.value)


def test_an_artifact_can_be_compressed_further(folder, place):
    first = compress(folder, of(D2), place / "first")
    second = compress(first, of(W18), place / "second")
    both = compress(folder, of(D2, W18), place / "both")
    assert read_artifact(second)["fingerprint"] == read_artifact(both)["fingerprint"]
    assert read_artifact(second)["base"]["label"] == "D2"


# ---------------------------------------------------------------- before anything loads


def test_what_does_not_fit_the_subject_loads_no_weight(folder, place, monkeypatch):
    monkeypatch.setattr("thesislib.pipeline.run.load_subject", lambda *_, **__: pytest.fail("loaded for nothing"))
    for recipe, message in [
        (of(Width(remove=1, of=7)), "recipe.yaml:1: pattern 1:7 does not fit q_proj: its rows have 32 inputs"),
        (of(D2, Depth(remove=2)), "recipe.yaml:2: cannot remove 2 of 6 blocks"),
        (of(Depth(blocks=[8])), "recipe.yaml:1: block 8 is out of range"),
        ("D2+X", "part 'X' is not understood"),
    ]:
        with pytest.raises(BadInput) as error:
            compress(folder, recipe, place / "out")
        assert str(error.value).startswith(message) or message in str(error.value)
    with pytest.raises(BadInput, match="unknown dtype 'int8'"):
        compress(folder, of(D2), place / "out", dtype="int8")
    assert not (place / "out").exists()


def test_where_no_artifact_may_go_is_said_first(folder, place, monkeypatch):
    monkeypatch.setattr("thesislib.pipeline.run.load_subject", lambda *_, **__: pytest.fail("loaded for nothing"))
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").write_text("years of work")
    mine = Path(shutil.copytree(folder, place / "mine"))
    for out, message in [
        (place / "full", "full holds something that is no artifact: expected a new folder"),
        (place / "full" / "thesis.tex", "cannot be a folder: a file stands there"),
        (place / "full" / "thesis.tex" / "out", "cannot be a folder or a file: a file stands above it"),
        (mine, "mine holds the subject itself"),
    ]:
        with pytest.raises(BadInput) as error:
            compress(mine, of(D2), out)
        assert message in str(error.value)
    assert (place / "full" / "thesis.tex").read_text() == "years of work"


# ---------------------------------------------------------------- what can go wrong on the way


def test_a_stage_that_fails_keeps_those_before_it_and_its_scratch(folder, place, monkeypatch):
    def refuse(self, subject, *, data, work):
        (work / "half.json").write_text("half")
        raise BadInput("the text is too short")

    recipe = of(Toy(2), Toy(3))
    with monkeypatch.context() as patch:
        patch.setattr(Width, "apply", refuse)
        with pytest.raises(BadInput, match=r"recipe.yaml:2: the text is too short"):
            compress(folder, of(Toy(2), W18), place / "out")
    assert not (place / "out").exists()
    assert [file.read_text() for file in cache_dir().glob("stages/*.work/half.json")] == ["half"]
    compress(folder, of(Toy(2), W18), place / "out")
    assert RAN == ["X2"] and not list(cache_dir().glob("stages/*.work"))
    compress(folder, recipe, place / "other")
    assert RAN == ["X2", "X3"]


def damage_byte(checkpoint):
    (file,) = (f for f in checkpoint.iterdir() if f.suffix == ".safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_record(checkpoint):
    (checkpoint / RECORD).write_text("{")


def damage_torn(checkpoint):
    for file in checkpoint.iterdir():
        file.unlink()
    (checkpoint / "config.json").write_text("{}")


def damage_file(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.write_text("a file where a folder should be")


@pytest.mark.parametrize("damage", [damage_byte, damage_record, damage_torn, damage_file])
def test_a_damaged_checkpoint_is_computed_again_and_said(folder, place, capsys, damage):
    recipe = of(Toy(2), Toy(3))
    expected = read_artifact(compress(folder, recipe, place / "out"))["fingerprint"]
    damage(Job.prepare(folder, recipe).folder(2))
    assert read_artifact(compress(folder, recipe, place / "again"))["fingerprint"] == expected
    assert RAN == ["X2", "X3", "X3"]
    assert "stage 2 of 2, X2+X3: the checkpoint cannot be used and is computed again (" in capsys.readouterr().err
    compress(folder, recipe, place / "third")
    assert RAN == ["X2", "X3", "X3"]


def test_a_checkpoint_of_the_same_weights_under_another_name(folder, place):
    compress(folder, of(D2), place / "first")
    other = Path(shutil.copytree(folder, place / "other"))
    record = read_artifact(compress(other, of(D2), place / "second"))
    assert record["name"] == record["base"]["name"] == "other"


def test_what_a_stage_is_given(folder, place, monkeypatch):
    """Sparse weights unpacked, and for one that compensates, the subject before what it makes up for."""
    given = {}

    def compensate(self, subject, *, data, work, original):
        given.update(subject=subject, original=original, data=data)
        return subject.copy(), {}

    monkeypatch.setattr(Toy, "apply", compensate)
    monkeypatch.setattr(Toy, "needs_original", True, raising=False)
    compress(folder, of(D2, W18, Toy(2)), place / "out", data="hub")
    expected, _ = D2.apply(load_subject(folder))
    assert given["original"].fingerprint == expected.fingerprint
    assert given["subject"].fingerprint == W18.apply(expected)[0].fingerprint
    assert all(type(m) is torch.nn.Linear for i in range(6) for m in given["subject"].linears(i).values())
    assert given["subject"].name == "tiny" and given["data"] == "hub"


def test_a_device_that_cannot_be_used_costs_no_checkpoint(folder, place):
    recipe = of(Toy(2))
    compress(folder, recipe, place / "out")
    with pytest.raises(BadInput, match="device 'nonsense' cannot be used"):
        compress(folder, recipe, place / "other", device="nonsense", packed=False)
    compress(folder, recipe, place / "third")
    assert RAN == ["X2"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_while_a_checkpoint_is_written(folder, place, monkeypatch, error):
    def full(tensors, path):
        path.write_bytes(b"half a file")
        raise error

    recipe = of(Toy(2), W18)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_tensors", full)
        with pytest.raises(
            BadInput,
            match="the disk is full at .*: free some space there or write elsewhere \\(the cache's place is "
            "THESISLIB_CACHE",
        ) as caught:
            compress(folder, recipe, place / "out")
    assert "\n" not in str(caught.value)
    stages, job = cache_dir() / "stages", Job.prepare(folder, recipe)
    assert sorted(p.name for p in stages.iterdir() if p.suffix != ".lock") == sorted(
        [job.keys[0], f"{job.keys[1]}.work"]
    )
    compress(folder, recipe, place / "out")
    assert RAN == ["X2"]


def test_a_disk_that_fills_while_a_stage_works(folder, place, monkeypatch):
    def full(self, subject, *, data, work):
        raise OSError(errno.ENOSPC, "No space left on device", str(work / "state"))

    monkeypatch.setattr(Toy, "apply", full)
    with pytest.raises(BadInput, match=r"the disk is full at .*work/state: free some space"):
        compress(folder, of(Toy(2)), place / "out")


# ---------------------------------------------------------------- killed, and two at once


def child(cache, folder, recipe, out, die=None):
    """A process of its own: carry out a recipe; with `die`, be killed at that moment."""
    os.environ["THESISLIB_CACHE"] = str(cache)
    torch.set_num_threads(1)
    STAGES["toy"] = Toy

    def killed(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if die == "while a stage works":
        Toy.apply = killed
    elif die == "while a checkpoint is written":
        artifact_json.checksum = killed
    elif die == "before a checkpoint has its name":
        os.replace, replaced = lambda a, b: killed() if len(Path(b).name) == 64 else replaced(a, b), os.replace
    elif die == "before the scratch is removed":
        shutil.rmtree, removed = (
            lambda path, **how: killed() if str(path).endswith(".work") else removed(path, **how),
            shutil.rmtree,
        )
    elif die == "while the artifact is written":
        shutil.copytree = killed
    compress(folder, recipe, out)


@pytest.fixture(scope="module")
def start():
    """Starts `child` in a process of its own."""
    context = processes()

    def start(*args):
        process = context.Process(target=child, args=args)
        process.start()
        return process

    return start


def ended(process):
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def leftovers(cache):
    """What should not be there when all is done."""
    stages = cache / "stages"
    return [
        p.name for p in stages.iterdir() if p.suffix != ".lock" and not (len(p.name) == 64 and (p / RECORD).is_file())
    ]


MOMENTS = (
    "while a stage works",
    "while a checkpoint is written",
    "before a checkpoint has its name",
    "before the scratch is removed",
    "while the artifact is written",
)


@pytest.mark.processes
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moments(folder, place, start, moment):
    recipe, out = of(Toy(2), D2, W18), place / "out"
    expected = read_artifact(compress(folder, recipe, place / "uninterrupted"))
    assert ended(start(place / "other", folder, recipe, out, moment)) == -signal.SIGKILL
    assert not (out / RECORD).exists()
    for checkpoint in (place / "other" / "stages").glob("?" * 64):
        read_artifact(checkpoint)  # whole
    assert ended(start(place / "other", folder, recipe, out)) == 0
    found = read_artifact(out)
    # what it had in its scratch folder was there for the second try
    assert found["reports"][0].pop("runs") == (2 if "checkpoint" in moment else expected["reports"][0]["runs"])
    del expected["reports"][0]["runs"]
    assert found == expected
    assert leftovers(place / "other") == []


@pytest.mark.processes
def test_killed_at_random_moments(folder, place, start):
    recipe, out, other = of(Toy(2, seconds=0.2), D2, Toy(3, seconds=0.2), W18), place / "out", place / "other"
    expected = read_artifact(compress(folder, recipe, place / "uninterrupted"))["fingerprint"]
    began = time.perf_counter()
    assert ended(start(place / "timing", folder, recipe, out)) == 0
    whole_s = time.perf_counter() - began
    rng, kills = random.Random(0), 0
    shutil.rmtree(out)
    while kills < 5:
        process = start(other, folder, recipe, out)
        process.join(rng.uniform(0.1, 0.6) * whole_s)
        process.kill()
        if ended(process) == 0:  # done before its end came: from the beginning
            assert read_artifact(out)["fingerprint"] == expected
            shutil.rmtree(out)
            shutil.rmtree(other)
        else:
            kills += 1
            assert not out.exists() or read_artifact(out)["fingerprint"] == expected
    assert ended(start(other, folder, recipe, out)) == 0
    assert read_artifact(out)["fingerprint"] == expected
    assert leftovers(other) == []


@pytest.mark.processes
def test_two_at_once_share_the_work_and_the_folder(folder, place, start):
    recipe, other = of(Toy(2, seconds=0.5), W18), place / "other"
    processes = [start(other, folder, recipe, place / "out") for _ in range(2)]
    processes.append(
        start(other, folder, of(Toy(2, seconds=0.5), Toy(3)), place / "beside")
    )  # shares only the beginning
    assert [ended(process) for process in processes] == [0, 0, 0]
    expected = read_artifact(compress(folder, recipe, place / "alone"))
    assert read_artifact(place / "out") == expected
    assert expected["reports"][0]["runs"] == read_artifact(place / "beside")["reports"][0]["runs"] == 1
    assert leftovers(other) == []


# ---------------------------------------------------------------- what is refused before anything is computed


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            (D2, Width(remove=1, of=8, linears="blocks.6.*")),
            r"no projection fits 'blocks\.6\.\*': the model has .* in blocks 0 to 5",
        ),
        ((W18, Rtn(bits=4, group=16, grid="minimum")), "grid 'minimum' has no exact zero"),
        ((D2, Lora(rank=999)), "rank 999 is larger than q_proj"),
    ],
    ids=["no such block", "no zero", "rank"],
)
def test_what_does_not_fit_the_subject_fails_before_the_first_stage(folder, place, capfd, recipe, message):
    with pytest.raises(BadInput, match=message):
        compress(folder, of(*recipe), place / "out")
    assert "computing" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "loop/out"])
def test_what_is_no_path_is_said_so(folder, place, name):
    (place / "loop").symlink_to(place / "loop")
    with pytest.raises(BadInput, match="cannot be a folder"):
        compress(folder, of(W18), place / name)


# ---------------------------------------------------------------- the command line


def test_on_the_command_line(folder, place):
    file = place / "recipe.yaml"
    file.write_text(
        "label: D2+W1:8\nstages:\n- depth: {blocks: [1, 4]}\n- width: {remove: 1, of: 8, metric: magnitude}\n"
    )
    args = ["compress", str(file), "--subject", str(folder), "--out", str(place / "out")]
    dry = run(app, [*args, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert [line.split()[:3] for line in dry.stdout.splitlines()[1:]] == [["1", "D2", "no"], ["2", "D2+W1:8", "no"]]
    assert not (place / "out").exists() and not (cache_dir() / "stages").exists()
    done = run(app, args)
    assert done.exit_code == 0, done.output
    fingerprint = read_artifact(place / "out")["fingerprint"]
    assert done.stdout.startswith(f"{place / 'out'}: D2+W1:8, ") and done.stdout.endswith(
        f"fingerprint {fingerprint}\n"
    )
    assert "stage 2 of 2, D2+W1:8: computing" in done.stderr and "stage" not in done.stdout
    assert [line.split()[2] for line in run(app, [*args, "--dry-run"]).stdout.splitlines()[1:]] == ["yes", "yes"]
    assert run(app, ["recipe", "check", str(file), "--subject", str(folder)]).stdout == f"{file}: D2+W1:8\n"
    assert run(app, ["recipe", "label", str(file)]).stdout == "D2+W1:8\n"
    loaded = run(app, ["compress", "W1:4+D1", "--plain", "--subject", str(folder), "--dry-run"])
    assert loaded.exit_code == 0 and "W1:4+D1" in loaded.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compress", "D2", "--subject", "FOLDER"], "where to write the artifact is not said: expected --out FOLDER"),
        (["compress", "D2", "--subject", "nowhere", "--out", "OUT"], "subject 'nowhere' is not known"),
        (["compress", "FILE", "--subject", "FOLDER", "--out", "OUT"], "recipe.yaml:2: cannot remove 30 of 8 blocks"),
        (["compress", "FILE", "--subject", "FOLDER", "--dry-run"], "recipe.yaml:2: cannot remove 30 of 8 blocks"),
        (["recipe", "check", "FILE", "--subject", "FOLDER"], "recipe.yaml:2: cannot remove 30 of 8 blocks"),
        (["recipe", "check", "gone.yaml"], "gone.yaml is not there"),
        (["recipe", "label", "gone.yaml"], "gone.yaml is not there"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, place, args, message):
    (place / "recipe.yaml").write_text("stages:\n- depth: {remove: 30}\n")
    args = [
        {"FOLDER": str(folder), "OUT": str(place / "out"), "FILE": str(place / "recipe.yaml")}.get(a, a) for a in args
    ]
    result = run(app, args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == "" and result.stderr.count("\n") == 1
    assert not (place / "out").exists()
