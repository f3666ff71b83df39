"""Workers on a Ray cluster: actors, each with the CPUs, GPUs and memory that one job asks for.

A job is the path of a file, and what it makes is a directory, so all machines see the run directory under the same path. Before a worker
gets its first job it shows that it does, that its Paretune is the driver's, and that its file locks reach the driver. A worker computes
with one thread per CPU of its request, so that its results are those of a local worker with as many threads.

Ray kills the actors of a driver that ends, however it ends; until they are gone they hold the store's worker lock, and the next run waits.
A worker that Ray has lost may still compute, on a machine that was cut off: it holds the lock of its job file, and no other worker starts
that job meanwhile.

Where a job asks for several GPUs a worker is as many actors, with a GPU each, on one machine or on several. They are the processes of a
training (`training.processes`): the first takes the job, and the others train along. Where one is lost they all go, and the training
starts again from its last checkpoint, on fewer GPUs where there are no more; its result is the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import paretune
from paretune.errors import ConfigError, ParetuneError, StoreError, TrainingError
from paretune.files import disk_errors, write_json
from paretune.registry import LEARNERS, loaded_plugins
from paretune.runs.display import Display
from paretune.runs.executors.pool import ATTEMPTS, ONE_THREAD, Pool, Worker, cpus
from paretune.runs.jobs import TRAIN, Job, Outcome, Tasks, as_error, attempt, failure, read_job, train_along, waits
from paretune.runs.store import ARTIFACTS, CELLS, Store
from paretune.tasks.base import keep_reference

__all__ = ["Ray", "RayWorkers", "Remote"]

GIB = 1 << 30
OBJECT_STORE = 100_000_000  # bytes of shared memory of a cluster of this machine alone: jobs pass by the file system
REACHED_WITHIN = 5.0  # seconds for the address to answer
SHARED_WITHIN = 5.0  # seconds in which a machine sees what the driver wrote just now
SEEN_WITHIN = 60.0  # seconds after which what one machine wrote is seen by all: NFS may remember for 30 that a file is not there
LOOK_EVERY = 0.3  # seconds that the driver waits for an answer before it looks around; Ctrl-C is heard then
GONE_WITHIN = 60.0  # seconds in which a worker that Ray has lost ends
MOST_MEMORY = 1e5  # GiB of one job; Ray counts in units so small that a million GiB overflow and are granted
SAYS_WITHIN = 5.0  # seconds that the first actor of a job gets to say itself what became of another
PATIENCE = 60.0  # seconds that the workers of a killed driver get to disappear: ray:// waits 30 of them for a reconnection
IDLE = 60.0  # seconds after which a worker without work gives its CPUs and GPUs back
PROGRESS_EVERY = 1.0  # seconds between two questions to all workers how far they are
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

    @property
    def resources(self) -> dict[str, float]:
        """What one job asks for, as Ray counts it."""
        return {"CPU": self.cpus_per_job, "GPU": self.gpus_per_job, "memory": self.memory_per_job * GIB}

    @property
    def processes(self) -> int:
        """How many actors share a job: one for each GPU."""
        return max(1, int(self.gpus_per_job))

    @property
    def share(self) -> dict[str, float]:
        """What one of them asks for; CPUs are whole ones."""
        each = {name: amount / self.processes for name, amount in self.resources.items()}
        return {**each, "CPU": max(1, self.cpus_per_job // self.processes)}

    def asked(self) -> str:
        """`1 CPU, 0.5 GPU, 16 GiB`."""
        return _resources(self.resources)


@dataclass(eq=False, kw_only=True)
class _Place(Worker):
    """An actor, and the call that it is busy with: `begin`, or `run`."""

    actor: Any
    call: Any
    told: Any = None  # the question for its latest progress record, not yet answered
    last: Mapping[str, Any] | None = None  # the answer before
    others: Sequence[Any] = ()  # the actors that train along
    along: Sequence[Any] = ()  # their calls
    group: Any = None  # the placement group of all


class RayWorkers(Pool[_Place]):
    """Up to `limit` actors, by default as many as the cluster's machines could hold; connects when there is work."""

    name = "ray"
    remedy = "where it ran out of memory, ask for more with --memory-per-job, so that fewer share a machine"

    def __init__(self, store: Store, settings: Ray, limit: int | None = None, *, display: Display | None = None):
        super().__init__(store, limit or 1, display=display)
        self._settings, self._asked_limit = settings, limit
        self._failed_starts = 0
        self._unseen: list[tuple[Outcome, float]] = []  # done on another machine, and until when this one must see it
        self._ask_at = self._look_at = 0.0
        self._hello: dict[str, Any] = {}
        self._starved_since: float | None = None
        self._size = settings.processes  # actors of a worker
        self._ran = False
        self._local = False
        self._open = contextlib.ExitStack()

    def outcomes(self) -> Iterator[Outcome]:
        if self._waiting():
            self._connect()
        yield from super().outcomes()

    def close(self) -> None:
        super().close()
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
        asked = self._settings.share
        machines = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        fit = sum(min(int(has.get(name, 0.0) / amount + 1e-9) for name, amount in asked.items() if amount) for has in machines)
        if 0 < fit < self._settings.processes and self._ran:
            self.display.note(f"trainings go on in {fit} processes, for want of GPUs")
        self._size = max(1, min(fit, self._settings.processes))
        if fit >= (1 if self._ran else self._settings.processes):
            fit, self._starved_since = fit // self._size, None
            self._limit = self._asked_limit or fit
            self.display.forecast.side_by_side = min(self._limit, fit)
            return
        if self._starved_since is None:
            self._starved_since = time.monotonic()
            if self._settings.wait:
                self.display.note(f"waiting up to {self._settings.wait:.0f} s for a machine with {self._settings.asked()}")
        if time.monotonic() - self._starved_since >= self._settings.wait:
            there = sorted({_resources(has) for has in machines})
            raise ConfigError(
                "a job fits on one machine of the cluster" if self._settings.processes == 1 else "the GPUs of a job are in the cluster",
                found=f"{self._settings.asked()} asked; machines: {'; '.join(there[:4]) or 'none'}",
                remedy="ask for less per job, add machines, or give --wait seconds where an autoscaler adds them",
            )

    # The actors

    def _start(self, log: Path) -> _Place:
        settings, log = self._settings, log.resolve()
        env = {**dict.fromkeys(ONE_THREAD, str(settings.share["CPU"])), "TOKENIZERS_PARALLELISM": "false"}
        env |= {} if self._size == 1 else {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # each actor sees one GPU, its own
        if self._local:  # elsewhere, the machines have a Paretune of their own
            env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        share = settings.share
        asked: dict[str, Any] = {"num_cpus": share["CPU"], "num_gpus": share["GPU"]}
        if settings.memory_per_job:
            asked["memory"] = int(share["memory"])
        group = _together(share, self._size) if self._size > 1 else None
        if group is not None:
            asked["placement_group"] = group
        # Several calls at a time: the job, the question how far it is, and where the others meet the first.
        made = _ray().remote(_worker()).options(**asked, max_concurrency=2 + self._size, runtime_env={"env_vars": env})
        actor, *others = (made.remote() for _ in range(self._size))
        logs = [log if rank == 0 else log.with_name(f"{log.stem}-{rank}.log") for rank in range(self._size)]
        begun = [other.begin.remote({**self._hello, "log": str(own)}) for other, own in zip(others, logs[1:], strict=True)]
        call = actor.begin.remote({**self._hello, "log": str(log)}, *begun)
        return _Place(log=log, ready=False, actor=actor, call=call, others=others, group=group)

    def _give(self, worker: _Place, job: Job) -> None:
        path, size = str(job.path.resolve()), 1 + len(worker.others) if job.kind == TRAIN else 1
        worker.call = worker.actor.run.remote(path, size, *worker.along)  # once the others have ended the job before
        worker.along = [other.along.remote(path, rank, size, worker.actor) for rank, other in enumerate(worker.others[: size - 1], start=1)]

    def _stop(self, workers: Sequence[_Place]) -> None:
        for worker in workers:
            for actor in (worker.actor, *worker.others):
                with contextlib.suppress(Exception):  # the cluster may be gone
                    _ray().kill(actor)
            if worker.group is not None:
                with contextlib.suppress(Exception):
                    _ray().util.remove_placement_group(worker.group)

    def _left(self) -> int:
        return super()._left() + len(self._unseen)

    def _listen(self) -> Iterator[Outcome]:
        calls = {worker.call: worker for worker in self._workers if worker.call is not None}
        for call in _answered(list(calls)):
            yield from self._returned(calls[call])
        yield from self._left_alone()
        yield from self._published()
        self._ask()
        self._rest()
        if not any(worker.ready for worker in self._workers):
            self._look_for_room()
            # Started before the cluster knew what it has lost: these would wait for GPUs that are gone.
            waiting = [worker for worker in self._workers if 1 + len(worker.others) != self._size]
            self._workers = [worker for worker in self._workers if worker not in waiting]
            self._stop(waiting)

    def _returned(self, worker: _Place) -> Iterator[Outcome]:
        ray = _ray()
        call, worker.call = worker.call, None
        try:
            answer = ray.get(call)
        except ray.exceptions.RayError as gone:
            how = _last_line(gone)
            yield from self._lost(worker, how)
            if not worker.ready:
                self._not_begun(how)
            return
        if not worker.ready:
            self._begun(worker, answer)
            return
        if worker.others and (answer["error"] or {}).get("error") == "Lost":
            yield from self._lost(worker, answer["error"]["found"])
            return
        outcome = self._ended(worker, answer)
        if worker.others and outcome.error is not None:  # whoever trained along may still wait for the first
            self._workers.remove(worker)
            self._stop([worker])
        if outcome.error is None and not self._sees(outcome.job):
            self._unseen.append((outcome, time.monotonic() + SEEN_WITHIN))
        else:
            yield outcome

    def _left_alone(self) -> Iterator[Outcome]:
        """Of a worker whose first actor waits for another one that has ended, or cannot come; it would wait for `processes_timeout`."""
        ray = _ray()
        for worker in [worker for worker in self._workers if worker.job is not None and worker.along]:
            try:
                ray.get(ray.wait(list(worker.along), num_returns=len(worker.along), timeout=0)[0])
            except ray.exceptions.RayError as gone:
                if not ray.wait([worker.call], timeout=SAYS_WITHIN)[0]:
                    yield from self._lost(worker, _last_line(gone))

    def _sees(self, job: Job) -> bool:
        """Whether this machine sees what the job has published."""
        return (self._store.artifact if job.kind == TRAIN else self._store.cell)(job.key) is not None

    def _begun(self, worker: _Place, problem: Mapping[str, str] | None) -> None:
        if problem is not None:
            raise as_error(problem, str(worker.log))
        if not self._store.has_workers():
            raise StoreError(
                "file locks of the run directory reach every machine",
                found=f"a Ray worker holds {self._store.root / '.workers'} and the driver does not see it",
                remedy="put --root on a file system with cluster-wide flock (NFS 4, Lustre mounted with -o flock)",
            )
        worker.ready, worker.since, self._failed_starts = True, time.monotonic(), 0
        self._ran = True

    def _not_begun(self, how: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= ATTEMPTS:
            raise TrainingError(
                "a Ray worker starts",
                found=f"{self._failed_starts} ended before their first job, the last with: {how}",
                remedy="see Ray's logs, by default under /tmp/ray/session_latest/logs on its machine",
            )

    def _published(self) -> Iterator[Outcome]:
        """What other machines have done and this one sees by now; all of it is looked for, once in a while."""
        if not self._unseen or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_EVERY
        looked = [(self._sees(outcome.job), outcome, deadline) for outcome, deadline in self._unseen]
        self._unseen = [(outcome, deadline) for sees, outcome, deadline in looked if not sees]
        yield from (outcome for sees, outcome, _ in looked if sees)
        late = next((outcome for outcome, deadline in self._unseen if time.monotonic() > deadline), None)
        if late is not None:
            raise StoreError(
                "what one machine publishes, all see",
                found=f"{late.job.label} ended well, and its directory is not here after {SEEN_WITHIN:.0f} s",
                remedy="mount the run directory everywhere from one server (NFS: -o lookupcache=positive)",
            )
        for kind in (ARTIFACTS, CELLS) if self._unseen else ():
            with contextlib.suppress(OSError):
                os.listdir(self._store.root / kind)  # makes NFS look again

    def _ask(self) -> None:
        """Ask busy workers how far they are, all of them once in a while; nobody waits for the answers."""
        if time.monotonic() < self._ask_at:
            return
        ray, self._ask_at = _ray(), time.monotonic() + PROGRESS_EVERY
        asked = {worker.told: worker for worker in self._workers if worker.told is not None}
        for told in ray.wait(list(asked), num_returns=len(asked), timeout=0)[0] if asked else ():
            worker, asked[told].told = asked[told], None
            with contextlib.suppress(ray.exceptions.RayError):  # its job's call says so too
                last, job = ray.get(told), worker.job
                if job is not None and last not in (None, worker.last) and last["path"] == str(job.path.resolve()):
                    worker.last = last
                    self.display.progress(job, last["record"])
        for worker in self._workers:
            if worker.told is None and worker.job is not None:
                worker.told = worker.actor.last.remote()

    def _rest(self) -> None:
        """End workers that have had nothing to do for a while: others may need their GPUs."""
        if self._waiting():
            return
        idle = [w for w in self._workers if w.ready and w.call is None and time.monotonic() - w.since > IDLE]
        self._workers = [worker for worker in self._workers if worker not in idle]
        self._stop(idle)


def _ray() -> Any:
    """Imported where it is used: it is an optional dependency."""
    import ray

    return ray


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2][:240]


def _together(share: Mapping[str, float], count: int) -> Any:
    """A placement group: all actors of a worker are placed, near each other if possible, or none is."""
    from ray.util.placement_group import placement_group

    return placement_group([{name: amount for name, amount in share.items() if amount}] * count, strategy="PACK")


def _answered(calls: list[Any]) -> list[Any]:
    """All calls that have returned, as soon as one has; none where none does within a moment."""
    ray = _ray()
    if not calls:
        time.sleep(LOOK_EVERY)
        return []
    try:
        done, others = ray.wait(calls, num_returns=1, timeout=LOOK_EVERY)
        return done + (ray.wait(others, num_returns=len(others), timeout=0)[0] if done and others else [])
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


# What runs in a worker


def _worker() -> type:
    """The actor's class. Being made in a function it travels by value, so that a machine without Paretune can say so."""

    class Worker:
        def begin(self, hello, *others):
            try:
                from paretune.runs.executors.ray import Remote
            except ImportError as error:
                return {
                    "error": "ConfigError",
                    "rule": "Paretune is installed on every machine of the cluster",
                    "found": f"{__import__('socket').gethostname()}: {error}",
                    "remedy": f"install version {hello['version']} there, with the packages that the driver has",
                }
            self.remote = Remote()
            return self.remote.begin(hello) or next((problem for problem in others if problem), None)

        def run(self, path, size, *before):
            return self.remote.run(path, size)

        def along(self, path, rank, size, first):
            return self.remote.along(path, rank, size, lambda: __import__("ray").get(first.meets.remote()))

        def meets(self):
            return self.remote.meets

        def last(self):
            return self.remote.last

    return Worker


class Remote:
    """What an actor does on its machine: `begin` once, then `run` one job after the other."""

    def __init__(self) -> None:
        self.tasks = Tasks()
        self.last: dict[str, Any] | None = None  # {"path", "record"}: the latest progress
        self.meets: tuple[str, str, int] | None = None  # the job, and the host and port where those who train along come
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
        keep_reference()

    def run(self, path: str, size: int = 1) -> dict[str, Any]:
        """Do the job, with others where `size` is more than one, and say how it ended, as `attempt` does."""

        said: dict[str, str] = {}  # the driver asks now and then, and may not see every record

        def progress(record: Mapping[str, Any]) -> None:
            said.update(record.get("warnings", {}))
            self.last = {"path": path, "record": {**record, **({"warnings": dict(said)} if said else {})}}

        try:
            with open(path, "r+", encoding="utf-8") as handle:
                _alone(handle, path)
                with self._joined(path, 0, size, None):
                    return attempt(Path(path), tasks=self.tasks, progress=progress)
        except (ParetuneError, OSError) as error:
            return {"error": failure(error, label=Path(path).stem), "full": False}

    def along(self, path: str, rank: int, size: int, meets: Callable[[], tuple[str, str, int] | None]) -> None:
        """Train along with the first actor. What goes wrong once they have met is told to it; what keeps them from it is raised."""
        if not _shared(path):
            return
        while (place := meets()) is None or place[0] != path:
            time.sleep(0.1)
        met = False
        try:
            with self._joined(path, rank, size, place):
                met = True
                train_along(Path(path))
        except Exception as error:
            print(error, flush=True)
            if not met:
                raise

    @contextlib.contextmanager
    def _joined(self, path: str, rank: int, size: int, place: tuple[str, str, int] | None) -> Iterator[None]:
        """Be one of the processes of a training; the first one opens the place where the others come."""
        if size == 1 or not (learner := _shared(path)):
            yield
            return
        from datetime import timedelta

        from ray.util import get_node_ip_address
        from torch.distributed import TCPStore

        from paretune.training.processes import joined

        host, port = (get_node_ip_address(), 0) if place is None else place[1:]
        within = waits(learner)
        store = TCPStore(host, port, size, rank == 0, timedelta(seconds=within["timeout"]), wait_for_workers=False)
        if rank == 0:
            self.meets = (path, host, store.port)
        with joined(rank, size, store, **within):
            yield


def _shared(path: str) -> Any:
    """The learner of a job whose training several processes can share; None of any other."""
    job = read_job(Path(path))
    settings = {**job["spec"].get("learner", {}), **job.get("unkeyed", {})}
    learner: Any = LEARNERS.build(settings) if job["kind"] == TRAIN else None
    alone = getattr(learner, "in_processes", "") != "torch" or getattr(learner, "unlabelled", 0)
    return None if alone else learner


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
    deadline, found = time.monotonic() + SHARED_WITHIN, ""
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
