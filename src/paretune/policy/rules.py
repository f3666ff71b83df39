"""Gate rules: how a preference becomes gates. Every rule of Paretune stands here, but for those that look at the prompt (`contextual`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.registry import GATE_RULES
from paretune.types import Amount, Cost, Count, Natural, Prompt

__all__ = [
    "Backbones",
    "Barycentric",
    "Best",
    "BridgeRule",
    "Constant",
    "ExtendedRule",
    "GateRule",
    "Identity",
    "Interpolated",
    "Nearest",
    "PromptedRule",
    "RouterRule",
    "Searched",
    "SharedRule",
    "StudentRule",
    "Table",
    "TiedRule",
    "barycentric_gates",
    "interaction",
    "rows_of",
]


class GateRule(ABC):
    """Preferences -> gates. Registered in GATE_RULES; a frozen dataclass of numbers, so that a family can be written as JSON.

    `gates` is all that a rule must have. A rule whose gates depend on the prompt, too, overrides `prompt_gates`; then `gates` is what it
    does without one. `paretune.testing.mixings.check_gate_rule` is the contract as a test.
    """

    registered_name: ClassVar[str]
    version: ClassVar[int]
    stepwise: ClassVar[bool] = False  # gates jump between regions of preferences, and are the same within one
    searches: ClassVar[bool] = False  # a preference that was not asked before costs a search

    @property
    def mixing(self) -> str | Mapping[str, Any]:
        """The mixing that a learner trains these gates at: a name, or a name with settings."""
        return "parameter"

    @abstractmethod
    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        """(W, K) float64 gates of W preferences, each by itself."""

    @property
    def per_prompt(self) -> bool:
        """Whether the gates depend on the prompt."""
        return type(self).prompt_gates is not GateRule.prompt_gates

    def prompt_gates(self, w_WM: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        """(W, P, K) gates of W preferences at P prompts, each by itself."""
        return np.repeat(self.gates(w_WM)[:, None], len(prompts), axis=1)

    def cost(self, w_WM: np.ndarray) -> Cost:
        """What the searches for these preferences cost, where a rule searches for each; see `Family.search_cost` for what is paid once."""
        return Cost()

    def frozen(self) -> GateRule:
        """The rule that is written to disk in its place: itself, where it is made of numbers."""
        return self


@GATE_RULES.register("identity")
@dataclass(frozen=True)
class Identity(GateRule):
    """Adapter k has the weight of objective k."""

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.array(w_WM, dtype=np.float64)


@GATE_RULES.register("nearest")
@dataclass(frozen=True)
class Nearest(GateRule):
    """The one adapter that was trained nearest (Euclid) to the preference: `points_KM`; ties go to the first."""

    stepwise: ClassVar[bool] = True
    points_KM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("nearest", "points_KM", self.points_KM)

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.eye(len(self.points_KM))[_nearest_rows(w_WM, self.points_KM)]


@GATE_RULES.register("best")
@dataclass(frozen=True)
class Best(GateRule):
    """The one adapter whose measured returns `returns_KM` are worth most at the preference; ties go to the first."""

    stepwise: ClassVar[bool] = True
    returns_KM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("best", "returns_KM", self.returns_KM)

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.eye(len(self.returns_KM))[(np.asarray(w_WM) @ np.asarray(self.returns_KM).T).argmax(1)]


@GATE_RULES.register("backbones")
@dataclass(frozen=True)
class Backbones(GateRule):
    """Gates of adapters that were trained at the mixed preferences `points_KM` (K = M): the x that solves points^T x = w.

    Where w lies outside of what the points span, gates are negative or above 1: the soup extrapolates. They sum to 1, times
    1 + `extrapolation`, which moves the soup further away from the reference.
    """

    points_KM: tuple[tuple[float, ...], ...]
    extrapolation: float = 0.0

    def __post_init__(self):
        _rectangle("backbones", "points_KM", self.points_KM)
        points = np.asarray(self.points_KM)
        if points.shape[0] != points.shape[1] or np.linalg.cond(points) > 1e6:
            raise ConfigError(
                "backbones: points_KM is one preference per objective, and none is a mixture of the others",
                found=f"{points.shape[0]} points for {points.shape[1]} objectives, condition {np.linalg.cond(points):.3g}",
                remedy="give every objective a backbone of its own, away from equal weights",
            )
        if not self.extrapolation > -1:
            raise ConfigError("backbones: extrapolation is above -1", found=f"extrapolation = {self.extrapolation:g}", remedy="0 adds none")

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        inverse = np.linalg.inv(np.asarray(self.points_KM, dtype=np.float64).T)
        # einsum, not a matrix product, whose rounding depends on how many rows there are
        return (1 + self.extrapolation) * np.einsum("km,wm->wk", inverse, np.asarray(w_WM, dtype=np.float64))


@GATE_RULES.register("constant")
@dataclass(frozen=True)
class Constant(GateRule):
    """The same gates at every preference: one expert, uniform weights."""

    stepwise: ClassVar[bool] = True
    gates_K: tuple[float, ...]

    def __post_init__(self):
        if not np.isfinite(self.gates_K).all():
            raise ConfigError("gates are finite numbers", found=f"gates_K = {list(self.gates_K)}", remedy="give one number per adapter")

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.tile(np.asarray(self.gates_K, dtype=np.float64), (len(w_WM), 1))


@GATE_RULES.register("table")
@dataclass(frozen=True)
class Table(GateRule):
    """What a search found: gates at some preferences, `gates_WK` at `w_WM`; any other preference takes the nearest row."""

    stepwise: ClassVar[bool] = True
    w_WM: tuple[tuple[float, ...], ...]
    gates_WK: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("table", "w_WM", self.w_WM)
        _rectangle("table", "gates_WK", self.gates_WK)
        if len(self.w_WM) != len(self.gates_WK):
            raise ConfigError(
                "a table has one row of gates per preference",
                found=f"{len(self.w_WM)} preferences, {len(self.gates_WK)} rows of gates",
                remedy="give one row each",
            )

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.asarray(self.gates_WK, dtype=np.float64)[_nearest_rows(w_WM, self.w_WM)]


@GATE_RULES.register("interpolated")
@dataclass(frozen=True)
class Interpolated(GateRule):
    """A smooth map through gates that were found at some preferences, one adapter per objective; exact at the vertices, in [0, 1].

    gates(w) = w + sum_i c_i |w - w_i|^3 + a linear part, so a line where the gates found are w itself: the natural cubic spline for two
    objectives, its like for more. With `smoothing` above 0 it may pass beside the gates found, but at a vertex never.
    """

    w_WM: tuple[tuple[float, ...], ...]
    gates_WK: tuple[tuple[float, ...], ...]
    smoothing: float = 0.0

    def __post_init__(self):
        _rectangle("interpolated", "w_WM", self.w_WM)
        _rectangle("interpolated", "gates_WK", self.gates_WK)
        shapes = [np.shape(self.w_WM), np.shape(self.gates_WK)]
        vertices = {int(np.argmax(w_M)) for w_M in self.w_WM if max(w_M) == 1.0}
        distinct = len(set(self.w_WM)) == len(self.w_WM)
        if shapes[0] != shapes[1] or len(vertices) != shapes[0][1] or not distinct or not self.smoothing >= 0:
            raise ConfigError(
                "interpolated: distinct preferences with all vertices, a gate for each objective at each, smoothing of at least 0",
                found=f"preferences {shapes[0]}, gates {shapes[1]}, smoothing {self.smoothing}",
                remedy="give one row of gates per preference, and those of every vertex",
            )

    @cached_property
    def _spline(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centers (W, M), their coefficients (W, K) and the linear part (M, K)."""
        w_WM, gates_WK = np.asarray(self.w_WM), np.asarray(self.gates_WK)
        count, m = w_WM.shape
        cubes_WW = (((w_WM[:, None] - w_WM[None]) ** 2).sum(-1)) ** 1.5
        slack_W = np.where(w_WM.max(1) == 1.0, 0.0, self.smoothing)
        system = np.block([[cubes_WW + np.diag(slack_W), w_WM], [w_WM.T, np.zeros((m, m))]])
        solved = np.linalg.solve(system, np.concatenate([gates_WK - w_WM, np.zeros((m, m))]))
        return w_WM, solved[:count], solved[count:]

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        centres_WM, cubes_WK, linear_MK = self._spline
        rows = []
        for w_M in np.asarray(w_WM, dtype=np.float64):  # row by row: the same bits in any batch
            near_W = (((centres_WM - w_M) ** 2).sum(1)) ** 1.5
            rows.append(w_M + near_W @ cubes_WK + w_M @ linear_MK)
        return np.clip(np.array(rows).reshape(-1, centres_WM.shape[1]), 0.0, 1.0)


@GATE_RULES.register("barycentric")
@dataclass(frozen=True)
class Barycentric(GateRule):
    """Expert k was trained at `points_KM[k]`; a preference is mixed of the corners of the cell that holds it."""

    points_KM: tuple[tuple[float, ...], ...]

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return barycentric_gates(np.asarray(self.points_KM), w_WM)


@GATE_RULES.register("bridge")
@dataclass(frozen=True)
class BridgeRule(GateRule):
    """Gates of M experts and one bridge: the preference, and its `interaction`."""

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(w_WM, dtype=np.float64), interaction(w_WM)], axis=1)


@GATE_RULES.register("extended")
@dataclass(frozen=True)
class ExtendedRule(GateRule):
    """Gates of M experts, the old family's bridge, and the new one; `new` is the place of the added objective.

    With o the weights of the old objectives, m of them: the old bridge has m/(m-1) * ((sum o)^2 - sum o^2), which is its own gate where
    the added objective has no weight; the new one has 4 v (1 - v), v the weight of the added objective, which is 0 there. A single old
    objective has no bridge. `stage` "old" is what the old family was trained under: its experts and its bridge.
    """

    new: Natural
    stage: str = "new"  # "old": without the new bridge

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        w_WM = np.asarray(w_WM, dtype=np.float64)
        old_WM = np.delete(w_WM, self.new, axis=1)
        m = old_WM.shape[1]
        added_W1 = w_WM[:, self.new : self.new + 1]
        new_W1 = 4.0 * added_W1 * (1.0 - added_W1)
        if m == 1:
            return np.concatenate([w_WM, new_W1], axis=1)
        old_W1 = m / (m - 1) * (old_WM.sum(1, keepdims=True) ** 2 - (old_WM**2).sum(1, keepdims=True))
        if self.stage == "old":
            return np.concatenate([old_WM, old_W1], axis=1)
        return np.concatenate([w_WM, old_W1, new_W1], axis=1)


@GATE_RULES.register("student")
@dataclass(frozen=True)
class StudentRule(GateRule):
    """No gate for the first `teachers` adapters, then those of a bridge: how a student samples while its teachers stand beside it."""

    teachers: Count

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((len(w_WM), self.teachers)), BridgeRule().gates(w_WM)], axis=1)


@GATE_RULES.register("shared")
@dataclass(frozen=True)
class SharedRule(GateRule):
    """Gate 1 for the adapter that all preferences share, then `scale` times the preference for those of the objectives."""

    scale: Amount = 1.0

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        w_WM = np.asarray(w_WM, dtype=np.float64)
        return np.concatenate([np.ones((len(w_WM), 1)), self.scale * w_WM], axis=1)


@GATE_RULES.register("tied")
@dataclass(frozen=True)
class TiedRule(GateRule):
    """Gate 1 for the adapter that all preferences share, then the preference. Trainings under it tie the others' factors."""

    seed: int = 0

    @property
    def mixing(self) -> Mapping[str, Any]:
        """The mixing at which a training under this rule runs."""
        return {"name": "tied", "own": 1, "seed": self.seed}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return SharedRule().gates(w_WM)


@GATE_RULES.register("router")
@dataclass(frozen=True)
class RouterRule(GateRule):
    """The gates that a router starts from: the preference, and with `bridge` its `interaction`. Trainings under it train a router."""

    experts: Count
    width: Count = 32
    seed: int = 0
    bridge: bool = False

    @property
    def mixing(self) -> Mapping[str, Any]:
        """The mixing at which a training under this rule runs."""
        return {"name": "routed", "experts": self.experts, "width": self.width, "seed": self.seed}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        w_WM = np.array(w_WM, dtype=np.float64)
        return np.concatenate([w_WM, interaction(w_WM)], axis=1) if self.bridge else w_WM


@GATE_RULES.register("prompted")
@dataclass(frozen=True)
class PromptedRule(GateRule):
    """The preference itself, for a policy that reads it as text; see the mixing "prompted"."""

    objectives: Count
    digits: Count = 2

    @property
    def mixing(self) -> Mapping[str, Any]:
        return {"name": "prompted", "objectives": self.objectives, "digits": self.digits}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.array(w_WM, dtype=np.float64)


class Searched(GateRule):
    """Gates by a search for each preference that was not asked before. On disk it is a table of what was found.

    `search` gives the gates (K,) of a preference, and what finding them cost. `first_WM` are searched before it is written down, where
    nothing was asked yet.
    """

    registered_name = "searched"
    stepwise = True
    searches = True

    def __init__(self, search: Callable[[np.ndarray], tuple[np.ndarray, Cost]], first_WM: np.ndarray):
        self._search, self._first_WM = search, first_WM
        self._found: dict[tuple[float, ...], tuple[np.ndarray, Cost]] = {}

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.stack([self._at(w_M)[0] for w_M in w_WM])

    def cost(self, w_WM: np.ndarray) -> Cost:
        """The searches one after the other, each as if nothing had been searched before."""
        total = Cost()
        for row in {tuple(map(float, w_M)): w_M for w_M in w_WM}.values():
            total = total.then(self._at(row)[1])
        return total

    def frozen(self) -> Table:
        if not self._found:
            self.gates(self._first_WM)
        return Table(w_WM=tuple(self._found), gates_WK=rows_of([gates_K for gates_K, _ in self._found.values()]))

    def _at(self, w_M: np.ndarray) -> tuple[np.ndarray, Cost]:
        key = tuple(map(float, w_M))
        if key not in self._found:
            self._found[key] = self._search(np.asarray(w_M, dtype=np.float64))
        return self._found[key]


def rows_of(array: np.ndarray | Sequence[Sequence[float]] | Sequence[np.ndarray]) -> tuple[tuple[float, ...], ...]:
    """A table of numbers as a rule's field holds it."""
    return tuple(tuple(map(float, row)) for row in array)


def interaction(w_WM: np.ndarray) -> np.ndarray:
    """(W, 1) how far a preference is from all vertices: M/(M-1) * (1 - sum w_k^2), 0 at the vertices and 1 at the center."""
    w_WM = np.asarray(w_WM, dtype=np.float64)
    m = w_WM.shape[1]
    return m / (m - 1) * (1.0 - (w_WM**2).sum(1, keepdims=True))


def barycentric_gates(points_KM: np.ndarray, w_WM: np.ndarray) -> np.ndarray:
    """(W, K) gates >= 0 that sum to 1 with sum_k g_k p_k = w, on the corners of one cell of the points' triangulation.

    For two objectives these are the two neighbors; for more, the corners of the Delaunay cell that holds w. The vertices of the
    simplex must be among the points.
    """
    points_KM, w_WM = np.asarray(points_KM, dtype=np.float64), np.asarray(w_WM, dtype=np.float64)
    gates_WK = np.zeros((len(w_WM), len(points_KM)))
    if points_KM.shape[1] == 2:
        order = np.argsort(points_KM[:, 0])
        x_K = points_KM[order, 0]
        right_W = np.clip(np.searchsorted(x_K, w_WM[:, 0]), 1, len(x_K) - 1)
        share_W = (w_WM[:, 0] - x_K[right_W - 1]) / (x_K[right_W] - x_K[right_W - 1])
        rows = np.arange(len(w_WM))
        gates_WK[rows, order[right_W - 1]] = 1 - share_W
        gates_WK[rows, order[right_W]] = share_W
        return gates_WK
    from scipy.spatial import Delaunay

    cells = Delaunay(points_KM[:, :-1]).simplices
    # Between points of a lattice some cells are flat: their equations have no solution, and they hold nothing that others do not.
    cells = cells[np.linalg.matrix_rank(points_KM[cells], tol=1e-9) == points_KM.shape[1]]
    for row, w_M in enumerate(w_WM):
        best: tuple[float, np.ndarray, np.ndarray] | None = None
        for corners in cells:
            share_M = np.linalg.lstsq(points_KM[corners].T, w_M, rcond=None)[0]
            inside = float(share_M.min())
            if best is None or inside > best[0]:  # the cell that holds it; on a face shared by two, the first
                best = (inside, corners, share_M)
        assert best is not None
        gates_WK[row, best[1]] = np.clip(best[2], 0.0, None) / np.clip(best[2], 0.0, None).sum()
    return gates_WK


def _nearest_rows(w_WM: np.ndarray, points_KM: tuple[tuple[float, ...], ...]) -> np.ndarray:
    distance_WK = ((np.asarray(w_WM)[:, None] - np.asarray(points_KM)[None]) ** 2).sum(-1)
    return distance_WK.argmin(1)


def _rectangle(rule: str, field: str, rows: tuple[tuple[float, ...], ...]) -> None:
    if not rows or len({len(row) for row in rows}) != 1 or not all(np.isfinite(row).all() for row in rows):
        raise ConfigError(
            f"{rule}: {field} is a table of finite numbers with rows of one length",
            found=f"{len(rows)} rows of lengths {sorted({len(row) for row in rows})}",
            remedy="give at least one row, all of one length",
        )
