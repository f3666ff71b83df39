"""What the commands share: the application, common options, and how things are printed (tables to stdout, all else to stderr)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from paretune.errors import ParetuneError

if TYPE_CHECKING:
    from paretune.report.tables import Table

__all__ = ["Json", "Overrides", "Plugins", "Workers", "app", "plug", "print_json", "say", "show_table"]


class _Group(TyperGroup):
    """Turns what a person can meet into one message on stderr and an exit code; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ParetuneError as error:
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            if not str(stop):  # with a message, whoever stopped the work has shown it
                say("stopped; finished work and checkpoints are kept: the same command goes on from there")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="paretune",
    cls=_Group,
    help="Train, combine and measure language-model policies under several objectives.",
    epilog="Exit codes: 0 done, 1 something failed while it ran, 2 a mistake in the request, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of a table.")]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file that registers methods, tasks or objectives.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes of one thread each. Default: one per CPU.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the file: learner.steps=20.", metavar="[KEY=VALUE]...")]


def plug(plugins: list[Path] | None) -> None:
    """Load the files given with --plugin."""
    from paretune.registry import load_plugin

    for path in plugins or []:
        load_plugin(path)


def show_table(table: Table, *, title: str = "") -> None:
    """Print a table to stdout, for a person."""
    from paretune.report.terminal import console, print_table

    to = console()
    print_table(table, to, title=title)
    to.print()


def print_json(value: Any) -> None:
    """Print strict JSON to stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=str))


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)
