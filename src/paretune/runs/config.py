"""One YAML file and `key=value` overrides become one plain dict, and every complaint names the file, the line and the nearest key.

    document = load("suite.yaml", ["learner.steps=20", "methods.experts.mixing=hidden"])
    suite = document.validate(Suite)  # a pydantic model
    with document.at("methods", 0):  # adds "(suite.yaml, line 6)" to a ConfigError
        METHODS.build(document.data["methods"][0])

YAML is read as its version 1.2 means it: `1e-3` and `.5` are numbers, `no` and `on` are words, dates stay text. A key stands once,
and there are no aliases: what a file says stands where it is used.
An override is `dotted.path=YAML`; the items of a list are known by number, or by their name. Where a plain string stands and the
path goes below it, the string is the item's name: `methods: [experts]` and `methods.experts.mixing=hidden` give
{name: experts, mixing: hidden}; `short` says where it is another key than `name`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from paretune.errors import ConfigError, nearest

__all__ = ["Document", "load", "parse"]

Place = tuple[str | int, ...]  # where a value stands: keys and list positions from the top
Model = TypeVar("Model", bound=BaseModel)


@dataclass
class Document:
    """What a file (and the overrides) said, and where each value came from."""

    data: dict[str, Any]
    name: str  # of the file, for messages
    lines: dict[Place, int] = field(default_factory=dict)  # counted from 1
    short: Mapping[str, str] = field(default_factory=dict)  # key -> the key that a plain string below it stands for, if not `name`
    overridden: dict[Place, str] = field(default_factory=dict)  # place -> the override as it was typed

    def where(self, *place: str | int) -> str:
        """ "suite.yaml, line 7", or the override that set the value; the closest known place above it where it is missing."""
        for depth in range(len(place), -1, -1):
            above = place[:depth]
            if above in self.overridden:
                return f"override {self.overridden[above]}"
            if above in self.lines:
                return f"{self.name}, line {self.lines[above]}"
        return self.name

    @contextlib.contextmanager
    def at(self, *place: str | int) -> Iterator[None]:
        """Add where `place` stands to any ConfigError that is raised inside."""
        try:
            yield
        except ConfigError as error:
            raise type(error)(error.rule, found=f"{error.found} ({self.where(*place)})", remedy=error.remedy) from error

    def override(self, text: str) -> Place:
        """Set one value, `dotted.path=YAML`; returns its place. Raises ConfigError where the path leads nowhere."""
        dotted, equals, given = text.partition("=")
        steps = dotted.strip().split(".")
        if not equals or not all(steps):
            raise ConfigError("an override reads key=value", found=repr(text), remedy="for example learner.steps=20")
        try:
            value = yaml.load(given, Loader=_Loader)  # a SafeLoader
        except yaml.YAMLError:
            raise ConfigError("the value of an override is YAML", found=repr(text), remedy="quote it, as in 'rho=[0.8, 0]'") from None
        here: Any = self.data
        place: Place = ()
        for step in steps[:-1]:
            key = _key(here, step, text)
            place = (*place, key)
            below = here.get(key) if isinstance(here, dict) else here[key]
            if isinstance(below, str):
                below = {self.short.get(str(key), "name"): below}
            elif below is None:
                below = {}
            if not isinstance(below, dict | list):
                raise ConfigError("an override names a value in the file", found=repr(text), remedy=f"{step} has nothing below it")
            here[key] = below
            here = below
        key = _key(here, steps[-1], text)
        here[key] = value
        place = (*place, key)
        self.lines = {known: line for known, line in self.lines.items() if known[: len(place)] != place}  # what stood there is gone
        self.overridden[place] = text
        return place

    def validate(self, model: type[Model]) -> Model:
        """The typed form. Raises ConfigError for the first thing that does not fit."""
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            first = error.errors()[0]
            place = tuple(first["loc"])
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):
                raise type(cause)(cause.rule, found=f"{cause.found} ({self.where(*place)})", remedy=cause.remedy) from error
            name = ".".join(map(str, place)) or "the file"
            remedy: str | None
            if first["type"] == "extra_forbidden":
                rule, shown = f"a {model.__name__.lower()} has the keys that it declares", repr(place[-1])
                remedy = nearest(str(place[-1]), model.model_fields)
            elif first["type"] == "missing":
                rule, shown, remedy = f"a {model.__name__.lower()} says its {name}", f"no {name}", f"add {name}:"
            else:
                rule, shown = f"{name}: {first['msg'].removeprefix('Value error, ')}", repr(first.get("input"))
                remedy = model.model_fields[str(place[0])].description if place and str(place[0]) in model.model_fields else None
            raise ConfigError(rule, found=f"{shown} ({self.where(*place)})", remedy=remedy or "correct that value") from error


def load(path: str | Path, overrides: Sequence[str] = (), *, short: Mapping[str, str] | None = None) -> Document:
    """Read the YAML mapping in `path` and apply the overrides in order. Raises ConfigError naming the file and the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("a configuration file exists", found=str(path), remedy=_neighbors(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        remedy = "give the path of a YAML file"
        raise ConfigError("a configuration file is readable text", found=f"{path}: {error}", remedy=remedy) from None
    document = parse(text, name=path.name)
    document.short = short or {}
    for override in overrides:
        document.override(override)
    return document


def parse(text: str, *, name: str) -> Document:
    """The document in `text`; `name` is what messages call it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            "a configuration file is YAML", found=f"{name}{line}: {problem}", remedy="check the indentation, colons and quotes there"
        ) from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError("a configuration file holds key: value lines", found=f"{name}: {found}", remedy="begin with name: value")
    lines: dict[Place, int] = {}
    _note_lines(node, (), lines)
    return Document(data=data, name=name, lines=lines)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans, string keys, and every key once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor} is an alias; write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _note_lines(node: Any, place: Place, lines: dict[Place, int]) -> None:
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*place, key.value), lines)
            lines[(*place, key.value)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, (*place, number), lines)


def _key(here: Any, step: str, override: str) -> str | int:
    """The key of a mapping, or the position in a list of the item with that number or name."""
    if isinstance(here, dict):
        return step
    names = [item if isinstance(item, str) else item.get("name") if isinstance(item, dict) else None for item in here]
    if names.count(step) == 1:
        return names.index(step)
    if step.isdigit() and int(step) < len(here):
        return int(step)
    known = [str(n) for n in range(len(here))] + [n for n in names if isinstance(n, str) and names.count(n) == 1]
    raise ConfigError("an override names one item of a list, by name or by number", found=repr(override), remedy=nearest(step, known))


def _neighbors(path: Path) -> str:
    others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return nearest(path.name, others) if others else "check the path"
