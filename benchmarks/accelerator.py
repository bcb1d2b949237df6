"""One NVIDIA card checked and timed: `python -m benchmarks.accelerator [SUBJECT] [--quick]`, one line of JSON a part,
minutes in all.

SUBJECT is a checkpoint folder, a .gguf file or, by default, the embedded model. No other data is needed: the text is
random tokens. A part that fails says so in its line, the others go on, and the exit code is 1.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from benchmarks.packed import median_speed, speeds_in_turns
from benchmarks.timing import in_turns
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.evaluate import perplexity
from thesislib.evaluate.generate import continuations
from thesislib.formats.load import load_subject
from thesislib.model.forward import batch_for, tile, token_losses
from thesislib.model.sparse import pack_all, semi_structured
from thesislib.model.subject import Subject

LENGTH = 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a run on a CPU is a rehearsal; its figures say nothing


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function on the card, run in turns after a round that warms up."""
    return in_turns(functions, repeats, warm_up=1, clock=clock)


def random_ids(subject: Subject, rows: int, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """(rows, length) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, subject.model.config.vocab_size, (rows, length), generator=generator)


# ---------------------------------------------------------------- the losses of an earlier version, to compare with


def losses_as_before(model, states, targets, rows=1024, columns=2048):
    """In tiles for a CPU's cache, with boolean indices that wait for the card."""
    words = model.get_output_embeddings().weight
    losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
    for i in range(0, len(states), rows):
        x, target = states[i : i + rows], targets[i : i + rows]
        total = torch.full((len(x),), -torch.inf, device=x.device)
        hit = torch.empty_like(total)
        for j in range(0, len(words), columns):
            logits = (x @ words[j : j + columns].T).float()
            total = torch.logaddexp(total, logits.logsumexp(1))
            here = (target >= j) & (target < j + columns)
            hit[here] = logits[here, target[here] - j]
        losses[i : i + rows] = total - hit
    return losses


# ---------------------------------------------------------------- parts


def losses(subject: Subject, batches: list[int], windows: int, repeats: int) -> dict:
    """Perplexity's own loop against the bare forward pass, logits and all, in tokens per second."""
    result = {}
    ids = random_ids(subject, windows)

    def bare(batch: int) -> None:
        with torch.inference_mode():
            for part in ids.split(batch):
                subject.model(part.to(DEVICE), use_cache=False)

    def before(batch: int) -> list:
        with torch.inference_mode():
            nats = []
            for part in ids.split(batch):
                part = part.to(DEVICE)
                states = subject.model.model(input_ids=part, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
                each = losses_as_before(subject.model, states, part[:, 1:].flatten())
                nats += each.view(len(part), -1).double().sum(1).cpu().tolist()
            return nats

    def now(batch: int) -> list:
        return perplexity._nats(subject, ids, None, batch)[0].tolist()

    ways = {"bare": bare, "before": before, "now": now}
    for batch in batches:
        some = {name: (lambda way=way, batch=batch: way(batch)) for name, way in ways.items()}
        times = medians(some, repeats)
        rates = {name: round(windows * LENGTH / s) for name, s in times.items()}
        shares = {name: round(times["bare"] / s, 3) for name, s in times.items() if name != "bare"}
        apart = max(abs(a - b) / b for a, b in zip(now(batch), before(batch), strict=True))
        result[f"batch {batch}"] = {
            "tokens_per_s": rates,
            "share_of_bare": shares,
            "largest_relative_difference": f"{apart:.1e}",
        }
    return {
        **result,
        "tile": tile(DEVICE, subject.model.config.vocab_size),
        "default_batch": batch_for(subject.model, LENGTH, 4),
        "bar": ">= 0.9 at batch 32",
    }


def loss_alone(subject: Subject, repeats: int) -> dict:
    """Milliseconds for the losses of 32 windows, without the model: by rows at a time."""
    states = torch.randn(32 * (LENGTH - 1), subject.model.config.hidden_size, device=DEVICE).to(subject.dtype)
    targets = random_ids(subject, 32, LENGTH - 1).flatten().to(DEVICE)
    head = subject.model.get_output_embeddings().weight
    ways = {
        f"{rows} rows": (lambda rows=rows: token_losses(subject.model, states, targets, rows))
        for rows in (256, 1024, 1820, 4096, 8192)
    }
    ways["product alone"] = lambda: [part @ head.T for part in states.split(4096)]
    ways["before"] = lambda: losses_as_before(subject.model, states, targets)
    with torch.inference_mode():
        return {name: round(1000 * s, 2) for name, s in medians(ways, repeats).items()}


def answers(subject: Subject, questions: int, batch: int, prompt: int, new: int) -> dict:
    """Questions per second: with a check at every token, with one every eight tokens, and with recorded steps besides.

    No row ends early, which is the slowest case.
    """
    ids, mask = random_ids(subject, questions, prompt), torch.ones(questions, prompt, dtype=torch.long)
    for row in range(questions):
        mask[row, : row % (prompt // 2)] = 0  # padding on the left
    never = mock.patch("thesislib.model.prompts.end_tokens", lambda subject: [])
    unrecorded = mock.patch("thesislib.evaluate.generate._recordable", lambda model: False)

    def ask(ahead: int) -> list:
        return [
            row
            for a, b in zip(ids.split(batch), mask.split(batch), strict=True)
            for row in continuations(subject, a, b, new, ahead)
        ]

    tokens, rates = {}, {}
    with never:
        for name, ahead, record in (("before", 0, True), ("ahead", 8, False), ("recorded", 8, True)):
            with contextlib.nullcontext() if record else unrecorded:
                continuations(subject, ids[:batch], mask[:batch], 4, ahead)
                start = clock()
                tokens[name] = ask(ahead)
                rates[name] = round(questions / (clock() - start), 2)
    pairs = {name: zip(tokens[name], tokens["before"], strict=True) for name in ("ahead", "recorded")}
    same = {name: sum(a == b for a, b in both) for name, both in pairs.items()}
    return {
        "questions_per_s": rates,
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "same_answers_as_before": same,
        "of": questions,
    }


def agreement(subject: Subject, spec: str) -> dict:
    """The losses and answers of the card against those of the CPU, in float32."""
    here = load_subject(spec, "float32")
    there = dataclasses.replace(here, model=here.copy().model.to(DEVICE))
    ids = random_ids(here, 2, 256)
    ours, theirs = (perplexity._nats(s, ids, None, 2)[0] for s in (there, here))
    mask = torch.ones_like(ids[:, :64])
    mask[1, :20] = 0
    tokens = [continuations(s, ids[:, :64], mask, 16) for s in (there, here)]
    return {
        "largest_relative_difference": float(max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))),
        "same_answers": tokens[0] == tokens[1], "fingerprint": there.fingerprint == here.fingerprint,
    }  # fmt: skip


def packed(subject: Subject, repeats: int) -> dict:
    """W2:4 and 4 bits on the card: tokens per second of a prompt of 512 and one token at a time."""
    pruned, _ = Width(2, 4, metric="magnitude").apply(subject)
    models = {
        "dense": subject,
        "W2:4 packed": pack_all(pruned),
        "W2:4 on sparse kernels": pruned,
        "4 bits": Rtn(grid="asymmetric", clip="none").apply(subject)[0],
    }
    if DEVICE == "cuda":
        models["W2:4 on sparse kernels"] = semi_structured(pruned)
    return {name: median_speed(speeds) for name, speeds in speeds_in_turns(models, repeats).items()}


CHILD = """
import sys, torch
from benchmarks import accelerator
from thesislib.evaluate import perplexity
from thesislib.formats.load import load_subject
from thesislib.sweep.task import MEMORY_FOR_TENSORS
workers, windows, spec = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if accelerator.DEVICE == "cuda":
    torch.cuda.set_per_process_memory_fraction(MEMORY_FOR_TENSORS / workers, "cuda:0")
subject = load_subject(spec, "bfloat16", accelerator.DEVICE)
ids = accelerator.random_ids(subject, windows)
perplexity._nats(subject, ids[:4], None, 4)
print("ready", flush=True)
sys.stdin.readline()
perplexity._nats(subject, ids, None, 4)
print("done", flush=True)
"""


def sharing(spec: str, counts: list[int], windows: int) -> dict:
    """Perplexity at batch 4 by several processes on one card, each with its part of the memory: tokens per second of
    all together."""
    rates = {}
    for count in counts:
        command = [sys.executable, "-c", CHILD, str(count), str(windows), spec]
        crew = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        try:
            if any(process.stdout.readline() != "ready\n" for process in crew):
                raise RuntimeError(f"one of {count} workers did not start")
            start = time.perf_counter()
            for process in crew:
                process.stdin.write("\n")
                process.stdin.flush()
            if any(process.stdout.readline() != "done\n" for process in crew):
                raise RuntimeError(f"one of {count} workers did not finish")
            rates[f"{count} on a card"] = round(count * windows * LENGTH / (time.perf_counter() - start))
        finally:
            for process in crew:
                process.kill()
                process.communicate()
    return {"tokens_per_s": rates}


def tests() -> dict:
    """The tests marked cuda."""
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_cuda.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    result = {"summary": done.stdout.strip().splitlines()[-1:]}
    if done.returncode:
        raise RuntimeError(f"{result['summary']}: {done.stdout[-3000:]}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", nargs="?", default="embedded")
    parser.add_argument("--quick", action="store_true", help="one repetition of fewer windows and questions")
    parser.add_argument("--only", nargs="*", help="parts")
    arguments = parser.parse_args()
    quick, spec = arguments.quick, arguments.subject
    size = SimpleNamespace(windows=64 if quick else 256, repeats=1 if quick else 3, questions=64 if quick else 128)
    if DEVICE == "cpu":
        size = SimpleNamespace(windows=2, repeats=1, questions=2)
    torch.backends.cuda.matmul.allow_tf32 = False
    subject = load_subject(spec, "bfloat16", DEVICE)
    batches, card = [4, 32], DEVICE == "cuda"
    new, counts = 50 if card else 4, [1, 2, 4] if quick else [1, 2, 4, 8]

    def float32() -> dict:
        return losses(load_subject(spec, "float32", DEVICE), batches, size.windows // 2 or 1, size.repeats)

    parts = {
        "tests": tests,
        "card and CPU": lambda: agreement(subject, spec),
        "perplexity, bfloat16": lambda: losses(subject, batches, size.windows, size.repeats),
        "losses alone, ms": lambda: loss_alone(subject, size.repeats) if card else {},
        "answers": lambda: answers(subject, size.questions, 32, 64, new),
        "answers from a text": lambda: answers(subject, size.questions, 32, 512, new),
        "packed": lambda: packed(subject, size.repeats),
        "sharing": lambda: sharing(spec, counts, 64) if card else {},
        "perplexity, float32": float32,
    }
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "subject": subject.name, "quick": quick}), flush=True)
    failed = False
    for part, measure in parts.items():
        if arguments.only and part not in arguments.only:
            continue
        start = time.perf_counter()
        try:
            result = measure()
        except Exception as error:  # the errors of a card have no common class
            failed, result = True, {"failed": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        print(json.dumps({"part": part, **result, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
