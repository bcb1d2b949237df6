"""Models trained several times: how far they lie apart, and comparisons over all of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tests.fakes import perplexity
from thesislib.chapters.chapter import on_one_sample
from thesislib.chapters.trainings import Spread, collect, compare_models, spread
from thesislib.evaluate.stats import Comparison, paired_means, with_spread
from thesislib.records.measurement import Measurement


def ppl(per_token, seed, training=0, card=None, word="lora"):
    m = perplexity(per_token, seed, texts=0, spread=0.02)
    hardware = {"accelerator": card}
    return m.with_provenance(made={"stages": [{word: {"seed": training}}]}, hardware=hardware)


def test_the_spread_is_the_pooled_deviation_of_logarithms():
    values = {"D2+W": (20.0, 20.4, 20.1), "W": (18.0, 18.3)}
    rows = [
        (label, "text", replace(ppl(3, i, training=i), value=v))
        for label, vs in values.items()
        for i, v in enumerate(vs)
    ]
    untrained = [("D2", "text", replace(ppl(3, i, training=i), value=30.0 + i)) for i in range(3)]
    apart = spread(collect([*rows, *untrained]), "text")
    squares = sum(np.var(np.log(vs), ddof=1) * (len(vs) - 1) for vs in values.values())
    assert apart == Spread(pytest.approx(math.sqrt(squares / 3)), 3)
    assert spread(collect(untrained), "text") is None


def test_a_training_is_a_seed_on_a_kind_of_processor():
    rows = [ppl(3, 0, 0), ppl(3, 1, 0), ppl(3, 2, 1), ppl(3, 3, 0, "a card")]
    assert collect(("W", "text", m) for m in rows)["W", "text"] == {rows[0].n: [rows[0], rows[2], rows[3]]}
    assert collect(("D2", "text", m) for m in rows)["D2", "text"] == {rows[0].n: [rows[0]]}
    for word, kept in (("calr", 2), ("tune", 2), ("width", 1)):  # only a trained stage's seed makes a training
        two = [ppl(3, i, i, word=word) for i in range(2)]
        assert len(collect(("Lr8+CALR4", "text", m) for m in two)["Lr8+CALR4", "text"][two[0].n]) == kept


def test_untrained_models_are_compared_over_documents_alone():
    a, b = ppl(3, 0), ppl(3.1, 1)
    assert compare_models("dense", [a], "D2", [b], None).test == "paired t"
    one = compare_models("dense", [a], "D2+W", [b], None)
    assert one.p == 1 and not one.told and one.difference > 0.05


def test_several_trainings_count_by_their_mean():
    a, b = ([ppl(3 + d, 10 * d + i, training=i) for i in range(3)] for d in (0, 1))
    c = compare_models("W", a, "T", b, Spread(0.1, 4))
    mean = [np.mean([m.column("nats") for m in ms], axis=0) / np.array(ms[0].column("tokens")) for ms in (a, b)]
    over_items = paired_means(*mean, a[0].column("document"), a[0].column("tokens"))
    assert c.difference == pytest.approx(over_items.difference)
    assert c == with_spread(over_items, 0.1 * math.sqrt(2 / 3), 4)
    one_side = compare_models("dense", a[:1], "T", b, Spread(0.1, 4))
    assert one_side.high - one_side.low < c.high - c.low


def test_answers_of_several_trainings():
    def answers(share, seed):
        right = np.random.default_rng(seed).random(500) < share
        items = [{"id": i, "correct": bool(r)} for i, r in enumerate(right)]
        what = {"task": "questions", "metric": "accuracy", "unit": "question", "n": 500, "low": 0, "high": 0}
        return Measurement(**what, value=float(right.mean()), items=items)

    a, b = ([answers(share, 7 * k + i) for i in range(2)] for k, share in enumerate((0.2, 0.4)))
    c = compare_models("W", a, "T", b, Spread(0.01, 3))
    means = [np.mean([m.value for m in ms]) for ms in (a, b)]
    assert c.difference == pytest.approx(means[1] - means[0]) and c.told and c.n == 500


def test_two_errors_add_as_variances():
    """Against a simulation: items and trainings both by chance, the interval covers the truth as often as it says."""
    rng, hits, alone = np.random.default_rng(0), 0, 0
    for _ in range(400):
        items = rng.normal(rng.normal(0, 0.3), 1, 40)  # each trial's training is off by 0.3
        deviation = np.std(rng.normal(0, 0.3, 5), ddof=1)  # as five other trainings say
        c = paired_means(np.zeros(40), items)
        both = with_spread(c, float(deviation), 4)
        hits += both.low <= 0 <= both.high
        alone += c.low <= 0 <= c.high
        assert (both.p < 0.05) == (not both.low <= 0 <= both.high)
    assert alone < 300 < 364 <= hits <= 396, (alone, hits)
    c = Comparison(0.5, 0.3, 0.7, 0.001, 30, "paired t")
    own = 0.2 / scipy_stats.t.ppf(0.975, 29)
    wide = with_spread(c, own, 29)  # two alike: 58 degrees of freedom
    assert wide.high - 0.5 == pytest.approx(scipy_stats.t.ppf(0.975, 58) * own * math.sqrt(2))
    nothing = Comparison(0.0, 0.0, 0.0, 1.0, 30, "paired t")
    assert with_spread(nothing, 0.0, 3) == nothing


def test_a_chapter_s_rows_are_of_one_sample():
    def row(label, n, task="text"):
        return replace(ppl(3, 0).with_provenance(label=label), task=task, n=n)

    def key(m):
        return m.provenance["label"], m.task

    small = [row(x, 24) for x in "abc"]
    assert on_one_sample([*small, row("a", 595)], key) == {key(m): m for m in small}
    whole = [row(x, 595) for x in "abc"]
    assert on_one_sample([*small, *whole], key) == {key(m): m for m in whole}
    assert on_one_sample([*whole, *small], key) == {key(m): m for m in whole}
    asked = [row("a", 200, "questions")]
    assert on_one_sample([*small, *asked], key) == {key(m): m for m in (*small, *asked)}
