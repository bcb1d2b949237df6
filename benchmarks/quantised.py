"""The speed of 4 bits: the embedded model rounded to an asymmetric grid in groups of 64, and dense."""

import statistics

from benchmarks.packed import linears_MB, median_speed, speeds_in_turns
from thesislib.compress.gptq import Rtn
from thesislib.formats.load import load_subject


def quantised_against_dense(dtype: str = "bfloat16", grid: str = "asymmetric", repeats: int = 5) -> dict:
    """Median tokens per second, in turns, of a prompt of 512 and of one token at a time, and MB of the linears."""
    dense = load_subject("embedded", dtype)
    models = {"dense": dense, "quantised": Rtn(grid=grid, clip="none").apply(dense)[0]}
    speeds = speeds_in_turns(models, repeats)
    result = {
        name: {**median_speed(speeds[name]), "MB_of_linears": linears_MB(subject)} for name, subject in models.items()
    }
    pairs = list(zip(speeds["quantised"], speeds["dense"], strict=True))
    ratios = {part: round(statistics.median(q[part] / d[part] for q, d in pairs), 3) for part in ("prefill", "decode")}
    return {**result, "ratios": ratios, "bar": "decode >= 1, prefill >= 0.9"}


if __name__ == "__main__":
    print(quantised_against_dense())
