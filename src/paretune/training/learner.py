"""Base classes of learners: `Learner` for all, `SampledLearner` with the settings of those that learn from sampled responses.

The loops are elsewhere: `embedded` (one process, no other library), `exact` (enumeration), `trl` (TRL's trainers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, TrainingError
from paretune.files import disk_errors
from paretune.objectives.base import refuse_unscored
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import SCALE, LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.self_test import check_model
from paretune.registry import GATE_RULES, GIVEN, UNKEYED
from paretune.tasks.base import Task, first_device, reference
from paretune.training.checkpoint import (
    Progress,
    TrainLog,
    is_finished,
    load_checkpoint,
    mark_finished,
    packed,
    save_checkpoint,
    unpacked,
)
from paretune.training.combine import Combine
from paretune.training.cost import PHASES, Cost, read_cost
from paretune.training.loggers import Loggers, reporting
from paretune.training.processes import ranks
from paretune.training.spec import Artifact, TrainSpec
from paretune.training.watch import named_means
from paretune.training.weightings.base import State
from paretune.types import Amount, Count, Device, Fraction, Name, Natural, Objectives, Positive

__all__ = [
    "Learner",
    "Run",
    "SampledLearner",
    "StoppingRule",
    "annealed",
    "check_cast",
    "converged",
    "gates_of",
    "log_record",
    "memory_explained",
    "not_finite",
    "run_loop",
    "watch_unscored",
]

WATCHED = 256  # completions over which `max_unscored` is judged, at least
CHECKPOINT_SECONDS = 300.0  # long steps: a checkpoint at least this often, whatever `checkpoint_every`


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """Base of all learners: the shape of the adapters, where they are computed, and `train`."""

    registered_name: ClassVar[str]
    version: ClassVar[int]
    in_processes: ClassVar[str] = ""  # what several processes share one of its trainings by: "torch", "accelerate"; "": they cannot

    rank: Count = 16  # of the LoRA adapters
    alpha: Count | None = None  # the scale of an adapter is alpha / rank; None: 2 at every rank
    targets: Name | tuple[Name, ...] = "all-linear"  # which layers get adapters; or names, as PEFT takes them
    device: Device = "auto"  # "auto" is the first GPU where there is one; only a CPU resumes bitwise
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: as the task loads it; adapters are float32 in any case
    faces: Fraction = field(default=0.0, metadata=GIVEN)  # the share of sampled preferences in which some objectives have no weight
    report_to: Loggers = field(default="none", metadata=UNKEYED)  # where the log goes, too: tensorboard, trackio, wandb

    def resolved(self) -> dict[str, Any]:
        """What `describe` says instead of a field that follows from others: a key names the alpha that is trained with."""
        return {"alpha": SCALE * self.rank if self.alpha is None else self.alpha}

    def scaled(self, effort: float) -> Self:
        """The same learner with `effort` times the budget: samples, or steps where nothing is sampled."""
        if effort != 1:
            raise ConfigError(
                "a method with an effort scales the budget of its learner",
                found=f"learner {self.registered_name}, which does not say how",
                remedy="give it a `scaled` method, or leave effort at 1",
            )
        return self

    def accept(self, spec: TrainSpec) -> None:  # noqa: B027
        """ConfigError where it cannot train `spec`; asked when a method plans, before its first training has begun."""

    @abstractmethod
    def train(
        self, spec: TrainSpec, task: Task, work: Path, *, parents: Mapping[str, Artifact] | None = None, progress: Progress | None = None
    ) -> Cost:
        """Train what `spec` says into the directory `work`, resuming where it holds a checkpoint; returns what it cost.

        Writes adapter_config.json and adapter_model.safetensors (plain PEFT), or such a folder adapter-<i> for each of several trained
        adapters; train.jsonl; ledger.json. `parents` are the artifacts of `spec.parents` by key. Raises TrainingError or RewardError
        when it cannot go on, with the last checkpoint kept.
        """

    def start(self, spec: TrainSpec, task: Task, parents: Mapping[str, Artifact]) -> ParameterMix:
        """The policy at step 0 on the task's model: frozen adapters, those that are trained on, and fresh ones; see `TrainSpec`."""
        device = first_device() if self.device == "auto" else self.device
        model, tokenizer = self.reference(task, device)
        paths: dict[str, Path] = {}
        for keys, kind in ((spec.frozen_adapters, "frozen"), (spec.init_from, "policy")):
            found = [path for key in keys for path in parents[key].adapters]
            paths |= {_adapter_name(kind, i, len(found)): path for i, path in enumerate(found)}
        trained = [name for name in paths if name.startswith("policy")]
        wanted = 1 if spec.preference is not None else task.objectives.count
        fresh = (self.rank,) * max(0, wanted - len(trained)) if spec.fresh is None else spec.fresh
        bank = LoraBank.load(model, paths, trainable=trained)
        for i, rank in enumerate(fresh):
            name = _adapter_name("fresh" if trained else "policy", i, len(fresh))
            alpha = None if self.alpha is None else max(1, round(self.alpha * rank / self.rank))  # the learner's scale at every rank
            bank.add(name, seed=spec.seed, rank=rank, alpha=alpha, targets=self.targets)
        rule = None if spec.rule is None else GATE_RULES.build(spec.rule)
        policy = build_mixing("parameter" if rule is None else rule.mixing, bank, tokenizer)
        assert isinstance(policy, ParameterMix), "a training runs at the parameter level, with a router or without"
        if not policy.parameters():
            raise ConfigError(
                "a training trains an adapter",
                found="none: no fresh ones and no init_from",
                remedy="ask for fresh ones, or start from some",
            )
        gates_of(spec, np.eye(task.objectives.count)[:1], policy.K)  # a rule for other adapters fails here
        check_model(policy)
        return policy

    def reference(self, task: Task, device: str) -> tuple[Any, Any]:
        """The task's model on the device, without adapters, and its tokenizer."""
        return reference(task, device=device, dtype=self.dtype, place=lambda model: placed(model, device, self.dtype))

    def finish(self, spec: TrainSpec, policy: ParameterMix, work: Path, cost: Cost) -> Cost:
        """Write the adapters and the cost, then drop the checkpoint; in this order, a kill in between loses nothing."""
        policy.commit()
        trained = policy.bank.trainable
        with disk_errors(work):
            for i, name in enumerate(trained):
                policy.bank.save(name, work if len(trained) == 1 else work / f"adapter-{i}")
            policy.save_extra(work)
        size = sum(p.numel() * p.element_size() for p in policy.parameters())
        base = sum(p.numel() * p.element_size() for p in policy.model.parameters())
        # Memory: weights, gradients and the optimizer's two moments; activations are not counted.
        cost = dataclasses.replace(cost, memory_bytes=base + 3 * size, storage_bytes=size)
        mark_finished(work, cost)
        return cost


def check_cast(model: Any, dtype: str | None) -> None:
    """ConfigError where a learner's dtype cannot be that of the model."""
    if dtype is not None and getattr(model, "is_quantized", False):
        raise ConfigError(
            "a quantized base keeps the dtypes that it was loaded with",
            found=f"learner.dtype={dtype}",
            remedy="leave it out, and set dtype beside quantize in the recipe",
        )


def placed(model: Any, device: str, dtype: str | None) -> Any:
    """The model on the device and in the dtype of a learner."""
    check_cast(model, dtype)
    try:
        return model.to(device) if dtype is None else model.to(device, getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            "a training runs on a device that is here",
            found=f"device {device!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            remedy='device "auto" takes the first GPU, or the CPU',
        ) from error


@dataclass(frozen=True, kw_only=True)
class SampledLearner(Learner):
    """Settings of a loop on sampled responses: how many, with which optimizer and schedule, and in what pieces."""

    lacks: ClassVar[Mapping[str, tuple[str, str]]] = {  # fields of other learners: name -> the rule, the way out
        "steps": ("a learner that samples counts responses; its steps are samples // batch", "give samples, such as learner.samples=6400")
    }
    keeps: ClassVar[Mapping[str, Any]] = {}  # fields that `like` does not take over

    samples: int = 40_000  # responses drawn in all; steps are samples // batch
    batch: int = 64  # responses per step
    group: int = 8  # responses to each prompt of a batch, which are compared with each other
    optimizer: Literal["muon", "adam"] = "muon"  # Muon needed half the steps on exact tasks
    lr: float = 5e-3  # for "adam", 3e-3 does about as well as it can on exact-v1
    momentum: Fraction = 0.9  # of "muon"
    betas: tuple[float, float] = (0.9, 0.95)  # of "adam"
    clip_norm: Positive | None = 1.0  # of the gradient; None: it is not clipped
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate, down to 0
    warmup: Natural = 0  # steps of linear warm-up
    epochs: int = 1  # updates on each batch
    micro_batch: Count | None = None  # rows per forward and backward; None is the whole batch at once
    checkpointing: bool = False  # of activations: decoder layers keep their input only and run again in the backward
    temperature: float = 1.0  # the policy that is trained is the tempered one
    max_unscored: float = 0.10  # the share of responses without a score that stops a training
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps

    def __post_init__(self):
        for rule, kept in self.rules().items():
            if not kept:
                words = rule.replace(",", " ").replace(":", " ").split()
                shown = [f.name for f in dataclasses.fields(self) if f.name in words]
                found = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
                raise ConfigError(
                    rule, found=found, remedy=f"change one of them; `paretune show {self.registered_name}` prints the defaults"
                )

    def rules(self) -> dict[str, bool]:
        """What the fields must keep, in words that name them, and whether they do."""
        return {
            "group is at least 2: a response is compared with the others to its prompt": self.group >= 2,
            "batch is a multiple of group": self.group > 0 and self.batch % self.group == 0 and self.batch > 0,
            "samples are at least one batch": self.samples >= self.batch,
            "epochs, log_every and checkpoint_every are at least 1": min(self.epochs, self.log_every, self.checkpoint_every) >= 1,
            "lr, alpha and temperature are positive": min(self.lr, self.resolved()["alpha"], self.temperature) > 0,
            "micro_batch is at least 1": (self.micro_batch or 1) >= 1,
            "max_unscored lies between 0 and 1": 0 <= self.max_unscored <= 1,
        }

    @classmethod
    def like(cls, learner: Any, **fields: Any) -> Self:
        """With the shape, budget and optimizer of another learner; an exact one counts as a batch of samples per step."""
        same = {f.name: getattr(learner, f.name) for f in dataclasses.fields(cls) if hasattr(learner, f.name)}
        if not isinstance(learner, SampledLearner):
            default = cls()
            same |= {"samples": default.batch * learner.steps, "lr": default.lr, "momentum": default.momentum}
        return cls(**{**same, **cls.keeps, **fields})

    @property
    def steps(self) -> int:
        """Batches drawn at most: whole ones only, so that `samples` is never exceeded."""
        return self.samples // self.batch

    def scaled(self, effort: float) -> Self:
        return dataclasses.replace(self, samples=max(self.batch, round(self.samples * effort)))

    def new_optimizer(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Muon (Jordan et al. 2024) orthogonalizes each factor's update; both optimizers have no weight decay."""
        if self.optimizer == "muon":
            return torch.optim.Muon(weights, lr=self.lr, momentum=self.momentum, weight_decay=0.0)
        return torch.optim.Adam(weights, lr=self.lr, betas=self.betas, fused=weights[0].device.type == "cpu" or None)

    def pace(self, step: int) -> float:
        """The learning rate at `step`, as a share of `lr`."""
        left = 1.0 - step / self.steps
        shape = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[self.schedule]
        return shape * min(1.0, (step + 1) / max(self.warmup, 1))


@dataclass(frozen=True, kw_only=True)
class StoppingRule(ABC):
    """EMORL's stopping rule, for learners that sample and for those that enumerate: they differ in how they `validate`.

    The values are mean scalarized rewards on training prompts, KL left out, as shares of the way from the declared lows to the highs: the
    coefficient of variation depends on where 0 is, and EMORL's rewards lie in [0, 1].
    """

    stop_cv: Amount | None = None  # stop when std / mean of the last `stop_window` validations is below
    stop_window: int = 20  # the latest validations that stop_cv looks at
    validate_every: int = 10  # steps

    @abstractmethod
    def validate(self, policy: Any, task: Any, spec: TrainSpec, run: Run) -> float:
        """The mean scalarized reward of the present policy on training prompts; what it costs is charged to the run."""

    def watch(self, policy: Any, task: Task, spec: TrainSpec, run: Run) -> None:
        """Validate where it is time to, after a step, and note in the run whether the training has converged."""
        if self.stop_cv is None or run.step % self.validate_every:
            return
        if not Combine.of(spec).weighting_rule.arrived(run.step, self.steps):  # type: ignore[attr-defined]
            return
        run.validations.append(self.validate(policy, task, spec, run))
        m = task.objectives.count
        w_2M, ends_2M = np.tile(spec.preference or (1 / m,) * m, (2, 1)), np.array([task.objectives.low, task.objectives.high])
        low, high = Combine.of(spec).scores(ends_2M, w_2M, task.objectives)
        run.converged = converged((np.array(run.validations) - low) / (high - low), self.stop_window, self.stop_cv)


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
    looks: list[dict[str, Any]] = field(default_factory=list)  # at validation prompts; see `training.validation`
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


def log_record(
    objectives: Objectives,
    window: Sequence[Mapping[str, Any]],
    *,
    step: int,
    samples: int,
    tokens: int,
    lr: float,
    group: int | None = None,
) -> dict[str, Any]:
    """One line of the log: means over the steps since the last line. A step is its rewards_NM and any numbers by name, None for none.

    Of a number whose name ends in `_max` it is the maximum. `seconds_of`, the seconds of each phase of a step, becomes its speed.
    `outside` is there only where rewards left their declared ranges: see `Objectives.outside`. With `group`, the rows of which lie
    together: `spread`, the standard deviation over responses, and `equal`, the share of groups in which all scores are the same.
    """
    names = objectives.names
    rewards_NM = np.concatenate([row["rewards_NM"] for row in window])
    record: dict[str, Any] = {"step": step, "samples": samples, "tokens": tokens}
    record["rewards"] = named_means(objectives, rewards_NM)
    record["unscored"] = dict(zip(names, np.isnan(rewards_NM).sum(0).tolist(), strict=True))
    if group is not None:
        record["spread"] = {name: float(value) for name, value in zip(names, _spread(rewards_NM), strict=True)}
        record["equal"] = {name: float(value) for name, value in zip(names, _equal(rewards_NM, group), strict=True)}
    record |= {"outside": outside} if (outside := objectives.outside(rewards_NM)) else {}
    for name in dict.fromkeys(name for row in window for name in row if name not in ("rewards_NM", "seconds_of")):
        values = [row[name] for row in window if row.get(name) is not None]
        if name.startswith("weights/"):
            record.setdefault("weights", {})[name.removeprefix("weights/")] = float(np.mean(values))
            continue
        record |= {name: float((np.max if name.endswith("_max") else np.mean)(values))} if values else {}
    return record | _speeds(window) | {"lr": lr}


def _speeds(window: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Generated tokens per second of each phase of a step alone; nothing where a loop does not say."""
    seconds: Counter[str] = Counter()
    for row in window:
        seconds.update(row.get("seconds_of", {}))
    tokens = sum(row["length"] * len(row["rewards_NM"]) for row in window if "seconds_of" in row)
    return {PHASES: {name: round(tokens / max(spent, 1e-9), 1) for name, spent in seconds.items()}} if seconds else {}


def _spread(rewards_NM: np.ndarray) -> np.ndarray:
    """(M,) the standard deviation of what was scored; 0 where nothing was."""
    known_NM = np.isfinite(rewards_NM)
    mean_M = np.where(known_NM, rewards_NM, 0.0).sum(0) / np.maximum(known_NM.sum(0), 1)
    return np.sqrt(np.where(known_NM, (rewards_NM - mean_M) ** 2, 0.0).sum(0) / np.maximum(known_NM.sum(0), 1))


def _equal(rewards_NM: np.ndarray, group: int) -> np.ndarray:
    """(M,) the share of groups in which no two scores differ."""
    rewards_PGM = rewards_NM.reshape(-1, group, rewards_NM.shape[1])
    lowest_PM = np.where(np.isnan(rewards_PGM), np.inf, rewards_PGM).min(1)
    highest_PM = np.where(np.isnan(rewards_PGM), -np.inf, rewards_PGM).max(1)
    return (highest_PM <= lowest_PM).mean(0)


def watch_unscored(
    recent: list[list[int]], rewards_NM: np.ndarray, names: Sequence[str], *, limit: float, last: bool = False
) -> list[list[int]]:
    """The recent batches with this one: completions, then unscored ones per objective. RewardError where these are too many.

    Judged as soon as `WATCHED` completions are seen, and at the `last` batch.
    """
    n = len(rewards_NM)
    recent = [*recent, [n, *np.isnan(rewards_NM).sum(0).tolist()]][-max(1, math.ceil(WATCHED / max(n, 1))) :]
    seen, *unscored_M = np.sum(recent, axis=0).tolist()
    if seen >= WATCHED or last:
        refuse_unscored(names, unscored_M, seen, limit=limit)
    return recent


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
        raise TrainingError(
            "a training step fits into memory", found=str(error).split("\n")[0] or type(error).__name__, remedy=remedy
        ) from error


def gates_of(spec: TrainSpec, w_NM: np.ndarray, count: int) -> np.ndarray:
    """(N, K) float64 gates of the `count` adapters for rows with the preferences `w_NM`; ConfigError for a rule of other adapters."""
    if spec.rule is None:
        gates_NK = np.ones((len(w_NM), 1)) if spec.preference is not None else np.asarray(w_NM, dtype=np.float64)
    else:
        gates_NK = GATE_RULES.build(spec.rule).gates(w_NM)
    if gates_NK.shape[1] != count:
        raise ConfigError(
            "the rule of a training gives one gate per adapter",
            found=f"{gates_NK.shape[1]} gates for {count} adapters (frozen, started from, fresh)",
            remedy="give one parent or fresh adapter per gate, or name another rule",
        )
    return gates_NK


def annealed(first: float, done: float) -> float:
    """The price of KL in units of the task's own, when a share `done` of the training is: from `first` down to 1, by equal factors.

    Where the task's price is small against the differences of rewards, a policy settles on what is good on average over preferences before
    it has seen what is best at each, and has no gradient left. At a high price it keeps all choices. The last fifth is at the task's own.

    Source: deterministic annealing (Rose 1998), for the entropy of a policy (Mei et al. 2019).
    """
    return first ** max(0.0, 1.0 - done / 0.8)


def _adapter_name(kind: str, i: int, count: int) -> str:
    return kind if count == 1 else f"{kind}-{i}"


def converged(values: Sequence[float] | np.ndarray, window: int, below: float | None) -> bool:
    """EMORL's stopping rule: the coefficient of variation of the last `window` values is below `below` (None: never)."""
    if below is None or len(values) < window:
        return False
    recent = np.asarray(values[-window:])
    return bool(recent.std() < below * abs(recent.mean()))
