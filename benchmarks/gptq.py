"""GPTQ of the embedded model, seconds and peak memory in a process of its own; its column loop against a plain one.

`python -m benchmarks.gptq` quantises all 210 linears on 16 windows of 512; with `--loop` it only compares the loops.
"""

import argparse
import json
import time

import torch

from benchmarks.timing import peak_MB
from thesislib.compress.gptq import Gptq, gptq, inverse_factor
from thesislib.formats.load import load_subject
from thesislib.model.grid import Grid


def unblocked(weight: torch.Tensor, moment: torch.Tensor, grid: Grid) -> torch.Tensor:
    """GPTQ as in its paper's equation 2: after every column all later columns are updated, group by group."""
    weight, size = weight.clone(), grid.size(weight.shape[1])
    factor, _ = inverse_factor(moment / moment.diagonal().mean(), 0.01)
    for j in range(weight.shape[1]):
        if j % size == 0:
            scale, offset = grid.fit(weight[:, j : j + size])
        column = weight[:, j].clone()
        weight[:, j] = grid.values(grid.codes(column, scale, offset), scale, offset)
        error = (column - weight[:, j]) / factor[j, j]
        weight[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return weight


def loops(rows: int, columns: int, repeats: int = 3) -> dict:
    """The fastest run of each, in turns, and the share of weights on which the two agree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * columns, columns, generator=generator)
    weight, moment, grid = torch.randn(rows, columns, generator=generator), x.T @ x, Grid(4, 64)
    ours, theirs = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        blocked = gptq(weight, moment, grid)[0].weight
        middle = time.perf_counter()
        reference = unblocked(weight, moment, grid)
        ours.append(middle - start)
        theirs.append(time.perf_counter() - middle)
    agree = float((blocked == reference).float().mean())
    return {
        "blocks_s": round(min(ours), 4),
        "plain_s": round(min(theirs), 4),
        "ratio": round(min(theirs) / min(ours), 1),
        "agree": round(agree, 4),
    }


def whole_model() -> dict:
    """Seconds and peak resident MB of the default stage on 16 windows of 512."""
    subject = load_subject()
    start = time.perf_counter()
    _, report = Gptq(windows=16).apply(subject)
    seconds = round(time.perf_counter() - start, 1)
    return {
        "linears": report["linears"],
        "seconds": seconds,
        "peak_MB": round(peak_MB()),
        "threads": torch.get_num_threads(),
        "bar": "< 240 s, < 3,000 MB",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", action="store_true")
    if parser.parse_args().loop:
        shapes = ((576, 576), (3072, 576), (576, 1536))
        print(json.dumps({f"{rows} x {columns}": loops(rows, columns) for rows, columns in shapes}))
    else:
        print(json.dumps(whole_model()))
