"""Workers of a Dask cluster: the only module that imports ``distributed``.

Dask schedules, retries and restarts. A model travels once per worker, as a plugin of the workers,
so that workers that join or are restarted get it too: as a path where all workers can open the
file, else as bytes. Items and answers are pickled here, so that their bytes can be counted.
"""

from __future__ import annotations

import logging
import pickle
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import resource_tracker
from typing import Any, Generic

import dask
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    WorkerPlugin,
)
from distributed.comm import CommClosedError
from distributed.protocol.pickle import dumps

from qcompile.compiler.cluster import groups, worker_side
from qcompile.compiler.cluster.account import ClusterAccount
from qcompile.compiler.cluster.worker_side import Answer, SentFile, SentKit
from qcompile.compiler.cluster.workers import Item, Kit, Result, Task
from qcompile.errors import ClusterError
from qcompile.runtime import session
from qcompile.system.temporary_folder import TemporaryFolder

SHARD = 4  # feeds in an item of calibration
_PER_WORKER = 2  # items at a worker: one that runs, one that waits
_WAIT = 60.0  # seconds for the first worker of a cluster
_ATTEMPTS = 4  # to start all workers, or to reach them, at the same time
_DEATHS = 3  # of workers under one item, then it is to blame
_SETTINGS = {
    "distributed.scheduler.allowed-failures": _DEATHS - 1,
    # What fills the memory of a worker is its model, so a worker that is paused would wait forever.
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.spill": False,
    # Imports as all workers start, not one by one as they get their first item.
    "distributed.worker.preload": [worker_side.__name__],
}
# Dask warns of items over 10 MB; a shard of images has more, and has to move in any case.
_LARGE_ITEMS = {"distributed.admin.large-graph-warning-threshold": "1TB"}
_GONE = (CommClosedError, OSError, TimeoutError)


class _Installed(WorkerPlugin):
    """Brings a kit to every worker, now and later."""

    def __init__(self, key: str, kit: SentKit) -> None:
        self.name, self.kit = key, kit

    def setup(self, worker: Any) -> None:
        """Called in the process of each worker, before its first item."""
        worker_side.install(self.name, self.kit, worker.state.nthreads)

    def teardown(self, worker: Any) -> None:
        """Called when the work is over."""
        worker_side.remove(self.name)


@dataclass(frozen=True)
class _Part:
    """An item as it was sent. ``what``: the item in a message."""

    what: str
    pickled: bytes


@dataclass
class _Sent(Generic[Item]):
    """Consecutive items at workers, and the one answer that is expected to them."""

    items: list[Item]
    parts: list[_Part]
    future: Future


class DaskWorkers:
    """The workers of one client. Raises ClusterError where there are none, or they differ."""

    shard = SHARD

    def __init__(self, client: Client) -> None:
        self.client = client
        self._begun = time.time()
        self._run_id = f"qcompile-{uuid.uuid4().hex[:8]}"
        self._numbers = count()
        self._sent_at: dict[str, float] = {}
        self._counts = _empty(client)
        self._check()

    def map(self, task: Task[Item, Result], items: Iterable[Item]) -> Generator[Result]:
        """Results in the order of the items; a window of them is at the workers."""
        kit = task.kit()
        with self._installed(kit) as key:
            count = max(1, len(self.client.nthreads()))
            size = 1 if kit.merge is None else groups.group_size(count)
            waiting: deque[_Sent[Item]] = deque()
            try:
                for group in groups.grouped(task, items, size):
                    parts = [self._part(task, item) for item in group]
                    waiting.append(_Sent(group, parts, self._submit(key, parts)))
                    if sum(len(w.items) for w in waiting) >= _PER_WORKER * count:
                        yield from self._next(key, task, waiting)
                while waiting:
                    yield from self._next(key, task, waiting)
            finally:
                self._cancel(waiting)

    def _next(
        self, key: str, task: Task[Item, Result], waiting: deque[_Sent[Item]]
    ) -> Sequence[Result]:
        """The results of the items that were sent first.

        Dask blames all items at a worker for its end. So those that are blamed are done again, one
        after the other while no other is at any worker, and those after them are sent again.
        """
        first = waiting.popleft()
        try:
            answer = self._answer(first.parts[0].what, first.future)
        except KilledWorker:
            self._cancel(waiting)
        else:
            return task.received(first.items, answer)
        results: list[Result] = []
        for item, part in zip(first.items, first.parts, strict=True):
            results += task.received([item], self._answer_alone(key, part))
        for later in waiting:
            later.future = self._submit(key, later.parts)
        return results

    def _cancel(self, waiting: Iterable[_Sent[Any]]) -> None:
        futures = [sent.future for sent in waiting]
        if futures:
            with suppress(*_GONE):
                self.client.cancel(futures, force=True)

    def account(self, since: ClusterAccount | None = None) -> ClusterAccount:
        """What was done so far, or after ``since``."""
        retries, lost = self._losses()
        threads = self.client.nthreads()
        now = replace(
            self._counts,
            workers=len(threads),
            threads=sum(threads.values()),
            retries=retries,
            lost_seconds=lost,
        )
        return now.minus(since or _empty(self.client))

    # ---- the model
    @contextmanager
    def _installed(self, kit: Kit) -> Iterator[str]:
        """The key of a kit that all workers have meanwhile."""
        key = f"{self._run_id}-kit-{next(self._numbers)}"
        sent = self._packed(kit)
        size = len(sent.pickled) + sum(len(f.data or b"") for f in sent.files.values())
        with _explained("workers cannot take the model"):
            _patiently(lambda: self.client.register_plugin(_Installed(key, sent)))
        self._counts = replace(
            self._counts,
            model_bytes=self._counts.model_bytes + size * len(self.client.nthreads()),
        )
        try:
            yield key
        finally:
            with suppress(*_GONE, ValueError):
                self.client.unregister_worker_plugin(key)

    def _packed(self, kit: Kit) -> SentKit:
        files = {name: SentFile.of(path) for name, path in kit.files.items()}
        here = self._everywhere(worker_side.files_here, list(files.values()))
        if not all(here.values()):
            files = {n: replace(f, data=f.path.read_bytes()) for n, f in files.items()}
        # Falls back to cloudpickle, for functions of the user.
        functions = dumps((kit.open, kit.merge))
        return SentKit(files, functions, worker_side.environment(), session.library_paths())

    def _everywhere(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """The function's result in each worker, by address."""
        with _explained("workers cannot be asked"):
            found: dict[str, Any] = _patiently(lambda: self.client.run(function, *arguments))
        return found

    def _check(self) -> None:
        """Raise ClusterError unless there are workers, all with this machine's environment."""
        with _explained(f"no worker has come within {_WAIT:g} s"):
            self.client.wait_for_workers(1, timeout=_WAIT)
        mine = worker_side.environment()
        found = self._everywhere(worker_side.environment)
        unlike = {a: text for a, e in found.items() if (text := worker_side.difference(mine, e))}
        if unlike:
            address, text = next(iter(unlike.items()))
            raise ClusterError(
                f"{len(unlike)} of {len(found)} workers differ from this machine, so that figures "
                f"would depend on who computes them: worker {address} has {text}; use workers with "
                "the client's versions and kind of processor"
            )

    # ---- items
    def _part(self, task: Task[Item, Result], item: Item) -> _Part:
        return _Part(task.label(item), pickle.dumps(task.sent(item), protocol=5))

    def _submit(self, key: str, parts: Sequence[_Part]) -> Future:
        """The future answer to some items, which workers merge in a tree, in their order."""
        level = [self._submitted(key, part.pickled) for part in parts]
        while len(level) > 1:
            starts = range(0, len(level), groups.FAN_IN)
            level = [self._merged(key, level[i : i + groups.FAN_IN]) for i in starts]
        return level[0]

    def _submitted(self, key: str, pickled: bytes) -> Future:
        name = f"{self._run_id}-item-{next(self._numbers)}"
        with dask.config.set(_LARGE_ITEMS):
            future = self.client.submit(worker_side.run_item, key, pickled, key=name, pure=False)
        self._sent_at[name] = time.time()
        self._counts = replace(self._counts, sent_bytes=self._counts.sent_bytes + len(pickled))
        return future

    def _merged(self, key: str, futures: Sequence[Future]) -> Future:
        name = f"{self._run_id}-merge-{next(self._numbers)}"
        return self.client.submit(
            worker_side.merge_answers, key, list(futures), key=name, pure=False
        )

    def _answer(self, what: str, future: Future) -> Any:
        with _explained(f"{what}: no answer"):
            answer: Answer = future.result()
        future.release()
        counts = self._counts
        self._counts = replace(
            counts,
            tasks=counts.tasks + answer.items,
            received_bytes=counts.received_bytes + len(answer.pickled),
            busy_seconds=counts.busy_seconds + answer.seconds,
        )
        return pickle.loads(answer.pickled)

    def _answer_alone(self, key: str, part: _Part) -> Any:
        """The answer to the only item at the workers. Raises ClusterError where they end."""
        try:
            return self._answer(part.what, self._submitted(key, part.pickled))
        except KilledWorker as e:
            raise ClusterError(
                f"{part.what} was ended with its worker {e.allowed_failures + 1} times, the "
                f"last was {e.last_worker.address}: out of memory? Give fewer --workers, a "
                "smaller --batch-size or --max-memory; the same command continues from there"
            ) from e

    def _losses(self) -> tuple[int, float]:
        """Items that were lost with their worker and done again, and seconds that they took."""
        events: Any = ()
        with suppress(*_GONE):
            events = self.client.get_events("all")
        again, seconds = 0, 0.0
        for when, event in events:
            if event.get("action") != "remove-worker" or when < self._begun:
                continue
            keys = {*event["processing-tasks"], *event["lost-computed-tasks"]}
            mine = [key for key in keys if key in self._sent_at]
            again += len(mine)
            seconds += sum(max(0.0, when - self._sent_at[key]) for key in mine)
        return again, round(seconds, 3)


def _patiently(ask: Callable[[], Any], faults: tuple[type[Exception], ...] = _GONE) -> Any:
    """The answer of all workers; asked again where one is lost meanwhile."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return ask()
        except faults:
            time.sleep(1)
    return ask()


def _empty(client: Client) -> ClusterAccount:
    return ClusterAccount(0, 0, client.dashboard_link or "", 0, 0, 0, 0, 0, 0.0, 0.0)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns errors of a lost cluster into a ClusterError."""
    try:
        yield
    except CancelledError as e:
        raise ClusterError(f"{what}: the cluster cancelled it, {e}") from e
    except _GONE as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ClusterError(f"{what}: {reason}") from e


@contextmanager
def local_client(workers: int) -> Iterator[Client]:
    """A client of new processes on this machine, with one thread each."""
    folder = TemporaryFolder()
    with (
        dask.config.set(_SETTINGS),
        _local_cluster(workers, str(folder.path)) as cluster,
        Client(cluster, direct_to_workers=True) as client,
    ):
        yield client


def _local_cluster(workers: int, folder: str) -> LocalCluster:
    """Raises ClusterError where processes do not start; one that ends then ends all of them."""

    def started() -> LocalCluster:
        with _without_interrupts():
            return LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                dashboard_address=":0",  # any free port: Dask warns where its own is taken
                local_directory=folder,
                silence_logs=logging.CRITICAL,
            )

    faults = RuntimeError, *_GONE
    try:
        return _patiently(started, faults)
    except faults as e:
        raise ClusterError(f"workers cannot be started: {e.__cause__ or e}") from e


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Threads that are started here, and their processes, never get SIGINT.

    A terminal sends it to all processes; workers end with the client. Here it comes later.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def joined_client(address: str) -> Iterator[Client]:
    """A client of a running cluster; TLS and time limits are those of Dask's configuration.

    Raises ClusterError where it cannot be reached.
    """
    with _explained(f"cluster {address!r} cannot be reached"):
        try:
            client = Client(address)
        except ValueError as e:
            raise ClusterError(f"cluster {address!r} is no address: {e}") from e
    with client:
        yield client
