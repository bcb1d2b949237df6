"""Orders carried out by Dask's workers: a few at a time, each claimed by one driver, each answer kept as it comes."""

import json
import os
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from thesislib.config import positive
from thesislib.errors import BadInput, shown
from thesislib.sweep.task import OtherVersion, carry_out, in_words, versions

CONNECT = 6  # seconds to wait for a scheduler's answer
PATIENCE = 60  # seconds to wait for a scheduler's first worker, which may just be starting
LOOPBACK = "127.0.0.1"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # torch takes the smallest


@dataclass(frozen=True)
class Order:
    """One task.

    Attributes:
        name: for readers.
        key: unique among the orders.
        text: the order for `thesislib.sweep.task.carry_out`, without the versions.
        done: whether its answer is kept already; called right before the task begins.
        keep: called with the answer.
        fail: called with the reason, if there is no answer.
    """

    name: str
    key: str
    text: dict = field(repr=False)
    done: Callable[[], bool] = field(repr=False)
    keep: Callable[[dict], None] = field(repr=False)
    fail: Callable[[str], None] = field(repr=False, default=lambda why: None)


@dataclass(frozen=True)
class Workers:
    """The processes that carry orders out: those of this machine, or the workers of a running scheduler.

    Attributes:
        count: processes on this machine.
        scheduler: the address of a running scheduler; None for this machine.
        host: the address that this machine's processes listen at.
        retries: how often an order is tried again after an error and, on this machine, after the death of its worker.
            (A running scheduler has its own number for deaths, distributed.scheduler.allowed-failures.)
        gpu: whether each worker has a card; at a running scheduler, those started with the resource GPU.
        threads: of each process; None shares out the cores.
        per_card: how many workers share a card and its memory, since a small model does not fill a large card.
    """

    count: int = 2
    scheduler: str | None = None
    host: str = LOOPBACK
    retries: int = 2
    gpu: bool = False
    threads: int | None = None
    per_card: int = 1

    def __post_init__(self):
        if self.per_card < 1:
            raise BadInput(f"--per-card is {self.per_card}: expected at least 1")
        if self.per_card > 1 and not self.gpu:
            raise BadInput(f"--per-card is {self.per_card}, and no card is asked for: expected --device cuda with it")
        if self.retries < 0:
            raise BadInput(f"--retries is {self.retries}: expected 0 or more")
        positive(workers=self.count, threads=self.threads, retries=self.retries or None)
        if self.scheduler is None:
            try:
                if not self.host:
                    raise OSError("it is empty")
                with socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET) as test:
                    test.bind((self.host, 0))
            except (OSError, ValueError, TypeError) as error:  # the latter two of a malformed name
                raise BadInput(
                    f"--host is {shown(self.host)} ({error}): expected an address of this machine, such as {LOOPBACK}"
                ) from error
        elif not re.fullmatch(r"(tcp|tls)://[^\s/]+:\d{1,5}", self.scheduler):
            raise BadInput(
                f"--scheduler is {shown(self.scheduler)}: expected such as tcp://127.0.0.1:8786, which "
                "`dask scheduler` says"
            )

    @property
    def resources(self) -> dict[str, float] | None:
        """The part of a card that an order takes, and that a worker of this machine has."""
        return {"GPU": 1 / self.per_card} if self.gpu else None

    def check_cards(self, cards: int) -> None:
        """Raises BadInput if this machine's cards are too few for the workers."""
        if self.gpu and self.scheduler is None and self.count > cards * self.per_card:
            has = f"{cards} card{'s' * (cards != 1)}"
            more = f", or --per-card {-(-self.count // cards)}" if cards else ""
            raise BadInput(
                f"--workers is {self.count}, and this machine has {has}: expected at most {cards * self.per_card}{more}"
            )


def drive(orders: Sequence[Order], workers: Workers, locks: Path) -> dict[str, str]:
    """Carry out the orders that are not done yet; {name: why} of those that failed. A failure does not stop the others.

    Two drivers with one `locks` folder share the work: an order that one has claimed is left by the other, which looks
    at it again when it is released.

    Raises:
        BadInput: no scheduler there; workers of another version, or without the card that is needed; whatever `keep`
            raises, such as a full disk.
        RuntimeError: the scheduler is gone. In both cases the kept answers stay, and the same call goes on from there.
    """
    waiting = deque(order for order in orders if not order.done())
    if not waiting:
        return {}
    failed: dict[str, str] = {}
    locks.mkdir(parents=True, exist_ok=True)
    with _client(workers) as client, tqdm(total=len(waiting), unit="task", disable=None, smoothing=0) as bar:
        started, finished, elsewhere = time.monotonic(), 0, 0
        running: dict[Any, tuple[Order, FileLock]] = {}
        while waiting or running:
            done_elsewhere = _submit(client, workers, waiting, running, locks)
            elsewhere += done_elsewhere
            bar.update(done_elsewhere)
            try:
                for future in _finished(client, running, workers):
                    order, lock = running.pop(future)
                    try:
                        why = _answer(future, order)
                        if why:
                            failed[order.name] = why
                            order.fail(why)
                    finally:
                        lock.release()
                    finished += 1
                    bar.update()
                    left = (time.monotonic() - started) / finished * (len(waiting) + len(running))
                    outcome = f"failed: {why}" if why else "done"
                    progress = f"{finished + elsewhere} of {bar.total}, about {_minutes(left)} left"
                    tqdm.write(f"{order.name}: {outcome}; {progress}", file=sys.stderr)
            except BaseException:
                client.cancel(list(running))
                for _, lock in running.values():
                    lock.release()
                raise
    return failed


def _submit(client, workers: Workers, waiting: deque[Order], running: dict, locks: Path) -> int:
    """Give each free worker an order that no other driver has claimed; the number of those found done by another."""
    done = 0
    # no more orders than workers: if a worker dies, Dask counts it against every order that it had in hand
    slots = max(1, _able(client, workers))
    for _ in range(len(waiting)):
        if len(running) >= slots:
            break
        order = waiting.popleft()
        lock = FileLock(locks / f"{order.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting.append(order)
            continue
        if order.done():
            lock.release()
            done += 1
            continue
        text = json.dumps({"versions": versions(), "per_card": workers.per_card, **order.text})
        future = client.submit(
            carry_out, text, key=f"{order.key}-{time.time_ns()}", pure=False, retries=workers.retries,
            resources=workers.resources,
        )  # fmt: skip
        running[future] = (order, lock)
    return done


def _finished(client, running: dict, workers: Workers) -> list:
    """The futures that have ended, after a second at most.

    Raises:
        RuntimeError: the scheduler is gone.
    """
    if running:
        end = time.monotonic() + 1
        while time.monotonic() < end and not any(future.done() for future in running):
            time.sleep(0.02)
    else:
        time.sleep(0.5)
    if client.status != "running" or any(future.status in ("cancelled", "lost") for future in running):
        raise RuntimeError(
            f"the scheduler{f' at {workers.scheduler}' if workers.scheduler else ''} is gone: what was measured is "
            "kept; start it again, and give the same command to go on"
        )
    return [future for future in running if future.done()]


def _answer(future, order: Order) -> str | None:
    """Keep a future's answer; the reason if there is none.

    Raises:
        BadInput: it went to a worker of another version that had joined later.
    """
    error = future.exception()
    if error is None:
        answer = json.loads(future.result())
        if "failed" not in answer:
            order.keep(answer)
        return answer.get("failed")
    if type(error).__name__ == "KilledWorker":
        return f"its worker died {error.allowed_failures + 1} times (out of memory, or killed): given up"
    if isinstance(error, OtherVersion):
        raise BadInput(f"a worker joined that has another version: {error}")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextmanager
def _client(workers: Workers) -> Iterator:
    """A client of the workers, which all have this driver's versions."""
    try:
        import dask
        from distributed import Client, LocalCluster
        from distributed.security import Security
    except ImportError as error:
        raise BadInput(
            'sweeps need Dask: expected it installed, by pip install -e ".[sweep]" -c constraints.txt in the checkout'
        ) from error
    workers.check_cards(torch.cuda.device_count())
    with ExitStack() as stack:
        settings = {
            "distributed.scheduler.allowed-failures": workers.retries,
            "distributed.comm.timeouts.connect": f"{CONNECT}s",
            # empty, since the default is one thread and MALLOC_TRIM_THRESHOLD_=65536: with it the memory of every
            # tensor goes back to the system and is asked for again, which takes half the time of a measurement
            "distributed.nanny.pre-spawn-environ": {},
        }
        stack.enter_context(dask.config.set(settings))
        if workers.scheduler is None:
            threads = workers.threads or max(1, _cores() // workers.count)
            stack.enter_context(_environment(dict.fromkeys(THREADS, str(threads))))  # the workers inherit it
            client = stack.enter_context(Client(stack.enter_context(_cluster(LocalCluster, workers)), timeout=60))
        else:
            security = Security(require_encryption=True) if workers.scheduler.startswith("tls://") else None
            if security is not None and not getattr(security, "tls_client_cert", None):
                raise BadInput(
                    f"{workers.scheduler} is encrypted, and this driver has no certificate: expected "
                    "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, ..._CLIENT__CERT and ..._CLIENT__KEY to name files"
                )
            try:
                client = stack.enter_context(Client(workers.scheduler, timeout=CONNECT, security=security))
            except (OSError, TimeoutError, ValueError, TypeError) as error:
                raise BadInput(
                    f"no scheduler answers at {workers.scheduler} ({type(error).__name__}): expected one that `dask "
                    "scheduler` started, such as tcp://127.0.0.1:8786; without --scheduler this machine does the work"
                ) from error
        if client.dashboard_link:
            print(f"dashboard: {client.dashboard_link}", file=sys.stderr)
        _refuse_other_versions(client, workers)
        yield client


def _cluster(local_cluster: type, workers: Workers):
    """The workers of this machine. If one dies before it is ready, they are started again, up to `retries` times."""
    for left in reversed(range(workers.retries + 1)):
        try:
            return local_cluster(
                n_workers=workers.count, threads_per_worker=1, processes=True, host=workers.host,
                dashboard_address=f"{workers.host}:0", resources=workers.resources, memory_limit=0, silence_logs=50,
            )  # fmt: skip
        except RuntimeError as error:
            if not left:
                raise
            print(f"a worker did not start ({error}): starting them again", file=sys.stderr, flush=True)


def _refuse_other_versions(client, workers: Workers) -> None:
    """Raises BadInput if there is no worker, or one with another version than the driver's."""
    if workers.scheduler is not None:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise BadInput(
                f"the scheduler at {workers.scheduler} has no workers: start some, by `dask worker "
                f"{workers.scheduler} --nthreads 1`"
            ) from error
    if workers.gpu and not _able(client, workers):
        has = f"GPU={workers.resources['GPU']:g}"
        raise BadInput(
            f"no worker has the resource {has}: start one for each, by `dask worker ADDRESS --nthreads 1 "
            f"--resources {has}`"
        )
    here, other = versions(), []
    for address, there in client.run(versions, on_error="return").items():
        if isinstance(there, OSError) or there == here:  # one that died meanwhile does not stop the others
            continue
        other.append(f"{address} has {there if isinstance(there, BaseException) else in_words(there)}")
    if other:
        raise BadInput(f"workers of another version: {'; '.join(other)}. Expected {in_words(here)}, as here")


@contextmanager
def _environment(given: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and restore all of them afterwards, since Dask leaves its own behind."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _able(client, workers: Workers) -> int:
    """How many workers can take an order."""
    known = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(not workers.gpu or worker["resources"].get("GPU", 0) >= workers.resources["GPU"] for worker in known)


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
