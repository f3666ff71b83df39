"""Worker processes of this machine. Each computes with one thread and pulls the next job when it is free.

A worker is `python -m paretune.runs.executors.local --worker ROOT PID`: it reads paths of job files on its standard input and answers with
one JSON line per event; everything else that it prints goes to ROOT/logs. It is killed by the system when the process PID ends, however
that ends, and holds the store's worker lock as long as it lives.

`python -m paretune.runs.executors.local ROOT/logs/jobs/train-<key>.json` does one job by hand.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError, ParetuneError
from paretune.files import disk_errors, is_disk_full, no_room
from paretune.runs.display import Display
from paretune.runs.executors.pool import ONE_THREAD, Pool, Worker
from paretune.runs.jobs import KIND, Job, Outcome, Tasks, attempt, failure, label_in, run_job
from paretune.runs.store import Store
from paretune.tasks.base import keep_reference

__all__ = ["Workers", "die_with"]

PROGRESS_EVERY = 0.3  # seconds between two progress events of a worker
STOPPED_WITHIN = 3.0  # seconds that workers get to end by themselves
PR_SET_PDEATHSIG = 1


@dataclass(eq=False, kw_only=True)
class _Process(Worker):
    process: subprocess.Popen[bytes]
    unread: bytes = b""


class Workers(Pool[_Process]):
    """Up to `limit` worker processes."""

    name = "worker"
    remedy = "SIGKILL is often the system running out of memory: use fewer --workers"

    def __init__(self, store: Store, limit: int, *, display: Display | None = None):
        super().__init__(store, limit, display=display)
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        super().close()
        self._selector.close()

    def _start(self, log: Path) -> _Process:
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(paths)}
        root = str(self._store.root.resolve())
        command = [sys.executable, "-P", "-m", "paretune.runs.executors.local", "--worker", root, str(os.getpid())]
        with disk_errors(self._store.root), open(log, "ab") as output:
            # A session of its own: Ctrl-C at the terminal reaches this process only, which then stops the workers.
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": output}
            process = subprocess.Popen(command, bufsize=0, **pipes, env=environment, start_new_session=True)
        worker = _Process(process=process, log=log)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _give(self, worker: _Process, job: Job) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: its end of file says so too
            worker.process.stdin.write(f"{job.path}\n".encode())

    def _listen(self) -> Iterator[Outcome]:
        for ready, _ in self._selector.select(timeout=1.0):
            yield from self._read(ready.data)

    def _read(self, worker: _Process) -> Iterator[Outcome]:
        assert worker.process.stdout is not None
        received = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not received:
            code = worker.process.wait()
            yield from self._lost(worker, f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
            return
        *lines, worker.unread = (worker.unread + received).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "end":
                yield self._ended(worker, event)
            else:
                assert worker.job is not None
                self.display.progress(worker.job, event["record"])

    def _stop(self, workers: Sequence[_Process]) -> None:
        for worker in workers:
            worker.process.terminate()
        deadline = time.monotonic() + STOPPED_WITHIN
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.wait()
            assert worker.process.stdin is not None
            assert worker.process.stdout is not None
            self._selector.unregister(worker.process.stdout)
            worker.process.stdin.close()
            worker.process.stdout.close()


# What runs in a worker


def _work(root: Path, parent: int) -> int:
    """Pull jobs until the standard input ends."""
    die_with(parent)
    commands, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what a job prints or asks for must not touch the two channels
    os.dup2(2, 1)
    store, tasks = Store(root), Tasks()
    keep_reference()
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
        if time.monotonic() - told > PROGRESS_EVERY or record.get("warnings"):  # what is warned of is not left out
            told = time.monotonic()
            print(json.dumps({"event": "progress", "record": dict(record)}, default=str), file=answers, flush=True)

    return {"event": "end", **attempt(path, tasks=tasks, progress=progress)}


def die_with(parent: int) -> None:
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
        if kind not in KIND or path.resolve().parts[-3:-1] != ("logs", "jobs"):
            remedy = "`paretune fit` and `bench` leave one there for each training and cell"
            raise ConfigError("a job is a file ROOT/logs/jobs/train-<key>.json, or cell-<key>.json", found=str(path), remedy=remedy)
        store = Store(path.resolve().parents[2])
        with store.lock():
            try:
                run_job(path, progress=lambda record: print(json.dumps(dict(record), default=str), flush=True))
            except Exception as error:
                if is_disk_full(error):
                    raise no_room(store.root, error) from error
                store.fail(KIND[kind], key, failure(error, label=label_in(path)))
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
    print("usage: python -m paretune.runs.executors.local ROOT/logs/jobs/JOB.json", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
