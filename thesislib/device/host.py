"""This machine as a device: the bandwidth and the MACs per second of one thread, measured, and a device file with
them."""

import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from thesislib.device.hardware import PRECISIONS
from thesislib.errors import BadInput, unknown
from thesislib.records.measurement import hardware

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
READ = 256 * 2**20  # bytes; larger than any last-level cache, so that memory is read


@contextmanager
def one_thread():
    """Run torch with one thread, as the engines that it is compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """The seconds of each call, after one that warms up."""
    function()
    seconds = []
    for _ in range(repeats):
        at = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - at)
    return seconds


def read_bandwidth(repeats: int = 9, size: int = READ) -> list[float]:
    """Bytes per second that one thread reads, one a repetition: in a sum over `size` bytes of float32, where reading
    takes longer than adding."""
    numbers = torch.ones(size // 4)
    with one_thread():
        return [size / s for s in _seconds(numbers.sum, repeats)]


def mac_rate(precision: str, product: str, repeats: int = 9) -> list[float]:
    """MACs per second of one thread, one a repetition.

    Args:
        precision: one of `TYPES`.
        product: gemm, a matrix product of 512 tokens by 576 by 1,536, as in the embedded model's MLP; or gemv, one
            token by a matrix of 256 KiB. That stays in the second-level cache, so that arithmetic is timed and not
            memory. torch has no int8 product for one token.
        repeats: how often.

    Raises:
        BadInput: another precision or product, or gemv in int8.
    """
    if precision not in TYPES:
        raise unknown("precision", precision, TYPES)
    if product not in ("gemm", "gemv") or (product, precision) == ("gemv", "int8"):
        raise BadInput(
            f"the rate of {product} in {precision} cannot be measured: expected gemm, or gemv in a floating type"
        )
    dtype = TYPES[precision]
    one_token = (1, 256, 2**18 // dtype.itemsize // 256, 200)
    tokens, inputs, outputs, times = (512, 576, 1536, 1) if product == "gemm" else one_token
    with one_thread(), torch.inference_mode():
        if dtype == torch.int8:
            a, b = (torch.randint(-8, 8, shape, dtype=dtype) for shape in ((tokens, inputs), (inputs, outputs)))
            seconds = _seconds(lambda: torch._int_mm(a, b), repeats)
        else:
            a, b = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
            seconds = _seconds(lambda: [torch.nn.functional.linear(a, b) for _ in range(times)], repeats)
    return [times * tokens * inputs * outputs / s for s in seconds]


def host_file(name: str = "host", repeats: int = 9) -> str:
    """A device file of one thread of this machine. Bandwidth and rates are medians of measurements; the rest is null.

    Raises:
        BadInput: the system does not say its clock or its memory.
    """
    clock, memory = _clock(), _memory()
    cpu, date = hardware()["cpu"], time.strftime("%Y-%m-%d", time.gmtime())
    how = f"one thread, torch {torch.__version__}, {date}, median of {repeats}: from {{:.3g}} to {{:.3g}}"

    def measured(value: float, unit: str, source: str) -> str:
        return f'{{value: {value:.4g} {unit}, kind: measured, source: "{source}"}}'

    def rates(product: str) -> list[str]:
        lines = [f"      {product}:"]
        for precision in PRECISIONS:
            # torch has no product of one token in int8; float16 is emulated on most CPUs
            if precision == "float16" or (product, precision) == ("gemv", "int8"):
                lines.append(f"        {precision}: null")
                continue
            samples = mac_rate(precision, product, repeats)
            source = f"{how.format(min(samples) / 1e9, max(samples) / 1e9)} GMAC/s, over the clock"
            lines.append(f"        {precision}: {measured(statistics.median(samples) / clock, 'MAC/cycle', source)}")
        return lines

    samples = read_bandwidth(repeats)
    source = f"{how.format(min(samples) / 1e9, max(samples) / 1e9)} GB/s, a sum over 256 MiB of float32"
    bandwidth = measured(statistics.median(samples) / 1e9, "GB/s", source)
    return "\n".join([
        f"name: {name}",
        f"title: the machine on which this file was made, one thread of it ({cpu})",
        "notes:",
        '  - "Made by `thesislib device calibrate`: rates are those of torch, which other engines may exceed."',
        "engines:",
        "  - name: one core",
        f"    clock: {measured(clock / 1e6, 'MHz', 'what the system says of the first core')}",
        "    macs_per_cycle:",
        *rates("gemv"),
        *rates("gemm"),
        "    stored_bits: null",
        "    energy: null",
        "tiers:",
        "  - name: DRAM",
        f"    size: {measured(memory / 1e9, 'GB', 'what the system says')}",
        f"    read: {bandwidth}",
        "    energy: null",
        "    on_chip: false",
        "    holds_cache: true",
        "overhead: null",
        "mbu:",
        "  value: [0.4, 0.9]",
        "  kind: assumed",
        '  source: "as for the boards; `thesislib measure` says what llama.cpp reaches here"',
        "mfu:",
        "  value: [0.7, 1]",
        "  kind: assumed",
        '  source: "rates here are what torch was measured to reach, not nominal; other engines may exceed them"',
        "idle: null",
        "power: null",
        "",
    ])  # fmt: skip


def _clock() -> float:
    """The clock of the first core, in Hz."""
    info = Path("/proc/cpuinfo")
    megahertz = re.search(r"^cpu MHz\s*: ([\d.]+)", info.read_text(), re.M) if info.exists() else None
    if not megahertz:
        raise BadInput(
            "this system does not say its clock in /proc/cpuinfo: copy hw/devices/laptop.yaml and write it by hand"
        )
    return float(megahertz[1]) * 1e6


def _memory() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
