"""Chapter 9 on records that nobody made: what was put in is what comes out, and verdicts turn with it."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import friedmanchisquare, ttest_rel

from thesislib.chapters import ch09_arithmetic as sums
from thesislib.chapters import ch09_claims
from thesislib.chapters import ch09_low_rank as ch09
from thesislib.chapters import ch09_sentences as sentences
from thesislib.chapters import ch09_tables as tables
from thesislib.chapters.ch09_runs import (
    HELD_OUT,
    PPL,
    TASKS,
    LowRankChapter,
    Maker,
    Record,
    every,
    key,
    measure,
    recorded_parameters,
)
from thesislib.chapters.ch09_spectra import Spectra, measured
from thesislib.chapters.phrases import FAILS, HOLDS, UNDECIDED
from thesislib.compress.lowrank import LowRankStage
from thesislib.errors import BadInput
from thesislib.experiment import recipe_of
from thesislib.records.measurement import Measurement

N = 24  # windows
LENGTH = 100  # tokens of each
MLPS = ("gate_proj", "up_proj", "down_proj")


def row(c, what, ratio, size, noise, seed):
    """A configuration's row: `ratio` times the dense model's perplexity of e^3, on windows of different difficulty."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(1).normal(0, 0.3, N)
    nats = LENGTH * (3 + hard + math.log(ratio) + noise * rng.standard_normal(N))
    items = [{"id": i, "document": i, "nats": float(x), "tokens": LENGTH} for i, x in enumerate(nats)]
    mean = float(nats.sum() / (N * LENGTH))
    made = {
        "label": c.label,
        "recipe": c.key,
        "stages": recipe_of(c.stages).entries(),
        "bytes": {"bytes_on_disk": size, "parameters": size // 2},
        "reports": [{"blocks": [1, 2], "relative_errors": {"blocks.0.q_proj": 0.1, "blocks.0.up_proj": 0.3}}],
    }
    facts = {"made": made, "chapter": {"cell": c.cell, "name": c.name, "what": what}, "protocol": {"on": "wikitext"}}
    value = math.exp(mean)
    return Measurement(
        task="text", metric="perplexity", value=value, low=value * 0.9, high=value * 1.1, n=N, unit="window",
        items=items, provenance={**facts, "settings": {"length": LENGTH, "limit": N}},
    )  # fmt: skip


def known(ratios=None, sizes=None, noise=0.01):
    """A record in which models have these ratios to the dense model; others have 2. Sizes are those of the names."""
    ratios, sizes = ratios or {}, sizes or {}
    rows = {}
    for i, c in enumerate(every(recorded_parameters())):
        for what in c.measured:
            if what in TASKS:
                continue
            ratio = 1.0 if not c.stages else ratios.get(c.name, 2.0)
            m = row(c, what, ratio, sizes.get(c.name, 200_000_000), 0 if not c.stages else noise, 100 + i)
            rows.setdefault((c.key, what), m)
    record = Record(rows, {})
    shapes = {f"blocks.{b}.{n}": (1536, 576) for b in range(2) for n in ("q_proj", "k_proj", "v_proj", "o_proj", *MLPS)}
    ways = ("plain", "whitened", "whitened, tokens of unit norm")
    record.spectra = Spectra({w: dict.fromkeys(shapes, 400.0) for w in ways}, shapes, {}, "c4", 32)
    return record


def test_a_rival_is_the_best_model_that_is_no_larger():
    sizes = {
        "90% kept, 16 bits": 240,
        "rounded to 8 bits": 241,
        "GPTQ, 4 bits": 110,
        "GPTQ, 3 bits": 100,
        "2 blocks removed": 239,
    }
    record = known({"90% kept, 16 bits": 1.5, "rounded to 8 bits": 1.01, "GPTQ, 4 bits": 1.3, "2 blocks removed": 1.2},
                   sizes)  # fmt: skip
    found = {r.model: r for r in tables.rivals(record)}
    mine = found["90% kept, 16 bits"]
    assert mine.rival == "2 blocks removed"  # 8 bits are better and one byte larger
    assert mine.c.difference == pytest.approx(math.log(1.2 / 1.5), abs=0.02) and mine.c.told
    assert "lose to another model" in sentences.front_sentence(record)
    better = known({"90% kept, 16 bits": 1.05, "2 blocks removed": 1.2}, sizes)
    assert {r.model: r for r in tables.rivals(better)}["90% kept, 16 bits"].c.difference > 0


def test_ratios_are_paired_with_the_dense_model():
    record = known({"svd_llm, Wikipedia": 1.7})
    table = tables.beside_dense(record, [c for c in every(recorded_parameters()) if c.name == "svd_llm, Wikipedia"])
    assert table["x dense"].iloc[0] == pytest.approx(1.7, rel=0.02)
    assert table["low"].iloc[0] < 1.7 < table["high"].iloc[0] < 1.75  # windows' difficulty cancels


def test_methods_are_tested_against_svd_llm_together():
    record = known({"svd": 9.0, "asvd": 5.0, "80% kept, 16 bits": 3.0, "svd_llm": 3.0, "svd_llm, Wikipedia": 3.0})
    tests = tables.against(record, tables.methods(recorded_parameters()), "svd_llm")
    assert tests["svd"].told and tests["svd"].difference == pytest.approx(math.log(3), abs=0.05)
    assert not tests["svd_llm, Wikipedia"].told or abs(tests["svd_llm, Wikipedia"].difference) < 0.02
    dense = [x["nats"] / LENGTH for x in tables.found(record, tables.methods(recorded_parameters()))["svd_llm"].items]
    svd = [x["nats"] / LENGTH for x in tables.found(record, tables.methods(recorded_parameters()))["svd"].items]
    assert tests["svd"].p >= ttest_rel(svd, dense).pvalue  # Holm's only makes it larger


def test_whether_it_is_the_path_rests_on_the_seeds():
    """The same means, seeds close together or far apart."""

    def arms(apart):
        ratios = {}
        for i, seed in enumerate((-1, 0, 1)):
            ratios[f"CALR, seed {i}"] = 1.5 * math.exp(apart * seed)
            ratios[f"wider pairs trained, seed {i}"] = 1.6 * math.exp(apart * seed)
            ratios[f"LoRA, seed {i}"] = 1.7 * math.exp(apart * seed)
        return known(ratios, noise=0.001)

    near, far = arms(0.001), arms(0.2)
    assert tables.spread(near).df == 6 and tables.spread(far).deviation == pytest.approx(0.2, rel=0.1)
    assert tables.arms_compared(near)["wider pairs trained"].told
    assert not tables.arms_compared(far)["wider pairs trained"].told
    assert ch09_claims.claims(near)[0].word == HOLDS
    assert ch09_claims.claims(far)[0].word == UNDECIDED
    assert "wider pairs trained is worse" in sentences.training_sentence(near)
    table = tables.arms_points(far).loc["CALR"]
    assert table["seeds"] == 3 and table["low"] == pytest.approx(1.5 * math.exp(-0.2), rel=0.01)


def test_without_training_the_path_is_held_against_wider_pairs():
    record = known({"wider pairs": 2.0, "path in closed form": 1.5, "CALR, seed 0": 1.4}, noise=0.001)
    said = sentences.untrained_sentence(record)
    assert "is x 0.750" in said and "p < 0.001" in said and said in sentences.training_sentence(record)


def test_kinds_for_which_whitening_is_worse_are_named():
    of = {"svd": (2, 3), "asvd": (1.2, 2), "svd_llm": (1.4, 1.1)}
    ratios = {f"{name}, {m}": first for name in ("q_proj", "k_proj") for m, (first, _) in of.items()}
    ratios |= {f"{name}, {m}": other for name in ("v_proj", "o_proj", *MLPS) for m, (_, other) in of.items()}
    said = sentences.kinds_sentence(known(ratios))
    assert "better than svd for 7 of 7 kinds and asvd for 5 of 7 kinds (surely worse for q_proj and k_proj)" in said


def test_claims_turn_with_the_record():
    better = known({"svd": 50.0, "fwsvd": 40.0, "asvd": 20.0, "80% kept, 16 bits": 5.0, "svd_llm": 5.0})
    assert {c.paper: c.word for c in ch09_claims.claims(better)}[ch09_claims.SVD_LLM] == HOLDS
    worse = known({"svd": 2.0, "fwsvd": 40.0, "asvd": 20.0, "80% kept, 16 bits": 5.0, "svd_llm": 5.0})
    assert {c.paper: c.word for c in ch09_claims.claims(worse)}[ch09_claims.SVD_LLM] == FAILS
    order = ("q_proj", "k_proj", "v_proj", "o_proj", *MLPS)
    as_said = known({f"{name}, asvd": 1.1 + 0.1 * i for i, name in enumerate(order)})
    assert ch09_claims.claims(as_said)[3].word == HOLDS
    other = known({f"{name}, asvd": 1.1 + 0.1 * i for i, name in enumerate(reversed(order))})
    assert ch09_claims.claims(other)[3].word == FAILS


def test_energy_is_the_square_of_the_error():
    said = sentences.energy_sentence(known({"80% kept, 16 bits": 5.0, "svd_llm": 5.0}))
    assert "miss 9.0% of their energy and those of attention 1.0%" in said and "x 5.0" in said


def test_neighbours_by_ranks():
    record = known({"LaCo, the paper's sum": 9.0, "ShortGPT": 1.2, "LLM-Streamline": 1.1})
    ranking, pairs = tables.neighbours_tests(record)
    assert max(ranking.mean_ranks, key=ranking.mean_ranks.get) == "LaCo, the paper's sum"
    assert min(ranking.mean_ranks, key=ranking.mean_ranks.get) == "LLM-Streamline"
    rows = tables.found(record, [*tables.neighbours(recorded_parameters()), *tables.calr(recorded_parameters())])
    values = [[x["nats"] for x in rows[name].items] for name in ranking.mean_ranks]
    assert ranking.statistic == pytest.approx(friedmanchisquare(*values).statistic)
    assert pairs["ShortGPT", "LLM-Streamline"].told


def test_every_sentence_copes_with_a_record_that_is_not_complete():
    whole = known()
    for c in every(recorded_parameters()):
        some = Record({k: m for k, m in whole.items() if k[0] != c.key or not c.stages}, {})
        some.spectra = whole.spectra
        assert all(isinstance(s, str) for s in sentences.every(some))


# ---------------------------------------------------------------- sums


def test_the_sizes_of_the_papers_models():
    small = sums.MODELS[0]
    assert small.mlp == 2_654_208 and small.blocks * small.mlp / 134_515_008 == pytest.approx(0.592, abs=1e-3)
    assert small.removed_by(32) == 2_654_208 - 7_488 * 32
    assert small.needed(32, small.whole) == pytest.approx(28.8, abs=0.05)
    assert small.needed(32, small.body) == pytest.approx(22.8, abs=0.05)
    qwen, llama = sums.MODELS[1:]
    assert qwen.blocks * qwen.mlp / qwen.whole == pytest.approx(0.443, abs=2e-3)
    assert llama.blocks * llama.mlp / llama.whole == pytest.approx(0.652, abs=2e-3)
    assert "Qwen3-0.6B" in sums.removable_sentence() and "impossible" in sums.removable_table().to_string()


def test_break_even_by_counting():
    rank = int(sums.break_even(1536, 576))
    assert rank * (1536 + 576) < 1536 * 576 <= (rank + 1) * (1536 + 576)
    assert "419 of 576" in sums.break_even_sentence()
    more = int(sums.control_sentence(128).split("pairs of rank ")[1].split()[0])
    assert abs(more * 6336 - 128 * 7488) <= 6336 / 2


def test_conventions_differ():
    table = sums.conventions_table({"up": (1536, 576)})
    assert table.loc["SVD-LLM", "up"] == "335" and table.loc["LASER", "up"] == "460"


# ---------------------------------------------------------------- runs


@pytest.fixture
def small(tiny, monkeypatch):
    subject = tiny()
    ids = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("thesislib.compress.stage.calibration_windows", lambda *a: ids)
    monkeypatch.setattr("thesislib.compress.calr.calibration_windows", lambda *a: ids)
    monkeypatch.setattr("thesislib.chapters.ch09_runs.load_subject", lambda *a: subject)
    return LowRankChapter(windows=4, length=24, held_out=3, quiet=1, rank=2, steps=1, linears=["*"], keep=0.8)


def test_models_made_from_shared_metrics_are_those_of_the_stage(small):
    maker = Maker(small)
    for settings in ({"keep": 0.8}, {"keep": 0.5}, {"keep": 0.5, "method": "asvd"}, {"keep": 0.5, "method": "svd"}):
        stage = small.pairs(**settings)
        alone, _ = stage.apply(maker.subject)
        shared, _ = maker.make((stage,))
        for b in range(alone.depth):
            for name, linear in alone.linears(b).items():
                assert torch.allclose(linear.weight, shared.linears(b)[name].weight, atol=1e-5)


def test_a_row_says_how_its_model_was_made(small):
    configs = [c for c in ch09.configurations(small) if c.name in ("dense", "svd_llm", "path in closed form")]
    found = measure(configs, small)
    m = found[configs[2].key, HELD_OUT]
    assert m.made["recipe"] == configs[2].key and [*m.made["stages"][1]] == ["calr"]
    assert m.made["bytes"]["bytes_on_disk"] > 0 and len(m.made["reports"]) == 2
    assert key(m) == (configs[2].label, configs[2].key, HELD_OUT)
    assert found[configs[0].key, HELD_OUT].label == "dense"


def test_effective_ranks_by_hand(small):
    found = measured(Maker(small).subject, small)
    weight = Maker(small).subject.linears(1)["up_proj"].weight.detach().double()
    share = torch.linalg.svdvals(weight).square()
    share = share / share.sum()
    by_hand = float(torch.exp(-(share * share.log()).sum()))
    assert found.ranks["plain"]["blocks.1.up_proj"] == pytest.approx(by_hand, abs=0.01)
    assert found.first["plain"]["blocks.1.up_proj"] == pytest.approx(float(share[0]), abs=1e-5)
    assert found.shapes["blocks.1.up_proj"] == tuple(weight.shape)


def test_bad_parameters_are_named():
    with pytest.raises(BadInput, match="method 'svdd'|unknown method"):
        LowRankChapter(methods=["svdd"])
    assert LowRankStage().keep == 0.8 and PPL == "perplexity"
