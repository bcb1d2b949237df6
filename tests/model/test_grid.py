"""Grids against plain formulas, and the checkpoint whose own grid one of them is."""

import numpy as np
import pytest
import torch

from thesislib.errors import BadInput
from thesislib.model.bits import pack_bits, packed_length, unpack_bits
from thesislib.model.grid import BITS, GRIDS, Grid, round_to_nearest


def normal(*shape, seed=0, scale=0.05):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_by_loops(w, bits, group, kind):
    """The reference: group after group in numpy, scales and minima through float16."""
    result, top = np.empty(w.shape), 2**bits - 1
    for r in range(w.shape[0]):
        for at in range(0, w.shape[1], group):
            x = w[r, at : at + group].astype(np.float64)
            if kind == "symmetric":
                scale = float(np.float16(2 * np.abs(x).max() / top))
                new = np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
            elif kind == "asymmetric":
                low, high = min(x.min(), 0), max(x.max(), 0)
                scale = float(np.float16((high - low) / top))
                zero = np.rint(-low / scale)
                new = (np.clip(np.rint(x / scale) + zero, 0, top) - zero) * scale
            else:
                scale, low = float(np.float16((x.max() - x.min()) / top)), float(np.float16(x.min()))
                new = np.clip(np.rint((x - low) / scale), 0, top) * scale + low
            result[r, at : at + group] = new
    return result


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128, "row"])
@pytest.mark.parametrize("around", [0.0, 0.02, 1.0, -1.0])
def test_rounding_is_the_formula(kind, bits, group, around):
    w = normal(6, 384) + around
    q = round_to_nearest(w, Grid(bits, group, kind))
    expected = rounded_by_loops(w.numpy(), bits, 384 if group == "row" else group, kind)
    # a tie may fall either way in the last bit of float32; a wrong formula would move far more
    assert (np.abs(q.weight.numpy() - expected) < 1e-6).mean() > 0.999
    assert q.codes.max() <= 2**bits - 1
    assert q.scale.shape == (6, 1 if group == "row" else 384 // group)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("clip", ["none", "squared"])
def test_zero_is_a_level_even_where_no_weight_is_near_it(bits, kind, clip):
    w = normal(4, 64).abs() + 1  # all weights about 1
    w[:, ::8] = 0
    q = round_to_nearest(w, Grid(bits, 32, kind), clip)
    assert (q.weight[:, ::8] == 0).all()
    assert q.weight[:, 1].min() > 0.5  # and the others did not go with it


def test_a_floating_minimum_has_no_zero():
    w = normal(4, 64).abs() + 1
    w[:, 0] = 0.003
    assert not (round_to_nearest(w, Grid(2, 64, "minimum")).weight == 0).any()
    assert not Grid(2, 64, "minimum").holds_zero


@pytest.mark.parametrize("kind", GRIDS)
def test_scales_are_float16_numbers(kind):
    q = round_to_nearest(normal(16, 128), Grid(3, 32, kind), "squared")
    assert torch.equal(q.scale, q.scale.half().float())
    assert torch.equal(q.offset, q.offset.half().float())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_takes_the_best_of_all_ranges(kind, bits):
    w, grid = normal(40, 64, seed=3), Grid(bits, 64, kind)
    plain, clipped = ((w - round_to_nearest(w, grid, clip).weight).square().sum(1) for clip in ("none", "squared"))
    assert (clipped <= plain).all()
    assert clipped.sum() < 0.97 * plain.sum()
    if kind == "symmetric":  # every candidate tried by hand
        best = torch.full((40,), torch.inf)
        for k in range(31):
            scale = ((1 - 0.02 * k) * 2 / (2**bits - 1) * w.abs().amax(1, keepdim=True)).half().float()
            new = (w / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
            best = torch.minimum(best, (w - new).square().sum(1))
        assert torch.allclose(clipped, best)


@pytest.mark.parametrize("around", [1.0, -1.0])
def test_weights_of_one_sign_are_clipped_towards_zero(around):
    w, grid = normal(8, 64) + around, Grid(4, 64, "asymmetric")
    for clip in ("none", "squared"):
        q = round_to_nearest(w, grid, clip)
        assert (q.offset == (0 if around > 0 else 15)).all()  # zero is the level at the end
        assert (q.weight - w).abs().max() <= q.scale.max()


def test_weighted_clipping_serves_the_weights_that_count():
    w, grid = normal(40, 64, seed=5), Grid(2, 64)
    importance = torch.ones(64)
    importance[:8] = 1000
    plain, weighted = (round_to_nearest(w, grid, clip, importance).weight for clip in ("squared", "weighted"))

    def error(new):
        return ((w - new).square() * importance).sum()

    assert error(weighted) < 0.9 * error(plain)


def test_groups_do_not_know_of_each_other():
    w = normal(4, 128)
    changed = w.clone()
    changed[:, 64:] *= 7
    a, b = (round_to_nearest(x, Grid(4, 64), "squared").weight for x in (w, changed))
    assert torch.equal(a[:, :64], b[:, :64])
    assert not torch.equal(a[:, 64:], b[:, 64:])


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("value", [0.0, 0.25, -1e-9, 1e5])
def test_groups_of_one_value(kind, value):
    q = round_to_nearest(torch.full((2, 32), value), Grid(4, 32, kind), "squared")
    assert torch.isfinite(q.weight).all()
    if kind == "minimum" and value < 60000:
        assert torch.equal(q.weight, torch.full((2, 32), value).half().float())
    if value == 0:
        assert not q.weight.any()


def test_an_integer_zero_costs_a_quarter_step_on_a_grid_with_a_floating_minimum():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(400, 1, generator=generator) * 0.01 + 0.002
    codes = torch.randint(0, 16, (400, 32), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 15
    w = codes * scale.half().float() - ((7 + torch.rand(400, 1, generator=generator)) * scale).half().float()
    assert torch.equal(round_to_nearest(w, Grid(4, 32, "minimum")).weight, w)
    q = round_to_nearest(w, Grid(4, 32, "asymmetric"))
    steps = ((q.weight - w).abs() / q.scale)[(codes > 0) & (codes < 15)]  # the ends may be cut off as well
    assert abs(steps.mean() - 0.25) < 0.02  # uniform between 0 and half a step: what chance gives


@pytest.mark.embedded
def test_a_floating_minimum_reproduces_the_embedded_checkpoint(embedded_subject):
    """Its projections lie on Q4_1: groups of 32, fp16 scale and minimum."""
    steps = []
    for i in (0, 15, 29):
        for linear in embedded_subject.linears(i).values():
            w = linear.weight
            assert torch.equal(round_to_nearest(w, Grid(4, 32, "minimum")).weight, w)
            q = round_to_nearest(w, Grid(4, 32, "asymmetric"))
            steps.append(((q.weight - w).abs().view(len(w), -1, 32).mean(2) / q.scale).mean())
    assert abs(torch.stack(steps).mean() - 0.25) < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "1 bits: 1 bit needs another method, expected 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 16}, "16 bits: 16 bits are what the weights have already, expected 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": 9}, "9 bits: expected 2, 3, 4, 5, 6, 7, 8"),
        (
            {"kind": "symetric"},
            "unknown grid 'symetric': did you mean 'symmetric'? expected one of symmetric, asymmetric, minimum",
        ),
        ({"group": 1}, "group '1': expected at least 2 weights, or 'row' for a whole row"),
        ({"group": "rows"}, "group 'rows': expected at least 2 weights, or 'row' for a whole row"),
    ],
)
def test_bad_grids(settings, message):
    with pytest.raises(BadInput) as error:
        Grid(**settings)
    assert str(error.value) == message


def test_a_group_that_does_not_divide_says_what_does():
    inputs = {"q_proj": 576, "down_proj": 1536}
    Grid(4, 64).check(inputs)
    Grid(4, "row").check(inputs)
    with pytest.raises(BadInput) as error:
        Grid(4, 128).check(inputs)
    assert str(error.value) == (
        "group 128 does not divide the rows of q_proj (576 inputs): 8, 12, 16, 24, 32, 48, 64, 96, 192 divide "
        "all rows here, and 'row' always fits"
    )
    with pytest.raises(BadInput, match="unknown clip 'mse': expected one of none, squared, weighted"):
        Grid().fit(torch.ones(1, 4), "mse")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_come_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, bits, count), codes)
    assert len(packed) == packed_length(bits, count)
    assert len(packed) <= -(-count * bits // 8) + 2  # no more than a byte begun for each part


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_where_the_layout_says(bits):
    """Each code is cut into parts of 4, 2 and 1 bits, the lowest part first; all of a part stand before the next."""
    codes = [(37 * i + 11) % 2**bits for i in range(21)]
    expected, low = [], 0
    for width in [w for w in (8, 4, 2, 1) if bits & w]:
        string = "".join(f"{code >> low & (1 << width) - 1:0{width}b}"[::-1] for code in codes)
        expected += [int(string[at : at + 8][::-1], 2) for at in range(0, len(string), 8)]
        low += width
    assert pack_bits(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_bits_are_dense_and_in_order():
    assert len(pack_bits(torch.zeros(576 * 64, dtype=torch.uint8), 3)) * 8 == 3 * 576 * 64
    # 2 low bits of 5, 6, 7, 0 in one byte: 01 10 11 00 from the right; their high bits 1, 1, 1, 0 in another
    assert pack_bits(torch.tensor([5, 6, 7, 0], dtype=torch.uint8), 3).tolist() == [0b00_11_10_01, 0b0111]
