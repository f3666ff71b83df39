"""The rows that every leaderboard has: no training, each expert alone, and one training at uniform weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paretune.errors import ConfigError, nearest
from paretune.methods.base import Card, Method, adapters_for, training
from paretune.policy.family import Family
from paretune.policy.rules import Constant
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["Expert", "Reference", "Uniform"]


@METHODS.register("reference")
@dataclass(frozen=True)
class Reference(Method):
    """The untrained reference at every preference: attainment 0 by definition, the floor of every table."""

    card: ClassVar[Card] = Card(
        category="baseline",
        summary="the untrained reference policy at every preference",
        source="none: the zero of attainment",
        differs="nothing",
        hides="nothing",
        trainings="0",
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return []

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        return self.family(task, "reference", Constant(gates_K=()), {}, seed)


class _OnePolicy(Method):
    """One training, used at every preference."""

    def _preference(self, task: Task) -> np.ndarray:
        raise AssertionError("subclasses say which preference they train")

    def _name(self, task: Task) -> str:
        raise AssertionError("subclasses name their adapter")

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return [training(task, learner, self._preference(task), seed)]

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for({self._name(task): self.plan(task, learner, done, seed)[0]}, done)
        return self.family(task, "parameter", Constant(gates_K=(1.0,)), adapters, seed)


@METHODS.register("expert")
@dataclass(frozen=True)
class Expert(_OnePolicy):
    """The expert of one objective, at every preference. `objective` is a name, or its place in the order of objectives."""

    objective: int | str = 0

    card: ClassVar[Card] = Card(
        category="baseline",
        summary="the expert of one objective alone, used at every preference",
        source="none: what ignoring the other objectives gives",
        differs="nothing",
        hides="a high mean attainment where the objectives agree: nothing was traded off",
        trainings="1",
        forwards_per_token="1",
        zero_shot=True,
    )

    def _place(self, task: Task) -> int:
        names = task.objectives.names
        if self.objective in names:
            return names.index(str(self.objective))
        text = str(self.objective)
        if not (text.isdecimal() and int(text) < len(names)):
            raise ConfigError(
                f"method expert: objective is one of the task's objectives, or its number from 0 to {len(names) - 1}",
                found=repr(self.objective),
                remedy=nearest(text, names),
            )
        return int(text)

    def _preference(self, task: Task) -> np.ndarray:
        return np.eye(task.objectives.count)[self._place(task)]

    def _name(self, task: Task) -> str:
        return f"expert-{task.objectives.names[self._place(task)]}"


@METHODS.register("uniform")
@dataclass(frozen=True)
class Uniform(_OnePolicy):
    """One training with equal weights, at every preference."""

    card: ClassVar[Card] = Card(
        category="baseline",
        summary="one training at uniform weights, used at every preference",
        source="EMORL (2505.02579) and DynaOpt (2403.13578) compare with it",
        differs="nothing",
        hides="for M = 2 the middle one of the judged preferences is the one it was trained at",
        trainings="1",
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _preference(self, task: Task) -> np.ndarray:
        return np.full(task.objectives.count, 1.0 / task.objectives.count)

    def _name(self, task: Task) -> str:
        return "uniform"
