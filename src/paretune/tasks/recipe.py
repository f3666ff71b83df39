"""Your own model, prompts and objectives as a task, and the recipe file that describes a whole run.

A recipe is one YAML file; `examples/support_desk/recipe.yaml` is a worked one. Paths in it are relative to its folder; paths in
`key=value` overrides are relative to where the command runs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paretune import config
from paretune.errors import ConfigError, nearest
from paretune.objectives import Objective, check_callable, score_all
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, TASKS, describe
from paretune.tasks import Task
from paretune.tasks.pretrained import check_pretrained, content_of, context_length, load_pretrained, load_tokenizer
from paretune.tasks.prompts import PromptSource
from paretune.types import Objectives, Preference, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Recipe", "RecipeTask", "load_recipe"]


@TASKS.register("recipe")
@dataclass(frozen=True, kw_only=True)
class RecipeTask(Task):
    """A causal LM, prompts and objectives of one's own. Returns are sampled: nothing is known about the true front.

    Each of `objective_specs` reads {name, use, low, high, fields...}: `use` is a built-in objective or `file.py:function`.
    Hides: scores are raw, so an objective with a wide range outweighs one with a narrow range at equal weights.
    """

    model: str  # a directory, or a name on the hub
    prompt_source: PromptSource
    objective_specs: tuple[dict[str, Any], ...]
    revision: str | None = None
    beta: float = 0.1  # units of return per nat of KL from the reference
    max_new_tokens: int = 64
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    trust_remote_code: bool = False

    def __post_init__(self):
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ConfigError(
                "beta, the price of one nat of KL, is positive",
                found=f"beta={self.beta:g}",
                remedy="0.05 to 0.3 suits scores within [0, 1]",
            )
        if self.max_new_tokens < 1:
            raise ConfigError("an answer has room for a token", found=f"max_new_tokens={self.max_new_tokens}", remedy="try 64")
        if len(self.objective_specs) < 2:
            raise ConfigError(
                "a trade-off needs at least two objectives",
                found=", ".join(_name_of(s) for s in self.objective_specs) or "none",
                remedy="add one under objectives:, for example {name: brief, use: length}",
            )

    @cached_property
    def scorers(self) -> tuple[tuple[str, Objective], ...]:
        """(name, objective) in the order of axis M."""
        return tuple((_name_of(spec), _objective(spec)) for spec in self.objective_specs)

    @cached_property
    def objectives(self) -> Objectives:  # type: ignore[override]
        return Objectives(
            names=tuple(name for name, _ in self.scorers),
            low=tuple(float(o.low) for _, o in self.scorers),
            high=tuple(float(o.high) for _, o in self.scorers),
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_pretrained(self.model, revision=self.revision, dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    def prompts(self, split: str) -> Sequence[Prompt]:
        if split not in self.prompt_source.splits:
            raise ConfigError("the prompts are split in two", found=repr(split), remedy=nearest(split, self.prompt_source.splits))
        return self.prompt_source.splits[split]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """(N, M) raw scores. `completion_ids` are the completions tokenised again, without special tokens."""
        ids = self.tokenizer(list(completions), add_special_tokens=False)["input_ids"] if len(completions) else []
        return score_all(self.scorers, prompts, completions, completion_ids=ids)

    def base(self) -> Mapping[str, Any]:
        """Without `trust_remote_code`: a family that one was given must not decide to run code."""
        return {"model": self.model, "revision": self.revision, "dtype": self.dtype}

    def content(self) -> dict[str, Any]:
        """Hashes of the prompts, of the local weights (or the hub's commit), and each objective with the hashes of its files."""
        return self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        return {
            "prompts": self.prompt_source.content(),
            "objectives": {name: describe(objective) for name, objective in self.scorers},
            "model": content_of(self.model, self.revision),
        }

    def check(self) -> None:
        """Everything that can be found wrong before a model is loaded; raises ConfigError."""
        check_pretrained(self.model)
        columns = self.prompt_source.columns
        assert self.objectives.count == len(self.scorers)
        for name, objective in self.scorers:
            check_callable(name, objective, columns)
        if self.prompt_source.conversational and not self.tokenizer.chat_template:
            raise ConfigError(
                "prompts made of messages need a tokenizer with a chat template",
                found=f"none in the tokenizer of {self.model}",
                remedy="give plain texts, for example with template:, or save a chat template with the tokenizer",
            )
        self._check_lengths()

    def _check_lengths(self) -> None:
        room = context_length(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        prompts = [*self.prompts("train"), *self.prompts("test")]
        if self.prompt_source.conversational:
            chat = self.tokenizer.apply_chat_template
            texts = [str(chat([dict(m) for m in p.messages or ()], tokenize=False, add_generation_prompt=True)) for p in prompts]
        else:
            texts = [str(p.text) for p in prompts]
        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        if min(lengths) == 0:
            raise ConfigError(
                "a prompt has at least one token", found=repr(texts[lengths.index(0)]), remedy="remove it, or use another tokenizer"
            )
        if room is not None and max(lengths) + self.max_new_tokens > room:
            raise ConfigError(
                "prompt and answer fit into the model's context",
                found=f"a prompt of {max(lengths)} tokens + max_new_tokens {self.max_new_tokens} > {room}",
                remedy="shorten the prompts, or lower max_new_tokens",
            )


def _name_of(spec: Mapping[str, Any]) -> str:
    use = str(spec.get("use", ""))
    return str(spec.get("name") or use.rpartition(":")[2] or "unnamed")


def _objective(spec: Mapping[str, Any]) -> Objective:
    """From {name, use, low, high, fields...}."""
    given = {key: value for key, value in spec.items() if key not in ("name", "use")}
    use = spec.get("use")
    if not isinstance(use, str):
        raise ConfigError(
            "an objective says what it uses",
            found=f"{_name_of(spec)!r} with {', '.join(spec)}",
            remedy=f"use: rewards.py:function, or one of {', '.join(n for n in OBJECTIVES if n != 'function')}",
        )
    if ":" not in use:
        return OBJECTIVES.build({**given, "name": use})
    missing = [bound for bound in ("low", "high") if bound not in given]
    if missing:
        raise ConfigError(
            f"objective {_name_of(spec)!r}: a function of your own comes with its range",
            found=f"no {' and no '.join(missing)}",
            remedy="add low: and high:, the worst and the best score that it gives",
        )
    return OBJECTIVES.build({**given, "name": "function", "use": use})


@dataclass(frozen=True)
class Recipe:
    """A whole run: what to fit, how, from which seed, and the run directory."""

    task: RecipeTask
    method: Any
    learner: Any
    seed: int
    root: Path
    preferences: int | tuple[tuple[float, ...], ...] | None = None  # where the result is measured: points per edge, or weights


TASK_KEYS = {
    **{name: name for name in ("model", "revision", "beta", "max_new_tokens", "dtype", "trust_remote_code")},
    "prompts": "prompt_source",
    "objectives": "objective_specs",
}
RUN_KEYS = ("method", "learner", "seed", "output", "preferences", "tune")  # `tune` is for `paretune tune` alone


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and check a recipe; ConfigError, with the line, before anything runs. An override reads `learner.lr=1e-3`."""
    path = Path(path)
    document = config.load(path, overrides, short={"prompts": "path"})
    given = document.data
    _known("a recipe", document, [*TASK_KEYS, *RUN_KEYS])
    for key in ("model", "prompts", "objectives"):
        if given.get(key) is None:
            raise ConfigError("a recipe names a model, prompts and objectives", found=f"no {key}: in {path.name}", remedy=f"add {key}:")
    _check_shape(document)
    _anchor(document, path.resolve().parent)
    task = _build_task(document)
    with document.at("method"):
        method = METHODS.build(_named(given.get("method"), "experts"))
    with document.at("learner"):
        learner = LEARNERS.build(_named(given.get("learner"), "pg"))
    task.check()
    with document.at("preferences"):
        preferences = _preferences(given.get("preferences"), task.objectives.names)
    root = Path(given["output"])
    return Recipe(task=task, method=method, learner=learner, seed=given.get("seed", 0), root=root, preferences=preferences)


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
    return {"name": default, **given} if isinstance(given, dict) else given or default


def _check_shape(document: config.Document) -> None:
    """Prompts are a mapping, objectives a list of mappings with usable names, the seed a number; short forms are written in full."""
    given = document.data
    if isinstance(given["prompts"], str):
        given["prompts"] = {"path": given["prompts"]}
    with document.at("prompts"):
        if not isinstance(given["prompts"], dict):
            raise ConfigError("prompts: is a file, or its settings", found=repr(given["prompts"]), remedy="write prompts: prompts.jsonl")
    _known("prompts", document, [f.name for f in fields(PromptSource)], "prompts")
    example = "write a list: - {name: brief, use: length}"
    with document.at("objectives"):
        specs = given["objectives"]
        if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
            raise ConfigError("objectives: is a list of objectives", found=f"a {type(specs).__name__}", remedy=example)
    for place, spec in enumerate(specs):
        with document.at("objectives", place):
            if not re.fullmatch(r"[^\s,=]+", _name_of(spec)):
                raise ConfigError("the name of an objective has no space, comma or =", found=repr(_name_of(spec)), remedy=example)
    with document.at("seed"):
        if not isinstance(given.get("seed", 0), int) or isinstance(given.get("seed"), bool):
            raise ConfigError("the seed is a whole number", found=repr(given["seed"]), remedy="for example seed: 0")


def _known(what: str, document: config.Document, keys: Sequence[str], *place: str) -> None:
    here = document.data[place[0]] if place else document.data
    for key in here:
        if key not in keys:
            with document.at(*place, key):
                raise ConfigError(f"{what} has the keys that it declares", found=repr(key), remedy=nearest(key, keys))


def _build_task(document: config.Document) -> RecipeTask:
    """The task, with its objectives and prompts looked at one by one so that a complaint says where."""
    given = document.data
    try:
        task = TASKS.build({"name": "recipe", **{TASK_KEYS[key]: value for key, value in given.items() if key in TASK_KEYS}})
    except ConfigError as error:
        rule = error.rule.removeprefix("task recipe: ").replace("prompt_source", "prompts").replace("objective_specs", "objectives")
        named = rule.partition(":")[0].partition(",")[0].split(".")
        where = f" ({document.where(*named)})" if named[0] in given else ""
        raise ConfigError(rule, found=error.found + where, remedy=error.remedy) from error
    with document.at("model"):
        check_pretrained(task.model)
    for place, spec in enumerate(given["objectives"]):
        with document.at("objectives", place):
            objective = _objective(spec)
            check_callable(_name_of(spec), objective, None)
            objective.check()
    with document.at("prompts"):
        assert task.prompt_source.splits
    return task


def _anchor(document: config.Document, folder: Path) -> None:
    """Make every path absolute: under the recipe's folder, or where an override gave it, under the current one."""

    def absolute(text: Any, *place: str | int, always: bool = True) -> Any:
        if not isinstance(text, str):
            return text
        typed = any(place[:depth] in document.overridden for depth in range(1, len(place) + 1))
        path = Path(os.path.normpath((Path.cwd() if typed else folder) / Path(text).expanduser()))
        return str(path) if always or text.startswith((".", "/", "~")) or path.exists() else text

    given, prompts = document.data, document.data["prompts"]
    given["model"] = absolute(given["model"], "model", always=False)  # else the name of a model on the hub
    given["output"] = absolute(given.get("output") or str(folder / "runs"), "output")
    of_files = prompts.get("dataset") is None
    for key in ("path", "test") if of_files else ("dataset",):
        if key in prompts:
            prompts[key] = absolute(prompts[key], "prompts", key, always=of_files)
    for place, spec in enumerate(given["objectives"]):
        if isinstance(spec.get("use"), str) and ":" in spec["use"]:
            file, _, function = spec["use"].rpartition(":")
            spec["use"] = f"{absolute(file, 'objectives', place, 'use')}:{function}"
            continue
        known = spec.get("use") in list(OBJECTIVES)
        for key, kind in getattr(OBJECTIVES[spec["use"]], "places", {}).items() if known else ():
            if key in spec:
                spec[key] = absolute(spec[key], "objectives", place, key, always=kind == "path")
