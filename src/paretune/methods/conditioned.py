"""One policy for all preferences, trained from scratch while a preference is sampled for every prompt.

`conditioned` gates adapters that are trained together by the preference; `prompted` writes the preference before the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method, adapters_for, parts_of, sampled_training
from paretune.policy.family import Family
from paretune.policy.rules import BridgeRule, GateRule, Identity, PromptedRule, SharedRule, TiedRule
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Amount

__all__ = ["Conditioned", "Prompted"]


@METHODS.register("conditioned")
@dataclass(frozen=True)
class Conditioned(Method):
    """One training over all preferences. What the preference changes is the `structure`:

    clp       one adapter per objective, gated by the preference
    bridge    the same and one more, gated by how mixed the preference is
    panacea   a shared adapter, and `private` ranks per objective whose singular values are `scale` times the preference
    pblora    a shared adapter, and one whose core is the preference's mixture of M square matrices: B (sum_k w_k C_k) A

    effort: the training's budget, in budgets of the learner. balance: see `bridge`.
    """

    structure: Literal["clp", "bridge", "panacea", "pblora"] = "clp"
    effort: float = 1.0
    balance: Amount = 0.0
    private: int = 1
    scale: float = 1.0

    card: ClassVar[Card] = Card(
        category="multi-policy",
        summary="one policy conditioned on the preference through the gates of its adapters, trained with preferences sampled per prompt",
        source="clp: CLP (2407.15762); panacea: Panacea (2402.02030); pblora: PBLoRA (PARM, 2505.06274); bridge: ours",
        differs="clp mixes LoRA deltas, not all parameters; panacea has a plain LoRA beside the gated ranks (its learned singular values "
        "are absorbed), linear utilities only, and scale is fixed where the source learns a scale per layer; pblora trains the policy, "
        "not a reward model that guides one, and its first core is absorbed by a plain LoRA; preferences of a batch are spread over the "
        "simplex",
        hides="one training has to learn all preferences: compare at equal samples, not at equal trainings; the adapters are as many as "
        "M experts'",
        trainings="1",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.effort <= 0 or self.private < 1 or self.scale <= 0:
            raise ConfigError(
                "method conditioned: effort and scale are positive, private is at least 1",
                found=f"effort = {self.effort:g}, scale = {self.scale:g}, private = {self.private}",
                remedy="`paretune show conditioned` prints the defaults",
            )

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return [self._spec(task, learner, seed)]

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        rule, _ = self._structure(task, learner)
        return self.family(task, "parameter", rule, parts_of(self._spec(task, learner, seed), done), seed)

    def _structure(self, task: Task, learner: Learner) -> tuple[GateRule, tuple[int, ...]]:
        """The rule of gates, and the ranks of the adapters."""
        m, rank = task.objectives.count, learner.rank
        if self.structure == "clp":
            return Identity(), (rank,) * m
        if self.structure == "bridge":
            return BridgeRule(), (rank,) * (m + 1)
        if self.structure == "pblora":
            return SharedRule(), (rank,) * (m + 1)
        return SharedRule(scale=self.scale), (rank, *(self.private,) * m)

    def _spec(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
        rule, ranks = self._structure(task, learner)
        if self.structure == "pblora":  # while it is trained; afterwards its adapters are plain ones
            rule = TiedRule(seed=seed)
        return sampled_training(task, learner, seed, rule=rule, fresh=ranks, effort=self.effort, balance=self.balance)


@METHODS.register("prompted")
@dataclass(frozen=True)
class Prompted(Method):
    """One training of one adapter, with a preference sampled for every prompt and written before it.

    effort: the training's budget, in budgets of the learner. balance: see `bridge`. digits: of each weight.
    """

    effort: float = 1.0
    balance: Amount = 0.0
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
        rule = self._rule(task)
        return self.family(task, rule.mixing, rule, adapters_for({"policy": self._spec(task, learner, seed)}, done), seed)

    def _rule(self, task: Task) -> PromptedRule:
        return PromptedRule(objectives=task.objectives.count, digits=self.digits)

    def _spec(self, task: Task, learner: Learner, seed: int) -> TrainSpec:
        fresh = (learner.rank,)
        return sampled_training(task, learner, seed, rule=self._rule(task), fresh=fresh, effort=self.effort, balance=self.balance)
