"""1,000 fake trainings on 50 simulated machines: what the driver of a Ray run does meanwhile, and which share of the time it takes.

    python benchmarks/ray_scale.py [--machines 50] [--jobs 1000] [--seconds 4] [--out benchmarks/results/ray_scale.json]

The machines are Ray actors of this one, processes of their own that ask for no CPU; a job sleeps `--seconds` (half to one and a half of
it), and publishes a directory as a training does. All else is the library's: the jobs' files, the queue, the actors' calls and questions,
the schedule, the directories' hashes. The file system is made slow: every directory operation of a machine takes 5 to 50 ms longer, the
driver's look for a result 2 ms, and what a machine has published is seen by the driver up to 3 s later, as NFS does it. All of it is drawn
by name, so that two runs are delayed alike.

driver_cpu   CPU seconds of the driver per second of the run, from the first job handed over to the last one seen
driver_busy  the share of that time in which it did not wait for Ray: nobody's answer is heard then
driver_per_job_ms   its CPU time per job, in milliseconds
The start of the actors is part of the run. On a machine that others use, the run takes longer; driver_per_job_ms stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import emit
from paretune.registry import TASKS, describe
from paretune.runs.display import Display
from paretune.runs.executors import ray as ray_cluster
from paretune.runs.executors.ray import Ray, RayWorkers
from paretune.runs.plan import Member, Schedule
from paretune.runs.store import Store
from paretune.seeds import generator
from paretune.training.spec import Artifact, TrainSpec

OPERATION, LOOK, SEEN = (0.005, 0.05), 0.002, (0.0, 3.0)  # seconds
OPERATIONS = 6  # of one training on its directory: made, spec, weights, hashes, renamed, forced


@TASKS.register("simulated")
@dataclass(frozen=True)
class Simulated:
    """A task of no content."""

    seed: int = 0
    is_exact = False


@dataclass(frozen=True)
class Nothing:
    """A learner that the actors only pretend to run."""


@dataclass(frozen=True)
class Points:
    """A method of `count` trainings in one wave."""

    count: int

    def plan(self, task: Any, learner: Any, done: Any, seed: int) -> list[TrainSpec]:
        weights = [(k / self.count, 1 - k / self.count) for k in range(self.count)]
        return [TrainSpec(task=describe(task), learner={"name": "simulated"}, preference=w, seed=seed) for w in weights]


class Slow(Store):
    """A run directory that its driver sees late."""

    def artifact(self, key: str) -> Artifact | None:
        time.sleep(LOOK)
        done = self.root / "artifacts" / key / "DONE"
        late = generator(0, "seen", key).uniform(*SEEN)
        if not done.exists() or time.time() - done.stat().st_mtime < late:
            return None
        return super().artifact(key)


def machine() -> type:
    """The actor's class; it travels by value."""

    class Machine:
        def begin(self, hello):
            import contextlib

            from paretune.runs.store import Store

            self.last_record, self.held = None, contextlib.ExitStack()
            self.store = Store(hello["root"])
            self.held.enter_context(self.store.worker_lock())

        def run(self, path, seconds, operations):
            import time
            from pathlib import Path

            from paretune.files import read_json, write_json

            job = read_json(Path(path), rule="", remedy="")
            key = path.rpartition("train-")[2].removesuffix(".json")
            for step in range(4):
                time.sleep(seconds / 4)
                self.last_record = {"path": path, "record": {"step": step + 1, "steps": 4, "rewards": {"a": 0.5}, "kl": 0.1}}
            folder = self.store.begin(key)
            write_json(folder / "spec.json", job["spec"])
            (folder / "adapter_model.safetensors").write_bytes(key.encode() * 10_000)
            (folder / "adapter_config.json").write_text("{}")
            time.sleep(sum(operations))
            self.store.publish(folder)
            return {"error": None, "full": False}

        def last(self):
            return self.last_record

    return Machine


class Simulation(RayWorkers):
    """The library's driver, with these actors."""

    seconds = 1.0

    def _start(self, log: Path) -> Any:
        env = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
        actor = ray_cluster._ray().remote(machine()).options(num_cpus=0, max_concurrency=2, runtime_env={"env_vars": env}).remote()
        return ray_cluster._Place(log=log, ready=False, actor=actor, call=actor.begin.remote(self._hello))

    def _look_for_room(self) -> None:
        self._limit = self._asked_limit

    def _give(self, worker: Any, job: Any) -> None:
        rng = generator(0, "job", job.key)
        seconds = self.seconds * rng.uniform(0.5, 1.5)
        worker.call = worker.actor.run.remote(str(job.path.resolve()), seconds, rng.uniform(*OPERATION, OPERATIONS).tolist())


class Waits:
    """Seconds that the driver waited for Ray."""

    def __init__(self) -> None:
        self.seconds, self._answered = 0.0, ray_cluster._answered

    def __call__(self, calls: list[Any]) -> list[Any]:
        began = time.perf_counter()
        try:
            return self._answered(calls)
        finally:
            self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machines", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2, object_store_memory=100_000_000, **quiet)
    each = 20
    members = [
        Member(key=f"{i}", label=f"{i}", task=Simulated(), method=Points(each), learner=Nothing(), seed=i)
        for i in range(-(-given.jobs // each))
    ]
    failed: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Slow(folder)
        pool = Simulation(store, Ray(), given.machines, display=Display(cells=0))
        pool.seconds = given.seconds
        ray_cluster._answered = waits = Waits()
        schedule = Schedule(
            store,
            pool,
            pool.display,
            on_ready=lambda member: None,
            on_failed=lambda member, error, cause: failed.append(error),
            on_done=lambda member: None,
        )
        with store.lock(), pool:
            began, cpu = time.perf_counter(), time.process_time()
            schedule.run(members)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        problems = Store(folder).check()
    ray.shutdown()
    assert not failed, failed[0]
    assert not problems, problems[0]
    assert len(schedule.trained) == each * len(members), len(schedule.trained)
    jobs = len(schedule.trained)
    emit(
        {"driver_cpu": cpu / seconds, "driver_busy": 1 - waits.seconds / seconds, "driver_per_job_ms": 1000 * cpu / jobs},
        out=given.out,
        seconds=round(seconds, 1),
        jobs=jobs,
        machines=given.machines,
        job_seconds=given.seconds,
        at_best_seconds=round(jobs * given.seconds / given.machines, 1),
        delays={"operation": OPERATION, "look": LOOK, "seen": SEEN},
        ray=ray.__version__,
        settings=dataclasses.asdict(Ray()),
    )


if __name__ == "__main__":
    main()
