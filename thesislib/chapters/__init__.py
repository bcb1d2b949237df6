"""What each notebook measures: its parameters, its measurements, and the claims it holds them against."""

RECORDS = {"00_measures": "results/00_measures.jsonl.gz", "01_franken_llama": "results/01_franken_llama.jsonl.gz"}


def recorded(chapter: str):
    """The recorded run of a chapter, as its functions take it."""
    from thesislib import records
    from thesislib.chapters import franken
    from thesislib.files import data_file

    found = records.read(data_file(RECORDS[chapter]))
    return franken.from_measurements(found) if chapter == "01_franken_llama" else found


def findings() -> str:
    """What was found, in sentences filled in from the recorded runs: for the book's first page and the README."""
    from thesislib.chapters import franken, measures

    return (
        f"**Chapter 0, the subject and its measures.** {measures.headline(recorded('00_measures'))}\n\n"
        f"**Chapter 1, skipping and repeating blocks.** {franken.headline(recorded('01_franken_llama'))}\n"
    )
