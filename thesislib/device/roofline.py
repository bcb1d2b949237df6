"""How long a pass would take: for each operation the larger of arithmetic and traffic, plus what it costs to start it (Williams et al. 2009).

All of it is projection. An interval is between the shares of bandwidth and arithmetic that programs are known to reach on such a
device (its `mbu` and `mfu`); the ceiling is what nothing could exceed.
"""

from dataclasses import dataclass

from thesislib.device.cost import Costs, Operation, costs, stored
from thesislib.device.hardware import Device, Tier
from thesislib.device.plan import TOO_LARGE, Plan, padded, plan
from thesislib.errors import BadInput
from thesislib.subject import Subject

ARITHMETIC, TRAFFIC, OVERHEAD, UNKNOWN = "arithmetic", "traffic", "overhead", "unknown"


@dataclass(frozen=True)
class Span:
    """Seconds: at the ceiling, and between the best and the worst share that is expected. binds: arithmetic, traffic or overhead, at the worst."""

    ceiling: float
    low: float
    high: float
    binds: str


@dataclass(frozen=True)
class Projection:
    """One pass on one device.

    spans: {operation: its span}. seconds: the sum. unknown: what the device's file does not say and was therefore left out: the true time is longer.
    """

    spans: dict[str, Span]
    seconds: Span
    unknown: tuple[str, ...]


def project(subject: Subject, device: Device, tokens: int = 1, context: int = 128, found: Plan | None = None) -> Projection:
    """Time of a pass over `tokens` new tokens after `context` others.

    Raises:
        BadInput: the model does not fit; the device says neither bandwidth nor arithmetic.
    """
    c = costs(subject, tokens, context)
    found = found or plan(subject, device, c.cache_bytes)
    if found.verdict == TOO_LARGE:
        raise BadInput(
            f"{subject.name} does not fit {device.name}: {found.missing / 1e6:.1f} MB have no place. `thesislib.device.plan.blocks_that_fit` says what would"
        )
    sizes = {w.name: padded(w, device) / max(w.bytes, 1) for w in stored(subject)}
    tiers = {tier.name: tier for tier in device.tiers}
    unknown: set[str] = set()
    spans = {o.name: _span(o, device, tiers, found, sizes.get(o.name, 1), unknown) for o in c.operations}
    total = [sum(getattr(s, key) for s in spans.values()) for key in ("ceiling", "low", "high")]
    by_limit: dict[str, float] = {}
    for s in spans.values():
        by_limit[s.binds] = by_limit.get(s.binds, 0) + s.high
    if total[2] == 0:
        raise BadInput(f"{device.name}'s file says neither how fast it reads nor how fast it multiplies: nothing can be projected")
    return Projection(spans, Span(*total, max(by_limit, key=lambda limit: by_limit[limit])), tuple(sorted(unknown)))


def _span(o: Operation, device: Device, tiers: dict[str, Tier], found: Plan, padding: float, unknown: set[str]) -> Span:
    traffic = 0.0
    for size, place in ((o.weights * padding, found.places.get(o.name)), (o.cache, found.cache)):
        if size and place is not None:
            if tiers[place].read is None:
                unknown.add(f"bandwidth of {place}")
            else:
                traffic += size / tiers[place].read
    # the best engine that says how fast it does this; attention is many small products, as one token at a time is
    rates = [rate for engine in device.engines if (rate := engine.rate("gemm" if o.kind == "gemm" else "gemv"))]
    if o.macs and not rates:
        unknown.add("arithmetic")
    arithmetic = o.macs / max(rates) if o.macs and rates else 0.0
    if device.overhead is None:
        unknown.add("overhead of an operation")
    start = device.overhead or 0.0
    slow = {ARITHMETIC: arithmetic / device.mfu[0], TRAFFIC: traffic / device.mbu[0]}
    binds = max(slow, key=lambda limit: slow[limit])
    low = max(arithmetic / device.mfu[1], traffic / device.mbu[1])
    return Span(max(arithmetic, traffic), low + start, slow[binds] + start, binds if slow[binds] >= start else OVERHEAD)


@dataclass(frozen=True)
class Profile:
    """A model on a device: its plan, and, if it fits, time to first token and per token, each (ceiling, low, high) in seconds."""

    plan: Plan
    prefill: Projection | None
    decode: Projection | None
    costs: Costs

    @property
    def tokens_per_second(self) -> tuple[float, float] | None:
        """Low and high, decoding."""
        return None if self.decode is None else (1 / self.decode.seconds.high, 1 / self.decode.seconds.low)


def profile(subject: Subject, device: Device, prompt: int = 128, context: int = 128) -> Profile:
    """A prompt of `prompt` tokens read at once, and one token after `context`."""
    c = costs(subject, 1, context)
    found = plan(subject, device, max(c.cache_bytes, costs(subject, prompt, 0).cache_bytes))
    if found.verdict == TOO_LARGE:
        return Profile(found, None, None, c)
    return Profile(found, project(subject, device, prompt, 0, found), project(subject, device, 1, context, found), c)
