"""The speed and the bytes of packed weights: the embedded model masked 2:4, its linears dense, packed, and on sparse
kernels."""

import statistics
import tempfile
import time
from collections.abc import Mapping

import torch

from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.artifact_json import read_artifact
from thesislib.formats.load import load_subject
from thesislib.formats.sizes import sizes
from thesislib.model.packing import THESIS_PATTERNS, pack, unpack
from thesislib.model.sparse import semi_structured
from thesislib.model.subject import Subject

PREFILL, DECODE = 512, 16


def masked_2_4(dtype: str, device: str) -> Subject:
    """The embedded model without the two smallest of each four weights of a row."""
    subject = load_subject("embedded", dtype, device)
    for i in range(subject.depth):
        for module in subject.linears(i).values():
            groups = module.weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, 1, largest=False).indices, 0)
    return subject


def tokens_per_second(subject: Subject) -> dict[str, float]:
    """Reading a prompt of 512 tokens, and writing one token after it at a time."""
    ids = torch.arange(PREFILL, device=subject.device)[None] + 100

    def clock() -> float:
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        start = clock()
        out = subject.model(ids, logits_to_keep=1)
        read = clock()
        for _ in range(DECODE):
            out = subject.model(ids[:, :1], past_key_values=out.past_key_values)
        written = clock()
    return {"prefill": PREFILL / (read - start), "decode": DECODE / (written - read)}


def speeds_in_turns(models: Mapping[str, Subject], repeats: int) -> dict[str, list[dict[str, float]]]:
    """`tokens_per_second` of each model, `repeats` times in turns, after one run of each that warms up."""
    for subject in models.values():
        tokens_per_second(subject)
    rounds = [{name: tokens_per_second(subject) for name, subject in models.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in models}


def median_speed(speeds: list[dict[str, float]]) -> dict[str, float]:
    """The medians of `tokens_per_second` over repetitions."""
    return {part: round(statistics.median(s[part] for s in speeds), 1) for part in speeds[0]}


def linears_MB(subject: Subject) -> float:
    """The memory of the linears."""
    tensors = (t for i in range(subject.depth) for m in subject.linears(i).values() for t in held(m))
    return round(sum(t.nbytes for t in tensors) / 1e6, 1)


def packed_against_dense(dtype: str = "bfloat16", device: str = "cpu", repeats: int = 3) -> dict:
    """Median tokens per second, in turns, and bytes of a 2:4 model: dense, packed in memory, on sparse kernels."""
    with tempfile.TemporaryDirectory() as folder:
        dense = masked_2_4(dtype, device)
        on_disk = {}
        for form, packed in (("dense", False), ("packed", True)):
            save_artifact(dense, f"{folder}/{form}", packed=packed)
            on_disk[form] = sizes_of(f"{folder}/{form}")
        models = {"dense": dense, "packed": load_artifact(f"{folder}/packed", device=device)}
    try:
        models["kernel"] = semi_structured(dense)
        kernel = "used"
    except BadInput as error:
        kernel = f"not used: {error}"
    speeds = speeds_in_turns(models, repeats)
    result = {}
    for form, subject in models.items():
        result[form] = {
            **{f"{part}_tokens_per_s": speed for part, speed in median_speed(speeds[form]).items()},
            "MB_in_memory": round(sizes(subject)["bytes_in_memory"] / 1e6, 1),
            "MB_of_linears": linears_MB(subject),
        }
        if form in on_disk:
            result[form]["MB_on_disk"] = round(on_disk[form] / 1e6, 1)
    share = result["packed"]["MB_of_linears"] / result["dense"]["MB_of_linears"]
    return {
        **result,
        "share_of_linears": round(share, 3),
        "bar": "<= 0.60 of the linears' bytes",
        "kernel_note": kernel,
        "threads": torch.get_num_threads(),
    }


def unpack_milliseconds(repeats: int = 20) -> dict:
    """Unpacking one 1536 x 576 bfloat16 matrix, for each of the nine patterns."""
    result = {}
    for pattern in THESIS_PATTERNS:
        weight = torch.randn(1536, 576).bfloat16()
        groups = weight.view(-1, pattern.of)
        groups.scatter_(1, groups.abs().topk(pattern.remove, 1, largest=False).indices, 0)
        for encoding in (str(pattern), *(["bitmap"] if str(pattern) == "2:4" else [])):
            tensors, times = pack(weight, encoding), []
            for _ in range(repeats):
                start = time.perf_counter()
                unpack(tensors, encoding, weight.shape)
                times.append(1000 * (time.perf_counter() - start))
            result[encoding] = round(statistics.median(times), 2)
    return {"ms": result, "threads": torch.get_num_threads()}


def held(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors of a projection's weight in memory."""
    return module.resident if hasattr(module, "resident") else [module.weight]


def sizes_of(folder: str) -> int:
    """The bytes of an artifact's weights on disk."""
    return read_artifact(folder)["sizes"]["bytes_on_disk"]


if __name__ == "__main__":
    print(unpack_milliseconds())
    print(packed_against_dense())
