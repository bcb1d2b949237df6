"""The energy of a pass, modelled and never measured.

Where the power of the whole device is known, it is that power times the time. Elsewhere it is a sum over the known
parts: bytes by the memory that they are read from, multiplications, and idle power times the time.
"""

from dataclasses import dataclass

from thesislib.device.cost import Sketch, costs
from thesislib.device.hardware import Device
from thesislib.device.placement import Placement, reads
from thesislib.device.roofline import Projection
from thesislib.model.subject import Subject

WHOLE, SUM = (
    "published power of the whole device, for as long as it takes",
    "bytes, multiplications and idle power, as far as they are known",
)


@dataclass(frozen=True)
class Energy:
    """The joules of a pass.

    Attributes:
        low: with the lower power over the shorter time.
        high: with the higher power over the longer time.
        how: `WHOLE` or `SUM`.
        parts: of the sum, without idle power.
        unknown: what the sum lacks; the true figure is higher.
    """

    low: float
    high: float
    how: str
    parts: dict[str, float]
    unknown: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether any part is known."""
        return self.how == WHOLE or sum(self.parts.values()) > 0


def energy(
    subject: Subject | Sketch,
    device: Device,
    placement: Placement,
    time: Projection,
    tokens: int = 1,
    context: int = 128,
) -> Energy:
    """The energy of a pass whose placement and time are known."""
    if device.power is not None:
        return Energy(device.power[0] * time.seconds.low, device.power[1] * time.seconds.high, WHOLE, {}, ())
    c = costs(subject, tokens, context)
    joules = {tier.name: tier.joules_per_byte for tier in device.tiers}
    traffic, unknown = 0.0, set()
    for read in reads(subject, device, placement, c.operations).values():
        for size, tier in read:
            if (each_byte := joules[tier]) is None:
                unknown.add(f"energy of a byte from {tier}")
            else:
                traffic += size * each_byte
    each = device.engines[0].joules_per_mac
    if each is None:
        unknown.add("energy of a multiplication")
    if device.idle is None:
        unknown.add("idle power")
    parts = {"traffic": traffic, "arithmetic": c.macs * (each or 0.0)}
    both = sum(parts.values())
    low, high = (both + (device.idle or 0.0) * seconds for seconds in (time.seconds.low, time.seconds.high))
    return Energy(low, high, SUM, parts, tuple(sorted(unknown)))
