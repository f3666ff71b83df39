"""Distillation: what mixing several experts gives at several forwards per token, learned by one steerable student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method, parts_of, vertex_trainings
from paretune.methods.placed import Placed
from paretune.policy.family import Family
from paretune.policy.rules import Barycentric, BridgeRule, StudentRule
from paretune.registry import METHODS, describe
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.learners.distill import Distillation
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["Distilled"]


@METHODS.register("distilled")
@dataclass(frozen=True)
class Distilled(Method):
    """The logit mixture of a `placed` family, distilled into M adapters and a bridge that start from the experts at the vertices.

    more: experts between the vertices, see `placed`; 0 distills plain logit mixing. effort: the budget of the distillation.
    """

    more: int = 1
    effort: float = 1.0

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="the token-level mixture of experts, neighbors of the preference, distilled on-policy into one steerable student",
        source="on-policy distillation from weighted teachers, MOPD (2606.30406); the teachers' mixture as in MOD (2406.18853)",
        differs="one student for all preferences, gated as a bridge; teachers at mixed preferences beside single objectives; "
        "the KL of a token is summed over the vocabulary",
        hides="the student is no better than the mixture that it copies; no reward is asked for while it learns, but all teachers run",
        trainings="M + more + 1",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.effort <= 0 or self.more < 0:
            raise ConfigError(
                "method distilled: effort is positive, more is at least 0",
                found=f"effort = {self.effort:g}, more = {self.more}",
                remedy="more = 1 places one expert between the vertices",
            )

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        self._student(task, learner, list(vertex_trainings(task, learner, seed).values()), seed)  # refused before teachers are paid for
        teachers = Placed(more=self.more).plan(task, learner, done, seed)
        ready = len(teachers) == task.objectives.count + self.more and all(spec.key in done for spec in teachers)
        return [*teachers, self._student(task, learner, teachers, seed)] if ready else teachers

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        teachers, cost = Placed(more=self.more).placement(task, learner, done, seed)
        adapters = parts_of(self._student(task, learner, list(teachers.values()), seed), done)
        return self.family(task, "parameter", BridgeRule(), adapters, seed, search_cost=cost)

    def _student(self, task: Task, learner: Learner, teachers: Sequence[TrainSpec], seed: int) -> TrainSpec:
        keys = tuple(spec.key for spec in teachers)
        rule = Barycentric(points_KM=tuple(tuple(spec.preference or ()) for spec in teachers))
        distillation = Distillation.like(learner, teacher=describe(rule)).scaled(self.effort)
        spec = TrainSpec(
            task=describe(task),
            learner=describe(distillation),
            preference=None,
            seed=seed,
            frozen_adapters=keys,
            init_from=keys[: task.objectives.count],
            fresh=(learner.rank,),
            rule=describe(StudentRule(teachers=len(keys))),
        )
        distillation.accept(spec)
        return spec
