"""A mixture of experts with a router that hears the preference: gates per layer and token, trained with the learner's own reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method
from paretune.methods.bridge import interaction
from paretune.methods.experts import adapters_for, family_meta, sampled_training, vertex_trainings
from paretune.policy.base import build_policy
from paretune.policy.rules import Rule
from paretune.registry import METHODS, RULES
from paretune.training.spec import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Router", "RouterRule"]


@RULES.register("router")
@dataclass(frozen=True)
class RouterRule(Rule):
    """The gates that a router starts from: the preference, and with `bridge` its `interaction`. Trainings under it train a router."""

    experts: int
    width: int = 32
    seed: int = 0
    bridge: bool = False

    @property
    def mixing(self) -> Mapping[str, Any]:
        """The level at which a training under this rule runs."""
        return {"name": "routed", "experts": self.experts, "width": self.width, "seed": self.seed}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        w_WM = np.array(w_WM, dtype=np.float64)
        return np.concatenate([w_WM, interaction(w_WM)], axis=1) if self.bridge else w_WM


@METHODS.register("router")
@dataclass(frozen=True)
class Router(Method):
    """M frozen experts and a router at every decoder layer, trained over sampled preferences; one forward per token.

    width: of the router's hidden layer. bridge: one more adapter, of the learner's rank, trained together with the router and gated as in
    the method `bridge`. effort: the budget of the router's training, in budgets of one expert. balance: as in `bridge`.
    """

    width: int = 32
    bridge: bool = False
    effort: float = 1.0
    balance: float = 0.0

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

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        experts = list(vertex_trainings(task, learner, seed).values())
        last = self._router(task, learner, seed)  # made first: a learner that cannot train it says so before the experts are paid for
        return [*experts, last] if all(spec.key in done for spec in experts) else experts

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        from paretune.policy.family import Family

        spec = self._router(task, learner, seed)
        specs = vertex_trainings(task, learner, seed)
        adapters = adapters_for({**specs, "bridge": spec} if self.bridge else specs, done)
        rule = self._rule(task, seed)
        policy = build_policy(task, rule.mixing, adapters)
        policy.load_extra(Path(done[spec.key].path))
        meta = family_meta(self, task, seed=seed, experts=range(task.objectives.count))
        return Family(policy, rule, task.objectives, task.base(), adapters, meta)

    def _rule(self, task: Task, seed: int) -> RouterRule:
        return RouterRule(experts=task.objectives.count, width=self.width, seed=seed, bridge=self.bridge)

    def _router(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
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
