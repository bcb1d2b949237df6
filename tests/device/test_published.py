"""Projections against what others published: the stand-ins have the published sizes, the sums are done by hand, and no
gap is hidden."""

import math
from dataclasses import replace

import pytest

from thesislib.device.cost import Sketch, Stored, costs, distinct_bytes
from thesislib.device.hardware import device
from thesislib.device.published import (
    CYCLES,
    FIGURES,
    HOSTED,
    JOULES,
    RATE,
    Figure,
    against_published,
    hosted,
    llama32_q4_k_m,
    micro_llama,
    projected,
    qwen3_q4_0,
    qwen35_q4_1,
    smollm2_large_q8_0,
    smollm2_q4_k_m,
)
from thesislib.errors import BadInput


@pytest.fixture(scope="module")
def table():
    return against_published()


def test_stand_ins_have_the_published_sizes():
    qwen = qwen3_q4_0()
    numbers = {w.tensors: w.params for w in qwen.weights}
    assert sum(numbers.values()) == pytest.approx(596.05e6, rel=1e-5)  # "596.05 M"
    assert distinct_bytes(qwen.weights) == pytest.approx(358.78 * 2**20, rel=0.002)
    assert distinct_bytes(qwen35_q4_1().weights) == pytest.approx(1.19 * 2**30, rel=1e-6)
    for made, size, numbers in (
        (smollm2_q4_k_m, 101 * 2**20, 134.515008e6),
        (llama32_q4_k_m, 771 * 2**20, 1235.814400e6),
        (smollm2_large_q8_0, 1.926e9, 1.812e9),
    ):
        held = made()
        assert distinct_bytes(held.weights) == pytest.approx(size, rel=1e-5)
        assert sum({w.tensors: w.params for w in held.weights}.values()) == pytest.approx(numbers, rel=1e-4)
    (bits,) = {round(8 * w.bytes / w.params, 2) for w in smollm2_large_q8_0().weights if w.name.endswith("_proj")}
    assert bits == 8.5  # Q8_0's, though only the file's size was given
    assert sum(w.params for w in micro_llama().weights) == distinct_bytes(micro_llama().weights) == 524_288
    assert costs(micro_llama(), 1, 128).macs == 524_288 + 8 * 2 * 129 * 64


def test_decoding_on_a_k1_by_hand(table):
    """Bytes a token over 10.66 GB/s, at 0.4 to 0.9 of it: weights, one row of the table, cache of 64 tokens and the new
    one, 4,096 bytes a block each."""
    row = table[(table.model == "Qwen3-0.6B Q4_0") & (table.quantity == "decode, tokens/s")].iloc[0]
    read = distinct_bytes(qwen3_q4_0().weights) + 1024 * 6.5625 / 8 + 28 * 66 * 4096
    assert row.ceiling == pytest.approx(10.66e9 / read, rel=1e-3) and row["projected low"] == pytest.approx(
        0.4 * row.ceiling, rel=1e-3
    )
    assert row["projected high"] == pytest.approx(0.9 * row.ceiling, rel=1e-3)
    assert row.published == 11.73 and row.within and "by construction" in row.why
    assert row.error == pytest.approx(math.sqrt(0.36) * row.ceiling / 11.73 - 1, rel=1e-3)
    large = table[(table.model == "Qwen3.5-2B Q4_1") & (table.quantity == "decode, tokens/s")].iloc[0]
    assert large.ceiling == pytest.approx(10.66e9 / (1.19 * 2**30)) and not large.within
    assert 3.07 / large["projected low"] == pytest.approx(0.92, abs=0.005)  # 8 % below the interval


def test_this_books_subject_on_a_jetson_by_hand(table):
    """Weights, a row of the table and the cache of 2,177 tokens, 192 numbers of 16 bits twice in 30 blocks, over 102.4
    GB/s at 0.4 to 0.9 of it; 7 to 25 W."""
    rows = table[table.model == "SmolLM2-135M-Instruct Q4_K_M"].set_index("quantity")
    speed, spent = rows.loc["decode, tokens/s"], rows.loc["decode, J/token"]
    read = 101 * 2**20 + 576 * 8.5 / 8 + 30 * 2178 * 2 * 192 * 2
    assert speed.ceiling == pytest.approx(device("orin_nano").tiers[0].read / read, rel=1e-3) and speed[
        "projected low"
    ] == pytest.approx(0.4 * speed.ceiling, rel=1e-3)
    assert speed.published == 165.1 and not speed.within and speed.optimistic > 2
    assert spent["projected low"] == pytest.approx(7 / speed["projected high"], rel=1e-6)
    assert spent["projected high"] == pytest.approx(25 / speed["projected low"], rel=1e-6) and spent.within
    llama = table[(table.model == "Llama-3.2-1B-Instruct Q4_K_M") & (table.quantity == "decode, tokens/s")].iloc[0]
    assert llama.within and llama.published == 47.0


def test_prompts_on_a_k1_are_far_off_and_the_table_says_so(table):
    """640 MAC/cycle at 1.6 GHz; 49.15 tokens/s times 440 M weights is 2 % of that and 17 % of FP32's 128 G."""
    row = table[(table.model == "Qwen3-0.6B Q4_0") & (table.quantity == "prompt, tokens/s")].iloc[0]
    linears = 596_049_920 - 151_936 * 1024
    reached = 49.15 * linears
    assert reached / 1.024e12 == pytest.approx(0.021, abs=0.001) and reached / 128e9 == pytest.approx(0.17, abs=0.003)
    assert (
        row.optimistic == pytest.approx(10.05, abs=0.01)
        and row.error == pytest.approx(row.optimistic - 1)
        and not row.within
    )
    assert row.ceiling < 1.024e12 / linears


def test_micro_llama_by_hand(table):
    """Cores: 15.5 MAC/cycle for eight, an eighth for one; 656,384 MACs a token; mfu 0.1 to 0.7. With N-EUREKA 1,152 for
    linears, 32 for attention."""
    rows = table.set_index(["model", "quantity"])
    one, eight = (rows.loc[(f"microLlama, {n}", "decode, cycles")] for n in ("1 core", "8 cores"))
    assert eight.ceiling == pytest.approx(656_384 / 15.5) and one.ceiling == pytest.approx(8 * eight.ceiling)
    assert eight["projected low"] == pytest.approx(eight.ceiling / 0.7) and eight["projected high"] == pytest.approx(
        eight.ceiling / 0.1
    )
    assert eight.optimistic == pytest.approx(
        3.1e6 / (eight.ceiling / math.sqrt(0.07))
    ) and eight.error == pytest.approx(1 / eight.optimistic - 1)
    npu = rows.loc[("microLlama, with N-EUREKA", "prompt, cycles")]
    assert npu.ceiling == pytest.approx(64 * 524_288 / 1152 + 8 * 2 * (64 * 65 / 2) * 64 / 32)
    assert npu.published / npu.ceiling == pytest.approx(299, abs=1)
    small, large = (rows.loc[(f"microLlama, 8 cores, {l1} L1", "prompt, cycles")] for l1 in ("8 kB", "64 kB"))
    assert (
        small["projected high"] == large["projected high"] and small.published > large.published
    )  # no L1 in this model of costs


def test_every_gap_is_shown_with_its_reason_and_source(table):
    assert len(table) == len(FIGURES) and (table.why.str.len() > 20).all() and (table.source.str.len() > 20).all()
    known = table[table["projected low"].notna()]
    assert ((known["projected low"] < known["projected high"]) & (known.published > 0)).all()
    rates, cycles = known[known.quantity.str.endswith(RATE)], known[known.quantity.str.endswith(CYCLES)]
    assert (rates.ceiling >= rates["projected high"]).all() and (cycles.ceiling <= cycles["projected low"]).all()
    assert (known.optimistic > 1).all()  # a roofline without overheads is never too slow
    unknown = table[table["projected low"].isna()]
    assert (
        list(unknown.quantity) == ["decode, J/token"]
        and unknown.within.iloc[0] is None
        and math.isnan(unknown.error.iloc[0])
    )
    assert "not published" in unknown.why.iloc[0] and device("siracusa").overhead is None


def test_what_the_devices_readme_says_of_the_gaps(table):
    """hw/README.md: decoding on three boards 1.1 to 2.4 times too good, prompts 2.8 to 14 times, Siracusa 4 to 79
    times."""
    found = {}
    for device_name, quantity, factor in zip(table.device, table.quantity, table.optimistic, strict=True):
        key = device_name if device_name == "siracusa" else f"{device_name} {quantity.partition(',')[0]}"
        found.setdefault(key, []).extend([factor] if factor == factor else [])
    assert {key: (round(min(f), 1), round(max(f), 1)) for key, f in found.items()} == {
        "k1 decode": (1.4, 1.6), "k1 prompt": (10.1, 14.0), "siracusa": (4.1, 79.1),
        "pi5 decode": (1.1, 1.1), "pi5 prompt": (2.8, 2.8), "orin_nano decode": (1.1, 2.4),
    }  # fmt: skip


def tiny_figure(**changes):
    made = Sketch("t", (Stored("blocks.0.up_proj", 1000, 1000, (0,), precision="int8"),), 1, 1, 1)
    return replace(Figure("siracusa", "t", lambda: made, "decode", CYCLES, 10.0, 1, 0, "nowhere", "because"), **changes)


def test_a_pessimistic_projection_has_the_other_sign():
    row = against_published((tiny_figure(),)).iloc[0]
    assert row.error > 0 and row.optimistic < 1 and not row.within
    fast = against_published((tiny_figure(quantity=RATE, value=1e9),)).iloc[0]
    assert -1 < fast.error < 0 and fast.optimistic < 1
    inside = against_published((tiny_figure(value=1000 / 32 / 0.3),)).iloc[0]
    assert inside.within and inside["projected low"] == pytest.approx(1000 / 32 / 0.7)


def test_joules_where_the_device_knows_them():
    known = device("gap9")  # 0.66 pJ/MAC
    figure = tiny_figure(device="gap9", quantity=JOULES)
    assert projected(figure) == pytest.approx((0.66e-9,) * 3)
    assert projected(figure, replace(known, idle=1.0))[1] > projected(figure, replace(known, idle=1.0))[0] > 0.66e-9
    silent = replace(known, engines=(replace(known.engines[0], clock=None),))
    assert all(map(math.isnan, projected(tiny_figure(device="gap9", engine="nine"), silent)))


def test_what_cannot_be_compared_is_said():
    with pytest.raises(
        BadInput, match="unknown engine of siracusa 'clusters': .*expected one of N-EUREKA, 1x1 mode, cluster"
    ):
        projected(tiny_figure(engine="clusters"))
    with pytest.raises(BadInput, match="unknown quantity 'watts'"):
        projected(tiny_figure(quantity="watts"))
    with pytest.raises(BadInput, match="published figure of t is 0"):
        against_published((tiny_figure(value=0),))
    with pytest.raises(BadInput, match="did you mean 'siracusa'"):
        projected(tiny_figure(device="syracusa"))


def test_hosted_models_joules():
    """6.7 Wh x 3,600 J / 300 = 80.4; 20.5 x 3,600 / 1,000 = 73.8. Every row says in words what it does, and the words
    differ by kind."""
    found = hosted({"SmolLM2 on k1": (0.1, 0.25)})
    assert (
        list(found["joules low"]) == pytest.approx([80.4, 73.8, 490e-6, 0.1]) and found["joules high"].iloc[-1] == 0.25
    )
    assert (
        list(found.kind) == ["estimated"] * len(HOSTED) + ["published", "modelled"] and found.difference.nunique() == 3
    )
    assert list(found.citation) == ["jegham2025hungry"] * 2 + ["scherer2024deeploy", ""] and len(hosted()) == 3
    for wrong in ((0, 1), (2, 1), (1, math.inf), (math.nan, 1)):
        with pytest.raises(BadInput, match="joules of x are .*low first"):
            hosted({"x": wrong})
