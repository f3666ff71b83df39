"""The gradient sweep: single policies whose steps are an aggregator's combination of the objectives' gradients."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from paretune.methods.base import Card
from paretune.methods.sweep import SWEEP_TRAININGS, Sweep
from paretune.registry import METHODS, describe
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import WEIGHTINGS

if TYPE_CHECKING:
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Gradient"]


@METHODS.register("gradient")
@dataclass(frozen=True)
class Gradient(Sweep):
    """One training per preference, each step weighing the objectives by how their gradients meet; the nearest policy answers.

    At a vertex one objective is left, and the training is that of its expert.
    """

    aggregator: Literal["mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g", "upgrad", "aligned_mtl"] = "upgrad"
    c: float = 0.5  # of cagrad

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep whose steps combine the objectives' gradients by MGDA, PCGrad, CAGrad, Nash-MTL, IMTL-G, UPGrad or Aligned-MTL",
        source="MGDA (Sener & Koltun 2018), PCGrad (2001.06782), CAGrad (2110.14048), Nash-MTL (2202.01017), IMTL-G (Liu et al. 2021), "
        "UPGrad (2406.16232), Aligned-MTL (Senushkin et al. 2023)",
        differs="none of the sources but UPGrad's and Aligned-MTL's has a preference: it scales the gradients for pcgrad and cagrad, "
        "divides them for mgda, and enters the equations of nash_mtl and imtl_g, which do not see a scale; gradients are those of the "
        "LoRA factors, of returns with KL; weights are scaled to absolute sum 1",
        hides="they stop wherever gradients oppose each other, which is anywhere on the front, so the preference decides less than the "
        "start does; estimated gradients hardly ever oppose each other exactly; needs the extra `gradient` but for nash_mtl and imtl_g",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        plain = super()._training(task, learner, w_M, seed)
        if np.count_nonzero(w_M) == 1:
            return plain
        weighting = WEIGHTINGS.build({"name": "gradient", "aggregator": self.aggregator, "c": self.c})
        weighting.check()
        return dataclasses.replace(plain, weighting=describe(weighting))
