"""Jobs of several GPUs on Ray: actors with one each train together. GPUs are Ray's word for them here; there are none."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paretune.registry import describe
from paretune.runs.executors.pool import InProcess
from paretune.runs.executors.ray import Ray, RayWorkers, _shared
from paretune.runs.jobs import train_job
from paretune.runs.store import ARTIFACTS, Store
from paretune.tasks.exact.task import ExactTask
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec

ray = pytest.importorskip("ray")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def machines(monkeypatch):
    """Where clusters of GPUs that are none may be started; they end with the test."""
    folder = Path("/dev/shm") / f"rg{os.getpid()}"
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    with contextlib.ExitStack() as opened:
        yield opened
        ray.shutdown()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


MACHINE = {"include_dashboard": False, "object_store_memory": 100_000_000}
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}

SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}  # a machine is given up


def trained(pool, store, spec):
    with store.lock(), pool:
        pool.submit(train_job(store, spec))
        assert [outcome.error for outcome in pool.outcomes()] == [None]
    files = sorted((store.root / ARTIFACTS / spec.key).rglob("*.safetensors"))
    return {f"{file.parent.name} {name}": value for file in files for name, value in load_file(file).items()}


def called(title):
    """Ids of processes by what Ray calls them: the actor, and what it does now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [int(path.parent.name)] if path.read_bytes().startswith(title) else []
    return found


SPEC = TrainSpec(
    task=describe(ExactTask(alphabet=4, length=3, prompt_count=4, width=32, layers=2)),
    learner=describe(
        PolicyGradient(
            samples=600,
            batch=12,
            group=2,
            rank=4,
            micro_batch=4,
            device="cpu",
            checkpoint_every=2,
            log_every=2,
            optimizer="adam",  # Muon makes more of rounding, which hangs on a batch's rows under some instruction sets
            lr=3e-3,
        )
    ),
    preference=None,
    seed=3,
)


class Losing(RayWorkers):
    """Once the training has a checkpoint of step 8 or later, `lose` is called; `logged` is what the log has up to that checkpoint."""

    def __init__(self, root, lose):
        super().__init__(Store(root), Ray(cpus_per_job=1, gpus_per_job=2), 1)
        self._lose, self.logged = lose, None

    def _dispatch(self):
        super()._dispatch()
        work = self._store.root / ARTIFACTS / f".wip-{SPEC.key}"
        step = max((int(path.name) for path in work.glob("checkpoint/[0-9]*")), default=0)
        if self.logged is None and step >= 8:
            self.logged = (work / "train.jsonl").read_bytes().splitlines()[: step // 2]
            self._lose()


def test_a_training_of_two_gpus_is_two_actors_and_one_that_is_killed_costs_nothing(machines, tmp_path):
    ray.init(address="local", num_cpus=2, num_gpus=2, **MACHINE, **QUIET)
    alone = trained(InProcess(), Store(tmp_path / "alone"), SPEC)
    pool = Losing(tmp_path / "ray", lambda: os.kill(called(b"ray::Worker.along")[0], signal.SIGKILL))
    _as_alone(trained(pool, Store(tmp_path / "ray"), SPEC), alone, pool)
    assert sorted(p.name for p in (tmp_path / "ray" / "logs").glob("ray-*.log")) == ["ray-1-1.log", "ray-1.log", "ray-2-1.log", "ray-2.log"]


def test_a_training_that_loses_a_machine_goes_on_with_the_gpu_that_is_left(machines, tmp_path):
    alone = trained(InProcess(), Store(tmp_path / "alone"), SPEC)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, **MACHINE, "_system_config": SOON})
    machines.callback(cluster.shutdown)
    second = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=MACHINE["object_store_memory"])
    ray.init(address=cluster.address, **QUIET)
    pool = Losing(tmp_path / "ray", lambda: cluster.remove_node(second, allow_graceful=False))
    _as_alone(trained(pool, Store(tmp_path / "ray"), SPEC), alone, pool)
    logs = {path.name for path in (tmp_path / "ray" / "logs").glob("ray-*.log")}
    assert "ray-1-1.log" in logs, "two actors began"
    assert f"ray-{pool._started}-1.log" not in logs, "one ended"


class Lonely(RayWorkers):
    """The actor that trains along with the first is killed as soon as it is asked to; `waited` is how long the driver took to see it."""

    def __init__(self, root):
        super().__init__(Store(root), Ray(cpus_per_job=1, gpus_per_job=2), 1)
        self._killed, self.waited = None, None

    def _give(self, worker, job):
        super()._give(worker, job)
        if self._killed is None:
            self._killed = time.monotonic()
            ray.kill(worker.others[0])

    def _lost(self, worker, how):
        self.waited = time.monotonic() - self._killed
        yield from super()._lost(worker, how)


def test_an_actor_that_ends_before_it_meets_the_first_is_not_waited_for(machines, tmp_path):
    """The first would wait for half an hour, and the driver for it."""
    ray.init(address="local", num_cpus=2, num_gpus=2, **MACHINE, **QUIET)
    pool = Lonely(tmp_path)
    trained(pool, Store(tmp_path), SPEC)
    assert pool.waited < 60


def test_a_training_on_unlabelled_prompts_is_one_process(tmp_path):
    """As learner.processes says of it; on Ray the number of GPUs says how many there are, and nobody else asks."""
    for more, alone in (({}, False), ({"unlabelled": 8, "scored": 12}, True)):
        spec = dataclasses.replace(SPEC, learner={**SPEC.learner, **more})
        assert (_shared(str(train_job(Store(tmp_path), spec).path)) is None) == alone


def _as_alone(together, alone, pool):
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-5)
    lines = (pool._store.artifact(SPEC.key).path / "train.jsonl").read_bytes().splitlines()
    assert pool.logged
    assert lines[: len(pool.logged)] == pool.logged, "with the times of then: what a checkpoint has is not computed again"
