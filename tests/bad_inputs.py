"""Wrong inputs by the thousand: every field, key and option crossed with values of each wrong kind, and files and functions that misbehave.

`python tests/bad_inputs.py [COUNT] [KIND...]` runs them all, or a seeded share, in worker processes and prints a table; exit code 1 where
one went wrong. `tests/test_bad_input.py` runs a small share of every kind. A case is right when it ends in one message with a rule, what
was found and a remedy. It goes wrong as a traceback, a hang (over 10 s), an acceptance, or unclear: a message that lacks a part.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from typer.main import get_command
from typer.testing import CliRunner

from paretune.cli import app
from paretune.errors import ParetuneError
from paretune.registry import GATE_RULES, LEARNERS, METHODS, OBJECTIVES, TASKS
from recipe_files import tiny_model, write_recipe

SECONDS = 10  # longer is a hang
WORKERS = 2
GOOD, WRONG = "ok", ("traceback", "hang", "accepted", "unclear")
HUGE, LONG, NESTED = 10**30, "x" * 5000, functools.reduce(lambda inner, _: [inner], range(2000), [])
SURROGATE = "a\ud800b"


@dataclass(frozen=True)
class Case:
    """`run` gets an empty folder and the samples of `Ground`; where `may_pass`, the input has a meaning, and only a crash is wrong."""

    kind: str
    name: str
    run: Callable[[Path, Ground], Any]
    may_pass: bool = False


class Accepted(Exception):
    """Work would have begun."""


class Hang(KeyboardInterrupt):
    """The alarm."""


@dataclass(frozen=True)
class Ground:
    """What cases need that takes time: a tiny model, and a saved family of it."""

    model: Path
    family: Path


def ground(folder: Path) -> Ground:
    """Made once, before any worker is forked."""
    from paretune.runs.recipes.recipe import load_recipe

    recipe = load_recipe(write_recipe(folder / "ground", tiny_model()))
    METHODS.build("uniform")
    reference: Any = METHODS.build("reference")
    family = reference.policy(recipe.task, LEARNERS.build("pg"), {}, 0)
    family.save(folder / "family")
    return Ground(tiny_model(), folder / "family")


# ---- running and judging


def verdict(case: Case, where: Ground) -> tuple[str, str]:
    """How it went ("ok" or one of WRONG), and the message or the traceback's end."""
    folder = Path(tempfile.mkdtemp(prefix="paretune-bad-"))
    previous = signal.signal(signal.SIGALRM, _alarm)
    plugins, classes = set(sys.modules), [(r, dict(r._classes)) for r in (TASKS, OBJECTIVES, LEARNERS, GATE_RULES, METHODS)]
    before = os.getcwd()
    os.chdir(folder)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        said = case.run(folder, where)
        signal.setitimer(signal.ITIMER_REAL, 0)
        how = _judged(said)
    except ParetuneError as error:
        how = _message(f"error: {error}")
    except Accepted:
        how = "accepted", ""
    except Hang as hang:
        how = "hang", "".join(traceback.format_tb(hang.__traceback__)[-2:])
    except BaseException as error:
        how = "traceback", f"{type(error).__name__}: {error}"[:300] + "".join(traceback.format_tb(error.__traceback__)[-2:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
        for registry, known in classes:
            registry._classes = known
        for name in set(sys.modules) - plugins:
            if name.startswith(("paretune_plugin_", "paretune_reward_")):
                del sys.modules[name]
    return (GOOD, how[1]) if how[0] == "accepted" and case.may_pass else how


def _alarm(*_: Any) -> None:
    raise Hang


def _judged(said: Any) -> tuple[str, str]:
    """Of a command: by its exit code and what it printed to stderr."""
    if not hasattr(said, "exit_code"):
        return "accepted", repr(said)[:200]
    if isinstance(said.exception, Hang):
        raise said.exception
    if said.exit_code == 130:
        return "hang", said.stderr[-300:]
    if isinstance(said.exception, Accepted) or said.exit_code == 0:
        return "accepted", said.output[:200]
    if said.exception is not None and not isinstance(said.exception, SystemExit):
        where = "".join(traceback.format_tb(said.exc_info[2])[-2:])
        return "traceback", f"{type(said.exception).__name__}: {said.exception}"[:300] + "\n" + where
    if "Invalid value" in said.stderr or "Missing" in said.stderr or "No such" in said.stderr or "requires an argument" in said.stderr:
        return GOOD, said.stderr  # of typer: the option, what it got, what it takes
    return _message(said.stderr)


def _message(text: str) -> tuple[str, str]:
    found, remedy = text.find("\n  found:  "), text.find("\n  remedy: ")
    whole = text.startswith("error: ") or "\nerror: " in text
    parts = whole and 0 < found < remedy and text[found + 11 : remedy].strip() and text[remedy + 11 :].strip()
    return (GOOD if parts and len(text) < 3000 and "Traceback" not in text else "unclear"), text[:600]


def command(*argv: Any) -> Any:
    """The command line in this process; what would begin to work raises Accepted."""
    from paretune.runs.suite import Schedule

    def begin(*_: Any, **__: Any) -> None:
        raise Accepted

    real, Schedule.run = Schedule.run, begin  # type: ignore[method-assign]
    try:
        return CliRunner().invoke(app, [str(a) for a in argv])
    finally:
        Schedule.run = real  # type: ignore[method-assign]


# ---- fields of registered classes

VALUES: dict[str, Any] = {
    "true": True,
    "none": None,
    "a word": "abc",
    "empty": "",
    "list": ["abc"],
    "list of list": [["abc"]],
    "mapping": {"abc": {"d": 1}},
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "1e300": 1e300,
    "huge": HUGE,
    "5000 digits": 10**5000,
    "half": 0.5,
    "surrogate": SURROGATE,
    "NUL": "a\0b",
    "long": LONG * 20,
    "nested": NESTED,
    "bytes": b"abc",
    "object": object(),
    "array": np.zeros((2, 2)),
}
NEVER = ("nan", "inf", "-inf", "huge", "5000 digits", "surrogate", "nested", "object", "bytes")  # whatever the field
SIGNED = ("seed", "mask_seed", "layer", "label", "rho", "context", "low", "high", "target")  # may be negative
FROM_ZERO = ("warmup", "retries", "backoff", "more", "copied", "private", "n", "points", "effort", "floor", "new", "objective", "landmarks")


def registered() -> Iterator[Case]:
    for registry in (TASKS, OBJECTIVES, LEARNERS, GATE_RULES, METHODS):
        for name in registry:
            hints = typing.get_type_hints(registry[name])
            for field in dataclasses.fields(registry[name]):
                if field.init:
                    for label, value in VALUES.items():
                        given = {"name": name, **_needed(registry[name]), field.name: value}
                        passes = label not in NEVER and _fits(value, hints[field.name], field.name)
                        yield Case(
                            f"{registry.kind} fields", f"{name} {field.name}={label}", functools.partial(_build, registry, given), passes
                        )
            for key, value in (("version", 77), ("version", "x"), ("content", {"a": "b"}), ("nmae", 1), (3, 4), ("x\0", 1), ("", 1)):
                given = {"name": name, **_needed(registry[name]), key: value}
                yield Case(f"{registry.kind} fields", f"{name} {key!r}: {value!r}", functools.partial(_build, registry, given))
        for label, value in VALUES.items():
            yield Case("names", f"{registry.kind} {label}", functools.partial(_build, registry, value))
            yield Case("names", f"{registry.kind} name: {label}", functools.partial(_build, registry, {"name": value}))


def _build(registry: Any, given: Any, *_: Any) -> Any:
    from paretune.registry import describe
    from paretune.types import key_of

    made = registry.build(given)
    if registry is not TASKS and registry is not OBJECTIVES:
        key_of(describe(made))
    return made


def _needed(cls: type) -> dict[str, Any]:
    """Values for the fields without a default."""
    made: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind = str(field.type)
            made[field.name] = (
                "x" if kind == "str" else 1 if kind in ("int", "float") else [[1.0, 0.0], [0.0, 1.0]] if "tuple[tuple" in kind else ["a"]
            )
    return made


def _fits(value: Any, hint: Any, name: str) -> bool:
    """Whether the declared type, and the field's name, leave it open that the value has a meaning."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _fits(value, inner[0], name)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one, name) for one in inner)
    if origin is Literal:
        return value in inner if isinstance(value, str | int) else False
    if hint is Any or hint is type(None):
        return hint is Any or value is None
    if hint is bool:
        return isinstance(value, bool) or value == 0
    if hint in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and (hint is float or value == int(value))
        return number and (value > 0 or name in SIGNED or (value == 0 and (hint is float or name in FROM_ZERO)))
    if hint is str:
        return isinstance(value, str)
    if dataclasses.is_dataclass(hint):
        return False
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, tuple | list | collections.abc.Sequence):
        return isinstance(value, list | np.ndarray) and value is not NESTED
    return isinstance(kind, type) and issubclass(kind, collections.abc.Mapping) and isinstance(value, dict)


# ---- keys of recipes and suites, as text

TEXTS = {
    "a list": "[experts]",
    "an empty list": "[]",
    "a number": "3",
    "a year": "2026",
    "a date": "2026-01-01",
    "a fraction": "1.5",
    "minus one": "-1",
    "zero": "0",
    "true": "true",
    "nothing": "",
    ".inf": ".inf",
    "-.inf": "-.inf",
    ".nan": ".nan",
    "1e400": "1e400",
    "thirty digits": "1" * 30,
    "5000 digits": "9" * 5000,
    "!!int abc": "!!int abc",
    "!!float abc": "!!float abc",
    "!!bool abc": "!!bool abc",
    "!!binary": "!!binary aGk=",
    "!!timestamp": "!!timestamp abc",
    "!!set": "!!set {a, b}",
    "!!omap": "!!omap [a: 1]",
    "!!str list": "!!str [a]",
    "!!map list": "!!map [a]",
    "!!seq text": "!!seq abc",
    "!!python": "!!python/name:os.system ''",
    "100 deep": "[" * 100 + "]" * 100,
    "2000 deep": "[" * 2000 + "]" * 2000,
    "mappings 2000 deep": "{a: " * 2000 + "}" * 2000,
    "a mapping": "{a: {b: c}}",
    "a list of lists": "[[a], [b]]",
    "an empty text": '""',
    "surrogate": '"a\\ud800b"',
    "NUL": '"a\\0b"',
    "newline": '"a\\nb"',
    "too long": LONG,
    "twice": "{a: 1, a: 2}",
    "alias": "*x",
    "anchor": "&x a",
    "open quote": '"abc',
    "a tab": "\tabc",
    "bell": "a\x07b",
    "list key": "{[a]: b}",
    "null key": "{null: b}",
}
NUMBERS = {"a number", "a year", "zero", "minus one", "a fraction"}
WHOLE = {"a number", "a year"}
EMPTY = {"nothing"}
PLAIN = {"a date", "anchor", "!!timestamp"}  # text
RECIPE = {
    "model": set(),
    "prompts": set(),
    "prompts.path": set(),
    "prompts.column": EMPTY,
    "prompts.map": set(),
    "prompts.transcript": EMPTY,
    "prompts.template": EMPTY,
    "prompts.chat": {"true"},
    "prompts.system": EMPTY,
    "prompts.test": EMPTY,
    "prompts.seed": WHOLE | {"zero", "minus one"},
    "prompts.limit": EMPTY | WHOLE,
    "prompts.shortest": WHOLE | {"zero"},
    "prompts.longest": WHOLE | EMPTY,
    "prompts.unique": {"true"},
    "prompts.dataset": set(),
    "prompts.config": set(),
    "objectives": set(),
    "objectives.0": set(),
    "objectives.0.name": {"a tab"},
    "objectives.0.use": set(),
    "objectives.0.low": NUMBERS,
    "objectives.1.half": NUMBERS - {"zero", "minus one"},
    "objectives.1.unit": set(),
    "method": EMPTY,
    "method.name": set(),
    "method.mixing": set(),
    "method.version": set(),
    "method.content": set(),
    "learner": EMPTY,
    "learner.name": EMPTY,
    "learner.lr": NUMBERS - {"zero", "minus one"},
    "learner.rank": WHOLE,
    "learner.alpha": WHOLE,
    "learner.group": set(),
    "learner.batch": set(),
    "learner.samples": WHOLE,
    "learner.betas": set(),
    "learner.device": set(),
    "learner.targets": PLAIN,  # a name of layers
    "learner.temperature": NUMBERS - {"zero", "minus one"},
    "learner.weighting": set(),
    "learner.version": set(),
    "seed": WHOLE | {"zero"},
    "output": PLAIN | EMPTY,
    "preferences": EMPTY | {"a number"},
    "tune": EMPTY,
    "beta": NUMBERS - {"zero", "minus one"},
    "max_new_tokens": {"a number"},
    "dtype": set(),
    "revision": EMPTY | PLAIN,
    "trust_remote_code": {"true"},
    "version": set(),
    "content": set(),
}
SUITE = {
    "name": PLAIN | {"a number", "a year"},
    "about": PLAIN | {"a number", "an empty text", "newline", "too long"},
    "tasks": set(),
    "tasks.0": set(),
    "tasks.0.name": set(),
    "tasks.0.rho": NUMBERS,
    "tasks.0.alphabet": WHOLE,
    "tasks.0.width": WHOLE,
    "tasks.0.version": set(),
    "learner": set(),
    "learner.name": set(),
    "learner.steps": WHOLE,
    "learner.lr": NUMBERS - {"zero", "minus one"},
    "learner.rank": WHOLE,
    "methods": set(),
    "methods.0": set(),
    "methods.0.mixing": set(),
    "methods.0.content": set(),
    "seeds": set(),
    "seeds.0": WHOLE | {"zero"},
    "splits": set(),
    "samples": WHOLE,
    "tune": EMPTY,
    "version": set(),
}
TINY = ["learner.samples=8", "learner.batch=8"]


def recipes() -> Iterator[Case]:
    for key, passes in RECIPE.items():
        for label, text in TEXTS.items():
            yield Case("recipe keys", f"{key}: {label}", functools.partial(_recipe, key, text), label in passes)
    for key in ("learner.lr", "method", "output", "seed", "beta", "objectives.0.low", "model", "prompts"):
        for label, text in TEXTS.items():
            run = functools.partial(_override, f"{key}={text}")
            yield Case("overrides", f"{key}={label}", run, label in RECIPE[key] or (key == "output" and label in ("bell", "a tab")))
    for text in (
        "",
        "=",
        "a",
        "a=",
        ".=1",
        "a..b=1",
        "learner.lr",
        "objectives.99=1",
        "objectives.-1=1",
        SURROGATE,
        f"learner.{SURROGATE}=1",
        "a" * 9999 + "=1",
        "objectives.²=1",
        ".".join("a" * 3000) + "=1",
    ):
        yield Case("overrides", repr(text)[:60], functools.partial(_override, text))


def _tree() -> dict[str, Any]:
    return {
        "model": "MODEL",
        "prompts": {"path": "prompts.jsonl"},
        "objectives": [{"name": "loud", "use": "rewards.py:shout", "low": 0, "high": 1}, {"name": "brief", "use": "length", "half": 10}],
        "method": {"name": "experts"},
        "learner": {"name": "pg"},
        "max_new_tokens": 8,
        "output": "runs",
    }


def _written(tree: Any, key: str, text: str, name: Path) -> None:
    """The tree as YAML of one key a line (JSON below), with `text` as the value of `key`."""
    mark = "@@@"
    here = tree
    *above, last = [int(step) if step.isdigit() else step for step in key.split(".")]
    for step in above:
        here = here[step]
    here[last] = mark
    lines = [f"{k}: {json.dumps(v)}\n" for k, v in tree.items()]
    name.write_text("".join(lines).replace(f'"{mark}"', text), encoding="utf-8")


def _recipe(key: str, text: str, folder: Path, where: Ground) -> Any:
    write_recipe(folder, where.model)
    tree = _tree()
    tree["model"] = str(where.model)
    if key in ("prompts.dataset", "prompts.config"):
        tree["prompts"] = {"dataset": "./nothing"}
    _written(tree, key, text, folder / "recipe.yaml")
    return command("fit", folder / "recipe.yaml", "--samples", 0)


def _override(text: str, folder: Path, where: Ground) -> Any:
    return command("fit", write_recipe(folder, where.model), text, "--samples", 0)


def suites() -> Iterator[Case]:
    for key, passes in SUITE.items():
        for label, text in TEXTS.items():
            yield Case("suite keys", f"{key}: {label}", functools.partial(_suite, key, text), label in passes)
    whole = {
        "empty": b"",
        "binary": bytes(range(256)),
        "UTF-16": "name: x\n".encode("utf-16"),
        "bom": b"\xef\xbb\xbf",
        "NULs": b"\0" * 100,
        "two documents": b"name: a\n---\nname: b\n",
        "json": b"[1, 2",
        "directive": b"%YAML 9.9\n---\nname: x\n",
        "tags": b"%TAG ! x\n---\n! a",
        "tab": b"name:\tx\n\ttasks: 1\n",
        "deep block": "".join(" " * n + "a:\n" for n in range(1500)).encode(),
    }
    for label, data in whole.items():
        for program in ("fit", "bench", "tune", "relate", "normalize"):
            yield Case("files of settings", f"{program} {label}", functools.partial(_file, program, data))


def _suite(key: str, text: str, folder: Path, where: Ground) -> Any:
    tree = {
        "name": "s",
        "about": "",
        "tasks": [{"name": "exact-v1", "alphabet": 4, "width": 32}],
        "learner": {"name": "exact", "steps": 5},
        "methods": [{"name": "experts"}],
        "seeds": [1],
        "samples": 8,
    }
    _written(tree, key, text, folder / "s.yaml")
    return command("bench", folder / "s.yaml", "--root", folder / "root", "--executor", "in-process")


def _file(program: str, data: bytes, folder: Path, where: Ground) -> Any:
    (folder / "x.yaml").write_bytes(data)
    return command(program, folder / "x.yaml")


# ---- options and arguments of every command

ARGV = {
    "empty": "",
    "word": "abc",
    "negative": "-1",
    "zero": "0",
    "nan": "nan",
    "inf": "inf",
    "1e400": "1e400",
    "thirty digits": str(HUGE),
    "5000 digits": "9" * 5000,
    "billion": "1000000000",
    "surrogate": "a\udcffb",
    "newline": "a\nb",
    "NUL": "a\0b",
    "long": LONG,
    "long name.yaml": LONG + ".yaml",
    "slashes": "/" * 5000,
    "missing": "nowhere/at/all",
    "device": "/dev/null/x",
    "folder": "/",
    "proc": "/proc/self/mem",
    "superscript": "²",
    "emoji": "🎈" * 300,
}
NO_WORK = {  # what makes each command complete, beside the value that is wrong
    "demo": [],
    "bench": ["SUITE", "--root", "ROOT", "--dry-run"],
    "report": ["ROOT"],
    "check": ["ROOT"],
    "tune": ["RECIPE"],
    "relate": ["RECIPE", "--prompts", "1", "--group", "2"],
    "normalize": ["RECIPE"],
    "ls": [],
    "show": ["experts"],
    "fit": ["RECIPE", "--samples", "0"],
    "sample": ["FAMILY", "hello", "--preference", "loud=1", "--max-new-tokens", "1"],
    "export": ["FAMILY", "--preference", "loud=1", "--out", "out"],
    "explain": ["FAMILY", "hello", "--preference", "loud=1", "--max-new-tokens", "1", "--samples", "0"],
}
NEVER_ARGV = {"surrogate", "thirty digits", "5000 digits", "nan", "inf", "1e400", "NUL"}
TEXT = {"word", "newline", "emoji", "negative", "zero", "superscript", "billion", "inf", "nan", "1e400", "thirty digits", "missing"}
TRUE_OF = {  # option or argument -> values with a meaning
    ("sample", "prompts"): {"*"},
    ("explain", "prompt"): {"*"},
    ("explain", "response"): {"*"},
    ("explain", "recipe"): {"*"},  # not read where nothing is measured
    ("relate", "results"): set(),
    **{(name, "seed"): {"zero", "billion", "negative", "thirty digits"} for name in NO_WORK},
    ("demo", "root"): {*TEXT, "folder", "long name.yaml"},
    ("sample", "temperature"): {"zero", "billion"},
    ("sample", "n"): set(),
    ("explain", "samples"): {"zero"},
    ("fit", "samples"): {"zero", "billion"},
}


def options() -> Iterator[Case]:
    for name, program in get_command(app).commands.items():  # type: ignore[attr-defined]
        if name not in NO_WORK:
            continue
        for parameter in program.params:
            if getattr(parameter, "is_flag", False) or parameter.name in ("install_completion", "show_completion", "help"):
                continue
            number = parameter.type_descriptor.annotation in (int, float)
            for label, value in ARGV.items():
                passes = TRUE_OF.get((name, parameter.name), {"billion", "zero"} if number else TEXT)
                flag = parameter.opts[0] if parameter.opts[0].startswith("-") else ""
                fine = (
                    ("*" in passes or label in passes)
                    and label != "surrogate"
                    and not (number and label in NEVER_ARGV and parameter.name != "seed")
                )
                yield Case(
                    "options", f"{name} {parameter.name} {label}", functools.partial(_option, name, parameter.name, flag, value), fine
                )


def _option(name: str, parameter: str, flag: str, value: str, folder: Path, where: Ground) -> Any:
    places = {"RECIPE": folder / "recipe.yaml", "SUITE": folder / "s.yaml", "ROOT": folder / "root", "FAMILY": where.family}
    write_recipe(folder, where.model)
    (folder / "s.yaml").write_text(
        "{name: s, tasks: [{name: exact-v1, alphabet: 4, width: 32}], learner: exact, methods: [experts], seeds: [1]}\n"
    )
    argv = [str(places.get(a, a)) for a in NO_WORK[name]]
    if flag:
        argv = [a for i, a in enumerate(argv) if a != flag and (i == 0 or argv[i - 1] != flag)] + [flag, value]
    else:
        order = [p.name for p in get_command(app).commands[name].params if not p.opts[0].startswith("-")]  # type: ignore[attr-defined]
        place = order.index(parameter)
        plain = [
            i
            for i, a in enumerate(argv)
            if not a.startswith("-") and (i == 0 or not argv[i - 1].startswith("--") or argv[i - 1] == "--dry-run")
        ]
        if place < len(plain):
            argv[plain[place]] = value
        else:
            argv.insert(len(plain), value)
        if value.startswith("-"):
            return CliRunner().invoke(app, [name, *[a for a in argv if a != value], "--", value])
    return command(name, *argv)


# ---- prompts


def prompt_files() -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tempdir = Path(tempfile.mkdtemp(prefix="paretune-bad-"))
    pq.write_table(pa.table({"prompt": [f"prompt {i}" for i in range(50)], "n": list(range(50))}), tempdir / "good.parquet")
    good = (tempdir / "good.parquet").read_bytes()
    shutil.rmtree(tempdir)
    rng = np.random.default_rng(0)
    for cut in (0, 1, 4, 8, 50, len(good) // 2, len(good) - 8, len(good) - 4, len(good) - 1):
        yield _prompts(f"parquet cut at {cut}", "p.parquet", good[:cut])
    for number in range(60):
        data = bytearray(good)
        for place in rng.integers(0, len(good), size=1 + number % 8):
            data[place] = int(rng.integers(256))
        yield _prompts(f"parquet damaged {number}", "p.parquet", bytes(data), may_pass=True)
    lines = {
        "duplicate key": b'{"prompt": "a", "prompt": "b"}',
        "deep": b'{"prompt": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "deep array": b"[" * 100_000,
        "surrogate": b'{"prompt": "a\\ud800"}',
        "surrogate column": b'{"prompt": "a", "x": "\\ud800"}',
        "surrogate key": b'{"prompt": "a", "\\ud800": "x"}',
        "surrogate role": b'{"prompt": [{"role": "\\ud800", "content": "a"}]}',
        "NUL": b'{"prompt": "a\\u0000b"}',
        "number": b'{"prompt": 3}',
        "true": b'{"prompt": true}',
        "null": b'{"prompt": null}',
        "1e400": b'{"prompt": "a", "x": 1e400}',
        "5000 digits": b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}",
        "NaN": b'{"prompt": "a", "x": NaN}',
        "long": json.dumps({"prompt": "a b c d " * 1_250_000}).encode(),
        "long word": json.dumps({"prompt": "a" * 2_000_000}).encode(),
        "no content": b'{"prompt": [{"role": "user"}]}',
        "content list": b'{"prompt": [{"role": "user", "content": ["a"]}]}',
        "empty messages": b'{"prompt": []}',
        "message is text": b'{"prompt": ["a"]}',
        "role list": b'{"prompt": [{"role": ["user"], "content": "x"}]}',
        "unknown role": b'{"prompt": [{"role": "wizard", "content": "x"}]}',
        "invalid UTF-8": b'{"prompt": "\xff"}',
        "trailing": b'{"prompt": "a"} x',
        "cr": b'{"prompt": "a"}\r{"prompt": "b"}',
        "integer keys": b'{1: "a"}',
    }
    meant = {"NUL", "unknown role", "surrogate column", "5000 digits"} - {"surrogate column", "5000 digits"}
    for label, line in lines.items():
        for suffix in ("jsonl", "json"):
            text = b'{"prompt": "first"}\n' + line + b"\n" if suffix == "jsonl" else b'[{"prompt": "first"},' + line + b"]"
            yield _prompts(f"{suffix} {label}", f"p.{suffix}", text, may_pass=label in meant)
    for label, data in {
        "NUL": b"prompt,x\na,\0\nb,c\n",
        "cr": b"prompt\ra\rb\r",
        "long field": b"prompt\n" + b"x" * 200_000 + b"\nb\n",
        "open quote": b'prompt\n"a\nb\n',
        "empty header": b"\n\n",
        "one column more": b"prompt\na,b\n",
        "messages": b'prompt\n"[{""role"": ""user""]"\nb\n',
        "python list": b"prompt\n\"[{'role': 'user', 'content': 'x'}]\"\nb\n",
        "utf-16": "prompt\na\nb\n".encode("utf-16"),
    }.items():
        yield _prompts(f"csv {label}", "p.csv", data, may_pass=label in ("NUL", "cr"))
    for label, make in {
        "folder": Path.mkdir,
        "FIFO": os.mkfifo,
        "link to itself": lambda p: p.symlink_to(p),
        "device": lambda p: p.symlink_to("/dev/zero"),
        "unreadable": lambda p: (p.touch(), p.chmod(0)),
    }.items():
        for name in ("p.jsonl", "p.csv", "p.json", "p.parquet"):
            yield Case("prompt files", f"{name} {label}", functools.partial(_special, name, make))


def _special(name: str, make: Callable[[Path], Any], folder: Path, where: Ground) -> Any:
    make(folder / name)
    return command("fit", write_recipe(folder, where.model, prompts=name), "--samples", 0)


def _prompts(label: str, name: str, data: bytes, *, may_pass: bool = False, **more: Any) -> Case:
    def run(folder: Path, where: Ground) -> Any:
        (folder / name).write_bytes(data)
        return command("fit", write_recipe(folder, where.model, prompts={"path": name, **more}), "--samples", 0)

    return Case("prompt files", label, run, may_pass)


# ---- chat templates, families, models


def models() -> Iterator[Case]:
    templates = {
        "raises": "{{ raise_exception('System role not supported') }}",
        "syntax": "{% if %}",
        "undefined": "{{ a.b.c }}",
        "divides": "{{ 1 / 0 }}",
        "attribute": "{{ messages[0].content.nothing.more }}",
        "sandbox": "{{ ''.__class__.__mro__ }}{{ messages.__class__.__init__.__globals__ }}",
        "empty": "",
        "huge": "{% for i in range(10**9) %}x{% endfor %}",
        "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    }
    for label, template in templates.items():
        yield Case("models", f"template {label}", functools.partial(_template, template))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        for label, data in {
            "empty": b"",
            "binary": bytes(range(256)),
            "list": b"[]",
            "text": b'"abc"',
            "null": b"null",
            "deep": b"[" * 100_000,
            "object": b"{}",
            "duplicate": b'{"model_type": "a", "model_type": "b"}',
            "NUL": b"\0" * 64,
        }.items():
            yield Case(
                "models",
                f"{file} {label}",
                functools.partial(_model, file, data),
                file in ("generation_config.json", "tokenizer_config.json"),
            )
    for key, value in itertools.product(
        (
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "max_position_embeddings",
            "eos_token_id",
            "model_type",
            "architectures",
            "num_attention_heads",
        ),
        (0, -1, "x", None, [], {}, 1e30, HUGE, True),
    ):
        passes = value is None or key in ("architectures", "max_position_embeddings") or (key == "eos_token_id")
        yield Case("models", f"config {key}={value!r}", functools.partial(_config, key, value), passes)


def _template(template: str, folder: Path, where: Ground) -> Any:
    own = shutil.copytree(where.model, folder / "own")
    (own / "chat_template.jinja").write_text(template)
    return command("fit", write_recipe(folder, own, prompts={"path": "prompts.jsonl", "chat": True, "system": "x"}), "--samples", 0)


def _model(file: str, data: bytes, folder: Path, where: Ground) -> Any:
    own = shutil.copytree(where.model, folder / "own")
    (own / file).write_bytes(data)
    return _loaded(folder, own)


def _config(key: str, value: Any, folder: Path, where: Ground) -> Any:
    own = shutil.copytree(where.model, folder / "own")
    (own / "config.json").write_text(json.dumps({**json.loads((own / "config.json").read_text()), key: value}))
    return _loaded(folder, own)


def _loaded(folder: Path, model: Path) -> Any:
    from paretune.runs.recipes.recipe import load_recipe

    return load_recipe(write_recipe(folder, model)).task.load()


def families() -> Iterator[Case]:
    for label, data in {
        "empty": b"",
        "list": b"[]",
        "text": b'"a"',
        "null": b"null",
        "number": b"3",
        "object": b"{}",
        "only format": b'{"format": 2}',
        "binary": bytes(range(256)),
        "deep": b"[" * 100_000,
        "format true": b'{"format": true}',
        "format list": b'{"format": [2]}',
        "duplicate": b'{"format": 2, "format": 2}',
        "NaN": b'{"format": NaN}',
    }.items():
        for program in ("sample", "explain", "export"):
            yield Case("families", f"{program} {label}", functools.partial(_family, program, data))
    for key in ("mixing", "rule", "objectives", "base", "adapters", "experts", "utility", "max_new_tokens", "meta"):
        for label, value in {
            "absent": ...,
            "null": None,
            "list": [],
            "text": "abc",
            "number": 3,
            "mapping": {"a": 1},
            "true": True,
            "nested": {"name": {"a": []}},
            "negative": -1,
            "list of lists": [[1], [2]],
        }.items():
            known = {
                "meta": {"mapping", "nested"},
                "experts": {"absent", "null"},
                "utility": {"absent", "null"},
                "max_new_tokens": {"number", "absent", "null"},
                "adapters": {"list"},
            }
            yield Case("families", f"{key} {label}", functools.partial(_entry, key, value), label in known.get(key, ()))
    for label, make in {"FIFO": os.mkfifo, "folder": Path.mkdir, "device": lambda p: p.symlink_to("/dev/zero")}.items():
        yield Case("families", f"family.json {label}", functools.partial(_family_file, make))
    for label, value in {
        "nothing": "",
        "negative": "loud=2,brief=-1",
        "nan": "loud=nan",
        "unknown": "x=1",
        "words": "loud=a",
        "surrogate": "loud=\udcff",
        "many": ",".join(["loud=.1"] * 999),
        "1e400": "loud=1e400",
        "long": LONG,
        "superscript": "loud=²",
    }.items():
        for program in ("sample", "explain", "export"):
            yield Case("preferences", f"{program} {label}", functools.partial(_preference, program, value))


def _family_argv(program: str, family: Path) -> list[Any]:
    more = {"sample": ["hi"], "explain": ["hi", "--samples", 0], "export": ["--out", "out"]}
    return [program, family, *more[program], "--preference", "loud=1"]


def _family(program: str, data: bytes, folder: Path, where: Ground) -> Any:
    own = shutil.copytree(where.family, folder / "own")
    (own / "family.json").write_bytes(data)
    return command(*_family_argv(program, own))


def _entry(key: str, value: Any, folder: Path, where: Ground) -> Any:
    card = json.loads((where.family / "family.json").read_text())
    card = {k: v for k, v in card.items() if k not in ("files", "sha256") and (k != key or value is not ...)}
    return _family("sample", json.dumps(card if value is ... else {**card, key: value}).encode(), folder, where)


def _family_file(make: Callable[[Path], Any], folder: Path, where: Ground) -> Any:
    own = shutil.copytree(where.family, folder / "own")
    (own / "family.json").unlink()
    make(own / "family.json")
    return command(*_family_argv("sample", own))


def _preference(program: str, value: str, folder: Path, where: Ground) -> Any:
    return command(*_family_argv(program, where.family)[:-1], value)


# ---- code of the user's own

CODE = {
    "exits 0": "import sys; sys.exit(0)",
    "exits": "raise SystemExit",
    "raises": "raise RuntimeError('no')",
    "syntax": "def f(:",
    "recursion": "def f(): return f()\nf()",
    "bytes": "\x00",
    "empty message": "raise ValueError",
    "odd message": "raise ValueError('\\ud800')",
    "bad repr": "class E(Exception):\n    def __str__(self): raise KeyError('x')\nraise E",
    "base": "class E(BaseException): pass\nraise E('x')",
    "memory": "raise MemoryError",
    "generator exit": "raise GeneratorExit",
    "os": "open('/nowhere/at/all')",
    "import": "import nothing_of_that_name",
}
RETURNS = {
    "short": "[1.0]",
    "none": "None",
    "text": "'abc'",
    "a set": "{1.0}",
    "a mapping": "{'a': 1}",
    "endless": "iter(lambda: 1.0, None)",
    "inf": "[float('inf')] * len(completions)",
    "huge": "[10**400] * len(completions)",
    "complex": "[1j] * len(completions)",
    "texts": "['1'] * len(completions)",
    "lists": "[[1.0]] * len(completions)",
    "the function": "f",
    "bytes": "[b'1'] * len(completions)",
    "nested": "[[[]]] * len(completions)",
    "objects": "[object()] * len(completions)",
    "raising generator": "(1 / 0 for _ in completions)",
    "exiting generator": "(exit(0) for _ in completions)",
    "bad float": "[type('F', (), {'__float__': lambda s: 1 / 0})()] * len(completions)",
    "exiting float": "[type('F', (), {'__float__': lambda s: exit(0)})()] * len(completions)",
    "bad len": "type('L', (), {'__len__': lambda s: -1, '__iter__': lambda s: iter([])})()",
    "huge len": "range(10**12)",
    "bad repr": "[type('R', (), {'__repr__': lambda s: 1 / 0})()] * len(completions)",
    "None in all": "[None] * len(completions)",
}


def code() -> Iterator[Case]:
    for label, text in CODE.items():
        body = text.replace("\n", "\n    ")
        for program in ("ls", "bench", "fit", "show"):
            yield Case("plugins", f"{program} {label}", functools.partial(_plugin, program, text))
        yield Case(
            "reward files", label, functools.partial(_reward_file, text + "\ndef f(completions, **k): return [0.0] * len(completions)\n")
        )
        yield Case("reward functions", label, functools.partial(_score, f"def f(completions, **k):\n    {body}\n"), label in ("syntax",))
    for label, text in RETURNS.items():
        yield Case("reward values", label, functools.partial(_score, f"def f(completions, **k): return {text}\n"), label == "None in all")
    for label, text in {
        "no arguments": "def f(): return []",
        "a class": "class f: pass",
        "a number": "f = 3",
        "positional": "def f(a, b, c, /): return []",
        "keyword": "def f(*, nothing): return []",
        "async": "async def f(**k): return []",
        "signature": "class F:\n    __signature__ = 3\n    def __call__(self, **k): return []\nf = F()",
        "getattr": "def __getattr__(name): raise SystemExit(0)",
    }.items():
        yield Case("reward files", label, functools.partial(_reward_file, text + "\n"), label in ("signature", "no arguments", "async"))
    for label, name in {
        "NUL": "a\0.py",
        "long": LONG + ".py",
        "folder": ".",
        "surrogate": "a\udcff.py",
        "empty": "",
        "json": "x.json",
        "newline": "a\nb.py",
    }.items():
        yield Case("plugins", f"path {label}", functools.partial(_plugin_path, name))


def _plugin(program: str, text: str, folder: Path, where: Ground) -> Any:
    (folder / "mine.py").write_text(text, errors="surrogatepass")
    argv = {
        "ls": ["ls"],
        "show": ["show", "experts"],
        "bench": ["bench", "quick", "--dry-run"],
        "fit": ["fit", write_recipe(folder, where.model), "--samples", 0],
    }
    return command(*argv[program], "--plugin", folder / "mine.py")


def _plugin_path(name: str, folder: Path, where: Ground) -> Any:
    return command("ls", "--plugin", name)


def _reward_file(text: str, folder: Path, where: Ground) -> Any:
    (folder / "r.py").write_text(text, errors="surrogatepass")
    objectives = [{"name": "own", "use": "r.py:f", "low": 0, "high": 1}, {"use": "length"}]
    return command("fit", write_recipe(folder, where.model, objectives=objectives), "--samples", 0)


def _score(text: str, folder: Path, where: Ground) -> Any:
    from paretune.objectives.base import score_all
    from paretune.objectives.functions import load_function
    from paretune.types import Prompt

    (folder / "r.py").write_text(text, errors="surrogatepass")
    function = load_function(f"{folder / 'r.py'}:f")
    return score_all([("own", function)], [Prompt(text="a"), Prompt(text="b")], ["x", "y"])


# ---- calls from Python


def calls() -> Iterator[Case]:
    from paretune.types import Preference

    for label, value in {
        **VALUES,
        "one": [1.0],
        "texts": ["a", "b"],
        "nan list": [math.nan, 1.0],
        "true list": [True, False],
        "mapping of texts": {"a": "x"},
        "wrong names": {"c": 1.0},
        "huge list": [HUGE, -HUGE],
        "none list": [None, 1.0],
        "sum 2": [1.0, 1.0],
        "nested": {"a": [1.0]},
    }.items():
        yield Case("calls", f"Preference.of {label}", lambda *_, value=value: Preference.of(("a", "b"), value))
    for label, value in VALUES.items():
        if value is not None:
            for key in ("workers", "executor", "root", "task", "method", "learner", "seed"):
                fine = (
                    (key == "root" and label in ("a word",))
                    or (key == "seed" and label in ("-1", "0"))
                    or (key in ("executor", "workers") and label == "0" and key == "workers")
                )
                yield Case("calls", f"fit {key}={label}", functools.partial(_fit, key, value), fine)
            yield Case("calls", f"run_suite {label}", functools.partial(_run_suite, value))
            yield Case(
                "calls",
                f"Family.sample prompts {label}",
                functools.partial(_sample, {"prompts": value}),
                label in ("empty", "a word", "list", "NUL"),  # as in files of prompts
            )
            for key in ("n", "seed", "max_new_tokens", "temperature"):
                fine = (key in ("seed",) and label in ("-1", "0")) or (key == "temperature" and label in ("0", "half", "1e300"))
                yield Case("calls", f"Family.sample {key}={label}", functools.partial(_sample, {key: value}), fine)


def _fit(key: str, value: Any, folder: Path, where: Ground) -> Any:
    from paretune.runs.suite import Schedule, fit

    given = {
        "task": {"name": "exact-v1", "alphabet": 4, "width": 32},
        "method": "experts",
        "learner": "exact",
        "root": folder / "r",
        "workers": 0,
        "seed": 0,
    }
    given[key] = value
    real, Schedule.run = Schedule.run, lambda *_: (_ for _ in ()).throw(Accepted())  # type: ignore[method-assign]
    try:
        return fit(given.pop("task"), given.pop("method"), **given, progress=False)
    finally:
        Schedule.run = real  # type: ignore[method-assign]


def _run_suite(value: Any, folder: Path, where: Ground) -> Any:
    from paretune.runs.suite import run_suite

    return run_suite(value, folder / "r", dry_run=True)


@functools.cache
def _family_of(path: Path) -> Any:
    from paretune.policy.family import Family

    return Family.load(path)


def _sample(given: dict[str, Any], folder: Path, where: Ground) -> Any:
    made = {"prompts": ["hello"], "max_new_tokens": 1, **given}
    return _family_of(where.family).sample(made.pop("prompts"), "loud=1", **made)


# ---- all of them


def cases() -> list[Case]:
    made = (registered(), recipes(), suites(), options(), prompt_files(), models(), families(), code(), calls())
    return list(itertools.chain(*made))


def share(count: int, *, seed: int = 0) -> list[Case]:
    """A seeded share, of every kind alike."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[Case]] = {}
    for case in cases():
        kinds.setdefault(case.kind, []).append(case)
    each = math.ceil(count / len(kinds))
    return [group[i] for group in kinds.values() for i in sorted(rng.permutation(len(group))[:each])]


def main(asked: list[str]) -> int:
    count = next((int(text) for text in asked if text.isdecimal()), None)
    kinds = [text for text in asked if not text.isdecimal()]
    chosen = [case for case in (share(count) if count else cases()) if not kinds or any(k in f"{case.kind}: {case.name}" for k in kinds)]
    folder = Path(tempfile.mkdtemp(prefix="paretune-bad-"))
    os.environ.setdefault("PARETUNE_CACHE", str(folder / "cache"))
    where = ground(folder)
    ends: dict[int, tuple[str, str]] = {}
    shards = [list(range(worker, len(chosen), WORKERS)) for worker in range(WORKERS)]
    files = [folder / f"worker-{worker}" for worker in range(WORKERS)]
    running = [_worker(chosen, shard, where, file) for shard, file in zip(shards, files, strict=True)]
    for worker, shard in enumerate(shards):
        while True:
            os.waitpid(running[worker], 0)
            ends |= {number: (how, text) for number, how, text in map(json.loads, files[worker].read_text().splitlines())}
            left = [i for i in shard if i not in ends]
            if not left:
                break
            ends[left[0]] = ("hang", "the process had to be ended")  # it died in this one
            running[worker] = _worker(chosen, left[1:], where, files[worker])
    counts: dict[str, collections.Counter[str]] = {}
    for i, case in enumerate(chosen):
        how, text = ends[i]
        counts.setdefault(case.kind, collections.Counter())[how] += 1
        if how != GOOD:
            print(f"--- {how}: {case.kind}: {case.name}\n{text}")
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    print(f"\n{'kind':20}" + "".join(f"{name:>11}" for name in (GOOD, *WRONG)))
    for kind, found in [*counts.items(), ("all", total)]:
        print(f"{kind:20}" + "".join(f"{found[name]:11}" for name in (GOOD, *WRONG)))
    shutil.rmtree(folder, ignore_errors=True)
    return int(any(total[name] for name in WRONG))


def _worker(chosen: list[Case], numbers: list[int], where: Ground, file: Path) -> int:
    """A forked process that judges these cases, a line of the file each; one that does not come back to Python ends it."""
    if child := os.fork():
        return child
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    with contextlib.suppress(BaseException), file.open("a") as out:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        for number in numbers:
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
            out.write(json.dumps([number, *verdict(chosen[number], where)]) + "\n")
            out.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
