"""The YAML file of a suite: its schema, and the cells that it stands for.

    name: quick                                   # also the name of ROOT/suites/<name>.json
    about: every method at three correlations     # optional
    tasks:
      - {name: exact-v1, rho: [0.8, 0.0, -0.8]}   # one task per value; several lists give their product, in the order written
    learner: {name: exact, steps: 100}
    methods: [reference, {name: experts, mixer: [parameter, logit]}]   # lists as in tasks
    seeds: [100, 101]      # the seed of every training, and of every task that has a `seed` field
    splits: [train, test]  # default: both
    samples: 64            # per preference and split, where a task is not exact
    tune: {learner.lr: [1e-3, 1e-1, log]}   # for `paretune tune` alone

A plain name stands for {name: ...}. A field whose declared type is itself a list or a tuple takes a list as its value; to vary such a
field, write the entry twice. Every combination of a task, a seed and a method is a *cell*.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import itertools
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from paretune.config import Document, load
from paretune.errors import ConfigError
from paretune.jobs import evaluation_settings, label_of
from paretune.registry import LEARNERS, METHODS, TASKS, Registry, describe
from paretune.schedule import Member
from paretune.types import key_of

__all__ = ["Suite", "expand", "load_suite", "members_of"]

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
    samples: int = Field(default=64, ge=1, description="a whole number of at least 1")
    tune: dict[str, Any] | None = Field(default=None, exclude=True, description="for example tune: {learner.lr: [1e-3, 1e-1, log]}")


def load_suite(given: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[Suite, Document]:
    """The checked suite, and where everything in it stands. Raises ConfigError with file and line."""
    if isinstance(given, str | Path):
        document = load(given, overrides)
    else:
        document = Document(copy.deepcopy(dict(given)), "the suite")
        for text in overrides:
            document.override(text)
    return document.validate(Suite), document


def members_of(suite: Suite, document: Document) -> list[Member]:
    """One per distinct cell: task entries, then seeds, then methods, in the order written. Everything is built and thereby checked."""
    with document.at("learner"):
        learner = LEARNERS.build(suite.learner)
    methods = [one for place, entry in enumerate(suite.methods) for one in _built(METHODS, entry, document, "methods", place)]
    evaluation = evaluation_settings(suite.splits, suite.samples)
    members: dict[str, Member] = {}
    for place, entry in enumerate(suite.tasks):
        for task, seed in _tasks(entry, suite.seeds, document, place):
            for method in methods:
                spec: dict[str, Any] = {"method": describe(method), "task": describe(task), "learner": describe(learner)}
                spec |= {"seed": seed, "evaluation": evaluation}
                label = f"{label_of(spec['method'], METHODS)} on {label_of(spec['task'], TASKS)}"
                label += f", seed {seed}" if "seed" not in spec["task"] else ""
                members.setdefault(key_of(spec), Member(key_of(spec), label, task, method, learner, seed, spec=spec))
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
            fixed = None if seeded else TASKS.build(one)
            found += [(TASKS.build({**one, "seed": seed}) if seeded else fixed, seed) for seed in seeds]
        return found


def _takes_list(hint: Any) -> bool:
    """True where a value of the declared type can be written as a list."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _takes_list(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_takes_list(one) for one in typing.get_args(hint))
    kind = origin or hint
    return hint is Any or (isinstance(kind, type) and issubclass(kind, collections.abc.Collection) and kind not in (str, bytes, dict))
