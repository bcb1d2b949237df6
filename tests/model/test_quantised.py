"""What quantised linears hold: no more bytes than promised, and every weight exactly."""

from dataclasses import replace

import pytest
import torch

from thesislib.compress.width import least_of_each
from thesislib.errors import BadInput
from thesislib.model.grid import BITS, GRIDS, Grid, round_to_nearest
from thesislib.model.layers import StoredLinear
from thesislib.model.packing import THESIS_PATTERNS
from thesislib.model.quantised import (
    QuantisedEmbedding,
    QuantisedLinear,
    kernel_is_known,
    parse_encoding,
    stored_shapes,
)


def weight(rows=48, columns=192, remove=0, of=4, seed=0):
    w = 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return w.masked_fill(least_of_each(w.abs(), remove, of), 0) if remove else w


def held_bytes(linear):
    return sum(t.nbytes for t in linear.stored.values())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, "row"])
def test_weights_come_back_exactly(kind, bits, group):
    q = round_to_nearest(weight() + 0.01, Grid(bits, group, kind), "squared")
    linear = QuantisedLinear.of(q, bias=torch.ones(48))
    assert torch.equal(linear.weight, q.weight)
    assert torch.equal(linear.quantised.codes, q.codes)
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(linear(x), x @ q.weight.T + 1, atol=1e-6)
    assert (linear.in_features, linear.out_features) == (192, 48)


@pytest.mark.parametrize(("remove", "of"), THESIS_PATTERNS)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_pruned_weights_are_left_out_and_come_back_as_zeros(remove, of, kind):
    w = weight(remove=remove, of=of)
    q = round_to_nearest(w, Grid(4, 64, kind))
    linear = QuantisedLinear.of(q, w == 0)
    assert torch.equal(linear.weight, q.weight)
    assert torch.equal(linear.quantised.codes, q.codes)
    whole = QuantisedLinear.of(q)
    if (remove, of) == (1, 16):
        assert linear.mask == "all"  # saves a quarter of a bit, and pays that for saying where
    else:
        assert linear.mask == f"{remove}:{of}"
        assert held_bytes(linear) < held_bytes(whole)


def test_irregular_masks_are_bitmaps():
    w = weight()
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.6] = 0
    q = round_to_nearest(w, Grid(4, 64))
    linear = QuantisedLinear.of(q, w == 0)
    assert linear.mask == "bitmap"
    assert torch.equal(linear.weight, q.weight)
    assert held_bytes(linear) < 0.7 * held_bytes(
        QuantisedLinear.of(q)
    )  # 1 + 0.4 x 4 bits and the scales, of 4 and the scales
    few = weight()
    few[:, ::12] = 0  # 8 % of 4 bits are less than a bitmap's bit
    assert QuantisedLinear.of(round_to_nearest(few, Grid(4, 64)), few == 0).mask == "all"


def test_a_group_with_more_zeros_than_its_pattern_keeps_some():
    w = weight(remove=2, of=4)
    w[3] = 0
    w[5, :6] = 0
    linear = QuantisedLinear.of(q := round_to_nearest(w, Grid(4, 64, "asymmetric")), w == 0)
    assert linear.mask == "2:4"
    assert torch.equal(linear.weight, q.weight)


def test_bytes_that_the_study_promises():
    """Of the bfloat16 bytes: 4 bits in groups of 64 at most 0.29, 3 bits 0.23; W2:4 and 4 bits less than either
    alone."""
    w = weight(576, 576)
    dense = 2 * w.numel()
    for kind in ("symmetric", "asymmetric"):
        assert held_bytes(QuantisedLinear.of(round_to_nearest(w, Grid(4, 64, kind)))) <= 0.29 * dense
        assert held_bytes(QuantisedLinear.of(round_to_nearest(w, Grid(3, 64, kind)))) <= 0.23 * dense
    sparse = weight(576, 576, 2, 4)
    both = held_bytes(QuantisedLinear.of(round_to_nearest(sparse, Grid(4, 64)), sparse == 0))
    assert both == w.numel() // 2 // 2 + w.numel() // 4 * 3 // 8 + 2 * w.numel() // 64  # codes, places, scales
    assert both < 0.2 * dense


def test_an_index_is_kept():
    q = round_to_nearest(weight(), Grid(4, 64, "asymmetric"))
    index = torch.randperm(192, generator=torch.Generator().manual_seed(0)) // 64
    q = replace(q, index=index)
    linear = QuantisedLinear.of(q)
    assert torch.equal(linear.weight, q.weight)
    assert torch.equal(linear.stored["index"].long(), index)
    sparse = q.weight == 0
    assert torch.equal(QuantisedLinear.of(q, sparse).weight, q.weight)


def indexed():
    return replace(round_to_nearest(weight(), Grid(3, 64, "asymmetric")), index=torch.arange(192) % 3)


@pytest.mark.parametrize("remove", [0, 2, 3])
@pytest.mark.parametrize("kind", GRIDS)
def test_a_file_gives_back_the_linear_and_its_sizes_are_foretold(kind, remove, tmp_path):
    from safetensors.torch import load_file, save_file

    w = weight(remove=remove) if kind != "minimum" else weight()
    if remove == 3:
        w = weight()
        w[:, :150] = 0  # a bitmap
    pruned = (w == 0) if kind != "minimum" else None
    for q in (round_to_nearest(w, Grid(3, 64, kind)), indexed()):
        linear = QuantisedLinear.of(q, pruned if q.index is None else None, torch.ones(48), torch.bfloat16)
        save_file(linear.stored, tmp_path / "file")
        again = QuantisedLinear.load(
            StoredLinear(linear.encoding, (48, 192), linear.bias, torch.bfloat16, load_file(tmp_path / "file"))
        )
        assert torch.equal(again.weight, linear.weight) and again.weight.dtype == torch.bfloat16
        foretold = stored_shapes(linear.encoding, (48, 192), int(w.count_nonzero()), q.index is not None)
        assert foretold == {n: (tuple(t.shape), t.dtype) for n, t in linear.stored.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "it lacks the weight 'q.scales'"),
        (
            {"codes": torch.zeros(7, dtype=torch.uint8)},
            r"'q.codes' is torch.uint8 of shape \(7,\), expected torch.uint8 of shape \(3456,\)",
        ),
        (
            {"scales": torch.zeros(48, 3)},
            r"'q.scales' is torch.float32 of shape \(48, 3\), expected torch.int16 of shape \(48, 3\)",
        ),
        ({"index": torch.full((192,), 3, dtype=torch.int16)}, "'q.index' names groups that it does not have"),
    ],
)
def test_damaged_files_are_refused(change, message):
    linear = QuantisedLinear.of(indexed())
    tensors = {n: t for n, t in {**linear.stored, **change}.items() if t is not None}
    with pytest.raises(BadInput, match=message):
        QuantisedLinear.load(StoredLinear(linear.encoding, (48, 192), None, torch.float32, tensors, "q"))


def test_damaged_places_are_refused():
    w = weight(remove=2)
    linear = QuantisedLinear.of(round_to_nearest(w, Grid(4, 64)), w == 0)
    tensors = {**linear.stored, "places": torch.full_like(linear.stored["places"], 255)}  # 7 of 6 combinations
    with pytest.raises(BadInput, match="names places that 2:4 does not have"):
        QuantisedLinear.load(StoredLinear(linear.encoding, (48, 192), None, torch.float32, tensors, "q"))


def test_a_pruned_weight_that_is_not_zero_is_refused():
    w = weight()
    with pytest.raises(BadInput, match="a pruned weight is not zero on its grid"):
        QuantisedLinear.of(round_to_nearest(w, Grid(4, 64)), least_of_each(w.abs(), 1, 8).roll(1, 1))


def test_encodings():
    assert parse_encoding("int3/asymmetric/row/8:16") == (Grid(3, "row", "asymmetric"), "8:16")
    for text, message in (
        ("int4/symmetric/64", "encoding 'int4/symmetric/64' is not understood"),
        ("int4/symmetric/64/4:2", "pattern '4:2' removes"),
        ("int9/symmetric/64/all", "9 bits: expected"),
    ):
        with pytest.raises(BadInput, match=message):
            parse_encoding(text)
    table = QuantisedLinear.of(round_to_nearest(weight(), Grid(4, 64)))
    with pytest.raises(BadInput, match="an embedding cannot be held as int4/symmetric/64/all: expected 8 bits"):
        QuantisedEmbedding(table)


def relative(found, expected):
    """The length of an error, of the length of what is right."""
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_bfloat16_products_of_4_bits_are_right_within_that_types_rounding(kind, group, rows):
    q = round_to_nearest(weight(192, 256) + 0.01, Grid(4, group, kind), "squared")
    bias = torch.randn(192, generator=torch.Generator().manual_seed(3)).bfloat16()
    linear, dense = QuantisedLinear.of(q, bias=bias, dtype=torch.bfloat16), q.weight.bfloat16()
    before = {name: tensor.clone() for name, tensor in linear.stored.items()}
    x = torch.randn(2, rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    right = x.float() @ q.weight.T + bias.float()
    with torch.inference_mode():
        y = linear(x)
    assert y.shape == (2, rows, 192) and y.dtype == torch.bfloat16
    assert relative(y, right) < 2**-8
    assert relative(y, right) < 1.3 * relative(torch.nn.functional.linear(x, dense, bias), right), (
        "about as near as the dense product in this type"
    )
    # what it holds may be in another order now; what it gives is not
    assert linear.tiled == kernel_is_known()
    assert before.keys() == linear.stored.keys() and all(
        torch.equal(before[name], tensor) for name, tensor in linear.stored.items()
    )
    assert torch.equal(linear.weight, dense) and torch.equal(linear.quantised.weight, q.weight)
    assert torch.equal(linear(x[0, 0]), linear(x)[0, 0]) if rows == 1 else True
    if group == 64:
        assert sum(t.nbytes for t in linear.resident) <= 0.29 * dense.nbytes
    assert torch.equal(linear.float().weight, q.weight)


@pytest.mark.skipif(not kernel_is_known(), reason="torch has no kernel for 4 bits on this processor")
def test_tiles_keep_every_scale_and_every_number():
    """The smallest, the largest, and those that round up, over all zeros."""
    q = round_to_nearest(weight(64, 1024), Grid(4, 32, "asymmetric"))
    bits = torch.randint(1, 0x7C00, (64, 32), generator=torch.Generator().manual_seed(0)).short()
    bits[0, :8] = torch.tensor([1, 3, 1023, 1024, 1025, 0x7BFF, 0x7BFE, 0x3C04])
    q = replace(q, scale=bits.view(torch.float16).float(), offset=torch.arange(2048).view(64, 32).float() % 16)
    linear = QuantisedLinear.of(q, dtype=torch.bfloat16)
    with torch.inference_mode():
        linear(torch.zeros(1, 1024, dtype=torch.bfloat16))
    assert linear.tiled
    assert torch.equal(linear.stored["scales"], bits) and torch.equal(linear.quantised.offset, q.offset)
    assert torch.equal(linear.weight, q.weight.bfloat16())
    assert torch.equal(linear(torch.eye(1024).bfloat16()).T, q.weight.bfloat16())  # many rows: from tiles, unpacked


def test_what_the_kernel_cannot_take_is_unpacked():
    w, x = weight(64, 256), torch.randn(2, 256).bfloat16()
    sparse = weight(64, 256, 2, 4)
    others = [
        QuantisedLinear.of(round_to_nearest(w, grid), dtype=torch.bfloat16)
        for grid in (Grid(3, 64), Grid(8, 64), Grid(4, "row"), Grid(4, 16), Grid(4, 64, "minimum"))
    ]
    others.append(
        QuantisedLinear.of(replace(round_to_nearest(w, Grid(4, 64)), index=torch.arange(256) % 4), dtype=torch.bfloat16)
    )
    others.append(QuantisedLinear.of(round_to_nearest(sparse, Grid(4, 64)), sparse == 0, dtype=torch.bfloat16))
    others.append(QuantisedLinear.of(round_to_nearest(weight(48, 256), Grid(4, 64)), dtype=torch.bfloat16))
    for linear in others:
        assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))
        assert not linear.tiled


def test_a_gradient_goes_through_tiles():
    """Of a correction trained on a quantised model: few rows or many."""
    q = round_to_nearest(weight(64, 128), Grid(4, 64, "asymmetric"))
    linear = QuantisedLinear.of(q, dtype=torch.bfloat16)
    for rows in (1, 40):
        x = torch.randn(rows, 128).bfloat16().requires_grad_()
        linear(x).float().sum().backward()
        assert relative(x.grad, q.weight.sum(0).expand(rows, -1)) < 2**-8
