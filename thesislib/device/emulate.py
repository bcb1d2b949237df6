"""The engine on riscv64 without such a machine: llama.cpp cross-compiled, run under qemu-user, beside the same program
on this machine.

What comes of it: whether the tokens and logits are the host's, and how many instructions of which class a token takes.
What an emulator needs in seconds says nothing about any device: it is neither kept nor shown. Opt-in, since the first
build takes minutes:

    python -m thesislib.device.emulate --out data/results/07_emulated.json
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from thesislib.device.measure import Agreement, agreed, file_type, gguf_file, prompt_ids
from thesislib.errors import BadInput
from thesislib.files import cache_dir, lock, sha256_of, shipped, whole_file, whole_folder, write_whole
from thesislib.formats.load import load_subject
from thesislib.model.blocks import apply_plan
from thesislib.model.subject import Subject
from thesislib.records.measurement import hardware, provenance
from thesislib.sources.wheels import downloaded

SOURCE = "llama_cpp_python-0.3.36"  # PyPI's source distribution, which has llama.cpp inside
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PARTS = (
    "CMakeLists.txt",
    "cmake",
    "ggml",
    "include",
    "licenses",
    "src",
    "vendor",
)  # of llama.cpp: without models, tools and tests
OWN = "hw/emulate"  # see `thesislib.files.shipped`
TOOLS = {  # and Debian's packages of them; qemu-user-static's emulator takes no plugins
    "cmake": "cmake",
    "make": "make",
    "gcc": "gcc",
    "g++": "g++",
    "riscv64-linux-gnu-gcc": "gcc-riscv64-linux-gnu",
    "riscv64-linux-gnu-g++": "g++-riscv64-linux-gnu",
    "qemu-riscv64": "qemu-user",
}
COMMON = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_COMMON=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
FLAGS = {
    "host": (*COMMON, "-DCMAKE_C_COMPILER=gcc", "-DCMAKE_CXX_COMPILER=g++", "-DGGML_NATIVE=ON"),
    # the control: the host without its vector instructions, as far as ggml can do without
    "plain host": (
        *COMMON,
        "-DCMAKE_C_COMPILER=gcc",
        "-DCMAKE_CXX_COMPILER=g++",
        *(f"-DGGML_{name}=OFF" for name in ("NATIVE", "SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "LLAMAFILE")),
    ),
    # GCC 12 knows no vector extension and qemu 7.2 not all of it: off, as are the small ones that ggml would assume
    "riscv64": (
        *COMMON,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=riscv64",
        "-DCMAKE_C_COMPILER=riscv64-linux-gnu-gcc",
        "-DCMAKE_CXX_COMPILER=riscv64-linux-gnu-g++",
        *(f"-DGGML_{name}=OFF" for name in ("RVV", "RV_ZFH", "RV_ZVFH", "RV_ZICBOP", "RV_ZIHINTPAUSE")),
    ),
}
CLASSES = ("load", "store", "jump", "integer", "multiply", "float", "other")  # as count.c prints them

# By how much emulated logits may differ from the host's: root mean square, as a share of their spread. Chosen after
# data/results/07_emulated.json, at under three times the largest share there. Sums are taken in another order, so last
# digits differ, and with float16 weights nothing more comes of it: 0.0018 was seen. For any other type llama.cpp rounds
# activations to 8 bits before every product, where a last digit decides a whole step: 0.033 to 0.088 was seen, and no
# less, 0.042 to 0.089, between the host with and without its own vector instructions. So F16 is the sharp test of the
# build; the wide bound finds kernels that are wrong, not ones that are a little worse. (Rounding the weights themselves
# to Q4_0 moved the host's own logits by 0.6.)
TOLERANCE = {"F32": 0.005, "F16": 0.005}
ROUNDED_TOLERANCE = 0.15


@dataclass(frozen=True)
class Programs:
    """What `build` makes: probe.cpp for this machine, for it without vector instructions and for riscv64, and the
    plugin that counts."""

    host: Path
    plain_host: Path
    riscv64: Path
    plugin: Path


@dataclass(frozen=True)
class Distance:
    """Of two runs' logits, as long as both read the same tokens.

    largest: absolute difference. typical: root mean square of the differences. spread: standard deviation of the
    first's logits over the vocabulary, mean over steps.
    """

    largest: float
    typical: float
    spread: float

    @property
    def share(self) -> float:
        """The typical difference as a share of the spread, which `TOLERANCE` bounds."""
        return self.typical / self.spread


@dataclass(frozen=True)
class Emulated:
    """One GGUF file on the host and emulated, greedily, one thread.

    host, emulated: tokens chosen. agreement: until where they are the same, and by what margin of the host's logits
    they part. distance: of the emulated logits from the host's. control: of those of the host without vector
    instructions from the host's. tolerance: of the distance's share. loading: instructions of all that comes before the
    prompt's pass. prompt: of that pass by class (`CLASSES`). later: of each pass of one token after it. weights: how
    many numbers decoding one token multiplies by.
    """

    host: tuple[int, ...]
    emulated: tuple[int, ...]
    agreement: Agreement
    distance: Distance
    control: Distance
    tolerance: float
    loading: int
    prompt: dict[str, int]
    later: tuple[dict[str, int], ...]
    weights: int

    @property
    def within(self) -> bool:
        """Whether the logits are the host's as far as can be expected."""
        return self.distance.share <= self.tolerance

    @property
    def per_token(self) -> dict[str, float]:
        """Instructions of one decoded token by class, mean over those after the prompt's."""
        return {name: float(np.mean([counts[name] for counts in self.later])) for name in CLASSES}

    @property
    def per_weight(self) -> float:
        """Instructions of a decoded token for each number that it multiplies by."""
        return sum(self.per_token.values()) / self.weights


def missing_tools() -> dict[str, str]:
    """Programs that are needed and not there, with the Debian package of each."""
    return {tool: package for tool, package in TOOLS.items() if not shutil.which(tool)}


def build(jobs: int = 1) -> Programs:
    """Fetch llama.cpp, build it for this machine and for riscv64, and build ours on top; what is there already is kept.

    Args:
        jobs: compilers at a time. One takes about 10 minutes.

    Raises:
        BadInput: a program is missing (said with its Debian package); no hw/emulate; no network; another sha256; a
            compiler fails.
    """
    if missing := missing_tools():
        raise BadInput(
            f"emulation needs {', '.join(missing)}, not found here: on Debian, apt-get install "
            f"{' '.join(sorted(set(missing.values())))}"
        )
    shipped(OWN)
    root = cache_dir() / "emulate"
    with lock(root / "build"):
        sources = _sources(root / SOURCE)
        probes = {target: _probe(target, sources, root, jobs) for target in FLAGS}
        plugin = root / f"count-{_digest(shipped(f'{OWN}/count.c').read_text(), _version('gcc'))}.so"
        if not plugin.exists():
            with whole_file(plugin) as temporary:
                _run(
                    ["gcc", "-O2", "-shared", "-fPIC", shipped(f"{OWN}/count.c"), "-o", temporary], "compiling count.c"
                )
    return Programs(probes["host"], probes["plain host"], probes["riscv64"], plugin)


def _sources(final: Path) -> Path:
    """The folder of llama.cpp, fetched once by pip, so that the user's own index settings hold."""
    if final.exists():
        return final
    with whole_folder(final, alone=True) as folder, tempfile.TemporaryDirectory(dir=folder) as below:
        archive = downloaded(
            SOURCE.replace("_", "-").replace("python-", "python=="),
            SHA256,
            Path(below),
            "llama.cpp, 77 MB",
            source=True,
        )
        top = f"{SOURCE}/vendor/llama.cpp/"
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.startswith(tuple(top + part for part in PARTS)):
                    member.name = member.name.removeprefix(top)
                    tar.extract(member, folder, filter="data")
    return final


def _probe(target: str, sources: Path, root: Path, jobs: int) -> Path:
    """Our program for a target, on static libraries that are built once for these flags, this compiler and, where it is
    native, this processor."""
    compiler = next(f.split("=")[1] for f in FLAGS[target] if "CXX_COMPILER" in f)
    key = _digest(*FLAGS[target], SHA256, _version(compiler), hardware()["cpu"] if target == "host" else "")
    folder = root / f"{target.replace(' ', '-')}-{key}"
    if not folder.exists():
        print(f"building llama.cpp for {target}: some minutes, once", file=sys.stderr)
        with whole_folder(folder, alone=True) as temporary:
            made = temporary / "made"
            _run(["cmake", "-S", sources, "-B", made, *FLAGS[target]], f"configuring llama.cpp for {target}")
            _run(["cmake", "--build", made, "--target", "llama", f"-j{jobs}"], f"building llama.cpp for {target}")
            for library in made.rglob("*.a"):
                shutil.move(library, temporary / library.name)
            shutil.rmtree(made)
    probe = folder / f"probe-{_digest(shipped(f'{OWN}/probe.cpp').read_text())}"
    if not probe.exists():
        includes = [f"-I{sources / place}" for place in ("include", "ggml/include")]
        libraries = [
            folder / f"lib{name}.a" for name in ("llama", "ggml", "ggml-cpu", "ggml-base")
        ]  # each before those that it needs
        with whole_file(probe) as temporary:
            _run(
                [
                    compiler,
                    "-O2",
                    "-std=c++17",
                    "-static",
                    *includes,
                    shipped(f"{OWN}/probe.cpp"),
                    *libraries,
                    "-lm",
                    "-o",
                    temporary,
                ],
                f"compiling probe.cpp for {target}",
            )
            temporary.chmod(0o755)
        probe.chmod(0o755)
    return probe


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _version(tool: str) -> str:
    """What a program says of its version, its first line."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _run(
    command: Sequence[str | Path], what: str, environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """A program's output, or an error with its last words."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            env={**os.environ, **(environment or {})},
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{what} took longer than {timeout:.0f} s: ask for fewer tokens") from error
    if done.returncode:
        said = [
            line for line in (done.stderr + done.stdout).splitlines() if line.strip() and not line.startswith("count ")
        ]
        raise BadInput(f"{what} failed (exit code {done.returncode}): {' / '.join(said[-3:]) or 'it said nothing'}")
    return done


def emulate(
    file: str | Path, ids: Sequence[int], new_tokens: int = 8, programs: Programs | None = None, timeout: float = 3600
) -> Emulated:
    """Run a GGUF file on this machine, with and without its vector instructions, and on an emulated riscv64, and
    compare.

    Args:
        file: GGUF.
        ids: the prompt's tokens.
        new_tokens: to decode greedily; the first comes from the prompt's own pass, so at least two for a count of what
            one costs.
        programs: what `build` made; made if need be.
        timeout: seconds that each run may take.

    Raises:
        BadInput: no such file; an empty prompt; fewer than two tokens; what llama.cpp cannot load; see also `build`.
    """
    if not Path(file).is_file():
        raise BadInput(
            f"{file} is no file: expected a GGUF file, such as `thesislib export SUBJECT --gguf Q8_0` writes"
        )
    if not ids or new_tokens < 2:
        raise BadInput(f"a prompt of {len(ids)} tokens and {new_tokens} new ones: expected at least one and two")
    programs = programs or build()
    plugin = str(programs.plugin).replace(",", ",,")  # qemu's way to write a comma
    host, theirs, _ = _decode([programs.host], file, ids, new_tokens, timeout)
    control, plain, _ = _decode([programs.plain_host], file, ids, new_tokens, timeout)
    emulated, ours, said = _decode(
        ["qemu-riscv64", "-plugin", plugin, programs.riscv64], file, ids, new_tokens, timeout
    )
    loading, (prompt, *later) = counted(said)
    return Emulated(
        tuple(host),
        tuple(emulated),
        agreed(host, emulated, list(torch.from_numpy(theirs))),
        distance(host, theirs, emulated, ours),
        distance(host, theirs, control, plain),
        TOLERANCE.get(file_type(file), ROUNDED_TOLERANCE),
        loading,
        prompt,
        tuple(later),
        multiplied(file),
    )


def _decode(
    program: Sequence[str | Path], file: str | Path, ids: Sequence[int], tokens: int, timeout: float
) -> tuple[list[int], np.ndarray, str]:
    """probe.cpp's tokens, logits (tokens, vocabulary) and what was said on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits"
        done = _run(
            [*program, Path(file).resolve(), ",".join(map(str, ids)), str(tokens), logits],
            f"running {file}",
            timeout=timeout,
        )
        answer = json.loads(done.stdout)
        return answer["tokens"], np.fromfile(logits, np.float32).reshape(tokens, answer["vocabulary"]), done.stderr


def counted(said: str) -> tuple[int, list[dict[str, int]]]:
    """The plugin's lines as instructions before the first pass, and of each pass by class; a pass stands between two
    marks.

    >>> counted("count 1 5 0 0 0 0 0 0\\ncount 1 7 1 0 3 0 0 0\\n")[1]
    [{'load': 2, 'store': 1, 'jump': 0, 'integer': 3, 'multiply': 0, 'float': 0, 'other': 0}]

    Raises:
        BadInput: no marks, an odd number of them, or more than one thread, whose adds would get in each other's way.
    """
    marks = [[int(x) for x in line.split()[1:]] for line in said.splitlines() if line.startswith("count ")]
    if not marks or len(marks) % 2 or any(len(mark) != 1 + len(CLASSES) for mark in marks):
        raise BadInput(
            f"the plugin printed {len(marks)} marks: expected two for every pass; is this qemu older than 4.2 or "
            "newer than 8.2?"
        )
    if (threads := max(mark[0] for mark in marks)) != 1:
        raise BadInput(f"instructions were counted on {threads} threads: expected one, since the counters are shared")
    passes = zip(marks[::2], marks[1::2], strict=True)
    return sum(marks[0][1:]), [
        {name: b - a for name, a, b in zip(CLASSES, before[1:], after[1:], strict=True)} for before, after in passes
    ]


def distance(tokens: Sequence[int], logits: np.ndarray, others: Sequence[int], theirs: np.ndarray) -> Distance:
    """Between two runs' logits (steps, vocabulary), up to the step where they first choose another token: it still read
    the same, those beyond it do not."""
    until = 1 + next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
    ours, off = logits[:until], logits[:until] - theirs[:until]
    return Distance(float(np.abs(off).max()), float(np.sqrt((off**2).mean())), float(ours.std(1).mean()))


def multiplied(file: str | Path) -> int:
    """How many numbers of a GGUF file's matrices decoding one token multiplies by: all, but the embedding's only where
    it is the head too."""
    sizes = {t.name: int(t.n_elements) for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def as_row(found: Emulated) -> dict[str, Any]:
    """JSON's types only; no seconds."""
    return {
        "tokens": {"host": list(found.host), "emulated": list(found.emulated)},
        "same": found.agreement.same,
        "of": found.agreement.of,
        "margin where they part": found.agreement.margin,
        "smallest lead": found.agreement.gap,
        "logits": _plain(found.distance) | {"tolerance": found.tolerance, "within": found.within},
        "logits of the host without vector instructions": _plain(found.control),
        "weights": found.weights,
        "instructions": {
            "loading": found.loading,
            "prompt": found.prompt,
            "per token": {name: round(n) for name, n in found.per_token.items()},
            "per token, all": round(sum(found.per_token.values())),
            "per weight": round(found.per_weight, 3),
            "each token": [sum(counts.values()) for counts in found.later],
        },
    }


def _plain(off: Distance) -> dict[str, float]:
    return {
        "largest difference": off.largest,
        "root mean square": off.typical,
        "spread": off.spread,
        "share": off.share,
    }


def record(
    subject: Subject, runs: Iterable[tuple[str, Sequence[int] | None]], prompt: int = 8, tokens: int = 8, jobs: int = 1
) -> dict[str, Any]:
    """Emulate a subject in several GGUF types, whole or with some blocks only, as JSON's types with what is needed to
    do it again.

    Args:
        subject: the model.
        runs: a GGUF type and the blocks that are kept, None for all.
        prompt: how many tokens it has.
        tokens: see `emulate`.
        jobs: see `build`.
    """
    programs, ids, started, rows = build(jobs), prompt_ids(subject, prompt), time.perf_counter(), []
    for kind, plan in runs:
        model = subject if plan is None else apply_plan(subject, list(plan))
        file = gguf_file(model, kind)
        row = as_row(emulate(file, ids, tokens, programs))
        rows.append(
            {
                "type": kind,
                "blocks": model.depth,
                "plan": plan and list(plan),
                "fingerprint": model.fingerprint,
                "sha256": sha256_of(file),
                **row,
            }
        )
        print(
            f"{kind}, {model.depth} blocks: {row['same']} of {row['of']} tokens, "
            f"{row['instructions']['per token, all'] / 1e6:.0f} M a token",
            file=sys.stderr,
        )
    made = provenance(subject, started, prompt=ids, tokens=tokens, threads=1, classes=list(CLASSES))
    for key in ("seconds", "peak_memory"):  # of an emulator: no one should take them for a device's
        del made[key]
    made["versions"] |= {"llama.cpp": {"sdist": SOURCE, "sha256": SHA256}, **{tool: _version(tool) for tool in TOOLS}}
    made["flags"] = {target: [f.removeprefix("-D") for f in flags] for target, flags in FLAGS.items()}
    made["own sources"] = {name: sha256_of(shipped(f"{OWN}/{name}")) for name in ("probe.cpp", "count.c")}
    return {
        "what": "llama.cpp emulated: riscv64 without vectors under qemu-user beside the host; instructions are "
        "counted, "
        "seconds are not",
        "rows": rows,
        "provenance": made,
    }


def readable(plain: dict[str, Any]) -> str:
    """A few lines of what `record` says."""
    lines = [
        f"{plain['provenance']['subject']}, llama.cpp on an emulated riscv64: instructions are counted, no time "
        "is taken"
    ]
    for row in plain["rows"]:
        counts, logits = row["instructions"], row["logits"]
        by_class = (
            ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in counts["per token"].items() if n >= 1e6)
            or "each class less than one"
        )
        lines.append(
            f"  {row['type']}, {row['blocks']} blocks: {counts['per token, all'] / 1e6:,.1f} M a decoded token, "
            f"{counts['per weight']:.2f} a weight; "
            f"by class, in M: {by_class}"
        )
        parted = (
            ""
            if row["margin where they part"] is None
            else f", where they part the host's lead is {row['margin where they part']:.3g}"
        )
        within = "within" if logits["within"] else "NOT within"
        lines.append(
            f"    {row['same']} of {row['of']} tokens are the host's{parted}; logits {logits['share']:.2%} of their "
            "spread apart, "
            f"{within} {logits['tolerance']:.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Record the embedded model in four types, and with ten of its blocks in one."""
    parser = argparse.ArgumentParser(
        description="Emulate the embedded model on riscv64 and record tokens, logits and instructions."
    )
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--prompt", type=int, default=8, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens, the first from the prompt's own pass")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    given = parser.parse_args()
    runs = [("F16", None), ("Q8_0", None), ("Q4_0", None), ("Q4_1", None), ("Q4_0", range(0, 30, 3))]
    try:
        subject = load_subject()
        write_whole(
            given.out, json.dumps(record(subject, runs, given.prompt, given.tokens, given.jobs), indent=1) + "\n"
        )
    except BadInput as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
