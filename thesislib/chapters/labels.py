"""A configuration's label as the study's tables and charts show it, and the thesis's model that it stands beside."""

import html
import re
from collections.abc import Iterator
from functools import cache

from thesislib.chapters.thesis import ThesisRow, thesis_row
from thesislib.compress.stage import STAGES
from thesislib.errors import BadInput
from thesislib.pipeline.label import DENSE, Label

SHOWN = {
    "pruned": "pruned",
    "factorised": "low rank",
    "trained": "+ LoRA",
    "quantised": "+ GPTQ",
    "compensated": "+ EoRA",
}  # families, as charts and tables name them
FAMILIES = tuple(SHOWN.values())
QUANTISED = FAMILIES[-2:]  # whose weights take few bits
# those that the book explains
PARTS: tuple[str, ...] = (DENSE, "D2", "DA2", "DM2", "D2L", "M4", "S4", "N75%", "W1:8", "W2:4", "W50%", "L80%")
PARTS += ("CALR32", "Z27-down-1%", "W", "T", "FT3", "R", "Q", "Q3", "H", "E", "D2+W1:8+W+Q+E")


@cache
def of(label: str) -> Label:
    """The parts of a label; of one that no stage writes, which a record may have, none."""
    try:
        return Label.parse(label)
    except BadInput:
        return Label(())


@cache
def _labels() -> re.Pattern:
    """What is not looked at in Markdown and HTML (code, formulas, tags, addresses), or a label."""
    part = "(?:" + "|".join(re.sub(r"\((?!\?)", "(?:", cls.pattern) for cls in STAGES.values()) + ")"
    other = r"`[^`]*`|\$[^$\n]*\$|<abbr.*?</abbr>|<code.*?</code>|<[^>]*>|\]\([^)]*\)|https?://\S+"
    return re.compile(rf"(?P<other>{other})|(?<![\w:.~/-])(?<!\w\+)(?P<label>{part}(?:\+{part})*)(?![\w+%~]|[-:.]\w)")


def pieces(text: str, letters: bool = True) -> Iterator[tuple[str, Label | None]]:
    """A text cut at its labels: each piece, and the label that it is or None.

    Args:
        text: Markdown or HTML; what stands in code, formulas, tags and addresses is no label.
        letters: whether a letter by itself, such as Q, is a label too.
    """
    end = 0
    for found in _labels().finditer(text):
        if found["label"] and (letters or len(found["label"]) > 1):
            yield text[end : found.start()], None
            yield found["label"], of(found["label"])
            end = found.end()
    yield text[end:], None


def abbreviated(label: Label) -> str:
    """A label as the book shows it, with its meaning, in HTML."""
    return f'<abbr title="{html.escape(f"{label}: {label.in_words}")}">{html.escape(label.shown)}</abbr>'


def marked(text: str, letters: bool = True) -> str:
    """A text of Markdown or HTML whose labels are `abbreviated`; see `pieces`.

    >>> print(marked("D2+W costs less than `D2`"))
    <abbr title="D2+W: 2 blocks removed, LoRA trained on WikiText-2">D2+LoRA(wiki)</abbr> costs less than `D2`
    """
    return "".join(abbreviated(label) if label else piece for piece, label in pieces(text, letters))


def plain(text: str) -> str:
    """A text with its labels as the book shows them, without their meaning: for figures."""
    return "".join(label.shown if label else piece for piece, label in pieces(text))


def table() -> str:
    """The parts of labels as a Markdown table: each as it is shown, what it means, and how records and commands write
    it."""
    rows = ["| label | meaning |", "| --- | --- |"]
    for label in map(Label.parse, PARTS):
        recorded = f", recorded as `{label}`" if label.shown != str(label) else ""
        rows.append(f"| {abbreviated(label)} | {label.in_words}{recorded} |")
    return "\n".join(rows)


def family(label: str) -> str:
    """What was done last to a model: pruned, + LoRA, + GPTQ or + EoRA. Of a single part it is the stage's family."""
    return SHOWN[of(label).family]


def training(label: str) -> tuple[str, ...]:
    """What a model was trained on.

    Perplexities of models that were trained differently do not compare methods of making them small.
    """
    return of(label).training


def thesis_of(label: str) -> ThesisRow | None:
    """The thesis's row of a label, or None.

    The thesis has GPTQ at 4 bits only, EoRA only after it, and one order of pruning and training.
    """
    model = of(label)
    if (
        model.of("rtn")
        or model.bits not in (None, 4)
        or (model.corrected and model.bits is None)
        or set(model.of_family("trained")) - {"W", "T"}
        or model.of_family("factorised")
    ):
        return None
    families, words = [kind.family for kind in model.classes], [kind.word for kind in model.classes]
    stage = "E" if model.corrected else "Q" if model.bits else ""
    if not stage and "trained" in families and "width" in words[families.index("trained") :]:
        stage = "order"
    try:
        return thesis_row(str(model.pruned) if model.pruned.parts else DENSE, "".join(model.training), stage)
    except BadInput:
        return None
