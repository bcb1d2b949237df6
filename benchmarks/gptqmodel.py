"""GPTQ of the embedded model side by side with GPTQModel: the same 16 windows of 512, 4 bits, groups of 64, symmetric;
seconds and perplexity.

Run it in the environment that CONTRIBUTING describes: `GPTQMODEL_CPU_WORKERS=2 python -m benchmarks.gptqmodel`. Ours is
measured with GPTQModel's settings (damping 0.05, no act-order, no clipping, tokens equal, sequential), though its
act_group_aware has no counterpart here, and with this study's defaults.
"""

import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from thesislib.compress.gptq import Gptq
from thesislib.evaluate.perplexity import perplexity
from thesislib.formats.load import load_subject, save_checkpoint
from thesislib.model.subject import Subject
from thesislib.sources.corpus import calibration_windows, evaluation_text

WINDOWS, LENGTH, HELD_OUT = 16, 512, 24
THEIRS = {"damping": 0.05, "act_order": "none", "clip": "none", "weighting": "equal", "sequential": True}


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


def main() -> None:
    if importlib.util.find_spec("gptqmodel") is None:
        sys.exit("skipped: GPTQModel is not installed here; CONTRIBUTING says how")
    from gptqmodel import GPTQModel, QuantizeConfig

    subject = load_subject()
    ids = calibration_windows(subject.tokenizer, "c4", "embedded", WINDOWS, LENGTH, 0)
    text = evaluation_text()

    def row(model: Subject, seconds: float) -> dict[str, float]:
        return {"seconds": round(seconds, 1), "perplexity": round(perplexity(model, text, limit=HELD_OUT).value, 2)}

    result = {"dense": {"perplexity": round(perplexity(subject, text, limit=HELD_OUT).value, 2)}}
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
        theirs = dense(subject, Path(f"{folder}/theirs"))
    result["GPTQModel"] = row(theirs, seconds)
    for name, settings in (("thesislib, the same settings", THEIRS), ("thesislib, its defaults", {})):
        start = time.perf_counter()
        ours, _ = Gptq(bits=4, group=64, windows=WINDOWS, length=LENGTH, **settings).apply(subject)
        result[name] = row(ours, time.perf_counter() - start)
    print(json.dumps({**result, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
