"""Fruit tree navigation (Yang et al. 2019) as a sequence task: a response is a path of left and right, its rewards are those of the leaf.

The benchmark's values are MO-Gymnasium's (`fruits.json`, with its license). No leaf is dominated and all are on the convex hull, so the
best utility is known at every preference: over uniform weights it is 4.963, 5.047 and 5.123 in the mean for depth 5, 6 and 7.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np

from paretune.errors import TaskError
from paretune.registry import TASKS
from paretune.tasks.exact.language import ReferenceSpec, check_width
from paretune.tasks.exact.task import SPLITS, ExactTask
from paretune.types import Count, Objectives

__all__ = ["FruitTree"]

NUTRIENTS = ("protein", "carbs", "fats", "vitamins", "minerals", "water")


@TASKS.register("fruit-tree")
@dataclass(frozen=True)
class FruitTree(ExactTask):
    """A tree of depth `length` (5, 6 or 7) with six rewards at each leaf; "a" is left and "b" right.

    The untrained reference goes either way with the same chance; a response that ends above the leaves gets nothing. The benchmark has
    one start and no KL: all prompts are the same (`prompt_count` is how many preferences a training step has), and `beta` is small.
    """

    length: int = 6
    beta: float = 0.02
    prompt_count: int = 16
    width: Count = 128
    layers: Count = 2
    seed: int = 0
    head: float = 5.0

    objective_count: ClassVar[int] = len(NUTRIENTS)  # type: ignore[misc]
    alphabet: ClassVar[int] = 2  # type: ignore[misc]
    rho: ClassVar[float] = 0.0  # type: ignore[misc]  # what follows are dials of made-up rewards
    interaction: ClassVar[float] = 0.0  # type: ignore[misc]
    strength: ClassVar[float] = 0.0  # type: ignore[misc]
    scale: ClassVar[float] = 1.0  # type: ignore[misc]
    sparse: ClassVar[float] = 0.0  # type: ignore[misc]
    noise: ClassVar[float] = 0.0  # type: ignore[misc]
    context: ClassVar[float] = 0.0  # type: ignore[misc]

    def __post_init__(self):
        ranges = {"length": (5, 7), "beta": (1e-3, 10.0), "prompt_count": (1, 512), "head": (0.1, 100)}
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise TaskError(f"{name} lies between {low:g} and {high:g}", found=f"{name} = {value:g}", remedy="choose it in that range")
        check_width(self.width)
        self._take_terms()

    @property
    def objectives(self) -> Objectives:  # type: ignore[override]
        return Objectives(names=NUTRIENTS, low=(0.0,) * len(NUTRIENTS), high=(10.0,) * len(NUTRIENTS))

    @cached_property
    def leaves_LM(self) -> np.ndarray:
        """(2 ** length, 6) the leaves from left to right."""
        return np.array(json.loads(files("paretune.tasks.exact").joinpath("fruits.json").read_text(encoding="utf-8"))[str(self.length)])

    def returned_M(self, logp_PR: np.ndarray, split: str) -> np.ndarray:
        """(M,) expected rewards without the KL term, which the benchmark does not have."""
        return self.returns(logp_PR, split)[0].mean(0)

    def posterior_PRM(self, split: str) -> np.ndarray:
        raise TaskError(
            "the posterior is that of rewards that one map makes of normal weights",
            found="the rewards of a benchmark's leaves",
            remedy="leave the line out for this task",
        )

    @property
    def _reference(self) -> ReferenceSpec:
        return replace(super()._reference, stop=1e-3, spread=0.0, head=self.head)

    @cached_property
    def _prompts_PT(self) -> np.ndarray:
        return np.zeros((2 * self.prompt_count, self._reference.context), dtype=np.int64)

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        return dict(zip(SPLITS, np.split(np.arange(2 * self.prompt_count), 2), strict=True))

    @cached_property
    def _rewards_all_PRM(self) -> np.ndarray:
        rewards_RM = np.zeros((self.tree.responses, len(NUTRIENTS)))
        rewards_RM[self.tree.internal :] = self.leaves_LM
        return self.gated(np.broadcast_to(rewards_RM, (2 * self.prompt_count, *rewards_RM.shape)))

    @property
    def _dense_all_PRM(self) -> Any:
        return self._rewards_all_PRM
