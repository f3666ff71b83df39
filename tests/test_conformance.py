"""The conformance suites of mixings and gate rules: all that ship pass, and broken ones are found with a reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from paretune.policy.base import MIXINGS, Weights
from paretune.policy.contextual import Features, GateBasis
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.mixing.predictions import LogitMix
from paretune.policy.rules import GateRule, Identity, Nearest, Searched
from paretune.registry import GATE_RULES
from paretune.seeds import generator
from paretune.testing import ConformanceError, check_gate_rule, check_mixing
from paretune.types import Cost

SHIPPED = [
    ("reference", 0),
    ("reference", 2),
    ("parameter", 3),
    ("factor", 3),
    ("logit", 3),
    ("hidden", 3),
    ({"name": "hidden-layer", "layer": 0}, 2),
    ({"name": "hidden-layer", "layer": 1}, 2),
    ({"name": "divergence"}, 2),
    ({"name": "divergence", "divergence": "alpha"}, 2),
    ({"name": "divergence", "divergence": "js"}, 2),
    ({"name": "robust"}, 2),
    ({"name": "robust", "radius": 0.0}, 2),
    ({"name": "merged"}, 2),
    ({"name": "merged", "how": "dare", "seed": 3}, 2),
    ({"name": "merged", "how": "dare-ties", "density": 1.0}, 2),
    ({"name": "routed", "experts": 3, "width": 4}, 3),
    ({"name": "routed", "experts": 2}, 3),
    ({"name": "tied", "own": 1}, 3),
    ({"name": "prompted", "objectives": 2}, 1),
]

THREE = ((0.8, 0.1, 0.1), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8))
CORNERS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def contextual() -> dict:
    terms = GateBasis(2, landmarks=4, width=0.5, top=1.0).terms
    theta = generator(0, "a contextual rule").normal(size=(4, terms, 2))
    features = {"kind": "words", "size": 3, "share": 1.0}
    fields = {"mean_F": (0.1, 0.2, 0.3), "adapters": 2, "landmarks": 4, "width": 0.5, "top": 1.0}
    return {"name": "contextual", "features": features, **fields, "theta_DQM": theta.tolist()}


EXAMPLES = [
    ("identity", {}),
    ({"name": "nearest", "points_KM": THREE}, {"objectives": 3}),
    ({"name": "best", "returns_KM": THREE}, {"objectives": 3}),
    ({"name": "backbones", "points_KM": THREE, "extrapolation": 0.2}, {"objectives": 3}),
    ({"name": "constant", "gates_K": (0.3, 0.7)}, {"objectives": 3}),
    ({"name": "table", "w_WM": THREE, "gates_WK": ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))}, {"objectives": 3}),
    ({"name": "interpolated", "w_WM": (*CORNERS, THREE[0]), "gates_WK": (*CORNERS, (0.6, 0.2, 0.3))}, {"objectives": 3, "mixing": "logit"}),
    ({"name": "barycentric", "points_KM": (*CORNERS, (0.4, 0.3, 0.3))}, {"objectives": 3, "mixing": "logit"}),
    ("bridge", {}),
    ({"name": "extended", "new": 1}, {"objectives": 3}),
    ({"name": "student", "teachers": 2}, {}),
    ({"name": "shared", "scale": 2.0}, {}),
    ("tied", {}),
    ({"name": "router", "experts": 2, "bridge": True}, {"mixing": {"name": "routed", "experts": 2}}),
    ({"name": "prompted", "objectives": 2}, {"mixing": {"name": "prompted", "objectives": 2}, "adapters": 1}),
    (contextual(), {}),
    ({"name": "pooled", "gates_GK": ((1.0, 0.0), (0.6, 0.7), (0.0, 1.0)), "returns_GM": ((1.0, 0.0), (0.7, 0.7), (0.0, 1.0))}, {}),
]


def name_of(given):
    return given if isinstance(given, str) else given["name"]


@pytest.mark.parametrize(("mixing", "adapters"), SHIPPED, ids=str)
def test_mixings_that_ship_keep_what_they_say(mixing, adapters):
    check_mixing(mixing, adapters=adapters)


@pytest.mark.parametrize(("rule", "given"), EXAMPLES, ids=lambda given: name_of(given) if "name" in given or isinstance(given, str) else "")
def test_gate_rules_that_ship_keep_what_they_say(rule, given):
    check_gate_rule(rule, **given)


def test_a_rule_that_searches_when_asked_keeps_it_too():
    def search(w_M):
        return np.round(w_M, 3), Cost(evaluations=3)

    check_gate_rule(Searched(search, np.eye(2)), mixing="logit")


def test_nothing_that_ships_is_left_out():
    shipped = {name: {n for n in kind if kind[n].__module__.startswith("paretune.policy")} for name, kind in KINDS.items()}
    assert {name_of(mixing) for mixing, _ in SHIPPED} == shipped["mixings"]
    assert {name_of(rule) for rule, _ in EXAMPLES} == shipped["rules"]


KINDS = {"mixings": MIXINGS, "rules": GATE_RULES}


@pytest.fixture
def registered():
    """Broken classes under their names, gone afterwards."""
    before = {name: dict(kind._classes) for name, kind in KINDS.items()}
    yield
    for name, kind in KINDS.items():
        kind._classes.clear()
        kind._classes.update(before[name])


class Sharing(LogitMix):
    """Every row is mixed with the mean of all rows' gates."""

    def combine(self, parts, gates_NK):
        return super().combine(parts, gates_NK.mean(0, keepdim=True).expand_as(gates_NK))


class Forgetful(LogitMix):
    """With a cache it answers by its first expert alone."""

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        parts = super().parts(input_ids_NT, attention_mask, position_ids, cache, gates_NK, last_only)
        return parts if cache is None else parts[:1].expand_as(parts)


class Flat(LogitMix):
    """Half of the sum of logits: a vertex is no expert."""

    def combine(self, parts, gates_NK):
        return super().combine(parts, gates_NK) / 2


class Overstated(Flat):
    """It says so, but claims to be one set of weights."""

    vertices_are_experts = False
    attribution = "shapley"

    def single_weights(self, gates_K):
        return Weights("delta", gates_K)


class Along(LogitMix):
    """Credited along a path that does not begin at the reference."""

    attribution = "path"


class FirstCounts(ParameterMix):
    """The first adapter twice: the order matters."""

    vertices_are_experts = False

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        gates_NK = torch.cat([2 * gates_NK[:, :1], gates_NK[:, 1:]], 1)
        return super().parts(input_ids_NT, attention_mask, position_ids, cache, gates_NK, last_only)


class Unsaid(LogitMix):
    """A setting that is not written down."""

    def __init__(self, bank, tokenizer, *, power=1.0):
        super().__init__(bank, tokenizer)
        self.power = power

    @property
    def settings(self):
        return {}

    vertices_are_experts = False
    attribution = "shapley"

    def combine(self, parts, gates_NK):
        return super().combine(parts, gates_NK**self.power)


@pytest.mark.parametrize(
    ("broken", "settings", "promise"),
    [
        (Sharing, {}, "a row does not depend on what else is in the batch"),
        (Forgetful, {}, "a cache changes nothing"),
        (Flat, {}, "gates e_k are adapter k alone"),
        (Overstated, {}, "an export computes what the family computes"),
        (FirstCounts, {}, "adapters in another order"),
        (Unsaid, {"power": 2.0}, "a saved family is the same family"),
        (Along, {}, "an explanation's parts sum to the log-ratio of every token"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_broken_mixings_are_found(registered, broken, settings, promise):
    MIXINGS.register("broken")(broken)
    with pytest.raises(ConformanceError, match=re.escape(promise)):
        check_mixing({"name": "broken", **settings}, adapters=2)


def test_a_mixing_for_one_gate_vector_refuses_several(registered):
    MIXINGS.register("broken")(type("Single", (LogitMix,), {"mixes_per_row": False}))
    with pytest.raises(ConformanceError, match="refuses several"):
        check_mixing("broken", adapters=2)


@dataclass(frozen=True)
class Jumpy(Nearest):
    """A rule in steps that calls itself smooth."""

    stepwise: ClassVar[bool] = False


@dataclass(frozen=True)
class Smooth(Identity):
    """A smooth rule that calls itself stepwise, like the list of names that was here."""

    stepwise: ClassVar[bool] = True


@dataclass(frozen=True)
class Centered(GateRule):
    """Gates that depend on the other rows."""

    def gates(self, w_WM):
        return w_WM - w_WM.mean(0) + 0.5


@dataclass(frozen=True)
class Thawed(Identity):
    """What it writes down is another rule."""

    def frozen(self):
        return Nearest(points_KM=((0.9, 0.1), (0.1, 0.9)))


@pytest.mark.parametrize(
    ("broken", "fields", "promise"),
    [
        (Jumpy, {"points_KM": ((1.0, 0.0), (0.0, 1.0))}, "a rule says whether its gates move in steps"),
        (Smooth, {}, "a rule says whether its gates move in steps"),
        (Centered, {}, "each by itself"),
        (Thawed, {}, "what is written to disk has the gates that were asked for"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_broken_gate_rules_are_found(registered, broken, fields, promise):
    GATE_RULES.register("broken")(broken)
    with pytest.raises(ConformanceError, match=re.escape(promise)):
        check_gate_rule({"name": "broken", **fields})


def test_features_of_the_contextual_rule_here_tell_prompts_apart():
    rule = GATE_RULES.build(contextual())
    assert rule.per_prompt
    assert isinstance(rule.features, Features)
