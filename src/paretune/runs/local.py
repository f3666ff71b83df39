"""Who runs the jobs: this process, one after the other, or a few worker processes that stay and pull the next job when they are free.

A worker is `python -m paretune.runs.local --worker ROOT PID`: it reads paths of job files on its standard input and answers with one
JSON line per event; everything else that it prints goes to ROOT/logs. It computes with one thread. It is killed by the system when
the process PID ends, however that ends, and holds the store's worker lock as long as it lives.

`python -m paretune.runs.local ROOT/logs/jobs/train-<key>.json` does one job by hand.

A worker that dies takes its job down once: the job starts again from its last checkpoint. The second time the job has failed.

`ray_cluster` does the same on many machines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretune.errors import ParetuneError, StoreError
from paretune.files import disk_errors, is_disk_full, no_room
from paretune.runs.jobs import CELL, KIND, Job, Tasks, failure, run_job
from paretune.runs.store import Store

__all__ = ["ATTEMPTS", "PROGRESS_EVERY", "Executor", "InProcess", "Outcome", "Workers", "attempt", "cpus", "lost"]

ATTEMPTS = 2
PROGRESS_EVERY = 0.3  # seconds between two progress events of a worker
PR_SET_PDEATHSIG = 1
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

OnProgress = Callable[[Job, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `error` is the content of FAILED.json, or None where it was done; `cause` the exception, where it is at hand."""

    job: Job
    seconds: float
    error: Mapping[str, Any] | None = None
    cause: BaseException | None = None


class Executor(ABC):
    """Takes jobs and says how they ended; more may be submitted while `outcomes` runs. Cells go before trainings.

    A full disk is not a job's failure: `outcomes` raises StoreError. Leaving the `with` block stops whatever still runs.
    """

    def __init__(self, on_progress: OnProgress | None = None):
        self.on_progress = on_progress
        self._queues: dict[bool, deque[Job]] = {True: deque(), False: deque()}  # is it a cell?

    def submit(self, job: Job) -> None:
        self._queues[job.kind == CELL].append(job)

    def _next(self, task: str | None = None) -> Job | None:
        """The next job, preferably on `task`."""
        for queue in (self._queues[True], self._queues[False]):
            for job in queue:
                if job.task == task:
                    queue.remove(job)
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


def lost(job: Job, how: str, log: Path, remedy: str) -> dict[str, Any]:
    """The content of FAILED.json of a job that has lost its worker for the last time."""
    return {
        "label": job.label,
        "error": "TrainingError",
        "message": f"its worker ended {ATTEMPTS} times, last with {how}; see {log.name}",
        "rule": "a worker ends its job before it ends",
        "found": f"{job.label}: {how}, {ATTEMPTS} times",
        "remedy": f"see {log}; {remedy}",
        "traceback": "",
    }


def attempt(path: Path, *, tasks: Tasks, progress: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Do a job in a worker and say how it ended: {"error": content of FAILED.json or None, "full": was it the disk?}."""
    try:
        run_job(path, tasks=tasks, progress=progress)
    except Exception as error:
        return {"error": failure(error, label=_label(path)), "full": is_disk_full(error)}
    return {"error": None, "full": False}


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class InProcess(Executor):
    """In this process, one after the other, with this process's threads; `tasks` are used as they are."""

    def __init__(self, *, tasks: Tasks | None = None, on_progress: OnProgress | None = None):
        super().__init__(on_progress)
        self._tasks = tasks or Tasks()

    def outcomes(self) -> Iterator[Outcome]:
        task = None
        while (job := self._next(task)) is not None:
            task, start = job.task, time.monotonic()
            error, cause = None, None
            try:
                run_job(job.path, tasks=self._tasks, progress=self._progress(job))
            except Exception as raised:
                if is_disk_full(raised):
                    raise
                error, cause = failure(raised, label=job.label), raised
            yield Outcome(job, time.monotonic() - start, error, cause)

    def _progress(self, job: Job) -> Callable[[Mapping[str, Any]], None] | None:
        report = self.on_progress
        return None if report is None else lambda record: report(job, record)


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    job: Job | None = None
    task: str | None = None  # what it worked on last
    began: float = 0.0
    unread: bytes = b""
    log: Path = field(default_factory=Path)


class Workers(Executor):
    """Up to `count` worker processes, started when there is work for them."""

    def __init__(self, store: Store, count: int, *, on_progress: OnProgress | None = None):
        super().__init__(on_progress)
        assert count >= 1
        self._store, self._count = store, count
        self._workers: list[_Worker] = []
        self._started = 0
        self._deaths: Counter[Path] = Counter()
        self._selector = selectors.DefaultSelector()

    def outcomes(self) -> Iterator[Outcome]:
        while True:
            self._dispatch()
            if not any(worker.job for worker in self._workers):
                return
            for ready, _ in self._selector.select(timeout=1.0):
                yield from self._read(ready.data)

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + 3.0
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.wait()
            self._drop(worker)
        self._workers = []
        self._selector.close()

    def _dispatch(self) -> None:
        while True:
            free = next((worker for worker in self._workers if worker.job is None), None)
            if free is None and len(self._workers) == self._count:
                return
            job = self._next(free.task if free else None)
            if job is None:
                return
            worker = free or self._start()
            worker.job, worker.task, worker.began = job, job.task, time.monotonic()
            with contextlib.suppress(BrokenPipeError):  # it has died: its end of file says so too
                assert worker.process.stdin is not None
                worker.process.stdin.write(f"{job.path}\n".encode())

    def _start(self) -> _Worker:
        self._started += 1
        log = self._store.root / "logs" / f"worker-{self._started}.log"
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-P", "-m", "paretune.runs.local", "--worker", str(self._store.root.resolve()), str(os.getpid())]
        with disk_errors(self._store.root), open(log, "ab") as output:
            # A session of its own: Ctrl-C at the terminal reaches this process only, which then stops the workers.
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        worker = _Worker(process=process, log=log)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)
        return worker

    def _read(self, worker: _Worker) -> Iterator[Outcome]:
        assert worker.process.stdout is not None
        received = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not received:
            yield from self._died(worker)
            return
        *lines, worker.unread = (worker.unread + received).split(b"\n")
        for line in lines:
            event, job = json.loads(line), worker.job
            assert job is not None
            if event["event"] == "progress":
                if self.on_progress is not None:
                    self.on_progress(job, event["record"])
                continue
            worker.job = None
            error = event["error"]
            if event["full"]:
                raise StoreError(error["rule"], found=error["found"], remedy=error["remedy"])
            yield Outcome(job, time.monotonic() - worker.began, error)

    def _died(self, worker: _Worker) -> Iterator[Outcome]:
        job, code = worker.job, worker.process.wait()
        self._workers.remove(worker)
        self._drop(worker)
        if job is None:
            return
        self._deaths[job.path] += 1
        if self._deaths[job.path] < ATTEMPTS:
            self._queues[job.kind == CELL].appendleft(job)
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        remedy = "SIGKILL is often the system running out of memory: use fewer --workers"
        yield Outcome(job, time.monotonic() - worker.began, lost(job, how, worker.log, remedy))

    def _drop(self, worker: _Worker) -> None:
        for pipe in (worker.process.stdin, worker.process.stdout):
            assert pipe is not None
            if pipe is worker.process.stdout:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(pipe)
            pipe.close()


# What runs in a worker


def _work(root: Path, parent: int) -> int:
    """Pull jobs until the standard input ends."""
    _die_with(parent)
    commands, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a job prints or asks for must not touch the two channels
    os.dup2(2, 1)
    store, tasks = Store(root), Tasks()
    with store.worker_lock():
        if os.getppid() != parent:
            return 1  # it ended before this process could be told, and the next run may have begun
        for line in commands:
            answer = _answer(Path(line.rstrip("\n")), tasks, answers)
            print(json.dumps(answer), file=answers, flush=True)
    return 0


def _answer(path: Path, tasks: Tasks, answers: Any) -> dict[str, Any]:
    told = time.monotonic()

    def progress(record: Mapping[str, Any]) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_EVERY:
            told = time.monotonic()
            print(json.dumps({"event": "progress", "record": dict(record)}, default=str), file=answers, flush=True)

    return {"event": "end", **attempt(path, tasks=tasks, progress=progress)}


def _label(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["label"])
    except (OSError, ValueError, KeyError):
        return path.stem


def _die_with(parent: int) -> None:
    """Be killed when the process `parent` ends: by the system on Linux, and by a thread that looks every second elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _by_hand(path: Path) -> int:
    """One job file, as a worker would do it, with the run directory to itself."""
    kind, _, key = path.stem.partition("-")
    try:
        store = Store(path.resolve().parents[2])
        with store.lock():
            try:
                run_job(path, progress=lambda record: print(json.dumps(dict(record), default=str), flush=True))
            except Exception as error:
                if is_disk_full(error):
                    raise no_room(store.root, error) from error
                store.fail(KIND[kind], key, failure(error, label=_label(path)))
                raise
    except ParetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def main(arguments: list[str]) -> int:
    if len(arguments) == 3 and arguments[0] == "--worker":
        return _work(Path(arguments[1]), int(arguments[2]))
    if len(arguments) == 1 and Path(arguments[0]).is_file():
        return _by_hand(Path(arguments[0]))
    print("usage: python -m paretune.runs.local ROOT/logs/jobs/JOB.json", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
