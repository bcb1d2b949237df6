"""Where a model's weights go in a device's memories, whether the model fits, and which smaller models would."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from thesislib.device.cost import Operation, Sketch, Stored, costs, resized, sketch, stored
from thesislib.device.hardware import Device
from thesislib.errors import BadInput
from thesislib.model.packing import Pattern
from thesislib.model.subject import Subject

FITS, STREAMS, TOO_LARGE = "fits", "streams", "does not fit"
PATTERNS, BITS = (None, "1:8", "2:4"), (16, 8, 4, 3, 2)  # that `what_fits` tries


@dataclass(frozen=True)
class Placement:
    """The memories that a model's weights and KV cache are placed in.

    Attributes:
        verdict: "fits", if all weights and the cache are on the chip, or in the only memory of the device; "streams",
            if some are read from another memory at every token; "does not fit".
        tier_of: {weight: memory tier}.
        bytes: {tier: bytes of weights}.
        cache: the tier of the KV cache, the nearest with room; None without room.
        missing: bytes for which no tier has room.
    """

    verdict: str
    tier_of: dict[str, str]
    bytes: dict[str, int]
    cache: str | None
    missing: int


def padded(weight: Stored, device: Device) -> int:
    """The bytes of a weight on a device whose engine reads at least `stored_bits` bits a number.

    Only linears, the embedding and the head are padded.
    """
    least = device.engines[0].stored_bits
    if least is None or not ("proj" in weight.name or weight.name in ("head", "embedding")):
        return weight.bytes
    size, many = weight.beside
    main = max(weight.bytes - size, math.ceil((weight.params - many) * least / 8))
    return main + max(size, math.ceil(many * least / 8))


def allocate(subject: Subject | Sketch, device: Device, cache_bytes: int = 0) -> Placement:
    """Place the KV cache, then the weights in the order in which they are used, each whole in the nearest tier with
    room."""
    room = {tier.name: tier.size for tier in device.tiers}
    nearest = next((tier.name for tier in device.tiers if tier.holds_cache and tier.size >= cache_bytes), None)
    if nearest is not None:
        room[nearest] -= cache_bytes
    tier_of: dict[str, str] = {}
    placed: dict[tuple[int, ...], str | None] = {}  # by memory address: tied and repeated weights are placed once
    used, missing = dict.fromkeys(room, 0), 0 if nearest is not None else cache_bytes
    for w in stored(subject):
        size = padded(w, device)
        if w.tensors not in placed:
            placed[w.tensors] = tier = next((name for name, free in room.items() if free >= size), None)
            if tier is None:
                missing += size
            else:
                room[tier] -= size
                used[tier] += size
        if (tier := placed[w.tensors]) is not None:
            tier_of[w.name] = tier
    chips = {tier.name for tier in device.tiers if tier.on_chip} or set(room)
    on_chip = all(tier in chips for tier in placed.values()) and nearest in chips
    verdict = FITS if on_chip else STREAMS
    return Placement(TOO_LARGE if missing else verdict, tier_of, used, nearest, missing)


def reads(
    subject: Subject | Sketch, device: Device, placement: Placement, operations: Iterable[Operation]
) -> dict[str, list[tuple[float, str]]]:
    """{operation: (bytes, tier) of the weights and of the KV cache that it reads}, as the device stores them."""
    padding = {w.name: padded(w, device) / max(w.bytes, 1) for w in stored(subject)}
    both = {
        o.name: (
            (o.weights * padding.get(o.name, 1), placement.tier_of.get(o.name)),
            (o.cache, placement.cache),
        )
        for o in operations
    }
    return {name: [(n, tier) for n, tier in pairs if n and tier is not None] for name, pairs in both.items()}


def blocks_that_fit(
    subject: Subject | Sketch, device: Device, bits: float, on_chip: bool = True, kept: float = 1, cache_bytes: int = 0
) -> int | None:
    """How many of the model's blocks would fit a device with linears of `bits` bits a weight. None if the rest of the
    model does not fit either.

    Args:
        subject: the model; its largest block counts.
        device: the device; its engine may pad bits.
        bits: of a weight, scales included.
        on_chip: count only the memories on the chip.
        kept: the share of weights that are stored, as by an N:M pattern's packing. An engine that pads stores all.
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
    """The depths, widths and bits at which a model would fit a device. Only sizes are computed; no model is made.

    Args:
        subject: the model before any compression.
        device: the device. An engine that pads stores every weight at its least bits, so neither fewer bits nor a
            pattern gain anything there.
        blocks: how many are kept; None for every number up to all.
        patterns: removed:of; None for no pattern.
        bits: of a linear's weight, scales included; the positions of a packed pattern take bits besides.
        table: bits of a weight of the embedding and the head; None for those of the subject.
        context: tokens in the cache.
        packed: whether the device's kernels unpack patterns as they read. False: zeros are stored like any weight and
            gain nothing.

    Returns:
        A row for each combination that fits, most blocks first, then most bits, then fewest zeros: blocks, pattern (""
        for none), bits, bytes (as the device stores them), weights (the share of the model's linears that is kept),
        on_chip (whether all of it is in memory on the chip). No row if nothing fits.

    Raises:
        BadInput: see `thesislib.device.cost.resized`.
    """
    whole, rows = sketch(subject), []
    has_chip = any(tier.on_chip for tier in device.tiers)
    for pattern in patterns:
        for b in bits:
            other = resized(whole, None, b, pattern if packed else None, table)
            share = 1 if pattern is None else Pattern.parse(pattern).keep / Pattern.parse(pattern).of
            for n in range(1, whole.depth + 1) if blocks is None else blocks:
                case = resized(other, n)
                placed = allocate(case, device, costs(case, 1, context).cache_bytes)
                if placed.verdict != TOO_LARGE:
                    weights, on_chip = share * n / whole.depth, has_chip and placed.verdict == FITS
                    rows.append((n, pattern or "", b, sum(placed.bytes.values()), weights, on_chip))
    columns = ["blocks", "pattern", "bits", "bytes", "weights", "on_chip"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values(["blocks", "bits", "weights"], ascending=False, kind="stable", ignore_index=True)
