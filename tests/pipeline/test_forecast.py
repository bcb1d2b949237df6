"""Forecasts against what real recipes on a small model then weigh, after every stage."""

import json
import random
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.lora.stage import Lora
from thesislib.compress.outline import spread
from thesislib.compress.stage import STAGES, Stage
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.files import data_file
from thesislib.formats.artifact_json import read_artifact
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.pipeline.forecast import Forecast
from thesislib.pipeline.recipe import Recipe
from thesislib.pipeline.run import Job, compress
from thesislib.sources.rows import SOURCES

IDS = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(1))
TRAINING = {
    "rank": 4,
    "length": 32,
    "batch": 2,
    "accumulate": 1,
    "steps": 2,
    "every": 2,
    "validation": 0,
    "learning_rate": 1e-2,
    "autocast": False,
}


@dataclass(frozen=True)
class Toy(Stage):
    """A stage that is not known to the forecast."""

    label = "X"
    word, family, pattern = "toy", "trained", "X"

    def apply(self, subject, *, data, work):
        return subject.copy(), {}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("THESISLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(STAGES, "toy", Toy)
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *_: IDS)
    return tmp_path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Text to train on."""
    root, r = tmp_path_factory.mktemp("texts"), random.Random(0)
    for task in ("wikitext_train", "wikitext"):
        path = root / f"{SOURCES[task].folder}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [row for i in range(4) for row in (f" = {task} {i} = \n", "".join(r.choices("abc def", k=200)) + "\n")]
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(root)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_checkpoint(tiny(layers=8), tmp_path_factory.mktemp("subject") / "tiny")


@pytest.fixture(scope="module")
def few_blocks(tiny, tmp_path_factory):
    return save_checkpoint(tiny(layers=5), tmp_path_factory.mktemp("small") / "tiny")


def of(*stages):
    return Recipe(stages, tuple(f"recipe.yaml:{n}" for n in range(1, len(stages) + 1)))


def width(remove=None, out_of=None, **more):
    return Width(remove, out_of, metric="magnitude", **more)


def lora(**more):
    return Lora(**(TRAINING | more))


def rows_of(folder, *stages, dtype="float32"):
    return Job.prepare(folder, of(*stages), dtype=dtype).forecast()


@cache
def own_zeros(folder):
    """Those that the subject came with: the embedding of padding, and Qwen2's biases."""
    return sum(int((p == 0).sum()) for p in load_subject(folder).model.parameters())


def check_every_stage(folder, stages, data, dtype, out):
    """Parameters and bytes are those of each stage's artifact, to the last one; non-zero parameters, where they are
    foretold."""
    job, own = Job.prepare(folder, of(*stages), data, dtype), own_zeros(folder)
    foreseen = job.forecast()
    compress(folder, of(*stages), out, data=data, dtype=dtype)
    for n, row in enumerate(foreseen, 1):
        record = read_artifact(job.folder(n))
        sizes = record["sizes"]
        assert not row.cached and row.label == record["label"]
        # a tiny model's headers outweigh its tensors, but they are foretold to the byte as well, so that 1 % needs no
        # more room
        assert (row.parameters, row.disk_bytes) == (sizes["parameters"], sizes["bytes_on_disk"]), row.label
        assert row.nonzero in (None, sizes["nonzero_parameters"] + own), row.label
    return foreseen


D2, W18, W24 = Depth(blocks=[1, 4]), width(1, 8), width(2, 4)
Q, Q3 = Gptq(group=16), Gptq(bits=3, group="row", grid="asymmetric", act_order="index")
MIXED = width(ratio=0.25, ratios={"blocks.2.*": 0.75, "up_proj": 0.5}, linears=["q_proj", "o_proj"])


# each encoding, and each way to train over one
IN_BOTH_TYPES = [
    (D2,),
    (W18, W24, width(ratio=0.5)),
    (D2, W18, lora(), Q, Eora(rank=4)),
    (MIXED, Q3),
    (Rtn(bits=8, group=16, grid="minimum", linears="*_proj", embedding_bits=8), D2),
    (W24, Eora(rank=4), Q, Eora(rank=5, linears="k_proj")),
    (W24, Eora(rank=4), lora(init="eora", linears="*")),
    (W24, lora(merge="masked"), Q),
    (Q, Eora(rank=4), lora(merge="dense", linears="*"), W18),
]
IN_FLOAT32 = [
    (W18,),
    (D2, W18),
    (Depth(blocks=[1, 4], part="attention"), W24),
    (width(ratio=0.5), D2),
    (width(6, 8), width(ratio=0.01)),
    (width(20, 32),),  # a pattern that is not packed as such
    (W24, W18),
    (MIXED,),
    (W24, Q),
    (W18, Rtn(bits=5, group=16, grid="asymmetric")),
    (W18, Rtn(bits=2, group=16)),  # its places would take more than its codes
    (width(ratio=0.5), Q3),
    (width(ratio=0.2), Q),
    (width(ratio=0.015625), Q),
    (Rtn(bits=3, group=64, linears="down_proj", embedding_bits=8),),  # 64 does not divide the embedding
    (Rtn(group=16, linears=["q_proj", "blocks.3.*"]), Eora(rank=3)),
    (W24, Eora(ranks={"q_proj": 2, "blocks.3.*": 40}, linears=["q_proj", "down_proj"])),
    (W24, lora(merge="dense"), W18),
    (lora(), lora(rank=2, linears="*"), D2),
    (
        Depth(remove=2, metric="magnitude", part="attention", protect_first=1, protect_last=1),
        Depth(remove=1, metric="magnitude", part="mlp", protect_first=1, protect_last=1),
        W24,
        Q,
    ),
]


@pytest.mark.parametrize(
    ("stages", "dtype"),
    [
        *((stages, "float32") for stages in IN_BOTH_TYPES + IN_FLOAT32),
        *((stages, "bfloat16") for stages in IN_BOTH_TYPES),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(stage.label for stage in x),
)
def test_sizes_are_foreseen_exactly(few_blocks, place, texts, stages, dtype):
    foreseen = check_every_stage(few_blocks, stages, texts, dtype, place / "out")
    assert all(row.parameters and row.disk_bytes for row in foreseen)
    assert [row.cached for row in Job.prepare(few_blocks, of(*stages), texts, dtype).forecast()] == [True] * len(stages)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_biases_and_an_own_head(tiny, place, texts, kind, tied):
    folder = save_checkpoint(tiny(kind, layers=3, tie_word_embeddings=tied), place / "tiny")
    stages = (W24, lora(), Rtn(group=16, grid="asymmetric", embedding_bits=8), Eora(rank=2))
    assert len(check_every_stage(folder, stages, texts, "float32", place / "out")) == 4


def test_a_second_look_shows_the_sizes_that_the_cache_has(folder, place):
    before = rows_of(folder, D2, W18)
    record = read_artifact(compress(folder, of(D2, W18), place / "out"))
    known = replace(before[1], cached=True, nonzero=record["sizes"]["nonzero_parameters"])
    assert (
        rows_of(folder, D2, W18)[1]
        == known
        == Forecast("D2+W1:8", True, known.parameters, before[1].nonzero - own_zeros(folder), before[1].disk_bytes)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("budget", "linears"), [(20_000, "*"), (3000, "*"), (200, "q_proj")])
def test_a_budget_is_taken_to_be_spent(folder, place, budget, linears, dtype):
    stages, size = (W24, Eora(bytes=budget, linears=linears)), getattr(torch, dtype).itemsize
    plain, row = rows_of(folder, *stages, dtype=dtype)
    record = read_artifact(compress(folder, of(*stages), place / "out", dtype=dtype))
    spent = record["reports"][1]["bytes"]
    # what is left over buys no direction: at most of the dearest kind, which has 96 entries of 2 bytes
    assert abs(row.parameters - plain.parameters - spent // 2) < 96 and budget - spent < 192
    # the corrections' own file differs by that, and by one line of 150 bytes for each factor of a projection that gets
    # none
    assert abs(row.disk_bytes - record["sizes"]["bytes_on_disk"]) < 96 * size + 2 * 56 * 150
    if linears == "q_proj":  # one direction, wherever it goes
        assert (row.parameters, row.disk_bytes) == (record["sizes"]["parameters"], record["sizes"]["bytes_on_disk"])


BUDGET = Eora(bytes=5000)


@pytest.mark.parametrize(
    ("stages", "known"),
    [
        # parameters, those not zero, bytes on disk, after the last stage
        ((Q,), "p b"),
        ((Rtn(bits=8, group=16, linears="down_proj"),), "p b"),
        ((Rtn(group=16, linears="q_proj", embedding_bits=8), lora(merge="dense")), "p b"),
        ((Q, lora(merge="dense", linears="*")), "pnb"),
        ((Q, lora(merge="masked")), "p"),
        ((Q, W24), "p"),
        ((Q, W24, lora(merge="dense", linears="*")), "pnb"),
        ((width(2, 8), width(1, 4)), "p"),
        ((width(ratio=0.5), width(2, 4), Eora(rank=2)), "p"),
        ((width(2, 8), width(1, 4), Q), "p"),
        ((W18, W24), "pnb"),
        ((Toy(), D2), ""),
        ((Depth(remove=1), Depth(remove=1)), "pnb"),
        ((Depth(blocks=[5], part="mlp"), Depth(remove=1)), ""),
        ((Depth(blocks=[5], part="mlp"), Depth(remove=1, part="attention")), "pnb"),
        ((width(2, 4, linears="blocks.4.*"), Depth(remove=1)), ""),
        ((width(2, 4, linears="blocks.0.*"), Depth(remove=1)), "pnb"),  # which is protected
        ((Depth(remove=1, part="mlp"), Depth(remove=1)), ""),
        ((Depth(remove=1, part="mlp"), Depth(remove=1, part="mlp")), ""),
        ((Depth(remove=1, part="mlp"), width(2, 4, linears="blocks.5.*")), ""),
        ((Depth(remove=1, part="mlp"), lora(linears="blocks.5.*")), ""),
        ((Depth(remove=1, part="mlp"), W24, Eora(bytes=5000, linears="blocks.5.*")), ""),
        ((W24, BUDGET), "pnb"),
        ((W24, BUDGET, D2), ""),
        ((W24, BUDGET, lora()), "pnb"),
        ((W24, BUDGET, lora(merge="masked")), ""),
        ((W24, Eora(bytes=200), lora(merge="masked", linears="blocks.0.*")), ""),  # one direction, wherever it is
        ((W24, BUDGET, lora(merge="masked", linears="*")), "pnb"),
    ],
    ids=lambda x: "+".join(stage.label for stage in x) if isinstance(x, tuple) else None,
)
def test_what_cannot_be_foreseen_is_not_guessed(folder, stages, known):
    row = rows_of(folder, *stages)[-1]
    assert [row.parameters is not None, row.nonzero is not None, row.disk_bytes is not None] == [
        sign in known for sign in "pnb"
    ]


def test_an_entry_of_a_correction_takes_what_its_type_takes(folder):
    """In bfloat16 a trained correction has 4 bytes an entry, and so has what is joined with it, wherever a budget puts
    that."""
    assert rows_of(folder, W24, BUDGET, lora(), dtype="bfloat16")[2].parameters is None
    assert rows_of(folder, W24, BUDGET, lora(linears="*"), dtype="bfloat16")[2].parameters is not None
    assert rows_of(folder, lora(), W24, BUDGET, dtype="bfloat16")[2].parameters is None
    assert rows_of(folder, lora(), W24, BUDGET)[2].parameters is not None


def test_a_stage_that_keeps_sizes_changes_none(folder, monkeypatch):
    monkeypatch.setattr(Toy, "outline", lambda self, outline: outline.changed.clear())
    assert rows_of(folder, Toy(), D2)[1] == replace(rows_of(folder, D2)[0], label="X+D2")


def test_an_artifact_may_be_packed_already(folder, place):
    row = rows_of(compress(folder, of(W24), place / "first"), D2)[0]
    assert row == Forecast("D2", False, None, None, None)


def test_what_the_run_would_refuse_is_refused(folder):
    with pytest.raises(
        BadInput,
        match=r"recipe.yaml:2: rank 20 is larger than k_proj of block 0, of shape \(16, 32\): expected at most 16",
    ):
        rows_of(folder, D2, lora(rank=20, linears="k_proj"))
    with pytest.raises(
        BadInput, match=r"recipe.yaml:2: grid 'minimum' has no exact zero, and weights have been pruned"
    ):
        rows_of(folder, W18, Rtn(group=16, grid="minimum"))
    with pytest.raises(
        BadInput, match=r"recipe.yaml:2: a budget of 10 bytes buys no correction: the cheapest takes 96"
    ):
        rows_of(folder, W24, Eora(bytes=10))


@pytest.mark.parametrize(
    ("remove", "of_", "run"), [(1, 2, 4), (2, 4, 2), (1, 8, 4), (6, 8, 4), (3, 8, 12), (5, 6, 4), (0, 1, 8), (3, 3, 7)]
)
def test_zeros_in_a_run(remove, of_, run):
    """Against random masks: the bounds hold, and are reached."""
    columns = 3 * of_ * run
    order = torch.rand(20_000, columns // of_, of_, generator=torch.Generator().manual_seed(0)).argsort(-1)
    counts = (order < remove).view(-1, columns // run, run).sum(-1)
    assert spread(remove, of_, run) == (int(counts.min()), int(counts.max()))


@pytest.mark.parametrize("name", ["thesis", "order_depth_lora_width", "order_depth_width_lora", "w2_4"])
def test_the_recipes_that_come_along_are_foreseen(tiny, place, name):
    folder = save_checkpoint(
        tiny(layers=8, hidden_size=64, num_attention_heads=8, intermediate_size=128), place / "tiny"
    )
    rows = Job.prepare(folder, data_file(f"recipes/{name}.yaml"), data="embedded").forecast()
    assert all(row.parameters and row.disk_bytes for row in rows)
