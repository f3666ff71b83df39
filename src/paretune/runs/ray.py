"""Jobs on a Ray cluster: long-lived actors pull them, each with the CPUs, GPUs and memory that one job asks for.

A job is the path of a file, and what it makes is a directory, so all machines see the run directory under the same path. Before a worker
gets its first job it shows that it does, that its Paretune is the driver's, and that its file locks reach the driver. A worker computes
with one thread per CPU of its request, so that its results are those of a local worker with as many threads.

Ray kills the actors of a driver that ends, however it ends; until they are gone they hold the store's worker lock, and the next run waits.
A worker that is lost takes its job down once, as in `cluster`. A machine that Ray has given up but that still computes holds the lock of
its job file: nobody else starts that job meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paretune
from paretune.errors import ConfigError, StoreError, TrainingError
from paretune.files import disk_errors, write_json
from paretune.registry import loaded_plugins
from paretune.runs.jobs import TRAIN, Job
from paretune.runs.local import ATTEMPTS, ONE_THREAD, PROGRESS_EVERY, Executor, Outcome, cpus, lost
from paretune.runs.store import ARTIFACTS, CELLS, Store

if TYPE_CHECKING:
    from paretune.runs.display import Display

__all__ = ["Ray", "RayWorkers"]

GIB = 1 << 30
OBJECT_STORE = 100_000_000  # bytes of shared memory of a cluster of this machine alone: jobs pass by the file system
REACHED_WITHIN = 5.0  # seconds for the address to answer
SEEN_WITHIN = 60.0  # seconds after which what one machine wrote is seen by all: NFS may remember for 30 that a file is not there
MOST_MEMORY = 1e5  # GiB of one job; Ray counts in units so small that a million GiB overflow and are granted
PATIENCE = 60.0  # seconds that the workers of a killed driver get to disappear: ray:// waits 30 of them for a reconnection
IDLE = 60.0  # seconds after which a worker without work gives its CPUs and GPUs back
USAGE = "RAY_USAGE_STATS_ENABLED"


@dataclass(frozen=True)
class Ray:
    """Where the cluster is and what one job asks of it. `env` names variables of this process that workers get, such as API keys.

    `address` is `local` (a cluster of this machine alone, which ends with this process), `auto`, `host:port` or `ray://host:port`; without
    it, the environment's RAY_ADDRESS, else `local`. A connection that this process has already is used as it is.
    """

    address: str | None = None
    cpus_per_job: int = 1
    gpus_per_job: float = 0.0
    memory_per_job: float = 0.0  # GiB; 0 asks for none
    wait: float = 0.0  # seconds for machines to appear on which a job fits
    env: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError for a request that no cluster can serve, and where Ray is missing."""
        whole = self.gpus_per_job <= 1 or self.gpus_per_job == int(self.gpus_per_job)
        room = 0 <= self.memory_per_job <= MOST_MEMORY
        if self.cpus_per_job < 1 or self.gpus_per_job < 0 or not whole or not room or self.wait < 0:
            raise ConfigError(
                f"a job asks for whole CPUs, at least one, for GPUs (a share of one, or whole ones), and for at most {MOST_MEMORY:g} GiB",
                found=f"{self.asked()}, wait {self.wait:g} s",
                remedy="for example --cpus-per-job 4 --gpus-per-job 0.5 --memory-per-job 16",
            )
        missing = [name for name in self.env if name not in os.environ]
        if missing:
            raise ConfigError(
                "a variable that workers get is set here", found=f"no {', '.join(missing)}", remedy=f"export {missing[0]}=..."
            )
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("the executor ray needs Ray", found="it is not installed", remedy='pip install "paretune[ray]"')

    def asked(self) -> str:
        """`1 CPU, 0.5 GPU, 16 GiB`."""
        return _resources({"CPU": self.cpus_per_job, "GPU": self.gpus_per_job, "memory": self.memory_per_job * GIB})


@dataclass(eq=False)
class _Place:
    """An actor, the call that it is busy with, and its job. It waits for a machine while `ready` is False."""

    actor: Any
    log: Path
    call: Any
    ready: bool = False
    job: Job | None = None
    task: str | None = None
    since: float = 0.0  # when the job began, or when it ended
    told: Any = None  # the question for its latest progress record, not yet answered
    last: Mapping[str, Any] | None = None  # the answer before


class RayWorkers(Executor):
    """Up to `count` actors, by default as many as the cluster's machines could hold; connects when there is work."""

    def __init__(self, store: Store, settings: Ray, count: int | None = None, *, display: Display | None = None):
        super().__init__(None if display is None else display.progress)
        self._store, self._settings, self._count, self._display = store, settings, count, display
        self._limit = count or 1
        self._places: list[_Place] = []
        self._started = self._failed_starts = 0
        self._deaths: Counter[Path] = Counter()
        self._hello: dict[str, Any] = {}
        self._starved_since: float | None = None
        self._local = False
        self._open = contextlib.ExitStack()

    def outcomes(self) -> Iterator[Outcome]:
        if self._waiting_jobs():
            self._connect()
        while self._waiting_jobs() or any(place.job for place in self._places):
            self._dispatch()
            calls = {place.call: place for place in self._places if place.call is not None}
            for call in _first(list(calls)):
                yield from self._returned(calls[call])
            self._progress()
            self._rest()
            if not any(place.ready for place in self._places):
                self._look_for_room()

    def close(self) -> None:
        for place in self._places:
            with contextlib.suppress(Exception):  # the cluster may be gone
                _ray().kill(place.actor)
        self._places = []
        self._open.close()

    # The cluster

    def _connect(self) -> None:
        ray = _ray()
        with disk_errors(self._store.root):
            token, logs = secrets.token_hex(8), self._store.root.resolve() / "logs"
            logs.mkdir(parents=True, exist_ok=True)
            write_json(logs / "ray.json", {"token": token})
            # Ray prints what it thinks of lost workers to standard output, where only results belong.
            noise = open(logs / "ray.log", "a", encoding="utf-8")  # noqa: SIM115 (open until `close`)
            self._open.enter_context(contextlib.redirect_stdout(self._open.enter_context(noise)))
        if not ray.is_initialized():
            address = self._settings.address or os.environ.get("RAY_ADDRESS") or "local"
            _init(address)
            self._local = address == "local"
            self._open.callback(ray.shutdown)
        self._hello = {
            "root": str(self._store.root.resolve()),
            "token": token,
            "version": paretune.__version__,
            "folder": os.getcwd(),
            "plugins": loaded_plugins(),
            "env": {name: os.environ[name] for name in self._settings.env},
        }
        self._look_for_room()

    def _look_for_room(self) -> None:
        """Raise ConfigError where a job fits on no machine, and none appears within the time to wait."""
        asked = {"CPU": self._settings.cpus_per_job, "GPU": self._settings.gpus_per_job, "memory": self._settings.memory_per_job * GIB}
        machines = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        fit = sum(min(int(has.get(name, 0.0) / amount + 1e-9) for name, amount in asked.items() if amount) for has in machines)
        if fit:
            self._starved_since = None
            self._limit = self._count or fit
            if self._display is not None:
                self._display.side_by_side = min(self._limit, fit)
            return
        if self._starved_since is None:
            self._starved_since = time.monotonic()
            if self._settings.wait and self._display is not None:
                self._display.note(f"waiting up to {self._settings.wait:.0f} s for a machine with {self._settings.asked()}")
        if time.monotonic() - self._starved_since >= self._settings.wait:
            there = sorted({_resources(has) for has in machines})
            raise ConfigError(
                "a job fits on one machine of the cluster",
                found=f"{self._settings.asked()} asked; machines: {'; '.join(there[:4]) or 'none'}",
                remedy="ask for less per job, add machines, or give --wait seconds where an autoscaler adds them",
            )

    # The actors

    def _waiting_jobs(self) -> int:
        return sum(map(len, self._queues.values()))

    def _dispatch(self) -> None:
        busy = sum(place.job is not None for place in self._places)
        while len(self._places) < min(self._limit, self._waiting_jobs() + busy):
            self._start()
        for place in self._places:
            if place.call is None and (job := self._next(place.task)) is not None:
                place.job, place.task, place.since = job, job.task, time.monotonic()
                place.call = place.actor.run.remote(str(job.path.resolve()))

    def _start(self) -> None:
        self._started += 1
        settings, log = self._settings, self._store.root.resolve() / "logs" / f"ray-{self._started}.log"
        env = {**dict.fromkeys(ONE_THREAD, str(settings.cpus_per_job)), "TOKENIZERS_PARALLELISM": "false"}
        if self._local:  # elsewhere, the machines have a Paretune of their own
            env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        asked: dict[str, Any] = {"num_cpus": settings.cpus_per_job, "num_gpus": settings.gpus_per_job}
        if settings.memory_per_job:
            asked["memory"] = int(settings.memory_per_job * GIB)
        # Two calls at a time: the job, and the question how far it is.
        actor = _ray().remote(_worker()).options(**asked, max_concurrency=2, runtime_env={"env_vars": env}).remote()
        self._places.append(_Place(actor=actor, log=log, call=actor.begin.remote({**self._hello, "log": str(log)})))

    def _returned(self, place: _Place) -> Iterator[Outcome]:
        ray, job = _ray(), place.job
        call, place.call = place.call, None
        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as gone:
            yield from self._lost(place, gone)
            return
        if job is None:
            self._begun(place, answer)
            return
        place.job, began, place.since = None, place.since, time.monotonic()
        error = answer["error"]
        if answer["full"]:
            raise StoreError(error["rule"], found=error["found"], remedy=error["remedy"])
        if error is None:
            self._await_published(job)
        yield Outcome(job, time.monotonic() - began, error)

    def _begun(self, place: _Place, problem: Mapping[str, str] | None) -> None:
        if problem is not None:
            kind = ConfigError if problem["error"] == "ConfigError" else StoreError
            raise kind(problem["rule"], found=problem["found"], remedy=problem["remedy"])
        if not self._store.has_workers():
            raise StoreError(
                "file locks of the run directory reach every machine",
                found=f"a Ray worker holds {self._store.root / '.workers'} and the driver does not see it",
                remedy="put --root on a file system with cluster-wide flock (NFS 4, Lustre mounted with -o flock)",
            )
        place.ready, place.since, self._failed_starts = True, time.monotonic(), 0

    def _lost(self, place: _Place, error: Exception) -> Iterator[Outcome]:
        self._places.remove(place)
        with contextlib.suppress(Exception):
            _ray().kill(place.actor)  # where only the connection was lost, it must not go on
        how, job = str(error).strip().rpartition("\n")[2][:240], place.job
        if job is None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise TrainingError(
                    "a Ray worker starts",
                    found=f"{self._failed_starts} ended before their first job, the last with: {how}",
                    remedy="see Ray's logs, by default under /tmp/ray/session_latest/logs on its machine",
                )
            return
        self._deaths[job.path] += 1
        if self._deaths[job.path] < ATTEMPTS:
            self._queues[job.kind != TRAIN].appendleft(job)
            return
        remedy = "where it ran out of memory, ask for more with --memory-per-job, so that fewer share a machine"
        yield Outcome(job, time.monotonic() - place.since, lost(job, how, place.log, remedy))

    def _await_published(self, job: Job) -> None:
        """Until this machine sees what another one has published: listing a directory makes NFS look again."""
        find = self._store.artifact if job.kind == TRAIN else self._store.cell
        deadline = time.monotonic() + SEEN_WITHIN
        while find(job.key) is None:
            if time.monotonic() > deadline:
                raise StoreError(
                    "what one machine publishes, all see",
                    found=f"{job.label} ended well, and its directory is not here after {SEEN_WITHIN:.0f} s",
                    remedy="mount the run directory everywhere from one server (NFS: -o lookupcache=positive)",
                )
            for kind in (ARTIFACTS, CELLS):
                with contextlib.suppress(OSError):
                    os.listdir(self._store.root / kind)
            time.sleep(0.2)

    def _progress(self) -> None:
        """Ask busy workers how far they are; nobody waits for the answer."""
        if self.on_progress is None:
            return
        ray = _ray()
        for place in self._places:
            if place.told is not None and ray.wait([place.told], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):  # its job's call says so too
                    last = ray.get(place.told)
                    if place.job is not None and last not in (None, place.last) and last["path"] == str(place.job.path.resolve()):
                        place.last = last
                        self.on_progress(place.job, last["record"])
                place.told = None
            if place.told is None and place.job is not None:
                place.told = place.actor.last.remote()

    def _rest(self) -> None:
        """End workers that have had nothing to do for a while: others may need their GPUs."""
        if self._waiting_jobs():
            return
        for place in [p for p in self._places if p.ready and p.call is None and time.monotonic() - p.since > IDLE]:
            self._places.remove(place)
            _ray().kill(place.actor)


def _ray() -> Any:
    """Imported where it is used: it is an optional dependency."""
    import ray

    return ray


def _first(calls: list[Any]) -> list[Any]:
    """The first of the calls to return, or none within a moment."""
    ray = _ray()
    try:
        return ray.wait(calls, num_returns=1, timeout=PROGRESS_EVERY)[0]
    except (ray.exceptions.RayError, ConnectionError) as error:
        found = str(error).strip().partition("\n")[0]
        remedy = "see the head's logs; the same command goes on from here"
        raise TrainingError("the Ray cluster answers as long as the run lasts", found=found, remedy=remedy) from error


def _init(address: str) -> None:
    _reach(address)
    given: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        given |= {"num_cpus": cpus(), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    before = os.environ.get(USAGE)
    os.environ.setdefault(USAGE, "0")
    try:
        _ray().init(address=address, **given)
    except Exception as error:  # of many types, by what is wrong there
        raise _unreachable(address, str(error).strip().partition("\n")[0] or repr(error)) from error
    finally:
        if before is None:
            del os.environ[USAGE]


def _reach(address: str) -> None:
    """Ray waits long for an address that nobody listens on; ask it first."""
    if address in ("local", "auto") or ("://" in address and not address.startswith("ray://")):
        return
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        raise _unreachable(address, "neither local, auto, host:port nor ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_WITHIN).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, why: str) -> ConfigError:
    return ConfigError(
        "a Ray cluster answers at its address",
        found=f"{address}: {why}",
        remedy="start one with `ray start --head` and give its host:port, or --address local for this machine alone",
    )


def _resources(amounts: Mapping[str, float]) -> str:
    shown = [f"{amounts.get('CPU', 0):g} CPU"]
    shown += [f"{amounts['GPU']:g} GPU"] if amounts.get("GPU") else []
    shown += [f"{amounts['memory'] / GIB:.3g} GiB"] if amounts.get("memory") else []
    return ", ".join(shown)


def _worker() -> type:
    """The actor's class. Being made in a function it travels by value, so that a machine without Paretune can say so."""

    class Worker:
        def begin(self, hello):
            try:
                from paretune.runs.ray_worker import Remote
            except ImportError as error:
                return {
                    "error": "ConfigError",
                    "rule": "Paretune is installed on every machine of the cluster",
                    "found": f"{__import__('socket').gethostname()}: {error}",
                    "remedy": f"install version {hello['version']} there, with the packages that the driver has",
                }
            self.remote = Remote()
            return self.remote.begin(hello)

        def run(self, path):
            return self.remote.run(path)

        def last(self):
            return self.remote.last

    return Worker
