"""One training of a run directory in several processes: what `accelerate launch` and `torchrun` start.

    accelerate launch --num_processes 4 -m paretune.runs.launch ROOT/logs/jobs/train-<key>.json

The file is that of `jobs.train_job`. Every process trains; the first one holds the run directory's lock, writes, and publishes. What is
published already is left alone, and a training that was killed goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from paretune.errors import ConfigError, ParetuneError, StoreError
from paretune.registry import LEARNERS
from paretune.runs.jobs import Tasks, failure, read_job, run_job
from paretune.runs.store import ARTIFACTS, Store
from paretune.training.checkpoint import is_finished
from paretune.training.spec import TrainSpec

__all__ = ["launch", "main"]


def launch(path: Path) -> None:
    """Do this process's part of the job in the file `path`."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    store, spec = Store(path.resolve().parents[2]), _spec(path)
    on_cpu = spec.learner.get("device") == "cpu" or not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    backend = {"backend": "gloo"} if on_cpu and several else {}
    place = PartialState(cpu=on_cpu, **backend)
    if place.num_processes > 1 and spec.learner["name"] != "trl":
        raise ConfigError(
            "several processes share one training with the learner trl",
            found=f"learner {spec.learner['name']} in {place.num_processes} processes",
            remedy='use learner "trl", or run many trainings side by side with `paretune bench --workers`',
        )
    with store.lock() if place.is_main_process else contextlib.nullcontext():
        shared = [False]
        if place.is_main_process:
            store.recover(spec.key)
            shared = [store.artifact(spec.key) is None and not is_finished(store.begin(spec.key))]
        broadcast_object_list(shared)
        if place.is_main_process:  # alone where nothing is left to train: it publishes what is not published yet
            try:
                run_job(path)
            except Exception as error:
                store.fail(ARTIFACTS, spec.key, failure(error))
                raise
        elif shared[0]:
            LEARNERS.build(spec.learner).train(spec, Tasks().get(spec.task), store.begin(spec.key))
    place.wait_for_everyone()
    place.destroy_process_group()


def _spec(path: Path) -> TrainSpec:
    try:
        return TrainSpec.from_json(read_job(path)["spec"])
    except (OSError, ValueError, KeyError, TypeError, StoreError) as error:
        raise ConfigError(
            "a job is a file ROOT/logs/jobs/train-<key>.json",
            found=f"{path}: {getattr(error, 'found', error)}",
            remedy="write it with paretune.runs.jobs.train_job",
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where the training failed, 2 where the request is wrong."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if len(given) != 1:
            raise ConfigError("launch takes one job file", found=" ".join(given) or "nothing", remedy="see docs/trl.md")
        launch(Path(given[0]))
    except ParetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
