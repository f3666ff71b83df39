"""Names to classes: one registry per kind of thing, open to other people's packages and to single files.

A registered class is a frozen dataclass; its fields are its hyperparameters, each written once with type and default.
`describe` turns an instance into the JSON that content keys are made of; `build` is its inverse.
Outside the tree: an entry point in the group `paretune.plugins`, or `load_plugin("file.py")`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import math
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from paretune.errors import ConfigError, ParetuneError, nearest, own_code, shown
from paretune.types import SECRET_NAMES, check_name, refuse_secrets

__all__ = [
    "LEARNERS",
    "METHODS",
    "OBJECTIVES",
    "PLUGIN_REMEDY",
    "GATE_RULES",
    "GIVEN",
    "TASKS",
    "Registry",
    "checked",
    "describe",
    "load_plugin",
    "loaded_plugins",
    "nearest",
    "not_plain",
    "unkeyed",
]

UNKEYED = {"keyed": False}  # metadata of a field that changes nothing in what is computed, such as where a training's log goes
GIVEN = {"keyed": "given"}  # of a field that is described only where it is not its default, so that it moved no key when it was added


PLUGIN_REMEDY = "; one of your own comes with --plugin FILE.py, in Python with load_plugin"


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
        if not isinstance(name, str) or name not in self._classes:
            self._load()  # not for a class that is there: the rooms of others may import torch
        if not isinstance(name, str) or name not in self._classes:
            remedy = nearest(shown(name), self._classes) + PLUGIN_REMEDY
            raise ConfigError(f"{self._one} is known by its name", found=shown(name), remedy=remedy)
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._classes))

    def build(self, given: str | Mapping[str, Any]) -> Any:
        """An instance from `"name"` or `{"name": ..., field: value, ...}`; every field is checked, unknown ones are refused.

        A description (see `describe`) is built where its version is that of the class.
        """
        params = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
        cls: Any = self[params.pop("name", given)]  # type: ignore[arg-type]
        label, see = f"{self.kind} {cls.registered_name}", f"see `paretune show {cls.registered_name}`"
        version = params.pop("version", None)
        if version not in (None, cls.version) or isinstance(version, bool):
            remedy = f"leave version: out; only descriptions that Paretune wrote have one, and this one is of {cls.version}"
            raise ConfigError(f"{label} is built as the version that is installed", found=f"version {shown(version)}", remedy=remedy)
        if version is not None:
            params.pop("content", None)
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        for name, value in params.items():
            if name in (lacks := {k: v for owner in reversed(cls.__mro__) for k, v in vars(owner).get("lacks", {}).items()}):
                rule, remedy = lacks[name]  # what a relative of the class has
                raise _at(name, ConfigError(rule, found=f"{label}, {name}={shown(value)}", remedy=remedy))
            if name not in fields:
                error = ConfigError(f"{label} has the fields that it declares", found=shown(name), remedy=nearest(shown(name), fields))
                raise _at(name, error)
            if wrong := not_plain(value):
                raise _at(name, ConfigError(f"{label}: {name} {wrong}", found=shown(value), remedy=see))
        refuse_secrets(label, list(params.values()))
        refuse_secrets(label, {name: value for name, value in params.items() if isinstance(value, str)}, names=SECRET_NAMES)
        try:
            built = _adapter(cls).validate_python(params)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or "its fields"
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):
                raise cause from None
            found = shown(first.get("input"))
            raise _at(*first["loc"], ConfigError(f"{label}: {where}: {first['msg']}", found=found, remedy=see)) from None
        except ParetuneError:
            raise
        except Exception as error:  # arithmetic on fields, before a class has looked at them
            found = f"{', '.join(f'{name}={shown(value)}' for name, value in params.items())}: {type(error).__name__}: {error}"
            raise ConfigError(f"{label} can be made of its fields", found=found, remedy=see) from error
        if changed := _changed(params, built):
            rule = f"{label}: {'.'.join(map(str, changed[:-1]))} is what it is declared as; a truth value is no number"
            raise _at(*changed[:-1], ConfigError(rule, found=shown(changed[-1]), remedy=see))
        return built

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for home in self.homes:
                room = importlib.import_module(home)
                for file in pkgutil.iter_modules(room.__path__):
                    if not file.ispkg:
                        importlib.import_module(f"{home}.{file.name}")
        _load_entry_points()


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def checked(what: str, kind: Any, value: Any) -> Any:
    """`value` as the type `kind`, or ConfigError: for arguments of the library's own functions, which `what` names."""
    wrong = None if kind is Any else not_plain(value)
    try:
        built = value if wrong else TypeAdapter(kind).validate_python(value)
        wrong = wrong or ("is what it is declared as; a truth value is no number" if _changed(value, built) else None)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = "is as declared: " + ": ".join([*[".".join(map(str, place)) for place in (first["loc"],) if place], first["msg"]])
    except RecursionError:
        wrong = "is not nested that deep"
    if wrong:
        raise ConfigError(f"{what} {wrong}", found=shown(value), remedy=f"correct {what}")
    return built


def _at(*place_and_error: Any) -> ConfigError:
    """The error with its place."""
    *place, error = place_and_error
    error.place = tuple(place)
    return error


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


DEEPEST = 32  # lists and mappings within each other
LARGEST = 2**63  # of a whole number


def not_plain(value: Any, depth: int = 0) -> str | None:
    """What keeps a value from being a setting, in words; None for finite numbers, texts, and lists and mappings of such."""
    if isinstance(value, str):
        return "is text that can be written as UTF-8, without NUL" if re.search("[\ud800-\udfff\0]", value) else None
    if isinstance(value, float):
        return None if math.isfinite(value) else "is a finite number"
    if isinstance(value, int):
        return None if abs(value) < LARGEST else "is a number of at most 64 bits"
    if value is None or isinstance(value, Path) or dataclasses.is_dataclass(value):
        return None
    if not isinstance(value, list | tuple | Mapping):
        return "is a number, a text, true, false, or a list or mapping of such"
    if depth == DEEPEST:
        return f"has at most {DEEPEST} lists and mappings within each other"
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    return next((wrong for item in items if (wrong := not_plain(item, depth + 1))), None)


def _changed(given: Any, built: Any) -> tuple[Any, ...] | None:
    """Where a truth value became a number, or a number a truth value: (place..., value); None where nothing did."""
    if isinstance(given, Mapping):
        inner = built if isinstance(built, Mapping) else getattr(built, "__dict__", {})
        pairs = [(key, item, inner.get(key, item)) for key, item in given.items()]
    elif isinstance(given, list | tuple) and isinstance(built, list | tuple):
        pairs = [(place, *both) for place, both in enumerate(zip(given, built, strict=False))]
    else:
        return (given,) if isinstance(given, bool | int | float) and isinstance(given, bool) != isinstance(built, bool) else None
    return next(((key, *below) for key, item, made in pairs if (below := _changed(item, made))), None)


TASKS = Registry("task", "paretune.tasks", "paretune.tasks.exact", "paretune.tasks.reflection")
OBJECTIVES = Registry("objective", "paretune.objectives", "paretune.tasks.reflection")
LEARNERS = Registry("learner", "paretune.training.learners", "paretune.training.trl")
GATE_RULES = Registry("gate rule", "paretune.policy")
METHODS = Registry("method", "paretune.methods")


def describe(thing: Any) -> dict[str, Any]:
    """The JSON description of a registered instance: name, version, every field that is not `unkeyed`, and `content` hashes.

    Fields that are None where they follow from others have the number that follows, by the method `resolved`.
    """
    fields = _fields(thing)
    fields |= thing.resolved() if hasattr(thing, "resolved") else {}
    content = thing.content() if hasattr(thing, "content") else {}
    described = {"name": thing.registered_name, "version": thing.version, **fields}
    return {**described, "content": content} if content else described


def unkeyed(thing: Any) -> dict[str, Any]:
    """The fields that `describe` leaves out, because results do not depend on them."""
    return {f.name: _plain(getattr(thing, f.name)) for f in dataclasses.fields(thing) if f.init and not f.metadata.get("keyed", True)}


def _fields(thing: Any) -> dict[str, Any]:
    """The keyed fields of a dataclass, and what they hold."""
    found = {}
    for f in dataclasses.fields(thing):
        keyed, value = f.metadata.get("keyed", True), getattr(thing, f.name)
        if f.init and keyed and not (keyed == "given" and value == f.default):
            found[f.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and hasattr(value, "registered_name"):
        return describe(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
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
    try:
        path = Path(path).resolve()
        if path.suffix != ".py" or not path.is_file():
            raise ValueError("no such file")
    except (OSError, ValueError) as error:
        remedy = "check the path given to --plugin"
        raise ConfigError("a plugin is a Python file", found=f"{shown(str(path))}: {error}", remedy=remedy) from None
    name = PLUGIN + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with own_code(ConfigError, f"the plugin {path.name} can be imported", "run it alone with python until it ends without an error"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


_entry_points_loaded = False


def _load_entry_points() -> None:
    global _entry_points_loaded
    if not _entry_points_loaded:
        _entry_points_loaded = True
        for point in entry_points(group="paretune.plugins"):
            with own_code(ConfigError, f"the installed plugin {point.name} can be imported", f"mend or uninstall {point.value}"):
                point.load()
