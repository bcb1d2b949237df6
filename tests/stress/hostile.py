"""Files that are far larger, deeper or more numerous than a model's: refused in one line or used, in bounded time and
memory."""

import gzip
import json
import os
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import kills
from .forked import call, copy, thesislib
from .place import Place

SECONDS, MEMORY = 60, 1 << 30  # that a case may take, beyond what it begins with
TERABYTE = 1 << 40
DEEP = b"[" * 1_000_000 + b"]" * 1_000_000
ENTRY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def cases(here: Place, case: Path) -> Iterator[tuple[str, Callable[[], object], list, bool]]:
    """What it is, what makes it, the command that meets it, and whether that may go on with it."""
    subject, pruned, data = case / "subject", case / "pruned", case / "data"

    def sparse(path: Path) -> None:
        with path.open("ab") as file:
            file.truncate(TERABYTE)

    def gguf(content: bytes, large: bool) -> None:
        (case / "x.gguf").write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
        if large:
            sparse(case / "x.gguf")

    def header(content: bytes) -> None:
        (subject / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)

    def tokens(count: int) -> None:
        plain = json.loads((subject / "tokenizer.json").read_text())
        plain["added_tokens"] += [{"id": 1000 + i, "content": f"<{i}>", **ENTRY} for i in range(count)]
        (subject / "tokenizer.json").write_text(json.dumps(plain))

    def unpacking(row: bytes, times: int) -> None:
        (data / "wikitext2" / "test.jsonl").unlink()
        with gzip.open(data / "wikitext2" / "test.jsonl.gz", "wb", 1) as file:
            for _ in range(times):
                file.write(row)

    def many() -> None:
        for i in range(100_000):
            (data / "c4" / f"{i}.jsonl").touch()

    def linked() -> None:
        for file in list(subject.iterdir()):
            os.link(file, case / f"other name of {file.name}")

    settings = [p.name for p in (here / "subject").iterdir()]
    for name in settings:
        yield f"a terabyte of {name}", lambda name=name: sparse(subject / name), here.measured(subject), False
        if name.endswith(".json"):
            yield f"deep {name}", lambda name=name: (subject / name).write_bytes(DEEP), here.measured(subject), False
    for name in ("artifact.json", "packed.safetensors", "config.json"):
        yield (
            f"a terabyte of {name} of an artifact",
            lambda name=name: sparse(pruned / name),
            here.measured(pruned),
            False,
        )
    yield "a deep artifact.json", lambda: (pruned / "artifact.json").write_bytes(DEEP), here.measured(pruned), False
    yield (
        "a terabyte of texts",
        lambda: sparse(data / "wikitext2" / "test.jsonl"),
        here.measured(here / "subject", data=data),
        False,
    )
    yield (
        "deep texts",
        lambda: (data / "wikitext2" / "test.jsonl").write_bytes(DEEP),
        here.measured(here / "subject", data=data),
        False,
    )
    yield (
        "ten gigabytes of one row in gzip",
        lambda: unpacking(bytes(100 << 20), 100),
        here.measured(here / "subject", data=data),
        False,
    )
    yield (
        "lines without end in gzip",
        lambda: unpacking(b"\n" * (20 << 20), 2),
        here.measured(here / "subject", data=data),
        False,
    )
    yield (
        "100,000 files beside the texts",
        many,
        [
            "compress",
            here / "recipes" / "quantised.yaml",
            "--subject",
            here / "subject",
            "--data",
            data,
            "--out",
            case / "out",
        ],
        True,
    )
    yield "hard links", linked, here.measured(subject), True
    for count in (100_000, 1_000_000):
        yield f"{count} added tokens", lambda count=count: tokens(count), here.measured(subject), count < 1_000_000
    yield "a header of 100 MB", lambda: header(b" " * 100_000_001), here.measured(subject), False
    yield "a header of 99 MB", lambda: header(b"{" + b" " * 99_000_000 + b"}"), here.measured(subject), False
    yield (
        "tensors without elements",
        lambda: header(b'{"model.norm.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        here.measured(subject),
        False,
    )
    yield (
        "a tensor of 2^60",
        lambda: header(b'{"x":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}'),
        here.measured(subject),
        False,
    )
    yield (
        "a key twice",
        lambda: (subject / "config.json").write_text(
            (subject / "config.json").read_text().replace("{", '{"hidden_size": 8,', 1)
        ),
        here.measured(subject),
        True,
    )
    yield (
        "a terabyte of records",
        lambda: sparse(case / "records.jsonl"),
        ["records", "--store", case / "records.jsonl"],
        False,
    )
    yield (
        "deep records",
        lambda: (case / "records.jsonl").write_bytes(DEEP),
        ["records", "--store", case / "records.jsonl"],
        True,
    )
    for name, use in (("recipe.yaml", ["recipe", "check"]), ("grid.yaml", ["sweep", "--dry-run"])):
        yield f"a terabyte of {name}", lambda name=name: sparse(case / name), [*use, case / name], False
        yield f"deep {name}", lambda name=name: (case / name).write_bytes(DEEP), [*use, case / name], False
    counts = {
        "tensors": struct.pack("<QQ", 1 << 60, 0), "settings": struct.pack("<QQ", 0, 1 << 60), "bytes in a "
            "name": struct.pack("<QQQ", 0, 1, 1 << 60),
        "numbers in a list": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"x", 9, 4, 1 << 60), "texts in a "
            "list": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"x", 9, 8, 1 << 60),
        "lists in a list": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"x", 9, 9, 1 << 60), "bytes in a text": struct.pack("<QQQ1sIQ", 0, 1, 1, b"x", 8, 1 << 60),
        "dimensions": struct.pack("<QQQ1sI", 1, 0, 1, b"x", (1 << 32) - 1), "elements": struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"x", 1, 1 << 60, 0, 0),
    }  # fmt: skip
    for name, content in counts.items():
        for large in (False, True):
            yield (
                f"2^60 {name} in a GGUF file{' of a terabyte' * large}",
                lambda c=content, large=large: gguf(c, large),
                here.measured(case / "x.gguf"),
                False,
            )
    yield (
        "a GGUF file with a hole of a terabyte behind it",
        lambda: sparse(Path(shutil.copy(here / "Q8_0.gguf", case / "x.gguf"))),
        here.measured(case / "x.gguf"),
        False,
    )


def run(here: Place, only: int | None = None) -> dict:
    """{"cases", "refused", "used", "bad": [(what, the case)]}."""
    counts, bad = {"cases": 0, "refused": 0, "used": 0}, []
    case = here.root / "hostile"
    for number, (name, make, args, may) in enumerate(cases(here, case)):
        if only not in (None, number):
            continue
        kills.fresh(case)
        for folder in ("subject", "pruned", "data"):
            copy(here / folder, case / folder)
        make()

        def do(args: list = args) -> int:
            before = _peak()
            code = thesislib(*args)()
            print(f"MEMORY {_peak() - before}", file=sys.stderr)
            return code

        ended = call(do, case, kills.environment(here, case) | here.environment(here / "cache"), SECONDS, room=1 << 45)
        said, _, memory = ended.err.rpartition("MEMORY ")
        counts["cases"] += 1
        how = f"--only hostile --case {number}: {name}"
        if ended.signal is not None or "Traceback" in said or ended.code not in (0, 2):
            bad.append((ended.trouble or f"exit {ended.code}: {said.strip()[-160:]}", how))
        elif int(memory) > MEMORY:
            bad.append((f"took {int(memory) >> 20} MB", how))
        elif ended.code == 2 and not said.rstrip("\n").split("\n")[-1].startswith("error: "):
            bad.append((f"exit 2, but not in one line: {said.strip()[-160:]!r}", how))
        elif ended.code == 0 and not may:
            bad.append((f"exit 0: {ended.out.strip()[:120]}", how))
        else:
            counts["used" if ended.code == 0 else "refused"] += 1
    shutil.rmtree(case, ignore_errors=True)
    return counts | {"bad": bad}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
