"""A projection in words and as JSON."""

import dataclasses

from thesislib.device.energy import energy
from thesislib.device.hardware import Device
from thesislib.device.placement import BITS, TOO_LARGE, blocks_that_fit
from thesislib.device.roofline import Span, profile
from thesislib.model.subject import Subject


def profile_report(subject: Subject, device: Device, prompt: int = 128, context: int = 128) -> dict:
    """The whole projection in SI units, with JSON's types only.

    Raises:
        BadInput: see `thesislib.device.roofline.project`.
    """
    p, on_chip = profile(subject, device, prompt, context), any(t.on_chip for t in device.tiers)
    report = {
        "kind": "projection",
        "subject": subject.name,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": device.name,
        "verdict": p.placement.verdict,
        "bytes": {
            "weights": p.costs.kept,
            "cache": p.costs.cache_bytes,
            "by_tier": p.placement.bytes,
            "without_place": p.placement.missing,
        },
        "per_token": {"macs": p.costs.macs, "weight_bytes": p.costs.weight_bytes},
        "blocks_that_fit": {
            str(bits): blocks_that_fit(subject, device, bits, on_chip=on_chip, cache_bytes=p.costs.cache_bytes)
            for bits in BITS
        },
        "where": "on the chip" if on_chip else "in its memory",
        "prompt": prompt,
        "context": context,
        "notes": list(device.notes),
        "evidence": {number: dataclasses.asdict(e) for number, e in device.evidence.items()},
    }
    if p.placement.verdict == TOO_LARGE or p.prefill is None or p.decode is None:
        return report
    spent = energy(subject, device, p.placement, p.decode, 1, context)
    slow, fast = p.tokens_per_second or (0.0, 0.0)
    return {
        **report,
        "seconds_to_first_token": _span(p.prefill.seconds),
        "seconds_per_token": _span(p.decode.seconds),
        "tokens_per_second": {"low": slow, "high": fast},
        "joules_per_token": {"low": spent.low, "high": spent.high, "how": spent.how} if spent.known else None,
        "left_out": sorted({*p.decode.unknown, *spent.unknown}),
        "taken": sorted({*p.prefill.taken, *p.decode.taken}),
    }


def _span(span: Span) -> dict:
    return dataclasses.asdict(span)


def readable(report: dict) -> str:
    """A projection of `profile_report` in a few lines."""
    size = report["bytes"]
    lines = [f"{report['subject']} on {report['device']}: {report['verdict']} (a projection, nothing is measured)"]
    tiers = ", ".join(f"{name} {n / 1e6:.1f} MB" for name, n in size["by_tier"].items() if n)
    outside = f"; {size['without_place'] / 1e6:.1f} MB without a place" if size["without_place"] else ""
    weights, cache = (
        f"{size['weights'] / 1e6:.1f} MB, in {report['dtype']} if not quantised",
        f"{size['cache'] / 1e6:.2f} MB",
    )
    lines.append(f"  weights {weights}; cache {cache}; in {tiers or 'no memory'}{outside}")
    if "seconds_per_token" in report:
        first, token, rate = report["seconds_to_first_token"], report["seconds_per_token"], report["tokens_per_second"]
        lines.append(
            f"  first token of a prompt of {report['prompt']}: {first['low'] * 1e3:.0f} to {first['high'] * 1e3:.0f} "
            f"ms; then {rate['low']:.3g} to "
            f"{rate['high']:.3g} tokens/s (ceiling {1 / token['ceiling']:.3g}), limited by {token['binds']}"
        )
        joules = report["joules_per_token"]
        spent = f"{joules['low']:.2g} to {joules['high']:.2g} ({joules['how']})" if joules else "not known"
        lines.append(f"  joules per token: {spent}")
        lines.append(f"  left out, since not known: {', '.join(report['left_out']) or 'nothing'}")
        lines += [f"  not known, another stands in: {', '.join(report['taken'])}"] if report["taken"] else []
    fit = [f"{'none' if n is None else n} at {bits}" for bits, n in report["blocks_that_fit"].items()]
    lines.append(f"  blocks that would fit {report['where']}, by bits: {', '.join(fit)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in report["notes"])])
