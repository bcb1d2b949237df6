"""A projection in words and as JSON."""

import dataclasses

from thesislib.device.energy import energy
from thesislib.device.hardware import Device
from thesislib.device.placement import BITS, TOO_LARGE, blocks_that_fit
from thesislib.device.roofline import Span, profile
from thesislib.model.subject import Subject


def profile_report(subject: Subject, device: Device, prompt: int = 128, context: int = 128) -> dict:
    """Everything that is projected, in SI units, JSON's types only.

    Raises:
        BadInput: see `thesislib.device.roofline.project`.
    """
    found, on_chip = profile(subject, device, prompt, context), any(t.on_chip for t in device.tiers)
    plain = {
        "kind": "projection",
        "subject": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": device.name,
        "verdict": found.plan.verdict,
        "bytes": {
            "weights": found.costs.kept,
            "cache": found.costs.cache_bytes,
            "by_tier": found.plan.bytes,
            "without_place": found.plan.missing,
        },
        "per_token": {"macs": found.costs.macs, "weight_bytes": found.costs.weight_bytes},
        "blocks_that_fit": {
            str(bits): blocks_that_fit(subject, device, bits, on_chip=on_chip, cache_bytes=found.costs.cache_bytes)
            for bits in BITS
        },
        "where": "on the chip" if on_chip else "in its memory",
        "prompt": prompt,
        "context": context,
        "notes": list(device.notes),
        "evidence": {place: dataclasses.asdict(e) for place, e in device.evidence.items()},
    }
    if found.plan.verdict == TOO_LARGE or found.prefill is None or found.decode is None:
        return plain
    spent = energy(subject, device, found.plan, found.decode, 1, context)
    slow, fast = found.tokens_per_second or (0.0, 0.0)
    return {
        **plain,
        "seconds_to_first_token": _span(found.prefill.seconds),
        "seconds_per_token": _span(found.decode.seconds),
        "tokens_per_second": {"low": slow, "high": fast},
        "joules_per_token": {"low": spent.low, "high": spent.high, "how": spent.how} if spent.known else None,
        "left_out": sorted({*found.decode.unknown, *spent.unknown}),
        "taken": sorted({*found.prefill.taken, *found.decode.taken}),
    }


def _span(span: Span) -> dict:
    return dataclasses.asdict(span)


def readable(plain: dict) -> str:
    """A few lines of what `profile_report` says."""
    size = plain["bytes"]
    lines = [f"{plain['subject']} on {plain['device']}: {plain['verdict']} (a projection, nothing is measured)"]
    tiers = ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in size["by_tier"].items() if n)
    outside = f"; {size['without_place'] / 1e6:.1f} MB without a place" if size["without_place"] else ""
    weights, cache = (
        f"{size['weights'] / 1e6:.1f} MB, in {plain['dtype']} if not quantised",
        f"{size['cache'] / 1e6:.2f} MB",
    )
    lines.append(f"  weights {weights}; cache {cache}; in {tiers or 'no memory'}{outside}")
    if "seconds_per_token" in plain:
        first, token, rate = plain["seconds_to_first_token"], plain["seconds_per_token"], plain["tokens_per_second"]
        lines.append(
            f"  first token of a prompt of {plain['prompt']}: {first['low'] * 1e3:.0f} to {first['high'] * 1e3:.0f} "
            f"ms; then {rate['low']:.3g} to "
            f"{rate['high']:.3g} tokens/s (ceiling {1 / token['ceiling']:.3g}), limited by {token['binds']}"
        )
        joules = plain["joules_per_token"]
        spent = f"{joules['low']:.2g} to {joules['high']:.2g} ({joules['how']})" if joules else "not known"
        lines.append(f"  joules per token: {spent}")
        lines.append(f"  left out, since not known: {', '.join(plain['left_out']) or 'nothing'}")
        lines += [f"  not known, another stands in: {', '.join(plain['taken'])}"] if plain["taken"] else []
    fit = [f"{'none' if n is None else n} at {bits}" for bits, n in plain["blocks_that_fit"].items()]
    lines.append(f"  blocks that would fit {plain['where']}, by bits: {', '.join(fit)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in plain["notes"])])
