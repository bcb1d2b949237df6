"""Devices as `hw/devices/*.yaml` describe them: every number with its evidence, what is unknown as null and never as a
guess."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thesislib.device.quantity import parse
from thesislib.errors import BadInput, unknown
from thesislib.files import expanded, shipped
from thesislib.yaml_lines import compose, value

KINDS = ("published", "derived", "measured", "assumed")
OPERATIONS = ("gemv", "gemm")  # one token at a time, many tokens at a time
# what a product is computed in, and where a device's file has no rate for it: floating numbers can be computed in wider
# ones, at that rate; where there is none in narrower ones, whose rate is too good. Integers on a device that only knows
# floating ones are turned into these.
NEAREST = {
    "float32": ("float32", "float16", "bfloat16", "int8"),
    "float16": ("float16", "float32", "bfloat16", "int8"),
    "bfloat16": ("bfloat16", "float32", "float16", "int8"),
    "int8": ("int8", "float16", "bfloat16", "float32"),
}
PRECISIONS = tuple(NEAREST)


@dataclass(frozen=True)
class Evidence:
    """Where a number is from. kind: one of `KINDS`. source: a document, a formula over other numbers, a measurement, or
    why it is assumed."""

    kind: str
    source: str


@dataclass(frozen=True)
class Engine:
    """What multiplies.

    clock: Hz. macs_per_cycle: {gemv or gemm: {one of `PRECISIONS`: number}}; None where it is not known. stored_bits:
    the least bits that a weight of a linear takes where this engine reads it: fewer are padded. joules_per_mac.
    """

    name: str
    clock: float | None
    macs_per_cycle: Mapping[str, Mapping[str, float | None]]
    stored_bits: float | None
    joules_per_mac: float | None

    def rate(self, operation: str, precision: str) -> float | None:
        """MACs per second of an operation, None if it is not known."""
        macs = self.macs_per_cycle[operation].get(precision)
        return None if macs is None or self.clock is None else macs * self.clock


@dataclass(frozen=True)
class Tier:
    """A memory. size: bytes. read: bytes per second. joules_per_byte. on_chip. holds_cache: whether it can be written
    at every token."""

    name: str
    size: float
    read: float | None
    joules_per_byte: float | None
    on_chip: bool
    holds_cache: bool = True


@dataclass(frozen=True)
class Device:
    """A device: engines, best first; tiers, nearest first.

    overhead: seconds that each operation costs besides. mbu, mfu: (low, high) shares of bandwidth and of MACs that
    programs reach. idle: W. power: (low, high) W of the whole device while it works. notes: what a reader must know.
    evidence: {place of a number: its evidence}.
    """

    name: str
    title: str
    engines: tuple[Engine, ...]
    tiers: tuple[Tier, ...]
    overhead: float | None
    mbu: tuple[float, float]
    mfu: tuple[float, float]
    idle: float | None
    power: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    evidence: Mapping[str, Evidence] = field(default_factory=dict)

    def rate(self, operation: str, precision: str) -> tuple[float, str] | None:
        """MACs per second of its fastest engine, and the precision of that rate: the one asked for, or the nearest with
        a rate; None without any.

        Raises:
            BadInput: a precision that is not known.
        """
        if precision not in NEAREST:
            raise unknown("precision", precision, PRECISIONS)
        for other in NEAREST[precision]:
            if rates := [rate for engine in self.engines if (rate := engine.rate(operation, other))]:
                return max(rates), other
        return None


def devices(folder: Path | None = None) -> dict[str, Path]:
    """The files of devices by name."""
    folder = folder or shipped("hw/devices")
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def device(name: str, folder: Path | None = None) -> Device:
    """The device of a name, or of a .yaml file.

    Raises:
        BadInput: no such device; see also `read_device`.
    """
    known = devices(folder)
    if name.endswith((".yaml", ".yml")):
        return read_device(expanded(name))
    if name not in known:
        raise unknown("device", name, known)
    return read_device(known[name])


def read_device(path: Path) -> Device:
    """A device from its file.

    Raises:
        BadInput: a key that is not known or is missing, a number without evidence or with a unit of another kind, a
            negative one.
    """
    reader = _Reader(path)
    top = reader.mapping(
        value(compose(path), path),
        "",
        {"name", "title", "engines", "tiers", "overhead", "mbu", "mfu", "idle", "power"},
        {"notes"},
    )
    if top["name"] != path.stem:
        raise BadInput(f"{path}: its name is '{top['name']}': expected '{path.stem}', as the file's")
    engines = []
    for i, plain in enumerate(reader.listed(top["engines"], "engines")):
        at = f"engines.{i}"
        keys = reader.mapping(plain, at, {"name", "clock", "macs_per_cycle", "stored_bits", "energy"})
        macs = reader.mapping(keys["macs_per_cycle"], f"{at}.macs_per_cycle", set(OPERATIONS))
        engines.append(
            Engine(
                str(keys["name"]),
                reader.number(keys["clock"], f"{at}.clock", "Hz"),
                {kind: reader.rates(macs[kind], f"{at}.macs_per_cycle.{kind}") for kind in OPERATIONS},
                reader.number(keys["stored_bits"], f"{at}.stored_bits", "bit"),
                reader.number(keys["energy"], f"{at}.energy", "J/MAC"),
            )
        )
    tiers = []
    for i, plain in enumerate(reader.listed(top["tiers"], "tiers")):
        at = f"tiers.{i}"
        keys = reader.mapping(plain, at, {"name", "size", "read", "energy", "on_chip", "holds_cache"})
        size = reader.number(keys["size"], f"{at}.size", "B")
        if size is None:
            raise BadInput(
                f"{path}, {at}.size is null: a memory of unknown size cannot be planned for; leave the tier out"
            )
        for name in ("on_chip", "holds_cache"):
            if not isinstance(keys[name], bool):
                raise BadInput(f"{path}, {at}.{name} is {keys[name]!r}: expected true or false")
        tiers.append(
            Tier(
                str(keys["name"]),
                size,
                reader.number(keys["read"], f"{at}.read", "B/s"),
                reader.number(keys["energy"], f"{at}.energy", "J/B"),
                keys["on_chip"],
                keys["holds_cache"],
            )
        )
    notes = reader.listed(top.get("notes") or ["-"], "notes") if top.get("notes") else []
    return Device(
        str(top["name"]),
        str(top["title"]),
        tuple(engines),
        tuple(tiers),
        reader.number(top["overhead"], "overhead", "s"),
        reader.band(top["mbu"], "mbu"),
        reader.band(top["mfu"], "mfu"),
        reader.number(top["idle"], "idle", "W"),
        reader.span(top["power"], "power", "W"),
        tuple(map(str, notes)),
        reader.evidence,
    )


@dataclass
class _Reader:
    """Reads one file and collects the evidence of its numbers."""

    path: Path
    evidence: dict[str, Evidence] = field(default_factory=dict)

    def mapping(self, plain: object, at: str, required: set[str], more: frozenset | set = frozenset()) -> dict:
        place = f"{self.path}{f', {at}' if at else ''}"
        if not isinstance(plain, dict):
            raise BadInput(f"{place}: expected a mapping with the keys {', '.join(sorted(required))}")
        for name in plain:
            if name not in required | more:
                raise unknown(f"key in {place}", name, sorted(required | more))
        for name in sorted(required - plain.keys()):
            raise BadInput(f"{place}: '{name}' is missing: expected it, null if it is not known")
        return plain

    def listed(self, plain: object, at: str) -> list:
        if not isinstance(plain, list) or not plain:
            raise BadInput(f"{self.path}, {at}: expected a list")
        return plain

    def _sourced(self, plain: object, at: str) -> object:
        """The value of {value, kind, source}, whose evidence is kept."""
        keys = self.mapping(plain, at, {"value", "kind", "source"})
        if keys["kind"] not in KINDS:
            raise unknown(f"kind of evidence in {self.path}, {at}", keys["kind"], KINDS)
        if not isinstance(keys["source"], str) or not keys["source"].strip():
            raise BadInput(
                f"{self.path}, {at}: its source is empty: expected where the number is from, or null for the "
                "whole entry"
            )
        self.evidence[at] = Evidence(keys["kind"], keys["source"])
        return keys["value"]

    def number(self, plain: object, at: str, unit: str) -> float | None:
        return None if plain is None else parse(self._sourced(plain, at), unit, f"{self.path}, {at}")

    def rates(self, plain: object, at: str) -> dict[str, float | None]:
        keys = self.mapping(plain, at, set(PRECISIONS))
        return {precision: self.number(keys[precision], f"{at}.{precision}", "MAC/cycle") for precision in PRECISIONS}

    def _two(self, plain: object, at: str, unit: str) -> tuple[float, float]:
        found = self._sourced(plain, at)
        if not isinstance(found, list) or len(found) != 2:
            raise BadInput(f"{self.path}, {at} is {found!r}: expected [low, high]")
        low, high = (parse(x, unit, f"{self.path}, {at}") for x in found)
        if low > high or (unit == "" and high > 1):
            shares = "shares with 0 < low <= high <= 1" if unit == "" else "the lower number first"
            raise BadInput(f"{self.path}, {at} is {found!r}: expected {shares}")
        return low, high

    def span(self, plain: object, at: str, unit: str) -> tuple[float, float] | None:
        return None if plain is None else self._two(plain, at, unit)

    def band(self, plain: object, at: str) -> tuple[float, float]:
        return self._two(plain, at, "")
