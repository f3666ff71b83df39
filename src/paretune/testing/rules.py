"""Conformance of gate rules: what a class registered in GATE_RULES promises, as a check that plug-in authors run.

from paretune.testing import check_gate_rule

def test_my_rule():
    check_gate_rule("my-rule")                      or {"name": "my-rule", field: value, ...}, or an instance
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paretune.policy.base import build_policy
from paretune.policy.family import Family
from paretune.policy.rules import GateRule
from paretune.registry import GATE_RULES
from paretune.seeds import generator
from paretune.testing.families import check_family, check_gates, quick_task, random_adapters, some_preferences
from paretune.testing.objectives import attempt, check_registered, require
from paretune.types import Cost

__all__ = ["check_gate_rule"]

PAIRS, STEP = 40, 1e-7  # preferences that are looked at twice, and how far apart


def check_gate_rule(
    rule: GateRule | str | Mapping[str, Any],
    *,
    objectives: int = 2,
    mixing: str | Mapping[str, Any] = "parameter",
    adapters: int | None = None,
) -> None:
    """A gate rule (an instance, a name, or {"name": ..., fields}) for this many objectives, in a family of random adapters.

    `mixing` is where its gates are used, and `adapters` how many there are, if not one per gate.
    """
    rule = GATE_RULES.build(rule) if isinstance(rule, (str, Mapping)) else rule
    if not rule.searches:
        check_registered(rule, GATE_RULES, GateRule)
    task = quick_task(objective_count=objectives)
    w_WM = some_preferences(task)
    remedy = "gates(w_WM) gives one row per preference"
    count = attempt("a gate rule gives gates to every preference", remedy, lambda: np.shape(rule.gates(w_WM))[1])
    _check_steps(rule, objectives)
    cost = attempt("a gate rule says what its searches cost", "cost(w_WM) gives a Cost", lambda: rule.cost(w_WM))
    require(isinstance(cost, Cost), "a gate rule says what its searches cost", repr(cost), "cost(w_WM) gives a Cost")
    frozen = rule.frozen()
    check_registered(frozen, GATE_RULES, GateRule)
    same = np.array_equal(frozen.gates(w_WM), rule.gates(w_WM))
    require(same, "what is written to disk has the gates that were asked for", "other gates", "see `frozen`")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = random_adapters(task, count if adapters is None else adapters, folder)
        policy = build_policy(task, mixing, paths)
        family = Family(policy, rule, task.objectives, task.base(), paths, {}, max_new_tokens=task.max_new_tokens)
        check_gates(family, list(task.prompts("test")), w_WM)
        check_family(family, task, folder)


def _check_steps(rule: GateRule, objectives: int) -> None:
    """Gates of near preferences are equal, but for a few pairs across a border, if and only if the rule is `stepwise`."""
    if rule.searches:
        return
    rng = generator(0, "conformance", "steps")
    w_WM = rng.dirichlet(np.full(objectives, 2.0), size=PAIRS)
    near_WM = (1 - STEP) * w_WM + STEP * np.roll(w_WM, 1, axis=0)
    equal = int((rule.gates(w_WM) == rule.gates(near_WM)).all(1).sum())
    found = f"{equal} of {PAIRS} pairs of near preferences have equal gates, and stepwise = {rule.stepwise}"
    want = equal >= 0.9 * PAIRS if rule.stepwise else equal <= 0.1 * PAIRS
    require(want, "a rule says whether its gates move in steps", found, f"stepwise = {not rule.stepwise}")
