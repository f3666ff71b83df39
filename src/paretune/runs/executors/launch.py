"""One training of a run directory in several processes: what `torchrun` and `accelerate launch` start.

    torchrun --nproc-per-node 2 -m paretune.launch ROOT/logs/jobs/train-<key>.json
    accelerate launch --num_processes 4 -m paretune.launch ROOT/logs/jobs/train-<key>.json

The file is that of `jobs.train_job`. Every process trains; the first one holds the run directory's lock, writes, and publishes. What is
published already is left alone, and a training that was killed goes on from its newest checkpoint. `learner.processes` of a recipe starts
the same without a launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from paretune.errors import ConfigError, ParetuneError, StoreError, TrainingError
from paretune.registry import LEARNERS
from paretune.runs.executors.local import die_with
from paretune.runs.jobs import Tasks, failure, label_in, read_job, run_job, train_along, waits
from paretune.runs.store import ARTIFACTS, Store
from paretune.training.loop.checkpoint import is_finished
from paretune.training.processes import ENDS_WITHIN, RESUMES, TOGETHER, WITH, joined, last_word, launched, without_defaults
from paretune.training.spec import TrainSpec

__all__ = ["launch", "main"]

ENGINES = ("deepspeed", "fsdp", "megatron_lm")  # what accelerate shards a model with; it tells transformers by the environment


def launch(path: Path) -> None:
    """Do this process's part of the job in the file `path`."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    job, spec = _read(path)
    kind: Any = LEARNERS[spec.learner["name"]]
    shares = kind.in_processes
    if shares == "accelerate":
        _with_accelerate(path, spec)
        return
    if count > 1 and shares != "torch":
        raise ConfigError(
            "several processes share one training with a learner that samples: pg, distill, modpo, or trl",
            found=f"learner {spec.learner['name']} in {count} processes",
            remedy="start one process, or run many trainings side by side with `paretune bench --workers`",
        )
    if engine := next((name for name in ENGINES if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true")), None):
        raise ConfigError(
            "a base is sharded by learner.shard: the embedded learners' adapters stay whole",
            found=f"learner {spec.learner['name']} under accelerate's settings for {engine}",
            remedy='launch it without them, with learner.shard=true, or use learner "trl", which takes them',
        )
    if count == 1:
        _publish(path, spec)
        return
    if WITH in os.environ:  # the process that started this one
        die_with(int(os.environ[WITH]))
    store, rank, size = launched()
    learner = LEARNERS.build({**spec.learner, **job.get("unkeyed", {}), "processes": size})
    signal.signal(signal.SIGTERM, signal.SIG_DFL if rank else _stopped)
    try:
        with joined(rank, size, store, **waits(learner)):
            train_along(path) if rank else _publish(path, spec)
    except Exception:
        if rank:
            last_word(store)
        raise


def _publish(path: Path, spec: TrainSpec) -> None:
    """Do the job as the only one that writes."""
    store = Store(path.resolve().parents[2])
    with store.lock():
        try:
            run_job(path)
        except Exception as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is said to its end
            store.fail(ARTIFACTS, spec.key, failure(error, label=label_in(path)))
            raise


def _stopped(*_: Any) -> NoReturn:
    """A launcher ends all processes when one has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TrainingError(TOGETHER, found="SIGTERM, by which a launcher stops the others when one has ended", remedy=RESUMES)


def _with_accelerate(path: Path, spec: TrainSpec) -> None:
    """A training whose loop is TRL's: accelerate knows the processes."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    without_defaults()
    store = Store(path.resolve().parents[2])
    on_cpu = spec.learner.get("device") == "cpu" or not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    backend = {"backend": "gloo"} if on_cpu and several else {}
    place = PartialState(cpu=on_cpu, **backend)
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


def _read(path: Path) -> tuple[dict[str, Any], TrainSpec]:
    try:
        job = read_job(path)
        return job, TrainSpec.from_json(job["spec"])
    except (OSError, ValueError, KeyError, TypeError, StoreError) as error:
        raise ConfigError(
            "a job is a file ROOT/logs/jobs/train-<key>.json",
            found=f"{path}: {getattr(error, 'found', error)}",
            remedy="`paretune fit` and `bench` leave one there for each training; or write it with paretune.runs.jobs.train_job",
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where the training failed, 2 where the request is wrong. Process 0 says what is wrong, for all.

    Another one says it where process 0 has not: that the job's file is on the first machine only, nobody else knows.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if len(given) != 1:
            raise ConfigError("launch takes one job file", found=" ".join(given) or "nothing", remedy="see docs/scale.md and docs/trl.md")
        launch(Path(given[0]))
    except ParetuneError as error:
        if os.environ.get("RANK", "0") != "0" and WITH not in os.environ:
            time.sleep(ENDS_WITHIN)  # or less: process 0 speaks and ends, and a launcher that sees it stops the others
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
