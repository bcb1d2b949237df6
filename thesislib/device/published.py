"""Projections held against figures that others published and nobody here tuned to, however far off; and joules of
hosted models beside them.

`Device.overhead` stays null for Siracusa, on purpose. Cycles that every operation and every token of it cost besides
could be fitted to Deeploy's figures below, which would then be no check of anything: there are too few to fit some and
hold out others that differ in kind. The gap is shown.
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
from thesislib.device.placement import plan
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
    """What somebody published.

    model: in words. made: gives its sketch. task: "decode" or "prompt". quantity: `RATE`, `CYCLES` or `JOULES`. value:
    in that unit. tokens: read or made at once. context: tokens before. source: the document. why: what explains a gap.
    engine: the part of its name where not the device's best ran it. share: of that engine, such as one core of eight.
    """

    device: str
    model: str
    made: Callable[[], Sketch]
    task: str
    quantity: str
    value: float
    tokens: int
    context: int
    source: str
    why: str
    engine: str | None = None
    share: float = 1


def _shapes(name: str, kind: str, **config: Any) -> Subject:
    """A model of an architecture, without its numbers."""
    with torch.device("meta"):
        return Subject(
            AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), dtype=torch.float32), None, name
        )


def _of_size(subject: Subject, size: float, table: float) -> Sketch:
    """A model whose file has `size` bytes: embedding and head at `table` bits a weight, its linears at what is left for
    them."""
    plain = resized(subject, table=table)
    linears = [w for w in plain.weights if is_linear(w)]
    rest = size - distinct_bytes(w for w in plain.weights if not is_linear(w))
    return resized(plain, bits=8 * rest / sum(w.params for w in linears))


@cache
def qwen3_q4_0() -> Sketch:
    """Qwen3-0.6B as llama.cpp's Q4_0 holds it: its linears in 4.5 bits a weight, the table, which is the head too, in
    Q6_K's 6.5625, norms in float32.

    Three matrices that the published file has in Q4_1 are counted as Q4_0: 0.2 % too few bytes.
    """
    shapes = _shapes(
        "Qwen3-0.6B Q4_0", "qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return resized(shapes, bits=4.5, table=6.5625)


@cache
def smollm2_q4_k_m() -> Sketch:
    """This book's subject in llama.cpp's Q4_K_M, 101 MiB. Its rows of 576 are too short for K-quants' groups of 256:
    the table is held in Q8_0's 8.5 bits."""
    shapes = _shapes(
        "SmolLM2-135M-Instruct Q4_K_M",
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return _of_size(shapes, 101 * 2**20, 8.5)


@cache
def llama32_q4_k_m() -> Sketch:
    """The thesis's subject in llama.cpp's Q4_K_M, 771 MiB, its table in Q6_K's 6.5625 bits."""
    shapes = _shapes(
        "Llama-3.2-1B-Instruct Q4_K_M",
        "llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return _of_size(shapes, 771 * 2**20, 6.5625)


@cache
def smollm2_large_q8_0() -> Sketch:
    """SmolLM2-1.7B in llama.cpp's Q8_0, 1.926 GB and 1.812 B weights: with a head of its own, as that count says."""
    shapes = _shapes(
        "SmolLM2-1.7B-Instruct Q8_0",
        "llama",
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    )
    return _of_size(shapes, 1.926e9, 8.5)


def qwen35_q4_1() -> Sketch:
    """Qwen3.5-2B as llama.cpp's Q4_1 holds it, of which only 1.19 GiB and 1.88 B weights are published: one matrix, no
    attention."""
    return Sketch(
        "Qwen3.5-2B Q4_1",
        (Stored("blocks.0.up_proj", int(1.19 * 2**30), 1_880_000_000, (0,), precision="int8"),),
        1,
        1,
        1,
    )


def micro_llama() -> Sketch:
    """Deeploy's microLlama: width 64, eight blocks, MLP of 256, int8, 524,288 weights; neither embedding nor head,
    which its graph lacks.

    As many heads of keys as of queries, since the weights add up so; how many does not change the products.
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
FIGURES = (
    # 128 tokens from nothing: 64 before each on average
    Figure("k1", QWEN3, qwen3_q4_0, "decode", RATE, 11.73, 1, 64, LLAMA_CPP, BAND),
    Figure("k1", QWEN3, qwen3_q4_0, "prompt", RATE, 49.15, 128, 0, LLAMA_CPP, KERNELS),
    Figure(
        "k1",
        QWEN35,
        qwen35_q4_1,
        "decode",
        RATE,
        3.07,
        1,
        64,
        LLAMA_CPP,
        f"its hybrid attention is not counted; {WHOLE}",
    ),
    Figure("k1", QWEN35, qwen35_q4_1, "prompt", RATE, 10.32, 128, 0, LLAMA_CPP, f"{KERNELS}; {WHOLE}"),
    Figure(
        "pi5",
        LARGE,
        smollm2_large_q8_0,
        "decode",
        RATE,
        5.177,
        1,
        64,
        LEADERBOARD,
        "the lengths are not published: 64 tokens before each are taken",
    ),
    Figure(
        "pi5",
        LARGE,
        smollm2_large_q8_0,
        "prompt",
        RATE,
        17.524,
        128,
        0,
        LEADERBOARD,
        f"the length is not published, 128 is taken; {REACH}",
    ),
    Figure("orin_nano", SMOL, smollm2_q4_k_m, "decode", RATE, 165.1, 1, 2176, SMOLPERF, SMALL_GPU),
    Figure("orin_nano", SMOL, smollm2_q4_k_m, "decode", JOULES, 1 / 22.6, 1, 2176, SMOLPERF, RAIL),
    Figure(
        "orin_nano",
        LLAMA,
        llama32_q4_k_m,
        "decode",
        RATE,
        47.0,
        1,
        2176,
        SMOLPERF,
        "the thesis's own subject, at mbu's low end",
    ),
    Figure("orin_nano", LLAMA, llama32_q4_k_m, "decode", JOULES, 1 / 4.7, 1, 2176, SMOLPERF, RAIL),
    Figure(
        "siracusa",
        MICRO + ", 1 core",
        micro_llama,
        "decode",
        CYCLES,
        16.1e6,
        1,
        128,
        TUTORIAL,
        STARTS,
        "cluster",
        1 / 8,
    ),
    Figure("siracusa", MICRO + ", 8 cores", micro_llama, "decode", CYCLES, 3.1e6, 1, 128, TUTORIAL, STARTS, "cluster"),
    Figure(
        "siracusa",
        MICRO + ", 8 cores, 8 kB L1",
        micro_llama,
        "prompt",
        CYCLES,
        47.5e6,
        64,
        0,
        TUTORIAL,
        STARTS,
        "cluster",
    ),
    Figure(
        "siracusa",
        MICRO + ", 8 cores, 64 kB L1",
        micro_llama,
        "prompt",
        CYCLES,
        35.3e6,
        64,
        0,
        TUTORIAL,
        STARTS,
        "cluster",
    ),
    Figure("siracusa", MICRO + ", with N-EUREKA", micro_llama, "prompt", CYCLES, 28.6e6, 64, 0, TUTORIAL, STARTS),
    Figure("siracusa", STORIES, micro_llama, "decode", RATE, 340, 1, 128, DEEPLOY, f"{SIZE}; {STARTS}"),
    Figure(
        "siracusa",
        STORIES,
        micro_llama,
        "decode",
        JOULES,
        490e-6,
        1,
        128,
        DEEPLOY,
        f"{SIZE}; energy of a multiplication, of a byte on the chip and of idling are not published: nothing "
        "can be projected",
    ),
)


def _with_engine(found: Device, name: str | None, share: float) -> Device:
    """A device with only the engine whose name has `name` in it, at a share of its rates."""
    if name is None:
        return found
    engine = next((e for e in found.engines if name in e.name), None)
    if engine is None:
        raise unknown(f"engine of {found.name}", name, [e.name for e in found.engines])
    slower = {
        kind: {p: None if r is None else r * share for p, r in rates.items()}
        for kind, rates in engine.macs_per_cycle.items()
    }
    return replace(found, engines=(replace(engine, macs_per_cycle=slower),))


def projected(figure: Figure, on: Device | None = None) -> tuple[float, float, float]:
    """(low, high, ceiling) of a figure, in its unit: low is the smaller number, the ceiling what nothing could better.
    NaN where nothing is known.

    Args:
        figure: the one.
        on: another description of its device.

    Raises:
        BadInput: an engine that the device does not have; see `thesislib.device.roofline.project`.
    """
    found = _with_engine(on or device(figure.device), figure.engine, figure.share)
    case = figure.made()
    places = plan(case, found, costs(case, figure.tokens, figure.context).cache_bytes)
    time = project(case, found, figure.tokens, figure.context, places)
    seconds = time.seconds
    if figure.quantity == RATE:
        return figure.tokens / seconds.high, figure.tokens / seconds.low, figure.tokens / seconds.ceiling
    if figure.quantity == CYCLES:
        clock = found.engines[0].clock
        clock = math.nan if clock is None else clock
        return seconds.low * clock, seconds.high * clock, seconds.ceiling * clock
    if figure.quantity == JOULES:
        spent = energy(case, found, places, time, figure.tokens, figure.context)
        least = found.power[0] * seconds.ceiling if found.power else sum(spent.parts.values())
        return (spent.low, spent.high, least) if spent.known else (math.nan,) * 3
    raise unknown("quantity", figure.quantity, (RATE, CYCLES, JOULES))


def against_published(figures: tuple[Figure, ...] = FIGURES) -> pd.DataFrame:
    """Every published figure beside its projection.

    Returns:
        device, model, quantity ("decode, tokens/s"), published, projected low, projected high, ceiling, error (of the
        interval's geometric middle, signed, as a share of the published figure), within (whether this lies in the
        interval), optimistic (how many times too good the middle is; below 1 it is too bad), why, source. What cannot
        be projected has NaN and within None.

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
        rows.append(
            (
                f.device,
                f.model,
                f"{f.task}, {f.quantity}",
                f.value,
                low,
                high,
                ceiling,
                middle / f.value - 1,
                within,
                optimistic,
                f.why,
                f.source,
            )
        )
    columns = [
        "device",
        "model",
        "quantity",
        "published",
        "projected low",
        "projected high",
        "ceiling",
        "error",
        "within",
        "optimistic",
        "why",
        "source",
    ]
    return pd.DataFrame(rows, columns=columns)


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

    What they do differs, and `difference` says how: a ratio of two rows is no gain in efficiency.

    Args:
        modelled: {"model on device": (low, high) joules a token}, such as `thesislib.device.energy.energy` gives.

    Returns:
        model, work (in words), joules low and high (a written token; those of reading the prompt are charged to what is
        written), kind (estimated, published, modelled), difference (in words), citation (a key of the book's
        references, a document or none).

    Raises:
        BadInput: joules that are not above 0, or low above high.
    """
    rows = []
    for model, read, written, wh in HOSTED:
        each = wh * 3600 / written
        rows.append(
            (model, f"{read:,} tokens read, {written:,} written: {wh} Wh", each, each, "estimated", DIFFERENCE, JEGHAM)
        )
    rows.append(
        (
            "a Llama on TinyStories, Siracusa",
            "one token written",
            490e-6,
            490e-6,
            "published",
            ALONE,
            "scherer2024deeploy",
        )
    )
    for model, (low, high) in (modelled or {}).items():
        if not 0 < low <= high < math.inf:
            raise BadInput(f"joules of {model} are {low} to {high}: expected two numbers above 0, low first")
        rows.append((model, "one token written", low, high, "modelled", MODELLED, ""))
    return pd.DataFrame(rows, columns=["model", "work", "joules low", "joules high", "kind", "difference", "citation"])
