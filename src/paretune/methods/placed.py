"""Adaptive placement: the next expert is trained where the family so far may lose most; neighbors are mixed in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError, TrainingError
from paretune.methods.base import SPLIT, Card, Method, adapters_for, training
from paretune.methods.search import simplex_lattice
from paretune.policy.base import Policy, build_policy
from paretune.policy.family import Family
from paretune.policy.returns import metered, returns_of
from paretune.policy.rules import Barycentric, barycentric_gates, rows_of
from paretune.registry import METHODS
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.tasks.preferences import KEEP_OUT
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Cost

__all__ = ["Placed", "optimistic_regret"]


def optimistic_regret(values_K: np.ndarray, gates_WK: np.ndarray, utility_W: np.ndarray) -> np.ndarray:
    """(W,) at most how much there is to gain at each preference: sum_k g_k V_k - U(w).

    The best utility is convex in w (a maximum of linear functions), so between trained preferences it lies below the interpolation of
    its values there. `values_K` are the trained policies' own utilities, which stand for the best ones.

    Source: the bound of optimistic linear support (Roijers 2016), on one cell. Differs: measured utilities stand for optimal ones.
    Hides: where trainings fall short of their optimum the bound may be below what is possible.
    """
    return np.where(gates_WK > 0, gates_WK * values_K, 0).sum(1) - utility_W  # NaN, unscored, only where it has a share


@METHODS.register("placed")
@dataclass(frozen=True)
class Placed(Method):
    """Experts at the vertices and at `more` preferences, each chosen where the family so far has the largest optimistic regret.

    Candidates are a lattice with `points` per edge, without what lies near a judged preference. mixing: "logit" mixes neighbors token by
    token, "parameter" is their exact soup. samples: responses per candidate where the task is not exact.
    """

    more: int = 1
    mixing: Literal["logit", "parameter"] = "logit"
    points: int = 9
    samples: int = 64

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="experts at the vertices and wherever the family so far may lose most; the neighbors of a preference are mixed",
        source="ours; mixing as in MOD (2406.18853), the bound from optimistic linear support (Roijers 2016)",
        differs="experts at mixed preferences beside those of single objectives; gates are the preference's place among its neighbors",
        hides="every expert more is a training more, one wave after the other, and with mixing logit a forward more per token (all run, "
        "though at most M have a gate); candidates are measured on training prompts",
        trainings="M + more",
        forwards_per_token="logit: M + more; parameter: 1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.more < 0 or self.points < 3 or self.samples < 1:
            raise ConfigError(
                "method placed: more is at least 0, points at least 3, samples at least 1",
                found=f"more = {self.more}, points = {self.points}, samples = {self.samples}",
                remedy="more = 1 adds one expert between the vertices",
            )

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return list(self.placement(task, learner, done, seed)[0].values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        specs, cost = self.placement(task, learner, done, seed)
        rule = Barycentric(points_KM=rows_of([spec.preference or () for spec in specs.values()]))
        meta = {"placed_at": [list(p) for p in rule.points_KM]}
        return self.family(task, self.mixing, rule, adapters_for(specs, done), seed, meta=meta, search_cost=cost)

    def placement(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> tuple[dict[str, TrainSpec], Cost]:
        """The trainings of this and all earlier waves, and what choosing them cost."""
        specs = {f"expert-{k}": training(task, learner, e_M, seed) for k, e_M in enumerate(np.eye(task.objectives.count))}
        candidates_WM = self._candidates(task)
        with metered() as meter:
            for _ in range(self.more):
                if any(spec.key not in done for spec in specs.values()):
                    break
                points_KM = np.array([spec.preference for spec in specs.values()])
                left_WM = candidates_WM[np.abs(candidates_WM[:, None] - points_KM).max(-1).min(-1) > 1e-9]
                policy = build_policy(task, self.mixing, adapters_for(specs, done))
                gates_WK = np.concatenate([np.eye(len(points_KM)), barycentric_gates(points_KM, left_WM)])
                asked_WM = np.concatenate([points_KM, left_WM])
                utility_W = _utility(task, policy, gates_WK, asked_WM, self.samples, seed)
                k = len(points_KM)
                gain_W = optimistic_regret(utility_W[:k], gates_WK[k:], utility_W[k:])
                if np.isnan(gain_W).all():
                    raise TrainingError(
                        "another expert is placed where its utility would rise most",
                        found="no preference whose objectives were scored",
                        remedy="repair the objectives",
                    )
                specs[f"expert-{k}"] = training(task, learner, left_WM[int(np.nanargmax(gain_W))], seed)
        return specs, meter.cost

    def _candidates(self, task: Task) -> np.ndarray:
        """(W, M) preferences that may be trained at: never near a judged one."""
        w_WM = simplex_lattice(task.objectives.count, self.points)
        kept = w_WM[np.abs(w_WM[:, None] - task.judged()).max(-1).min(-1) > KEEP_OUT]
        if len(kept) < task.objectives.count + self.more:
            raise ConfigError(
                "method placed needs a candidate for every expert",
                found=f"{len(kept)} candidates for {task.objectives.count + self.more} experts",
                remedy="raise points",
            )
        return kept


def _utility(task: Task, policy: Policy, gates_WK: np.ndarray, w_WM: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(W,) J_w on training prompts: exact where the task is, else from samples with shared noise."""
    returns = returns_of(task, policy, SPLIT, samples=samples, seed=seed_for(seed, "placement"))
    return np.where(w_WM > 0, w_WM * returns.at(gates_WK).means_WM, 0).sum(1)  # what has no weight may be unscored
