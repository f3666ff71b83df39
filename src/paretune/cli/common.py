"""What the commands share: the application, common options, and how things are printed (tables to stdout, all else to stderr)."""

from __future__ import annotations

import codecs
import contextlib
import errno
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from paretune.errors import CONTROLS, ConfigError, ParetuneError, StoreError, first_line, printable, raised_by, refuse_exit, shown
from paretune.files import is_disk_full
from paretune.progress import Heartbeat, spoken
from paretune.registry import not_plain

if TYPE_CHECKING:
    from paretune.report.tables import Table
    from paretune.runs.executors.ray import Ray

__all__ = [
    *("DryRun", "Json", "OnDevice", "Overrides", "Plugins", "Preference", "Trust", "Workers"),
    *("app", "check_writable", "device_of", "examples", "on_ray", "plug", "print_json", "say", "show_legend", "show_table"),
    *("takes_any_text", "tell"),
]


PATIENT = ("serve", "chat", "elicit")  # commands that wait for a person: no line says so every half minute


class _Group(TyperGroup):
    """Turns what a person can meet into one message on stderr and an exit code; anything else keeps its traceback."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each with its first sentence, whole."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, (one.help or "").split("\n\n")[0].split(". ")[0]) for name, one in self.commands.items()])

    def invoke(self, ctx: Any) -> Any:
        name = next(iter((*ctx._protected_args, *ctx.args)), "paretune")
        speaking = contextlib.nullcontext() if name in PATIENT else Heartbeat(name)
        try:
            with _readable(), refuse_exit(), speaking:
                for text in (*ctx._protected_args, *ctx.args):
                    if wrong := not_plain(text):
                        raise ConfigError(f"an argument {wrong}", found=shown(text), remedy="write it again, in UTF-8")
                return super().invoke(ctx)
        except ParetuneError as error:
            if isinstance(error.__cause__, SystemExit) and isinstance(error.__cause__.__context__, BrokenPipeError):
                raise typer.Exit(1) from None  # whoever read our table has seen enough
            say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            if not str(stop):  # with a message, whoever stopped the work has shown it
                say("stopped; finished work and checkpoints are kept: the same command goes on from there")
            raise typer.Exit(130) from None


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Errors of the system for which no command has words of its own: paths and texts that it refuses, nesting, memory."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        found = f"{'' if error.filename is None else shown(str(error.filename)) + ': '}{error.strerror or error}"
        kind, rule = StoreError if is_disk_full(error) else ConfigError, "files that a command names can be read and written"
        raise kind(rule, found=found, remedy="check the path, its permissions and its disk") from error
    except UnicodeError as error:
        remedy = "write it again, in UTF-8"
        raise ConfigError("text can be written as UTF-8", found=shown(str(error)), remedy=remedy) from error
    except (RecursionError, MemoryError, OverflowError) as error:
        found, remedy = raised_by(error), "ask for less at once, or give the machine more memory"
        raise ParetuneError("what a command reads and makes fits into memory", found=found, remedy=remedy) from error


app = typer.Typer(
    name="paretune",
    cls=_Group,
    help="Train, combine and measure language-model policies under several objectives.",
    epilog="Exit codes: 0 done, 1 something failed while it ran, 2 a mistake in the request, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: no boxes in a pipe or a narrow terminal, and flags without a type
)


def examples(*lines: str) -> dict[str, Any]:
    """For `app.command`: what stands below a command's help."""
    return {"epilog": "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])}


def _version(asked: bool) -> None:
    if asked:
        from paretune import __version__

        typer.echo(f"paretune {__version__}")
        raise typer.Exit


@app.callback()
def start(version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False) -> None:
    """What comes before any command."""


Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of a table.")]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file that registers methods, tasks or objectives.")]
Workers = Annotated[int | None, typer.Option(min=1, max=1024, help="Worker processes of one thread each. Default: one per CPU.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it would cost.")]
OnDevice = Annotated[str, typer.Option("--device", help="As in a learner: auto (the first GPU, or the CPU), cpu, cuda:1, mps.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run code, and call services, that the family names; read them before.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the file: learner.lr=1e-3.", metavar="[KEY=VALUE]...")]

Preference = Annotated[str, typer.Option(help="Weights that sum to 1: a=.7,b=.3; an objective left out has 0.")]

# Of `--executor ray` only: the fields of `Ray`, as `on_ray` gives them to a command.
RAY: dict[str, Any] = {
    "address": Annotated[str | None, typer.Option(help="Ray: local, auto, host:port or ray://host:port. Default: RAY_ADDRESS, or local.")],
    "cpus_per_job": Annotated[int | None, typer.Option(min=1, help="Ray: CPUs, and threads, of one training or cell. Default: 1.")],
    "gpus_per_job": Annotated[float | None, typer.Option(min=0, help="Ray: GPUs of one training or cell; 0.5 shares one. Default: 0.")],
    "memory_per_job": Annotated[float | None, typer.Option(min=0, help="Ray: GiB of memory that one job needs. Default: not asked for.")],
    "wait": Annotated[float | None, typer.Option(min=0, help="Ray: seconds to wait for a machine on which a job fits. Default: 0.")],
    "pass_env": Annotated[list[str] | None, typer.Option(metavar="NAME", help="Ray: an environment variable that workers get, too.")],
}


def on_ray(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of Ray: its `executor` becomes what `run_suite` and `fit` take."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        ray = {name: value for name in RAY if (value := given.pop(name)) not in (None, [])}
        command(**{**given, "executor": _executor(given["executor"], ray)})

    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind) for name, kind in RAY.items()]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    with_options.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return with_options


def _executor(executor: str, given: dict[str, Any]) -> str | Ray:
    from paretune.runs.executors.ray import Ray

    if executor == "ray":
        env = tuple(given.pop("pass_env", ()))
        return Ray(**given, env=env)
    if given:
        raise ConfigError(
            "options of Ray go with its executor",
            found=f"--{next(iter(given)).replace('_', '-')} with --executor {executor}",
            remedy="add --executor ray, or leave it out",
        )
    if executor != "local":
        from paretune.runs.suite import check_executor

        check_executor(executor)  # here, because a fit that is done already would not look
    return executor


def plug(plugins: list[Path] | None) -> None:
    """Load the files given with --plugin."""
    from paretune.registry import load_plugin

    for path in plugins or []:
        load_plugin(path)


def device_of(asked: str) -> str:
    """The device that --device names; ConfigError where it is none, or not here."""
    import torch

    from paretune.registry import checked
    from paretune.tasks.base import first_device
    from paretune.types import Device

    name = checked("--device", Device, asked)
    name = first_device() if name == "auto" else name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        found = f"{name}: {first_line(error)}"
        raise ConfigError("a model runs on a device that is here", found=found, remedy="--device auto takes what there is") from error
    return name


def check_writable(file: Path | None, option: str) -> None:
    """ConfigError where a file that is written at the end of long work could not be; None is no file."""
    if file is None:
        return
    place = file if file.exists() and not file.is_file() else file.parent  # a file is replaced, which needs its folder
    if file.is_dir() or not file.parent.is_dir() or not os.access(place, os.W_OK):
        found = f"{file} is a directory" if file.is_dir() else f"cannot write {file}"
        remedy = f"give {option} a file in a folder that exists and is yours"
        raise ConfigError("what is written at the end can be written", found=found, remedy=remedy)


def show_table(table: Table, *, title: str = "") -> None:
    """Print a table to stdout, for a person."""
    from paretune.report.terminal import console, print_table

    to = console()
    print_table(table, to, title=title)
    to.print()


def show_legend(*tables: Table) -> None:
    """One line for every column that is shown and has a help, to stdout."""
    for line in dict.fromkeys(f"  {' '.join(c.title.split())}: {c.help}" for table in tables for c in table.shown if c.help):
        tell(line)


def print_json(value: Any) -> None:
    """Print strict JSON to stdout; what a terminal would obey, or stdout cannot hold, is escaped as JSON escapes it."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=not takes_any_text(sys.stdout), default=str)
    typer.echo(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def takes_any_text(stream: Any) -> bool:
    """Whether every character can be written there: the encoding is one of Unicode's."""
    return codecs.lookup(stream.encoding or "utf-8").name.startswith("utf")


def tell(text: str) -> None:
    """Print a text that others may have written to stdout."""
    typer.echo(printable(text))


def say(text: str) -> None:
    """Print one line to stderr."""
    print(printable(text), file=sys.stderr, flush=True)
    spoken()
