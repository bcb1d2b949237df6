"""Lossless packing of pruned weights: the values that are kept, and their positions.

- A pattern N:M (in this study removed:of): each group of `of` consecutive inputs keeps the same number of values. Their
  positions are one of (of choose kept) combinations, whose number is stored in the fewest whole bits. W2:4 in bfloat16
  takes 2 x 16 + 3 bits instead of 64.
- A bitmap, for unstructured zeros: one bit a weight, 1 where its value is kept.

Zero means that all bits are zero. -0.0 is kept, so every weight is unpacked exactly.
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

LARGEST = 16  # group of a pattern: 8 of 16 has 12,870 combinations, 16 of 32 would have 601 million
PRUNED = 1 / 64  # a weight matrix with a larger share of zeros has been pruned: a trained one has next to none
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pattern(NamedTuple):
    """A pattern of zeros: `remove` of each `of` consecutive inputs of a row are zero.

    1:8 keeps 7 of 8. 2:4 is NVIDIA's 2:4 too, although NVIDIA counts the kept ones.
    """

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
            count = "nothing" if remove == 0 else f"{remove} of {of}"
            raise BadInput(
                f"pattern '{text}' removes {count}: expected at least 1 and fewer than all, e.g. "
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
        """The values that a group keeps."""
        return self.of - self.remove

    @property
    def states(self) -> int:
        """The number of combinations of positions that the kept values of a group can have."""
        return comb(self.of, self.keep)

    @property
    def bits(self) -> int:
        """The bits of a combination's number."""
        return (self.states - 1).bit_length()


_REMOVED = {2: (1,), 4: (2, 3), 8: (1, 4, 6), 16: (1, 8, 12)}
THESIS_PATTERNS = tuple(
    Pattern.parse(text) for text in ("1:2", "2:4", "3:4", "1:8", "4:8", "6:8", "1:16", "8:16", "12:16")
)


def pack_nm(weight: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values of a weight, and their positions.

    Args:
        weight: (rows, columns) of any dtype of up to 8 bytes. A group with fewer than `keep` values keeps some zeros.
        pattern: that the weight obeys.

    Returns:
        values (rows, columns / of * keep) of the same dtype, and codes (uint8). A group's code is the number of its
        combination in lexicographic order. It has `bits` bits, least significant first. Eight groups fill `bits`
        bytes; the last eight are padded.

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
    values = groups[kept].view(rows, columns // pattern.of * pattern.keep).view(weight.dtype)
    return values, _bytes(F.pad(bits, (0, 0, 0, -len(bits) % 8)))


def unpack_nm(values: torch.Tensor, codes: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The weight (rows, columns) that `pack_nm` packed, exactly."""
    rows, columns = values.shape
    groups = values.numel() // pattern.keep
    joined = next(n for n in (4, 2, 1) if n * pattern.bits <= 14)  # groups in one table look-up: up to twice as fast
    numbers = _codes(codes, pattern.bits, joined)[: ceil(groups / joined)]
    positions = _joined_positions(pattern, joined, values.device).index_select(0, numbers)
    kept = _integers(values).view(-1)  # as 16-bit floating numbers NaN would lose its payload
    kept = F.pad(kept, (0, positions.numel() - len(kept))).view(positions.shape)
    weight = torch.zeros(len(positions), joined * pattern.of, dtype=kept.dtype, device=kept.device)
    weight.scatter_(1, positions, kept)
    return weight.view(-1)[: groups * pattern.of].view(rows, columns // pattern.keep * pattern.of).view(values.dtype)


def pack_bitmap(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that are not zero, (kept,) row by row, and a uint8 bitmap, least significant bit first."""
    flat = _integers(weight).view(-1)
    kept = flat != 0
    return flat[kept].view(weight.dtype), _bytes(F.pad(kept, (0, -len(kept) % 8)))


def unpack_bitmap(values: torch.Tensor, bitmap: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The weight of this shape that `pack_bitmap` packed, exactly."""
    kept = _byte_bits(values.device).index_select(0, bitmap.int()).view(torch.bool)[: prod(shape)]
    integers = _integers(values)
    weight = torch.zeros(prod(shape), dtype=integers.dtype, device=integers.device).masked_scatter_(kept, integers)
    return weight.view(*shape).view(values.dtype)


# An encoding's name is "dense", "bitmap", or a pattern such as "2:4".


def pack(weight: torch.Tensor, encoding: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight in an encoding: "weight"; "values" and "bitmap"; or "values" and "codes"."""
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


def check_positions(tensors: dict[str, torch.Tensor], encoding: str, name: str) -> None:
    """Raises BadInput if packed tensors of the right shapes, read from a file, have positions that do not exist."""
    if encoding == "bitmap":
        bitmap, values = tensors["bitmap"], len(tensors["values"])
        positions = int(_byte_bits(bitmap.device)[bitmap.int()].view(torch.uint8).sum())
        if positions != values:
            raise BadInput(f"'{name}.bitmap' names {positions} places for {values} values")
    elif encoding != "dense":
        pattern = Pattern.parse(encoding)
        if tensors["codes"].numel() and _codes(tensors["codes"], pattern.bits).max() >= pattern.states:
            raise BadInput(f"'{name}.codes' names places that {encoding} does not have")


def packed_shapes(shape: Sequence[int], encoding: str, nonzero: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `pack` gives.

    Args:
        shape: of the weight.
        encoding: its encoding.
        nonzero: weights that are not zero, needed for "bitmap".

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
    """The exact bytes of a weight of this shape in an encoding, see `packed_shapes`."""
    return sum(
        prod(s) * (1 if name in ("codes", "bitmap") else dtype.itemsize)
        for name, s in packed_shapes(shape, encoding, nonzero).items()
    )


def smallest(weight: torch.Tensor) -> str:
    """The encoding of a weight with the fewest bytes: "dense", "bitmap", or a pattern that all its groups obey.

    It depends on the weight alone, so nothing needs to remember how it was pruned.
    """
    options = {"dense": None, "bitmap": int(nonzero_bits(weight).sum())}
    for of in (2, 4, 8, 16):
        if weight.shape[1] % of == 0 and (remove := of - max(most_kept(weight, of), 1)):
            options[f"{remove}:{of}"] = None
    return min(options, key=lambda encoding: predicted_bytes(weight.shape, weight.dtype, encoding, options[encoding]))


def nonzero_bits(weight: torch.Tensor) -> torch.Tensor:
    """Booleans of a weight's shape: True where any bit is set, so for -0.0 too."""
    return _integers(weight) != 0


def most_kept(weight: torch.Tensor, of: int) -> int:
    """The largest number of non-zero weights in any group of `of` consecutive inputs."""
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
    """Zeros and ones, a multiple of eight of them, packed into bytes."""
    return (bits.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def _codes(codes: torch.Tensor, bits: int, joined: int = 1) -> torch.Tensor:
    """Codes of `bits` bits unpacked, `joined` (1, 2 or 4) neighbours as one number: (padded codes / joined,) int64."""
    eights = F.pad(codes.view(-1, bits), (0, 8))
    shifts = torch.arange(0, 4, joined, device=codes.device) * bits
    halves = []
    for half in (0, 1):  # four codes fit into a word of 64 bits: 4 x 14 and half a byte
        byte, bit = divmod(4 * bits * half, 8)
        word = eights[:, byte : byte + 8].clone(memory_format=torch.contiguous_format).view(torch.int64)
        halves.append(word >> shifts + bit & (1 << bits * joined) - 1)
    return torch.cat(halves, 1).view(-1)


@cache
def _positions(pattern: Pattern, device: torch.device) -> torch.Tensor:
    """(states, keep): the positions of every combination, in lexicographic order."""
    return torch.tensor(list(itertools.combinations(range(pattern.of), pattern.keep)), device=device)


@cache
def _joined_positions(pattern: Pattern, joined: int, device: torch.device) -> torch.Tensor:
    """(2^(joined x bits), joined x keep): the positions in `joined` neighbouring groups, by their joined codes."""
    unused = (1 << pattern.bits) - pattern.states  # codes without a combination
    positions = F.pad(_positions(pattern, device), (0, 0, 0, unused))
    codes = torch.arange(1 << joined * pattern.bits, device=device)
    return torch.cat(
        [positions[codes >> k * pattern.bits & (1 << pattern.bits) - 1] + k * pattern.of for k in range(joined)], 1
    )


@cache
def _ranks(pattern: Pattern, device: torch.device) -> torch.Tensor:
    """(2^of,): the number of each combination, by the binary number with a 1 at each of its positions."""
    ranks = torch.zeros(1 << pattern.of, dtype=torch.int64, device=device)
    ranks[(1 << _positions(pattern, device)).sum(1)] = torch.arange(pattern.states, device=device)
    return ranks


@cache
def _byte_bits(device: torch.device) -> torch.Tensor:
    """(256,): for each byte its eight bits as eight bytes, viewed as int64."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1)
