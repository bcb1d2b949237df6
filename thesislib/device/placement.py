"""Which memory each weight lives in, whether a model fits a device, and the other way round: what would fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from thesislib.device.cost import Sketch, Stored, costs, resized, sketch, stored
from thesislib.device.hardware import Device
from thesislib.errors import BadInput
from thesislib.model.packing import Pattern
from thesislib.model.subject import Subject

FITS, STREAMS, TOO_LARGE = "fits", "streams", "does not fit"
PATTERNS, BITS = (None, "1:8", "2:4"), (16, 8, 4, 3, 2)  # what is tried when it is asked what would fit


@dataclass(frozen=True)
class Plan:
    """Where weights live.

    verdict: fits, if all weights and the cache lie on the chip, or in the only memory there is; streams, if some come
    from further away at every token; does not fit. places: {weight: tier}. bytes: {tier: bytes of weights}. cache: tier
    of the KV cache, the nearest with room, None without room. missing: bytes without a place.
    """

    verdict: str
    places: dict[str, str]
    bytes: dict[str, int]
    cache: str | None
    missing: int


def padded(weight: Stored, device: Device) -> int:
    """Bytes of a weight on a device whose engine reads no fewer than so many bits a number; only linears and the head
    are padded."""
    least = device.engines[0].stored_bits
    if least is None or not ("proj" in weight.name or weight.name in ("head", "embedding")):
        return weight.bytes
    size, many = weight.beside
    return max(weight.bytes - size, math.ceil((weight.params - many) * least / 8)) + max(
        size, math.ceil(many * least / 8)
    )


def plan(subject: Subject | Sketch, device: Device, cache_bytes: int = 0) -> Plan:
    """Place the KV cache, then weights in the order in which they are used, each in the nearest tier with room for it
    whole."""
    weights = stored(subject)
    room = {tier.name: tier.size for tier in device.tiers}
    nearest = next((tier.name for tier in device.tiers if tier.holds_cache and tier.size >= cache_bytes), None)
    if nearest is not None:
        room[nearest] -= cache_bytes
    places: dict[str, str] = {}
    at: dict[tuple[int, ...], str | None] = {}  # by where a tensor lies: tied and repeated weights are placed once
    used, missing = dict.fromkeys(room, 0), 0 if nearest is not None else cache_bytes
    for w in weights:
        size = padded(w, device)
        if w.tensors not in at:
            at[w.tensors] = where = next((name for name, free in room.items() if free >= size), None)
            if where is None:
                missing += size
            else:
                room[where] -= size
                used[where] += size
        if (place := at[w.tensors]) is not None:
            places[w.name] = place
    chips = {tier.name for tier in device.tiers if tier.on_chip} or {tier.name for tier in device.tiers}
    inside = all(name in chips for name in at.values()) and nearest in chips
    return Plan(TOO_LARGE if missing else FITS if inside else STREAMS, places, used, nearest, missing)


def blocks_that_fit(
    subject: Subject | Sketch, device: Device, bits: float, on_chip: bool = True, kept: float = 1, cache_bytes: int = 0
) -> int | None:
    """How many of the model's blocks would fit a device at `bits` a weight of a linear, all else as it is held; None if
    not even none do.

    Args:
        subject: its largest block counts.
        device: its engine pads bits.
        bits: of a weight, scales included.
        on_chip: within the memories on the chip, else within all.
        kept: the share of weights that are stored, as an N:M pattern's packing would; an engine that pads knows no
            pattern and stores all.
        cache_bytes: of the KV cache.

    Raises:
        BadInput: bits that are not above 0.
    """
    if not bits > 0 or not 0 < kept <= 1:
        raise BadInput(f"bits {bits}, kept {kept}: expected bits above 0 and a share above 0 and up to 1")
    least = device.engines[0].stored_bits
    effective = bits * kept if least is None else max(bits * kept, least)
    tiers = [tier for tier in device.tiers if tier.on_chip or not on_chip]
    room = sum(tier.size for tier in tiers) - cache_bytes
    weights = stored(subject)
    rest = sum({w.tensors: w.bytes for w in weights if not w.name.startswith("blocks.")}.values())
    blocks: dict[str, float] = {}
    for w in weights:
        if w.name.startswith("blocks."):
            number = w.name.split(".")[1]
            blocks[number] = blocks.get(number, 0) + (w.params * effective / 8 if "proj" in w.name else w.bytes)
    return None if rest > room else min(len(blocks), int((room - rest) // max(blocks.values())))


def what_fits(
    subject: Subject | Sketch,
    device: Device,
    blocks: Sequence[int] | None = None,
    patterns: Sequence[str | None] = PATTERNS,
    bits: Sequence[float] = BITS,
    table: float | None = None,
    context: int = 128,
    packed: bool = True,
) -> pd.DataFrame:
    """The depths, widths and bits at which a model would fit a device. From sizes alone, no model is made.

    Args:
        subject: where they start from.
        device: an engine that pads stores every weight at its least bits: there neither fewer bits nor a pattern gain
            anything.
        blocks: how many are kept, None for every number up to all.
        patterns: removed:of, None for none.
        bits: a weight of a linear, scales included; a packed pattern's places come on top.
        table: bits of the embedding and the head, None as they are held.
        context: tokens in the cache.
        packed: whether the device's kernels unpack patterns as they read. False: zeros are stored like any weight and
            gain nothing.

    Returns:
        A row for each combination that fits, most blocks first, then most bits, then fewest zeros: blocks, pattern (""
        for none), bits, bytes (as the device stores them), weights (share of the model's linears that are kept),
        on_chip (all of it; where a device has memory on a chip). No row: nothing fits.

    Raises:
        BadInput: see `thesislib.device.cost.resized`.
    """
    plain, rows = sketch(subject), []
    has_chip = any(tier.on_chip for tier in device.tiers)
    for pattern in patterns:
        for b in bits:
            other = resized(plain, None, b, pattern if packed else None, table)
            share = 1 if pattern is None else Pattern.parse(pattern).keep / Pattern.parse(pattern).of
            for n in range(1, plain.depth + 1) if blocks is None else blocks:
                case = resized(other, n)
                found = plan(case, device, costs(case, 1, context).cache_bytes)
                if found.verdict != TOO_LARGE:
                    size = sum(found.bytes.values())
                    row = {
                        "blocks": n,
                        "pattern": pattern or "",
                        "bits": b,
                        "bytes": size,
                        "weights": share * n / plain.depth,
                    }
                    rows.append(row | {"on_chip": has_chip and found.verdict == FITS})
    columns = ["blocks", "pattern", "bits", "bytes", "weights", "on_chip"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(["blocks", "bits", "weights"], ascending=False, kind="stable", ignore_index=True)
