"""What a configuration's label says: what was done to a model, in which order, and which of the thesis's models it stands beside."""

from thesislib.chapters.thesis import thesis_row
from thesislib.errors import BadInput
from thesislib.experiment import DENSE

FAMILIES = ("pruned", "+ LoRA", "+ GPTQ", "+ EoRA")


def stages_of(label: str) -> list[str]:
    """The parts of a label; none of the dense model's."""
    return [] if label == DENSE else label.split("+")


def family(label: str) -> str:
    """What was done last to a model: pruned only, trained, quantised, compensated."""
    parts = stages_of(label)
    return FAMILIES[3] if "E" in parts else FAMILIES[2] if any(x[0] == "Q" for x in parts) else FAMILIES[1] if {"W", "T"} & set(parts) else FAMILIES[0]


def step_family(part: str) -> str:
    """The family of a stage by its part of a label."""
    return FAMILIES[3] if part == "E" else FAMILIES[2] if part[0] == "Q" else FAMILIES[1] if part in ("W", "T") else FAMILIES[0]


def training(label: str) -> tuple[str, ...]:
    """What a model was trained on: perplexities of models that were trained differently do not compare methods of making them small."""
    return tuple(x for x in stages_of(label) if x in ("W", "T"))


def thesis_of(label: str):
    """The thesis's row of a label, or None."""
    parts = stages_of(label)
    if any(x[0] == "Q" and x != "Q" for x in parts) or ("E" in parts and "Q" not in parts):
        return None  # it has 4 bits only
    pruned = "+".join(x for x in parts if x[0] in "DW" and x != "W") or DENSE
    lora = "".join(x for x in parts if x in ("W", "T"))
    widths = [i for i, x in enumerate(parts) if x[0] == "W" and x != "W"]
    other_order = lora and widths and parts.index(lora[0]) < widths[-1]
    stage = "E" if "E" in parts else "Q" if "Q" in parts else "order" if other_order else ""
    try:
        return thesis_row(pruned, lora, stage)
    except BadInput:
        return None
