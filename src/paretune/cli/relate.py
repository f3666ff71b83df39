"""`paretune relate`: how the objectives of a task or a recipe relate, before anything is trained, and what that asks for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import Json, Plugins, app, plug, print_json, say, show_table

if TYPE_CHECKING:
    from paretune.evaluation.advice import Advice
    from paretune.evaluation.relations import Relations
    from paretune.tasks.base import Task

__all__ = ["relate"]


@app.command()
def relate(
    target: Annotated[str, typer.Argument(help="A task, such as exact-v1, or a recipe's YAML file.", metavar="TASK|RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dials, or changes to the recipe: rho=-0.8.", metavar="[KEY=VALUE]...")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also compare the objectives' gradients.")] = False,
    probe_steps: Annotated[
        int, typer.Option(min=0, help="Steps at equal weights before the probe; 0: LoRA's B is 0, only it has one.")
    ] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts to sample, where responses cannot be enumerated.")] = 16,
    group: Annotated[int, typer.Option(min=2, help="Responses per prompt there; below 10 there are no intervals.")] = 16,
    budget: Annotated[int | None, typer.Option(min=1, help="Advice only on methods of at most this many samples.")] = None,
    results: Annotated[Path | None, typer.Option(help="What advice is read from. Default: the results that Paretune ships.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write relations.json, figures/*.svg and tables/*.csv into this folder.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same responses.")] = 0,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """How objectives relate, before you pay for training: correlation, scale, sparsity, conflict, and which methods fit."""
    from paretune.evaluation import probe as probing
    from paretune.evaluation.relations import relate as measure
    from paretune.report.relate import gradient_table, objective_table, pair_table, to_json, write_relations

    plug(plugin)
    task, learner = _target(target, overrides or [])
    rows = _rows(results)
    found = measure(task, prompts=prompts, group=group, seed=seed)
    looked = probing.probe(task, steps=probe_steps, learner=learner, seed=seed) if probe or probe_steps else None
    advice = _advice(task, found, rows, budget, source=results)
    written = write_relations(out, found, looked, advice) if out is not None else []
    if as_json:
        print_json(to_json(found, looked, advice))
    else:
        drawn = "every response" if found.exact else f"{found.samples} responses"
        show_table(objective_table(found), title=f"{target}: {drawn} of the reference to {len(found.prompts)} training prompts")
        show_table(pair_table(found), title="Pairs: correlations, and what one gains while the other gains 1")
        if looked is not None:
            place = (
                f"after {looked.steps} steps at equal weights" if looked.steps else "at initialization, of LoRA's B alone (A has none yet)"
            )
            show_table(gradient_table(looked), title=f"Gradients {place}")
        for line in [*_warnings(found), *map(str, advice)]:
            typer.echo(f"• {line}")
    for path in written:
        say(f"wrote {path}")


def _target(target: str, overrides: list[str]) -> tuple[Task, Any]:
    """The task, and a recipe's learner where it is the embedded one."""
    from paretune.errors import ConfigError
    from paretune.registry import TASKS
    from paretune.runs.config import Document
    from paretune.runs.recipe import load_recipe
    from paretune.training.policy_gradient import PolicyGradient

    name, *more = target.split() or [""]
    if Path(target).suffix.lower() in (".yaml", ".yml") or Path(target).is_file():
        recipe = load_recipe(target, overrides)
        return recipe.task, recipe.learner if isinstance(recipe.learner, PolicyGradient) else None
    if name == "recipe":
        raise ConfigError("a recipe is given by its file", found="the task 'recipe'", remedy="paretune relate RECIPE.yaml")
    document = Document(data={"name": name}, name="the command line")
    for text in [*more, *overrides]:
        document.override(text)
    return TASKS.build(document.data), None


def _rows(results: Path | None) -> list[dict[str, Any]]:
    from paretune.evaluation.advice import load_rows, shipped

    path = results or shipped()
    return load_rows(path) if path is not None else []


def _advice(task: Task, found: Relations, rows: list[dict[str, Any]], budget: int | None, *, source: Path | None) -> list[Advice]:
    """By the dials that the task declares (they were verified), else by what was measured."""
    import dataclasses

    from paretune.evaluation.advice import DIALS, advise

    declared = {name: getattr(task, name) for name in DIALS if hasattr(task, name)}
    dials = declared if len(declared) == len(DIALS) else found.dials
    said = advise(dials, rows, budget=budget)
    return [dataclasses.replace(one, source=str(source)) for one in said] if source is not None else said


def _warnings(found: Relations) -> list[str]:
    """What a reader should know before the advice: unknown is said, not shown as 0."""
    said = [
        f"{one['name']} gave every response the same score: nothing can be learned from it, and its correlations are unknown."
        for one in found.objectives
        if one["constant"]
    ]
    for pair in found.pairs:
        if pair["known_prompts"] < len(found.prompts):
            names = " and ".join(pair["objectives"])
            said.append(
                f"{names}: at {len(found.prompts) - pair['known_prompts']} of {len(found.prompts)} prompts one of them never varied; "
                "the correlation is over the others."
            )
    return said
