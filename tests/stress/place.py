"""What the cases work on: a tiny random model in every form, texts, recipes, a grid, records, a notebook and a
wheel."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from .forked import call, thesislib

# LLaMA 3's
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "river",
    "stone",
    "lantern",
    "seven",
    "copper",
    "window",
    "the",
    "of",
    "and",
    "under",
    "morning",
    "quiet",
    "market",
    "bridge",
    "letter",
    "1984",
    "twelve",
    "harbour",
    "it",
    "was",
    "a",
]
LENGTH, WINDOWS = 48, 4  # of every perplexity here
RECIPES = {
    "pruned": "stages:\n- depth: {blocks: [1]}\n- width: {remove: 2, of: 4, metric: magnitude}\n",
    "quantised": "stages:\n- width: {remove: 1, of: 8, metric: magnitude}\n- gptq: {bits: 4, group: 32, windows: 2, "
    "length: "
    "48, grid: asymmetric, text: c4}\n"
    "- eora: {rank: 4, windows: 2, length: 48, text: c4}\n",
    "streamed": "stages:\n- width: {remove: 1, of: 8, windows: 2, length: 48, text: c4}\n",
    "trained": "stages:\n- depth: {remove: 1, metric: influence, windows: 2, length: 48}\n"
    "- lora: {text: wikitext, rank: 2, steps: 8, batch: 2, accumulate: 1, length: 48, every: 2, validation: 2, "
    "checkpoint_every: 1}\n",
}
GRID = """name: small
stages:
  Q: {gptq: {bits: 4, group: 32, windows: 2, length: 48, text: c4}}
groups:
  some: [[none, D1], [none, "W1:8"]]
sizes:
  quick:
    stages:
      D1: {depth: {remove: 1, metric: influence, windows: 2, length: 48}}
      "W1:8": {width: {remove: 1, of: 8, metric: magnitude}}
    measures: {perplexity: {on: wikitext, length: 48, limit: 4}}
"""
PARTS = {"pkg/a.txt": b"alpha\n" * 1000, "pkg/deep/b.bin": random.Random(0).randbytes(3 << 20)}  # of the wheel


def prose(n: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n)) + "."


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([prose(200, i) for i in range(20)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=CHATML, bos_token=special[0], eos_token=special[2], pad_token=special[0]
    )


def save_model(folder: Path, seed: int = 0) -> Path:
    tok = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=16, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
                         pad_token_id=0)  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def save_texts(root: Path) -> Path:
    answer = {"value": "copper", "aliases": ["copper"]}
    tables = {
        "wikitext2/test": [{"text": t} for i in range(6) for t in (f" = Article {i} = \n", prose(120, 100 + i) + "\n")],
        "wikitext2/train_head": [{"text": t} for i in range(6) for t in (f" = Other {i} = \n", prose(120, 200 + i) + "\n")],
        "c4/train_sample": [{"text": prose(150, 300 + i)} for i in range(8)],
        "wikipedia/train_sample": [{"text": prose(150, 400 + i)} for i in range(8)],
        "trivia_qa/validation_closed_book": [{"question_id": str(i), "question": "Which "
            f"{prose(4 + i, i)}?", "answer": answer} for i in range(3)],
        "ai2_arc/easy_validation": [
            {"id": str(i), "question": prose(6, 700 + i), "answerKey": "A", "choices": {"text": [prose(2, 800 + 4 * i + k) for k in range(4)], "label": list("ABCD")}}
            for i in range(3)
        ],
    }  # fmt: skip
    for stem, rows in tables.items():
        path = root / f"{stem}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def save_notebook(path: Path) -> Path:
    """A notebook of chapters' kind, without torch in its kernel."""
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    prelude = "from dataclasses import make_dataclass\nfrom thesislib.config import settings"
    cells = [("", prelude), ("parameters", "k = 1\nname = 'x'"), ("", "p = settings(make_dataclass('P', [('k', int), "
        "('name', str)]), globals())"),
             ("", "import time\nfor _ in range(10): time.sleep(0.03)"), ("", "print(p.k * p.k, p.name)")]  # fmt: skip
    nb.cells = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}) for tag, source in cells]
    nbformat.write(nb, path)
    return path


def save_wheel(folder: Path) -> dict:
    """An installable wheel in `folder`; the manifest that names it."""
    info = "tinywheel-1.0.dist-info"
    parts = PARTS | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    parts |= {f"{info}/RECORD": "".join(f"{name},,\n" for name in parts).encode()}
    folder.mkdir(parents=True)
    path = folder / "tinywheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    members = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in PARTS.items()
    }
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"tinywheel": {"version": "1.0", "sha256": sha256, "holds": "a test", "licence": "none", "members": members}}


@dataclass(frozen=True)
class Place:
    """A folder with everything: see `Place.made`."""

    root: Path
    manifest: dict

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def environment(self, cache: Path) -> dict[str, str]:
        return {"THESISLIB_CACHE": str(cache)}

    def measured(self, subject: Path | str, on: str = "wikitext", data: Path | None = None) -> list:
        """The call that measures a subject in a fraction of a second."""
        return [
            "evaluate",
            subject,
            "--on",
            on,
            "--data",
            data or self / "data",
            "--dtype",
            "float32",
            "--length",
            LENGTH,
            "--limit",
            WINDOWS,
            "--json",
        ]

    def compressed(self, recipe: str | Path, out: Path, subject: Path | None = None) -> list:
        return [
            "compress",
            recipe,
            "--subject",
            subject or self / "subject",
            "--data",
            self / "data",
            "--dtype",
            "float32",
            "--out",
            out,
        ]

    def must(self, *args, cache: Path | None = None):
        """A call that has to work."""
        ended = call(thesislib(*args), self.root, self.environment(cache or self / "cache"), 120)
        assert ended.code == 0, f"{' '.join(map(str, args))}: {ended.trouble or ended.code}\n{ended.err[-2000:]}"
        return ended

    @classmethod
    def made(cls, root: Path) -> "Place":
        """subject/, other/ (another model), data/, recipes, grid.yaml, artifacts pruned, quantised, trained; .gguf
        files; a store of records."""
        root.mkdir(parents=True, exist_ok=True)
        save_model(root / "subject")
        save_model(root / "other", seed=1)
        save_texts(root / "data")
        save_notebook(root / "book.ipynb")
        (root / "grid.yaml").write_text(GRID)
        (root / "recipes").mkdir()
        for name, text in RECIPES.items():
            (root / "recipes" / f"{name}.yaml").write_text(text)
        here = cls(root, save_wheel(root / "index"))
        for name in ("pruned", "quantised", "trained"):
            here.must(*here.compressed(root / "recipes" / f"{name}.yaml", root / name))
        for kind in ("F16", "Q8_0"):
            here.must("export", root / "subject", "--gguf", kind, "--out", root / f"{kind}.gguf")
        device = Path(__file__).parents[2] / "hw" / "devices" / "pi5.yaml"
        shutil.copy(device, root / "pi5.yaml")
        call(lambda: records(here), root, here.environment(root / "cache"), 60)
        assert (root / "records.jsonl").exists(), (root / ".err").read_text()
        return here


def records(here: Place) -> None:
    """A store of three measurements, as a sweep would append them."""
    from thesislib import experiment
    from thesislib.evaluate.setup import Setup
    from thesislib.pipeline.recipe import parse_label
    from thesislib.records.store import Store

    store = Store(here / "records.jsonl")
    for label in ("D1", "W1:8", "D1+W1:8"):
        stages = [
            type(s)(**({"blocks": [1]} if "D" in s.label else {"remove": 1, "of": 8, "metric": "magnitude"}))
            for s in parse_label(label).stages
        ]
        ready = experiment.prepare(str(here / "subject"), stages, data=str(here / "data"), dtype="float32")
        store.append(ready.measure(Setup("wikitext", length=LENGTH, limit=WINDOWS), str(here / "data")))


def plain_perplexity(subject: Path, data: Path) -> float:
    """What `Place.measured` should say, by transformers alone.

    Raises:
        whatever transformers, tokenizers or json raise; ValueError where weights are missing or do not fit.
    """
    import numpy as np

    where, more = (subject.parent, {"gguf_file": subject.name}) if subject.suffix == ".gguf" else (subject, {})
    tok = AutoTokenizer.from_pretrained(where, **more)
    model, report = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **more
    )
    if any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"not what the file holds: {report}")
    rows = [
        json.loads(line)["text"]
        for line in (data / "wikitext2" / "test.jsonl").read_bytes().splitlines()
        if line.strip()
    ]
    ids = torch.tensor(tok("\n\n".join(rows), add_special_tokens=False, verbose=False)["input_ids"])
    n = len(ids) // LENGTH
    cut = ids[: n * LENGTH].view(n, LENGTH)[
        torch.from_numpy(np.linspace(0, n - 1, min(WINDOWS, n)).round().astype(int))
    ]
    with torch.no_grad():
        logits = model.eval()(cut).logits.float()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), cut[:, 1:].flatten()).exp())


def prepared() -> None:
    """Import what calls need, so that a forked one does not, and keep to one thread: a thread pool does not outlive a
    fork."""
    import importlib

    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    for name in ("cli", "book", "pipeline.offload", "formats.gguf", "formats.gptq", "compress.lora.train", "experiment", "chapters.ch03_width", "sweep.run",
                 "device.report", "device.measured", "device.emulate", "device.host"):  # fmt: skip
        importlib.import_module(f"thesislib.{name}")
    for name in (
        "transformers.models.llama.modeling_llama",
        "transformers.integrations",
        "transformers.generation",
        "papermill",
        "distributed",
    ):
        importlib.import_module(name)
    for name in ("utf_8_sig", "idna", "ascii", "latin_1"):
        importlib.import_module(f"encodings.{name}")  # another user may not read Python's own folder
    import dask

    from thesislib.records.measurement import commit

    dask.config.set({"distributed.worker.multiprocessing-method": "fork"})  # Dask's workers have all imported too
    with contextlib.redirect_stdout(io.StringIO()):
        thesislib(
            "recipe", "label", "D1"
        )()  # what Typer imports late; no file is read, whose checksum a process may remember
    commit()
    for name in ("torch", "transformers", "tokenizers", "numpy", "safetensors"):
        version(name)
