"""Where the runs of a sweep happen: ``concurrent.futures`` executors that survive the death of a worker."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

logger = logging.getLogger(__name__)

PACKS_ON_A_GPU = 3
"""Packs at a time: one leaves the GPU idle between its launches, and more than a few slow each other down."""


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _follow_parent() -> None:
    """Called in a worker: end it when its parent process ends. Otherwise its queue keeps its run alive."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # the kernel of the run notices this and ends as well

    threading.Thread(target=watch, daemon=True).start()


class LocalExecutor(ThreadPoolExecutor):
    """Spawned processes, each in a separate pool: a process that dies loses only its run, and is replaced."""

    def __init__(self, workers: int | None = None):
        super().__init__(workers or cores())
        self.workers = {"cpu": workers or cores(), "cuda": min(workers or cores(), PACKS_ON_A_GPU)}
        self._thread, self._pools = threading.local(), []

    def submit(self, fn, /, *args, **kwargs) -> Future:
        """Like :meth:`Executor.submit`. If the process dies, the future raises BrokenProcessPool."""
        return super().submit(self._call, fn, *args, **kwargs)

    def _call(self, fn, /, *args, **kwargs):
        if getattr(self._thread, "pool", None) is None:
            self._thread.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _follow_parent)
            self._pools.append(self._thread.pool)
        try:
            return self._thread.pool.submit(fn, *args, **kwargs).result()
        except BrokenExecutor:
            self._thread.pool = None
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        for pool in self._pools:
            pool.shutdown(wait, cancel_futures=cancel_futures)


@contextmanager
def cluster_executor(scheduler: str) -> Iterator[Executor]:
    """The dask cluster at ``scheduler``; its workers must see the same files under the same paths.

    A worker that declares N units of the dask resource "run" takes N runs at a time. For one run per GPU:
    ``CUDA_VISIBLE_DEVICES=0 dask worker tcp://… --nthreads 1 --resources run=1``. If a worker dies, the
    scheduler gives its run to another worker, as often as the scheduler's ``allowed-failures`` permits.
    Raises ValueError if dask is not installed, or if no scheduler answers.
    """
    try:
        from distributed import Client  # optional
    except ImportError:
        raise ValueError("a cluster needs dask: pip install 'cfclip[cluster]'") from None
    try:
        client = Client(scheduler, timeout=30)
    except (OSError, ValueError) as error:
        start = "start one with `dask scheduler`"
        raise ValueError(f"no dask scheduler answers at {scheduler} ({error}): {start}") from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        offered = int(sum(worker["resources"].get("run", 0) for worker in workers))
        if not offered:
            start = f"dask worker {scheduler} --nthreads 1 --resources run=1"
            logger.warning("no worker offers the resource yet, so runs wait; start one with `%s`", start)
        with client.get_executor(resources={"run": 1}, pure=False) as executor:
            executor.workers = dict.fromkeys(("cpu", "cuda"), offered or 1)
            yield executor
