"""One policy for all preferences: adapters trained together, from scratch, while a preference is sampled for every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method
from paretune.methods.bridge import BridgeRule
from paretune.methods.experts import family_meta, sampled_training
from paretune.policy.base import build_policy
from paretune.policy.rules import Identity, Rule
from paretune.registry import METHODS, RULES
from paretune.training.spec import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Conditioned", "SharedRule", "TiedRule"]


@RULES.register("shared")
@dataclass(frozen=True)
class SharedRule(Rule):
    """Gate 1 for the adapter that all preferences share, then `scale` times the preference for those of the objectives."""

    scale: float = 1.0

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        w_WM = np.asarray(w_WM, dtype=np.float64)
        return np.concatenate([np.ones((len(w_WM), 1)), self.scale * w_WM], axis=1)


@RULES.register("tied")
@dataclass(frozen=True)
class TiedRule(Rule):
    """Gate 1 for the adapter that all preferences share, then the preference. Trainings under it tie the others' factors."""

    seed: int = 0

    @property
    def mixing(self) -> Mapping[str, Any]:
        """The level at which a training under this rule runs."""
        return {"name": "tied", "own": 1, "seed": self.seed}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return SharedRule().gates(w_WM)


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
    balance: float = 0.0
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
        from paretune.policy.family import Family

        found = done[self._spec(task, learner, seed).key].adapters
        adapters = {f"part-{i}": path for i, path in enumerate(found)}
        rule, _ = self._structure(task, learner)
        meta = family_meta(self, task, seed=seed)
        return Family(build_policy(task, "parameter", adapters), rule, task.objectives, task.base(), adapters, meta)

    def _structure(self, task: Task, learner: Learner) -> tuple[Rule, tuple[int, ...]]:
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
