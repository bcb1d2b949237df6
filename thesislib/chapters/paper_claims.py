"""Claims of papers beside the thesis, each with a verdict from a chapter's record."""

from collections.abc import Iterable
from dataclasses import dataclass

from thesislib.chapters import chapters
from thesislib.files import data_file
from thesislib.records.measurement import in_markdown


@dataclass(frozen=True)
class PaperClaim:
    """What a paper says, and what became of it here.

    Attributes:
        paper: its short name with a link.
        says: the claim, and how it is read here where it leaves room.
        theirs: its own figures, "" for none.
        word: the verdict, one of those of the thesis's claims.
        found: what was found here, in a sentence.
        where: notebook and anchor at which the book shows it.
    """

    paper: str
    says: str
    theirs: str
    word: str
    found: str
    where: tuple[str, str]


def recorded_claims() -> list[PaperClaim]:
    """Those of every chapter that has some, from the study's records."""
    files = {name: data_file("results") / f"{name}.jsonl" for name in chapters()}
    return [
        claim
        for name, chapter in chapters().items()
        if chapter.papers and files[name].exists()
        for claim in chapter.papers(chapter.read(files[name]))
    ]


def section(found: Iterable[PaperClaim]) -> list[str]:
    """The lines of the page of claims about papers; none for no claims."""
    rows = []
    for i, c in enumerate(found, 1):
        notebook, anchor = c.where
        shown = f'<a href="../notebooks/{notebook}.html#{anchor}">chapter {int(notebook[:2])}</a>'
        theirs = f" The paper: {c.theirs}." if c.theirs else ""
        rows.append(f"| P{i} | {c.paper}: {c.says}{theirs} | **{c.word}** | {in_markdown(c.found)} ({shown}) |")
    if not rows:
        return []
    return [
        "## Claims of papers",
        "",
        "Papers beside the thesis measured other models, mostly fifty times as large. A claim may hold there and not "
        "on this subject. Verdicts are made as above; a claim that something exists holds if it was built.",
        "",
        "| | claim | verdict | found here |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]
