"""A linear whose parameters are not those of a matrix of its shape: what it says of itself is what is counted, kept and
read back."""

import json

import pytest
import torch
from torch.nn import functional as F

from thesislib.device.cost import costs, stored
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.artifact_json import RECORD
from thesislib.formats.sizes import predicted_disk_bytes, sizes
from thesislib.model.layers import ComputedLinear, adapt, reader, replace, size_of

RANK = 3


class Pair(ComputedLinear):
    """W = B A, and nothing but A (rank, inputs) and B (outputs, rank) is held and multiplied."""

    words = ("pair",)
    encoding = "pair"

    @classmethod
    def load(cls, linear):
        return cls(linear.shape, linear.bias, **linear.tensors)

    weight = property(lambda self: self.B @ self.A)
    numel = property(lambda self: self.A.numel() + self.B.numel())
    macs = property(lambda self: self.A.numel() + self.B.numel())
    nonzero = property(lambda self: int(self.A.count_nonzero() + self.B.count_nonzero()))

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B, self.bias)


@pytest.fixture
def subject(tiny):
    """One of whose projections, the 32 x 64 down of block 1, is a pair, with two zeros in A."""
    subject = tiny(layers=2)
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(RANK, 64, generator=generator), torch.randn(32, RANK, generator=generator)
    A[0, :2] = 0
    replace(subject.blocks[1], "down_proj", Pair((32, 64), None, A=A, B=B))
    return subject


def test_it_is_counted_as_what_it_holds(subject, tiny):
    dense, fewer = tiny(layers=2), 32 * 64 - RANK * (32 + 64)
    assert subject.parameters == dense.parameters - fewer
    own, plain = sizes(subject), sizes(dense)
    assert (
        own["parameters"] == subject.parameters and own["nonzero_parameters"] == plain["nonzero_parameters"] - fewer - 2
    )
    assert own["bytes_in_memory"] == plain["bytes_in_memory"] - 4 * fewer
    assert size_of(subject.linears(1)["down_proj"]) == (288, 288, 4 * 288)
    for tokens in (1, 5):
        one, other = costs(subject, tokens), costs(dense, tokens)
        assert one.macs == other.macs - tokens * fewer and one.kept == other.kept - 4 * fewer
        (operation,) = (o for o in one.operations if o.name == "blocks.1.down_proj")
        assert (operation.macs, operation.params, operation.weights) == (tokens * 288, 288, 4 * 288)


def test_what_is_multiplied_need_not_be_what_is_stored(subject):
    """A pair whose A is multiplied twice, say: MACs are asked for by themselves."""
    pair = subject.linears(1)["down_proj"]
    pair.__class__ = type("Twice", (Pair,), {"macs": property(lambda self: 2 * self.A.numel() + self.B.numel())})
    (operation,) = (o for o in costs(subject, 5).operations if o.name == "blocks.1.down_proj")
    assert operation.macs == 5 * (288 + 3 * 64) and operation.params == 288


def test_a_correction_of_it_adds_its_own(subject):
    replace(
        subject.blocks[1], "down_proj", adapt(subject.linears(1)["down_proj"], torch.ones(2, 64), torch.ones(32, 2))
    )
    (held,) = (w for w in stored(subject) if w.name == "blocks.1.down_proj")
    assert (held.params, held.macs, held.bytes, held.beside) == (288 + 192, 288 + 192, 4 * (288 + 192), (4 * 192, 192))


def test_it_comes_back_from_an_artifact(subject, tmp_path):
    save_artifact(subject, tmp_path / "a")
    back = load_artifact(tmp_path / "a")
    pair = back.linears(1)["down_proj"]
    assert type(pair) is Pair and back.fingerprint == subject.fingerprint and sizes(back) == sizes(subject)
    assert torch.equal(pair.A, subject.linears(1)["down_proj"].A)
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert (
        record["encodings"]["model.layers.1.mlp.down_proj"] == "pair"
        and record["sizes"]["parameters"] == subject.parameters
    )
    assert (
        record["sizes"]["bytes_on_disk"]
        == (tmp_path / "a" / "packed.safetensors").stat().st_size
        == predicted_disk_bytes(subject)
    )
    assert type(load_artifact(tmp_path / "a", packed=False).linears(1)["down_proj"]) is torch.nn.Linear
    assert load_artifact(tmp_path / "a", "bfloat16").linears(1)["down_proj"].A.dtype == torch.bfloat16


def test_an_encoding_that_nothing_reads_is_named():
    assert reader("pair") is Pair and reader("2:4") is reader("bitmap")
    for encoding in ("pear", "nf4/64", "Int4", "2:", "int4/symmetric"):
        with pytest.raises(BadInput, match="encoding|pattern") as caught:
            reader(encoding)
        assert encoding in str(caught.value) and "expected" in str(caught.value)
    with pytest.raises(TypeError, match="'pair' are read by Pair already: Other needs another word"):
        type("Other", (ComputedLinear,), {"words": ("pair",)})
