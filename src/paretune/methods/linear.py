"""The linear sweep: the weighted sum of objectives, trained once per preference of a lattice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from paretune.methods.base import Card
from paretune.methods.sweep import SWEEP_TRAININGS, Sweep
from paretune.registry import METHODS

__all__ = ["Linear"]


@METHODS.register("linear")
@dataclass(frozen=True)
class Linear(Sweep):
    """Single policies trained at fixed weighted sums, vertices included, so that the experts are among them; the nearest one answers.

    points = 0 trains at the judged preferences themselves: the dedicated training that every shortcut is compared with.
    """

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one linearly scalarized training per preference of a lattice, so a sweep of single policies; the nearest one answers",
        source='the weighted sum of rewards ("MORLHF"), as most trainers do it',
        differs="the learner's: KL in the reward and a leave-one-out baseline by default, so that its optimum is that of w . J",
        hides="points = 0 was trained at the very preferences it is judged at; otherwise some of the loss is the lattice's, not the "
        "training's; a preference half-way between two policies takes the first",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True
