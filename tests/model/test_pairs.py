"""Pairs of low rank: what they compute, what they hold, and that copies and other dtypes are still pairs."""

import copy

import pytest
import torch
from torch import nn

from thesislib.compress.gptq import Rtn
from thesislib.device.cost import costs, stored
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.blocks import apply_plan, with_bias
from thesislib.model.grid import Grid, round_to_nearest
from thesislib.model.layers import Adapted, StoredLinear, adapt, base_of, reader, replace, size_of, unpack, unpack_all
from thesislib.model.lowrank import LowRank, factor_shapes, is_lowrank, parse_lowrank
from thesislib.model.quantised import QuantisedLinear

RANK, INPUTS, OUTPUTS = 3, 64, 32
IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(1))


def factors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, INPUTS, generator=generator), torch.randn(OUTPUTS, RANK, generator=generator)


def rounded(factor, bits, group="row"):
    return QuantisedLinear.of(round_to_nearest(factor, Grid(bits, group, "symmetric"), "squared"))


def pair(a_bits=16, b_bits=16, bias=None):
    A, B = factors()
    return LowRank(*(f if bits == 16 else rounded(f, bits) for f, bits in ((A, a_bits), (B, b_bits))), bias)


KINDS = [(16, 16), (8, 8), (4, 8), (16, 4), (4, 16)]


@pytest.fixture
def subject(tiny):
    """With pairs of every kind as down_proj, each in its block."""
    subject = tiny(layers=len(KINDS))
    for b, kind in enumerate(KINDS):
        replace(subject.blocks[b], "down_proj", pair(*kind))
    return subject


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
def test_it_computes_the_product(kind, biased):
    bias = torch.arange(float(OUTPUTS)) if biased else None
    linear, (A, B) = pair(*kind, bias=bias), factors()
    a, b = (f if bits == 16 else rounded(f, bits).weight for f, bits in ((A, kind[0]), (B, kind[1])))
    x = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(1))
    expected = x @ (b @ a).T + (bias if biased else 0)
    assert torch.allclose(linear(x), expected, atol=1e-4) and torch.allclose(linear.weight, b @ a, atol=1e-5)
    assert torch.allclose(unpack(linear)(x), expected, atol=1e-4)
    assert (linear.in_features, linear.out_features, linear.rank) == (INPUTS, OUTPUTS, RANK)
    assert linear.is_quantised == (kind != (16, 16)) and is_lowrank(linear)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_of_what_is_held(kind):
    linear = pair(*kind)
    numel = RANK * (INPUTS + OUTPUTS)
    nbytes = sum(t.numel() * t.element_size() for t in linear.stored.values())
    assert size_of(linear) == (numel, numel, nbytes)
    foretold = factor_shapes(RANK, (OUTPUTS, INPUTS), linear.encodings, torch.float32)
    assert foretold == {name: (tuple(t.shape), t.dtype) for name, t in linear.stored.items()}
    assert parse_lowrank(linear.encoding) == (RANK, linear.encodings)
    if kind == (16, 16):
        assert linear.nonzero == numel and nbytes == 4 * numel
        linear.A[0, :5] = 0
        assert linear.nonzero == numel - 5
    if kind == (8, 8):  # a byte an entry and two a scale, of each row of a factor
        assert nbytes == numel + 2 * (RANK + OUTPUTS)


def test_a_subject_counts_pairs(subject, tiny):
    dense, fewer = tiny(layers=len(KINDS)), INPUTS * OUTPUTS - RANK * (INPUTS + OUTPUTS)
    assert subject.parameters == sizes(subject)["parameters"] == dense.parameters - len(KINDS) * fewer
    own = sum(size_of(subject.linears(b)["down_proj"]).nbytes for b in range(subject.depth))
    dense_bytes = 4 * INPUTS * OUTPUTS * len(KINDS)
    kept = sizes(subject)["bytes_in_memory"] - (sizes(dense)["bytes_in_memory"] - dense_bytes)
    assert own <= kept <= own + 8 * len(KINDS)  # nothing beside them
    for tokens in (1, 5):
        one, other = costs(subject, tokens), costs(dense, tokens)
        assert one.macs == other.macs - tokens * len(KINDS) * fewer
        assert one.kept == other.kept - dense_bytes + own
    held = {w.name: w for w in stored(subject)}
    for b, kind in enumerate(KINDS):
        w = held[f"blocks.{b}.down_proj"]
        assert (w.params, w.macs, w.bytes) == size_of(subject.linears(b)["down_proj"])
        assert w.precision == ("float32" if 16 in kind else "int8")


def test_an_artifact_brings_it_back(subject, tmp_path):
    save_artifact(subject, tmp_path / "a")
    back = load_artifact(tmp_path / "a")
    assert back.fingerprint == subject.fingerprint and sizes(back) == sizes(subject)
    for b in range(subject.depth):
        one, other = back.linears(b)["down_proj"], subject.linears(b)["down_proj"]
        assert type(one) is LowRank and one.encoding == other.encoding and one.stored.keys() == other.stored.keys()
        assert all(torch.equal(t, other.stored[n]) for n, t in one.stored.items())
    assert torch.equal(back.model(IDS).logits, subject.model(IDS).logits)
    assert (tmp_path / "a" / "packed.safetensors").stat().st_size == predicted_disk_bytes(subject)
    dense = load_artifact(tmp_path / "a", packed=False)
    assert all(type(dense.linears(b)["down_proj"]) is nn.Linear for b in range(subject.depth))
    assert torch.allclose(dense.model(IDS).logits, subject.model(IDS).logits, atol=1e-4)
    half = load_artifact(tmp_path / "a", "bfloat16").linears(0)["down_proj"]
    assert half.A.dtype == half.weight.dtype == torch.bfloat16


def test_copies_and_other_dtypes_are_pairs(subject):
    before = subject.fingerprint
    for other in (copy.deepcopy(subject.model), subject.copy(unpack=False).model):
        theirs = other.model.layers[0].mlp.down_proj
        assert type(theirs) is LowRank and torch.equal(other(IDS).logits, subject.model(IDS).logits)
        theirs.A.zero_()
        assert subject.linears(0)["down_proj"].A.any()
    assert type(subject.copy().linears(0)["down_proj"]) is nn.Linear and subject.copy().fingerprint == before
    half = subject.copy(unpack=False).model.to(torch.bfloat16)
    for b, kind in enumerate(KINDS):
        linear = half.model.layers[b].mlp.down_proj
        assert linear.weight.dtype == torch.bfloat16 and linear.encoding == pair(*kind).encoding
        assert linear(torch.ones(1, INPUTS, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert half(IDS).logits.dtype == torch.bfloat16
    assert subject.fingerprint == before


def test_blocks_that_run_twice_share_a_pair(subject):
    franken = apply_plan(subject, (0, 1, 1, 2, 0))
    own = [franken.linears(b)["down_proj"] for b in range(5)]
    assert own[1] is own[2] and own[0] is own[4] and all(type(linear) is LowRank for linear in own)
    dense = apply_plan(subject.copy(), (0, 1, 1, 2, 0))
    assert torch.allclose(franken.model(IDS).logits, dense.model(IDS).logits, atol=1e-4)
    three = apply_plan(subject, (0, 1, 2))
    assert franken.parameters == three.parameters == sizes(franken)["parameters"]
    again = franken.copy(unpack=False)
    assert again.linears(1)["down_proj"] is again.linears(2)["down_proj"]
    unpacked = franken.copy()
    assert unpacked.linears(1)["down_proj"] is unpacked.linears(2)["down_proj"]
    rounded, _ = Rtn(bits=8, group=16, linears="q_proj").apply(franken)
    assert rounded.linears(1)["down_proj"] is rounded.linears(2)["down_proj"]
    assert type(rounded.linears(1)["down_proj"]) is LowRank


def test_a_correction_and_a_bias_stand_beside_it():
    linear, x = pair(4, 8), torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1))
    corrected = adapt(linear, torch.ones(1, INPUTS), torch.ones(OUTPUTS, 1))
    assert torch.allclose(corrected(x), linear(x) + x.sum(1, keepdim=True), atol=1e-4)
    assert is_lowrank(corrected) and base_of(corrected) is linear
    assert type(unpack(corrected)) is Adapted and type(unpack(corrected).base) is nn.Linear
    biased = with_bias(corrected, torch.ones(OUTPUTS))
    assert is_lowrank(biased) and torch.allclose(biased(x), corrected(x) + 1, atol=1e-4)
    assert linear.bias is None and base_of(biased).encoding == linear.encoding


def test_only_what_is_no_pair_is_unpacked(subject):
    replace(subject.blocks[0], "q_proj", rounded(subject.linears(0)["q_proj"].weight, 8))
    unpack_all(subject.model, but=(LowRank,))
    assert type(subject.linears(0)["q_proj"]) is nn.Linear and type(subject.linears(1)["down_proj"]) is LowRank


def test_other_factors_are_held():
    linear = pair()
    A, B = factors(seed=1)
    linear.hold(rounded(A, 4), B)
    assert linear.stored.keys() == {"A_codes", "A_scales", "B"} and linear.encodings[1] == "dense"
    assert torch.allclose(linear.weight, B @ rounded(A, 4).weight, atol=1e-5)
    assert linear.encoding == f"lowrank:3:{rounded(A, 4).encoding}:dense"


def test_factors_that_do_not_fit():
    A, B = factors()
    with pytest.raises(BadInput, match=r"factors A \(3, 64\) and B \(32, 2\) do not fit: expected \(r, 64\) and"):
        LowRank(A, B[:, :2], None)
    with pytest.raises(BadInput, match="do not fit"):
        LowRank(A[:0], B[:, :0], None)
    with pytest.raises(BadInput, match=r"a factor has shape \(64,\): expected a matrix"):
        LowRank(A[0], B, None)
    pruned = A.clone()
    pruned[:, ::2] = 0
    codes = QuantisedLinear.of(round_to_nearest(pruned, Grid(8, "row", "symmetric"), "none"), pruned == 0)
    with pytest.raises(BadInput, match="a factor cannot be held as int8/symmetric/row/.*: expected nothing left out"):
        LowRank(codes, B, None)


@pytest.mark.parametrize(
    "encoding",
    [
        "lowrank", "lowrank:3", "lowrank:3:dense", "lowrank:0:dense:dense", "lowrank:-1:dense:dense",
        "lowrank:03:dense:dense", "lowrank:٣:dense:dense", "lowrank:3:dense:dense:dense", "lowrank:3:Dense:dense",
        "lowrank:3:bitmap:dense", "lowrank:3:int4/symmetric/64/2:4:dense", "lowrank:3:int4/symmetric/64/bitmap:dense",
        "lowrank:3:dense:int99/symmetric/64/all", "lowrank:9999999999:dense:dense",
    ],
)  # fmt: skip
def test_encodings_that_are_not_understood(encoding):
    with pytest.raises(BadInput, match="expected") as caught:
        reader(encoding)
    assert encoding in str(caught.value)


def test_tensors_of_another_linear():
    A, B = factors()
    stored = {"A": A, "B": B}

    def load(encoding="lowrank:3:dense:dense", shape=(OUTPUTS, INPUTS), **tensors):
        return LowRank.load(StoredLinear(encoding, shape, None, torch.float32, stored | tensors, "layers.1.down"))

    assert torch.equal(load().A, A)
    for change, message in [
        ({"shape": (OUTPUTS, 60)}, r"'layers.1.down.A' is torch.float32 of shape \(3, 64\), expected torch.float32 of"),
        ({"encoding": "lowrank:4:dense:dense"}, r"'layers.1.down.A' .* of shape \(4, 64\)"),
        ({"B": B[:-1]}, r"'layers.1.down.B' is torch.float32 of shape \(31, 3\)"),
        ({"B": B.double()}, r"'layers.1.down.B' is torch.float64"),
        ({"encoding": "lowrank:3:int8/symmetric/row/all:dense"}, "it lacks the weight 'layers.1.down.A_codes'"),
    ]:
        with pytest.raises(BadInput, match=message):
            load(**change)
    del stored["B"]
    with pytest.raises(BadInput, match="it lacks the weight 'layers.1.down.B'"):
        load()
