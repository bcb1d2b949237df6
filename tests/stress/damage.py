"""Files of every kind, damaged: refused in one line, healed, or the value is the right one; and nothing outside a
folder is read.

Right is what the undamaged file gives, or, for files that a user may write as they like (a checkpoint, texts, a
recipe), what another program makes of the damaged file: plain transformers, plain YAML.
"""

import copy as copying
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import kills
from .forked import Ended, call, copy, thesislib
from .place import RECIPES, Place, plain_perplexity

SECONDS = 30  # that a case may take
OUTSIDE = ("../outside.safetensors", "ABSOLUTE/outside.safetensors", "../../outside.safetensors")
ODD = (None, True, False, -1, 0, 1, 2, 7, 10**9, 10**18, 10**400, -(10**18), 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf, "", "x", "nope", "0", "é\u2028\0",
       "x" * 100_000, "\ud800", "<script>alert(1)</script>", "{{ 7 * 7 }}", [], {}, [[]], [None], ["x"], [-1], [0, 0], [10**9], {"x": 1}, {"": None})  # fmt: skip

# ---------------------------------------------------------------- what is done to a file


def bytes_of(path: Path, rng: random.Random, others: list[Path], devices: bool = True) -> str:
    """Damage whatever the file is; what was done, in words. devices: pipes and endless files too."""
    whole = path.read_bytes()
    size, at = len(whole), rng.randrange(max(1, len(whole)))

    def write(content: bytes) -> None:
        path.write_bytes(content)

    def flip(where: int, mask: int) -> None:
        write(whole[:where] + bytes([whole[where] ^ mask]) + whole[where + 1 :])

    def instead(make: Callable[[], None]) -> None:
        path.unlink()
        make()

    where = min(size - 1, int(rng.expovariate(1 / 60))) if size else 0
    mask = 1 << rng.randrange(8)
    other = rng.choice(others) if others else path
    ways: dict[str, tuple[int, Callable]] = {
        f"bit {mask} flipped at byte {at}": (6 * bool(size), lambda: flip(at, mask)),
        f"bit {mask} flipped at byte {where}": (4 * bool(size), lambda: flip(where, mask)),
        f"cut at byte {at}": (4, lambda: write(whole[:at])),
        "last byte gone": (1, lambda: write(whole[:-1])),
        "emptied": (1, lambda: write(b"")),
        f"zeros from byte {at}": (2, lambda: write(whole[:at] + bytes(len(whole[at : at + 64])) + whole[at + 64 :])),
        f"64 random bytes at {at}": (2, lambda: write(whole[:at] + rng.randbytes(64) + whole[at + 64 :])),
        "bytes at its end": (1, lambda: write(whole + rng.randbytes(40))),
        "gone": (1, path.unlink),
        f"{other.name} of {other.parent.name} in its place": (2, lambda: write(other.read_bytes())),
        "a folder in its place": (1, lambda: instead(path.mkdir)),
        "a link to nowhere": (1, lambda: instead(lambda: path.symlink_to("nowhere"))),
        "a link to itself": (1, lambda: instead(lambda: path.symlink_to(path.name))),
        "a link to /dev/zero": (devices, lambda: instead(lambda: path.symlink_to("/dev/zero"))),
        "a pipe in its place": (devices, lambda: instead(lambda: os.mkfifo(path))),
    }
    name = rng.choices(list(ways), [weight for weight, _ in ways.values()])[0]
    ways[name][1]()
    return name


def nodes(plain: object, path: tuple = ()) -> list[tuple]:
    """The places in plain data: keys and indices from the outside in."""
    found = [path] if path else []
    pairs = plain.items() if isinstance(plain, dict) else enumerate(plain[:3]) if isinstance(plain, list) else ()
    for key, value in pairs:
        found += nodes(value, (*path, key))
    return found


def changed(plain: object, rng: random.Random, odd: tuple = ODD) -> tuple[object, str]:
    """Plain data with one value that is well-formed and wrong, and where and what."""
    plain = copying.deepcopy(plain)
    places = nodes(plain)
    if not places or rng.random() < 0.03:
        value = rng.choice(odd)
        return value, f"all of it is {_short(value)}"
    depth = rng.choice(sorted({len(p) for p in places}))
    place = rng.choice([p for p in places if len(p) == depth])
    holder = plain
    for key in place[:-1]:
        holder = holder[key]
    key, old = place[-1], holder[place[-1]]
    name = ".".join(map(str, place))
    what = rng.random()
    if what < 0.12:
        del holder[key]
        return plain, f"{name} is gone"
    if what < 0.18 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return plain, f"{name} is called {key}x"
    near = [str(old), [old], {"x": old}] + (
        [old + 1, old - 1, old * 2, -old, float(old)] if isinstance(old, (int, float)) else []
    )
    value = rng.choice(near) if rng.random() < 0.35 else rng.choice(odd)
    holder[key] = value
    return plain, f"{name} is {_short(value)}"


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:30]}... ({len(said)} characters)"


def written(plain: object) -> bytes:
    """Plain data as JSON, as Python's own writer does it (NaN and lone surrogates too)."""
    return json.dumps(plain, indent=1).encode()


def json_of(path: Path, rng: random.Random, others: list[Path], more: tuple = ()) -> str:
    """One odd value somewhere in a JSON file."""
    plain, said = changed(json.loads(path.read_text("utf8")), rng, ODD + more)
    path.write_bytes(b"[" * 5000 + b"]" * 5000 if rng.random() < 0.02 else written(plain))
    return said


def json_line_of(path: Path, rng: random.Random, others: list[Path]) -> str:
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    plain, said = changed(json.loads(lines[at]), rng)
    lines[at] = json.dumps(plain).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {at + 1}: {said}"


def yaml_of(path: Path, rng: random.Random, others: list[Path]) -> str:
    import yaml

    plain, said = changed(
        yaml.safe_load(path.read_text("utf8")), rng, tuple(x for x in ODD if x not in (math.inf, -math.inf, 1e308))
    )
    with suppress(UnicodeEncodeError):
        path.write_text(yaml.safe_dump(plain, sort_keys=False), "utf8")
    return said


def tensors_of(path: Path, rng: random.Random, others: list[Path]) -> str:
    """A safetensors file whose header or tensors are well-formed and wrong."""
    import struct

    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    if rng.random() < 0.6:
        header, said = changed(header, rng, (*ODD, "F64", "BF16", "U8", "I64", [0, 10**12], [64, 64], [-1, 4]))
    else:
        import safetensors.torch as st

        held = st.load(whole)
        name = rng.choice(sorted(held))
        ways = {
            "transposed": lambda t: t.t().contiguous() if t.dim() == 2 else t.view(-1, 1).contiguous(),
            "of another type": lambda t: t.double() if t.is_floating_point() else t.int(),
            "one row short": lambda t: t[:-1].contiguous(),
            "not finite": lambda t: t.clone().fill_(math.nan) if t.is_floating_point() else t,
            "empty": lambda t: t[:0].contiguous(),
            "gone": None,
            "there twice": "twice",
        }
        way = rng.choice(list(ways))
        if ways[way] is None:
            del held[name]
        elif ways[way] == "twice":
            held[f"{name}.more"] = held[name].clone()
        else:
            held[name] = ways[way](held[name])
        path.write_bytes(st.save(held, {"format": "pt"}))
        return f"{name} is {way}"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    return f"header: {said}"


def signed(damage: Callable, folder: Callable[[Path], Path]) -> Callable:
    """Damage to a file of an artifact whose record then vouches for the damaged file."""

    def do(path: Path, rng: random.Random, others: list[Path]) -> str:

        said = damage(path, rng, others)
        if path.is_symlink() or not path.is_file():  # a pipe, or no end: nothing to sign
            return said
        from thesislib.formats.artifact_json import RECORD, checksum

        with suppress(Exception):
            record = json.loads((folder(path) / RECORD).read_text("utf8"))
            if path.name != RECORD:
                record["files"][path.relative_to(folder(path)).as_posix()] = kills.sha256(path)
            record.pop("sha256", None)
            (folder(path) / RECORD).write_bytes(written({**record, "sha256": checksum(record)}))
        return f"{said}, and signed"

    return do


# ---------------------------------------------------------------- kinds of files


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    copies: {name in the case: what to copy there}. target: of the case's folder, the files of which one is damaged.
    ways: how. use: what reads them. right: what must come of it, given how it ended; compared with the undamaged.
    judge: in place of that comparison, what is wrong with an exit 0, or None. plain: an independent program's value,
    where right is another than the undamaged's. resigned: a file whose record was made again to vouch for it may have
    another value.
    """

    name: str
    copies: dict[str, Path]
    target: Callable[[Path], list[Path]]
    ways: tuple[Callable, ...]
    use: Callable[[Path], Callable[[], int | None]]
    right: Callable[[Path, Ended], object]
    plain: Callable[[Path], object] | None = None
    judge: Callable[[Path, Ended, object], str | None] | None = None
    cases: int = 200
    resigned: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def value(case: Path, ended: Ended) -> object:
    """Of a measurement: the number, its interval, and what was counted."""
    found = ended.json() or {}
    return [found.get(key) for key in ("value", "low", "high", "n")]


def kinds(here: Place) -> list[Kind]:
    """All of them."""
    evaluate = here.measured

    def measured(name: str, on: str = "wikitext", data: str | None = None) -> Callable:
        return lambda case: thesislib(*evaluate(case / name, on, data and case / data))

    def plainly(subject: str, data: str | None = None) -> Callable:
        return lambda case: plain_perplexity(case / subject, case / data if data else here / "data")

    def files(pattern: str) -> Callable:
        return lambda case: sorted(p for p in case.glob(pattern) if p.is_file())

    def top(path: Path) -> Path:
        return next(p for p in path.parents if (p / "artifact.json").exists())

    def artifact(name: str, of: str, pattern: str, *ways: Callable) -> Kind:
        return Kind(
            name,
            {"a": here / of},
            files(f"a/{pattern}"),
            ways,
            measured("a"),
            value,
            resigned=pattern != "artifact.json",
        )

    def checkpoint(name: str, pattern: str, *ways: Callable) -> Kind:
        return Kind(
            name,
            {"subject": here / "subject"},
            files(f"subject/{pattern}"),
            ways,
            measured("subject"),
            value,
            plainly("subject"),
        )

    def asked(name: str, pattern: str, *ways: Callable) -> Kind:
        return Kind(name, {"subject": here / "subject"}, files(f"subject/{pattern}"), ways,
                    lambda case: thesislib(*evaluate(case / "subject", "trivia"), "--items"), answers, lambda case: plain_answers(case / "subject", here / "data"))  # fmt: skip

    sign = partial(signed, folder=top)
    places = partial(json_of, more=OUTSIDE)
    found = [
        artifact("artifact.json", "quantised", "artifact.json", bytes_of, places, sign(places), sign(places)),
        artifact("artifact.json of a pruned one", "pruned", "artifact.json", bytes_of, sign(places), sign(places)),
        artifact("packed.safetensors", "pruned", "packed.safetensors", bytes_of, tensors_of, sign(tensors_of)),
        artifact("adapter", "trained", "adapter/*", bytes_of, sign(tensors_or_json)),
        artifact("an artifact's settings", "quantised", "*.json*", bytes_of, json_or_bytes, sign(json_or_bytes)),
        checkpoint("model.safetensors", "model.safetensors", bytes_of, tensors_of),
        Kind("model.safetensors.index.json", {"subject": here / "shards"}, files("subject/*.index.json"), (bytes_of, places, places), measured("subject"), value,
             plainly("subject")),
        checkpoint("config.json", "config.json", bytes_of, json_of, json_of),
        checkpoint("tokenizer.json", "tokenizer.json", bytes_of, json_of, json_of),
        checkpoint("tokenizer_config.json", "tokenizer_config.json", bytes_of, json_of, json_of),
        asked("chat_template", "chat_template.jinja", bytes_of, template_of),
        asked("generation_config.json", "generation_config.json", bytes_of, json_of, json_of),
        Kind("gguf", {"x.gguf": here / "Q8_0.gguf"}, files("x.gguf"), (bytes_of, bytes_of, head_of), measured("x.gguf"), value, plainly("x.gguf")),
        Kind("cached conversion", {"cache": here / "cache", "x.gguf": here / "Q8_0.gguf"}, lambda case: sorted(p for p in case.glob("cache/subjects/Q8_0-*/*") if p.is_file()),
             (bytes_of, tensors_or_json), lambda case: thesislib(*evaluate(here / "Q8_0.gguf")), value),
        Kind("cached stage", {"cache": here / "cache"}, lambda case: files("cache/stages/*/*")(case) + files("cache/stages/*/adapter/*")(case),
             (bytes_of, tensors_or_json), lambda case: thesislib(*here.compressed(here / "recipes" / "quantised.yaml", case / "out")), _made),
        Kind("fingerprint", {"cache": here / "cache"}, files("cache/fingerprints/*"), (bytes_of, json_of, other_fingerprint),
             lambda case: thesislib(*here.compressed(here / "recipes" / "pruned.yaml", case / "out")), _made),
        Kind("records", {"records.jsonl": here / "records.jsonl", "records.items.gz": here / "records.items.gz"}, files("records.jsonl"), (bytes_of, json_line_of, json_line_of),
             lambda case: thesislib("records", "--store", "records.jsonl", "--json"), lambda case, ended: sorted(ended.out.splitlines()), judge=_some_rows),
        Kind("items of records", {"records.jsonl": here / "records.jsonl", "records.items.gz": here / "records.items.gz"}, files("records.*"), (bytes_of, item_of),
             lambda case: lambda: _items(case), lambda case, ended: sorted(ended.out.splitlines()), judge=_some_rows),
        Kind("recipe", {"r.yaml": here / "recipes" / "trained.yaml"}, files("r.yaml"), (bytes_of, yaml_of, yaml_of), lambda case: lambda: _recipe(here, case / "r.yaml"),
             lambda case, ended: None, judge=_as_yaml_says),
        Kind("grid", {"g.yaml": here / "grid.yaml"}, files("g.yaml"), (bytes_of, yaml_of, yaml_of),
             lambda case: thesislib("sweep", case / "g.yaml", "--out", case / "rows.jsonl", "--subject", here / "subject", "--data", here / "data", "--dtype", "float32", "--dry-run"),
             lambda case, ended: None),
        Kind("device file", {"pi5.yaml": here / "pi5.yaml"}, files("pi5.yaml"), (bytes_of, yaml_of, yaml_of),
             lambda case: thesislib("profile", here / "subject", "--device", case / "pi5.yaml", "--dtype", "float32", "--json"), lambda case, ended: None, judge=_sane),
        Kind("texts", {"data": here / "data"}, files("data/wikitext2/test.jsonl"), (bytes_of, json_line_of), lambda case: thesislib(*evaluate(here / "subject", "wikitext", case / "data")),
             value, lambda case: plain_perplexity(here / "subject", case / "data")),
        Kind("questions", {"data": here / "data"}, files("data/trivia_qa/validation_closed_book.jsonl"), (bytes_of, json_line_of),
             lambda case: thesislib(*evaluate(here / "subject", "trivia", case / "data"), "--items"), answers, lambda case: plain_answers(here / "subject", case / "data")),
        Kind("choices", {"data": here / "data"}, files("data/ai2_arc/*"), (bytes_of, json_line_of),
             lambda case: thesislib(*evaluate(here / "subject", "arc_easy", case / "data"), "--fast"), lambda case, ended: None),
        Kind("notebook", {"book.ipynb": here / "book.ipynb"}, files("book.ipynb"), (bytes_of, json_of), lambda case: lambda: _look(case / "book.ipynb"), lambda case, ended: None),
        Kind("executed notebook", {"executed": here / "executed"}, files("executed/*.ipynb"), (bytes_of, json_of), lambda case: lambda: _executed(here, case),
             lambda case, ended: ended.out, cases=60),
        Kind("wheel's member", {"cache": here / "fetched"}, files("cache/wheels/*/pkg/**/*"), (bytes_of,), lambda case: lambda: _members(here, here / "index"),
             lambda case, ended: ended.out),
        Kind("wheel", {"index": here / "index"}, files("index/*"), (partial(bytes_of, devices=False),), lambda case: lambda: _members(here, case / "index"), lambda case, ended: ended.out),
        Kind("training checkpoint", {"cache": here / "halfway"}, files("cache/stages/*.work/*"), (bytes_of, tensors_or_json),
             lambda case: thesislib(*here.compressed(here / "recipes" / "trained.yaml", case / "out")), _made),
    ]  # fmt: skip
    return found


def prepared(here: Place, quick: bool = False) -> None:
    """What the cases copy besides: shards, a fetched wheel, a converted file; unless quick, an executed notebook and a
    training that was killed halfway."""
    from safetensors.torch import load_file, save_file

    copy(here / "subject", here / "shards")
    held = load_file(here / "shards" / "model.safetensors")
    (here / "shards" / "model.safetensors").unlink()
    names, weight_map = sorted(held), {}
    for n in range(2):
        file = f"model-0000{n + 1}-of-00002.safetensors"
        own = {name: held[name] for name in names[n::2]}
        save_file(own, here / "shards" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in held.values())}, "weight_map": weight_map}
    (here / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(held, here / "outside.safetensors", {"format": "pt"})
    ended = call(lambda: _members(here, here / "index"), here.root, here.environment(here / "fetched"), 60)
    assert ended.code == 0, ended.err
    here.must(*here.measured(here / "Q8_0.gguf"))
    if quick:
        return
    ended = call(lambda: _executed(here, here.root), here.root, here.environment(here / "cache"), 120)
    assert ended.code == 0, ended.err
    ended = call(lambda: _halfway(here), here.root, here.environment(here / "halfway"), 60)
    assert list((here / "halfway" / "stages").glob("*.work/*")), ended.err


def run(kind: Kind, here: Place, cases: range, seed: int) -> dict:
    """{"cases", "refused", "right", "other" (another input, rightly measured), "bad": [(what, how to see it
    again)]}."""
    counts = {"cases": 0, "refused": 0, "right": 0, "other": 0}
    bad = []
    case = here.root / "damage" / kind.name.replace(" ", "-").replace("'", "")
    _copied(kind, case)
    whole = _used(kind, here, case)
    if whole.code:
        return counts | {"bad": [(f"fails undamaged: {whole.trouble or whole.err[-300:]}", "")]}
    expected = kind.right(case, whole)
    for number in cases:
        rng = random.Random(f"{seed} {kind.name} {number}")
        _copied(kind, case)
        targets = kind.target(case)
        path = rng.choice(targets)
        said = (
            f"{path.relative_to(case)}: "
            f"{rng.choice(kind.ways)(path, rng, [p for p in targets if p != path] or [here / 'other' / 'model.safetensors', here / 'F16.gguf'])}"
        )
        how = f"--seed {seed} --only 'damage {kind.name}' --case {number}: {said}"
        ended = _used(kind, here, case)
        counts["cases"] += 1
        wrong = _wrong(kind, here, case, ended, expected, counts, said)
        if wrong:
            bad.append((wrong, how))
    shutil.rmtree(case, ignore_errors=True)
    return counts | {"bad": bad}


def _wrong(kind: Kind, here: Place, case: Path, ended: Ended, expected: object, counts: dict, how: str) -> str | None:
    if ended.trouble:
        return ended.trouble
    if ended.code == 2:
        counts["refused"] += 1
        return None
    if ended.code == 1:
        return f"exit 1 for bad input: {ended.err.strip()[-160:]}"
    if "READ OUTSIDE" in ended.err:
        return f"read outside its folder: {ended.err.split('READ OUTSIDE')[1].splitlines()[0]}"
    try:
        found = kind.right(case, ended)
    except Exception as error:
        return f"exit 0, and its result cannot be read: {type(error).__name__}: {str(error)[:120]}"
    if kind.judge:
        why = kind.judge(case, ended, expected)
        counts["right"] += not why
        return why
    if found == expected:
        counts["right"] += 1
        return None
    if (
        "signed" in how and kind.resigned and found[0] is not None
    ):  # it vouches for other weights or settings: another artifact
        counts["other"] += 1
        return None
    if kind.plain:
        ref = call(lambda: print(json.dumps(kind.plain(case))), case, here.environment(case / "other-cache"), SECONDS)
        if ref.code != 0:
            return (
                f"exit 0 with {str(found)[:60]}, where a plain program ends in {(ref.trouble or ref.err[-120:])[:140]}"
            )
        other = ref.json() if kind.right is answers else float(ref.out.strip().splitlines()[-1])
        if _same(found, other):
            counts["other"] += 1
            return None
        return f"exit 0 with {str(found)[:80]}, where a plain program says {str(other)[:80]}"
    return f"exit 0 with {str(found)[:80]}, expected {str(expected)[:80]}"


def _same(found: object, other: object) -> bool:
    if isinstance(other, float):
        mine = found[0]
        return (mine is None and not math.isfinite(other)) or (
            mine is not None and math.isclose(mine, other, rel_tol=1e-4)
        )
    return found == other


def _copied(kind: Kind, case: Path) -> None:
    kills.fresh(case)
    for name, source in kind.copies.items():
        copy(source, case / name)


def _used(kind: Kind, here: Place, case: Path) -> Ended:
    def do() -> int | None:
        import sys

        outside = str(here.root / "outside.safetensors")

        def look(event: str, args: tuple) -> None:
            if (
                event == "open"
                and isinstance(args[0], (str, bytes))
                and os.path.realpath(os.fsdecode(args[0])) == outside
            ):
                print(f"READ OUTSIDE {args[0]}", file=sys.stderr)

        sys.addaudithook(look)
        copy(Path(outside), case.parent / "outside.safetensors") if not (
            case.parent / "outside.safetensors"
        ).exists() else None
        return kind.use(case)()

    cache = (
        case / "cache"
        if "cache" in kind.copies
        else case / "cold"
        if kind.name in ("gguf", "wheel")
        else here / "cache"
    )
    return call(do, case, kills.environment(here, case) | here.environment(cache), SECONDS)


# ---------------------------------------------------------------- ways of single kinds


def tensors_or_json(path: Path, rng: random.Random, others: list[Path]) -> str:
    return (tensors_of if path.suffix == ".safetensors" else json_or_bytes)(path, rng, others)


def json_or_bytes(path: Path, rng: random.Random, others: list[Path]) -> str:
    return (json_of if path.suffix == ".json" else bytes_of)(path, rng, others)


def head_of(path: Path, rng: random.Random, others: list[Path]) -> str:
    """A GGUF's counts, lengths and names, where a reader allocates by them."""
    whole = bytearray(path.read_bytes())
    at = rng.choice([4, 8, 16, *(rng.randrange(24, 6000) for _ in range(5))])
    number = rng.choice([0, 1, 255, 2**31 - 1, 2**32 - 1, 2**40])
    whole[at : at + 8] = number.to_bytes(8, "little")
    path.write_bytes(whole)
    return f"{number} at byte {at}"


def template_of(path: Path, rng: random.Random, others: list[Path]) -> str:
    """Templates that are odd, hostile or endless."""
    odd = ["{{ raise_exception('no') }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ "
        "''.__class__.__mro__[1].__subclasses__() }}", "{{ messages[9].content }}",
           "{{ undefined.x }}", "{%", "{{", "{% if %}", "{{ 'x' * 10**9 }}", "{% include '/etc/passwd' "
               "%}", "{{ "
               "messages }}", "", " ", "plain", "{{ 1 / 0 }}",
           "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}", "{{ bos_token }}{{ "
               "messages[0].content }}", "{{ lipsum.__globals__ }}",
           "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "{{ messages[0]['content'] | upper }}", "\ufeff{{ messages[0].content }}"]  # fmt: skip
    text = rng.choice(odd)
    path.write_text(text, "utf8")
    return f"template {text!r}"


def other_fingerprint(path: Path, rng: random.Random, others: list[Path]) -> str:
    text = "".join(rng.choices("0123456789abcdef", k=64))
    path.write_text(json.dumps({"fingerprint": text}))
    return f"fingerprint {text[:8]}..."


def item_of(path: Path, rng: random.Random, others: list[Path]) -> str:
    """Items that are well-formed gzip with another content."""
    import gzip

    if path.suffix != ".gz":
        return json_line_of(path, rng, others)
    lines = gzip.decompress(path.read_bytes()).splitlines()
    at = rng.randrange(len(lines))
    plain, said = changed(json.loads(lines[at]), rng)
    lines[at] = json.dumps(plain).encode()
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return f"item {at}: {said}"


# ---------------------------------------------------------------- uses and verdicts of single kinds


def answers(case: Path, ended: Ended) -> object:
    return [item["answer"] for item in (ended.json() or {}).get("items", [])]


def plain_answers(subject: Path, data: Path) -> list[str]:
    """Greedy answers to the closed-book questions, up to the first special token, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tok = AutoTokenizer.from_pretrained(subject)
    model = AutoModelForCausalLM.from_pretrained(subject, dtype=torch.float32, use_safetensors=True).eval()
    ends = model.generation_config.eos_token_id
    ends = tok.eos_token_id if ends is None else ends
    config = GenerationConfig(
        max_new_tokens=50,
        min_new_tokens=1,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tok.pad_token_id,
        repetition_penalty=1.0,
    )
    rows = [
        json.loads(line)
        for line in (data / "trivia_qa" / "validation_closed_book.jsonl").read_bytes().splitlines()
        if line.strip()
    ]
    found = []
    chosen = random.Random(0).sample(rows, len(rows))[:4] if len(rows) > 4 else rows
    for row in chosen:
        bare = f"Question: {row['question']} Answer:"
        text = (
            tok.apply_chat_template([{"role": "user", "content": bare}], tokenize=False, add_generation_prompt=True)
            if tok.chat_template
            else bare
        )
        ids = tok(text, add_special_tokens=not text.startswith(tok.bos_token or "\0"), return_tensors="pt")["input_ids"]
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, ids.shape[1] :
        ].tolist()
        marks = {
            n
            for n, token in tok.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
        }
        special = {*tok.all_special_ids, *marks, *(ends if isinstance(ends, list) else [ends])}
        until = next((i for i, t in enumerate(new) if t in special), len(new))
        found.append(tok.decode(new[:until], skip_special_tokens=True).strip())
    return found


def _made(case: Path, ended: Ended) -> object:
    """What an artifact says it is and was made from, once its files are found right."""
    from thesislib.formats.artifact_json import read_artifact

    record = read_artifact(case / "out")
    return record["fingerprint"], record["base"], record["label"], record["stages"]


def _some_rows(case: Path, ended: Ended, expected: list) -> str | None:
    """Rows may be left out, aloud; none may be another."""
    found = ended.out.splitlines()
    if other := [row for row in found if row not in expected]:
        return f"exit 0 with another row: {_difference(other[0], expected)}"
    if len(found) < len(expected) and not ended.err.strip():
        return f"exit 0 with {len(found)} of {len(expected)} rows, and nothing said"
    return None


def _difference(row: str, expected: list[str]) -> str:
    near = max(expected, key=lambda e: sum(a == b for a, b in zip(row, e, strict=False)), default="")
    at = next((i for i, (a, b) in enumerate(zip(row, near, strict=False)) if a != b), 0)
    return f"...{row[max(0, at - 30) : at + 40]}..."


def _items(case: Path) -> int:
    from thesislib.errors import BadInput
    from thesislib.records.store import Store

    try:
        for name, m in Store(case / "records.jsonl").rows().items():
            print(name, json.dumps([m.task, m.metric, m.value, m.low, m.high, m.n, m.items]))
    except BadInput as error:
        import sys

        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _recipe(here: Place, path: Path) -> int:
    """As the command line checks it; then what it was taken to say."""
    code = thesislib("recipe", "check", path, "--subject", here / "subject")()
    if code == 0:
        from thesislib.pipeline.recipe import read_recipe

        print(json.dumps(read_recipe(path).entries()))
    return code


def _as_yaml_says(case: Path, ended: Ended, expected: object) -> str | None:
    """Every setting that plain YAML finds in the recipe is the one that is taken."""
    import yaml

    taken = ended.json()
    try:
        said = yaml.safe_load((case / "r.yaml").read_text("utf8"))["stages"]
    except Exception as error:
        return f"exit 0 for what plain YAML does not read: {str(error).splitlines()[0][:100]}"
    for one, other in zip(said, taken, strict=True):
        ((kind, settings),) = one.items()
        for key, setting in (settings or {}).items():
            if (mine := other[kind][key]) != setting and str(mine) != str(setting):
                return f"exit 0 with {kind}.{key} {_short(mine)} for {_short(setting)}"
    return None


def _sane(case: Path, ended: Ended, expected: object) -> str | None:
    """Numbers of a projection are finite and not negative."""
    plain = ended.json()
    if plain is None:
        return "exit 0 without JSON"
    for place in nodes(plain):
        found = plain
        for key in place:
            found = found[key]
        if isinstance(found, (int, float)) and not isinstance(found, bool) and (not math.isfinite(found) or found < 0):
            return f"exit 0 with {'.'.join(map(str, place))} {found}"
    return None


def _look(path: Path) -> int:
    """`thesislib run`, but for the execution itself, which takes seconds."""
    import papermill

    from thesislib import runner

    papermill.execute_notebook = lambda source, out, parameters, **_: shutil.copy(source, out)
    runner.chapters = lambda *_: {"01_book": path}
    return thesislib("run", "01", "-p", "k=2", "--out", path.parent / "out.ipynb")()


def _executed(here: Place, case: Path) -> None:
    """The output of a notebook that is executed or out of the cache."""
    import nbformat

    from thesislib.runner import executed

    found = executed("book", here / "book.ipynb", case / "executed")
    print([[o.get("text") for o in c.outputs] for c in nbformat.read(found, 4).cells if c.cell_type == "code"])


def _members(here: Place, index: Path) -> int:
    """A wheel's members out of the cache, or fetched; pip is replaced by a copy, which costs a hundredth."""
    import sys

    from thesislib.errors import BadInput
    from thesislib.sources import wheels

    class Copied:
        returncode, stdout, stderr = 0, "", ""

        def __init__(self, command: list[str], **_):
            try:
                for file in index.glob("*.whl"):
                    shutil.copy(file, command[command.index("--dest") + 1])
            except OSError as error:
                self.returncode, self.stderr = 1, str(error)

    wheels.manifest = lambda: here.manifest
    wheels.subprocess.run = Copied
    try:
        folder = wheels.wheel_folder("tinywheel")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print({p.relative_to(folder).as_posix(): kills.sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()})
    return 0


def _halfway(here: Place) -> None:
    """A training that ends, as if killed, when its fourth checkpoint is written."""
    from thesislib.compress import training as train

    written, calls = train.write_whole, []

    def write(file: Path, content: bytes) -> None:
        written(file, content)
        calls.append(file)
        if len(calls) == 4:
            os._exit(9)

    train.write_whole = write
    thesislib(*here.compressed(here / "recipes" / "trained.yaml", here / "never"))()


assert set(RECIPES) >= {"pruned", "quantised", "trained"}
