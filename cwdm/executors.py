"""Where the cases of a cohort are worked on: this machine, a Ray cluster, or SLURM.

Scheduling is left to concurrent.futures, Ray and submitit. An executor gives every task to some
worker, once; whoever calls it finds out which tasks are finished, and gives out again those whose
worker died.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cwdm.errors import InputError
from cwdm.machine import capacity, cores

__all__ = ["AMPLE", "Begin", "Executor", "Local", "Ray", "Slurm", "Work", "end_with_parent"]

Work = Callable[[Sequence[Any]], Iterator[None]]
"""Does a share of the tasks; goes on to the next when it is asked to."""
Begin = Callable[[str], Work]
"""Loads on a device what the work takes. It can be pickled."""

_POLL_SECONDS = 0.5
_LARGEST_SHARE = 8
_AT_A_TIME = 2
"""Tasks of an actor: one is read or written while the other is computed."""
_ENOUGH = 4
"""Tasks that make up for the seconds in which a process begins."""
AMPLE = 8 * 2**30
"""Bytes in which a process completes or segments any case of a brain at 1 mm."""


class Executor(Protocol):
    """A place to work."""

    def run(self, begin: Begin, tasks: Sequence[Any], *, alone: bool = False) -> Iterator[None]:
        """Do the tasks; yields now and then until no more will be done.

        A worker that dies takes its tasks with it. InputError where a worker cannot begin.

        Args:
            alone: one task at a time in a process, and not in this one.
        """

    def processes(self, tasks: int) -> int:
        """How many will work on so many tasks, as far as it is known before."""


@dataclass(frozen=True)
class Local:
    """This machine: one process per GPU; on a CPU this process, or several."""

    workers: int | None = None
    """Processes in all, which take the devices in turn."""
    device: str = "auto"
    bytes_each: int | None = None
    """What a process may take of memory. On a CPU and not told how many, there are then as many
    processes as it has cores, if there is memory and enough to do: cores that share a case wait for
    each other. Processes begin by importing the program again, so a script that says so has to be
    under ``if __name__ == "__main__"``."""

    def run(self, begin: Begin, tasks: Sequence[Any], *, alone: bool = False) -> Iterator[None]:
        devices = _devices(self.device)
        workers = 1 if alone else self.processes(len(tasks))
        if workers == 1 and not alone:
            yield from begin(devices[0])(tasks)
            return
        # Forking would copy the locks of torch's threads as they are just then.
        context = multiprocessing.get_context("spawn")
        places = context.SimpleQueue()
        for number in range(workers):
            places.put(devices[number % len(devices)])
        threads = max(1, cores() // workers)
        pool = ProcessPoolExecutor(
            workers, context, initializer=_start_worker, initargs=(begin, places, threads)
        )
        size = 1 if alone else max(1, min(_LARGEST_SHARE, len(tasks) // (4 * workers)))
        try:
            waiting = {pool.submit(_work_here, share) for share in _shares(tasks, size)}
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS)
                for future in done:
                    future.result()
                yield
        except BrokenProcessPool:
            return
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()  # an interruption waits for nobody
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def processes(self, tasks: int) -> int:
        devices = _devices(self.device)
        return min(self.workers or max(len(devices), self._spread(devices, tasks)), tasks)

    def _spread(self, devices: Sequence[str], tasks: int) -> int:
        if self.bytes_each is None or any(device.startswith("cuda") for device in devices):
            return 1
        return min(cores(), capacity() // self.bytes_each, tasks // _ENOUGH)


@dataclass(frozen=True)
class Ray:
    """A Ray cluster: actors that hold the models, one task at a time each."""

    workers: int | None = None
    """Actors. [default: one per GPU of the cluster; without GPUs, one per node]"""
    address: str | None = None
    """Of an existing cluster; none starts one on this machine, or joins that of RAY_ADDRESS."""

    def run(self, begin: Begin, tasks: Sequence[Any], *, alone: bool = False) -> Iterator[None]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool

        own = not ray.is_initialized()
        if own:
            try:
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                found = str(error).partition("\n")[0]
                raise InputError(f"ray: found no cluster ({found}), expected --address") from error
        try:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            workers = 1 if alone else min(self.workers or gpus or len(ray.nodes()), len(tasks))
            at_a_time = 1 if alone else _AT_A_TIME
            actor: Any = ray.remote(_Worker)
            actor = actor.options(
                num_gpus=min(1, gpus / workers), max_restarts=-1, max_concurrency=at_a_time
            )
            actors = [actor.remote(begin) for _ in range(workers)]
            pool = ActorPool(actors * at_a_time)
            for task in tasks:
                pool.submit(lambda each, task: each.work.remote([task]), task)
            while pool.has_next():
                # What a dead actor was doing is given out again by the caller; it comes back.
                with suppress(TimeoutError, RayActorError):
                    pool.get_next_unordered(timeout=_POLL_SECONDS)
                yield
        except RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise
        finally:
            if own:
                ray.shutdown()

    def processes(self, tasks: int) -> int:
        return min(self.workers or 1, tasks)  # what a cluster has is seen when it is joined


@dataclass(frozen=True)
class Slurm:
    """A SLURM cluster: one array job. The output has to be on a disk that all nodes share."""

    folder: Path
    """For submitit's files and the logs of the jobs."""
    workers: int | None = None
    """Elements of the array. [default: one for 16 tasks]"""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """For submitit: slurm_partition, timeout_min, gpus_per_node, ..."""
    cluster: str = "slurm"
    """Or "local", which imitates it with processes on this machine."""

    def run(self, begin: Begin, tasks: Sequence[Any], *, alone: bool = False) -> Iterator[None]:
        import submitit

        workers = len(tasks) if alone else self.processes(len(tasks))
        shares = _shares(tasks, -(-len(tasks) // workers))
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
            executor.update_parameters(**{"timeout_min": 24 * 60, **self.parameters})
            jobs = executor.map_array(partial(_work_alone, begin), shares)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split()) or "found a parameter that it does not take"
            raise InputError(f"slurm: {reason}") from error
        except submitit.core.utils.FailedJobError as error:
            raise InputError(f"slurm: {error}") from error
        try:
            while not all(job.done() for job in jobs):
                time.sleep(_POLL_SECONDS)
                yield
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        for told in filter(None, (job.exception() for job in jobs)):
            if "InputError: " in str(told):  # submitit keeps the text alone
                raise InputError(str(told).rpartition("InputError: ")[2])

    def processes(self, tasks: int) -> int:
        return min(self.workers or -(-tasks // 16), tasks)


def end_with_parent() -> None:
    """For a process of a pool: end when the process that started it has ended, even by kill -9."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _devices(name: str) -> list[str]:
    if name == "auto" and torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [name]


def _shares(tasks: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [tasks[start : start + size] for start in range(0, len(tasks), size)]


class _Worker:
    """What a process holds that works for others."""

    def __init__(self, begin: Begin, device: str = "auto"):
        self.refusal: InputError | None = None
        try:
            self._work = begin(device)
        except InputError as error:  # told with the first share; here nobody would hear it
            self.refusal = error

    def work(self, share: Sequence[Any]) -> None:
        if self.refusal is not None:
            raise self.refusal
        for _ in self._work(share):
            pass


_worker: _Worker
"""Of this process, if it is one of a pool."""


def _start_worker(begin: Begin, places: Any, threads: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    end_with_parent()
    torch.set_num_threads(threads)
    _worker = _Worker(begin, places.get())


def _work_here(share: Sequence[Any]) -> None:
    _worker.work(share)


def _work_alone(begin: Begin, share: Sequence[Any]) -> None:
    _Worker(begin).work(share)
