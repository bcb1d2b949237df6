"""The speed of decoding on this machine, in llama.cpp and in transformers: on one pinned thread, with every sample, and
with a verdict on whether the machine was quiet."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import DynamicCache

from thesislib.device.cost import distinct_bytes, stored
from thesislib.device.engine import Request, run_engine, watched
from thesislib.device.host import one_thread
from thesislib.errors import BadInput
from thesislib.files import cache_dir
from thesislib.formats.gguf import export_gguf
from thesislib.model.subject import Subject
from thesislib.records.measurement import Measurement, provenance

LOADED = 0.25  # cores that other processes kept busy; beyond, memory and the last cache were shared
NOISY = 0.15  # spread of the repetitions' medians, as a share of their median
METRIC = "seconds per token"
QUIET, NOISY_HOST = "quiet", "inconclusive: noisy host"
SAMPLE = (
    "The history of engineering is full of machines that were made smaller, cheaper and slower, and were used by "
    "more people for it. "
)


def engine_name(kind: str) -> str:
    """The name of an engine, as in `Timing`: "llama.cpp Q8_0" for a GGUF type, "transformers bfloat16" for a dtype."""
    return f"{'transformers' if kind.startswith(('float', 'bfloat')) else 'llama.cpp'} {kind}"


def computed_in(kind: str) -> str:
    """The precision in which an engine multiplies by matrices of a GGUF type or a dtype."""
    floating = {"F16": "float32", "F32": "float32", "BF16": "bfloat16", "float32": "float32", "bfloat16": "bfloat16"}
    return floating.get(kind, "int8")


@dataclass(frozen=True)
class Timing:
    """The times of one model in one engine.

    Attributes:
        engine: see `engine_name`.
        prompt: how many tokens were read at once.
        first: the seconds from the prompt to the first token, one a repetition.
        later: the seconds of each token after it, by repetition.
        others: how many cores other processes kept busy, by repetition; None if the system does not say.
        bytes: of weights, cache and the process, as far as the engine tells.
        versions: of the engine.
    """

    engine: str
    prompt: int
    first: tuple[float, ...]
    later: tuple[tuple[float, ...], ...]
    others: tuple[float | None, ...]
    bytes: dict[str, int]
    versions: dict[str, str]

    @property
    def seconds_to_first_token(self) -> float:
        """The median over repetitions."""
        return statistics.median(self.first)

    @property
    def seconds_per_token(self) -> float:
        """The median over all tokens but the first, whose time contains the prompt's."""
        return statistics.median(self.seconds)

    @property
    def seconds(self) -> list[float]:
        """The seconds of every token but the first, over all repetitions."""
        return [s for repetition in self.later for s in repetition]

    @property
    def spread(self) -> float:
        """How much repetitions differ: the range of their medians, as a share of the median of these."""
        middles = [statistics.median(repetition) for repetition in self.later]
        return (max(middles) - min(middles)) / statistics.median(middles)

    @property
    def verdict(self) -> str:
        """Whether the machine was quiet: "quiet", "inconclusive: noisy host", or "loaded: others kept 1.0 cores
        busy"."""
        others = [x for x in self.others if x is not None]
        if others and (busy := statistics.median(others)) > LOADED:
            return f"loaded: others kept {busy:.1f} cores busy"
        return NOISY_HOST if self.spread > NOISY else QUIET


def time_llama_cpp(
    file: str | Path, ids: Sequence[int], tokens: int = 32, repeats: int = 5, core: int | None = 0
) -> Timing:
    """Time llama.cpp on one thread that is pinned to a core, after one run that warms up.

    Args:
        file: a GGUF file.
        ids: the prompt's tokens.
        tokens: how many to decode after the first.
        repeats: at least five, for a median that can be relied on.
        core: that the thread is pinned to.

    Raises:
        BadInput: see `thesislib.device.engine.run_engine`.
    """
    answer = run_engine(Request(str(file), [list(ids)], tokens + 1, repeats, warm_up=1, core=core))
    samples = answer["samples"]
    return Timing(
        engine_name(file_type(file)),
        len(ids),
        tuple(s["seconds"][0] for s in samples),
        tuple(tuple(s["seconds"][1:]) for s in samples),
        tuple(s["others"] for s in samples),
        answer["bytes"],
        answer["versions"],
    )


def prompt_ids(subject: Subject, n: int) -> list[int]:
    """The first `n` tokens of a text that is repeated as often as needed; the text does not change the cost."""
    ids = subject.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    return (ids * (n // len(ids) + 1))[:n]


def file_type(file: str | Path) -> str:
    """The GGUF type that most bytes of a file's matrices have, embedding and head apart.

    Raises:
        BadInput: the file has no other matrices.
    """
    size: dict[str, int] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1 and tensor.name not in ("token_embd.weight", "output.weight"):
            size[tensor.tensor_type.name] = size.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    if not size:
        raise BadInput(f"{file} has no matrices beside its embedding: expected a language model")
    return max(size, key=lambda name: size[name])


def bytes_per_token(file: str | Path) -> int:
    """The bytes of weights that decoding one token reads from a GGUF file.

    They are all weights, but only one row of an embedding that is not the head too.
    """
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    sizes = {name: int(t.n_bytes) for name, t in tensors.items()}
    if "output.weight" in sizes:
        sizes["token_embd.weight"] //= int(tensors["token_embd.weight"].shape[-1])
    return sum(sizes.values())


def time_transformers(subject: Subject, ids: Sequence[int], tokens: int = 32, repeats: int = 5) -> Timing:
    """Time the same greedy decoding by transformers with its KV cache, on one thread of this process.

    One run before warms up.
    """
    with one_thread():
        greedy_steps(subject, ids, 2)
        runs = []
        for _ in range(repeats):
            others = watched()
            runs.append((greedy_steps(subject, ids, tokens + 1)[2], others()))
    return Timing(
        engine_name(str(subject.dtype).removeprefix("torch.")),
        len(ids),
        tuple(s[0] for s, _ in runs),
        tuple(tuple(s[1:]) for s, _ in runs),
        tuple(others for _, others in runs),
        {"weights": distinct_bytes(stored(subject))},
        {"torch": torch.__version__},
    )


def greedy_steps(
    subject: Subject, ids: Sequence[int], tokens: int
) -> tuple[list[int], list[torch.Tensor], list[float]]:
    """Greedy decoding that goes on after end tokens.

    Returns:
        The chosen tokens, the logits (vocabulary,) that each was chosen from, and the seconds of each.
    """
    cache, feed = DynamicCache(config=subject.model.config), torch.tensor([list(ids)])
    chosen, scores, seconds = [], [], []
    with torch.inference_mode():
        for _ in range(tokens):
            at = time.perf_counter()
            logits = subject.model(
                input_ids=feed.to(subject.device), past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[0, -1]
            chosen.append(int(logits.argmax()))
            seconds.append(time.perf_counter() - at)
            scores.append(logits.float().cpu())
            feed = torch.tensor([chosen[-1:]])
    return chosen, scores, seconds


@dataclass(frozen=True)
class Agreement:
    """How long two engines choose the same tokens after a prompt.

    Attributes:
        same: how many tokens are the same before the first that differs.
        of: how many tokens there are.
        margin: at the first that differs, the reference's logit of its own token less that of the other's token; None
            if all are the same.
        gap: the smallest difference between the reference's two largest logits, up to there.
    """

    same: int
    of: int
    margin: float | None
    gap: float


def agreement(
    subject: Subject, file: str | Path, prompts: Sequence[Sequence[int]], tokens: int = 32
) -> list[Agreement]:
    """Compare greedy decoding of a GGUF file in llama.cpp, its cache in float32, with the subject's in transformers,
    prompt by prompt.

    Raises:
        BadInput: see `thesislib.device.engine.run_engine`.
    """
    theirs = run_engine(Request(str(file), [list(p) for p in prompts], tokens, exact=True))["samples"]
    result = []
    for prompt, sample in zip(prompts, theirs, strict=True):
        ours, logits, _ = greedy_steps(subject, prompt, tokens)
        result.append(agreed(ours, sample["ids"], logits))
    return result


def agreed(ours: Sequence[int], theirs: Sequence[int], logits: Sequence[torch.Tensor]) -> Agreement:
    """Compare two sequences of tokens, given the logits (vocabulary,) that each of ours was chosen from."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    leads = [float(torch.subtract(*torch.topk(step, 2).values)) for step in logits[: same + 1]]
    margin = None if same == len(ours) else float(logits[same][ours[same]] - logits[same][theirs[same]])
    return Agreement(same, len(ours), margin, min(leads))


def gguf_file(subject: Subject, kind: str) -> Path:
    """The subject as a GGUF file in the cache, written once; low-rank corrections are merged into the weights.

    Raises:
        BadInput: see `thesislib.formats.gguf.export_gguf`.
    """
    file = cache_dir() / "gguf" / f"{subject.fingerprint[:16]}-{kind}.gguf"
    return file if file.exists() else export_gguf(subject, file, kind, merge_corrections=True)


def as_measurement(subject: Subject, timing: Timing, started: float, **settings: Any) -> Measurement:
    """The measurement of a timing: the median over tokens, with the quartiles as its interval. That is no confidence
    interval.

    It depends on the machine and on what else runs there, so a record of it cannot be made again.
    """
    seconds = timing.seconds
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    items = [
        {"id": f"{i}.{j}", "seconds": s} for i, repetition in enumerate(timing.later) for j, s in enumerate(repetition)
    ]
    extra = {
        "tokens per second": 1 / middle,
        "seconds to first token": timing.seconds_to_first_token,
        "prompt tokens per second": timing.prompt / timing.seconds_to_first_token,
        "first": list(timing.first),
        "bytes": timing.bytes,
        "verdict": timing.verdict,
        "spread": timing.spread,
        "cores that others kept busy": list(timing.others),
    }
    facts = provenance(
        subject, started, engine=timing.engine, prompt=timing.prompt, tokens=len(timing.later[0]),
        repeats=len(timing.later), threads=1, interval="quartiles", **settings,
    )  # fmt: skip
    facts["versions"] = {**facts["versions"], **timing.versions}
    return Measurement(
        task=f"{timing.engine}, after {timing.prompt} tokens", metric=METRIC, value=middle, low=low, high=high,
        n=len(seconds), unit="token", items=items, extra=extra, provenance=facts,
    )  # fmt: skip
