"""Integers of 1 to 8 bits packed into bytes, with no unused bits in between."""

from functools import cache

import torch
from torch.nn import functional as F


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into (n,) bytes, the first code in the lowest bits.

    Where `bits` does not divide 8, codes are split: 3 bits into 2 and 1. All low parts come first, then all high parts.

    Args:
        codes: uint8 of any shape, each below 2^bits.
        bits: of a code.

    >>> pack_bits(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist()
    [33, 15]
    """
    codes = codes.reshape(-1)
    parts = []
    for low, width in _parts(bits):
        part = codes >> low & (1 << width) - 1
        part = F.pad(part, (0, -len(part) % (8 // width))).view(-1, 8 // width)
        parts.append((part << _shifts(width, codes.device)).sum(1, dtype=torch.uint8))
    return torch.cat(parts)


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The (count,) uint8 codes that `pack_bits` packed."""
    start, codes = 0, None
    for low, width in _parts(bits):
        size = -(-count * width // 8)
        part = packed[start : start + size]
        if width < 8:  # a look-up table is many times as fast as shifts
            part = _table(width, packed.device).index_select(0, part.int()).view(torch.uint8)[:count]
        codes = part if codes is None else codes | part << low
        start += size
    return codes


def packed_length(bits: int, count: int) -> int:
    """The bytes that `count` packed codes take."""
    return sum(-(-count * width // 8) for _, width in _parts(bits))


def _parts(bits: int) -> list[tuple[int, int]]:
    """The parts into which a code is split, as (lowest bit, width): each width divides 8."""
    parts, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            parts.append((low, width))
            low += width
    return parts


def _shifts(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


@cache
def _table(width: int, device: torch.device) -> torch.Tensor:
    """(256,): for each byte the 8 / `width` codes in it, one byte each, viewed as one integer."""
    codes = torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, width, device=device) & (1 << width) - 1
    return codes.to(torch.uint8).view({4: torch.int16, 2: torch.int32, 1: torch.int64}[width]).view(-1)
