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

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from thesislib.config import positive
from thesislib.errors import BadInput, shown
from thesislib.sweep.task import OtherVersion, carry_out, versions

CONNECT = 6  # seconds until a scheduler that does not answer is given up
PATIENCE = 60  # seconds until a scheduler without workers is: they may just be starting
LOOPBACK = "127.0.0.1"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # the smallest counts


@dataclass(frozen=True)
class Order:
    """One task.

    name: for the reader. key: what no two orders share. text: what `thesislib.sweep.task.carry_out` takes, less the
    versions. done: whether its answer is kept already, asked right before it is begun. keep: takes the answer. fail:
    takes the reason why there is none.
    """

    name: str
    key: str
    text: dict = field(repr=False)
    done: Callable[[], bool] = field(repr=False)
    keep: Callable[[dict], None] = field(repr=False)
    fail: Callable[[str], None] = field(repr=False, default=lambda why: None)


@dataclass(frozen=True)
class Workers:
    """Who carries orders out: `count` processes on this machine, bound to `host`, or whoever is at a running scheduler.

    retries: how often an order is tried again after an error, or, on this machine, after the death of its worker (a
    running scheduler has its own number for that, distributed.scheduler.allowed-failures). gpu: one worker a card; at a
    running scheduler only workers that were started with the resource GPU. threads: of each process, None for the cores
    shared out. per_card: how many workers share a card instead, each with its share of the memory: a small model does
    not fill a large card.
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
            except (
                OSError,
                ValueError,
                TypeError,
            ) as error:  # of a name too long for one, or with characters that none has
                raise BadInput(
                    f"--host is {shown(self.host)} ({error}): expected an address of this machine, such as {LOOPBACK}"
                ) from error
        elif not re.fullmatch(r"(tcp|tls)://[^\s/]+:\d{1,5}", self.scheduler):
            raise BadInput(
                f"--scheduler is {shown(self.scheduler)}: expected such as tcp://127.0.0.1:8786, which `dask "
                "scheduler` says"
            )

    @property
    def resources(self) -> dict[str, float] | None:
        """What an order takes of a worker, and a worker of this machine has: its part of a card."""
        return {"GPU": 1 / self.per_card} if self.gpu else None

    def check_cards(self, cards: int) -> None:
        """Raises BadInput for more workers than this machine's `cards` have places for."""
        if self.gpu and self.scheduler is None and self.count > cards * self.per_card:
            has = f"{cards} card{'s' * (cards != 1)}"
            more = f", or --per-card {-(-self.count // cards)}" if cards else ""
            raise BadInput(
                f"--workers is {self.count}, and this machine has {has}: expected at most {cards * self.per_card}{more}"
            )


def drive(orders: Sequence[Order], workers: Workers, locks: Path) -> dict[str, str]:
    """Carry out what is not done yet; {name: why} of what failed, the rest goes on.

    Two drivers with one `locks` folder share the work: what one has claimed, the other leaves, and looks at again when
    that is released.

    Raises:
        BadInput: no scheduler there; workers of another version, or without the card that is needed; whatever `keep`
            raises, such as a full disk.
        RuntimeError: the scheduler is gone. In both cases what was kept stays, and the same call goes on from there.
    """
    waiting = deque(order for order in orders if not order.done())
    if not waiting:
        return {}
    failed: dict[str, str] = {}
    locks.mkdir(parents=True, exist_ok=True)
    with _client(workers) as client, tqdm(total=len(waiting), unit="task", disable=None, smoothing=0) as bar:
        started, finished, running, others = time.monotonic(), 0, {}, 0
        while waiting or running:
            # no more than workers: if one dies, Dask counts it against every order that it had in hand, and gives up
            # the innocent too
            slots = max(1, _able(client, workers))
            for _ in range(len(waiting)):
                if len(running) >= slots:
                    break
                order = waiting.popleft()
                lock = FileLock(locks / f"{order.key}.lock")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    waiting.append(order)  # another driver is at it
                    continue
                if order.done():
                    lock.release()
                    others += 1
                    bar.update()
                    continue
                text = json.dumps({"versions": versions(), "per_card": workers.per_card, **order.text})
                future = client.submit(
                    carry_out,
                    text,
                    key=f"{order.key}-{time.time_ns()}",
                    pure=False,
                    retries=workers.retries,
                    resources=workers.resources,
                )
                running[future] = (order, lock)
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
                    word = f"failed: {why}" if why else "done"
                    tqdm.write(
                        f"{order.name}: {word}; {finished + others} of {bar.total}, about {_minutes(left)} left",
                        file=sys.stderr,
                    )
            except BaseException:
                client.cancel(list(running))
                for _, lock in running.values():
                    lock.release()
                raise
    return failed


def _finished(client, running: dict, workers: Workers) -> list:
    """Those of the futures that have ended; after a second at most.

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
            "kept; start it again, "
            "and give the same command to go on"
        )
    return [future for future in running if future.done()]


def _answer(future, order: Order) -> str | None:
    """Keep a future's answer, or say why there is none.

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
    """A client of the workers, all of them with this driver's versions."""
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
            # empty, for by default it is one thread, and MALLOC_TRIM_THRESHOLD_=65536: the memory of every tensor would
            # go back to the system and be asked for again, half of the time that a measurement takes
            "distributed.nanny.pre-spawn-environ": {},
        }
        stack.enter_context(dask.config.set(settings))
        if workers.scheduler is None:
            threads = workers.threads or max(1, _cores() // workers.count)
            stack.enter_context(_environment(dict.fromkeys(THREADS, str(threads))))  # which the workers inherit
            client = stack.enter_context(Client(stack.enter_context(_cluster(LocalCluster, workers)), timeout=60))
        else:
            security = Security(require_encryption=True) if workers.scheduler.startswith("tls://") else None
            if security is not None and not getattr(security, "tls_client_cert", None):
                raise BadInput(f"{workers.scheduler} is encrypted, and this driver has no certificate: expected "
                    "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, "
                               "..._CLIENT__CERT and ..._CLIENT__KEY to name files")  # fmt: skip
            try:
                client = stack.enter_context(Client(workers.scheduler, timeout=CONNECT, security=security))
            except (OSError, TimeoutError, ValueError, TypeError) as error:
                raise BadInput(
                    f"no scheduler answers at {workers.scheduler} ({type(error).__name__}): expected one that `dask "
                    "scheduler` started, "
                    "such as tcp://127.0.0.1:8786; without --scheduler this machine does the work"
                ) from error
        if client.dashboard_link:
            print(f"dashboard: {client.dashboard_link}", file=sys.stderr)
        _refuse_other_versions(client, workers)
        yield client


def _cluster(kind: type, workers: Workers):
    """The workers of this machine; started anew, as often as an order is tried again, where one of them died before it
    was ready."""
    for left in reversed(range(workers.retries + 1)):
        try:
            return kind(
                n_workers=workers.count,
                threads_per_worker=1,
                processes=True,
                host=workers.host,
                dashboard_address=f"{workers.host}:0",
                resources=workers.resources,
                memory_limit=0,
                silence_logs=50,
            )
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
    here, other = versions(), {}
    for address, found in client.run(versions, on_error="return").items():
        if isinstance(found, OSError):  # it died meanwhile; the others go on
            continue
        if found != here:
            other[address] = (
                str(found)
                if isinstance(found, BaseException)
                else ", ".join(f"{name} {number}" for name, number in found.items())
            )
    if other:
        listed = "; ".join(f"{address} has {found}" for address, found in other.items())
        raise BadInput(
            f"workers of another version: {listed}. Expected "
            f"{', '.join(f'{name} {number}' for name, number in here.items())}, as here"
        )


@contextmanager
def _environment(given: dict[str, str]) -> Iterator[None]:
    """Variables set, and all as it was afterwards: Dask leaves its own behind."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _able(client, workers: Workers) -> int:
    """How many workers can take an order now."""
    found = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(not workers.gpu or worker["resources"].get("GPU", 0) >= workers.resources["GPU"] for worker in found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
