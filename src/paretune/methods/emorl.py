"""EMORL: one expert per objective, their last hidden states summed with weights that are searched anew for every preference.

`emorl` trains its own experts with the published stopping rule; `emorl-shared` takes the experts that the other methods share, so
that a comparison shows the outer level alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paretune.methods.base import SPLIT, Card, OnExperts, adapters_for, vertex_trainings
from paretune.methods.search import hierarchical_grid, hierarchical_simplex
from paretune.policy.base import Policy, build_policy
from paretune.policy.family import Family
from paretune.policy.returns import metered, returns_of
from paretune.policy.rules import Searched
from paretune.registry import METHODS
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Amount, Cost, Count

__all__ = ["Emorl", "EmorlShared", "outer_score"]

CLIP = 1e-4  # the product score takes logarithms of rewards in [CLIP, 1 - CLIP]

Scorer = Callable[[np.ndarray, np.ndarray], float]
"""(gates (K,), preference (M,)) -> score."""


def outer_score(task: Task, policy: Policy, *, kind: str, samples: int, seed: int) -> Scorer:
    """What the search maximizes on the training prompts: exact where the task is exact, else `samples` responses with shared noise.

    "linear" is J_w, KL included. "product" is E[sum_k w_k log r_k], each reward scaled to its declared range and clipped to
    [1e-4, 1 - 1e-4], per response and without KL, as in the experts' score of the source. Responses that are unscored in an objective with
    weight are left out.
    """
    assert kind in ("linear", "product"), kind
    low_M, high_M = np.asarray(task.objectives.low), np.asarray(task.objectives.high)

    def value(rewards: np.ndarray, w_M: np.ndarray) -> np.ndarray:
        scaled = rewards if kind == "linear" else np.log(np.clip((rewards - low_M) / (high_M - low_M), CLIP, 1 - CLIP))
        return np.where(w_M > 0, scaled, 0.0) @ w_M

    price = task.beta if kind == "linear" else 0.0
    returns = returns_of(task, policy, SPLIT, samples=samples, seed=seed_for(seed, "outer level"))
    return lambda gates_K, w_M: returns.expected(gates_K, lambda rewards: value(rewards, w_M), price)


_DIFFERS = (
    "any number of objectives and any score; one search per preference (the source reports one point); sampling at temperature 1 with "
    "a KV cache (the source decodes greedily without one); the score is J_w with its KL, or the source's product of rewards; "
    "on exact tasks the score is exact"
)
_HIDES = (
    "with one shared linear head this is logit mixing; the weights need not sum to 1, so their scale is a temperature; "
    "the search sees training prompts only and is paid again at every preference; 3^M evaluations per level"
)


@METHODS.register("emorl-shared")
@dataclass(frozen=True)
class EmorlShared(OnExperts):
    """EMORL's outer level on the experts that the other methods use: compare this one."""

    score: Literal["linear", "product"] = "linear"
    search: Literal["box", "simplex"] = "box"
    levels: Count = 5
    cache: bool = False
    samples: Count = 64

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="EMORL's search and aggregation on the experts shared with the other methods",
        source="EMORL (2505.02579), paper and the authors' code",
        differs="the experts are the shared ones, without the published stopping rule; " + _DIFFERS,
        hides=_HIDES,
        trainings="M",
        forwards_per_token="M",
        zero_shot=False,
    )
    symmetric: ClassVar[bool] = True

    def _learner(self, learner: Learner) -> Learner:
        return learner

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return list(vertex_trainings(task, self._learner(learner), seed).values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for(vertex_trainings(task, self._learner(learner), seed), done)
        policy = build_policy(task, "hidden", adapters)
        score = outer_score(task, policy, kind=self.score, samples=self.samples, seed=seed)
        searcher = hierarchical_grid if self.search == "box" else hierarchical_simplex

        def search(w_M: np.ndarray) -> tuple[np.ndarray, Cost]:
            with metered() as meter:
                result = searcher(lambda gates_K: score(gates_K, w_M), policy.K, levels=self.levels, cache=self.cache)
            return result.best_K, meter.cost

        return self.family(task, policy, Searched(search, task.judged()), adapters, seed)


@METHODS.register("emorl", version=2)
@dataclass(frozen=True)
class Emorl(EmorlShared):
    """As published, with its own experts: each stops when the coefficient of variation of its last 20 validations is below `stop_cv`.

    Sampled and exact learners have the same rule, on estimates and on expectations: see the learners' field `stop_cv`. A learner that has
    no such field (TRL's) trains as it always does.
    """

    stop_cv: Amount = 0.015

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="experts with the published stopping rule; hidden states summed with weights searched anew for each preference",
        source="EMORL (2505.02579), paper and the authors' code",
        differs=_DIFFERS + "; in the stopping rule rewards count as shares of their declared ranges",
        hides=_HIDES,
        trainings="M",
        forwards_per_token="M",
        zero_shot=False,
    )

    def _learner(self, learner: Learner) -> Learner:
        stops = any(field.name == "stop_cv" for field in dataclasses.fields(learner))
        return dataclasses.replace(learner, stop_cv=self.stop_cv) if stops else learner  # type: ignore[call-arg]
