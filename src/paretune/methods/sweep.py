"""A sweep: one single-policy training per preference of a lattice, and the nearest trained policy answers. What each training is, is a
hook, so that every single-policy method (a weighting, a scalarizer, an aggregation of advantages or of gradients) is a few lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Method
from paretune.methods.experts import adapters_for, family_meta, training
from paretune.methods.search import simplex_lattice
from paretune.policy.base import build_policy
from paretune.tasks.preferences import KEEP_OUT
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Preference

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["SWEEP_TRAININGS", "Sweep"]

SWEEP_TRAININGS = "C(points + M - 2, M - 1), or W for points = 0"
"""What a sweep's card says under `trainings`."""


@dataclass(frozen=True)
class Sweep(Method):
    """Base of all sweeps. A subclass is a registered dataclass with a card, and overrides `_training` (and `_utility`, see there).

    `points` trained preferences on each edge of the simplex, vertices included; 0 trains at the judged preferences themselves, the
    dedicated training that every shortcut is compared with; `at` names the trained preferences one by one instead. For M = 2 an odd
    `points` would train at (.5, .5), which is judged; hence the even default. The family says in `trained_at_judged` how many of its
    trainings lie within 0.005 of a judged preference.
    """

    points: int = 6
    at: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if self.points < 0 or self.points == 1:
            raise ConfigError(
                f"method {self.registered_name}: points is 0 (the judged preferences) or at least 2 (the vertices)",
                found=f"points = {self.points}",
                remedy="for example points = 6",
            )

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        """The hook: the training for the preference `w_M`. Change what `training` gives with `dataclasses.replace`."""
        return training(task, learner, w_M, seed)

    def _utility(self) -> Mapping[str, Any] | None:
        """The description of the utility that the trainings climb, where it is not w . J: evaluation judges by it, too."""
        return None

    def preferences(self, task: Task) -> np.ndarray:
        """(K, M) what is trained."""
        if self.at:
            return np.stack([Preference.of(task.objectives.names, w_M).w_M for w_M in self.at])
        return task.judged() if self.points == 0 else simplex_lattice(task.objectives.count, self.points)

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        task.judged()  # refuses a single objective before anything is trained
        return list(self._specs(task, learner, seed).values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        from paretune.policy.family import Family
        from paretune.policy.rules import Nearest

        w_KM = self.preferences(task)
        adapters = adapters_for(self._specs(task, learner, seed), done)
        rule = Nearest(points_KM=tuple(tuple(float(w) for w in w_M) for w_M in w_KM))
        meta = {**family_meta(self, task, seed=seed), "trained_at_judged": near_judged(task, w_KM)}
        utility = self._utility()
        if utility is not None:
            meta["utility"] = dict(utility)
        return Family(build_policy(task, "parameter", adapters), rule, task.objectives, task.base(), adapters, meta)

    def _specs(self, task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
        return {f"policy-{k}": self._training(task, learner, w_M, seed) for k, w_M in enumerate(self.preferences(task))}


def near_judged(task: Task, w_KM: np.ndarray) -> int:
    """How many of these preferences lie within 0.005 of a judged one."""
    return int((np.abs(w_KM[:, None] - task.judged()[None]).max(-1).min(1) <= KEEP_OUT).sum())
