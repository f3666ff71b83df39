"""Suites: methods x tasks x seeds in a YAML file; and `task`, `method` and `fit` for a notebook.

    name: quick                                   # also the name of ROOT/suites/<name>.json
    about: every method at three correlations     # optional
    tasks:
      - {name: exact-v1, rho: [0.8, 0.0, -0.8]}   # one task per value; several lists give their product, in the order written
      - {recipe: my.yaml, beta: [0.05, 0.1]}      # the model, prompts and objectives of a recipe, some of its keys changed
    learner: {name: exact, steps: 100}
    methods: [reference, {name: experts, mixing: [parameter, logit]}]   # lists as in tasks
    seeds: [100, 101]      # the seed of every training, and of every task that has a `seed` field
    splits: [train, test]  # default: both
    samples: 64            # per preference and split, where a task is not exact
    tune: {learner.lr: [1e-3, 1e-1, log]}   # for `paretune tune` alone

A plain name stands for {name: ...}, in `tasks` a name that ends in .yaml for {recipe: ...}. A suite without `learner:` takes the one
of its recipe. A field whose declared type is itself a list or a tuple takes a list as its value; to vary such a
field, write the entry twice.

Every combination of a task, a seed and a method is a *cell*. A cell's key is a hash of everything that its numbers depend on, so suites
that overlap share cells, and a suite that is run again computes only what is missing. Trainings are shared between all methods that need
the same. What failed is tried again by the next run.

The schema and the cells come first below, then `fit` and `run_suite`.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copy
import dataclasses
import itertools
import re
import textwrap
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from paretune.errors import ConfigError, nearest, shown
from paretune.files import disk_errors, sealed, write_json
from paretune.methods.base import Method
from paretune.objectives.utilities import UTILITIES
from paretune.registry import LEARNERS, METHODS, TASKS, Registry, checked, describe, unkeyed
from paretune.runs.config import Document, load
from paretune.runs.display import Display, display
from paretune.runs.estimate import Foreseen, foresee
from paretune.runs.executors.local import Workers
from paretune.runs.executors.pool import Executor, InProcess, cpus
from paretune.runs.executors.ray import PATIENCE, Ray, RayWorkers
from paretune.runs.jobs import Job, Tasks, as_error, cell_job, evaluation_settings, failure, label_of, said_of, training_label
from paretune.runs.plan import Member, Schedule, next_wave
from paretune.runs.recipes.recipe import _named, load_recipe, refuse_recipe, task_entry
from paretune.runs.store import ARTIFACTS, CELLS, FAILED, WIP, Store
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import refuse_unreachable
from paretune.training.cost import as_if_alone, read_cost
from paretune.types import Natural, key_of

if TYPE_CHECKING:  # these load torch
    from paretune.policy.family import Family
    from paretune.training.learners.base import Learner

__all__ = [
    *("Row", "Suite", "Summary", "check_executor", "compared", "expand", "fit", "load_suite", "members_of", "method", "run_suite"),
    "task",
]

OWN_KEYS = {"prompts", "objectives", "guards"}  # what a recipe's task is written with, and `RecipeTask` has other names for
EXECUTORS = ("local", "in-process", "ray")

Entry = Annotated[dict[str, Any], BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given)]


class Suite(BaseModel):
    """The schema of the YAML file; see the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="use letters, digits, dots, dashes and underscores")
    about: str = ""
    tasks: list[Entry] = Field(min_length=1, description="for example tasks: [{name: exact-v1, rho: [0.8, -0.8]}]")
    learner: Entry = Field(default={"name": "pg"}, description="for example learner: {name: exact, steps: 100}")
    methods: list[Entry] = Field(min_length=1, description="for example methods: [reference, experts]")
    seeds: list[StrictInt] = Field(min_length=1, description="for example seeds: [100, 101]")
    splits: list[Literal["train", "test"]] = Field(default=["train", "test"], min_length=1, description="train, test or both")
    samples: StrictInt = Field(default=64, ge=1, description="a whole number of at least 1")
    tune: dict[str, Any] | None = Field(default=None, exclude=True, description="for example tune: {learner.lr: [1e-3, 1e-1, log]}")


def load_suite(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[Suite, Document]:
    """The checked suite, and where everything in it stands. Raises ConfigError with file and line."""
    if isinstance(given, str | Path):
        document = load(given, overrides)
        folder = Path(given).resolve().parent
        refuse_recipe(document.data, Path(given))
    else:
        document, folder = Document(copy.deepcopy(dict(checked("a suite", Mapping[str, Any], given))), "the suite"), Path.cwd()
        for text in overrides:
            document.override(text)
    _take_recipes(document, folder)
    return document.validate(Suite), document


def compared(
    recipe: str | Path, methods: Sequence[Any], overrides: Sequence[str] = (), *, seeds: int = 1, samples: int = 64
) -> tuple[dict[str, Any], Path]:
    """A suite of these methods, and of the untrained model, on a recipe's task with its learner; and the recipe's run directory.

    Its trainings are those of `paretune fit`: what that trained is not trained again.
    """
    entry, learner, seed = task_entry(Path(recipe), overrides)
    root = load_recipe(recipe, overrides).root
    rows = ["reference", *(one for one in methods if one != "reference")]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(recipe).stem).lstrip(".-_") or "recipe"
    made = {"name": name, "tasks": [entry], "methods": rows, "seeds": [seed + n for n in range(seeds)], "samples": samples}
    return made | ({} if learner is None else {"learner": _named(learner, "pg")}), root


def _take_recipes(document: Document, folder: Path) -> None:
    """Write the tasks of recipes, and the learner of theirs, into a suite."""
    tasks: Any = document.data.get("tasks")
    learners: list[Any] = []
    for place, entry in enumerate(tasks if isinstance(tasks, list) else ()):
        entry = {"recipe": entry} if isinstance(entry, str) and entry.endswith((".yaml", ".yml")) else entry
        if not isinstance(entry, dict) or not ("recipe" in entry or (entry.get("name") == "recipe" and OWN_KEYS & set(entry))):
            continue
        with document.at("tasks", place):
            typed = any(one[:2] in (("tasks",), ("tasks", place)) for one in document.overridden)
            where, file = Path.cwd() if typed else folder, checked("recipe:", str | None, entry.get("recipe"))
            changes = {key: value for key, value in entry.items() if key not in ("recipe", "name")}
            tasks[place], learner, _ = task_entry(file and where / Path(file).expanduser(), changes=changes, folder=where)
            learners += [learner] if file else []
    if learners and "learner" not in document.data:
        if any(one != learners[0] for one in learners):
            found, remedy = "recipes with different ones, and no learner: beside tasks:", "write learner: into the suite"
            raise ConfigError("a suite has one learner", found=found, remedy=remedy)
        document.data |= {} if learners[0] is None else {"learner": _named(learners[0], "pg")}


def members_of(suite: Suite, document: Document) -> list[Member]:
    """One per distinct cell: task entries, then seeds, then methods, in the order written. Everything is built and thereby checked."""
    with document.at("learner"):
        learner = LEARNERS.build(suite.learner)
    methods = [one for place, entry in enumerate(suite.methods) for one in _built(METHODS, entry, document, "methods", place)]
    shared = {"learner": describe(learner), "evaluation": evaluation_settings(suite.splits, suite.samples)}
    described = [(method, says := describe(method), label_of(says, METHODS)) for method in methods]
    members: dict[str, Member] = {}
    for place, entry in enumerate(suite.tasks):
        for task, seed in _tasks(entry, suite.seeds, document, place):
            where = describe(task)
            on = f"on {label_of(where, TASKS)}" + (f", seed {seed}" if "seed" not in where else "")
            for method, says, label in described:
                spec = {"method": says, "task": where, "seed": seed, **shared}
                key = key_of(spec)
                members.setdefault(key, Member(key, f"{label} {on}", task, method, learner, seed, spec=spec))
    return list(members.values())


def expand(registry: Registry, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries that an entry with lists stands for; see the module's docstring."""
    cls = registry[str(entry.get("name", ""))]
    hints = typing.get_type_hints(cls)
    choices = []
    for name, value in entry.items():
        varies = isinstance(value, list) and name in hints and not _takes_list(hints[name])
        if varies and not value:
            raise ConfigError("a list of values has at least one", found=f"{name}: []", remedy="give a value, or leave the field out")
        choices.append([(name, one) for one in (value if varies else [value])])
    return [dict(chosen) for chosen in itertools.product(*choices)]


def _built(registry: Registry, entry: Mapping[str, Any], document: Document, *place: str | int) -> list[Any]:
    with document.at(*place):
        return [registry.build(one) for one in expand(registry, entry)]


def _tasks(entry: Mapping[str, Any], seeds: Sequence[int], document: Document, place: int) -> list[tuple[Any, int]]:
    """(task, seed) for every value and seed; a task without a `seed` field is one instance for all seeds."""
    with document.at("tasks", place):
        seeded = any(f.name == "seed" and f.init for f in dataclasses.fields(TASKS[str(entry.get("name", ""))]))
        if seeded and "seed" in entry:
            raise ConfigError(
                "the seeds of a suite's tasks stand under seeds:",
                found=f"seed: {entry['seed']}",
                remedy="move it to seeds:, which all tasks share",
            )
        found = []
        for one in expand(TASKS, entry):
            fixed: Any = None if seeded else TASKS.build(one)
            found += [(TASKS.build({**one, "seed": seed}) if seeded else fixed, seed) for seed in seeds]
        for task, _ in found:
            check_task(task)
        return found


def check_task(task: Any) -> None:
    """ConfigError for what a task can find wrong before anything is trained."""
    if isinstance(task, Task):
        task.check()
        if task.is_exact and task.terms is not None and task.terms.constraints is not None:
            refuse_unreachable(task, "train", UTILITIES.build(task.terms.utility()))  # type: ignore[arg-type]


def _takes_list(hint: Any) -> bool:
    """True where a value of the declared type can be written as a list."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _takes_list(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_takes_list(one) for one in typing.get_args(hint))
    kind = origin or hint
    return hint is Any or (isinstance(kind, type) and issubclass(kind, collections.abc.Collection) and kind not in (str, bytes, dict))


@dataclass(frozen=True)
class Row:
    """One training or cell of a run. `status`: "done" before, "new" from this run, "failed" (see `message`), or "planned"."""

    key: str
    label: str
    status: str
    message: str = ""


@dataclass(frozen=True)
class Summary:
    """What a run did, or would do. `trainings` are distinct; a dry run knows those of each plan's next wave."""

    suite: str
    root: str
    cells: tuple[Row, ...]
    trainings: tuple[Row, ...]
    seconds: float
    foreseen: Mapping[str, Any] | None = None  # of a dry run: samples, tokens (at most) and measured responses of all that is to do

    def count(self, status: str) -> int:
        """Cells with this status."""
        return sum(row.status == status for row in self.cells)

    @property
    def failed(self) -> list[Row]:
        return [row for row in (*self.trainings, *self.cells) if row.status == "failed"]

    @property
    def trained(self) -> int:
        return sum(row.status == "new" for row in self.trainings)

    @property
    def reused(self) -> int:
        return sum(row.status == "done" for row in self.trainings)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "trained": self.trained, "reused": self.reused, "failed": len(self.failed)}

    def text(self) -> str:
        """For people: what is planned, or what happened."""
        planned = [row for row in (*self.trainings, *self.cells) if row.status == "planned"]
        if planned:
            lines = [
                f"{row.status:8} {kind} {row.key} {row.label}" + (f":\n{textwrap.indent(row.message, '  ')}" if row.message else "")
                for kind, row in self._rows()
            ]
            cost = self.foreseen or {}
            known = f"\n{cost['samples']:,} samples and at most {cost['tokens']:,} tokens to train with" if cost.get("samples") else ""
            known += f", {cost['measured']:,} responses to measure with" if known and cost["measured"] else ""
            known += "; methods that plan by results may ask for more" if known and not cost["whole"] else ""
            return "\n".join([*lines, f"{len(planned)} to do in {self.root}; methods may ask for more trainings after these{known}"])
        done = self.count("new") + self.count("done")
        lines = [
            f"suite {self.suite}: {done} of {len(self.cells)} cells ({self.count('done')} were there), "
            f"{self.trained} trained, {self.reused} reused, {len(self.failed)} failed, {self.seconds:.0f} s"
        ]
        failed = [(kind, row) for kind, row in self._rows() if row.status == "failed"]
        lines += [f"failed {kind} {row.key} {row.label}:\n{textwrap.indent(row.message, '  ')}" for kind, row in failed]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, Row]]:
        return [("training", row) for row in self.trainings] + [("cell", row) for row in self.cells]


def task(name: str, **dials: Any) -> Task:
    """The task `name` with these dials: `task("exact-v1", rho=-0.8)`."""
    return TASKS.build({"name": name, **dials})


def method(name: str, **fields: Any) -> Method:
    """The method `name` with these hyperparameters: `method("experts", mixing="logit")`."""
    return METHODS.build({"name": name, **fields})


def fit(
    task: Task | str | Mapping[str, Any],
    method: Method | str | Mapping[str, Any],
    *,
    learner: Learner | str | Mapping[str, Any] = "pg",
    root: str | Path = "runs",
    seed: int = 0,
    workers: int | None = 0,
    executor: str | Ray | None = None,
    progress: bool = True,
    drawn: int = 0,
) -> Family:
    """Train what the method needs and is not yet in `root`, in this process (workers=0) or several; returns the family of policies.

    `executor` is as for `run_suite`; without it, `workers` decides. The time left counts `drawn` responses, to be measured afterwards.

    The family's `meta["ledger"]` says what the trainings cost, and `meta["trainings"]` their keys. Raises what made a training fail;
    others that finished are kept, and calling again goes on from the last checkpoint.
    """
    root, seed = checked("root", str | Path, root), checked("seed", int, seed)
    chosen = task if isinstance(task, Task) or hasattr(task, "registered_name") else TASKS.build(task)
    check_task(chosen)
    member = Member("", "", chosen, _whole(METHODS, method), _whole(LEARNERS, learner), seed)
    member.label = f"{label_of(describe(member.method), METHODS)} on {label_of(describe(chosen), TASKS)}"
    store = Store(root)

    def failed(_: Member, error: Mapping[str, Any], cause: BaseException | None) -> None:
        if cause is not None and "training" not in error:  # the plan itself
            raise cause
        where = store.root / ARTIFACTS / (WIP + str(error.get("training"))) / FAILED
        raise as_error(error, str(where)) from cause

    workers = checked("workers", Natural | None, workers) or None
    tasks, who = Tasks(), _executor(("local" if workers else "in-process") if executor is None else executor, workers)
    tasks.put(chosen)
    with _lock(store, who), _running(store, who, workers, tasks, cells=0, show=progress, drawn=drawn) as (runner, shown):
        Schedule(store, runner, shown, on_ready=lambda _: None, on_failed=failed, on_done=lambda _: None).run([member])
    family = member.method.policy(member.task, member.learner, member.done, seed)
    costs = {key: read_cost(artifact.path) for key, artifact in member.done.items()}
    ledger = as_if_alone([[costs[key] for key in wave] for wave in member.waves])
    family.meta["ledger"] = {kind: cost.to_json() for kind, cost in ledger.items()}
    family.meta["trainings"] = list(member.done)
    family.meta["warnings"] = said_of(member.done)
    return family


def run_suite(
    suite: str | Path | Mapping[str, Any],
    root: str | Path,
    *,
    workers: int | None = None,
    executor: str | Ray = "local",
    dry_run: bool = False,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> Summary:
    """Compute every cell of the suite that `root` does not hold yet; `overrides` read `learner.steps=20`.

    `executor` is "local" (worker processes of one thread each, by default one per CPU), "in-process", or "ray" or a `Ray` with its
    settings (a cluster; by default as many workers as fit on its machines). A failure becomes a FAILED.json and stops only the cells
    that need what failed. `dry_run` only says what would be done. Raises ConfigError before anything runs, BusyError, StoreError where
    the disk is full, and KeyboardInterrupt with a message; none of them loses anything.
    """
    began = time.monotonic()
    who, store = _executor(executor, workers), Store(checked("root", str | Path, root))
    read, document = load_suite(suite, overrides)
    members = members_of(read, document)
    if dry_run:
        return _planned(read, store, members, began)
    with _lock(store, who):
        with disk_errors(store.root):
            (store.root / "suites").mkdir(exist_ok=True)
            labels = {member.key: member.label for member in members}
            listed = sealed({"format": 1, "suite": read.model_dump(mode="json"), "cells": labels})
            write_json(store.root / "suites" / f"{read.name}.json", listed)
        return _run(read, store, members, began, who=who, workers=workers, progress=progress)


def _run(
    suite: Suite, store: Store, members: Sequence[Member], began: float, *, who: str | Ray, workers: int | None, progress: bool
) -> Summary:
    """With the store's lock held."""
    rows = {member.key: Row(member.key, member.label, "done") for member in members}
    todo = [member for member in members if store.cell(member.key) is None]

    def ready(member: Member) -> Job:
        return cell_job(store, member.spec, member.label, member.waves)

    def failed(member: Member, error: Mapping[str, Any], _: BaseException | None) -> None:
        store.fail(CELLS, member.key, error)
        rows[member.key] = Row(member.key, member.label, "failed", str(error["message"]))

    def done(member: Member) -> None:
        rows[member.key] = Row(member.key, member.label, "new")

    with _running(store, who, workers, Tasks(), cells=len(todo), show=progress) as (runner, shown):
        schedule = Schedule(store, runner, shown, on_ready=ready, on_failed=failed, on_done=done)
        schedule.run(todo)
    labels = {key: training_label(spec) for key, spec in schedule.specs.items()}
    trainings = [Row(key, labels[key], "done") for key in schedule.reused]
    trainings += [Row(key, labels[key], "new") for key in schedule.trained]
    trainings += [Row(key, labels[key], "failed", str(error["message"])) for key, error in schedule.broken.items()]
    return Summary(suite.name, str(store.root), tuple(rows.values()), tuple(trainings), time.monotonic() - began)


def _planned(suite: Suite, store: Store, members: Sequence[Member], began: float) -> Summary:
    """What a run would do, as far as it can be known without training."""
    cells, trainings = [], {}
    ahead: dict[str, Foreseen] = {}
    whole, measured = True, 0
    for member in members:
        if store.cell(member.key) is not None:
            cells.append(Row(member.key, member.label, "done"))
            continue
        try:
            while not member.waiting and (wave := next_wave(member)):
                member.waves.append(list(wave))
                for key, spec in wave.items():
                    artifact = store.artifact(key)
                    trainings[key] = Row(key, training_label(spec), "done" if artifact else "planned")
                    if artifact is None:
                        member.waiting.add(key)
                    else:
                        member.done[key] = artifact
            cells.append(Row(member.key, member.label, "planned"))
            later, all_known = foresee(store, member)
            ahead |= {one.key: one for one in later if not one.done}
            whole = whole and all_known
            if isinstance(member.task, Task) and not member.task.is_exact:
                measured += suite.samples * (len(member.task.judged()) + 1) * len(suite.splits)
        except Exception as error:
            cells.append(Row(member.key, member.label, "failed", failure(error)["message"]))
    total = {field: sum(getattr(one, field) or 0 for one in ahead.values()) for field in ("samples", "tokens")}
    foreseen = {**total, "measured": measured, "whole": whole}
    return Summary(suite.name, str(store.root), tuple(cells), tuple(trainings.values()), time.monotonic() - began, foreseen)


def check_executor(given: object) -> None:
    """ConfigError where this is neither Ray with its settings nor the name of an executor."""
    if not isinstance(given, Ray) and (not isinstance(given, str) or given not in EXECUTORS):
        raise ConfigError("jobs are run by a known executor", found=shown(given), remedy=nearest(shown(given), EXECUTORS))


def _executor(given: str | Ray, workers: int | None) -> str | Ray:
    """Checked, with the settings of Ray written out."""
    workers = checked("workers", int | None, workers)
    if workers is not None and workers < 1:
        raise ConfigError("a suite has at least one worker", found=f"workers = {workers}", remedy="leave it out for one per CPU")
    check_executor(given)
    who = Ray() if given == "ray" else given
    if isinstance(who, Ray):
        who.check()
    return who


def _lock(store: Store, who: str | Ray) -> contextlib.AbstractContextManager[Store]:
    return store.lock(patience=PATIENCE) if isinstance(who, Ray) else store.lock()


@contextlib.contextmanager
def _running(
    store: Store, who: str | Ray, workers: int | None, tasks: Tasks, *, cells: int, show: bool, drawn: int = 0
) -> Iterator[tuple[Executor, Display]]:
    """An executor and what shows its work. On Ctrl-C the workers are stopped before the message appears."""
    count = 1 if who == "in-process" else workers or cpus()
    with display(show=show, cells=cells, side_by_side=count) as shown:
        shown.forecast.drawn = drawn
        executor: Executor
        if isinstance(who, Ray):
            executor = RayWorkers(store, who, workers, display=shown)
        elif who == "local":
            executor = Workers(store, count, display=shown)
        else:
            executor = InProcess(tasks=tasks, display=shown)
        try:
            with executor:
                yield executor, shown
        except KeyboardInterrupt:
            message = f"stopped; finished work and checkpoints are kept in {store.root}: the same command goes on from there"
            shown.note(message)
            raise KeyboardInterrupt(message) from None


def _whole(registry: Registry, given: Any) -> Any:
    """The same with its fields checked and converted (1 is not 1.0 in a key), also where it was made by calling the class."""
    return registry.build({**describe(given), **unkeyed(given)} if hasattr(given, "registered_name") else given)
