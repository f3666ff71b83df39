"""Hyperparameters of a learner and a method, searched with Optuna on validation preferences.

    plan = read_plan("recipe.yaml", ["learner.samples=6400"])        # a recipe, or a suite with one method
    found = tune(plan, trials=20, metric="worst")
    print(found.yaml())

What is searched stands in the file, under `tune:`. A list is a choice; a list that ends in `log` or `linear` is a range:

    tune: {learner.lr: [1e-4, 1e-2, log], learner.rank: [8, 16, 32], method.effort: [1, 4, linear]}

A trial is trained and measured on one cell (a task and a seed) after the other, and given up when the mean so far is below the median of
the earlier trials at that place. Where there is one cell only, a training of a quarter of the budget comes before it. Scores are on
training prompts at seeded preferences that are not judged ones; tasks with judged seeds are refused. Everything is on disk, in
ROOT/tune/<name>/: a run that was killed goes on where it was, with the same trials, and trains nothing twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import statistics
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paretune.errors import ConfigError, ParetuneError, RewardError, StoreError, TrainingError, first_line, nearest
from paretune.files import disk_errors, is_sealed, note, read_json, remove, sealed, write_json
from paretune.methods.search import load_optuna, quiet
from paretune.registry import LEARNERS, METHODS, describe
from paretune.runs import config
from paretune.runs.config import Document
from paretune.runs.recipes.recipe import load_recipe
from paretune.runs.store import ARTIFACTS, Store
from paretune.runs.suite import expand, fit, load_suite, members_of
from paretune.seeds import generator, seed_for
from paretune.tasks.base import Task
from paretune.tasks.preferences import JUDGED_SEEDS, spread_preferences
from paretune.training.cost import Cost, read_cost, then
from paretune.types import canonical_json, is_number, key_of

__all__ = ["METRICS", "Dimension", "Plan", "Trial", "Tuning", "read_plan", "space_of", "tune", "validation_preferences"]

METRICS = ("worst", "mean", "hypervolume")
SPLIT = "train"  # test prompts are for judging
FIRST_RUNG = 0.25  # of the budget, where there is one cell only
EARLIER = 4  # trials that have been at a place before one is given up there
RANDOM = 6  # trials before Optuna's model of what was good is asked
PREFERENCES = 8  # for two objectives; twice as many for more
OUTAGE = 3  # settings in a row whose rewards failed, after which a search stops: a judge may be down
ROUNDED = 3  # significant digits of what is drawn from a range
JOURNAL, MARK = "optuna.log", "journal.json"  # the trials; how much of that is whole
SCORE = 1  # raise when measuring the same family would give other scores
REGISTRIES = {"learner": LEARNERS, "method": METHODS}
SCALES = ("log", "linear")
AROUND = 10.0  # where nothing is asked for, the learning rate, this many times lower and higher

Say = Callable[[str], None]


# What is searched


@dataclass(frozen=True)
class Dimension:
    """One field, `path` is learner.NAME or method.NAME: one of `choices`, or from `low` to `high`, whole numbers where it has such."""

    path: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Any, *, digits: int | None) -> Any:
        """The value that an Optuna trial draws; rounded to `digits`, so that it can be read and typed."""
        if self.choices:
            return json.loads(trial.suggest_categorical(self.path, [json.dumps(choice) for choice in self.choices]))
        if self.whole:
            return trial.suggest_int(self.path, int(self.low), int(self.high), log=self.log)
        drawn = trial.suggest_float(self.path, self.low, self.high, log=self.log)
        return drawn if digits is None else min(self.high, max(self.low, float(f"{drawn:.{digits}g}")))

    def parameter(self, value: Any) -> Any:
        """What Optuna knows a value as; None where it is not in here."""
        if self.choices:
            given = list(value) if isinstance(value, tuple) else value
            same = (choice for choice in self.choices if choice == given and isinstance(choice, bool) == isinstance(given, bool))
            return next(map(json.dumps, same), None)  # a file may write 1 for 1.0
        inside = is_number(value) and self.low <= value <= self.high
        return value if inside else None


@dataclass(frozen=True)
class Plan:
    """What is tuned, on what: `learner` and `method` are entries as in the file, `cells` are pairs of a task and a seed."""

    name: str
    cells: tuple[tuple[Task, int], ...]
    learner: dict[str, Any]
    method: dict[str, Any]
    space: tuple[Dimension, ...]
    samples: int
    root: Path
    is_recipe: bool

    def settings(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The learner's and the method's entry with these values of the dimensions."""
        found = {"learner": dict(self.learner), "method": dict(self.method)}
        for path, value in values.items():
            part, _, name = path.partition(".")
            found[part][name] = value
        return found["learner"], found["method"]


def read_plan(
    path: str | Path, overrides: Sequence[str] = (), *, method: str | None = None, repeats: int = 1, samples: int | None = None
) -> Plan:
    """Read a recipe or a suite. `method` is another one than the file's, or one of a suite's; `repeats` is how many seeds a recipe has,
    from its own on; `samples` are responses per preference and cell, where a task is not exact."""
    document, path = config.load(path, overrides, short={"prompts": "path"}), Path(path)
    is_recipe = "tasks" not in document.data
    if is_recipe:
        recipe = load_recipe(path, overrides)
        cells = tuple((recipe.task, recipe.seed + i) for i in range(repeats))
        chosen: Any = method or document.data.get("method") or "experts"
        learner, root, count = document.data.get("learner") or "pg", recipe.root, 64
    else:
        if repeats != 1:
            raise ConfigError("a suite says its seeds", found=f"repeats = {repeats}", remedy="write them under seeds:")
        suite, document = load_suite(path, overrides)
        chosen = _one_method(suite.methods, method)
        alone = suite.model_copy(update={"methods": [chosen]})
        cells = tuple((member.task, member.seed) for member in members_of(alone, document))
        learner, root, count = suite.learner, Path("paretune-runs") / suite.name, suite.samples
    judged = sorted({seed for task, seed in cells if hasattr(task, "seed") and seed in JUDGED_SEEDS})
    if judged:
        raise ConfigError(
            "nothing is tuned on the seeds 100 to 109 and 200 to 209: results are judged there",
            found=f"seeds {', '.join(map(str, judged))}",
            remedy="tune on development seeds, 0 to 9 or 10 to 19: seeds=[0,1,2]",
        )
    named = [_entry(given, default) for given, default in ((learner, "pg"), (chosen, "experts"))]
    space = space_of(document, learner=named[0], method=named[1])
    return Plan(path.stem, cells, named[0], named[1], space, samples or count, root, is_recipe)


def _entry(given: Any, default: str) -> dict[str, Any]:
    return {"name": given} if isinstance(given, str) else {"name": default, **given}


def _one_method(entries: Sequence[Mapping[str, Any]], wanted: str | None) -> dict[str, Any]:
    """The one method of a suite that is tuned."""
    found = [one for entry in entries for one in expand(METHODS, entry) if wanted in (None, one.get("name"))]
    if not found and wanted is not None:
        return {"name": wanted}
    if len(found) != 1:
        shown = "; ".join(", ".join(f"{key}={value}" for key, value in one.items()) for one in found[:6])
        remedy = "choose one with --method NAME, or write one with its settings into the file"
        raise ConfigError("one method is tuned at a time", found=f"{len(found)}: {shown}", remedy=remedy)
    return found[0]


def space_of(document: Document, *, learner: Mapping[str, Any], method: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """The dimensions that `tune:` in the file names, each end and choice tried on the learner or the method; else the learning rate.

    Raises ConfigError with the line for an unknown field, an empty range, or a value that the field does not take.
    """
    entries = {"learner": learner, "method": method}
    with document.at("learner"):
        built = LEARNERS.build(learner)
    with document.at("method"):
        METHODS.build(method)
    given = document.data.get("tune")
    if given is None and hasattr(built, "lr"):
        given = {"learner.lr": [built.lr / AROUND, built.lr * AROUND, "log"]}
    with document.at("tune"):
        if not isinstance(given, dict) or not given:
            raise ConfigError(
                "tune: says which fields are searched, and where",
                found=repr(given),
                remedy="for example tune: {learner.lr: [1e-4, 1e-2, log], learner.rank: [8, 16, 32]}",
            )
    found = []
    for path, values in given.items():
        with document.at("tune", path):
            found.append(_dimension(str(path), values, entries))
    return tuple(found)


def _dimension(path: str, values: Any, entries: Mapping[str, Mapping[str, Any]]) -> Dimension:
    part, _, name = path.partition(".")
    if part not in entries or not name:
        known = [f"{one}.{field}" for one in entries for field in _fields(one, entries)]
        raise ConfigError("what is tuned is learner.FIELD or method.FIELD", found=repr(path), remedy=nearest(path, known))
    if name not in _fields(part, entries):
        label = f"{part} {entries[part]['name']}"
        raise ConfigError(f"{label} has the fields that it declares", found=repr(path), remedy=nearest(name, _fields(part, entries)))
    if not isinstance(values, list) or not values:
        remedy = f"for example {path}: [8, 16], or {path}: [1e-4, 1e-2, log]"
        raise ConfigError("a field is tuned over a list of values, or a range", found=f"{path}: {values!r}", remedy=remedy)
    distinct = {json.dumps(value): value for value in values}
    made = _range(path, values, entries) if values[-1] in SCALES else Dimension(path, choices=tuple(distinct.values()))
    for value in made.choices or (made.low, made.high):
        REGISTRIES[part].build({**entries[part], name: int(value) if made.whole else value})
    return made


def _range(path: str, values: list[Any], entries: Mapping[str, Mapping[str, Any]]) -> Dimension:
    part, _, name = path.partition(".")
    ends, log = values[:-1], values[-1] == "log"
    numbers = all(is_number(end) and math.isfinite(end) for end in ends)
    if len(ends) != 2 or not numbers or not ends[0] < ends[1] or (log and ends[0] <= 0):
        above = ", above 0" if log else ""
        raise ConfigError(
            f"a range is [low, high, {values[-1]}] with low below high{above}",
            found=f"{path}: {values}",
            remedy=f"for example {path}: [1e-4, 1e-2, log]",
        )
    cls = REGISTRIES[part][entries[part]["name"]]
    hint = typing.get_type_hints(cls)[name]
    whole = int in (hint, *typing.get_args(hint)) and float not in typing.get_args(hint)  # int, or int | None
    if whole and any(int(end) != end for end in ends):
        raise ConfigError(f"{path} is a whole number", found=f"{path}: {values}", remedy="give whole ends")
    return Dimension(path, low=float(ends[0]), high=float(ends[1]), log=log, whole=whole)


def _fields(part: str, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    cls: Any = REGISTRIES[part][str(entries[part]["name"])]
    return [field.name for field in dataclasses.fields(cls) if field.init]


# The search


def validation_preferences(count: int, *, seed: int) -> np.ndarray:
    """(W, M) seeded preferences, spread over the simplex and away from the judged ones."""
    return spread_preferences(generator(seed, "validation preferences"), PREFERENCES if count == 2 else 2 * PREFERENCES, count)


@dataclass(frozen=True)
class Trial:
    """One setting, counted from 1: `state` is "done", "pruned" or "failed" (see `message`); `value` is its score so far, or None."""

    number: int
    values: dict[str, Any]
    state: str
    value: float | None
    cells: int  # trained and measured, of those of the plan
    cost: Cost
    message: str = ""


@dataclass(frozen=True)
class Tuning:
    """What a search found. `cost` counts each training once, those of pruned trials too; `folder` holds it all."""

    plan: Plan
    metric: str
    folder: Path
    trials: tuple[Trial, ...]
    cost: Cost

    @cached_property
    def best(self) -> Trial:
        done = [trial for trial in self.trials if trial.state == "done" and trial.value is not None]
        if not done:
            why = next((trial.message for trial in self.trials if trial.message), "all were given up")
            raise ParetuneError(
                "a search ends with a trial that was trained and measured",
                found=f"none of {len(self.trials)}: {first_line(why)}",
                remedy="run `paretune fit` with these settings to see why, or ask for more trials",
            )
        return max(done, key=lambda trial: trial.value or 0.0)  # the first of equals

    def yaml(self) -> str:
        """Lines for a recipe or a suite: the best settings."""
        learner, method = self.plan.settings(self.best.values)
        entries = {"learner": learner, **({"method": method} if self.plan.is_recipe else {"methods": [method]})}
        return "\n".join([f"# {self.summary()}", *(f"{key}: {config.dump(entry)}" for key, entry in entries.items())]) + "\n"

    def summary(self) -> str:
        best, states = self.best, [trial.state for trial in self.trials]
        return (
            f"{self.metric} {best.value:.4g} in trial {best.number} of {len(states)} ({states.count('pruned')} pruned, "
            f"{states.count('failed')} failed); all of them cost {self.cost.samples:,} samples, {self.cost.tokens:,} tokens, "
            f"{self.cost.seconds:.0f} s and {self.cost.validation_samples:,} validation samples"
        )

    def to_json(self) -> dict[str, Any]:
        learner, method = self.plan.settings(self.best.values)
        return {
            "format": 1,
            "metric": self.metric,
            "folder": str(self.folder),
            "best": {"trial": self.best.number, "value": self.best.value, "learner": learner, "method": method},
            "trials": [{**asdict(trial), "cost": trial.cost.to_json()} for trial in self.trials],
            "cost": self.cost.to_json(),
        }


@dataclass(frozen=True)
class _Score:
    """What one family is worth on one cell, and what that took."""

    values: dict[str, float | None]  # per metric
    trainings: tuple[str, ...]
    validation: Cost

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> _Score:
        return cls(known["values"], tuple(known["trainings"]), Cost.from_json(known["validation"]))


class _Scores:
    """Fits and measures, once for each setting and cell; what was measured is kept in ROOT/tune/scores."""

    def __init__(self, plan: Plan, root: Path, *, seed: int, workers: int, progress: bool):
        self._plan, self._root, self._workers, self._seed, self._progress = plan, root, workers, seed, progress
        self.folder = root / "tune" / "scores"
        self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, task: Task, method: Any, learner: Any, seed: int) -> _Score:
        w_WM = validation_preferences(task.objectives.count, seed=self._seed)
        samples = None if task.is_exact else self._plan.samples
        about = {"task": describe(task), "method": describe(method), "learner": describe(learner), "seed": seed, "version": SCORE}
        path = self.folder / f"{key_of({**about, 'preferences': w_WM.tolist(), 'samples': samples})}.json"
        known = _kept(path)
        if known is not None:
            return _Score.from_json(known)
        from paretune.evaluation.evaluate import evaluate

        family = fit(task, method, learner=learner, root=self._root, seed=seed, workers=self._workers, progress=self._progress)
        measured = evaluate(task, family, w_WM=w_WM, splits=(SPLIT,), samples=samples or 1, seed=self._seed)
        drawn = 0 if samples is None else samples * (len(w_WM) + 1)  # and once for the reference
        cost = measured.cost.then(Cost(validation_samples=drawn))
        score = _Score(_values(measured.metrics["splits"][SPLIT]), tuple(family.meta["trainings"]), cost)
        with disk_errors(self._root):
            write_json(path, sealed(json.loads(json.dumps(asdict(score) | {"validation": cost.to_json()}))))
        return score

    def cost(self, scores: Sequence[_Score]) -> Cost:
        """Every training once."""
        keys = dict.fromkeys(key for score in scores for key in score.trainings)
        trained = then(read_cost(Store(self._root).root / ARTIFACTS / key) for key in keys)
        return trained.then(then(score.validation for score in scores))


def _kept(path: Path) -> dict[str, Any] | None:
    """Sealed JSON as it was written; None where there is none, or, with a warning, where it is damaged and made again."""
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path, rule="", remedy="")
        why = "" if is_sealed(found) else f"{path}: the content is not what was written"
    except StoreError as error:
        found, why = {}, error.found
    if not why:
        return found
    note(f"damaged, and made again: {why}")
    with disk_errors(path):
        remove(path)
    return None


def _values(split: Mapping[str, Any]) -> dict[str, float | None]:
    """Shares of the possible gain where the optimum is known, else gains on the reference in units of return."""
    volume = split["hypervolume"]
    known: Mapping[str, Any] | None = split["attainment"]
    if known is not None:
        return {"worst": known["worst"], "mean": known["mean"], "hypervolume": volume["share"]}
    gains = [one["value"] for one in split["gain"]["per_preference"]]
    worst = None if None in gains else min(gains)
    return {"worst": worst, "mean": split["gain"]["mean"]["value"], "hypervolume": volume["value"]}


def tune(
    plan: Plan,
    *,
    trials: int = 20,
    metric: Literal["worst", "mean", "hypervolume"] = "worst",
    root: str | Path | None = None,
    seed: int = 0,
    workers: int = 0,
    prune: bool = True,
    say: Say | None = None,
) -> Tuning:
    """Run trials until there are `trials` in all, of this run and earlier ones with the same settings.

    The metric of a trial is its mean over cells: of the worst, or the mean, over validation preferences of the attainment (of the gain,
    where the optimum is not known), or of the hypervolume. The first trial is the file's own settings. The same seed gives the same
    trials. `say` gets a line per trial, and with it trainings show how far they are. Raises BusyError where another process works on the
    same search, and RewardError where rewards failed at `OUTAGE` settings one after the other: run again, it begins with the first of them.

    Source: Optuna (Akiba et al. 2019), its TPE sampler, and its median rule for giving up.
    Differs: a trial's numbers depend on the seed, its place and the trials before it, not on how often a run was interrupted. The median
        rule compares means over the same cells, of all trials that came so far.
    Hides: the best of many trials is partly luck: measure it again on other seeds. A quarter of a budget favors fast learning. The last
        digits of a GPU can change which trials follow. A training that failed is not in the cost.
    """
    optuna = load_optuna(otherwise="")
    if metric not in METRICS:
        raise ConfigError("a search climbs one metric", found=repr(metric), remedy=nearest(metric, METRICS))
    if trials < 1:
        raise ConfigError("a search has at least one trial", found=f"trials = {trials}", remedy="20 is a start")
    folder = Path(root or plan.root) / "tune" / f"{plan.name}-{_key(plan, metric, seed, prune)[:8]}"
    scores = _Scores(plan, Path(root or plan.root), seed=seed, workers=workers, progress=say is not None)
    with Store(folder).lock(), quiet(optuna):
        search = _Search(plan, _study(optuna, folder), scores, metric=metric, seed=seed, prune=prune)
        while len(search.finished) < trials:
            trial = search.run()
            if say is not None:
                say(f"trial {trial.number} of {trials}: {_shown(trial, metric)}")
            if len(search.unrewarded) == OUTAGE:
                raise RewardError(
                    "rewards that fail at one setting after the other are no fault of the settings",
                    found=f"{OUTAGE} settings in a row, the last: {first_line(trial.message)}",
                    remedy="mend the rewards and run the search again: it goes on with the first of these trials",
                )
            if not search.unrewarded:
                _mark(folder)
        _mark(folder)
        found = search.result(folder)
        with disk_errors(folder):
            write_json(folder / "ledger.json", found.cost.to_json())
            write_json(folder / "tuning.json", found.to_json())
    return found


def _shown(trial: Trial, metric: str) -> str:
    value = "" if trial.value is None else f", {metric} {trial.value:.4g}"
    settings = " ".join(f"{path}={value}" for path, value in trial.values.items())
    return f"{settings} {trial.state}{value}" + (f": {first_line(trial.message)}" if trial.message else "")


def _key(plan: Plan, metric: str, seed: int, prune: bool) -> str:
    """Names a search: everything that its trials depend on, but not how many there are."""
    return key_of(
        {
            "cells": [[describe(task), cell_seed] for task, cell_seed in plan.cells],
            "learner": describe(LEARNERS.build(plan.learner)),
            "method": describe(METHODS.build(plan.method)),
            "space": [asdict(dimension) for dimension in plan.space],
            "search": [metric, seed, prune, plan.samples, SCORE],
        }
    )


def _study(optuna: Any, folder: Path) -> Any:
    """The search as Optuna stored it, cut back to the last trial that ended; the caller holds the folder's lock.

    A damaged one begins anew: the same trials follow, and nothing is trained twice.
    """
    journal = folder / JOURNAL
    Path(f"{journal}.lock").unlink(missing_ok=True)
    mark = _kept(folder / MARK) or {"length": 0}
    with disk_errors(folder):
        if os.path.lexists(journal):
            damaged = not journal.is_file() or _start(journal, mark["length"]) != mark
            if damaged:
                note(f"a damaged journal begins anew, with what was trained: {journal}")
                remove(journal)
            else:
                os.truncate(journal, mark["length"])
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    study = optuna.create_study(storage=storage, study_name="tune", direction="maximize", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # asked for again, and the same is drawn
    return study


def _start(journal: Path, length: int) -> dict[str, Any]:
    """How long the first part of the journal is, and its hash."""
    with journal.open("rb") as file:
        known = file.read(length)
    return sealed({"length": len(known), "start": hashlib.sha256(known).hexdigest()}) if known else {"length": 0}


def _mark(folder: Path) -> None:
    """A trial has ended: what the journal holds now is kept."""
    with disk_errors(folder):
        write_json(folder / MARK, _start(folder / JOURNAL, (folder / JOURNAL).stat().st_size))


class _Search:
    """One study: asks for a trial, runs it over the stages, and tells how it went. Optuna's FAIL marks trials that were interrupted."""

    def __init__(self, plan: Plan, study: Any, scores: _Scores, *, metric: str, seed: int, prune: bool):
        self.plan, self.study, self.scores, self.metric = plan, study, scores, metric
        self._optuna, self._seed, self._prune = load_optuna(), seed, prune
        self._states = self._optuna.trial.TrialState
        self.unrewarded: set[str] = set()  # the settings of the latest trials, in a row, in which rewards failed
        rung = [(FIRST_RUNG, *plan.cells[0])] if prune and len(plan.cells) == 1 and _scales(plan.learner) else []
        self.stages = [*rung, *((1.0, task, cell_seed) for task, cell_seed in plan.cells)]

    @property
    def finished(self) -> list[Any]:
        """The trials that count, in their order."""
        return list(self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE, self._states.PRUNED)))

    def run(self) -> Trial:
        place, own = len(self.finished), self._own()
        if not place and own is not None and not self.study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
            self.study.enqueue_trial(own)
        self.study.sampler = self._optuna.samplers.TPESampler(seed=seed_for(self._seed, "tune", place) % 2**32, n_startup_trials=RANDOM)
        trial = self.study.ask()
        values = {
            dimension.path: dimension.suggest(trial, digits=ROUNDED if place or own is None else None) for dimension in self.plan.space
        }
        seen: list[_Score] = []
        state, value, message, rewards = "failed", None, "", False
        try:
            state, value = self._stages(trial, values, seen)
        except ParetuneError as error:
            if isinstance(error, StoreError) or (isinstance(error, ConfigError) and not place and own is not None):
                raise  # the disk, or another process: no setting's fault; or a mistake in the file's own settings
            message = str(error)
            rewards = isinstance(error, RewardError)
        self.unrewarded = self.unrewarded | {canonical_json(values)} if rewards else set()
        cost = self.scores.cost(seen)
        notes = {"values": values, "state": state, "value": value, "message": message, "stages": len(seen), "cost": cost.to_json()}
        trial.set_user_attr("trial", notes | {"scores": [asdict(score) for score in seen]})
        if state == "done":
            self.study.tell(trial, value)
        else:
            self.study.tell(trial, state=self._states.PRUNED)
        return self._trial(place + 1, self.finished[-1])

    def _stages(self, trial: Any, values: Mapping[str, Any], seen: list[_Score]) -> tuple[str, float | None]:
        """The state and the value that a trial ends with; `seen` gets the score of every stage."""
        given = self.plan.settings(values)
        learner, method = LEARNERS.build(given[0]), METHODS.build(given[1])
        full: list[float] = []
        mean: float | None = None
        for step, (effort, task, seed) in enumerate(self.stages):
            seen.append(self.scores.of(task, method, learner.scaled(effort), seed))
            value = seen[-1].values[self.metric]
            if value is None:
                raise TrainingError(
                    "a trial can be scored", found=f"{self.metric} is unknown on {task.registered_name}", remedy="look at the objectives"
                )
            full += [value] if effort == 1 else []
            mean = statistics.fmean(full) if full else value
            trial.report(mean, step)
            earlier = [other.intermediate_values[step] for other in self.finished if step in other.intermediate_values]
            below = len(earlier) >= EARLIER and mean < statistics.median(earlier)
            if self._prune and below and step + 1 < len(self.stages):
                return "pruned", mean
        return "done", mean

    def _own(self) -> dict[str, Any] | None:
        """The file's own settings as Optuna's parameters, where they lie in the space."""
        built = {"learner": LEARNERS.build(self.plan.learner), "method": METHODS.build(self.plan.method)}
        found = {}
        for dimension in self.plan.space:
            part, _, name = dimension.path.partition(".")
            parameter = dimension.parameter(getattr(built[part], name))
            if parameter is None:
                return None
            found[dimension.path] = parameter
        return found

    def _trial(self, number: int, stored: Any) -> Trial:
        notes = stored.user_attrs["trial"]
        cost, cells = Cost.from_json(notes["cost"]), max(0, notes["stages"] - (len(self.stages) - len(self.plan.cells)))
        return Trial(number, notes["values"], notes["state"], notes["value"], cells, cost, notes["message"])

    def result(self, folder: Path) -> Tuning:
        known = {canonical_json(one): one for stored in self.finished for one in stored.user_attrs["trial"]["scores"]}
        rows = tuple(self._trial(number, stored) for number, stored in enumerate(self.finished, start=1))
        return Tuning(self.plan, self.metric, folder, rows, self.scores.cost([_Score.from_json(one) for one in known.values()]))


def _scales(entry: Mapping[str, Any]) -> bool:
    """Whether the learner says what a part of its budget is."""
    try:
        LEARNERS.build(entry).scaled(FIRST_RUNG)
    except ConfigError:
        return False
    return True
