"""A new mixing and a new gate rule, each one file outside the tree: everything that ships works with them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from paretune.evaluation.evaluate import evaluate
from paretune.evaluation.explain import explain, sensitivity
from paretune.policy.base import MIXINGS, build_policy
from paretune.policy.family import Family
from paretune.policy.rules import Identity
from paretune.registry import GATE_RULES, load_plugin
from paretune.serve.export import export, single_weights
from paretune.testing import check_gate_rule, check_mixing, quick_task
from paretune.testing.mixings import random_adapters

MIXING = '''\
"""The arithmetic mean of the experts' next-token probabilities: one expert is drawn for each token."""

from paretune.policy.base import MIXINGS
from paretune.policy.mixing.predictions import LogitMix, weighted


@MIXINGS.register("mean")
class MeanMix(LogitMix):
    """log pi(y_t) = log sum_k g_k pi_k(y_t), plus `floor` in every probability.

    Source: the linear opinion pool (Stone 1961). Differs: token by token. Hides: K forwards per token.
    """

    has_composition_limit = False
    attribution = "shapley"  # "product", which logit mixing is, would miss its sum

    def __init__(self, bank, tokenizer, *, floor=1e-12):
        super().__init__(bank, tokenizer)
        self.floor = floor

    @property
    def settings(self):
        return {"floor": self.floor}

    def combine(self, parts, gates_NK):
        return (weighted(parts.softmax(-1), gates_NK) + self.floor).log()
'''

RULE = '''\
"""Gates that follow the preference faster near the middle: w^power, scaled to sum to 1."""

from dataclasses import dataclass

import numpy as np

from paretune.policy.rules import GateRule
from paretune.registry import GATE_RULES


@GATE_RULES.register("power")
@dataclass(frozen=True)
class Power(GateRule):
    """Adapter k has the gate w_k^power / sum_j w_j^power; power 1 is the preference itself."""

    power: float = 2.0

    def gates(self, w_WM):
        raised_WM = np.asarray(w_WM, dtype=np.float64) ** self.power
        return raised_WM / raised_WM.sum(1, keepdims=True)
'''


@pytest.fixture
def plugins(tmp_path):
    """The two files, loaded; their names are gone afterwards."""
    known = {kind: dict(kind._classes) for kind in (MIXINGS, GATE_RULES) if list(kind)}
    modules = set(sys.modules)
    for name, text in (("my_mixing.py", MIXING), ("my_rule.py", RULE)):
        assert len(text.splitlines()) < 40
        (tmp_path / name).write_text(text)
        load_plugin(tmp_path / name)
    yield
    for kind, classes in known.items():
        kind._classes.clear()
        kind._classes.update(classes)
    for name in set(sys.modules) - modules:
        if name.startswith("paretune_plugin_"):
            del sys.modules[name]


def test_a_new_mixing_is_one_file(plugins, tmp_path):
    check_mixing("mean")
    task = quick_task(objective_count=3)
    paths = random_adapters(task, 3, tmp_path)
    family = Family(build_policy(task, "mean", paths), Identity(), task.objectives, task.base(), paths, max_new_tokens=3)
    used(family, task, tmp_path, exported=[1.0, 0.0, 0.0])
    assert single_weights(family, np.array([0.0, 1.0, 0.0])).how == "delta"


def test_a_new_gate_rule_is_one_file(plugins, tmp_path):
    check_gate_rule("power", objectives=3)
    check_gate_rule({"name": "power", "power": 0.5}, mixing="logit")
    task = quick_task()
    paths = random_adapters(task, 2, tmp_path)
    rule = GATE_RULES.build({"name": "power", "power": 3.0})
    family = Family(build_policy(task, "parameter", paths), rule, task.objectives, task.base(), paths, max_new_tokens=3)
    assert family.gates(np.array([[0.5, 0.5], [0.25, 0.75]])) == pytest.approx(np.array([[0.5, 0.5], [1 / 28, 27 / 28]]))
    used(family, task, tmp_path, exported=[0.3, 0.7])


def used(family, task, folder, exported):
    """What a user does with a family, one after the other."""
    prompts, middle = list(task.prompts("test")), np.full(task.objectives.count, 1 / task.objectives.count)
    said = family.sample(prompts, middle.tolist(), n=2)
    assert [len(answers) for answers in said] == [2] * len(prompts)
    (why,) = explain(family, prompts[0], middle.tolist(), response=said[0][0])
    assert why.contribution_TK.sum(1) + why.remainder_T == pytest.approx(why.ratio_T)
    assert not sensitivity(task, family, middle.tolist()).stepwise
    measured = evaluate(task, family, splits=["test"])
    assert np.isfinite(measured.metrics["splits"]["test"]["attainment"]["mean"])
    assert export(family, folder / "exported", exported).path.is_dir()
    family.save(folder / "family")
    card = json.loads((folder / "family" / "family.json").read_text())
    assert card["max_new_tokens"] == 3
    assert Family.load(folder / "family").sample(prompts, middle.tolist(), n=2) == said
