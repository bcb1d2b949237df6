"""The cost of the calibration pass and of block ablation, and their peaks of memory; run as a module for one peak, see
benchmarks.__main__."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import MB, peak_MB, seconds
from thesislib.compress.calibration import stream
from thesislib.compress.depth import leave_one_out
from thesislib.compress.width import Prune, Width
from thesislib.formats.load import load_subject
from thesislib.model.blocks import remove
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_windows


def wanda_against_bare_forward(repeats: int = 3) -> dict:
    """A WANDA pass (statistics, masks, second run) over 8 windows of 512 against the model's own forward of the same
    tokens."""
    subject = load_subject(dtype="bfloat16")
    ids = calibration_windows(subject.tokenizer, "c4", "embedded", 8)

    def bare():
        with torch.inference_mode():
            for at in range(0, len(ids), 4):
                subject.model(ids[at : at + 4], use_cache=False)

    copies = [subject.copy() for _ in range(repeats + 1)]
    stream(copies.pop(), ids, Prune(Width(2, 4)))
    bare()
    pairs = [(seconds(lambda copy=copy: stream(copy, ids, Prune(Width(2, 4)))), seconds(bare)) for copy in copies]
    ours, theirs = (statistics.median(x) for x in zip(*pairs, strict=True))
    return {
        "pass_s": round(ours, 2),
        "bare_forward_s": round(theirs, 2),
        "ratio": round(ours / theirs, 2),
        "bar": "<= 2.5",
    }


def ablation_against_naive(repeats: int = 1) -> dict:
    """Every one of the 30 blocks left out once over 4 windows of 512: activations shared, against one forward with loss
    for each."""
    subject = load_subject(dtype="bfloat16")
    ids = calibration_windows(subject.tokenizer, "wikipedia", "embedded", 4)
    blocks = range(subject.depth)

    def naive():
        with torch.inference_mode():
            for b in blocks:
                remove(subject, [b]).model(ids, labels=ids, use_cache=False)

    def alone():
        for b in blocks:
            leave_one_out(subject, ids, [b])

    leave_one_out(subject, ids, [0])
    runs = [
        (seconds(lambda: leave_one_out(subject, ids, blocks)), seconds(naive), seconds(alone)) for _ in range(repeats)
    ]
    shared, theirs, ours_apart = (statistics.median(x) for x in zip(*runs, strict=True))
    return {
        "shared_s": round(shared, 1), "naive_s": round(theirs, 1), "ratio": round(shared / theirs, 2), "bar": "<= 0.6",
        "our_own_forwards_unshared_s": round(ours_apart, 1),
    }  # fmt: skip


def embedded_64_windows() -> dict:
    subject = load_subject(dtype="float32")
    Width(2, 4, windows=64).apply(subject)
    return {"bar": "< 2000"}


def one_billion(streamed: bool) -> dict:
    """Llama-3.2-1B's shapes with random weights, WANDA 2:4 over 16 windows of 512 in bfloat16."""
    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128_256, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    ids = torch.randint(0, config.vocab_size, (16, 512), generator=torch.Generator().manual_seed(0))
    if not streamed:
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        took = seconds(lambda: stream(Subject(model, None, "1B"), ids, Prune(Width(2, 4)), batch=2))
        return {"seconds": round(took), "bar": "< 6000"}
    from thesislib.pipeline.offload import FromFolder

    with tempfile.TemporaryDirectory() as folder:
        # written by another process, so that its memory does not count
        code = (
            "import sys, torch; from transformers import LlamaConfig, LlamaForCausalLM; "
            "torch.set_default_dtype(torch.bfloat16);"
            f"LlamaForCausalLM(LlamaConfig(**{config.to_diff_dict()!r})).save_pretrained(sys.argv[1])"
        )
        subprocess.run([sys.executable, "-c", code, f"{folder}/dense"], check=True, capture_output=True)
        Path(folder, "pruned").mkdir()
        blocks = FromFolder(Path(folder, "dense"), Path(folder, "pruned"))
        took = seconds(lambda: (Width(2, 4).stream_weights(blocks, ids), blocks.finish()))
        written = sum(f.stat().st_size for f in Path(folder, "pruned").iterdir())
    return {"seconds": round(took), "written_MB": round(written / MB), "bar": "< 6000"}


PEAKS = {"embedded": embedded_64_windows, "1B": lambda: one_billion(False), "1B-streamed": lambda: one_billion(True)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=PEAKS)
    result = PEAKS[parser.parse_args().which]()
    print(json.dumps({"peak_MB": round(peak_MB()), **result}))
