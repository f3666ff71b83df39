"""One expert per objective, combined at a chosen level: the simplest meta-policy, and the parts that other methods share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from paretune.methods.base import Card, Method
from paretune.policy.base import build_policy
from paretune.registry import METHODS, describe
from paretune.training.spec import Artifact, TrainSpec
from paretune.training.weightings.base import Balanced, Fixed

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.policy.rules import Rule
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Experts", "OnExperts", "adapters_for", "family_meta", "sampled_training", "training", "vertex_trainings"]


def training(task: Task, learner: Learner, w_M: Sequence[float] | np.ndarray, seed: int) -> TrainSpec:
    """The training for one fixed preference. Equal arguments give equal keys, so that methods share its result."""
    preference = tuple(float(w) for w in w_M)
    return TrainSpec(task=describe(task), learner=describe(learner), preference=preference, seed=seed)


def sampled_training(
    task: Task,
    learner: Learner,
    seed: int,
    *,
    rule: Rule,
    fresh: tuple[int, ...],
    frozen_adapters: Iterable[TrainSpec] = (),
    effort: float = 1.0,
    balance: float = 0.0,
    active_objectives: tuple[int, ...] | None = None,
) -> TrainSpec:
    """The training over sampled preferences, gated by `rule`: new adapters of the ranks `fresh` beside those of `frozen_adapters`.

    effort: its budget, in budgets of the learner. balance: the power of the weighting "balanced", 0 is plain sampling.
    """
    spec = TrainSpec(
        task=describe(task),
        learner=describe(learner.scaled(effort)),
        preference=None,
        seed=seed,
        weighting=describe(Balanced(power=balance) if balance else Fixed()),
        frozen_adapters=tuple(spec.key for spec in frozen_adapters),
        fresh=fresh,
        rule=describe(rule),
        active_objectives=active_objectives,
    )
    learner.accept(spec)
    return spec


def vertex_trainings(task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
    """Adapter name -> training of the expert of each objective, in the order of axis M."""
    vertices = np.eye(task.objectives.count)
    return {f"expert-{name}": training(task, learner, e_M, seed) for name, e_M in zip(task.objectives.names, vertices, strict=True)}


def adapters_for(specs: Mapping[str, TrainSpec], done: Mapping[str, Artifact]) -> dict[str, Any]:
    """Adapter name -> directory of the finished training."""
    return {name: done[spec.key].path for name, spec in specs.items()}


def family_meta(method: Method, task: Task, *, seed: int, experts: Sequence[int] | None = None) -> dict[str, Any]:
    """What a family says of itself: method, card, default length, and which adapter is the expert of which objective."""
    meta = {"method": describe(method), "card": asdict(method.card), "seed": seed, "max_new_tokens": task.max_new_tokens}
    return meta if experts is None else {**meta, "experts": list(experts)}


class OnExperts(Method):
    """One expert per objective, with the preference as their gates; subclasses say at which level they are mixed."""

    symmetric: ClassVar[bool] = True

    def mixing_settings(self) -> str | Mapping[str, Any]:
        """The mixing level, by name or with its settings."""
        raise AssertionError("subclasses name their level")

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return list(vertex_trainings(task, learner, seed).values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        from paretune.policy.family import Family
        from paretune.policy.rules import Identity

        adapters = adapters_for(vertex_trainings(task, learner, seed), done)
        meta = family_meta(self, task, seed=seed, experts=range(task.objectives.count))
        return Family(build_policy(task, self.mixing_settings(), adapters), Identity(), task.objectives, task.base(), adapters, meta)


@METHODS.register("experts")
@dataclass(frozen=True)
class Experts(OnExperts):
    """M experts, one per objective; a preference is the vector of their gates.

    mixing: "parameter" is the exact delta soup, "factor" the soup of the factors as its authors' code does it, "logit" the product of
    the experts' next-token distributions, "hidden" the sum of their last hidden states under the shared head.
    """

    mixing: Literal["parameter", "factor", "logit", "hidden"] = "logit"

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, mixed with the preference as weights (soup, logits or hidden states)",
        source="rewarded soups (2306.04488) for parameter and factor; MOD (2406.18853), reverse KL, for logit; "
        "EMORL (2505.02579) for hidden",
        differs="parameter is the exact soup of the deltas, not of the factors; hidden uses the preference as weights, without a search; "
        "all levels sample under one decoding, with a KV cache",
        hides="what mixing loses even with perfect experts: evaluation separates learning from composition; "
        "hidden at the last layer IS logit mixing where the head is shared, linear and bias-free; factor adds cross terms of experts",
        trainings="M",
        forwards_per_token="parameter, factor: 1; logit, hidden: M",
        zero_shot=True,
    )

    def mixing_settings(self) -> str:
        return self.mixing
