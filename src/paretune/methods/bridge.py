"""Experts and a bridge: one more adapter that repairs the soup between the experts, at the cost of one model and one more training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from paretune.errors import ConfigError
from paretune.methods.base import Card, OnExperts, adapters_for, sampled_training, vertex_trainings
from paretune.policy.family import Family
from paretune.policy.rules import BridgeRule
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Amount, Natural

__all__ = ["Bridge"]


@METHODS.register("bridge")
@dataclass(frozen=True)
class Bridge(OnExperts):
    """M frozen experts as an exact soup, and one adapter between them, trained over sampled preferences under its gate.

    effort: the budget of the bridge's training, in budgets of one expert. rank: the bridge's; 0 is the learner's.
    balance: scale preferences by what there is to gain at them, see the weighting "balanced"; 0 is plain sampling.
    """

    effort: float = 1.0
    rank: Natural = 0
    balance: Amount = 0.0

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="a soup of experts and one more adapter, gated by how mixed the preference is, that repairs the soup in between",
        source="ours; experts and soup as in rewarded soups (2306.04488), preferences sampled as in CLP (2407.15762)",
        differs="the experts stay as they are and the gate is 0 at the vertices, so that nothing is lost there; preferences of a batch are "
        "spread over the simplex",
        hides="the bridge's training sees every preference: with effort 1 it costs as much as one expert; at the vertices it can gain "
        "nothing on the experts",
        trainings="M + 1",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.effort <= 0 or self.rank < 0:
            raise ConfigError(
                "method bridge: effort is positive, rank at least 0",
                found=f"effort = {self.effort:g}, rank = {self.rank}",
                remedy="effort = 1 costs as much as one expert; rank = 0 is the learner's",
            )

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for({**vertex_trainings(task, learner, seed), "bridge": self._last(task, learner, seed)}, done)
        return self.family(task, "parameter", BridgeRule(), adapters, seed)

    def _last(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
        return sampled_training(
            task,
            learner,
            seed,
            rule=BridgeRule(),
            fresh=(self.rank or learner.rank,),
            frozen_adapters=vertex_trainings(task, learner, seed).values(),
            effort=self.effort,
            balance=self.balance,
        )
