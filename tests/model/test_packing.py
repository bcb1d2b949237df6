import itertools
import math

import numpy as np
import pytest
import torch

from thesislib.errors import BadInput
from thesislib.model.packing import (
    THESIS_PATTERNS,
    Pattern,
    most_kept,
    pack,
    pack_bitmap,
    pack_nm,
    predicted_bytes,
    smallest,
    unpack,
    unpack_bitmap,
    unpack_nm,
)

TYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
)


def bits(weight):
    """The weight's bytes, so that NaN equals itself and -0.0 is not 0.0."""
    return weight.contiguous().view(torch.uint8)


def masked(pattern, rows=5, columns=48, dtype=torch.float32, seed=0):
    """Random bits of any kind (NaN, infinity and -0.0 among them), `remove` of each `of` zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, (rows, columns * dtype.itemsize), generator=generator, dtype=torch.uint8).view(dtype)
    order = torch.rand(rows, columns // pattern.of, pattern.of, generator=generator).argsort(-1)
    integers = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    integers.view(rows, columns // pattern.of, pattern.of).scatter_(-1, order[..., : pattern.remove], 0)
    return weight


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("pattern", THESIS_PATTERNS, ids=str)
def test_patterns_come_back_bit_for_bit(pattern, dtype):
    weight = masked(pattern, dtype=dtype)
    values, codes = pack_nm(weight, pattern)
    assert values.shape == (5, 48 // pattern.of * pattern.keep) and values.dtype == dtype
    assert len(codes) == math.ceil(5 * 48 / pattern.of / 8) * pattern.bits and codes.dtype == torch.uint8
    assert torch.equal(bits(unpack_nm(values, codes, pattern)), bits(weight))


@pytest.mark.parametrize("pattern", THESIS_PATTERNS, ids=str)
def test_codes_are_ranks_in_the_table_of_combinations_in_the_fewest_bits(pattern):
    table = list(itertools.combinations(range(pattern.of), pattern.keep))
    assert len(table) == pattern.states and 2 ** (pattern.bits - 1) < len(table) <= 2**pattern.bits
    weight = masked(pattern)
    weight[weight == 0] = 0  # -0.0 would count as kept
    number = 0
    for i, group in enumerate(weight.reshape(-1, pattern.of).view(torch.int32)):
        kept = list(group.nonzero()[:, 0])
        kept = sorted({*map(int, kept), *[j for j in range(pattern.of) if j not in kept][: pattern.keep - len(kept)]})
        number |= table.index(tuple(kept)) << (i * pattern.bits)
    _, codes = pack_nm(weight, pattern)
    assert int.from_bytes(bytes(codes.tolist()), "little") == number


def test_bits_of_the_nine():
    assert {str(p): p.bits for p in THESIS_PATTERNS} == {
        "1:2": 1,
        "2:4": 3,
        "3:4": 2,
        "1:8": 3,
        "4:8": 7,
        "6:8": 5,
        "1:16": 4,
        "8:16": 14,
        "12:16": 11,
    }


def test_special_values_and_places_survive():
    weight = torch.tensor([[-0.0, 0.0, float("nan"), 0.0, float("inf"), -float("inf"), 0.0, 0.0]])
    weight.view(torch.int32)[0, 2] = 0x7FC12345  # a NaN with a message in it
    for encoding in ("2:4", "4:8", "bitmap", "dense"):
        assert torch.equal(bits(unpack(pack(weight, encoding), encoding, weight.shape)), bits(weight)), encoding


def test_all_combinations_of_the_largest_table():
    """8 of 16 has 12,870 places: each once, so that no two share a code."""
    places = torch.tensor(list(itertools.combinations(range(16), 8)))
    weight = torch.zeros(len(places), 16, dtype=torch.int8).scatter_(1, places, 1)
    values, codes = pack_nm(weight, Pattern(8, 16))
    assert torch.equal(unpack_nm(values, codes, Pattern(8, 16)), weight)


@pytest.mark.parametrize("rows", (0, 1, 2, 7, 8, 9))
def test_any_number_of_groups(rows):
    weight = masked(Pattern(2, 4), rows=rows, columns=4)
    values, codes = pack_nm(weight, Pattern(2, 4))
    assert torch.equal(bits(unpack_nm(values, codes, Pattern(2, 4))), bits(weight))


def test_groups_with_more_zeros_than_needed_and_transposed_memory():
    weight = masked(Pattern(2, 4), rows=16, columns=16)
    weight = torch.where(torch.arange(16) % 4 < 2, weight, 0).T.contiguous().T
    assert not weight.is_contiguous() and most_kept(weight, 4) <= 2 and (weight != 0).sum() < 100
    for pattern in (Pattern(2, 4), Pattern(4, 8), Pattern(8, 16)):
        assert torch.equal(bits(unpack_nm(*pack_nm(weight, pattern), pattern)), bits(weight))
    zeros = torch.zeros(2, 16)
    assert smallest(zeros) == "bitmap" and torch.equal(unpack(pack(zeros, "bitmap"), "bitmap", (2, 16)), zeros)
    assert torch.equal(unpack(pack(zeros, "8:16"), "8:16", (2, 16)), zeros)


def test_a_group_with_too_many_weights_is_refused_by_its_place():
    weight = masked(Pattern(2, 4))
    weight[3, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(
        BadInput, match=r"row 3, inputs 8 to 11 hold 3 non-zero weights and cannot be packed 2:4: expected at most 2"
    ):
        pack_nm(weight, Pattern(2, 4))


def test_ragged_rows_and_wide_types_are_refused():
    with pytest.raises(BadInput, match=r"rows of 30 inputs cannot be packed 2:4: expected a multiple of 4"):
        pack_nm(torch.zeros(2, 30), Pattern(2, 4))
    with pytest.raises(BadInput, match=r"rows of 30 inputs cannot be packed 8:16: expected a multiple of 16"):
        predicted_bytes((2, 30), torch.float32, "8:16")
    with pytest.raises(BadInput, match=r"torch.complex128 cannot be packed: expected a type of at most 8 bytes"):
        pack_bitmap(torch.zeros(1, 2, dtype=torch.complex128))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-4", "pattern '2-4' is not understood: expected removed:of, e.g. '2:4'"),
        ("bitmaps", "pattern 'bitmaps' is not understood"),
        ("4:4", "pattern '4:4' removes 4 of 4: expected at least 1 and fewer than all, e.g. '2:4'"),
        ("0:8", "pattern '0:8' removes nothing"),
        ("0:0", "pattern '0:0' removes nothing: expected at least 1 and fewer than all, e.g. '1:2'"),
        ("8:32", "pattern '8:32' has groups of 32: expected at most 16, e.g. '4:16'"),
    ],
)
def test_patterns_that_cannot_be(text, message):
    with pytest.raises(BadInput) as caught:
        Pattern.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("share", (0.0, 0.03, 0.5, 1.0))
def test_bitmaps_come_back_bit_for_bit(share, dtype):
    weight = torch.randint(
        0, 256, (5, 7 * dtype.itemsize), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ).view(dtype)
    integers = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    integers[torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < share] = 0
    values, bitmap = pack_bitmap(weight)
    assert bitmap.tolist() == np.packbits((integers != 0).numpy(), bitorder="little").tolist()
    assert torch.equal(bits(values), bits(weight[integers != 0]))
    assert torch.equal(bits(unpack_bitmap(values, bitmap, (5, 7))), bits(weight))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_predicted_bytes_are_the_bytes(dtype):
    for pattern in THESIS_PATTERNS:
        weight = masked(pattern, rows=9, columns=48, dtype=dtype)
        nonzero = int((weight.view(torch.int16 if dtype.itemsize == 2 else torch.int32) != 0).sum())
        for encoding in (str(pattern), "bitmap", "dense"):
            actual = sum(tensor.nbytes for tensor in pack(weight, encoding).values())
            assert predicted_bytes((9, 48), dtype, encoding, nonzero) == actual, encoding


def test_w2_4_in_bfloat16_takes_35_of_64_bits():
    assert predicted_bytes((1536, 576), torch.bfloat16, "2:4") / (1536 * 576 * 2) == 35 / 64 <= 0.60


@pytest.mark.parametrize("pattern", THESIS_PATTERNS, ids=str)
def test_the_smallest_encoding_is_found_from_the_weights(pattern):
    weight = masked(pattern, rows=16, columns=64, dtype=torch.bfloat16)
    sizes = {encoding: sum(t.nbytes for t in pack(weight, encoding).values()) for encoding in ("dense", "bitmap")}
    for other in THESIS_PATTERNS:
        try:
            sizes[str(other)] = sum(t.nbytes for t in pack(weight, str(other)).values())
        except BadInput:
            continue
    assert smallest(weight) == min(sizes, key=sizes.get) == str(pattern)


def test_the_smallest_encoding_of_other_weights():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert smallest(weight) == "dense"
    assert (
        smallest(weight.masked_fill(torch.rand(32, 64, generator=torch.Generator().manual_seed(1)) < 0.5, 0))
        == "bitmap"
    )
    weight[:, ::8] = 0
    assert smallest(weight) == "1:8"
    assert smallest(weight[:, :63]) == "bitmap"  # no group divides 63
    weight[5, 8] = 1
    assert smallest(weight) == "bitmap"  # one group too full


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_same_on_a_gpu():
    for pattern in THESIS_PATTERNS:
        weight = masked(pattern, dtype=torch.bfloat16)
        for encoding in (str(pattern), "bitmap"):
            here, there = pack(weight, encoding), pack(weight.cuda(), encoding)
            assert all(torch.equal(bits(here[name]), bits(there[name].cpu())) for name in here)
            assert torch.equal(bits(unpack(there, encoding, weight.shape).cpu()), bits(weight))
