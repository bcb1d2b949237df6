"""A command in a process of its own that costs milliseconds: forked from one that has imported everything, under limits
of time and memory."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOM = 2 << 30  # bytes of address space that a case may take beyond what it begins with
BROKE = 70  # exit code of a call that ended in a traceback


@dataclass(frozen=True)
class Ended:
    """How a call ended. code: None where a signal ended it."""

    code: int | None
    signal: int | None
    out: str
    err: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Bad input, said in one line at the end; the box that Typer draws about usage counts as one."""
        lines = self.err.rstrip("\n").split("\n")
        said = [n for n, line in enumerate(lines) if line.startswith("error: ")]
        return self.code == 2 and (said == [len(lines) - 1] or (not said and self.err.count("─ Error ─") == 1))

    @property
    def trouble(self) -> str | None:
        """What no input should lead to, in words; None if it did not."""
        if self.signal == signal.SIGALRM:
            return f"not done after {self.seconds:.0f} s"
        if self.signal is not None:
            return f"ended by {signal.Signals(self.signal).name}"
        if self.code == BROKE or "Traceback (most recent call last)" in self.err:
            last = [
                line
                for line in self.err.splitlines()
                if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit|Warning)\b", line)
            ]
            return f"traceback: {(last or self.err.splitlines() or ['?'])[-1][:160]}"
        if self.code == 2 and not self.refused:
            return f"exit 2, but not in one line: {self.err.strip()[-160:]!r}"
        if self.code not in (0, 1, 2):
            return f"exit {self.code}"
        return None

    def json(self) -> dict | None:
        """The last line of the output, if it is JSON."""
        with suppress(ValueError, IndexError):
            return json.loads(self.out.strip().splitlines()[-1])
        return None


def thesislib(*args: str | Path) -> Callable[[], int]:
    """The command line in this process; its exit code."""

    def run() -> int:
        from thesislib.cli import app

        try:
            app([str(a) for a in args], prog_name="thesislib")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    return run


def start(
    do: Callable[[], int | None], where: Path, environment: dict[str, str], seconds: float, room: int = ROOM
) -> int:
    """Fork, and do it in a session of its own in the folder `where`, which takes what it says as `.out` and `.err`; its
    pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = BROKE
    try:
        os.setsid()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        for handle, name in ((1, ".out"), (2, ".err")):
            file = os.open(where / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(file, handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (
            open(handle, "w", encoding="utf8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
            for handle in (1, 2)
        )
        os.chdir(where)
        os.environ.update(environment)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = do() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def end(pid: int, where: Path, began: float) -> Ended:
    """Wait for what `start` began, and end what it left running."""
    _, status = os.waitpid(pid, 0)
    seconds = time.monotonic() - began
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    said = [(where / name).read_text("utf8", "replace") if (where / name).exists() else "" for name in (".out", ".err")]
    code = os.waitstatus_to_exitcode(status)
    return Ended(None if code < 0 else code, -code if code < 0 else None, *said, seconds)


def call(
    do: Callable[[], int | None], where: Path, environment: dict[str, str], seconds: float = 30, room: int = ROOM
) -> Ended:
    """`start`, undisturbed to its `end`."""
    began = time.monotonic()
    return end(start(do, where, environment, seconds, room), where, began)


def copy(source: Path, target: Path) -> Path:
    """A file or a folder copied, links as links, times as they were (a fingerprint's memory looks at them)."""
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    return target
