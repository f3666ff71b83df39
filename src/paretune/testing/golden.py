"""Golden data for multi-reward RL: rewards and the advantages that published rules make of them, for anybody's implementation.

The numbers lie in `paretune/golden/advantages.json`. `tools/golden.py` computes them from the rules' formulas, without this library.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from paretune.errors import ConfigError, nearest
from paretune.registry import checked
from paretune.training.advantages import advantages, aggregate_advantages
from paretune.types import Amount

__all__ = ["Difference", "check_golden", "check_known", "functions_of", "golden", "own"]

TOLERANCE = 1e-6


@cache
def golden() -> dict[str, Any]:
    """All rules and cases: "eps", "rules" by name, "cases" with rewards (None = unscored), group, weights, and expected by rule."""
    return json.loads((files("paretune") / "golden" / "advantages.json").read_text(encoding="utf-8"))


def check_known(rules: Sequence[str] = (), cases: Sequence[str] = (), *, words: Sequence[str] = ()) -> None:
    """ConfigError for a rule or a case that the data does not have; `words` may stand in a rule's place, too."""
    for name in rules:
        if name not in (known := (*golden()["rules"], *words)):
            raise ConfigError("golden data is for the rules it lists", found=repr(name), remedy=nearest(name, known))
    for name in cases:
        if name not in (known := tuple(case["name"] for case in golden()["cases"])):
            raise ConfigError("a case of the golden data is known by its name", found=repr(name), remedy=nearest(name, known))


@dataclass(frozen=True)
class Difference:
    """One case in which advantages differ: by how much at most, or why there are none to compare."""

    rule: str
    case: str
    why: str  # what the case is there for
    expected: tuple[float, ...]
    got: tuple[float, ...]
    error: str = ""

    @property
    def largest(self) -> float:
        """Infinite where a number is missing or not finite."""
        if len(self.got) != len(self.expected) or not np.isfinite(self.got).all():
            return float("inf")
        return float(np.abs(np.subtract(self.got, self.expected)).max())


def own(rule: str) -> Callable[..., np.ndarray]:
    """This library's function for a rule, called as any other that is checked."""
    settings = golden()["rules"][rule]["settings"]

    def function(rewards_NM: np.ndarray, group: int, weights_M: np.ndarray) -> np.ndarray:
        w_NM = np.tile(weights_M, (len(rewards_NM), 1))
        if "aggregation" in settings:
            return aggregate_advantages(settings["aggregation"], rewards_NM, w_NM, group=group)
        return advantages(rewards_NM, w_NM, group=group, **settings)

    return function


def check_golden(function: Callable[..., Any], rule: str, *, cases: Sequence[str] = (), tolerance: float = TOLERANCE) -> list[Difference]:
    """Where `function(rewards_NM, group, weights_M)` differs from a rule's advantages by more than `tolerance`; [] is what is wanted.

    `rewards_NM` is a float array with NaN for unscored, `group` the number of consecutive rows of one prompt. A function with a
    parameter `eps` is given that of the data. An exception is a difference, too: a case that stops a trainer is a finding.
    ConfigError where `tolerance` is negative or not finite.
    """
    data, tolerance = golden(), checked("tolerance", Amount, tolerance)
    check_known([rule], cases)
    more = {"eps": data["eps"]} if "eps" in inspect.signature(function).parameters else {}
    found = []
    for case in data["cases"]:
        if cases and case["name"] not in cases:
            continue
        expected = tuple(case["expected"][rule]["advantages"])
        got, error = (), ""
        try:
            rewards_NM = np.array(case["rewards"], dtype=float)
            answer = function(rewards_NM, case["group"], np.array(case["weights"], dtype=float), **more)
            got = tuple(np.asarray(answer, dtype=float).reshape(-1).tolist())
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        one = Difference(rule, case["name"], case["why"], expected, got, error)
        if one.largest > tolerance:
            found.append(one)
    return found


def functions_of(target: str, rules: Sequence[str] = ()) -> dict[str, Callable[..., Any]]:
    """Rule -> function, from FILE, FILE:FUNCTION, MODULE or MODULE:FUNCTION.

    Without a function's name every function that is called like a rule is taken; a named one is checked against `rules`, or the rule
    of its name.
    """
    place, _, name = target.partition(":")
    module = _module(place)
    known = golden()["rules"]
    check_known(rules)
    wanted = dict.fromkeys(rules or ([name] if name in known else []), name) if name else {rule: rule for rule in rules or known}
    found = {rule: getattr(module, one) for rule, one in wanted.items() if callable(getattr(module, one, None))}
    if not found or (name and not wanted) or (rules and len(found) < len(wanted)):
        raise ConfigError(
            "a function that is checked has the name of a rule, or is named together with --rule",
            found=f"{target} with the rules {', '.join(rules)}" if rules else target,
            remedy=f"call it like one of {', '.join(known)}; or give {place}:FUNCTION --rule RULE",
        )
    return found


def _module(place: str) -> Any:
    """The module of a Python file or of an importable name; ConfigError where it cannot be had."""
    spec = importlib.util.spec_from_file_location("paretune_golden_checked", place) if place.endswith(".py") else None
    try:
        if spec is None or spec.loader is None:
            return importlib.import_module(place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise ConfigError(
            "what is checked is a Python file or a module that can be imported",
            found=f"{place}: {type(error).__name__}: {error}",
            remedy="give FILE.py, or a module on the path, such as paretune.training.advantages",
        ) from error
