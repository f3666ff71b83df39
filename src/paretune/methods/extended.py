"""An objective added later: a family for the other objectives is kept as it is, and two trainings make it one for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from paretune.errors import ConfigError, nearest
from paretune.methods.base import Card, OnExperts, adapters_for, sampled_training, vertex_trainings
from paretune.policy.family import Family
from paretune.policy.rules import ExtendedRule
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Amount

__all__ = ["Extended"]


@METHODS.register("extended")
@dataclass(frozen=True)
class Extended(OnExperts):
    """First a `bridge` family of all objectives but `new`; then the expert of `new`, and a second bridge towards it.

    new: name or number of the added objective; empty is the last. effort, balance: as in `bridge`, for both bridges.
    """

    new: str = ""
    effort: float = 1.0
    balance: Amount = 0.0

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="a bridge family to which an objective is added later: two more trainings, and nothing old is trained again",
        source="ours",
        differs="nothing old changes: where the added objective has no weight, the answers are those of the old family",
        hides="the two last trainings are what adding costs, all of them what the whole cost; two bridges where one from scratch has one; "
        "the objectives must share prompts and reference",
        trainings="M + 2 (M + 1 for M = 2), of which 2 for the added objective",
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        if self.effort <= 0:
            raise ConfigError(
                "method extended: effort is positive", found=f"effort = {self.effort:g}", remedy="1 costs as much as an expert"
            )

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        experts = list(vertex_trainings(task, learner, seed).values())
        added = experts.pop(self._place(task))
        bridges = self._bridges(task, learner, seed)
        waves = [experts, [bridges["old"]] if "old" in bridges else [], [added], [bridges["new"]]]
        asked: list[TrainSpec] = []
        for wave in waves:
            asked += wave
            if any(spec.key not in done for spec in wave):
                break
        return asked

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for({**vertex_trainings(task, learner, seed), **self._bridges(task, learner, seed)}, done)
        return self.family(task, "parameter", ExtendedRule(new=self._place(task)), adapters, seed)

    def _place(self, task: Task) -> int:
        names = task.objectives.names
        if self.new == "" or self.new in names:
            return names.index(self.new) if self.new else len(names) - 1
        if self.new.isdigit() and int(self.new) < len(names):
            return int(self.new)
        raise ConfigError("method extended: new is an objective", found=repr(self.new), remedy=nearest(self.new, names))

    def _bridges(self, task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
        """The trainings of the old family's bridge, where it has one, and of the new one."""
        place = self._place(task)
        experts = list(vertex_trainings(task, learner, seed).values())
        others = [k for k in range(len(experts)) if k != place]
        found: dict[str, TrainSpec] = {}
        for stage, frozen, active_objectives in (("old", [experts[k] for k in others], tuple(others)), ("new", experts, None)):
            if stage == "old" and len(others) == 1:
                continue
            found[stage] = sampled_training(
                task,
                learner,
                seed,
                rule=ExtendedRule(new=place, stage=stage),
                fresh=(learner.rank,),
                frozen_adapters=(*frozen, *found.values()),
                effort=self.effort,
                balance=self.balance,
                active_objectives=active_objectives,
            )
        return found
