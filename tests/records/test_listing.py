"""What a listing says of each record: whatever tells it from the others under its heading, and no more."""

from dataclasses import replace

import pytest

from tests.fakes import perplexity
from thesislib.records.listing import WIDTH, listing


def made(label="D2", card=None, time="2026-11-26T12:00:00Z", dtype="bfloat16", chapter=None, seed=0, **stages):
    plain = [{word: settings} for word, settings in stages.items()]
    return perplexity(3.0, n=5).with_provenance(
        made={"label": label, "stages": plain},
        hardware={"accelerator": card},
        time=time,
        dtype=dtype,
        chapter=chapter or {},
        protocol={"on": "wikitext", "seed": seed},
    )


def differences(*rows):
    """What stands behind each row's numbers, in one line."""
    lines = list(listing({f"{k:012x}": m for k, m in enumerate(rows)}))
    assert max(map(len, lines)) <= WIDTH and not any(line.endswith(" ") for line in lines)
    found = []
    for line in lines[1:]:
        if line.startswith(" " * 6):
            found[-1] = f"{found[-1]} {line.strip()}".strip()
        else:
            found.append(line.partition("windows")[2].strip())
    return found


def depth(**settings):
    return {"remove": 2, "blocks": None, "windows": 8, "text": "wikipedia", **settings}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([made(depth=depth())], [""]),
        ([made(depth=depth()), made(depth=depth(windows=64))], ["depth.windows 8", "depth.windows 64"]),
        ([made(depth=depth()), made(depth=depth(), dtype="float32")], ["dtype bfloat16", "dtype float32"]),
        ([made(depth=depth()), made(depth=depth(), card="H100")], ["", "card H100"]),
        ([made(depth=depth()), made(depth=depth(), seed=1)], ["seed 0", "seed 1"]),
        (
            [made(depth=depth(text="c4")), made(depth=depth(remove=None, blocks=[14, 17]))],
            ["depth.remove 2, depth.text c4", "depth.blocks 14-17, depth.text wikipedia"],
        ),
        (
            [made(chapter={"method": m, "text": "x" * 99, "sizes": {"a": 1}}) for m in ("taylor", "angular")],
            ["method taylor", "method angular"],
        ),
        (
            [made(label="Q", gptq={"bits": 4}), made(label="Q", rtn={"bits": 4})],
            ["stages gptq", "stages rtn"],  # a setting that another has not at all is said by the stages
        ),
        (
            [made(seed=0), made(seed=1), made(seed=1, time="2026-11-27T12:00:00Z")],
            ["seed 0", "seed 1, made 2026-11-26T12:00:00Z", "seed 1, made 2026-11-27T12:00:00Z"],
        ),
    ],
)
def test_a_row_says_what_tells_it_apart(rows, said):
    assert differences(*rows) == said


def test_many_differences_take_further_lines():
    rows = [made(gptq={f"setting_{i}": f"{value} of a kind" for i in range(9)}) for value in ("one", "another")]
    assert differences(*rows) == [
        ", ".join(f"gptq.setting_{i} {value} of a kind" for i in range(9)) for value in ("one", "another")
    ]


def test_rows_are_compared_within_label_task_and_metric_only():
    rows = [made(), made(label="D4", dtype="float32"), made(seed=3)]
    rows.append(replace(made(dtype="float32"), metric="bits per byte"))
    first, seed_0, seed_3, *others = listing(dict(zip("abcd", rows, strict=True)))
    assert first == "D2  text  perplexity" and seed_0.endswith("  seed 0") and seed_3.endswith("  seed 3")
    assert [line.split("  ")[0] for line in others[::2]] == ["D4", "D2"] and "dtype" not in " ".join(others)
