"""Optimistic linear support: train next where a set of policies could be missing most, and stop where that is little."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError, TrainingError
from paretune.evaluation.metrics import MIN_GAIN
from paretune.methods.base import Card, Method, adapters_for, training
from paretune.methods.search import simplex_lattice
from paretune.methods.sweep import near_judged
from paretune.policy.base import build_policy
from paretune.policy.family import Family
from paretune.policy.returns import metered, returns_of
from paretune.policy.rules import Best, GateRule, Nearest, rows_of
from paretune.registry import METHODS, describe
from paretune.seeds import generator, seed_for
from paretune.tasks.base import Task
from paretune.tasks.preferences import KEEP_OUT
from paretune.training.cost import then
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Cost, canonical_json

__all__ = ["Measured", "OptimisticSupport", "corners", "next_corner", "next_planned", "optimistic"]

GRID = 1000  # preferences are trained at multiples of 1 / GRID, so that keys do not hang on the last bit of a measurement
POWER, STARTS = 12, 12  # of the planner: the worst is nearly a sum of 12th powers; exchanges from 12 starts


@METHODS.register("ols")
@dataclass(frozen=True)
class OptimisticSupport(Method):
    """One training after the other, each where most could be gained; ends at `budget` trainings, or when no preference can gain `eps`.

    `estimate` says what could be gained. "bound" is the published way: the vertices first; what is missing at w is at most the
    largest w . v of any return v that no trained preference would have preferred to its own policy, less the best trained w . J; that is
    largest at a corner, where the best trained policy changes. "curvature" is ours: the policy that is best at v lacks at w, to
    second order, (w - v)' S (w - v) / (2 beta), S being the covariance of rewards under the untrained reference. It knows what a training
    would bring before it is paid for, so the trainings that are left are planned together, to make the worst share of the possible gain
    over the preferences `asked` as large as it can be; of these, the one that helps most is trained, measured, and the rest planned anew.

    `asked` = "judged" plans for the preferences that results are judged at, as a user would who knows what will be asked (it never trains
    at them); "all" for the whole simplex.
    """

    budget: int = 5
    eps: float = 0.01  # in shares of the possible gain; "bound": in units of return
    estimate: Literal["curvature", "bound"] = "curvature"
    asked: Literal["all", "judged"] = "all"
    answer: Literal["best", "nearest"] = "best"
    samples: int = 256  # responses that measure each policy, where returns are not exact

    card: ClassVar[Card] = Card(
        category="multi-policy",
        summary="trains next where the optimistic improvement is largest, given what is trained; the best of the trained policies answers",
        source='optimistic linear support (Roijers, Whiteson & Oliehoek 2015), with estimate = "bound"',
        differs="by default the improvement is estimated from the covariance of rewards instead of bounded, counted in shares of the "
        "possible gain, and the trainings that are left are planned together, without the vertices; preferences are rounded to "
        "0.001 and kept 0.005 away from judged ones; trained policies are taken for optimal",
        hides="trainings come one after the other: the critical path is nearly the total; asked = judged knows which preferences will be "
        "judged; off exact tasks returns come from samples of training prompts, whose noise can stop it early or late",
        trainings="at most budget",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.budget < 1 or not 0 <= self.eps < np.inf or self.samples < 2:
            raise ConfigError(
                "method ols: budget is at least 1, eps at least 0, samples at least 2",
                found=f"budget = {self.budget}, eps = {self.eps:g}, samples = {self.samples}",
                remedy="leave them out for the defaults",
            )
        if self.estimate == "bound" and self.asked != "all":
            raise ConfigError(
                "the bound is looked at on the whole simplex",
                found=f"asked = {self.asked!r} with estimate = 'bound'",
                remedy='use asked = "all", or estimate = "curvature"',
            )

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        task.judged()  # refuses a single objective
        m = task.objectives.count
        if self.estimate == "bound" and self.budget < m:
            raise ConfigError(
                "optimistic linear support begins with every vertex",
                found=f"budget = {self.budget} for {m} objectives",
                remedy=f"a budget of at least {m}, better twice as many",
            )
        specs = [training(task, learner, w_M, seed) for w_M in np.eye(m)] if self.estimate == "bound" else []
        while all(spec.key in done for spec in specs) and len(specs) < self.budget:
            w_M = self._next(task, specs, done, seed)
            if w_M is None:
                break
            specs.append(training(task, learner, w_M, seed))
        if not specs:
            raise TrainingError(
                "optimistic support trains where rewards vary among the reference's responses to a prompt",
                found="rewards that hardly do, so that no training seems to gain anything",
                remedy="raise samples where an objective pays rarely, or take method linear, which measures nothing beforehand",
            )
        return specs

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        """Of what was trained, whatever the plan would say now: measured on another machine, its last digits may differ."""
        own = [a.spec.preference for a in done.values() if a.spec.preference is not None]
        specs = [spec for w_M in sorted(own, reverse=True) if (spec := training(task, learner, w_M, seed)).key in done]
        adapters = adapters_for({f"policy-{k}": spec for k, spec in enumerate(specs)}, done)
        points_KM = [spec.preference or () for spec in specs]
        found = [_measured(task, done[spec.key], self.samples, seed) for spec in specs]
        best = self.answer == "best"
        rule: GateRule = Best(returns_KM=rows_of([one.returns_M for one in found])) if best else Nearest(points_KM=rows_of(points_KM))
        asked = [] if self.estimate == "bound" else [_measured(task, None, self.samples, seed)]  # the bound does without the reference
        spent = then(one.cost for one in [*asked, *found])
        meta = {"trained_at": [list(w_M) for w_M in points_KM], "trained_at_judged": near_judged(task, np.array(points_KM))}
        return self.family(task, "parameter", rule, adapters, seed, meta=meta, search_cost=spent)

    def _next(self, task: Task, specs: Sequence[TrainSpec], done: Mapping[str, Artifact], seed: int) -> np.ndarray | None:
        m = task.objectives.count
        returns_KM = np.array([_measured(task, done[spec.key], self.samples, seed).returns_M for spec in specs]).reshape(-1, m)
        w_KM = np.array([spec.preference for spec in specs]).reshape(-1, m)
        if self.estimate == "bound":
            return next_corner(returns_KM, w_KM, eps=self.eps, judged_WM=task.judged())
        reference = _measured(task, None, self.samples, seed)
        if not np.isfinite([*reference.returns_M, *reference.covariance_MM.flat]).all():
            raise TrainingError(
                "trainings are planned by how the rewards of the reference's responses vary",
                found="no prompt with two responses that were scored in every objective",
                remedy="repair the objectives, or raise samples",
            )
        return next_planned(
            returns_KM,
            w_KM,
            reference=reference,
            beta=task.beta,
            asked_WM=task.judged() if self.asked == "judged" else _spread(m, 101),
            candidates_CM=_spread(m, 201)[_allowed(_spread(m, 201), task.judged())],
            left=self.budget - len(specs),
            eps=self.eps,
        )


# The published way


def next_corner(returns_KM: np.ndarray, w_KM: np.ndarray, *, eps: float, judged_WM: np.ndarray) -> np.ndarray | None:
    """(M,) the corner at which most could be missing, moved off the judged preferences; None where it is at most `eps`."""
    best, chosen = eps, None
    for w_M in corners(returns_KM):
        at_M = _off_judged(w_M, judged_WM)
        missing = optimistic(returns_KM, w_KM, w_M) - (returns_KM @ w_M).max()
        if missing > best and np.abs(w_KM - at_M).max(1).min() > 0:
            best, chosen = missing, at_M
    return chosen


def corners(returns_KM: np.ndarray) -> np.ndarray:
    """(C, M) the preferences at which the best point changes, to the rim of the simplex: vertices of {(w, u): u >= w . J_k for all k}.

    Between them the best achieved value is linear in w and the bound convex, so that what may be missing is largest at one of them.
    """
    k, m = returns_KM.shape
    rows = np.concatenate([np.hstack([returns_KM, -np.ones((k, 1))]), np.eye(m, m + 1)])
    chosen = np.array([c for c in itertools.combinations(range(k + m), m) if c[0] < k])
    system = np.concatenate([rows[chosen], np.tile(np.append(np.ones(m), 0.0), (len(chosen), 1, 1))], axis=1)
    system = system[np.abs(np.linalg.det(system)) > 1e-12]
    found = np.linalg.solve(system, np.tile(np.append(np.zeros(m), 1.0)[:, None], (len(system), 1, 1)))[..., 0]
    w_CM, u_C = found[:, :m], found[:, m]
    feasible_C = (w_CM > -1e-9).all(1) & (u_C >= (w_CM @ returns_KM.T).max(1) - 1e-9)
    return np.unique(np.abs(w_CM[feasible_C]).round(9), axis=0)


def optimistic(returns_KM: np.ndarray, w_KM: np.ndarray, w_M: np.ndarray) -> float:
    """The largest w . v such that no trained preference prefers v to the best of the trained points."""
    from scipy.optimize import linprog

    known_K = (w_KM @ returns_KM.T).max(1)
    found = linprog(-w_M, A_ub=w_KM, b_ub=known_K, bounds=[(None, None)] * len(w_M), method="highs")
    assert found.status == 0, "the vertices are trained, so the program is bounded"
    return float(-found.fun)


# Ours


def next_planned(
    returns_KM: np.ndarray,
    w_KM: np.ndarray,
    *,
    reference: Measured,
    beta: float,
    asked_WM: np.ndarray,
    candidates_CM: np.ndarray,
    left: int,
    eps: float,
) -> np.ndarray | None:
    """(M,) the most helpful of the `left` candidates that together make the worst share of the possible gain largest; None where
    at most `eps` of it is missing at every preference asked for."""

    def lacks(w_WM: np.ndarray, v_CM: np.ndarray) -> np.ndarray:
        apart_WCM = w_WM[:, None] - v_CM[None]
        return np.einsum("wcj,jk,wck->wc", apart_WCM, reference.covariance_MM, apart_WCM) / (2 * beta)

    start_W = asked_WM @ reference.returns_M
    if len(w_KM):
        lacks_WK = lacks(asked_WM, w_KM)
        near_W = lacks_WK.argmin(1)
        best_W = (asked_WM * returns_KM[near_W]).sum(1) + lacks_WK.min(1)
        missing_W = best_W - (asked_WM @ returns_KM.T).max(1)
    else:
        best_W = start_W + lacks(asked_WM, np.zeros((1, asked_WM.shape[1])))[:, 0]
        missing_W = best_W - start_W
    gain_W = np.maximum(best_W - start_W, MIN_GAIN)
    missing_W = np.maximum(missing_W, 0.0) / gain_W
    if missing_W.max() <= eps:
        return None
    lacks_WC = lacks(asked_WM, candidates_CM) / gain_W[:, None]
    chosen = _together(missing_W, lacks_WC, left)
    helps = [np.maximum(missing_W - lacks_WC[:, c], 0.0).sum() for c in chosen]
    return candidates_CM[chosen[int(np.argmax(helps))]]


def _together(missing_W: np.ndarray, lacks_WC: np.ndarray, count: int) -> list[int]:
    """`count` candidates whose worst lack is smallest: exchanged one by one until none helps, from a greedy start and from random ones."""
    missing_W, lacks_WC = missing_W**POWER, np.minimum(lacks_WC, 10.0) ** POWER
    rng = generator(0, "optimistic support", count)
    best, best_total = [], np.inf
    for start in range(STARTS):
        chosen = rng.choice(lacks_WC.shape[1], count).tolist()
        if start == 0:
            chosen = []
            for _ in range(count):
                covered_W = np.minimum(missing_W, lacks_WC[:, chosen].min(1, initial=np.inf))
                chosen.append(int(np.minimum(covered_W[:, None], lacks_WC).sum(0).argmin()))
        changed = True
        while changed:
            changed = False
            for i in range(count):
                others = chosen[:i] + chosen[i + 1 :]
                covered_W = np.minimum(missing_W, lacks_WC[:, others].min(1, initial=np.inf))
                total_C = np.minimum(covered_W[:, None], lacks_WC).sum(0)
                if total_C.min() < total_C[chosen[i]] * (1 - 1e-9):
                    chosen[i], changed = int(total_C.argmin()), True
        total = np.minimum(missing_W, lacks_WC[:, chosen].min(1)).sum()
        if total < best_total * (1 - 1e-9):
            best, best_total = chosen, total
    return best


# Preferences


def _spread(m: int, points: int) -> np.ndarray:
    """(W, M) preferences all over the simplex, on the grid: `points` of them for two objectives, two to three hundred for more."""
    if m == 2:
        return simplex_lattice(2, points)
    if m <= 4:
        return np.stack([_on_grid(w_M) for w_M in simplex_lattice(m, {3: 21, 4: 10}[m])])
    inner = generator(0, "optimistic support", "spread", m).dirichlet(np.ones(m), size=300)
    return np.concatenate([np.eye(m), np.stack([_on_grid(w_M) for w_M in inner])])


def _on_grid(w_M: np.ndarray) -> np.ndarray:
    """The nearest preference whose weights are multiples of 1 / GRID."""
    scaled_M = w_M / w_M.sum() * GRID
    whole_M = np.floor(scaled_M + 1e-6)
    raise_M = np.argsort(whole_M - scaled_M, kind="stable")[: round(GRID - whole_M.sum())]
    whole_M[raise_M] += 1
    return whole_M / GRID


def _allowed(w_CM: np.ndarray, judged_WM: np.ndarray) -> np.ndarray:
    """(C,) True where no judged preference is within 0.005."""
    return np.abs(w_CM[:, None] - judged_WM[None]).max(-1).min(1) > KEEP_OUT + 0.1 / GRID


def _off_judged(w_M: np.ndarray, judged_WM: np.ndarray) -> np.ndarray:
    """On the grid, and moved along an edge of the simplex, as little as it takes, where it lies too near to a judged preference."""
    edges = [a_M - b_M for a_M, b_M in itertools.permutations(np.eye(len(w_M)) / GRID, 2)]
    for size in range(GRID):
        moved_CM = np.stack([_on_grid(np.maximum(w_M + size * edge_M, 0.0)) for edge_M in edges])
        allowed_C = _allowed(moved_CM, judged_WM)
        if allowed_C.any():
            return moved_CM[allowed_C.argmax()]
    raise AssertionError("judged preferences do not fill the simplex")


# Measuring what is trained


@dataclass(frozen=True)
class Measured:
    """A policy on the training prompts."""

    returns_M: np.ndarray
    covariance_MM: np.ndarray  # of the rewards of one prompt's responses, mean over prompts
    cost: Cost


_MEASURED: dict[tuple[str, ...], Measured] = {}  # a memo: the same arguments always measure the same


def _measured(task: Task, artifact: Artifact | None, samples: int, seed: int) -> Measured:
    """A finished training's policy, or the reference: exact on exact tasks, else from samples."""
    where = "" if artifact is None else str(artifact.path.resolve())
    key = (type(task).__qualname__, canonical_json(describe(task)), where, "" if artifact is None else artifact.key, f"{samples} {seed}")
    if key not in _MEASURED:
        _MEASURED[key] = _measure(task, artifact, samples, seed)
    return _MEASURED[key]


def _measure(task: Task, artifact: Artifact | None, samples: int, seed: int) -> Measured:
    mixing, adapters = ("reference", {}) if artifact is None else ("parameter", {"policy": artifact.path})
    with metered() as meter:
        policy = build_policy(task, mixing, adapters)
        returns = returns_of(task, policy, "train", samples=samples, seed=seed_for(seed, "optimistic support"), each=2)
        gates = None if artifact is None else np.ones(1)
        made = returns.at(np.array([gates]))
        covariance_MM = returns.covariance_MM(gates)
    return Measured(made.means_WM[0], covariance_MM, meter.cost)
