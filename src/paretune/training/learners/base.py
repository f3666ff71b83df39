"""Base classes of learners: `Learner` for all, `SampledLearner` with the settings of those that learn from sampled responses.

Their loop is `loop.run`; TRL's trainers, in the room `trl`, have one of their own. What a step does is in `embedded` and `exact`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, first_line
from paretune.files import disk_errors
from paretune.policy.base import Policy, build_mixing
from paretune.policy.lora.bank import SCALE, LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.self_test import check_model
from paretune.registry import GATE_RULES, GIVEN, UNKEYED
from paretune.tasks.base import Task, first_device, reference
from paretune.training.batch import Draws, Responses, draw
from paretune.training.combine import Combine
from paretune.training.cost import Cost
from paretune.training.loop.checkpoint import Progress, mark_finished
from paretune.training.loop.loggers import Loggers
from paretune.training.loop.run import Run
from paretune.training.spec import Artifact, TrainSpec, gates_of
from paretune.types import Amount, Count, Device, Fraction, Name, Natural, Positive

__all__ = ["Learner", "SampledLearner", "StoppingRule", "annealed", "check_cast", "converged", "draw_step"]


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
            found=f"device {device!r}: {first_line(error)}",
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


def draw_step(
    learner: SampledLearner, policy: Policy, task: Task, spec: TrainSpec, step: int, *, reference: bool = False, by: Draws | None = None
) -> Responses:
    """The responses of one step of a learner: its batch, its groups, the next prompts."""
    group, count = learner.group, learner.batch // learner.group
    shape: dict[str, Any] = {"step": step, "first": step * count, "prompts": count, "group": group, "temperature": learner.temperature}
    return draw(policy, task, spec, reference=reference, by=by, **shape)


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
