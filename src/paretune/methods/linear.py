"""Single-policy training, repeated: one training per preference of a lattice, and the nearest trained policy answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.methods import Card, Method
from paretune.methods.experts import adapters_for, build_policy, family_meta, training
from paretune.registry import METHODS
from paretune.search import simplex_lattice
from paretune.tasks import KEEP_OUT
from paretune.types import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.learner import Learner
    from paretune.policy import Family
    from paretune.tasks import Task

__all__ = ["Linear"]


@METHODS.register("linear")
@dataclass(frozen=True)
class Linear(Method):
    """A sweep: several single policies, of which one answers. `points` trained preferences on each edge of the simplex, vertices included,
    so that the experts are among them.

    points = 0 trains at the judged preferences themselves: the dedicated training that every shortcut is compared with. For M = 2 an
    odd `points` would train at (.5, .5), which is judged; hence the even default. The family says in `trained_at_judged` how many of its
    trainings lie within 0.005 of a judged preference.
    """

    points: int = 6

    card: ClassVar[Card] = Card(
        family="single-policy",
        summary="one linearly scalarised training per preference of a lattice, so a sweep of single policies; the nearest one answers",
        source='the weighted sum of rewards ("MORLHF"), as most trainers do it',
        differs="the learner's: KL in the reward and a leave-one-out baseline by default, so that its optimum is that of w . J",
        hides="points = 0 was trained at the very preferences it is judged at; otherwise some of the loss is the lattice's, not the "
        "training's; a preference half-way between two policies takes the first",
        trainings="C(points + M - 2, M - 1), or W for points = 0",
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def __post_init__(self):
        if self.points < 0 or self.points == 1:
            raise ConfigError(
                "method linear: points is 0 (the judged preferences) or at least 2 (the vertices)",
                found=f"points = {self.points}",
                remedy="for example points = 6",
            )

    def preferences(self, task: Task) -> np.ndarray:
        """(K, M) what is trained."""
        return task.judged() if self.points == 0 else simplex_lattice(task.objectives.count, self.points)

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return list(self._specs(task, learner, seed).values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        from paretune.mixing import Nearest
        from paretune.policy import Family

        w_KM = self.preferences(task)
        adapters = adapters_for(self._specs(task, learner, seed), done)
        rule = Nearest(points_KM=tuple(tuple(float(w) for w in w_M) for w_M in w_KM))
        near_K = np.abs(w_KM[:, None] - task.judged()[None]).max(-1).min(1) <= KEEP_OUT
        meta = {**family_meta(self, task, seed=seed), "trained_at_judged": int(near_K.sum())}
        return Family(build_policy(task, "parameter", adapters), rule, task.objectives, task.base(), adapters, meta)

    def _specs(self, task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
        return {f"policy-{k}": training(task, learner, w_M, seed) for k, w_M in enumerate(self.preferences(task))}
