"""How a preference becomes gates: the combination rules that need no training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.registry import RULES

__all__ = ["Backbones", "Best", "Constant", "Identity", "Interpolated", "Nearest", "Rule", "Table"]


class Rule(ABC):
    """Preferences -> gates. Registered in RULES; a frozen dataclass of numbers, so that a family can be written as JSON.

    A rule whose gates depend on the prompt too has also `prompt_gates(w_WM, prompts) -> (W, P, K)`, each prompt by itself. Then `gates`
    is what it does without one.
    """

    registered_name: ClassVar[str]
    version: ClassVar[int]

    @property
    def mixing(self) -> str | Mapping[str, Any]:
        """The level that a learner trains these gates at: a name, or a name with settings."""
        return "parameter"

    @abstractmethod
    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        """(W, K) float64 gates of W preferences."""


@RULES.register("identity")
@dataclass(frozen=True)
class Identity(Rule):
    """Adapter k has the weight of objective k."""

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.array(w_WM, dtype=np.float64)


@RULES.register("nearest")
@dataclass(frozen=True)
class Nearest(Rule):
    """The one adapter that was trained nearest (Euclid) to the preference: `points_KM`; ties go to the first."""

    points_KM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("nearest", "points_KM", self.points_KM)

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.eye(len(self.points_KM))[_nearest_rows(w_WM, self.points_KM)]


@RULES.register("best")
@dataclass(frozen=True)
class Best(Rule):
    """The one adapter whose measured returns `returns_KM` are worth most at the preference; ties go to the first."""

    returns_KM: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        _rectangle("best", "returns_KM", self.returns_KM)

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.eye(len(self.returns_KM))[(np.asarray(w_WM) @ np.asarray(self.returns_KM).T).argmax(1)]


@RULES.register("backbones")
@dataclass(frozen=True)
class Backbones(Rule):
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


@RULES.register("constant")
@dataclass(frozen=True)
class Constant(Rule):
    """The same gates at every preference: one expert, uniform weights."""

    gates_K: tuple[float, ...]

    def __post_init__(self):
        if not np.isfinite(self.gates_K).all():
            raise ConfigError("gates are finite numbers", found=f"gates_K = {list(self.gates_K)}", remedy="give one number per adapter")

    def gates(self, w_WM: np.ndarray) -> np.ndarray:
        return np.tile(np.asarray(self.gates_K, dtype=np.float64), (len(w_WM), 1))


@RULES.register("table")
@dataclass(frozen=True)
class Table(Rule):
    """What a search found: gates at some preferences, `gates_WK` at `w_WM`; any other preference takes the nearest row."""

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


@RULES.register("interpolated")
@dataclass(frozen=True)
class Interpolated(Rule):
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
