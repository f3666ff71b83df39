"""`paretune relate` and `normalize`: what the objectives of a task or a recipe are like, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import Json, Overrides, Plugins, app, examples, plug, print_json, say, show_legend, show_table, tell
from paretune.errors import ConfigError

if TYPE_CHECKING:
    from paretune.evaluation.advice import Advice
    from paretune.evaluation.relations import Relations
    from paretune.tasks.base import Task
    from paretune.tasks.recipe import RecipeTask
    from paretune.types import Prompt

__all__ = ["normalize", "relate"]


@app.command(
    **examples(
        "paretune relate exact-v1 rho=-0.8", "paretune relate recipe.yaml --prompts 32 --probe", "paretune relate recipe.yaml --out related"
    )
)
def relate(
    target: Annotated[str, typer.Argument(help="A task, such as exact-v1, or a recipe's YAML file.", metavar="TASK|RECIPE")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dials, or changes to the recipe: rho=-0.8.", metavar="[KEY=VALUE]...")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also compare the objectives' gradients.")] = False,
    probe_steps: Annotated[
        int, typer.Option(min=0, max=10_000, help="Steps at equal weights before the probe; 0: LoRA's B is 0, only it has one.")
    ] = 0,
    prompts: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Training prompts to sample, where responses cannot be enumerated.")
    ] = 16,
    group: Annotated[int, typer.Option(min=2, max=100_000, help="Responses per prompt there; below 10 there are no intervals.")] = 16,
    budget: Annotated[int | None, typer.Option(min=1, help="Advice only on methods of at most this many samples.")] = None,
    results: Annotated[Path | None, typer.Option(help="What advice is read from. Default: the results that Paretune ships.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write relations.json, figures/*.svg and tables/*.csv into this folder.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same responses.")] = 0,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """How objectives relate, before you pay for training: correlation, scale, sparsity, conflict, and which methods fit."""
    plug(plugin)
    task, learner = _target(target, overrides or [])
    from paretune.evaluation import relations
    from paretune.report.relate import gradient_table, objective_table, pair_table, to_json, write_relations

    rows = _rows(results)
    found = relations.relate(task, prompts=prompts, group=group, seed=seed)
    looked = relations.probe(task, steps=probe_steps, learner=learner, seed=seed) if probe or probe_steps else None
    advice = _advice(task, found, rows, budget, source=results)
    written = write_relations(out, found, looked, advice) if out is not None else []
    if as_json:
        print_json(to_json(found, looked, advice))
    else:
        drawn = "every response" if found.exact else f"{found.samples} responses"
        tables = [objective_table(found), pair_table(found)]
        show_table(tables[0], title=f"{target}: {drawn} of the reference to {len(found.prompts)} training prompts")
        show_table(tables[1], title="Pairs: correlations, and what one gains while the other gains 1")
        if looked is not None:
            place = (
                f"after {looked.steps} steps at equal weights" if looked.steps else "at initialization, of LoRA's B alone (A has none yet)"
            )
            tables.append(gradient_table(looked))
            show_table(tables[-1], title=f"Gradients {place}")
        show_legend(*tables)
        measure = [f"To know for yours: paretune compare {target} --methods experts,bridge,conditioned"] if Path(target).is_file() else []
        for line in [*_warnings(found), *map(str, advice), *measure]:
            tell(f"• {line}")
    for path in written:
        say(f"wrote {path}")


@app.command(**examples("paretune normalize recipe.yaml --column reply", "paretune normalize recipe.yaml --samples 8"))
def normalize(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with objectives that use: reward-model.")],
    overrides: Overrides = None,
    column: Annotated[str | None, typer.Option(help="Score the texts of this column of the prompts, for example reply.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Without --column: responses of the untrained model per prompt.")] = 4,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Use the first training prompts only.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Measure what `normalize:` of a reward model needs: the mean and deviation of its scores, on training prompts."""
    from paretune.objectives.models import RewardModel, measure
    from paretune.runs.recipes.recipe import load_recipe

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
        tell(f'{name}: normalize: {{mean: {numbers["mean"]}, std: {numbers["std"]}, from: "{numbers["from"]}"}}')


def _target(target: str, overrides: list[str]) -> tuple[Task, Any]:
    """The task, and a recipe's learner where it is the embedded one."""
    from paretune.registry import TASKS
    from paretune.runs.config import Document
    from paretune.runs.recipes.recipe import load_recipe

    name, *more = target.split() or [""]
    if Path(target).suffix.lower() in (".yaml", ".yml") or Path(target).is_file():
        recipe = load_recipe(target, overrides)
        from paretune.training.learners.policy_gradient import PolicyGradient

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
