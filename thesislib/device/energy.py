"""Joules of a pass, modelled and never measured: the whole device's power for as long as it takes where that is known,
else the sum of what is known.

That sum: bytes by the memory they come from, multiplications, and idle power for as long as it takes.
"""

from dataclasses import dataclass

from thesislib.device.cost import Sketch, costs, stored
from thesislib.device.hardware import Device
from thesislib.device.placement import Plan, padded
from thesislib.device.roofline import Projection
from thesislib.model.subject import Subject

WHOLE, SUM = (
    "published power of the whole device, for as long as it takes",
    "bytes, multiplications and idle power, as far as they are known",
)


@dataclass(frozen=True)
class Energy:
    """Joules. low, high: with the lower power over the shorter time, and the higher over the longer.

    how: `WHOLE` or `SUM`. parts: of the sum, idling apart. unknown: what was left out of it, so that the true figure is
    higher.
    """

    low: float
    high: float
    how: str
    parts: dict[str, float]
    unknown: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether anything of it is."""
        return self.how == WHOLE or sum(self.parts.values()) > 0


def energy(
    subject: Subject | Sketch, device: Device, found: Plan, time: Projection, tokens: int = 1, context: int = 128
) -> Energy:
    """Of a pass whose plan and time are known."""
    if device.power is not None:
        return Energy(device.power[0] * time.seconds.low, device.power[1] * time.seconds.high, WHOLE, {}, ())
    c = costs(subject, tokens, context)
    padding = {w.name: padded(w, device) / max(w.bytes, 1) for w in stored(subject)}
    tiers = {tier.name: tier for tier in device.tiers}
    traffic, unknown = 0.0, set()
    for o in c.operations:
        for size, place in ((o.weights * padding.get(o.name, 1), found.places.get(o.name)), (o.cache, found.cache)):
            if size and place is not None:
                if tiers[place].joules_per_byte is None:
                    unknown.add(f"energy of a byte from {place}")
                else:
                    traffic += size * tiers[place].joules_per_byte
    each = device.engines[0].joules_per_mac
    if each is None:
        unknown.add("energy of a multiplication")
    if device.idle is None:
        unknown.add("idle power")
    parts = {"traffic": traffic, "arithmetic": c.macs * (each or 0.0)}
    both = sum(parts.values())
    low, high = (both + (device.idle or 0.0) * seconds for seconds in (time.seconds.low, time.seconds.high))
    return Energy(low, high, SUM, parts, tuple(sorted(unknown)))
