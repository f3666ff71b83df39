"""Conformance of methods: what a class registered in METHODS promises, as a check that plug-in authors run.

    from paretune.testing import check_method

    def test_my_method():
        check_method("my-method")

It raises ConformanceError at the first broken promise, in three parts like every error here: the promise, what was found, and the
way out. It trains and samples for real, on a task with 85 responses, in seconds; nothing is written outside a temporary directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np

from paretune.evaluation.evaluate import evaluate
from paretune.methods.base import CATEGORIES, Card, Method
from paretune.policy.family import Family
from paretune.policy.returns import metered
from paretune.registry import LEARNERS, METHODS, describe
from paretune.tasks.base import Task
from paretune.testing.mixings import check_gates, check_samples, exact_logp, quick_task, some_preferences
from paretune.testing.objectives import ConformanceError, attempt, check_registered, require
from paretune.training.learners.base import Learner
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Preference, canonical_json

__all__ = ["ConformanceError", "check_method", "quick_learner", "quick_task", "train_plan"]

MAX_WAVES = 50
TOLERANCE = 1e-3  # of returns, between a task and the same task with its objectives swapped


def quick_learner(**fields: Any) -> Learner:
    """An exact learner with a few steps, and adapters that count for more than usual: enough to tell policies apart."""
    return LEARNERS.build({"name": "exact", "steps": 5, "rank": 4, "alpha": 32, **fields})


def check_method(method: Method | str | Mapping[str, Any], *, task: Task | None = None, learner: Learner | None = None) -> None:
    """Card, description, plan, trainings, policies and the search's cost of a method (an instance, a name, or {"name": ..., fields}).

    A method that declares `symmetric: ClassVar[bool] = True` promises, in addition, that swapping the task's objectives swaps its
    trainings and its returns; this is checked on exact tasks.
    """
    method = METHODS.build(method) if isinstance(method, (str, Mapping)) else method
    check_registered(method, METHODS, Method)
    _check_card(method)
    task, learner = task or quick_task(), learner or quick_learner()
    with tempfile.TemporaryDirectory() as folder:
        done = train_plan(method, task, learner, Path(folder), seed=0)
        _check_seed(method, task, learner)
        before = _digests(folder)
        build = partial(
            attempt,
            "policy() builds a family from the trainings that plan() asked for",
            "use only keys that plan() gave, and only `done[key].path` of them",
            lambda: method.policy(task, learner, MappingProxyType(done), 0),
        )
        w_WM = some_preferences(task)
        family = _check_charged(build, task, w_WM)
        check_gates(family, list(task.prompts("test"))[:3], w_WM)
        check_samples(family, task, w_WM)
        if task.is_exact:
            _check_probabilities(family, build(), task, w_WM)
        _check_saved(family, Path(folder) / "saved", w_WM)
        after = {path: digest for path, digest in _digests(folder).items() if not path.startswith("saved")}
        require(before == after, "finished trainings never change", "files of an artifact were written to", "copy what you want to change")
        if method.symmetric and task.is_exact:
            _check_symmetry(method, task, learner, family, Path(folder) / "swapped")


def train_plan(method: Method, task: Task, learner: Learner, root: Path, *, seed: int) -> dict[str, Artifact]:
    """Train everything that the method plans, wave by wave, into `root`; every promise of `plan` is checked on the way."""
    done: dict[str, Artifact] = {}
    for _ in range(MAX_WAVES):
        wave = [spec for spec in _planned(method, task, learner, done, seed) if spec.key not in done]
        if not wave:
            return done
        for spec in wave:
            work = root / spec.key
            work.mkdir(parents=True)
            parents = {key: done[key] for key in spec.parents}
            LEARNERS.build(spec.learner).train(spec, task, work, parents=parents)
            done[spec.key] = Artifact(key=spec.key, path=work, spec=spec)
    raise ConformanceError(
        "plan() comes to an end",
        found=f"it still asks for new trainings after {MAX_WAVES} waves ({len(done)} trained)",
        remedy="return nothing new once everything is in `done`; make specs from the arguments only, so that keys repeat",
    )


def _planned(method: Method, task: Task, learner: Learner, done: dict[str, Artifact], seed: int) -> list[TrainSpec]:
    """The next wave, asked for three times; refuses what is not a valid wave."""
    rule, remedy = "plan() is a pure function of its arguments", "no state, no clock, no random draws without the seed"
    views = [MappingProxyType(dict(done)), MappingProxyType(dict(done)), MappingProxyType(dict(reversed(done.items())))]
    plans = [list(attempt(rule, remedy, partial(method.plan, task, learner, view, seed))) for view in views]
    for spec in plans[0]:
        require(isinstance(spec, TrainSpec), "plan() returns TrainSpecs", repr(spec), "build them with paretune.training.spec.TrainSpec")
    keys = [[spec.key for spec in plan] for plan in plans]
    require(keys[0] == keys[1], rule, "two calls with equal arguments gave different trainings", remedy)
    require(sorted(keys[0]) == sorted(keys[2]), rule, "the order of `done` changed the plan", "sort by key what you read from `done`")
    require(len(set(keys[0])) == len(keys[0]), "a wave asks for each training once", f"{len(keys[0])} specs, {len(set(keys[0]))} keys",
             "make the specs distinct, or name each once")  # fmt: skip
    for spec in plans[0]:
        require(canonical_json(spec.task) == canonical_json(describe(task)), "a training is on the task that was given",
                 f"spec.task = {spec.task}", "task=registry.describe(task)")  # fmt: skip
        attempt("spec.learner describes a learner", "learner=registry.describe(learner)", partial(LEARNERS.build, spec.learner))
        if spec.preference is not None:
            attempt("spec.preference is a preference over the task's objectives", "non-negative weights that sum to 1, or None",
                     partial(Preference, task.objectives.names, spec.preference))  # fmt: skip
        early = [key for key in spec.parents if key not in done]
        require(
            not early, "a training starts from finished ones", f"parents {early} not in `done`", "ask for the parent in an earlier wave"
        )
    return plans[0]


def _check_seed(method: Method, task: Task, learner: Learner) -> None:
    first, second = ([spec.key for spec in method.plan(task, learner, {}, seed)] for seed in (0, 1))
    require(
        not set(first) & set(second), "the seed is part of every training", "two seeds share a training", "seed=seed in every TrainSpec"
    )


def _check_charged(build: Callable[[], Family], task: Task, w_WM: np.ndarray) -> Family:
    """The family, after its search: what was measured through `policy.returns`, and what was scored in any other way, is in its cost."""
    kind, scored = type(task), 0

    def score(self: Task, prompts: Any, completions: Any) -> np.ndarray:
        nonlocal scored
        scored += len(completions)
        return plain(self, prompts, completions)

    plain = kind.score
    with metered() as meter, mock.patch.object(kind, "score", score):
        family = build()
        family.gates(w_WM)
    said, seen = family.cost(w_WM), max(scored, meter.cost.validation_samples)
    told = f"{said.evaluations} gate vectors and {said.validation_samples} responses in `cost`"
    require(
        said.evaluations >= meter.cost.evaluations and said.validation_samples >= seen,
        "what a search measures is charged",
        f"{told}, {meter.cost.evaluations} and {seen} were measured",
        "measure within `with metered() as meter:`, and give the family search_cost=meter.cost, or the rule a `cost`",
    )
    return family


def _check_card(method: Method) -> None:
    card: Any = getattr(method, "card", None)
    require(isinstance(card, Card), "a method has a card", repr(card), "card: ClassVar[Card] = Card(...)")
    for field in dataclasses.fields(Card):
        value = getattr(card, field.name)
        require(value != "" and value is not None and (not isinstance(value, str) or bool(value.strip())), "every line of a card is filled",
                 f"{field.name} is empty", 'say "nothing" or "none" where that is the truth')  # fmt: skip
    require(card.category in CATEGORIES, "a card's family is one of the taxonomy's", repr(card.category), f"one of {', '.join(CATEGORIES)}")
    require("\n" not in card.summary, "a card's summary is one line", repr(card.summary), "move the rest into the class's docstring")


def _check_probabilities(family: Family, again: Family, task: Any, w_WM: np.ndarray) -> None:
    for split in ("train", "test"):
        prompts = task.prompts(split)
        for w_M, gates in zip(w_WM, family.gates(w_WM, prompts), strict=True):
            logp_PR = exact_logp(task, family, split, gates)
            off = float(np.abs(np.exp(logp_PR).sum(1) - 1).max())
            require(off < 1e-5, "the policy is a distribution over responses", f"probabilities sum to 1 +- {off:.2g}", "normalize logits")
            same = np.array_equal(exact_logp(task, again, split, again.gates(w_M[None], prompts)[0]), logp_PR)
            require(same, "policy() is a pure function of its arguments", "two families of the same trainings differ", "draw from the seed")


def _check_saved(family: Family, path: Path, w_WM: np.ndarray) -> None:
    rule = "a saved family is the same family"
    gates_WK = family.gates(w_WM)
    remedy = "describe everything in the rule's fields, base and adapters"
    attempt(rule, remedy, partial(family.save, path))
    loaded = attempt(rule, remedy, partial(Family.load, path))
    require(np.array_equal(loaded.gates(w_WM), gates_WK), rule, "other gates at the same preferences", "save what the rule needs")
    require(loaded.policy.mixing == family.policy.mixing, rule, f"mixing {loaded.policy.mixing}", f"save mixing {family.policy.mixing}")
    require(isinstance(loaded.meta.get("card"), dict), "a family carries its method's card", f"meta has {sorted(loaded.meta)}",
             'meta={"card": dataclasses.asdict(method.card), ...}')  # fmt: skip


def _check_symmetry(method: Method, task: Any, learner: Learner, family: Family, root: Path) -> None:
    """The same task with its objectives in the opposite order: trainings and returns must be those of the opposite preferences."""
    rule, remedy = "a symmetric method treats the objectives alike", "do the same for every objective, or leave out `symmetric`"
    swapped = _swapped(task)
    plans = [[s.preference for s in method.plan(t, learner, {}, 0) if s.preference is not None] for t in (task, swapped)]
    mirrored = sorted(tuple(reversed(p)) for p in plans[1])
    same = len(mirrored) == len(plans[0]) and np.allclose(sorted(plans[0]), mirrored)
    require(same, rule, f"it trains {sorted(plans[0])}, and {mirrored} with the objectives swapped", remedy)
    other = method.policy(swapped, learner, train_plan(method, swapped, learner, root, seed=0), 0)
    w_WM = some_preferences(task, ties=False)
    one = evaluate(task, family, w_WM=w_WM, splits=["train"]).curves["train"].returns_WSM
    two = evaluate(swapped, other, w_WM=w_WM[:, ::-1], splits=["train"]).curves["train"].returns_WSM[:, :, ::-1]
    off = float(np.abs(one - two).max())
    require(off < TOLERANCE, rule, f"with the objectives swapped, returns differ by {off:.3g}", remedy)


def _swapped(task: Any) -> Any:
    kind = type(task)
    changes = {
        "rewards_PRM": lambda self, split: np.ascontiguousarray(kind.rewards_PRM(self, split)[:, :, ::-1]),
        "score": lambda self, prompts, completions: kind.score(self, prompts, completions)[:, ::-1],
    }
    return type("Swapped", (kind,), changes)(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.init})


def _digests(folder: str) -> dict[str, str]:
    root = Path(folder)
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}
