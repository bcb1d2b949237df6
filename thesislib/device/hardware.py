"""Devices from `hw/devices/*.yaml`: every number with its evidence, and an unknown number as null, never as a guess."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from thesislib.device.quantity import parse
from thesislib.errors import BadInput, unknown
from thesislib.files import expanded, shipped
from thesislib.yaml_lines import compose, value

KINDS = ("published", "derived", "measured", "assumed")  # classes of evidence
OPERATIONS = ("gemv", "gemm")  # one token at a time, many tokens at a time
# for each precision, whose rate to use when the device file lacks its own, best first: for floats wider ones
# (pessimistic), then narrower ones (optimistic), int8 last; for int8 floats, if the device computes in nothing else
NEAREST = {
    "float32": ("float32", "float16", "bfloat16", "int8"),
    "float16": ("float16", "float32", "bfloat16", "int8"),
    "bfloat16": ("bfloat16", "float32", "float16", "int8"),
    "int8": ("int8", "float16", "bfloat16", "float32"),
}
PRECISIONS = tuple(NEAREST)


@dataclass(frozen=True)
class Evidence:
    """Where a number is from.

    Attributes:
        kind: the class of evidence, one of `KINDS`.
        source: a document, a formula over other numbers, a measurement, or the reason for an assumption.
    """

    kind: str
    source: str


@dataclass(frozen=True)
class Engine:
    """A unit that multiplies: cores or an accelerator.

    Attributes:
        name: of the engine.
        clock: Hz.
        macs_per_cycle: {gemv or gemm: {one of `PRECISIONS`: number}}; None if it is not known.
        stored_bits: the least bits of a linear's weight in the memory that this engine reads; fewer bits are padded.
        joules_per_mac: energy of a multiply-accumulate.
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
    """A memory.

    Attributes:
        name: of the memory.
        size: bytes.
        read: bytes per second.
        joules_per_byte: energy of reading a byte.
        on_chip: whether it is on the chip.
        holds_cache: whether it can hold the KV cache, which is written at every token.
    """

    name: str
    size: float
    read: float | None
    joules_per_byte: float | None
    on_chip: bool
    holds_cache: bool = True


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        name: of its file.
        title: for readers.
        engines: best first.
        tiers: its memories, nearest first.
        overhead: seconds to start an operation.
        mbu: (low, high) the share of the bandwidth that programs reach.
        mfu: (low, high) the share of the MACs per second that programs reach.
        idle: W.
        power: (low, high) W of the whole device while it works.
        notes: for readers.
        evidence: {path of a number in the file: its evidence}.
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
        """MACs per second of the fastest engine, and the precision of that rate: `precision`, or the nearest that has a
        rate. None if no precision has one.

        Raises:
            BadInput: an unknown precision.
        """
        if precision not in NEAREST:
            raise unknown("precision", precision, PRECISIONS)
        for other in NEAREST[precision]:
            if rates := [rate for engine in self.engines if (rate := engine.rate(operation, other))]:
                return max(rates), other
        return None


def devices(folder: Path | None = None) -> dict[str, Path]:
    """The device files by name."""
    folder = folder or shipped("hw/devices")
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def device(name: str, folder: Path | None = None) -> Device:
    """The device of this name, or of a .yaml file.

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
        BadInput: an unknown or a missing key; a number without evidence, with a unit of another quantity, or below 0.
    """
    reader = _Reader(path)
    required = {"name", "title", "engines", "tiers", "overhead", "mbu", "mfu", "idle", "power"}
    top = reader.mapping(value(compose(path), path), "", required, {"notes"})
    if top["name"] != path.stem:
        raise BadInput(f"{path}: its name is '{top['name']}': expected '{path.stem}', as the file's")
    engines = reader.listed(top["engines"], "engines")
    tiers = reader.listed(top["tiers"], "tiers")
    notes = reader.listed(top["notes"], "notes") if top.get("notes") else []
    return Device(
        str(top["name"]),
        str(top["title"]),
        tuple(reader.engine(entry, f"engines.{i}") for i, entry in enumerate(engines)),
        tuple(reader.tier(entry, f"tiers.{i}") for i, entry in enumerate(tiers)),
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
    """Reads one file and collects the evidence of its numbers.

    Attributes:
        path: of the file.
        evidence: {path of a number in the file, such as engines.0.clock: its evidence}.
    """

    path: Path
    evidence: dict[str, Evidence] = field(default_factory=dict)

    def mapping(self, entry: object, at: str, required: set[str], optional: frozenset | set = frozenset()) -> dict:
        """An entry of the file, if it is a mapping with these keys."""
        name = f"{self.path}{f', {at}' if at else ''}"
        if not isinstance(entry, dict):
            raise BadInput(f"{name}: expected a mapping with the keys {', '.join(sorted(required))}")
        for key in entry:
            if key not in required | optional:
                raise unknown(f"key in {name}", key, sorted(required | optional))
        for key in sorted(required - entry.keys()):
            raise BadInput(f"{name}: '{key}' is missing: expected it, null if it is not known")
        return entry

    def listed(self, entry: object, at: str) -> list:
        """An entry, if it is a list with something in it."""
        if not isinstance(entry, list) or not entry:
            raise BadInput(f"{self.path}, {at}: expected a list")
        return entry

    def engine(self, entry: object, at: str) -> Engine:
        """An entry of `engines`."""
        keys = self.mapping(entry, at, {"name", "clock", "macs_per_cycle", "stored_bits", "energy"})
        macs = self.mapping(keys["macs_per_cycle"], f"{at}.macs_per_cycle", set(OPERATIONS))
        return Engine(
            str(keys["name"]),
            self.number(keys["clock"], f"{at}.clock", "Hz"),
            {product: self.rates(macs[product], f"{at}.macs_per_cycle.{product}") for product in OPERATIONS},
            self.number(keys["stored_bits"], f"{at}.stored_bits", "bit"),
            self.number(keys["energy"], f"{at}.energy", "J/MAC"),
        )

    def tier(self, entry: object, at: str) -> Tier:
        """An entry of `tiers`."""
        keys = self.mapping(entry, at, {"name", "size", "read", "energy", "on_chip", "holds_cache"})
        size = self.number(keys["size"], f"{at}.size", "B")
        if size is None:
            raise BadInput(
                f"{self.path}, {at}.size is null: a memory of unknown size cannot be planned for; leave the tier out"
            )
        for key in ("on_chip", "holds_cache"):
            if not isinstance(keys[key], bool):
                raise BadInput(f"{self.path}, {at}.{key} is {keys[key]!r}: expected true or false")
        read = self.number(keys["read"], f"{at}.read", "B/s")
        joules = self.number(keys["energy"], f"{at}.energy", "J/B")
        return Tier(str(keys["name"]), size, read, joules, keys["on_chip"], keys["holds_cache"])

    def _sourced(self, entry: object, at: str) -> object:
        """The value of an entry {value, kind, source}, whose evidence is kept."""
        keys = self.mapping(entry, at, {"value", "kind", "source"})
        if keys["kind"] not in KINDS:
            raise unknown(f"kind of evidence in {self.path}, {at}", keys["kind"], KINDS)
        if not isinstance(keys["source"], str) or not keys["source"].strip():
            raise BadInput(
                f"{self.path}, {at}: its source is empty: expected where the number is from, or null for the "
                "whole entry"
            )
        self.evidence[at] = Evidence(keys["kind"], keys["source"])
        return keys["value"]

    def number(self, entry: object, at: str, unit: str) -> float | None:
        """The number of an entry in the base unit `unit`; None for null."""
        return None if entry is None else parse(self._sourced(entry, at), unit, f"{self.path}, {at}")

    def rates(self, entry: object, at: str) -> dict[str, float | None]:
        """MACs per cycle by precision."""
        keys = self.mapping(entry, at, set(PRECISIONS))
        return {precision: self.number(keys[precision], f"{at}.{precision}", "MAC/cycle") for precision in PRECISIONS}

    def _pair(self, entry: object, at: str, unit: str) -> tuple[float, float]:
        pair = self._sourced(entry, at)
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadInput(f"{self.path}, {at} is {pair!r}: expected [low, high]")
        low, high = (parse(x, unit, f"{self.path}, {at}") for x in pair)
        if low > high or (unit == "" and high > 1):
            expected = "shares with 0 < low <= high <= 1" if unit == "" else "the lower number first"
            raise BadInput(f"{self.path}, {at} is {pair!r}: expected {expected}")
        return low, high

    def span(self, entry: object, at: str, unit: str) -> tuple[float, float] | None:
        """(low, high) in the base unit `unit`; None for null."""
        return None if entry is None else self._pair(entry, at, unit)

    def band(self, entry: object, at: str) -> tuple[float, float]:
        """(low, high), two shares."""
        return self._pair(entry, at, "")
