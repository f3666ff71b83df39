"""Conformance of objectives: what every objective must keep, as a check that plug-in authors run; and what all suites share."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paretune.objectives.base import Objective
from paretune.registry import OBJECTIVES, Registry, describe
from paretune.seeds import forked_torch
from paretune.types import canonical_json

__all__ = ["ConformanceError", "attempt", "check_objective", "check_registered", "require"]

TEXTS = ("", " ", "A plain sentence.", "Zwei Zeilen.\n\nUmlaute: äöß, 漢字, 🙂", "word " * 200, '{"json": [1, 2]}', "</s><eos>\\n\t")


class ConformanceError(AssertionError):
    """A class that does not keep what its contract promises."""

    def __init__(self, rule: str, *, found: str, remedy: str):
        super().__init__(f"{rule}\n  found:  {found}\n  remedy: {remedy}")
        self.rule, self.found, self.remedy = rule, found, remedy


def require(kept: bool, rule: str, found: str, remedy: str) -> None:
    """Raise ConformanceError unless the rule is kept."""
    if not kept:
        raise ConformanceError(rule, found=found, remedy=remedy)


def attempt(rule: str, remedy: str, call: Callable[[], Any]) -> Any:
    """The result of `call`; an exception inside it breaks `rule`."""
    try:
        return call()
    except ConformanceError:
        raise
    except Exception as error:
        raise ConformanceError(rule, found=f"{type(error).__name__}: {error}", remedy=remedy) from error


def check_registered(thing: Any, registry: Registry, base: type) -> None:
    """A frozen dataclass, registered, that its JSON description builds again."""
    kind, cls = registry.kind, type(thing)
    names = "_".join(kind.upper().split()) + "S"
    require(isinstance(thing, base), f"a {kind} is a subclass of {base.__name__}", repr(cls), f"class {cls.__name__}({base.__name__})")
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, f"a {kind} is a frozen dataclass", cls.__name__, "@dataclass(frozen=True) below the register decorator")
    name = getattr(thing, "registered_name", None)
    known = name is not None and name in list(registry) and registry[name] is cls
    require(known, f"a {kind} is registered", f"{cls.__name__}: {name!r}", f'@{names}.register("its-name")')
    text = attempt(f"a {kind} describes itself as JSON", "fields of plain JSON types", lambda: canonical_json(describe(thing)))
    again = attempt(
        f"a {kind} is built again from its description", "every field is an argument of __init__", lambda: registry.build(describe(thing))
    )
    require(canonical_json(describe(again)) == text, f"a {kind} is built again from its description", repr(again), "do not change fields")


# Objectives


def check_objective(objective: Any, *, columns: Mapping[str, Any] | None = None) -> None:
    """An objective (an instance, a description, or any callable with TRL's reward signature) called as TRL's trainers call it.

    `columns`: one value for each column that it needs, such as {"answer": "42"}.
    """
    objective = OBJECTIVES.build(objective) if isinstance(objective, (str, Mapping)) else objective
    if isinstance(objective, Objective):
        check_registered(objective, OBJECTIVES, Objective)
        ranged = math.isfinite(objective.low) and math.isfinite(objective.high) and objective.low < objective.high
        require(ranged, "an objective states its range", f"{objective.low} to {objective.high}", "low and high are finite, low below high")
    require(callable(objective), "an objective is called with prompts and completions", repr(objective), "def __call__(self, ...)")
    require(isinstance(getattr(objective, "__name__", None), str), "an objective has a __name__: trainers print it", repr(objective),
            "a property __name__ that returns a string")  # fmt: skip
    call = inspect.unwrap(objective if inspect.isfunction(objective) else objective.__call__)
    require(not inspect.iscoroutinefunction(call), "an objective is an ordinary function", "async", "run the event loop inside")
    given = dict(columns or {})
    for chat in (False, True):
        _check_calls(objective, given, chat=chat)


def _check_calls(objective: Any, columns: Mapping[str, Any], *, chat: bool) -> None:
    kind = "conversational" if chat else "plain"
    prompts: list[Any] = [f"Question {i}?" for i in range(len(TEXTS))]
    completions: list[Any] = list(TEXTS)
    if chat:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        completions = [[{"role": "assistant", "content": c}] for c in completions]
    remedy = "def __call__(self, prompts, completions, **columns) -> list[float | None]"

    def scores(order: Sequence[int]) -> list[float | None]:
        batch: dict[str, Any] = {
            "prompts": [prompts[i] for i in order],
            "completions": [completions[i] for i in order],
            "completion_ids": [[ord(c) for c in TEXTS[i]] for i in order],
            **{name: [copy.deepcopy(value) for _ in order] for name, value in columns.items()},
        }
        kept = copy.deepcopy(batch)
        rule = f"an objective scores {kind} prompts and completions, called by keyword with columns that it may not know"
        hooks = {"trainer_state": None, "log_extra": lambda *_, **__: None, "log_metric": lambda *_, **__: None}
        with forked_torch(0):
            returned = attempt(rule, remedy, lambda: objective(**batch, **hooks))
        require(batch == kept, "an objective leaves its arguments as they are", "a changed list", "work on copies")
        return _checked_scores(objective, returned, len(order), remedy)

    everything = list(range(len(TEXTS)))
    first = scores(everything)
    rule = "a score depends on its own prompt and completion only, and is the same every time"
    require(_same(scores(everything), first), rule, "two calls differ", "no randomness, no state")
    require(_same(scores(everything[::-1])[::-1], first), rule, "another order of the batch gave other scores", "score each row by itself")
    alone = [scores([i])[0] for i in everything]
    rounding = getattr(objective, "rounding", 0.0)
    require(_same(alone, first, rounding), rule, "a completion scored alone got another score", "no comparison within the batch")
    require(scores([]) == [], "no completions get no scores", "something else", "return one score per completion")


def _checked_scores(objective: Any, returned: Any, count: int, remedy: str) -> list[float | None]:
    rule = "an objective returns a list with one number or None per completion"
    require(isinstance(returned, (list, tuple)), rule, type(returned).__name__, remedy)
    require(len(returned) == count, rule, f"{len(returned)} scores for {count} completions", remedy)
    for score in returned:
        number = score is None or (isinstance(score, (int, float, np.number)) and not isinstance(score, complex))
        require(number, rule, repr(score), "float(...), or None where it cannot be scored")
        if score is None or math.isnan(score):
            continue
        require(math.isfinite(score), "scores are finite", repr(score), "None where it cannot be scored")
        if isinstance(objective, Objective):
            inside = objective.low - 1e-9 <= score <= objective.high + 1e-9
            require(inside, "scores lie within the declared range", f"{score} outside {objective.low} to {objective.high}", "widen or clip")
    return list(returned)


def _same(one: Sequence[float | None], two: Sequence[float | None], rounding: float = 0.0) -> bool:
    pairs = [(_known(a), _known(b)) for a, b in zip(one, two, strict=True)]
    return all(a == b or (a is not None and b is not None and abs(a - b) <= rounding) for a, b in pairs)


def _known(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else score
