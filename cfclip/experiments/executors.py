"""Where the runs of a sweep happen: ``concurrent.futures`` executors that outlive their workers."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager


def _follow_parent() -> None:
    """In a worker: end with the process that started it. Its queue alone would keep it, and a run, alive for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # its kernel sees that and ends as well

    threading.Thread(target=watch, daemon=True).start()


class LocalExecutor(ThreadPoolExecutor):
    """Spawned processes, each the only one of its own pool: one that dies takes exactly its run with it, and is replaced."""

    def __init__(self, workers: int | None = None):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        super().__init__(workers or cores)
        self._here, self._pools = threading.local(), []

    def submit(self, fn, /, *args, **kwargs) -> Future:
        """As every executor's; the future of a process that died raises BrokenProcessPool."""
        return super().submit(self._call, fn, *args, **kwargs)

    def _call(self, fn, /, *args, **kwargs):
        if getattr(self._here, "pool", None) is None:
            self._here.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _follow_parent)
            self._pools.append(self._here.pool)
        try:
            return self._here.pool.submit(fn, *args, **kwargs).result()
        except BrokenExecutor:
            self._here.pool = None
            raise

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As every executor's."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        for pool in self._pools:
            pool.shutdown(wait, cancel_futures=cancel_futures)


@contextmanager
def cluster_executor(scheduler: str) -> Iterator[Executor]:
    """The dask cluster at ``scheduler``, whose workers see the same files under the same paths.

    A worker takes as many runs at once as it declares of the resource "run". One a GPU:
    ``CUDA_VISIBLE_DEVICES=0 dask worker tcp://… --nthreads 1 --resources run=1``. The scheduler hands a dead worker's run to another one,
    as often as its ``allowed-failures`` says.
    """
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("a cluster needs dask: pip install 'cfclip[cluster]'") from None
    try:
        client = Client(scheduler, timeout=30)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no dask scheduler answers at {scheduler} ({error}): start one with `dask scheduler`"
        ) from None
    with client:
        if not any(
            "run" in worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()
        ):
            print(
                f"no worker offers the resource yet, so runs wait; start some: dask worker {scheduler} --nthreads 1 --resources run=1",
                file=sys.stderr,
            )
        with client.get_executor(resources={"run": 1}, pure=False) as executor:
            yield executor
