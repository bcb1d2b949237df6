"""llama.cpp's own quantised files of a subject, measured by this study's protocol: `python -m benchmarks.llama_cpp`.

llama.cpp's quantiser makes them from this package's F16 file. Their weights, as `thesislib.formats.gguf_reader` decodes
them, are measured like any other subject's, on WikiText-2 whole and on the held-out text of chapter 5. The rows are
added to data/results/05_llama_cpp.jsonl, about 7 minutes a file on one thread of a quiet machine; run again, it makes
those that are missing. The extra `engine` and THESISLIB_DATA are needed.
"""

import argparse
import ctypes
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from thesislib.chapters.ch05_runs import HELD_OUT, PPL, recorded_parameters
from thesislib.chapters.pareto import ENGINE_FILE
from thesislib.device.measure import engine_name
from thesislib.errors import BadInput
from thesislib.experiment import prepare
from thesislib.files import sha256_of
from thesislib.formats.gguf import export_gguf
from thesislib.formats.gguf_reader import GgufModel
from thesislib.formats.load import load_subject
from thesislib.records.store import Store, study
from thesislib.sources.rows import default_data

TYPES = ("Q4_0", "Q5_0", "Q8_0")
MEASURES = (PPL, HELD_OUT)


def quantise(f16: Path, file: Path, kind: str) -> None:
    """Let llama.cpp quantise an F16 file with its defaults for a type, on one thread."""
    import llama_cpp as ll

    options = ll.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    if code := ll.llama_model_quantize(str(f16).encode(), str(file).encode(), ctypes.byref(options)):
        raise BadInput(f"llama.cpp cannot quantise {f16} to {kind}: it answers {code}")


def type_shares(file: Path) -> dict[str, float]:
    """The share of a file's numbers that each of its types holds, e.g. {"Q5_0": 0.79, "Q8_0": 0.21, "F32": 0.0}."""
    numbers: dict[str, int] = {}
    for tensor in GgufModel(file).stored.values():
        numbers[tensor.tensor_type.name] = numbers.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return {kind: n / sum(numbers.values()) for kind, n in sorted(numbers.items(), key=lambda pair: -pair[1])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=study() / ENGINE_FILE)
    parser.add_argument("--subject", default="embedded")
    parser.add_argument("--data", default=None)
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit("skipped: llama.cpp is not installed here: pip install -e '.[engine]'")
    import llama_cpp as ll

    store, p = Store(chosen.out), recorded_parameters(data=chosen.data or default_data(), subject=chosen.subject)
    have = {(m.label, m.chapter["what"]) for m in store.rows(items=False).values()} if store.path.exists() else set()
    versions = {"llama_cpp_python": ll.__version__, "llama.cpp": ll.llama_version().decode()}
    original = load_subject(p.subject, p.dtype)
    with tempfile.TemporaryDirectory() as folder:
        f16 = export_gguf(load_subject(p.subject), Path(folder) / "F16.gguf", "F16")
        for kind in tqdm(TYPES, desc="llama.cpp's files", unit="file", disable=None):
            todo = [what for what in MEASURES if (engine_name(kind), what) not in have]
            if not todo:
                continue
            file = f16.with_name(f"{original.name}-{kind}.gguf")
            quantise(f16, file, kind)
            facts = {
                "of": original.fingerprint,
                "made_by": versions,
                "sha256": sha256_of(file),
                "bytes": file.stat().st_size,
                "types": type_shares(file),
            }
            ready = prepare(str(file), (), data=p.data, dtype=p.dtype)
            size = {key: ready.history["bytes"][key] for key in ("parameters", "nonzero_parameters")}
            made = {"label": engine_name(kind), "bytes": {**size, "bytes_on_disk": facts["bytes"]}}
            ready = dataclasses.replace(ready, history={**ready.history, **made})
            for what in todo:
                setup, data = p.protocols()[what]
                store.append(ready.measure(setup, data, file=facts, chapter={"what": what}))


if __name__ == "__main__":
    main()
