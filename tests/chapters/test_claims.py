"""Claims: verdicts turn with the records, and the page is what the records say."""

from dataclasses import replace

import nbformat
import numpy as np
import pytest
from docutils.nodes import make_id
from PIL import Image

from tests.fakes import perplexity
from thesislib.chapters import figures
from thesislib.chapters.ch01_franken import plan_name
from thesislib.chapters.claims import (
    CLAIMS,
    CLOSED,
    FIGURE,
    GRID_PAGE,
    MISSING,
    WIKITEXT,
    digest,
    forest,
    judge,
    page,
    verdicts,
)
from thesislib.chapters.labels import marked
from thesislib.chapters.paper_claims import recorded_claims
from thesislib.chapters.phrases import DEPENDS, FAILS, HOLDS, UNDECIDED
from thesislib.chapters.pool import recorded_pool, scored_by
from thesislib.chapters.scorings import SCORINGS
from thesislib.chapters.trainings import collect, spread
from thesislib.compress.franken import parse_plan
from thesislib.files import ROOT
from thesislib.records.measurement import Measurement
from thesislib.runner import chapters

COMPARING = [c for c in CLAIMS if c.within is None]


def ppl(per_token, seed, training=0):
    """A perplexity, of a training with that seed."""
    m = perplexity(per_token, seed, texts=0, spread=0.02)
    return m.with_provenance(made={"stages": [{"lora": {"seed": training}}]})


def answers(share, seed, n=400, training=0):
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
        provenance={"made": {"stages": [{"lora": {"seed": training}}]}},
    )


def of_measure(measure, value, seed, training=0):
    return (ppl if measure.startswith(WIKITEXT) else answers)(value, seed, training=training)


def trained_twice(measure):
    """Two trainings of another model, by which it is known how far trainings lie apart."""
    near = of_measure(measure, 0.2 if "book" in measure else 3.2, 98)
    far = replace(near.with_provenance(made={"stages": [{"lora": {"seed": 1}}]}), value=near.value * 1.001)
    return [("D8+W+T", measure, near), ("D8+W+T", measure, far)]


def story(claim, first, second, scored=()):
    """Rows in which every first of a claim's pairs has one value and every second another.

    Args:
        scored: words after the measure, of a further scoring.
    """
    rows = []
    for k, (a, b, measure) in enumerate(claim.pairs({("block 3 twice", WIKITEXT): {}})):
        measure = scored_by(measure, scored) if scored else measure
        rows += [(a, measure, of_measure(measure, first, 2 * k)), (b, measure, of_measure(measure, second, 2 * k + 1))]
    return [*rows, *trained_twice(measure)]


@pytest.mark.parametrize("claim", COMPARING, ids=range(len(COMPARING)))
def test_a_verdict_turns_with_the_records(claim):
    about_answers = "book" in claim.pairs({})[0][2]
    low, high = (0.1, 0.4) if about_answers else (3.0, 3.5)
    chained = claim.says.startswith("With half")  # one record stands in two pairs
    said = {}
    for first, second in ((low, high), (high, low)):
        rows = story(claim, first, second)
        if chained:
            rows = [
                (label, WIKITEXT, ppl(3 + (i if second > first else -i) * 0.2, i))
                for i, label in enumerate(("W1:2", "W2:4", "W4:8", "W8:16"))
            ]
        said[second > first] = judge(claim, collect(rows)).word
    assert said == {claim.higher: HOLDS, not claim.higher: FAILS}
    assert judge(claim, {}).word == MISSING
    middle = story(claim, *(2 * [0.2 if about_answers else 3.2]))
    alike = [(label, measure, replace(m, items=middle[0][2].items)) for label, measure, m in middle]
    assert judge(claim, collect(alike)).word == UNDECIDED


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.scored], ids=["closed", "open"])
def test_a_verdict_may_depend_on_the_scoring(claim):
    """Two scorings that point in opposite ways decide it; one that tells nothing apart does not."""
    plain = story(claim, 0.1, 0.4)
    assert judge(claim, collect(plain)).word == HOLDS  # the other scorings are not measured
    assert {v.word for v in judge(claim, collect(plain)).by_scoring.values()} == {MISSING}
    others = [row for metric in SCORINGS[1:] for row in story(claim, 0.1, 0.4, metric)]
    assert judge(claim, collect(plain + others + story(claim, 0.1, 0.4, SCORINGS[0]))).word == HOLDS
    turned = collect(plain + others + story(claim, 0.4, 0.1, SCORINGS[0]))
    opposite = judge(claim, turned)
    assert opposite.word == DEPENDS and opposite.by_scoring[SCORINGS[0]].word == FAILS
    assert opposite.by_scoring[SCORINGS[2]].word == HOLDS and opposite.comparisons[0][1].difference > 0
    assert judge(claim, collect(story(claim, 0.4, 0.1, SCORINGS[0]) + plain)).word == DEPENDS
    text = page(turned)
    assert f"**{DEPENDS}**" in text and f"| {SCORINGS[0]} | {FAILS} |" in text
    assert "by the thesis's rule. By exact match -" in opposite.in_words and opposite.in_words in text


def test_answers_that_ramble_win_by_the_thesis_rule_only():
    """Of the study's own records: trained on WikiText a model writes on, and never the name alone."""
    records = recorded_pool()
    (claim, *_) = (c for c in CLAIMS if c.scored)
    verdict = judge(claim, records)
    assert verdict.word == DEPENDS and verdict.by_scoring["exact match"].word == FAILS
    for a, b, measure in claim.pairs(records):
        questions, ramble = (records[label, scored_by(measure, "exact match")][1200][0] for label in (a, b))
        assert questions.extra["words"]["value"] < 6 < 30 < ramble.extra["words"]["value"], (a, b)
        assert ramble.value < questions.value


def test_a_claim_about_training_rests_on_the_spread_over_trainings():
    """Two single trainings that documents tell apart are not, if trainings lie further apart, or if nobody knows."""
    claim = next(c for c in CLAIMS if c.says.startswith("Pruning depth and width"))
    rows = story(claim, 3.0, 3.02)
    assert judge(claim, collect(rows)).word == HOLDS
    alone = collect(row for row in rows if row[0] != "D8+W+T")
    assert spread(alone, WIKITEXT) is None and judge(claim, alone).word == UNDECIDED
    near, far = (row[2] for row in rows if row[0] == "D8+W+T")
    wide = [row for row in rows if row[0] != "D8+W+T"] + [
        ("D8+W+T", WIKITEXT, near),
        ("D8+W+T", WIKITEXT, replace(far, value=near.value * 1.05)),
    ]
    verdict = judge(claim, collect(wide))
    assert verdict.word == UNDECIDED and all(c.low < 0 < c.high for _, c, _ in verdict.comparisons)
    text = page(collect(wide))
    assert f"None of {len(verdict.comparisons)} comparisons differ (p < 0.05)." in text
    apart = spread(collect(wide), WIKITEXT)
    said = f"standard deviation of {100 * apart.deviation:.2g} % of perplexity (1 degrees of freedom)."
    assert verdict.spreads == {WIKITEXT: apart} and said in text


def test_what_is_not_measured_keeps_a_claim_from_holding():
    claim = next(c for c in CLAIMS if c.says.startswith("LoRA on WikiText takes"))
    rows = story(claim, 3.5, 3.0)
    assert judge(claim, collect(rows)).word == HOLDS
    gone = collect(row for row in rows if row[0] != "D4+W")
    verdict = judge(claim, gone)
    assert verdict.word == UNDECIDED and verdict.missing == [f"D4 to D4+W, {WIKITEXT}"]
    text = page(gone)
    assert f"Not measured: {marked('D4 to D4+W')}" in text and text.count("**not measured**") == len(CLAIMS) - 1


def test_often_is_more_than_half():
    claim = next(c for c in CLAIMS if c.often)
    pairs = claim.pairs({})
    for better, word in ((5, HOLDS), (3, HOLDS), (2, FAILS), (0, FAILS)):
        rows = [(b, WIKITEXT, ppl(3.0 if k < better else 4.0, k)) for k, (_, b, _) in enumerate(pairs)]
        records = collect([("dense", WIKITEXT, ppl(3.5, 99)), *rows, *trained_twice(WIKITEXT)])
        assert judge(claim, records).word == word


def test_sizes_are_held_against_the_whole_interval():
    free = next(c for c in CLAIMS if "nearly free" in c.says)
    for nats, word in ((3.05, HOLDS), (3.3, FAILS), (3.095, UNDECIDED)):
        rows = [("dense", WIKITEXT, ppl(3.0, 1)), ("W1:8", WIKITEXT, ppl(nats, 2))]
        assert judge(free, collect(rows)).word == word
    points = next(c for c in CLAIMS if "3 to 6 points" in c.says)
    ((a, b, measure),) = points.pairs({})
    assert measure == CLOSED

    def fewer(step, n=20_000):
        right = answers(0.5, 0, n)
        items = [{**item, "correct": item["correct"] and i % step != 0} for i, item in enumerate(right.items)]
        return collect([(a, measure, right), (b, measure, replace(right, items=items))])

    assert judge(points, fewer(11)).word == HOLDS
    assert judge(points, fewer(10**6)).word == FAILS
    assert judge(points, fewer(8, 1200)).word == UNDECIDED
    text = page(fewer(8, 1200))
    assert "There surely is an effect; whether it lies between -6 and -3 points, 1,200 questions leave open." in text


def test_the_larger_measurement_of_a_pair_is_taken_where_both_have_it():
    claim = next(c for c in CLAIMS if "EoRA gives" in c.says)
    small = [(name, CLOSED, answers(0.2, 0, 200)) for name in ("Q", "Q+E")]
    large = [(name, CLOSED, answers(0.2, 0, 1200)) for name in ("Q", "Q+E")]
    for rows, n in ((small, 200), ([*small, large[0]], 200), ([*small, *large], 1200), ([*large, *small], 1200)):
        verdict = judge(claim, collect(rows))
        assert [(name, c.n) for name, c, _ in verdict.comparisons] == [(f"Q to Q+E, closed book, {n:,} questions", n)]
    assert judge(claim, collect([small[0], large[1]])).word == MISSING  # on no sample in common


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
    assert GRID_PAGE.partition("#")[2] in map(make_id, headings)


def test_plans_by_name():
    assert plan_name(None, 8) == plan_name(list(range(8)), 8) == "dense"
    assert plan_name(list(parse_plan("0-3,3-7", 8)), 8) == "block 3 twice"
    assert plan_name([0, 2, 1], 3).startswith("plan") and plan_name([0, 1], 3).startswith(
        "plan"
    )  # the last block left out


def test_the_page_says_what_the_records_say():
    assert (ROOT / "book" / "claims.md").read_text("utf8") == page(recorded_pool(), recorded_claims()), (
        "run `make findings`"
    )


def test_the_figure_was_drawn_from_these_records():
    table = forest(verdicts(recorded_pool()))
    with Image.open(ROOT / FIGURE) as image:
        assert image.text["Description"] == digest(table), "run `make findings`"


def test_the_figure_has_every_comparison_and_where_it_is_claimed():
    claim = next(c for c in CLAIMS if "EoRA gives" in c.says)
    rows = [("Q", CLOSED, answers(0.2, 0, 1200)), ("Q+E", CLOSED, answers(0.3, 0, 1200))]
    free = [("dense", WIKITEXT, ppl(3.0, 1)), ("W1:8", WIKITEXT, ppl(3.3, 1))]
    table = forest(verdicts(collect([*rows, *free])))
    assert list(table["n"]) == [2, CLAIMS.index(claim) + 1]
    assert table["effect"].tolist() == pytest.approx([np.exp(0.3), 10])
    assert table["claimed to"].tolist() == [1.1, 2] and table["verdict"].tolist() == [FAILS, FAILS]
    chart = figures.forest_chart(table)
    said = [label.get_text() for axis in chart.axes for label in axis.get_yticklabels()]
    assert said == [f"2 W1:8 is nearly free: {FAILS}", f"11 EoRA gives 1 to 2 points back: {FAILS}"]
    figures.plt.close("all")


def test_every_claim_names_its_subject():
    assert not [c.says for c in CLAIMS if c.says.startswith("The same")]
