"""What a Ray worker does, on whatever machine it lives: show that it can do the driver's jobs, then do one after the other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import paretune
from paretune.errors import ConfigError, ParetuneError, StoreError, TrainingError
from paretune.files import disk_errors
from paretune.runs.jobs import Tasks, failure
from paretune.runs.local import attempt
from paretune.runs.store import Store

__all__ = ["Remote"]

SEEN_WITHIN = 5.0  # seconds in which a machine sees what the driver wrote just now
GONE_WITHIN = 60.0  # seconds in which a worker that Ray has lost ends


class Remote:
    """What an actor does: `begin` once, then `run` one job after the other."""

    def __init__(self) -> None:
        self.tasks = Tasks()
        self.last: dict[str, Any] | None = None  # {"path", "record"}: the latest progress
        self._held = contextlib.ExitStack()  # until the process ends

    def begin(self, hello: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check that this machine can do the driver's jobs; what is wrong, as FAILED.json would say it."""
        try:
            self._begin(hello)
        except ParetuneError as error:
            return failure(error)
        return None

    def _begin(self, hello: Mapping[str, Any]) -> None:
        host, root = socket.gethostname(), Path(hello["root"])
        if paretune.__version__ != hello["version"]:
            raise ConfigError(
                "all machines of a run have the same Paretune",
                found=f"{paretune.__version__} on {host}, {hello['version']} here",
                remedy=f"install {hello['version']} there",
            )
        _await_text(root / "logs" / "ray.json", hello["token"], host)
        missing = [path for path in hello["plugins"] if not Path(path).is_file()]
        if missing:
            raise ConfigError(
                "every machine sees the plugins", found=f"{host} has no {missing[0]}", remedy="put it on the shared file system"
            )
        os.environ.update(hello["env"])
        with contextlib.suppress(OSError):  # relative paths in a suite then mean the same; absolute ones need no folder
            os.chdir(hello["folder"])
        with disk_errors(root):
            log = os.open(hello["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
            self._held.enter_context(Store(root).worker_lock())

    def run(self, path: str) -> dict[str, Any]:
        """Do the job and say how it ended, as `attempt` does."""

        def progress(record: Mapping[str, Any]) -> None:
            self.last = {"path": path, "record": dict(record)}

        try:
            with open(path, "r+", encoding="utf-8") as handle:
                _alone(handle, path)
                return attempt(Path(path), tasks=self.tasks, progress=progress)
        except (ParetuneError, OSError) as error:
            return {"error": failure(error, label=Path(path).stem), "full": False}


def _alone(handle: IO[str], path: str) -> None:
    deadline = time.monotonic() + GONE_WITHIN
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return  # closing the file releases it
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TrainingError(
                    "one worker at a time works on a job",
                    found=f"another one still holds {path}, on a machine that Ray has lost",
                    remedy="end ray::Worker there, and run the same command again",
                ) from None
            time.sleep(0.1)


def _await_text(path: Path, text: str, host: str) -> None:
    deadline, found = time.monotonic() + SEEN_WITHIN, ""
    while True:
        try:
            if text in path.read_text(encoding="utf-8"):
                return
            found = f"{path} is another one there"
        except OSError as error:
            found = f"{path}: {error.strerror}"
        if time.monotonic() > deadline:
            raise StoreError(
                "every machine of the cluster sees the run directory under the same path",
                found=f"{host}: {found}",
                remedy="give a --root on a file system that all machines mount at the same place",
            )
        time.sleep(0.2)
