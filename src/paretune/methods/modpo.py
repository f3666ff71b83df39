"""The MODPO sweep: single policies learned offline, from pairs of the reference's responses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from paretune.methods.base import Card
from paretune.methods.sweep import SWEEP_TRAININGS, Sweep
from paretune.registry import METHODS, describe
from paretune.training.spec import TrainSpec

if TYPE_CHECKING:
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["ModpoSweep"]


@METHODS.register("modpo")
@dataclass(frozen=True)
class ModpoSweep(Sweep):
    """One offline training per preference, with the budget of the learner as responses of the reference; the nearest policy answers.

    labels: how the better response of a pair is named, see learner `modpo`. With the learner `trl`, TRL's DPOTrainer trains (`trl-modpo`).
    """

    labels: Literal["expected", "drawn", "hard"] = "expected"

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep of offline trainings on pairs of the reference's responses: DPO with the other objectives as a margin",
        source="MODPO (2310.03708)",
        differs="pairs are built from the task: all pairs of a prompt's responses, compared by the reward of the objective with the "
        "largest weight, so that w_1 is at least 1/M (the source's is fixed, and its loss has no value at w_1 = 0); margins are true "
        "rewards, not learned ones; labels are chances under Bradley-Terry by default; every pair is seen in one pass",
        hides="every training draws responses of its own, which a stored set of pairs would share; it learns only from what the "
        "reference says; labels = hard, the usual ones, have another optimum than J_w",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        from paretune.training.modpo import Modpo
        from paretune.training.trl.dpo import TrlModpo

        kind = TrlModpo if learner.registered_name in ("trl", "trl-modpo") else Modpo
        offline = describe(kind.like(learner, labels=self.labels))
        return dataclasses.replace(super()._training(task, learner, w_M, seed), learner=offline)
