"""A configuration's label as the study's tables and charts show it, and the thesis's model that it stands beside."""

from functools import cache

from thesislib.chapters.thesis import thesis_row
from thesislib.errors import BadInput
from thesislib.pipeline.label import DENSE, Label

SHOWN = {
    "pruned": "pruned",
    "trained": "+ LoRA",
    "quantised": "+ GPTQ",
    "compensated": "+ EoRA",
}  # families, as charts and tables name them
FAMILIES = tuple(SHOWN.values())


@cache
def of(label: str) -> Label:
    """What a label says; of one that no stage writes, which a record may have, nothing."""
    try:
        return Label.parse(label)
    except BadInput:
        return Label(())


def family(label: str) -> str:
    """What was done last to a model: pruned only, trained, quantised, compensated."""
    return SHOWN[of(label).family]


def step_family(part: str) -> str:
    """The family of a stage by its part of a label."""
    return SHOWN[of(part).family]


def training(label: str) -> tuple[str, ...]:
    """What a model was trained on: perplexities of models that were trained differently do not compare methods of
    making them small."""
    return of(label).training


def thesis_of(label: str):
    """The thesis's row of a label, or None: it has GPTQ at 4 bits only, EoRA only after it, and one order of pruning
    and training."""
    said = of(label)
    if (
        said.of("rtn")
        or said.bits not in (None, 4)
        or (said.corrected and said.bits is None)
        or set(said.of_family("trained")) - {"W", "T"}
    ):
        return None
    kinds = [kind.family for kind in said.classes]
    width = max((i for i, kind in enumerate(said.classes) if kind.word == "width"), default=-1)
    other_order = "trained" in kinds and kinds.index("trained") < width
    stage = "E" if said.corrected else "Q" if said.bits else "order" if other_order else ""
    try:
        return thesis_row(str(said.pruned) if said.pruned.parts else DENSE, "".join(said.training), stage)
    except BadInput:
        return None
