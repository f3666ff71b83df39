"""Jobs of several GPUs on Ray: actors with one each train together. GPUs are Ray's word for them here; there are none."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paretune.registry import describe
from paretune.runs.jobs import train_job
from paretune.runs.pool import InProcess
from paretune.runs.ray import Ray, RayWorkers
from paretune.runs.store import ARTIFACTS, Store
from paretune.tasks.exact.task import ExactTask
from paretune.training.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture
def gpus(monkeypatch):
    """A cluster of two GPUs that are none."""
    folder = Path("/dev/shm") / f"rg{os.getpid()}"
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, num_gpus=2, object_store_memory=100_000_000, **quiet)
    yield
    ray.shutdown()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


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


def test_a_training_of_two_gpus_is_two_actors_and_one_that_is_killed_costs_nothing(gpus, tmp_path):
    task = ExactTask(alphabet=4, length=3, prompt_count=4, width=32, layers=2)
    settings = {"group": 2, "rank": 4, "micro_batch": 4, "device": "cpu", "checkpoint_every": 2, "log_every": 2}
    settings |= {"optimizer": "adam", "lr": 3e-3}  # Muon makes more of rounding, which hangs on a batch's rows under some instruction sets
    learner = PolicyGradient(samples=600, batch=12, **settings)
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=None, seed=3)
    alone = trained(InProcess(), Store(tmp_path / "alone"), spec)
    killed = []

    class Killing(RayWorkers):
        def _dispatch(self):
            super()._dispatch()
            if not killed and list((tmp_path / "ray" / ARTIFACTS).glob(".wip-*/checkpoint/*")):
                killed.extend(called(b"ray::Worker.along"))
                os.kill(killed[0], signal.SIGKILL)

    together = trained(Killing(Store(tmp_path / "ray"), Ray(cpus_per_job=2, gpus_per_job=2), 1), Store(tmp_path / "ray"), spec)
    assert killed
    assert sorted(p.name for p in (tmp_path / "ray" / "logs").glob("ray-*.log")) == ["ray-1-1.log", "ray-1.log", "ray-2-1.log", "ray-2.log"]
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-5)
