"""GPTQ of the embedded model side by side with GPTQModel: the same 16 windows of 512, 4 bits, groups of 64, symmetric;
seconds and perplexity.

Run it in the environment that CONTRIBUTING describes: `GPTQMODEL_CPU_WORKERS=2 python -m benchmarks.gptqmodel --write`
keeps the result in data/results/05_gptqmodel.json, which chapter 5 quotes: a row for each number of threads, since sums
in another order end at other weights. Without GPTQModel its recorded row stays and the others are measured: rounding,
GPTQ with GPTQModel's settings (damping 0.05, groups by importance, no clipping, tokens equal, sequential), the same
from left to right, and GPTQ with this study's defaults.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from thesislib.chapters.ch05_runs import GPTQMODEL
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.evaluate.perplexity import perplexity
from thesislib.files import data_file, read_json, write_whole
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_windows, evaluation_text

WINDOWS, LENGTH, HELD_OUT = 16, 512, 24
OURS = {
    "rounding": Rtn(4, 64, clip="none"),
    "thesislib, the same settings": Gptq(4, 64, windows=WINDOWS, length=LENGTH, **GPTQMODEL),
    "thesislib, from left to right": Gptq(4, 64, windows=WINDOWS, length=LENGTH, **{**GPTQMODEL, "act_order": "none"}),
    "thesislib, its defaults": Gptq(4, 64, windows=WINDOWS, length=LENGTH),
}


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """(n, m) int32 words to (n, m x 32 / bits) codes, the lowest bits first."""
    single = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(len(words), -1, bits)
    return (single.astype(int) << np.arange(bits)).sum(-1)


def dense(subject: Subject, folder: Path, bits: int = 4) -> Subject:
    """A copy of the subject with the weights of a GPTQ checkpoint."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    result, less = subject.copy(), int(config.get("checkpoint_format", "gptq") == "gptq")
    for i in range(subject.depth):
        for name, linear in result.linears(i).items():
            end = f".{name}.qweight"
            codes_of = next(p for p in tensors if p.startswith(f"model.layers.{i}.") and p.endswith(end))
            path = codes_of.removesuffix(".qweight")
            codes = unpacked(np.ascontiguousarray(tensors[f"{path}.qweight"].T.numpy()), bits)
            zeros = unpacked(np.ascontiguousarray(tensors[f"{path}.qzeros"].numpy()), bits).T + less
            groups, scales = tensors[f"{path}.g_idx"].long().numpy(), tensors[f"{path}.scales"].float().T.numpy()
            values = torch.from_numpy(scales[:, groups] * (codes - zeros[:, groups]))
            linear.weight.data = values.to(linear.weight.dtype)
    return result


def theirs(subject: Subject) -> tuple[Subject, float]:
    """The subject as GPTQModel quantises it, and the seconds that took."""
    from gptqmodel import GPTQModel, QuantizeConfig

    ids = calibration_windows(subject.tokenizer, "c4", "embedded", WINDOWS, LENGTH, 0)
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(f"{folder}/dense")
        subject.tokenizer.save_pretrained(f"{folder}/dense")
        config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False)
        model = GPTQModel.load(f"{folder}/dense", config, device="cpu")
        examples = [{"input_ids": window[None], "attention_mask": torch.ones_like(window)[None]} for window in ids]
        start = time.perf_counter()
        model.quantize(examples, batch_size=4)
        seconds = time.perf_counter() - start
        save_checkpoint(model, f"{folder}/theirs")
        return dense(subject, Path(f"{folder}/theirs")), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    subject, text, path = load_subject(), evaluation_text(), data_file("results/05_gptqmodel.json")
    facts, threads = read_json(path), torch.get_num_threads()
    rows = {(row["model"], row["threads"]): row for row in facts["rows"]}

    def measure(name: str, model: Subject, seconds: float = 0.0) -> None:
        value = round(perplexity(model, text, limit=HELD_OUT).value, 3)
        row = {"model": name, "threads": threads, "seconds": round(seconds, 1), "perplexity": value}
        rows[name, threads] = row
        print(row, flush=True)

    measure("dense", subject)
    if importlib.util.find_spec("gptqmodel"):
        measure("GPTQModel", *theirs(subject))
        facts["GPTQModel"] = importlib.metadata.version("gptqmodel")
    else:
        print("GPTQModel is not installed here; CONTRIBUTING says how. Its recorded row stays")
    for name, stage in OURS.items():
        start = time.perf_counter()
        ours, _ = stage.apply(subject)
        measure(name, ours, time.perf_counter() - start)
    if write:
        write_whole(path, json.dumps({**facts, "rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
