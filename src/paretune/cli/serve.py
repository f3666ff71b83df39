"""`paretune serve`: families over HTTP, with the preference in each request."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import OnDevice, Plugins, Trust, app, device_of, examples, plug, say
from paretune.cli.places import find_family
from paretune.errors import ConfigError
from paretune.policy.card import read_card

if TYPE_CHECKING:
    from paretune.tasks.base import Task

__all__ = ["serve"]

Base = Annotated[str | None, typer.Option("--model", help="Where the families' reference model is now, if it has moved.")]
ENGINES = ("embedded", "vllm")
# Options that vLLM does not have, or has under other names.
EMBEDDED = ("max_queue", "playground", "chunk", "prefix_cache", "max_body", "drain", "trust", "recipe", "device")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command(**examples("paretune serve FAMILY", "paretune serve FAMILY OTHER --port 9000 --api-key MY_KEY --max-rows 32"))
def serve(
    family: Annotated[list[Path], typer.Argument(help="Directories that `paretune fit` wrote; one base model is loaded once.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="The environment variable with the key that clients send.")
    ] = None,
    default: Annotated[str | None, typer.Option(help="The preference of requests without one: a=.7,b=.3. Default: even weights.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, max=4096, help="Responses that are decoded at a time.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, max=100_000, help="Responses that may wait; beyond them, status 429.")] = 256,
    chunk: Annotated[int, typer.Option(min=1, max=65536, help="Tokens of a long prompt that are read between two tokens.")] = 128,
    prefix_cache: Annotated[int, typer.Option(min=0, max=2**20, help="MiB for prompts that others begin with; 0 keeps none.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, max=2**30, help="KiB of a request.")] = 4096,
    drain: Annotated[int, typer.Option(min=0, max=86_400, help="Seconds that responses have to end after SIGTERM.")] = 60,
    recipe: Annotated[
        list[Path] | None, typer.Option(help="A family's recipe: its rewards make questions to a preference. May be given again.")
    ] = None,
    playground: Annotated[
        bool | None, typer.Option("--playground/--no-playground", help="A page at /playground. Default: where Gradio is installed.")
    ] = None,
    device: OnDevice = "auto",
    engine: Annotated[str, typer.Option(help="embedded: every mixing; vllm: vLLM's own server, for soups of LoRAs.")] = "embedded",
    vllm_args: Annotated[str, typer.Option(help="More arguments of `vllm serve`, as one text.")] = "",
    context: typer.Context = None,  # type: ignore[assignment]
    trust: Trust = False,
    model: Base = None,
    plugin: Plugins = None,
) -> None:
    """Serve families over HTTP, as the OpenAI API has it, with a preference in every request."""
    family = [find_family(path) for path in family]
    for path in family:
        read_card(path)
    key = _key(api_key)
    plug(plugin)
    _check_engine(engine, vllm_args, context)
    if engine == "vllm":
        from paretune.serve.vllm import launch

        settings: dict[str, Any] = {"host": host, "port": port, "rows": max_rows, "default": default, "key": key, "model": model}
        argv, variables = launch.command(family, version=launch.installed(), **settings, more=shlex.split(vllm_args))
        os.execve(argv[0], argv, {**os.environ, **variables})
    playground = _with_playground(playground)
    place, tasks = device_of(device), _tasks(recipe or [], family)
    try:
        from paretune.serve import app as server
    except ImportError as error:
        remedy = "pip install 'paretune[serve]'"
        raise ConfigError("serving needs the packages of the extra `serve`", found=str(error), remedy=remedy) from error
    from paretune.serve.engine import Engine

    models = server.load_families(family, default=default, trust=trust, model=model, device=place, tasks=tasks)
    decoder = Engine(
        {name: served.family for name, served in models.items()},
        rows=max_rows,
        queue=max_queue,
        chunk=chunk,
        prefix_bytes=prefix_cache * 2**20,
    )
    pages = dict(zip(models, family, strict=True))
    if key is None and host not in LOOPBACK:
        say(f"warning: everybody who reaches {host} may use this server; --api-key asks for a key")
    server.serve(
        models,
        decoder,
        host=host,
        port=port,
        key=key,
        limits=server.Limits(body=max_body * 1024, drain=drain),
        ready=lambda url: say(
            ("" if not playground else f"the playground is {url}/playground/\n") + f"serving {', '.join(models)} at {url}/v1"
        ),
        more=partial(_play, pages) if playground else lambda app: None,
    )
    say("stopped; every response that was begun has ended or was dropped after --drain")


def _with_playground(asked: bool | None) -> bool:
    """Whether there is a playground; ConfigError where one is asked for and Gradio is not installed."""
    able = find_spec("gradio") is not None
    if asked and not able:
        remedy = "pip install 'paretune[playground]', or leave --playground out"
        raise ConfigError("the playground needs the packages of the extra `playground`", found="no gradio", remedy=remedy)
    return able if asked is None else asked


def _play(pages: dict[str, Path], app: Any) -> None:
    from paretune.report.playground import mount

    mount(app, pages)


def _tasks(recipes: Sequence[Path], families: Sequence[Path]) -> list[Task]:
    """The tasks of the recipes; ConfigError for one that has the objectives of none of the families."""
    if not recipes:
        return []
    from paretune.runs.recipes.recipe import load_recipe

    served = {tuple(read_card(path)["objectives"]["names"]) for path in families}
    tasks: list[Task] = []
    for recipe in recipes:
        task: Any = load_recipe(recipe, []).task
        if task.objectives.names not in served:
            found = f"{', '.join(task.objectives.names)} in {recipe.name}"
            remedy = "give the recipe that a family was fitted from"
            raise ConfigError("a recipe has the objectives of a family that is served", found=found, remedy=remedy)
        tasks.append(task)
    return tasks


def _check_engine(engine: str, vllm_args: str, context: typer.Context) -> None:
    """The engine is one of two, and is given no option of the other's."""
    if engine not in ENGINES:
        raise ConfigError(f"an engine is one of {', '.join(ENGINES)}", found=repr(engine), remedy="leave --engine out for the embedded one")
    if engine == "embedded" and vllm_args:
        raise ConfigError("--vllm-args are vLLM's", found="--engine embedded", remedy="add --engine vllm")
    given = [name for name in EMBEDDED if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"]
    if engine == "vllm" and given:
        found = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError("vLLM has options of its own", found=found, remedy='leave it out, or see --vllm-args "..."')


def _key(variable: str | None) -> str | None:
    """The key that clients send, from the environment: a command line is seen by others."""
    if variable is None:
        return None
    key = os.environ.get(variable, "") if variable and "=" not in variable and "\0" not in variable else ""
    if not key.strip():
        raise ConfigError(
            "--api-key names an environment variable that holds the key",
            found="no such variable, or an empty one",
            remedy="export PARETUNE_KEY=..., then --api-key PARETUNE_KEY",
        )
    return key.strip()
