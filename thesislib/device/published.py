"""Projections compared with figures that others published, to which nothing here was tuned, however far off they are;
and joules of hosted models beside them.

`Device.overhead` stays null for Siracusa, on purpose. The cycles to start an operation or a token could be fitted to
Deeploy's figures below, which would then test nothing: there are too few of them to fit some and hold out others of
another sort. The gap is shown.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from thesislib.device.cost import Sketch, Stored, costs, distinct_bytes, is_linear, resized
from thesislib.device.energy import energy
from thesislib.device.hardware import Device, device
from thesislib.device.placement import allocate
from thesislib.device.roofline import project
from thesislib.errors import BadInput, unknown
from thesislib.model.subject import Subject

LLAMA_CPP = "llama.cpp, docs/build-riscv64-spacemit.md: llama-bench, four threads, n_ubatch 128"
TUTORIAL = "Deeploy, docs/tutorials/introduction.md (May 2025), cycles of the simulator GVSoC"
DEEPLOY = "Scherer et al. 2024, arXiv 2408.04413, abstract"
RATE, CYCLES, JOULES = "tokens/s", "cycles", "J/token"
# why a projection may be off, in words
KERNELS = (
    "its kernels reach 2 % of the chip's INT8 figure (17 % of its FP32 one), not the 10 % that mfu's low end takes"
)
BAND = "mbu's low end was taken from this very figure (see k1.yaml): within the interval by construction"
STARTS = (
    "starting, tiling and moving operations this small (64 by 64) must take most of the cycles, and the device "
    "file has none for that; "
    "softmax, norms and rotations, which count no products here, run on the cores"
)


@dataclass(frozen=True)
class Figure:
    """A published figure.

    Attributes:
        device: the name of its file.
        model: in words.
        sketch: returns the model's sketch.
        task: "decode" or "prompt".
        quantity: `RATE`, `CYCLES` or `JOULES`.
        value: in that unit.
        tokens: that a pass reads.
        context: tokens before.
        source: the document.
        why: why a projection may be off.
        engine: a part of the engine's name, if it was not the device's best.
        share: of that engine, such as one core of eight.
    """

    device: str
    model: str
    sketch: Callable[[], Sketch]
    task: str
    quantity: str
    value: float
    tokens: int
    context: int
    source: str
    why: str
    engine: str | None = None
    share: float = 1


def _shapes(name: str, architecture: str, **config: Any) -> Subject:
    """A model of an architecture with tensors that have no values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**config), dtype=torch.float32)
    return Subject(model, None, name)


def _of_size(subject: Subject, size: float, table: float) -> Sketch:
    """A model whose file has `size` bytes: embedding and head take `table` bits a weight, linears share the rest."""
    model = resized(subject, table=table)
    linears = [w for w in model.weights if is_linear(w)]
    rest = size - distinct_bytes(w for w in model.weights if not is_linear(w))
    return resized(model, bits=8 * rest / sum(w.params for w in linears))


@cache
def qwen3_q4_0() -> Sketch:
    """Qwen3-0.6B in llama.cpp's Q4_0: the linears have 4.5 bits a weight, the embedding, which is the head too, Q6_K's
    6.5625, and the norms are in float32.

    Three matrices that the published file has in Q4_1 are counted as Q4_0: 0.2 % too few bytes.
    """
    shapes = _shapes(
        "Qwen3-0.6B Q4_0", "qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return resized(shapes, bits=4.5, table=6.5625)


@cache
def smollm2_q4_k_m() -> Sketch:
    """This book's subject in llama.cpp's Q4_K_M, 101 MiB. Its rows of 576 are too short for K-quants' groups of 256, so
    its embedding has Q8_0's 8.5 bits."""
    shapes = _shapes(
        "SmolLM2-135M-Instruct Q4_K_M", "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return _of_size(shapes, 101 * 2**20, 8.5)


@cache
def llama32_q4_k_m() -> Sketch:
    """The thesis's subject in llama.cpp's Q4_K_M, 771 MiB, with the embedding in Q6_K's 6.5625 bits."""
    shapes = _shapes(
        "Llama-3.2-1B-Instruct Q4_K_M", "llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    return _of_size(shapes, 771 * 2**20, 6.5625)


@cache
def smollm2_large_q8_0() -> Sketch:
    """SmolLM2-1.7B in llama.cpp's Q8_0, 1.926 GB and 1.812 B weights. By that count its head is not tied."""
    shapes = _shapes(
        "SmolLM2-1.7B-Instruct Q8_0", "llama", vocab_size=49152, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
    )  # fmt: skip
    return _of_size(shapes, 1.926e9, 8.5)


def qwen35_q4_1() -> Sketch:
    """Qwen3.5-2B in llama.cpp's Q4_1. Only its 1.19 GiB and 1.88 B weights are published, so it is one matrix without
    attention."""
    weights = Stored("blocks.0.up_proj", int(1.19 * 2**30), 1_880_000_000, (0,), precision="int8")
    return Sketch("Qwen3.5-2B Q4_1", (weights,), 1, 1, 1)


def micro_llama() -> Sketch:
    """Deeploy's microLlama: width 64, eight blocks, MLP of 256, int8, 524,288 weights. Its graph has neither embedding
    nor head.

    The number of weights tells that it has as many heads of keys as of queries; how many does not change the products.
    """
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 64 * 64) | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), 64 * 256
    )
    weights = [
        Stored(f"blocks.{b}.{name}", n, n, (b, i), precision="int8")
        for b in range(8)
        for i, (name, n) in enumerate(shapes.items())
    ]
    return Sketch("microLlama", tuple(weights), 8, 8, 8, activations="int8")


SMALL_GPU = (
    "a token of so small a model starts some hundred kernels on the GPU, and the device file has no time for that: "
    "the larger model below is less far off"
)
REACH = "what kernels reach of the chip's arithmetic is a guess, 10 to 70 %"
RAIL = (
    "published for CPU and GPU alone, the reading of 2,048 tokens before included; projected from the module's "
    "settings, 7 to 25 W, whose middle is above "
    "what such a model draws, which makes up for a time that is too short"
)
LEADERBOARD = "nyunai/edge-llm-leaderboard (Hugging Face), llm-perf-leaderboard-Raspberry Pi 5(8GB).csv: llama.cpp"
SMOLPERF = "Y. Singh, smolperfbenchmark (2026), table 7: llama.cpp on the GPU, 25 W setting, 256 tokens after 2,048"
SMOL, LLAMA, LARGE = "SmolLM2-135M-Instruct Q4_K_M", "Llama-3.2-1B-Instruct Q4_K_M", "SmolLM2-1.7B-Instruct Q8_0"
STORIES = "a Llama on TinyStories (microLlama stands in)"
QWEN3, QWEN35, MICRO = "Qwen3-0.6B Q4_0", "Qwen3.5-2B Q4_1", "microLlama"
WHOLE = (
    "only the size and number of its weights are published: all are taken to multiply at every token, the table's too"
)
SIZE = "its size is not in the abstract: microLlama, Deeploy's public example, stands in"
HYBRID = "its hybrid attention is not counted"
LENGTHS = "the lengths are not published: 64 tokens before each are taken"
LENGTH = "the length is not published, 128 is taken"
SUBJECT = "the thesis's own subject, at mbu's low end"
NO_ENERGY = (
    "energy of a multiplication, of a byte on the chip and of idling are not published: nothing can be projected"
)


def _micro(
    cores: str, task: str, cycles: float, tokens: int, context: int, engine: str | None = None, share: float = 1
) -> Figure:
    """A figure of Deeploy's tutorial: microLlama on Siracusa, in cycles."""
    model = f"{MICRO}{cores}"
    return Figure(
        "siracusa", model, micro_llama, task, CYCLES, cycles, tokens, context, TUTORIAL, STARTS, engine, share
    )


FIGURES = (
    # decoding 128 tokens from nothing: 64 before each on average
    Figure("k1", QWEN3, qwen3_q4_0, "decode", RATE, 11.73, 1, 64, LLAMA_CPP, BAND),
    Figure("k1", QWEN3, qwen3_q4_0, "prompt", RATE, 49.15, 128, 0, LLAMA_CPP, KERNELS),
    Figure("k1", QWEN35, qwen35_q4_1, "decode", RATE, 3.07, 1, 64, LLAMA_CPP, f"{HYBRID}; {WHOLE}"),
    Figure("k1", QWEN35, qwen35_q4_1, "prompt", RATE, 10.32, 128, 0, LLAMA_CPP, f"{KERNELS}; {WHOLE}"),
    Figure("pi5", LARGE, smollm2_large_q8_0, "decode", RATE, 5.177, 1, 64, LEADERBOARD, LENGTHS),
    Figure("pi5", LARGE, smollm2_large_q8_0, "prompt", RATE, 17.524, 128, 0, LEADERBOARD, f"{LENGTH}; {REACH}"),
    Figure("orin_nano", SMOL, smollm2_q4_k_m, "decode", RATE, 165.1, 1, 2176, SMOLPERF, SMALL_GPU),
    Figure("orin_nano", SMOL, smollm2_q4_k_m, "decode", JOULES, 1 / 22.6, 1, 2176, SMOLPERF, RAIL),
    Figure("orin_nano", LLAMA, llama32_q4_k_m, "decode", RATE, 47.0, 1, 2176, SMOLPERF, SUBJECT),
    Figure("orin_nano", LLAMA, llama32_q4_k_m, "decode", JOULES, 1 / 4.7, 1, 2176, SMOLPERF, RAIL),
    _micro(", 1 core", "decode", 16.1e6, 1, 128, "cluster", 1 / 8),
    _micro(", 8 cores", "decode", 3.1e6, 1, 128, "cluster"),
    _micro(", 8 cores, 8 kB L1", "prompt", 47.5e6, 64, 0, "cluster"),
    _micro(", 8 cores, 64 kB L1", "prompt", 35.3e6, 64, 0, "cluster"),
    _micro(", with N-EUREKA", "prompt", 28.6e6, 64, 0),
    Figure("siracusa", STORIES, micro_llama, "decode", RATE, 340, 1, 128, DEEPLOY, f"{SIZE}; {STARTS}"),
    Figure("siracusa", STORIES, micro_llama, "decode", JOULES, 490e-6, 1, 128, DEEPLOY, f"{SIZE}; {NO_ENERGY}"),
)


def _with_engine(whole: Device, name: str | None, share: float) -> Device:
    """A device with only the engine whose name contains `name`, at a share of its rates; None for the whole device."""
    if name is None:
        return whole
    engine = next((e for e in whole.engines if name in e.name), None)
    if engine is None:
        raise unknown(f"engine of {whole.name}", name, [e.name for e in whole.engines])
    slower = {
        product: {p: None if r is None else r * share for p, r in rates.items()}
        for product, rates in engine.macs_per_cycle.items()
    }
    return replace(whole, engines=(replace(engine, macs_per_cycle=slower),))


def projected(figure: Figure, on: Device | None = None) -> tuple[float, float, float]:
    """(low, high, ceiling) of a figure, in its unit; NaN where nothing is known.

    low is the smaller number. The ceiling is the best that the device's rates allow.

    Args:
        figure: the published figure.
        on: the device; by default that of the figure's device file.

    Raises:
        BadInput: the device has no such engine; see `thesislib.device.roofline.project`.
    """
    target = _with_engine(on or device(figure.device), figure.engine, figure.share)
    case = figure.sketch()
    placement = allocate(case, target, costs(case, figure.tokens, figure.context).cache_bytes)
    time = project(case, target, figure.tokens, figure.context, placement)
    seconds = time.seconds
    if figure.quantity == RATE:
        return figure.tokens / seconds.high, figure.tokens / seconds.low, figure.tokens / seconds.ceiling
    if figure.quantity == CYCLES:
        clock = target.engines[0].clock
        clock = math.nan if clock is None else clock
        return seconds.low * clock, seconds.high * clock, seconds.ceiling * clock
    if figure.quantity == JOULES:
        spent = energy(case, target, placement, time, figure.tokens, figure.context)
        least = target.power[0] * seconds.ceiling if target.power else sum(spent.parts.values())
        return (spent.low, spent.high, least) if spent.known else (math.nan,) * 3
    raise unknown("quantity", figure.quantity, (RATE, CYCLES, JOULES))


def against_published(figures: tuple[Figure, ...] = FIGURES) -> pd.DataFrame:
    """Every published figure beside its projection.

    Returns:
        device, model, quantity ("decode, tokens/s"), published, projected low, projected high, ceiling, error (of the
        interval's geometric middle, signed, as a share of the published figure), within (whether the published figure
        lies in the interval), optimistic (how many times too good the middle is; below 1 it is too bad), why, source. A
        figure that cannot be projected has NaN, and None for within.

    Raises:
        BadInput: see `projected`.
    """
    rows = []
    for f in figures:
        if not f.value > 0:
            raise BadInput(f"the published figure of {f.model} is {f.value}: expected a number above 0")
        low, high, ceiling = projected(f)
        middle = math.sqrt(low * high)
        within = None if math.isnan(middle) else low <= f.value <= high
        optimistic = middle / f.value if f.quantity == RATE else f.value / middle
        rows.append({
            "device": f.device, "model": f.model, "quantity": f"{f.task}, {f.quantity}", "published": f.value,
            "projected low": low, "projected high": high, "ceiling": ceiling, "error": middle / f.value - 1,
            "within": within, "optimistic": optimistic, "why": f.why, "source": f.source,
        })  # fmt: skip
    return pd.DataFrame(rows)


JEGHAM = "jegham2025hungry"  # key in the book's references
HOSTED = (  # model, tokens read, tokens written, Wh, as the thesis's introduction has them
    ("GPT-4.5", 100, 300, 6.7),
    ("GPT-4.5", 1000, 1000, 20.5),
)
DIFFERENCE = (
    "An estimate, not a measurement: from the speed of a public API, the servers that probably answer, many "
    "requests at a time, and a factor for "
    "cooling and the building's losses. A model of unpublished size, far larger than any here, which answers "
    "what these cannot."
)
ALONE = (
    "One chip alone, one request at a time: no board, no supply's losses, no memory outside the chip, no "
    "network. A model small enough for the "
    "chip, which continues simple stories for children."
)
MODELLED = (
    "A projection, never measured: a board's published power (see its file in hw/devices) for as long as a token "
    "would take, decoding only, the prompt "
    "apart. One request at a time. A small model, which answers far fewer questions."
)


def hosted(modelled: Mapping[str, tuple[float, float]] | None = None) -> pd.DataFrame:
    """Published joules of hosted models, which the thesis's introduction cites, beside those of a chip and of this
    study's projections.

    The rows are of different work, and `difference` says how: a ratio of two rows is no gain in efficiency.

    Args:
        modelled: {"model on device": (low, high) joules a token}, such as `thesislib.device.energy.energy` gives.

    Returns:
        model, work (in words), joules low and high (a written token, with the share of reading the prompt), kind
        (estimated, published, modelled), difference (in words), citation (a key of the book's references, a document or
        none).

    Raises:
        BadInput: joules that are not above 0, or low above high.
    """
    rows = []
    for model, read, written, wh in HOSTED:
        each = wh * 3600 / written
        rows.append(
            (model, f"{read:,} tokens read, {written:,} written: {wh} Wh", each, each, "estimated", DIFFERENCE, JEGHAM)
        )
    chip = "a Llama on TinyStories, Siracusa"
    rows.append((chip, "one token written", 490e-6, 490e-6, "published", ALONE, "scherer2024deeploy"))
    for model, (low, high) in (modelled or {}).items():
        if not 0 < low <= high < math.inf:
            raise BadInput(f"joules of {model} are {low} to {high}: expected two numbers above 0, low first")
        rows.append((model, "one token written", low, high, "modelled", MODELLED, ""))
    return pd.DataFrame(rows, columns=["model", "work", "joules low", "joules high", "kind", "difference", "citation"])
