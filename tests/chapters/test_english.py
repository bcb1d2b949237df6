"""Every sentence of the book from the committed records, to the letter: the one test of the English.

After a sentence or a record changed: `python -m tests.chapters.test_english` writes `english.md` anew.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import pandas as pd

import thesislib.chapters as study
from thesislib.chapters import ch00_measures as measures
from thesislib.chapters import ch01_franken as franken
from thesislib.chapters import ch02_depth as depth
from thesislib.chapters import ch02_stability as choice
from thesislib.chapters import ch03_width as width
from thesislib.chapters import ch04_recovery as recovery
from thesislib.chapters import ch04_runs as lora
from thesislib.chapters import ch05_comparisons as comparisons
from thesislib.chapters import ch05_quantisation as quantisation
from thesislib.chapters import ch05_runs as gptq
from thesislib.chapters import ch06_grid as grid
from thesislib.chapters import ch06_runs as grid_runs
from thesislib.chapters import ch07_device as device
from thesislib.chapters import (
    ch08_cost,
    ch08_healing,
    ch08_over_training,
    ch08_pairs,
    ch08_scale,
    ch09_arithmetic,
    ch09_claims,
    ch09_sentences,
    chapters,
    pareto,
    record_file,
    recorded,
)
from thesislib.chapters import ch08_relevance as blocks
from thesislib.chapters import ch09_low_rank as low
from thesislib.chapters.chapter import DEPTH_WINDOWS
from thesislib.records import measurement
from thesislib.sources.choices.choice_set import PARTS


class Bare(NamedTuple):
    """A measurement of which only the value counts."""

    value: float


GOLDEN = Path(__file__).with_name("english.md")


def english() -> dict[str, str]:
    """{where: sentence} of all that the book says of its records."""
    record = {name: recorded(name) for name in chapters()}
    r0, r1, r2, r3, r4, r5, r6, r7, r8, r9 = record.values()
    p3, p4, p5, q5 = (
        width.recorded_parameters(),
        lora.recorded_parameters(),
        gptq.recorded_parameters(),
        gptq.ablation_parameters(),
    )
    five, file = record_file("05_quantisation"), record_file("06_evaluation")
    exact, rounded = (grid_runs.read_size(file, grid_runs.PRECISION, dtype) for dtype in ("float32", "bfloat16"))
    sentences = {f"{name[:2]}.headline": chapter.headline(record[name]) for name, chapter in chapters().items()}
    sentences |= {
        f"{name[:2]}.{part}": getattr(chapter.opening, part)(record[name])
        for name, chapter in chapters().items()
        if chapter.opening
        for part in ("answer", "short", "protocol")
    }
    sentences |= {
        "00.cost": measurement.cost(record["00_measures"]),
        **{
            f"00.{said.__name__}": said(r0)
            for said in (
                measures.choices_caption,
                measures.prompt_sentence,
                measures.window_sentence,
                measures.choice_sentence,
                measures.units_sentence,
                measures.items_sentence,
                measures.length_sentence,
            )
        },
        **{
            f"01.{said.__name__}": said(r1)
            for said in (
                franken.plans_caption,
                franken.singles_caption,
                franken.neighbours_sentence,
                franken.items_sentence,
                franken.memory_sentence,
            )
        },
        **{f"01.claim {i}": f"{c.verdict}: {c.said} {c.shown}" for i, c in enumerate(franken.claims(r1), 1)},
        "02.chosen_elsewhere": depth.chosen_elsewhere(r2),
        "02.one_shot_sentence": depth.one_shot_sentence(r2),
        "02.scorings_sentence": depth.scorings_sentence(r2),
        "02.adding_up_sentence": depth.adding_up_sentence(r2),
        "02.chance_sentence": depth.chance_sentence(r2),
        "02.single_weights_sentence": depth.single_weights_sentence(r2),
        "02.ranks_caption": depth.ranks_caption(r2.scores),
        "02.stability": " ".join(choice.sentences(choice.read_recorded(), DEPTH_WINDOWS)),
        **{f"02.verdict at {k}": depth.verdict(r2, k) for k in (2, 4, 8)},
        "03.places_sentence": width.places_sentence(),
        "03.seeds_sentence": width.seeds_sentence(r3, p3),
        "03.equal_bytes_sentence": width.equal_bytes_sentence(r3, p3),
        "03.halves_sentence": width.halves_sentence(r3, p3),
        "03.magnitude_sentence": width.magnitude_sentence(r3, p3),
        "03.calibration_sentence": width.calibration_sentence(r3, p3),
        "03.weighting_sentence": width.weighting_sentence(r3, p3),
        "04.cost_sentence": recovery.cost_sentence(r4),
        "04.control_sentence": recovery.control_sentence(r4),
        "04.counted_sentence": recovery.counted_sentence(r4),
        "04.converged_sentence": recovery.converged_sentence(r4),
        "04.answer": recovery.answer(r4),
        "04.short": recovery.short(r4),
        "04.protocol": recovery.protocol(r4),
        "04.control_sentence, questions": recovery.control_sentence(r4, "trivia"),
        "04.texts_sentence": recovery.texts_sentence(r4.pool, recovery.trained_models(r4)),
        "04.texts_sentence, open book": recovery.texts_sentence(r4.pool, recovery.trained_models(r4), lora.OPEN),
        "04.other_measure_sentence": recovery.other_measure_sentence(r4),
        "04.order_sentence": recovery.order_sentence(r4),
        "04.merge_sentence": recovery.merge_sentence(r4),
        "04.seeds_sentence": recovery.seeds_sentence(r4),
        "04.tokens_sentence": recovery.tokens_sentence(r4, p4),
        "04.rates_sentence": recovery.rates_sentence(r4, p4),
        "05.cost_sentence": quantisation.cost_sentence(r5),
        "05.more_sentence": quantisation.more_sentence(r5, p5),
        "05.methods_caption": quantisation.methods_caption(r5, q5),
        "05.eora_sentence": quantisation.eora_sentence(r5, p5),
        "05.bytes_sentence": quantisation.bytes_sentence(r5, p5),
        "05.textbook_sentence": quantisation.textbook_sentence(r5, q5),
        "05.gptqmodel_sentence": quantisation.gptqmodel_sentence(comparisons.read_gptqmodel()),
        "05.calibration_sentence": quantisation.calibration_sentence(r5, q5),
        "05.kinds_sentence": quantisation.kinds_sentence(r5, q5),
        "05.layer_sentence": quantisation.layer_sentence(comparisons.read_layers(five), r5, q5),
        "05.sink_sentence": quantisation.sink_sentence(comparisons.read_sinks(five)["shares"], p5.length),
        "05.pruned_sentence": quantisation.pruned_sentence(r5, q5),
        "05.starts_sentence": quantisation.starts_sentence(r5, q5),
        "05.answers_sentence": quantisation.answers_sentence(r5),
        "05.rank_in_bits": quantisation.rank_in_bits(r5, p5),
        "05.groups_or_rank": quantisation.groups_or_rank(r5, q5),
        "06.cost_sentence": grid.cost_sentence(r6.full),
        "06.coverage_sentence": grid.coverage_sentence(r6.sample),
        "06.interaction_sentence": grid.interaction_sentence(r6.on_one(grid.PRUNED)),
        "06.protocol_sentence": grid.protocol_sentence(r6.full),
        "06.control_sentence": grid.control_sentence(grid.with_control(r6)),
        "06.width_sentence": grid.width_sentence(r6.full),
        "06.usable_sentence": pareto.usable_sentence(r6.for_fronts),
        "06.file_sentence": pareto.file_sentence(r6.for_fronts),
        "06.equal_bytes_sentence": pareto.equal_bytes_sentence(r6.for_fronts),
        "06.precision_sentence": grid.precision_sentence(exact, rounded),
        "06.full_sentence": grid.full_sentence(r6.full),
        "07.zeros_sentence": device.zeros_sentence(r7),
        "07.same_sentence": device.same_sentence(r7),
        "07.prediction_sentence": device.prediction_sentence(r7),
    }
    projected = pd.DataFrame(
        [
            ("k1", "dense", "weights", 0.01, 0.02),
            ("pi4", "dense", "arithmetic", None, None),
            ("gap9", "dense", "", None, None),
        ],
        columns=["device", "model", "binds", "joules low", "joules high"],
    )
    return sentences | {
        "05.grid_sentence": quantisation.grid_sentence(comparisons.OwnGrid(14, 0.0, 0.25)),
        "07.binding_sentence": device.binding_sentence(projected),
        "07.energy_sentence": device.energy_sentence(projected),
        **{
            f"08.{said.__name__}": said(r8)
            for said in (
                blocks.block_sentence,
                blocks.agreement_sentence,
                blocks.ends_sentence,
                blocks.misranked_sentence,
                blocks.regret_sentence,
                blocks.dependence_sentence,
                blocks.settling_sentence,
                blocks.curse_sentence,
                blocks.own_sentence,
                blocks.left_out_sentence,
                ch08_cost.cost_sentence,
            )
        },
        "08.sets_sentence": blocks.sets_sentence(r8, 4),
        "08.this_run_sentence": blocks.this_run_sentence(r8, blocks.Relevance(), r8.outcomes["arc_easy", PARTS[0]]),
        **{
            f"08.{name}": " ".join(said)
            for name, said in (
                ("scale_sentences", ch08_scale.sentences(blocks.scale(r8))),
                ("_search_sentence", ch08_pairs.search_sentences(blocks.pairs(r8))),
                ("adding_up_sentences", ch08_pairs.additivity_sentences(blocks.pairs(r8))),
                ("training_sentences", ch08_over_training.sentences(blocks.training(r8))),
            )
        },
        **{
            f"08.healing_sentence, {k} blocks": ch08_healing.healing_sentence(r8.healed, k)
            for k in ch08_healing.counts(r8.healed)
        },
        **{
            f"09.{said.__name__}": said(r9) for name, said in vars(ch09_sentences).items() if name.endswith("_sentence")
        },
        **{f"09.{said.__name__}": said() for name, said in vars(ch09_arithmetic).items() if name.endswith("_sentence")},
        "09.this_run_sentence": " / ".join(
            low.this_run_sentence({n: Bare(x) for n, x in some.items()})
            for some in (
                {"svd": 9.0, "svd_llm": 2.0, "pairs of quiet MLPs": 3.0, "path in closed form": 2.5},
                {"svd": 1.0, "svd_llm": 2.0, "pairs of quiet MLPs": 3.0, "path in closed form": 2.5},
            )
        ),
        **{f"09.claim {i}": f"{c.says} {c.word}: {c.found}" for i, c in enumerate(ch09_claims.claims(r9))},
        "08.luck_sentence": blocks.luck_sentence(),
        "08.sharing_sentence": ch08_cost.sharing_sentence(),
        **{f"08.claim {i}": f"{c.says} {c.word}: {c.found}" for i, c in enumerate(blocks.claims(r8))},
        "07.energy_sentence, none known": device.energy_sentence(projected[1:]),
        "04.seeds_sentence, one": recovery.seeds_sentence({key: m for key, m in r4.items() if not key[0].seed}),
        **{
            f"{name[:2]}.{sentence.__name__}, not run": sentence(*given)
            for name, sentence, *given in (
                ("05", quantisation.bytes_sentence, {}, p5),
                ("05", quantisation.calibration_sentence, {}, q5),
                ("05", quantisation.kinds_sentence, {}, q5),
                ("05", quantisation.more_sentence, {}, p5),
                ("05", quantisation.pruned_sentence, {}, q5),
                ("05", quantisation.starts_sentence, {}, q5),
                ("06", grid.interaction_sentence, {}),
                ("06", grid.full_sentence, {}),
                ("06", pareto.equal_bytes_sentence, {key: m for key, m in r6.sample.items() if "Q" not in key[0]}),
                ("07", device.prediction_sentence, {}),
                ("07", device.same_sentence, {}),
                ("07", device.zeros_sentence, {}),
            )
        },
    }


def text() -> str:
    """The golden file."""
    return "".join(f"## {where}\n\n{sentence}\n\n" for where, sentence in english().items()).rstrip() + "\n"


def test_every_sentence_is_there():
    """Whatever is called so in a chapter's modules."""
    modules = [m.name for m in iter_modules(study.__path__) if m.name != "__main__"]
    written = {
        name for m in modules for name in vars(import_module(f"{study.__name__}.{m}")) if name.endswith("_sentence")
    }
    golden = GOLDEN.read_text("utf8")
    assert written and all(f".{name}" in golden for name in written)


def test_every_sentence_is_the_golden_one():
    assert text() == GOLDEN.read_text("utf8"), "meant? `python -m tests.chapters.test_english` writes the file anew"


if __name__ == "__main__":
    GOLDEN.write_text(text(), "utf8")
