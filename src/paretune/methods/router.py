"""A mixture of experts with a router that hears the preference: gates per layer and token, trained with the learner's own reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from paretune.errors import ConfigError
from paretune.methods.base import Card, OnExperts, adapters_for, sampled_training, vertex_trainings
from paretune.policy.base import build_policy
from paretune.policy.family import Family
from paretune.policy.rules import RouterRule
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Amount

__all__ = ["Router"]


@METHODS.register("router")
@dataclass(frozen=True)
class Router(OnExperts):
    """M frozen experts and a router at every decoder layer, trained over sampled preferences; one forward per token.

    width: of the router's hidden layer. bridge: one more adapter, of the learner's rank, trained together with the router and gated as in
    the method `bridge`. effort: the budget of the router's training, in budgets of one expert. balance: as in `bridge`.
    """

    width: int = 32
    bridge: bool = False
    effort: float = 1.0
    balance: Amount = 0.0

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="frozen experts and a router per layer that sets their gates for each token, from its hidden state and the preference",
        source="ours; gates over LoRA experts from hidden states as in X-LoRA (2402.07148), preferences sampled as in CLP (2407.15762)",
        differs="the router hears the preference, corrects it instead of replacing it, and is silent at the vertices; no softmax",
        hides="a router can only scale what the experts learned; its training sees every preference: with effort 1 it costs one expert",
        trainings="M + 1",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.effort <= 0 or self.width < 1:
            raise ConfigError(
                "method router: effort is positive, width at least 1",
                found=f"effort = {self.effort:g}, width = {self.width}",
                remedy="effort = 1 costs as much as one expert",
            )

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        spec, specs = self._last(task, learner, seed), vertex_trainings(task, learner, seed)
        adapters = adapters_for({**specs, "bridge": spec} if self.bridge else specs, done)
        rule = self._rule(task, seed)
        policy = build_policy(task, rule.mixing, adapters)
        policy.load_extra(Path(done[spec.key].path))
        return self.family(task, policy, rule, adapters, seed)

    def _rule(self, task: Task, seed: int) -> RouterRule:
        return RouterRule(experts=task.objectives.count, width=self.width, seed=seed, bridge=self.bridge)

    def _last(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
        return sampled_training(
            task,
            learner,
            seed,
            rule=self._rule(task, seed),
            fresh=(learner.rank,) if self.bridge else (),
            frozen_adapters=vertex_trainings(task, learner, seed).values(),
            effort=self.effort,
            balance=self.balance,
        )
