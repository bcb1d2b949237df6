"""Recipes carried out: what each stage makes is kept in the cache, under the hash of everything that it depends on.

Two recipes that begin alike share the work of their beginning, a run that died goes on with the stage in which it died,
and of two processes that need the same stage one computes it while the other waits.
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
from thesislib.model.subject import Subject
from thesislib.pipeline.forecast import Forecast, forecast, shape_of, stand_in
from thesislib.pipeline.recipe import Recipe, read_recipe
from thesislib.sources.rows import default_data, origin_of
from thesislib.sources.wheels import manifest

T = TypeVar("T")
AROUND = ("thesislib.formats.load", "thesislib.formats.artifact")  # what every stage's subject comes from and goes to
SCHEMA = 1  # raise it when the same settings come to mean something else


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
    """Carry out a recipe on a subject and write the artifact folder `out`; what the cache holds is not computed again.

    Args:
        subject: a subject spec, see `thesislib.formats.load.load_subject`.
        recipe: a recipe's file, a label such as D2+W1:8, or a `Recipe`.
        out: a new folder, or an artifact that this one replaces.
        data: a data spec for calibration; by default the recipe's own, else `thesislib.sources.rows.default_data()`.
        dtype: as the subject is loaded; by default its own, see `thesislib.formats.options.own_dtype`. device: a torch
            device.
        packed: see `thesislib.formats.artifact.save_artifact`.

    Raises:
        BadInput: a recipe that cannot work on this subject, before any weight is read; a full disk; whatever a stage
            refuses.
    """
    out = expanded(out)
    with explain_errors():
        job = Job.prepare(subject, recipe, data, dtype, device)
        place = place_for(out, job.source)
        job.forecast()  # refuses what does not fit the subject's shapes, while nothing is computed yet
        job.write(place, packed)
    return place


@dataclass
class Job:
    """A recipe on a subject.

    Attributes:
        recipe: what to do.
        source: the subject's checkpoint folder.
        name: the subject's.
        data, dtype, device: see `compress`.
        made: what artifact.json says, if the subject is an artifact itself.
    """

    recipe: Recipe
    source: Path
    name: str
    data: str
    dtype: str
    device: str
    made: dict | None

    @classmethod
    def prepare(
        cls,
        subject: str | Path,
        recipe: str | Path | Recipe,
        data: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> "Job":
        """The job, if all that can be checked without reading a weight is right.

        Raises:
            BadInput: see `compress`.
        """
        recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
        recipe.check()
        data = next(given for given in (data, recipe.data, default_data()) if given is not None)
        origin_of(data)
        check_dtype(dtype)
        source, name = checkpoint_folder(str(subject))
        dtype = dtype or own_dtype(subject)
        recipe.check(shape_of(stand_in(source)))
        made = read_json(source / RECORD) if (source / RECORD).is_file() else None
        return cls(recipe, source, made["name"] if made else name, data, dtype, device, made)

    @cached_property
    def subject(self) -> Subject:
        """What the recipe begins with.

        Raises:
            BadInput: its weights are not those whose fingerprint was remembered, though size and time of its files
                stayed.
        """
        made = dataclasses.replace(load_subject(self.source, self.dtype, self.device, packed=False), name=self.name)
        if "base" in self.__dict__ and self.base["fingerprint"] != made.fingerprint:
            self._memory.unlink(missing_ok=True)
            raise BadInput(
                f"the weights in {self.source} are others than before, though their files' size and time stayed: was "
                "a byte damaged? "
                "What was remembered of them is forgotten; run again to go on with them as they are"
            )
        return made

    @property
    def _memory(self) -> Path:
        """Where the subject's fingerprint is remembered."""
        # also the time of the last change of any kind, which no program can set back
        changed = [file.stat().st_ctime_ns for file in sorted(self.source.glob("*")) if file.is_file()]
        return (
            cache_dir()
            / "fingerprints"
            / f"{_hash([str(self.source.resolve()), _files(self.source, '*'), changed, self.dtype])}.json"
        )

    @cached_property
    def base(self) -> dict[str, str]:
        """The subject's name and fingerprint, and the label if it is an artifact itself.

        A fingerprint is remembered for as long as the files keep size and time: a cached recipe loads no weight.
        """
        memory = self._memory
        try:
            kept = read_json(memory)
            fingerprint = kept["fingerprint"]
            if kept["sha256"] != _hash([memory.stem, fingerprint]):
                raise KeyError
        except (BadInput, KeyError, TypeError):
            fingerprint = self.subject.fingerprint
            write_whole(memory, json.dumps({"fingerprint": fingerprint, "sha256": _hash([memory.stem, fingerprint])}))
        return {"name": self.name, "fingerprint": fingerprint, **({"label": self.made["label"]} if self.made else {})}

    @cached_property
    def keys(self) -> list[str]:
        """For each stage the name under which the cache keeps the subject after it.

        A hash over everything that it depends on: the weights, how they run and how text becomes tokens; the stages so
        far, with every setting (seeds too); the calibration data; this package's version. The sources that a stage and
        what keeps its result import, however far, count as well, since the version stands still while a stage is being
        written.
        """
        facts = {
            "schema": SCHEMA,
            "version": thesislib.__version__,
            "fingerprint": self.base["fingerprint"],
            "configuration": _settings(self.source),
            "dtype": self.dtype,
            "data": _identity(self.data),
        }
        stages = [
            (plain, sources_of(type(stage)))
            for stage, plain in zip(self.recipe.stages, self.recipe.plain(), strict=True)
        ]
        return [_hash({**facts, "stages": stages[:n]}) for n in range(1, len(stages) + 1)]

    def folder(self, n: int) -> Path:
        """Where the cache keeps the subject after the first `n` stages, if it does."""
        return cache_dir() / "stages" / self.keys[n - 1]

    def forecast(self) -> list[Forecast]:
        """See `thesislib.pipeline.forecast.forecast`."""
        return forecast(self.recipe, None if self.made else stand_in(self.source, self.dtype), self._sizes)

    def _sizes(self, n: int) -> dict[str, int] | None:
        """What the cache says of the subject after the first `n` stages, if it holds it."""
        try:
            sizes = read_json(self.folder(n) / RECORD)["sizes"]
            return {name: sizes[name] for name in ("parameters", "nonzero_parameters", "bytes_on_disk")}
        except (BadInput, KeyError, TypeError):
            return None

    def after(self, n: int) -> tuple[Subject, list[dict]]:
        """The subject after the first `n` stages and their reports.

        It is read from its checkpoint even when it was just computed: so the next stage gets what a run that goes on
        from there would give it, to the last bit. (Matrix libraries may round otherwise where a tensor begins
        elsewhere.)
        """
        return self.with_checkpoint(n, self._load) if n else (self.subject, [])

    def with_checkpoint(self, n: int, read: Callable[[Path], T]) -> T:
        """Compute stage `n` unless the cache has a checkpoint after it that `read` can use; then what `read` makes of
        its folder."""
        stage, folder = self.recipe.stages[n - 1], self.folder(n)
        work = folder.with_name(f"{folder.name}.work")
        title = f"stage {n} of {len(self.recipe.stages)}, {self.recipe.label_of(n)}"
        with _alone(folder, title):
            if folder.exists():
                try:
                    found = read(folder)
                    shutil.rmtree(work, ignore_errors=True)  # a kill may have come just before
                    _say(f"{title}: out of the cache")
                    return found
                except BadInput as error:
                    _say(f"{title}: the checkpoint cannot be used and is computed again ({error})")
            before, reports = self.after(n - 1)
            # what a compensating stage makes up for is what the stage before it did
            more = {"original": self.after(n - 2)[0]} if stage.needs_original else {}
            _say(f"{title}: computing")
            work.mkdir(exist_ok=True)
            try:
                made, report = stage.apply(before, data=self.data, work=work, **more)
            except BadInput as error:
                raise BadInput(f"{self.recipe.places[n - 1]}: {error}") from error
            # what a run left that was killed while it saved, and a damaged checkpoint; nobody else is at them now
            clear_leftovers(folder, alone=True)
            if folder.exists():
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            self.save(made, [*reports, report], folder)
            shutil.rmtree(work, ignore_errors=True)
            del before, more, made  # before they are in memory twice
            return read(folder)

    def write(self, out: Path, packed: bool = True) -> None:
        """Write the artifact: a copy of the last checkpoint, if that is what it should be."""
        n = len(self.recipe.stages)
        record = self.with_checkpoint(n, read_artifact)
        with _alone(cache_dir() / "locks" / _hash(str(out.resolve())), f"writing {out}"):
            if packed and record["base"] == self.base:
                with whole_folder(out) as temporary:
                    shutil.copytree(self.folder(n), temporary, dirs_exist_ok=True)
            else:  # other weights on disk, or made first from the same subject under another name
                self.save(*self.after(n), out, packed)

    def _load(self, folder: Path) -> tuple[Subject, list[dict]]:
        """A checkpoint's subject and reports. Quantised weights stay packed; sparse ones are unpacked, for stages to
        read."""
        made = dataclasses.replace(load_artifact(folder, self.dtype, self.device), name=self.name)
        unpack_all(made.model, PackedLinear)
        return made, read_json(folder / RECORD)["reports"]

    def save(self, made: Subject, reports: list[dict], folder: Path, packed: bool = True) -> None:
        """Write the subject after the first stages, as many as there are reports, as an artifact."""
        n = len(reports)
        save_artifact(
            made,
            folder,
            stages=self.recipe.plain()[:n],
            reports=reports,
            base=self.base,
            label=self.recipe.label_of(n),
            packed=packed,
        )


# ---------------------------------------------------------------- identities


def sources_of(kind: type, package: Path = PACKAGE) -> str:
    """sha256 of the code that a stage's result comes from: its own module's, that which loads, saves and runs it, and
    all that these import."""
    names = {kind.__module__, *AROUND}
    if kind.__module__.partition(".")[0] == "thesislib":
        return digest_of([*sources(names, package), package / "pipeline" / "run.py"], package)
    own = Path(inspect.getfile(kind))  # a stage of somebody else's
    return digest_of(sources(names | imported(own.read_text("utf8")), package), package) + sha256_of(own)


def _settings(folder: Path) -> dict[str, str]:
    """sha256 of the files that say how weights run, how text becomes tokens and how it is generated: all that a result
    may hold a copy of.

    Weights, their index and what artifact.json says of them are in the fingerprint.
    """
    files = [*folder.glob("*"), *(folder / "additional_chat_templates").rglob("*")]
    found = {
        file.relative_to(folder).as_posix(): file
        for file in files
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken")
    }
    skip = (
        RECORD,
        SUMS,
        *(name for name in found if name.endswith(".index.json") or name.lower().startswith(HARMLESS)),
    )
    return {name: sha256_of(file) for name, file in sorted(found.items()) if name not in skip and file.is_file()}


def _identity(data: str) -> object:
    """What tells one calibration text from another, without reading it."""
    if origin_of(data) == "embedded":
        return {name: entry["sha256"] for name, entry in manifest().items()}
    return data if data == "hub" else _files(expanded(data), "*", "*/*")


def _files(folder: Path, *patterns: str) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change in ns) of a folder's files."""
    found = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return [(file.relative_to(folder).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- folders and locks


def place_for(out: str | Path, source: Path) -> Path:
    """Where an artifact is written that was asked for at `out`; see `thesislib.files.replaceable_folder`.

    Raises:
        BadInput: before any work, if it cannot be written there.
    """
    if source.resolve().is_relative_to(real(out)):
        raise BadInput(f"{out} holds the subject itself: expected another folder for the artifact")
    return replaceable_folder(out, replaces=RECORD)


@contextmanager
def _alone(path: Path, title: str) -> Iterator[None]:
    """Nobody else inside the block for `path`: a second process waits, and says so. A killed one leaves no lock
    behind."""
    held = lock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        _say(f"{title}: another process is at it, waiting")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
