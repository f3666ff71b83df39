"""`paretune explain`: which expert moved each token of a response, and what each weight does to each return."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import Json, Plugins, app, check_writable, plug, print_json, say, show_table

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.tasks.base import Task

__all__ = ["explain"]


@app.command()
def explain(
    family: Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote.")],
    prompt: Annotated[str, typer.Argument(help="One prompt.")],
    preference: Annotated[str, typer.Option(help="Weights that sum to 1: a=.7,b=.3; an objective left out has 0.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Sampled responses to explain.")] = 1,
    response: Annotated[str | None, typer.Option(help="Explain this response instead of a sampled one.")] = None,
    seed: Annotated[int, typer.Option(help="As for `paretune sample`: the same responses.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: as in training.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with colored tokens to this file.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The family's recipe: needed to measure returns of your own model.")] = None,
    split: Annotated[str, typer.Option(help="Prompts on which returns are measured: train or test.")] = "train",
    samples: Annotated[int, typer.Option(min=0, help="Responses per preference to measure returns with; 0 does not measure.")] = 256,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Which expert moved each token, and how each return answers to each weight."""
    from paretune.evaluation.explain import explain as explain_family
    from paretune.evaluation.explain import sensitivity
    from paretune.policy.family import Family
    from paretune.report.page import sensitivity_table, token_table, write_explanation

    plug(plugin)
    check_writable(html, "--html")
    loaded = Family.load(family)
    found = explain_family(loaded, prompt, preference, n=n, response=response, seed=seed, max_new_tokens=max_new_tokens)
    task = _task(loaded, recipe) if samples else None
    slopes = sensitivity(task, loaded, preference, split=_split(split), samples=samples, seed=seed) if task else None
    if html is not None:
        write_explanation(html, found, slopes, family=loaded)
        say(f"wrote {html}")
    if as_json:
        print_json({"explanations": [each.to_json() for each in found], "sensitivity": slopes.to_json() if slopes else None})
        return
    for each in found:
        show_table(
            token_table(each), title=f"{each.response!r}: nats by which each part raised each token above the reference ({each.how})"
        )
    if slopes:
        show_table(sensitivity_table(slopes), title=f"Slope of each return towards each objective, {split} prompts")
    elif samples:
        say("returns were not measured: give --recipe, the file that the family was fitted from")


def _task(family: Family, recipe: Path | None) -> Task | None:
    """The task that can score responses: named in the family, or of the recipe."""
    from paretune.errors import ConfigError
    from paretune.registry import TASKS
    from paretune.runs.recipe import load_recipe

    if recipe is None:
        return TASKS.build(family.base["task"]) if "task" in family.base else None
    task: Any = load_recipe(recipe, []).task
    if task.objectives.names != family.objectives.names:
        raise ConfigError(
            "a family is measured by the objectives that it was fitted for",
            found=f"{', '.join(task.objectives.names)} in {recipe.name}, {', '.join(family.objectives.names)} in the family",
            remedy="give the recipe that the family was fitted from",
        )
    return task


def _split(split: str) -> str:
    from paretune.errors import ConfigError

    if split not in ("train", "test"):
        raise ConfigError("--split is train or test", found=repr(split), remedy="train prompts are the default")
    return split
