"""Pruning a model larger than memory: its blocks are read from a checkpoint and written back one at a time."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from thesislib.errors import BadInput, unknown
from thesislib.files import whole_folder, write_whole
from thesislib.formats.artifact_json import RECORD, write_record
from thesislib.formats.checkpoint import (
    DERIVED,
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    check_tensors,
    empty_model,
    full_name,
    headers,
    read_config,
    read_tokenizer,
)
from thesislib.formats.load import checkpoint_folder
from thesislib.formats.options import check_dtype, own_dtype
from thesislib.model.forward import attention_windows
from thesislib.model.layers import projections
from thesislib.model.subject import DTYPES, fingerprint
from thesislib.model.tokenizers import check_windows
from thesislib.pipeline.recipe import read_recipe
from thesislib.pipeline.run import artifact_folder
from thesislib.sources.rows import default_data


class FromFolder:
    """The blocks of a plain checkpoint folder; after its visit each is written into `target`.

    After the pass, `finish` writes the embedding, the last norm and the head, the index, the configuration and the
    tokenizer. The result is a plain sharded checkpoint with a file for each block.

    Args:
        source: a folder with config.json and safetensors.
        target: an existing folder, best a temporary one (`thesislib.files.whole_folder`).
        dtype: 'float32' or 'bfloat16', of the computation and of the result.
        device: of the one block in memory.

    Raises:
        BadInput: a folder that is no such checkpoint, unknown architecture or dtype.
    """

    def __init__(self, source: Path, target: Path, dtype: str = "bfloat16", device: str = "cpu"):
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        self.source, self.target, self.dtype, self.device = Path(source), Path(target), DTYPES[dtype], device
        config = read_config(self.source)
        if (self.source / "adapter_config.json").is_file() or getattr(config, "quantization_config", None):
            raise BadInput(
                f"{source} holds an adapter or quantised weights: weights are streamed from a plain checkpoint, "
                "which `thesislib compress --plain` writes"
            )
        stored = headers(self.source)
        self.model = empty_model(config, self.dtype).eval().requires_grad_(False)
        expected = {key: tuple(t.shape) for key, t in self.model.state_dict().items()}
        check_tensors(self.source, stored, expected, bool(config.tie_word_embeddings))
        # by a tensor's name in the model: its file, and its name there
        used = ((key, header.file) for key, header in stored.items() if not DERIVED.fullmatch(key))
        self.files = {full_name(key): (file, key) for key, file in used}
        if config.tie_word_embeddings and HEAD in self.files:
            if EMBEDDING not in self.files or torch.equal(self._tensor(HEAD), self._tensor(EMBEDDING)):
                self.files.setdefault(EMBEDDING, self.files.pop(HEAD))
            else:  # another head is kept, see `thesislib.formats.checkpoint.read_tensors`
                config.tie_word_embeddings = False
        self.config, self.depth = config, config.num_hidden_layers
        self.windows = attention_windows(config)
        self._rotary = type(self.model.model.rotary_emb)(config).to(device)
        self.written: dict[str, str] = {}

    @property
    def inputs(self) -> dict[str, int]:
        """The inputs of each projection of a block by name."""
        return {name: m.weight.shape[1] for name, m in projections(self.model.model.layers[0]).items()}

    @property
    def fingerprint(self) -> str:
        """As `Subject.fingerprint`, with one tensor in memory at a time."""
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        return fingerprint((key, self._tensor(tied.get(key, key))) for key in sorted(self.model.state_dict()))

    @property
    def sizes(self) -> dict[str, int]:
        """As `thesislib.formats.sizes.sizes` of the whole model, with one tensor in memory at a time."""
        parameters = nonzero = 0
        for key in self.files:
            tensor = self._tensor(key)
            parameters, nonzero = parameters + tensor.numel(), nonzero + int(torch.count_nonzero(tensor))
        nbytes = parameters * self.dtype.itemsize + sum(buffer.nbytes for buffer in self._rotary.buffers())
        return {"parameters": parameters, "nonzero_parameters": nonzero, "bytes_in_memory": nbytes}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens -> (B, T, D); the embedding is in memory only during this call."""
        file, key = self.files[EMBEDDING]
        with safe_open(file, framework="pt") as opened:
            table = opened.get_tensor(key)
        return nn.functional.embedding(ids, table).to(self.dtype)

    def rotary(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `thesislib.compress.calibration.Blocks`."""
        return self._rotary(x, position_ids=positions)

    @contextmanager
    def hold(self, i: int) -> Iterator[nn.Module]:
        """Block i in memory; it is written when the context ends without an error."""
        block, prefix = copy.deepcopy(self.model.model.layers[i]), f"model.layers.{i}."
        block.load_state_dict({k: self._tensor(prefix + k) for k in block.state_dict()}, assign=True)
        block.requires_grad_(False)
        for key, tensor in block.state_dict().items():
            if not torch.isfinite(tensor.sum(dtype=torch.float32)):
                raise BadInput(f"weight '{prefix}{key}' holds NaN or infinity: the checkpoint is damaged")
        yield block
        self._write(f"model-{i:05d}.safetensors", {prefix + k: v.cpu() for k, v in block.state_dict().items()})

    def finish(self) -> None:
        """Write the rest of the checkpoint."""
        names = [k for k in self.model.state_dict() if not k.startswith("model.layers.") and k in self.files]
        self._write(f"model-{self.depth:05d}.safetensors", {name: self._tensor(name).cpu() for name in names})
        size = sum((self.target / f).stat().st_size for f in set(self.written.values()))
        index = {"metadata": {"total_size": size}, "weight_map": self.written}
        write_whole(self.target / INDEX, json.dumps(index, indent=1))
        config = copy.deepcopy(self.config)
        config.dtype = self.dtype
        config.save_pretrained(self.target)
        for file in self.source.iterdir():  # tokenizer, chat template, generation settings
            copied = file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != RECORD
            if copied and not (self.target / file.name).exists():
                shutil.copyfile(file, self.target / file.name)

    def _tensor(self, name: str) -> torch.Tensor:
        """A tensor of the source by its name in the model."""
        file, key = self.files[name]
        with safe_open(file, framework="pt") as opened:  # each time, since an open file keeps its pages in memory
            return opened.get_tensor(key).to(self.device, self.dtype)

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write a file of the target, and check that it reads back."""
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        save_file(tensors, self.target / name, metadata={"format": "pt"})
        with safe_open(self.target / name, framework="pt") as file:
            for key, tensor in tensors.items():
                if not torch.equal(file.get_tensor(key), tensor):
                    raise BadInput(
                        f"'{key}' reads back from {name} as other numbers than were written: is the disk sound?"
                    )
        self.written.update(dict.fromkeys(tensors, name))


def compress_streamed(
    spec: str, recipe: str | Path, out: Path, *, data: str | None = None, dtype: str | None = None, device: str = "cpu"
) -> Path:
    """Run a recipe of one width stage with one block in memory at a time, and write an artifact folder.

    Args:
        spec: a subject that is a plain checkpoint.
        recipe: a recipe's file or label.
        out: a new folder, or an artifact that this one replaces.
        data: a data spec for calibration; by default the recipe's own, else THESISLIB_DATA, else embedded.
        dtype: of the computation and of the result; by default the subject's own, see
            `thesislib.formats.options.own_dtype`.
        device: a torch device.

    Raises:
        BadInput: other stages; a checkpoint, a text or a shape that cannot be used.
    """
    parsed = read_recipe(recipe)
    if len(parsed.stages) != 1 or not parsed.stages[0].streams or parsed.stages[0].family != "pruned":
        raise BadInput(
            f"--stream-weights takes a recipe of one WANDA stage, e.g. W2:4, and this one is {parsed.label}: carry "
            "out the others first with --plain, then stream over the checkpoint they leave"
        )
    stage: Any = parsed.stages[0]  # of a class with `stream_weights`
    check_dtype(dtype)
    source, name = checkpoint_folder(spec)
    dtype = dtype or own_dtype(spec)
    if (source / RECORD).is_file() and not (source / SINGLE).is_file() and not (source / INDEX).is_file():
        raise BadInput(
            f"{source} is a packed artifact: weights are streamed from a plain checkpoint, which `thesislib "
            "compress --plain` writes"
        )
    out = artifact_folder(out, source)
    tokenizer = read_tokenizer(source)
    spec_of_data = next(spec for spec in (data, parsed.data, default_data()) if spec is not None)
    windows = stage.ids(tokenizer, spec_of_data)
    with whole_folder(out) as folder:
        blocks = FromFolder(source, folder, dtype, device)
        check_windows(blocks.model, tokenizer, windows)
        stage.check(blocks.inputs, blocks.depth)
        report = stage.stream_weights(blocks, windows)
        blocks.finish()
        before, after = FromFolder(source, folder, dtype), FromFolder(folder, folder, dtype)
        write_record(
            folder,
            label=parsed.label,
            name=name,
            plan=None,
            stages=parsed.entries(),
            reports=[report],
            base={"name": name, "fingerprint": before.fingerprint},
            fingerprint=after.fingerprint,
            dtype=dtype,
            sizes=after.sizes,
            encodings={},
            repeats={},
            without={},
        )
    return out
