"""The adaptive sweep: single policies whose weights change during the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from paretune.methods.base import Card
from paretune.methods.sweep import SWEEP_TRAININGS, Sweep
from paretune.registry import METHODS, describe
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import WEIGHTINGS

if TYPE_CHECKING:
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Adaptive"]

RULES_OF: Mapping[str, Mapping[str, Any]] = {
    "influence": {"name": "influence"},
    "ctwa": {"name": "ctwa"},
    "exp3": {"name": "exp3"},
    "linucb": {"name": "contextual", "rule": "linucb"},
    "thompson": {"name": "contextual", "rule": "thompson"},
}


@METHODS.register("adaptive")
@dataclass(frozen=True)
class Adaptive(Sweep):
    """One training per preference, whose weights start there and then follow what the training sees; the nearest policy answers.

    `weighting` names the rule, `settings` change its fields (`paretune show NAME` lists them). At a vertex the training is the
    expert's.
    """

    weighting: Literal["influence", "ctwa", "exp3", "linucb", "thompson"] = "influence"
    settings: Mapping[str, float] = field(default_factory=dict)

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep whose weights adapt: gradient influence, covariance targets, an Exp3 bandit, or a bandit over prompt features",
        source="gradient influence (2509.11452); CTWA (2602.06869); DynaOpt's Exp3 (2403.13578); LinUCB and Thompson sampling over prompts "
        "(2510.02850, LASeR)",
        differs="all start at the preference and multiply it, so that an objective with weight 0 stays out and weights sum to 1; returns "
        "of the training batches, with KL, stand for the validation sets of the sources; influence is in units of the mean square; "
        "CTWA's statistic is a correlation; the contextual bandits tilt the preference for a prompt instead of selecting a reward",
        hides="what is climbed in the end is not w . J for the w that is asked for; the source's settings suit its scale of rewards and "
        "number of steps, and `settings` are tuned or not tuned per task",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        super().__post_init__()
        self._weighting()  # its fields are checked here

    def _weighting(self) -> dict[str, Any]:
        return describe(WEIGHTINGS.build({**RULES_OF[self.weighting], **self.settings}))

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        plain = super()._training(task, learner, w_M, seed)
        return plain if np.count_nonzero(w_M) == 1 else dataclasses.replace(plain, weighting=self._weighting())
