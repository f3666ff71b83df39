"""Your own model, prompts and objectives as a task, and the recipe file that describes a whole run.

A recipe is one YAML file; `examples/support_desk/recipe.yaml` is a worked one. Paths in it are relative to its folder; paths in
`key=value` overrides are relative to where the command runs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

from paretune.errors import ConfigError, nearest
from paretune.objectives import Objective, check_callable, score_all
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, TASKS, describe
from paretune.tasks import Task
from paretune.tasks.pretrained import check_pretrained, content_of, context_length, load_pretrained, load_tokenizer
from paretune.tasks.prompts import PromptSource
from paretune.types import Objectives, Prompt

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


TASK_KEYS = {
    **{name: name for name in ("model", "revision", "beta", "max_new_tokens", "dtype", "trust_remote_code")},
    "prompts": "prompt_source",
    "objectives": "objective_specs",
}
RUN_KEYS = ("method", "learner", "seed", "output")
SHORT = {"prompts": "path", "method": "name", "learner": "name"}  # the key that a plain string stands for


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, complete and check a recipe; ConfigError before anything runs. An override reads `learner.steps=20`."""
    path = Path(path)
    given = _read(path)
    _known("a recipe", given, [*TASK_KEYS, *RUN_KEYS])
    for key in given:
        _anchor(given, key, path.resolve().parent)
    for text in overrides:
        _anchor(given, _override(given, text), Path.cwd())
    for key in ("model", "prompts", "objectives"):
        if given.get(key) is None:
            raise ConfigError("a recipe names a model, prompts and objectives", found=f"no {key}: in {path.name}", remedy=f"add {key}:")
    if not isinstance(given["prompts"], Mapping):
        raise ConfigError("prompts: is a file, or its settings", found=repr(given["prompts"]), remedy="for example prompts: prompts.jsonl")
    _known("prompts", given["prompts"], [f.name for f in fields(PromptSource)])
    _check_specs(given["objectives"])
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError("the seed is a whole number", found=repr(seed), remedy="for example seed: 0")
    try:
        task = TASKS.build({"name": "recipe", **{TASK_KEYS[key]: value for key, value in given.items() if key in TASK_KEYS}})
    except ConfigError as error:
        rule = error.rule.replace("task recipe: prompt_source", "recipe: prompts").replace("task recipe:", "recipe:")
        raise ConfigError(rule, found=error.found, remedy=error.remedy) from error
    method, learner = METHODS.build(given.get("method", "experts")), LEARNERS.build(given.get("learner", "pg"))
    task.check()
    return Recipe(task=task, method=method, learner=learner, seed=seed, root=Path(given.get("output") or path.resolve().parent / "runs"))


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the recipe can be read", found=f"{path}: {error}", remedy="give the path of a YAML file") from None
    try:
        given = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            "a recipe is YAML",
            found=f"{path.name}{line}: {getattr(error, 'problem', None) or error}",
            remedy="check the indentation, colons and quotes there",
        ) from None
    if not isinstance(given, dict):
        raise ConfigError("a recipe is a YAML mapping", found=f"{path.name}: {_kind(given)}", remedy="write key: value lines")
    return {str(key): value for key, value in given.items()}


def _override(given: dict[str, Any], text: str) -> str:
    """Set one value in place; the items of a list are known by number or by their name. The top-level key that changed."""
    dotted, equals, value = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError("an override reads key=value", found=repr(text), remedy="for example learner.steps=20 or beta=0.2")
    _known("a recipe", keys[:1], [*TASK_KEYS, *RUN_KEYS])
    try:
        parsed = yaml.load(value, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        raise ConfigError("the value of an override is YAML", found=repr(text), remedy="quote it, for example 'beta=0.2'") from None
    if len(keys) > 1 and keys[0] not in (*SHORT, "objectives"):
        raise ConfigError("an override names a value in the recipe", found=repr(text), remedy=f"{keys[0]} has nothing below it")
    here: Any = given
    for depth, key in enumerate(keys[:-1]):
        if isinstance(here, dict):
            if isinstance(here.get(key), str) and depth == 0 and key in SHORT:
                here[key] = {SHORT[key]: here[key]}
            here = here.setdefault(key, {})
        else:
            here = here[_position(here, key, text)]
        if not isinstance(here, (dict, list)):
            raise ConfigError("an override names a value in the recipe", found=repr(text), remedy=f"{key} has nothing below it")
    if isinstance(here, dict):
        here[keys[-1]] = parsed
    else:
        here[_position(here, keys[-1], text)] = parsed
    return keys[0]


def _position(items: list[Any], key: str, text: str) -> int:
    named = {str(item.get("name")): place for place, item in enumerate(items) if isinstance(item, dict) and "name" in item}
    if key in named or (key.isdigit() and int(key) < len(items)):
        return named.get(key, int(key) if key.isdigit() else 0)
    raise ConfigError("an override names an item of the list", found=repr(text), remedy=nearest(key, named))


def _anchor(given: dict[str, Any], key: str, base: Path) -> None:
    """Make the paths under `key` absolute, in place; write short forms in full."""
    if isinstance(given[key], str) and key in SHORT:
        given[key] = {SHORT[key]: given[key]}
    value = given[key]
    if key in ("model", "output") and isinstance(value, str):
        given[key] = _absolute(value, base, always=key == "output")
    elif key == "prompts" and isinstance(value, dict):
        of_files = value.get("dataset") is None
        for part in ("path", "test") if of_files else ("dataset",):
            if isinstance(value.get(part), str):
                value[part] = _absolute(value[part], base, always=of_files)
    elif key == "objectives" and isinstance(value, list):
        for spec in value:
            if isinstance(spec, dict) and isinstance(spec.get("use"), str) and ":" in spec["use"]:
                file, _, function = spec["use"].rpartition(":")
                spec["use"] = f"{_absolute(file, base, always=True)}:{function}"


def _absolute(text: str, base: Path, *, always: bool) -> str:
    """`text` under `base`, if it is a path: always, or when it looks like one or is there."""
    path = Path(os.path.normpath(base / Path(text).expanduser()))
    return str(path) if always or path.exists() or text.startswith((".", "/", "~")) else text


def _check_specs(specs: Any) -> None:
    example = "write a list: - {name: brief, use: length}"
    if not isinstance(specs, list) or not all(isinstance(spec, Mapping) for spec in specs):
        raise ConfigError("objectives: is a list of objectives", found=_kind(specs), remedy=example)
    for spec in specs:
        name = _name_of(spec)
        if not re.fullmatch(r"[^\s,=]+", name):
            raise ConfigError("the name of an objective has no space, comma or =", found=repr(name), remedy=example)


def _known(what: str, given: Iterable[Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{what} has the keys that it declares", found=repr(key), remedy=nearest(str(key), known))


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
