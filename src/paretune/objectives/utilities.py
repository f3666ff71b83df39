"""What a user may want other than w . J: scalarizers of single responses, and concave utilities of expected returns.

A scalarizer turns the rewards of one response into one number. A `TrainSpec` names it as `{"name": ..., field: value}`; `linear` is the
default and the only one whose optimum the exact tasks know. The KL penalty is no part of it: the learner subtracts it afterwards.

A utility is a function of J. J_k is a regularized return, E[r_k] - beta KL, of the whole policy. Every utility here rises with each J_k
and is concave in J, so that its best policy is pi*_lambda for some weights lambda >= 0: those of the utility's gradient at the optimum.
Only the direction of lambda counts, since every J_k contains the KL penalty: sum_k lambda_k J_k = (sum lambda) (w . J) with
w = lambda / sum lambda, and the same beta.

An objective whose weight in the preference is 0 is left out, so that at a vertex every utility here, but for `constrained`, is that of
the single objective, and its optimum the expert. Returns are measured in units of the objective's declared range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError, nearest
from paretune.registry import Registry
from paretune.types import is_number

__all__ = [
    "Constrained",
    "Dual",
    "Landmarks",
    "LogProduct",
    "LogSum",
    "MaxMin",
    "SCALARIZERS",
    "Tchebycheff",
    "UTILITIES",
    "Utility",
    "check_scalarizer",
    "linear",
    "log_product",
    "scalarize",
]


def linear(rewards_NM: np.ndarray, w_NM: np.ndarray) -> np.ndarray:
    """(N,) weighted sums; NaN where any objective with a positive weight is NaN.

    Source: the usual scalarization ("MORLHF").
    Differs: nothing.
    Hides: the objective with the larger spread dominates; only the convex part of a front can be reached without regularization.
    """
    return np.where(w_NM > 0, w_NM * rewards_NM, 0.0).sum(-1)


def log_product(
    rewards_NM: np.ndarray,
    w_NM: np.ndarray,
    *,
    low_M: np.ndarray,
    high_M: np.ndarray,
    floor: float = 1e-4,
    ceiling: float = 0.9999,
) -> np.ndarray:
    """(N,) sum_k w_k log clip(r_k, floor, ceiling), each r_k first mapped from [low, high] to [0, 1]; NaN as in `linear`.

    Source: DynaOpt (2403.13578) and EMORL (2505.02579), where rewards lie in [0, 1].
    Differs: objectives with another range are mapped to [0, 1].
    Hides: a reward at its low costs log(floor) = -9.2, so one bad objective outweighs everything else.
    """
    unit_NM = np.clip((rewards_NM - low_M) / (high_M - low_M), floor, ceiling)
    return linear(np.log(unit_NM), w_NM)


SCALARIZERS: Mapping[str, Callable[..., np.ndarray]] = {"linear": linear, "log_product": log_product}


def check_scalarizer(scalarizer: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `scalarize` can use it."""
    name = str(scalarizer.get("name", ""))
    if name not in SCALARIZERS:
        raise ConfigError("a scalarizer is known by its name", found=repr(name), remedy=nearest(name, SCALARIZERS))
    fields = SCALARIZERS[name].__kwdefaults__ or {}
    for field in scalarizer:
        if field not in ("name", *fields):
            known = ", ".join(fields) or "none"
            raise ConfigError(f"scalarizer {name} has the fields that it declares", found=repr(field), remedy=f"its fields: {known}")
    low, high = scalarizer.get("floor", 1e-4), scalarizer.get("ceiling", 0.9999)
    if not (is_number(low) and is_number(high) and 0 < low < high <= 1):
        raise ConfigError(
            "0 < floor < ceiling <= 1", found=f"floor={low!r}, ceiling={high!r}", remedy="leave them out for the published 1e-4 and 0.9999"
        )


def scalarize(
    rewards_NM: np.ndarray, w_NM: np.ndarray, scalarizer: Mapping[str, Any], *, low_M: np.ndarray, high_M: np.ndarray
) -> np.ndarray:
    """(N,) one number per response, NaN where it cannot be said. `low_M` and `high_M` are the objectives' ranges."""
    fields = {name: value for name, value in scalarizer.items() if name != "name"}
    if scalarizer["name"] == "linear":
        return linear(rewards_NM, w_NM)
    return SCALARIZERS[scalarizer["name"]](rewards_NM, w_NM, low_M=low_M, high_M=high_M, **fields)


UTILITIES = Registry("utility", "paretune.objectives")


@dataclass(frozen=True)
class Landmarks:
    """Where a utility's zero lies, (M,) each. `ideal_M` and `reference_M` are exact on exact tasks only."""

    low_M: np.ndarray
    high_M: np.ndarray
    ideal_M: np.ndarray  # the largest J_k that any policy has
    reference_M: np.ndarray  # J of the untrained reference


@dataclass(frozen=True)
class Dual:
    """max U(J) = min over q of support(lambda) + conjugate(q), lambda = fixed_M + slope_MQ q, q >= 0, and sum q = 1 where `simplex`.

    `conjugate` gives value, gradient (Q,) and second derivatives (Q,): it is separable. `start_Q` lies inside.
    """

    fixed_M: np.ndarray
    slope_MQ: np.ndarray
    start_Q: np.ndarray
    simplex: bool
    conjugate: Any


class Utility(ABC):
    """A frozen dataclass registered in UTILITIES. `J` arrays are (..., M)."""

    registered_name: ClassVar[str]
    version: ClassVar[int]
    per_objective: ClassVar[str]  # the field with one number per objective
    smooth: ClassVar[bool] = True  # False: it has kinks, its gradient jumps, and multipliers are needed to climb it

    @abstractmethod
    def value(self, J: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        """(...) U(J)."""

    @abstractmethod
    def gradient(self, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        """(M,) dU/dJ, non-negative; at a kink one of the supergradients."""

    @abstractmethod
    def dual(self, w_M: np.ndarray, marks: Landmarks) -> Dual:
        """The problem over weights whose optimum is the utility's optimum."""

    def violation(self, J: np.ndarray, marks: Landmarks) -> np.ndarray | None:
        """(...) the largest shortfall of a constraint, 0 where all are kept; None for a utility without constraints."""
        return None

    def check(self, count: int) -> None:
        """ConfigError where a field does not have one number for each of `count` objectives."""
        given = getattr(self, self.per_objective)
        known = [value for value in given or () if value is not None]
        if given is not None and (len(given) != count or not np.isfinite(known).all()):
            raise ConfigError(
                f"utility {self.registered_name}: {self.per_objective} has one finite number per objective",
                found=f"{list(given)} for {count} objectives",
                remedy=f"give {count} numbers, or leave {self.per_objective} out",
            )


@UTILITIES.register("tchebycheff")
@dataclass(frozen=True)
class Tchebycheff(Utility):
    """Smooth Tchebycheff: U = -mu log sum_k exp(M w_k (z_k - J_k) / mu): the worst weighted distance from the ideal point z, softened.

    z is `ideal` where given; else, on exact tasks, the largest return of each objective, and elsewhere the upper end of its range.

    Source: smooth Tchebycheff scalarization (2402.19078), at the level of expected returns. Differs: distances are in units of
    each objective's range, weights are shares M w_k, so that U is in units of a return, and an objective with weight 0 is left out
    instead of adding a constant. Hides: mu softens the worst case: U lies up to mu log M below it; where the ideal point is the
    end of the range and far away, the optimum is nearly that of equal w_k (z_k - J_k), whatever the front looks like.
    """

    mu: float = 0.01
    ideal: tuple[float, ...] | None = None
    per_objective: ClassVar[str] = "ideal"

    def __post_init__(self):
        if not 1e-6 <= self.mu <= 1e3:
            raise ConfigError(
                "utility tchebycheff: mu lies between 1e-6 and 1e3", found=f"mu = {self.mu:g}", remedy="for example mu = 0.01"
            )

    def value(self, J: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        z_M, share_M, on_M = self._terms(w_M, marks)
        return -self.mu * np.logaddexp.reduce((share_M * (z_M - J) / self.mu)[..., on_M], axis=-1)

    def gradient(self, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        z_M, share_M, on_M = self._terms(w_M, marks)
        exponent_M = np.where(on_M, share_M * (z_M - J_M) / self.mu, -np.inf)
        worst_M = np.exp(exponent_M - exponent_M.max())
        return share_M * worst_M / worst_M.sum()

    def dual(self, w_M: np.ndarray, marks: Landmarks) -> Dual:
        z_M, share_M, on_M = self._terms(w_M, marks)
        slope_MQ = np.diag(share_M)[:, on_M]
        linear_Q = z_M @ slope_MQ

        def conjugate(q: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            logs = np.log(q)
            return float(self.mu * q @ logs - linear_Q @ q), self.mu * (logs + 1) - linear_Q, self.mu / q

        return Dual(np.zeros(len(w_M)), slope_MQ, np.full(on_M.sum(), 1 / on_M.sum()), True, conjugate)

    def _terms(self, w_M: np.ndarray, marks: Landmarks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z_M = marks.ideal_M if self.ideal is None else np.asarray(self.ideal)
        return z_M, len(w_M) * w_M / (marks.high_M - marks.low_M), w_M > 0


@UTILITIES.register("max-min")
@dataclass(frozen=True)
class MaxMin(Utility):
    """Worst case: U = min over k of (J_k - b_k) / (M w_k): the smallest gain, each counted in shares of its weight.

    The optimum lies where the ray from b in the direction w meets the front, where all gains are as w asks; at uniform w it is the largest
    smallest gain. b is `base` where given, else the return of the untrained reference.

    Source: max-min alignment (MaxMin-RLHF, 2402.08925) has equal weights; the ray is the proportional solution of bargaining (Kalai
    1977). Differs: the preference scales the gains. Hides: a tiny weight still demands a gain that is not negative, while a
    weight of 0 demands nothing; where no policy gains everywhere (a constant objective) the reference itself is the optimum.
    """

    base: tuple[float, ...] | None = None
    per_objective: ClassVar[str] = "base"
    smooth: ClassVar[bool] = False

    def value(self, J: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        b_M, share_M, on_M = self._terms(w_M, marks)
        return ((J - b_M)[..., on_M] / share_M[on_M]).min(-1)

    def gradient(self, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        b_M, share_M, on_M = self._terms(w_M, marks)
        gain_M = np.where(on_M, (J_M - b_M) / np.where(on_M, share_M, 1.0), np.inf)
        return np.eye(len(w_M))[gain_M.argmin()] / share_M[gain_M.argmin()]

    def base_M(self, marks: Landmarks) -> np.ndarray:
        """(M,) b."""
        return marks.reference_M if self.base is None else np.asarray(self.base)

    def dual(self, w_M: np.ndarray, marks: Landmarks) -> Dual:
        b_M, share_M, on_M = self._terms(w_M, marks)
        slope_MQ = np.diag(1 / np.where(on_M, share_M, 1.0))[:, on_M]
        return Dual(np.zeros(len(w_M)), slope_MQ, np.full(on_M.sum(), 1 / on_M.sum()), True, _linear(-(b_M @ slope_MQ)))

    def _terms(self, w_M: np.ndarray, marks: Landmarks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.base_M(marks), len(w_M) * w_M * (marks.high_M - marks.low_M), w_M > 0


@UTILITIES.register("log-sum")
@dataclass(frozen=True)
class LogSum(Utility):
    """The product of returns: U = sum_k w_k log((J_k - low_k) / range_k), whose gradient is w_k / (J_k - low_k).

    low is `base` where given, else the lower end of each objective's range. Below `floor` of the range the logarithm goes on as its
    tangent, so that U stays finite and concave.

    Source: Nash's bargaining product; per response in DynaOpt (2403.13578) and EMORL (2505.02579), see `log-product`. Differs: the
    product is of expected returns. Hides: far above its low an objective is almost linear, so that this differs little from w . J.
    """

    base: tuple[float, ...] | None = None
    floor: float = 1e-3
    per_objective: ClassVar[str] = "base"

    def __post_init__(self):
        if not 1e-9 <= self.floor < 1:
            raise ConfigError(
                "utility log-sum: floor lies between 1e-9 and 1", found=f"floor = {self.floor:g}", remedy="leave it out for 1e-3"
            )

    def value(self, J: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        unit = self._unit(J, marks)
        above = np.maximum(unit, self.floor)
        return (w_M * (np.log(above) + (unit - above) / self.floor)).sum(-1)

    def gradient(self, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        return w_M / np.maximum(self._unit(J_M, marks), self.floor) / (marks.high_M - marks.low_M)

    def dual(self, w_M: np.ndarray, marks: Landmarks) -> Dual:
        base_M, on_M = self._base(marks), w_M > 0
        scale_M = marks.high_M - marks.low_M
        slope_MQ = np.diag(1 / scale_M)[:, on_M]
        w_Q, linear_Q = w_M[on_M], base_M @ slope_MQ

        def conjugate(q: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            # Where q > w / floor the conjugate of the extended logarithm is infinite; no optimum above the floor comes there.
            return float((w_Q * (np.log(w_Q / q) - 1)).sum() - linear_Q @ q), -w_Q / q - linear_Q, w_Q / q**2

        return Dual(np.zeros(len(w_M)), slope_MQ, w_Q.copy(), False, conjugate)

    def _base(self, marks: Landmarks) -> np.ndarray:
        return marks.low_M if self.base is None else np.asarray(self.base)

    def _unit(self, J: np.ndarray, marks: Landmarks) -> np.ndarray:
        return (J - self._base(marks)) / (marks.high_M - marks.low_M)


@UTILITIES.register("constrained")
@dataclass(frozen=True)
class Constrained(Utility):
    """The largest w . J among the policies with J_k >= c_k.

    c is `thresholds`, one per objective, None where there is none; left out it is the return of the untrained reference plus `margin`
    for every objective: the largest gain at which no objective loses.

    Source: constrained Markov decision processes (Altman 1999); Safe-RLHF (2310.12773) for language models. Differs: thresholds
    bound regularized returns, as everything here does; a plain reward exceeds its return by beta KL. Hides: by how much a
    constraint is broken: the violation stands beside the attainment, which charges it at the optimum's own multipliers.
    """

    thresholds: tuple[float | None, ...] | None = None
    margin: float = 0.0
    per_objective: ClassVar[str] = "thresholds"
    smooth: ClassVar[bool] = False

    def value(self, J: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        """w . J, whether the constraints are kept or not."""
        return (w_M * J).sum(-1)

    def gradient(self, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        return np.array(w_M)

    def violation(self, J: np.ndarray, marks: Landmarks) -> np.ndarray:
        return np.maximum(self.thresholds_M(marks) - J, 0.0).max(-1)

    def thresholds_M(self, marks: Landmarks) -> np.ndarray:
        """(M,) c; -inf where an objective has none."""
        if self.thresholds is None:
            return marks.reference_M + self.margin
        return np.array([-np.inf if c is None else c for c in self.thresholds], dtype=np.float64)

    def dual(self, w_M: np.ndarray, marks: Landmarks) -> Dual:
        c_M = self.thresholds_M(marks)
        on_M = np.isfinite(c_M)
        slope_MQ = np.eye(len(w_M))[:, on_M]
        return Dual(np.array(w_M, dtype=np.float64), slope_MQ, np.ones(on_M.sum()), False, _linear(-c_M[on_M]))


@UTILITIES.register("log-product")
@dataclass(frozen=True)
class LogProduct:
    """The product of single responses' rewards: U = E[sum_k w_k log clip(r_k)] - beta KL; see `log_product`.

    No function of J, hence no `Utility`: the expectation is of the logarithm. It is linear in the policy, so its optimum is closed form.

    Source: the training score of DynaOpt (2403.13578) and EMORL (2505.02579). Differs: the KL penalty is outside of the logarithm.
    Hides: what a policy gains on rare responses with a reward near 0, which outweigh all others.
    """

    floor: float = 1e-4
    ceiling: float = 0.9999
    registered_name: ClassVar[str]
    version: ClassVar[int]

    def __post_init__(self):
        check_scalarizer(self.scalarizer)

    @property
    def scalarizer(self) -> Mapping[str, Any]:
        """As a `TrainSpec` names it."""
        return {"name": "log_product", "floor": self.floor, "ceiling": self.ceiling}

    def scores(self, rewards: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> np.ndarray:
        """(...) what single responses with `rewards` (..., M) are worth, before the KL penalty."""
        flat_NM = rewards.reshape(-1, rewards.shape[-1])
        found_N = scalarize(flat_NM, np.tile(w_M, (len(flat_NM), 1)), self.scalarizer, low_M=marks.low_M, high_M=marks.high_M)
        return found_N.reshape(rewards.shape[:-1])


def _linear(slope_Q: np.ndarray) -> Any:
    return lambda q: (float(slope_Q @ q), slope_Q, np.zeros_like(q))
