"""Soups beyond the weighted sum: TIES and DARE merges of the shared experts, and Bone Soups, whose trainings are mixed already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method, adapters_for, training
from paretune.methods.experts import MixedExperts
from paretune.policy.family import Family
from paretune.policy.rules import Backbones, rows_of
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Amount, Share

__all__ = ["BoneSoup", "Dare", "Ties"]

_DIFFERS = (
    "what is merged is the exact change B A of every matrix, entries kept per matrix; the preference is the weights, as in mergekit, and "
    "takes part in the election of signs"
)
_HIDES = "a vertex is the expert after pruning, not the expert; the merge is dense and made anew for every preference"


@METHODS.register("ties")
@dataclass(frozen=True)
class Ties(MixedExperts):
    """Trim, elect signs, merge what agrees; see `MergedMix`."""

    density: Share = 0.8
    normalize: bool = False

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, a TIES soup: largest entries kept, one sign elected per entry, what agrees is merged",
        source="TIES-Merging (2306.01708)",
        differs=_DIFFERS + "; the default keeps 80 % of the entries (the source: 20 %) and sums what agrees instead of averaging it, both "
        "by the mean attainment on a development seed",
        hides=_HIDES,
        trainings="M",
        forwards_per_token="1",
        zero_shot=True,
    )

    def mixing_settings(self) -> Mapping[str, Any]:
        return {"name": "merged", "how": "ties", "density": self.density, "normalize": self.normalize}


@METHODS.register("dare")
@dataclass(frozen=True)
class Dare(MixedExperts):
    """Drop at random and rescale, then sum, or elect signs first; see `MergedMix`."""

    density: Share = 0.8
    signs: bool = False
    mask_seed: int = 0

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, a DARE soup: entries dropped at random, the rest scaled up, summed (or merged as by TIES)",
        source="DARE (2311.03099)",
        differs=_DIFFERS + "; the default keeps 80 % of the entries (the source drops up to 99 % of full fine-tunings)",
        hides=_HIDES + "; one draw of the masks: another seed is another policy",
        trainings="M",
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = False

    def mixing_settings(self) -> Mapping[str, Any]:
        how = "dare-ties" if self.signs else "dare"
        return {"name": "merged", "how": how, "density": self.density, "normalize": False, "seed": self.mask_seed}


@METHODS.register("bone-soup")
@dataclass(frozen=True)
class BoneSoup(Method):
    """Backbones trained at mixed preferences: `share` for one objective each, the rest evenly for the others. Rows of B.

    The gates x solve B^T x = w, so that the soup of the backbones' own preferences is w; outside of what they span, x extrapolates.
    """

    share: Share = 0.8
    extrapolation: Amount = 0.0
    mixing: Literal["parameter", "logit"] = "parameter"

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one training per objective at a mixed preference; a soup whose gates bring their mixture to the wanted preference",
        source="Bone Soups (2502.10762)",
        differs="share is .8, by the worst attainment on a development seed; the source chooses from .6, .7, .8 by the hypervolume of "
        "short trainings. For M > 2 the rest is shared evenly. The soup is of the exact changes, unmerged. mixing logit is ours",
        hides="preferences beyond the backbones are extrapolated with negative gates; one's own objective alone was never trained",
        trainings="M",
        forwards_per_token="parameter: 1; logit: M",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def points_KM(self, count: int) -> np.ndarray:
        """The preferences of the trainings."""
        if not 1 / count < self.share <= 1:
            raise ConfigError(
                "method bone-soup: share is above 1 / M and at most 1",
                found=f"share = {self.share:g} for {count} objectives",
                remedy="the source uses .6 to .8; 1 gives plain experts",
            )
        rest = (1 - self.share) / (count - 1)
        return np.where(np.eye(count, dtype=bool), self.share, rest)

    def _specs(self, task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
        points_KM = self.points_KM(task.objectives.count)
        return {f"bone-{name}": training(task, learner, w_M, seed) for name, w_M in zip(task.objectives.names, points_KM, strict=True)}

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        return list(self._specs(task, learner, seed).values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for(self._specs(task, learner, seed), done)
        rule = Backbones(points_KM=rows_of(self.points_KM(task.objectives.count)), extrapolation=self.extrapolation)
        return self.family(task, self.mixing, rule, adapters, seed)
