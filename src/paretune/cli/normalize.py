"""`paretune normalize`: the mean and standard deviation of a recipe's reward models, with where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import Json, Overrides, Plugins, app, plug, print_json, say
from paretune.errors import ConfigError

if TYPE_CHECKING:
    from paretune.tasks.recipe import RecipeTask
    from paretune.types import Prompt

__all__ = ["normalize"]


@app.command()
def normalize(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with objectives that use: reward-model.")],
    overrides: Overrides = None,
    column: Annotated[str | None, typer.Option(help="Score the texts of this column of the prompts, for example reply.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Without --column: responses of the untrained model per prompt.")] = 4,
    limit: Annotated[int, typer.Option(min=1, help="Use the first training prompts only.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Measure what `normalize:` of a reward model needs: the mean and deviation of its scores, on training prompts."""
    from paretune.objectives.models import RewardModel, measure
    from paretune.runs.recipe import load_recipe

    plug(plugin)
    task = load_recipe(recipe, overrides or []).task
    chosen = {name: objective for name, objective in task.scorers if isinstance(objective, RewardModel)}
    if not chosen:
        raise ConfigError(
            "`paretune normalize` measures objectives that use: reward-model",
            found=f"none in {recipe.name}: {', '.join(task.objectives.names)}",
            remedy="other objectives state their range themselves",
        )
    prompts, texts = _texts(task, column, samples, limit, seed)
    digest = task.prompt_source.content()["train"]
    source = f"{len(prompts)} {'texts of column ' + column if column else 'responses of the untrained model'}, prompts {digest[:8]}"
    found = {}
    for name, objective in chosen.items():
        say(f"scoring {len(texts)} texts with {objective.model}")
        found[name] = measure(objective, prompts, texts, source=source)
    if as_json:
        print_json(found)
        return
    for name, numbers in found.items():
        typer.echo(f'{name}: normalize: {{mean: {numbers["mean"]}, std: {numbers["std"]}, from: "{numbers["from"]}"}}')


def _texts(task: RecipeTask, column: str | None, samples: int, limit: int, seed: int) -> tuple[list[Prompt], list[str]]:
    """A completion for each of the prompts, which repeat where there are several."""
    prompts: list[Prompt] = list(task.prompts("train"))[:limit]
    if column is not None:
        missing = [n for n, prompt in enumerate(prompts) if not isinstance(prompt.columns.get(column), str)]
        if missing:
            raise ConfigError(
                f"every prompt has a text in the column {column!r}",
                found=f"prompt {missing[0]} has {', '.join(prompts[missing[0]].columns) or 'no columns'}",
                remedy="name another column, or leave --column out to score responses of the untrained model",
            )
        return prompts, [str(prompt.columns[column]) for prompt in prompts]
    from paretune.registry import LEARNERS, METHODS

    reference: Any = METHODS.build("reference")
    family = reference.policy(task, LEARNERS.build("pg"), {}, seed)
    even = [1 / task.objectives.count] * task.objectives.count
    say(f"sampling {samples} responses to each of {len(prompts)} prompts")
    made = family.sample(prompts, even, n=samples, seed=seed)
    pairs = [(prompt, text) for prompt, several in zip(prompts, made, strict=True) for text in several]
    return [prompt for prompt, _ in pairs], [text for _, text in pairs]
