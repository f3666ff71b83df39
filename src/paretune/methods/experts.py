"""One expert per objective, with the preference as their gates: soups, logits, hidden states, and other ways to mix predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from paretune.errors import ConfigError
from paretune.methods.base import Card, OnExperts, adapters_for, vertex_trainings
from paretune.policy.family import Family
from paretune.policy.rules import Identity
from paretune.registry import METHODS
from paretune.tasks.base import Task
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact

__all__ = ["Experts", "HiddenLayer", "MixedExperts", "ModDivergence", "Rmod"]


class MixedExperts(OnExperts):
    """Base of the methods that mix the experts at the preference itself; subclasses say by which mixing."""

    symmetric: ClassVar[bool] = True

    def mixing_settings(self) -> str | Mapping[str, Any]:
        """The mixing, by name or with its settings."""
        raise AssertionError("subclasses name their mixing")

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        adapters = adapters_for(vertex_trainings(task, learner, seed), done)
        return self.family(task, self.mixing_settings(), Identity(), adapters, seed)


@METHODS.register("experts")
@dataclass(frozen=True)
class Experts(MixedExperts):
    """M experts, one per objective; a preference is the vector of their gates.

    mixing: "parameter" is the exact delta soup, "factor" the soup of the factors as its authors' code does it, "logit" the product of
    the experts' next-token distributions, "hidden" the sum of their last hidden states under the shared head.
    """

    mixing: Literal["parameter", "factor", "logit", "hidden"] = "logit"

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, mixed with the preference as weights (soup, logits or hidden states)",
        source="rewarded soups (2306.04488) for parameter and factor; MOD (2406.18853), reverse KL, for logit; "
        "EMORL (2505.02579) for hidden",
        differs="parameter is the exact soup of the deltas, not of the factors; hidden uses the preference as weights, without a search; "
        "all mixings sample under one decoding, with a KV cache",
        hides="what mixing loses even with perfect experts: evaluation separates learning from composition; "
        "hidden at the last layer IS logit mixing where the head is shared, linear and bias-free; factor adds cross terms of experts",
        trainings="M",
        forwards_per_token="parameter, factor: 1; logit, hidden: M",
        zero_shot=True,
    )

    def mixing_settings(self) -> str:
        return self.mixing


@METHODS.register("mod-divergence")
@dataclass(frozen=True)
class ModDivergence(MixedExperts):
    """The experts' next-token distributions, mixed as a divergence other than the reverse KL asks for; see `DivergenceMix`."""

    divergence: Literal["forward-kl", "alpha", "js"] = "forward-kl"
    alpha: float = 0.5

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, next-token distributions mixed by forward KL (harmonic mean), an alpha-divergence or JS",
        source="MOD (2406.18853), its divergences beside the reverse KL",
        differs="1/alpha is kept, which the authors' code leaves out; the normalizer is a factor outside, as in the source's formulas; "
        "for JS the reference runs beside the experts, and its closed form is ours",
        hides="the experts were trained under the reverse KL, so that this answers another game than theirs",
        trainings="M",
        forwards_per_token="M; js: M + 1",
        zero_shot=True,
    )

    def mixing_settings(self) -> Mapping[str, Any]:
        return {"name": "divergence", "divergence": self.divergence, "alpha": self.alpha}


@METHODS.register("rmod")
@dataclass(frozen=True)
class Rmod(MixedExperts):
    """Decoding against the worst-case weights within `radius` of the preference; see `RobustMix`."""

    radius: float = 1.0

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, logits mixed at the worst weights for each token: robust, and at radius 1 without a preference",
        source="RMOD (2503.08796)",
        differs="the experts' log-ratios stand for trained value functions; the game is played and solved exactly at every token, not for "
        "blocks of sampled candidates; a radius below 1 keeps the worst weights near the preference",
        hides="at radius 1 every preference gets the same policy: read the worst objective, not attainment; without value functions it "
        "does not see which objective has fallen behind so far",
        trainings="M",
        forwards_per_token="M",
        zero_shot=True,
    )

    def mixing_settings(self) -> Mapping[str, Any]:
        return {"name": "robust", "radius": self.radius}


@METHODS.register("hidden-layer")
@dataclass(frozen=True)
class HiddenLayer(MixedExperts):
    """Hidden states of the experts, mixed at one layer; the layers above run once under the soup. see `HiddenLayerMix`."""

    layer: int = 1

    card: ClassVar[Card] = Card(
        category="meta-policy",
        summary="one expert per objective, hidden states mixed at a layer; below it the experts run apart, above it their soup runs once",
        source="EMORL (2505.02579) for the last layer; the layers below are our extension",
        differs="any layer, with a KV cache; the preference is the weights, without a search",
        hides="layer 0 is the delta soup and the last layer is logit mixing (shared linear head), so that only what lies between is new",
        trainings="M",
        forwards_per_token="(layer M + L - layer) / L",
        zero_shot=True,
    )

    def mixing_settings(self) -> Mapping[str, Any]:
        if self.layer < 0:
            raise ConfigError("method hidden-layer: layer is at least 0", found=f"layer = {self.layer}", remedy="0 is the soup")
        return {"name": "hidden-layer", "layer": self.layer}
