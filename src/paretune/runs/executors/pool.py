"""Executors: the queue of jobs, and a pool of long-lived workers that pull from it.

`InProcess` does one job after the other in this process. A `Pool` keeps up to a number of workers, gives each the next job when it is free,
and says how the jobs ended. `local` has worker processes of this machine, `ray` has actors on a cluster: how a worker is started, given a
job, listened to and stopped is theirs, and all else is here.

A worker that is lost takes its job down once: the job starts again from its last checkpoint. The second time the job has failed.
"""

from __future__ import annotations

import functools
import os
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from paretune.files import is_disk_full
from paretune.runs.display import Display
from paretune.runs.jobs import CELL, Job, Outcome, Tasks, as_error, failure, run_job
from paretune.runs.store import Store

__all__ = ["ATTEMPTS", "ONE_THREAD", "Executor", "InProcess", "Pool", "Worker", "cpus"]

ATTEMPTS = 2
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Executor(ABC):
    """Takes jobs and says how they ended; more may be submitted while `outcomes` runs. Cells go before trainings.

    A full disk is not a job's failure: `outcomes` raises StoreError. Leaving the `with` block stops whatever still runs.
    """

    def __init__(self, display: Display | None = None):
        self.display = display or Display(cells=0)
        self._queues: dict[bool, deque[Job]] = {True: deque(), False: deque()}  # is it a cell?

    def submit(self, job: Job) -> None:
        self._queues[job.kind == CELL].append(job)

    def _next(self, task: str | None = None) -> Job | None:
        """The next job, preferably on `task`."""
        for queue in (self._queues[True], self._queues[False]):
            for place, job in enumerate(queue):
                if job.task == task:
                    del queue[place]
                    return job
            if queue:
                return queue.popleft()
        return None

    @abstractmethod
    def outcomes(self) -> Iterator[Outcome]:
        """Run until nothing is left."""

    def close(self) -> None:  # noqa: B027 (nothing to stop is a fine default)
        """Stop everything."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcess(Executor):
    """In this process, one after the other, with this process's threads; `tasks` are used as they are."""

    def __init__(self, *, tasks: Tasks | None = None, display: Display | None = None):
        super().__init__(display)
        self._tasks = tasks or Tasks()

    def outcomes(self) -> Iterator[Outcome]:
        task = None
        while (job := self._next(task)) is not None:
            task, start = job.task, time.monotonic()
            error, cause = None, None
            try:
                tell = functools.partial(self.display.progress, job)
                run_job(job.path, tasks=self._tasks, progress=tell, doing=tell)
            except Exception as raised:
                if is_disk_full(raised):
                    raise
                error, cause = failure(raised, label=job.label), raised
            yield Outcome(job, time.monotonic() - start, error, cause)


@dataclass(eq=False, kw_only=True)
class Worker:
    """A worker as its pool knows it. It gets its first job once it is `ready`."""

    log: Path
    ready: bool = True
    job: Job | None = None
    task: str | None = None  # what it worked on last
    since: float = 0.0  # when its job began, or when the last one ended


W = TypeVar("W", bound=Worker)


class Pool(Executor, Generic[W]):
    """Up to `limit` workers, started when there is work for them."""

    name: str  # of the logs
    remedy: str  # where a job has lost its last worker

    def __init__(self, store: Store, limit: int, *, display: Display | None = None):
        super().__init__(display)
        assert limit >= 1
        self._store, self._limit = store, limit
        self._workers: list[W] = []
        self._started = 0
        self._deaths: Counter[Path] = Counter()

    @abstractmethod
    def _start(self, log: Path) -> W:
        """A new worker; what its jobs print goes to `log`."""

    @abstractmethod
    def _give(self, worker: W, job: Job) -> None:
        """Tell the worker to do the job."""

    @abstractmethod
    def _listen(self) -> Iterator[Outcome]:
        """Wait a moment for workers, and pass on what they say to `_ended`, `_lost` and the display."""

    @abstractmethod
    def _stop(self, workers: Sequence[W]) -> None:
        """End these workers, which may be dead already."""

    def outcomes(self) -> Iterator[Outcome]:
        while self._left():
            self._dispatch()
            yield from self._listen()

    def close(self) -> None:
        self._stop(self._workers)
        self._workers = []

    def _waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def _left(self) -> int:
        """Jobs whose outcome is not known yet."""
        return self._waiting() + sum(worker.job is not None for worker in self._workers)

    def _dispatch(self) -> None:
        busy = sum(worker.job is not None for worker in self._workers)
        while len(self._workers) < min(self._limit, self._waiting() + busy):
            self._started += 1
            self._workers.append(self._start(self._store.root / "logs" / f"{self.name}-{self._started}.log"))
        for worker in self._workers:
            if worker.ready and worker.job is None and (job := self._next(worker.task)) is not None:
                worker.job, worker.task, worker.since = job, job.task, time.monotonic()
                self._give(worker, job)

    def _ended(self, worker: W, answer: Mapping[str, Any]) -> Outcome:
        """The worker has done its job and is free again; `answer` is that of `jobs.attempt`. Raises StoreError where the disk is full."""
        job, began, error = worker.job, worker.since, answer["error"]
        assert job is not None
        worker.job, worker.since = None, time.monotonic()
        if answer["full"]:
            raise as_error(error, str(worker.log))
        return Outcome(job, worker.since - began, error)

    def _lost(self, worker: W, how: str) -> Iterator[Outcome]:
        """The worker has ended or does not answer any more: its job goes first in the queue, until it has had its attempts."""
        self._workers.remove(worker)
        self._stop([worker])
        job = worker.job
        if job is None:
            return
        self._deaths[job.path] += 1
        if self._deaths[job.path] < ATTEMPTS:
            self._queues[job.kind == CELL].appendleft(job)
            return
        error = {
            "label": job.label,
            "error": "TrainingError",
            "message": f"its worker ended {ATTEMPTS} times, last with {how}; see {worker.log.name}",
            "rule": "a worker ends its job before it ends",
            "found": f"{job.label}: {how}, {ATTEMPTS} times",
            "remedy": f"see {worker.log}; {self.remedy}",
            "traceback": "",
        }
        yield Outcome(job, time.monotonic() - worker.since, error)
