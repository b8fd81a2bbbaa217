"""Where runs are executed: in this process, in processes of this machine, on a Dask cluster.

Each engine yields the records of its runs as they end. A worker that dies loses nothing but time: its runs are given to
another, and only a run that has failed `ATTEMPTS` times is given up, as a record that says so.
"""

import collections
import contextlib
import logging
import os
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from nblora.errors import MissingExtraError

from .task import Records, Runs, Task, failed_record, run_one
from .texts import TextTask

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from distributed import Client

ATTEMPTS = 3
logger = logging.getLogger("nblora.sweep")


def run_here(task: Task | TextTask, runs: Runs) -> Records:
    """Execute one run after the other in this process."""
    waiting = _Waiting(runs)
    while waiting.runs:
        for key, settings in list(waiting.runs.items()):
            try:
                record = run_one(task, key, settings)
            except Exception as error:
                yield from waiting.fault(key, error)
            else:
                yield waiting.done(key, record)


# --- processes -----------------------------------------------------------------------------------------------------

_task: Task | TextTask | None = None  # a worker process's, set once when it starts


def run_in_processes(task: Task | TextTask, runs: Runs, workers: int) -> Records:
    """Execute runs in `workers` processes of this machine, each of which gets the task once."""
    waiting = _Waiting(runs)
    while waiting.runs:
        broken = False
        with _pool(task, min(workers, len(waiting.runs))) as pool:
            with _interrupts_held():  # the workers start here, and take that over
                submitted = {pool.submit(_run_in_worker, key, settings): key for key, settings in waiting.runs.items()}
            for future in futures.as_completed(submitted):
                key = submitted[future]
                try:
                    record = future.result()
                except BrokenProcessPool:
                    broken = True
                except Exception as error:
                    yield from waiting.fault(key, error)
                else:
                    yield waiting.done(key, record)
        if broken:
            yield from waiting.lost(BrokenProcessPool("a worker process died"))


@contextlib.contextmanager
def _pool(task: Task | TextTask, workers: int) -> Iterator[futures.ProcessPoolExecutor]:
    import multiprocessing

    # spawn: a fork would take over locks and thread pools in whatever state they are
    context = multiprocessing.get_context("spawn")
    until, alive = context.Pipe(duplex=False)
    pool = futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(task, until))
    try:
        yield pool
    except BaseException:  # Ctrl-C among them: nobody waits for the runs that are under way
        alive.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        alive.close()
        until.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back inside the block, where the system can, and from processes that start in it for good.

    A terminal sends it to every process; the sweep's own decides, and its workers end when it does.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(task: Task | TextTask, until: "Connection") -> None:
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    threading.Thread(target=_end_with_parent, args=(until,), daemon=True).start()


def _end_with_parent(until: "Connection") -> None:
    """End this worker when the sweep has ended, be it by SIGKILL: nobody would read its result."""
    import multiprocessing.connection

    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel, until])  # `until` ends with its other side
        os._exit(1)


def _run_in_worker(key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    if _task is None:
        raise RuntimeError("this process is no worker of a sweep: it has no task")
    return run_one(_task, key, settings)


# --- Dask ----------------------------------------------------------------------------------------------------------


def run_on_dask(task: Task | TextTask, runs: Runs, client: "Client") -> Records:
    """Execute runs on a Dask cluster; the task is scattered once, to every worker."""
    from distributed import as_completed

    waiting = _Waiting(runs)
    while waiting.runs:
        attempt = uuid.uuid4().hex  # a name that the scheduler has not seen: an old result must not stand in
        # Without a name of its own, scattered data lost with its last worker would be taken for still there.
        (shared,) = client.scatter([task], broadcast=True, hash=False)
        submitted = {
            client.submit(run_one, shared, key, settings, key=f"nblora-run-{key}-{attempt}", pure=False): key
            for key, settings in waiting.runs.items()
        }
        for future in as_completed(list(submitted)):
            key = submitted[future]
            try:
                record = future.result()
            except Exception as error:  # KilledWorker, a cancelled future, what the run itself raised
                yield from waiting.fault(key, error)
            else:
                yield waiting.done(key, record)
            future.release()


@contextlib.contextmanager
def dask_client(scheduler: str | None, workers: int, threads: int) -> Iterator["Client"]:
    """Connect to the scheduler at an address, or, without one, start a cluster of worker processes on this machine.

    Raises
    ------
    MissingExtraError
        Without Dask.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise MissingExtraError("Dask sweeps need Dask's distributed: pip install 'nblora[dask]'") from error
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            # One Dask thread a process: runs share nothing but the task, and Numba's threads are the run's own.
            cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0"
            )
            scheduler = stack.enter_context(cluster)
        client = stack.enter_context(Client(scheduler))
        client.wait_for_workers(1)
        yield client


class _Waiting:
    """The runs that have no record yet, and how often each was tried in vain."""

    def __init__(self, runs: Runs) -> None:
        self.runs = dict(runs)
        self._faults: collections.Counter[str] = collections.Counter()
        self._losses = 0  # workers lost since the last record

    def done(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        self._losses = 0
        del self.runs[key]
        return record

    def fault(self, key: str, error: BaseException) -> Records:
        """Count a fault against one run, and give the run up after too many."""
        self._faults[key] += 1
        logger.warning("run %s: %s: %s (attempt %d)", key, type(error).__name__, error, self._faults[key])
        if self._faults[key] >= ATTEMPTS:
            yield failed_record(key, self.runs.pop(key), error)

    def lost(self, error: BaseException) -> Records:
        """Count a dead worker, whose run is not known, and give all runs up when none has ended for long."""
        self._losses += 1
        logger.warning("a worker process died, and is replaced (%d waiting runs)", len(self.runs))
        if self._losses >= ATTEMPTS:
            for key in list(self.runs):
                yield failed_record(key, self.runs.pop(key), error)
