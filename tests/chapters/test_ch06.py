"""Chapter 6's tables and sentences on made-up records, and on the recorded ones; the README's figure is of them."""

import json
from dataclasses import replace

import pytest

from tests.fakes import accuracy, perplexity
from thesislib.chapters import ch06_figures as plots
from thesislib.chapters import ch06_grid as evaluation
from thesislib.chapters import ch06_runs as runs
from thesislib.chapters import figures, labels, record_file, recorded
from thesislib.chapters import pareto as trade_offs
from thesislib.chapters.ch06_runs import EvaluationChapter
from thesislib.chapters.labels import family
from thesislib.chapters.pareto import OPEN, PPL, front, points
from thesislib.errors import BadInput
from thesislib.evaluate.stats import Comparison


def provenance(megabytes, millions=100):
    size = {"bytes_on_disk": megabytes * 1e6, "parameters": millions * 1e6, "nonzero_parameters": millions * 1e6}
    return {
        "made": {"bytes": size},
        "seconds": 2.0,
        "hardware": {"torch_threads": 1, "cpu": "a processor", "cores": 2},
        "sweep": {"seconds_to_make": 5.0},
    }


def ppl(per_token, megabytes, seed=0):
    return perplexity(per_token, seed, texts=1, provenance=provenance(megabytes))


def answers(share, megabytes, n=100):
    return accuracy(share, n, provenance=provenance(megabytes))


@pytest.fixture
def story():
    """D2 and W1:8 cost 0.3 and 0.1 nats, together 0.6; training gives 0.2 back, 4 bits cost 0.05, of which EoRA gives
    0.02."""
    nats = {
        "dense": (3.0, 270),
        "D2": (3.3, 250),
        "W1:8": (3.1, 265),
        "D2+W1:8": (3.6, 240),
        "W": (2.9, 271),
        "D2+W": (3.1, 251),
        "D2+W1:8+W": (3.4, 241),
        "D2+W+Q": (3.15, 110),
        "D2+W+Q+E": (3.13, 130),
    }
    found = {(label, PPL): ppl(x, mb, seed) for seed, (label, (x, mb)) in enumerate(nats.items())}
    return found | {("dense", OPEN): answers(0.6, 270), ("D2", OPEN): answers(0.3, 250)}


def test_families():
    told = {
        "dense": "pruned",
        "D2+W1:8": "pruned",
        "W1:2": "pruned",
        "W": "+ LoRA",
        "D2+W": "+ LoRA",
        "D2+T+W1:8": "+ LoRA",
        "Q3": "+ GPTQ",
        "W+Q": "+ GPTQ",
    }
    assert {label: family(label) for label in told} == told and family("D2+W+Q+E") == family("Q2+E") == "+ EoRA"


def test_the_thesis_stands_beside():
    assert labels.thesis_of("D2+W1:8").perplexity == evaluation.thesis_row("D2+W1:8").perplexity
    assert labels.thesis_of("D2+W+Q").perplexity == evaluation.thesis_row("D2", "W", "Q").perplexity
    assert labels.thesis_of("D2+W+Q+E") == evaluation.thesis_row("D2", "W", "E")
    assert labels.thesis_of("Q3") is labels.thesis_of("Q2+E") is None
    assert not any(map(labels.thesis_of, ("L80%", "L80%+W", "M4", "S4", "N75%", "FT3", "Z27-down-1%", "D2+FT3")))
    assert (
        labels.thesis_of("D2+W+W1:8") == evaluation.thesis_row("D2+W1:8", "W", "order") != labels.thesis_of("D2+W1:8+W")
    )
    assert labels.thesis_of("Q") is None and labels.thesis_of("dense") == evaluation.thesis_row("dense")


def test_a_front_is_what_nothing_beats(story):
    table = points(story)
    by_base = front(table, "MB", PPL)
    assert by_base == {"dense": ["D2+W1:8", "D2", "W1:8", "dense"], "W": ["D2+W+Q", "D2+W+Q+E", "D2+W", "W"]}
    rows = table.set_index("label")
    for x in rows.index:  # by the definition
        beaten = any(
            rows.loc[y, "MB"] <= rows.loc[x, "MB"] and rows.loc[y, PPL] <= rows.loc[x, PPL]
            for y in rows.index
            if y != x and rows.loc[y, "base"] == rows.loc[x, "base"]
        )
        assert (x in by_base[rows.loc[x, "base"]]) == (not beaten), x
    assert front(table, "MB", OPEN) == {"dense": ["D2", "dense"]} and front(points({}), "MB", PPL) == {}


def test_a_trained_model_wins_over_no_untrained_one(story):
    """The smallest and best of all saw WikiText: everything else says of the untrained models what it said before."""
    seen = {**story, ("D8+W+Q", PPL): ppl(2.5, 60, 30), ("D8+T", PPL): ppl(2.4, 50, 31)}
    table = points(seen)
    by_base = front(table, "MB", PPL)
    assert by_base == {"dense": front(points(story), "MB", PPL)["dense"], "T": ["D8+T"], "W": ["D8+W+Q"]}
    assert next(iter(by_base)) == "dense"
    assert trade_offs.smallest_usable(seen)["dense"] == trade_offs.smallest_usable(story)["dense"] == "W1:8"
    assert trade_offs.smallest_usable(seen)["W"] == "D8+W+Q" and "T" not in trade_offs.smallest_usable(seen)
    said = trade_offs.front_table(seen)
    assert said.index.tolist()[3:6] == [
        ("untrained", "dense"),
        ("trained on TriviaQA", "D8+T"),
        ("trained on WikiText", "D8+W+Q"),
    ]
    assert said.loc[("untrained", "D2+W1:8"), "MB"] == "240"
    assert "untrained, W1:8 with 265 MB (22.2 against 20.1)" in trade_offs.usable_sentence(seen)
    shown = explorer_data(trade_offs.explorer(seen))
    assert shown["fronts"]["MB"][PPL] == by_base and list(shown["groups"]) == ["dense", "T", "W"]
    chart = plots.pareto_chart(table, by_base, PPL, trade_offs.marks_of(seen))
    lines = [list(line.get_xdata()) for axis in chart.axes for line in axis.lines if line.get_label() == "front"]
    assert lines == [[240, 250, 265, 270], [50], [60]]
    plots.plt.close(chart)


def file_row(kind, per_token, megabytes, of="f", limit=None, text="t"):
    """A measurement of a file of llama.cpp's."""
    made = {"label": f"llama.cpp {kind}", "bytes": {"bytes_on_disk": megabytes * 1e6}}
    settings = {"text_sha256": text, "length": 512, "limit": limit}
    return perplexity(per_token, texts=1, provenance={"made": made, "settings": settings, "file": {"of": of}})


def as_came(story, of="f", limit=None):
    """The story of the embedded subject."""
    facts = {
        "subject": "SmolLM2-135M-Instruct",
        "fingerprint": of,
        "settings": {"text_sha256": "t", "length": 512, "limit": limit},
    }
    return {key: replace(m, provenance={**m.provenance, **facts}) for key, m in story.items()}


def test_files_beside_the_study_are_marks(story, monkeypatch):
    files = (file_row("Q4_0", 3.2, 92), file_row("Q8_0", 3.0, 145))
    monkeypatch.setattr(trade_offs, "_engine_files", lambda: files)
    came = as_came(story)
    marks = trade_offs.marks_of(came).set_index("label")
    assert list(marks.index) == [trade_offs.AS_IT_CAME, "llama.cpp Q4_0", "llama.cpp Q8_0"]
    star, dense = marks.loc[trade_offs.AS_IT_CAME], came["dense", PPL]
    assert round(star["MB"]) == 98 and [star[f"{PPL}{end}"] for end in ("", " low", " high")] == [
        dense.value,
        dense.low,
        dense.high,
    ]
    assert star[OPEN] == came["dense", OPEN].value and marks[OPEN].notna().sum() == 1
    assert list(marks["MB"].round()) == [98, 92, 145] and marks.loc["llama.cpp Q4_0", PPL] == files[0].value
    # of another subject, of a part of the text, of another text
    for other in (as_came(story, of="g"), as_came(story, limit=24)):
        assert list(trade_offs.marks_of(other)["label"]) == [trade_offs.AS_IT_CAME]
    assert len(trade_offs.marks({PPL: dense}, [file_row("Q5_0", 3.0, 105, text="u")])) == 1
    assert trade_offs.marks_of(story).empty and trade_offs.marks_of({}).empty

    table = points(came)
    untrained = front(table, "MB", PPL)["dense"]
    assert trade_offs.no_better(table, untrained, star, PPL) == ["D2+W1:8", "D2", "W1:8", "dense"]
    assert trade_offs.no_better(table, untrained, marks.loc["llama.cpp Q4_0"], PPL) == ["D2+W1:8", "D2"]
    assert trade_offs.no_better(table, ["D2", "dense"], star, OPEN) == ["D2", "dense"]
    assert trade_offs.no_better(table, ["dense"], {"MB": 98, OPEN: 0.5}, OPEN) == []
    said = trade_offs.front_table(came).loc["a file of the dense model"]
    assert list(said.index) == list(marks.index) and list(said["MB"]) == ["98", "92", "145"]
    assert "None of the 4 untrained models on the front is smaller or better" in trade_offs.file_sentence(came)
    assert not trade_offs.file_sentence(story)

    shown = explorer_data(trade_offs.explorer(came))["marks"]
    assert [(r["label"], round(r["MB"])) for r in shown] == [(x, round(marks.loc[x, "MB"])) for x in marks.index]
    beside = trade_offs.marks_of(came)
    chart, others = (plots.pareto_chart(table, front(table, "MB", measure), measure, beside) for measure in (PPL, OPEN))
    drawn = {line.get_label(): line.get_xydata() for line in chart.axes[0].lines}
    assert drawn["the file it came in"].tolist() == [[star["MB"], star[PPL]]]
    assert drawn["llama.cpp's files"].tolist() == beside[["MB", PPL]][1:].to_numpy().tolist()
    assert not {"the file it came in", "llama.cpp's files"} & {line.get_label() for line in chart.axes[1].lines}
    assert {"Q4_1 file, 98 MB", "Q4_0", "Q8_0", "dense", "D2"} <= {text.get_text() for text in chart.axes[0].texts}
    assert {"dense", "D2", "D2+Q"} <= {text.get_text() for text in chart.axes[1].texts}  # of models trained alike
    for axis in (*chart.axes, *others.axes):
        assert_nothing_covered(axis)
    plots.plt.close("all")


def assert_nothing_covered(axis):
    """No label lies on a mark or on another label."""
    boxes = [figures.Text.get_window_extent(text) for text in axis.texts]
    at = [axis.transData.transform(line.get_xydata()) for line in axis.lines if line.get_marker() not in ("None", "")]
    assert boxes and not any(box.contains(x, y) for box in boxes for xys in at for x, y in xys)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def explorer_data(html):
    """{name: value} of the constants in an explorer's script."""
    lines = html.partition("(() => {\n")[2].splitlines()[:4]
    pairs = (line.removeprefix("const ").removesuffix(";").split(" = ", 1) for line in lines)
    return {name: json.loads(value) for name, value in pairs}


def test_the_recorded_figure_covers_nothing():
    record = recorded("06_evaluation").for_fronts
    table = points(record)
    for measure, most in ((PPL, 100), (OPEN, 1)):
        fronts = front(table, "MB", measure)
        chart = plots.pareto_chart(table, fronts, measure, trade_offs.marks_of(record), most)
        for axis, (base, names) in zip(chart.axes, fronts.items(), strict=True):
            assert_nothing_covered(axis)
            assert "dense" in {text.get_text() for text in axis.texts} or base not in names
    plots.plt.close("all")


def test_depth_and_width_together_cost_more_than_their_sum(story):
    ((name, c),) = evaluation.interactions(story).items()
    assert name == "D2+W1:8" and c.difference == pytest.approx(0.2, abs=0.01) and c.p < 0.001
    (less,) = evaluation.interactions({**story, ("D2+W1:8", PPL): ppl(3.2, 240, 3)}).values()
    assert less.verdict() == "better"
    assert not evaluation.interactions({})


def test_steps_go_from_the_model_before(story):
    found = {(a, b): c for _, a, b, c in evaluation.steps(story)}
    assert set(found) == {
        ("dense", "D2"),
        ("dense", "W1:8"),
        ("D2", "D2+W1:8"),
        ("dense", "W"),
        ("D2", "D2+W"),
        ("D2+W1:8", "D2+W1:8+W"),
        ("D2+W", "D2+W+Q"),
        ("D2+W+Q", "D2+W+Q+E"),
    }
    assert found["D2+W", "D2+W+Q"].difference == pytest.approx(0.05, abs=0.01)
    table = evaluation.stage_table(story)
    trained = table.loc["+ LoRA"]
    assert (trained["pairs"], trained["better"], trained["worse"]) == (3, 3, 0)
    lost = table[table["measure"] == OPEN].loc["pruned"]
    assert (lost["lowest"], lost["worse"]) == ("-30.0", 1)
    other = evaluation.steps({**story, ("D2+W+W1:8", PPL): ppl(3.5, 240, 8)})
    assert next(f for f, a, b, _ in other if b == "D2+W+W1:8") == "pruned"


def test_findings_turn_with_the_records(story):
    # only D2+W1:8+W: the quantised models of the story are all trained, and what is not trained is not compared
    tests = trade_offs.at_equal_bytes(story)
    assert list(tests) == ["W", "D2+W", "D2+W1:8+W"]
    assert {x: c.verdict() for x, c in tests.items() if c} == {"W": "worse", "D2+W": "worse", "D2+W1:8+W": "better"}
    untrained = {**story, ("Q", PPL): ppl(3.05, 100, 20)}
    beaten = {x for x, c in trade_offs.at_equal_bytes(untrained).items() if c and c.verdict() == "better"}
    assert beaten == {"D2", "W1:8", "D2+W1:8", "D2+W1:8+W"}
    assert not trade_offs.at_equal_bytes({key: m for key, m in story.items() if "Q" not in key[0]})
    # D2+W+Q is smaller than D2+W, and more than 1.25 times worse than W
    assert trade_offs.smallest_usable(untrained) == {"dense": "Q", "W": "D2+W"}
    came, own = as_came(story)["dense", PPL], story["dense", PPL]
    assert round(trade_offs.original_file(came) / 1e6) == 98 and trade_offs.original_file(own) is None
    assert evaluation.pruned_and_trained(story) == ["D2+W", "D2+W1:8+W"]
    assert evaluation.below(story, "dense") == evaluation.below(story, "W") == []
    better = {**story, ("D2+W", PPL): ppl(2.7, 251, 9)}
    assert evaluation.below(better, "dense") == evaluation.below(better, "W") == ["D2+W"]
    assert evaluation.below({key: m for key, m in story.items() if key[0] != "W"}, "W") is None


def test_bfloat16_is_held_against_float32(story):
    exact = {key: m for key, m in story.items() if key[1] == PPL}
    n, same = len(exact), evaluation.precision(exact, exact)
    assert len(same.exact) == n * (n - 1) // 2 and not same.differ and set(same.shifts.values()) == {0}
    moved = evaluation.precision(exact, {**exact, ("D2", PPL): ppl(2.95, 250, 1)})
    assert ("dense", "D2") in moved.differ and moved.shifts["D2"] == pytest.approx(-0.2953, abs=1e-4)


def test_what_was_not_run_is_shown(story):
    table = evaluation.grid_table(story)
    assert len(table) == len(runs.grid("sample").configurations)
    assert (
        table.loc["D8", PPL] == table.loc["D2+W", OPEN] == "not run" and table.loc["D2", "thesis: open book"] == "53.0%"
    )
    assert "D4" in evaluation.absent(story) and "dense" not in evaluation.absent(story)
    assert evaluation.complete(story) == ["dense", "D2"]


def test_the_full_size_is_shown_as_far_as_it_was_run(story):
    right = answers(0.5, 270, 1000)
    choice = {label: replace(m, task="hellaswag", metric="acc_norm", unit="item")
              for label, m in (("dense", right), ("W1:8", answers(0.4, 265, 1000)))}  # fmt: skip
    full = {(label, PPL): story[label, PPL] for label in ("dense", "D2", "W1:8")} | {
        (label, "HellaSwag"): m for label, m in choice.items()
    }
    table = evaluation.grid_table(full, size="full", run=True)
    assert list(table.index) == ["dense", "D2", "W1:8"] and table.loc["dense", "HellaSwag"] == "50.0% [40.0%, 60.0%]"
    assert table.loc["D2", "HellaSwag"] == "not run" and "PIQA" not in table  # nobody was asked
    assert list(table.columns)[:2] == ["x dense", PPL] and table.loc["D2", "x dense"].startswith("1.3")
    beside = evaluation.against_dense(full)
    assert (
        list(beside.index) == ["D2", "W1:8"]
        and beside.loc["D2", PPL].startswith("x 1.3")
        and beside.loc["D2", PPL].endswith("*")
    )
    assert beside.loc["W1:8", "HellaSwag"].startswith("-10.0 [") and beside.loc["W1:8", "HellaSwag"].endswith("*")
    assert beside.loc["D2", "HellaSwag"] == "not run"
    alike = evaluation.against_dense({("dense", "HellaSwag"): right, ("D2", "HellaSwag"): right})
    assert alike.loc["D2", "HellaSwag"] == "+0.0 [+0.0, +0.0]"
    assert evaluation.against_dense({}).empty


def test_costs_are_reported(story):
    table = evaluation.cost_table(story)
    assert (
        table.loc["pruned", "models"] == 4
        and (table["to make it"] == "5").all()
        and table.loc["+ EoRA", PPL] == "2"
        and table.loc["+ EoRA", OPEN] == ""
    )


def test_the_explorers_text_is_safe_and_whole(story):
    html = trade_offs.explorer({**story, ("</script>", PPL): ppl(3, 100)})
    assert html.count("</script>") == 1
    rows = explorer_data(html)["rows"]
    assert len(rows) == 10 and {"label", "family", "MB", "M", PPL, f"{PPL} low"} <= set(rows[0])


def figure_of(difference):
    return Comparison(difference, difference - 0.1, difference + 0.1, 0.001, 9, "t")


def test_figures_hold_every_model(story):
    table = points(story)
    marks = trade_offs.marks_of(story)
    chart = plots.pareto_chart(table, front(table, "MB", PPL), PPL, marks, most=30)
    assert chart.axes[0].get_title() == "untrained: 3 models\n(1 above 30 not drawn)"
    assert len(chart.axes) == 2 and chart.axes[0].get_xlabel() == "MB on disk"
    off, told = evaluation.interaction_grid(story)
    assert off.loc[2, "1:8"] == pytest.approx(1.22, abs=0.01) and told.loc[2, "1:8"]
    (cell,) = plots.interaction_chart(off, told).axes[0].texts
    assert cell.get_text() == "1.22 *"
    panels = plots.steps_chart(evaluation.steps(story)).axes
    assert [a.get_title() for a in panels] == ["pruned", "+ LoRA", "+ GPTQ", "+ EoRA"]
    assert [t.get_text() for t in panels[1].get_yticklabels()] == ["dense", "D2", "D2+W1:8"]
    (beyond,) = plots.steps_chart([("+ GPTQ", "dense", "Q2", figure_of(2.6))]).axes[0].texts
    assert beyond.get_text() == "x 13.5 →"
    plots.plt.close("all")


@pytest.mark.parametrize(("key", "value"), [("size", "huge"), ("workers", 0), ("dtype", "int4")])
def test_bad_parameters(key, value):
    with pytest.raises(BadInput, match=str(value)):
        EvaluationChapter(**{key: value})


# ---------------------------------------------------------------- the recorded run


def test_the_record_shares_what_other_chapters_measured():
    record = recorded("06_evaluation")
    assert record.sample["dense", PPL].n == 24 and record.full["dense", PPL].n == 595
    assert all(m.provenance["dtype"] == "bfloat16" for results in record for m in results.values())
    exact = runs.read_size(record_file("06_evaluation"), runs.PRECISION, "float32")
    assert len(exact) == len(runs.grid("precision").configurations) and {
        m.provenance["dtype"] for m in exact.values()
    } == {"float32"}


def test_a_section_is_of_one_sample():
    """The whole text's, once it has every model of the section."""
    sample = {(label, PPL): ppl(3, 24) for label in ("dense", "D2", "W1:8", "D2+W1:8")}
    whole = {key: ppl(3.1, 595) for key in list(sample)[:3]}
    record = runs.Record(whole, sample)
    assert record.on_one(["depth", "width"]) is whole and record.on_one(evaluation.PRUNED) is sample
    assert runs.Record({**whole, ("D2+W1:8", PPL): ppl(3.1, 595)}, sample).on_one(evaluation.PRUNED) is not sample
