"""`make bench`: print the table, and with --write keep it in benchmarks/results.json. No test depends on a timing."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import stream, threads
from benchmarks.generate import leaving_against_generate
from benchmarks.lora import lora_against_bare_loop
from benchmarks.packed import packed_against_dense
from benchmarks.quantised import quantised_against_dense
from benchmarks.timing import in_turns, seconds
from thesislib.compress.franken import franken_plans
from thesislib.evaluate.perplexity import perplexities, perplexity
from thesislib.evaluate.setup import Setup
from thesislib.evaluate.triviaqa import triviaqa
from thesislib.formats.load import load_subject
from thesislib.model.blocks import apply_plan
from thesislib.records.measurement import hardware
from thesislib.sources.corpus import evaluation_text, questions, windows


def alternating(first, second, repeats: int) -> tuple[float, float]:
    """Median seconds of each, run in turns."""
    times = in_turns({"first": first, "second": second}, repeats)
    return times["first"], times["second"]


def perplexity_against_bare_forward(dtype: str, repeats: int = 3) -> dict:
    """32 windows of 512 in batches of 4: our whole measurement against the model's own forward, logits and all."""
    subject, text = load_subject(dtype=dtype), evaluation_text()
    ids = windows(text, subject.tokenizer, 512, 32).ids
    subject.fingerprint  # noqa: B018  computed at first use, once for a loaded model

    def bare():
        with torch.inference_mode():
            for i in range(0, 32, 4):
                subject.model(ids[i : i + 4], use_cache=False)

    perplexity(subject, text, limit=4)
    ours, theirs = alternating(lambda: perplexity(subject, text, limit=32), bare, repeats)
    tokens = 32 * 512
    return {
        "tokens_per_s": round(tokens / ours),
        "bare_tokens_per_s": round(tokens / theirs),
        "ratio": round(theirs / ours, 3),
        "bar": ">= 0.9",
    }


def plans_together_and_apart(repeats: int = 1) -> dict:
    """The 25 Franken-LLaMA plans over 4 windows of 512: blocks shared, and one plan after the other."""
    subject, text = load_subject(dtype="bfloat16"), evaluation_text()
    plans = franken_plans(subject.depth)
    perplexity(subject, text, limit=4)
    ours, theirs = alternating(
        lambda: perplexities(subject, text, plans, limit=4),
        lambda: [perplexity(apply_plan(subject, p), text, limit=4) for p in plans.values()],
        repeats,
    )
    return {"together_s": round(ours, 1), "apart_s": round(theirs, 1), "ratio": round(ours / theirs, 3)}


def trivia_batched(repeats: int = 3) -> dict:
    """Closed-book questions per second at batch 32 and at batch 1."""
    subject, asked = load_subject(dtype="bfloat16"), questions(limit=64)
    triviaqa(subject, asked[:2], source="warm-up")
    many, one = alternating(
        lambda: triviaqa(subject, asked, source="bench", batch=32),
        lambda: triviaqa(subject, asked[:8], source="bench", batch=1),
        repeats,
    )
    return {
        "batch_32_per_s": round(64 / many, 2),
        "batch_1_per_s": round(8 / one, 2),
        "ratio": round((64 / many) / (8 / one), 2),
        "bar": ">= 4",
    }


def choice_against_harness(repeats: int = 1) -> dict:
    """24 HellaSwag items: endings packed behind one context, and lm-evaluation-harness's pairs."""
    subject = load_subject(dtype="bfloat16")
    packed, pairs = (Setup("hellaswag", limit=24, fast=fast) for fast in (True, False))
    ours, theirs = alternating(
        lambda: packed.measure(subject, "embedded"), lambda: pairs.measure(subject, "embedded"), repeats
    )
    return {"packed_s": round(ours, 1), "harness_s": round(theirs, 1), "ratio": round(ours / theirs, 3)}


def load_seconds() -> dict:
    """Loading the embedded subject once it is converted."""
    return {"seconds": round(statistics.median(seconds(load_subject) for _ in range(3)), 2), "bar": "< 4"}


def in_own_process(module: str, *arguments: str) -> dict:
    """The JSON that a module of this folder prints when it is run by itself, so that its peak of memory is its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def memory_at_2048() -> dict:
    """Peak resident bytes of a process that loads the float32 subject and measures windows of 2,048, one at a time."""
    return {**in_own_process("memory"), "bar": "< 700 above the model"}


BENCHMARKS = {
    "load": load_seconds,
    "perplexity, bfloat16": lambda: perplexity_against_bare_forward("bfloat16"),
    "perplexity, float32": lambda: perplexity_against_bare_forward("float32"),
    "memory at 2,048": memory_at_2048,
    "trivia": trivia_batched,
    "generation": leaving_against_generate,
    "plans": plans_together_and_apart,
    "choice": choice_against_harness,
    "WANDA pass": stream.wanda_against_bare_forward,
    "block ablation": stream.ablation_against_naive,
    "packed": packed_against_dense,
    "quantised": quantised_against_dense,
    "threads that wait": threads.waiting,
    "LoRA": lora_against_bare_loop,
    "GPTQ, the embedded model": lambda: in_own_process("gptq"),
    "memory, WANDA over 64 windows": lambda: in_own_process("stream", "embedded"),
    "memory, WANDA on 1B": lambda: in_own_process("stream", "1B"),
    "memory, WANDA on 1B, weights streamed": lambda: in_own_process("stream", "1B-streamed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=BENCHMARKS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    results = {}
    for name, benchmark in BENCHMARKS.items():
        if arguments.only in (None, name):
            results[name] = benchmark()
            print(name, results[name], flush=True)
    if arguments.write:
        path = Path(__file__).parent / "results.json"
        kept = json.loads(path.read_text())["results"] if path.exists() else {}
        date = time.strftime("%Y-%m-%d", time.gmtime())
        machine = {"hardware": hardware(), "torch": torch.__version__, "python": sys.version.split()[0], "date": date}
        path.write_text(json.dumps({**machine, "results": {**kept, **results}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
