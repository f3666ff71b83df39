"""The loop of a training: steps, lines of the log and checkpoints, until the learner says that it is finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretune.errors import TrainingError, first_line
from paretune.tasks.base import Task
from paretune.training.cost import Cost, read_cost
from paretune.training.loop.checkpoint import Progress, TrainLog, is_finished, load_checkpoint, packed, save_checkpoint, unpacked
from paretune.training.loop.loggers import reporting
from paretune.training.processes import ranks
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State

__all__ = ["CHECKPOINT_SECONDS", "Run", "memory_explained", "not_finite", "run_loop"]

CHECKPOINT_SECONDS = 300.0  # long steps: a checkpoint at least this often, whatever `checkpoint_every`


@dataclass
class Run:
    """What a checkpoint must know beside tensors."""

    key: str
    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    evaluations: int = 0
    validation_samples: int = 0
    log: dict[str, Any] = field(default_factory=dict)  # how much was written; see `TrainLog.mark`
    window: list[dict[str, Any]] = field(default_factory=list)  # what steps returned since the last line of the log
    validations: list[float] = field(default_factory=list)
    converged: bool = False  # by a `StoppingRule`
    looks: list[dict[str, Any]] = field(default_factory=list)  # at validation prompts; see `training.loop.validation`
    first_guards: list[list[float | None]] = field(default_factory=list)  # of the responses of the first look
    best: int | None = None  # the place of the best look
    kept: list[Tensor] | None = None  # the weights that it looked at
    weighting: State | None = None
    unscored: list[list[int]] = field(default_factory=list)  # see `watch_unscored`
    lr_share: float = 1.0  # of the schedule's learning rate, as `step_kl` allows it
    kl: float = 0.0  # from the reference, nats per response, over the last batches
    rounding: float = 0.0  # the same of nothing but rounding, between sampling and scoring
    step_kl: float | None = None  # of the last update that was looked at, before it was shortened
    lr_cap: float = 1.0  # of the learning rate, halved where KL rises and the reward does not
    lr_cut: int | None = None  # the step of the last halving
    responses: list[dict[str, Any]] = field(default_factory=list)  # to fixed prompts, since the last line; see `validation.respond`


def run_loop(learner: Any, spec: TrainSpec, task: Task, work: Path, parents: Any = None, progress: Progress | None = None) -> Cost:
    """A training with log and checkpoints; the learner says what a step is.

    Its methods: `advance(policy, optimizer, task, spec, run)` takes a step, charges it to the run and returns what the log needs of it;
    `record(task, spec, run, window, records)` makes a line of the log from what steps returned since the last of `records`;
    `finished(run)`; `new_optimizer(weights)`; `trained_on(policy, spec, task, work)`, the task that it sees. Where it leaves weights in
    `run.kept`, these are the result.
    """
    here = ranks()
    if here.shared(here.first and is_finished(work)):  # by a process that was killed before it could publish
        return read_cost(work) if here.first else Cost()
    learner.accept(spec)
    with here.gathering() if getattr(learner, "shard", False) else here.in_turn():  # what is sharded is loaded by all at once
        policy = learner.start(spec, task, parents or {})
    began = time.monotonic()  # a worker may have loaded the model for an earlier training: loading is charged to none
    weights = policy.parameters()
    optimizer = learner.new_optimizer(weights)
    task, spent = learner.trained_on(policy, spec, task, work)
    run = _resumed(work, spec.key, weights, optimizer, spent)
    saved = time.monotonic()
    with contextlib.ExitStack() as opened:
        if here.first:
            told = opened.enter_context(reporting(learner, spec, work, progress))
            log = opened.enter_context(TrainLog(work, mark=run.log, began=began - run.seconds, tokens=run.tokens, progress=told))
        while not learner.finished(run):
            run.window.append(learner.advance(policy, optimizer, task, spec, run))
            last = learner.finished(run)
            if not here.first:
                _follow(run)
                continue
            if last or run.step % learner.log_every == 0:
                log.write(learner.record(task, spec, run, run.window, log.records), steps=learner.steps)
                run.window = []
            if last or run.step % learner.checkpoint_every == 0 or time.monotonic() - saved > CHECKPOINT_SECONDS:
                run.seconds, run.log, saved = log.seconds, log.mark(), time.monotonic()
                state = {**vars(run), "window": packed(run.window)}
                save_checkpoint(work, run.step, weights, optimizer, state, kept=state.pop("kept"))
            _follow(run)
    if run.kept is not None:
        with torch.no_grad():
            for weight, kept in zip(weights, run.kept, strict=True):
                weight.copy_(kept)
    counted = {name: getattr(run, name) for name in ("samples", "tokens", "flops", "seconds", "evaluations", "validation_samples")}
    cost = Cost(steps=run.updates, **counted)
    return learner.finish(spec, policy, work, cost) if here.first else cost


def _resumed(work: Path, key: str, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer, spent: Mapping[str, int]) -> Run:
    """The run and the tensors of the newest checkpoint, or of the start; process 0 looks first, because it removes what is damaged.

    `spent` is what was paid before the first step.
    """
    here = ranks()
    state = load_checkpoint(work, key, weights, optimizer) if here.first else None
    step = here.shared(None if state is None else state["step"])
    if not here.first and step is not None:
        state = load_checkpoint(work, key, weights, optimizer, removes=False)
    here.agree("checkpoint", {"step": None if state is None else state["step"]})
    here.share(weights)
    run = Run(**(state or {"key": key, **spent}))
    run.window = unpacked(run.window)
    return run


def _follow(run: Run) -> None:
    """After a step: all that process 0 remembers holds in every process, so that none can decide otherwise."""
    if (here := ranks()).size > 1:
        own = ("kept", "window", "log", "seconds", "responses")  # equal weights, and what only the one that writes needs
        vars(run).update(here.shared({name: value for name, value in vars(run).items() if name not in own} if here.first else {}))
        run.window, run.responses = (run.window, run.responses) if here.first else ([], [])


def not_finite(found: str, step: int, lr: float) -> TrainingError:
    """The error of a training whose numbers are none."""
    return TrainingError(
        "loss and gradient of a training are finite",
        found=f"{found}, at step {step}",
        remedy=f"lower lr (now {lr:g}), or train in float32; the last checkpoint is kept",
    )


@contextlib.contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Running out of memory, on a GPU or a CPU, as a TrainingError with the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "not enough memory" not in str(error):
            raise
        raise TrainingError("a training step fits into memory", found=first_line(error), remedy=remedy) from error
