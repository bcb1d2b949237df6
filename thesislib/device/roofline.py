"""The time of a pass by the roofline model: for each operation the larger of arithmetic and traffic, plus the time to
start it (Williams et al. 2009).

All of it is projection. The interval lies between the shares of bandwidth and arithmetic that programs are assumed to
reach on such a device (its `mbu` and `mfu`). The ceiling is the time at the device file's full rates, one operation
after the other. The rate of arithmetic is that of the precision that an operation is computed in (see
`thesislib.device.cost.Stored`). If the device has no rate for it, the nearest precision's is used, and the projection
says so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from thesislib.device.cost import Costs, Operation, Sketch, costs, distinct_bytes, resized, sketch
from thesislib.device.hardware import Device
from thesislib.device.placement import TOO_LARGE, Placement, allocate, reads
from thesislib.errors import BadInput
from thesislib.model.subject import Subject

ARITHMETIC, TRAFFIC, OVERHEAD = "arithmetic", "traffic", "overhead"


@dataclass(frozen=True)
class Span:
    """The projected seconds of an operation or a pass.

    Attributes:
        ceiling: at the device's full rates.
        low: at the best shares of its rates that are expected.
        high: at the worst.
        binds: which part is the largest at the worst: arithmetic, traffic or overhead.
    """

    ceiling: float
    low: float
    high: float
    binds: str


@dataclass(frozen=True)
class Projection:
    """One pass on one device.

    Attributes:
        spans: {operation: its seconds}.
        seconds: the sum.
        unknown: what the device's file does not say and the sum therefore lacks; the true time is longer.
        taken: rates that the file does not say, each with the precision whose rate is used instead.
    """

    spans: dict[str, Span]
    seconds: Span
    unknown: tuple[str, ...]
    taken: tuple[str, ...] = ()


def project(
    subject: Subject | Sketch, device: Device, tokens: int = 1, context: int = 128, placement: Placement | None = None
) -> Projection:
    """The time of a pass over `tokens` new tokens after `context` others.

    Raises:
        BadInput: the model does not fit; the device's file has neither a bandwidth nor a rate of arithmetic.
    """
    c = costs(subject, tokens, context)
    placement = placement or allocate(subject, device, c.cache_bytes)
    if placement.verdict == TOO_LARGE:
        raise BadInput(
            f"{subject.name} does not fit {device.name}: {placement.missing / 1e6:.1f} MB have no place. "
            "`thesislib.device.placement.what_fits` says what would"
        )
    bandwidth = {tier.name: tier.read for tier in device.tiers}
    unknown, taken = set(), set()
    read = reads(subject, device, placement, c.operations)
    spans = {o.name: _span(o, device, bandwidth, read[o.name], unknown, taken) for o in c.operations}
    ceiling, low, high = (sum(getattr(s, key) for s in spans.values()) for key in ("ceiling", "low", "high"))
    by_limit: dict[str, float] = {}
    for s in spans.values():
        by_limit[s.binds] = by_limit.get(s.binds, 0) + s.high
    if high == 0:
        raise BadInput(
            f"{device.name}'s file says neither how fast it reads nor how fast it multiplies: nothing can be projected"
        )
    total = Span(ceiling, low, high, max(by_limit, key=lambda limit: by_limit[limit]))
    return Projection(spans, total, tuple(sorted(unknown)), tuple(sorted(taken)))


def _span(
    o: Operation,
    device: Device,
    bandwidth: Mapping[str, float | None],
    read: Iterable[tuple[float, str]],
    unknown: set[str],
    taken: set[str],
) -> Span:
    """The seconds of an operation that reads (bytes, tier); adds to `unknown` and `taken`, see `Projection`."""
    traffic = 0.0
    for size, tier in read:
        if (rate_of_tier := bandwidth[tier]) is None:
            unknown.add(f"bandwidth of {tier}")
        else:
            traffic += size / rate_of_tier
    product = "gemm" if o.kind == "gemm" else "gemv"  # attention is many small products, as for one token
    arithmetic = 0.0
    if o.macs and (rate := device.rate(product, o.precision)) is None:
        unknown.add("arithmetic")
    elif o.macs:
        arithmetic = o.macs / rate[0]
        if rate[1] != o.precision:
            taken.add(f"rate of {product} in {o.precision}: that in {rate[1]}")
    if device.overhead is None:
        unknown.add("overhead of an operation")
    start = device.overhead or 0.0
    slow = {ARITHMETIC: arithmetic / device.mfu[0], TRAFFIC: traffic / device.mbu[0]}
    binds = max(slow, key=lambda limit: slow[limit])
    low = max(arithmetic / device.mfu[1], traffic / device.mbu[1])
    return Span(max(arithmetic, traffic), low + start, slow[binds] + start, binds if slow[binds] >= start else OVERHEAD)


@dataclass(frozen=True)
class Profile:
    """A model on a device.

    Attributes:
        placement: of its weights.
        prefill: the pass over the prompt; None if the model does not fit.
        decode: the pass over one token; None if the model does not fit.
        costs: of decoding one token.
    """

    placement: Placement
    prefill: Projection | None
    decode: Projection | None
    costs: Costs

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """The lowest and highest rate of decoding that is expected; None if the model does not fit."""
        return None if self.decode is None else (1 / self.decode.seconds.high, 1 / self.decode.seconds.low)


def profile(subject: Subject | Sketch, device: Device, prompt: int = 128, context: int = 128) -> Profile:
    """Project a prompt of `prompt` tokens read at once, and one token after `context` others."""
    c = costs(subject, 1, context)
    placed = allocate(subject, device, max(c.cache_bytes, costs(subject, prompt, 0).cache_bytes))
    if placed.verdict == TOO_LARGE:
        return Profile(placed, None, None, c)
    prefill, decode = (project(subject, device, n, before, placed) for n, before in ((prompt, 0), (1, context)))
    return Profile(placed, prefill, decode, c)


def what_each_buys(
    subject: Subject | Sketch,
    device: Device,
    depths: Sequence[float] = (0.75, 0.5),
    patterns: Sequence[str] = ("1:8", "2:4"),
    bits: Sequence[float] = (8, 4, 2),
    context: int = 128,
) -> pd.DataFrame:
    """The tokens per second that depth, width and bits each gain, with all else as the subject has it. It is projected
    from sizes; no model is made.

    Args:
        subject: the model before any compression.
        device: the device.
        depths: shares of the blocks that are kept; at least one block.
        patterns: removed:of. Each has two rows: as zeros, which gain nothing since they are stored and multiplied like
            any weight; and packed, for a kernel that unpacks as it reads. No engine is assumed to skip products.
        bits: of a linear's weight, scales included.
        context: tokens in the cache.

    Returns:
        lever ("as it is", depth, width, bits), setting, bytes (of weights, as stored), verdict (see `Placement`),
        tokens per second: low, high, ceiling, NaN where the model does not fit; binds (see `Span`).

    Raises:
        BadInput: see `resized`; a share that is not above 0 and up to 1.
    """
    whole = sketch(subject)
    for share in depths:
        if not 0 < share <= 1:
            raise BadInput(f"depth {share}: expected a share of the blocks above 0 and up to 1, e.g. 0.5")
    cases = [("as it is", "", whole)]
    for share in depths:
        blocks = max(1, round(share * whole.depth))
        cases.append(("depth", f"{blocks} of {whole.depth} blocks", resized(whole, blocks=blocks)))
    for pattern in patterns:
        packed = resized(whole, pattern=pattern)
        cases += [("width", f"{pattern} as zeros", whole), ("width", f"{pattern} packed", packed)]
    cases += [("bits", f"{b:g} bits", resized(whole, bits=b)) for b in bits]
    rows = []
    for lever, setting, case in cases:
        placed = allocate(case, device, costs(case, 1, context).cache_bytes)
        rates: tuple[float, float, float, str] = (math.nan, math.nan, math.nan, "")
        if placed.verdict != TOO_LARGE:
            seconds = project(case, device, 1, context, placed).seconds
            rates = (1 / seconds.high, 1 / seconds.low, 1 / seconds.ceiling, seconds.binds)
        rows.append((lever, setting, distinct_bytes(case.weights), placed.verdict, *rates))
    return pd.DataFrame(rows, columns=["lever", "setting", "bytes", "verdict", "low", "high", "ceiling", "binds"])
