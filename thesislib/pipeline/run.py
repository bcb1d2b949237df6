"""Running recipes: the subject after each stage is kept in the cache, under a hash of everything that it depends on.

Recipes share the work of the stages that they begin with. A killed run continues with the stage that was running. If
two processes need the same stage, one computes it and the other waits.
"""

import dataclasses
import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from filelock import Timeout

import thesislib
from thesislib.errors import BadInput
from thesislib.files import (
    HARMLESS,
    cache_dir,
    clear_leftovers,
    expanded,
    explain_errors,
    lock,
    read_json,
    real,
    replaceable_folder,
    sha256_of,
    whole_folder,
    write_whole,
)  # fmt: skip
from thesislib.formats.artifact import load_artifact, save_artifact
from thesislib.formats.artifact_json import RECORD, read_artifact
from thesislib.formats.convert import SUMS
from thesislib.formats.load import checkpoint_folder, load_subject
from thesislib.formats.options import check_dtype, own_dtype
from thesislib.imports import PACKAGE, digest_of, imported, sources
from thesislib.model.layers import PackedLinear, unpack_all
from thesislib.model.lowrank import LowRank
from thesislib.model.subject import Subject
from thesislib.pipeline.forecast import Forecast, forecast, shape_of, stand_in
from thesislib.pipeline.recipe import Recipe, read_recipe
from thesislib.sources.rows import default_data, origin_of
from thesislib.sources.wheels import manifest

T = TypeVar("T")
AROUND = (
    "thesislib.formats.load",
    "thesislib.formats.artifact",
)  # they load every stage's subject, save its result
SCHEMA = 1  # raise it when the same settings get another meaning


def compress(
    subject: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    data: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    packed: bool = True,
) -> Path:
    """Run a recipe on a subject and write the artifact folder `out`; stages in the cache are not computed again.

    Args:
        subject: a subject spec, see `thesislib.formats.load.load_subject`.
        recipe: a recipe's file, a label such as D2+W1:8, or a `Recipe`.
        out: a new folder, or an artifact that this one replaces.
        data: a data spec for calibration; by default the recipe's own, else `thesislib.sources.rows.default_data()`.
        dtype: of the loaded subject; by default its own, see `thesislib.formats.options.own_dtype`.
        device: a torch device.
        packed: see `thesislib.formats.artifact.save_artifact`.

    Raises:
        BadInput: a recipe that cannot work on this subject, before any weight is read; a full disk; an error of a
            stage.
    """
    out = expanded(out)
    with explain_errors():
        job = Job.prepare(subject, recipe, data, dtype, device)
        folder = artifact_folder(out, job.source)
        job.forecast()  # raises for stages that do not fit the subject's shapes, before anything is computed
        job.write(folder, packed)
    return folder


@dataclass
class Job:
    """A recipe on a subject.

    Attributes:
        recipe: the stages.
        source: the subject's checkpoint folder.
        name: the subject's name.
        data: see `compress`.
        dtype: see `compress`.
        device: see `compress`.
        artifact: the content of artifact.json if the subject is an artifact itself; else None.
    """

    recipe: Recipe
    source: Path
    name: str
    data: str
    dtype: str
    device: str
    artifact: dict | None

    @classmethod
    def prepare(
        cls,
        subject: str | Path,
        recipe: str | Path | Recipe,
        data: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> "Job":
        """The job, with every check that needs no weights.

        Raises:
            BadInput: see `compress`.
        """
        recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
        recipe.check()
        data = next(spec for spec in (data, recipe.data, default_data()) if spec is not None)
        origin_of(data)
        check_dtype(dtype)
        source, name = checkpoint_folder(str(subject))
        dtype = dtype or own_dtype(subject)
        recipe.check(shape_of(stand_in(source)))
        artifact = read_json(source / RECORD) if (source / RECORD).is_file() else None
        return cls(recipe, source, artifact["name"] if artifact else name, data, dtype, device, artifact)

    @cached_property
    def subject(self) -> Subject:
        """The subject before the first stage.

        Raises:
            BadInput: its fingerprint is not the one in the cache, although size and time of its files are the same.
        """
        subject = dataclasses.replace(load_subject(self.source, self.dtype, self.device), name=self.name)
        unpack_all(subject.model, but=(LowRank,))  # pairs of low rank stay such
        if "base" in self.__dict__ and self.base["fingerprint"] != subject.fingerprint:
            self.fingerprint_file.unlink(missing_ok=True)
            raise BadInput(
                f"the weights in {self.source} are others than before, though their files' size and time stayed: was "
                "a byte damaged? "
                "What was remembered of them is forgotten; run again to go on with them as they are"
            )
        return subject

    @property
    def fingerprint_file(self) -> Path:
        """The file in the cache with the subject's fingerprint, named by the size and times of the subject's files."""
        # also the time of the last change of the inode, which no program can set back
        changed = [file.stat().st_ctime_ns for file in sorted(self.source.glob("*")) if file.is_file()]
        name = _hash([str(self.source.resolve()), _files(self.source, "*"), changed, self.dtype])
        return cache_dir() / "fingerprints" / f"{name}.json"

    @cached_property
    def base(self) -> dict[str, str]:
        """The subject's name and fingerprint, and its label if it is an artifact itself.

        The fingerprint is cached while the files keep size and time, so that a cached recipe loads no weights.
        """
        file = self.fingerprint_file
        try:
            content = read_json(file)
            fingerprint = content["fingerprint"]
            if content["sha256"] != _hash([file.stem, fingerprint]):
                raise KeyError
        except (BadInput, KeyError, TypeError):
            fingerprint = self.subject.fingerprint
            write_whole(file, json.dumps({"fingerprint": fingerprint, "sha256": _hash([file.stem, fingerprint])}))
        label = {"label": self.artifact["label"]} if self.artifact else {}
        return {"name": self.name, "fingerprint": fingerprint, **label}

    @cached_property
    def keys(self) -> list[str]:
        """The cache's key for the subject after each stage, a hash over everything that it depends on.

        That is the weights, the files that say how they run and how text becomes tokens, the stages so far with every
        setting (seeds too), the calibration data and this package's version. The source files that a stage imports
        count too, directly or not, since the version does not change while a stage is being written.
        """
        facts = {
            "schema": SCHEMA,
            "version": thesislib.__version__,
            "fingerprint": self.base["fingerprint"],
            "configuration": _settings(self.source),
            "dtype": self.dtype,
            "data": _identity(self.data),
        }
        # a pair of low rank and its product have one fingerprint, and stages tell them apart
        encodings = (self.artifact or {}).get("encodings", {})
        if pairs := {name: encoding for name, encoding in encodings.items() if encoding.startswith("lowrank:")}:
            facts["pairs"] = pairs
        hashes = [sources_of(type(stage)) for stage in self.recipe.stages]
        stages = list(zip(self.recipe.entries(), hashes, strict=True))
        return [_hash({**facts, "stages": stages[:n]}) for n in range(1, len(stages) + 1)]

    def folder(self, n: int) -> Path:
        """The cache's folder for the subject after the first `n` stages, whether it exists or not."""
        return cache_dir() / "stages" / self.keys[n - 1]

    def forecast(self) -> list[Forecast]:
        """See `thesislib.pipeline.forecast.forecast`."""
        return forecast(self.recipe, None if self.artifact else stand_in(self.source, self.dtype), self._sizes)

    def _sizes(self, n: int) -> dict[str, int] | None:
        """The sizes of the subject after the first `n` stages if the cache has it, else None."""
        try:
            sizes = read_json(self.folder(n) / RECORD)["sizes"]
            return {name: sizes[name] for name in ("parameters", "nonzero_parameters", "bytes_on_disk")}
        except (BadInput, KeyError, TypeError):
            return None

    def after(self, n: int) -> tuple[Subject, list[dict]]:
        """The subject after the first `n` stages, and their reports.

        It is read from its checkpoint even if it was just computed, so that the next stage gets the same bits as in a
        run that continues from there. (Matrix libraries may round differently at another memory address.)
        """
        return self.with_checkpoint(n, self._load) if n else (self.subject, [])

    def with_checkpoint(self, n: int, read: Callable[[Path], T]) -> T:
        """The result of `read` on the checkpoint after stage `n`, which is computed if the cache has none.

        A checkpoint that `read` refuses with BadInput is computed again.
        """
        stage, folder = self.recipe.stages[n - 1], self.folder(n)
        work = folder.with_name(f"{folder.name}.work")
        title = f"stage {n} of {len(self.recipe.stages)}, {self.recipe.label_of(n)}"
        with _alone(folder, title):
            if folder.exists():
                try:
                    result = read(folder)
                    shutil.rmtree(work, ignore_errors=True)  # of a run killed just before it removed this
                    _say(f"{title}: out of the cache")
                    return result
                except BadInput as error:
                    _say(f"{title}: the checkpoint cannot be used and is computed again ({error})")
            before, reports = self.after(n - 1)
            # a compensating stage corrects the change that the previous stage made
            more = {"original": self.after(n - 2)[0]} if stage.needs_original else {}
            _say(f"{title}: computing")
            work.mkdir(exist_ok=True)
            try:
                subject, report = stage.apply(before, data=self.data, work=work, **more)
            except BadInput as error:
                raise BadInput(f"{self.recipe.locations[n - 1]}: {error}") from error
            # leftovers of a run killed while it saved, and a damaged checkpoint; the lock keeps others away
            clear_leftovers(folder, alone=True)
            if folder.exists():
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            self.save(subject, [*reports, report], folder)
            shutil.rmtree(work, ignore_errors=True)
            del before, more, subject  # so that they are not in memory twice
            return read(folder)

    def write(self, out: Path, packed: bool = True) -> None:
        """Write the artifact, as a copy of the last checkpoint if possible."""
        n = len(self.recipe.stages)
        record = self.with_checkpoint(n, read_artifact)
        with _alone(cache_dir() / "locks" / _hash(str(out.resolve())), f"writing {out}"):
            if packed and record["base"] == self.base:
                with whole_folder(out) as temporary:
                    shutil.copytree(self.folder(n), temporary, dirs_exist_ok=True)
            else:  # a plain checkpoint, or the same weights under another name
                self.save(*self.after(n), out, packed)

    def _load(self, folder: Path) -> tuple[Subject, list[dict]]:
        """A checkpoint's subject and reports; quantised weights stay packed, sparse ones are unpacked for stages."""
        subject = dataclasses.replace(load_artifact(folder, self.dtype, self.device), name=self.name)
        unpack_all(subject.model, PackedLinear)
        return subject, read_json(folder / RECORD)["reports"]

    def save(self, subject: Subject, reports: list[dict], folder: Path, packed: bool = True) -> None:
        """Write the subject after the first stages, one for each report, as an artifact."""
        n = len(reports)
        save_artifact(
            subject,
            folder,
            stages=self.recipe.entries()[:n],
            reports=reports,
            base=self.base,
            label=self.recipe.label_of(n),
            packed=packed,
        )


# ---------------------------------------------------------------- parts of a key


def sources_of(cls: type, package: Path = PACKAGE) -> str:
    """sha256 over the source files that a stage's result depends on.

    These are its module, the modules that load, save and run it, and all that they import.
    """
    names = {cls.__module__, *AROUND}
    if cls.__module__.partition(".")[0] == "thesislib":
        return digest_of([*sources(names, package), package / "pipeline" / "run.py"], package)
    file = Path(inspect.getfile(cls))  # of a stage outside this package
    return digest_of(sources(names | imported(file.read_text("utf8")), package), package) + sha256_of(file)


def _settings(folder: Path) -> dict[str, str]:
    """The sha256 of each file with settings of the model, the tokenizer or generation, which results may copy.

    Weights are left out, with their index and artifact.json: the fingerprint covers them.
    """
    settings = {}
    for file in sorted([*folder.glob("*"), *(folder / "additional_chat_templates").rglob("*")]):
        name = file.relative_to(folder).as_posix()
        skipped = name in (RECORD, SUMS) or name.endswith(".index.json") or name.lower().startswith(HARMLESS)
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken") and file.is_file() and not skipped:
            settings[name] = sha256_of(file)
    return settings


def _identity(data: str) -> object:
    """A value that differs between calibration texts, computed without reading them."""
    if origin_of(data) == "embedded":
        return {name: entry["sha256"] for name, entry in manifest().items()}
    return data if data == "hub" else _files(expanded(data), "*", "*/*")


def _files(folder: Path, *patterns: str) -> list[tuple[str, int, int]]:
    """The name, bytes and modification time in ns of each of a folder's files."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return [(file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- folders and locks


def artifact_folder(out: str | Path, source: Path) -> Path:
    """Check, before any work, that an artifact can be written to `out`; see `thesislib.files.replaceable_folder`.

    Raises:
        BadInput: it cannot be written there, or the subject's folder `source` is there.
    """
    if source.resolve().is_relative_to(real(out)):
        raise BadInput(f"{out} holds the subject itself: expected another folder for the artifact")
    return replaceable_folder(out, replaces=RECORD)


@contextmanager
def _alone(path: Path, title: str) -> Iterator[None]:
    """Lock `path` inside the block; a process that has to wait prints a line. A kill leaves no lock behind."""
    own = lock(path)
    try:
        own.acquire(timeout=0)
    except Timeout:
        _say(f"{title}: another process is at it, waiting")
        own.acquire()
    try:
        yield
    finally:
        own.release()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
