"""One policy for all preferences, which reads the preference in its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method
from paretune.methods.experts import adapters_for, family_meta, sampled_training
from paretune.policy.base import build_policy
from paretune.policy.rules import Rule
from paretune.registry import METHODS, RULES
from paretune.training.spec import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Prompted", "PromptedRule"]


@RULES.register("prompted")
@dataclass(frozen=True)
class PromptedRule(Rule):
    """The preference itself, for a policy that reads it as text; see the level "prompted"."""

    objectives: int
    digits: int = 2

    @property
    def mixing(self) -> Mapping[str, Any]:
        return {"name": "prompted", "objectives": self.objectives, "digits": self.digits}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.array(w_WM, dtype=np.float64)


@METHODS.register("prompted")
@dataclass(frozen=True)
class Prompted(Method):
    """One training of one adapter, with a preference sampled for every prompt and written before it.

    effort: the training's budget, in budgets of the learner. balance: see `bridge`. digits: of each weight.
    """

    effort: float = 1.0
    balance: float = 0.0
    digits: int = 2

    card: ClassVar[Card] = Card(
        category="multi-policy",
        summary="one policy and one adapter, conditioned on the preference by text before the prompt, preferences sampled per prompt",
        source="preferences in the prompt: RiC (2402.10207), MO-ODPO (2503.00295)",
        differs="trained by the learner on its own responses, not by supervised rounds (RiC) or on preference pairs (MO-ODPO); the text "
        "is the weights as digits of fixed width, no words; preferences of a batch are spread over the simplex",
        hides="one training has to learn all preferences, and to read them: compare at equal samples; the prompt is longer by "
        "M * digits tokens; preferences closer than the last digit are one",
        trainings="1",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.effort <= 0 or self.digits < 1:
            raise ConfigError(
                "method prompted: effort is positive, digits are at least 1",
                found=f"effort = {self.effort:g}, digits = {self.digits}",
                remedy="`paretune show prompted` prints the defaults",
            )

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return [self._spec(task, learner, seed)]

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        from paretune.policy.family import Family

        adapters = adapters_for({"policy": self._spec(task, learner, seed)}, done)
        rule = self._rule(task)
        meta = family_meta(self, task, seed=seed)
        return Family(build_policy(task, rule.mixing, adapters), rule, task.objectives, task.base(), adapters, meta)

    def _rule(self, task: Task) -> PromptedRule:
        return PromptedRule(objectives=task.objectives.count, digits=self.digits)

    def _spec(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
        fresh = (learner.rank,)
        return sampled_training(task, learner, seed, rule=self._rule(task), fresh=fresh, effort=self.effort, balance=self.balance)
