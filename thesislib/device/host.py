"""This machine as a device: what one thread of it reads and multiplies in a second, measured, and a device file made of that."""

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

from thesislib.errors import BadInput, unknown

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
READ = 256 * 2**20  # bytes: larger than any last cache, so that memory is read


@contextmanager
def one_thread():
    """torch with one thread, as what is measured beside it has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call, after one that does not count."""
    function()
    found = []
    for _ in range(repeats):
        at = time.perf_counter()
        function()
        found.append(time.perf_counter() - at)
    return found


def read_bandwidth(repeats: int = 9, size: int = READ) -> list[float]:
    """Bytes per second that one thread reads, once a repetition: a sum over `size` bytes of float32, where reading takes longer than adding."""
    numbers = torch.ones(size // 4)
    with one_thread():
        return [size / s for s in _seconds(numbers.sum, repeats)]


def mac_rate(precision: str, kind: str, repeats: int = 9) -> list[float]:
    """MACs per second of one thread, once a repetition.

    Args:
        precision: one of `PRECISIONS`.
        kind: gemm, a matrix product of 512 tokens by 576 by 1,536, the MLP's of the embedded model; or gemv, one token by a matrix of
            256 KiB, which stays in the second cache, so that it is arithmetic that is timed and not memory. torch has no int8 product for one token.
        repeats: how often.

    Raises:
        BadInput: another precision or kind, or gemv in int8.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if kind not in ("gemm", "gemv") or (kind, precision) == ("gemv", "int8"):
        raise BadInput(f"the rate of {kind} in {precision} cannot be measured: expected gemm, or gemv in a floating type")
    dtype = PRECISIONS[precision]
    tokens, inputs, outputs, times = (512, 576, 1536, 1) if kind == "gemm" else (1, 256, 2**18 // dtype.itemsize // 256, 200)
    with one_thread(), torch.inference_mode():
        if dtype == torch.int8:
            a, b = (torch.randint(-8, 8, shape, dtype=dtype) for shape in ((tokens, inputs), (inputs, outputs)))
            seconds = _seconds(lambda: torch._int_mm(a, b), repeats)
        else:
            a, b = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
            seconds = _seconds(lambda: [torch.nn.functional.linear(a, b) for _ in range(times)], repeats)
    return [times * tokens * inputs * outputs / s for s in seconds]
