"""Reward functions of your own as objectives: named `file.py:function`, and known by the content of the file.

The file is run once, under a module name made of its content, with its folder importable as it would be for a script. Modules
beside it that it imports are hashed with it, so that a change of any of them changes the key of every training that uses it. What a
function reads from elsewhere (a data file, a service, an installed package) is not part of the key.

`names_in` reads which columns a template names: objectives that compare with a text, and prompts, take text with {column} in it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import shlex
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from paretune.errors import ConfigError, nearest, own_code
from paretune.objectives.base import Objective
from paretune.registry import OBJECTIVES

__all__ = ["FunctionObjective", "content_hashes", "load_function", "names_in"]


@OBJECTIVES.register("function")
@dataclass(frozen=True)
class FunctionObjective(Objective):
    """A reward function of your own, with the signature that TRL's trainers expect.

    Source: the `reward_funcs` convention of TRL 1.16.
    Differs: `trainer_state` is not offered, because a score depends on prompts and completions alone; `completion_ids` are the
    completion's text tokenized again, without EOS.
    Hides: the file is hashed with the modules beside it, but not the data, services or packages that it uses.
    """

    use: str  # "file.py:function"
    low: float
    high: float

    def __post_init__(self):
        _split(self.use)
        self.check_range()

    @property
    def __name__(self) -> str:
        return _split(self.use)[1]

    @cached_property
    def function(self) -> Callable[..., Any]:
        return _import_function(*_split(self.use))

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function: what it is offered follows from what it accepts."""
        return inspect.signature(self.function)

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self.function(*args, **given)

    def trusts(self) -> tuple[str, ...]:
        return (f"the function {self.use}",)

    def content(self) -> dict[str, str]:
        """File name -> hash, for the file and the modules beside it that it imports."""
        return content_hashes(_split(self.use)[0])


def load_function(use: str, *, low: float = 0.0, high: float = 1.0) -> FunctionObjective:
    """The objective `file.py:function`, imported now; ConfigError where the file or the function is missing or cannot be imported."""
    objective = FunctionObjective(use=use, low=low, high=high)
    assert callable(objective.function)
    return objective


def content_hashes(path: Path) -> dict[str, str]:
    """File name -> SHA-256 (20 hex digits) of `path` and of every module of its folder that it imports, directly or not."""
    files = [path, *_beside(path)]
    return {file.relative_to(path.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:20] for file in files}


def _split(use: str) -> tuple[Path, str]:
    file, colon, name = use.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ConfigError("a reward function is written file.py:function", found=repr(use), remedy="for example use: rewards.py:politeness")
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(
            f"the reward function {name!r} is in a Python file that exists",
            found=f"no file {path}",
            remedy="paths in a recipe are relative to the recipe's own folder",
        )
    return path, name


def _imported_names(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError):  # reported, with its line, when the file is run
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def _beside(path: Path) -> list[Path]:
    """The Python files of the folder of `path` that it imports, directly or through each other; a package counts with all its files.

    A folder without __init__.py is a package where Python finds nothing else of its name.
    """
    folder = path.parent
    seen: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        for name in _imported_names(waiting.pop()):
            package, alone = folder / name, folder / f"{name}.py"
            whole = (package / "__init__.py").is_file() or (package.is_dir() and not alone.is_file() and not _origin(name))
            found = sorted(package.rglob("*.py")) if whole else [alone]
            for file in found:
                if file.is_file() and file != path and file not in seen:
                    seen[file] = None
                    waiting.append(file)
    return sorted(seen)


def _import_function(path: Path, name: str) -> Callable[..., Any]:
    module = _import_file(path)
    function = getattr(module, name, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"the reward function is defined in {path.name}", found=f"no {name!r} there", remedy=nearest(name, public))
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"{path.name}:{name} is a function, or an object that can be called",
            found=f"a {type(function).__name__}" if not isinstance(function, type) else f"the class {name}",
            remedy="name a function, or an instance of the class",
        )
    return function


def _import_file(path: Path) -> ModuleType:
    hashes = content_hashes(path)
    name = "paretune_objective_" + hashlib.sha256(repr((str(path), hashes)).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    beside = {file.relative_to(path.parent).parts[0].removesuffix(".py") for file in _beside(path)}
    _forget(beside, path.parent)
    _refuse_taken(beside, path)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    write_nothing, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a cache by modification time could serve an older text
    try:
        with own_code(
            ConfigError,
            f"{path.name} can be imported",
            f"run `python {shlex.quote(path.name)}` in its folder until it ends without an error",
        ):
            spec.loader.exec_module(module)
            for neighbor in sorted(beside):  # also those imported only inside a function, while the folder can be found
                with contextlib.suppress(ImportError):
                    importlib.import_module(neighbor)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = write_nothing
        sys.path.remove(str(path.parent))
    return module


def _forget(names: set[str], folder: Path) -> None:
    """Drop modules of `folder` that an earlier version of the same file may have loaded."""
    for loaded, module in list(sys.modules.items()):
        if loaded.split(".")[0] in names and _is_in(module, folder):
            del sys.modules[loaded]


def _refuse_taken(names: set[str], path: Path) -> None:
    """A neighbor whose name something else has would get that thing, or hide it from everybody else."""
    for name in sorted(names):
        within = [module for loaded, module in sys.modules.items() if loaded.startswith(f"{name}.")]  # of a folder without __init__.py
        origin = _origin(name) or next((module.__file__ for module in within if not _is_in(module, path.parent)), None)
        if origin is not None and not Path(origin).resolve().is_relative_to(path.parent):
            raise ConfigError(
                f"the modules that {path.name} imports from its own folder are the ones that it gets",
                found=f"{name!r} is also {'part of the interpreter' if origin == 'built-in' else origin}",
                remedy=f"give {name}{'' if (path.parent / name).is_dir() else '.py'} a name that nothing else has",
            )


def _origin(name: str) -> str | None:
    """The file of what Python finds under a name; None for nothing, and for a folder without __init__.py."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # loaded, but nobody knows from where
        return None
    return None if spec is None else spec.origin


def _is_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(folder)


def names_in(template: str) -> list[str]:
    """The columns that a template names, in order; ConfigError where it is no template, or names none."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            "a template is text with {column} in it", found=f"{template!r}: {error}", remedy="write a literal brace twice: {{ or }}"
        ) from None
    if not names:
        raise ConfigError("a template names at least one column", found=repr(template), remedy='for example "Question: {prompt}"')
    return names
