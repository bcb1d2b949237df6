"""Chapter 8 on records that nobody made: what was put in is what comes out, and verdicts turn with it."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import friedmanchisquare, kendalltau, spearmanr, ttest_rel, wilcoxon
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.fakes import choice_data
from thesislib.chapters import ch08_agreement, ch08_claims, ch08_healing, paper_claims
from thesislib.chapters import ch08_cost as cost
from thesislib.chapters import ch08_relevance as ch08
from thesislib.chapters import ch08_sets as sets
from thesislib.chapters import ch08_tables as tables
from thesislib.chapters.ch08_agreement import (
    ASKING,
    LEAST,
    TEXT_ONLY,
    against_cosine,
    agreements,
    curse,
    dependence,
    lost,
    reference,
    scores_of,
    settled,
)
from thesislib.chapters.ch08_claims import claims
from thesislib.chapters.ch08_record import Record
from thesislib.chapters.ch08_runs import ALL, PERPLEXITY, RANKINGS, TASKS, Relevance, asked, chosen, key, outcomes_of
from thesislib.chapters.ch08_scores import Scores
from thesislib.chapters.claims import page
from thesislib.chapters.paper_claims import PaperClaim, section
from thesislib.chapters.phrases import FAILS, HOLDS, UNDECIDED
from thesislib.compress.agreement import Estimate
from thesislib.compress.depth import influence
from thesislib.compress.relevance import Outcomes, choices, next_tokens, outcomes
from thesislib.model.blocks import plan_without, remove
from thesislib.model.forward import final_states
from thesislib.records.measurement import Measurement
from thesislib.sources.corpus import calibration_windows

DEPTH = 20  # blocks, of which 4 to 17 may go
MIDDLE = [*range(4, 18)]
N = {"arc_easy": 200, "piqa": 180, "hellaswag": 160}
CHANCE = {"arc_easy": 0.25, "piqa": 0.5, "hellaswag": 0.25}
PARTS = ("rank", "report")
WORTH = np.r_[np.full(4, 3.0), np.random.default_rng(5).permutation(np.linspace(0.05, 1.5, 14)), 3, 3]  # nats
SHUFFLED = np.r_[np.full(4, 0.9), np.random.default_rng(11).permutation(np.linspace(0.01, 0.2, 14)), 0.9, 0.9]
PLAN = [*range(DEPTH)]


def answers(task, part, plan, ranking="", *, right, nats, label="", removed=()):
    """A row of answers."""
    items = [
        {"id": i, "correct": bool(c), "margin": float(x) / 2, "right": float(x)}
        for i, (c, x) in enumerate(zip(right, nats, strict=True))
    ]
    facts = {"protocol": {"on": task, "part": part}, "plan": plan, "made": {"label": label or f"plan {plan}"}}
    if ranking:
        facts["chapter"] = {"ranking": ranking, "removed": [*removed]}
    share = float(np.mean(right))
    half = 1.96 * np.sqrt(share * (1 - share) / len(items))
    return Measurement(
        task=task,
        metric="accuracy",
        value=share,
        low=share - half,
        high=share + half,
        n=len(items),
        unit="question",
        items=items,
        extra={"chance": CHANCE.get(task, 0.5)},
        provenance=facts,
    )


def known(worth=WORTH, cosine=SHUFFLED, noise=0.3, flips=0.05, helps=(), kept=None, seed=0):
    """A record.

    Args:
        worth: (blocks,) the nats that every item loses without a block, or {task: the same}. The share of right
            answers, 0.8 of the whole model, sinks by 0.2 a nat.
        cosine: (blocks,) scores.
        noise: of each item's nats.
        flips: the share of answers that are given anew without a block; if 0, shares of right answers are exact.
        helps: blocks without which 0.1 more are right.
        kept: {ranking: the share of right answers without the two and four blocks that it chooses}; by default by what
            these are worth.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    of = worth if isinstance(worth, dict) else dict.fromkeys(TASKS, worth)
    rows = []
    for task, n in N.items():
        for part in PARTS:
            hard = rng.random(n) if flips else rng.permutation(n) / n
            whole_nats = -2 - rng.random(n)
            rows.append(answers(task, part, PLAN, right=hard < 0.8, nats=whole_nats))
            for b in range(DEPTH):
                share = 0.8 + 0.1 * (b in helps) - 0.2 * of[task][b]
                right = np.where(rng.random(n) < flips, rng.random(n) < share, hard < share)
                nats = whole_nats - of[task][b] + noise * rng.standard_normal(n)
                rows.append(answers(task, part, [x for x in PLAN if x != b], right=right, nats=nats))
    found = outcomes_of(rows)
    text = Outcomes(*(rng.random((DEPTH + 1, 6)) for _ in range(4)), np.zeros(6))
    names = ("entropy", "magnitude", "taylor")
    scores = Scores(
        {"influence": [*map(float, cosine)], **{name: rng.random(DEPTH).tolist() for name in names}},
        {task: cosine + 0.001 * rng.standard_normal((n, DEPTH)) for task, n in N.items()},
        {n: rng.random(DEPTH + 1 - n).tolist() for n in range(1, DEPTH + 1)},
        rng.random((DEPTH, 8)),
        text,
        {},
        {"arc_easy, 12 items": 7.0, "arc_easy, 48 items": 79.0, "influence": 2, "entropy": 3, "perplexity": 50,
         "next_token kl": 60},
        {"settings": {"length": 512}},
    )  # fmt: skip
    for k in (2, 4):
        for ranking in RANKINGS:
            gone = chosen(ranking, k, scores, found)
            plan = [b for b in PLAN if b not in gone]
            for task, n in N.items():
                nats = of[task][[*gone]].sum()
                share = (kept or {}).get(ranking, 0.8 - 0.05 * nats)
                right, nats = rng.permutation(n) < share * n, -2 - nats + noise * rng.standard_normal(n)
                rows.append(answers(task, "report", plan, ranking, right=right, nats=nats, label=f"D{k}", removed=gone))
    for task, share in (("boolq", 0.52), ("winogrande", 0.49)):
        rows.append(answers(task, "", PLAN, right=np.arange(300) < share * 300, nats=np.zeros(300)))
    return Record({key(m): m for m in rows}, found, scores, None)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """A quarter, for speed."""
    monkeypatch.setattr(ch08_agreement, "RESAMPLES", RESAMPLES)


RESAMPLES = 500


@pytest.fixture(scope="module")
def record():
    return known()


# ---------------------------------------------------------------- the record


def test_the_record_knows_its_parts(record):
    assert record.depth == DEPTH and record.middle == MIDDLE
    assert {*record.outcomes} == {(task, part) for task in TASKS for part in PARTS}
    assert {*record.left_out} == {"boolq", "winogrande"}
    for task in TASKS:
        whole = record.whole(task, "report")
        assert whole.provenance["plan"] == PLAN and whole.provenance["protocol"] == {"on": task, "part": "report"}
    both = asked(record.outcomes, ALL, "report")
    assert both.correct.shape == (DEPTH + 1, sum(N.values()))


# ---------------------------------------------------------------- agreement


def means(record, task, metric, part):
    """What is lost without each block, by the rows alone."""
    column = {"relevance": "correct", "margin": "margin", "likelihood": "right"}[metric]
    tasks = TASKS if task == ALL else (task,)
    rows = {
        name: np.concatenate([record.rows[f"plan {plan}", t, part, ""].column(column) for t in tasks]).astype(float)
        for name, plan in ((None, PLAN), *((b, [x for x in PLAN if x != b]) for b in PLAN))
    }
    return np.array([(rows[None] - rows[b]).mean() for b in PLAN])


@pytest.mark.parametrize("metric", ASKING)
@pytest.mark.parametrize("task", [ALL, "piqa"])
def test_what_is_lost_is_the_whole_models_less_the_rest(record, task, metric):
    assert lost(asked(record.outcomes, task), metric).mean(1) == pytest.approx(means(record, task, metric, "rank"))
    assert reference(record, task, metric)[0] == pytest.approx(means(record, task, metric, "report"))
    assert scores_of(record, metric, task)[0] == pytest.approx(means(record, task, metric, "rank"))
    assert scores_of(record, metric, task).shape == (1 + RESAMPLES, DEPTH)


def test_scores_by_text_are_those_of_the_record(record):
    s = record.scores
    wanted = {
        "cosine": s.scores["influence"], "angular": s.runs[1], "Taylor": s.scores["taylor"],
        "magnitude": s.scores["magnitude"], "entropy": s.scores["entropy"], "perplexity": s.losses.mean(1),
        "KL": s.text.kl[1:].mean(1), "cosine of the task's text": s.cosine["piqa"].mean(0),
    }  # fmt: skip
    assert {*wanted} == {*TEXT_ONLY, "cosine of the task's text"}
    for name, scores in wanted.items():
        assert scores_of(record, name, "piqa")[0] == pytest.approx(np.array(scores)), name
    mixed = np.concatenate([*s.cosine.values()]).mean(0)
    assert scores_of(record, "cosine of the task's text", ALL)[0] == pytest.approx(mixed)


@pytest.mark.parametrize("metric", ["likelihood", "relevance"])
def test_agreements_are_scipys(record, metric):
    true = means(record, "piqa", metric, "report")[MIDDLE]
    found = agreements(record, "piqa", MIDDLE, metric)
    assert {*found} == {*TEXT_ONLY, "cosine of the task's text", *ASKING}
    best = np.argsort(true, kind="stable")[:LEAST]
    for name, a in found.items():
        score = scores_of(record, name, "piqa")[0, MIDDLE]
        least = np.argsort(score, kind="stable")[:LEAST]
        assert a.spearman.value == pytest.approx(spearmanr(score, true).statistic)
        assert a.kendall.value == pytest.approx(kendalltau(score, true).statistic)
        assert a.shared.value == pytest.approx(len({*least} & {*best}) / LEAST)
        assert a.regret.value == pytest.approx(true[least].sum() - true[best].sum())
        assert a.spearman.low <= a.spearman.high


def test_an_interval_is_that_of_other_items(record):
    values = lost(record.outcomes["piqa", "report"], "relevance")[MIDDLE]
    cosine, rng, drawn = SHUFFLED[MIDDLE], np.random.default_rng(99), []
    for _ in range(1_000):
        drawn.append(
            spearmanr(cosine, values[:, rng.integers(values.shape[1], size=values.shape[1])].mean(1)).statistic
        )
    a = agreements(record, "piqa", MIDDLE, "relevance")["cosine"].spearman
    assert (a.low, a.high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.03)


def test_items_without_noise_agree_with_what_was_put_in():
    exact = known(noise=0, flips=0)
    found = agreements(exact, ALL, MIDDLE)["likelihood"]
    assert found.spearman == pytest.approx((1, 1, 1)) and found.misranked.value == 0 and found.shared.value == 1
    assert found.regret == pytest.approx((0, 0, 0), abs=1e-12)
    cosine = agreements(exact, ALL, MIDDLE)["cosine"].spearman
    assert cosine == pytest.approx([spearmanr(SHUFFLED[MIDDLE], WORTH[MIDDLE]).statistic] * 3)


# ---------------------------------------------------------------- tasks


def test_dependence_is_the_variance_of_z_and_friedmans(record):
    d = dependence(record, "likelihood", MIDDLE)
    of = []
    for task in TASKS:
        per_item = [
            np.concatenate([lost(record.outcomes[task, part], "likelihood")[b] for part in PARTS]) for b in MIDDLE
        ]
        of.append(np.mean(per_item, 1))
    z = [(x - np.mean(x)) / np.std(x) for x in of]
    assert d.variance == pytest.approx(np.var(z, axis=0, ddof=1))
    test = friedmanchisquare(*np.transpose(of))
    assert (d.order.statistic, d.order.p) == pytest.approx((test.statistic, test.pvalue))
    assert d.order.w == pytest.approx(test.statistic / (len(TASKS) * (len(MIDDLE) - 1)))


def test_noise_is_not_told_from_noise():
    """Tasks that rank blocks alike differ by their items alone, even where that is all they differ by."""
    for seed in range(4):
        alike = known(np.ones(DEPTH), noise=3, flips=0.5, seed=seed)
        for metric in ("likelihood", "relevance"):
            plain, less = (against_cosine(alike, metric, MIDDLE, corrected) for corrected in (False, True))
            assert plain.told and plain.difference > 0 and not (less.told and less.difference > 0)


def test_a_difference_of_tasks_is_more_than_noise():
    rng = np.random.default_rng(3)
    differ = known({task: np.r_[WORTH[:4], rng.permutation(WORTH[MIDDLE]), WORTH[-2:]] for task in TASKS})
    d, cosine = (dependence(differ, name, MIDDLE) for name in ("likelihood", "cosine"))
    less = against_cosine(differ, "likelihood", MIDDLE, True)
    assert less.told and less.difference > 0 and d.noise.mean() < 0.1 * d.variance.mean()
    assert cosine.variance.mean() < 0.01 and cosine.order.w > 0.95 > d.order.w
    pairs = (d.variance - d.noise) - (cosine.variance - cosine.noise)
    assert less.p == pytest.approx(wilcoxon(pairs).pvalue) and less.n == len(MIDDLE)


# ---------------------------------------------------------------- noise


def test_a_ranking_settles_at_that_of_all_items(record):
    found = settled(record, "piqa", "relevance", MIDDLE)
    assert [*found] == [8, 16, 32, 64, 128, N["piqa"]]
    first = means(record, "piqa", "relevance", "rank")[MIDDLE].round(12)
    everything = spearmanr(first, means(record, "piqa", "likelihood", "report")[MIDDLE]).statistic
    assert found[N["piqa"]].spearman == pytest.approx((everything,) * 3)
    likelihood = settled(record, "piqa", "likelihood", MIDDLE)
    assert found[8].spearman.value < min(found[N["piqa"]].spearman.value, likelihood[8].spearman.value)


def test_what_does_harm_does_harm_on_other_items():
    worthless = np.where(np.arange(DEPTH) == 9, 0, WORTH + 0.3)
    c = curse(known(worthless, helps=[9]), "arc_easy", MIDDLE)
    assert [MIDDLE[i] for i in c.blocks] == [9] and c.still == 1
    assert c.kept.value == pytest.approx(-0.1, abs=0.03) and c.kept.high < 0
    assert c.slope.value == pytest.approx(1, abs=0.15)


def test_what_is_noise_is_gone_on_other_items():
    c = curse(known(np.zeros(DEPTH), flips=0.4), "arc_easy", MIDDLE)
    first, others = (lost(known(np.zeros(DEPTH), flips=0.4).outcomes["arc_easy", p], "relevance") for p in PARTS)
    gains = first.mean(1)[MIDDLE]
    assert [*c.blocks] == [*np.flatnonzero(gains < 0)] and len(c.blocks) > 1
    assert c.seen == pytest.approx(gains[gains < 0].mean())
    assert c.kept.value == pytest.approx(others.mean(1)[MIDDLE][gains < 0].mean())
    assert c.kept.low < 0 < c.kept.high or abs(c.kept.value) < abs(c.seen)
    assert c.still == (others.mean(1)[MIDDLE][gains < 0] < 0).sum()


# ---------------------------------------------------------------- sets


def test_what_sets_keep(record):
    assert sets.counts(record) == [2, 4] and sets.measured(record, 2) == [*RANKINGS]
    for k, name in ((2, "cosine"), (4, f"likelihood: {ALL}")):
        right = [record.rows[f"D{k}", task, "report", name].column("correct") for task in TASKS]
        found = sets.kept(record, k, name)
        assert found.n == sum(N.values()) and found.accuracy == pytest.approx(np.concatenate(right).mean())
        assert found.low < found.accuracy < found.high
        assert found.blocks == chosen(name, k, record.scores, record.outcomes)
        assert sets.kept(record, k, name, ["piqa"]).accuracy == pytest.approx(np.mean(right[1]))
    whole = sets.kept(record, 0)
    assert whole.accuracy == asked(record.outcomes, ALL, "report").accuracy()[0] and whole.blocks == ()


def test_a_count_with_one_ranking_is_none_to_compare(record):
    rows = {k: m for k, m in record.rows.items() if k[0] != "D4" or k[3] == "cosine"}
    fewer = replace(record, rows=rows)
    assert sets.counts(fewer) == [2] and sets.measured(fewer, 4) == ["cosine"]
    del rows["D2", "piqa", "report", "last"]
    assert "last" not in sets.measured(fewer, 2)


@pytest.mark.parametrize("column", ["correct", "right"])
def test_sets_against_a_base_are_paired_and_adjusted(record, column):
    tests = sets.against(record, 4, "cosine", column)

    def values(name):
        rows = [record.rows["D4", task, "report", name].column(column) for task in TASKS]
        return np.concatenate(rows).astype(float)

    base = chosen("cosine", 4, record.scores, record.outcomes)
    assert {*tests} == {n for n in RANKINGS if chosen(n, 4, record.scores, record.outcomes) != base} and len(tests) > 3
    raw = {name: ttest_rel(values(name), values("cosine")) for name in tests}
    order, running = sorted(raw, key=lambda name: raw[name].pvalue), 0.0
    for i, name in enumerate(order):
        running = max(running, min(1, (len(raw) - i) * raw[name].pvalue))
        assert tests[name].p == pytest.approx(running, abs=1e-12)
        assert tests[name].difference == pytest.approx((values(name) - values("cosine")).mean())
        assert tests[name].n == sum(N.values())


def test_the_same_blocks_are_not_compared():
    same = known(cosine=WORTH, noise=0, flips=0)
    assert chosen(f"likelihood: {ALL}", 2, same.scores, same.outcomes) == sets.kept(same, 2, "cosine").blocks
    assert f"likelihood: {ALL}" not in sets.against(same, 2, "cosine")


def test_own_and_other_items(record):
    kept = {f"likelihood: {by}": share for by, share in zip((*TASKS, ALL), (0.7, 0.5, 0.3, 0.6), strict=True)}
    own, other, mixed = sets.own_and_other(known(kept=kept), 2, "likelihood")
    assert own == other == pytest.approx(0.5, abs=0.01) and mixed == pytest.approx(0.6, abs=0.01)
    rows = dict(record.rows)
    for task, n in N.items():  # a task's own items choose best
        for by in TASKS:
            right = np.arange(n) < (0.7 if by == task else 0.4) * n
            k = ("D2", task, "report", f"likelihood: {by}")
            rows[k] = answers(task, "report", PLAN, k[3], right=right, nats=np.zeros(n), label="D2")
    own, other, _ = sets.own_and_other(replace(record, rows=rows), 2, "likelihood")
    assert (own, other) == pytest.approx((0.7, 0.4), abs=0.01)


def test_perplexities_are_those_that_were_measured(record):
    m = Measurement(task="text", metric="perplexity", value=30.0, low=29, high=31, n=1, unit="window", items=[])
    k = ("D2", PERPLEXITY, "", "last")
    assert sets.perplexities(record, 2) == {}
    assert sets.perplexities(replace(record, rows={**record.rows, k: m}), 2) == {"last": m}
    table = tables.sets_table(replace(record, rows={**record.rows, k: m}), 2)
    assert table.loc["last", "perplexity"] == "30" and table.loc["cosine", "perplexity"] == ""


# ---------------------------------------------------------------- cost


def test_runs_are_those_of_a_forward_pass(tiny):
    subject, calls = tiny(layers=5), []
    for block in subject.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    plans = [plan_without(5, some) for some in ((), *([b] for b in range(5)))]
    with torch.no_grad():
        assert len([*final_states(subject.model, torch.tensor([[1, 2, 3]]), plans)]) == len(plans)
        shared, apart = cost.runs(5)
        assert len(calls) == shared == 5 + 4 + 3 + 2 + 1 and apart == 5 + 5 * 4
        calls.clear()
        for plan in plans:
            [*final_states(subject.model, torch.tensor([[1, 2, 3]]), [plan])]
    assert len(calls) == apart


# heads, heads of keys, whether the head is the embedding, and all parameters that the model's card states
PUBLISHED = {
    "SmolLM2-135M": (9, 3, True, 134_515_008),
    "Llama-3.2-1B": (32, 8, True, 1_235_814_400),
    "Llama-3-8B": (32, 8, False, 8_030_261_248),
}


@pytest.mark.parametrize("size", [cost.HERE, *cost.LARGER], ids=lambda size: size.name)
def test_sizes_are_those_of_transformers(size):
    heads, of_keys, tied, published = PUBLISHED[size.name]
    shapes = {
        "SmolLM2-135M": (576, 1536, 49152),
        "Llama-3.2-1B": (2048, 8192, 128256),
        "Llama-3-8B": (4096, 14336, 128256),
    }
    width, mlp, vocabulary = shapes[size.name]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=mlp, vocab_size=vocabulary, num_hidden_layers=size.blocks,
        num_attention_heads=heads, num_key_value_heads=of_keys, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == published
    for block in model.model.layers:
        assert size.block == sum(p.numel() for p in block.parameters() if p.dim() == 2)
    assert size.head == model.lm_head.weight.numel()
    assert cost.weights_of(size, False) == size.blocks * size.block


def test_weights_of_a_ranking_by_answers():
    size = cost.Size("small", 3, 10, 7)
    # whole, then from the first left-out block on: 3 + 2 + 1 + 0 blocks; four times the head
    assert cost.weights_of(size, True) == (3 + 2 + 1 + 0) * 10 + 4 * 7 and cost.weights_of(size, False) == 30


def test_seconds_are_the_records_and_projected_ones_their_multiples(record):
    assert cost.an_item(record) == (79 - 7) / 36
    table = cost.cost_table(record)
    asked_items = f"answers or their log-probability, {N['arc_easy']} items"
    assert table.loc["cosine, 8 windows", "SmolLM2-135M"] == "2 s"
    assert table.loc[asked_items, "SmolLM2-135M"] == cost.duration(2.0 * N["arc_easy"])
    for size in cost.LARGER:
        for name, seconds, every in (("cosine, 8 windows", 2, False), (asked_items, 400, True)):
            factor = cost.weights_of(size, every) / cost.weights_of(cost.HERE, every)
            assert table.loc[name, f"{size.name}, projected"] == cost.duration(seconds * factor)
    assert cost.duration(90) == "90 s" and cost.duration(150) == "2.5 min" and cost.duration(9000) == "2.5 h"
    assert f"take {2 * N['arc_easy'] / 2:.0f} times" in cost.cost_sentence(record)
    assert f"take {sum(range(DEPTH + 1))} block runs a token instead of {DEPTH**2}" in cost.cost_sentence(record)
    assert "53% at 16 blocks" in cost.sharing_sentence([16])  # 17 / 32


# ---------------------------------------------------------------- tables


def test_tables_have_what_was_put_in(record):
    worth = tables.worth(record)
    assert worth.shape == (DEPTH, 5) and worth["cosine"].tolist() == pytest.approx(SHUFFLED)
    assert worth["loss"].tolist() == pytest.approx(WORTH, abs=0.1)
    assert (worth["low"] <= worth["loss"]).all() and (worth["loss"] <= worth["high"]).all()
    assert [*worth.index[worth["free"]]] == MIDDLE
    found = tables.spearmans(record, "likelihood")
    assert found.loc["likelihood", ("piqa", "value")] == agreements(record, "piqa", MIDDLE)["likelihood"].spearman.value
    assert {*found.columns.get_level_values(0)} == {*TASKS}
    table = tables.agreement_table(record)
    values = [float(cell.split()[0]) for cell in table["Spearman"]]
    assert values == sorted(values, reverse=True) and table.index[0] in ASKING
    settling = tables.settling(record)
    assert {*settling} == {*TASKS} and {*settling["piqa"]} == {*ASKING}
    assert [*settling["piqa"]["margin"].columns] == ["value", "low", "high"]
    for task, two in tables.other_items(record).items():
        assert [*two.index] == MIDDLE
        assert two["first"].to_numpy() == pytest.approx(100 * means(record, task, "relevance", "rank")[MIDDLE])
        assert two["others"].to_numpy() == pytest.approx(100 * means(record, task, "relevance", "report")[MIDDLE])
    assert [*tables.dependence_table(record).index] == ["cosine", *ASKING]


def test_the_table_of_harm_names_the_block_and_its_gain():
    worthless = np.where(np.arange(DEPTH) == 9, 0, WORTH + 0.3)
    table = tables.curse_table(known(worthless, helps=[9], flips=0))
    assert (table["blocks better left out"] == "9").all() and (table["still better"] == "1 of 1").all()
    assert (table["gain there, points"] == "+10.0").all()
    none = tables.curse_table(known(WORTH + 0.3, flips=0))
    assert (none["blocks better left out"] == "none").all() and (none["still better"] == "").all()


def test_tables_of_sets(record):
    rows = tables.sets_rows(record)
    assert len(rows) == 2 * len(RANKINGS) and {*rows["k"]} == {2, 4}
    for row in rows.itertuples():
        assert row.value == sets.kept(record, row.k, row.ranking).accuracy and row.low < row.value < row.high
    table = tables.sets_table(record, 4)
    shares = [float(cell.rstrip("%")) for cell in table["right answers"]]
    assert {*table.index} == {*RANKINGS} and shares == sorted(shares, reverse=True)
    assert table.loc["cosine", "beside cosine's"] == "" and "perplexity" not in table
    assert table.loc["last", "removed"] == "14, 15, 16, 17"


def test_the_table_of_tasks_says_which_are_above_guessing(record):
    table = tables.left_out_table(record)
    assert [*table.index] == [*TASKS, "boolq", "winogrande"]
    assert table["above guessing"].tolist() == ["yes", "yes", "yes", "not surely", "no"]
    assert table.loc["winogrande", "standard error of relevance"] == "undefined"
    margin = record.whole("piqa", "report").value - CHANCE["piqa"]
    assert table.loc["piqa", "standard error of relevance"] == f"{np.sqrt(0.15 / N['piqa']) / margin:.2f}"


def test_a_runs_table():
    correct = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], float)
    nats = np.array([[-1.0] * 4, [-3.0] * 4, [-0.5] * 4])
    found = Outcomes(correct, nats, nats, nats * np.nan, np.full(4, 0.25))
    table = tables.run_table(found, [0.3, 0.1])
    assert table["accuracy lost, points"].tolist() == [50, -25]
    assert table["relevance"].tolist() == [1, pytest.approx(1 - 0.75 / 0.5)]
    assert table["log-probability lost, nats"].tolist() == [2, -0.5] and table["cosine"].tolist() == [0.3, 0.1]
    guessing = tables.run_table(replace(found, chance=np.full(4, 0.75)), [0.3, 0.1])
    assert guessing["relevance"].isna().all() and not guessing["accuracy lost, points"].isna().any()


# ---------------------------------------------------------------- claims


def verdicts(record):
    theorem, weak, task, *better, negative = (c.word for c in claims(record))
    return {"theorem": theorem, "weak": weak, "task": task, "better": better[0] if better else None, "harm": negative}


def test_verdicts_turn_with_the_record(record):
    found = verdicts(record)
    assert found["theorem"] == HOLDS  # it is built, whatever the record says
    assert found["weak"] == HOLDS
    assert verdicts(known(cosine=WORTH, flips=0))["weak"] == FAILS
    blur = np.r_[WORTH[:4], np.random.default_rng(0).permutation(WORTH[MIDDLE]), WORTH[-2:]]
    assert verdicts(known(np.full(DEPTH, 0.5), cosine=blur, flips=0.6))["weak"] in (HOLDS, UNDECIDED)


@pytest.mark.parametrize(
    ("cosine", "itself", "word"),
    [
        (Estimate(0.23, -0.03, 0.43), 1.0, HOLDS),
        (Estimate(0.23, -0.03, 0.43), 0.42, UNDECIDED),  # 0.43 / sqrt(0.42) = 0.66: noise alone may make it weak
        (Estimate(0.45, 0.4, 0.49), 0.25, FAILS),  # 0.4 / 0.5 = 0.8
        (Estimate(0.1, 0.0, 0.2), -0.1, UNDECIDED),  # nothing but noise
    ],
)
def test_noise_is_no_weak_agreement(record, monkeypatch, cosine, itself, word):
    rankings = agreements(record, ALL, MIDDLE, "relevance")
    changed = {"cosine": cosine, "relevance": Estimate(itself, itself, itself)}
    found = {name: rankings[name]._replace(spearman=e) for name, e in changed.items()}
    monkeypatch.setattr(ch08_claims, "agreements", lambda *_: found)
    assert ch08_claims._weak(record).word == word


def test_the_claim_about_tasks_needs_more_than_noise():
    assert verdicts(known(flips=0.5))["task"] != HOLDS
    rng = np.random.default_rng(3)
    differ = {task: np.r_[WORTH[:4], rng.permutation(WORTH[MIDDLE]), WORTH[-2:]] for task in TASKS}
    assert verdicts(known(differ))["task"] == HOLDS


@pytest.mark.parametrize(("relevance", "cosine", "word"), [(0.7, 0.4, HOLDS), (0.4, 0.7, FAILS), (0.6, 0.6, UNDECIDED)])
def test_the_claim_about_sets_is_about_what_they_keep(relevance, cosine, word):
    assert verdicts(known(kept={f"relevance: {ALL}": relevance, "cosine": cosine}))["better"] == word


def test_equal_sets_decide_nothing():
    same = known(cosine=WORTH, noise=0, flips=0)
    assert chosen(f"relevance: {ALL}", 4, same.scores, same.outcomes) == sets.kept(same, 4, "cosine").blocks
    found = claims(same)[3]
    assert found.word == UNDECIDED and found.found == "Both remove the same blocks."


def test_the_claim_about_harm_needs_other_items():
    worthless = np.where(np.arange(DEPTH) == 9, 0, WORTH + 0.3)
    assert verdicts(known(worthless, helps=[9]))["harm"] == HOLDS
    assert verdicts(known(WORTH + 0.3, flips=0))["harm"] == UNDECIDED  # no block seems to do harm
    assert verdicts(known(np.zeros(DEPTH), flips=0.4))["harm"] == UNDECIDED  # many seem to, by noise
    one, other = known(worthless, helps=[9], flips=0), known(WORTH + 0.3, flips=0)
    turned = {(task, p): (one if p == "rank" else other).outcomes[task, p] for task in TASKS for p in PARTS}
    assert (
        verdicts(replace(one, outcomes=turned))["harm"] == FAILS
    )  # better on the items that chose it, worse on others


def test_claims_of_papers_have_a_section(record):
    found = claims(record)
    text = page({}, found)
    assert "## Claims of papers" in text and "## Claims of papers" not in page({})
    for i, c in enumerate(found, 1):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| P{i} |"))
        assert f"**{c.word}**" in line and "2605.14075" in line
        assert f'08_relevance.html#{c.where[1]}">chapter 8</a>' in line
        assert (f"The paper: {c.theirs}." in line) == bool(c.theirs)
    assert section([]) == [] and "<abbr" not in text.partition("## Claims of papers")[2]
    one = section([PaperClaim("[P](https://example.org)", "a claim.", "", HOLDS, "Found.", ("08_relevance", "x"))])
    assert "The paper:" not in "".join(one)


def test_claims_are_of_chapters_that_have_a_record(monkeypatch):
    def of(path):
        return [PaperClaim("[P](https://example.org)", f"a claim about {path.name}.", "", HOLDS, "", ("08_x", "x"))]

    chapter = replace(ch08.CHAPTER, read=lambda path: path, papers=of)
    every = {"00_measures": chapter, "99_none": chapter, "01_franken_llama": replace(chapter, papers=None)}
    monkeypatch.setattr(paper_claims, "chapters", lambda: every)
    assert [c.says for c in paper_claims.recorded_claims()] == ["a claim about 00_measures.jsonl."]


# ---------------------------------------------------------------- sentences


def test_the_block_whose_scores_lie_furthest_apart_is_named():
    cosine, worth = np.linspace(0.1, 0.2, DEPTH), np.linspace(0.1, 1, DEPTH)
    cosine[11], worth[11] = 0.01, 2
    said = ch08.block_sentence(known(worth, cosine))
    assert "Of the 14 blocks that may go, block 11 has the lowest cosine score" in said
    assert "costs the most" in said and "2.0 nats an item" in said


def test_places_in_words():
    assert [ch08._nth(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        "", "2nd ", "3rd ", "4th ", "11th ", "12th ", "13th ", "21st ", "102nd ", "111th ",
    ]  # fmt: skip


def test_sentences_have_the_numbers_of_their_tables(record):
    likelihood, accuracy = (agreements(record, ALL, MIDDLE, m) for m in ("likelihood", "relevance"))
    said = ch08.agreement_sentence(record)
    assert f"cosine {likelihood['cosine'].spearman.value:.2f} [" in said
    assert f"highest is {max(accuracy, key=lambda n: accuracy[n].spearman.value)}," in said
    table = tables.worth(record)
    pearson = (
        np.corrcoef(table["cosine"], table["loss"])[0, 1],
        np.corrcoef(*table.loc[MIDDLE, ["cosine", "loss"]].T.to_numpy())[0, 1],
    )
    said = ch08.ends_sentence(record)
    assert all(f"Pearson's {x:.2f}" in said for x in pearson[:1]) and f"and {pearson[1]:.2f}." in said
    assert pearson[0] > pearson[1]
    assert f"cosine {likelihood['cosine'].regret.value:.1f} [" in ch08.regret_sentence(record)
    said = ch08.misranked_sentence(record)
    assert "1 - 1/28 = 96.4%" in said and f"a random order {1 - 1 / 14:.0%}" in said


def test_the_sentence_about_tasks_says_whether_it_is_more_than_noise():
    assert "is within what items alone can give" in ch08.dependence_sentence(known(flips=0.5))
    rng = np.random.default_rng(3)
    differ = {task: np.r_[WORTH[:4], rng.permutation(WORTH[MIDDLE]), WORTH[-2:]] for task in TASKS}
    assert "the difference stays" in ch08.dependence_sentence(known(differ))


def test_the_sentence_about_harm():
    worthless = np.where(np.arange(DEPTH) == 9, 0, WORTH + 0.3)
    said = ch08.curse_sentence(known(worthless, helps=[9], flips=0))
    assert said.startswith("3 times") and "3 of them still are" in said and "piqa +10.0 becomes +10.0" in said
    assert ch08.curse_sentence(known(WORTH + 0.3, flips=0)).startswith("No block's removal")


def test_the_sentence_about_sets_names_the_best_and_those_surely_better():
    kept = dict.fromkeys(RANKINGS, 0.5) | {"Taylor": 0.75, "last": 0.2}
    said = ch08.sets_sentence(known(kept=kept, flips=0), 2)
    assert "the most right answers, 75.0%, are left by Taylor" in said and "cosine's choice leaves 50.0%" in said
    assert "1 (Taylor) surely better" in said and "1 (last) surely worse" in said and "has 80.0%" in said
    assert "none of" in ch08.sets_sentence(known(kept=dict.fromkeys(RANKINGS, 0.5)), 2)


def test_further_sentences(record):
    found = {task: settled(record, task, "relevance", MIDDLE)[32].spearman.value for task in TASKS}
    assert f"relevance {min(found.values()):.2f} to {max(found.values()):.2f} from 32 items" in (
        ch08.settling_sentence(record)
    )
    own, other, mixed = sets.own_and_other(record, 2, "likelihood")
    assert f"2 blocks: {own:.1%} by its own, {other:.1%} by another task's, {mixed:.1%}" in ch08.own_sentence(record)
    said = ch08.left_out_sentence(record)
    assert "On boolq it is not surely above guessing" in said
    assert "On winogrande this subject is not above guessing" in said
    none = replace(record, rows={k: m for k, m in record.rows.items() if k[1] not in ("boolq", "winogrande")})
    assert ch08.left_out_sentence(none) == ""
    n = np.array([*N.values()])
    assert ch08.guessing(record) == pytest.approx(n @ [*CHANCE.values()] / n.sum())


def test_the_box(record):
    opening, accuracy = ch08.OPENING, agreements(record, ALL, MIDDLE, "relevance")
    c = [curse(record, task, MIDDLE) for task in TASKS]
    for said in (opening.answer(record), opening.short(record)):
        assert f"{accuracy['cosine'].spearman.value:.2f}" in said
        assert f"{accuracy['relevance'].spearman.value:.2f}" in said
    assert f"Of {sum(len(x.blocks) for x in c)} removals that seemed to help, {sum(x.still for x in c)} do" in (
        opening.answer(record)
    )
    said = opening.protocol(record)
    assert "200 items to rank by" in said and "8 windows of 512 tokens" in said and "The 6 blocks at the ends" in said
    assert all(f"{task} ({record.whole(task, 'report').value:.1%} right)" in said for task in TASKS)


# ---------------------------------------------------------------- this run


@pytest.mark.parametrize("task", ["piqa", "next_token"])
def test_what_a_run_measures(tiny, tmp_path, monkeypatch, task):
    subject, p = tiny(layers=4), Relevance(task=task, items=3, windows=2, length=24, data=choice_data(tmp_path))
    monkeypatch.setattr(ch08, "load_subject", lambda *_: subject)
    name, found, cosine = ch08.measure(p)
    ids = calibration_windows(subject.tokenizer, "wikipedia", p.data, 2, 24)
    items = next_tokens(ids) if task == "next_token" else choices(task, p.data, 3)
    assert name == subject.name and cosine == pytest.approx(influence(subject, ids))
    assert found.correct.shape == (5, len(items.asked))
    for b in range(4):
        alone = outcomes(remove(subject, [b]), items, ())
        assert found.likelihood[1 + b] == pytest.approx(alone.likelihood[0], abs=1e-3)


def trained(k, ranking, seed, curve, ratio):
    """Rows of a set that was trained: its held-out losses by step, and perplexity `ratio` times e^3."""
    made = {"label": f"D{k}+W", "reports": [{}, {"validation": [{"step": s, "loss": x} for s, x in curve.items()]}]}
    facts = {"made": made, "chapter": {"ranking": ranking, "removed": [1, 2], "seed": seed}}
    rng = np.random.default_rng(3)
    items = [
        {"id": i, "document": i, "nats": 10 * (3 + np.log(ratio) + rng.normal(0, 0.01)), "tokens": 10}
        for i in range(30)
    ]
    m = Measurement(
        task="text", metric="perplexity", value=np.exp(3) * ratio, low=1.0, high=99.0, n=30, unit="window",
        items=items, provenance={**facts, "protocol": {"on": "wikitext"}},
    )  # fmt: skip
    return {key(m): m}


def test_healing_says_how_far_rankings_lie_apart_before_and_after():
    rows = {}
    for i, ranking in enumerate(ch08_healing.HEALED):
        rows |= trained(4, ranking, 0, {0: 3.5 + 0.2 * i, 8: 3.2 + 0.1 * i, 16: 3.3}, 1 + 0.05 * i)
    assert ch08_healing.counts(rows) == [4] and next(iter(rows)) == ("D4+W", "perplexity", "", "cosine", 0)
    first = ch08_healing.healed(rows)[0]
    assert first.before == 3.5 and first.after == 3.2  # the best step is kept
    said = ch08_healing.healing_sentence(rows, 4)
    assert "lie 0.40 apart before and 0.10 after" in said and "likelihood: all x 1.050" in said and "1 seed)" in said
    table = ch08_healing.healing_table(rows)
    assert list(table["step 0"]) == ["3.500", "3.700", "3.900"] and "step 16" in table
    del rows["D4+W", "perplexity", "", "cosine", 0]
    assert ch08_healing.counts(rows) == []  # until every ranking's set was trained


def test_healing_trains_each_rankings_own_set(tiny, monkeypatch):
    made = []
    monkeypatch.setattr(ch08_healing, "prepare", lambda subject, stages, **_: made.append(stages) or Ready())

    class Ready:
        def measure(self, setup, data, chapter):
            return (setup.on, setup.part, chapter)

    p = Relevance(healed=[2], seeds=2, steps=6, items=5)
    parts = list(ch08_healing.parts(p, lambda ranking, k: (k, k + len(ranking)), TASKS, "report"))
    assert [part.name.split()[-1] for part in parts] == ["0"] * 3 + ["1"] * 3  # every set once before any twice
    kept = []
    parts[4].make([*parts[4].rows], kept.append)
    depth, lora = made[0]
    assert depth.blocks == (2, 2 + len("likelihood: all")) and (lora.seed, lora.steps) == (1, 6)
    assert {on for on, *_ in kept} == {"wikitext", *TASKS} and all(c["ranking"] == "likelihood: all" for *_, c in kept)


def test_files_beside_the_record_are_made_by_their_own_modules(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ch08, "load_subject", lambda _, dtype, __: dtype)
    monkeypatch.setattr(ch08.ch08_runs, "recorded_parts", lambda *_: [])
    for module in (ch08.ch08_pairs, ch08.ch08_scale, ch08.ch08_over_training):
        monkeypatch.setattr(module, "record", lambda *args, module=module: made.append((module, args)))
    p = Relevance(dtype="bfloat16", seeds=2)
    for part in ch08.recorded_parts(p, tmp_path / "08_relevance.jsonl"):
        part.make((), None)
        assert part.file == tmp_path / f"08_relevance_{part.name}.json" == made[-1][1][-1] and part.rows == {}
    assert [module for module, _ in made] == [ch08.ch08_pairs, ch08.ch08_scale, ch08.ch08_over_training]
    assert made[1][1][:2] == ("bfloat16", "float32")  # gains by gradients need more digits
    assert [*made[2][1][2]] == [0, 1]


def test_a_run_agrees_with_the_record_or_asks_something_else(record):
    p = Relevance(task="piqa")
    first = record.outcomes["piqa", "rank"]
    wanted = spearmanr(means(record, "piqa", "likelihood", "rank"), means(record, "piqa", "likelihood", "report"))
    assert ch08.agrees(record, p, first) == pytest.approx(wanted.statistic)
    assert f"rank correlation {wanted.statistic:.2f}" in ch08.this_run_sentence(record, p, first)
    fewer = Outcomes(*(x[:5] for x in (first.correct, first.margin, first.likelihood, first.kl)), first.chance)
    for other, found in ((Relevance(task="next_token"), first), (p, fewer)):
        assert ch08.agrees(record, other, found) is None
        assert "nothing to agree with" in ch08.this_run_sentence(record, other, found)


@pytest.mark.parametrize(("items", "blocks", "changed"), [(190, 30, 0.15), (100, 10, 0.3)])
def test_luck_is_the_expected_best_of_so_many(items, blocks, changed):
    """Exactly: an item gains, loses or stays, so the sum's distribution is a power of that of one item."""
    pmf = np.ones(1)
    for _ in range(items):
        pmf = np.convolve(pmf, [changed / 2, 1 - changed, changed / 2])
    gained = np.arange(-items, items + 1)
    best = np.diff(np.r_[0, pmf.cumsum() ** blocks]) @ gained
    deviation = np.sqrt(pmf @ gained**2)
    said = [float(x) for x in re.findall(r"[\d.]*\d(?= points)", ch08.luck_sentence(items, blocks, changed))]
    assert said == pytest.approx([100 * best / items, 100 * deviation / items], abs=0.1)
