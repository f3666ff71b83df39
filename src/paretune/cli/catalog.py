"""`paretune ls` and `paretune show`: what there is, and the taxonomy of methods."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from paretune.cli.common import Json, Plugins, app, examples, plug, print_json, say, show_table, tell
from paretune.cli.places import families_table, runs_table
from paretune.errors import ConfigError, nearest
from paretune.policy.card import CATALOG
from paretune.registry import LEARNERS, METHODS, OBJECTIVES, PLUGIN_REMEDY, TASKS, Registry, loaded_plugins
from paretune.report.tables import Column, Table
from paretune.runs.config import load

__all__ = ["CATALOG", "KINDS", "catalog", "describe_name", "fields_of", "list_", "made_catalog", "show", "suite_path", "taxonomy"]


@app.command("ls", **examples("paretune ls methods", "paretune ls runs", "paretune ls runs paretune-runs/quick", "paretune ls families"))
def list_(
    kind: Annotated[
        str | None, typer.Argument(help="methods, tasks, objectives, learners, suites (all of these if left out), runs or families.")
    ] = None,
    root: Annotated[
        Path | None, typer.Argument(help="Of runs and families: a run directory, or a folder with some. Default: here.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List what there is: methods (the taxonomy), tasks, objectives, learners, suites; or what was run here, and its families."""
    plug(plugin)
    if kind in PLACES:
        tables = {kind: PLACES[kind](root or Path())}
    elif root is not None:
        raise ConfigError("a folder goes with runs or families", found=f"{kind} {root}", remedy="leave the folder out")
    else:
        tables = {name: catalog(name) for name in ([kind] if kind else KINDS)}
    if as_json:
        print_json(tables[kind].to_json() if kind else {name: table.to_json() for name, table in tables.items()})
        return
    for name, table in tables.items():
        wanted = SHORT.get(name, [column.key for column in table.columns])
        shown = Table(name, tuple(column for column in table.columns if column.key in wanted), table.rows)
        if name in PLACES and not table.rows:
            say(f"no {name} in {root or 'this folder'}, nor in the folders below it")
        elif name in PLACES and sys.stdout.isatty() and get_terminal_size().columns < WIDE:
            for row in table.rows:
                first, *others = (f"{column.title} {column.show(row.get(column.key))}" for column in table.shown)
                tell(f"{first.partition(' ')[2]}\n    {', '.join(others)}")
        else:
            show_table(shown, title="" if kind else name)


@app.command(**examples("paretune show bridge", "paretune show pg", "paretune show quick"))
def show(name: Annotated[str, typer.Argument(help="As `paretune ls` prints it.")], plugin: Plugins = None, as_json: Json = False) -> None:
    """Show one method, task, objective, learner or suite: its card, its fields and their defaults."""
    plug(plugin)
    found = describe_name(name)
    if as_json:
        print_json(found)
        return
    for thing in found:
        _print_description(thing)


def _print_description(thing: dict[str, Any]) -> None:
    typer.echo(f"{thing['kind']} {thing['name']}" + (f" (version {thing['version']})" if "version" in thing else ""))
    typer.echo(f"\n{thing['about']}\n")
    if "text" in thing:
        typer.echo(thing["text"])
    for key, value in (thing.get("card") or {}).items():
        typer.echo(f"  {key.replace('_', ' ') + ':':20}{'yes' if value is True else 'no' if value is False else value}")
    if thing.get("fields"):
        keys = ("name", "type", "default", "about")
        show_table(Table("fields", tuple(Column(key, key, "text") for key in keys), thing["fields"]), title="fields")


REGISTRIES: dict[str, Registry] = {"methods": METHODS, "tasks": TASKS, "objectives": OBJECTIVES, "learners": LEARNERS}
KINDS = (*REGISTRIES, "suites")
PLACES = {"runs": runs_table, "families": families_table}  # what lies in folders
SHORT = {"methods": ("name", "summary")}  # the columns that a person is shown, where `show` and --json have more
WIDE = 100  # columns of a terminal, below which what lies in folders is listed in lines
COMMENT = re.compile(r"^\s+(\w+)\s*:[^#]*#\s*(.+)$")

SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
BOUNDED = re.compile(r"\b(Count|Natural|Positive|Amount|Share|Fraction)\b")  # of `paretune.types`


def catalog(kind: str) -> Table:
    """One row per name of a kind; methods with what their cards say."""
    if kind not in KINDS:
        raise ConfigError("`paretune ls` lists one kind of thing", found=repr(kind), remedy=nearest(kind, (*KINDS, *PLACES)))
    if kind == "methods":
        return taxonomy()
    if kind == "suites":
        said = {name: str(load(path).data.get("about", "")) for name, path in _suites().items()}
    elif shipped := _shipped():
        said = {name: _first_sentence(one["about"]) for name, one in shipped[kind].items()}
    else:
        said = {name: _first_sentence(inspect.cleandoc(REGISTRIES[kind][name].__doc__ or "")) for name in REGISTRIES[kind]}
    columns = (Column("name", "name", "text"), Column("summary", "what it is", "text"))
    return Table(kind, columns, [{"name": name, "summary": summary} for name, summary in said.items()])


def _shipped() -> dict[str, dict[str, dict[str, Any]]] | None:
    """Kind -> name -> what `describe_name` says; None where a plugin may have added to it, or the classes are in memory anyway."""
    if "paretune.methods.base" in sys.modules or loaded_plugins() or entry_points(group="paretune.plugins"):
        return None
    return {kind: _read_catalog()[kind] for kind in REGISTRIES}


@cache
def _read_catalog() -> dict[str, dict[str, Any]]:
    return json.loads((files("paretune") / CATALOG).read_text(encoding="utf-8"))


def made_catalog() -> dict[str, dict[str, Any]]:
    """The content of CATALOG, from the classes themselves; of mixings, why one that only has single weights at an expert has no others."""
    from paretune.policy.base import MIXINGS, Policy

    found = {name: cls for name in MIXINGS if getattr(cls := MIXINGS[name], "single_weights", None) is Policy.single_weights}
    many = {name: getattr(cls, "why_many", "") for name, cls in found.items()}
    return {**{kind: {name: _described(kind, name) for name in registry} for kind, registry in REGISTRIES.items()}, "mixtures": many}


def _described(kind: str, name: str) -> dict[str, Any]:
    cls: Any = REGISTRIES[kind][name]
    card = dataclasses.asdict(cls.card) if hasattr(cls, "card") else None
    about = inspect.cleandoc(cls.__doc__ or "")
    return {"kind": kind[:-1], "name": name, "version": cls.version, "about": about, "card": card, "fields": list(fields_of(cls))}


def taxonomy() -> Table:
    """The methods by family, from their cards."""
    columns = (
        Column("name", "method", "text"),
        Column("category", "category", "text"),
        Column("summary", "what it does", "text"),
        Column("trainings", "trainings", "text"),
        Column("forwards_per_token", "forwards per token", "text"),
        Column("zero_shot", "a new preference is free", "yes"),
        Column("source", "source", "text"),
    )
    shipped = _shipped()
    cards: dict[str, dict[str, Any]] = (
        {name: one["card"] for name, one in shipped["methods"].items()}
        if shipped
        else {name: dataclasses.asdict(METHODS[name].card) for name in METHODS}  # type: ignore[attr-defined]
    )
    order = {family: place for place, family in enumerate(("single-policy", "multi-policy", "meta-policy", "baseline"))}
    names = sorted(cards, key=lambda name: (order.get(cards[name]["category"], len(order)), name))
    return Table("methods", columns, [{"name": name, **{c.key: cards[name][c.key] for c in columns[1:]}} for name in names])


def describe_name(name: str) -> list[dict[str, Any]]:
    """Everything called `name`: {"kind", "name", "version", "about", "card", "fields": [{"name", "type", "default", "about"}]}."""
    shipped = _shipped() or {}
    found = [things[name] for things in shipped.values() if name in things]
    found = found or [_described(kind, name) for kind, registry in REGISTRIES.items() if name not in _suites() and name in list(registry)]
    suites = _suites()
    if name in suites:
        text = suites[name].read_text(encoding="utf-8")
        found.append({"kind": "suite", "name": name, "about": load(suites[name]).data.get("about", ""), "text": text})
    if not found:
        known = {n for registry in REGISTRIES.values() for n in registry} | set(suites)
        raise ConfigError(
            "`paretune show` takes the name of something that exists", found=repr(name), remedy=nearest(name, known) + PLUGIN_REMEDY
        )
    return found


def suite_path(given: str) -> Path:
    """A suite's file: the one that is there, or the one of that name that ships with Paretune."""
    path = Path(given)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        load(path)  # refused here, before anything large is imported
        return path
    shipped = _suites()
    if given not in shipped:
        rule = "a suite is a YAML file, or the name of one that ships with Paretune"
        raise ConfigError(rule, found=given, remedy=nearest(given, shipped))
    return shipped[given]


def _suites() -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path(str(files("paretune") / "suites")).glob("*.yaml"))}


def _first_sentence(about: str) -> str:
    return re.split(r"(?<=\S\.)\s", " ".join(about.split("\n\n")[0].split()))[0].rstrip(".")


def _bounds(name: re.Match[str]) -> str:
    """The type and its bounds: "int ≥ 1"."""
    from paretune import types

    kind, field = typing.get_args(getattr(types, name[0]))
    return f"{kind.__name__} " + " ".join(
        f"{SIGNS[key]} {value}" for bound in field.metadata for key, value in dataclasses.asdict(bound).items()
    )


def _told(cls: type, field: str) -> str:
    """What a docstring says in the form "field: what it is."."""
    text = " ".join((cls.__doc__ or "").split())
    found = re.search(rf"(?<![\w`]){field}: (.+?)(?=\. |\.?$)", text)
    return found[1] if found else ""


def fields_of(cls: type) -> Iterator[dict[str, Any]]:
    """The hyperparameters; what is said of each is the comment beside it in the source, or the class's docstring."""
    said: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner) or "__annotations__" in vars(owner):
            with suppress(OSError, TypeError):  # a class without source
                said |= {match[1]: match[2].strip() for line in inspect.getsource(owner).splitlines() if (match := COMMENT.match(line))}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.init:
            kind = BOUNDED.sub(_bounds, field.type) if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
            made = repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"
            default = made if field.default is dataclasses.MISSING else repr(field.default)
            yield {"name": field.name, "type": kind, "default": default, "about": said.get(field.name) or _told(cls, field.name)}
