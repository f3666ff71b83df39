"""`paretune fit`, `sample`, `export` and `explain`: a policy family from your own model, and what it says, exports and answers for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import (
    Json,
    Overrides,
    Plugins,
    Preference,
    Trust,
    app,
    check_writable,
    on_ray,
    plug,
    print_json,
    say,
    show_table,
    tell,
)
from paretune.errors import ConfigError
from paretune.policy.card import read_card

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.report.tables import Table
    from paretune.runs.recipe import Recipe
    from paretune.tasks.base import Task

__all__ = ["explain", "export", "fit", "sample"]

System = Annotated[str | None, typer.Option(help="A system message in place of the training's; '' is none.")]
Raw = Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the chat template.")]
Base = Annotated[str | None, typer.Option("--model", help="Where the family's reference model is now, if it has moved.")]


@app.command()
@on_ray
def fit(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, prompts, objectives, method, learner.")],
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Worker processes; 0 trains in this one.")] = 0,
    executor: Annotated[str, typer.Option(help="local: as --workers says; ray: a Ray cluster.")] = "local",
    samples: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Responses per preference to measure the result with; 0 does not measure.")
    ] = 32,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Fit one method to your model, prompts and objectives; the result is a policy family on disk."""
    from paretune.runs.recipe import load_recipe

    plug(plugin)
    plan = load_recipe(recipe, overrides or [])
    from paretune.policy.family import Family
    from paretune.runs.suite import fit as fit_family

    folder = plan.root / "families" / _family_name(plan)
    if (folder / "family.json").is_file():
        say(f"this family was fitted before: {folder}")
        family = Family.load(folder, trust=plan.task.trust_remote_code)
    else:
        for reason, count in plan.task.prompt_source.left_out.items():
            say(f"prompts left out, {reason}: {count}")
        who = None if executor == "local" else executor  # then --workers decides
        given: dict[str, Any] = {"root": plan.root, "seed": plan.seed, "workers": workers, "executor": who}
        family = fit_family(plan.task, plan.method, learner=plan.learner, drawn=samples * _policies(plan), **given)
        family.save(folder)
    rows = _measure(plan, family, samples, folder) if samples else None
    if as_json:
        print_json({"family": str(folder), "objectives": list(family.objectives.names), "measured": rows.to_json() if rows else None})
        return
    if rows:
        for text in family.meta.get("warnings", {}).values():
            say(f"while it trained: {text}")
        show_table(rows, title=f"Mean scores on {len(plan.task.prompts('test'))} test prompts ({samples} responses per preference)")
    example = _even_weights(family.objectives.names)
    typer.echo(f'{folder}\ntry it: paretune sample {shlex.quote(str(folder))} --preference {shlex.quote(example)} "your prompt"')


@app.command()
def sample(
    family: Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote.")],
    preference: Preference,
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", metavar="PROMPT...")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts from a file: its column prompt, or messages (conversations).")] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Responses per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: as in training.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    system: System = None,
    raw: Raw = False,
    trust: Trust = False,
    model: Base = None,
    as_json: Json = False,
) -> None:
    """Sample responses from a policy family at one preference."""
    read_card(family)
    from paretune.policy.family import Family
    from paretune.tasks.prompts import read_requests

    asked: list[Any] = [*(prompts or ()), *(read_requests(file) if file else ())]
    if not asked:
        raise ConfigError("there is a prompt to answer", found="no PROMPT and no --file", remedy='add "your prompt"')
    loaded = Family.load(family, trust=trust, model=model)
    settings: dict[str, Any] = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens, "temperature": temperature}
    made = loaded.sample(asked, preference, system=system, raw=raw, **settings)
    if as_json:
        print_json([{"prompt": prompt, "responses": texts} for prompt, texts in zip(asked, made, strict=True)])
        return
    for prompt, texts in zip(asked, made, strict=True):
        shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        for text in texts:
            tell(text if len(asked) == 1 else f"{shown}\n  {text}")


@app.command()
def export(
    family: Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote.")],
    preference: Preference,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    kind: Annotated[str, typer.Option("--as", help="merged: a whole model; adapter: one plain LoRA for the base model.")] = "merged",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the weights are.")] = None,
    trust: Trust = False,
    model: Base = None,
    as_json: Json = False,
) -> None:
    """Write the policy at one preference as a model or adapter that transformers, PEFT and vLLM load."""
    read_card(family)
    from paretune.policy.family import Family
    from paretune.serve.export import export as write

    made = write(Family.load(family, trust=trust, model=model), out, preference, kind=kind, dtype=dtype, results=family)
    if as_json:
        print_json(made.to_json())
        return
    limit = made.to_json()["max_lora_rank"]
    served = f"; vLLM: --max-lora-rank {limit}" if limit else "; too high for vLLM, which wants it merged" if made.rank else ""
    tell(f"{made.path}: {made.kind}, {made.dtype}" + (f", rank {made.rank}" if made.rank else "") + served)
    typer.echo(f"how to load it: {made.path / 'README.md'}")


@app.command()
def explain(
    family: Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote.")],
    prompt: Annotated[str, typer.Argument(help="One prompt; a conversation is the JSON of its messages.")],
    preference: Preference,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Sampled responses to explain.")] = 1,
    response: Annotated[str | None, typer.Option(help="Explain this response instead of a sampled one.")] = None,
    seed: Annotated[int, typer.Option(help="As for `paretune sample`: the same responses.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: as in training.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with colored tokens to this file.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The family's recipe: needed to measure returns of your own model.")] = None,
    split: Annotated[str, typer.Option(help="Prompts on which returns are measured: train or test.")] = "train",
    samples: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Responses per preference to measure returns with; 0 does not measure.")
    ] = 256,
    system: System = None,
    raw: Raw = False,
    trust: Trust = False,
    model: Base = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Which expert moved each token, and how each return answers to each weight."""
    read_card(family)
    from paretune.evaluation.explain import explain as explain_family
    from paretune.evaluation.explain import sensitivity
    from paretune.policy.family import Family
    from paretune.report.page import sensitivity_table, token_table, write_explanation

    plug(plugin)
    check_writable(html, "--html")
    loaded = Family.load(family, trust=trust, scoring=recipe is None, model=model)
    settings: dict[str, Any] = {"n": n, "response": response, "seed": seed, "max_new_tokens": max_new_tokens}
    found = explain_family(loaded, prompt, preference, system=system, raw=raw, **settings)
    task = _task(loaded, recipe, trust) if samples else None
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


def _family_name(plan: Recipe) -> str:
    """The same recipe names the same family."""
    from paretune.registry import describe
    from paretune.types import key_of

    method = describe(plan.method)
    key = key_of({"task": describe(plan.task), "method": method, "learner": describe(plan.learner), "seed": plan.seed})
    return f"{method['name']}-{key[:8]}"


def _measure(plan: Recipe, family: Family, samples: int, folder: Path) -> Table:
    """Mean scores and KL on test prompts, at the recipe's preferences, or for each objective alone and for all alike.

    They are written into the family's folder too, for the cards of its exports.
    """
    import json

    import numpy as np

    from paretune.evaluation.evaluate import evaluate
    from paretune.evaluation.metrics import plain
    from paretune.files import disk_errors, sealed, write_json
    from paretune.methods.search import simplex_lattice
    from paretune.report.tables import Column, Table
    from paretune.serve.model_card import MEASURED

    count, names = family.objectives.count, family.objectives.names
    if plan.preferences is None:
        w_WM = np.concatenate([np.eye(count), np.full((1, count), 1 / count)])
        labels = [*(f"{name} only" for name in names), "all alike"]
    else:
        w_WM = simplex_lattice(count, plan.preferences) if isinstance(plan.preferences, int) else np.array(plan.preferences)
        labels = [", ".join(f"{name}={w:.2g}" for name, w in zip(names, w_M, strict=True)) for w_M in w_WM]
    say(f"measuring {len(w_WM)} preferences, {samples} responses each")
    measured = evaluate(plan.task, family, w_WM=w_WM, splits=("test",), samples=samples, seed=plan.seed).metrics["splits"]["test"]
    with disk_errors(folder, "a family"):
        about = {"split": "test", "samples": samples, "preferences": w_WM.tolist(), "measured": plain(measured)}
        write_json(folder / MEASURED, sealed(json.loads(json.dumps(about))))
    guards = measured.get("guards", {})
    shown = [*(Column(name, name) for name in names), *(Column(name, f"{name} (guard)") for name in guards), Column("kl", "KL")]
    columns = (Column("preference", "preference", "text"), *shown)
    start = dict(zip(names, measured["reference"]["rewards"], strict=True)) | {name: each["reference"] for name, each in guards.items()}
    rows: list[dict[str, Any]] = [{"preference": "the untrained model", **start, "kl": 0.0}]
    for w, (label, rewards_M, kl) in enumerate(zip(labels, measured["rewards"], measured["kl"]["per_preference"], strict=True)):
        guarded = {name: each["per_preference"][w] for name, each in guards.items()}
        rows.append({"preference": label, **dict(zip(names, rewards_M, strict=True)), **guarded, "kl": kl})
    return Table("measured", columns, rows)


def _policies(plan: Recipe) -> int:
    """How many policies `_measure` draws responses of: at each preference, and the untrained model."""
    count, asked = len(plan.task.objectives.names), plan.preferences
    if asked is None:
        return count + 2
    return 1 + (comb(asked + count - 2, count - 1) if isinstance(asked, int) else len(asked))


def _even_weights(names: Sequence[str]) -> str:
    """`a=.34,b=.33,c=.33`: nearly even, in hundredths, and exactly 1 in sum, so that it can be typed as it stands."""
    even = 100 // len(names)
    return ",".join(f"{name}={(even if k else 100 - even * (len(names) - 1)) / 100:g}" for k, name in enumerate(names))


def _task(family: Family, recipe: Path | None, trust: bool) -> Task | None:
    """The task that can score responses: named in the family, or of the recipe."""
    from paretune.policy.family import task_of
    from paretune.runs.recipe import load_recipe

    if recipe is None:
        return task_of(family.base, trust=trust)
    task: Any = load_recipe(recipe, []).task
    if task.objectives.names != family.objectives.names:
        raise ConfigError(
            "a family is measured by the objectives that it was fitted for",
            found=f"{', '.join(task.objectives.names)} in {recipe.name}, {', '.join(family.objectives.names)} in the family",
            remedy="give the recipe that the family was fitted from",
        )
    return task


def _split(split: str) -> str:
    if split not in ("train", "test"):
        raise ConfigError("--split is train or test", found=repr(split), remedy="train prompts are the default")
    return split
