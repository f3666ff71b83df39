"""Recipes: a YAML file that fits one method to your model, prompts and objectives.

    model: ./my-model        # or a GGUF file, or a hub name; revision, beta, max_new_tokens, dtype, quantize, trust_remote_code beside
    prompts: prompts.jsonl   # or {path, ...}, {dataset, ...}
    objectives:
      - {name: brief, use: length}
    guards: []               # written as objectives are: looked at on validation prompts and in the end, never trained
    terms: {}                # gated rewards, weights by step, targets, constraints: see `objectives.terms`
    method: experts          # or {name: experts, mixing: logit}; learner as well
    preferences: 11          # where the result is measured
    name: support            # of the family: runs/families/support

Relative paths mean the recipe's folder, and in an override the current one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from paretune.errors import ConfigError, nearest, shown
from paretune.hub import is_gguf
from paretune.objectives.base import check_callable
from paretune.objectives.terms import Terms
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, TASKS, checked
from paretune.runs import config
from paretune.tasks.pretrained import check_pretrained
from paretune.tasks.prompts import PromptSource
from paretune.tasks.recipe import RecipeTask, _name_of, _objective, _objectives
from paretune.types import Preference, check_name

__all__ = ["Recipe", "is_recipe", "is_suite", "load_recipe", "mistakes", "refuse_recipe", "refuse_suite", "task_entry", "unused"]

TASK_KEYS = {
    **{name: name for name in ("model", "revision", "beta", "max_new_tokens", "dtype", "quantize", "trust_remote_code")},
    "prompts": "prompt_source",
    "objectives": "objective_specs",
    "guards": "guard_specs",
    "terms": "terms",
}
SCORED = ("objectives", "guards")
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NEEDED = ("model", "prompts", "objectives")
PROMPT_KEYS = [field.name for field in fields(PromptSource)]
STAND_IN = {
    "model": "owner/model",
    "prompt_source": {"path": "prompts.jsonl"},
    "objective_specs": [{"use": "length"}, {"use": "length", "name": "2"}],
}
RUN_KEYS = ("name", "method", "learner", "seed", "output", "preferences", "tune")  # `tune` is for `paretune tune` alone


@dataclass(frozen=True)
class Recipe:
    """A whole run: what to fit, how, from which seed, and the run directory."""

    task: RecipeTask
    method: Any
    learner: Any
    seed: int
    root: Path
    name: str | None = None  # of the family; None: the method's and a hash
    preferences: int | tuple[tuple[float, ...], ...] | None = None  # where the result is measured: points per edge, or weights


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and check a recipe; ConfigError, with the line, before anything runs. An override reads `learner.lr=1e-3`."""
    path = Path(path)
    return _checked(config.load(path, overrides, short={"prompts": "path"}), path)


def is_recipe(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file says what only a recipe does, and nothing that only a suite does."""
    return "objectives" in data and "tasks" not in data


def refuse_recipe(data: Mapping[str, Any], path: Path) -> None:
    """ConfigError where a recipe stands in the place of a suite."""
    if is_recipe(data):
        remedy = f"paretune fit {path} fits its method; paretune compare {path} --methods experts,bridge runs several"
        raise ConfigError("a suite names tasks, methods and seeds", found=f"a recipe: {path.name}", remedy=remedy)


def refuse_suite(data: Mapping[str, Any], path: Path) -> None:
    """ConfigError where a suite stands in the place of a recipe."""
    if is_suite(data):
        remedy = f"paretune bench {path} runs it; `paretune fit` takes one model, its prompts and objectives, and one method"
        raise ConfigError("a recipe is fitted, and a suite is benched", found=f"a suite: {path.name}", remedy=remedy)


def is_suite(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file says what only a suite does."""
    return "tasks" in data or "methods" in data


def task_entry(
    file: Path | None, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None, *, folder: Path | None = None
) -> tuple[dict[str, Any], Any, int]:
    """The task of a recipe as an entry of a suite's `tasks:`, the recipe's learner and its seed.

    `changes` are keys of the recipe with other values, or all that there is where no `file` is given; their paths mean `folder`. A list
    where a recipe takes one value stays one, which the suite varies.
    """
    document = config.Document({}, "the suite") if file is None else config.load(file, overrides, short={"prompts": "path"})
    varied: dict[str, Any] = {}
    for key, value in (changes or {}).items():
        if key not in TASK_KEYS:
            raise ConfigError("an entry of a recipe has the recipe's keys", found=repr(key), remedy=nearest(key, TASK_KEYS))
        several = isinstance(value, list) and key not in SCORED
        document.data[key] = value[0] if several and value else value
        document.overridden[(key,)] = f"{key} in the suite"
        varied |= {key: value} if several else {}
    recipe = _checked(document, file or Path("the suite"), typed=folder)
    entry = {TASK_KEYS[key]: value for key, value in {**document.data, **varied}.items() if key in TASK_KEYS}
    return {"name": "recipe", **entry}, document.data.get("learner"), recipe.seed


def _checked(document: config.Document, path: Path, *, typed: Path | None = None) -> Recipe:
    """The recipe in a document; paths in it mean the folder of `path`, those of overrides `typed` (None: the current one)."""
    given = document.data
    refuse_suite(given, path)
    _known("a recipe", document, [*TASK_KEYS, *RUN_KEYS])
    for key in NEEDED:
        _check_needed(given, path, key)
    _check_shape(document)
    _anchor(document, path.resolve().parent, typed or Path.cwd())
    _check_places(document)
    task = _build_task(document)
    with document.at("method"):
        method = METHODS.build(_named(given.get("method"), "experts"))
    with document.at("learner"):
        learner = LEARNERS.build(_named(given.get("learner"), "pg"))
    task.check()
    _check_unlabelled(document, task, learner)
    with document.at("preferences"):
        preferences = _preferences(given.get("preferences"), task.objectives.names)
    root, name = Path(given["output"]), given.get("name")
    return Recipe(task=task, method=method, learner=learner, seed=given.get("seed", 0), root=root, name=name, preferences=preferences)


def _check_needed(given: Mapping[str, Any], path: Path, key: str) -> None:
    if given.get(key) is None:
        raise ConfigError("a recipe names a model, prompts and objectives", found=f"no {key}: in {path.name}", remedy=f"add {key}:")


def _check_places(document: config.Document) -> None:
    """What only a run looks at: `output` and `tune`."""
    given = document.data
    for key, kind in (("output", str), ("tune", dict[str, Any] | None)):
        if key in given:
            with document.at(key):
                checked(f"{key}:", kind, given.get(key))
    with document.at("name"):
        if given.get("name") is not None and not (isinstance(given["name"], str) and re.fullmatch(FOLDER_NAME, given["name"])):
            remedy = "use letters, digits, dots, dashes and underscores"
            raise ConfigError("name: is what the family's folder is called", found=shown(given["name"]), remedy=remedy)
    with document.at("output"):
        if not given.get("output", "").isprintable():
            raise ConfigError("output: is a folder's name, on one line", found=shown(given["output"]), remedy="for example output: runs")


def _check_unlabelled(document: config.Document, task: RecipeTask, learner: Any) -> None:
    """Prompts without rewards that a learner asks for are there."""
    with document.at("learner"):
        if hasattr(learner, "prompts_without"):
            learner.prompts_without(task)


def unused(recipe: Recipe) -> list[str]:
    """What a recipe gives and its learner does not take, in sentences."""
    if recipe.task.unlabelled(1) and not getattr(recipe.learner, "unlabelled", 0):
        return ["prompts.unlabelled is not used: nothing is trained on it without learner.unlabelled, which the learner pg has"]
    return []


def _specs(given: Mapping[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """Each objective and guard with its key and place."""
    return [(key, place, spec) for key in SCORED for place, spec in enumerate(given.get(key) or ())]


def _preferences(given: Any, names: Sequence[str]) -> int | tuple[tuple[float, ...], ...] | None:
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and given >= 2):
        return given
    if not isinstance(given, list) or not given or not all(isinstance(row, list | dict) for row in given):
        raise ConfigError(
            "preferences: is a number of points per edge, or a list of weights",
            found=repr(given),
            remedy="for example preferences: 11, or preferences: [[1, 0], [0.5, 0.5], [0, 1]]",
        )
    return tuple(Preference.of(names, row).weights for row in given)


def _named(given: Any, default: str) -> Any:
    """What is built where a recipe says nothing, or gives settings without a name."""
    return {"name": default, **given} if isinstance(given, dict) else default if given is None else given


def _check_shape(document: config.Document) -> None:
    """Prompts are a mapping, objectives a list of mappings with usable names, the seed a number; short forms are written in full."""
    given = document.data
    if isinstance(given["prompts"], str):
        given["prompts"] = {"path": given["prompts"]}
    with document.at("prompts"):
        if not isinstance(given["prompts"], dict):
            raise ConfigError("prompts: is a file, or its settings", found=repr(given["prompts"]), remedy="write prompts: prompts.jsonl")
    _known("prompts", document, PROMPT_KEYS, "prompts")
    example = "write a list: - {name: brief, use: length}"
    for key in SCORED:
        with document.at(key):
            specs = given.get(key, [])
            if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
                raise ConfigError(f"{key}: is a list of objectives", found=f"a {type(specs).__name__}", remedy=example)
    for key, place, spec in _specs(given):
        with document.at(key, place):
            if not re.fullmatch(r"[^\s,=]+", _name_of(spec)):
                raise ConfigError("the name of an objective has no space, comma or =", found=repr(_name_of(spec)), remedy=example)
            check_name("an objective", _name_of(spec))
    with document.at("seed"):
        if not isinstance(given.get("seed", 0), int) or isinstance(given.get("seed"), bool):
            raise ConfigError("the seed is a whole number", found=repr(given["seed"]), remedy="for example seed: 0")


def _known(what: str, document: config.Document, keys: Sequence[str], *place: str, only: str | None = None) -> None:
    here = document.data[place[0]] if place else document.data
    for key in here:
        if key not in keys and only in (None, key):
            with document.at(*place, key):
                raise ConfigError(f"{what} has the keys that it declares", found=repr(key), remedy=nearest(key, keys))


def _build_task(document: config.Document, values: Mapping[str, Any] | None = None, *, parts: bool = True) -> RecipeTask:
    """The task, with its objectives and prompts (the `parts`) looked at one by one so that a complaint says where."""
    given = document.data
    if parts:
        _terms(document)
    values = values or {TASK_KEYS[key]: value for key, value in given.items() if key in TASK_KEYS}
    try:
        task = TASKS.build({"name": "recipe", **values})
    except ConfigError as error:
        rule = error.rule.removeprefix("task recipe: ").replace("prompt_source", "prompts").replace("objective_specs", "objectives")
        rule = rule.replace("guard_specs", "guards")
        keys = {field: key for key, field in TASK_KEYS.items()}
        named = [keys.get(str(step), step) for step in error.place] or rule.partition(":")[0].partition(",")[0].split(".")
        where = f" ({document.where(*named)})" if named[0] in given else ""
        raise ConfigError(rule, found=error.found + where, remedy=error.remedy) from error
    if not parts:
        return task
    with document.at("model"):
        check_pretrained(task.model)
    for key, place, spec in _specs(given):
        with document.at(key, place):
            objective = _objective(spec)
            check_callable(_name_of(spec), objective, None)
            objective.check()
    with document.at("terms"):
        if task.terms is not None:
            task.terms.check(task.objectives, task.guards)
    with document.at("prompts"):
        assert task.prompt_source.splits
    return task


def _terms(document: config.Document) -> Terms | None:
    """The terms, for objectives and guards of these names."""
    names = {key: [_name_of(spec) for spec in document.data.get(key) or ()] for key in SCORED}
    with document.at("terms"):
        return Terms.of(document.data.get("terms"), names["objectives"], names["guards"])


def _anchor(document: config.Document, folder: Path, typed_in: Path) -> None:
    """Make every path absolute: under the recipe's folder, or where an override gave it, under `typed_in`.

    Objectives that read the reference model get its name.
    """

    def absolute(text: Any, *place: str | int, always: bool = True) -> Any:
        if not isinstance(text, str):
            return text
        typed = any(place[:depth] in document.overridden for depth in range(1, len(place) + 1))
        path = Path(os.path.normpath((typed_in if typed else folder) / Path(text).expanduser()))
        return str(path) if always or text.startswith((".", "/", "~")) or is_gguf(text) or path.exists() else text

    given, prompts = document.data, document.data["prompts"]
    given["model"] = absolute(given["model"], "model", always=False)  # else the name of a model on the hub
    given["output"] = absolute(given.get("output") or str(folder / "runs"), "output")
    of_files = prompts.get("dataset") is None
    for key in ("path", "test", "validation", "unlabelled") if of_files else ("dataset",):
        if key in prompts:
            prompts[key] = absolute(prompts[key], "prompts", key, always=of_files)
    for role, place, spec in _specs(given):
        if isinstance(spec.get("use"), str) and ":" in spec["use"]:
            file, _, function = spec["use"].rpartition(":")
            spec["use"] = f"{absolute(file, role, place, 'use')}:{function}"
            continue
        known = spec.get("use") in list(OBJECTIVES)
        for key, kind in getattr(OBJECTIVES[spec["use"]], "places", {}).items() if known else ():
            if key in spec:
                spec[key] = absolute(spec[key], role, place, key, always=kind == "path")
        if known and "model" not in spec and getattr(OBJECTIVES[spec["use"]], "of_reference", False):
            spec.update({key: given[key] for key in ("model", "revision", "dtype", "trust_remote_code") if key in given})


# All mistakes at once


def mistakes(path: str | Path, overrides: Sequence[str] = ()) -> list[ConfigError]:
    """Everything that is wrong with a recipe; [] where it loads. What is wrong is left out, and the rest looked at by itself."""
    path, found = Path(path), _Found()
    with found:
        load_recipe(path, overrides)
        return []
    with contextlib.suppress(ConfigError):  # no YAML at all, or an override that leads nowhere: that is all that can be said
        document = config.load(path, overrides, short={"prompts": "path"})
        if not is_suite(document.data):
            _look_at_parts(document, path, found)
    return found.errors


class _Found:
    """A block after which the ConfigError that ended it is one of `errors`."""

    def __init__(self) -> None:
        self.errors: list[ConfigError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, ConfigError):
            for place, known in enumerate(self.errors):  # the same one may say where it is, or not
                short, long = sorted((known, error), key=lambda one: len(one.found))
                if (known.rule, known.remedy) == (error.rule, error.remedy) and long.found.startswith(short.found):
                    self.errors[place] = long
                    break
            else:
                self.errors.append(error)
        return isinstance(error, ConfigError)


def _look_at_parts(document: config.Document, path: Path, found: _Found) -> None:
    given = document.data
    for key in list(given):
        with found:
            _known("a recipe", document, [*TASK_KEYS, *RUN_KEYS], only=key)
    given = document.data = {key: value for key, value in given.items() if key in (*TASK_KEYS, *RUN_KEYS) and value is not None}
    for key in NEEDED:
        with found:
            _check_needed(given, path, key)
    for key in [key for key in ("prompts", *SCORED, "seed") if key in given]:  # what has the wrong shape goes
        alone = dataclasses.replace(document, data={"prompts": {}, "objectives": []} | {key: given[key]})
        with found:
            _check_shape(alone)
            given[key] = alone.data[key]
            continue
        if key == "prompts" and isinstance(given[key], dict):
            for name in list(given[key]):
                with found:
                    _known("prompts", document, PROMPT_KEYS, "prompts", only=name)
            given[key] = {name: value for name, value in given[key].items() if name in PROMPT_KEYS}
        elif key in SCORED and isinstance(given[key], list):
            given[key] = [spec if isinstance(spec, dict) else {} for spec in given[key]]
        else:
            del given[key]
    usable = {"model": "", "prompts": {}, "objectives": []} | given
    document.data = given = usable
    with found:
        _check_places(document)
    with contextlib.suppress(ConfigError):
        _anchor(document, path.resolve().parent, Path.cwd())
    _look_at_values(document, found)


def _look_at_values(document: config.Document, found: _Found) -> None:
    """Each field of the task by itself, the objectives one by one, then what needs several of them."""
    given, good = document.data, []
    for key, field in TASK_KEYS.items():
        if key in given and key not in (*NEEDED, *SCORED, "terms"):
            with found:
                _build_task(document, {**STAND_IN, field: given[key]}, parts=False)
    for key, place, spec in _specs(given):
        with found, document.at(key, place):
            objective = _objective(spec)
            check_callable(_name_of(spec), objective, None)
            objective.check()
            good.append((key, place, spec))
    for key, registry, default in (("method", METHODS, "experts"), ("learner", LEARNERS, "pg")):
        entry = _named(given.get(key), default)
        with contextlib.suppress(ConfigError):
            registry.build(entry)
            continue
        settings, wrong = entry if isinstance(entry, dict) else {}, False
        for name, value in settings.items():
            try:
                registry.build({"name": settings["name"], name: value})
            except ConfigError as error:
                if error.place[:1] == (name,):  # else a rule of several fields, of which the others are the defaults here
                    wrong = True
                    with found, document.at(key):
                        raise
        if not wrong:
            with found, document.at(key):
                registry.build(entry)
    with found:
        terms, scorers = _terms(document), [(_name_of(spec), _objective(spec)) for _, _, spec in good]
        with document.at("terms"):
            if terms is not None and len(good) == len(_specs(given)):
                terms.check(_objectives(scorers[: len(given["objectives"])]), _objectives(scorers))
    with found, document.at("preferences"):
        _preferences(given.get("preferences"), [_name_of(spec) for spec in given["objectives"]])
    usable = True
    if given["model"]:
        with found, document.at("model"):
            usable = False
            check_pretrained(given["model"])
            usable = True
    columns: tuple[str, ...] | None = None
    if given["prompts"]:
        with found, document.at("prompts"):
            columns = _build_task(document, {**STAND_IN, "prompt_source": given["prompts"]}, parts=False).prompt_source.columns
    if columns is None:
        return
    for key, place, spec in good:
        with found, document.at(key, place):
            check_callable(_name_of(spec), _objective(spec), columns)
    if usable and given["model"]:
        plain: dict[str, Any] = {key: given[key] for key in ("model", "revision", "trust_remote_code") if key in given}
        with found, document.at("prompts"):
            _build_task(document, {**STAND_IN, **plain, "prompt_source": given["prompts"]}, parts=False).check()
