"""Claims: verdicts turn with the records, and the page is what the records say."""

from dataclasses import replace

import nbformat
import numpy as np
import pytest
from docutils.nodes import make_id

from tests.fakes import perplexity
from thesislib.chapters.ch01_franken import plan_name
from thesislib.chapters.ch05_runs import QuantChapter, main_models
from thesislib.chapters.claims import (
    CLAIMS,
    CLOSED,
    MISSING,
    SCORINGS,
    WHOLE_PAGE,
    WIKITEXT,
    judge,
    large,
    page,
    recorded_pool,
    scored_by,
)
from thesislib.chapters.phrases import DEPENDS, FAILS, HOLDS, UNDECIDED
from thesislib.compress.franken import parse_plan
from thesislib.files import ROOT
from thesislib.records.measurement import Measurement
from thesislib.runner import chapters

COMPARING = [c for c in CLAIMS if c.within is None]


def ppl(per_token, seed):
    return perplexity(per_token, seed, texts=0, spread=0.02)


def answers(share, seed, n=400):
    right = np.random.default_rng(seed).permutation(n) < share * n
    return Measurement(
        task="questions",
        metric="accuracy",
        value=share,
        low=0,
        high=0,
        n=n,
        unit="question",
        items=[{"id": i, "correct": bool(r), "tier": "exact" if r else None} for i, r in enumerate(right)],
    )


def story(claim, first, second):
    """Records in which every first of a claim's pairs has one value and every second another."""
    pairs = claim.pairs({("block 3 twice", "WikiText-2, 32 windows"): None})
    made = {}
    for k, (_, a, b) in enumerate(pairs):
        make = ppl if "WikiText" in a[1] else answers
        made |= {a: make(first, 2 * k), b: make(second, 2 * k + 1)}
    return made


@pytest.mark.parametrize("claim", COMPARING, ids=range(len(COMPARING)))
def test_a_verdict_turns_with_the_records(claim):
    about_answers = "book" in claim.pairs({})[0][1][1]
    low, high = (0.1, 0.4) if about_answers else (3.0, 3.5)
    chained = claim.says.startswith("With half")  # one record stands in two pairs
    said = {}
    for first, second in ((low, high), (high, low)):
        records = story(claim, first, second)
        if chained:
            records = {
                (label, WIKITEXT): ppl(3 + (i if second > first else -i) * 0.2, i)
                for i, label in enumerate(("W1:2", "W2:4", "W4:8", "W8:16"))
            }
        said[second > first] = judge(claim, records).word
    assert said == {claim.higher: HOLDS, not claim.higher: FAILS}
    assert judge(claim, {}).word == MISSING
    middle = 0.2 if about_answers else 3.2
    alike = {
        key: replace(m, items=next(iter(story(claim, middle, middle).values())).items)
        for key, m in story(claim, middle, middle).items()
    }
    assert judge(claim, alike).word == UNDECIDED


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.scored], ids=["closed", "open"])
def test_a_verdict_may_depend_on_the_scoring(claim):
    """Two scorings that point in opposite ways decide it; one that tells nothing apart does not."""
    plain = story(claim, 0.1, 0.4)

    def under(metric, first, second):
        return {(label, scored_by(measure, metric)): m for (label, measure), m in story(claim, first, second).items()}

    assert judge(claim, plain).word == HOLDS  # the other scorings are not measured
    assert {v.word for v in judge(claim, plain).by_scoring.values()} == {MISSING}
    agreed = plain | {k: m for metric in SCORINGS for k, m in under(metric, 0.1, 0.4).items()}
    assert judge(claim, agreed).word == HOLDS
    opposite = judge(claim, agreed | under(SCORINGS[0], 0.4, 0.1))
    assert opposite.word == DEPENDS and opposite.by_scoring[SCORINGS[0]].word == FAILS
    assert opposite.by_scoring[SCORINGS[2]].word == HOLDS and opposite.comparisons[0][1].difference > 0
    assert judge(claim, {**under(SCORINGS[0], 0.4, 0.1), **plain}).word == DEPENDS
    text = page(agreed | under(SCORINGS[0], 0.4, 0.1))
    assert f"**{DEPENDS}**" in text and f"| {SCORINGS[0]} | {FAILS} |" in text


def test_answers_that_ramble_win_by_the_thesis_rule_only():
    """Of the study's own records: trained on WikiText a model writes on, and never the name alone."""
    records = recorded_pool()
    (claim, *_) = (c for c in CLAIMS if c.scored)
    verdict = judge(claim, records)
    assert verdict.word == DEPENDS and verdict.by_scoring["exact match"].word == FAILS
    for name, (a, x), (b, y) in claim.pairs(records):
        questions, ramble = (records[label, scored_by(m, "exact match")] for label, m in ((a, x), (b, y)))
        assert questions.extra["words"]["value"] < 6 < 30 < ramble.extra["words"]["value"], name
        assert ramble.value < questions.value


def test_what_is_not_measured_keeps_a_claim_from_holding():
    claim = next(c for c in CLAIMS if c.says.startswith("LoRA on WikiText takes"))
    records = story(claim, 3.5, 3.0)
    assert judge(claim, records).word == HOLDS
    gone = {key: m for key, m in records.items() if key[0] != "D4+W"}
    verdict = judge(claim, gone)
    assert verdict.word == UNDECIDED and verdict.missing == [f"D4 to D4+W, {WIKITEXT}"]
    text = page(gone)
    assert "Not measured: D4 to D4+W" in text and text.count("**not measured**") == len(CLAIMS) - 1


def test_often_is_more_than_half():
    claim = next(c for c in CLAIMS if c.often)
    pairs = claim.pairs({})
    for better, word in ((5, HOLDS), (3, HOLDS), (2, FAILS), (0, FAILS)):
        records = {("dense", WIKITEXT): ppl(3.5, 99)} | {
            b: ppl(3.0 if k < better else 4.0, k) for k, (_, _, b) in enumerate(pairs)
        }
        assert judge(claim, records).word == word


def test_sizes_are_held_against_the_whole_interval():
    free = next(c for c in CLAIMS if "nearly free" in c.says)
    dense = ("dense", WIKITEXT)
    for nats, word in ((3.05, HOLDS), (3.3, FAILS), (3.095, UNDECIDED)):
        assert judge(free, {dense: ppl(3.0, 1), ("W1:8", WIKITEXT): ppl(nats, 2)}).word == word
    points = next(c for c in CLAIMS if "3 to 6 points" in c.says)
    ((_, a, b),) = points.pairs({})
    right = answers(0.5, 0, 20_000)
    fewer = [{**item, "correct": item["correct"] and i % 11 != 0} for i, item in enumerate(right.items)]
    assert judge(points, {a: right, b: replace(right, items=fewer)}).word == HOLDS
    assert judge(points, {a: right, b: right}).word == FAILS
    assert a[1] == b[1] == CLOSED


def test_the_larger_measurement_of_a_pair_is_taken_where_both_have_it():
    claim = next(c for c in CLAIMS if "EoRA gives" in c.says)
    names = [c.name for c in main_models(QuantChapter()) if c.method == "GPTQ"]
    small = {(name, CLOSED): answers(0.2, 0) for name in names}
    ((_, *keys),) = claim.pairs({**small, ("Q", large(CLOSED)): answers(0.2, 0)})
    assert keys == [(name, CLOSED) for name in names]
    both = {**small, ("Q", large(CLOSED)): answers(0.2, 0, 1200), ("Q+E", large(CLOSED)): answers(0.2, 0, 1200)}
    verdict = judge(claim, both)
    assert [(n, c.n) for n, c, _ in verdict.comparisons] == [("Q to Q+E, closed book, size full", 1200)]
    assert large(WIKITEXT) == "WikiText-2, size full"
    free = next(c for c in CLAIMS if "nearly free" in c.says)
    told = {
        ("dense", WIKITEXT): ppl(3.0, 1),
        ("W1:8", WIKITEXT): ppl(3.3, 2),
        ("dense", large(WIKITEXT)): ppl(3.0, 1),
        ("W1:8", large(WIKITEXT)): ppl(3.05, 2),
    }
    assert judge(free, told).word == HOLDS


def test_every_claim_is_shown_where_it_says():
    for notebook, anchor in {claim.where for claim in CLAIMS}:
        headings = [
            make_id(line.lstrip("# "))
            for cell in nbformat.read(chapters()[notebook], 4).cells
            if cell.cell_type == "markdown"
            for line in cell.source.splitlines()
            if line.startswith("#")
        ]
        assert anchor in headings, f"{notebook} has {headings}"


def test_the_heading_of_size_full_is_there():
    headings = [
        line.lstrip("# ")
        for cell in nbformat.read(chapters()["06_evaluation"], 4).cells
        for line in cell.source.splitlines()
        if line.startswith("#")
    ]
    assert WHOLE_PAGE.partition("#")[2] in map(make_id, headings)


def test_plans_by_name():
    assert plan_name(None, 8) == plan_name(list(range(8)), 8) == "dense"
    assert plan_name(list(parse_plan("0-3,3-7", 8)), 8) == "block 3 twice"
    assert plan_name([0, 2, 1], 3).startswith("plan") and plan_name([0, 1], 3).startswith(
        "plan"
    )  # the last block left out


def test_the_page_says_what_the_records_say():
    assert (ROOT / "book" / "claims.md").read_text("utf8") == page(recorded_pool()), "run `make findings`"
