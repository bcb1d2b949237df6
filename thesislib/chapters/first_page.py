"""The book's first page, and README's: the question, the study in one strip, three findings, what held and what did
not, how to begin, and a line for each chapter."""

from collections import Counter
from collections.abc import Mapping

import yaml

from thesislib.chapters import ch04_recovery as recovery
from thesislib.chapters import ch04_runs as lora
from thesislib.chapters import ch06_grid as grid
from thesislib.chapters import ch07_device as device
from thesislib.chapters import chapters, recorded
from thesislib.chapters.chapter import WIKITEXT
from thesislib.chapters.claims import CLAIMS, judge
from thesislib.chapters.drawing import Drawing
from thesislib.chapters.labels import marked, of
from thesislib.chapters.page import minutes
from thesislib.chapters.pareto import beaten, front, marks_of, no_better, points, size_of
from thesislib.chapters.phrases import DEPENDS, FAILS, HOLDS, UNDECIDED
from thesislib.chapters.pool import recorded_pool
from thesislib.experiment import DENSE
from thesislib.files import ROOT
from thesislib.records.measurement import Measurement

STRIP = "book/_static/strip.svg"  # README's
TEMPLATE = "book/first_page.txt"
STEPS = {
    "depth": "remove blocks",
    "width": "zero some weights",
    "lora": "train",
    "gptq": "fewer bits",
    "eora": "correct",
}
CHAIN = (DENSE, "D2", "D2+W1:8", "D2+W1:8+W", "D2+W1:8+W+Q", "D2+W1:8+W+Q+E")  # the thesis's five stages, one by one


def chain() -> dict[str, tuple[Measurement, float]]:
    """{label: (its perplexity, MB on disk)} of the thesis's stages, all on the largest sample that all have."""
    pool, record = recorded_pool(), recorded("06_evaluation")
    rows = {label: pool[label, WIKITEXT] for label in CHAIN}
    n = max(set.intersection(*(set(by_n) for by_n in rows.values())))
    sizes = {label: size_of(record.sample, label, "bytes_on_disk") for label in CHAIN}
    return {label: (by_n[n][0], sizes[label] / 1e6) for label, by_n in rows.items()}


def strip(stages: Mapping[str, tuple[Measurement, float]]) -> Drawing:
    """The study in one picture: a box for each stage, as high as its file is large, with MB and perplexity."""
    says = "; ".join(f"{label} {mb:.0f} MB, perplexity {m.value:.3g}" for label, (m, mb) in stages.items())
    drawing = Drawing(860, 196, f"The five stages of the thesis in order: {says}")
    largest = max(mb for _, mb in stages.values())
    wide, gap, left = 132, 13, 4
    for i, (label, (m, mb)) in enumerate(stages.items()):
        x, model = left + i * (wide + gap), of(label)
        last = model.parts[-1] if model.parts else ""
        doing, name = (STEPS[model.classes[-1].word], f"+ {of(last).shown}") if last else ("as it came", DENSE)
        drawing.text(x + wide / 2, 18, doing, size=11, faint=True)
        drawing.text(x + wide / 2, 38, name, size=14, bold=True)
        height = 62 * mb / largest
        drawing.box(x + 26, 116 - height, wide - 52, height, "changed" if i else "kept")
        drawing.text(x + wide / 2, 133, f"{mb:.0f} MB")
        drawing.text(x + wide / 2, 151, f"perplexity {m.value:.1f}", bold=True)
        if i + 1 < len(stages):
            drawing.arrow(x + wide - 12, 96, x + wide + gap + 14, 96)
    whole, (dense, _) = [*stages][-1], stages[DENSE]
    control = next(m for m in recorded_pool()["W", WIKITEXT][dense.n])
    drawing.text(434, 174, f"Parts add up to a model's label: the last is {of(whole).shown}.", size=12, faint=True)
    said = (
        f"WikiText-2 test, {dense.n} windows of {dense.settings['length']} tokens. LoRA has read WikiText: "
        f"the dense model with the same training has {control.value:.1f}."
    )
    drawing.text(434, 192, said, size=12, faint=True)
    return drawing


def verdicts() -> str:
    """What became of the thesis's claims, as counts."""
    pool = recorded_pool()
    count = Counter(judge(claim, pool).word for claim in CLAIMS if not claim.ours)
    named = {
        HOLDS: ("holds", "hold"),
        FAILS: ("fails", "fail"),
        DEPENDS: ("depends on how answers are scored", "depend on how answers are scored"),
        UNDECIDED: ("is undecided", "are undecided"),
    }
    said = [f"{count[word]} {phrases[count[word] > 1]}" for word, phrases in named.items() if count[word]]
    return f"Of the thesis's {sum(count.values())} claims {', '.join(said[:-1])} and {said[-1]}"


def table(link: str) -> str:
    """Chapters as a Markdown table: question, the answer in ten words, and how long it takes to run again."""
    rows = ["| | question | answer | to run again |", "| --- | --- | --- | --- |"]
    for name, chapter in chapters().items():
        if not (opening := chapter.opening):
            continue
        short = marked(opening.short(recorded(name)))
        rows.append(f"| [{int(name[:2])}]({link.format(name)}) | {opening.question} | {short} | {minutes(name)} |")
    return "\n".join(rows)


def addresses() -> tuple[str, str]:
    """The addresses of the repository and of the rendered book in `_config.yml`; "" where none is set."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    return config.get("repository", {}).get("url") or "", config.get("html", {}).get("baseurl") or ""


def findings() -> list[tuple[str, str, str]]:
    """(what was found, the number behind it, the notebook that shows it) of the three that matter most."""
    share = recovery.recovered(recorded("04_lora_recovery")).loc["D2"]
    lose, of_all = beaten(recorded("06_evaluation").for_fronts)
    timed = recorded("07_on_device")
    return [
        (
            "Fewer bits beat fewer weights.",
            f"Of {of_all} models in 16 bits {lose} lose to a quantised one that is no larger.",
            "06_evaluation",
        ),
        (
            "About half of what LoRA wins back is getting used to the text.",
            f"Of D2's loss {share['fair']:.0%} comes back, not {share['naive']:.0%}, if the dense model is trained in "
            "the same way.",
            "04_lora_recovery",
        ),
        (
            "Zeros that no kernel skips buy no time.",
            f"With half of its weights zero it is at most {max(device.gains_by_zeros(timed).values()):.0%} faster "
            f"in llama.cpp; two files of one size differ by up to {device.drift(timed):.0%}.",
            "07_on_device",
        ),
    ]


def text(chapter: str, page: str, picture: str) -> str:
    """The first page as Markdown.

    Args:
        chapter: the address of a chapter, with {} for its notebook's name.
        page: of a page of the book, with {} for its name.
        picture: the strip, as Markdown or HTML.
    """
    repository, rendered = addresses()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    p = lora.recorded_parameters()
    return (
        (ROOT / TEMPLATE)
        .read_text("utf8")
        .format(
            picture=picture,
            findings="\n".join(
                f"1. **{title}** {marked(line)} ([chapter {int(name[:2])}]({chapter.format(name)}))"
                for title, line, name in findings()
            ),
            verdicts=verdicts(),
            claims=page.format("claims"),
            failed=failed(),
            tokens=f"{p.steps * p.batch * p.length:,}",
            read=f"[the rendered book]({rendered})" if rendered else "`make book` prints the path of its first page",
            minutes=minutes("03_width_pruning"),
            rerun=page.format("rerun"),
            chapters=table(chapter),
            label=marked(CHAIN[-1]),
            labels=page.format("labels"),
            title=citation["title"],
            year=str(citation["date-released"])[:4],
            version=citation["version"],
            url=f",\n  url    = {{{repository}}}" if repository else "",
        )
    )


def failed() -> str:
    """What went against the thesis, or against us."""
    record = recorded("06_evaluation")
    results = record.full if ("W", grid.PPL) in record.full else record.sample
    trained, below = grid.pruned_and_trained(results), grid.below(results, "W") or []
    models, mark = points(record.for_fronts), marks_of(record.for_fronts).iloc[0]
    untrained = front(models, "MB", grid.PPL)[DENSE]
    worse = no_better(models, untrained, mark, grid.PPL)
    how_many = "all" if len(worse) == len(untrained) else f"{len(worse)} of the"
    return (
        f"{len(below) or 'none'} of {len(trained)} pruned models with LoRA beats the dense model with LoRA; "
        f"{how_many} {len(untrained)} best untrained models are no smaller and no better than the "
        f"{mark['MB']:.0f} MB file that the model came in."
    )
