"""Chapter 4: what it measures on a tiny model, that a run killed goes on, and that its sentences turn with the
numbers."""

import dataclasses
import re

import pytest

from tests.fakes import accuracy, perplexity
from thesislib.chapters import ch04_figures as plots
from thesislib.chapters import ch04_pictures as pictures
from thesislib.chapters import ch04_recovery as recovery
from thesislib.chapters import ch04_runs as lora
from thesislib.chapters.ch04_runs import CLOSED, OPEN, PPL, Configuration, LoraChapter
from thesislib.chapters.pool import scored_by
from thesislib.chapters.trainings import collect
from thesislib.errors import BadInput
from thesislib.evaluate.stats import by_verdict
from thesislib.experiment import again
from thesislib.formats.load import save_checkpoint
from thesislib.records.measurement import Measurement
from thesislib.records.store import Store


@pytest.fixture(scope="module")
def small(tiny, tiny_data, tmp_path_factory):
    """Parameters, with a cache of their own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("THESISLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = save_checkpoint(tiny(layers=8), tmp_path_factory.mktemp("subject") / "tiny")
    yield LoraChapter(
        subject=str(folder),
        data=tiny_data,
        dtype="float32",
        pruned=["D1", "W2:4"],
        texts=["wikitext", "trivia"],
        steps=4,
        batch=2,
        length=64,
        rank=2,
        validation=2,
        every=2,
        seeds=2,
        windows=4,
        answering=3,
        questions=2,
        passages=2,
        tokens=4,
        learning_rate=1e-2,
    )
    patch.undo()


@pytest.fixture(scope="module")
def measured(small):
    found = []
    results = lora.measure(
        [*lora.configurations(small), *lora.order_experiment(small, "D1", "W1:8")], small, keep=found.append
    )
    return results, found


def test_everything_is_measured_once(small, measured):
    results, found = measured
    assert len(found) == len(results)
    labels = {(c.label, c.seed) for c, what in results if what == PPL}
    assert labels == {
        *(
            (x, 0)
            for x in (
                "dense",
                "D1",
                "W2:4",
                "D1+W",
                "W2:4+W",
                "W",
                "D1+T",
                "W2:4+T",
                "T",
                "D1+W+W1:8",
                "D1+T+W1:8",
            )
        ),
        *((f"W2:4+{x}-{way}", 0) for x in "WT" for way in ("masked", "dense")),
        ("D1+W", 1),
    }
    assert {what for c, what in results if c == Configuration("D1", "wikitext")} == {PPL, CLOSED, OPEN}
    assert {what for c, what in results if c.seed == 1} == {PPL}
    assert (
        results[Configuration("D1", "wikitext"), PPL].value
        != results[Configuration("D1", "wikitext", seed=1), PPL].value
    )
    beside, masked, dense = (
        results[Configuration("W2:4", "wikitext", merge=way), PPL] for way in ("beside", "masked", "dense")
    )
    assert len({beside.value, masked.value, dense.value}) == 3
    assert (
        masked.provenance["made"]["bytes"]["nonzero_parameters"]
        < dense.provenance["made"]["bytes"]["nonzero_parameters"]
    )
    assert dense.value == pytest.approx(beside.value, rel=1e-5)  # float32: the same sum, added otherwise


def test_a_run_goes_on_where_it_was(small, measured):
    results, found = measured
    some = lora.from_measurements(found[:7])
    later = []
    configs = [c for c in dict.fromkeys(c for c, _ in results) if c.merge == "beside"]
    assert lora.measure(configs[:4], small, some, later.append).keys() >= some.keys()
    assert not {(c, w) for c, w in lora.from_measurements(later)} & set(some)


def test_records_come_back_and_can_be_made_again(small, measured, tiny_data, tmp_path):
    results, found = measured
    store = Store(tmp_path / "r.jsonl")
    for m in found:
        store.append(m)
    assert dict(lora.read_recorded(store.path)) == results
    for key in (
        (Configuration("W2:4", "wikitext", merge="masked"), PPL),
        (Configuration("D1", "trivia", after="W1:8"), PPL),
        (Configuration("dense"), CLOSED),
    ):
        verdict = again(results[key], small.subject, tiny_data)
        assert verdict.agrees and verdict.same_bits and verdict.same_subject, (key, str(verdict))


def test_what_the_chapter_refuses():
    for settings, message in (
        ({"texts": ["wiki"]}, "unknown training text 'wiki': did you mean 'wikitext'"),
        ({"pruned": ["X2"]}, "part 'X2' is not understood"),
        ({"pruned": []}, "at least one"),
        ({"steps": 0}, "steps"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ):
        with pytest.raises(BadInput, match=message):
            LoraChapter(**settings)
    with pytest.raises(BadInput, match="not the results of chapter 4"):
        lora.from_measurements(
            [
                Measurement(
                    task="t",
                    metric="perplexity",
                    value=1.0,
                    low=1.0,
                    high=1.0,
                    n=1,
                    unit="u",
                    items=[],
                    provenance={"chapter": {}},
                )
            ]
        )


# ---------------------------------------------------------------- what it says


def loss(per_token, seed=0, **settings):
    """A made-up perplexity over 24 documents."""
    report = {
        "curve": [{"step": 1, "loss": 3.0}],
        "validation": [{"step": 0, "loss": 3.5}, {"step": 4, "loss": 3.0}],
        "best_loss": 3.0,
        "best_step": 4,
        "tokens": 1000,
        "parameters": 10**6,
        "tokens_per_second": 100.0,
    }
    made = {
        "reports": [report],
        "bytes": {"parameters": 10, "nonzero_parameters": 8, "bytes_on_disk": 10**6},
        "stages": [{"lora": {"learning_rate": 0.002}}],
    }
    return perplexity(per_token, seed, texts=0, provenance={"made": made, "chapter": {"text": "x"}, **settings})


@pytest.fixture
def story():
    """Pruning costs 0.7 nats in D2 and 1 in W2:4; training wins back 0.6 and 0.8, of which the control gains 0.2 by
    itself."""
    C = Configuration
    found = {
        C("dense"): 3.3,
        C("D2"): 4.0,
        C("W2:4"): 4.3,
        C("D2", "wikitext"): 3.4,
        C("W2:4", "wikitext"): 3.5,
        C("dense", "wikitext"): 3.1,
        C("D2", "trivia"): 3.9,
        C("W2:4", "trivia"): 4.2,
        C("dense", "trivia"): 3.3,
        C("W2:4", "wikitext", merge="masked"): 3.6,
        C("W2:4", "wikitext", merge="dense"): 3.5,
        C("W2:4", "trivia", merge="masked"): 4.25,
        C("W2:4", "trivia", merge="dense"): 4.2,
        C("D2+W1:8"): 4.1,
        C("D2+W1:8", "wikitext"): 3.5,
        C("D2", "wikitext", after="W1:8"): 3.7,
        C("D2", "wikitext", seed=1): 3.42,
        C("D2+W1:8", "wikitext", merge="masked"): 3.5,
        C("D2+W1:8", "wikitext", merge="dense"): 3.5,
    }
    results = {(c, PPL): loss(x, seed) for seed, (c, x) in enumerate(found.items())}
    for c, share in (
        (C("dense"), 0.3),
        (C("D2"), 0.1),
        (C("D2", "wikitext"), 0.25),
        (C("D2", "trivia"), 0.15),
        (C("dense", "wikitext"), 0.3),
        (C("dense", "trivia"), 0.31),
    ):
        results[c, CLOSED] = accuracy(share)
        results[c, OPEN] = accuracy(share + 0.3)
    return results


def test_recovery_is_counted_against_the_control(story):
    table = recovery.recovered(story)
    assert table.loc["D2", "naive"] == pytest.approx(0.6 / 0.7, abs=0.02) and table.loc[
        "W2:4", "naive"
    ] == pytest.approx(0.8, abs=0.02)
    assert table.loc["D2", "fair"] == pytest.approx((0.7 - 0.3) / 0.7, abs=0.02)
    assert recovery.adaptation(story).verdict() == "better"
    story[Configuration("dense", "wikitext"), PPL] = loss(3.3, seed=99)
    assert not recovery.adaptation(story).told
    assert recovery.recovered(story).loc["D2", "fair"] == pytest.approx(0.6 / 0.7, abs=0.02)


def test_both_countings_are_drawn_and_a_share_above_all_cannot_be(story):
    row = recovery.recovered(story).loc["D2"]
    assert (row["cost"], row["naive left"], row["fair left"]) == pytest.approx((0.7, 0.1, 0.3), abs=0.02)
    drawn = pictures.two_countings(story)
    assert ">86%<" in drawn and ">57%<" in drawn and ">+0.70<" in drawn
    assert "which cannot be" not in recovery.counted_sentence(story)
    story[Configuration("D2", "wikitext"), PPL] = loss(3.2, seed=98)
    assert "which cannot be. Against the dense model with the same LoRA" in recovery.counted_sentence(story)
    assert ">-0.10<" in pictures.two_countings(story)


def test_a_run_agrees_with_another_in_order(story):
    assert recovery.agrees(story, story)
    worse = {**story, (Configuration("D2", "wikitext"), PPL): loss(4.2, seed=97)}
    assert not recovery.agrees(worse, story) and not recovery.agrees(story, worse)
    first = {key: m for key, m in story.items() if key[0].pruned in ("dense", "D2")}
    assert recovery.agrees(first, story)


def as_pool(story, measure=CLOSED):
    """The story's answers as all chapters' records have them, and two trainings that tell how far they lie apart."""
    rows = []
    for (c, task), m in story.items():
        if task == CLOSED:
            letter = recovery.LETTERS.get(c.text, "")
            label = f"{c.pruned}+{letter}" if letter and c.pruned != "dense" else letter or c.pruned
            rows.append((label, measure, m.with_provenance(made={"stages": [{"lora": {"seed": 0}}]})))
    second = accuracy(0.3).with_provenance(made={"stages": [{"lora": {"seed": 1}}]})
    return collect([*rows, ("W", measure, dataclasses.replace(second, value=0.301))])


def _told(pool, measure=CLOSED):
    return by_verdict(recovery.texts_compared(pool, ["D2", "dense"], measure), higher_is_better=True)


def test_texts_are_compared_by_model(story):
    assert _told(as_pool(story)) == {"better": ["D2"], "worse": [], "not told apart": ["dense"]}
    story[Configuration("D2", "wikitext"), CLOSED] = accuracy(0.02)
    assert _told(as_pool(story)) == {"better": [], "worse": ["D2"], "not told apart": ["dense"]}


def test_texts_are_compared_by_every_scoring(story):
    """Answers that hold a name among other words count by the thesis's rule alone."""
    exact = scored_by(CLOSED, "exact match")
    pool = as_pool(story)
    story[Configuration("D2", "wikitext"), CLOSED] = accuracy(0.02)
    both = {**pool, **as_pool(story, exact)}
    assert _told(both)["better"] == ["D2"] and _told(both, exact)["worse"] == ["D2"]
    said = recovery.texts_sentence(both, ["D2", "dense"])
    assert "depends on the scoring. By the thesis's rule (a name anywhere in the answer)" in said
    assert "is better for D2. By exact match" in said and "is worse for D2." in said and "token F1" not in said
    table = recovery.answers_table(pool, ["D2", "dense"])
    assert list(table.index) == ["D2", "D2+T", "D2+W", "dense", "T", "W"] and set(table["exact"]) == {"-"}


def test_pruning_after_training_is_held_against_pruning_before(story):
    late = Configuration("D2", "wikitext", after="W1:8")
    for made, verdict in ((loss(3.7), "worse"), (loss(3.3), "better"), (loss(3.5, seed=77), "not told apart")):
        story[late, PPL] = made
        assert {c: test.verdict() for c, test in recovery.orders(story).items()} == {late: verdict}


def test_longer_trainings_are_counted_against_the_control(story):
    p = LoraChapter(pruned=["D2"], steps=4)
    said = recovery.tokens_sentence(story, p)
    assert "57% after 1,000 tokens; longer trainings are not run yet." in said  # of 0.7 nats 0.3 are left
    for steps, pruned, dense in ((8, 3.2, 3.0), (16, 3.05, 2.95)):
        for model, nats in (("D2", pruned), ("dense", dense)):
            m = loss(nats, seed=steps)
            report = {**m.made["reports"][-1], "tokens": 1000 * steps}
            m = m.with_provenance(made={**m.made, "reports": [report]})
            story[Configuration(model, "wikitext", steps=steps), PPL] = m
    said = recovery.tokens_sentence(story, p)
    shares = {tokens: int(share) for share, tokens in re.findall(r"(\d+)% after ([\d,]+\d)", said)}
    assert shares == {
        "1,000": pytest.approx(57, abs=2), "8,000": pytest.approx(71, abs=2), "16,000": pytest.approx(86, abs=2)
    }  # fmt: skip
    assert not lora.is_main(lora.longer(p)[0])
    assert lora.longer(p)[0].stages(p)[-1].steps == 8


def test_seeds_of_one_training(story):
    two = recovery.seeds(story)
    assert two.label == "D2+W" and len(two.values) == 2 and two.test is None
    assert two.share_of_gain == pytest.approx(two.deviation / (two.untrained - two.values.mean()))
    story[Configuration("D2", "wikitext", seed=2), PPL] = loss(3.6, seed=50)
    assert recovery.seeds(story).test.p < 0.001
    one = {key: m for key, m in story.items() if not key[0].seed}
    assert len(recovery.seeds(one).values) == 1


def test_tables_and_figures_hold_what_was_measured(story):
    p = LoraChapter(pruned=["D2", "W2:4", "D2+W1:8"], texts=["wikitext", "trivia"])
    assert list(recovery.recovery_table(story).index) == ["D2", "W2:4", "D2+W1:8", "dense"]
    assert recovery.recovery_table(story).loc["D2", "thesis: x dense, +W"] == "0.802"
    assert recovery.recovery_table(story).loc["D2", "x dense"].startswith("2.0")
    merge = recovery.merge_table(story)
    assert set(merge.index) == {
        (m, way) for m in ("W2:4+W", "W2:4+T", "D2+W1:8+W") for way in ("beside", "masked", "dense")
    }
    assert merge.loc[("W2:4+W", "masked"), "against beside, paired"].startswith("x 1.1")
    beside, dense = recovery.mergings(story)["W2:4+W", "dense"]
    assert dense.value == pytest.approx(beside.value) and dense.disk_bytes == beside.disk_bytes
    assert len(recovery.training_table(story)) == 8
    assert list(recovery.by_rate(story, p)) == [0.004]
    assert set(recovery.samples(story, p).index) >= {"dense", "D2+W", "W"}
    tests = recovery.tests_table(story)
    assert list(tests.columns) == ["paired t", "paired bootstrap", "Wilcoxon signed-rank"] and len(tests) == 6
    assert all(tests.loc["D2 to D2+W"].str.startswith("x 0.5")) and all(
        tests.loc["D2 to D2+W"].str.endswith("p < 0.001")
    )
    chart = plots.recovery_chart(recovery.points(story))
    assert [t.get_text() for t in chart.axes[0].get_yticklabels()] == ["D2", "W2:4", "D2+W1:8", "dense"]
    lines = plots.loss_curves(recovery.curves(story))
    assert [a.get_title() for a in lines.axes] == ["trained on WikiText", "trained on questions"]
    plots.plt.close("all")
