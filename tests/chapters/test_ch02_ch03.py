"""Chapters 2 and 3: what they measure on a tiny model, and that their sentences turn with the numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import perplexity
from thesislib.chapters import ch02_depth as depth
from thesislib.chapters import ch02_runs as runs
from thesislib.chapters import ch03_width as width
from thesislib.chapters import recorded
from thesislib.chapters.thesis import thesis_row, thesis_rows
from thesislib.compress.depth import Depth
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.evaluate.stats import by_verdict
from thesislib.records.store import Store
from thesislib.sources.corpus import Question, join

WINDOWS = 24


@pytest.fixture(scope="module", autouse=True)
def text():
    monkeypatch = pytest.MonkeyPatch()
    made = join(
        "text", [f"{i} is a number of things that may be counted, and {i * i} is its square. " * 3 for i in range(12)]
    )
    for module in (runs, width):
        monkeypatch.setattr(module, "evaluation_text", lambda _: made)
    monkeypatch.setattr("thesislib.sources.corpus.calibration_text", lambda *_: made)
    asked = [Question("1", "Who?", ("a",), None), Question("2", "What?", ("zzz",), None)]
    monkeypatch.setattr(
        runs, "questions", lambda _, open_book, limit: [replace(q, context="C") for q in asked] if open_book else asked
    )
    yield
    monkeypatch.undo()


def loss(per_token, seed=0, **provenance):
    return perplexity(per_token, seed, n=WINDOWS, provenance=provenance)


# ---------------------------------------------------------------- chapter 2

SMALL = runs.DepthChapter(length=32, calibration=3, windows=4, counts=[1, 2], greedy=2, seeds=2, tokens=4)


@pytest.fixture(scope="module")
def measured_once(tiny):
    subject = tiny(layers=9)
    return runs.measure(subject, runs.score(subject, SMALL), SMALL)


@pytest.fixture
def measured(measured_once):
    return replace(measured_once, perplexity=dict(measured_once.perplexity))


def test_every_method_removes_as_many_unprotected_blocks_as_it_should(measured):
    removed = measured.scores.removed
    assert set(removed) == {
        "perplexity",
        "taylor",
        "magnitude",
        "influence",
        "angular",
        runs.GREEDY,
        "random 0",
        "random 1",
    }
    for sets in removed.values():
        for k, gone in sets.items():
            assert len(set(gone)) == k and set(gone) <= {4, 5, 6}
    assert removed["perplexity"][1] == removed[runs.GREEDY][1]  # their first step is the same
    assert removed["angular"][2] in ((4, 5), (5, 6))
    assert set(measured.perplexity) == {(runs.NOTHING, 0), *((m, k) for m in removed for k in (1, 2))}
    assert set(measured.trivia) == {(0, False), (0, True), (2, False), (2, True)}
    assert all(t.startswith("Once upon a time") for t in measured.texts.values())


def test_tables_and_sentences_of_depth(measured):
    assert depth.importance_table(measured.scores).shape == (9, 5)
    correlations = depth.rank_correlations(measured.scores)
    assert np.allclose(np.diag(correlations), 1) and np.allclose(correlations, correlations.T)
    table = depth.thesis_table(measured)
    assert list(table.index) == ["dense", "D2"] and table.loc["D2", "thesis: x dense"] == "2.08"
    curves = depth.curves(measured)
    whole, paired = (
        curves[curves["base"] == base].set_index(["method", "removed"]) for base in (runs.NOTHING, "perplexity")
    )
    assert {*whole.index} == {*measured.perplexity} and len(paired) == len(whole) - 3
    of_two = whole.loc[[("taylor", 2), ("perplexity", 2)], "value"]
    assert paired.loc[("taylor", 2), "value"] == pytest.approx(of_two.iloc[0] / of_two.iloc[1])
    methods = depth.methods_table(measured)
    assert list(methods.columns) == ["D2"] and methods.loc["random, 2 seeds", "D2"].count(" to ") == 1


def test_parts(tiny):
    table = runs.parts(tiny(layers=9), SMALL, count=1)
    assert list(table.index) == ["1 x block", "1 x attention", "1 x mlp"]
    for part, gone in zip(("block", "attention", "mlp"), table["of blocks"], strict=True):
        stage = Depth(1, part=part, metric="taylor", windows=SMALL.calibration, length=SMALL.length)
        assert gone == str(stage.apply(tiny(layers=9))[1]["removed"][0])


def test_a_page_shows_the_main_score_and_chance(measured):
    assert list(measured.scores.of_main().removed) == ["perplexity", "random 0", "random 1"]
    assert measured.scores.of_main().metrics == measured.scores.metrics


def test_verdict_turns_with_the_numbers(measured):
    k = 2
    random = [key for key in measured.perplexity if key[0].startswith("random")]
    for key in random:
        measured.perplexity[key] = loss(6.0, 2)
    for method, per_token in (
        (("perplexity"), 3.0),
        (runs.GREEDY, 2.5),
        ("taylor", 3.5),
        ("magnitude", 3.0),
        ("influence", 3.0),
        ("angular", 3.0),
    ):
        measured.perplexity[method, k] = loss(per_token, seed=0 if per_token == 3.0 else 1)
    tests = depth.deterministic(measured, k)
    assert by_verdict(tests) == {
        "better": [runs.GREEDY],
        "worse": ["taylor"],
        "not told apart": ["magnitude", "influence", "angular"],
    }
    assert tests[runs.GREEDY].difference == pytest.approx(-0.5, abs=0.01)
    assert depth.best(measured, k) == runs.GREEDY
    assert "Taylor (+65 %) is worse than one-shot perplexity" in depth.verdict(measured, k)
    measured.perplexity[runs.GREEDY, k] = loss(4.0, seed=1)
    tests = depth.deterministic(measured, k)
    assert not by_verdict(tests)["better"] and tests[runs.GREEDY].difference == pytest.approx(1.0, abs=0.01)


def test_depth_results_survive_being_recorded(measured, tmp_path):
    path = tmp_path / "r.jsonl"
    for m in runs.as_measurements(measured):
        Store(path).append(m)
    (tmp_path / "r_scores.json").write_text(measured.scores.to_json())
    again = runs.read_recorded(path)
    assert again.scores == measured.scores and again.texts == measured.texts
    assert {k: m.value for k, m in again.perplexity.items()} == {k: m.value for k, m in measured.perplexity.items()}
    assert depth.headline(again) == depth.headline(measured)
    with pytest.raises(BadInput, match="the whole model's perplexity or the answers are missing"):
        runs.from_measurements([], measured.scores)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metrics": ["taylr"]}, "'taylr'.*taylor"),
        ({"counts": [0]}, "'counts' is"),
        ({"windows": 0}, "'windows' is 0"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ],
)
def test_bad_parameters_of_depth(settings, said):
    with pytest.raises(BadInput, match=said):
        runs.DepthChapter(**settings)


def test_what_a_subject_cannot_lose_is_left_out_or_refused(tiny, capsys):
    scores = runs.score(tiny(layers=7), SMALL)
    assert "to remove 2 of its 7 blocks" in capsys.readouterr().out
    assert {k for sets in scores.removed.values() for k in sets} == {1} and {
        b for sets in scores.removed.values() for b in sets[1]
    } == {4}
    with pytest.raises(BadInput, match="of this subject's 6 blocks 0 can go"):
        runs.score(tiny(layers=6), SMALL)


def test_the_ranks_are_as_the_figure_s_text_says():
    ranks = depth.importance_table(recorded("02_depth_pruning").scores).rank()
    assert all({*ranks[metric].nlargest(2).index} == {0, 1} for metric in ("perplexity", "taylor"))
    assert all({*ranks[metric].nlargest(2).index} == {0, 29} for metric in ("influence", "angular"))
    assert ranks["magnitude"].idxmin() == 0
    assert ranks.loc[[14, 17]].max(axis=None) == 9 and ranks.loc[[12, 13]].drop(columns="magnitude").max(axis=None) == 7


# ---------------------------------------------------------------- chapter 3

NARROW = width.WidthChapter(
    length=32, calibration=3, windows=4, ratios=[0.5], by_magnitude=["2:4"], weightings=["unit_norm"]
)


@pytest.fixture(scope="module")
def pruned(tiny):
    return width.measure(tiny(layers=2), width.configurations(NARROW), NARROW)


def test_every_configuration_is_measured_and_packed(pruned):
    assert len(pruned) == 1 + 9 + 1 + 1 + 1
    for config, m in pruned.items():
        sizes = m.provenance["chapter"]["sizes"]
        share = sizes["zeros"] / (sizes["dense"] / 4)
        assert share == pytest.approx(config.share(0, "q_proj") if config else 0, abs=0.01)
        assert (sizes["packed"] < sizes["dense"]) == (config is not None)
    table = width.pattern_table(pruned, NARROW)
    assert list(table.index) == ["dense", *width.NINE, "0.5"]
    assert table.loc["2:4", "x dense, magnitude"] and not table.loc["1:2", "x dense, magnitude"]
    assert table.loc["2:4", "thesis: perplexity"] == "161.10"


def test_done_configurations_are_not_measured_again(tiny, pruned):
    fresh = []
    done = {c: m for c, m in pruned.items() if c is None or c.of == 16}
    again = width.measure(tiny(layers=2), width.configurations(NARROW), NARROW, done, fresh.append)
    assert len(fresh) == len(pruned) - len(done) and {c: m.value for c, m in again.items()} == {
        c: m.value for c, m in pruned.items()
    }


def test_width_results_survive_being_recorded(pruned, tmp_path):
    for m in pruned.values():
        Store(tmp_path / "r.jsonl").append(m)
    again = width.read_recorded(tmp_path / "r.jsonl")
    assert list(again) == list(pruned) and again[None].value == pruned[None].value
    with pytest.raises(BadInput, match="not the results of chapter 3"):
        width.from_measurements([loss(3.0)])


def test_conventions():
    table = width.conventions()
    assert (
        table.loc["1:8", "NVIDIA's reading (kept:of)"] == "7:8"
        and table.loc["2:4", "NVIDIA's reading (kept:of)"] == "2:4"
    )
    assert table.loc["8:16", "ways to place"] == "12,870" and table.loc["8:16", "bits a group"] == 14
    assert table.loc["2:4", "bytes packed, bfloat16"] == "54.7%"


def test_what_width_compares_turns_with_the_numbers():
    p = width.WidthChapter(by_magnitude=["1:8", "2:4"], weightings=["unit_norm"])
    order = {"1:2": 5.0, "2:4": 4.5, "4:8": 4.0, "8:16": 4.0}
    results = (
        {None: loss(3.0)}
        | {p.width(x): loss(v, seed=0 if x != "8:16" else 1) for x, v in order.items()}
        | {p.width("1:8"): loss(3.05)}
    )
    results |= {p.width("1:8", metric="magnitude"): loss(3.05), p.width("2:4", metric="magnitude"): loss(6.0, 1)}
    results |= {p.width("2:4", weighting="unit_norm"): loss(4.6)}
    verdicts = {pair: c.verdict() for pair, c in width.halves(results, p).items()}
    assert verdicts == {("1:2", "2:4"): "better", ("2:4", "4:8"): "better", ("4:8", "8:16"): "not told apart"}
    assert width.halves(results, p)["1:2", "2:4"].difference == pytest.approx(-0.5)
    assert by_verdict(width.wanda_against_magnitude(results, p)) == {
        "better": ["2:4"],
        "worse": [],
        "not told apart": ["1:8"],
    }
    (weighting,) = width.weightings(results, p).items()
    assert weighting[0] == "unit_norm" and weighting[1].difference == pytest.approx(0.1)
    results[p.width("2:4")] = loss(5.5)
    assert width.halves(results, p)["1:2", "2:4"].verdict() == "worse"


def test_calibration_table():
    p = width.WidthChapter()
    results = {c: loss(4 - 0.1 * math.log2(c.windows) + 0.01 * c.seed) for c in width.calibrations(p)} | {None: loss(3)}
    table = width.calibration_table(results, p)
    assert table.shape == (6, 3) and table.loc[("c4", 8), 0] > table.loc[("c4", 128), 0]
    assert table.loc[("c4", 8)].mean() == pytest.approx(math.exp(0.71), rel=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patterns": ["4:4"]}, "removes 4 of 4"),
        ({"by_magnitude": ["half"]}, "'half' is not understood"),
        ({"windows": 0}, "'windows' is 0"),
    ],
)
def test_bad_parameters_of_width(settings, said):
    with pytest.raises(BadInput, match=said):
        width.WidthChapter(**settings)


# ---------------------------------------------------------------- the thesis's figures


def test_the_thesis_figures():
    assert len(thesis_rows()) == 189
    assert (thesis_row("dense").perplexity, thesis_row("D2").closed, thesis_row("W1:8").open) == (26.61, 20.0, 80.8)
    assert thesis_row("W1:8", "W", "E").perplexity == 16.68 and thesis_row("D2+W1:8", "T", "order").closed == 28.2
    with pytest.raises(BadInput, match=r"unknown configuration of the thesis 'D3'.*D"):
        thesis_row("D3")
    assert Width(1, 8).label in {label for label, _, _ in thesis_rows()}
