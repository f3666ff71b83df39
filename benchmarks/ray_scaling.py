"""32 trainings on a Ray cluster of this machine: two workers against one, a thread each.

    python benchmarks/ray_scaling.py [--rounds 3] [--steps 200] [--root FOLDER] [--out benchmarks/results/ray_scaling.json]

The trainings are exact ones on a small exact task, at 32 preferences. A run is timed from the first job handed over to the last one
published, the start of its workers included; the cluster runs before. Runs with one and two workers alternate, and the figure is the
median of the pairs' ratios. Every run must publish the same adapters, byte for byte. Two free cores are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path

from common import emit
from paretune.registry import describe
from paretune.runs.executors.ray import Ray, RayWorkers
from paretune.runs.jobs import train_job
from paretune.runs.store import ARTIFACTS, Store
from paretune.tasks.exact.task import ExactTask
from paretune.training.learners.exact import ExactGradient
from paretune.training.spec import TrainSpec


def run(root: Path, specs: list[TrainSpec], workers: int) -> tuple[float, str]:
    """Seconds, and one hash of all adapters."""
    store = Store(root)
    with store.lock(), RayWorkers(store, Ray(), workers) as pool:
        jobs = [train_job(store, spec) for spec in specs]
        start = time.perf_counter()
        for job in jobs:
            pool.submit(job)
        failed = [outcome.error for outcome in pool.outcomes() if outcome.error is not None]
        seconds = time.perf_counter() - start
    assert not failed, failed[0]
    digest = hashlib.sha256()
    for spec in specs:
        digest.update((root / ARTIFACTS / spec.key / "adapter_model.safetensors").read_bytes())
    return seconds, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainings", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--root", type=Path, help="where run directories are made; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    task, learner = ExactTask(alphabet=5, length=3, prompt_count=4, width=64, layers=1), ExactGradient(steps=given.steps)
    weights = [(k / (given.trainings - 1), 1 - k / (given.trainings - 1)) for k in range(given.trainings)]
    specs = [TrainSpec(task=describe(task), learner=describe(learner), preference=w, seed=0) for w in weights]
    rows, hashes = [], set()
    with tempfile.TemporaryDirectory(dir=given.root) as folder:
        for pair in range(given.rounds):
            seconds = {}
            for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                seconds[workers], digest = run(Path(folder) / f"{pair}-{workers}", specs, workers)
                hashes.add(digest)
            rows.append({"one": round(seconds[1], 2), "two": round(seconds[2], 2), "ratio": round(seconds[1] / seconds[2], 3)})
            print(rows[-1], flush=True)
    ray.shutdown()
    assert len(hashes) == 1, "the same jobs have made different adapters"
    emit(
        {"ray_speedup": statistics.median(row["ratio"] for row in rows)},
        out=given.out,
        rows=rows,
        trainings=given.trainings,
        sha256=hashes.pop(),
        ray=ray.__version__,
        task=describe(task),
        learner=describe(learner),
    )


if __name__ == "__main__":
    main()
