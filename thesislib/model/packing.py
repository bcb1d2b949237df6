"""Sparse weights in fewer bytes, bit for bit: the values that are kept, and where they stand.

N:M, here removed:of as everywhere in this study: each run of `of` consecutive inputs keeps the same number of values,
and one of (of choose kept) places for them, written in the fewest whole bits. W2:4 in bfloat16 takes 2 x 16 + 3 of 64
bits. Unstructured: one bit a weight says whether its value follows.

Zero means all bits zero: -0.0 is kept, so that every weight comes back as it was.
"""

import itertools
import re
from collections.abc import Sequence
from functools import cache
from math import ceil, comb, prod
from typing import NamedTuple

import torch
from torch.nn import functional as F

from thesislib.errors import BadInput

LARGEST = 16  # of a pattern: the table of 8 of 16 has 12,870 rows, of 16 of 32 it would have 601 million
PRUNED = 1 / 64  # a weight with more zeros than this share has been pruned: a trained one has next to none
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pattern(NamedTuple):
    """`remove` of each `of` consecutive inputs of a row are zero. 2:4 at half density is also NVIDIA's 2:4; 1:8 keeps
    7."""

    remove: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """The pattern that "2:4" writes.

        Raises:
            BadInput: not two numbers, all or none removed, or a group of more than 16.
        """
        match = re.fullmatch(r"(\d+):(\d+)", str(text))
        if not match:
            raise BadInput(f"pattern '{text}' is not understood: expected removed:of, e.g. '2:4'")
        remove, of = map(int, match.groups())
        if not 0 < remove < of:
            what = "nothing" if remove == 0 else f"{remove} of {of}"
            raise BadInput(
                f"pattern '{text}' removes {what}: expected at least 1 and fewer than all, e.g. "
                f"'{max(of // 2, 1)}:{max(of, 2)}'"
            )
        if of > LARGEST:
            raise BadInput(
                f"pattern '{text}' has groups of {of}: expected at most {LARGEST}, e.g. "
                f"'{ceil(remove * LARGEST / of)}:{LARGEST}'"
            )
        return cls(remove, of)

    def __str__(self) -> str:
        return f"{self.remove}:{self.of}"

    @property
    def keep(self) -> int:
        """How many values of a group stay."""
        return self.of - self.remove

    @property
    def states(self) -> int:
        """How many places there are for them."""
        return comb(self.of, self.keep)

    @property
    def bits(self) -> int:
        """The fewest whole bits that tell the states apart."""
        return (self.states - 1).bit_length()


NINE = tuple(Pattern.parse(text) for text in ("1:2", "2:4", "3:4", "1:8", "4:8", "6:8", "1:16", "8:16", "12:16"))


def pack_nm(weight: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values of a weight, and the places they had.

    Args:
        weight: (rows, columns) of any type of up to 8 bytes. A group with fewer than `keep` values keeps some zeros.
        pattern: how many of each group are zero.

    Returns:
        values (rows, columns / of * keep) of the same type, and codes (uint8): each group's row in the lexicographic
        table of combinations, `bits` bits each, least significant first; eight groups fill `bits` bytes, the last eight
        padded.

    Raises:
        BadInput: columns that are no multiple of `of`; a group with more than `keep` values.
    """
    rows, columns = weight.shape
    _check_columns(columns, pattern)
    groups = _integers(weight).view(rows * columns // pattern.of, pattern.of)
    kept = groups != 0
    count = kept.sum(1, keepdim=True)
    if (count > pattern.keep).any():
        row, group = divmod(int((count[:, 0] > pattern.keep).nonzero()[0]), columns // pattern.of)
        first, n = group * pattern.of, int(count.view(rows, -1)[row, group])
        where = f"row {row}, inputs {first} to {first + pattern.of - 1}"
        raise BadInput(
            f"{where} hold {n} non-zero weights and cannot be packed {pattern}: expected at most {pattern.keep}; "
            "mask the weight first"
        )
    zero = ~kept
    kept |= zero & (zero.cumsum(1) <= pattern.keep - count)
    ranks = _ranks(pattern, weight.device)[(kept << torch.arange(pattern.of, device=weight.device)).sum(1)]
    bits = ranks[:, None] >> torch.arange(pattern.bits, device=weight.device) & 1
    return groups[kept].view(rows, columns // pattern.of * pattern.keep).view(weight.dtype), _bytes(
        F.pad(bits, (0, 0, 0, -len(bits) % 8))
    )


def unpack_nm(values: torch.Tensor, codes: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The weight (rows, columns) that `pack_nm` packed, bit for bit."""
    rows, columns = values.shape
    groups = values.numel() // pattern.keep
    joined = next(
        n for n in (4, 2, 1) if n * pattern.bits <= 14
    )  # one look into a table for several groups: up to twice as fast
    places = _joined_places(pattern, joined, values.device).index_select(
        0, _codes(codes, pattern.bits, joined)[: ceil(groups / joined)]
    )
    kept = _integers(values).view(-1)  # as floating numbers of 16 bits NaN would lose its payload
    kept = F.pad(kept, (0, places.numel() - len(kept))).view(places.shape)
    weight = torch.zeros(len(places), joined * pattern.of, dtype=kept.dtype, device=kept.device).scatter_(
        1, places, kept
    )
    return weight.view(-1)[: groups * pattern.of].view(rows, columns // pattern.keep * pattern.of).view(values.dtype)


def pack_bitmap(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values (kept,), bitmap (uint8)): what is not zero, row by row, and one bit a weight, least significant first."""
    flat = _integers(weight).view(-1)
    kept = flat != 0
    return flat[kept].view(weight.dtype), _bytes(F.pad(kept, (0, -len(kept) % 8)))


def unpack_bitmap(values: torch.Tensor, bitmap: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The weight of this shape that `pack_bitmap` packed, bit for bit."""
    kept = _byte_bits(values.device).index_select(0, bitmap.int()).view(torch.bool)[: prod(shape)]
    integers = _integers(values)
    weight = torch.zeros(prod(shape), dtype=integers.dtype, device=integers.device).masked_scatter_(kept, integers)
    return weight.view(*shape).view(values.dtype)


# An encoding is written as text: "dense", "bitmap", or a pattern such as "2:4".


def pack(weight: torch.Tensor, encoding: str) -> dict[str, torch.Tensor]:
    """The tensors that hold a weight in this encoding: "weight"; "values" and "bitmap"; or "values" and "codes"."""
    if encoding == "dense":
        return {"weight": weight}
    if encoding == "bitmap":
        return dict(zip(("values", "bitmap"), pack_bitmap(weight), strict=True))
    return dict(zip(("values", "codes"), pack_nm(weight, Pattern.parse(encoding)), strict=True))


def unpack(tensors: dict[str, torch.Tensor], encoding: str, shape: Sequence[int]) -> torch.Tensor:
    """The weight of this shape that `pack` packed."""
    if encoding == "dense":
        return tensors["weight"]
    if encoding == "bitmap":
        return unpack_bitmap(tensors["values"], tensors["bitmap"], shape)
    return unpack_nm(tensors["values"], tensors["codes"], Pattern.parse(encoding))


def check_places(tensors: dict[str, torch.Tensor], encoding: str, name: str) -> None:
    """Raises BadInput if packed tensors of the right shapes, read from a file, name places that cannot be."""
    if encoding == "bitmap":
        places, values = (
            int(_byte_bits(tensors["bitmap"].device)[tensors["bitmap"].int()].view(torch.uint8).sum()),
            len(tensors["values"]),
        )
        if places != values:
            raise BadInput(f"'{name}.bitmap' names {places} places for {values} values")
    elif encoding != "dense":
        pattern = Pattern.parse(encoding)
        if tensors["codes"].numel() and _codes(tensors["codes"], pattern.bits).max() >= pattern.states:
            raise BadInput(f"'{name}.codes' names places that {encoding} does not have")


def packed_shapes(shape: Sequence[int], encoding: str, nonzero: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `pack` gives; "bitmap" needs to know how many weights are not zero.

    Raises:
        BadInput: columns that are no multiple of the pattern's group.
    """
    rows, columns = shape
    if encoding == "dense":
        return {"weight": (rows, columns)}
    if encoding == "bitmap":
        return {"values": (nonzero,), "bitmap": (ceil(rows * columns / 8),)}
    pattern = Pattern.parse(encoding)
    _check_columns(columns, pattern)
    return {
        "values": (rows, columns // pattern.of * pattern.keep),
        "codes": (ceil(rows * columns // pattern.of / 8) * pattern.bits,),
    }


def predicted_bytes(shape: Sequence[int], dtype: torch.dtype, encoding: str, nonzero: int | None = None) -> int:
    """How many bytes a weight of this shape takes in this encoding, exactly."""
    return sum(
        prod(s) * (1 if name in ("codes", "bitmap") else dtype.itemsize)
        for name, s in packed_shapes(shape, encoding, nonzero).items()
    )


def smallest(weight: torch.Tensor) -> str:
    """The encoding that holds a weight in the fewest bytes: "dense", "bitmap", or the pattern that all its groups obey.

    A property of the weight, so nothing has to remember how it was pruned.
    """
    options = {"dense": None, "bitmap": int(nonzero_bits(weight).sum())}
    for of in (2, 4, 8, 16):
        if weight.shape[1] % of == 0 and (remove := of - max(most_kept(weight, of), 1)):
            options[f"{remove}:{of}"] = None
    return min(options, key=lambda encoding: predicted_bytes(weight.shape, weight.dtype, encoding, options[encoding]))


def nonzero_bits(weight: torch.Tensor) -> torch.Tensor:
    """Where a weight has a bit set: booleans of its shape, True for -0.0 too."""
    return _integers(weight) != 0


def most_kept(weight: torch.Tensor, of: int) -> int:
    """The largest number of weights that are not zero in a group of `of` consecutive inputs."""
    counts = nonzero_bits(weight).view(-1, of).sum(1, dtype=torch.uint8)
    return int(counts.max()) if counts.numel() else 0


def _check_columns(columns: int, pattern: Pattern) -> None:
    """Raises BadInput if groups do not divide a row."""
    if columns % pattern.of:
        raise BadInput(f"rows of {columns} inputs cannot be packed {pattern}: expected a multiple of {pattern.of}")


def _integers(weight: torch.Tensor) -> torch.Tensor:
    """The bits of a weight as integers of its size."""
    if weight.dtype.itemsize not in _INTEGERS:
        raise BadInput(f"weights of type {weight.dtype} cannot be packed: expected a type of at most 8 bytes")
    return weight.detach().contiguous().view(_INTEGERS[weight.dtype.itemsize])


def _bytes(bits: torch.Tensor) -> torch.Tensor:
    """Zeros and ones, a multiple of eight of them, as bytes."""
    return (bits.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def _codes(codes: torch.Tensor, bits: int, joined: int = 1) -> torch.Tensor:
    """Codes of `bits` bits out of their bytes, `joined` (1, 2 or 4) of them to a number: (padded codes / joined,)
    int64."""
    eights = F.pad(codes.view(-1, bits), (0, 8))
    shifts = torch.arange(0, 4, joined, device=codes.device) * bits
    halves = []
    for half in (0, 1):  # four codes fit into a word of 64 bits: 4 x 14 and half a byte
        byte, bit = divmod(4 * bits * half, 8)
        word = eights[:, byte : byte + 8].clone(memory_format=torch.contiguous_format).view(torch.int64)
        halves.append(word >> shifts + bit & (1 << bits * joined) - 1)
    return torch.cat(halves, 1).view(-1)


@cache
def _places(pattern: Pattern, device: torch.device) -> torch.Tensor:
    """(states, keep): the lexicographic table of combinations."""
    return torch.tensor(list(itertools.combinations(range(pattern.of), pattern.keep)), device=device)


@cache
def _joined_places(pattern: Pattern, joined: int, device: torch.device) -> torch.Tensor:
    """(2^(joined x bits), joined x keep): the places of `joined` neighbouring groups, by their codes one after the
    other."""
    places = F.pad(
        _places(pattern, device), (0, 0, 0, (1 << pattern.bits) - pattern.states)
    )  # codes that are not used too
    codes = torch.arange(1 << joined * pattern.bits, device=device)
    return torch.cat(
        [places[codes >> k * pattern.bits & (1 << pattern.bits) - 1] + k * pattern.of for k in range(joined)], 1
    )


@cache
def _ranks(pattern: Pattern, device: torch.device) -> torch.Tensor:
    """(2^of,): a group's row in that table, by the number that its kept places make in binary."""
    ranks = torch.zeros(1 << pattern.of, dtype=torch.int64, device=device)
    ranks[(1 << _places(pattern, device)).sum(1)] = torch.arange(pattern.states, device=device)
    return ranks


@cache
def _byte_bits(device: torch.device) -> torch.Tensor:
    """(256,) int64: the eight bits of each byte, as eight bytes."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)
