"""`paretune ls` and `paretune show`: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from paretune.cli.common import Json, Plugins, app, plug, print_json, show_table

__all__ = ["list_", "show"]


@app.command("ls")
def list_(
    kind: Annotated[str | None, typer.Argument(help="methods, tasks, objectives, learners or suites; all of them if left out.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List what there is: methods (the taxonomy), tasks, objectives, learners, suites."""
    from paretune.report.catalog import KINDS, catalog

    plug(plugin)
    tables = {name: catalog(name) for name in ([kind] if kind else KINDS)}
    if as_json:
        print_json(tables[kind].to_json() if kind else {name: table.to_json() for name, table in tables.items()})
        return
    for name, table in tables.items():
        show_table(table, title="" if kind else name)


@app.command()
def show(name: Annotated[str, typer.Argument(help="As `paretune ls` prints it.")], plugin: Plugins = None, as_json: Json = False) -> None:
    """Show one method, task, objective, learner or suite: its card, its fields and their defaults."""
    from paretune.report.catalog import describe_name

    plug(plugin)
    found = describe_name(name)
    if as_json:
        print_json(found)
        return
    for thing in found:
        _print_description(thing)


def _print_description(thing: dict[str, Any]) -> None:
    from paretune.report.tables import Column, Table

    typer.echo(f"{thing['kind']} {thing['name']}" + (f" (version {thing['version']})" if "version" in thing else ""))
    typer.echo(f"\n{thing['about']}\n")
    if "text" in thing:
        typer.echo(thing["text"])
    for key, value in (thing.get("card") or {}).items():
        typer.echo(f"  {key.replace('_', ' ') + ':':20}{'yes' if value is True else 'no' if value is False else value}")
    if thing.get("fields"):
        keys = ("name", "type", "default", "about")
        show_table(Table("fields", tuple(Column(key, key, "text") for key in keys), thing["fields"]), title="fields")
