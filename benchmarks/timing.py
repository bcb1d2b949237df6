"""What the benchmarks share: seconds, medians of runs in turns, and the peak of memory."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping

MB = 1e6


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes."""
    start = clock()
    function()
    return clock() - start


def in_turns(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function, run in turns so that a busy machine slows all alike, after `warm_up` rounds."""
    rounds = [{name: seconds(f, clock) for name, f in functions.items()} for _ in range(warm_up + repeats)][warm_up:]
    return {name: statistics.median(times[name] for times in rounds) for name in functions}


def peak_MB() -> float:
    """The peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
