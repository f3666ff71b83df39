"""Calibrated aggregation: the map from preferences to gates is learned on training prompts, once, and answers every preference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import SPLIT, Card, OnExperts, adapters_for, vertex_trainings
from paretune.methods.search import SEARCHERS, simplex_lattice
from paretune.objectives.utilities import linear
from paretune.policy.base import Policy, build_policy
from paretune.policy.family import Family
from paretune.policy.returns import KNOWN, metered, returns_of
from paretune.policy.rules import Interpolated, rows_of
from paretune.registry import METHODS
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.tasks.preferences import KEEP_OUT
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact

__all__ = ["Calibrated", "Calibration", "calibrate", "outer_returns"]

Returns = Callable[[np.ndarray], np.ndarray]
"""Gates (K,) -> returns (M,), KL included; NaN where more than a tenth of the responses were not scored in that objective."""


def outer_returns(task: Task, policy: Policy, *, samples: int, seed: int) -> Returns:
    """What the mixed policy earns on the training prompts: exact where the task is exact, else from `samples` responses, shared noise.

    What is unscored is left out, as in EMORL's score; where that is more than a tenth, the return is unknown.
    """
    measured = returns_of(task, policy, SPLIT, samples=samples, seed=seed_for(seed, "outer level"))

    def run(gates_K: np.ndarray) -> np.ndarray:
        made = measured.at(gates_K[None])
        share_M = (~np.isnan(made.rewards_WSM[0])).mean(0)
        # Where all is scored, the mean as it always was: the other sum may differ in its last digit, and searches compare.
        known_M = np.where(share_M == 1, made.returns_WSM[0].mean(0), made.means_WM[0])
        return np.where(share_M >= KNOWN, known_M, np.nan)

    return run


@dataclass(frozen=True)
class Calibration:
    """Gates at some preferences, vertices first, and the distinct gates that were run to find them."""

    w_WM: np.ndarray
    gates_WK: np.ndarray
    evaluations: int
    unscored: int  # of those, how many left an objective without a return


def calibrate(returns: Returns, w_WM: np.ndarray, *, search: str, budget: int) -> Calibration:
    """Search gates for every preference of `w_WM`, whose first rows are the vertices; these keep their experts.

    A run of the mixed policy gives all M returns, so that it serves every preference: first the preferences themselves are run as gates,
    then each preference searches from the best of all these. No search sees another's points, and axes are searched in the order of their
    weights (equal ones in that of their experts' returns), so that neither the order of preferences nor of objectives matters.
    """
    known: dict[bytes, np.ndarray] = {}

    def run(gates_K: np.ndarray) -> np.ndarray:
        name = gates_K.tobytes()
        if name not in known:
            known[name] = returns(gates_K)
        return known[name]

    m = w_WM.shape[1]
    first_WM = np.stack([run(w_M) for w_M in w_WM])
    own_M = np.diagonal(first_WM[:m])
    found = list(np.eye(m))
    for w_M in w_WM[m:]:
        order = np.lexsort((-own_M, -w_M))  # by weight, then by the expert's own return

        def score(sorted_K: np.ndarray, w_M: np.ndarray = w_M, order: np.ndarray = order) -> float:
            gates_K = np.empty(m)
            gates_K[order] = sorted_K
            return float(linear(run(gates_K), w_M))

        first_W = linear(first_WM, w_M)
        start_K = w_M if np.isnan(first_W).all() else w_WM[int(np.nanargmax(first_W))]
        best = SEARCHERS[search](score, m, start=start_K[order], budget=budget)
        gates_K = np.empty(m)
        gates_K[order] = best.best_K
        found.append(gates_K)
    unscored = sum(bool(np.isnan(row_M).any()) for row_M in known.values())
    return Calibration(w_WM=w_WM, gates_WK=np.stack(found), evaluations=len(known), unscored=unscored)


@METHODS.register("calibrated")
@dataclass(frozen=True)
class Calibrated(OnExperts):
    """M experts, one per objective. At a lattice of preferences their gates are searched for J_w on the training prompts; every other
    preference takes the smooth map through what was found. At a vertex the gates are e_k: its expert alone.

    search: "model" and "grid" look in [0, 1]^M, so that the scale of the gates is free; "lattice" keeps their sum. `grid` is the
    published search, 3^M points a level, until the budget is spent.
    """

    mixing: Literal["parameter", "logit", "hidden"] = "logit"
    search: Literal["model", "lattice", "grid"] = "model"
    points: int = 4  # preferences on each edge of the lattice, vertices included; those near judged ones are left out
    budget: int = 60  # evaluations for each preference of the lattice, at most
    samples: int = 64  # responses for each evaluation, where the task is not exact
    smoothing: float = 0.0  # above 0 the map may pass beside what was found, against noise

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="experts mixed with gates that are searched at a few preferences and interpolated between them",
        source="none: ours; a search of the weights on validation utility as in EMORL (2505.02579)",
        differs="one calibration for all preferences instead of a search for each; the scale of the gates is free (but for lattice); a "
        "quadratic model of the score instead of a grid",
        hides="gates are searched on the training prompts; between the preferences of the lattice they are interpolated, and where the "
        "best gates jump that is no good mixture; what mixing loses at the best gates remains",
        trainings="M",
        forwards_per_token="parameter: 1; logit, hidden: M",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def __post_init__(self):
        if self.points < 2 or self.budget < 1 or self.samples < 1 or not self.smoothing >= 0:
            raise ConfigError(
                "method calibrated: points is at least 2 (the vertices), budget and samples at least 1, smoothing at least 0",
                found=f"points = {self.points}, budget = {self.budget}, samples = {self.samples}, smoothing = {self.smoothing}",
                remedy="`paretune show calibrated` prints the defaults",
            )

    def preferences(self, task: Task) -> np.ndarray:
        """(W, M) where gates are searched, vertices first: the lattice without what is near a judged preference."""
        m = task.objectives.count
        w_WM = simplex_lattice(m, self.points)
        gap_W = np.abs(w_WM[:, None] - task.judged()[None]).max(-1).min(1)
        return w_WM[(gap_W > KEEP_OUT) | (np.arange(len(w_WM)) < m)]

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for(vertex_trainings(task, learner, seed), done)
        policy = build_policy(task, self.mixing, adapters)
        with metered() as meter:
            returns = outer_returns(task, policy, samples=self.samples, seed=seed)
            found = calibrate(returns, self.preferences(task), search=self.search, budget=self.budget)
        rule = Interpolated(w_WM=rows_of(found.w_WM), gates_WK=rows_of(found.gates_WK), smoothing=self.smoothing)
        meta = {"calibration": {"preferences": len(found.w_WM), "evaluations": found.evaluations, "unscored": found.unscored}}
        return self.family(task, policy, rule, adapters, seed, meta=meta, search_cost=meter.cost)
