"""What `paretune tune` is asked for: a recipe or a suite, and fields of its learner or method, each a range or a list of choices."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ConfigError, nearest
from paretune.registry import LEARNERS, METHODS
from paretune.runs import config
from paretune.runs.config import Document
from paretune.runs.recipe import load_recipe
from paretune.runs.suite import expand, load_suite, members_of
from paretune.tasks.preferences import JUDGED_SEEDS

if TYPE_CHECKING:
    from paretune.tasks.base import Task

__all__ = ["Dimension", "Plan", "read_plan", "space_of"]

REGISTRIES = {"learner": LEARNERS, "method": METHODS}
SCALES = ("log", "linear")
AROUND = 10.0  # where nothing is asked for, the learning rate, this many times lower and higher


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
            label = json.dumps(list(value) if isinstance(value, tuple) else value)
            return label if label in [json.dumps(choice) for choice in self.choices] else None
        inside = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return value if inside else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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
        learner, root, count = suite.learner, Path("paretune-runs") / path.stem, suite.samples
    judged = sorted({seed for task, seed in cells if hasattr(task, "seed") and seed in JUDGED_SEEDS})
    if judged:
        raise ConfigError(
            f"nothing is tuned on the seeds {JUDGED_SEEDS[0]} to {JUDGED_SEEDS[-1]}: results are judged there",
            found=f"seeds {', '.join(map(str, judged))}",
            remedy="tune on development seeds, 0 to 9: seeds=[0,1,2]",
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
    made = _range(path, values, entries) if values[-1] in SCALES else Dimension(path, choices=_distinct(values))
    for value in made.choices or (made.low, made.high):
        REGISTRIES[part].build({**entries[part], name: int(value) if made.whole else value})
    return made


def _range(path: str, values: list[Any], entries: Mapping[str, Mapping[str, Any]]) -> Dimension:
    part, _, name = path.partition(".")
    ends, log = values[:-1], values[-1] == "log"
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end) for end in ends)
    if len(ends) != 2 or not numbers or not ends[0] < ends[1] or (log and ends[0] <= 0):
        above = ", above 0" if log else ""
        raise ConfigError(
            f"a range is [low, high, {values[-1]}] with low below high{above}",
            found=f"{path}: {values}",
            remedy=f"for example {path}: [1e-4, 1e-2, log]",
        )
    cls = REGISTRIES[part][entries[part]["name"]]
    whole = typing.get_type_hints(cls)[name] is int
    if whole and any(int(end) != end for end in ends):
        raise ConfigError(f"{path} is a whole number", found=f"{path}: {values}", remedy="give whole ends")
    return Dimension(path, low=float(ends[0]), high=float(ends[1]), log=log, whole=whole)


def _fields(part: str, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    cls: Any = REGISTRIES[part][str(entries[part]["name"])]
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _distinct(values: list[Any]) -> tuple[Any, ...]:
    return tuple({json.dumps(value): value for value in values}.values())
