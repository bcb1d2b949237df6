"""Bad calls over all commands: made from the command line's own list of options, and tables of what people type."""

import inspect
import os
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import typer

from . import kills
from .forked import Ended, call, thesislib
from .place import Place

SECONDS = 30
LONG = "x" * 5000
NUMBERS = ("abc", "", "1.5", "-1", "0", "1e3", "0x10", "٣", "nan", str(10**30), "-" + str(10**30), "--", "1;2")
TEXTS = (
    "",
    "nope",
    LONG,
    "a\0b",
    "a\nb",
    "\ud800",
    "../../..",
    "-",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "$(touch pwned)",
    "None",
    "~nouser",
)
PLACES = (
    "",
    "note.txt/below",
    "/proc/nowhere/x",
    "x" * 300,
    "a\0b",
    "loop/out",
    "full",
    "\ud800",
    "~nouser/x",
    "note.txt",
    "x" * 5000,
)
MAY_BE_ZERO = {"seed", "core", "retries"}
MAY_BE = {("csv", "note.txt"), ("out", "full")}  # a table replaces what was there; recipes lie beside other files
PLANS = ("0-999999999", "5-3", "a", "0-", "-", ",", "0.5", "٣", "0-7,", "0--1", "1e3", "99", "-1", "0-7:0", "0-7:-1", "0:99999999999", "0,0,x", "0-7" + ",0-7" * 99_999,
         "18446744073709551616", " ", "0-7;rm", "[0]", "None")  # fmt: skip
LABELS = ("D0", "D999", "D-1", "W0:4", "W4:4", "W9:8", "W1:0", "W1:999999999", "X", "", "+", "D1+", "+D1", "D1++Q", "D" + "9" * 400, "D1" + "+Q" * 50, "E", "D1+E", "Q+Q", "W1:5",
          "DA9", "DM-1", "d1", "D1.5", "D٣", "W1:8:8", "W-masked-x", "Q99", "Q0", "Q-4", "nope.yaml", "../x.yaml", ".", "/", "~nouser/r.yaml", "note.txt", "full", "D1\nD2",
          "a\0b", "\ud800", LONG)  # fmt: skip
SUBJECTS = ("nope", "", ".", "full", "note.txt", "hub:", "hub:x", "hub:../../x", "hub:a/b@", "hub:a/b@../..", "hub:" + "x" * 500, "~nouser", "/proc", "/proc/self/mem", "loop", "a\0b", "\ud800",
            "x" * 300, LONG, "short.gguf", "text.gguf", "nope.gguf", "full.gguf", "http://localhost/x", "embedded ", "Embedded", "grid.yaml", "records.jsonl")  # fmt: skip
DEVICES = (
    "meta",
    "nope",
    "",
    "cuda",
    "cuda:99",
    "cuda:-1",
    "mps",
    "xpu",
    "0",
    "-1",
    "vulkan",
    "privateuseone",
    "CPU",
    "cpu,cpu",
    "a\0b",
    LONG,
)
YAMLS = ("[", "{", "&a [*a]", "*a", "!!python/object/apply:os.system ['touch pwned']", "!x y", "[" * 200 + "]" * 200, "a: b: c", "'", '"', "\0", "\ud800", "1e999", "9" * 400, "%", "@", "- - -",
         "? x", "{a: 1, a: 2}", "<script>", "|", ">", "null", "[]", "{}")  # fmt: skip


def commands() -> Iterator[tuple[tuple[str, ...], typing.Any]]:
    """Every command of the command line by its words."""

    def walk(words: tuple[str, ...], command: typing.Any) -> Iterator:
        children = getattr(command, "commands", {})
        if not children or getattr(command, "invoke_without_command", False):
            yield words, command
        for name, child in children.items():
            yield from walk((*words, name), child)

    from thesislib.cli import app

    yield from walk((), typer.main.get_command(app))


def good(here: Place) -> dict[tuple[str, ...], list]:
    """A call of each command that works and is quick, or would be if what it needs were installed."""
    subject, texts = here / "subject", here / "data"
    return {
        ("evaluate",): [subject, "--on", "wikitext", "--data", texts, "--length", 48, "--limit", 2],
        ("run",): ["01", "--out", "out.ipynb"],
        ("record",): [
            "03",
            "--out",
            "record",
            "--data",
            texts,
            "--limit",
            1,
            "-p",
            f"subject={subject}",
            "-p",
            "length=48",
            "-p",
            "windows=2",
        ],
        ("fetch",): [],
        ("compress",): ["W1:8", "--subject", subject, "--data", texts, "--dry-run"],
        ("export",): [here / "pruned", "--gguf", "Q8_0", "--out", "out.gguf"],
        ("sweep",): [here / "grid.yaml", "--subject", subject, "--data", texts, "--out", "rows.jsonl", "--dry-run"],
        ("profile",): [subject, "--device", "pi5"],
        ("measure",): [subject, "--repeats", 1],
        ("emulate",): [subject],
        ("device", "calibrate"): ["--out", "host.yaml"],
        ("device", "list"): [],
        ("recipe", "check"): [here / "recipes" / "pruned.yaml"],
        ("recipe", "label"): [here / "recipes" / "pruned.yaml"],
        ("recipe", "expand"): [here / "grid.yaml", "--out", "recipes", "--size", "quick"],
        ("records",): ["--store", here / "records.jsonl"],
        ("records", "verify"): ["0", "--store", here / "records.jsonl", "--subject", subject, "--data", texts],
        ("records", "score"): ["--store", here / "records.jsonl", "--data", texts, "--out", "answers.jsonl"],
    }


def generated(here: Place) -> Iterator[list]:
    """A bad value for every option of every command, an option that there is not, one value too many and one too
    few."""
    base = good(here)
    for words, command in commands():
        assert words in base, f"no good call of {' '.join(words)} is known here"
        args = [*words, *base[words]]
        yield [*args, "--nope"]
        yield [*args, "one", "two", "three", "--nope", "x"] if words != ("recipe", "check") else [*args, "nope.yaml"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.is_flag and p.name != "help"]
        kinds = typing.get_type_hints(inspect.unwrap(command.callback))
        for option in options:
            name = max(option.opts, key=len)
            yield [*args, name]
            kind = str(kinds[option.name])
            values = (
                [n for n in NUMBERS if not (n == "0" and option.name in MAY_BE_ZERO)]
                if "int" in kind
                else PLACES
                if "Path" in kind
                else TEXTS
            )
            for value in values:
                if (option.name, value) in MAY_BE:
                    continue
                yield [*args, name, value]


def tables(here: Place) -> Iterator[list]:
    """What people type, and worse."""
    subject, texts = here / "subject", here / "data"
    measured = ["--on", "wikitext", "--data", texts, "--length", 48, "--limit", 2]
    yield from (["evaluate", subject, *measured, "--plan", plan] for plan in PLANS)
    yield from (["compress", label, "--subject", subject, "--data", texts, "--out", "out"] for label in LABELS)
    yield from (["recipe", "label", label] for label in LABELS)
    yield from (["evaluate", s, *measured] for s in SUBJECTS)
    yield from (["compress", "W1:8", "--subject", s, "--data", texts, "--out", "out"] for s in SUBJECTS)
    yield from (["export", s, "--gguf", "Q8_0", "--out", "out.gguf"] for s in SUBJECTS)
    yield from (["profile", s, "--device", "pi5"] for s in SUBJECTS[:12])
    yield from (["evaluate", subject, *measured, "--device", device] for device in DEVICES)
    yield from (
        ["compress", "W1:8", "--subject", subject, "--data", texts, "--out", "out", "--device", device]
        for device in DEVICES
    )
    yield from (
        ["sweep", here / "grid.yaml", "--subject", subject, "--data", texts, "--out", "rows.jsonl", "--device", device]
        for device in DEVICES[:8]
    )
    yield from (
        ["profile", subject, "--device", device]
        for device in (*DEVICES, "../hw/devices/pi5", "pi5.yaml", "full", "note.txt", here / "grid.yaml")
    )
    yield from (["run", "01", "--out", "out.ipynb", "-p", f"windows={y}"] for y in YAMLS)
    yield from (["run", "01", "--out", "out.ipynb", "-p", p] for p in ("windows", "=", "=1", "windwos=1", "windows=abc", "windows=-1", "windows=0", "windows=1.5", "x;import os=1", "__class__=1",
                                                                      "subject=nope", "data=nope", "dtype=float16", "windows=true", "windows=[1]"))  # fmt: skip
    yield from (
        ["record", "00", "--out", "record", "-p", p]
        for p in ("windows", "=", "windwos=1", "windows=abc", "windows=-1", "lengths=512", "subject=nowhere")
    )
    yield from (["record", c, "--out", "record"] for c in ("99", "", "nope", "../01", "a\0b", LONG))
    yield from (
        ["record", "03", "--data", texts, "-p", f"subject={subject}", "--limit", 1, "--out", out]
        for out in PLACES
        if out not in ("", "full")  # where one stands; a folder of other files may get a record
    )
    yield from (["run", c, "--out", "out.ipynb"] for c in ("99", "", "nope", "../01", "1e0", "a\0b", "-1", LONG))
    yield from (["run", "01", "--out", out] for out in PLACES)
    yield from (
        ["sweep", "--chapter", "01", "-p", p, "--out", "sweep"]
        for p in ("windows=", "windows=[", "nope=1", "=", "windows", "windows=abc")
    )
    yield from (["sweep", here / "grid.yaml", "--subject", subject, "--data", texts, "--out", "rows.jsonl", *more]
                for more in (["--host", "999.1.1.1"], ["--host", "nope.invalid"], ["--host", ""], ["--workers", "0"], ["--workers", "-1"], ["--threads", "0"], ["--retries", "-1"],
                             ["--scheduler", "nope"], ["--scheduler", "tcp://127.0.0.1:1"], ["--scheduler", "tls://127.0.0.1:1"], ["--only", "nope"], ["--measure", "nope"], ["--size", "nope"],
                             ["--with", "nope.jsonl"], ["--with", "full"], ["--chapter", "01"], ["--workers", "99", "--device", "cuda"]))  # fmt: skip
    yield from (["compress", "W1:8", "--subject", subject, "--data", texts, "--out", out] for out in PLACES)
    yield from (
        ["compress", "W1:8", "--subject", subject, "--data", texts, "--out", out]
        for out in (subject, subject.parent, here / "grid.yaml")
    )
    yield from (
        ["export", here / "pruned", "--gguf", kind, "--out", "o.gguf"]
        for kind in ("q8_0", "Q9", "", "F64", "BF16", "Q4_K", LONG, "../x")
    )
    yield from (
        ["export", here / "pruned", "--gguf", "F16", "--out", out] for out in (*PLACES, "o.txt", "o", here / "F16.gguf")
    )
    yield from (["export", here / "quantised", "--gptq", "--out", out] for out in (*PLACES, here / "subject"))
    yield ["export", here / "pruned"]
    yield ["export", here / "pruned", "--gptq", "--gguf", "F16"]
    yield ["export", here / "pruned", "--gptq", "--merge"]
    yield ["export", here / "pruned", "--gptq", "--out", "o"]  # nothing there is quantised
    yield from (
        ["recipe", "check", f]
        for f in (
            "full",
            "note.txt",
            "nope",
            "loop",
            "deep.yaml",
            "include.yaml",
            "anchor.yaml",
            "bomb.yaml",
            "large.yaml",
            "binary.yaml",
            "tag.yaml",
        )
    )
    yield from (
        ["sweep", f, "--subject", subject, "--data", texts, "--dry-run"]
        for f in (
            "full",
            "note.txt",
            "loop",
            "deep.yaml",
            "anchor.yaml",
            "lists.yaml",
            "bomb.yaml",
            "large.yaml",
            "binary.yaml",
        )
    )
    yield from (
        ["records", "--store", f] for f in ("full", "note.txt", "nope.jsonl", "loop", ".", "/proc", "folder.jsonl")
    )
    yield from (["records", "--store", here / "records.jsonl", "--csv", out] for out in PLACES if out != "note.txt")
    yield from (
        ["records", "verify", i, "--store", here / "records.jsonl"] for i in ("", "nope", "-", LONG, "a\0b", "\ud800")
    )
    yield from (["device", "calibrate", "--out", out] for out in (*PLACES, "x.txt", "x", ".yaml"))
    yield from (
        ["evaluate", subject, "--on", "wikitext", "--data", d]
        for d in ("nope", "full", "note.txt", "hub ", "", "loop", "a\0b", "\ud800", LONG, "/proc")
    )
    yield from (
        ["evaluate", subject, "--on", on, "--data", texts]
        for on in ("", "nope", "Wikitext", "mmlu", "wikitext,trivia", LONG, "piqa", "hellaswag", "trivia_open")
    )
    for words, _ in commands():
        yield [*words, "--nope"]
        yield [*words, "--out"]
    yield from (["nope"], ["evalaute", subject], [""], ["--nope"], ["-"], ["\0"], [LONG])


def laid(here: Place, case: Path) -> None:
    """What the calls find in the folder where they are made."""
    kills.fresh(case)
    (case / "note.txt").write_text("years of work")
    (case / "full").mkdir()
    (case / "full" / "thesis.tex").write_text("years of work")
    (case / "loop").symlink_to("loop")
    (case / "short.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)
    (case / "text.gguf").write_text("no gguf")
    (case / "full.gguf").mkdir()
    (case / "folder.jsonl").mkdir()
    (case / "deep.yaml").write_text("stages: " + "[" * 9000 + "]" * 9000)
    (case / "include.yaml").write_text("include: include.yaml\nstages:\n- depth: {remove: 1}\n")
    (case / "anchor.yaml").write_text("a: &a [*a]\nstages: *a\n")
    (case / "bomb.yaml").write_text(
        "a: &a [x, x]\n"
        + "".join(
            f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *{'a' if not i else f'b{i - 1}'}]\n" for i in range(40)
        )
    )
    (case / "large.yaml").write_bytes(b"stages:\n" + b"- depth: {remove: 1}\n" * 100_000)
    (case / "binary.yaml").write_bytes(bytes(range(256)))
    (case / "tag.yaml").write_text("stages: !!python/object/apply:os.system ['touch pwned']\n")
    (case / "lists.yaml").write_text(
        "groups:\n  g: ["
        + ", ".join("[none, D1]" for _ in range(40))
        + "]\nsizes:\n  quick:\n    measures: {p: {on: wikitext}}\n"
    )


def run(here: Place, part: int = 0, parts: int = 1, every: int = 1, seed: int = 0, only: int | None = None) -> dict:
    """{"cases", "refused", "harmless" (exit 0, as without the option), "bad": [(what, the call)]}; each `every`th call
    from `seed` on."""
    counts, bad = {"cases": 0, "refused": 0, "harmless": 0}, []
    calls = [*tables(here), *generated(here)]
    chosen = [only] if only is not None else range(seed % every, len(calls), every)
    case = here.root / "calls" / str(part)
    usual: dict[str, Ended] = {}
    for number in [n for n in chosen if n % parts == part]:
        args = calls[number]
        laid(here, case)
        before = kills.listing(case)
        ended = call(thesislib(*args), case, kills.environment(here, case) | here.environment(here / "cache"), SECONDS)
        counts["cases"] += 1
        how = f"--only calls --case {number}: thesislib {' '.join(_said(a) for a in args)}"
        changed = (case / "note.txt").read_text() != "years of work" or (
            case / "full" / "thesis.tex"
        ).read_text() != "years of work"
        left = [f for f in kills.listing(case) - before if "/." in f"/{f}" and "claims" not in f]
        if ended.trouble:
            bad.append((ended.trouble, how))
        elif changed or (case / "pwned").exists() or Path("pwned").exists():
            bad.append(("wrote over what was there, or ran code", how))
        elif ended.code == 2 and left:
            bad.append((f"left {left[0]}", how))
        elif ended.code == 2:
            counts["refused"] += 1
        elif ended.code == 1:
            bad.append((f"exit 1 where 2 is meant: {ended.err.strip().splitlines()[-1:]}"[:200], how))
        elif str(10**30) in map(str, args) or _usual(here, case, args, ended, usual):
            counts["harmless"] += 1
        else:
            bad.append((f"exit 0: {ended.out.strip()[-120:]!r}", how))
    shutil.rmtree(case, ignore_errors=True)
    return counts | {"bad": bad}


def _usual(here: Place, case: Path, args: list, ended: Ended, usual: dict[str, Ended]) -> bool:
    """Whether a call said what it says without its last option."""
    words = next(w for n in (2, 1) if (w := tuple(map(str, args[:n]))) in good(here))
    name = " ".join(words)
    if name not in usual:
        laid(here, case)
        usual[name] = call(thesislib(*words, *good(here)[words]), case, here.environment(here / "cache"), SECONDS)
    taken = words == ("recipe", "label") and ended.out.strip() == str(
        args[-1]
    )  # whether it fits a subject is not asked
    literal = "~nouser/x" in map(str, args) and (case / "~nouser" / "x").exists()
    literal |= words in (("recipe", "expand"), ("record",)) and args[-1] == ""  # the current folder, as "." is
    return taken or literal or (usual[name].code == 0 and usual[name].out == ended.out)


def _said(arg: object) -> str:
    text = repr(str(arg)) if not str(arg).isprintable() or " " in str(arg) or not str(arg) else str(arg)
    return text if len(text) < 70 else f"{text[:30]}...({len(text)})"


def as_nobody(here: Place) -> dict:
    """What an ordinary user may not read or write, tried as one; {} where this process can be no other."""
    counts, bad = {"cases": 0, "refused": 0}, []
    if os.getuid() != 0:
        return counts | {"bad": []}
    root = here.root / "nobody"
    for path, mode in ((here.root, 0o755), (here / "cache", 0o777)):
        path.chmod(mode)
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    (root / "closed").mkdir(mode=0o555)
    for name in ("subject", "pruned", "data"):
        shutil.copytree(here / name, root / name)
    hidden = [root / "subject" / "model.safetensors", root / "pruned" / "packed.safetensors", root / "pruned" / "artifact.json", root / "data" / "wikitext2" / "test.jsonl", root / "data" / "c4" / "train_sample.jsonl"]  # fmt: skip
    for file in (here / "grid.yaml", here / "records.jsonl", here / "recipes" / "pruned.yaml", here / "Q8_0.gguf"):
        hidden.append(Path(shutil.copy(file, root / file.name)))
    for file in hidden:
        file.chmod(0)
    measured = here.measured
    table = [measured(root / "subject"), measured(root / "pruned"), measured(root / "Q8_0.gguf"), measured(here / "subject", data=root / "data"),
             here.compressed("W1:8", root / "closed" / "out"), here.compressed("W1:8", root / "out", root / "subject"), here.compressed(root / "pruned.yaml", root / "out"),
             ["export", here / "pruned", "--gguf", "Q8_0", "--out", root / "closed" / "o.gguf"], ["export", here / "quantised", "--gptq", "--out", root / "closed" / "o"],
             ["sweep", root / "grid.yaml", "--subject", here / "subject", "--data", here / "data", "--dry-run"], ["records", "--store", root / "records.jsonl"],
             ["sweep", here / "grid.yaml", "--subject", here / "subject", "--data", here / "data", "--out", root / "closed" / "rows.jsonl", "--workers", "1"],
             ["records", "--store", here / "records.jsonl", "--csv", root / "closed" / "x.csv"], ["recipe", "expand", here / "grid.yaml", "--size", "quick", "--out", root / "closed" / "r"],
             ["device", "calibrate", "--out", root / "closed" / "x.yaml"], ["run", "01", "--out", root / "closed" / "x.ipynb"], ["recipe", "check", root / "pruned.yaml"]]  # fmt: skip
    table = [(args, here / "cache") for args in table] + [
        (measured(here / "Q8_0.gguf"), root / "closed" / "cache"),
        (here.compressed("W1:8", root / "out"), root / "closed" / "cache"),
    ]
    where = root / "where"
    for args, cache in table:
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        where.chmod(0o777)
        for path in (here / "cache").rglob("*"):
            path.chmod(0o777 if path.is_dir() else 0o666)

        def do(args: list = args) -> int:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            return thesislib(*args)()

        ended = call(do, where, {"HOME": str(where), "TMPDIR": str(where)} | here.environment(cache), SECONDS)
        counts["cases"] += 1
        how = f"--only 'calls as an ordinary user': thesislib {' '.join(_said(a) for a in args)}"
        if ended.code == 2 and not ended.trouble:
            counts["refused"] += 1
        else:
            bad.append((ended.trouble or f"exit {ended.code}: {(ended.out + ended.err).strip()[-150:]!r}", how))
    for file in hidden:
        file.chmod(0o644)
    return counts | {"bad": bad}
