"""How long a pass would take: for each operation the larger of arithmetic and traffic, plus what it costs to start it
(Williams et al. 2009).

All of it is projection. An interval is between the shares of bandwidth and arithmetic that programs are assumed to
reach on such a device (its `mbu` and `mfu`); the ceiling is what the device file's rates give without loss, one
operation after the other. Arithmetic goes at the rate of the precision that an operation is computed in (see
`thesislib.device.cost.Stored`); where a device has none for it, at the nearest precision's, and the projection says so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from thesislib.device.cost import Costs, Operation, Sketch, costs, distinct_bytes, resized, sketch, stored
from thesislib.device.hardware import Device, Tier
from thesislib.device.placement import TOO_LARGE, Plan, padded, plan
from thesislib.errors import BadInput
from thesislib.model.subject import Subject

ARITHMETIC, TRAFFIC, OVERHEAD, UNKNOWN = "arithmetic", "traffic", "overhead", "unknown"


@dataclass(frozen=True)
class Span:
    """Seconds: at the ceiling, and between the best and the worst share that is expected. binds: arithmetic, traffic or
    overhead, at the worst."""

    ceiling: float
    low: float
    high: float
    binds: str


@dataclass(frozen=True)
class Projection:
    """One pass on one device.

    spans: {operation: its span}. seconds: the sum. unknown: what the device's file does not say and was therefore left
    out: the true time is longer. taken: rates that it does not say either, and the precision whose rate stands in.
    """

    spans: dict[str, Span]
    seconds: Span
    unknown: tuple[str, ...]
    taken: tuple[str, ...] = ()


def project(
    subject: Subject | Sketch, device: Device, tokens: int = 1, context: int = 128, found: Plan | None = None
) -> Projection:
    """Time of a pass over `tokens` new tokens after `context` others.

    Raises:
        BadInput: the model does not fit; the device says neither bandwidth nor arithmetic.
    """
    c = costs(subject, tokens, context)
    found = found or plan(subject, device, c.cache_bytes)
    if found.verdict == TOO_LARGE:
        raise BadInput(
            f"{subject.name} does not fit {device.name}: {found.missing / 1e6:.1f} MB have no place. "
            "`thesislib.device.placement.what_fits` says what would"
        )
    sizes = {w.name: padded(w, device) / max(w.bytes, 1) for w in stored(subject)}
    tiers = {tier.name: tier for tier in device.tiers}
    unknown, taken = set(), set()
    spans = {o.name: _span(o, device, tiers, found, sizes.get(o.name, 1), unknown, taken) for o in c.operations}
    ceiling, low, high = (sum(getattr(s, key) for s in spans.values()) for key in ("ceiling", "low", "high"))
    by_limit: dict[str, float] = {}
    for s in spans.values():
        by_limit[s.binds] = by_limit.get(s.binds, 0) + s.high
    if high == 0:
        raise BadInput(
            f"{device.name}'s file says neither how fast it reads nor how fast it multiplies: nothing can be projected"
        )
    return Projection(
        spans,
        Span(ceiling, low, high, max(by_limit, key=lambda limit: by_limit[limit])),
        tuple(sorted(unknown)),
        tuple(sorted(taken)),
    )


def _span(
    o: Operation,
    device: Device,
    tiers: dict[str, Tier],
    found: Plan,
    padding: float,
    unknown: set[str],
    taken: set[str],
) -> Span:
    traffic = 0.0
    for size, place in ((o.weights * padding, found.places.get(o.name)), (o.cache, found.cache)):
        if size and place is not None:
            if tiers[place].read is None:
                unknown.add(f"bandwidth of {place}")
            else:
                traffic += size / tiers[place].read
    arithmetic, kind = (
        0.0,
        "gemm" if o.kind == "gemm" else "gemv",
    )  # attention is many small products, as one token at a time is
    if o.macs and (rate := device.rate(kind, o.precision)) is None:
        unknown.add("arithmetic")
    elif o.macs:
        arithmetic = o.macs / rate[0]
        if rate[1] != o.precision:
            taken.add(f"rate of {kind} in {o.precision}: that in {rate[1]}")
    if device.overhead is None:
        unknown.add("overhead of an operation")
    start = device.overhead or 0.0
    slow = {ARITHMETIC: arithmetic / device.mfu[0], TRAFFIC: traffic / device.mbu[0]}
    binds = max(slow, key=lambda limit: slow[limit])
    low = max(arithmetic / device.mfu[1], traffic / device.mbu[1])
    return Span(max(arithmetic, traffic), low + start, slow[binds] + start, binds if slow[binds] >= start else OVERHEAD)


@dataclass(frozen=True)
class Profile:
    """A model on a device: its plan, and, if it fits, time to first token and per token, each (ceiling, low, high) in
    seconds."""

    plan: Plan
    prefill: Projection | None
    decode: Projection | None
    costs: Costs

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Low and high, decoding."""
        return None if self.decode is None else (1 / self.decode.seconds.high, 1 / self.decode.seconds.low)


def profile(subject: Subject | Sketch, device: Device, prompt: int = 128, context: int = 128) -> Profile:
    """A prompt of `prompt` tokens read at once, and one token after `context`."""
    c = costs(subject, 1, context)
    found = plan(subject, device, max(c.cache_bytes, costs(subject, prompt, 0).cache_bytes))
    if found.verdict == TOO_LARGE:
        return Profile(found, None, None, c)
    return Profile(found, project(subject, device, prompt, 0, found), project(subject, device, 1, context, found), c)


def what_each_buys(
    subject: Subject | Sketch,
    device: Device,
    depths: Sequence[float] = (0.75, 0.5),
    patterns: Sequence[str] = ("1:8", "2:4"),
    bits: Sequence[float] = (8, 4, 2),
    context: int = 128,
) -> pd.DataFrame:
    """What depth, width and bits each buy in tokens per second, one at a time, all else as the subject has it.
    Projected from sizes, no model is made.

    Args:
        subject: where each starts from.
        device: where it would run.
        depths: shares of the blocks that are kept, at least one.
        patterns: removed:of. Each stands twice, as zeros, which buy nothing since they are stored and multiplied like
            any weight, and packed, for a kernel that unpacks as it reads. No engine here is taken to skip the products.
        bits: a weight of a linear, scales included.
        context: tokens before.

    Returns:
        lever ("as it is", depth, width, bits), setting, bytes (of weights, as stored), verdict (see `Plan`), tokens per
        second: low, high, ceiling, NaN where the model does not fit; binds.

    Raises:
        BadInput: see `resized`; a share that is not above 0 and up to 1.
    """
    plain = sketch(subject)
    for share in depths:
        if not 0 < share <= 1:
            raise BadInput(f"depth {share}: expected a share of the blocks above 0 and up to 1, e.g. 0.5")
    cases = [("as it is", "", plain)]
    for share in depths:
        blocks = max(1, round(share * plain.depth))
        cases.append(("depth", f"{blocks} of {plain.depth} blocks", resized(plain, blocks=blocks)))
    for pattern in patterns:
        packed = resized(plain, pattern=pattern)
        cases += [("width", f"{pattern} as zeros", plain), ("width", f"{pattern} packed", packed)]
    cases += [("bits", f"{b:g} bits", resized(plain, bits=b)) for b in bits]
    rows = []
    for lever, setting, case in cases:
        found = plan(case, device, costs(case, 1, context).cache_bytes)
        row = {"lever": lever, "setting": setting, "bytes": distinct_bytes(case.weights), "verdict": found.verdict}
        rates = dict.fromkeys(("low", "high", "ceiling"), math.nan) | {"binds": ""}
        if found.verdict != TOO_LARGE:
            seconds = project(case, device, 1, context, found).seconds
            rates = {
                "low": 1 / seconds.high,
                "high": 1 / seconds.low,
                "ceiling": 1 / seconds.ceiling,
                "binds": seconds.binds,
            }
        rows.append(row | rates)
    return pd.DataFrame(rows)
