"""Devices read, costs counted, models placed and timed: against sums by hand, and against figures that others
published."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from thesislib.cli import app
from thesislib.compress.depth import Depth
from thesislib.compress.gptq import Rtn
from thesislib.compress.width import Width
from thesislib.device.cost import Sketch, Stored, costs, distinct_bytes, resized, sketch, stored
from thesislib.device.energy import SUM, WHOLE, energy
from thesislib.device.hardware import (
    KINDS,
    NEAREST,
    OPERATIONS,
    PRECISIONS,
    Device,
    Engine,
    Tier,
    device,
    devices,
    read_device,
)
from thesislib.device.placement import FITS, STREAMS, TOO_LARGE, allocate, blocks_that_fit, padded, what_fits
from thesislib.device.quantity import UNITS, parse
from thesislib.device.report import profile_report, readable
from thesislib.device.roofline import ARITHMETIC, OVERHEAD, TRAFFIC, profile, project, what_each_buys
from thesislib.errors import BadInput
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.load import save_checkpoint
from thesislib.formats.sizes import sizes
from thesislib.model.blocks import apply_plan
from thesislib.model.layers import Adapted

LINEARS = 3 * 32 * 64 + 2 * 32 * 32 + 2 * 16 * 32  # weights of a tiny block: three of the MLP, q and o, k and v


def rates(gemv, gemm, precisions=PRECISIONS):
    return {
        kind: {p: rate if p in precisions else None for p in PRECISIONS}
        for kind, rate in (("gemv", gemv), ("gemm", gemm))
    }


def made(
    tiers, *, gemv=10.0, gemm=100.0, clock=1e6, bits=None, overhead=0.0, joules=None, idle=None, precisions=PRECISIONS
):
    """A device of made-up numbers; tiers (size, read, joules per byte, on chip); precisions: those with a rate."""
    memories = tuple(Tier(f"m{i}", *t) for i, t in enumerate(tiers))
    engine = Engine("e", clock, rates(gemv, gemm, precisions), bits, joules)
    return Device("made", "made", (engine,), memories, overhead, (0.5, 1.0), (0.25, 0.5), idle)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", devices())
def test_every_number_of_every_device_has_evidence(name):
    found = read_device(devices()[name])
    numbers = [e.clock for e in found.engines] + [
        x for e in found.engines for kind in OPERATIONS for x in e.macs_per_cycle[kind].values()
    ]
    numbers += [x for e in found.engines for x in (e.stored_bits, e.joules_per_mac)] + [
        x for t in found.tiers for x in (t.size, t.read, t.joules_per_byte)
    ]
    numbers += [found.overhead, found.idle, found.power]
    assert all(tuple(e.macs_per_cycle[kind]) == PRECISIONS for e in found.engines for kind in OPERATIONS)
    assert sum(x is not None for x in numbers) + 2 == len(found.evidence)  # and the two bands
    assert all(e.kind in KINDS and len(e.source) > 10 for e in found.evidence.values())


def test_the_devices_that_the_thesis_and_its_readers_ask_for():
    assert {"siracusa", "gap9", "k1", "pi4", "pi5", "orin_nano", "laptop"} <= set(devices())
    s = device("siracusa")
    assert s.engines[0].stored_bits == 8 and sum(t.size for t in s.tiers if t.on_chip) == 8 * 2**20
    assert s.tiers[0].read == pytest.approx(256 / 8 * s.engines[0].clock)  # one 256 bit word a cycle
    assert any("1x1" in note for note in s.notes) and any("8.25 MiB" in note for note in s.notes)
    with pytest.raises(BadInput, match="did you mean 'siracusa'"):
        device("syracusa")


@pytest.fixture
def edited(tmp_path):
    def edit(old, new, name="siracusa"):
        text = devices()[name].read_text()
        assert old in text
        (tmp_path / f"{name}.yaml").write_text(text.replace(old, new, 1))
        return tmp_path / f"{name}.yaml"

    return edit


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source: "arXiv 2312.14750"}', 'source: ""}', "its source is empty"),
        (', source: "arXiv 2312.14750"}', "}", "'source' is missing"),
        ("kind: published", "kind: guessed", "unknown kind of evidence"),
        ("value: 11.52 GB/s", "value: -11.52 GB/s", "above 0, or null"),
        ("value: 11.52 GB/s", "value: 11.52 GB", "unknown unit.*'GB': did you mean 'GB/s'"),
        ("value: 11.52 GB/s", "value: fast", "expected a number with one of the units"),
        ("value: 360 MHz", "value: 0 MHz", "above 0, or null"),
        ("value: 360 MHz", "value: 360", "unknown unit"),
        ("value: 360 MHz", "value: 1e999 MHz", "expected a number"),
        ("value: [0.4, 0.9]", "value: [0.9, 0.4]", "0 < low <= high <= 1"),
        ("value: [0.4, 0.9]", "value: [0.4]", r"expected \[low, high\]"),
        ("idle: null", "idel: null", "did you mean 'idle'"),
        ("idle: null\n", "", "'idle' is missing"),
        ("idle: null", "idle: 3", "expected a mapping with the keys kind, source, value"),
        ("power: null\n", "", "'power' is missing"),
        ("power: null", 'power: {value: [3 W, 2 W], kind: published, source: "x"}', "the lower number first"),
        ("power: null", 'power: {value: 3 W, kind: published, source: "x"}', r"expected \[low, high\]"),
        ("power: null", 'power: {value: [3 V, 4 V], kind: published, source: "x"}', "unknown unit of .*power 'V'"),
        ("power: null", 'power: {value: [3 W, 4 W], kind: published, source: ""}', "its source is empty"),
        ("on_chip: true", "on_chip: maybe", "expected true or false"),
        ("size: {value: 4 MiB", "size: null  # {value: 4 MiB", "unknown size cannot be planned"),
        (
            "int8: {value: 32 MAC/cycle, kind: derived",
            "int9: {value: 32 MAC/cycle, kind: derived",
            "unknown key.*gemv 'int9': did you mean 'int8'",
        ),
        ("        float16: null\n", "", "gemv: 'float16' is missing: expected it, null if it is not known"),
        (
            "float32: null",
            "float32: 16 MAC/cycle",
            "gemv.float32: expected a mapping with the keys kind, source, value",
        ),
        ("value: 32 MAC/cycle", "value: -32 MAC/cycle", "gemv.int8 is '-32 MAC/cycle': expected a number above 0"),
        ("value: 32 MAC/cycle", "value: 32 FLOP/cycle", "unknown unit.*gemv.int8 'FLOP/cycle'.*'MAC/cycle'"),
        (
            ', source: "one 256 bit read of 8 bit weights a cycle, each used once"}',
            "}",
            "gemv.int8: 'source' is missing",
        ),
        ("name: siracusa", "name: syracuse", "expected 'siracusa', as the file's"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(edited, old, new, message):
    with pytest.raises(BadInput, match=message):
        read_device(edited(old, new))


def test_units_are_what_they_say():
    assert (
        parse("4 MiB", "B", "x") == 4 * 1024**2
        and parse("0.5 pJ/B", "J/B", "x") == 5e-13
        and parse("0.7", "", "x") == 0.7
    )
    assert all(unit in names or not unit or 1 not in names.values() for unit, names in UNITS.items())


# ---------------------------------------------------------------- costs


def test_bytes_are_those_of_the_artifacts_tensors(tiny, tmp_path):
    subject = tiny()
    pruned, _ = Width(remove=2, of=4, metric="magnitude").apply(subject, data="embedded", work=tmp_path)
    quantised, _ = Rtn(bits=4, group=32).apply(subject)
    both, _ = Rtn(bits=4, group=32).apply(pruned)
    for name, s in (("dense", subject), ("w", pruned), ("q", quantised), ("wq", both)):
        save_artifact(s, tmp_path / name, stages=[], reports=[], base={"name": "x", "fingerprint": "y"}, label=name)
        loaded = load_artifact(tmp_path / name)
        rotary = sum(b.nbytes for b in loaded.model.model.rotary_emb.buffers())
        assert distinct_bytes(stored(loaded)) == sizes(loaded)["bytes_in_memory"] - rotary, name
        from safetensors import safe_open

        kept = 0
        for file in (tmp_path / name).glob("*.safetensors"):
            with safe_open(file, "pt") as f:
                kept += sum(f.get_tensor(key).nbytes for key in f.keys())  # noqa: SIM118
        assert distinct_bytes(stored(loaded)) == kept, name


def test_macs_are_counted_by_hand(tiny):
    subject = tiny(layers=3)
    one, many = costs(subject, 1, 7), costs(subject, 5, 0)
    vocabulary = subject.model.config.vocab_size * 32
    assert one.macs == 3 * (LINEARS + 2 * 8 * 4 * 8) + vocabulary  # attention: 8 positions, q k and p v, 4 heads of 8
    assert many.macs == 3 * (5 * LINEARS + 2 * 15 * 4 * 8) + vocabulary  # 1 + 2 + 3 + 4 + 5 pairs, the head once
    assert one.cache_bytes == 3 * 8 * (2 * 2 * 8) * 2  # float16 keys and values of two heads of 8
    assert {o.kind for o in one.operations} == {"gemv", "attention", "move"} and "gemm" in {
        o.kind for o in many.operations
    }


def test_a_tied_table_is_kept_once_and_read_at_every_token(tiny):
    tied, apart = tiny(), tiny(tie_word_embeddings=False)
    table = tied.model.config.vocab_size * 32 * 4
    assert costs(apart).kept - costs(tied).kept == table
    assert costs(apart).weight_bytes == costs(tied).weight_bytes == costs(tied).kept + 32 * 4  # and one row of it


def test_blocks_that_run_twice_are_kept_once_and_read_twice(tiny):
    subject = tiny(layers=4)
    twice = apply_plan(subject, [0, 1, 1, 2, 3])
    assert costs(twice).kept == costs(subject).kept
    assert costs(twice).weight_bytes - costs(subject).weight_bytes == (LINEARS + 2 * 32) * 4


def test_masked_zeros_are_multiplied(tiny, tmp_path):
    pruned, _ = Width(remove=2, of=4, metric="magnitude").apply(tiny(), data="embedded", work=tmp_path)
    assert costs(pruned).macs == costs(tiny()).macs


def test_what_lost_its_attention_keeps_no_cache(tiny, tmp_path):
    halved, _ = Depth(blocks=[2, 4], part="attention").apply(tiny(), data="embedded", work=tmp_path)
    assert costs(halved).cache_bytes == costs(tiny()).cache_bytes * 4 // 6


def test_a_quantised_table_that_is_not_tied(tiny):
    subject, _ = Rtn(bits=4, group=32, embedding_bits=8).apply(tiny(tie_word_embeddings=False))
    assert {w.name for w in stored(subject)} >= {"embedding", "head"} and costs(subject).macs == costs(
        tiny(tie_word_embeddings=False)
    ).macs


def test_corrections_count(tiny):
    subject = tiny()
    linear = subject.linears(2)["up_proj"]
    before = costs(subject)
    subject.blocks[2].mlp.up_proj = Adapted(linear, torch.ones(4, 32), torch.ones(64, 4))
    after = costs(subject)
    assert after.macs - before.macs == 4 * (32 + 64) and after.kept - before.kept == 4 * 4 * (32 + 64)


def test_what_is_not_known_is_named(tiny):
    subject = tiny()
    subject.blocks[1].mlp.gate_bias = nn.Linear(4, 4)
    with pytest.raises(BadInput, match="block 1 .*'mlp.gate_bias' .Linear.*expected q_proj"):
        stored(subject)
    subject = tiny()
    subject.model.model.adapter_norm = nn.LayerNorm(4)
    with pytest.raises(BadInput, match="'adapter_norm'"):
        costs(subject)
    for tokens, context in ((0, 1), (1, -1)):
        with pytest.raises(BadInput, match="at least 1 token"):
            costs(tiny(), tokens, context)


def test_a_weight_is_computed_in_what_it_is_held_in(tiny, tmp_path):
    """Floating types as they are, codes of any bits as int8, attention as the norms; packed and corrected weights as
    the weights themselves."""
    halves = tiny()
    halves.model.bfloat16()
    assert (
        {w.precision for w in stored(halves)}
        == {"bfloat16"}
        == {o.precision for o in costs(halves).operations if o.macs}
    )
    four, _ = Rtn(bits=4, group=32, embedding_bits=8).apply(halves)
    four.blocks[2].mlp.up_proj = Adapted(four.linears(2)["up_proj"], torch.ones(4, 32), torch.ones(64, 4))
    found = {o.name: o.precision for o in costs(four).operations}
    assert (
        found["blocks.2.up_proj"] == found["blocks.0.q_proj"] == found["head"] == "int8"
        and found["blocks.0.attention"] == "bfloat16"
    )
    pruned, _ = Width(remove=2, of=4, metric="magnitude").apply(tiny(), data="embedded", work=tmp_path)
    save_artifact(pruned, tmp_path / "w", stages=[], reports=[], base={"name": "x", "fingerprint": "y"}, label="w")
    packed = load_artifact(tmp_path / "w")
    assert packed.linears(0)["q_proj"].encoding == "2:4" and {w.precision for w in stored(packed)} == {"float32"}


def test_a_sketch_costs_what_its_subject_does(tiny):
    for subject in (
        tiny(),
        apply_plan(tiny(layers=4), [0, 1, 1, 2]),
        Rtn(bits=4, group=32).apply(tiny(tie_word_embeddings=False))[0],
    ):
        for tokens, context in ((1, 16), (5, 0)):
            assert costs(sketch(subject), tokens, context) == costs(subject, tokens, context)
    plain = sketch(tiny(layers=4))
    assert plain.depth == 4 and sketch(plain) is plain


def test_another_size_is_that_of_the_model_made_so(tiny, tmp_path):
    """Bytes of sketches against those of models that were really cut, pruned and packed, or quantised (4 bits and 16 a
    group of 32: 4.5)."""
    subject = tiny()
    assert distinct_bytes(resized(subject, blocks=2).weights) == distinct_bytes(stored(apply_plan(subject, [0, 1])))
    pruned, _ = Width(remove=2, of=4, metric="magnitude").apply(subject, data="embedded", work=tmp_path)
    save_artifact(pruned, tmp_path / "w", stages=[], reports=[], base={"name": "x", "fingerprint": "y"}, label="w")
    assert distinct_bytes(resized(subject, pattern="2:4").weights) == distinct_bytes(
        stored(load_artifact(tmp_path / "w"))
    )
    four = Rtn(bits=4, group=32, embedding_bits=8).apply(subject)[0]
    sizes = {w.name: (w.bytes, w.precision) for w in stored(four) if "proj" in w.name}
    assert sizes == {w.name: (w.bytes, w.precision) for w in resized(subject, bits=4.5).weights if "proj" in w.name}
    tables = {w.name: w.bytes for w in resized(subject, bits=16, table=8).weights}
    assert (
        tables["head"] == tables["embedding"] == subject.model.config.vocab_size * 32
        and tables["blocks.0.up_proj"] == 2 * 32 * 64
    )
    assert (
        next(w for w in resized(subject, bits=2, pattern="1:16").weights if "proj" in w.name).bytes == 32 * 32 * 2 / 8
    )  # packed would be 2.125 bits
    for wrong, message in (
        ({"blocks": 0}, "0 blocks: expected 1 to 6"), ({"blocks": 7}, "expected 1 to 6"), ({"bits": 0}, "bits 0: "
            "expected"),
        ({"table": 64}, "table 64: expected"), ({"pattern": "2:2"}, "removes 2 of 2"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            resized(subject, **wrong)


def test_a_correction_keeps_its_bytes_at_other_bits(tiny):
    subject = tiny()
    subject.blocks[2].mlp.up_proj = Adapted(subject.linears(2)["up_proj"], torch.ones(4, 32), torch.ones(64, 4))
    w = next(w for w in resized(subject, bits=8, pattern="2:4").weights if w.name == "blocks.2.up_proj")
    assert w.bytes == 32 * 64 * (8 * 2 + 3) / 4 / 8 + 4 * 4 * (32 + 64)


# ---------------------------------------------------------------- places


def test_weights_live_in_the_nearest_room(tiny):
    subject = tiny()
    total = distinct_bytes(stored(subject))
    assert allocate(subject, made([(total, 1e6, None, True)])).verdict == FITS
    two = allocate(subject, made([(total / 2, 1e6, None, True), (total, 1e5, None, False)]))
    assert two.verdict == STREAMS and sum(two.bytes.values()) == total and two.bytes["m0"] <= total / 2
    assert two.tier_of["embedding"] == two.tier_of["head"] == "m0"
    small = allocate(subject, made([(total - 1, 1e6, None, True)]))
    assert small.verdict == TOO_LARGE and small.missing == total - sum(small.bytes.values())
    assert allocate(subject, made([(total, 1e6, None, True)]), cache_bytes=1).verdict == TOO_LARGE
    assert (
        allocate(subject, made([(total + 1, 1e6, None, False)]), cache_bytes=1).verdict == FITS
    )  # the only memory there is


def test_an_engine_that_pads_gains_nothing_from_fewer_bits(tiny):
    subject = tiny()
    four, eight = (Rtn(bits=bits, group=32).apply(subject)[0] for bits in (4, 8))
    pads, does_not = made([(1e9, 1e6, None, True)], bits=8), made([(1e9, 1e6, None, True)])
    linear = next(w for w in stored(four) if w.name == "blocks.0.up_proj")
    assert padded(linear, pads) == 32 * 64 > padded(linear, does_not) == linear.bytes
    speeds = {
        (bits, d.engines[0].stored_bits): project(s, d).seconds.ceiling
        for bits, s in ((4, four), (8, eight))
        for d in (pads, does_not)
    }
    assert speeds[4, None] < speeds[8, None] and speeds[4, 8] == pytest.approx(speeds[8, 8], rel=0.1)


def test_corrections_are_padded_by_themselves(tiny):
    subject = Rtn(bits=4, group=32).apply(tiny())[0]
    linear = subject.linears(2)["up_proj"]
    subject.blocks[2].mlp.up_proj = Adapted(linear, torch.ones(4, 32), torch.ones(64, 4))
    w = next(w for w in stored(subject) if w.name == "blocks.2.up_proj")
    assert padded(w, made([(1e9, 1e6, None, True)], bits=8)) == 32 * 64 + 4 * 4 * (32 + 64)


def test_a_cache_is_never_in_memory_that_is_not_written(tiny):
    subject = tiny()
    frozen = Device(
        "d",
        "",
        made([]).engines,
        (Tier("flash", 1e9, 1e6, None, True, False), Tier("ram", 5e3, 1e6, None, True)),
        None,
        (1, 1),
        (1, 1),
        None,
    )
    found = allocate(subject, frozen, cache_bytes=4000)
    assert (found.cache, found.verdict) == ("ram", FITS) and allocate(
        subject, frozen, cache_bytes=6000
    ).verdict == TOO_LARGE
    assert profile(subject, frozen, prompt=4, context=4).placement.verdict == FITS
    assert profile(subject, frozen, prompt=400, context=4).placement.verdict == TOO_LARGE  # the prompt's own cache


def test_the_other_way_round_agrees_with_the_plan(tiny):
    subject = tiny(layers=6)
    weights = stored(subject)
    block = sum(w.bytes for w in weights if w.name.startswith("blocks.0."))
    rest = distinct_bytes(weights) - 6 * block
    d = made([(rest + 3.5 * block, 1e6, None, True)])
    assert blocks_that_fit(subject, d, 32) == 3
    assert (
        allocate(apply_plan(subject, [0, 1, 2]), d).verdict == FITS
        and allocate(apply_plan(subject, [0, 1, 2, 3]), d).verdict == TOO_LARGE
    )
    assert blocks_that_fit(subject, d, 8) == 6 and blocks_that_fit(subject, made([(10, 1, None, True)]), 8) is None
    assert blocks_that_fit(subject, d, 32, kept=0.5) > 3
    assert blocks_that_fit(subject, made([(rest + 3.5 * block, 1e6, None, True)], bits=32), 4) == 3
    for bits, kept in ((0, 1), (-4, 1), (4, 0), (4, 2)):
        with pytest.raises(BadInput, match="expected bits above 0"):
            blocks_that_fit(subject, d, bits, kept=kept)


def block_of(n, weights=1000):
    return Stored(f"blocks.{n}.up_proj", 2 * weights, weights, (n,), precision="bfloat16")


FOUR = Sketch(
    "four", (Stored("embedding", 600, 300, (9,)), Stored("head", 600, 300, (9,)), *map(block_of, range(4))), 1, 1, 1
)


def test_what_fits_by_hand():
    """Four blocks of 1,000 weights and a tied table of 600 bytes, into 2,600: a block is 2,000 bytes at 16 bits, 1,000
    at 8, 500 at 4.

    W2:4 packed takes (2 b + 3) / 4 bits: 8.75, 4.75 and 2.75, so 1,094, 594 and 344 bytes.
    """
    found = what_fits(FOUR, made([(2600, 1e6, None, True)]), patterns=(None, "2:4"), bits=(16, 8, 4))
    most = {(p, b): rows.blocks.max() for (p, b), rows in found.groupby(["pattern", "bits"])}
    assert most == {("", 16): 1, ("", 8): 2, ("", 4): 4, ("2:4", 16): 1, ("2:4", 8): 3, ("2:4", 4): 4}
    assert found.on_chip.all() and list(found.blocks) == sorted(found.blocks, reverse=True)
    first = found.iloc[0]
    assert (first.blocks, first.bits, first.pattern, first.bytes, first.weights) == (4, 4, "", 2600, 1)
    assert set(found[found.pattern == "2:4"].weights) == {0.125, 0.25, 0.375, 0.5}
    unpacked = what_fits(FOUR, made([(2600, 1e6, None, True)]), patterns=("2:4",), bits=(16, 8, 4), packed=False)
    assert {b: rows.blocks.max() for b, rows in unpacked.groupby("bits")} == {16: 1, 8: 2, 4: 4}
    # the table is padded too, from 600 bytes of 300 numbers no further; further memory is in memory and not on the chip
    pads = what_fits(FOUR, made([(2600, 1e6, None, True)], bits=8), patterns=(None, "2:4"), bits=(8, 4, 2))
    assert set(pads.groupby(["pattern", "bits"]).blocks.max()) == {2}
    two = what_fits(FOUR, made([(2600, 1e6, None, True), (1000, 1e5, None, False)]), patterns=(None,), bits=(8,))
    assert list(zip(two.blocks, two.on_chip, strict=True)) == [(3, False), (2, True), (1, True)]
    assert not what_fits(FOUR, made([(1e9, 1e6, None, False)]), blocks=(4,)).on_chip.any()
    none = what_fits(FOUR, made([(599, 1e6, None, True)]))
    assert (
        none.empty
        and "on_chip" in none
        and not what_fits(FOUR, made([(599, 1e6, None, True)]), table=4, bits=(2,)).empty
    )
    with pytest.raises(BadInput, match="5 blocks: expected 1 to 4"):
        what_fits(FOUR, made([(2600, 1e6, None, True)]), blocks=(5,))


def test_what_fits_agrees_with_blocks_that_fit_and_with_the_plan(tiny):
    subject = tiny()
    d = made([(distinct_bytes(stored(subject)) * 0.6, 1e6, None, True)])
    found = what_fits(subject, d, patterns=(None,), bits=(32, 8), context=1)
    cache = costs(subject, 1, 1).cache_bytes
    assert (
        found[found.bits == 32].blocks.max()
        == blocks_that_fit(subject, d, 32, cache_bytes=cache)
        < found[found.bits == 8].blocks.max()
        == 6
    )
    assert allocate(apply_plan(subject, [0, 1]), d).verdict == FITS and 2 in set(found[found.bits == 32].blocks)


# ---------------------------------------------------------------- time and energy


def test_time_is_the_larger_of_arithmetic_and_traffic(tiny):
    subject = tiny()
    c = costs(subject, 1, 16)
    slow_memory = made([(1e9, 1e3, None, True)], gemv=1e9, gemm=1e9)
    found = project(subject, slow_memory, 1, 16)
    cache = sum(o.cache for o in c.operations)
    assert (
        found.seconds.ceiling == pytest.approx((c.weight_bytes + cache) / 1e3, rel=1e-6)
        and found.seconds.binds == TRAFFIC
    )
    assert found.seconds.high == pytest.approx(2 * found.seconds.ceiling) and found.seconds.low == pytest.approx(
        found.seconds.ceiling
    )
    slow_engine = project(subject, made([(1e9, 1e12, None, True)]), 1, 16)
    assert (
        slow_engine.seconds.ceiling == pytest.approx(c.macs / 1e7, rel=1e-6) and slow_engine.seconds.binds == ARITHMETIC
    )
    assert slow_engine.seconds.high == pytest.approx(4 * slow_engine.seconds.ceiling, rel=1e-3)
    started = project(subject, made([(1e9, 1e12, None, True)], gemv=1e9, gemm=1e9, overhead=1.0), 1, 16)
    assert started.seconds.binds == OVERHEAD and started.seconds.low == pytest.approx(len(c.operations), rel=1e-3)
    assert (
        project(subject, slow_engine_with(None)).unknown
        and "bandwidth of m0" in project(subject, slow_engine_with(None)).unknown
    )


def test_arithmetic_goes_at_the_rate_of_the_precision(tiny):
    """int8 four times as fast as float32: the linears of a quantised model gain it, attention, which stays floating,
    does not."""
    subject, memory = tiny(), [(1e9, 1e12, None, True)]
    engines = (
        Engine("f", 1e6, rates(10, 10, ("float32",)), None, None),
        Engine("i", 1e6, rates(40, 80, ("int8",)), None, None),
    )
    d = Device("d", "", engines, made(memory).tiers, 0.0, (1, 1), (1, 1), None)
    dense, eight = (project(s, d, 1, 16) for s in (subject, Rtn(bits=8, group=32).apply(subject)[0]))
    assert dense.spans["blocks.0.up_proj"].ceiling == pytest.approx(32 * 64 / 10e6) and dense.taken == eight.taken == ()
    assert eight.spans["blocks.0.up_proj"].ceiling == pytest.approx(32 * 64 / 40e6)
    assert (
        eight.spans["blocks.0.attention"].ceiling
        == dense.spans["blocks.0.attention"].ceiling
        == pytest.approx(2 * 17 * 4 * 8 / 10e6)
    )
    prompt = project(Rtn(bits=8, group=32).apply(subject)[0], d, 5, 0)
    assert prompt.spans["blocks.0.up_proj"].ceiling == pytest.approx(5 * 32 * 64 / 80e6)


def test_a_rate_that_is_not_known_is_taken_from_the_nearest_precision_and_named(tiny):
    halves = tiny()
    halves.model.bfloat16()
    memory = [(1e9, 1e12, None, True)]
    wider, narrower = (made(memory, precisions=p) for p in (("float32", "int8"), ("int8",)))
    assert wider.rate("gemv", "bfloat16") == (1e7, "float32") and narrower.rate("gemm", "bfloat16") == (1e8, "int8")
    assert (
        made(memory, precisions=("float32",)).rate("gemv", "int8") == (1e7, "float32")
        and made(memory, gemv=None).rate("gemv", "int8") is None
    )
    assert project(halves, wider).taken == ("rate of gemv in bfloat16: that in float32",)
    assert project(halves, narrower, 4, 0).taken == (
        "rate of gemm in bfloat16: that in int8",
        "rate of gemv in bfloat16: that in int8",
    )
    assert project(halves, made(memory)).taken == () and project(halves, made(memory, gemv=None), 1).unknown == (
        "arithmetic",
    )
    plain = profile_report(halves, narrower)
    assert plain["taken"] and "another stands in: rate of gemm in bfloat16: that in int8" in readable(plain)
    assert "another stands in" not in readable(profile_report(halves, made(memory)))
    with pytest.raises(BadInput, match="unknown precision 'int4': did you mean 'int8'"):
        wider.rate("gemv", "int4")
    assert all(set(order) == set(PRECISIONS) and order[0] == p for p, order in NEAREST.items())


def test_rates_are_half_the_published_operations():
    """FLOPS and OPS count two a MAC: K1 256 GFLOPS FP32 and 2.05 TOPS INT8, GAP9 150.8 GOPS, Pi 4 57.6 and Pi 5 153.6
    GFLOPS."""
    k1, gap9, pi4, pi5 = map(device, ("k1", "gap9", "pi4", "pi5"))
    assert 2 * k1.rate("gemm", "float32")[0] == pytest.approx(256e9) and 2 * k1.rate("gemm", "int8")[
        0
    ] == pytest.approx(2.05e12, rel=1e-3)
    assert 2 * gap9.rate("gemm", "int8")[0] == pytest.approx(150.8e9) and gap9.rate("gemm", "float32")[1] == "int8"
    assert 2 * pi4.rate("gemv", "float32")[0] == pytest.approx(57.6e9) and 2 * pi5.rate("gemv", "float32")[
        0
    ] == pytest.approx(153.6e9)
    assert k1.rate("gemv", "bfloat16")[1] == "float32" and device("siracusa").rate("gemv", "bfloat16")[1] == "int8"
    assert device("laptop").rate("gemv", "int8") is None


def test_what_each_lever_buys_by_hand():
    """1e4 bytes a second, 4 blocks of 2,000 bytes and a head of 600: 8,600 bytes and one row of the table, all of it, a
    token."""
    d = made([(1e9, 1e4, None, True)], gemv=1e9, gemm=1e9)
    found = what_each_buys(FOUR, d, depths=(0.5, 0.1), patterns=("2:4",), bits=(8,)).set_index("setting")
    assert found.ceiling.to_dict() == pytest.approx({
        "": 1e4 / 9200, "2 of 4 blocks": 1e4 / 5200, "1 of 4 blocks": 1e4 / 3200, "2:4 as zeros": 1e4 / 9200, "2:4 "
            "packed": 1e4 / 5576, "8 bits": 1e4 / 5200,
    })  # fmt: skip
    assert (found.high == found.ceiling).all() and found.low.to_numpy() == pytest.approx(
        found.ceiling / 2
    )  # mbu 0.5 to 1
    assert (
        found.bytes["2:4 packed"] == 600 + 4 * 1094 and set(found.verdict) == {FITS} and set(found.binds) == {TRAFFIC}
    )
    assert list(found.lever) == ["as it is", "depth", "depth", "width", "width", "bits"]
    pads = what_each_buys(
        resized(FOUR, bits=8), made([(1e9, 1e4, None, True)], gemv=1e9, bits=8), patterns=("2:4",), bits=(4,)
    ).set_index("setting")
    assert pads.high["4 bits"] == pads.high["2:4 packed"] == pads.high[""] < pads.high["2 of 4 blocks"]
    small = what_each_buys(FOUR, made([(5000, 1e4, None, True)]), patterns=(), bits=(8,)).set_index("setting")
    assert (
        small.verdict[""] == TOO_LARGE
        and small.high.isna()[""]
        and small.verdict["8 bits"] == FITS
        and small.high["8 bits"] > 0
    )
    for wrong in (0, 1.5):
        with pytest.raises(BadInput, match=f"depth {wrong}: expected a share"):
            what_each_buys(FOUR, d, depths=(wrong,))


def slow_engine_with(read):
    return made([(1e9, read, None, True)])


def test_many_tokens_at_once_are_cheaper_a_token(tiny):
    subject, d = tiny(), made([(1e9, 1e4, None, True)], gemv=1e3, gemm=1e3)
    found = profile(subject, d, prompt=32, context=32)
    assert found.prefill.seconds.ceiling < 32 * found.decode.seconds.ceiling / 4
    slow, fast = found.tokens_per_second
    assert slow == pytest.approx(1 / found.decode.seconds.high) and slow < fast


def test_energy_is_the_sum_of_its_parts(tiny):
    subject = tiny()
    d = made([(1e9, 1e6, 2e-12, True)], joules=3e-12, idle=0.5)
    time, c = project(subject, d, 1, 16), costs(subject, 1, 16)
    found = energy(subject, d, allocate(subject, d), time, 1, 16)
    cache = sum(o.cache for o in c.operations)
    assert found.parts["arithmetic"] == pytest.approx(3e-12 * c.macs) and found.parts["traffic"] == pytest.approx(
        2e-12 * (c.weight_bytes + cache)
    )
    assert found.high - found.low == pytest.approx(0.5 * (time.seconds.high - time.seconds.low)) and found.unknown == ()
    bare = energy(subject, made([(1e9, 1e6, None, True)]), allocate(subject, d), time, 1, 16)
    assert bare.low == bare.high == 0 and len(bare.unknown) == 3 and not bare.known and found.known and found.how == SUM


def test_energy_is_the_whole_devices_power_where_that_is_known(tiny):
    subject = tiny()
    d = replace(made([(1e9, 1e6, 2e-12, True)], joules=3e-12, idle=0.5), power=(2.0, 7.0))
    time = project(subject, d, 1, 16).seconds
    plain = profile_report(subject, d, context=16)
    assert plain["joules_per_token"] == {
        "low": pytest.approx(2 * time.low),
        "high": pytest.approx(7 * time.high),
        "how": WHOLE,
    }
    assert "idle power" not in plain["left_out"] and "power of the whole device" in readable(plain)


def test_the_report_says_all_and_that_it_is_a_projection(tiny):
    plain = json.loads(json.dumps(profile_report(tiny(), made([(1e9, 1e6, 1e-12, True)]))))
    assert plain["kind"] == "projection" and plain["tokens_per_second"]["low"] < plain["tokens_per_second"]["high"]
    assert plain["joules_per_token"] is not None and "idle power" in plain["left_out"] and plain["verdict"] == FITS
    text = readable(plain)
    assert "a projection, nothing is measured" in text and "tokens/s" in text and "not known" in text
    none = profile_report(tiny(), made([(10, 1e6, 1e-12, True)]))
    assert none["verdict"] == TOO_LARGE and "seconds_per_token" not in none and "without a place" in readable(none)
    with pytest.raises(BadInput, match="does not fit made"):
        project(tiny(), made([(10, 1e6, 1e-12, True)]))
    silent = Device(
        "silent",
        "",
        (Engine("e", None, rates(None, None), None, None),),
        (Tier("m", 1e9, None, None, True),),
        None,
        (1, 1),
        (1, 1),
        None,
    )
    with pytest.raises(BadInput, match="neither how fast it reads nor how fast it multiplies"):
        project(tiny(), silent)


def test_the_command(tiny, tmp_path):
    folder = save_checkpoint(tiny(), tmp_path / "tiny")
    run = CliRunner().invoke(app, ["profile", str(folder), "--device", "siracusa", "--json", "--dtype", "bfloat16"])
    plain = json.loads(run.stdout)
    assert (
        run.exit_code == 0
        and plain["device"] == "siracusa"
        and plain["verdict"] == FITS
        and plain["evidence"]["engines.0.stored_bits"]["kind"] == "published"
    )
    assert "projection" in CliRunner().invoke(app, ["profile", str(folder), "--device", "k1"]).stdout
    wrong = CliRunner().invoke(app, ["profile", str(folder), "--device", "siracuse"])
    assert wrong.exit_code == 2 and "did you mean 'siracusa'" in wrong.output
