"""The normalized sweep: single policies whose advantages are normalized or filtered per objective before they are summed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from paretune.methods.base import Card
from paretune.methods.sweep import SWEEP_TRAININGS, Sweep
from paretune.registry import METHODS
from paretune.training.spec import TrainSpec

if TYPE_CHECKING:
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Normalized"]


@METHODS.register("normalized")
@dataclass(frozen=True)
class Normalized(Sweep):
    """One training per preference under a named aggregation of advantages (`paretune.training.advantages`); the nearest policy answers.

    With the exact learner the step is the one to which samples converge as groups grow: what is missing then is the aggregation's bias.
    """

    aggregation: Literal["grpo", "mo_grpo", "gdpo", "gd2po", "gd2po_snr", "dvao", "rdpo", "pama"] = "gdpo"

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep whose advantages are normalized per group or objective: GRPO, MO-GRPO, GDPO, GD2PO (hard, SNR), DVAO, RDPO, PAMA",
        source="GRPO (2402.03300) and GDPO (2601.05242) as in TRL; MO-GRPO (2509.22047); GD2PO (2606.16771); DVAO (2605.25604); "
        "RDPO (2605.13641); PAMA (2508.07768)",
        differs="KL is part of every objective's return, not a term of the loss; dvao, rdpo and pama are experimental: their sources leave "
        "open what is chosen here, and each says so; gd2po whitens by response, not by token",
        hides="each climbs something other than w . J: prompts and objectives are divided by spreads that the policy itself changes",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        if self.aggregation.startswith("gd2po"):
            form = "snr" if self.aggregation == "gd2po_snr" else "hard"
            aggregation: dict[str, object] = {"name": "gd2po", "form": form, "tau": 0.2}
        else:
            aggregation = {"name": self.aggregation}
        return dataclasses.replace(super()._training(task, learner, w_M, seed), aggregation=aggregation)
