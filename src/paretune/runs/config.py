"""Configuration: a YAML file and `key=value` overrides become one plain dict, and every error names the file, the line and the nearest key.

    document = load("suite.yaml", ["learner.lr=1e-3", "methods.experts.mixing=hidden"])
    suite = document.validate(Suite)  # a pydantic model
    with document.at("methods", 0):  # adds "(suite.yaml, line 6)" to a ConfigError
        METHODS.build(document.data["methods"][0])

YAML is read as its version 1.2 means it: `1e-3` and `.5` are numbers, `no` and `on` are words; dates and numbers that begin with a 0 stay
text. A key stands once, and there are no aliases: what a file says stands where it is used.
An override is `dotted.path=YAML`; the items of a list are known by number, or by their name. Where a plain string stands and the
path goes below it, the string is the item's name: `methods: [experts]` and `methods.experts.mixing=hidden` give
{name: experts, mixing: hidden}; `short` says where it is another key than `name`.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from paretune.errors import ConfigError, nearest, shown
from paretune.registry import DEEPEST, not_plain
from paretune.types import refuse_secrets

__all__ = ["Document", "dump", "load", "parse"]

Place = tuple[str | int, ...]  # where a value stands: keys and list positions from the top
Model = TypeVar("Model", bound=BaseModel)

MAP, LIST, INT, *WORDS = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "int", "timestamp", "merge", "value"))


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
            where = self.where(*place, *error.place)
            typed = [text for at, text in self.overridden.items() if at[: len(place)] == place and at != place and not error.place]
            where += f", with {', '.join(typed)} on the command line" if typed else ""
            raise type(error)(error.rule, found=f"{error.found} ({where})", remedy=error.remedy) from error

    def override(self, text: str) -> Place:
        """Set one value, `dotted.path=YAML`; returns its place. Raises ConfigError where the path leads nowhere."""
        dotted, equals, given = text.partition("=")
        steps = dotted.strip().split(".")
        if not equals or not all(steps):
            raise ConfigError("an override reads key=value", found=repr(text), remedy="for example learner.lr=1e-3")
        try:
            value = _read(given, {})
        except YAMLError as error:
            found, remedy = f"{shown(text)}: {_problem(error)}", "quote it, as in 'rho=[0.8, 0]'"
            raise ConfigError("the value of an override is YAML", found=found, remedy=remedy) from None
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
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("a configuration file exists", found=str(path), remedy=_neighbors(path)) from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a NUL
        remedy = "give the path of a YAML file"
        raise ConfigError("a configuration file is readable text", found=f"{shown(str(path))}: {error}", remedy=remedy) from None
    document = parse(text, name=path.name)
    document.short = short or {}
    for override in overrides:
        document.override(override)
    refuse_secrets(document.name, document.data)
    return document


def parse(text: str, *, name: str) -> Document:
    """The document in `text`; `name` is what messages call it."""
    lines: dict[Place, int] = {}
    try:
        data = _read(text, lines)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(
            "a configuration file is YAML",
            found=f"{name}{line}: {_problem(error)}",
            remedy="check the indentation, colons and quotes there",
        ) from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError("a configuration file holds key: value lines", found=f"{name}: {found}", remedy="begin with name: value")
    return Document(data=data, name=name, lines=lines)


def dump(value: Any) -> str:
    """A value as one line of YAML: `{name: pg, lr: 0.01}`."""
    writer, text = YAML(), io.StringIO()
    writer.default_flow_style, writer.width, writer.brace_single_entry_mapping_in_flow_sequence = True, 10_000, True
    writer.dump(value, text)
    return text.getvalue().strip()


def _read(text: str, lines: dict[Place, int]) -> Any:
    """The plain value of one YAML document; `lines` gets where everything in it stands."""
    reader, depth = YAML(typ="safe", pure=True), 0
    for event in reader.parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > DEEPEST:
            problem = f"more than {DEEPEST} lists and mappings within each other"
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if isinstance(event, AliasEvent):
            raise MarkedYAMLError(problem=f"*{event.anchor} is an alias; write the value out", problem_mark=event.start_mark)

    def plain(node: Any, place: Place) -> Any:
        lines.setdefault(place, node.start_mark.line + 1)
        if (node.tag == MAP and not isinstance(node, MappingNode)) or (node.tag == LIST and not isinstance(node, SequenceNode)):
            raise MarkedYAMLError(problem=f"{node.tag} is not the tag of this", problem_mark=node.start_mark)
        if node.tag == MAP:
            found: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, ScalarNode) or key.value in found or not_plain(key.value):
                    twice = isinstance(key, ScalarNode) and key.value in found
                    problem = f"the key {shown(key.value)} stands twice" if twice else "a key is one word"
                    raise MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                lines[*place, key.value] = key.start_mark.line + 1
                found[key.value] = plain(value, (*place, key.value))
            return found
        if node.tag == LIST:
            return [plain(item, (*place, number)) for number, item in enumerate(node.value)]
        if node.tag in WORDS or (node.tag == INT and re.fullmatch(r"[-+]?0\w+", node.value)):  # 010, 0x10
            return node.value
        try:
            value = reader.constructor.construct_object(node)  # refuses tags that it does not know
        except YAMLError:
            raise
        except Exception:  # `!!int abc`, 5,000 digits: conversions that nothing checks
            problem = f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
        wrong = not_plain(value) if isinstance(value, str | int | float | None) else "is a number, a text, true or false"
        if wrong:
            raise MarkedYAMLError(problem=f"{shown(value)}: a value {wrong}", problem_mark=node.start_mark)
        return value

    root = reader.compose(text)
    return None if root is None else plain(root, ())


def _problem(error: YAMLError) -> str:
    return str(getattr(error, "problem", None) or " ".join(str(error).split())[:200])


def _key(here: Any, step: str, override: str) -> str | int:
    """The key of a mapping, or the position in a list of the item with that number or name."""
    if isinstance(here, dict):
        return step
    names = [item if isinstance(item, str) else item.get("name") if isinstance(item, dict) else None for item in here]
    if names.count(step) == 1:
        return names.index(step)
    if step.isdecimal() and int(step) < len(here):
        return int(step)
    known = [str(n) for n in range(len(here))] + [n for n in names if isinstance(n, str) and names.count(n) == 1]
    raise ConfigError("an override names one item of a list, by name or by number", found=repr(override), remedy=nearest(step, known))


def _neighbors(path: Path) -> str:
    others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return nearest(path.name, others) if others else "check the path"
