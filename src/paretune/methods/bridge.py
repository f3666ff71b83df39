"""Experts and a bridge: one more adapter that repairs the soup between the experts, at the cost of one model and one more training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method
from paretune.methods.experts import adapters_for, family_meta, sampled_training, vertex_trainings
from paretune.policy.base import build_policy
from paretune.policy.rules import Rule
from paretune.registry import METHODS, RULES
from paretune.training.spec import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Bridge", "BridgeRule", "interaction"]


def interaction(w_WM: np.ndarray) -> np.ndarray:
    """(W, 1) how far a preference is from all vertices: M/(M-1) * (1 - sum w_k^2), 0 at the vertices and 1 at the center."""
    w_WM = np.asarray(w_WM, dtype=np.float64)
    m = w_WM.shape[1]
    return m / (m - 1) * (1.0 - (w_WM**2).sum(1, keepdims=True))


@RULES.register("bridge")
@dataclass(frozen=True)
class BridgeRule(Rule):
    """Gates of M experts and one bridge: the preference, and its `interaction`."""

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(w_WM, dtype=np.float64), interaction(w_WM)], axis=1)


@METHODS.register("bridge")
@dataclass(frozen=True)
class Bridge(Method):
    """M frozen experts as an exact soup, and one adapter between them, trained over sampled preferences under its gate.

    effort: the budget of the bridge's training, in budgets of one expert. rank: the bridge's; 0 is the learner's.
    balance: scale preferences by what there is to gain at them, see the weighting "balanced"; 0 is plain sampling.
    """

    effort: float = 1.0
    rank: int = 0
    balance: float = 0.0

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

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        experts = list(vertex_trainings(task, learner, seed).values())
        last = self._bridge(task, learner, seed)  # made first: a learner that cannot train it says so before the experts are paid for
        return [*experts, last] if all(spec.key in done for spec in experts) else experts

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        from paretune.policy.family import Family

        adapters = adapters_for({**vertex_trainings(task, learner, seed), "bridge": self._bridge(task, learner, seed)}, done)
        meta = family_meta(self, task, seed=seed, experts=range(task.objectives.count))
        return Family(build_policy(task, "parameter", adapters), BridgeRule(), task.objectives, task.base(), adapters, meta)

    def _bridge(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
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
