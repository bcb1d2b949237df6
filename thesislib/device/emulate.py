"""The engine on an emulated riscv64: llama.cpp cross-compiled and run under qemu-user, beside the same program on this
machine.

The results are whether tokens and logits are the host's, and how many instructions of each class a token takes. The
seconds of an emulator say nothing about any device, so they are neither kept nor shown. It is opt-in, since the first
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
# of llama.cpp, without models, tools and tests
PARTS = ("CMakeLists.txt", "cmake", "ggml", "include", "licenses", "src", "vendor")
OWN = "hw/emulate"  # see `thesislib.files.shipped`
TOOLS = {  # programs, and Debian's packages of them; the emulator of qemu-user-static takes no plugins
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
    *(f"-D{name}=OFF" for name in ("BUILD_SHARED_LIBS", "GGML_OPENMP", "GGML_CCACHE")),
    *(f"-DLLAMA_BUILD_{name}=OFF" for name in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
    "-DLLAMA_OPENSSL=OFF",
)
FLAGS = {
    "host": (*COMMON, "-DCMAKE_C_COMPILER=gcc", "-DCMAKE_CXX_COMPILER=g++", "-DGGML_NATIVE=ON"),
    # the control: the host without its vector instructions, as far as ggml can be built without them
    "plain host": (
        *COMMON,
        "-DCMAKE_C_COMPILER=gcc",
        "-DCMAKE_CXX_COMPILER=g++",
        *(f"-DGGML_{name}=OFF" for name in ("NATIVE", "SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "LLAMAFILE")),
    ),
    # GCC 12 has no vector extension and qemu 7.2 not all of it, so it is off, and so are small ones that ggml assumes
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

# How far emulated logits may differ from the host's: the root mean square, as a share of their spread. The bounds were
# chosen after data/results/07_emulated.json, at under three times the largest share there. Sums are taken in another
# order, so last digits differ. With float16 weights that is all: 0.0018 was measured. For any other type llama.cpp
# rounds activations to 8 bits before every product, where a last digit can decide a whole step: 0.033 to 0.088 was
# measured, and 0.042 to 0.089 between the host with and without its own vector instructions. So F16 is the sharp test
# of the build; the wide bound finds wrong kernels, not ones that are a little worse. (Rounding the weights themselves
# to Q4_0 changed the host's own logits by 0.6.)
TOLERANCE = {"F32": 0.005, "F16": 0.005}
ROUNDED_TOLERANCE = 0.15


@dataclass(frozen=True)
class Programs:
    """The programs that `build` compiles.

    Attributes:
        host: probe.cpp for this machine.
        plain_host: the same without vector instructions.
        riscv64: the same for riscv64.
        plugin: qemu's plugin that counts instructions.
    """

    host: Path
    plain_host: Path
    riscv64: Path
    plugin: Path


@dataclass(frozen=True)
class Distance:
    """The distance of two runs' logits, over the steps in which both had read the same tokens.

    Attributes:
        largest: the largest absolute difference.
        typical: the root mean square of the differences.
        spread: the standard deviation of the first run's logits over the vocabulary, its mean over steps.
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
    """One GGUF file on the host and emulated, decoded greedily on one thread.

    Attributes:
        host: the tokens that the host chose.
        emulated: the tokens that the emulated machine chose.
        agreement: how long the two are the same.
        distance: of the emulated logits from the host's.
        control: of the logits of the host without vector instructions from the host's.
        tolerance: the largest share of `distance` that is accepted.
        loading: how many instructions run before the prompt's pass.
        prompt: the instructions of that pass by class, see `CLASSES`.
        later: the instructions of each pass of one token after it.
        weights: how many numbers decoding one token multiplies by.
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
        """Whether the emulated logits lie within the tolerance."""
        return self.distance.share <= self.tolerance

    @property
    def per_token(self) -> dict[str, float]:
        """The instructions of one decoded token by class, their mean over the tokens after the prompt's."""
        return {name: float(np.mean([counts[name] for counts in self.later])) for name in CLASSES}

    @property
    def per_weight(self) -> float:
        """The instructions of a decoded token for each number that it multiplies by."""
        return sum(self.per_token.values()) / self.weights


def missing_tools() -> dict[str, str]:
    """The programs that are needed and not installed, each with its Debian package."""
    return {tool: package for tool, package in TOOLS.items() if not shutil.which(tool)}


def build(jobs: int = 1) -> Programs:
    """Fetch llama.cpp, build it for this machine and for riscv64, and build our programs on it.

    What was built before is kept.

    Args:
        jobs: compilers at a time. One takes about 10 minutes.

    Raises:
        BadInput: a program is missing (the message names its Debian package); no hw/emulate; no network; another
            sha256; a compiler fails.
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
            source = shipped(f"{OWN}/count.c")
            with whole_file(plugin) as temporary:
                _run(["gcc", "-O2", "-shared", "-fPIC", source, "-o", temporary], "compiling count.c")
    return Programs(probes["host"], probes["plain host"], probes["riscv64"], plugin)


def _sources(final: Path) -> Path:
    """The folder of llama.cpp. It is fetched once, by pip, so that the user's own index settings are used."""
    if final.exists():
        return final
    with whole_folder(final, alone=True) as folder, tempfile.TemporaryDirectory(dir=folder) as below:
        requirement = SOURCE.replace("_", "-").replace("python-", "python==")
        archive = downloaded(requirement, SHA256, Path(below), "llama.cpp, 77 MB", source=True)
        top = f"{SOURCE}/vendor/llama.cpp/"
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.startswith(tuple(top + part for part in PARTS)):
                    member.name = member.name.removeprefix(top)
                    tar.extract(member, folder, filter="data")
    return final


def _probe(target: str, sources: Path, root: Path, jobs: int) -> Path:
    """Our program for a target. Its static libraries are built once for these flags, this compiler and, for the host,
    this processor."""
    compiler = next(f.split("=")[1] for f in FLAGS[target] if "CXX_COMPILER" in f)
    key = _digest(*FLAGS[target], SHA256, _version(compiler), hardware()["cpu"] if target == "host" else "")
    folder = root / f"{target.replace(' ', '-')}-{key}"
    if not folder.exists():
        print(f"building llama.cpp for {target}: some minutes, once", file=sys.stderr)
        with whole_folder(folder, alone=True) as temporary:
            output = temporary / "made"
            _run(["cmake", "-S", sources, "-B", output, *FLAGS[target]], f"configuring llama.cpp for {target}")
            _run(["cmake", "--build", output, "--target", "llama", f"-j{jobs}"], f"building llama.cpp for {target}")
            for library in output.rglob("*.a"):
                shutil.move(library, temporary / library.name)
            shutil.rmtree(output)
    probe = folder / f"probe-{_digest(shipped(f'{OWN}/probe.cpp').read_text())}"
    if not probe.exists():
        includes = [f"-I{sources / below}" for below in ("include", "ggml/include")]
        # each library before those that it needs
        libraries = [folder / f"lib{name}.a" for name in ("llama", "ggml", "ggml-cpu", "ggml-base")]
        code: list[str | Path] = [*includes, shipped(f"{OWN}/probe.cpp"), *libraries, "-lm"]
        with whole_file(probe) as temporary:
            command = [compiler, "-O2", "-std=c++17", "-static", *code, "-o", temporary]
            _run(command, f"compiling probe.cpp for {target}")
            temporary.chmod(0o755)
        probe.chmod(0o755)
    return probe


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _version(tool: str) -> str:
    """The first line that a program prints of its version."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _run(
    command: Sequence[str | Path], task: str, environment: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """Run a program.

    Raises:
        BadInput: it takes longer than `timeout` seconds, or fails; the message has its last lines, and `task` in words.
    """
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{task} took longer than {timeout:.0f} s: ask for fewer tokens") from error
    if done.returncode:
        printed = (done.stderr + done.stdout).splitlines()
        lines = [line for line in printed if line.strip() and not line.startswith("count ")]
        raise BadInput(f"{task} failed (exit code {done.returncode}): {' / '.join(lines[-3:]) or 'it said nothing'}")
    return done


def emulate(
    file: str | Path, ids: Sequence[int], new_tokens: int = 8, programs: Programs | None = None, timeout: float = 3600
) -> Emulated:
    """Compare runs of a GGUF file on this machine, with and without vector instructions, and on an emulated riscv64.

    Args:
        file: a GGUF file.
        ids: the prompt's tokens.
        new_tokens: how many to decode greedily. The first comes from the prompt's own pass, so at least two are needed
            to count the instructions of one.
        programs: from `build`, by default built here.
        timeout: seconds that each run may take.

    Raises:
        BadInput: no such file; an empty prompt; fewer than two tokens; a file that llama.cpp cannot load; see also
            `build`.
    """
    if not Path(file).is_file():
        raise BadInput(
            f"{file} is no file: expected a GGUF file, such as `thesislib export SUBJECT --gguf Q8_0` writes"
        )
    if not ids or new_tokens < 2:
        raise BadInput(f"a prompt of {len(ids)} tokens and {new_tokens} new ones: expected at least one and two")
    programs = programs or build()
    plugin = str(programs.plugin).replace(",", ",,")  # qemu's escape of a comma
    qemu: list[str | Path] = ["qemu-riscv64", "-plugin", plugin, programs.riscv64]
    host, host_logits, _ = _decode([programs.host], file, ids, new_tokens, timeout)
    control, control_logits, _ = _decode([programs.plain_host], file, ids, new_tokens, timeout)
    emulated, emulated_logits, printed = _decode(qemu, file, ids, new_tokens, timeout)
    loading, (prompt, *later) = counted(printed)
    return Emulated(
        tuple(host),
        tuple(emulated),
        agreed(host, emulated, list(torch.from_numpy(host_logits))),
        distance(host, host_logits, emulated, emulated_logits),
        distance(host, host_logits, control, control_logits),
        TOLERANCE.get(file_type(file), ROUNDED_TOLERANCE),
        loading,
        prompt,
        tuple(later),
        multiplied(file),
    )


def _decode(
    program: Sequence[str | Path], file: str | Path, ids: Sequence[int], tokens: int, timeout: float
) -> tuple[list[int], np.ndarray, str]:
    """Run probe.cpp: its tokens, its logits (tokens, vocabulary) and its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        logits = Path(folder) / "logits"
        command = [*program, Path(file).resolve(), ",".join(map(str, ids)), str(tokens), logits]
        done = _run(command, f"running {file}", timeout=timeout)
        answer = json.loads(done.stdout)
        return answer["tokens"], np.fromfile(logits, np.float32).reshape(tokens, answer["vocabulary"]), done.stderr


def counted(printed: str) -> tuple[int, list[dict[str, int]]]:
    """The instructions before the first pass, and those of each pass by class, from the lines that the plugin printed.

    A pass lies between two marks.

    >>> counted("count 1 5 0 0 0 0 0 0\\ncount 1 7 1 0 3 0 0 0\\n")[1]
    [{'load': 2, 'store': 1, 'jump': 0, 'integer': 3, 'multiply': 0, 'float': 0, 'other': 0}]

    Raises:
        BadInput: no marks, an odd number of them, or more than one thread, since threads would share the counters.
    """
    marks = [[int(x) for x in line.split()[1:]] for line in printed.splitlines() if line.startswith("count ")]
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
    """The distance of two runs' logits (steps, vocabulary), up to the first step that chooses another token. That step
    still read the same tokens; later ones did not."""
    until = 1 + next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
    ours, off = logits[:until], logits[:until] - theirs[:until]
    return Distance(float(np.abs(off).max()), float(np.sqrt((off**2).mean())), float(ours.std(1).mean()))


def multiplied(file: str | Path) -> int:
    """How many numbers decoding one token multiplies by: those of all matrices of a GGUF file, but of the embedding's
    only if it is the head too."""
    sizes = {t.name: int(t.n_elements) for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def as_row(run: Emulated) -> dict[str, Any]:
    """A run with JSON's types only, and without seconds."""
    return {
        "tokens": {"host": list(run.host), "emulated": list(run.emulated)},
        "same": run.agreement.same,
        "of": run.agreement.of,
        "margin where they part": run.agreement.margin,
        "smallest lead": run.agreement.gap,
        "logits": _distance_row(run.distance) | {"tolerance": run.tolerance, "within": run.within},
        "logits of the host without vector instructions": _distance_row(run.control),
        "weights": run.weights,
        "instructions": {
            "loading": run.loading,
            "prompt": run.prompt,
            "per token": {name: round(n) for name, n in run.per_token.items()},
            "per token, all": round(sum(run.per_token.values())),
            "per weight": round(run.per_weight, 3),
            "each token": [sum(counts.values()) for counts in run.later],
        },
    }


def _distance_row(d: Distance) -> dict[str, float]:
    return {"largest difference": d.largest, "root mean square": d.typical, "spread": d.spread, "share": d.share}


def record(
    subject: Subject, runs: Iterable[tuple[str, Sequence[int] | None]], prompt: int = 8, tokens: int = 8, jobs: int = 1
) -> dict[str, Any]:
    """Emulate a subject in several GGUF types, whole or with some of its blocks. The record has JSON's types only, and
    all that is needed to make it again.

    Args:
        subject: the model.
        runs: a GGUF type and the blocks that are kept, None for all.
        prompt: how many tokens it has.
        tokens: see `emulate`.
        jobs: see `build`.
    """
    programs, ids, started, rows = build(jobs), prompt_ids(subject, prompt), time.perf_counter(), []
    for gguf_type, plan in runs:
        model = subject if plan is None else apply_plan(subject, list(plan))
        file = gguf_file(model, gguf_type)
        row = as_row(emulate(file, ids, tokens, programs))
        case = {"type": gguf_type, "blocks": model.depth, "plan": plan and list(plan)}
        rows.append({**case, "fingerprint": model.fingerprint, "sha256": sha256_of(file), **row})
        print(
            f"{gguf_type}, {model.depth} blocks: {row['same']} of {row['of']} tokens, "
            f"{row['instructions']['per token, all'] / 1e6:.0f} M a token",
            file=sys.stderr,
        )
    facts = provenance(subject, started, prompt=ids, tokens=tokens, threads=1, classes=list(CLASSES))
    for key in ("seconds", "peak_memory"):  # an emulator's, which nobody should take for a device's
        del facts[key]
    facts["versions"] |= {"llama.cpp": {"sdist": SOURCE, "sha256": SHA256}, **{tool: _version(tool) for tool in TOOLS}}
    facts["flags"] = {target: [f.removeprefix("-D") for f in flags] for target, flags in FLAGS.items()}
    facts["own sources"] = {name: sha256_of(shipped(f"{OWN}/{name}")) for name in ("probe.cpp", "count.c")}
    return {
        "what": "llama.cpp emulated: riscv64 without vectors under qemu-user beside the host; instructions are "
        "counted, seconds are not",
        "rows": rows,
        "provenance": facts,
    }


def readable(recorded: dict[str, Any]) -> str:
    """A record of `record` in a few lines."""
    name = recorded["provenance"]["subject"]
    lines = [f"{name}, llama.cpp on an emulated riscv64: instructions are counted, no time is taken"]
    for row in recorded["rows"]:
        counts, logits = row["instructions"], row["logits"]
        classes = ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in counts["per token"].items() if n >= 1e6)
        lines.append(
            f"  {row['type']}, {row['blocks']} blocks: {counts['per token, all'] / 1e6:,.1f} M a decoded token, "
            f"{counts['per weight']:.2f} a weight; by class, in M: {classes or 'each class less than one'}"
        )
        margin = row["margin where they part"]
        parted = "" if margin is None else f", where they part the host's lead is {margin:.3g}"
        within = "within" if logits["within"] else "NOT within"
        lines.append(
            f"    {row['same']} of {row['of']} tokens are the host's{parted}; logits {logits['share']:.2%} of their "
            f"spread apart, {within} {logits['tolerance']:.1%}"
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
        recorded = record(load_subject(), runs, given.prompt, given.tokens, given.jobs)
        write_whole(given.out, json.dumps(recorded, indent=1) + "\n")
    except BadInput as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
