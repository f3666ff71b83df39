"""The single-policy sweeps: which trainings they plan, and that every setting passes the conformance suite with 2 and 3 objectives."""

import numpy as np
import pytest

from paretune.errors import ConfigError
from paretune.methods.sweep import Gradient
from paretune.registry import METHODS
from paretune.testing.methods import check_method, quick_learner, quick_task
from paretune.training.weightings.adaptive import GradientLevel
from paretune.training.weightings.gramian import AGGREGATORS

TINY = {"alphabet": 3, "length": 2, "prompt_count": 2, "width": 16}
TASKS = {2: quick_task(**TINY), 3: quick_task(**TINY, objective_count=3, rho=-0.2)}
AT = {
    2: ((0.6, 0.4), (0.4, 0.6)),
    3: ((0.5, 0.3, 0.2), (0.3, 0.4, 0.3), (0.2, 0.3, 0.5)),
}  # mirror images, for the methods that promise symmetry
SETTINGS = [
    *({"name": "gradient", "aggregator": aggregator} for aggregator in AGGREGATORS),
    *({"name": "adaptive", "weighting": weighting} for weighting in ("influence", "ctwa", "exp3", "linucb", "thompson")),
    *({"name": "normalized", "aggregation": a} for a in ("grpo", "mo_grpo", "gdpo", "gd2po", "gd2po_snr", "dvao", "rdpo", "pama")),
]


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: "-".join(given.values()))
def test_it_passes_the_conformance_suite(given, m):
    pytest.importorskip("torchjd")
    check_method({**given, "at": AT[m]}, task=TASKS[m], learner=quick_learner(steps=2, rank=2))


def specs(given, m=2):
    method = METHODS.build({**given, "points": 3})
    learner = quick_learner()
    return method.preferences(TASKS[m]), method.plan(TASKS[m], learner, {}, 0), METHODS.build("linear").plan(TASKS[m], learner, {}, 0)


@pytest.mark.parametrize("given", SETTINGS, ids=lambda given: "-".join(given.values()))
def test_every_training_says_what_it_is_and_vertices_are_shared_where_they_are_the_experts(given):
    w_KM, planned, linear = specs(given)
    keys = {spec.key for spec in linear}
    for w_M, spec in zip(w_KM, planned, strict=True):
        vertex = np.count_nonzero(w_M) == 1
        assert (spec.key in keys) == (vertex and given["name"] != "normalized")
    others = [METHODS.build({**other, "points": 3}).plan(TASKS[2], quick_learner(), {}, 0)[-1].key for other in SETTINGS if other != given]
    assert planned[-1].key not in others


def test_settings_reach_the_weighting_and_are_checked_at_once():
    plain = METHODS.build({"name": "adaptive", "weighting": "linucb", "points": 3})
    tuned = METHODS.build({"name": "adaptive", "weighting": "linucb", "settings": {"alpha": 0.5}, "points": 3})
    assert tuned.plan(TASKS[2], quick_learner(), {}, 0)[-1].weighting["alpha"] == 0.5
    assert plain.plan(TASKS[2], quick_learner(), {}, 0)[-1].weighting["rule"] == "linucb"
    with pytest.raises(ConfigError, match="fields that it declares"):
        METHODS.build({"name": "adaptive", "weighting": "ctwa", "settings": {"alpha": 0.5}})


def test_a_missing_library_is_said_when_the_trainings_are_planned(monkeypatch):
    def missing(self):
        raise ConfigError("needs TorchJD", found="nothing", remedy='pip install "paretune[gradient]"')

    monkeypatch.setattr(GradientLevel, "check", missing)
    assert Gradient().points == 6, "listing methods needs no library"
    with pytest.raises(ConfigError, match="needs TorchJD"):
        specs({"name": "gradient"})
