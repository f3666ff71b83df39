"""The promises of tasks and objectives as checks; `paretune.testing` is the public door to them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from paretune.objectives import Objective
from paretune.registry import OBJECTIVES, TASKS, Registry, describe
from paretune.seeds import forked_torch, generator
from paretune.tasks import Task
from paretune.types import Preference, Prompt, canonical_json

__all__ = ["ConformanceError", "attempt", "check_objective", "check_registered", "check_task", "require"]

SPLITS = ("train", "test")
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
    require(isinstance(thing, base), f"a {kind} is a subclass of {base.__name__}", repr(cls), f"class {cls.__name__}({base.__name__})")
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, f"a {kind} is a frozen dataclass", cls.__name__, "@dataclass(frozen=True) below the register decorator")
    name = getattr(thing, "registered_name", None)
    known = name is not None and name in list(registry) and registry[name] is cls
    require(known, f"a {kind} is registered", f"{cls.__name__}: {name!r}", f'@{kind.upper()}S.register("its-name")')
    text = attempt(f"a {kind} describes itself as JSON", "fields of plain JSON types", lambda: canonical_json(describe(thing)))
    again = attempt(
        f"a {kind} is built again from its description", "every field is an argument of __init__", lambda: registry.build(describe(thing))
    )
    require(canonical_json(describe(again)) == text, f"a {kind} is built again from its description", repr(again), "do not change fields")


# Tasks


def check_task(task: Task | str | Mapping[str, Any]) -> None:
    """Description, prompts, scores, reference model and, for exact tasks, the front of a task (an instance or its description)."""
    task = TASKS.build(task) if isinstance(task, (str, Mapping)) else task
    check_registered(task, TASKS, Task)
    m = task.objectives.count
    low_M, high_M = np.array(task.objectives.low), np.array(task.objectives.high)
    ranged = np.isfinite(low_M).all() and np.isfinite(high_M).all() and (low_M < high_M).all()
    require(bool(ranged), "every objective has a finite range, low below high", f"{low_M} to {high_M}", "declare the worst and the best")
    require(m >= 2, "a task has at least two objectives", f"{m}", "with one objective there is nothing to trade")
    require(task.beta > 0, "beta is positive: KL costs return", f"{task.beta}", "beta=0.1, for example")
    require(task.max_new_tokens >= 1, "a response may have a token", f"{task.max_new_tokens}", "max_new_tokens=64, for example")
    _check_judged(task, m)
    prompts = _check_prompts(task)
    _check_scores(task, prompts, m)
    _check_model(task)
    if task.is_exact:
        _check_exact(task)


def _check_judged(task: Task, m: int) -> None:
    w_WM = task.judged()
    for w_M in w_WM:
        attempt("judged preferences are preferences", "rows on the simplex", partial(Preference.of, task.objectives.names, w_M.tolist()))
    require(np.array_equal(w_WM, task.judged()), "judged preferences are fixed", "two calls differ", "no randomness without a fixed seed")


def _check_prompts(task: Task) -> list[Prompt]:
    found: dict[str, list[Prompt]] = {}
    for split in SPLITS:
        rule = f"prompts({split!r}) gives the same prompts every time"
        found[split] = list(attempt(rule, "both splits exist", partial(task.prompts, split)))
        require(bool(found[split]), f"the split {split!r} has prompts", "none", "keep some prompts for testing")
        same = [p.digest for p in task.prompts(split)] == [p.digest for p in found[split]]
        require(same, rule, "another order, or other prompts", "sort, and draw only from the task's seed")
    shared = {p.digest for p in found["train"]} & {p.digest for p in found["test"]}
    require(not shared, "test prompts are not training prompts", f"{len(shared)} in both splits", "split once, by prompt")
    return found["train"][:3] + found["test"][:3]


def _check_scores(task: Task, prompts: list[Prompt], m: int) -> None:
    texts = [TEXTS[i % len(TEXTS)] for i in range(len(prompts))]
    if task.is_exact:
        responses: list[str] = task.responses  # type: ignore[attr-defined]
        texts = [responses[i * len(responses) // len(prompts)] for i in range(len(prompts))]
    rule, remedy = "score() gives an (N, M) float array, NaN where it cannot score", "build on paretune.objectives.score_all"
    scores_NM = attempt(rule, remedy, lambda: task.score(prompts, texts))
    shaped = isinstance(scores_NM, np.ndarray) and scores_NM.shape == (len(prompts), m) and scores_NM.dtype == np.float64
    require(shaped, rule, f"{type(scores_NM).__name__} {np.shape(scores_NM)}", remedy)
    require(not np.isinf(scores_NM).any(), rule, "an infinity", remedy)
    empty = attempt(rule, remedy, lambda: task.score([], []))
    require(np.shape(empty) == (0, m), rule, f"shape {np.shape(empty)} for no completions", remedy)
    again = task.score(prompts[::-1], texts[::-1])[::-1]
    require(np.array_equal(again, scores_NM, equal_nan=True), "a score depends on its own prompt and completion only",
            "another order of the batch gave other scores", "no state, no comparison within the batch")  # fmt: skip


def _check_model(task: Task) -> None:
    import torch

    rule = "load() gives a fresh copy of the reference in eval mode, and its tokenizer"
    (model, tokenizer), (other, _) = (attempt(rule, "load from disk each time", task.load) for _ in range(2))
    require(not model.training, rule, "training mode", "return model.eval()")
    require(not hasattr(model, "peft_config"), rule, "a model with adapters", "merge them, or load the base model")
    mine, theirs = next(model.parameters()), next(other.parameters())
    require(bool(torch.equal(mine, theirs)), rule, "two copies with different weights", "seed the initialisation")
    require(mine.data_ptr() != theirs.data_ptr(), rule, "two calls share their weights", "a method may change the model that it was given")
    require(tokenizer.eos_token_id is not None or model.config.eos_token_id is not None, "responses can end",
            "no EOS id in tokenizer or model", "set tokenizer.eos_token")  # fmt: skip


def _check_exact(task: Any) -> None:
    """Probabilities, optima and front agree with their definitions; random policies stay below the front."""
    for split in SPLITS:
        reference_PR, rewards_PRM = task.reference_logp_PR(split), task.rewards_PRM(split)
        sums = np.exp(reference_PR).sum(1)
        require(np.allclose(sums, 1, atol=1e-5), "the reference is a distribution over the responses", f"sums {sums}", "see tasks.exact")
        texts, prompts = task.responses, task.prompts(split)
        scored = task.score([prompts[0]] * len(texts), texts)
        require(np.allclose(scored, rewards_PRM[0]), "score() and rewards_PRM() agree", f"{split}: they differ", "one table for both")
        start_M = task.J_M(reference_PR, split)
        kl = float(np.abs(task.returns(reference_PR, split)[1]).max())
        require(kl < 1e-9, "the reference is no nats from itself", f"{kl}", "KL against reference_logp_PR")
        w_WM = np.concatenate([np.eye(task.objectives.count), task.judged()[:3]])
        front_WM = task.front(split, w_WM).points_KM
        above = (front_WM > task.reference_point(split)).all(1) | (np.abs(w_WM).max(1) == 1)
        require(bool(above.all()), "the reference point lies below the front", f"{task.reference_point(split)}", "nadir minus a margin")
        for w_M, point_M in zip(w_WM, front_WM, strict=True):
            own_M = task.J_M(task.optimum_logp_PR(w_M, split), split)
            require(
                np.allclose(own_M, point_M, rtol=0, atol=1e-8), "the front holds the optima", f"{own_M} and {point_M}", "one from the other"
            )
            require(w_M @ own_M >= w_M @ start_M - 1e-9, "the optimum is no worse than the reference", f"at {w_M}", "check beta's sign")
        rng = generator(0, "conformance", split)
        for number in range(40):
            noise_PR = rng.normal(0, rng.choice([0.1, 1.0, 3.0]), reference_PR.shape)
            start_PR = task.optimum_logp_PR(w_WM[number % len(w_WM)], split) if number % 2 else reference_PR
            logp_PR = start_PR + noise_PR
            logp_PR -= np.logaddexp.reduce(logp_PR, axis=1, keepdims=True)
            excess_W = w_WM @ task.J_M(logp_PR, split) - (w_WM * front_WM).sum(1)
            require(
                excess_W.max() <= 1e-9, "no policy exceeds the front", f"a random one does, by {excess_W.max():.3g}", "see J_M and front"
            )


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
