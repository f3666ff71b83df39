"""What a fit would cost, before anything is paid: its trainings, samples and tokens, and from a rate its time and memory.

The rate is that of like trainings in the run directory, or else of two steps of one that is thrown away: with the recipe's model, prompts
and batch, and with rewards that cost nothing in the place of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paretune.files import read_json
from paretune.methods.base import training
from paretune.registry import describe
from paretune.runs.jobs import training_label
from paretune.runs.plan import Member, next_wave
from paretune.runs.recipes.recipe import Recipe
from paretune.runs.store import ARTIFACTS, Store
from paretune.training.cost import read_cost
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["Estimate", "Foreseen", "Rate", "estimate", "foresee", "rate_of"]

SLOW = 20.0  # seconds: a step that takes longer is looked at once
BESIDE = ("samples", "lr", "schedule", "warmup", "log_every", "checkpoint_every")  # fields that do not change what a response takes


@dataclass(frozen=True)
class Foreseen:
    """A training that a plan asks for. `tokens` is at most; None: the learner does not count them before."""

    key: str
    label: str
    wave: int
    done: bool
    samples: int | None
    tokens: int | None


@dataclass(frozen=True)
class Rate:
    """Seconds of one response that is trained on, and of one that is measured; peak memory in bytes; where that is from."""

    train: float
    measure: float
    memory: int
    source: str


@dataclass(frozen=True)
class Estimate:
    """A fit before it is made. `whole`: the plan asks for no more than these trainings, as far as it says without their results."""

    trainings: tuple[Foreseen, ...]
    whole: bool
    preferences: int  # measured, beside the untrained model
    samples: int  # per preference
    judged: tuple[str, ...]  # objectives that ask a service
    rate: Rate | None = None
    workers: int = 1

    @property
    def open(self) -> list[Foreseen]:
        return [one for one in self.trainings if not one.done]

    def total(self, field: str) -> int:
        """Samples or tokens of what is still to be trained."""
        return sum(getattr(one, field) or 0 for one in self.open)

    @property
    def train_seconds(self) -> float | None:
        """The waves one after the other, each spread over the workers."""
        if self.rate is None:
            return None
        waves: dict[int, list[int]] = {}
        for one in self.open:
            waves.setdefault(one.wave, []).append(one.samples or 0)
        return sum(max(max(wave), sum(wave) / self.workers) for wave in waves.values()) * self.rate.train

    @property
    def measured(self) -> int:
        """Responses to test prompts, those of the untrained model included."""
        return self.samples * (self.preferences + 1) if self.samples else 0

    @property
    def measure_seconds(self) -> float | None:
        return None if self.rate is None else self.measured * self.rate.measure

    def to_json(self) -> dict[str, Any]:
        found = {"trainings": [dataclasses.asdict(one) for one in self.trainings], "whole": self.whole, "workers": self.workers}
        found |= {"samples": self.total("samples"), "tokens_at_most": self.total("tokens"), "measured_responses": self.measured}
        found |= {"seconds": {"training": self.train_seconds, "measuring": self.measure_seconds}, "judged": list(self.judged)}
        return found | {"memory_bytes": self.rate.memory if self.rate else None, "estimated_from": self.rate.source if self.rate else None}

    def line(self) -> str:
        """One sentence, of what is known without a rate."""
        open_, more = len(self.open), "" if self.whole else ", and more that the plan chooses by their results"
        there = f" ({len(self.trainings) - open_} are there)" if open_ < len(self.trainings) else ""
        said = f"{open_} training{'s' if open_ != 1 else ''} to do{there}: {self.total('samples'):,} samples, "
        said += f"at most {self.total('tokens'):,} tokens{more}"
        return said + (f"; then {self.measured:,} responses to measure with" if self.samples else "")


def foresee(store: Store, member: Member) -> tuple[list[Foreseen], bool]:
    """Every training that a member's plan asks for, and whether that is all: a plan that reads results ends where they are missing."""
    found: dict[str, Foreseen] = {}
    imagined, wave = dict(member.done), 0
    while True:
        asked = dataclasses.replace(member, done=dict(imagined))
        try:
            specs = next_wave(asked)
        except Exception:
            if not wave:
                raise
            return list(found.values()), False
        if not specs or wave > 99:
            return list(found.values()), not specs
        for key, spec in specs.items():
            there = store.artifact(key)
            found[key] = Foreseen(key, training_label(spec), wave, there is not None, *_counts(spec, member.task))
            imagined[key] = there or Artifact(key, store.root / ARTIFACTS / key, spec)
        wave += 1


def estimate(recipe: Recipe, *, preferences: int, samples: int, workers: int = 1, rate: bool = True) -> Estimate:
    """What fitting and measuring would cost. Without `rate`, only what needs no model."""
    store = Store(recipe.root)
    trainings, whole = foresee(store, Member("", "this fit", recipe.task, recipe.method, recipe.learner, recipe.seed))
    judged = tuple(name for name, objective in (*recipe.task.scorers, *recipe.task.guarding) if objective.asks_service)
    made = Estimate(tuple(trainings), whole, preferences, samples, judged, workers=max(workers, 1))
    return dataclasses.replace(made, rate=rate_of(recipe, store)) if rate else made


def rate_of(recipe: Recipe, store: Store) -> Rate | None:
    """Of like trainings in the run directory, or of a probe; None where this one process cannot hold what several share."""
    copies = recipe.method.card.forwards_per_token != "1"
    times = recipe.task.objectives.count if copies else 1  # of a mixture: one forward for each expert
    wanted = _like(describe(recipe.learner), describe(recipe.task))
    costs = []
    for key in store.published(ARTIFACTS):
        spec = read_json(store.root / ARTIFACTS / key / "spec.json", rule="a training has its spec", remedy="run `paretune check`")
        if _like(spec["learner"], spec["task"]) == wanted:
            costs.append(read_cost(store.root / ARTIFACTS / key))
    drawn = sum(cost.samples + cost.validation_samples for cost in costs)
    if drawn:
        each, memory = sum(cost.seconds for cost in costs) / drawn, max(cost.memory_bytes for cost in costs)
        count = f"{len(costs)} like training{'s' if len(costs) > 1 else ''} in {store.root}"
        return Rate(each, each * times, memory, f"{count}; a measured response is taken to cost as much")
    return None if getattr(recipe.learner, "shard", False) else _probe(recipe, times)


def _like(learner: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[Any, ...]:
    same = {name: value for name, value in learner.items() if name not in BESIDE}
    return same, *(task.get(name) for name in ("model", "max_new_tokens", "dtype", "quantize"))


def _counts(spec: TrainSpec, task: Any) -> tuple[int | None, int | None]:
    """Responses of a training, those to validation prompts included, and their tokens at most."""
    learner = spec.learner
    drawn = learner.get("samples")
    if drawn is None:
        return None, None
    if learner.get("look_samples") and task.validation():
        steps = (drawn - learner.get("scored", 0)) // learner["batch"]
        drawn += learner["look_samples"] * (2 + (steps - 1) // learner["validate_every"])
    return drawn, drawn * task.max_new_tokens


class _Enough(Exception):
    """One slow step has said what is to be known."""


def _probe(recipe: Recipe, times: int) -> Rate:
    """Two steps of a training at equal weights in a temporary folder, and a few responses of the untrained model."""
    task, learner = recipe.task, recipe.learner
    free = tuple({"name": name, "use": "length"} for name in task.objectives.names)
    bare = dataclasses.replace(task.prompt_source, validation=0)
    plain = dataclasses.replace(task, objective_specs=free, guard_specs=(), terms=None, prompt_source=bare)
    alone = {"scored": 0, "unlabelled": 0} if hasattr(learner, "scored") else {}  # a reward model of two steps would know nothing
    short = dataclasses.replace(learner, samples=2 * learner.batch, log_every=1, **alone)
    count = task.objectives.count
    spec = training(plain, short, np.full(count, 1 / count), recipe.seed)
    records: list[Mapping[str, Any]] = []

    def progress(record: Mapping[str, Any]) -> None:
        records.append(record)
        if record["seconds"] > SLOW:
            raise _Enough

    with tempfile.TemporaryDirectory(prefix="paretune-estimate-") as folder:
        memory = 0
        with contextlib.suppress(_Enough):
            memory = short.train(spec, plain, Path(folder), progress=progress).memory_bytes
    memory = max(memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # activations, too, where they are in this process
    last = records[-1]["seconds"] - (records[-2]["seconds"] if len(records) > 1 else 0.0)
    measured = _sampling(recipe)
    steps = f"{len(records)} step{'s' if len(records) > 1 else ''}"
    return Rate(
        last / learner.batch,
        measured * times,
        memory,
        f"{steps} of a training that was thrown away; no reward was called, so that their time is missing",
    )


def _sampling(recipe: Recipe) -> float:
    """Seconds of a response of the untrained model, drawn as measuring draws it."""
    from paretune.registry import LEARNERS, METHODS

    family, task = METHODS.build("reference").policy(recipe.task, LEARNERS.build("pg"), {}, recipe.seed), recipe.task
    prompts = list(task.prompts("test"))[:16]
    began = time.perf_counter()
    family.sample(prompts, [1 / task.objectives.count] * task.objectives.count, seed=recipe.seed)
    return (time.perf_counter() - began) / len(prompts)
