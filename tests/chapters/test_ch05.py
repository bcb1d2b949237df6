"""Chapter 5: what it measures on a tiny model, and that its tables and sentences turn with the numbers."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from tests.fakes import perplexity
from thesislib.chapters import ch05_comparisons as comparisons
from thesislib.chapters import ch05_figures as plots
from thesislib.chapters import ch05_quantisation as quantisation
from thesislib.chapters import ch05_runs as gptq
from thesislib.chapters import ch05_tables as tables
from thesislib.chapters import record_file, recorded
from thesislib.chapters.ch05_runs import BEST, CLOSED, HELD_OUT, INGREDIENTS, OPEN, PLAIN, PPL, QuantChapter
from thesislib.chapters.pareto import AS_IT_CAME
from thesislib.errors import BadInput
from thesislib.evaluate.stats import by_verdict
from thesislib.experiment import again
from thesislib.formats.load import save_checkpoint
from thesislib.model.grid import Grid, round_to_nearest
from thesislib.records.store import Store
from thesislib.sources import corpus


@pytest.fixture(scope="module")
def small(tiny, tiny_data, tmp_path_factory):
    """Parameters, with a cache of their own and the folder's text for held-out text too."""
    patch = pytest.MonkeyPatch()
    patch.setenv("THESISLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
    text = corpus.evaluation_text
    patch.setattr(corpus, "evaluation_text", lambda data: text(tiny_data))
    folder = save_checkpoint(
        tiny(layers=3, hidden_size=64, intermediate_size=64, num_attention_heads=8),
        tmp_path_factory.mktemp("subject") / "tiny",
    )
    settings = {
        "length": 64,
        "calibration": 3,
        "rank": 4,
        "windows": 4,
        "held_out": 3,
        "questions": 2,
        "passages": 2,
        "tokens": 4,
        "group": 32,
    }
    yield QuantChapter(subject=str(folder), data=tiny_data, dtype="float32", bits=[3], **settings)
    patch.undo()


@pytest.fixture(scope="module")
def measured(small):
    found = []
    results = gptq.measure(
        [*gptq.main_models(small), *gptq.pruned_models(small, ["W2:4"]), *gptq.eora_ranks(small, tried=(2, 8))],
        small,
        keep=found.append,
    )
    return results, found


def test_every_model_is_made_and_measured_once(small, measured):
    results, found = measured
    assert (
        len(found)
        == len(results)
        == len({(m.provenance["made"]["recipe"], m.provenance["chapter"]["what"]) for m in found})
    )
    table = tables.main_table(results, gptq.main_models(small))
    names = ["dense", *(f"{way} 3-bit{more}" for way in ("rounding", "GPTQ") for more in ("", " + EoRA"))]
    assert list(table.index) == names and (table["x dense"][1:] != "").all() and table["x dense"]["dense"] == ""
    assert list(table["settings"]) == ["", *["asymmetric, clipped"] * 4]
    assert list(table["calibration"]) == ["", "", *["web, 3 x 64"] * 3] and (table["WikiText-2"] != "").all()
    assert comparisons.agrees(results, results, small)  # nothing else is recorded of these bits
    without, with_eora = (
        results[c.key, PPL].provenance["made"]["bytes"]["bytes_on_disk"] for c in gptq.main_models(small)[-2:]
    )
    assert without < with_eora
    assert list(tables.pruned_table(results, small).index) == [
        "W2:4",
        "W2:4, rounding",
        "W2:4, GPTQ",
        "W2:4, GPTQ + EoRA",
    ]
    ranks = tables.rank_table(results, small)
    assert list(ranks["MB of factors"]) == sorted(ranks["MB of factors"]) and ranks.loc["0", "against rank 0"] == ""
    errors = gptq.layers(small, gptq.main_models(small)[-2:], windows=3)
    means = tables.layer_table(errors)
    assert (means["GPTQ 3-bit asymmetric + EoRA"] < means["GPTQ 3-bit asymmetric"]).all() and len(means) == 7
    assert gptq.measure(gptq.main_models(small), small, results, pytest.fail) == results  # nothing is done twice


def test_records_come_back_and_can_be_made_again(small, measured, tiny_data, tmp_path):
    results, found = measured
    store = Store(tmp_path / "r.jsonl")
    for m in found:
        store.append(m)
    assert gptq.from_measurements(store.rows().values()) == results
    verdict = again(results[gptq.main_models(small)[-1].key, CLOSED], small.subject, tiny_data)
    assert verdict.same_bits and verdict.same_subject


def test_ingredients_change_one_thing_each():
    p = gptq.recorded_parameters()
    plain = dataclasses.asdict(gptq.one_change(p)[1].stages[0])
    for c in gptq.one_change(p)[2:-1]:
        changed = {k for k, v in dataclasses.asdict(c.stages[0]).items() if v != plain[k]} - {"windows"}
        assert changed == {INGREDIENTS[c.name.split(":")[0]][0]}, c.name
    (_, *less), best = gptq.leave_one_out(p), dataclasses.asdict(gptq.leave_one_out(p)[0].stages[0])
    assert {k: best[k] for k in BEST} == BEST
    assert [c.name for c in less if c.name.startswith("without")] == [
        f"without {t}" for t, (k, _) in INGREDIENTS.items() if k in PLAIN and PLAIN[k] != BEST[k]
    ]
    assert len(less) == len(INGREDIENTS) - 1  # groups have a table of their own
    for c in less:
        assert len({k for k, v in dataclasses.asdict(c.stages[0]).items() if v != best[k]} - {"windows"}) == 1, c.name
    long = next(c for c in gptq.one_change(p) if "window length" in c.name).stages[0]
    assert long.windows * long.length == p.calibration * p.length  # as many tokens


def test_what_stands_beside_the_table_on_the_test():
    p = gptq.recorded_parameters()
    configs = {c.name: c for c in gptq.on_the_test(p)}
    assert len({c.key for c in configs.values()}) == len(configs)  # no model twice
    assert {c.bits for c in configs.values()} == {None, 3, 4, 5, 6}
    assert all(c.measured == (PPL, HELD_OUT) for c in configs.values())
    planned = {(c.key, task) for c in gptq.recorded_configurations(p) for task in c.measured}
    assert {(c.key, task) for c in configs.values() if c.stages for task in c.measured} <= planned
    papers = [c.stages[0] for name, c in configs.items() if "the paper's calibration" in name]
    assert [(s.windows, s.length) for s in papers] == [(128, 2048)] * 3
    theirs = configs["GPTQ 4-bit symmetric, GPTQModel's settings"].stages[0]
    assert (theirs.act_order, theirs.damping, theirs.clip, theirs.weighting) == ("groups", 0.05, "none", "equal")
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    fifth = sum(o * i + o * i / p.group for o, i in shapes) / 8  # a bit more of each code and each zero-point, in bytes
    assert fifth // sum(2 * (o + i) for o, i in shapes) == gptq.EQUAL_RANK  # a rank is a float16 for each in and output


# ---------------------------------------------------------------- sentences


def test_gptqmodel_stands_beside_rounding():
    names = ("dense", "rounding", "GPTQModel", "thesislib, the same settings", "thesislib, from left to right")
    rows = [{"model": name, "threads": 1, "perplexity": 20.0 + i} for i, name in enumerate(names)]
    found = {"GPTQModel": "1.2", "rows": [*rows, {**rows[-1], "threads": 2, "perplexity": 25.5}]}
    said = quantisation.gptqmodel_sentence(found)
    assert said.startswith("GPTQModel 1.2 ") and "has 22.00 on held-out text" in said
    assert "rounding has 21.00 and the dense model 20.00" in said and "has 23.00 with the same settings" in said
    assert "from left to right it has 24.00 and 25.50, more than rounding" in said
    assert "by up to 6.2%" in said  # 25.5 / 24
    alone = quantisation.gptqmodel_sentence({**found, "rows": [*rows[:4], {**rows[4], "perplexity": 20.5}]})
    assert "by up to" not in alone and "more than rounding" not in alone


def loss(per_token, seed=0):
    return perplexity(per_token, seed, texts=0, provenance={"made": {"bytes": {"bytes_on_disk": 10**6}}})


def test_the_textbook_recipe_turns_with_the_numbers():
    p = gptq.recorded_parameters()
    configs = gptq.one_change(p)
    results = {(c.key, HELD_OUT): loss(4.0, i) for i, c in enumerate(configs)}
    results[configs[0].key, HELD_OUT] = loss(3.7, 90)
    results[configs[3].key, HELD_OUT] = loss(3.5, 91)
    results[configs[4].key, HELD_OUT] = loss(5.0, 92)
    found = comparisons.textbook(results, p)
    assert found.plain.verdict() == "worse" and found.plain.difference == pytest.approx(0.3, abs=0.01)
    assert found.best == "token weighting: first_16" and not found.zero_point.told
    assert by_verdict(found.changes)["better"] == ["token weighting: first_16"]
    assert by_verdict(found.changes)["worse"] == ["token weighting: skip_1"]
    assert all(table(results, p).empty for table in (tables.pruned_table, tables.rank_table, tables.kinds_table))
    table = tables.ingredient_table(results, configs)
    assert (
        table.loc["token weighting: first_16", ""] == "better" and table.loc["act-order: static", ""] == "within noise"
    )
    for nats, verdict in ((4.5, "better"), (4.0, "not told apart")):
        results[configs[0].key, HELD_OUT] = loss(nats, 90)
        assert comparisons.textbook(results, p).plain.verdict() == verdict


def test_methods_are_compared_on_their_own_grid():
    p = gptq.recorded_parameters()
    configs = gptq.main_models(p)
    results = {(c.key, PPL): loss(3.4 - 0.05 * i, i) for i, c in enumerate(configs)}
    _, rounding_4, _, gptq_4, both_4, _, rounding_3, *_ = configs
    tests = comparisons.method_comparisons(results, configs)
    assert tests[comparisons.against(gptq_4, rounding_4)].verdict() == "better"
    assert tests[f"{rounding_3.name} against without"].verdict() == "better"
    results[both_4.key, PPL] = loss(3.9, 5)
    assert comparisons.method_comparisons(results, configs)[f"{both_4.name} against without"].verdict() == "worse"


def test_starts_are_compared_at_each_ones_better_rate():
    p = gptq.recorded_parameters()
    configs = gptq.lora_starts(p)
    results = {(c.key, HELD_OUT): loss(3.5 if c.corrected else 3.6, i) for i, c in enumerate(configs)}
    assert by_verdict(comparisons.starts(results, p).tests)["better"] == [0, 1, 2]
    slow = [c for c in configs if c.rate == min(gptq.RATES)]
    assert len(slow) == 6 and len(tables.starts_table(results, p)) == 4
    faster = {**results, **{(c.key, HELD_OUT): loss(3.3, i) for i, c in enumerate(slow) if not c.corrected}}
    both = comparisons.starts(faster, p)
    assert both.usual.rate == 2e-4 and both.eora.rate == 2e-3 and both.usual.before is None
    assert by_verdict(both.tests)["worse"] == [0, 1, 2]
    results[configs[2].key, HELD_OUT] = loss(3.0)  # the second seed, which does not choose the rate
    assert by_verdict(comparisons.starts(results, p).tests) == {"better": [0, 2], "worse": [1], "not told apart": []}
    assert comparisons.starts({}, p) is None


def told(c, per_token, seed=0):
    """A loss of a configuration's subject, with what its stages would have reported."""
    made = {
        "bytes": {"bytes_on_disk": 10**6 * (1 + len(c.stages))},
        "stages": [{type(s).__name__.lower(): {}} for s in c.stages],
    }
    m = loss(per_token, seed)
    return dataclasses.replace(
        m, provenance={"made": {**made, "label": "", "reports": [{"bytes": 2 * 10**6} for _ in c.stages]}}
    )


def test_every_cell_says_what_its_numbers_say():
    p, q = gptq.recorded_parameters(), gptq.ablation_parameters()
    cells = [
        gptq.one_projection(q),
        gptq.bits_by_group(q),
        gptq.calibrations(q),
        gptq.eora_choices(q),
        gptq.pruned_models(q),
        gptq.eora_ranks(q),
    ]
    results = {
        (c.key, HELD_OUT): told(c, 4.0 - 0.1 * c.name.startswith("GPTQ"), i)
        for cell in cells
        for i, c in enumerate(cell)
    }
    worse = next(c for c in gptq.one_projection(q) if c.name == "v_proj, GPTQ")
    better = next(c for c in gptq.one_projection(q) if c.name == "k_proj, GPTQ")
    results |= {(worse.key, HELD_OUT): told(worse, 4.2), (better.key, HELD_OUT): told(better, 3.8)}
    tests = by_verdict(comparisons.by_projection(results, q))
    assert (tests["worse"], tests["better"]) == (["v_proj"], ["k_proj"]) and "q_proj" in tests["not told apart"]
    results[worse.key, HELD_OUT] = told(worse, 3.8)
    assert by_verdict(comparisons.by_projection(results, q))["better"] == ["k_proj", "v_proj"]

    table = tables.shapes_table(results, q)
    assert set(table.index) == {(str(b), str(g)) for b, groups in gptq.SHAPES.items() for g in groups}
    assert (
        table.loc[("8", "64"), "GPTQ / rounding"].endswith("better than")
        and table.loc[("4", "row"), "MB on disk"] == "2.0"
    )
    gone = next(c for c in gptq.bits_by_group(q) if c.name == "GPTQ, 2 bits, group 64")
    missing = {k: m for k, m in results.items() if k != (gone.key, HELD_OUT)}
    assert tables.shapes_table(missing, q).loc[("2", "64"), "GPTQ"] == "not run"

    seeds, amounts = comparisons.calibration_noise(results, q)
    assert len(seeds) == 3 and list(amounts) == ["4 windows", "32 windows"]
    compensation = tables.compensation_table(results, q)
    assert compensation.loc["rounding", "against without"] == "" and compensation.loc["rounding + EoRA", "MB"] == "2.0"
    assert not comparisons.pruned_comparisons(results, q)["W2:4: GPTQ against rounding"].told

    few, many = gptq.main_models(p)[-1], gptq.main_models(p)[3]
    assert (few.name, many.name) == ("GPTQ 3-bit asymmetric + EoRA", "GPTQ 4-bit asymmetric")
    results |= {(few.key, PPL): told(few, np.log(40)), (many.key, PPL): told(many, np.log(36))}
    assert [m.disk_bytes for m in comparisons.few_and_many_bits(results, p)] == [3e6, 2e6]
    assert not comparisons.more_comparisons(results, p)
    first, second = (c for c in gptq.more_calibration(p, 3))
    results |= {
        (first.key, PPL): told(first, np.log(47)),
        (gptq.main_models(p)[-2].key, PPL): told(first, np.log(50), 5),
        (second.key, PPL): told(second, np.log(39)),
    }
    more = comparisons.more_comparisons(results, p)
    assert {name: list(tests) for name, tests in more.items()} == {"GPTQ 3-bit": [PPL], "GPTQ 3-bit + EoRA": [PPL]}
    assert more["GPTQ 3-bit"][PPL].difference == pytest.approx(np.log(47 / 50), abs=0.01)
    dense = loss(3.0, 7)
    sizes = tables.sizes({**results, (None, HELD_OUT): dense}, q)
    assert set(sizes["series"]) == {"rounding", "GPTQ", "GPTQ 3-bit + EoRA", "GPTQ 4-bit + EoRA"}
    assert list(sizes.loc[sizes["series"] == "GPTQ 3-bit + EoRA", "label"]) == ["", "rank 8", "rank 32", "rank 128"]
    files = pd.DataFrame({"label": [AS_IT_CAME, "llama.cpp Q4_0"], "MB": [98.0, 92.0]})
    files = files.assign(
        **{f"{PPL}{end}": [20.0 * up, 40.0 * up] for end, up in (("", 1), (" low", 0.9), (" high", 1.1))}
    )
    files = tables.files(files, dense)
    assert files["x dense"].tolist() == pytest.approx([20 / dense.value, 40 / dense.value])
    for most, there in ((4, ["Q4_1 file, 98 MB", "Q4_0"]), (1.5, ["Q4_1 file, 98 MB"])):
        axis = plots.bytes_chart(sizes, files, most).axes[0]
        drawn = [len(line.get_xdata()) for line in axis.lines if "file" in str(line.get_label())]
        assert sum(drawn) == len(there)
        assert [t.get_text() for t in axis.texts if t.get_text().startswith("Q")] == there
    plots.plt.close("all")


def test_the_sinks_share_under_each_weighting():
    q = gptq.ablation_parameters()
    changed = {c.stages[0].weighting: c for c in gptq.one_change(q) if c.varied == "token weighting"}
    results = {(gptq.one_change(q)[1].key, HELD_OUT): loss(4.0)}
    results |= {(c.key, HELD_OUT): loss(4.0 + 0.2 * (w == "skip_1"), 0) for w, c in changed.items()}
    sinks = {"length": 100, "shares": {"blocks.0.v_proj": 0.002, "blocks.1.v_proj": 0.002, "blocks.1.down_proj": 0.5}}
    table = tables.sink_table(sinks, results, q)
    assert list(table.index) == ["v_proj, median block", "down_proj of block 1", "held-out perplexity"]
    assert table["as it comes"].tolist() == ["0.20%", "50.00%", "x 1"]
    assert table["every token at unit norm"].tolist() == ["1.00%", "1.00%", "x 1.000"]
    assert table["first token x 16"].tolist() == ["3.11%", "94.12%", "x 1.000"]  # 16 of 514 and of 17
    assert table["first token left out"].tolist() == ["0.00%", "0.00%", "x 1.221"]  # e^0.2


def test_the_first_figure_has_every_method_once():
    table = tables.methods(recorded("05_quantisation"), gptq.ablation_parameters())
    assert len(set(table["method"])) == 10 and len(table) == 11  # the same settings on one thread and on two
    assert table["low"].isna().sum() == 3 and (table["x dense"] > 1).all()
    axis = plots.methods_chart(table).axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == list(dict.fromkeys(table["method"]))
    plots.plt.close("all")


def test_what_is_measured_directly(small, tiny):
    shares = gptq.sink_shares(small, windows=3)
    assert len(shares) == 21 and all(0 < v < 0.5 for v in shares.values())  # one token of 64 in a random model
    subject = tiny(hidden_size=64)
    assert comparisons.own_grid(subject).lost > 0
    for b in (0, 1):
        for linear in subject.linears(b).values():
            linear.weight.data = round_to_nearest(linear.weight, Grid(4, 32, "minimum")).weight
    found = comparisons.own_grid(subject)
    assert (found.linears, found.lost) == (14, 0) and 0.2 < found.steps < 0.3


def test_thesis_figures_stand_beside():
    table = tables.thesis_table()
    assert (
        table.loc["W1:8+W", "perplexity, 4-bit + EoRA"] == 16.68
        and table.loc["W1:8+W", "perplexity, recovered"] == 15.7
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": [9]}, "9 bits"),
        ({"calibration": 0}, "calibration"),
        ({"dtype": "int8"}, "'int8'"),
        ({"group": 1}, "group '1'"),
    ],
)
def test_what_the_chapter_refuses(settings, message):
    with pytest.raises(BadInput, match=message):
        QuantChapter(**settings)
    assert OPEN in QuantChapter().protocols()


# ---------------------------------------------------------------- fields and names


def test_fields_say_what_names_say():
    p = gptq.recorded_parameters()
    for c in gptq.main_models(p):
        assert c.name == (
            "dense" if not c.method else f"{c.method} {c.bits}-bit {c.grid}{' + EoRA' if c.corrected else ''}"
        )
    assert [c.name for c in gptq.lora_starts(p)] == [
        f"{'EoRA' if c.corrected else 'usual'}, rate {c.rate:g}, seed {c.seed}" for c in gptq.lora_starts(p)
    ]
    assert [c.name for c in gptq.eora_ranks(p)] == [str(c.rank) for c in gptq.eora_ranks(p)]
    assert [c.name for c in gptq.bits_by_group(p)] == [
        f"{c.method}, {c.bits} bits, group {c.group}" for c in gptq.bits_by_group(p)
    ]
    assert all(
        c.name.startswith(c.varied) and (c.rate, c.seed) == (None, None)
        for c in (*gptq.one_projection(p), *gptq.pruned_models(p), *gptq.one_change(p))
    )
    with pytest.raises(StopIteration):
        gptq.pick(gptq.main_models(p), bits=5)


def test_names_are_for_readers_only(monkeypatch):
    """Whatever models are called, the same numbers are compared."""
    record, p, q = recorded("05_quantisation"), gptq.recorded_parameters(), gptq.ablation_parameters()
    said = [
        lambda: quantisation.kinds_sentence(record, q),
        lambda: tables.worth_table(record, q).to_csv(index=False),
        lambda: quantisation.bytes_sentence(record, p),
        lambda: quantisation.more_sentence(record, p),
        lambda: quantisation.starts_sentence(record, q),
        lambda: quantisation.pruned_sentence(record, q),
        lambda: tables.shapes_table(record, q).to_csv(),
        lambda: tables.starts_table(record, q).to_csv(),
        lambda: tables.sizes(record, q).to_csv(),
        lambda: tables.methods(record, q).to_csv(),
        lambda: tables.sink_table(comparisons.read_sinks(record_file("05_quantisation")), record, q).to_csv(),
        lambda: tables.compensation_table(record, q).to_csv(index=False),
        lambda: quantisation.headline(record),
        lambda: sorted(c.p for c in comparisons.method_comparisons(record, gptq.main_models(p), HELD_OUT).values()),
    ]
    before = [say() for say in said]
    for name in (
        "eora_choices",
        "one_projection",
        "more_calibration",
        "pruned_models",
        "eora_ranks",
        "bits_by_group",
        "lora_starts",
        "main_models",
        "leave_one_out",
    ):
        make = getattr(gptq, name)
        for module in (m for m in (comparisons, tables, quantisation) if hasattr(m, name)):
            monkeypatch.setattr(
                module,
                name,
                lambda *given, make=make, **more: [
                    dataclasses.replace(c, name=f"model {i}") for i, c in enumerate(make(*given, **more))
                ],
            )
    assert [say() for say in said] == before
