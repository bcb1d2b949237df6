"""Labels: one writer, one reader."""

import itertools
import re

import pytest

from thesislib.compress.calr import FITS, Calr
from thesislib.compress.depth import Depth
from thesislib.compress.eora import Eora
from thesislib.compress.gptq import Gptq, Rtn
from thesislib.compress.hqq import Hqq
from thesislib.compress.laco import FORMS, Laco
from thesislib.compress.lora.sequences import TEXTS
from thesislib.compress.lora.stage import MERGES, Lora
from thesislib.compress.lowrank import METHODS, LowRankStage
from thesislib.compress.slicing import Slice
from thesislib.compress.stage import FAMILIES, STAGES
from thesislib.compress.streamline import Streamline
from thesislib.compress.tune import Tune
from thesislib.compress.width import Width
from thesislib.errors import BadInput
from thesislib.model.grid import BITS
from thesislib.pipeline.label import DENSE, LETTERS, Label, stage_class
from thesislib.pipeline.recipe import parse_label

WRITTEN = [
    *(Depth(remove=n, part=part) for n in (1, 24) for part in ("block", "attention", "mlp")),
    Depth(blocks=[3, 4]),
    *(Width(n, m) for n, m in ((1, 8), (12, 16))),
    *(Width(ratio=r) for r in (0.5, 0.25, 0.125, 1 / 3, 1e-6)),
    Width(ratios={"q_proj": 0.5}),
    *(Streamline(remove=n) for n in (1, 24)),
    *(Laco(remove=n, form=form) for n in (1, 24) for form in FORMS),
    *(Slice(keep=keep) for keep in (0.75, 1, 1 / 3)),
    *(LowRankStage(keep=0.8, method=m, feed="both" if m == "saes" else "original") for m in METHODS),
    LowRankStage(rank=64),
    *(Calr(rank=4, fit=fit) for fit in FITS),
    *(Tune(blocks=n, head=head) for n, head in ((3, False), (16, True), (0, True))),
    *(Lora(text=text, merge=merge) for text in TEXTS for merge in MERGES),
    *(kind(bits=b) for kind in (Rtn, Gptq, Hqq) for b in BITS),
    Eora(),
    Eora(rank=7),
]
WRITTEN += [kind() for kind in STAGES.values() if kind not in {type(stage) for stage in WRITTEN}]


@pytest.mark.parametrize("stage", WRITTEN, ids=lambda s: s.label)
def test_every_label_that_a_stage_writes_is_read_as_that_stage(stage):
    assert stage_class(stage.label) is type(stage) and [
        k for k in STAGES.values() if re.fullmatch(k.pattern, stage.label)
    ] == [type(stage)]
    if stage.label != "W~":  # which does not say the ratios
        assert parse_label(stage.label).label == stage.label


@pytest.mark.parametrize("stages", itertools.permutations([WRITTEN[0], Width(1, 8), Lora(), Gptq(), Eora()], 3))
def test_a_label_reads_what_it_writes(stages):
    text = "+".join(s.label for s in stages)
    label = Label.parse(text)
    assert str(label) == text and [k.word for k in label.classes] == [s.word for s in stages]
    assert label.family == max((s.family for s in stages), key=FAMILIES.index)
    assert label.depth == sum(isinstance(s, Depth) for s in stages) and bool(label.width) == any(
        isinstance(s, Width) for s in stages
    )
    assert label.training == ("W",) * any(isinstance(s, Lora) for s in stages) and label.corrected == any(
        isinstance(s, Eora) for s in stages
    )
    assert label.bits == (4 if any(isinstance(s, Gptq) for s in stages) else None) and str(label.before()) == "+".join(
        s.label for s in stages[:2]
    )


def test_width_and_training_on_wikitext_are_told_apart():
    label = Label.parse("D2+W1:8+W-masked+R3")
    assert (label.depth, label.width, label.training, label.bits, label.family) == (2, ("1:8",), ("W",), 3, "quantised")
    assert (
        str(label.pruned) == "D2+W1:8"
        and Label.parse("D2+W-masked").family == "trained"
        and Label.parse("DA2+W25%").depth == 0
    )


def test_what_other_stages_count_for():
    assert [Label.parse(t).depth for t in ("M4", "M~", "S4", "D2S", "D2+M4P+S1", "N75%+FT3+Lr64", "DM2")] == [
        4, 0, 4, 2, 7, 0, 0,
    ]  # fmt: skip
    trained = {"FT3H": "W", "S4": "W", "Lr8+CALR32": "W", "Lr8+CALR32-hidden+T-masked": "WT", "Lr8+CALR0": "W"}
    untrained = dict.fromkeys(("Lr8+CALR32-closed", "Lr8+CALR4-none", "M4+N75%", "L80%-asvd+Q+E"), "")
    assert {label: "".join(Label.parse(label).training) for label in trained | untrained} == trained | untrained
    assert {*LETTERS} == {*TEXTS} and {Lora(text=text).label for text in TEXTS} == {*LETTERS.values()}


def test_the_dense_model():
    dense = Label.parse(DENSE)
    assert dense.parts == () and str(dense) == DENSE and dense.family == "pruned" and dense.bits is None
    with pytest.raises(BadInput, match="'dense' is the model as it was"):
        dense.before()
    with pytest.raises(BadInput, match="part 'X' is not understood"):
        Label.parse("D2+X")
