"""What a method is: which trainings are needed, and how they and a preference become a policy; and the trainings that methods share.

`plan` is called again after each wave of trainings until it asks for nothing new; then `policy` builds the family.
A method is one frozen dataclass registered in `METHODS`; its fields are its hyperparameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from paretune.objectives.utilities import UTILITIES
from paretune.policy.base import Policy, build_policy
from paretune.policy.family import Family
from paretune.policy.rules import GateRule
from paretune.registry import describe
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.training.weightings.base import Balanced, Fixed

__all__ = ["Card", "Method", "OnExperts", "adapters_for", "parts_of", "sampled_training", "training", "vertex_trainings"]

CATEGORIES = ("single-policy", "multi-policy", "meta-policy", "baseline")
SPLIT = "train"  # the outer level measures on training prompts only


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
    symmetric: ClassVar[bool] = False  # True promises that swapping the objectives swaps trainings and returns

    @abstractmethod
    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        """The trainings of the next wave (they may run side by side), or nothing when all that is needed is in `done` (key -> artifact).

        Must be a pure function of its arguments; may return specs that are already done (they are not trained again).
        """

    @abstractmethod
    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        """The family of policies made of the finished trainings."""

    def family(
        self,
        task: Task,
        mixing: Policy | str | Mapping[str, Any],
        rule: GateRule,
        adapters: Mapping[str, Any],
        seed: int,
        *,
        meta: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Family:
        """A family of this method: a policy, or the mixing that one is built at, under `rule`. `fields` are further ones of `Family`."""
        policy = mixing if isinstance(mixing, Policy) else build_policy(task, mixing, adapters)
        said = {"method": describe(self), "card": asdict(self.card), "seed": seed, **(meta or {})}
        if task.terms is not None:
            said["terms"] = task.terms.sentences(task.objectives.names)
            if (utility := task.terms.utility()) is not None:
                fields["utility"] = describe(UTILITIES.build(utility))
        return Family(
            policy, rule, task.objectives, task.base(), adapters, said, max_new_tokens=task.max_new_tokens, **task.prompt_form(), **fields
        )


class OnExperts(Method):
    """Base of the methods on one expert per objective. `_last` may name one more training, which follows the experts'."""

    def _last(self, task: Task, learner: Learner, seed: int) -> TrainSpec | None:
        return None

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        experts = list(vertex_trainings(task, learner, seed).values())
        last = self._last(task, learner, seed)  # made first: a learner that cannot train it says so before the experts are paid for
        return [*experts, last] if last is not None and all(spec.key in done for spec in experts) else experts

    def family(self, task: Task, *given: Any, **fields: Any) -> Family:
        """The same as of any method; the first M adapters are the experts, unless `experts` says otherwise."""
        return super().family(task, *given, **{"experts": tuple(range(task.objectives.count)), **fields})


def training(task: Task, learner: Learner, w_M: Sequence[float] | np.ndarray, seed: int) -> TrainSpec:
    """The training for one fixed preference. Equal arguments give equal keys, so that methods share its result."""
    preference = tuple(float(w) for w in w_M)
    return TrainSpec(task=describe(task), learner=describe(learner), preference=preference, seed=seed)


def sampled_training(
    task: Task,
    learner: Learner,
    seed: int,
    *,
    rule: GateRule,
    fresh: tuple[int, ...],
    frozen_adapters: Iterable[TrainSpec] = (),
    effort: float = 1.0,
    balance: float = 0.0,
    active_objectives: tuple[int, ...] | None = None,
) -> TrainSpec:
    """The training over sampled preferences, gated by `rule`: new adapters of the ranks `fresh` beside those of `frozen_adapters`.

    effort: its budget, in budgets of the learner. balance: the power of the weighting "balanced", 0 is plain sampling.
    """
    spec = TrainSpec(
        task=describe(task),
        learner=describe(learner.scaled(effort)),
        preference=None,
        seed=seed,
        weighting=describe(Balanced(power=balance) if balance else Fixed()),
        frozen_adapters=tuple(spec.key for spec in frozen_adapters),
        fresh=fresh,
        rule=describe(rule),
        active_objectives=active_objectives,
    )
    learner.accept(spec)
    return spec


def vertex_trainings(task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
    """Adapter name -> training of the expert of each objective, in the order of axis M."""
    vertices = np.eye(task.objectives.count)
    return {f"expert-{name}": training(task, learner, e_M, seed) for name, e_M in zip(task.objectives.names, vertices, strict=True)}


def adapters_for(specs: Mapping[str, TrainSpec], done: Mapping[str, Artifact]) -> dict[str, Any]:
    """Adapter name -> directory of the finished training."""
    return {name: done[spec.key].path for name, spec in specs.items()}


def parts_of(spec: TrainSpec, done: Mapping[str, Artifact]) -> dict[str, Any]:
    """Adapter name -> directory of each adapter of one finished training."""
    return {f"part-{i}": path for i, path in enumerate(done[spec.key].adapters)}
