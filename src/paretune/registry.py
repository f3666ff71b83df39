"""Names to classes: one registry per kind of thing, open to other people's packages and to single files.

A registered class is a frozen dataclass; its fields are its hyperparameters, each written once with type and default.
`describe` turns an instance into the JSON that content keys are made of; `build` is its inverse.
Outside the tree: an entry point in the group `paretune.plugins`, or `load_plugin("file.py")`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from paretune.errors import ConfigError, nearest
from paretune.types import SECRET_NAMES, check_name, refuse_secrets

__all__ = [
    "LEARNERS",
    "METHODS",
    "OBJECTIVES",
    "GATE_RULES",
    "TASKS",
    "Registry",
    "describe",
    "load_plugin",
    "loaded_plugins",
    "nearest",
]


class Registry:
    """Name -> class of one kind. `homes` are the rooms whose files, imported at first use, register what ships with Paretune."""

    def __init__(self, kind: str, *homes: str):
        self.kind, self.homes = kind, homes
        self._classes: dict[str, type] = {}
        self._loaded = False

    def register(self, name: str, *, version: int = 1) -> Callable[[type], type]:
        """Class decorator. Raise `version` whenever the same fields would give other results: it is part of every key."""

        def add(cls: type) -> type:
            check_name(self._one, name)
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(f"a {self.kind} has one name", found=f"{name!r} is registered twice", remedy="rename yours")
            cls.registered_name, cls.version = name, version  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    @property
    def _one(self) -> str:
        return f"{'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"

    def __getitem__(self, name: str) -> type:
        self._load()
        if name not in self._classes:
            raise ConfigError(f"{self._one} is known by its name", found=repr(name), remedy=nearest(str(name), self._classes))
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._classes))

    def build(self, given: str | Mapping[str, Any]) -> Any:
        """An instance from `"name"` or `{"name": ..., field: value, ...}`; every field is checked, unknown ones are refused."""
        params = {"name": given} if isinstance(given, str) else dict(given)
        cls = self[str(params.pop("name", ""))]
        params.pop("version", None)
        params.pop("content", None)
        label = f"{self.kind} {cls.registered_name}"  # type: ignore[attr-defined]
        refuse_secrets(label, list(params.values()))
        refuse_secrets(label, {name: value for name, value in params.items() if isinstance(value, str)}, names=SECRET_NAMES)
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        for name in params:
            if name in getattr(cls, "lacks", {}):  # what a relative of the class has
                rule, remedy = cls.lacks[name]  # type: ignore[attr-defined]
                raise ConfigError(rule, found=f"{label}, {name}={params[name]!r}", remedy=remedy)
            if name not in fields:
                raise ConfigError(f"{label} has the fields that it declares", found=repr(name), remedy=nearest(name, fields))
        try:
            return TypeAdapter(cls).validate_python(params)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or "its fields"
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):
                raise cause from None
            raise ConfigError(
                f"{label}: {where}: {first['msg']}", found=repr(first.get("input")), remedy=f"see `paretune show {label.split()[-1]}`"
            ) from None

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for home in self.homes:
                room = importlib.import_module(home)
                for file in pkgutil.iter_modules(room.__path__):
                    if not file.ispkg:
                        importlib.import_module(f"{home}.{file.name}")
        _load_entry_points()


TASKS = Registry("task", "paretune.tasks", "paretune.tasks.exact", "paretune.tasks.reflection")
OBJECTIVES = Registry("objective", "paretune.objectives", "paretune.tasks.reflection")
LEARNERS = Registry("learner", "paretune.training", "paretune.training.trl")
GATE_RULES = Registry("gate rule", "paretune.policy")
METHODS = Registry("method", "paretune.methods")


def describe(thing: Any) -> dict[str, Any]:
    """The JSON description of a registered instance: name, version, every field, and `content` hashes where it has any.

    Fields that are None where they follow from others have the number that follows, by the method `resolved`.
    """
    fields = {f.name: _plain(getattr(thing, f.name)) for f in dataclasses.fields(thing) if f.init}
    fields |= thing.resolved() if hasattr(thing, "resolved") else {}
    content = thing.content() if hasattr(thing, "content") else {}
    described = {"name": thing.registered_name, "version": thing.version, **fields}
    return {**described, "content": content} if content else described


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and hasattr(value, "registered_name"):
        return describe(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


PLUGIN = "paretune_plugin_"  # the modules that plugins become


def loaded_plugins() -> list[str]:
    """The files given to `load_plugin` so far, in that order: worker processes load the same."""
    return [str(module.__file__) for name, module in sys.modules.items() if name.startswith(PLUGIN)]


def load_plugin(path: str | Path) -> None:
    """Import one Python file whose decorators register methods, tasks or objectives."""
    path = Path(path).resolve()
    if not path.is_file():
        raise ConfigError("a plugin is a Python file", found=str(path), remedy="check the path given to --plugin")
    name = PLUGIN + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError("a plugin imports without error", found=f"{path.name}: {error!r}", remedy="run it alone with python") from error


_entry_points_loaded = False


def _load_entry_points() -> None:
    global _entry_points_loaded
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for point in entry_points(group="paretune.plugins"):
            point.load()
