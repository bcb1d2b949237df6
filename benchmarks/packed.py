"""What packing costs in speed and saves in bytes: the embedded model masked 2:4, its linears packed, unpacked, and on
sparse kernels."""

import statistics
import tempfile
import time

import torch

from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.load import load_subject
from thesislib.formats.sizes import sizes
from thesislib.model.packing import NINE, pack, unpack
from thesislib.model.sparse import semi_structured
from thesislib.model.subject import Subject

PREFILL, DECODE = 512, 16


def masked_2_4(dtype: str, device: str) -> Subject:
    """The embedded model without the two smallest of each four weights of a row: what it says does not matter here."""
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


def packed_against_dense(dtype: str = "bfloat16", device: str = "cpu", repeats: int = 3) -> dict:
    """Tokens per second (median, the kinds in turns) and bytes of a 2:4 model: dense, packed in memory, on sparse
    kernels."""
    with tempfile.TemporaryDirectory() as folder:
        dense = masked_2_4(dtype, device)
        on_disk = {}
        for kind, packed in (("dense", False), ("packed", True)):
            save_artifact(dense, f"{folder}/{kind}", packed=packed)
            on_disk[kind] = sizes_of(f"{folder}/{kind}")
        kinds = {"dense": dense, "packed": load_artifact(f"{folder}/packed", device=device)}
    try:
        kinds["kernel"] = semi_structured(dense)
        kernel = "used"
    except BadInput as error:
        kernel = f"not used: {error}"
    speeds = {kind: [] for kind in kinds}
    for subject in kinds.values():  # warm
        tokens_per_second(subject)
    for _ in range(repeats):
        for kind, subject in kinds.items():
            speeds[kind].append(tokens_per_second(subject))
    result = {}
    for kind, subject in kinds.items():
        speed = {
            f"{part}_tokens_per_s": round(statistics.median(s[part] for s in speeds[kind]), 1)
            for part in ("prefill", "decode")
        }
        linears = sum(t.nbytes for i in range(subject.depth) for m in subject.linears(i).values() for t in held(m))
        result[kind] = {
            **speed,
            "MB_in_memory": round(sizes(subject)["bytes_in_memory"] / 1e6, 1),
            "MB_of_linears": round(linears / 1e6, 1),
        }
        if kind in on_disk:
            result[kind]["MB_on_disk"] = round(on_disk[kind] / 1e6, 1)
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
    for pattern in NINE:
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
    """What a projection's weight takes in memory."""
    return module.resident if hasattr(module, "resident") else [module.weight]


def sizes_of(folder: str) -> int:
    """Bytes of weights on disk, as the artifact says."""
    from thesislib.formats.artifact_json import read_artifact

    return read_artifact(folder)["sizes"]["bytes_on_disk"]


if __name__ == "__main__":
    print(unpack_milliseconds())
    print(packed_against_dense())
