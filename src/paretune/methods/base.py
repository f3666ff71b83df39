"""What a method is: which trainings are needed, and how they and a preference become a policy.

`plan` is called again after each wave of trainings until it asks for nothing new; then `policy` builds the family.
A method is one file with one frozen dataclass registered in `METHODS`; its fields are its hyperparameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paretune.training.spec import Artifact, TrainSpec

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task
    from paretune.training.learner import Learner

__all__ = ["Card", "Method"]

CATEGORIES = ("single-policy", "multi-policy", "meta-policy", "baseline")


@dataclass(frozen=True)
class Card:
    """What a reader must know before believing a method's numbers. `paretune ls methods` is made of these."""

    category: str  # one of CATEGORIES
    summary: str  # one line
    source: str  # paper, arXiv number
    differs: str  # what differs from the source
    hides: str  # what the method's numbers hide
    trainings: str  # as a function of M and of the number of preferences W, e.g. "M"
    forwards_per_token: str  # e.g. "1", "M"
    zero_shot: bool  # True where a new preference costs neither a training nor a search


class Method(ABC):
    """Base of all methods; see `paretune.testing.methods.check_method` for the contract as tests."""

    card: ClassVar[Card]
    registered_name: ClassVar[str]
    version: ClassVar[int]

    @abstractmethod
    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        """The trainings of the next wave (they may run side by side), or nothing when all that is needed is in `done` (key -> artifact).

        Must be a pure function of its arguments; may return specs that are already done (they are not trained again).
        """

    @abstractmethod
    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        """The family of policies made of the finished trainings."""
