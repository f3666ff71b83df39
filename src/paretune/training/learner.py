"""Learners: how adapters are trained for one objective of training. The loops themselves: `policy_gradient` and `exact_learner`."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from paretune.errors import ConfigError, TrainingError
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.registry import GATE_RULES
from paretune.tasks.base import Task
from paretune.training.checkpoint import Progress, clear_checkpoint
from paretune.training.cost import Cost, write_cost
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["Learner", "converged", "gates_of", "memory_explained"]


@dataclass(frozen=True, kw_only=True)
class Learner(ABC):
    """Base of all learners: the shape of the adapters, where they are computed, and `train`."""

    registered_name: ClassVar[str]
    version: ClassVar[int]

    rank: int = 16
    alpha: int = 32
    targets: str | tuple[str, ...] = "all-linear"
    device: str = "auto"  # "auto" is the first GPU where there is one; only a CPU resumes bitwise
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: as the task loads it; adapters are float32 in any case

    def scaled(self, effort: float) -> Learner:
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
        self,
        spec: TrainSpec,
        task: Task,
        work: Path,
        *,
        parents: Mapping[str, Artifact] | None = None,
        progress: Progress | None = None,
    ) -> Cost:
        """Train what `spec` says into the directory `work`, resuming where it holds a checkpoint; returns what it cost.

        Writes adapter_config.json and adapter_model.safetensors (plain PEFT), or such a folder adapter-<i> for each of several trained
        adapters; train.jsonl; ledger.json. `parents` are the artifacts of `spec.parents` by key. Raises TrainingError or RewardError
        when it cannot go on, with the last checkpoint kept.
        """

    def start(self, spec: TrainSpec, task: Task, parents: Mapping[str, Artifact]) -> ParameterMix:
        """The policy at step 0 on the task's model: frozen adapters, those that are trained on, and fresh ones; see `TrainSpec`."""
        loaded, tokenizer = task.load()
        model: Any = loaded
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        model = model.to(device) if self.dtype is None else model.to(device, getattr(torch, self.dtype))
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
            alpha = max(1, round(self.alpha * rank / self.rank))  # the same scaling alpha / rank for every rank
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
        return policy

    def finish(self, spec: TrainSpec, policy: ParameterMix, work: Path, cost: Cost) -> Cost:
        """Write the adapters and the cost, then drop the checkpoint; in this order, a kill in between loses nothing."""
        policy.commit()
        trained = policy.bank.trainable
        for i, name in enumerate(trained):
            policy.bank.save(name, work if len(trained) == 1 else work / f"adapter-{i}")
        policy.save_extra(work)
        size = sum(p.numel() * p.element_size() for p in policy.parameters())
        base = sum(p.numel() * p.element_size() for p in policy.model.parameters())
        # Memory: weights, gradients and the optimizer's two moments; activations are not counted.
        cost = dataclasses.replace(cost, memory_bytes=base + 3 * size, storage_bytes=size)
        write_cost(work, cost)
        clear_checkpoint(work)
        return cost


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


def _adapter_name(kind: str, i: int, count: int) -> str:
    return kind if count == 1 else f"{kind}-{i}"


def converged(values: Sequence[float], window: int, below: float | None) -> bool:
    """EMORL's stopping rule: the coefficient of variation of the last `window` values is below `below` (None: never)."""
    if below is None or len(values) < window:
        return False
    recent = np.asarray(values[-window:])
    return bool(recent.std() < below * abs(recent.mean()))
