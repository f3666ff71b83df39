"""Single-policy methods that climb another utility than w . J, and the sweep whose trainings start from one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, training
from paretune.methods.sweep import SWEEP_TRAININGS, Sweep
from paretune.objectives import utilities
from paretune.registry import METHODS, describe
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import refuse_unreachable
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.training.weightings.base import WEIGHTINGS
from paretune.types import Amount, Fraction

__all__ = ["Lagrangian", "LogSum", "MaxMin", "Product", "Tchebycheff", "WarmSweep"]


class _Climbing(Sweep):
    """A sweep whose trainings climb `_seeks()`, by the weighting `climb` where a subclass says nothing else."""

    decay: Fraction  # of the running mean of returns; every subclass has a default of its own

    def _seeks(self) -> utilities.Utility:
        raise AssertionError("subclasses say which utility they climb")

    def _weighting(self, seeks: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": "climb", "utility": seeks, "decay": self.decay}

    def _utility(self) -> Mapping[str, Any]:
        return describe(self._seeks())

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        self._seeks().check(task.objectives.count)
        weighting = describe(WEIGHTINGS.build(self._weighting(self._utility())))
        return dataclasses.replace(training(task, learner, w_M, seed), weighting=weighting)


_TWICE = "the preferences are those of the utility, not of w . J: its linear attainment is no measure of it, own_utility is"


@METHODS.register("tchebycheff")
@dataclass(frozen=True)
class Tchebycheff(_Climbing):
    """Smooth Tchebycheff at the level of expected returns; see `utilities.Tchebycheff` and the weighting `climb`."""

    mu: float = utilities.Tchebycheff.mu
    ideal: tuple[float, ...] | None = None
    decay: Fraction = 0.9

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one training per preference of a lattice for the softened worst distance from the ideal point; the nearest one answers",
        source="smooth Tchebycheff scalarization (2402.19078)",
        differs="at the level of expected returns, estimated by a running mean of batches where they are not exact; weights are "
        "shares M w_k; a weight of 0 leaves its objective out; the ideal point is exact on exact tasks, else declared, or the ranges' ends",
        hides=_TWICE + "; mu softens the worst case by up to mu log M",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _seeks(self) -> utilities.Utility:
        return utilities.Tchebycheff(mu=self.mu, ideal=self.ideal)


@METHODS.register("log-sum")
@dataclass(frozen=True)
class LogSum(_Climbing):
    """The product of expected returns, sum_k w_k log(J_k - low_k); see `utilities.LogSum` and the weighting `climb`."""

    base: tuple[float, ...] | None = None
    floor: float = utilities.LogSum.floor
    decay: Fraction = 0.9

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one training per preference of a lattice for the product of expected returns; the nearest one answers",
        source="Nash's bargaining product, at the level of expected returns",
        differs="returns below the floor are extended linearly; the product counts from each range's low unless `base` is given",
        hides=_TWICE + "; far above the low it is almost linear",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _seeks(self) -> utilities.Utility:
        return utilities.LogSum(base=self.base, floor=self.floor)


@METHODS.register("max-min")
@dataclass(frozen=True)
class MaxMin(_Climbing):
    """The largest smallest gain, counted in shares of the preference; see `utilities.MaxMin` and the weighting `multipliers`."""

    base: tuple[float, ...] | None = None
    rate: Amount = 1.0
    damping: Amount = 10.0
    decay: Fraction = 0.9

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one training per preference of a lattice for the largest smallest gain in shares of w; the nearest one answers",
        source="max-min alignment (MaxMin-RLHF, 2402.08925) by multiplicative weights",
        differs="the preference scales the gains; they count from the reference's returns, exact on exact tasks, else the first batch's; "
        "the weights' update is damped",
        hides=_TWICE + "; a weight of 0 demands nothing, a tiny one still no loss",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _seeks(self) -> utilities.Utility:
        return utilities.MaxMin(base=self.base)

    def _weighting(self, seeks: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": "multipliers", "utility": seeks, "rate": self.rate, "damping": self.damping, "decay": self.decay}


@METHODS.register("lagrangian")
@dataclass(frozen=True)
class Lagrangian(_Climbing):
    """The largest w . J among the policies that keep J_k >= c_k, by prices on the constraints; see `utilities.Constrained`.

    `thresholds` has one number per objective, None where there is no constraint; left out, every objective must keep the untrained
    reference's return plus `margin`. On exact tasks thresholds that no policy meets are refused with the bound.
    """

    thresholds: tuple[float | None, ...] | None = None
    margin: Amount = 0.0
    rate: Amount = 1.0
    damping: Amount = 10.0
    logarithmic: bool = False
    decay: Fraction = 0.9

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one training per preference of a lattice for the largest w . J above thresholds; the nearest one answers",
        source="Safe-RLHF (2310.12773), A = (A_r - sum l A_c) / (1 + sum l), for any number of constraints",
        differs="thresholds bound regularized returns; prices rise by plain dual ascent, damped (logarithmic = True: as in the source); "
        "the additive form differs by the length of a step alone and is not offered",
        hides=_TWICE + "; how far a threshold is missed stands in its violation; off exact tasks unreachable thresholds are found only so",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _seeks(self) -> utilities.Constrained:
        return utilities.Constrained(thresholds=self.thresholds, margin=self.margin)

    def _weighting(self, seeks: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": "multipliers",
            "utility": seeks,
            "rate": self.rate,
            "damping": self.damping,
            "logarithmic": self.logarithmic,
            "decay": self.decay,
        }

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        seeks: Any = self._seeks()
        seeks.check(task.objectives.count)
        for name, threshold, high in zip(task.objectives.names, self.thresholds or (), task.objectives.high, strict=False):
            if threshold is not None and threshold > high:
                raise ConfigError(
                    "a threshold lies within its objective's range",
                    found=f"{name} >= {threshold:g}, and its range ends at {high:g}",
                    remedy="lower the threshold",
                )
        if task.is_exact:
            refuse_unreachable(task, "train", seeks)  # type: ignore[arg-type]
        return super().plan(task, learner, done, seed)


@METHODS.register("product")
@dataclass(frozen=True)
class Product(Sweep):
    """The weighted product of each response's rewards, as a scalarizer of single responses; see `scalarize.log_product`."""

    floor: float = utilities.LogProduct.floor
    ceiling: float = utilities.LogProduct.ceiling

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one training per preference of a lattice for the product of each response's rewards; the nearest one answers",
        source="the training score of DynaOpt (2403.13578) and EMORL (2505.02579)",
        differs="one preference per training; the KL penalty is outside of the logarithm; the learner's own baseline",
        hides=_TWICE + "; a response with one reward near 0 outweighs all others",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _seeks(self) -> utilities.LogProduct:
        return utilities.LogProduct(floor=self.floor, ceiling=self.ceiling)

    def _utility(self) -> Mapping[str, Any]:
        return describe(self._seeks())

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        return dataclasses.replace(training(task, learner, w_M, seed), scalarizer=dict(self._seeks().scalarizer))


@METHODS.register("warm-sweep")
@dataclass(frozen=True)
class WarmSweep(Sweep):
    """The linear sweep, each training from its neighbor's result: the preference next to it on the way to the nearest extreme one.

    The extreme preferences (those with most of one objective; the vertices of a lattice) are trained from scratch, with the whole budget;
    every other has `share` of the learner's samples or steps.
    """

    share: float = 0.5

    card: ClassVar[Card] = Card(
        category="multi-policy",
        summary="a linear sweep from the vertices inwards, each training starting from its neighbor's; the nearest one answers",
        source="reuse along the front, as in Roijers 2016 (OLS with reuse) and most sweeps of single policies",
        differs="the order is fixed beforehand; a learning-rate schedule begins anew with every training",
        hides="waves follow one another, so the critical path is longer than that of a plain sweep; a neighbor's collapse is inherited",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError("method warm-sweep: share is above 0 and at most 1", found=f"share = {self.share:g}", remedy="share = 0.5")

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        task.judged()
        return [spec for spec in self._specs(task, learner, seed).values() if all(key in done for key in spec.parents)]

    def _specs(self, task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
        w_KM = self.preferences(task)
        parents, found = neighbors(w_KM), {}
        for k in sorted(parents, key=lambda k: parents[k][1]):
            parent = parents[k][0]
            if parent is None:
                found[k] = training(task, learner, w_KM[k], seed)
            else:
                spec = training(task, learner.scaled(self.share), w_KM[k], seed)
                found[k] = dataclasses.replace(spec, init_from=(found[parent].key,))
        return {f"policy-{k}": found[k] for k in range(len(w_KM))}


def neighbors(w_KM: np.ndarray) -> dict[int, tuple[int | None, int]]:
    """Point -> (the point that it starts from, how many lie before it): the nearest of those that are nearer to its nearest extreme point,
    the nearest to that of equals. (None, 0) for extreme points: those with most of one objective."""
    roots = sorted({int(k) for k in w_KM.argmax(0)})
    far_KK = np.abs(w_KM[:, None] - w_KM[None]).sum(-1).round(9)
    found: dict[int, tuple[int | None, int]] = dict.fromkeys(roots, (None, 0))
    root_K = [roots[int(row.argmin())] for row in far_KK[:, roots]]
    for k in sorted(range(len(w_KM)), key=lambda k: (far_KK[k, root_K[k]], k)):
        if k not in found:
            root = root_K[k]
            parent = min((j for j in found if far_KK[j, root] < far_KK[k, root]), key=lambda j: (far_KK[k, j], far_KK[j, root], j))
            found[k] = (parent, found[parent][1] + 1)
    return found
