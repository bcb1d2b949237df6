"""What 4 bits cost or save in speed: the embedded model rounded to an asymmetric grid in groups of 64, and dense, both
as they are held."""

import statistics

from benchmarks.packed import held, tokens_per_second
from thesislib.compress.gptq import Rtn
from thesislib.formats.load import load_subject


def quantised_against_dense(dtype: str = "bfloat16", grid: str = "asymmetric", repeats: int = 5) -> dict:
    """Tokens per second (median, in turns) of a prompt of 512 and of one token at a time, and MB of the linears."""
    dense = load_subject("embedded", dtype)
    kinds = {"dense": dense, "quantised": Rtn(grid=grid, clip="none").apply(dense)[0]}
    for subject in kinds.values():  # warm
        tokens_per_second(subject)
    speeds = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, subject in kinds.items():
            speeds[kind].append(tokens_per_second(subject))
    found = {}
    for kind, subject in kinds.items():
        found[kind] = {
            part: round(statistics.median(s[part] for s in speeds[kind]), 1) for part in ("prefill", "decode")
        }
        found[kind]["MB_of_linears"] = round(
            sum(t.nbytes for i in range(subject.depth) for m in subject.linears(i).values() for t in held(m)) / 1e6, 1
        )
    pairs = list(zip(speeds["quantised"], speeds["dense"], strict=True))
    ratios = {part: round(statistics.median(q[part] / d[part] for q, d in pairs), 3) for part in ("prefill", "decode")}
    return {**found, "ratios": ratios, "bar": "decode >= 1, prefill >= 0.9"}


if __name__ == "__main__":
    print(quantised_against_dense())
