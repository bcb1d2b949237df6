from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import perplexity
from thesislib.chapters import ch00_measures as measures
from thesislib.chapters import ch01_franken as franken
from thesislib.chapters import chapters, record_file, recorded
from thesislib.compress.franken import franken_plans
from thesislib.errors import BadInput
from thesislib.evaluate.setup import TASKS
from thesislib.evaluate.stats import by_verdict
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store

DEPTH, WINDOWS, ITEMS = 30, 24, 200


def loss(plan, per_token, seed=0):
    return perplexity(per_token, seed, n=WINDOWS, provenance={"plan": list(plan)})


def hella(plan, right):
    items = [{"id": str(i), "correct": i < right, "correct_unnormalised": i < right} for i in range(ITEMS)]
    return Measurement(
        task="HellaSwag",
        metric="acc_norm",
        value=right / ITEMS,
        low=0,
        high=1,
        n=ITEMS,
        unit="item",
        items=items,
        provenance={"plan": list(plan)},
    )


@pytest.fixture
def results():
    """A made-up study: every plan ruins the model, except three, and every single change hurts, least in the middle."""
    plans = franken_plans(DEPTH)
    ppl = {n: loss(p, 9.0, seed=k) for k, (n, p) in enumerate(plans.items())}
    for name, per_token in (
        ("baseline", 3.0),
        ("15_single_skip", 3.05),
        ("0-23_27-31", 3.08),
        ("skip_near_end_keep_last_two", 3.08),
        ("2_3rd_of_llama", 9.5),
    ):
        ppl[name] = loss(plans[name], per_token)
    skipped, repeated = franken.single_block_plans(DEPTH, range(DEPTH))
    assert skipped[14] == plans["15_single_skip"]  # one plan by two names has one measurement
    return franken.Results(
        plans, ppl, {n: hella(p, 80) for n, p in plans.items()},
        {b: ppl["15_single_skip"] if b == 14 else loss(p, 3.1 + abs(b - 14.5) / 100, b) for b, p in skipped.items()},
        {b: loss(p, 3.2, b) for b, p in repeated.items()},
    )  # fmt: skip


def verdicts(results):
    return [c.verdict for c in franken.claims(results)]


def test_claims_hold_on_records_that_bear_them_out(results):
    results.hellaswag["skip_near_end_keep_last_two"] = hella(results.plans["skip_near_end_keep_last_two"], 110)
    assert verdicts(results) == ["holds"] * 6


def test_each_verdict_turns_on_contrary_records(results):
    base = results.plans["baseline"]
    results.hellaswag["skip_near_end_keep_last_two"] = hella(base, 40)
    results.perplexity["0-23_27-31"] = loss(base, 3.6)
    better = replace(results, repeated={b: loss(m.provenance["plan"], 2.8, b) for b, m in results.repeated.items()})
    outward = replace(
        better,
        skipped={b: loss(m.provenance["plan"], 3.4 - abs(b - 14.5) / 100, b) for b, m in results.skipped.items()},
    )
    for name in outward.plans:
        if name not in ("baseline", "0-23_27-31", "2_3rd_of_llama"):
            outward.perplexity[name] = loss(base, 3.05)
    outward.perplexity["2_3rd_of_llama"] = loss(base, 3.01)
    assert verdicts(outward) == ["does not hold"] * 6


def test_skip_or_repeat_counts_both_ways(results):
    told = by_verdict(results.skipped_against_repeated())
    assert told["worse"] == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]  # what leaving out costs rises outwards
    assert {*range(6, 24)} <= {*told["better"]} and not {*told["better"]} & {*told["worse"]}


def test_noise_leaves_claims_undecided(results):
    """The same numbers everywhere settle nothing about an order."""
    same = loss(results.plans["baseline"], 3.0)
    flat = franken.Results(
        results.plans,
        dict.fromkeys(results.plans, same),
        results.hellaswag,
        dict.fromkeys(range(5), same),
        dict.fromkeys(range(5), same),
    )
    found = dict(zip(range(6), verdicts(flat), strict=True))
    assert [found[k] for k in (0, 2, 3, 5)] == ["undecided"] * 4


def test_single_blocks_are_tabled_as_ratios_to_the_baseline(results):
    table = franken.singles_table(results).set_index("change", append=True)["times"]
    assert len(table) == 2 * DEPTH
    base = results.perplexity["baseline"].value
    assert table[14, "left out"] == pytest.approx(results.skipped[14].value / base, rel=0.01)
    assert table[3, "run twice"] == pytest.approx(results.repeated[3].value / base, rel=0.01)


def test_three_neighbours_are_held_against_what_they_cost_one_at_a_time(results):
    """If two cost x a and x b alone and all three x t, the third would have to cost x t / (a b)."""
    del results.skipped[26]
    alone = results.losses(results.skipped)
    together = results.against_baseline()["skip_near_end_keep_last_two"][0].difference
    said = franken.neighbours_sentence(results)
    assert f"Together they cost x {np.exp(together):.2f}" in said
    third = together - alone[25].difference - alone[27].difference
    assert f"block 26 would have to cost x {np.exp(third):.2f}" in said


def test_results_survive_being_recorded(results, tmp_path):
    store = Store(tmp_path / "r.jsonl")
    for m in franken.as_measurements(results):
        store.append(m)
    again = franken.read_recorded(store.path)
    assert again == results
    with pytest.raises(BadInput, match="perplexity of plan 0-7 is missing"):
        franken.from_measurements(
            [m for m in franken.as_measurements(results) if m.provenance["plan"] != list(range(8))]
        )


def test_ruined_plans_and_the_mildest(results):
    against = results.against_baseline()
    assert len(against) == 24 and set(against) - set(franken.ruined(against)) == {
        "15_single_skip",
        "0-23_27-31",
        "skip_near_end_keep_last_two",
    }
    losses = {name: loss for name, (loss, _) in against.items()}
    best = franken.mildest(losses)
    assert best == "15_single_skip" and losses[best].difference == pytest.approx(0.05, abs=0.01)


def test_measure_on_a_tiny_model(tiny, monkeypatch):
    from thesislib.sources.corpus import Choice, join

    monkeypatch.setattr(
        franken,
        "evaluation_text",
        lambda _: join("text", [f"{i} is a number of things that may be counted. " * 3 for i in range(9)]),
    )
    monkeypatch.setattr(
        TASKS["hellaswag"], "items", lambda *_: [Choice(str(i), "It", ("is.", "was not"), i % 2) for i in range(4)]
    )
    subject = tiny(layers=12)
    p = franken.Franken(length=32, windows=6, items=4, singles=3, tokens=4)
    found = franken.measure(subject, p)
    assert list(found.skipped) == list(found.repeated) == [0, 6, 11]
    written = franken.completions(subject, found.plans, p)
    table = franken.table(found, written)
    assert len(table) == 25 and table.loc["all blocks", "parameters, M"] == subject.parameters / 1e6
    assert table.loc["all blocks", "times"] == 1 and table["perplexity"].is_monotonic_increasing
    assert set(table.index) == set(franken.named_plans(found)) and len(franken.readable(franken.table(found))) == 25
    assert (table["parameters, M"] <= subject.parameters / 1e6).all()
    assert len(franken.readable(table)) == len(franken.texts(found, written, p.prompt)) == 25
    assert franken.agreement(found, found) == pytest.approx(1)


def test_the_committed_records_are_whole_and_say_where_they_come_from():
    for chapter in chapters():
        for m in Store(record_file(chapter)).rows().values():
            assert len(m.items) == m.n and m.low <= m.value <= m.high
            made = m.provenance
            assert made["subject"] == "SmolLM2-135M-Instruct" and len(made["fingerprint"]) == 64
            assert made["versions"]["torch"] and made["hardware"]["cpu"] and made["seconds"] > 0


def test_recorded_reference_values():
    """The figures that the project was given, from an independent implementation, against our record."""
    found = {(m.metric, m.provenance["settings"].get("length")): m for m in recorded("00_measures")}
    short, long = found["perplexity", 512], found["perplexity", 2048]
    assert (short.n, long.n) == (595, 148)
    assert short.value == pytest.approx(30.21, abs=0.01) and long.value == pytest.approx(21.61, abs=0.01)
    hellaswag = found["acc_norm", None]
    assert hellaswag.n == 10_042
    assert hellaswag.value == pytest.approx(0.407, abs=0.001) and hellaswag.extra["acc"]["value"] == pytest.approx(
        0.337, abs=0.001
    )
    trivia = {
        m.provenance["settings"]["prompt"]: m
        for m in recorded("00_measures")
        if m.metric == "accuracy" and not m.provenance["settings"]["open_book"]
    }
    assert trivia["chat"].n == 1200 and trivia["chat"].low < 0.14 < trivia["chat"].high
    assert trivia["thesis"].low < 0.046 < trivia["thesis"].high


def test_measures_table_and_flattering_answers(tiny, monkeypatch):
    from thesislib.sources.corpus import Choice, Question, join

    monkeypatch.setattr(
        measures,
        "evaluation_text",
        lambda _: join("text", [f"{i} is a number of things that may be counted. " * 3 for i in range(9)]),
    )
    monkeypatch.setattr(
        TASKS["hellaswag"], "items", lambda *_: [Choice(str(i), "It", ("is.", "was not"), i % 2) for i in range(4)]
    )
    asked = [Question("1", "Who?", ("a",), None), Question("2", "What?", ("zzz",), None)]
    monkeypatch.setattr(
        measures,
        "questions",
        lambda _, open_book, limit: [replace(q, context="C") for q in asked] if open_book else asked,
    )
    p = measures.Measures(lengths=[16, 64], windows=8)
    found = measures.measure(tiny(), p)
    assert [m.metric for m in found] == [
        "perplexity",
        "perplexity",
        "accuracy",
        "accuracy",
        "accuracy",
        "accuracy",
        "acc_norm",
    ]
    assert (found[0].n, found[1].n) == (8, 2)  # as many tokens at either length
    table = measures.table(found)
    assert len(table) == 3 + 3 + 4 * 4 + 2 and len(measures.readable(table)) == len(table)
    loose = replace(
        found[2],
        items=[{"id": "1", "answer": "long answer", "tier": "substring"}, {"id": "2", "answer": "x", "tier": "exact"}],
    )
    assert measures.flattering(loose)["answer"].tolist() == ["long answer"]


def test_this_run_is_in_the_order_of_the_record():
    record = recorded("00_measures")
    assert measures.same_order(record, record)
    assert measures.same_order(record, [m for m in record if m.settings.get("prompt") != "chat"])
    flipped = [replace(m, value=0.0) if m.settings.get("prompt") == "chat" else m for m in record]
    assert not measures.same_order(record, flipped)


def test_a_plan_says_which_blocks_it_leaves_out_here_whatever_its_name_counts():
    plans = franken_plans(30)
    results = franken.Results(plans, {}, {}, {}, {})
    assert [
        franken.left_out(results, name) for name in ("15_single_skip", "skip_near_end_keep_last_two", "baseline")
    ] == [
        "without block 14",
        "without blocks 25-27",
        "with all blocks",
    ]
