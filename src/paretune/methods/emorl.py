"""EMORL: one expert per objective, their last hidden states summed with weights that are searched anew for every preference.

`emorl` trains its own experts with the published stopping rule; `emorl-shared` takes the experts that the other methods share, so
that a comparison shows the outer level alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from paretune.methods.base import Card, Method
from paretune.methods.experts import adapters_for, family_meta, vertex_trainings
from paretune.methods.search import SearchResult, hierarchical_grid, hierarchical_simplex
from paretune.policy.base import build_policy
from paretune.policy.family import Family
from paretune.policy.returns import returns_of
from paretune.policy.rules import Rule, Table
from paretune.registry import METHODS
from paretune.seeds import seed_for
from paretune.training.cost import Cost
from paretune.training.spec import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.policy.base import Policy
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Emorl", "EmorlShared", "SearchedFamily", "SearchedGates", "outer_score"]

CLIP = 1e-4  # the product score takes logarithms of rewards in [CLIP, 1 - CLIP]
SPLIT = "train"  # the outer level sees training prompts only

Scorer = Callable[[np.ndarray, np.ndarray], float]
"""(gates (K,), preference (M,)) -> score."""


def outer_score(task: Task, policy: Policy, *, kind: str, samples: int, seed: int) -> Scorer:
    """What the search maximizes on the training prompts: exact where the task is exact, else `samples` responses with shared noise.

    "linear" is J_w, KL included. "product" is E[sum_k w_k log r_k], each reward scaled to its declared range and clipped to
    [1e-4, 1 - 1e-4], per response and without KL, as in the experts' score of the source. NaN where any response is unscored.
    """
    assert kind in ("linear", "product"), kind
    low_M, high_M = np.asarray(task.objectives.low), np.asarray(task.objectives.high)

    def value(rewards: np.ndarray, w_M: np.ndarray) -> np.ndarray:
        scaled = rewards if kind == "linear" else np.log(np.clip((rewards - low_M) / (high_M - low_M), CLIP, 1 - CLIP))
        return scaled @ w_M

    price = task.beta if kind == "linear" else 0.0
    returns = returns_of(task, policy, SPLIT, samples=samples, seed=seed_for(seed, "outer level"))
    return lambda gates_K, w_M: returns.expected(gates_K, lambda rewards: value(rewards, w_M), price)


class SearchedGates(Rule):
    """Preferences -> gates by a search for each preference that was not asked before; `frozen` is what can be written down."""

    registered_name = "searched"

    def __init__(self, search: Callable[[np.ndarray], tuple[SearchResult, Cost]], first_WM: np.ndarray):
        self._search, self._first_WM = search, first_WM
        self.found: dict[tuple[float, ...], tuple[SearchResult, Cost]] = {}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.stack([self._at(w_M)[0].best_K for w_M in w_WM])

    def cost(self, w_WM: np.ndarray) -> Cost:
        """What the searches for these preferences cost, one after the other, each as if nothing had been searched before."""
        total = Cost()
        for row in {tuple(map(float, w_M)): w_M for w_M in w_WM}.values():
            total = total.then(self._at(row)[1])
        return total

    def frozen(self) -> Table:
        """Everything found so far; where nothing was asked yet, the judged preferences are searched first."""
        if not self.found:
            self.gates(self._first_WM)
        gates_WK = tuple(tuple(map(float, result.best_K)) for result, _ in self.found.values())
        return Table(w_WM=tuple(self.found), gates_WK=gates_WK)

    def _at(self, w_M: np.ndarray) -> tuple[SearchResult, Cost]:
        key = tuple(map(float, w_M))
        if key not in self.found:
            self.found[key] = self._search(np.asarray(w_M, dtype=np.float64))
        return self.found[key]


@dataclass
class SearchedFamily(Family):
    """A family whose rule searches. On disk it is a table of what was found; loaded again, a new preference takes the nearest row."""

    def __post_init__(self):
        """Nothing is asked of the rule here: every question costs a search."""

    def save(self, path: Any) -> None:
        Family(self.policy, self.rule.frozen(), self.objectives, self.base, self.adapters, self.meta).save(path)


class _Emorl(Method):
    score: str
    search: str
    levels: int
    cache: bool
    samples: int

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

        def search(w_M: np.ndarray) -> tuple[SearchResult, Cost]:
            start = time.perf_counter()
            result = searcher(lambda gates_K: score(gates_K, w_M), policy.K, levels=self.levels, cache=self.cache)
            drawn = 0 if task.is_exact else result.evaluations * self.samples
            seconds = time.perf_counter() - start
            return result, Cost(evaluations=result.evaluations, validation_samples=drawn, seconds=seconds)

        meta = family_meta(self, task, seed=seed, experts=range(task.objectives.count))
        rule = SearchedGates(search, task.judged())
        return SearchedFamily(policy, rule, task.objectives, task.base(), adapters, meta)


_DIFFERS = (
    "any number of objectives and any score; one search per preference (the source reports one point); sampling at temperature 1 with "
    "a KV cache (the source decodes greedily without one); the score is J_w with its KL, or the source's product of rewards; "
    "on exact tasks the score is exact"
)
_HIDES = (
    "with one shared linear head this is logit mixing; the weights need not sum to 1, so their scale is a temperature; "
    "the search sees training prompts only and is paid again at every preference; 3^M evaluations per level"
)


@METHODS.register("emorl")
@dataclass(frozen=True)
class Emorl(_Emorl):
    """As published, with its own experts: each stops when its last 20 validation means vary by less than `stop_cv`.

    Learners without a stopping rule (the exact one) train as they always do.
    """

    score: Literal["linear", "product"] = "linear"
    search: Literal["box", "simplex"] = "box"
    levels: int = 5
    cache: bool = False
    samples: int = 64
    stop_cv: float = 0.015

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="experts with the published stopping rule; hidden states summed with weights searched anew for each preference",
        source="EMORL (2505.02579), paper and the authors' code",
        differs=_DIFFERS,
        hides=_HIDES,
        trainings="M",
        forwards_per_token="M",
        zero_shot=False,
    )

    def _learner(self, learner: Learner) -> Learner:
        stops = any(field.name == "stop_cv" for field in dataclasses.fields(learner))
        return dataclasses.replace(learner, stop_cv=self.stop_cv) if stops else learner  # type: ignore[call-arg]


@METHODS.register("emorl-shared")
@dataclass(frozen=True)
class EmorlShared(_Emorl):
    """The same outer level on the experts that the other methods use: compare this one."""

    score: Literal["linear", "product"] = "linear"
    search: Literal["box", "simplex"] = "box"
    levels: int = 5
    cache: bool = False
    samples: int = 64

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
