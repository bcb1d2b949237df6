"""A linear path beside an MLP: what it computes, what it counts for, and where it can be kept."""

import json

import pytest
import torch

from thesislib.compress.gptq import Rtn
from thesislib.compress.laco import Laco
from thesislib.compress.slicing import Slice
from thesislib.device.cost import costs, stored
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.artifact_json import RECORD, checksum
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gptq import export_gptq
from thesislib.formats.load import save_checkpoint
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.beside import CorrectedMLP, check_no_path, ranks_beside, with_paths
from thesislib.model.blocks import apply_plan, remove, without_parts
from thesislib.model.layers import LINEARS, adapt, replace

IDS = torch.arange(24).view(2, 12)
D, EXTRA = 32, 2 * 32 * 3 + 2 * 32 * 5  # of the two paths below


def path(rank, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, D, generator=generator), torch.randn(D, rank, generator=generator)
    return (A / 4).to(dtype), (B / 4).to(dtype)


def logits(subject):
    with torch.inference_mode():
        return subject.model(IDS, use_cache=False).logits


@pytest.fixture
def plain(tiny):
    return tiny(layers=4)


@pytest.fixture
def subject(plain):
    return with_paths(plain, {1: path(3, 1), 3: path(5, 3)})


def test_it_adds_a_linear_map_of_the_mlps_input(plain, subject):
    x = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(0))
    for b, rank in {1: 3, 3: 5}.items():
        A, B = path(rank, b)
        mlp = subject.blocks[b].mlp
        torch.testing.assert_close(mlp(x), plain.blocks[b].mlp(x) + x @ A.T @ B.T)
        assert torch.equal(mlp.gated(x), plain.blocks[b].mlp(x)) and mlp.rank == rank
        assert torch.equal(mlp.path[0], A) and torch.equal(mlp.path[1], B)
        assert not any(p.requires_grad for p in mlp.parameters())
    assert ranks_beside(subject) == {1: 3, 3: 5} and ranks_beside(plain) == {}
    assert set(subject.linears(1)) == set(LINEARS) and subject.linears(1)["up_proj"] is plain.linears(1)["up_proj"]
    assert subject.blocks[0].mlp is plain.blocks[0].mlp and subject.plan == plain.plan
    assert not isinstance(plain.blocks[1].mlp, CorrectedMLP)


def test_a_path_that_is_zero_changes_no_bit_and_another_path_replaces_it(plain):
    A, B = path(4)
    none = with_paths(plain, {0: (A, torch.zeros_like(B))})
    assert torch.equal(logits(none), logits(plain)) and none.fingerprint != plain.fingerprint
    other = with_paths(with_paths(plain, {0: path(7, 9)}), {0: (A, B)})
    assert ranks_beside(other) == {0: 4} and torch.equal(logits(other), logits(with_paths(plain, {0: (A, B)})))


def test_a_path_has_its_own_dtype(plain):
    plain.model.to(torch.bfloat16)
    mlp = with_paths(plain, {0: path(4)}).blocks[0].mlp
    x = torch.ones(1, D, dtype=torch.bfloat16)
    assert mlp.path[0].dtype == torch.float32 and mlp(x).dtype == torch.bfloat16


def test_factors_and_blocks_that_do_not_fit(plain):
    A, B = path(4)
    for wrong in ((A, B[:, :3]), (A[:, :9], B), (B, A), (A[:0], B[:, :0])):
        with pytest.raises(BadInput, match=r"do not fit an MLP of 32 inputs: expected \(r, 32\) and \(32, r\)"):
            with_paths(plain, {0: wrong})
    with pytest.raises(BadInput, match="block 4 is out of range: the model has blocks 0 to 3"):
        with_paths(plain, {4: (A, B)})
    with pytest.raises(BadInput, match="block 2 lost its MLP"):
        with_paths(without_parts(plain, {2: "mlp"}), {2: (A, B)})
    with pytest.raises(BadInput, match="an MLP of class Linear has no gate_proj"):
        CorrectedMLP(torch.nn.Linear(D, D), A, B)


def test_it_is_counted(plain, subject):
    own, other = sizes(subject), sizes(plain)
    assert subject.parameters - plain.parameters == EXTRA == own["parameters"] - other["parameters"]
    assert own["nonzero_parameters"] - other["nonzero_parameters"] == EXTRA
    assert own["bytes_in_memory"] - other["bytes_in_memory"] == 4 * EXTRA
    for tokens, kind in ((1, "gemv"), (5, "gemm")):
        one, two = costs(subject, tokens), costs(plain, tokens)
        assert one.macs - two.macs == tokens * EXTRA and one.kept - two.kept == 4 * EXTRA
        beside = [o for o in one.operations if o.name.endswith(".beside")]
        assert [(o.name, o.kind, o.macs, o.weights, o.params) for o in beside] == [
            (f"blocks.{b}.mlp.beside", kind, tokens * 64 * r, 256 * r, 64 * r) for b, r in ((1, 3), (3, 5))
        ]
    assert {w.precision for w in stored(subject) if w.name.endswith(".beside")} == {"float32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_comes_back_from_an_artifact(subject, tmp_path, dtype):
    for p in subject.model.parameters():  # not model.to(), which would round the rotary frequencies
        p.data = p.data.to(dtype)
    folder = save_artifact(subject, tmp_path / "a")
    back = load_artifact(folder)
    assert back.fingerprint == subject.fingerprint and sizes(back) == sizes(subject) and back.dtype == dtype
    assert torch.equal(logits(back), logits(subject)) and ranks_beside(back) == {1: 3, 3: 5}
    record = json.loads((folder / RECORD).read_text())
    assert record["beside"] == {"1": 3, "3": 5}
    assert record["sizes"]["bytes_on_disk"] == predicted_disk_bytes(subject)
    assert record["sizes"]["bytes_on_disk"] == (folder / "packed.safetensors").stat().st_size
    assert load_artifact(folder, "bfloat16").blocks[1].mlp.path[0].dtype == torch.bfloat16
    assert load_artifact(folder, packed=False).fingerprint == subject.fingerprint


def test_with_everything_that_may_be_beside_it(subject, tmp_path):
    """Quantised weights, a correction of the down projection inside the MLP, blocks removed, repeated and lamed."""
    other = Rtn(group=16).apply(subject)[0]
    replace(other.blocks[3], "down_proj", adapt(other.linears(3)["down_proj"], torch.ones(2, 64), torch.ones(D, 2)))
    other = without_parts(apply_plan(other, (0, 1, 3, 3)), {0: "mlp", 1: "attention"})
    back = load_artifact(save_artifact(other, tmp_path / "a"))
    assert back.fingerprint == other.fingerprint and ranks_beside(back) == {1: 3, 2: 5, 3: 5}
    assert back.parameters == other.parameters and torch.equal(logits(back), logits(other))
    assert predicted_disk_bytes(other) == sum(f.stat().st_size for f in (tmp_path / "a").rglob("*.safetensors"))
    assert ranks_beside(remove(other, [1])) == {1: 5, 2: 5}
    assert ranks_beside(without_parts(other, {1: "mlp"})) == {2: 5, 3: 5}
    assert costs(other).macs > 0


def test_a_copy_is_independent(subject):
    twin = subject.copy()
    twin.blocks[1].mlp.path[0].data.zero_()
    assert subject.blocks[1].mlp.path[0].any() and ranks_beside(twin) == {1: 3, 3: 5}


def test_formats_without_a_place_for_it_refuse_it(plain, subject, tmp_path):
    quantised = with_paths(Rtn(group=32).apply(plain)[0], {1: path(3)})
    for what, write in {
        "a plain checkpoint": lambda: save_checkpoint(subject, tmp_path / "out"),
        "a plain checkpoint ": lambda: save_artifact(subject, tmp_path / "out", packed=False),
        "a GGUF file": lambda: export_gguf(subject, tmp_path / "out.gguf"),
        "a GPTQ checkpoint": lambda: export_gptq(quantised, tmp_path / "out"),
    }.items():
        with pytest.raises(BadInput, match=f"block 1 has a linear path of rank 3 beside .*, which {what.strip()} "):
            write()
        assert not list(tmp_path.glob("out*"))
    check_no_path(plain, "nothing")


def test_steps_that_change_whole_weights_refuse_it(subject, tiny_data):
    """They would leave the path in another basis, or take one of two."""
    for stage, step in ((Slice(keep=0.5), "slice"), (Laco(remove=1, merge=2), "merge blocks")):
        with pytest.raises(BadInput, match=f"block 1 has a linear path beside it.*{step} before calr"):
            stage.apply(subject, data=tiny_data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beside", {"9": 3}), ("beside", {"-1": 3}), ("beside", {"1": 0}), ("beside", {"1": -1}),
        ("beside", {"1": "3"}), ("beside", {"one": 3}), ("beside", {"1": True}), ("beside", {"\u0661": 3}),
        ("beside", []), ("beside", {"1": 4}), ("beside", {"9" * 5000: 3}), ("beside", {"1": 3}),
        ("beside", {"1": 3, "2": 4, "3": 5}), ("beside", None),
        ("beside", {"1": 10**12, "3": 5}), ("without", {"mlp": [1]}),
    ],
)  # fmt: skip
def test_an_artifact_that_says_something_else(subject, tmp_path, field, value):
    folder = save_artifact(subject, tmp_path / "a")
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    record[field] = value
    if value is None:
        del record[field]
    (folder / RECORD).write_text(json.dumps({**record, "sha256": checksum(record)}))
    with pytest.raises(BadInput, match="beside|block 1 "):
        load_artifact(folder)
